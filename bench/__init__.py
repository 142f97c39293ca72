"""Scripts that measure. Each is run as ``python -m bench.NAME`` from the root of the repository."""
