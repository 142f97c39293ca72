"""Tokenize markers in message text as plain text: to ids that differ from the control tokens of the template."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise

from aria.processor.chat import Prompt

_SPACE = "\u2581"  # the space symbol of SentencePiece


class MarkerSpeller:
    """Encodes text between images. Markers are control tokens only where the template wrote them.

    Args:
        encode: Encodes a text, with all markers as control tokens.
        token_bytes: The UTF-8 bytes that an id contributes to the decoded text.
        byte_ids: The ids of byte pieces for some bytes; None if the vocabulary has no byte pieces.
        normalize: SentencePiece's text normalization.
        markers: All markers, longest first.
        special: Ids that plain text must never have.
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        token_bytes: Callable[[int], bytes],
        byte_ids: Callable[[bytes], list[int] | None],
        normalize: Callable[[str], str],
        markers: Sequence[str],
        special: frozenset[int],
    ):
        self._encode, self._token_bytes, self._byte_ids, self._normalize = encode, token_bytes, byte_ids, normalize
        self._markers, self._special = markers, special
        self._spellings: dict[str, list[int]] = {}

    def encode(self, segment: Prompt) -> list[int]:
        """Encode a prompt without image slots.

        Raises:
            ValueError: A marker in text that the vocabulary can only encode as control tokens.
        """
        segment = self._normalized(segment)
        text = str(segment)
        ids: list[int] = []
        done = 0
        for start, marker in sorted(segment.literal_markers(self._markers)):
            if start >= done:  # otherwise it overlaps one that is already encoded
                ids += self._encode(text[done:start]) + self._spelled(marker)
                done = start + len(marker)
        return ids + self._encode(text[done:])

    def _spelled(self, marker: str) -> list[int]:
        """Encode a marker as text: ids that decode to it but differ from its control tokens in any context.

        A marker of several pieces is split inside a piece, since splitting between two would change nothing.
        """
        if marker not in self._spellings:
            usual = self._encode(marker)
            self._spellings[marker] = next((ids for ids in self._other_spellings(marker, usual) if ids != usual), [])
        if not self._spellings[marker]:
            raise ValueError(
                f"text holds {marker}, which this vocabulary can only encode as a control token; remove it, or use a "
                "vocabulary with byte pieces"
            )
        return self._spellings[marker]

    def _other_spellings(self, marker: str, usual: Sequence[int]) -> Iterator[list[int]]:
        at, cuts = 0, []
        for i, size in enumerate(len(self._token_bytes(index)) for index in usual):
            # The first and last pieces can differ if surrounding text merges with them: split them last.
            cuts += [(i in (0, len(usual) - 1), -size, at + inner) for inner in range(1, size)]
            at += size
        for *_, cut in sorted(cuts):
            ids = self._encode(marker[:cut]) + self._encode(marker[cut:])
            if self._special.isdisjoint(ids) and b"".join(map(self._token_bytes, ids)) == marker.encode():
                yield ids
        for place, index in enumerate(usual):
            letter = marker[place : place + 1].isalpha()
            if letter and (spelled := self._byte_ids(self._token_bytes(index))):
                yield [*usual[:place], *spelled, *usual[place + 1 :]]

    def _normalized(self, segment: Prompt) -> Prompt:
        """Normalize text that SentencePiece would normalize to a marker, so that the marker is found."""
        if not self._normalizes or segment.markup == Prompt.raw(segment).markup:
            return segment
        edges = [0, *(edge for span in segment.markup for edge in span), len(segment)]
        runs = [segment[start:end] for start, end in pairwise(edges)]
        for i, run in enumerate(runs[::2]):
            read = self._normalize(str(run)).replace(_SPACE, " ")
            if any(read.count(marker) > run.count(marker) for marker in self._markers):
                runs[2 * i] = read
        return Prompt.concat(runs)

    @cached_property
    def _normalizes(self) -> bool:
        """Whether SentencePiece normalizes any character to another."""
        codes = (*range(1, 32), *range(33, 0x3000), *range(0xF900, 0x10000))
        text = "a".join(chr(code) for code in codes if chr(code) != _SPACE)
        return self._normalize(text) != text
