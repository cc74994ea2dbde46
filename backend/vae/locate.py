"""Finds a VAE's weights and configuration on disk and identifies them, without torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from backend.errors import UserError
from backend.files import fingerprint

_FIELD = "vae"


class VaeFiles(NamedTuple):
    """The weights, the configuration file beside them (None: there is none) and what it says."""

    weights: Path
    config_file: Path | None
    config: dict[str, Any]

    def fingerprint(self) -> str:
        """16 hexadecimal digits over configuration and weights, for the metadata of caches.

        Raises:
            OSError: the weights cannot be read.
        """
        described = json.dumps(self.config, sort_keys=True) + fingerprint(self.weights)
        return hashlib.sha256(described.encode("utf-8")).hexdigest()[:16]


def locate_vae(path: str | Path) -> VaeFiles:
    """Find a VAE: a .safetensors file, or a folder with one (its `vae` subfolder too).

    Raises:
        UserError: field "vae"; nothing is there, it is unclear which file is meant, or config.json is damaged.
    """
    weights, config_file = _locate(Path(path).expanduser())
    return VaeFiles(weights, config_file, _read_config(config_file) if config_file else {})


def _locate(path: Path) -> tuple[Path, Path | None]:
    """The weights file and the configuration beside it, if there is one."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(
                f"{path} is not a .safetensors file; other formats can run code and are not loaded.", _FIELD
            )
        config = path.parent / "config.json"
        return path, config if _is_vae_config(config) else None
    if not path.is_dir():
        raise UserError(f"{path} does not exist. Give a .safetensors file or a folder with a HunyuanVideo VAE.", _FIELD)
    for folder in (path / "vae", path):
        found = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
        named = [file for file in found if file.name == "diffusion_pytorch_model.safetensors"]
        if len(found) == 1 or named:
            config = folder / "config.json"
            return (named or found)[0], config if config.is_file() else None
        if found:
            raise UserError(f"{folder} has several .safetensors files. Give the file of the VAE.", _FIELD)
    raise UserError(f"{path} has no .safetensors file, nor has its vae subfolder. Give the file of the VAE.", _FIELD)


def _is_vae_config(config: Path) -> bool:
    """Whether the config.json beside a single file belongs to a VAE; in a mixed folder it may be of another model."""
    return config.is_file() and "latent_channels" in _read_config(config)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}. Get the VAE again.", _FIELD) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object. Get the VAE again.", _FIELD)
    return content
