"""``python -m aria.cli``: runs ``aria``, for launchers such as ``torchrun`` that take a module."""

from aria.cli import main

main()
