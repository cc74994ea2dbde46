"""All options of `python -m backend.kandinsky5_train_network`; here those of network, saving, samples and tracking."""

from __future__ import annotations

from typing import Literal

from backend.config.options import option
from backend.config.train_steps import TrainStepsOptions


class TrainOptions(TrainStepsOptions):
    """What `python -m backend.kandinsky5_train_network` reads."""

    network_module: str = option(
        "networks.lora_kandinsky", "Kind of network; LoRA is the only one.", group="network", level="advanced",
        max_length=200,
    )  # fmt: skip
    network_dim: int = option(32, "Rank of the LoRA.", group="network", ge=1, le=4096)
    network_alpha: float | None = option(
        None, "Alpha of the LoRA, whose effect is alpha / rank; default: the rank.", group="network", ge=0.0, le=1e6
    )
    network_dropout: float | None = option(
        None, "Share of the low-rank values that are dropped while training.", group="network", level="advanced",
        ge=0.0, le=0.99,
    )  # fmt: skip
    network_args: list[str] = option(
        [], "Any of loraplus_lr_ratio=4, rank_dropout=0.1, module_dropout=0.1, include_patterns=['regex'], "
        "exclude_patterns=['regex'].", group="network", level="advanced",
    )  # fmt: skip
    network_weights: str | None = option(
        None, "LoRA file to start from.", group="network", level="advanced", path="file"
    )
    dim_from_weights: bool = option(
        False, "Take rank and alpha from --network_weights.", group="network", level="advanced"
    )
    base_weights: list[str] = option(
        [], "LoRA files to merge into the frozen model before training (before it is quantised).", group="network",
        level="advanced", path="file",
    )  # fmt: skip
    base_weights_multiplier: list[float] = option(
        [], "Strength of each of these, in the same order; default 1.", group="network", level="advanced"
    )
    scale_weight_norms: float | None = option(
        None, "Largest norm of a layer's difference; larger ones are scaled down after each step.", group="network",
        level="advanced", gt=0.0, le=1e9,
    )  # fmt: skip
    output_dir: str | None = option(
        None, "Folder of the LoRA files; default: checkpoints in the run folder.", group="saving", path="folder"
    )
    output_name: str = option("k5_lora", "Name of the LoRA files, without an ending.", group="saving", max_length=200)
    save_every_n_epochs: int | None = option(None, "Save that often.", group="saving", unit="epochs", ge=1)
    save_every_n_steps: int | None = option(None, "Save that often.", group="saving", unit="steps", ge=1)
    save_last_n_epochs: int | None = option(
        None, "Keep only that many of the files saved by epoch.", group="saving", level="advanced", ge=1
    )
    save_last_n_steps: int | None = option(
        None, "Keep only files of that many last steps (a distance, not a count).", group="saving", level="advanced",
        unit="steps", ge=1,
    )  # fmt: skip
    save_state: bool = option(False, "Save what is needed to go on exactly, each time.", group="saving")
    save_state_on_train_end: bool = option(False, "Save it at the end as well.", group="saving", level="advanced")
    save_last_n_epochs_state: int | None = option(
        None, "As --save_last_n_epochs, for states.", group="saving", level="advanced", ge=1
    )
    save_last_n_steps_state: int | None = option(
        None, "As --save_last_n_steps, for states.", group="saving", level="advanced", unit="steps", ge=1
    )
    save_precision: Literal["float", "fp32", "fp16", "bf16"] = option(
        "fp32", "Number format of the LoRA files; training is always in float32.", group="saving", level="advanced"
    )
    resume: str | None = option(
        None, "Go on from this state folder; latest = the newest whole one of --output_name in --output_dir.",
        group="saving", path="folder",
    )  # fmt: skip
    no_metadata: bool = option(
        False, "Store only what is needed to load the LoRA, nothing of dataset and settings.", group="saving",
        level="advanced",
    )  # fmt: skip
    training_comment: str | None = option(
        None, "A remark that is stored in the files.", group="saving", level="advanced", max_length=2000
    )
    metadata_title: str | None = option(
        None, "Title in the files; default: the output name.", group="saving", level="advanced", max_length=500
    )
    metadata_author: str | None = option(None, "Author in the files.", group="saving", level="advanced", max_length=500)
    metadata_description: str | None = option(
        None, "Description in the files.", group="saving", level="advanced", max_length=5000
    )
    metadata_license: str | None = option(
        None, "Licence in the files.", group="saving", level="advanced", max_length=500
    )
    metadata_tags: str | None = option(
        None, "Tags in the files, separated by commas.", group="saving", level="advanced", max_length=2000
    )
    sample_prompts: str | None = option(
        None, "Prompt file (.txt, .toml, .json) of the clips that are made while training.", group="samples",
        path="file",
    )  # fmt: skip
    sample_every_n_steps: int | None = option(None, "Make them that often.", group="samples", unit="steps", ge=1)
    sample_every_n_epochs: int | None = option(None, "Make them that often.", group="samples", unit="epochs", ge=1)
    sample_at_first: bool = option(False, "Make them before the first step too.", group="samples")
    scheduler_scale: float | None = option(
        None, "Shift of the sigma grid of samples; default: the task's. Training has --discrete_flow_shift.",
        group="samples", gt=0.0, le=100.0,
    )  # fmt: skip
    offload_dit_during_sampling: bool = option(
        False, "Put the DiT into CPU memory while a sample is decoded.", group="samples", level="advanced"
    )
    vae_tiling: Literal["auto", "on", "off"] = option(
        "auto", "Decode samples in overlapping tiles to save memory.", group="samples", level="advanced"
    )
    text_cache_dir: str | None = option(
        None, "Folder that keeps embeddings of sample prompts, so that known ones load no encoder.", group="samples",
        level="advanced", path="folder",
    )  # fmt: skip
    logging_dir: str | None = option(
        None, "Folder for TensorBoard or wandb.", group="tracking", level="advanced", path="folder"
    )
    log_with: Literal["tensorboard", "wandb", "all"] | None = option(
        None, "Who gets the curves besides the journal; tensorboard when --logging_dir is given.", group="tracking",
        level="advanced",
    )  # fmt: skip
    log_prefix: str | None = option(
        None, "Start of the folder's name in --logging_dir.", group="tracking", level="advanced", max_length=200
    )
    log_tracker_name: str = option(
        "network_train", "Name of the project there.", group="tracking", level="advanced", max_length=200
    )
    log_tracker_config: str | None = option(
        None, "TOML file with arguments for the trackers.", group="tracking", level="advanced", path="file"
    )
    wandb_run_name: str | None = option(
        None, "Name of the run in wandb.", group="tracking", level="advanced", max_length=200
    )
    log_config: bool = option(
        False, "Give the trackers the options too, without paths.", group="tracking", level="advanced"
    )
    ddp_timeout: int | None = option(
        None, "Minutes that processes wait for each other.", group="tracking", level="advanced", unit="min", ge=1,
        le=10_000,
    )  # fmt: skip
