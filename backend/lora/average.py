"""Post-hoc averages over the checkpoints of a run: an exponential moving average made afterwards."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from backend.errors import UserError
from backend.lora.alphas import FIELD
from backend.lora.formats import LoraFile, LoraWeights, listing

_STEP_NAME = re.compile(r"-step(\d+)$")
_EPOCH_NAME = re.compile(r"-(\d+)$")


def sorted_by_step(files: Sequence[LoraFile]) -> list[LoraFile]:
    """The files by training step: that of their metadata (`ss_steps`), else the number at the end of all their names.

    A name without a number, as the last file of a run has, comes last.

    Raises:
        UserError: the order cannot be told, or two files are of one step.
    """
    steps = [_number(file.metadata.get("ss_steps", "")) for file in files]
    if any(step is None for step in steps):
        for pattern in (_STEP_NAME, _EPOCH_NAME):
            matches = [pattern.search(file.path.stem) for file in files]
            if sum(match is None for match in matches) <= 1:
                steps = [None if match is None else int(match[1]) for match in matches]
                break
        else:
            raise UserError(
                "The order of these files cannot be told: they have no step in their metadata or names. "
                "Give them from the first to the last, with --no_sort.",
                FIELD,
            )
    keys = [float("inf") if step is None else step for step in steps]
    if len(set(keys)) != len(keys):
        raise UserError(
            "Two of these files are of the same step. Leave one out, or give --no_sort with the order that you want.",
            FIELD,
        )
    return [file for _, file in sorted(zip(keys, files, strict=True), key=lambda pair: pair[0])]


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() and len(text) < 18 else None


def ema_weights(count: int, beta: float, beta2: float | None = None) -> list[float]:
    """Weight of each of `count` checkpoints in average = b * average + (1 - b) * next, which starts with the first.

    b is `beta`, or goes evenly from `beta` (at the second checkpoint) to `beta2` (at the last one).
    """
    last = beta if beta2 is None else beta2
    ramp = [beta + (last - beta) * index / max(count - 2, 1) for index in range(count - 1)]
    return _from_betas(ramp)


def power_weights(count: int, sigma_rel: float) -> list[float]:
    """Weight of each of `count` checkpoints in a power-function average of relative width `sigma_rel`.

    b of checkpoint t (from 1) is (1 - 1/t)^(gamma + 1), so checkpoint t weighs (t^(gamma+1) - (t-1)^(gamma+1)) /
    count^(gamma+1). Formula: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models".
    """
    exponent = gamma_of(sigma_rel) + 1
    return _from_betas([(1 - 1 / step) ** exponent for step in range(2, count + 1)])


def gamma_of(sigma_rel: float) -> float:
    """The exponent whose profile t^gamma has this relative standard deviation.

    It is the largest root of g^3 + 7 g^2 + (16 - s^-2) g + (12 - s^-2) = 0.
    """
    inverse = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def _from_betas(betas: Sequence[float]) -> list[float]:
    weights = [1.0]
    for beta in betas:
        weights = [weight * beta for weight in weights] + [1 - beta]
    return weights


def average_layers(
    checkpoints: Sequence[tuple[str, Mapping[str, LoraWeights]]], weights: Sequence[float]
) -> dict[str, LoraWeights]:
    """The weighted sum of the pairs of all checkpoints (name for people, layers by dotted names), in float64.

    The result has the number format of the first checkpoint.

    Raises:
        UserError: layers, shapes or alphas differ: then these are not checkpoints of one run.
    """
    first = checkpoints[0][1]
    _refuse_different(checkpoints)
    found: dict[str, LoraWeights] = {}
    for name, pair in first.items():
        pairs = [layers[name] for _, layers in checkpoints]
        down = _weighted([each.down for each in pairs], weights)
        up = _weighted([each.up for each in pairs], weights)
        found[name] = LoraWeights(down.to(pair.down.dtype), up.to(pair.up.dtype), pair.alpha)
    return found


def _weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros(tensors[0].shape, dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor.double(), alpha=weight)
    return total


def _refuse_different(checkpoints: Sequence[tuple[str, Mapping[str, LoraWeights]]]) -> None:
    first_name, first = checkpoints[0]
    problems = []
    for title, layers in checkpoints[1:]:
        if set(layers) != set(first):
            odd = min(set(layers) ^ set(first))
            problems.append(f"{title}: other layers than {first_name}, among them {odd}")
            continue
        for name, pair in layers.items():
            expected = first[name]
            if (pair.down.shape, pair.up.shape) != (expected.down.shape, expected.up.shape):
                problems.append(f"{title}: {name} has rank {pair.rank}, in {first_name} it is {expected.rank}")
            elif pair.alpha != expected.alpha:
                problems.append(f"{title}: {name} has alpha {pair.alpha:g}, in {first_name} it is {expected.alpha:g}")
    if problems:
        raise UserError(f"These are not checkpoints of one run, so they have no average:{listing(problems)}", FIELD)
