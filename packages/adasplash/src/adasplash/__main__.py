"""`python -m adasplash` is the command line."""

from .cli import main

main()
