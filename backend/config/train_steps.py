"""The options of training that say how it learns: length, optimizer, schedule, timesteps, loss, validation."""

from __future__ import annotations

from typing import Literal

from backend.config.options import option
from backend.config.train_data import TrainDataOptions

SCHEDULES = (
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt",
    "cosine_with_min_lr", "warmup_stable_decay", "piecewise_constant", "adafactor", "rex",
)  # fmt: skip
Schedule = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt",
    "cosine_with_min_lr", "warmup_stable_decay", "piecewise_constant", "adafactor", "rex",
]  # fmt: skip
TimestepSampling = Literal["uniform", "sigmoid", "shift", "logsnr", "logit_normal", "mode"]


class TrainStepsOptions(TrainDataOptions):
    """Length, optimizer, schedule, timesteps, loss, validation."""

    max_train_steps: int = option(
        1600, "Optimizer steps; --max_train_epochs overrides it.", group="length", unit="steps", ge=1, le=10_000_000
    )
    max_train_epochs: int | None = option(
        None, "Length in passes over the dataset instead of steps.", group="length", unit="epochs", ge=1, le=1_000_000
    )
    gradient_accumulation_steps: int = option(
        1, "Batches whose gradients are averaged for one step.", group="length", ge=1, le=4096
    )
    seed: int | None = option(
        None, "Start of every random draw; without it one is drawn and recorded.", group="length", ge=0, le=2**32 - 1
    )
    max_nonfinite_steps: int = option(
        10, "Steps in a row with a loss or gradient that is no number, after which the run stops.", group="length",
        level="advanced", unit="steps", ge=1, le=100_000,
    )  # fmt: skip
    optimizer_type: str = option(
        "AdamW", "AdamW, AdamW8bit, Adafactor, or a class: its name in torch.optim or a dotted path.",
        group="optimizer", max_length=200,
    )  # fmt: skip
    optimizer_args: list[str] = option(
        [], "Arguments of the optimizer, like weight_decay=0.01 betas=(0.9,0.99).", group="optimizer"
    )
    learning_rate: float = option(1e-4, "Learning rate.", group="optimizer", ge=0.0, le=100.0)
    max_grad_norm: float = option(
        1.0, "Largest norm of the gradient; longer ones are scaled down; 0 = off.", group="optimizer", ge=0.0, le=1e9
    )
    lr_scheduler: Schedule = option("constant", "How the learning rate goes on.", group="schedule")
    lr_warmup_steps: str = option(
        "0", "Steps in which the learning rate grows: a number, a fraction (0.05) or a percentage (5%).",
        group="schedule", max_length=20,
    )  # fmt: skip
    lr_decay_steps: str = option(
        "0", "Steps of the decay at the end (warmup_stable_decay): a number, a fraction or a percentage.",
        group="schedule", level="advanced", max_length=20,
    )  # fmt: skip
    lr_scheduler_num_cycles: float = option(
        1.0, "Cycles of the cosine schedules.", group="schedule", level="advanced", gt=0.0, le=10_000.0
    )
    lr_scheduler_power: float = option(
        1.0, "Power of the polynomial schedule.", group="schedule", level="advanced", gt=0.0, le=100.0
    )
    lr_scheduler_timescale: int | None = option(
        None, "Time scale of inverse_sqrt; default: its warm-up.", group="schedule", level="advanced", unit="steps",
        ge=1,
    )  # fmt: skip
    lr_scheduler_min_lr_ratio: float | None = option(
        None, "Lowest learning rate as a share of the highest (cosine_with_min_lr, warmup_stable_decay, rex).",
        group="schedule", level="advanced", ge=0.0, le=1.0,
    )  # fmt: skip
    lr_scheduler_type: str | None = option(
        None, "A schedule by class instead: its name in torch.optim.lr_scheduler or a dotted path.", group="schedule",
        level="advanced", max_length=200,
    )  # fmt: skip
    lr_scheduler_args: list[str] = option(
        [], "Arguments of the schedule, like T_max=1000.", group="schedule", level="advanced"
    )
    timestep_sampling: TimestepSampling = option("shift", "How often each noise level is trained.", group="timesteps")
    discrete_flow_shift: float = option(
        5.0,
        "How far the sampling `shift` moves towards noise; t' = s t / (1 + (s - 1) t).",
        group="timesteps",
        gt=0.0,
        le=1000.0,
    )
    sigmoid_scale: float = option(
        1.0,
        "Spread before the sigmoid of the samplings `sigmoid` and `shift`.",
        group="timesteps",
        level="advanced",
        gt=0.0,
        le=100.0,
    )
    logit_mean: float = option(
        0.0,
        "Mean of the samplings `logit_normal` and `logsnr`.",
        group="timesteps",
        level="advanced",
        ge=-100.0,
        le=100.0,
    )
    logit_std: float = option(
        1.0,
        "Standard deviation of the samplings `logit_normal` and `logsnr`.",
        group="timesteps",
        level="advanced",
        gt=0.0,
        le=100.0,
    )
    mode_scale: float = option(
        1.29, "Strength of the sampling `mode`.", group="timesteps", level="advanced", ge=-1.0, le=1.75
    )
    min_timestep: float | None = option(
        None, "Lowest time that is trained, of 0 (clean) to 1000 (noise).", group="timesteps", level="advanced",
        ge=0.0, le=1000.0,
    )  # fmt: skip
    max_timestep: float | None = option(
        None, "Highest time that is trained.", group="timesteps", level="advanced", ge=0.0, le=1000.0
    )
    preserve_distribution_shape: bool = option(
        False, "Within these limits keep the distribution's shape (draw again) instead of squeezing it.",
        group="timesteps", level="advanced",
    )  # fmt: skip
    num_timestep_buckets: int | None = option(
        None, "Draw times evenly from this many strata of the distribution.", group="timesteps", level="advanced",
        ge=2, le=100_000,
    )  # fmt: skip
    weighting_scheme: Literal["none", "sigma_sqrt", "cosmap"] = option(
        "none", "Weight of the loss by noise level.", group="timesteps", level="advanced"
    )
    show_timesteps: Literal["image", "console"] | None = option(
        None, "Train nothing; show how often each noise level would be trained, and its weight.", group="timesteps",
        level="advanced",
    )  # fmt: skip
    validate_every_n_steps: int | None = option(
        None, "Measure the loss of the held-out items (validation_split of the dataset) that often.",
        group="validation", unit="steps", ge=1,
    )  # fmt: skip
    validate_every_n_epochs: int | None = option(
        None, "The same by epochs; default 1 when items are held out.", group="validation", unit="epochs", ge=1
    )
    validation_timesteps: int = option(
        4, "Noise levels at which each held-out item is measured: the middles of as many equal shares of the "
        "trained distribution.", group="validation", level="advanced", ge=1, le=100,
    )  # fmt: skip
    max_validation_items: int = option(
        16, "Held-out items that are measured at most.", group="validation", level="advanced", unit="items", ge=1,
        le=100_000,
    )  # fmt: skip
