"""What a cache file says of itself, from its header only, and whether that is what is wanted now."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from backend.config.safetensors_header import Header, read_header
from backend.data.stamps import Stamp, content_hash, text_hash
from backend.errors import UserError
from backend.vae.tiling import latent_frames

ARCHITECTURE = "kandinsky5"
FORMAT_VERSION = "1.0.1"
#: Present in the metadata of the caches that this project writes, absent from those of other tools.
OURS = "fingerprint_version"
FINGERPRINT_VERSION = "1"
CHANNELS = 16
DTYPE_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "F8_E4M3": "float8_e4m3fn"}

# Metadata that is compared: key in the file -> what people call it. Everything else is a record for people.
LATENT_KEYS = {
    "frame_count": "frames",
    "clip_start": "clip start",
    "bucket": "resolution",
    "resize": "resize",
    "frame_rate": "frame rate",
    "vae_fingerprint": "VAE",
    "vae_dtype": "VAE number format",
    "vae_tiling": "VAE tiling",
    "posterior": "posterior",
}
TEXT_KEYS = {
    "template": "template",
    "template_hash": "template text",
    "max_length": "token limit",
    "clip_max_length": "CLIP token limit",
    "qwen_fingerprint": "Qwen encoder",
    "clip_fingerprint": "CLIP encoder",
    "text_dtype": "text number format",
}
_LABELS = LATENT_KEYS | TEXT_KEYS
_ADVICE = re.compile(r"(Download|Get) [\w ]*again\.")
_LATENTS = re.compile(r"latents_(\d+)x(\d+)x(\d+)_(\w+)")

Hasher = Callable[[str], str]
State = Literal["valid", "stale", "foreign", "broken", "missing"]


class Verdict(NamedTuple):
    """The state of one cache file.

    `reasons` says in words why it is not simply valid; `usable` whether training may read it as it is: valid ones, and
    those of other tools that fit.
    """

    state: State
    reasons: tuple[str, ...] = ()
    usable: bool = False


VALID = Verdict("valid", (), True)
MISSING = Verdict("missing", ("not cached yet",))
_FOREIGN_LATENT = Verdict(
    "foreign",
    ("written by another tool: its source, VAE and tiling cannot be compared, its frames and size fit",),
    True,
)
_FOREIGN_TEXT = Verdict(
    "foreign", ("written by another tool: its encoders cannot be compared, its caption fits",), True
)
_FOREIGN_VIDEO_TEXT = Verdict(
    "foreign",
    (
        "written by another tool, which encodes the captions of videos with the template for images; "
        "the model would learn other texts than it is given later. Cache the text again",
    ),
)


class CacheFacts(NamedTuple):
    """What a header says: `shared` is equal for many files of a dataset, the rest belongs to one source.

    For a latent cache `shared` holds `shape` (CxFxHxW) besides the compared metadata; the `source_` fields are None in
    files of other tools. For a text cache `caption_hash` is None if the file does not tell its caption.
    """

    ours: bool
    shared: Mapping[str, str]
    source_size: int | None = None
    source_mtime_ns: int | None = None
    source_hash: str | None = None
    caption_hash: str | None = None


class ExpectedLatent(NamedTuple):
    """What a latent cache must be: compared metadata (absent keys are not compared), and its source as it is now.

    `frames` are pixel frames, `width` and `height` pixels of the clip that was encoded.
    """

    shared: Mapping[str, str]
    frames: int
    width: int
    height: int
    source: str
    stamp: Stamp


class ExpectedText(NamedTuple):
    """What a text cache must be: compared metadata, the hash of the caption, and the kind of its dataset."""

    shared: Mapping[str, str]
    caption_hash: str
    kind: str


def check_latent_cache(path: str | Path, expected: ExpectedLatent) -> Verdict:
    """Judge a latent cache by its header; the source is read only when its time changed and its size did not."""
    facts = _read(path, read_latent_facts)
    return facts if isinstance(facts, Verdict) else judge_latent(facts, expected)


def check_text_cache(path: str | Path, expected: ExpectedText) -> Verdict:
    """Judge a text cache by its header."""
    facts = _read(path, read_text_facts)
    return facts if isinstance(facts, Verdict) else judge_text(facts, expected)


def _read(path: str | Path, reader: Callable[[str | Path], CacheFacts]) -> CacheFacts | Verdict:
    if not os.path.lexists(path):
        return MISSING
    try:
        return reader(path)
    except UserError as error:
        return Verdict("broken", (error.message,))


# --- judging ------------------------------------------------------------------------------------------------------


def judge_latent(facts: CacheFacts, expected: ExpectedLatent, hasher: Hasher = content_hash) -> Verdict:
    """Compare what a latent cache says with what it must be; `hasher` gives the hash of the source's content."""
    shared = judge_shared_latent(facts.ours, facts.shared, expected)
    if not facts.ours:
        return shared
    changed = source_change(facts, expected.source, expected.stamp, hasher)
    if changed is None:
        return shared
    return Verdict("stale", (*shared.reasons, changed))


