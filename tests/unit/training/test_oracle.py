"""Losses and gradients against an independent float64 implementation of model, inputs and loss.

The expected inputs are built here from the words of the contract: x = (1 - s) clean + s noise, model time 1000 s, given
frames clean with mask 1 and without a loss, condition channels zero, every text at its own length, once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from backend.config.checkpoint import TransformerConfig
from backend.config.train import TrainOptions
from backend.model.dit import Kandinsky5Transformer
from backend.training.draws import generator
from backend.training.inputs import ModelInputs, make_inputs
from backend.training.loss import flow_loss
from backend.training.training_set import Batch
from tests.unit.model.helpers import SMALL_HEADS, build, random_weights, relative
from tests.unit.training.batches import random_batch
from tests.unit.training.oracle_model import OracleModel

SCALE = (1.0, 2.0, 2.0)
SEED, EPOCH, NUMBER = 17, 3, 5
PLAIN = replace(SMALL_HEADS, visual_cond=False)
CASES = {
    "t2v": ("k5-demo-t2v", "first", SMALL_HEADS, ()),
    "t2v of a model without condition channels": ("k5-demo-t2v", "first", PLAIN, ()),
    "i2v first": ("k5-demo-i2v", "first", SMALL_HEADS, (0,)),
    "i2v first_last": ("k5-demo-i2v", "first_last", SMALL_HEADS, (0, 3)),
}


def _predict(model: Kandinsky5Transformer, inputs: ModelInputs) -> Tensor:
    return model(
        inputs.hidden_states,
        inputs.text,
        inputs.pooled,
        inputs.timesteps,
        text_mask=inputs.text_mask,
        scale_factor=SCALE,
    )


def _gradients(model: Kandinsky5Transformer) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.ndim == 2}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def _expected(
    batch: Batch, sigmas: Tensor, config: TransformerConfig, given: tuple[int, ...], texts: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, list[float], dict[str, Any]]:
    """Weighted loss, plain losses of the samples, gradients; everything in float64."""
    oracle = OracleModel(random_weights(config), config.axes_dims, SCALE)
    count, _, frames, height, width = batch.latents.shape
    noises = torch.randn((count, frames, height, width, 16), generator=generator(SEED, EPOCH, NUMBER, "noise")).double()
    total, plain = torch.zeros((), dtype=torch.float64), []
    for sample, (text, pooled) in enumerate(texts):
        sigma = float(sigmas[sample])
        clean = batch.latents[sample].double().permute(1, 2, 3, 0)
        entered = (1 - sigma) * clean + sigma * noises[sample]
        mask = torch.zeros(frames, height, width, 1, dtype=torch.float64)
        for frame in given:
            entered[frame] = batch.latents_image[sample, :, 0 if frame == 0 else 1].double().permute(1, 2, 0)
            mask[frame] = 1
        if config.visual_cond:
            entered = torch.cat([entered, torch.zeros(frames, height, width, 16).double(), mask], dim=-1)
        velocity = oracle.velocity(entered, text.double(), pooled.double(), 1000 * sigma)
        free = [frame for frame in range(frames) if frame not in given]
        error = (velocity - (noises[sample] - clean))[free].square().mean()
        total = total + error * (2 / (torch.pi * (1 - 2 * sigma + 2 * sigma**2))) / count
        plain.append(float(error.detach()))
    total.backward()
    return total.detach(), plain, {name: weight.grad for name, weight in oracle.weights.items()}


@pytest.mark.parametrize("lengths", [(5,), (3, 7, 5)], ids=["one", "three"])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_equal_the_oracle(case: str, lengths: tuple[int, ...]) -> None:
    """Traps T3 (text once), T4 (lengths), T5 and B3 (mask), T6 (clean frame, no loss), B4 (zeros), B18 (no + 1)."""
    task, mode, config, given = CASES[case]
    # The second sample's caption is dropped: its text and its pooled vector are those of the empty caption.
    batch = random_batch(lengths, dropout=[0.0, 1.0, 0.0][: len(lengths)])
    texts = [(batch.text[i, :length], batch.pooled[i]) for i, length in enumerate(lengths)]
    if len(texts) > 1:
        assert batch.empty_text is not None
        assert batch.empty_pooled is not None
        texts[1] = batch.empty_text, batch.empty_pooled
    options = TrainOptions.model_validate({"task": task, "i2v_mode": mode, "weighting_scheme": "cosmap"})
    inputs = make_inputs(batch, options, SEED, EPOCH, NUMBER, config.in_channels, torch.device("cpu"))
    model = build(config)
    loss, per_sample = flow_loss(_predict(model, inputs), inputs)
    loss.backward()
    expected_loss, expected_plain, expected_gradients = _expected(batch, inputs.sigmas, config, given, texts)
    assert relative(loss.detach(), expected_loss) < 1e-5
    assert relative(per_sample, torch.tensor(expected_plain)) < 1e-5
    found = _gradients(model)
    assert len(found) > 30
    worst = max((relative(gradient, expected_gradients[name]), name) for name, gradient in found.items())
    assert worst[0] < 1e-4, worst


def test_the_oracle_notices_every_trap() -> None:
    """Each known mistake moves the loss by far more than the tolerance, so the test above would see it."""
    _, mode, config, given = CASES["i2v first"]
    batch = random_batch((5,))
    options = TrainOptions.model_validate({"task": "k5-demo-i2v", "i2v_mode": mode, "weighting_scheme": "cosmap"})
    right = make_inputs(batch, options, SEED, EPOCH, NUMBER, config.in_channels, torch.device("cpu"))
    texts = [(batch.text[0], batch.pooled[0])]
    expected, _, _ = _expected(batch, right.sigmas, config, given, texts)
    assert batch.latents_image is not None
    hidden = right.hidden_states
    noisy_first, all_given, filled = hidden.clone(), hidden.clone(), hidden.clone()
    noisy_first[:, 0, ..., :16] = batch.latents[:, :, 0].permute(0, 2, 3, 1)
    all_given[..., -1] = 1
    filled[:, 0, ..., 16:32] = batch.latents_image[:, :, 0].permute(0, 2, 3, 1)
    wrong = {
        "T3, B5: text repeated for each frame": replace(right, text=right.text.repeat(1, 4, 1)),
        "T5, B3: every frame marked as given": replace(right, hidden_states=all_given),
        "T6: frame 0 not the single-image latent": replace(right, hidden_states=noisy_first),
        "T6: a loss on frame 0": replace(right, loss_mask=torch.ones_like(right.loss_mask)),
        "B4: the image in the condition channels": replace(right, hidden_states=filled),
        "B18: time + 1": replace(right, timesteps=right.timesteps + 1),
    }
    model = build(config)
    with torch.no_grad():
        assert relative(flow_loss(_predict(model, right), right)[0], expected) < 1e-5
        for name, inputs in wrong.items():
            assert relative(flow_loss(_predict(model, inputs), inputs)[0], expected) > 5e-5, name


@pytest.mark.parametrize("mode", ["first", "first_last"])
def test_a_batch_equals_the_mean_of_its_samples(mode: str) -> None:
    """T4, B10: one forward for three captions of different lengths, a weighted loss, one sample without its frame."""
    options = TrainOptions.model_validate(
        {"task": "k5-demo-i2v", "i2v_mode": mode, "weighting_scheme": "sigma_sqrt", "i2v_cond_prob": 0.5}
    )
    batch = random_batch((9, 2, 4))
    whole = make_inputs(batch, options, 1, 0, 4, SMALL_HEADS.in_channels, torch.device("cpu"))
    assert whole.text_mask is not None
    assert len({tuple(mask) for mask in whole.loss_mask.tolist()}) == 2, "some samples have given frames, others not"
    together, alone = build(SMALL_HEADS), build(SMALL_HEADS)
    loss, per_sample = flow_loss(_predict(together, whole), whole)
    loss.backward()
    losses = []
    for sample in range(3):
        one = {name: value[sample : sample + 1] for name, value in vars(whole).items()}
        length = int(whole.text_mask[sample].sum())
        single = ModelInputs(**{**one, "text": one["text"][:, :length], "text_mask": None})
        result, plain = flow_loss(_predict(alone, single), single)
        (result / 3).backward()
        losses.append(float(result.detach()))
        assert relative(plain, per_sample[sample : sample + 1]) < 1e-5
    assert abs(sum(losses) / 3 - float(loss.detach())) < 1e-5 * float(loss.detach())
    separate = _gradients(alone)
    assert all(relative(gradient, separate[name]) < 1e-4 for name, gradient in _gradients(together).items())
