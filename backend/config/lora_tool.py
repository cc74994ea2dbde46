"""The options of `python -m backend.lora_tool <verb>`: one class for each verb."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from backend.config.checkpoint import KNOWN_ARCHITECTURES
from backend.config.options import Options, option

if TYPE_CHECKING:
    Architecture = str
else:  # Checkers cannot read choices that come from a table.
    Architecture = Literal[tuple(KNOWN_ARCHITECTURES)]

Precision = Literal["float", "fp32", "fp16", "bf16"]
_PRECISION_HELP = "Number format of the written weights; default: the one that they have."
_DIT_HELP = "DiT whose header tells the layers, for models of other sizes."
_ONE_LORA_HELP = "LoRA file, or PEFT folder with one."


class InspectOptions(Options):
    """What `inspect` reads."""

    lora_weight: str | None = option(None, _ONE_LORA_HELP, group="files", path="file", aliases=("input",))
    layers: bool = option(False, "List every layer with its sizes, rank and alpha.", group="display")
    as_json: bool = option(False, "Print JSON instead of text.", group="display", aliases=("json",))


class ConvertOptions(Options):
    """What `convert` reads."""

    lora_weight: str | None = option(None, _ONE_LORA_HELP, group="files", path="file", aliases=("input",))
    output: str | None = option(None, "LoRA file to write (.safetensors).", group="files", path="new_file")
    target: Literal["kohya", "diffusers", "comfyui"] | None = option(
        None, "Names to write: kohya (lora_unet_...), diffusers (transformer....lora_A, PEFT) or comfyui "
        "(diffusion_model....lora_A).", group="files",
    )  # fmt: skip
    save_precision: Precision | None = option(None, _PRECISION_HELP, group="files")
    architecture: Architecture | None = option(
        None, "Model of the LoRA; default: the one whose layers it fits.", group="model", level="advanced"
    )
    dit: str | None = option(None, _DIT_HELP, group="model", level="advanced", path="weights")


class MergeOptions(Options):
    """What `merge` reads."""

    dit: str | None = option(
        None, "DiT checkpoint: a .safetensors file, a sharded folder or a diffusers folder.", group="files",
        path="weights",
    )  # fmt: skip
    lora_weight: list[str] = option([], "LoRA files, or PEFT folders.", group="files", path="file", aliases=("input",))
    lora_multiplier: list[float] = option(
        [], "Strength of each LoRA, in the same order; default 1.", group="files"
    )  # fmt: skip
    output: str | None = option(
        None, "Checkpoint to write: a .safetensors file, or a new folder with the shards of the input.", group="files",
        path="new_file", aliases=("save_merged_model",),
    )  # fmt: skip
    save_precision: Precision | None = option(None, _PRECISION_HELP, group="files")


class AverageOptions(Options):
    """What `average` reads."""

    lora_weight: list[str] = option(
        [], "Checkpoints of one run, two or more.", group="files", path="file", aliases=("input",)
    )
    output: str | None = option(
        None, "LoRA file to write (.safetensors).", group="files", path="new_file", aliases=("output_file",)
    )
    save_precision: Precision | None = option(None, _PRECISION_HELP, group="files")
    no_sort: bool = option(
        False, "Keep the order in which the files are given; default: by the step in their names or metadata.",
        group="average",
    )  # fmt: skip
    beta: float = option(
        0.95, "How much of the average stays at each checkpoint: average = beta * average + (1 - beta) * next.",
        group="average", ge=0.0, le=1.0,
    )  # fmt: skip
    beta2: float | None = option(
        None, "Beta at the last checkpoint; in between it goes evenly from --beta to this.", group="average", ge=0.0,
        le=1.0,
    )  # fmt: skip
    sigma_rel: float | None = option(
        None, "Power-function average of this relative width instead of --beta, like 0.05 to 0.25.", group="average",
        ge=0.001, le=0.28,
    )  # fmt: skip
    dit: str | None = option(None, _DIT_HELP, group="model", level="advanced", path="weights")


class ResizeOptions(Options):
    """What `resize` reads."""

    lora_weight: str | None = option(None, _ONE_LORA_HELP, group="files", path="file", aliases=("input",))
    output: str | None = option(None, "LoRA file to write (.safetensors).", group="files", path="new_file")
    save_precision: Precision | None = option(None, _PRECISION_HELP, group="files")
    new_rank: int | None = option(None, "Rank of every layer.", group="rank", ge=1, le=4096)
    keep_energy: float | None = option(
        None, "Choose each layer's rank, at most --new_rank, so that this share of its squared singular values stays.",
        group="rank", gt=0.0, le=1.0,
    )  # fmt: skip
    dit: str | None = option(None, _DIT_HELP, group="model", level="advanced", path="weights")


class CheckOptions(Options):
    """What `check` reads."""

    lora_weight: str | None = option(None, _ONE_LORA_HELP, group="files", path="file", aliases=("input",))
    lora_multiplier: float = option(1.0, "Strength at which the difference is measured.", group="files")
    task: Literal["k5-demo-t2v", "k5-demo-i2v"] | None = option(
        None, "Check with the embedded demo model.", group="model"
    )
    dit: str | None = option(
        None, "DiT to check with; without it the layers are compared with the known models by name and shape.",
        group="model", path="weights",
    )  # fmt: skip
    architecture: Architecture | None = option(
        None, "Model to compare with when no weights are given; default: the one whose layers fit.", group="model",
        level="advanced",
    )  # fmt: skip
    header_only: bool = option(False, "Compare names and shapes only, load no weights.", group="model")
    seed: int = option(42, "Seed of the random input.", group="measurement", level="advanced", ge=0, le=2**32 - 1)
    device: str | None = option(
        None, "Where to compute (cpu, cuda:0, mps); default: the best that is there.", group="measurement",
        level="advanced",
    )  # fmt: skip


VERBS: Mapping[str, tuple[str, type[Options]]] = {
    "inspect": ("say what a LoRA file is", InspectOptions),
    "convert": ("write a LoRA with the names of other software", ConvertOptions),
    "merge": ("add LoRAs to a DiT checkpoint", MergeOptions),
    "average": ("average the checkpoints of a run", AverageOptions),
    "resize": ("give a LoRA another rank", ResizeOptions),
    "check": ("try whether a LoRA fits a model and changes its output", CheckOptions),
}
"""Verb -> what it does, and its options."""
