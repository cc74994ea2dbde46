"""The clock of a training: rates of this attempt, and a forecast that knows what samples and saves cost."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from backend.progress import Reporter
from backend.training import step_meter
from backend.training.step_meter import StepFacts, TrainingMeter


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


class Records:
    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def emit(self, type: str, /, **fields: Any) -> int:
        assert type == "step"
        self.steps.append(fields)
        return len(self.steps)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(step_meter, "time", clock)
    return clock


def facts(step: int, loss: float | None = 0.5) -> StepFacts:
    norm = None if loss is None else 1.0
    return StepFacts(step=step, epoch=1, loss=loss, grad_norm=norm, bands=[loss, None, None, None, None], rates=[1e-4])


def test_the_forecast_has_the_rate_of_the_steps_and_the_known_cost_of_the_rest(clock: Clock) -> None:
    records, left = Records(), {"sample": 2, "save": 1}
    meter = TrainingMeter(Reporter(records, stream=io.StringIO()), 100, 4, lambda _: left, torch.device("cpu"))
    meter.begin()
    clock.now += 2.0
    meter.step(facts(1))
    with meter.aside("sample"):
        clock.now += 30.0
    with meter.aside("sample"):
        clock.now += 10.0
    clock.now += 2.0
    meter.step(facts(2))
    first, second = records.steps
    assert (first["step_seconds"], first["seconds_per_step"], first["remaining_seconds"]) == (2.0, 2.0, 198.0)
    assert second["step_seconds"] == 2.0, "sampling is no step"
    assert second["remaining_seconds"] == 2.0 * 98 + 2 * 20.0
    assert second["memory_bytes"] > 1 << 20


def test_the_rate_is_the_median_of_the_last_twenty(clock: Clock) -> None:
    records = Records()
    meter = TrainingMeter(Reporter(records, stream=io.StringIO()), 100, 4, lambda _: {}, torch.device("cpu"))
    meter.begin()
    for step, seconds in enumerate([50.0] * 15 + [1.0] * 20, 1):
        clock.now += seconds
        meter.step(facts(step))
    assert records.steps[14]["seconds_per_step"] == 50.0
    assert records.steps[-1]["seconds_per_step"] == 1.0


def test_skipped_steps_and_several_rates_are_told() -> None:
    records = Records()
    meter = TrainingMeter(Reporter(records, stream=io.StringIO()), 2, 1, lambda _: {}, torch.device("cpu"))
    meter.step(facts(1, None))
    meter.step(StepFacts(2, 1, 0.5, 1.0, [0.5, None, None, None, None], [1e-4, 4e-4], max_norm=0.2))
    assert records.steps[0]["skipped"] is True
    assert "lrs" not in records.steps[0]
    assert (records.steps[1]["lrs"], records.steps[1]["max_norm"]) == ([1e-4, 4e-4], 0.2)
    assert "skipped" not in records.steps[1]
