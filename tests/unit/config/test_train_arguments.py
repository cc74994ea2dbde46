"""Options of training that are text with a structure of its own."""

from __future__ import annotations

import pytest

from backend.config.train import TrainOptions
from backend.config.train_arguments import NetworkArguments, key_values, network_arguments, steps_of
from backend.errors import Problems, UserError


def test_values_are_literals_and_only_the_first_equals_sign_separates() -> None:
    words = ["weight_decay=0.001", "betas=(0.9,0.95)", "fused=true", "decouple=False", "name=a=b", "growth=None"]
    expected = {
        "weight_decay": 0.001,
        "betas": (0.9, 0.95),
        "fused": True,
        "decouple": False,
        "name": "a=b",
        "growth": None,
    }
    assert key_values(words, "optimizer_args") == expected


def test_nothing_is_executed_in_a_value() -> None:
    hostile = "__import__('os').system('true')"
    assert key_values([f"a={hostile}"], "optimizer_args") == {"a": hostile}


def test_all_bad_words_are_told_at_once() -> None:
    with pytest.raises(Problems) as caught:
        key_values(["betas", "1a=2", "x=1", "x=2"], "optimizer_args")
    assert [problem.field for problem in caught.value.problems] == ["optimizer_args"] * 3


@pytest.mark.parametrize(
    ("text", "steps"),
    [("0", 0), ("100", 100), ("0.05", 50), ("5%", 50), ("12.5 %", 125), ("1000", 1000), ("100%", 1000)],
)
def test_lengths_are_steps_fractions_and_percentages(text: str, steps: int) -> None:
    assert steps_of(text, 1000, "lr_warmup_steps") == steps


@pytest.mark.parametrize("text", ["", "-1", "1.5", "nan", "inf", "101%", "five", "1001", "1e400"])
def test_other_lengths_are_refused_with_their_field(text: str) -> None:
    with pytest.raises(UserError) as caught:
        steps_of(text, 1000, "lr_warmup_steps")
    assert caught.value.problems[0].field == "lr_warmup_steps"


def test_network_arguments_are_settled() -> None:
    words = ["loraplus_lr_ratio=4", "rank_dropout=0.1", "include_patterns=['.*cross.*']", "exclude_patterns=.*ff.*"]
    expected = NetworkArguments(4.0, 0.1, None, (".*cross.*",), (".*ff.*",))
    assert network_arguments(TrainOptions(network_args=words)) == expected


def test_wrong_network_arguments_are_all_told() -> None:
    words = ["algo=lokr", "loraplus_ratio=2", "rank_dropout=1", "include_patterns=['(']", "exclude_patterns=3"]
    with pytest.raises(Problems) as caught:
        network_arguments(TrainOptions(network_args=words))
    text = "\n".join(problem.message for problem in caught.value.problems)
    assert len(caught.value.problems) == 5
    for part in ("LoHa and LoKr", "Did you mean loraplus_lr_ratio", "below 1", "no regular expression", "list of"):
        assert part in text
