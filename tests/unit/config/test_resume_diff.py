"""What changed since a state was saved: every option is classified, and the classes are the right ones."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from backend.config.options import specs, to_toml
from backend.config.resume_diff import FACTS, TABLE, Difference, differences, restarts_epoch
from backend.config.train import TrainOptions

BASE: dict[str, Any] = {"task": "k5-lite-t2v-5s-sd", "network_dim": 16, "optimizer_args": ["weight_decay=0.01"]}


def diff(old: dict[str, Any] | None = None, new: dict[str, Any] | None = None, **facts: Any) -> list[Difference]:
    before = TrainOptions(**{**BASE, **(old or {})})
    now = TrainOptions(**{**BASE, **(new or {})})
    return differences(before.model_dump(mode="json"), now, facts.get("before", {}), facts.get("now", {}))


def kinds(**changed: Any) -> dict[str, str]:
    return {difference.name: difference.kind for difference in diff(new=changed)}


def test_every_option_is_classified_and_nothing_else() -> None:
    assert set(TABLE) == {spec.name for spec in specs(TrainOptions)}


def test_nothing_changed_is_no_difference_and_resume_itself_never_counts() -> None:
    assert diff(new={"resume": "x-state"}) == []


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("task", "k5-pro-t2v-5s-sd", "impossible"),
        ("task", "k5-lite-i2v-5s-sd", "meaning"),
        ("task", None, "impossible"),
        ("network_dim", 8, "impossible"),
        ("network_alpha", 1.0, "impossible"),
        ("optimizer_type", "Adafactor", "impossible"),
        ("network_args", ["include_patterns=['.*visual.*']"], "impossible"),
        ("network_args", ["exclude_patterns=['.*visual.*']", "verbose=True"], "impossible"),
        ("network_args", ["rank_dropout=0.1"], "meaning"),
        ("network_args", ["loraplus_lr_ratio=4"], "meaning"),
        ("network_args", ["verbose=True"], "safe"),
        ("learning_rate", 2e-4, "meaning"),
        ("lr_scheduler", "cosine", "meaning"),
        ("seed", 3, "meaning"),
        ("gradient_accumulation_steps", 2, "meaning"),
        ("optimizer_args", [], "meaning"),
        ("timestep_sampling", "uniform", "meaning"),
        ("i2v_mode", "first_last", "meaning"),
        ("base_weights", ["style.safetensors"], "meaning"),
        ("fp8_base", True, "meaning"),
        ("mixed_precision", "bf16", "meaning"),
        ("max_train_steps", 5000, "safe"),
        ("dit", "elsewhere.safetensors", "safe"),
        ("dataset_config", "elsewhere.toml", "safe"),
        ("output_name", "other", "safe"),
        ("save_every_n_steps", 50, "safe"),
        ("sample_prompts", "prompts.txt", "safe"),
        ("attention", "flash_attn", "safe"),
        ("gradient_checkpointing", True, "safe"),
        ("device", "cpu", "safe"),
        ("max_data_loader_n_workers", 0, "safe"),
        ("network_weights", "start.safetensors", "safe"),
    ],
)
def test_kinds(name: str, value: Any, kind: str) -> None:
    assert kinds(**{name: value}) == {name: kind}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"optimizer_type": "AdamW8bit"}, {"optimizer_type": "adamw8bit"}),
        ({}, {"network_alpha": 16.0}),  # the rank, which is the default
        ({"network_alpha": 0.0}, {}),
        ({"seed": 5}, {}),  # without one, the saved one is used
        ({"fp8_base": True}, {"fp8_scaled": True}),
        ({"network_args": ["rank_dropout=0.1"]}, {"network_args": ["rank_dropout=.1"]}),
    ],
)
def test_what_means_the_same_is_no_difference(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert diff(old, new) == []


def test_the_drawn_seed_counts_when_the_old_options_had_none() -> None:
    assert diff(new={"seed": 9}, before={"seed": 9}) == []
    found = diff(new={"seed": 8}, before={"seed": 9})
    assert [(item.name, item.old, item.new) for item in found] == [("seed", 9, 8)]
    assert restarts_epoch(found)


@pytest.mark.parametrize(
    "schedule", [{"lr_scheduler": "cosine"}, {"lr_scheduler_type": "CosineAnnealingLR"}, {"lr_warmup_steps": "5%"}]
)
def test_the_length_changes_the_meaning_where_the_learning_rate_follows_it(schedule: dict[str, Any]) -> None:
    found = diff(schedule, {**schedule, "max_train_steps": 3200, "max_train_epochs": 4})
    assert {item.kind for item in found} == {"meaning"}
    assert all("learning rate" in item.why for item in found)


@pytest.mark.parametrize("name", sorted(FACTS))
def test_facts_that_changed_change_the_meaning_and_unknown_ones_are_not_compared(name: str) -> None:
    (found,) = diff(before={name: "a"}, now={name: "b"})
    assert (found.name, found.kind) == (name, "meaning")
    assert diff(before={name: "a"}) == []
    assert diff(now={name: "a"}) == []
    assert diff(before={name: "a"}, now={name: "a"}) == []


def test_a_changed_dataset_says_that_the_epoch_begins_again() -> None:
    found = diff(before={"dataset_fingerprint": "a"}, now={"dataset_fingerprint": "b"})
    assert "epoch begins again" in found[0].why
    assert restarts_epoch(found)
    assert not restarts_epoch(diff(before={"base_fingerprint": "a"}, now={"base_fingerprint": "b"}))


def test_the_gravest_comes_first() -> None:
    found = diff(new={"output_name": "b", "network_dim": 4, "learning_rate": 1e-3, "device": "cpu"})
    assert [item.kind for item in found] == ["impossible", "meaning", "safe", "safe"]


def test_options_of_a_file_compare_like_those_of_a_state() -> None:
    """options.toml leaves out what is None, and an older version had fewer options."""
    now = TrainOptions(**BASE)
    old = tomllib.loads(to_toml(now))
    assert differences(old, now, {}, {}) == []
    del old["attention"]
    assert differences({**old, "option_of_long_ago": 1}, now, {}, {}) == []


def test_sentences_are_sentences() -> None:
    for entry in TABLE.values():
        if not callable(entry):
            assert entry is not None
            assert entry[1][0].isupper()
            assert entry[1].endswith(".")
