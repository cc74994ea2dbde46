"""Which model of the family a LoRA file belongs to, told by the models' own lists of layers, without weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from backend.config.checkpoint import KNOWN_ARCHITECTURES, TransformerConfig, identify
from backend.errors import UserError
from backend.lora.alphas import FIELD
from backend.lora.formats import LoraFile, LoraWeights
from backend.lora.patterns import trainable_names
from backend.lora.targets import Target, linear_targets, resolve
from backend.model.dit import Kandinsky5Transformer


@dataclass(frozen=True)
class Fit:
    """A LoRA on a model: the model's name, its pairs by dotted names, and how many layers are usually trained."""

    architecture: str
    layers: dict[str, LoraWeights]
    trainable: int

    @property
    def coverage(self) -> str:
        """'624 of 624 layers' in words, with what lies beyond the usual ones."""
        usual = len(trainable_names(self.layers))
        extra = len(self.layers) - usual
        return f"{usual} of {self.trainable}" + (f" and {extra} more" if extra else "")


@functools.cache
def known_layers(config: TransformerConfig) -> Mapping[str, Target]:
    """Every linear layer of a DiT of these sizes by dotted name; the layers have shapes and no memory."""
    with torch.device("meta"):
        return linear_targets(Kandinsky5Transformer(config))


def fit_lora(file: LoraFile, architecture: str | None = None, dit: str | Path | None = None) -> Fit:
    """Resolve a LoRA's names strictly on a model: the one called `architecture`, that of the header of `dit`, or, when
    neither is given, the known one that all its entries fit.

    Raises:
        UserError: entries that match no layer or do not have its shape, `dit` is no DiT, or no known model fits.
    """
    if dit is not None:
        info = identify(dit)
        if info.config is None:
            raise UserError(info.unsupported or f"{dit} is not a Kandinsky 5 DiT but: {info.summary}.", "dit")
        return _fit(file, info.architecture or "custom", info.config)
    if architecture is not None:
        return _fit(file, architecture, KNOWN_ARCHITECTURES[architecture])
    refusals: list[UserError] = []
    for name, config in KNOWN_ARCHITECTURES.items():
        try:
            return _fit(file, name, config)
        except UserError as error:
            refusals.append(error)
    widths = _widths(file)
    of_width = [
        error
        for error, config in zip(refusals, KNOWN_ARCHITECTURES.values(), strict=True)
        if config.model_dim in widths
    ]
    if of_width:
        raise of_width[0]
    raise UserError(
        f"{file.path} fits no known Kandinsky 5 model: its first layer is {next(iter(file.layers))[:150]!r}. "
        "Give --dit for a model of another size, or use a LoRA for this family.",
        FIELD,
    )


def _fit(file: LoraFile, name: str, config: TransformerConfig) -> Fit:
    targets = known_layers(config)
    return Fit(name, resolve(file, targets), len(trainable_names(targets)))


def _widths(file: LoraFile) -> set[int]:
    ends = ("self_attention.to_query", "self_attention_to_query")
    return {weights.down.shape[1] for stem, weights in file.layers.items() if stem.endswith(ends)}
