"""Training: `recipe` describes a run, `run` assembles and runs it, `trainer` is the loop."""
