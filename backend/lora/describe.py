"""What a LoRA file is, for people and programs: sizes, alphas, the model it fits, how strong it is, its metadata."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from backend.errors import UserError
from backend.lora.architecture import fit_lora
from backend.lora.convert import MODEL_HASH
from backend.lora.formats import LoraFile, LoraWeights

_FORMAT_TITLES = {"kohya": "kohya", "diffusers": "diffusers / PEFT", "comfyui": "ComfyUI"}
_GROUPS: Sequence[tuple[str, tuple[str, ...]]] = (
    ("Model", ("k5_", "ss_base_model", "ss_sd_model", "ss_vae", "modelspec.architecture", "modelspec.implementation")),
    ("About", ("modelspec.", "ss_output_name", "ss_training_comment")),
    ("Training", ("ss_",)),
    ("Checksums", ("sshs_",)),
    ("Other", ("",)),
)
_UNSAID = ("None", "null", "")
_SHOWN_TEXT = 160
_CHUNK = 1 << 20


def describe(file: LoraFile) -> dict[str, Any]:
    """Everything about a LoRA as plain values that JSON can hold.

    `fits` names the known model that all entries match, with the layers that it covers, else `fits_not` says why none
    does. `hash_matches` tells whether the hash in the metadata is that of the weights (absent without one). `effect` is
    the Frobenius norm of strength-1 differences (alpha / rank * up @ down) of the layers.
    """
    report: dict[str, Any] = {
        "path": str(file.path),
        "bytes": file.path.stat().st_size,
        "fingerprint": file.fingerprint,
        "format": _FORMAT_TITLES[file.format],
        "layers": len(file.layers),
        "parameters": sum(pair.down.numel() + pair.up.numel() for pair in file.layers.values()),
        "number_formats": _counts(str(pair.up.dtype).removeprefix("torch.") for pair in file.layers.values()),
        "ranks": _counts(pair.rank for pair in file.layers.values()),
        "alphas": _counts(f"{pair.alpha:g}" for pair in file.layers.values()),
        "metadata": file.metadata,
    }
    if MODEL_HASH in file.metadata:
        report["hash_matches"] = _content_hash(file.path) == file.metadata[MODEL_HASH]
    try:
        fit = fit_lora(file)
        report["fits"] = {"model": fit.architecture, "layers": len(fit.layers), "usual_layers": fit.trainable}
        report["fits_text"] = f"{fit.architecture}: {fit.coverage} layers"
    except UserError as error:
        report["fits"] = None
        report["fits_not"] = error.message
    norms = {stem: difference_norm(pair) for stem, pair in file.layers.items()}
    ordered = sorted(norms.values())
    report["effect"] = {
        "least": ordered[0],
        "median": ordered[len(ordered) // 2],
        "most": ordered[-1],
        "layers_without": sum(norm == 0 for norm in ordered),
    }
    report["layer_table"] = [
        {"name": stem, "in": pair.down.shape[1], "out": pair.up.shape[0], "rank": pair.rank, "alpha": pair.alpha,
         "effect": norms[stem]}
        for stem, pair in file.layers.items()
    ]  # fmt: skip
    return report


def _content_hash(path: Path) -> str:
    """SHA-256 of all bytes after the header of a safetensors file."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        handle.seek(8 + int.from_bytes(handle.read(8), "little"))
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def difference_norm(pair: LoraWeights) -> float:
    """Frobenius norm of alpha / rank * up @ down, in float64 and without the product itself."""
    up, down = pair.up.double(), pair.down.double()
    squared = torch.trace((up.t() @ up) @ (down @ down.t()))
    return abs(pair.alpha) / pair.rank * float(squared.clamp_min(0).sqrt())


def describe_text(report: Mapping[str, Any], layers: bool = False) -> str:
    """The report of `describe` as lines for people; `layers` lists every layer.

    Metadata that say nothing ("None") are left out.
    """
    effect = report["effect"]
    lines = [
        f"{report['path']}",
        f"  format      {report['format']} names, {_listed(report['number_formats'])}, {report['bytes'] / 1e6:.1f} MB",
        f"  rank        {_listed(report['ranks'])}",
        f"  alpha       {_listed(report['alphas'])}",
        f"  layers      {report['layers']}, {report['parameters'] / 1e6:.2f} M parameters",
        f"  fits        {report.get('fits_text') or 'no known model. ' + report['fits_not']}",
        f"  difference  norm {effect['least']:.4g} to {effect['most']:.4g} a layer, median {effect['median']:.4g}",
        f"  fingerprint {report['fingerprint']}",
    ]
    if effect["layers_without"]:
        lines.append(f"  Note: {effect['layers_without']} of {report['layers']} layers change nothing (all zero).")
    if report.get("hash_matches") is False:
        lines.append(f"  Note: {MODEL_HASH} is that of other weights; these were changed afterwards.")
    lines += _metadata_lines(report["metadata"])
    if layers:
        lines.append("Layers")
        lines += [
            f"  {row['name']}  {row['in']} -> {row['out']}, rank {row['rank']}, alpha {row['alpha']:g}, "
            f"norm {row['effect']:.4g}"
            for row in report["layer_table"]
        ]
    return "\n".join(lines) + "\n"


def describe_json(report: Mapping[str, Any], layers: bool = False) -> str:
    """The report as JSON; the table of layers only when `layers` asks for it."""
    shown = {key: value for key, value in report.items() if layers or key != "layer_table"}
    return json.dumps(shown, indent=2, ensure_ascii=False) + "\n"


def _counts(values: Any) -> dict[str, int]:
    return {str(value): count for value, count in Counter(values).most_common()}


def _listed(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({count} layers)" for value, count in counts.items())


def _metadata_lines(metadata: Mapping[str, str]) -> list[str]:
    if not metadata:
        return ["  (no metadata: who trained it how is not recorded)"]
    waiting = {key: text for key, text in sorted(metadata.items()) if text not in _UNSAID}
    lines: list[str] = []
    for title, starts in _GROUPS:
        mine = [key for key in waiting if key.startswith(starts)]
        if mine:
            lines.append(title)
            lines += [f"  {key}: {_short(waiting.pop(key))}" for key in mine]
    return lines


def _short(text: str) -> str:
    plain = " ".join(text.split())
    printable = "".join(letter if letter.isprintable() else "?" for letter in plain)
    return printable if len(printable) <= _SHOWN_TEXT else f"{printable[: _SHOWN_TEXT - 3]}..."
