"""`python -m perfusion`: the command `perfusion` of this Python, where the other one is not on the path."""

from perfusion.cli import main

main()
