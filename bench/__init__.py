"""Benchmarks. Run each as ``python -m bench.NAME`` from the root of the repository; README.md lists them."""
