"""Images, clips and documents from anywhere -> RGB arrays: where they may come from, what they may cost, decoding.

Nothing here imports PyTorch, so that the processes which decode start quickly and stay small.
"""
