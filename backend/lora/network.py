"""Attaches LoRA files to a model, changes their strengths while it is loaded, and takes them away again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from backend.errors import UserError
from backend.lora.formats import LoraFile, read_lora
from backend.lora.modules import LoraBranch, LoraLinear
from backend.lora.targets import Target, linear_targets, resolve

STRENGTH_FIELD = "lora_multiplier"


class LoraSet:
    """The LoRAs that one call attached, in its order. Strength 0 skips a LoRA: the output is the base's bit for bit."""

    def __init__(self, files: Sequence[LoraFile], branches: Sequence[Sequence[tuple[Target, LoraBranch]]]) -> None:
        self.files = tuple(files)
        self._branches = [list(pairs) for pairs in branches]
        self._strengths = [pairs[0][1].strength for pairs in branches]

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strength of each LoRA."""
        return tuple(self._strengths)

    def set_strength(self, index: int, strength: float) -> None:
        """Give the LoRA `index` another strength; nothing is loaded or copied.

        Raises:
            UserError: the strength is not a finite number.
        """
        checked = check_strength(strength)
        self._strengths[index] = checked
        for _, branch in self._branches[index]:
            branch.strength = checked

    def detach(self) -> None:
        """Take these LoRAs away. A layer that carries no other branch is the original module object again."""
        for pairs in self._branches:
            for target, branch in pairs:
                layer = target.layer
                assert isinstance(layer, LoraLinear)
                layer.remove_branch(branch)
                if not len(layer.branches):
                    setattr(target.parent, target.attribute, layer.base)
            pairs.clear()


def check_strength(strength: float) -> float:
    """`strength` as a float.

    Raises:
        UserError: it is NaN or infinite.
    """
    if not math.isfinite(strength):
        raise UserError(f"A LoRA's strength must be a finite number, not {strength}.", STRENGTH_FIELD)
    return float(strength)


def attach_loras(transformer: nn.Module, loras: Sequence[tuple[str | Path, float]]) -> LoraSet:
    """Attach LoRA files, each with its strength, as low-rank layers beside the frozen linear layers of `transformer`.

    Several LoRAs on one layer add up. Weights are never changed, so quantised layers work as they are; the pairs live
    on each layer's device, in its number format (in the model's where the layer holds 8-bit codes). All files are read
    and checked before the first layer is touched.

    Raises:
        UserError: a file is not a LoRA or does not fit the model, or a strength is not finite.
    """
    targets = linear_targets(transformer)
    strengths = [check_strength(strength) for _, strength in loras]
    files = [read_lora(path) for path, _ in loras]
    resolved = [resolve(file, targets) for file in files]
    model_dtype = getattr(transformer, "dtype", None)
    branches = []
    for layers, strength in zip(resolved, strengths, strict=True):
        pairs = []
        for name, weights in layers.items():
            target = targets[name]
            layer = target.layer
            if not isinstance(layer, LoraLinear):
                layer = LoraLinear(layer)
                setattr(target.parent, target.attribute, layer)
            pairs.append((target, layer.add_branch(weights.down, weights.up, weights.alpha, strength, model_dtype)))
        branches.append(pairs)
    return LoraSet(files, branches)
