"""Findings for people (text) and for programs (JSON)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import NamedTuple

from backend.data.lint.finding import SEVERITIES, TITLES, Finding, sorted_findings

_VERSION = 1
_SHOWN = 20
_NAMES = {"error": ("error", "errors"), "warning": ("warning", "warnings"), "info": ("note", "notes")}


class Coverage(NamedTuple):
    """How much of a dataset was looked at: its index, its sources, and how many of them could be measured."""

    index: int
    sources: int
    checked: int


def to_json(coverage: Sequence[Coverage], findings: Sequence[Finding]) -> str:
    """One JSON document, findings sorted by severity, kind and name; pure ASCII, so that any file name fits."""
    document = {
        "version": _VERSION,
        "datasets": [one._asdict() for one in coverage],
        "findings": [finding.as_json() for finding in sorted_findings(findings)],
    }
    return json.dumps(document, indent=1) + "\n"


def to_text(coverage: Sequence[Coverage], findings: Sequence[Finding]) -> str:
    """Lines for people: a summary, then the findings by kind, the most severe first, at most 20 of each kind."""
    lines = [f"datasets[{one.index}]: {one.sources} sources, {one.checked} looked at." for one in coverage]
    counts = {severity: sum(finding.severity == severity for finding in findings) for severity in SEVERITIES}
    total = ", ".join(f"{number} {_NAMES[severity][number > 1]}" for severity, number in counts.items() if number)
    lines.append(f"Found: {total}." if findings else "Nothing was found that needs attention.")
    for (severity, kind), group in itertools.groupby(
        sorted_findings(findings), key=lambda finding: (finding.severity, finding.kind)
    ):
        members = list(group)
        lines += ["", f"{TITLES[kind]} ({severity}, {len(members)})"]
        lines += [f"  {_line(finding)}" for finding in members[:_SHOWN]]
        if len(members) > _SHOWN:
            lines.append(f"  and {len(members) - _SHOWN} more")
    text = "\n".join(lines) + "\n"
    # File names may hold bytes that are no UTF-8 and that no terminal takes.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _line(finding: Finding) -> str:
    names = list(finding.identities[:_SHOWN])
    left = len(finding.identities) - len(names)
    shown = ", ".join(names) + (f" and {left} more" if left else "")
    return f"datasets[{finding.dataset}] {shown}: {finding.message}" if shown else finding.message
