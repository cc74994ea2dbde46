"""Flags are a promise: none changes by accident, and every flag that users of the guide know is accepted."""

from __future__ import annotations

import json
import shlex

import pytest

from backend.config import docs
from backend.config.generate import GenerateOptions
from backend.config.options import parse_command_line
from tests.house.source_tree import ROOT

GOLDEN = ROOT / "tests" / "golden" / "flags.json"

# The flags that the inference section of the Kandinsky 5 guide names.
GUIDE_INFERENCE_FLAGS = (
    *("task", "dit", "vae", "text_encoder_qwen", "text_encoder_clip", "offload_dit_during_sampling", "fp8_base"),
    *("dtype", "prompt", "negative_prompt", "frames", "steps", "guidance", "scheduler_scale", "seed", "width"),
    *("height", "output", "lora_weight", "lora_multiplier", "blocks_to_swap"),
)
GUIDE_EXAMPLE = """
  python -m backend.kandinsky5_generate_video
  --task k5-pro-t2v-5s-sd
  --dit path/to/dit_model
  --vae path/to/vae/diffusion_pytorch_model.safetensors
  --text_encoder_qwen Qwen/Qwen2.5-VL-7B-Instruct
  --text_encoder_clip openai/clip-vit-large-patch14
  --offload_dit_during_sampling --fp8_base --dtype bfloat16
  --prompt "A cat walks on the grass, realistic style."
  --negative_prompt "low quality, artifacts"
  --frames 17 --steps 50 --guidance 5 --scheduler_scale 10
  --seed 42 --width 512 --height 512
  --output path/to/output.mp4
  --lora_weight path/to/lora.safetensors --lora_multiplier 1.0
"""


def test_flags_are_those_of_the_golden_file() -> None:
    golden = json.loads(GOLDEN.read_text("utf-8"))
    now = json.loads(json.dumps(docs.flag_table()))
    assert now == golden, (
        "Flags, defaults or choices changed. If that is meant, write the golden file anew in the same commit: "
        "python -m backend.config.docs --flags > tests/golden/flags.json"
    )


@pytest.mark.parametrize("flag", GUIDE_INFERENCE_FLAGS)
def test_every_inference_flag_of_the_guide_exists(flag: str) -> None:
    assert f"--{flag}" in docs.flag_table()["kandinsky5_generate_video"]


def test_the_example_command_of_the_guide_parses() -> None:
    words = shlex.split(GUIDE_EXAMPLE)
    options = parse_command_line(GenerateOptions, words[3:], "kandinsky5_generate_video", "").options
    assert options.task == "k5-pro-t2v-5s-sd"
    assert options.prompt == "A cat walks on the grass, realistic style."
    assert (options.frames, options.steps, options.guidance, options.scheduler_scale) == (17, 50, 5.0, 10.0)
    assert (options.width, options.height, options.seed) == (512, 512, 42)
    assert options.offload_dit_during_sampling
    assert options.fp8_base
    assert options.dtype == "bfloat16"
    assert options.lora_weight == ["path/to/lora.safetensors"]
    assert options.lora_multiplier == [1.0]