def judge_shared_latent(ours: bool, shared: Mapping[str, str], expected: ExpectedLatent) -> Verdict:
    """The part of the judgement that does not look at the source."""
    frames, height, width = latent_frames(expected.frames), expected.height // 8, expected.width // 8
    reasons = differences(shared, expected.shared)
    found = tuple(int(side) for side in shared["shape"].split("x"))
    if found[1] != frames and "frame_count" not in _differing(shared, expected.shared):
        reasons += (f"frames: {found[1]} latent frames, {expected.frames} frames have {frames}",)
    if found[2:] != (height, width) and "bucket" not in _differing(shared, expected.shared):
        size = f"{found[3] * 8}x{found[2] * 8}"
        reasons += (f"resolution: made for {size}, now {expected.width}x{expected.height}",)
    if reasons:
        return Verdict("stale", reasons)
    return VALID if ours else _FOREIGN_LATENT


def source_change(facts: CacheFacts, source: str, stamp: Stamp, hasher: Hasher = content_hash) -> str | None:
    """Why the source is not what was cached; None when it is, also when only its time differs."""
    if facts.source_size != stamp.size:
        return f"source: had {facts.source_size} bytes, now {stamp.size}"
    if facts.source_mtime_ns == stamp.mtime_ns:
        return None
    try:
        same = hasher(source) == facts.source_hash
    except OSError as error:
        return f"source: cannot be read ({error.strerror or error})"
    return None if same else "source: its content changed"


def judge_text(facts: CacheFacts, expected: ExpectedText) -> Verdict:
    """Compare what a text cache says with what it must be."""
    if not facts.ours and expected.kind == "video":
        return _FOREIGN_VIDEO_TEXT
    reasons = differences(facts.shared, expected.shared) if facts.ours else ()
    if facts.caption_hash is not None and facts.caption_hash != expected.caption_hash:
        reasons += ("caption: changed",)
    elif facts.caption_hash is None:
        reasons += ("caption: the file does not say which one it holds",)
    if reasons:
        return Verdict("stale", reasons)
    return VALID if facts.ours else _FOREIGN_TEXT


def differences(found: Mapping[str, str], expected: Mapping[str, str]) -> tuple[str, ...]:
    """One reason for every compared key whose value differs; keys that `found` lacks differ only in our own files."""
    return tuple(
        f"{_LABELS[key]}: was {found.get(key, 'not recorded')}, now {expected[key]}"
        for key in _differing(found, expected)
    )


