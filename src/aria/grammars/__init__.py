"""JSON schemas, and grammars as text: read within limits, and made into what llguidance compiles. Without PyTorch."""
