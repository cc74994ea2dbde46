"""What is wrong with captions: none, empty, equal, too long, without the trigger word."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from backend.data.lint.finding import Finding
from backend.data.lint.tokens import TokenCounter
from backend.data.scan import Scan, join_caption, read_caption
from backend.data.stamps import text_hash
from backend.errors import UserError

if TYPE_CHECKING:
    from backend.config.dataset import DatasetEntry

_SHOWN = 80


def caption_findings(
    entry: DatasetEntry, scan: Scan, counter: TokenCounter | None = None, trigger_word: str | None = None
) -> list[Finding]:
    """All findings about the captions of one dataset; tokens are counted with a `counter` only."""
    found = [_no_caption(entry, source.identity) for source in scan.missing_captions]
    captions: dict[str, str] = {}
    for source in scan.sources:
        if not source.has_caption:
            continue
        try:
            captions[source.identity] = " ".join(read_caption(source).split())
        except UserError as error:
            found.append(_unreadable(entry, source.identity, error.message))
    found += [_empty(entry, identity) for identity, caption in captions.items() if not caption]
    written = {identity: caption for identity, caption in captions.items() if caption}
    found += _equal(entry, written)
    if counter is not None:
        found += _too_long(entry, written, counter)
    if trigger_word is not None and trigger_word.strip():
        found += _without_trigger(entry, captions, trigger_word.strip())
    return found


def _no_caption(entry: DatasetEntry, identity: str) -> Finding:
    return Finding(
        "no_caption", "error", entry.index, (identity,),
        "It has no caption, so there is no text to cache and to train it with. Write one, or exclude it.",
        {}, ("edit_caption", "exclude"),
    )  # fmt: skip


def _unreadable(entry: DatasetEntry, identity: str, reason: str) -> Finding:
    return Finding("broken", "error", entry.index, (identity,), reason, {"caption": True}, ("edit_caption", "exclude"))


def _empty(entry: DatasetEntry, identity: str) -> Finding:
    if entry.caption_prefix.strip():
        message = (
            "Its caption is empty, so it is trained with the caption prefix alone. That is fine for a style or a "
            "single subject; else write what is to be seen."
        )
        severity = "info"
    else:
        message = (
            "Its caption is empty, so the model learns it for every prompt, whatever it says. Write what is to be "
            "seen, or exclude it."
        )
        severity = "warning"
    return Finding("empty_caption", severity, entry.index, (identity,), message, {}, ("edit_caption", "exclude"))


def _equal(entry: DatasetEntry, captions: Mapping[str, str]) -> list[Finding]:
    groups: dict[str, list[str]] = {}
    for identity, caption in captions.items():
        groups.setdefault(caption, []).append(identity)
    found = []
    for caption, identities in groups.items():
        if len(identities) < 2:
            continue
        message = (
            f"{len(identities)} sources have one caption: {_short(caption)!r}. The model cannot tell them apart by "
            "text, which is right for a style and wrong for different contents. Say in each what sets it apart."
        )
        values = {"sources": len(identities), "caption": caption[:_SHOWN]}
        found.append(
            Finding(
                "equal_captions", "info", entry.index, tuple(identities), message, values, ("edit_caption",),
                subject=text_hash(caption),
            )
        )  # fmt: skip
    return found


def _too_long(entry: DatasetEntry, captions: Mapping[str, str], counter: TokenCounter) -> list[Finding]:
    found = []
    limit = counter.limit(entry.kind)
    for identity, caption in captions.items():
        tokens = counter.tokens(join_caption(entry.caption_prefix, caption), entry.kind)
        if tokens <= limit:
            continue
        message = (
            f"Its caption has {tokens} tokens and the model reads {limit} of a caption of {entry.kind}s; the last "
            f"{tokens - limit} are cut off and never learned. Shorten it, with what matters first."
        )
        values = {"tokens": tokens, "limit": limit}
        found.append(
            Finding("token_limit", "warning", entry.index, (identity,), message, values, ("edit_caption", "exclude"))
        )
    return found


def _without_trigger(entry: DatasetEntry, captions: Mapping[str, str], word: str) -> list[Finding]:
    # As a word of its own, in any letter case: "cat" is not in "catalogue".
    pattern = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)
    if pattern.search(entry.caption_prefix):
        return []
    lacking = [identity for identity, caption in captions.items() if not pattern.search(caption)]
    values = {"trigger_word": word, "sources": len(lacking), "captions": len(captions)}
    if lacking and len(lacking) == len(captions) and len(lacking) > 1:
        message = (
            f"None of the {len(lacking)} captions has the trigger word {word!r}, so it will call up nothing. "
            "Put it into the dataset's caption prefix."
        )
        return [_trigger_finding(entry, lacking, message, values, word)]
    message = (
        f"Its caption lacks the trigger word {word!r}, so what it shows is learned without the word. "
        "Add it to the caption."
    )
    return [_trigger_finding(entry, [identity], message, values, "") for identity in lacking]


def _trigger_finding(
    entry: DatasetEntry, identities: Sequence[str], message: str, values: Mapping[str, object], subject: str
) -> Finding:
    fixes = ("add_prefix",) if subject else ("edit_caption", "exclude")
    return Finding("missing_trigger", "warning", entry.index, tuple(identities), message, values, fixes, subject)


def _short(caption: str) -> str:
    return caption if len(caption) <= _SHOWN else caption[: _SHOWN - 3] + "..."
