"""What the model is given: given frames, masks, captions, noise, and that a position alone decides all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from backend.config.train import TrainOptions
from backend.training.draws import generator, reseed, seed_of
from backend.training.inputs import ModelInputs, make_inputs
from tests.unit.training.batches import random_batch

CPU = torch.device("cpu")


def _inputs(batch: Any, b: int = 2, *, seed: int = 3, channels: int = 33, **keys: object) -> ModelInputs:
    options = TrainOptions.model_validate({"task": "k5-demo-i2v", **keys})
    return make_inputs(batch, options, seed, 1, b, channels, CPU)


def test_the_noisy_latent_its_time_and_its_target() -> None:
    batch = random_batch((3, 3))
    inputs = _inputs(batch, task="k5-demo-t2v")
    clean = batch.latents.permute(0, 2, 3, 4, 1)
    noise = torch.randn(clean.shape, generator=generator(3, 1, 2, "noise"))
    sigma = inputs.sigmas[:, None, None, None, None]
    torch.testing.assert_close(inputs.hidden_states[..., :16], (1 - sigma) * clean + sigma * noise)
    torch.testing.assert_close(inputs.target, noise - clean)
    assert len(set(inputs.sigmas.tolist())) == 2, "a time for each sample"
    # B18: exactly 1000 sigma.
    assert torch.equal(inputs.timesteps, 1000 * inputs.sigmas)
    assert not inputs.hidden_states[..., 16:].any()
    assert inputs.loss_mask.all()
    assert {value.dtype for value in vars(inputs).values() if value is not None} == {torch.float32, torch.bool}
    assert _inputs(batch, task="k5-demo-t2v", channels=16).hidden_states.shape[-1] == 16


@pytest.mark.parametrize(("mode", "given"), [("first", {0: 0}), ("first_last", {0: 0, 4: 1})])
def test_given_frames_are_clean_marked_and_without_a_loss(mode: str, given: dict[int, int]) -> None:
    """T5, T6, B3, B4: frame -> which of the two single images."""
    batch = random_batch((2, 4), (5, 4, 6))
    inputs, plain = _inputs(batch, i2v_mode=mode), _inputs(batch, task="k5-demo-t2v")
    assert batch.latents_image is not None
    for frame in range(5):
        mask = inputs.hidden_states[:, frame, ..., 32]
        assert not inputs.hidden_states[:, frame, ..., 16:32].any(), "condition channels stay zero"
        if frame in given:
            image = batch.latents_image[:, :, given[frame]].permute(0, 2, 3, 1)
            assert torch.equal(inputs.hidden_states[:, frame, ..., :16], image)
            assert mask.eq(1).all()
        else:
            assert torch.equal(inputs.hidden_states[:, frame, ..., :16], plain.hidden_states[:, frame, ..., :16])
            assert mask.eq(0).all()
        assert inputs.loss_mask[:, frame].tolist() == [frame not in given] * 2


def test_a_still_is_trained_as_text_to_video() -> None:
    """T20: its only frame would be given and asked for at once. A clip of one frame is a still too."""
    for kinds in (["image"], ["video"]):
        inputs = _inputs(random_batch((3,), (1, 4, 6), kinds=kinds))
        assert inputs.loss_mask.all()
        assert not inputs.hidden_states[..., 16:].any()


def test_some_clips_get_their_frames_and_some_do_not() -> None:
    batch = random_batch((1,) * 50, (3, 2, 2))
    for share, low, high in ((0.0, 0, 0), (0.3, 0.27, 0.33), (1.0, 1, 1)):
        chosen = torch.stack([~_inputs(batch, b, i2v_cond_prob=share).loss_mask[:, 0] for b in range(40)])
        assert low <= float(chosen.float().mean()) <= high
        if share == 0.3:
            assert 0 < int(chosen[0].sum()) < 50, "decided for each sample, not for each batch"


def test_a_model_without_mask_channel_cannot_be_given_frames() -> None:
    with pytest.raises(ValueError, match="no mask channel"):
        _inputs(random_batch((1,)), channels=16)
    with pytest.raises(ValueError, match="none of Kandinsky"):
        _inputs(random_batch((1,)), channels=20)


def test_a_dropped_caption_takes_its_pooled_vector_along() -> None:
    batch = random_batch((5, 1, 3), dropout=[0.0, 1.0, 0.0])
    inputs = _inputs(batch)
    assert batch.empty_text is not None
    assert batch.empty_pooled is not None
    assert inputs.text_mask is not None
    assert inputs.text_mask.sum(1).tolist() == [5, 2, 3]
    assert torch.equal(inputs.text[1, :2], batch.empty_text)
    assert not inputs.text[1, 2:].any()
    assert torch.equal(inputs.pooled[1], batch.empty_pooled)
    for kept in (0, 2):
        assert torch.equal(inputs.text[kept], batch.text[kept])
        assert torch.equal(inputs.pooled[kept], batch.pooled[kept])
    # All dropped: equal lengths, no mask; the text is there once, whatever the number of frames (T3, B5).
    dropped = _inputs(random_batch((5, 1), dropout=[1.0, 1.0]))
    assert dropped.text.shape == (2, 2, 48)
    assert dropped.text_mask is None


def test_captions_are_dropped_as_often_as_asked() -> None:
    batch = random_batch((7,) * 50, (1, 2, 2), dropout=[0.2] * 50)
    counts = []
    for b in range(40):
        mask = _inputs(batch, b).text_mask
        counts.append(0 if mask is None else int((mask.sum(1) == 2).sum()))
    assert 0.17 < sum(counts) / 2000 < 0.23
    assert len(set(counts)) > 3


def test_a_position_decides_everything_and_nothing_else_is_touched() -> None:
    batch = random_batch((5, 1, 3), dropout=[0.5] * 3)
    state = torch.get_rng_state()
    first = _inputs(batch, i2v_cond_prob=0.5)
    torch.manual_seed(99)
    again = _inputs(batch, i2v_cond_prob=0.5)
    for name, value in vars(first).items():
        other = getattr(again, name)
        assert value is other is None or torch.equal(value, other), name
    torch.set_rng_state(state)
    _inputs(batch)
    assert torch.equal(state, torch.get_rng_state())
    for other in (_inputs(batch, 3), _inputs(batch, seed=4)):
        assert not torch.equal(first.target, other.target)
        assert not torch.equal(first.sigmas, other.sigmas)


def test_an_option_changes_nothing_but_what_it_is_for() -> None:
    """Each purpose has draws of its own, so runs that differ in one option can be compared."""
    batch = random_batch((5, 1, 3), dropout=[0.5] * 3)
    plain, other = (
        _inputs(batch),
        _inputs(batch, i2v_cond_prob=0.0, weighting_scheme="cosmap", timestep_sampling="mode"),
    )
    assert torch.equal(plain.target, other.target)
    assert torch.equal(plain.text, other.text)
    assert not torch.equal(plain.sigmas, other.sigmas)


def test_seeds_of_positions() -> None:
    assert seed_of(1, 23, 4, "noise") != seed_of(12, 3, 4, "noise"), "parts are kept apart"
    assert 0 <= seed_of(1, 2, 3, "x") < 2**32
    seeds = {seed_of(0, epoch, b, what) for epoch in range(10) for b in range(100) for what in ("noise", "frames")}
    assert len(seeds) == 2000
    reseed(1, 2, 3)
    values = torch.rand(3)
    reseed(1, 2, 4)
    assert not torch.equal(values, torch.rand(3))
    reseed(1, 2, 3)
    assert torch.equal(values, torch.rand(3))


def test_inputs_move_as_a_whole() -> None:
    inputs = _inputs(random_batch((2, 1)))
    moved = inputs.to(torch.device("meta"))
    assert {value.device.type for value in vars(moved).values()} == {"meta"}
