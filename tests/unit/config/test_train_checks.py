"""What is wrong with a request to train is said before weights are loaded, each at its field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from backend.config.checks import weight_paths
from backend.config.tasks import DEMO_WEIGHTS
from backend.config.train import TrainOptions
from backend.config.train_checks import check_train


@pytest.fixture
def good(tmp_path: Path) -> dict[str, Any]:
    """Options that can start, but for the caches, which are not looked at."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    (folder / "a.txt").write_text("a red circle", "utf-8")
    dataset = tmp_path / "data.toml"
    dataset.write_text(
        '[general]\nresolution = [64, 64]\ncaption_extension = ".txt"\n[[datasets]]\n'
        f'image_directory = "{folder.as_posix()}"\ncache_directory = "{(tmp_path / "cache").as_posix()}"\n',
        "utf-8",
    )
    return {"task": "k5-demo-t2v", "dataset_config": str(dataset), "output_dir": str(tmp_path / "out")}


def test_a_good_request_has_no_problem(good: dict[str, Any]) -> None:
    assert check_train(TrainOptions(**good)) == []
    assert weight_paths(TrainOptions(**good)).dit == str(DEMO_WEIGHTS / "transformer")


def test_an_empty_request_names_all_that_is_missing() -> None:
    assert {problem.field for problem in check_train(TrainOptions())} == {"task", "dataset_config", "output_dir"}


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"attention": "sage_attn"}, "attention", "no gradients"),  # T13
        ({"network_module": "networks.loha"}, "network_module", "not supported for Kandinsky 5"),
        ({"mixed_precision": "fp16"}, "mixed_precision", "bf16"),
        ({"min_timestep": 500.0, "max_timestep": 100.0}, "min_timestep", "not below"),
        ({"preserve_distribution_shape": True}, "preserve_distribution_shape", "needs"),
        ({"sample_at_first": True}, "sample_at_first", "--sample_prompts"),
        ({"dim_from_weights": True}, "dim_from_weights", "--network_weights"),
        ({"network_weights": "gone.safetensors"}, "network_weights", "does not exist"),
        ({"base_weights_multiplier": [1.0]}, "base_weights_multiplier", "more strengths"),
        ({"nabla_P": 0.8}, "nabla_P", "--force_nabla_attention"),
        ({"i2v_mode": "first_last"}, "i2v_mode", "no given frames"),
        ({"output_name": "../other"}, "output_name", "file name"),
        ({"save_last_n_steps": 3}, "save_last_n_steps", "--save_every_n_steps"),
        ({"resume": "nowhere"}, "resume", "no folder"),
        ({"lr_scheduler": "adafactor"}, "lr_scheduler", "Adafactor"),
        ({"lr_warmup_steps": "soon"}, "lr_warmup_steps", "no length"),
        ({"optimizer_args": ["betas"]}, "optimizer_args", "name=value"),
        ({"log_with": "tensorboard"}, "log_with", "--logging_dir"),
        (
            {"max_data_loader_n_workers": 0, "persistent_data_loader_workers": True},
            "persistent_data_loader_workers",
            "1 or more",
        ),
        ({"dit": str(DEMO_WEIGHTS / "vae")}, "dit", "not a DiT"),
    ],
)
def test_each_problem_stands_at_its_field(
    good: dict[str, Any], changes: dict[str, Any], field: str, words: str
) -> None:
    problems = check_train(TrainOptions(**(good | changes)))
    assert [problem.field for problem in problems] == [field], problems
    assert words in problems[0].message


def test_bad_lines_of_the_prompt_file_are_told(good: dict[str, Any], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a circle --w 63\na square\na star --s 0\n", "utf-8")
    problems = check_train(TrainOptions(**good, sample_prompts=str(prompts), sample_every_n_steps=5))
    assert [problem.field for problem in problems] == ["sample_prompts", "sample_prompts"]
    assert "line 1" in problems[0].message
    assert "line 3" in problems[1].message
