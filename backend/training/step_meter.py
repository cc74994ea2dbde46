"""Counts optimizer steps: how fast this attempt is, how long the rest will take, and the record of each step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch

from backend.model.device import used_memory
from backend.progress import Reporter

_WINDOW = 20


@dataclass(frozen=True)
class StepFacts:
    """What one step measured.

    Attributes:
        step, epoch: of this step, both from 1.
        loss: mean over the step's samples, without weights; None when the step was skipped.
        grad_norm: before clipping; None when skipped.
        bands: mean loss of five noise bands, None where the step had no sample.
        rates: learning rate of each group of parameters.
        max_norm: largest norm of a layer's difference, with --scale_weight_norms.
    """

    step: int
    epoch: int
    loss: float | None
    grad_norm: float | None
    bands: list[float | None]
    rates: list[float]
    max_norm: float | None = None

    @property
    def skipped(self) -> bool:
        """Whether the optimizer was left alone because a number was not finite."""
        return self.loss is None


class TrainingMeter:
    """The clock of one attempt; what is no step (samples, saves, validation) is timed by itself.

    Args:
        total: steps of the whole training.
        epochs: its epochs.
        upcoming: how often each kind of interruption is still to come after a step, as far as it is planned.
        device: whose memory is shown.
    """

    def __init__(
        self,
        reporter: Reporter,
        total: int,
        epochs: int,
        upcoming: Callable[[int], Mapping[str, int]],
        device: torch.device,
    ) -> None:
        self._reporter, self._total, self._epochs = reporter, total, epochs
        self._upcoming, self._device = upcoming, device
        self._times: deque[float] = deque(maxlen=_WINDOW)
        self._costs: dict[str, deque[float]] = {}
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._last = time.perf_counter()

    def begin(self) -> None:
        """Start the clock."""
        self._last = time.perf_counter()

    @contextmanager
    def aside(self, kind: str) -> Iterator[None]:
        """Time something that is no step, by its kind; the clock of the steps stands still meanwhile."""
        began = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - began
            self._costs.setdefault(kind, deque(maxlen=_WINDOW)).append(took)
            self._last += took

    def step(self, facts: StepFacts) -> dict[str, Any]:
        """Record a step in the journal and on the terminal; returns what was recorded."""
        now = time.perf_counter()
        took = now - self._last
        self._last = now
        self._times.append(took)
        rate = median(self._times)
        remaining = self._remaining(facts.step, rate)
        fields: dict[str, Any] = {
            "step": facts.step,
            "total": self._total,
            "epoch": facts.epoch,
            "epochs": self._epochs,
            "loss": facts.loss,
            "lr": facts.rates[0],
            "grad_norm": facts.grad_norm,
            "band_loss": facts.bands,
            "seconds_per_step": round(rate, 4),
            "remaining_seconds": round(remaining, 2),
            "step_seconds": round(took, 4),
            "memory_bytes": used_memory(self._device),
        }
        if len(set(facts.rates)) > 1:
            fields["lrs"] = facts.rates
        if facts.max_norm is not None:
            fields["max_norm"] = facts.max_norm
        if facts.skipped:
            fields["skipped"] = True
        self._reporter.journal.emit("step", **fields)
        self._show(facts, rate, remaining)
        return fields

    def _remaining(self, step: int, rate: float) -> float:
        """Seconds of the steps that are left, and of the interruptions whose cost is known by now."""
        upcoming = self._upcoming(step)
        aside = sum(fmean(costs) * upcoming.get(kind, 0) for kind, costs in self._costs.items())
        return rate * max(self._total - step, 0) + aside

    def _show(self, facts: StepFacts, rate: float, remaining: float) -> None:
        if facts.loss is not None:
            self._losses.append(facts.loss)
        loss = "skipped: not finite" if facts.loss is None else f"loss {facts.loss:.4f}"
        mean = f" (mean of {len(self._losses)}: {fmean(self._losses):.4f})" if self._losses else ""
        minutes, seconds = divmod(round(remaining), 60)
        hours, minutes = divmod(minutes, 60)
        self._reporter.line(
            f"step {facts.step}/{self._total}, epoch {facts.epoch}/{self._epochs}, {loss}{mean}, {rate:.2f} s/step, "
            f"{hours}:{minutes:02d}:{seconds:02d} left",
            end=facts.step == self._total,
        )
