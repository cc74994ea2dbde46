"""Validation: the same noise and noise levels every time, nothing dropped, the training's randomness untouched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backend.config.train import TrainOptions
from backend.training.dataset import load_training_set
from backend.training.inputs import ModelInputs
from backend.training.timesteps import TimestepDistribution
from backend.training.training_set import TrainingSet
from backend.training.validation import Validation
from tests.unit.training.training_folder import clips, stills, together, videos_are_texts

__all__ = ["videos_are_texts"]

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("videos_are_texts")


def _options(**keys: object) -> TrainOptions:
    return TrainOptions.model_validate({"task": "k5-demo-i2v", "i2v_cond_prob": 0.0, **keys})


def _set(folder: Path, options: TrainOptions, *, seed: int = 0, count: int = 8, split: float = 0.5) -> TrainingSet:
    facts = dict.fromkeys((f"clip{number}" for number in range(count)), "80 60 9 24")
    keys = {"target_frames": [9], "validation_split": split, "caption_dropout": 1.0}
    return load_training_set(options, together(clips(folder, facts, **keys)), seed)


def test_sigmas_are_the_middles_of_the_trained_distribution(tmp_path: Path) -> None:
    options = _options(validation_timesteps=5, min_timestep=100)
    found = Validation(_set(tmp_path, options), options, 33, CPU)
    shares = TimestepDistribution.from_options(options).cumulative(found.sigmas)
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]).double(), atol=1e-6, rtol=0)


def test_inputs_are_fixed_whole_and_conditioned(tmp_path: Path) -> None:
    options = _options(weighting_scheme="sigma_sqrt")
    held = _set(tmp_path, options)
    validation = Validation(held, options, 33, CPU)
    assert len(validation.numbers) == 4
    seen = []
    for number, item in zip(validation.numbers, held.held_out, strict=True):
        batch = held.read([number])
        inputs = validation.inputs(number)
        seen.append(inputs[0].target)
        for each in inputs:
            # i2v_cond_prob is 0 and caption_dropout 1: both are for training only.
            assert each.loss_mask.tolist() == [[False, True, True]], item.name
            assert batch.latents_image is not None
            assert torch.equal(each.hidden_states[:, 0, ..., :16], batch.latents_image[:, :, 0].permute(0, 2, 3, 1))
            assert torch.equal(each.text, batch.text)
            assert torch.equal(each.pooled, batch.pooled)
            assert each.weights.tolist() == [1.0]
            assert torch.equal(each.target, inputs[0].target), "one noise for all noise levels"
        again = Validation(held, options, 33, CPU).inputs(number)
        assert all(torch.equal(one.hidden_states, two.hidden_states) for one, two in zip(inputs, again, strict=True))
    assert not torch.equal(seen[0], seen[1])
    # Neither the run's seed nor the order of items changes an item's noise.
    other = _set(tmp_path, options, seed=5)
    assert torch.equal(Validation(other, options, 33, CPU).inputs(other.held_out_numbers[2])[1].target, seen[2])


def test_the_result_is_the_mean_over_items_and_levels(tmp_path: Path) -> None:
    options = _options(validation_timesteps=3)
    validation = Validation(_set(tmp_path, options), options, 33, CPU)
    calls: list[ModelInputs] = []

    def predict(inputs: ModelInputs) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        calls.append(inputs)
        wrong = inputs.target.clone()
        wrong[:, 0] += 1000.0  # The given frame: not counted.
        return wrong + float(inputs.sigmas[0])

    state = torch.get_rng_state()
    result = validation.run(predict)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.is_grad_enabled()
    assert len(calls) == 4 * 3
    assert {inputs.hidden_states.shape[0] for inputs in calls} == {1}
    expected = [float(sigma) ** 2 for sigma in validation.sigmas]
    assert [sigma for sigma, _ in result.by_sigma] == validation.sigmas.tolist()
    assert [loss for _, loss in result.by_sigma] == pytest.approx(expected, rel=1e-5)
    assert result.loss == pytest.approx(sum(expected) / 3, rel=1e-5)
    assert result.items == 4
    assert result.seconds > 0


def test_many_held_out_items_are_thinned_evenly(tmp_path: Path) -> None:
    options = _options(max_validation_items=3)
    held = _set(tmp_path, options, count=20, split=0.5)
    validation = Validation(held, options, 33, CPU)
    assert [number - len(held.items) for number in validation.numbers] == [0, 3, 6]


def test_stills_are_validated_as_text_to_video(tmp_path: Path) -> None:
    options = _options()
    held = load_training_set(options, together(stills(tmp_path, 4, validation_split=0.5)), 0)
    validation = Validation(held, options, 33, CPU)
    assert all(each.loss_mask.all() for number in validation.numbers for each in validation.inputs(number))


def test_without_held_out_items_there_is_nothing_to_measure(tmp_path: Path) -> None:
    options = _options()
    validation = Validation(_set(tmp_path, options, split=0.0), options, 33, CPU)
    assert validation.numbers == ()
    with pytest.raises(ValueError, match="Nothing is held out"):
        validation.run(lambda inputs: inputs.target)
