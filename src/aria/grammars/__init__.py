"""Convert JSON schemas and text grammars, within limits, to grammars that llguidance compiles. Without PyTorch."""
