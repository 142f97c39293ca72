"""Fuzz targets for everything that parses untrusted input: one module each in `targets`, run by `tests.fuzz.run`.

A target module has ``fuzz(data)``, which raises only where something is wrong, and ``seeds()``, which makes inputs to
start from. It may have ``WORDS``, which are put into inputs; ``LONGEST``, bytes of an input; and ``MEMORY``, bytes that
an input may take. `corpus` holds inputs that once found a fault.
"""
