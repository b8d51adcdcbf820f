"""`python -m tracequant`."""

from tracequant.cli import main

main()
