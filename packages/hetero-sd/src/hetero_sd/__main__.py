"""`python -m hetero_sd`."""

from .cli import main

if __name__ == "__main__":
    main()
