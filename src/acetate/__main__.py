"""`python -m acetate` is `acetate`."""

from acetate.cli import main

main()
