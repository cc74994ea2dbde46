"""The options of training that say what is trained on what: model, dataset, conditions, number formats, memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from backend.config.generate import ATTENTION_SWITCHES, Attention
from backend.config.options import Options, option
from backend.config.tasks import TASKS

if TYPE_CHECKING:
    TaskName = str
else:  # Checkers cannot read choices that come from a table.
    TaskName = Literal[tuple(TASKS)]


class TrainDataOptions(Options):
    """Model, dataset, conditions and memory."""

    task: TaskName | None = option(
        None, "The model that is trained; the k5-demo tasks bring their own weights.", group="model"
    )
    dit: str | None = option(
        None, "DiT checkpoint: a .safetensors file or a diffusers folder.", group="model", path="weights"
    )
    vae: str | None = option(
        None, "HunyuanVideo VAE: needed for samples and for --cache_missing.", group="model", path="weights"
    )
    text_encoder_qwen: str | None = option(
        None, "Qwen2.5-VL text encoder (folder or hub name): for samples and --cache_missing.", group="model",
        path="weights",
    )  # fmt: skip
    text_encoder_clip: str | None = option(
        None, "CLIP text encoder (folder or hub name): for samples and --cache_missing.", group="model", path="weights"
    )
    dataset_config: str | None = option(
        None, "Dataset configuration (.toml or .json) whose latents and captions are cached.", group="dataset",
        path="file",
    )  # fmt: skip
    cache_missing: bool = option(
        False, "Cache first what is missing or stale, with the weights given here.", group="dataset"
    )
    nabla_resize: bool = option(
        False, "The caches were made with --nabla_resize (sizes in multiples of 128).", group="dataset",
        level="advanced",
    )  # fmt: skip
    nabla_stretch: bool = option(False, "The caches were made with --nabla_stretch.", group="dataset", level="advanced")
    max_data_loader_n_workers: int = option(
        2, "Threads that read batches ahead; 0 reads them between the steps.", group="dataset", level="advanced",
        ge=0, le=64,
    )  # fmt: skip
    persistent_data_loader_workers: bool = option(
        False, "Keep these threads over the end of an epoch, so that the next one starts at once.", group="dataset",
        level="advanced",
    )  # fmt: skip
    i2v_mode: Literal["first", "first_last"] = option(
        "first", "Image to video: which frames are given.", group="conditions"
    )
    i2v_cond_prob: float = option(
        1.0, "Image to video: share of the clips that get their frames; the rest trains text to video.",
        group="conditions", ge=0.0, le=1.0,
    )  # fmt: skip
    i2v_stills: Literal["t2v", "refuse"] = option(
        "t2v", "Image to video: train stills as text to video, or refuse a dataset that has some.", group="conditions",
        level="advanced",
    )  # fmt: skip
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "Number format of the frozen model; default bf16 on a GPU, no (float32) on CPU.", group="compute"
    )
    device: str | None = option(
        None, "Where to compute (cpu, cuda:0, mps); default: the best that is there.", group="compute",
        level="advanced",
    )  # fmt: skip
    attention: Attention = option(
        "auto", "Attention implementation; sage_attn has no gradients and is refused.", group="compute",
        level="advanced", switches=ATTENTION_SWITCHES,
    )  # fmt: skip
    rope_bf16_rounding: bool = option(
        False, "Round the result of rotary embeddings to bfloat16, as the official code does.", group="compute",
        level="advanced",
    )  # fmt: skip
    force_nabla_attention: bool = option(
        False, "Train with NABLA's sparse mask although the task has none.", group="NABLA", level="advanced"
    )
    nabla_method: Literal["topcdf", "topk"] | None = option(
        None, "How NABLA chooses blocks; default: the task's, else topcdf.", group="NABLA", level="advanced"
    )
    nabla_P: float | None = option(  # noqa: N815 (the published name)
        None, "Share of the attention that NABLA keeps; default: the task's, else 0.9.", group="NABLA",
        level="advanced", gt=0.0, le=1.0,
    )  # fmt: skip
    nabla_wT: int | None = option(  # noqa: N815
        None, "NABLA's window over time; default: the task's, else 11.", group="NABLA", unit="blocks",
        level="advanced", ge=1, le=999,
    )  # fmt: skip
    nabla_wH: int | None = option(  # noqa: N815
        None, "NABLA's window over rows; default: the task's, else 3.", group="NABLA", unit="blocks",
        level="advanced", ge=1, le=999,
    )  # fmt: skip
    nabla_wW: int | None = option(  # noqa: N815
        None, "NABLA's window over columns; default: the task's, else 3.", group="NABLA", unit="blocks",
        level="advanced", ge=1, le=999,
    )  # fmt: skip
    nabla_add_sta: bool = option(
        True, "Keep NABLA's window besides the chosen blocks.", group="NABLA", level="advanced"
    )
    fp8_base: bool = option(
        False, "Keep the frozen block weights in 8-bit floating point: half the memory.", group="memory"
    )
    fp8_scaled: bool = option(
        False, "Same as --fp8_base, which always has scales here.", group="memory", level="advanced"
    )
    gradient_checkpointing: bool = option(
        False,
        "Compute each block again in the backward pass: far less memory, about half again as slow.",
        group="memory",
    )
    gradient_checkpointing_cpu_offload: bool = option(
        False, "Keep what checkpointing remembers in CPU memory (turns --gradient_checkpointing on).", group="memory",
        level="advanced",
    )  # fmt: skip
    blocks_to_swap: int = option(
        0, "Blocks kept in CPU memory and copied to the GPU when used, forward and backward.", group="memory",
        unit="blocks", level="advanced", ge=0, le=256,
    )  # fmt: skip
