"""Every schedule against its closed form in float64 over all steps, and against itself saved and loaded."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from backend.config.options import from_mapping
from backend.config.train import TrainOptions
from backend.config.train_steps import SCHEDULES
from backend.errors import Problems
from backend.training.optimizers import make_optimizer
from backend.training.schedules import REX_MINIMUM, OwnRates, Schedule, make_schedule, schedule_notices

TOTAL = 60
RATE = 3e-4
RATIO = 4.0


def _options(**values: Any) -> TrainOptions:
    return from_mapping(TrainOptions, {"learning_rate": RATE, **values})


def _optimizer(options: TrainOptions) -> Optimizer:
    """Two groups, as LoRA+ has them."""
    parameters = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    groups = [{"params": [parameters[0]], "lr": RATE}, {"params": [parameters[1]], "lr": RATIO * RATE}]
    return make_optimizer(groups, options)


def _advance(optimizer: Optimizer, schedule: Schedule) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    schedule.step()


def _rates(options: TrainOptions, steps: int = TOTAL) -> list[float]:
    """The factor that each step is made with; both groups have the same. torch's own warnings are errors."""
    optimizer = _optimizer(options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = make_schedule(optimizer, options, TOTAL)
        factors = []
        for _ in range(steps):
            first, second = (group["lr"] for group in optimizer.param_groups)
            assert second == pytest.approx(RATIO * first, rel=1e-12, abs=1e-30)
            factors.append(first / RATE)
            _advance(optimizer, schedule)
    return factors


def _warm(warmup: int, rest: Callable[[int], float]) -> Callable[[int], float]:
    return lambda step: step / warmup if step < warmup else rest(step)


def _share(step: int, warmup: int) -> float:
    return (step - warmup) / (TOTAL - warmup)


def _wsd(step: int, warmup: int, decay: int, low: float) -> float:
    if step < warmup:
        return low + (1 - low) * step / warmup
    done = max(0, step - (TOTAL - decay)) / decay
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))


def _rex(step: int, warmup: int, low: float) -> float:
    left = 1 - _share(step, warmup)
    return low + (1 - low) * left / (0.1 + 0.9 * left)


CLOSED_FORMS: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    "constant": ({}, lambda step: 1.0),
    # A peer refuses a constant rate with a warm-up.
    "constant, warm-up": ({"lr_scheduler": "constant", "lr_warmup_steps": "6"}, _warm(6, lambda step: 1.0)),
    "constant_with_warmup": ({"lr_warmup_steps": "10%"}, _warm(6, lambda step: 1.0)),
    "linear": ({"lr_warmup_steps": "0.2"}, _warm(12, lambda step: 1 - _share(step, 12))),
    "linear, no warm-up": ({"lr_scheduler": "linear"}, lambda step: 1 - step / TOTAL),
    "cosine": ({"lr_warmup_steps": "6"}, _warm(6, lambda step: 0.5 * (1 + math.cos(math.pi * _share(step, 6))))),
    "cosine, 3 half waves": (
        {"lr_scheduler": "cosine", "lr_scheduler_num_cycles": 3.0},
        lambda step: 0.5 * (1 + math.cos(3 * math.pi * step / TOTAL)),
    ),
    "cosine_with_restarts": (
        {"lr_warmup_steps": "6", "lr_scheduler_num_cycles": 3.0},
        _warm(6, lambda step: 0.5 * (1 + math.cos(math.pi * ((3 * _share(step, 6)) % 1.0)))),
    ),
    "polynomial": (
        {"lr_warmup_steps": "6", "lr_scheduler_power": 2.0},
        _warm(6, lambda step: ((RATE - 1e-7) * (1 - _share(step, 6)) ** 2 + 1e-7) / RATE),
    ),
    "polynomial, own end": (
        {"lr_scheduler": "polynomial", "lr_scheduler_args": ["lr_end=1e-5"]},
        lambda step: ((RATE - 1e-5) * (1 - step / TOTAL) + 1e-5) / RATE,
    ),
    "inverse_sqrt": ({"lr_warmup_steps": "10"}, _warm(10, lambda step: math.sqrt(10 / step))),
    "inverse_sqrt, own scale": (
        {"lr_scheduler": "inverse_sqrt", "lr_warmup_steps": "6", "lr_scheduler_timescale": 20},
        _warm(6, lambda step: math.sqrt(20 / (step + 14))),
    ),
    "cosine_with_min_lr": (
        {"lr_warmup_steps": "6", "lr_scheduler_min_lr_ratio": 0.2},
        _warm(6, lambda step: 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * _share(step, 6)))),
    ),
    "warmup_stable_decay": (
        {"lr_warmup_steps": "6", "lr_decay_steps": "25%", "lr_scheduler_min_lr_ratio": 0.1},
        lambda step: _wsd(step, 6, 15, 0.1),
    ),
    "piecewise_constant": (
        {"lr_scheduler_args": ["step_rules=1:10,0.5:25,0.125"]},
        lambda step: 1.0 if step < 10 else 0.5 if step < 25 else 0.125,
    ),
    "rex": ({}, lambda step: _rex(step, 0, 0.01)),
    "rex, warm-up": (
        {"lr_scheduler": "rex", "lr_warmup_steps": "12", "lr_scheduler_min_lr_ratio": 0.0},
        _warm(12, lambda step: _rex(step, 12, 0.0)),
    ),
}  # fmt: skip


