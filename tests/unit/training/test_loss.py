"""The loss by hand-made numbers, and the bands of sigma."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from backend.training.inputs import ModelInputs
from backend.training.loss import band_losses, flow_loss


def _inputs(loss_mask: list[list[bool]], weights: list[float]) -> ModelInputs:
    count, frames = len(loss_mask), len(loss_mask[0])
    target = torch.zeros(count, frames, 2, 2, 16)
    one = torch.zeros(count)
    return ModelInputs(
        target, torch.zeros(count, 1, 4), None, torch.zeros(count, 4), one, one, target, torch.tensor(loss_mask),
        torch.tensor(weights),
    )  # fmt: skip


def test_frames_without_a_loss_do_not_count_and_weights_do() -> None:
    """T6, B3: sample 0 has errors 9 (given), 1, 4 -> 2.5; sample 1 has 9, 1, 4 -> 14 / 3."""
    inputs = _inputs([[False, True, True], [True, True, True]], [2.0, 3.0])
    velocity = torch.tensor([3.0, 1.0, -2.0])[None, :, None, None, None].expand(2, 3, 2, 2, 16).clone().requires_grad_()
    loss, per_sample = flow_loss(velocity, inputs)
    torch.testing.assert_close(per_sample, torch.tensor([2.5, 14 / 3]))
    assert not per_sample.requires_grad
    assert abs(float(loss.detach()) - (2 * 2.5 + 3 * 14 / 3) / 2) < 1e-6
    loss.backward()
    assert velocity.grad is not None
    assert not velocity.grad[0, 0].any(), "what the model says of given frames is of no interest"
    # d/dv of weight / samples * mean((v - 0)^2) over the 2 * 2 * 2 * 16 values that count.
    expected = 2.0 / 2 * 2 * 1.0 / (2 * 2 * 2 * 16)
    torch.testing.assert_close(velocity.grad[0, 1], torch.full((2, 2, 16), expected))


def test_the_loss_is_float32_whatever_the_model_computes_in() -> None:
    inputs = _inputs([[True]], [1.0])
    velocity = torch.full((1, 1, 2, 2, 16), 1.0078125, dtype=torch.bfloat16)
    loss, per_sample = flow_loss(velocity, inputs)
    assert loss.dtype == per_sample.dtype == torch.float32
    # Squared in bfloat16 it would be 1.015625.
    assert float(loss) == pytest.approx(1.0078125**2, rel=1e-6)


def test_nonsense_is_refused() -> None:
    inputs = _inputs([[False]], [1.0])
    with pytest.raises(ValueError, match="nothing is left to learn"):
        flow_loss(inputs.target, inputs)
    with pytest.raises(ValueError, match="its target"):
        flow_loss(inputs.target[..., :1], replace(inputs, loss_mask=torch.tensor([[True]])))


def test_bands() -> None:
    sigmas = torch.tensor([0.0, 0.1, 0.2, 0.79, 1.0])
    losses = torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0])
    assert band_losses(sigmas, losses) == [2.0, 5.0, None, 7.0, 9.0]
    assert band_losses(sigmas, losses, bands=1) == [5.0]
    found = band_losses(sigmas, torch.tensor([1.0, math.nan, 5.0, 7.0, 9.0]))
    assert math.isnan(found[0] or 0)
    assert found[1:] == [5.0, None, 7.0, 9.0]
