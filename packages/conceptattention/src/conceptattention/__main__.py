"""Run the command line with `python -m conceptattention`."""

from .cli import main

main()
