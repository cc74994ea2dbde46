"""A ledger as the page shows it: segments by state, reasons in words, what is skipped, left over and still to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from backend.config.dataset import DatasetEntry
from backend.data.cache_facts import MISSING, Verdict
from backend.data.ledger import DatasetLedger, LatentRow, Row, TextRow, bytes_of, count_states, not_valid
from backend.data.ledger_seal import Shape
from backend.data.sizes import shape_bytes
from k5ui.caching.pace import Work
from k5ui.caching.request import Kind
from k5ui.text.loader import Texts

_SHOWN = 100
_EXAMPLES = 20
# Reasons of the ledger by the words that they begin with -> the sentences of the page.
_REASONS = {
    "source": "source",
    "caption": "caption",
    "resolution": "resolution",
    "frames": "frames",
    "clip start": "clip_start",
    "resize": "resize",
    "frame rate": "frame_rate",
    "VAE": "vae",
    "VAE number format": "vae_dtype",
    "VAE tiling": "vae_tiling",
    "posterior": "posterior",
    "template": "template",
    "template text": "template",
    "token limit": "token_limit",
    "CLIP token limit": "token_limit",
    "Qwen encoder": "qwen",
    "CLIP encoder": "clip",
    "text number format": "text_dtype",
    "written by another tool": "foreign",
}
# Their values are hashes or say nothing more than the sentence does.
_WITHOUT_VALUES = ("source", "caption", "vae", "qwen", "clip", "template", "foreign")


@dataclass
class Todo:
    """What is left to do by kind of run: the work and the bytes that it will write."""

    work: dict[Kind, Work] = field(default_factory=lambda: {"cache_text": Work(), "cache_latents": Work()})
    bytes: dict[Kind, int] = field(default_factory=lambda: {"cache_text": 0, "cache_latents": 0})

    def add(self, kind: Kind, work: Work, size: int) -> None:
        """Add items."""
        self.work[kind] = self.work[kind] + work
        self.bytes[kind] += size


def count_todo(ledgers: Iterable[DatasetLedger], dtype: str, text_size: int, *, again: bool) -> Todo:
    """What a run would do that leaves valid caches alone; with `again`, one that makes all of them.

    `dtype` is the number format of the latents, `text_size` about how many bytes the cache of a caption has.
    """
    todo = Todo()
    for ledger in ledgers:
        shapes = ledger.shapes if again else _pending_shapes(ledger)
        for (frames, width, height), count in shapes.items():
            work = Work(count, count * width * height * frames / 1e6)
            todo.add("cache_latents", work, count * shape_bytes(frames, width, height, dtype))
        unusable = [row for row in not_valid(ledger.texts) if not row.verdict.usable]
        without = sum(row.source is not None and not row.source.has_caption for row in unusable)
        count = (len(ledger.texts) if again else len(unusable)) - without
        todo.add("cache_text", Work(count, float(count)), count * text_size)
    return todo


def _pending_shapes(ledger: DatasetLedger) -> Counter[Shape]:
    items = (row.item for row in not_valid(ledger.latents) if not row.verdict.usable)
    return Counter((item.frames, item.bucket.width, item.bucket.height) for item in items)


def entry_sheet(entry: DatasetEntry, ledger: DatasetLedger | None, problem: str | None, texts: Texts) -> dict[str, Any]:
    """One [[datasets]] table; without a ledger it is disabled, or `problem` says why nobody could look at it."""
    sheet: dict[str, Any] = {
        "index": entry.index,
        "kind": entry.kind,
        "source": entry.source.name,
        "path": str(entry.source),
        "cache_directory": str(entry.cache_directory),
        "enabled": entry.enabled,
        "problem": problem,
    }
    if ledger is None:
        return sheet
    return sheet | {
        "ready": ledger.ready,
        "sources": ledger.sources,
        "latents": _bar(ledger.latents, texts),
        "texts": _bar(ledger.texts, texts),
        "orphans": {
            "count": len(ledger.orphans),
            "bytes": ledger.orphan_bytes,
            "names": [_plain(orphan.name) for orphan in ledger.orphans[:_SHOWN]],
        },
        "held": ledger.held,
        "skipped": _skipped(ledger),
        "skipped_total": len(ledger.skipped),
        "broken_total": sum(skipped.broken for skipped in ledger.skipped),
        "missing_captions": [_plain(source.identity) for source in ledger.missing_captions[:_SHOWN]],
        "missing_captions_total": len(ledger.missing_captions),
        "problems": [_plain(problem.message) for problem in ledger.problems[:_SHOWN]],
    }


def _skipped(ledger: DatasetLedger) -> list[dict[str, Any]]:
    return [
        {"name": _plain(skipped.source.identity), "reason": _plain(skipped.reason), "broken": skipped.broken}
        for skipped in sorted(ledger.skipped, key=lambda skipped: not skipped.broken)[:_SHOWN]
    ]


def _bar(rows: Sequence[Row], texts: Texts) -> dict[str, Any]:
    """Counts by state, and every reason with the names of some of the items that it holds for."""
    pending = not_valid(rows)
    groups: dict[tuple[str, str], Counter[str]] = {}
    for row in pending:
        verdict = row.verdict
        if verdict is MISSING or verdict.reasons == MISSING.reasons:
            continue
        if isinstance(row, TextRow) and row.source is not None and not row.source.has_caption:
            continue  # listed among the sources without a caption
        for reason in verdict.reasons:
            groups.setdefault((verdict.state, reason_text(verdict, reason, texts)), Counter())[_name(row, texts)] += 1
    reasons = [
        {"state": state, "text": text, "count": names.total(), "names": list(names)[:_EXAMPLES], "named": len(names)}
        for (state, text), names in sorted(groups.items(), key=lambda group: -group[1].total())[:_SHOWN]
    ]
    return {
        "total": len(rows),
        "usable": len(rows) - sum(not row.verdict.usable for row in pending),
        "states": {state: count for state, count in count_states(rows).items() if count},
        "bytes": bytes_of(rows),
        "reasons": reasons,
    }


def reason_text(verdict: Verdict, reason: str, texts: Texts) -> str:
    """A reason of the ledger in the language of the page; one that it does not know stays as it is."""
    if verdict.state == "broken":
        return texts("caching.reason.broken")
    head, _, values = reason.partition(": ")
    key = _REASONS.get(head)
    if key is None:
        return _plain(reason)
    if key == "foreign":
        return texts("caching.reason.foreign" if verdict.usable else "caching.reason.foreign_refused")
    sentence = texts(f"caching.reason.{key}")
    before, _, now = values.removeprefix("was ").partition(", now ")
    if key in _WITHOUT_VALUES or not now or not values.startswith("was "):
        return sentence
    return f"{sentence}: {before} → {now}"


def _name(row: LatentRow | TextRow, texts: Texts) -> str:
    if isinstance(row, LatentRow):
        return _plain(row.item.source.identity)
    return _plain(row.source.identity) if row.source is not None else texts("caching.empty_caption")


def _plain(text: str) -> str:
    # Names that are not UTF-8 hold surrogates, which the page cannot show.
    return text.encode("utf-8", "replace").decode("utf-8")
