"""The loss of flow matching: mean squared error of the velocity on the frames that are not given, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from backend.training.inputs import ModelInputs


def flow_loss(velocity: Tensor, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
    """The loss of one batch, and that of each sample.

    For each sample: the mean of (velocity - target)^2 over all values of the frames with a loss (T6, B3: frames that
    are given have none), times its weight; then the mean over the samples. A batch thus equals the mean of its samples
    one by one.

    Args:
        velocity: [B, F, H, W, 16], the model's prediction of noise - clean, in any format.

    Returns:
        A float32 scalar with gradients, weighted; and the samples' errors without weights, float32 [B], detached.

    Raises:
        ValueError: shapes that differ, or a sample all of whose frames are given.
    """
    if velocity.shape != inputs.target.shape:
        raise ValueError(f"The velocity is {list(velocity.shape)} and its target {list(inputs.target.shape)}.")
    counted = inputs.loss_mask.sum(1)
    if not bool(counted.all()):
        raise ValueError("All frames of a sample are given; nothing is left to learn.")
    errors = (velocity.float() - inputs.target.float()).square().mean(dim=(2, 3, 4))
    per_sample = (errors * inputs.loss_mask).sum(1) / counted
    return (per_sample * inputs.weights).mean(), per_sample.detach()


def band_losses(sigmas: Tensor, per_sample: Tensor, bands: int = 5) -> list[float | None]:
    """The mean error of the samples in each of `bands` equal bands of sigma, 0..1; None for a band without samples.

    A sigma on a border belongs to the upper band, 1 to the last. Values that are no numbers make their band NaN.

    Args:
        sigmas, per_sample: [N] each, on any device.
    """
    places = (sigmas.detach().double().cpu() * bands).long().clamp(0, bands - 1)
    values = per_sample.detach().double().cpu()
    picked: Sequence[Tensor] = [values[places == band] for band in range(bands)]
    return [float(torch.mean(chosen)) if len(chosen) else None for chosen in picked]
