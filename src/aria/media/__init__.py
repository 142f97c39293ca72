"""Load images, video clips and documents as RGB arrays: permissions, limits, fetching and decoding.

Nothing in this package imports PyTorch at module level, so that the decoding worker processes start quickly and stay
small.
"""
