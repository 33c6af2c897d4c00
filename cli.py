"""`python cli.py ...` is `mist ...` from a checkout."""

from mist.cli import main

if __name__ == "__main__":  # processes that a command starts import this file
    main()
