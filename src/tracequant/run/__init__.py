"""Run directories: what was asked, what is finished, and the stages that work on them."""