def _case(name: str) -> tuple[TrainOptions, Callable[[int], float]]:
    values, formula = CLOSED_FORMS[name]
    return _options(**{"lr_scheduler": name, **values}), formula


def test_every_schedule_is_compared() -> None:
    assert set(SCHEDULES) - {"adafactor"} <= set(CLOSED_FORMS)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_form_of_every_step(name: str) -> None:
    options, formula = _case(name)
    factors = _rates(options)
    for step, factor in enumerate(factors):
        assert factor == pytest.approx(formula(step), rel=1e-12, abs=1e-15), f"step {step}"
    assert schedule_notices(options) == []


@pytest.mark.parametrize("name", CLOSED_FORMS)
@pytest.mark.parametrize("stop", [7, 33])
def test_saved_and_loaded_it_goes_on_exactly(name: str, stop: int) -> None:
    """Trap T17: a resumed schedule stands at its step. The state goes through JSON, as it does on disk."""
    options, _ = _case(name)
    whole = _rates(options)
    optimizer = _optimizer(options)
    schedule = make_schedule(optimizer, options, TOTAL)
    for _ in range(stop):
        _advance(optimizer, schedule)
    saved = json.loads(json.dumps(schedule.state_dict()))
    optimizer_state = optimizer.state_dict()
    fresh = _optimizer(options)
    resumed = make_schedule(fresh, options, TOTAL)
    fresh.load_state_dict(optimizer_state)
    resumed.load_state_dict(saved)
    factors = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(stop, TOTAL):
            factors.append(fresh.param_groups[0]["lr"] / RATE)
            _advance(fresh, resumed)
    assert factors == whole[stop:]
    assert resumed.state_dict() == {**resumed.state_dict(), "last_epoch": TOTAL}


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"adafactor", "piecewise_constant"}))
def test_a_warm_up_as_long_as_the_training(name: str) -> None:
    """Nothing is divided by the zero steps that are left after it."""
    more = {"lr_scheduler_min_lr_ratio": 0.0} if name == "cosine_with_min_lr" else {}
    factors = _rates(_options(lr_scheduler=name, lr_warmup_steps="100%", **more))
    assert factors == pytest.approx([step / TOTAL for step in range(TOTAL)], abs=1e-12)


def test_rex_reaches_its_minimum_at_the_end_and_stays_there() -> None:
    factors = _rates(_options(lr_scheduler="rex"), TOTAL + 5)
    assert factors[0] == 1.0
    assert factors[TOTAL:] == pytest.approx([REX_MINIMUM] * 5)
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[: TOTAL + 1]))


def test_adafactor_sets_its_own_rate() -> None:
    for name in ("adafactor", "cosine"):
        options = _options(optimizer_type="Adafactor", lr_scheduler=name)
        optimizer = _optimizer(options)
        schedule = make_schedule(optimizer, options, TOTAL)
        assert isinstance(schedule, OwnRates)
        # Also when a step was skipped because its loss was no number: there is no state yet to look at.
        schedule.step()
        _advance(optimizer, schedule)
        assert schedule.state_dict() == {"steps": 2}
        again = make_schedule(optimizer, options, TOTAL)
        again.load_state_dict(schedule.state_dict())
        assert again.state_dict() == {"steps": 2}


