"""The targets, a module each; see `tests.fuzz`."""
