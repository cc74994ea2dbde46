"""The loop against closed forms, with models that remember what they were asked."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import pytest
import torch

from backend.sampling.condition import GivenFrames
from backend.sampling.denoise import TextCondition, denoise
from backend.sampling.schedule import draw_noise, seeded_generator, sigma_grid

SHAPE = (3, 4, 6)
POSITIVE = TextCondition(torch.ones(1, 5, 8), torch.ones(1, 4))
NEGATIVE = TextCondition(-torch.ones(1, 3, 8), -torch.ones(1, 4))


@dataclass
class Recorder:
    """velocity = a x + b, with b of the prompt's sign; keeps every argument."""

    slope: float = 0.0
    offset: float = 1.0
    calls: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def __call__(self, hidden_states, text_embeds, pooled_embeds, timesteps) -> torch.Tensor:
        self.calls.append(
            {"input": hidden_states.clone(), "text": text_embeds, "pooled": pooled_embeds, "time": timesteps.clone()}
        )
        sign = 1.0 if float(text_embeds.mean()) > 0 else -1.0
        return self.slope * hidden_states[..., :16] + sign * self.offset


def _noise(seed: int = 1) -> torch.Tensor:
    return draw_noise(seeded_generator(seed), *SHAPE)


def _given(last: bool = False) -> GivenFrames:
    first = torch.full((1, 1, 4, 6, 16), 0.25)
    return GivenFrames(first, 2 * first if last else None)


# --- Euler and guidance -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [0.7, -1.3])
@pytest.mark.parametrize(("steps", "scale"), [(1, 1.0), (7, 3.0), (50, 10.0)])
def test_euler_on_a_linear_field_has_the_closed_form(slope: float, steps: int, scale: float) -> None:
    """x' = x + d (a x): the end is the noise times the product of (1 + a d_i)."""
    grid = sigma_grid(steps, scale)
    found = denoise(Recorder(slope, 0.0), _noise(), POSITIVE, None, grid, 1.0)
    factor = math.prod(1.0 + slope * (float(after) - float(now)) for now, after in itertools.pairwise(grid))
    torch.testing.assert_close(found, _noise() * factor, rtol=1e-5, atol=1e-6)
    assert found.dtype == torch.float32


def test_a_constant_velocity_is_crossed_exactly_whatever_the_grid() -> None:
    for steps, scale in ((1, 1.0), (9, 5.0), (50, 10.0)):
        found = denoise(Recorder(0.0, 2.0), _noise(), POSITIVE, None, sigma_grid(steps, scale), 1.0)
        torch.testing.assert_close(found, _noise() - 2.0, rtol=0, atol=2e-6)


@pytest.mark.parametrize("guidance", [0.0, 0.5, 2.0, 5.0])
def test_guidance_mixes_both_prompts(guidance: float) -> None:
    """v = v_n + g (v_p - v_n) with v_p = 1 and v_n = -1 is 2 g - 1."""
    model = Recorder()
    found = denoise(model, _noise(), POSITIVE, NEGATIVE, sigma_grid(4, 3.0), guidance)
    torch.testing.assert_close(found, _noise() - (2 * guidance - 1), rtol=0, atol=1e-5)
    assert len(model.calls) == 8
    assert [float(call["text"].mean()) for call in model.calls] == [1.0, -1.0] * 4
    assert [float(call["pooled"].mean()) for call in model.calls] == [1.0, -1.0] * 4


def test_guidance_one_makes_one_pass_a_step() -> None:
    """Trap: a peer runs the negative prompt in full and multiplies it by zero."""
    model = Recorder()
    found = denoise(model, _noise(), POSITIVE, NEGATIVE, sigma_grid(6, 3.0), 1.0)
    assert len(model.calls) == 6
    assert all(call["text"] is POSITIVE.text for call in model.calls)
    torch.testing.assert_close(found, _noise() - 1.0, rtol=0, atol=2e-6)


def test_guidance_without_a_negative_prompt_is_an_error_before_the_first_pass() -> None:
    model = Recorder()
    with pytest.raises(ValueError, match="negative prompt"):
        denoise(model, _noise(), POSITIVE, None, sigma_grid(2, 3.0), 2.0)
    assert model.calls == []


