"""Forward passes of one process in which all take part: what is sent around, and what a failure on the way does."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from backend.errors import EngineError
from backend.training.processes import Processes
from backend.training.shared_forwards import SharedForwards
from backend.training.transformer import TrainingTransformer

INPUTS = (torch.ones(1, 2), torch.ones(1, 3), torch.ones(1, 4), torch.ones(1), None)


class Line:
    """Stands for the processes: what one sends, another receives."""

    sharded = True
    count = 2

    def __init__(self) -> None:
        self.sent: list[Sequence[Tensor | None] | None] = []

    def send(self, inputs: Sequence[Tensor | None] | None) -> None:
        self.sent.append(inputs)

    def receive(self) -> Sequence[Tensor | None] | None:
        return self.sent.pop(0)


class Model:
    """Stands for the transformer: it counts its forward passes, and fails in the one that it is told."""

    def __init__(self, failing: int = 0) -> None:
        self.around: Any = None
        self.ran = 0
        self._failing = failing

    def evaluating(self) -> AbstractContextManager[None]:
        return nullcontext()

    def velocity(self, *arguments: Tensor, text_mask: Tensor | None = None) -> None:
        with nullcontext() if self.around is None else self.around((*arguments, text_mask)):
            self.ran += 1
            if self.ran == self._failing:
                raise MemoryError("no room")


def _pair(failing: int = 0) -> tuple[Line, Model, SharedForwards]:
    line, model = Line(), Model(failing)
    return line, model, SharedForwards(cast(Processes, line), cast(TrainingTransformer, model))


def test_followers_run_what_the_leader_runs_and_no_more() -> None:
    line, model, forwards = _pair()
    with forwards.leading("sample"):
        for _ in range(3):
            model.velocity(*INPUTS[:4])
    assert model.around is None
    assert [inputs is None for inputs in line.sent] == [False, False, False, True]
    follower = Model()
    SharedForwards(cast(Processes, line), cast(TrainingTransformer, follower)).follow()
    assert (follower.ran, line.sent) == (3, [])


def test_a_failure_beside_the_forward_passes_lets_the_others_go_on() -> None:
    line, model, forwards = _pair()
    with pytest.raises(OSError, match="disk"), forwards.leading("sample"):
        model.velocity(*INPUTS[:4])
        raise OSError("the disk is full")
    assert line.sent[-1] is None


def test_a_failure_in_a_forward_pass_ends_the_training_even_if_somebody_lets_it_pass() -> None:
    """The others are in the middle of the pass: nothing more may be sent to them, and this process may not go on."""
    line, model, forwards = _pair(failing=2)
    with pytest.raises(EngineError, match="no room") as raised, forwards.leading("sample"):
        for _ in range(4):
            try:
                model.velocity(*INPUTS[:4])
            except (MemoryError, EngineError):
                continue
    assert raised.value.phase == "sample"
    assert model.ran == 2, "the model is left alone after that"
    assert len(line.sent) == 2
    assert None not in line.sent


def test_whole_models_need_nobody() -> None:
    line, model, forwards = _pair()
    line.sharded = False
    with forwards.leading("validate"):
        model.velocity(*INPUTS[:4])
    assert not line.sent
