"""A small real dataset with its caches, and the training command inside the test's process."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from backend.config.tasks import TASKS, default_weights
from backend.events import read_events
from backend.kandinsky5_cache_latents import main as cache_latents
from backend.kandinsky5_cache_text_encoder_outputs import main as cache_captions
from backend.kandinsky5_train_network import main
from backend.training.step_meter import StepFacts, TrainingMeter
from tests.integration.command import Run
from tests.real_clips import caption, real_clip, real_still

_COUNTER = iter(range(1, 1_000_000))
PATHS = default_weights(TASKS["k5-demo-t2v"])
#: Few layers and a low rank: what these tests are about does not depend on how much is trained.
SMALL = ("--task", "k5-demo-t2v", "--network_dim", "4", "--seed", "7", "--learning_rate", "1e-3", "--output_name", "my")


def make_sources(folder: Path) -> Path:
    """Five real clips of 9 frames and two stills, 64 x 64, with captions; returns the configuration. Nothing cached."""
    for number, (name, start) in enumerate((("bikes", 0), ("bikes", 30), ("bunny", 0), ("bunny", 40), ("phone", 0))):
        path = real_clip(folder / "clips" / f"{name}_{number}.mp4", name, (64, 64), 9, start=start)
        caption(path, f"{name}, clip {number}" + (" with a far longer caption" if number == 1 else ""))
    for name in ("bikes", "bunny"):
        caption(real_still(folder / "stills" / f"{name}.png", name, (64, 64)), f"a still of {name}")
    return write_config(folder, folder / "dataset.toml")


def write_config(folder: Path, path: Path, *, clips: str = "", stills: str | None = "") -> Path:
    """The configuration of `make_sources`; `clips` and `stills` are further keys, None leaves the stills out."""
    text = f"""
[general]
resolution = [64, 64]
caption_extension = ".txt"

[[datasets]]
video_directory = '{folder / "clips"}'
cache_directory = '{folder / "cache_clips"}'
target_frames = [9]
{clips}
"""
    if stills is not None:
        text += f"""
[[datasets]]
image_directory = '{folder / "stills"}'
cache_directory = '{folder / "cache_stills"}'
{stills}
"""
    path.write_text(text, encoding="utf-8")
    return path


def cache(config: Path) -> None:
    """Run both caching commands."""
    runs = config.parent / "caching"
    with contextlib.redirect_stderr(io.StringIO()) as said:
        words = ["--dataset_config", str(config), "--task", "k5-demo-t2v"]
        assert cache_captions([*words, "--run_dir", str(runs / "text")]) == 0, said.getvalue()
        assert cache_latents([*words, "--run_dir", str(runs / "latents")]) == 0, said.getvalue()


def train(folder: Path, config: Path, *words: Any) -> Run:
    """The training command with `--run_dir folder`; nothing but the words given is set."""
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream):
        code = main([*map(str, words), "--dataset_config", str(config), "--run_dir", str(folder)])
    records = [dict(record) for record in read_events(folder / "events.jsonl").records]
    return Run(code, records, stream.getvalue(), folder)


def ask(folder: Path, name: str) -> None:
    """What the page does when a button is pressed."""
    path = folder / "requests" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"id": f"a{next(_COUNTER)}"}), "utf-8")


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA file."""
    return load_file(path)


def same(first: Path, second: Path) -> bool:
    """Whether two LoRA files hold the same numbers, bit for bit."""
    one, other = weights(first), weights(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def copy_of(folder: Path, to: Path) -> Path:
    """A dataset with its caches in another place."""
    shutil.copytree(folder, to)
    return to


def ask_after_step(patch: pytest.MonkeyPatch, folder: Path, wanted: Mapping[int, str]) -> None:
    """Leave requests in the run folder right after steps, as somebody at the page would: {10: "save"}."""
    step = TrainingMeter.step

    def asking(meter: TrainingMeter, facts: StepFacts) -> dict[str, Any]:
        record = step(meter, facts)
        if facts.step in wanted:
            ask(folder, wanted[facts.step])
        return record

    patch.setattr(TrainingMeter, "step", asking)


def guide_words(out: Path, *, warmup: int, epochs: int) -> list[str]:
    """The training command of the guide, its paths changed to the demo weights, its warm-up and length shortened."""
    return [
        *("--mixed_precision", "bf16", "--task", "k5-demo-t2v", "--dit", str(PATHS.dit)),
        *("--text_encoder_qwen", str(PATHS.text_encoder_qwen), "--text_encoder_clip", str(PATHS.text_encoder_clip)),
        *("--vae", str(PATHS.vae), "--fp8_base", "--sdpa", "--gradient_checkpointing"),
        *("--max_data_loader_n_workers", "1", "--persistent_data_loader_workers", "--learning_rate", "1e-4"),
        *("--optimizer_type", "AdamW8Bit", "--optimizer_args", "weight_decay=0.001", "betas=(0.9,0.95)"),
        *("--max_grad_norm", "1.0", "--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", str(warmup)),
        *("--network_module", "networks.lora_kandinsky", "--network_dim", "32", "--network_alpha", "32"),
        *("--timestep_sampling", "shift", "--discrete_flow_shift", "5.0"),
        *("--output_dir", str(out), "--output_name", "k5_lora"),
        *("--save_every_n_epochs", "1", "--max_train_epochs", str(epochs), "--scheduler_scale", "10.0"),
    ]