def test_the_model_is_told_1000_sigma_in_float32() -> None:
    """Traps B18 (offset of one) and B27 (910.7 rounded to 912)."""
    model, grid = Recorder(), sigma_grid(50, 10.0)
    denoise(model, _noise(), POSITIVE, None, grid, 1.0)
    times = torch.cat([call["time"] for call in model.calls])
    assert times.dtype == torch.float32
    torch.testing.assert_close(times, 1000 * grid[:-1], rtol=1e-6, atol=0)


# --- what the model sees ------------------------------------------------------------------------------------------


def test_without_given_frames_condition_and_mask_are_zero() -> None:
    model = Recorder()
    denoise(model, _noise(), POSITIVE, None, sigma_grid(2, 3.0), 1.0)
    for call in model.calls:
        assert call["input"].shape == (1, *SHAPE, 33)
        assert not call["input"][..., 16:].any()
    assert torch.equal(model.calls[0]["input"][..., :16], _noise())


def test_models_without_condition_channels_see_the_latents_alone() -> None:
    model = Recorder()
    denoise(model, _noise(), POSITIVE, None, sigma_grid(2, 3.0), 1.0, input_channels=16)
    assert {call["input"].shape[-1] for call in model.calls} == {16}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_given_frames_are_clean_in_every_pass_and_in_the_result(last: bool, guidance: float) -> None:
    """Traps B3 (x left noisy, mask everywhere), B4 (image in the condition channels), B9 (not put back at the end)."""
    model, given = Recorder(), _given(last)
    found = denoise(model, _noise(), POSITIVE, NEGATIVE, sigma_grid(5, 10.0), guidance, given)
    for call in model.calls:
        latents, condition, mask = call["input"].split([16, 16, 1], dim=-1)
        assert torch.equal(latents[:, :1], given.first)
        assert not condition.any()
        assert torch.equal(mask[:, :1], torch.ones(1, 1, 4, 6, 1))
        assert not mask[:, 1:-1].any()
        assert bool(mask[:, -1:].all()) == last
        assert torch.equal(latents[:, -1:], 2 * given.first) == last
    assert torch.equal(found[:, :1], given.first)
    assert torch.equal(found[:, -1:], 2 * given.first) == last
    middle = slice(1, -1)
    torch.testing.assert_close(found[:, middle], _noise()[:, middle] - (2 * guidance - 1), rtol=0, atol=1e-5)


def test_given_frames_change_nothing_that_they_were_given() -> None:
    noise, given = _noise(), _given(True)
    denoise(Recorder(), noise, POSITIVE, None, sigma_grid(2, 3.0), 1.0, given)
    assert torch.equal(noise, _noise())
    assert torch.equal(given.first, _given().first)


def test_one_frame_that_is_given_comes_back() -> None:
    noise = draw_noise(seeded_generator(1), 1, 4, 6)
    found = denoise(Recorder(), noise, POSITIVE, None, sigma_grid(2, 3.0), 1.0, _given())
    assert torch.equal(found, _given().first)


# --- stopping -----------------------------------------------------------------------------------------------------


def test_the_callback_comes_before_every_step() -> None:
    model, asked = Recorder(), []

    def before(index: int) -> bool:
        asked.append((index, len(model.calls)))
        return False

    denoise(model, _noise(), POSITIVE, None, sigma_grid(4, 3.0), 1.0, before_step=before)
    assert asked == [(0, 0), (1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize("at", [1, 3])
def test_stopping_keeps_the_clean_clip_that_the_last_step_predicted(at: int) -> None:
    """With velocity 1 the noise is x0 + 1, so every step predicts noise - 1."""
    model = Recorder()
    found = denoise(model, _noise(), POSITIVE, None, sigma_grid(5, 3.0), 1.0, before_step=lambda index: index == at)
    assert len(model.calls) == at
    torch.testing.assert_close(found, _noise() - 1.0, rtol=0, atol=2e-6)


def test_stopping_keeps_given_frames_too() -> None:
    found = denoise(
        Recorder(), _noise(), POSITIVE, None, sigma_grid(5, 3.0), 1.0, _given(True), lambda index: index == 2
    )
    assert torch.equal(found[:, :1], _given().first)
    assert torch.equal(found[:, -1:], 2 * _given().first)


def test_no_gradients_are_kept() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    found = denoise(
        lambda hidden_states, *_: hidden_states[..., :16] * weight, _noise(), POSITIVE, None, sigma_grid(2, 3.0), 1.0
    )
    assert not found.requires_grad