def _differing(found: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    complete = OURS in found
    return [key for key in expected if found.get(key) != expected[key] and (complete or key in found)]


# --- reading ------------------------------------------------------------------------------------------------------


def read_latent_facts(path: str | Path) -> CacheFacts:
    """Read and check the header of a latent cache.

    Raises:
        UserError: it is unreadable, cut off, for another model, or its tensors contradict their names.
    """
    header = _read_architecture(path)
    metadata = header.metadata
    names = [name for name in header.tensors if _LATENTS.fullmatch(name)]
    if len(names) != 1:
        raise _broken(path, f"holds {len(names)} clips instead of one")
    shape = _named_shape(path, header, names[0])
    if len(shape) != 4 or shape[0] != CHANNELS:
        raise _broken(path, f"holds latents of the shape {list(shape)} instead of [{CHANNELS}, F, H, W]")
    images = [name for name in header.tensors if name.startswith("latents_image_")]
    ours = OURS in metadata
    if ours or images:
        expected = (CHANNELS, 2, *shape[2:])
        if len(images) != 1 or header.tensors[images[0]].shape != expected:
            raise _broken(path, "holds no first and last frame of the right size")
    shared = {key: metadata[key] for key in (*LATENT_KEYS, OURS) if key in metadata}
    shared["shape"] = "x".join(str(side) for side in shape)
    if not ours:
        return CacheFacts(False, shared)
    try:
        size, mtime = int(metadata["source_size"]), int(metadata["source_mtime_ns"])
        return CacheFacts(True, shared, size, mtime, metadata["source_hash"])
    except (KeyError, ValueError) as error:
        raise _broken(path, f"does not say which source it was made of ({error})") from error


def read_text_facts(path: str | Path) -> CacheFacts:
    """Read and check the header of a text cache.

    Raises:
        UserError: it is unreadable, cut off, for another model, or lacks a tensor.
    """
    header = _read_architecture(path)
    tokens, width = _text_tensor(path, header, "text_embeds_", 2)
    _text_tensor(path, header, "pooled_embed_", 1)
    if not tokens or not width:
        raise _broken(path, "holds an empty text")
    mask = header.tensors.get("attention_mask")
    if mask is not None and mask.shape != (tokens,):
        raise _broken(path, "has a mask of another length than its text")
    metadata = header.metadata
    shared = {key: metadata[key] for key in (*TEXT_KEYS, OURS) if key in metadata}
    caption = metadata.get("caption1")
    digest = metadata.get("caption_hash") if OURS in metadata else None
    if digest is None and caption is not None:
        digest = text_hash(caption)
    return CacheFacts(OURS in metadata, shared, caption_hash=digest)


def _read_architecture(path: str | Path) -> Header:
    if not os.path.isfile(path):
        raise _broken(path, "is not a file")
    try:
        header = read_header(path)
    except UserError as error:
        # A cache is not downloaded but made again.
        message = error.message.replace("the download is incomplete", "it is cut off")
        raise UserError(_ADVICE.sub("Cache it again.", message)) from error
    found = header.metadata.get("architecture")
    if found != ARCHITECTURE:
        raise _broken(path, f"is a cache for {str(found)[:40]!r}, not for {ARCHITECTURE}")
    return header


def _named_shape(path: str | Path, header: Header, name: str) -> tuple[int, ...]:
    """The shape of a latent tensor, after a check that its name tells the same shape and number format."""
    tensor = header.tensors[name]
    match = _LATENTS.fullmatch(name)
    told = tuple(int(side) for side in match.groups()[:3]) if match else ()
    if told != tensor.shape[1:] or not match or match[4] != DTYPE_NAMES.get(tensor.dtype):
        raise _broken(path, f"holds {name}, which is {tensor.dtype} {list(tensor.shape)}")
    return tensor.shape


def _text_tensor(path: str | Path, header: Header, prefix: str, dimensions: int) -> tuple[int, ...]:
    names = [name for name in header.tensors if name.removeprefix("varlen_").startswith(prefix)]
    if len(names) != 1 or len(header.tensors[names[0]].shape) != dimensions:
        raise _broken(path, f"holds no {prefix.rstrip('_')}")
    return header.tensors[names[0]].shape


def _broken(path: str | Path, what: str) -> UserError:
    return UserError(f"{path} {what}. Cache it again.")
