"""Names of cache files: the ones that other Kandinsky 5 tools read, never the same for two sources of a dataset."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

LATENT_SUFFIX = "_k5.safetensors"
TEXT_SUFFIX = "_k5_te.safetensors"
#: Hidden, so that no other tool takes them for caches of sources, and no scan for sources.
INDEX_FILE = ".k5_index.json"
SEAL_FILE = ".k5_seal.json"
TRASH_FOLDER = ".k5_trash"

_NAME_LIMIT = 255
# What a latent cache adds to its key at most: _start-frames, _WxH and the suffix, with room for large numbers.
_ADDED = len("_0000000-00000_00000x00000") + len(LATENT_SUFFIX)
_KEY_LIMIT = _NAME_LIMIT - _ADDED
_HASH_DIGITS = 8
_UNFINISHED = re.compile(r"\..{0,20}\.[0-9a-f]{8}\.tmp\.safetensors", re.DOTALL)
_SIZE = re.compile(r"(\d{4,})x(\d{4,})")
_CLIP = re.compile(r"(\d{5,})-(\d{3,})")


class LatentName(NamedTuple):
    """What the name of a latent cache says; `start` and `frames` (pixel frames) are None for a still image."""

    key: str
    width: int
    height: int
    start: int | None = None
    frames: int | None = None


def latent_cache_name(key: str, width: int, height: int, start: int | None = None, frames: int | None = None) -> str:
    """The file name of a latent cache.

    An image is named by the size of its source, a clip by the size that the clip was resized to: that is what other
    tools write, and what they choose the bucket by when they read.
    """
    clip = "" if start is None or frames is None else f"_{start:05d}-{frames:03d}"
    return f"{key}{clip}_{width:04d}x{height:04d}{LATENT_SUFFIX}"


def text_cache_name(key: str) -> str:
    """The file name of a source's text cache; all clips of the source share it."""
    return f"{key}{TEXT_SUFFIX}"


def unconditional_cache_name(template: str) -> str:
    """The file name of the embedding of the empty caption, one per cache folder and template."""
    return text_cache_name(f".unconditional-{template}")


def parse_latent_name(name: str, kind: str) -> LatentName | None:
    """Read the name of a latent cache of an "image" or a "video" dataset from its end; None: it is not one."""
    if not name.endswith(LATENT_SUFFIX) or name.startswith("."):
        return None
    parts = name[: -len(LATENT_SUFFIX)].split("_")
    size = _SIZE.fullmatch(parts.pop())
    if size is None or not parts:
        return None
    width, height = int(size[1]), int(size[2])
    if kind == "image":
        return LatentName("_".join(parts), width, height)
    clip = _CLIP.fullmatch(parts.pop())
    if clip is None or not parts:
        return None
    return LatentName("_".join(parts), width, height, int(clip[1]), int(clip[2]))


def parse_text_name(name: str) -> str | None:
    """The key in the name of a text cache; None: it is not one."""
    if not name.endswith(TEXT_SUFFIX) or name.startswith("."):
        return None
    return name[: -len(TEXT_SUFFIX)] or None


def is_unfinished(name: str) -> bool:
    """Whether this is the temporary file of a cache whose writer was killed (see `backend.files.atomic_path`)."""
    return name.endswith(".tmp.safetensors") and _UNFINISHED.fullmatch(name) is not None


def unique_keys(sources: Iterable[tuple[str, str]]) -> list[str]:
    """Cache keys for `(stem, identity)` pairs in order: no two are equal, and none makes a file name too long.

    The first source of a stem keeps the plain stem, so that its existing caches are found. Every other one gets a
    short hash of its identity (its path inside the dataset), which does not depend on its neighbours. Stems that
    differ only in letter case or in the way accents are stored count as equal, because folders on Windows and macOS
    cannot hold both.
    """
    pairs = list(sources)
    stems = [stem for stem, _ in pairs]
    if _all_plain(stems):
        return stems
    keys: list[str | None] = []
    taken: set[str] = set()
    for stem, _ in pairs:
        plain = stem.isascii()
        folded = stem.lower() if plain else _fold(stem)
        # A hidden name would not be seen by the tools that list caches, and ours for the empty caption are hidden.
        fits = folded not in taken and stem[:1] not in ("", ".")
        if fits and (len(stem) <= _KEY_LIMIT if plain else _fits(stem)):
            taken.add(folded)
            keys.append(stem)
        else:
            keys.append(None)
    return [
        _hashed_key(stem, identity, taken) if key is None else key
        for key, (stem, identity) in zip(keys, pairs, strict=True)
    ]


def _all_plain(stems: list[str]) -> bool:
    """Whether every stem may stand as it is: plain letters, short, visible, all different; true for nearly all."""
    together = "\n".join(stems)
    if not together.isascii() or together.count("\n") != len(stems) - 1:
        return False
    if together.startswith(".") or "\n." in together or "" in stems or max(map(len, stems)) > _KEY_LIMIT:
        return False
    return len(set(together.lower().split("\n"))) == len(stems)


def _fold(stem: str) -> str:
    return stem.lower() if stem.isascii() else unicodedata.normalize("NFC", stem).casefold()


def _fits(stem: str) -> bool:
    if stem.isascii():
        return len(stem) <= _KEY_LIMIT
    try:
        return len(stem.encode("utf-8")) <= _KEY_LIMIT
    except UnicodeEncodeError:
        return False  # A name that is not UTF-8 could not be opened by the tools that read the cache.


def _hashed_key(stem: str, identity: str, taken: set[str]) -> str:
    digest = hashlib.sha256(_bytes(identity)).hexdigest()
    counter = 0
    while True:
        ending = f"-{digest[:_HASH_DIGITS]}"
        short = _bytes(stem.lstrip("."))[: _KEY_LIMIT - len(ending)].decode("utf-8", "ignore")
        key = f"{short or 'item'}{ending}"
        if _fold(key) not in taken:
            taken.add(_fold(key))
            return key
        # Only a source that is called like another one's hash, or the same JSONL line twice, comes here.
        counter += 1
        digest = hashlib.sha256(_bytes(f"{identity}\n{counter}")).hexdigest()


def _bytes(text: str) -> bytes:
    # Names that are not UTF-8 reach Python with surrogates in place of the foreign bytes.
    return text.encode("utf-8", "surrogateescape")
