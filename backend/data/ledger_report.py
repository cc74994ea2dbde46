"""The ledger for people (text) and for programs (JSON)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from backend.data.ledger import DatasetLedger, LatentRow, TextRow, not_valid
from backend.errors import Problem

_VERSION = 1
_SHOWN = 20


def to_json(ledgers: Sequence[DatasetLedger], *, every_item: bool = True) -> str:
    """All ledgers as one JSON document; with `every_item` off, items and texts that are valid are only counted."""
    datasets = [_dataset(ledger, every_item) for ledger in ledgers]
    document = {"version": _VERSION, "ready": all(ledger.ready for ledger in ledgers), "datasets": datasets}
    return json.dumps(document, indent=1) + "\n"


def _dataset(ledger: DatasetLedger, every_item: bool) -> dict[str, Any]:
    return {
        "index": ledger.index,
        "kind": ledger.kind,
        "cache_directory": ledger.cache_directory,
        "ready": ledger.ready,
        "sources": ledger.sources,
        "latents": ledger.latent_states,
        "texts": ledger.text_states,
        "bytes": ledger.bytes,
        "orphan_bytes": ledger.orphan_bytes,
        "held": ledger.held,
        "excluded": ledger.excluded,
        "items": [_latent(row) for row in (ledger.latents if every_item else not_valid(ledger.latents))],
        "captions": [_text(row) for row in (ledger.texts if every_item else not_valid(ledger.texts))],
        "skipped": [
            {"source": skipped.source.identity, "reason": skipped.reason, "broken": skipped.broken}
            for skipped in ledger.skipped
        ],
        "missing_captions": [source.identity for source in ledger.missing_captions],
        "problems": [_problem(problem) for problem in ledger.problems],
        "orphans": [{"name": orphan.name, "why": orphan.why, "bytes": orphan.stamp.size} for orphan in ledger.orphans],
    }


def _latent(row: LatentRow) -> dict[str, Any]:
    clip = None if row.item.clip is None else [row.item.clip.start, row.item.clip.frames]
    return {
        "source": row.item.source.identity,
        "cache": row.item.latent_name,
        "clip": clip,
        "bucket": [row.item.bucket.width, row.item.bucket.height],
        "state": row.verdict.state,
        "reasons": list(row.verdict.reasons),
        "usable": row.verdict.usable,
        "bytes": row.bytes,
    }


def _text(row: TextRow) -> dict[str, Any]:
    return {
        "source": row.source.identity if row.source is not None else None,
        "cache": row.name,
        "state": row.verdict.state,
        "reasons": list(row.verdict.reasons),
        "usable": row.verdict.usable,
        "bytes": row.bytes,
    }


def _problem(problem: Problem) -> dict[str, str | None]:
    return {"field": problem.field, "message": problem.message}


def to_text(ledgers: Sequence[DatasetLedger]) -> str:
    """All ledgers in words: counts, then what is not valid and why, at most 20 lines of each sort and dataset."""
    return "\n".join(line for ledger in ledgers for line in _lines(ledger))


def _lines(ledger: DatasetLedger) -> list[str]:
    lines = [
        f"Dataset {ledger.index + 1} ({ledger.kind}, caches in {ledger.cache_directory}): "
        f"{ledger.sources} sources{f' and {ledger.excluded} left out' if ledger.excluded else ''}, "
        f"{len(ledger.latents)} items, {_size(ledger.bytes)}.",
        f"  latents: {_counts(ledger.latent_states)}",
        f"  texts: {_counts(ledger.text_states)}",
    ]
    rows = [*not_valid(ledger.latents), *not_valid(ledger.texts)]
    lines += _listed(
        "not valid",
        [
            f"{_name(row)}: {row.verdict.state} ({'; '.join(row.verdict.reasons)})"
            for row in rows
            if row.verdict.state != "missing"
        ],
    )
    lines += _listed("without caption", [source.identity for source in ledger.missing_captions])
    lines += _listed("without items", [f"{skipped.source.identity}: {skipped.reason}" for skipped in ledger.skipped])
    lines += _listed("problems", [problem.message for problem in ledger.problems])
    label = f"left over, {_size(ledger.orphan_bytes)} (--prune moves them to the trash)"
    lines += _listed(label, [orphan.name for orphan in ledger.orphans])
    if ledger.held:
        lines.append(f"  {ledger.held} caches of sources that cannot be read are kept.")
    return lines


def _listed(label: str, entries: list[str]) -> list[str]:
    if not entries:
        return []
    lines = [f"  {label}: {len(entries)}", *(f"    {_printable(entry)}" for entry in entries[:_SHOWN])]
    if len(entries) > _SHOWN:
        lines.append(f"    and {len(entries) - _SHOWN} more")
    return lines


def _name(row: LatentRow | TextRow) -> str:
    return row.item.latent_name if isinstance(row, LatentRow) else row.name


def _printable(text: str) -> str:
    """One line that every terminal can show: file names may hold line breaks and bytes that are no UTF-8."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _counts(states: dict[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in states.items() if count) or "none"


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
