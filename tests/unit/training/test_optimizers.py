"""Optimizers by name against closed forms of their first steps, and what wrong names and arguments say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from backend.config.options import from_mapping
from backend.config.train import TrainOptions
from backend.errors import Problems
from backend.training.optimizers import (
    learning_rates,
    make_optimizer,
    optimizer_class,
    optimizer_notices,
    set_mode,
    uses_relative_step,
)

RATE = 0.01


def _options(name: str, *arguments: str, rate: float = RATE, **more: Any) -> TrainOptions:
    values = {"optimizer_type": name, "optimizer_args": list(arguments), "learning_rate": rate, **more}
    return from_mapping(TrainOptions, values)


def _parameter(seed: int = 0, shape: tuple[int, int] = (64, 80)) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def _make(options: TrainOptions, *parameters: torch.nn.Parameter) -> Optimizer:
    return make_optimizer([{"params": list(parameters), "lr": options.learning_rate}], options)


def _steps(optimizer: Optimizer, parameter: torch.nn.Parameter, count: int) -> None:
    """Steps towards a far target, with the same gradients for everybody."""
    for seed in range(count):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 + seed))
        parameter.grad = 1.0 + 0.5 * noise
        optimizer.step()


def _adamw(start: torch.Tensor, count: int, decay: float, betas: tuple[float, float], eps: float) -> torch.Tensor:
    """AdamW (Loshchilov and Hutter) in float64."""
    value, first, second = start.double(), torch.zeros_like(start).double(), torch.zeros_like(start).double()
    for seed in range(count):
        noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(100 + seed))
        gradient = (1.0 + 0.5 * noise).double()
        value = value * (1 - RATE * decay)
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        corrected = first / (1 - betas[0] ** (seed + 1)), second / (1 - betas[1] ** (seed + 1))
        value = value - RATE * corrected[0] / (corrected[1].sqrt() + eps)
    return value


@pytest.mark.parametrize("name", ["AdamW", "adamw", "torch.optim.AdamW"])
def test_adamw_with_arguments_is_its_formula(name: str) -> None:
    parameter = _parameter()
    expected = _adamw(parameter.detach(), 5, 0.1, (0.8, 0.95), 1e-6)
    optimizer = _make(_options(name, "weight_decay=0.1", "betas=(0.8,0.95)", "eps=1e-6"), parameter)
    _steps(optimizer, parameter, 5)
    assert type(optimizer) is torch.optim.AdamW
    assert (parameter.detach().double() - expected).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW8Bit", "adamw8BIT"])
def test_adamw8bit_works_on_the_cpu_near_adamw(name: str) -> None:
    """The guide writes AdamW8Bit. Its moments have 8 bits, so after 20 steps it is near AdamW and not equal to it."""
    parameter = _parameter(shape=(128, 128))
    start = parameter.detach().clone()
    expected = _adamw(start, 20, 0.01, (0.9, 0.999), 1e-8)
    optimizer = _make(_options(name), parameter)
    _steps(optimizer, parameter, 20)
    assert optimizer.state[parameter]["state1"].dtype == torch.uint8, "moments are not kept in 8 bits"
    difference = float((parameter.detach().double() - expected).norm() / (expected - start.double()).norm())
    assert 1e-5 < difference < 0.05


def test_adafactor_without_relative_step_takes_the_learning_rate() -> None:
    parameter = _parameter()
    before = parameter.detach().clone()
    optimizer = _make(
        _options("Adafactor", "relative_step=False", "scale_parameter=False", "clip_threshold=1e9"), parameter
    )
    assert not uses_relative_step(optimizer)
    _steps(optimizer, parameter, 1)
    gradient = 1.0 + 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100)).double()
    squares = gradient**2 + 1e-30
    rows, columns = squares.mean(1, keepdim=True), squares.mean(0, keepdim=True)
    expected = before.double() - RATE * gradient / (rows * columns / squares.mean()).sqrt()
    assert (parameter.detach().double() - expected).abs().max() < 1e-6
    assert learning_rates(optimizer) == [RATE]


def test_adafactor_with_relative_step_replaces_the_learning_rate_and_says_so() -> None:
    """Its default. The rate is min(0.01, 1 / sqrt(step)) times the size of the parameter."""
    options = _options("adafactor", rate=0.5)
    parameter = _parameter()
    size = float(parameter.detach().norm() / parameter.numel() ** 0.5)
    optimizer = _make(options, parameter)
    assert uses_relative_step(optimizer)
    assert learning_rates(optimizer) == [0.0]
    _steps(optimizer, parameter, 1)
    assert learning_rates(optimizer) == [pytest.approx(0.01 * size, rel=1e-6)]
    notices = optimizer_notices(options)
    assert [notice.field for notice in notices] == ["optimizer_type"]
    assert "relative_step=False" in notices[0].message
    assert optimizer_notices(_options("Adafactor", "relative_step=False")) == []


def test_any_class_of_torch_and_two_groups() -> None:
    """LoRA+: the second group learns with its own rate."""
    first, second = _parameter(1), _parameter(2)
    before = first.detach().clone(), second.detach().clone()
    options = _options("SGD", "momentum=0.0")
    groups = [{"params": [first], "lr": RATE}, {"params": [second], "lr": 16 * RATE}]
    optimizer = make_optimizer(groups, options)
    assert learning_rates(optimizer) == [RATE, 16 * RATE]
    for parameter in (first, second):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.allclose(before[0] - first, torch.full_like(first, RATE), atol=1e-6)
    assert torch.allclose(before[1] - second, torch.full_like(second, 16 * RATE), atol=1e-6)
    assert groups[1]["lr"] == 16 * RATE, "the caller's groups were changed"


def test_prodigy_finds_its_step_size() -> None:
    options = _options("prodigyopt.Prodigy", "d_coef=2.0", "weight_decay=0", rate=1.0)
    parameter = _parameter()
    optimizer = _make(options, parameter)
    assert learning_rates(optimizer) == [1e-6], "d * lr before the first step, with d0 = 1e-6"
    before = parameter.detach().clone()
    _steps(optimizer, parameter, 30)
    assert learning_rates(optimizer)[0] == optimizer.param_groups[0]["d"] * 1.0
    assert learning_rates(optimizer)[0] > 1e-4, "it did not adapt"
    assert (parameter.detach() - before).abs().max() > 1e-3
    assert optimizer_notices(options) == []
    assert [notice.field for notice in optimizer_notices(_options("prodigyopt.Prodigy", rate=1e-4))] == [
        "learning_rate"
    ]


def test_schedule_free_trains_one_point_and_gives_another() -> None:
    parameter = _parameter()
    optimizer = _make(_options("schedulefree.AdamWScheduleFree", "warmup_steps=4"), parameter)
    _steps(optimizer, parameter, 2)
    assert learning_rates(optimizer) == [pytest.approx(RATE * 2 / 4)], "its own warm-up"
    _steps(optimizer, parameter, 6)
    assert learning_rates(optimizer) == [pytest.approx(RATE)]
    trained = parameter.detach().clone()
    set_mode(optimizer, train=False)
    averaged = parameter.detach().clone()
    momentum = optimizer.param_groups[0]["betas"][0]
    # By its definition y = (1 - beta) z + beta x: z is where plain steps are, x the average, y what is trained.
    fast = optimizer.state[parameter]["z"]
    assert not torch.allclose(trained, averaged, atol=1e-4)
    assert torch.allclose(trained, (1 - momentum) * fast + momentum * averaged, atol=1e-5)
    set_mode(optimizer, train=True)
    assert torch.allclose(parameter.detach(), trained, atol=1e-5)
    notices = optimizer_notices(_options("schedulefree.AdamWScheduleFree", lr_scheduler="cosine"))
    assert [notice.field for notice in notices] == ["lr_scheduler"]


def test_modes_of_ordinary_optimizers_change_nothing() -> None:
    parameter = _parameter()
    optimizer = _make(_options("AdamW"), parameter)
    _steps(optimizer, parameter, 2)
    before = parameter.detach().clone()
    set_mode(optimizer, train=False)
    set_mode(optimizer, train=True)
    assert torch.equal(parameter, before)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Adma", "Did you mean Ada"),
        ("Lion", "path with dots"),
        ("nowhere_at_all.Lion", "Install nowhere_at_all"),
        ("torch.optim.Nothing", "no Nothing"),
        ("torch.nn.Linear", "not a torch Optimizer"),
        ("torch.optim.Optimizer", "not a torch Optimizer"),
        ("os.path.join", "not a torch Optimizer"),
        ("os;rm.x", "no class"),
        ("..", "no class"),
        ("LBFGS", "cannot train a LoRA"),
        ("SparseAdam", "cannot train a LoRA"),
    ],
)
def test_names_that_cannot_be_used(name: str, words: str) -> None:
    with pytest.raises(Problems) as caught:
        _make(_options(name), _parameter())
    assert [problem.field for problem in caught.value.problems] == ["optimizer_type"]
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "argument", "words"),
    [
        ("AdamW", "beta=(0.9,0.99)", "Did you mean betas?"),
        ("AdamW", "nonsense=1", "It takes betas"),
        ("AdamW", "lr=1", "--learning_rate"),
        ("AdamW", "params=1", "no argument params"),
        ("AdamW", "betas=0.9", "betas=0.9"),
        ("AdamW", "eps=small", "eps=small"),
        ("AdamW", "weight_decay=-1", "weight_decay"),
        ("Adafactor", "beta1=x", "beta1=x"),
        ("AdamW8bit", "optim_bits=16", "optim_bits"),
        ("AdamW8bit", "amsgrad=True", "amsgrad"),
        ("AdamW", "betas", "name=value"),
    ],
)
def test_arguments_that_cannot_be_used(name: str, argument: str, words: str) -> None:
    """Also those that only a step finds (beta1=x): nothing of this comes out after minutes of loading and steps."""
    with pytest.raises(Problems) as caught:
        _make(_options(name, argument), _parameter())
    assert [problem.field for problem in caught.value.problems] == ["optimizer_args"]
    assert words in str(caught.value)


def test_all_wrong_arguments_are_reported_together() -> None:
    with pytest.raises(Problems) as caught:
        _make(_options("AdamW", "one=1", "two=2"), _parameter())
    assert len(caught.value.problems) == 2


def test_prodigy_refuses_a_rate_of_zero_and_different_rates() -> None:
    with pytest.raises(Problems) as caught:
        _make(_options("prodigyopt.Prodigy", rate=0.0), _parameter())
    assert caught.value.problems[0].field == "learning_rate"
    groups = [{"params": [_parameter()], "lr": 1.0}, {"params": [_parameter()], "lr": 4.0}]
    with pytest.raises(Problems) as caught:
        make_optimizer(groups, _options("prodigyopt.Prodigy", rate=1.0))
    assert caught.value.problems[0].field == "network_args"
    assert "loraplus_lr_ratio" in str(caught.value)


def test_trying_arguments_leaves_the_parameters_alone() -> None:
    parameter = _parameter()
    before = parameter.detach().clone()
    optimizer = _make(_options("AdamW", "weight_decay=0.5"), parameter)
    assert torch.equal(parameter, before)
    assert parameter.grad is None
    assert len(optimizer.state) == 0
    assert optimizer_class("muon") is torch.optim.Muon
