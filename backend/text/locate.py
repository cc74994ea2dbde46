"""Where a text encoder's weights and tokenizer lie, and what identifies them. Reads no weights and imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.errors import UserError
from backend.files import fingerprint

_TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class EncoderKind:
    """One of the two text encoders: the option that names it, its name for people, and its diffusers folder names."""

    field: str
    label: str
    folder: str
    tokenizer_folder: str
    model_types: tuple[str, ...]
    example: str


QWEN = EncoderKind(
    field="text_encoder_qwen",
    label="Qwen2.5-VL",
    folder="text_encoder",
    tokenizer_folder="tokenizer",
    model_types=("qwen2_5_vl", "qwen2_5_vl_text"),
    example="Qwen/Qwen2.5-VL-7B-Instruct",
)
CLIP = EncoderKind(
    field="text_encoder_clip",
    label="CLIP",
    folder="text_encoder_2",
    tokenizer_folder="tokenizer_2",
    model_types=("clip", "clip_text_model"),
    example="openai/clip-vit-large-patch14",
)


@dataclass(frozen=True)
class EncoderFiles:
    """The files of one encoder: configuration as read, folder of the tokenizer, weight files, and their fingerprint."""

    kind: EncoderKind
    model: Path
    tokenizer: Path
    weights: tuple[Path, ...]
    config: dict[str, Any]
    fingerprint: str


def locate_encoder(location: str | Path, kind: EncoderKind) -> EncoderFiles:
    """Find an encoder in a folder, in a diffusers-layout folder (or its root), or on the hub by `org/name`.

    A hub model that lies complete in the local hub cache is used as it is, without the network. The fingerprint is 16
    hexadecimal digits over configuration, weights and tokenizer; it does not depend on where they lie.

    Raises:
        UserError: nothing is there, files are missing, or the weights are not safetensors of this kind of model.
    """
    root = _folder(location, kind)
    return _files_in(root if root is not None else _from_hub(str(location), kind), kind)


def find_encoder(location: str | Path, kind: EncoderKind) -> EncoderFiles | None:
    """`locate_encoder` without the network: None for a hub model that is not complete on this machine.

    Raises:
        UserError: as `locate_encoder`.
    """
    root = _folder(location, kind)
    if root is None:
        root = _from_hub_cache(_hub_name(str(location), kind), kind)
    return _files_in(root, kind) if root is not None else None


def _folder(location: str | Path, kind: EncoderKind) -> Path | None:
    root = Path(location).expanduser()
    if root.is_file():
        raise UserError(
            f"{root} is a file. Give the folder that holds it, its config.json and its tokenizer.", kind.field
        )
    return root if root.is_dir() else None


def _files_in(root: Path, kind: EncoderKind) -> EncoderFiles:
    model = _model_folder(root, kind)
    if model is None:
        raise UserError(f"{root} has no config.json. Give the folder of a {kind.label} model.", kind.field)
    config = _read_json(model / "config.json", kind)
    if config.get("model_type") not in kind.model_types:
        raise UserError(
            f"{model} holds a model of type {config.get('model_type')!r}, but {kind.label} is needed here "
            f"(for example {kind.example}).",
            kind.field,
        )
    weights = _weight_files(model, kind)
    tokenizer = _tokenizer_folder(model, kind)
    return EncoderFiles(kind, model, tokenizer, weights, config, _fingerprint(model, tokenizer, weights, kind))


def _model_folder(root: Path, kind: EncoderKind) -> Path | None:
    for folder in (root, root / kind.folder):
        if (folder / "config.json").is_file():
            return folder
    return None


def _tokenizer_folder(model: Path, kind: EncoderKind) -> Path:
    for folder in (model, model.parent / kind.tokenizer_folder):
        vocabulary = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
        if vocabulary or (folder / "tokenizer.json").is_file():
            return folder
    raise UserError(
        f"No tokenizer for {kind.label} in {model} or {model.parent / kind.tokenizer_folder}. "
        "Put its tokenizer.json, or vocab.json and merges.txt, into one of them.",
        kind.field,
    )


def _weight_files(model: Path, kind: EncoderKind) -> tuple[Path, ...]:
    index = model / "model.safetensors.index.json"
    if index.is_file():
        return _sharded_files(index, kind)
    found = sorted(model.glob("*.safetensors"))
    if len(found) == 1:
        return (found[0],)
    if found:
        raise UserError(
            f"{model} has {len(found)} .safetensors files but no model.safetensors.index.json that says how they "
            "belong together. Download the folder again.",
            kind.field,
        )
    if any(file.suffix in _PICKLES for file in model.iterdir()):
        raise UserError(
            f"{model} has its weights only as pickle files, which can run code and are not loaded. "
            "Get the model with .safetensors weights.",
            kind.field,
        )
    raise UserError(f"{model} has no .safetensors weights. Download the {kind.label} model again.", kind.field)


def _sharded_files(index: Path, kind: EncoderKind) -> tuple[Path, ...]:
    weight_map = _read_json(index, kind).get("weight_map")
    names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
        raise UserError(f"{index} does not list .safetensors files. Download the folder again.", kind.field)
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(
            f"{index.parent} lacks {len(missing)} of its {len(names)} weight files, for example {missing[0]}. "
            "Download the folder again.",
            kind.field,
        )
    return tuple(index.parent / name for name in names)


def _read_json(path: Path, kind: EncoderKind) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}. Download the folder again.", kind.field) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object. Download the folder again.", kind.field)
    return content


def _fingerprint(model: Path, tokenizer: Path, weights: tuple[Path, ...], kind: EncoderKind) -> str:
    files = [model / "config.json", *weights]
    files += [tokenizer / name for name in _TOKENIZER_FILES if (tokenizer / name).is_file()]
    digest = hashlib.sha256()
    try:
        for file in files:
            digest.update(f"{file.name}:{fingerprint(file)}\n".encode())
    except OSError as error:
        raise UserError(f"{error.filename or model} cannot be read: {error.strerror}.", kind.field) from error
    return digest.hexdigest()[:16]


def _is_complete(folder: Path, kind: EncoderKind) -> bool:
    """Whether a folder of the hub cache holds everything; a download may have stopped half-way."""
    model = _model_folder(folder, kind)
    if model is None:
        return False
    try:
        return bool(_weight_files(model, kind)) and bool(_tokenizer_folder(model, kind))
    except UserError:
        return False


def _hub_name(name: str, kind: EncoderKind) -> str:
    if not _HUB_NAME.fullmatch(name):
        raise UserError(
            f"{name} does not exist. Give a folder with a {kind.label} model, or a hub name such as {kind.example}.",
            kind.field,
        )
    return name


def _from_hub_cache(name: str, kind: EncoderKind) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return cached if _is_complete(cached, kind) else None


def _from_hub(name: str, kind: EncoderKind) -> Path:
    """The local folder of a hub model: from the hub cache when it is complete there, else fetched into it."""
    cached = _from_hub_cache(_hub_name(name, kind), kind)
    if cached is not None:
        return cached
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    failures = (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError)
    try:
        # Only the top folder first: below it a diffusers repository keeps tens of gigabytes of other models.
        patterns = ["*.safetensors", "*.json", "*.txt"]
        folder = Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
        if not (folder / "config.json").is_file():
            patterns = [f"{part}/{pattern}" for part in (kind.folder, kind.tokenizer_folder) for pattern in patterns]
            folder = Path(snapshot_download(name, allow_patterns=patterns))
    except failures as error:
        raise UserError(
            f"{name} is not a folder here, and it could not be fetched from the hub "
            f"({type(error).__name__}: no network, offline mode, or no such model). Give the folder of a downloaded "
            f"{kind.label} model.",
            kind.field,
        ) from error
    return folder
