"""`python -m mole`."""

from .cli import main

main()
