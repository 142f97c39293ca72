"""The nano recipe: draws its own pictures, trains the packaged small Aria on them and measures it."""
