"""What trackers are told: curves under known names, options without paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from backend.config.train import TrainOptions
from backend.errors import UserError
from backend.training.trackers import Trackers, chosen_trackers, shown_options

RECORD = {
    "step": 3, "loss": 0.5, "lr": 1e-4, "grad_norm": 0.1, "band_loss": [None, 0.5, None, None, None],
    "memory_bytes": 10, "seconds_per_step": 0.2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, []),
        ({"logging_dir": "logs"}, ["tensorboard"]),
        ({"log_with": "wandb"}, ["wandb"]),
        ({"log_with": "all", "logging_dir": "logs"}, ["tensorboard", "wandb"]),
    ],
)
def test_who_gets_the_curves(options: dict[str, Any], expected: list[str]) -> None:
    assert chosen_trackers(TrainOptions(**options)) == expected


def test_options_are_shown_without_paths() -> None:
    options = TrainOptions(
        task="k5-demo-t2v", dit="/secret/a.safetensors", output_dir="/secret/out", optimizer_args=["eps=1e-8", "a=1"]
    )
    shown = shown_options(options)
    assert shown["optimizer_args"] == "eps=1e-8 a=1"
    assert shown["task"] == "k5-demo-t2v"
    assert not any("secret" in str(value) for value in shown.values())


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    trackers = Trackers(TrainOptions(logging_dir=str(tmp_path)), 4, first=False)
    trackers.step(RECORD)
    trackers.close()
    assert not list(tmp_path.iterdir())


def test_a_configuration_for_something_else_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "trackers.toml"
    config.write_text("[comet]\nkey = 1\n", "utf-8")
    with pytest.raises(UserError, match="comet is no tracker"):
        Trackers(TrainOptions(logging_dir=str(tmp_path), log_tracker_config=str(config)), 4, first=True)


@pytest.mark.slow
def test_wandb_stays_offline(tmp_path: Path) -> None:
    """Nothing is sent: the network of the tests is this machine alone, and a reach for another one fails the test."""
    options = TrainOptions(log_with="wandb", logging_dir=str(tmp_path), wandb_run_name="mine", log_config=True)
    trackers = Trackers(options, 4, first=True)
    trackers.step(RECORD)
    trackers.validation(0.4, 3)
    trackers.close()
    assert list(tmp_path.glob("*/wandb/offline-run-*/*.wandb"))
