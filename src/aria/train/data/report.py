"""What of the data could not be used, and why; nothing is passed over without a line here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

MOST_EXAMPLES = 5
CONVERT = "convert it: python examples/convert.py OLD NEW.jsonl (docs/data.md)"
"""What helps with data in a format that is not read."""


class RowError(ValueError):
    """A row that cannot be used.

    Attributes:
        kind: a few words that are the same for all rows with this fault, such as ``not JSON``.
    """

    def __init__(self, kind: str, said: str):
        super().__init__(said)
        self.kind = kind


@dataclass
class Tally:
    """One kind of fault or remark."""

    count: int = 0
    examples: list[str] = field(default_factory=list)
    """The first ones: ``file:line: what is wrong``."""

    def add(self, example: str, count: int = 1) -> None:
        """Count it, and keep the example if it is among the first."""
        self.count += count
        if len(self.examples) < MOST_EXAMPLES and example not in self.examples:
            self.examples.append(example)


@dataclass
class Report:
    """What a stream gave, and what it did not. Rows count each time they come up, which is once an epoch or more."""

    rows: int = 0
    """Rows that were read."""
    sequences: int = 0
    batches: int = 0
    tokens: int = 0
    """Of sequences in batches, filler not counted."""
    filler: int = 0
    labels: int = 0
    crops: int = 0
    skipped: dict[str, Tally] = field(default_factory=dict)
    """Kind of fault -> rows that were passed over."""
    notes: dict[str, Tally] = field(default_factory=dict)
    """Kind of remark -> rows that were used, but not as they are: trimmed, with fields that nothing reads, ..."""

    @property
    def efficiency(self) -> float:
        """Share of the batches' tokens that are not filler; 1.0 before the first batch."""
        return self.tokens / (self.tokens + self.filler) if self.tokens else 1.0

    def skip(self, kind: str, example: str) -> None:
        """A row that is passed over."""
        self.skipped.setdefault(kind, Tally()).add(example)

    def note(self, kind: str, example: str) -> None:
        """A row that is used, but not as it is."""
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
        """Go on counting where another report was."""
        for name, value in state.items():
            tallies = name in ("skipped", "notes")
            setattr(self, name, {kind: Tally(**_copied(one)) for kind, one in value.items()} if tallies else value)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Report:
        """The report whose state it is."""
        report = cls()
        report.load_state_dict(state)
        return report

    @classmethod
    def joined(cls, reports: Iterable[Report]) -> Report:
        """What several streams gave together."""
        together = cls()
        for report in reports:
            for name, value in vars(report).items():
                if name not in ("skipped", "notes"):
                    setattr(together, name, getattr(together, name) + value)
                    continue
                for kind, one in value.items():
                    tally = getattr(together, name).setdefault(kind, Tally())
                    tally.count += one.count
                    tally.examples = list(dict.fromkeys([*tally.examples, *one.examples]))[:MOST_EXAMPLES]
        return together

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
