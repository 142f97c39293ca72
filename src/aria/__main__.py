"""``python -m aria``: the program ``aria``."""

from aria.cli import main

main()
