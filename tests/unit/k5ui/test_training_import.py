"""Commands of musubi-tuner and of ours, scripts and TOML, as values of the form and notes about them."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from backend.config.options import to_command_text, to_toml
from backend.config.train import TrainOptions
from backend.errors import UserError
from k5ui.text.loader import Texts
from k5ui.training.command_words import commands
from k5ui.training.foreign_options import LEFT_OUT
from k5ui.training.import_command import Imported, import_text

GUIDE = r"""accelerate launch --num_cpu_threads_per_process 1 --mixed_precision bf16 \
  src/musubi_tuner/kandinsky5_train_network.py \
  --dataset_config path/to/toml --task k5-pro-t2v-5s-sd \
  --dit path/to/dit.safetensors --vae path/to/vae.safetensors \
  --text_encoder_qwen Qwen/Qwen2.5-VL-7B-Instruct \
  --fp8_base --sdpa --gradient_checkpointing \
  --max_data_loader_n_workers 1 --persistent_data_loader_workers \
  --learning_rate 1e-4 --optimizer_type AdamW8Bit \
  --optimizer_args "weight_decay=0.001" "betas=(0.9,0.95)" \
  --lr_scheduler constant_with_warmup --lr_warmup_steps 100 \
  --network_module networks.lora_kandinsky --network_dim 32 --network_alpha 32 \
  --timestep_sampling shift --discrete_flow_shift 5.0 \
  --output_dir path/to/output --output_name k5_lora \
  --save_every_n_epochs 1 --max_train_epochs 50 --scheduler_scale 10.0
"""
TRAINER = "python src/musubi_tuner/kandinsky5_train_network.py --task k5-lite-t2v-5s-sd "
#: Given, so that the other trainer's defaults leave no notes.
QUIET = "--learning_rate 1e-4 --network_dim 8 --network_alpha 8 --timestep_sampling uniform "


def read(text: str) -> Imported:
    return import_text(text, Texts("en"))


def notes(found: Imported) -> dict[str, tuple[str, str]]:
    return {note.name: (note.kind, note.text) for note in found.notes}


def test_the_command_of_the_guide_leaves_no_note() -> None:
    """Every flag of it has its meaning here; switches, lists and continued lines included."""
    found = read(GUIDE)
    assert found.notes == []
    assert found.values == {
        "mixed_precision": "bf16", "dataset_config": "path/to/toml", "task": "k5-pro-t2v-5s-sd",
        "dit": "path/to/dit.safetensors", "vae": "path/to/vae.safetensors",
        "text_encoder_qwen": "Qwen/Qwen2.5-VL-7B-Instruct", "fp8_base": True, "attention": "sdpa",
        "gradient_checkpointing": True, "max_data_loader_n_workers": 1, "persistent_data_loader_workers": True,
        "learning_rate": 1e-4, "optimizer_type": "AdamW8Bit",
        "optimizer_args": ["weight_decay=0.001", "betas=(0.9,0.95)"], "lr_scheduler": "constant_with_warmup",
        "lr_warmup_steps": "100", "network_module": "networks.lora_kandinsky", "network_dim": 32,
        "network_alpha": 32.0, "timestep_sampling": "shift", "discrete_flow_shift": 5.0,
        "output_dir": "path/to/output", "output_name": "k5_lora", "save_every_n_epochs": 1, "max_train_epochs": 50,
        "scheduler_scale": 10.0,
    }  # fmt: skip


def test_our_own_command_and_options_come_back(tmp_path: Path) -> None:
    """What the page copies, it reads back: as a command and as the options.toml of a run."""
    options = TrainOptions(
        task="k5-demo-i2v", dataset_config=str(tmp_path / "a set.toml"), network_args=["include_patterns=['.*to_key']"],
        learning_rate=3e-5, nabla_add_sta=False, gradient_checkpointing=True, lr_warmup_steps="5%",
        base_weights=["/a/b.safetensors", "/c.safetensors"], base_weights_multiplier=[0.5, 1.0], save_state=True,
    )  # fmt: skip
    for text in (to_command_text(options, "kandinsky5_train_network"), to_toml(options)):
        found = read(text)
        assert found.notes == []
        assert TrainOptions(**found.values) == options


BATCH = """@echo off
rem comment --network_dim 99
call venv\\Scripts\\activate
set MODELS=D:\\models
set "NAME=cat"
python kandinsky5_cache_latents.py --dataset_config x.toml
accelerate launch kandinsky5_train_network.py ^
  --task k5-lite-t2v-5s-sd ^
  --dit "%MODELS%\\k5 lite.safetensors" --output_name %NAME% ^
  --learning_rate 1e-4 --network_dim 8 --network_alpha 8 --timestep_sampling uniform --vae %VAE%
