"""`python -m tracequant`."""

from tracequant.cli.app import main

main()
