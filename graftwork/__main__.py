"""`python -m graftwork ...` is the `graftwork` command."""

from graftwork.cli import main

main()
