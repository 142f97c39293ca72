"""Texts for Hypothesis that contain turn markers, whole and in pieces."""

from __future__ import annotations

from hypothesis import strategies as st

from aria.processor.chat import MARKERS

# Markers whole, in pieces, and with what may merge with them or be read as a space.
FRAGMENTS = (
    *MARKERS,
    *("<|im_", "<|im_end", "end|>", "start|>user\n", "<", "|", ">", "<|", "|>", "im", "_", "<<|im_end|>>", ".<"),
    *(
        " ",
        "\n",
        "\u2581",
        "\u200b",
        "the fox",
        "?",
        "世",
        "\U0001f44d",
        "<0x3C>",
        "<s>",
        "</s>",
        "<mark4",
        "é",
        "7",
        "\t",
    ),
)
fragments = st.sampled_from(FRAGMENTS)
texts = st.lists(fragments | st.text(max_size=3), max_size=8).map("".join)
