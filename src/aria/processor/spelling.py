"""Markers in people's text, tokenised as the text that they are: to ids that the template's markers never have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise

from aria.processor.chat import Prompt

_SPACE = "\u2581"  # how SentencePiece writes a space


class MarkerSpeller:
    """Encodes text between images with its markers as control tokens where the template wrote them, and nowhere else.

    Args:
        encode: ids of a text whose markers are all control tokens.
        token_bytes: what an id contributes to the decoded text, in UTF-8.
        byte_ids: ids of the pieces that stand for single bytes, or None where the vocabulary has none.
        normalize: how SentencePiece reads a text.
        markers: all markers, the longest first.
        special: ids that no text may have.
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
        """Ids of a prompt without places for images.

        Raises:
            ValueError: text with a marker that the vocabulary can only spell as the template does.
        """
        segment = self._normalized(segment)
        text = str(segment)
        ids: list[int] = []
        done = 0
        for start, marker in sorted(segment.literal_markers(self._markers)):
            if start >= done:  # else it lies in one that is spelled already
                ids += self._encode(text[done:start]) + self._spelled(marker)
                done = start + len(marker)
        return ids + self._encode(text[done:])

    def _spelled(self, marker: str) -> list[int]:
        """A marker as text: ids that decode to it and are not those that the template's has in any surroundings.

        Where it has several pieces, cutting it between two of them would change nothing. It is cut inside one.
        """
        if marker not in self._spellings:
            usual = self._encode(marker)
            self._spellings[marker] = next((ids for ids in self._other_spellings(marker, usual) if ids != usual), [])
        if not self._spellings[marker]:
            raise ValueError(
                f"text holds {marker}, which this vocabulary can only spell as the template does; remove it, or use a "
                "vocabulary with byte pieces"
            )
        return self._spellings[marker]

    def _other_spellings(self, marker: str, usual: Sequence[int]) -> Iterator[list[int]]:
        at, cuts = 0, []
        for i, size in enumerate(len(self._token_bytes(index)) for index in usual):
            # The first and last pieces may be others where text around the marker merges with them.
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
        """The segment, with text that SentencePiece would normalise to a marker normalised already, to be found."""
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
        """Whether SentencePiece reads any character as another one."""
        codes = (*range(1, 32), *range(33, 0x3000), *range(0xF900, 0x10000))
        text = "a".join(chr(code) for code in codes if chr(code) != _SPACE)
        return self._normalize(text) != text
