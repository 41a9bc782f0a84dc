"""`python -m aerie` is the command line."""

from aerie.cli import main

main()
