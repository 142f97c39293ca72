"""Report of rows that could not be used, and why; no row is skipped silently."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

MOST_EXAMPLES = 5
CONVERT = "convert it: python examples/convert.py OLD NEW.jsonl (docs/data.md)"
"""Advice for data in an unsupported format."""


class RowError(ValueError):
    """A row that cannot be used.

    Attributes:
        kind: A few words that are the same for all rows with this problem, such as ``not JSON``.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclass
class Tally:
    """One kind of problem or note."""

    count: int = 0
    examples: list[str] = field(default_factory=list)
    """The first ones: ``file:line: message``."""

    def add(self, example: str, count: int = 1) -> None:
        """Count an example, and keep it if it is among the first."""
        self.count += count
        if len(self.examples) < MOST_EXAMPLES and example not in self.examples:
            self.examples.append(example)


@dataclass
class Report:
    """What a stream used and skipped. Rows count each time they are read."""

    rows: int = 0
    """Rows that were read."""
    sequences: int = 0
    batches: int = 0
    tokens: int = 0
    """Tokens of sequences in batches, without filler."""
    filler: int = 0
    labels: int = 0
    crops: int = 0
    skipped: dict[str, Tally] = field(default_factory=dict)
    """Kind of problem -> rows that were skipped."""
    notes: dict[str, Tally] = field(default_factory=dict)
    """Kind of note -> rows that were used with changes: trimmed, with unknown fields, ..."""

    @property
    def efficiency(self) -> float:
        """Fraction of the batches' tokens that is not filler; 1.0 before the first batch."""
        return self.tokens / (self.tokens + self.filler) if self.tokens else 1.0

    def skip(self, kind: str, example: str) -> None:
        """Count a skipped row."""
        self.skipped.setdefault(kind, Tally()).add(example)

    def note(self, kind: str, example: str) -> None:
        """Count a row that is used with changes."""
        self.notes.setdefault(kind, Tally()).add(example)

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        tallies = {"skipped": self.skipped, "notes": self.notes}
        plain = {
            name: {kind: {"count": tally.count, "examples": list(tally.examples)} for kind, tally in found.items()}
            for name, found in tallies.items()
        }
        return {**vars(self), **plain}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of another report."""
        for name, value in state.items():
            tallies = name in ("skipped", "notes")
            setattr(self, name, {kind: Tally(**_copied(one)) for kind, one in value.items()} if tallies else value)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Report:
        """The report with a state."""
        report = cls()
        report.load_state_dict(state)
        return report

    @classmethod
    def joined(cls, reports: Iterable[Report]) -> Report:
        """The sum of several reports."""
        joined = cls()
        for report in reports:
            for name, value in vars(report).items():
                if name not in ("skipped", "notes"):
                    setattr(joined, name, getattr(joined, name) + value)
                    continue
                for kind, one in value.items():
                    tally = getattr(joined, name).setdefault(kind, Tally())
                    tally.count += one.count
                    tally.examples = list(dict.fromkeys([*tally.examples, *one.examples]))[:MOST_EXAMPLES]
        return joined

    def __str__(self) -> str:
        lines = [
            f"{self.batches:,} batches of {self.sequences:,} sequences, {self.efficiency:.1%} full; "
            f"{self.tokens:,} tokens, {self.labels:,} of them targets; {self.crops:,} crops"
        ]
        for word, found in (("skipped", self.skipped), ("noted", self.notes)):
            for kind, tally in sorted(found.items(), key=lambda item: -item[1].count):
                lines.append(f"{word} {tally.count:,} of {self.rows:,} rows: {kind}")
                lines += [f"    {example}" for example in tally.examples]
        return "\n".join(lines)


def _copied(tally: Mapping[str, Any]) -> dict[str, Any]:
    return {"count": tally["count"], "examples": list(tally["examples"])}
