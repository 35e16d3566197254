"""`python -m lfmc`."""

from lfmc.cli import main

main()
