"""The options of the commands that look at datasets and cache them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from backend.config.options import Options, option
from backend.config.tasks import TASKS

if TYPE_CHECKING:
    TaskName = str
else:  # Checkers cannot read choices that come from a table.
    TaskName = Literal[tuple(TASKS)]
DebugMode = Literal["image", "console", "video"]
ReportFormat = Literal["text", "json"]


class DatasetOptions(Options):
    """What every command that reads a dataset configuration has."""

    dataset_config: str | None = option(None, "Dataset configuration (.toml or .json).", group="dataset", path="file")
    nabla_resize: bool = option(
        False, "Sizes in multiples of 128 for NABLA tasks: scaled to cover, then cropped; the aspect stays.",
        group="dataset",
    )  # fmt: skip
    nabla_stretch: bool = option(
        False, "With --nabla_resize: stretch to the next multiple of 128 as other trainers do; the aspect changes.",
        group="dataset", level="advanced",
    )  # fmt: skip
    num_workers: int | None = option(
        None, "Workers that read sources ahead; default: one less than the CPU cores, 2 at least.", group="work",
        level="advanced", ge=1, le=256,
    )  # fmt: skip
    report_format: ReportFormat = option("text", "How reports are printed.", group="report")


class CacheOptions(DatasetOptions):
    """What both caching commands have."""

    task: TaskName | None = option(
        None, "The model that the caches are for; the k5-demo tasks bring their own weights.", group="model"
    )
    batch_size: int | None = option(
        None, "Items encoded together; default: the dataset's batch_size.", group="work", unit="items", ge=1, le=1024
    )
    skip_existing: bool = option(
        False, "Leave caches alone that are still valid: same source, size, caption and weights.", group="work"
    )
    device: str | None = option(
        None, "Where to compute (cpu, cuda:0, mps); default: the best that is there.", group="work", level="advanced"
    )
    check: bool = option(
        False, "Cache nothing; report what is valid, stale, missing, left over or broken.", group="report"
    )
    prune: bool = option(
        False, "Afterwards move caches that belong to no item to .k5_trash in the cache folder.", group="report"
    )
    keep_cache: bool = option(
        False, "Keep caches that belong to no item: the default here; refused together with --prune.",
        group="report", level="advanced",
    )  # fmt: skip


class CacheLatentsOptions(CacheOptions):
    """What `python -m backend.kandinsky5_cache_latents` reads."""

    vae: str | None = option(None, "HunyuanVideo VAE: a .safetensors file or a folder.", group="model", path="weights")
    vae_dtype: Literal["float16", "bfloat16", "float32"] | None = option(
        None, "Number format of the VAE; default float16 on a GPU, float32 on CPU.", group="model", level="advanced"
    )
    vae_tiling: Literal["auto", "on", "off"] = option(
        "auto", "Encode in overlapping tiles to save memory.", group="model", level="advanced"
    )
    posterior: Literal["sample", "mode"] = option(
        "sample", "Draw from the VAE's distribution, each item with its own seed, or take its middle.",
        group="model", level="advanced",
    )  # fmt: skip
    seed: int = option(
        0, "Start of the random numbers; each item has its own, which depends on its name.", group="model",
        level="advanced", ge=0, le=2**63 - 1,
    )  # fmt: skip
    disable_cudnn_backend: bool = option(
        False, "Do without cuDNN, which fails on some cards.", group="work", level="advanced"
    )
    debug_mode: DebugMode | None = option(
        None, "Encode nothing; show what would be encoded: pictures, text art, or clips beside the caches.",
        group="debug", level="advanced",
    )  # fmt: skip
    console_width: int = option(
        80, "Width of text art.", group="debug", unit="characters", level="advanced", ge=20, le=400
    )
    console_back: str | None = option(
        None, "Background colour of text art: a colour name or #rrggbb.", group="debug", level="advanced", max_length=40
    )
    console_num_images: int | None = option(
        None, "Stop after so many items of text art.", group="debug", level="advanced", ge=1, le=1_000_000
    )


class CacheTextOptions(CacheOptions):
    """What `python -m backend.kandinsky5_cache_text_encoder_outputs` reads."""

    text_encoder_qwen: str | None = option(
        None, "Qwen2.5-VL text encoder: a folder or a hub name.", group="model", path="weights"
    )
    text_encoder_clip: str | None = option(
        None, "CLIP text encoder: a folder or a hub name.", group="model", path="weights"
    )
    dtype: Literal["bfloat16", "float32"] | None = option(
        None, "Number format of Qwen2.5-VL; default bfloat16 on a GPU, float32 on CPU.", group="model",
        level="advanced",
    )  # fmt: skip
    batch_size: int | None = option(
        None, "Captions between two looks at a request to stop; default 1. Each is encoded by itself whatever this "
        "says, so that its numbers do not depend on its neighbours.", group="work", unit="captions", level="advanced",
        ge=1, le=1024,
    )  # fmt: skip
    quantized_qwen: bool = option(
        False, "Load Qwen2.5-VL in 4 bits (nf4, needs bitsandbytes): 5 GB instead of 15.", group="model"
    )
    qwen_max_length: int | None = option(
        None, "Largest number of tokens of a caption; default: 256 for videos, 512 for images, as in generation.",
        group="model", unit="tokens", level="advanced", ge=2, le=4096,
    )  # fmt: skip
    clip_max_length: int = option(
        77, "Largest number of CLIP tokens of a caption; generation reads 77.", group="model", unit="tokens",
        level="advanced", ge=3, le=77,
    )  # fmt: skip


class CheckDatasetOptions(DatasetOptions):
    """What `python -m backend.kandinsky5_check_dataset` reads."""

    text_encoder_qwen: str | None = option(
        None, "Folder of Qwen2.5-VL, whose tokenizer counts the tokens of captions.", group="dataset", path="weights"
    )
    trigger_word: str | None = option(None, "A word that every caption should hold.", group="dataset", max_length=200)
    output: str | None = option(None, "Also write the findings as JSON to this file.", group="report", path="new_file")
