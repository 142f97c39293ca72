"""``python -m aria.cli``: the program ``aria``, for launchers such as ``torchrun`` that take a module."""

from aria.cli import main

main()
