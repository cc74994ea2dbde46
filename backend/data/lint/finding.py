"""One thing that is wrong with a dataset: what, where, how bad, with numbers, and what can be done about it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal[
    "broken", "no_caption", "too_short", "black", "empty_caption", "hard_cut", "frozen", "letterbox", "variable_rate",
    "odd_fps", "near_duplicate", "token_limit", "missing_trigger", "too_small", "upscaled", "equal_captions",
]  # fmt: skip
Severity = Literal["error", "warning", "info"]
Fix = Literal["exclude", "set_source_fps_auto", "add_prefix", "edit_caption"]

#: Title of each kind, in the order in which kinds of one severity are shown.
TITLES: Mapping[Kind, str] = {
    "broken": "Broken files",
    "no_caption": "No caption",
    "too_short": "Too short for any clip",
    "black": "Black frames",
    "empty_caption": "Empty captions",
    "hard_cut": "Hard cuts inside clips",
    "frozen": "Frozen stretches",
    "letterbox": "Black bars",
    "variable_rate": "Variable frame rates",
    "odd_fps": "Not at 24 frames per second",
    "near_duplicate": "Duplicates",
    "token_limit": "Captions over the token limit",
    "missing_trigger": "Trigger word missing",
    "too_small": "Much too small",
    "upscaled": "Enlarged",
    "equal_captions": "Equal captions",
}
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
_KINDS = tuple(TITLES)


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        dataset: index of the (first) dataset that it belongs to.
        identities: the sources; of several datasets if `values["datasets"]` gives the dataset of each.
        message: a sentence or two for people: what it means for training, and what to do.
        values: numbers with their units in their names.
        fixes: what the page can do about it; nothing is done here.
        subject: what the finding is about, where that is not its sources (a rate, a text): it keeps its `id` when
            more sources join.
    """

    kind: Kind
    severity: Severity
    dataset: int
    identities: tuple[str, ...]
    message: str
    values: Mapping[str, Any] = field(default_factory=dict)
    fixes: tuple[Fix, ...] = ()
    subject: str = ""

    @property
    def id(self) -> str:
        """16 hexadecimal digits of kind, dataset and sources (or subject); the same in every run."""
        about = [f"subject:{self.subject}"] if self.subject else [f"source:{name}" for name in self.identities]
        text = "\0".join((self.kind, str(self.dataset), *about))
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def as_json(self) -> dict[str, Any]:
        """The finding as plain values."""
        return {
            "id": self.id,
            "kind": self.kind,
            "severity": self.severity,
            "dataset": self.dataset,
            "identities": list(self.identities),
            "message": self.message,
            "values": dict(self.values),
            "fixes": list(self.fixes),
        }


def sorted_findings(findings: Sequence[Finding]) -> list[Finding]:
    """The most severe first, then by kind, dataset and names."""
    return sorted(
        findings,
        key=lambda one: (SEVERITIES.index(one.severity), _KINDS.index(one.kind), one.dataset, one.identities, one.id),
    )
