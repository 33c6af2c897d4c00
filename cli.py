"""`python cli.py ...` is `mist ...` from a checkout."""

from mist.cli import main

main()
