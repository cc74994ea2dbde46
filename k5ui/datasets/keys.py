"""Short names for datasets and sources: hashes, so that an address of the page can name nothing that was not found."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

_DATASET_DIGITS = 12
_SOURCE_DIGITS = 16
DATASET_ID = re.compile(rf"[0-9a-f]{{{_DATASET_DIGITS}}}")
SOURCE_KEY = re.compile(rf"[0-9a-f]{{{_SOURCE_DIGITS}}}")


def dataset_id(path: str | Path) -> str:
    """The id of a dataset configuration: 12 hexadecimal digits of its absolute path."""
    return hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:_DATASET_DIGITS]


def source_key(entry_index: int, identity: str) -> str:
    """The key of a source: 16 hexadecimal digits of the number of its [[datasets]] table and its identity."""
    text = f"{entry_index}:{identity}".encode("utf-8", "surrogateescape")
    return hashlib.sha256(text).hexdigest()[:_SOURCE_DIGITS]