pause
"""
SHELL = """#!/bin/bash
MODELS=/models   # where they lie
NAME="a cat"
# --network_dim 99
cd /x && accelerate launch -m musubi_tuner.kandinsky5_train_network --task k5-lite-t2v-5s-sd \\
  --dit ${MODELS}/k5.safetensors --output_name "$NAME" --learning_rate 1e-4 --network_dim 8 --network_alpha 8 \\
  --timestep_sampling uniform
"""


def test_batch_files() -> None:
    """Carets, variables, comments, backslashes; the caching command is named, not taken."""
    found = read(BATCH)
    assert found.values["dit"] == "D:\\models\\k5 lite.safetensors"
    assert (found.values["output_name"], found.values["network_dim"], found.values["vae"]) == ("cat", 8, "%VAE%")
    assert notes(found)["vae"][0] == "changed"
    assert "kandinsky5_cache_latents" in notes(found)[""][1]


def test_shell_scripts() -> None:
    found = read(SHELL)
    assert found.notes == []
    assert found.values["dit"] == "/models/k5.safetensors"
    assert (found.values["output_name"], found.values["network_dim"]) == ("a cat", 8)


def test_powershell_and_one_line() -> None:
    found = read("python kandinsky5_train_network.py `\n --task k5-lite-t2v-5s-sd " + QUIET + "`\n --seed 7\n")
    assert (found.values["seed"], found.values["task"]) == (7, "k5-lite-t2v-5s-sd")
    assert read("--task k5-demo-t2v --network_dim 4").values == {"task": "k5-demo-t2v", "network_dim": 4}


def test_toml_tables_are_flattened() -> None:
    found = read('[model]\ntask = "k5-demo-t2v"\n[training]\nlearning_rate = 1e-3\nsave_state = true\nseeds = 3\n')
    assert found.values == {"task": "k5-demo-t2v", "learning_rate": 1e-3, "save_state": True}
    assert notes(found) == {"seeds": ("unknown", "is no option here. Did you mean seed?")}


CHANGED = [
    # T16: the default there draws evenly and ignores the shift; its limits count from the noisy end.
    ("", {"timestep_sampling": "uniform"}, "timestep_sampling"),
    ("--timestep_sampling sigma --discrete_flow_shift 3", {"timestep_sampling": "uniform"}, "discrete_flow_shift"),
    ("--weighting_scheme logit_normal --logit_mean 0.5", {"timestep_sampling": "logit_normal", "logit_mean": 0.5},
     "weighting_scheme"),
    ("--weighting_scheme mode", {"timestep_sampling": "mode"}, "weighting_scheme"),
    ("--timestep_sampling sigma --min_timestep 0 --max_timestep 300", {"min_timestep": 700.0, "max_timestep": 1000.0},
     "min_timestep"),
    ("--timestep_sampling qwen_shift", {"timestep_sampling": "shift"}, "timestep_sampling"),
    ("--timestep_sampling shift", {"discrete_flow_shift": 1.0}, "discrete_flow_shift"),
    ("--weighting_scheme sigma_sqrt", {"weighting_scheme": "sigma_sqrt", "timestep_sampling": "uniform"},
     "timestep_sampling"),
    # The defaults there are others.
    ("", {"learning_rate": 2e-6, "network_dim": 4, "network_alpha": 1.0}, "learning_rate"),
    # T14, T12: what does nothing there works here.
    ("--network_args \"exclude_patterns=['.*']\"", {"network_args": ["exclude_patterns=['.*']"]}, "network_args"),
    ("--gradient_checkpointing_cpu_offload", {"gradient_checkpointing_cpu_offload": True},
     "gradient_checkpointing_cpu_offload"),
    ("--dim_from_weights /a/b.safetensors", {"dim_from_weights": True, "network_weights": "/a/b.safetensors"},
     "dim_from_weights"),
    ("--sample_prompts /a/p.txt", {"sample_prompts": "/a/p.txt"}, "sample_prompts"),  # T9
]  # fmt: skip


@pytest.mark.parametrize(("flags", "values", "note"), CHANGED)
def test_what_means_something_else_here(flags: str, values: dict[str, Any], note: str) -> None:
    """It is said, and the value is the one that means the same."""
    found = read(TRAINER + flags)
    assert found.values | values == found.values
    assert notes(found)[note][0] in ("changed", "left_out")


def test_schemes_that_weigh_nothing_are_left_out_with_other_samplings() -> None:
    found = read(TRAINER + QUIET + "--weighting_scheme logit_normal")
    assert found.values["timestep_sampling"] == "uniform"
    assert "weighting_scheme" not in found.values
    assert notes(found)["weighting_scheme"][0] == "left_out"


def test_sage_attention_is_refused() -> None:
    """T13: it has no gradients."""
    found = read(TRAINER + QUIET + "--sage_attn --flash_attn --xformers")
    assert found.values["attention"] == "flash_attn"
    assert {name: kind for name, (kind, _) in notes(found).items()} == {"sage_attn": "left_out", "xformers": "left_out"}


def test_keys_are_never_kept() -> None:
    found = read(TRAINER + QUIET + "--wandb_api_key 0123456789abcdef")
    assert "0123456789abcdef" not in str(found)


@pytest.mark.parametrize("name", sorted(LEFT_OUT))
def test_flags_without_a_counterpart_say_why(name: str) -> None:
    found = read(TRAINER + QUIET + f"--{name} 3 --seed 5")
    assert notes(found)[name][0] == "left_out"
    assert found.values["seed"] == 5


def test_several_processes_are_the_launchers() -> None:
    found = read("accelerate launch --multi_gpu --num_processes 4 kandinsky5_train_network.py --seed 1 " + QUIET)
    assert "accelerate launch" in notes(found)["num_processes"][1]


def test_values_of_another_kind_are_not_taken() -> None:
    found = read(TRAINER + QUIET + "--seed many --lr_scheduler cosinus --save_state maybe --network_dropout")
    kinds = {name: kind for name, (kind, _) in notes(found).items()}
    assert kinds == dict.fromkeys(("seed", "lr_scheduler", "save_state", "network_dropout"), "unknown")


def test_another_model_is_said() -> None:
    found = read("python wan_train_network.py --task t2v-14B " + QUIET)
    assert "wan_train_network" in notes(found)[""][1]
    assert notes(found)["task"][0] == "unknown"


@pytest.mark.parametrize("text", ["hello", "pip install x", "", "   ", 'python x.py --a "b', "x" * 300_000])
def test_texts_without_a_training(text: str) -> None:
    with pytest.raises(UserError):
        read(text)


@pytest.mark.parametrize("text", ["\\\n" * 5000, "--a " * 20_000, "%A%" * 10_000, "a=" * 20_000, "'" * 9_999])
def test_odd_texts_end_soon(text: str) -> None:
    """No expression of the reader backtracks without end."""
    began = time.process_time()
    with suppress(ValueError):
        commands(text)
    assert time.process_time() - began < 5