def test_adafactor_without_its_own_rate_follows_a_schedule() -> None:
    options = _options(optimizer_type="Adafactor", optimizer_args=["relative_step=False"], lr_scheduler="linear")
    assert _rates(options) == pytest.approx([1 - step / TOTAL for step in range(TOTAL)])
    with pytest.raises(Problems) as caught:
        _rates(options.model_copy(update={"lr_scheduler": "adafactor"}))
    assert caught.value.problems[0].field == "lr_scheduler"


@pytest.mark.parametrize("name", ["CosineAnnealingLR", "torch.optim.lr_scheduler.CosineAnnealingLR"])
def test_a_class_of_torch(name: str) -> None:
    options = _options(lr_scheduler_type=name, lr_scheduler_args=["T_max=60", "eta_min=0"])
    expected = [0.5 * (1 + math.cos(math.pi * step / TOTAL)) for step in range(TOTAL)]
    # torch goes from step to step by a recursion instead of by the formula.
    assert _rates(options) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("values", "field", "words"),
    [
        ({"lr_warmup_steps": "61"}, "lr_warmup_steps", "longer than the whole training"),
        ({"lr_warmup_steps": "61", "optimizer_type": "Adafactor"}, "lr_warmup_steps", "longer than the whole training"),
        ({"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": "40", "lr_decay_steps": "50%"}, "lr_decay_steps",
         "longer than the 60 steps"),
        ({"lr_scheduler": "cosine_with_min_lr"}, "lr_scheduler_min_lr_ratio", "0.1"),
        ({"lr_scheduler": "piecewise_constant"}, "lr_scheduler_args", "step_rules="),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ["step_rules=a:b"]}, "lr_scheduler_args",
         "cannot be read"),
        ({"lr_scheduler": "polynomial", "lr_scheduler_args": ["lr_ende=1e-5"]}, "lr_scheduler_args",
         "Did you mean lr_end?"),
        ({"lr_scheduler": "polynomial", "lr_scheduler_args": ["lr_end=1"]}, "lr_scheduler_args", "smaller"),
        ({"lr_scheduler": "warmup_stable_decay", "lr_scheduler_args": ["decay_type=x"]}, "lr_scheduler_args", "x"),
        ({"lr_scheduler": "linear", "lr_scheduler_args": ["power=2"]}, "lr_scheduler_args", "takes none"),
        ({"lr_scheduler_type": "Nothing"}, "lr_scheduler_type", "no schedule"),
        ({"lr_scheduler_type": "nowhere_at_all.X"}, "lr_scheduler_type", "cannot be imported"),
        ({"lr_scheduler_type": "..X"}, "lr_scheduler_type", "cannot be imported"),
        ({"lr_scheduler_type": "torch.nn.Linear"}, "lr_scheduler_type", "no schedule"),
        ({"lr_scheduler_type": "ReduceLROnPlateau"}, "lr_scheduler_type", "measured value"),
        ({"lr_scheduler_type": "StepLR"}, "lr_scheduler_args", "step_size"),
        ({"lr_scheduler_type": "StepLR", "lr_scheduler_args": ["step=1"]}, "lr_scheduler_args", "step_size"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_said(values: dict[str, Any], field: str, words: str) -> None:
    options = _options(**values)
    with pytest.raises(Problems) as caught:
        make_schedule(_optimizer(options), options, TOTAL)
    assert [problem.field for problem in caught.value.problems] == [field]
    assert words in str(caught.value)


def test_options_without_effect_are_named() -> None:
    options = _options(lr_scheduler="linear", lr_scheduler_power=2.0, lr_decay_steps="5", lr_scheduler_num_cycles=1.0)
    assert sorted(str(notice.field) for notice in schedule_notices(options)) == ["lr_decay_steps", "lr_scheduler_power"]
    options = _options(lr_scheduler_type="StepLR", lr_scheduler_args=["step_size=5"], lr_warmup_steps="5")
    assert [notice.field for notice in schedule_notices(options)] == ["lr_warmup_steps"]
