"""What is due after which step, counted by hand."""

from __future__ import annotations

from typing import Any

import pytest

from backend.config.state_record import Position
from backend.config.train import TrainOptions
from backend.data.epochs import Length
from backend.training.due import Due

# Three steps an epoch, ten steps in all: the fourth epoch is not finished.
LENGTH = Length(batches_per_epoch=5, steps_per_epoch=3, total_steps=10, epochs=4)
PLACES = [Position(step, step // 3, 2 * (step % 3)) for step in range(1, 11)]


def due(*, held_out: bool = False, **options: Any) -> Due:
    return Due(TrainOptions(**options), LENGTH, held_out=held_out)


def steps(question: Any) -> list[int]:
    return [place.step for place in PLACES if question(place)]


def test_saves_by_step_and_epoch_leave_out_the_last_step() -> None:
    plan = due(save_every_n_epochs=2, save_every_n_steps=5)
    assert steps(plan.save_epoch) == [6]
    assert steps(plan.save_step) == [5]
    whole = Due(TrainOptions(save_every_n_epochs=1), Length(5, 3, 9, 3), held_out=False)
    assert [place.step for place in PLACES[:9] if whole.save_epoch(place)] == [3, 6]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [3, 6, 9, 10]),
        ({"validate_every_n_steps": 4}, [4, 8, 10]),
        ({"validate_every_n_epochs": 3}, [9, 10]),
        ({"validate_every_n_steps": 5, "validate_every_n_epochs": 2}, [5, 6, 10]),
    ],
)
def test_validation_is_by_epoch_unless_said_and_always_at_the_end(options: dict[str, int], expected: list[int]) -> None:
    assert steps(due(held_out=True, **options).validate) == expected
    assert steps(due(held_out=False, **options).validate) == []


def test_samples_need_prompts() -> None:
    assert steps(due(sample_every_n_steps=4).sample) == []
    assert steps(due(sample_every_n_steps=4, sample_prompts="p.txt").sample) == [4, 8]
    assert steps(due(sample_every_n_epochs=2, sample_prompts="p.txt").sample) == [6]


def test_what_is_still_to_come_is_what_will_be_due() -> None:
    plan = due(held_out=True, save_every_n_steps=4, sample_every_n_epochs=1, sample_prompts="p.txt")
    for done in range(10):
        later = [place for place in PLACES if place.step > done]
        upcoming = plan.upcoming(done)
        assert upcoming["sample"] == sum(map(plan.sample, later))
        # The file of the end comes on top of those by step.
        assert upcoming["save"] == sum(map(plan.save_step, later)) + 1
        assert upcoming["validate"] == sum(map(plan.validate, later))
    assert plan.upcoming(10) == {"save": 0, "validate": 0, "sample": 0}
