"""States of the project's own LoRA with every schedule: going on exactly, and going on by changed options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from backend.config.train import TrainOptions
from backend.config.train_arguments import network_arguments
from backend.config.train_steps import SCHEDULES
from backend.errors import UserError
from backend.lora.trainable import TrainableLora
from backend.training.optimizers import make_optimizer
from backend.training.schedules import make_schedule
from backend.training.state import Position, load_state, save_state
from tests.unit.lora.models import skeleton

ADAFACTOR = {"optimizer_type": "Adafactor"}
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"lr_scheduler": name, "lr_warmup_steps": "4"} for name in SCHEDULES},
    "constant": {"lr_scheduler": "constant"},
    "piecewise_constant": {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ["step_rules=1:3,0.1:9,0.01"]},
    "warmup_stable_decay": {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": "4", "lr_decay_steps": "10"},
    "cosine_with_min_lr": {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_min_lr_ratio": 0.1},
    "adafactor": {**ADAFACTOR, "lr_scheduler": "adafactor"},
    "by class": {"lr_scheduler_type": "CosineAnnealingLR", "lr_scheduler_args": ["T_max=9"]},
}


class Own:
    """A LoRA on a few layers; its gradients are drawn from the step's number."""

    def __init__(self, seed: int = 0, **given: Any) -> None:
        self.options = TrainOptions(**{"task": "k5-demo-t2v", "learning_rate": 1e-3, **given})
        include = [r"visual_transformer_blocks\.0\.self_attention\..*"]
        self.lora = TrainableLora.attach(skeleton(), 4, 0.3, seed=seed, include=include)
        ratio = network_arguments(self.options).loraplus_lr_ratio or 4.0
        self.optimizer = make_optimizer(self.lora.param_groups(self.options.learning_rate, ratio), self.options)
        self.schedule = make_schedule(self.optimizer, self.options, self.options.max_train_steps)

    @property
    def rates(self) -> list[float | None]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def run(self, first: int, last: int) -> list[Any]:
        """Learning rates and weights after each step."""
        seen: list[Any] = []
        for number in range(first, last + 1):
            generator = torch.Generator().manual_seed(number)
            for parameter in self.lora.named_parameters().values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            self.optimizer.step()
            self.schedule.step()
            seen.append((self.rates, [pair.up.tolist() for pair in self.lora.weights().values()]))
        return seen

    def save(self, folder: Path, step: int) -> Path:
        save_state(
            folder, Position(step, 0, step), 1, self.lora, self.optimizer, self.schedule, self.options, {}, 0, 1,
            lambda: None,
        )  # fmt: skip
        return folder

    def load(self, folder: Path) -> None:
        load_state(folder, self.lora, self.optimizer, self.schedule, 0, 1, self.options)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_schedule_goes_on_exactly(name: str, tmp_path: Path) -> None:
    given = {**OPTIONS[name], "max_train_steps": 20}
    whole = Own(**given)
    whole.run(1, 7)
    folder = whole.save(tmp_path / "a-state", 7)
    again = Own(seed=5, **given)
    again.load(folder)
    assert again.run(8, 14) == whole.run(8, 14)


CHANGES = [
    {"learning_rate": 3e-3},
    {"lr_scheduler": "rex"},
    {"lr_warmup_steps": "9"},
    {"max_train_steps": 40},
    {"lr_scheduler_num_cycles": 2.0},
    {"lr_scheduler_type": "CosineAnnealingLR", "lr_scheduler_args": ["T_max=9"], "lr_warmup_steps": "0"},
]


@pytest.mark.parametrize("change", CHANGES, ids=[",".join(change) for change in CHANGES])
def test_a_changed_schedule_goes_on_as_if_it_had_always_been_that(change: dict[str, Any], tmp_path: Path) -> None:
    given = {"lr_scheduler": "cosine_with_restarts", "lr_warmup_steps": "4", "max_train_steps": 20}
    first = Own(**given)
    first.run(1, 7)
    folder = first.save(tmp_path / "a-state", 7)
    always = Own(**{**given, **change})
    always.run(1, 7)
    changed = Own(**{**given, **change})
    changed.load(folder)
    assert changed.rates == pytest.approx(always.rates, rel=1e-12)
    assert changed.rates != pytest.approx(first.rates, rel=1e-3)
    assert [pair.up.tolist() for pair in changed.lora.weights().values()] == [
        pair.up.tolist() for pair in first.lora.weights().values()
    ]
    for number in range(8, 15):
        always.run(number, number)
        changed.run(number, number)
        assert changed.rates == pytest.approx(always.rates, rel=1e-12), number


def test_the_ratio_of_lora_plus_is_the_new_one(tmp_path: Path) -> None:
    first = Own(network_args=["loraplus_lr_ratio=4"])
    first.run(1, 2)
    folder = first.save(tmp_path / "a-state", 2)
    changed = Own(network_args=["loraplus_lr_ratio=2"])
    changed.load(folder)
    assert changed.rates == [1e-3, 2e-3]


def test_an_alpha_that_float32_cannot_hold_stays_exact(tmp_path: Path) -> None:
    first = Own()
    folder = first.save(tmp_path / "a-state", 1)
    again = Own(seed=3)
    again.load(folder)
    assert {pair.alpha for pair in again.lora.weights().values()} == {0.3}


def test_a_lora_of_another_rank_is_refused(tmp_path: Path) -> None:
    folder = Own().save(tmp_path / "a-state", 1)
    other = Own()
    other.lora = TrainableLora.attach(
        skeleton(), 8, 0.3, seed=0, include=[r"visual_transformer_blocks\.0\.self_attention\..*"]
    )
    with pytest.raises(UserError):
        other.load(folder)
