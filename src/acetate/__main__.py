"""Runs the command `acetate` as `python -m acetate`."""

from acetate.cli import main

main()
