"""What has changed between a saved state and the run that goes on from it, and what that means. No torch.

Every training option has a kind. `impossible`: the saved numbers do not fit any more. `meaning`: it goes on, but what
is learned from here on, or how, is another thing. `safe`: nothing of what is learned depends on it, except for rounding
where another device or another way to compute is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from backend.config.options import specs
from backend.config.tasks import TASKS
from backend.config.train import TrainOptions
from backend.config.train_arguments import key_values
from backend.errors import Problems

Kind = Literal["safe", "meaning", "impossible"]
Verdict = tuple[Kind, str] | None
Rule = Callable[[Mapping[str, Any], Mapping[str, Any]], Verdict]
_ORDER: tuple[Kind, ...] = ("impossible", "meaning", "safe")

DATASET_FACT = "dataset_fingerprint"
BASE_FACT = "base_fingerprint"
BATCHES_FACT = "batches_per_epoch"
PROCESSES_FACT = "processes"


_OUTPUT = "Only names and places of files."
_SAVING = "Only when, and how, files are saved."
_SAMPLES = "Samples take no part in learning."
_TRACKING = "Only where curves and messages go."
_CACHES = "What was cached is compared by its content."
_ROUNDING = "The same numbers up to rounding, so not bit for bit."
_MEMORY = "The same numbers; only memory and speed change."
_SPEED = "Only how fast batches are read."
_MEASURE = "Only what is measured; the new validation losses do not compare with the old ones."
_START = "Only used at the start of a run; the state has the weights."
_SCHEDULE = "The learning rate goes on as if the new schedule had been used from the start."
_LEARNING = "It learns in another way from here on."
_TIMESTEPS = "Other noise levels are trained from here on, and losses do not compare."
_MODEL = "The frozen model computes other numbers, to which the LoRA must adapt."
_CONDITIONS = "What the model is given while it learns is another thing."
_SHAPE = "The saved weights have other shapes. Start a new run."


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it was; `why` is a sentence for people that says what follows."""

    name: str
    old: Any
    new: Any
    kind: Kind
    why: str


# --- rules for options whose kind depends on the values -----------------------------------------------------------


def _task(old: Mapping[str, Any], new: Mapping[str, Any]) -> Verdict:
    before, now = TASKS.get(old["task"] or ""), TASKS.get(new["task"] or "")
    if before is None or now is None or before.architecture != now.architecture:
        return "impossible", "The model has other layers, so the saved LoRA does not fit. Start a new run."
    return "meaning", "The LoRA goes on learning for another task."


def _optimizer(old: Mapping[str, Any], new: Mapping[str, Any]) -> Verdict:
    if str(old["optimizer_type"]).lower() == str(new["optimizer_type"]).lower():
        return None
    return (
        "impossible",
        "Each optimizer keeps other numbers, so the saved ones are of no use. Start a new run with --network_weights.",
    )


def _alpha(old: Mapping[str, Any], new: Mapping[str, Any]) -> Verdict:
    before, now = (
        values["network_dim"] if not values["network_alpha"] else values["network_alpha"] for values in (old, new)
    )
    if before == now:
        return None
    return "impossible", "Everything learned so far would have another strength at once. Start a new run."


def _seed(old: Mapping[str, Any], new: Mapping[str, Any]) -> Verdict:
    if new["seed"] is None:
        return None  # The saved one is used.
    return (
        "meaning",
        "Noise, noise levels and the order of the items are other ones. The epoch begins again, so some of its items "
        "are seen twice.",
    )


def _fp8(old: Mapping[str, Any], new: Mapping[str, Any]) -> Verdict:
    before, now = (values["fp8_base"] or values["fp8_scaled"] for values in (old, new))
    return None if before == now else ("meaning", _MODEL)


def _length(old: Mapping[str, Any], new: Mapping[str, Any]) -> Verdict:
    by_length = any(
        values["lr_scheduler"] != "constant" or values["lr_scheduler_type"] or not values["lr_warmup_steps"].isdecimal()
        for values in (old, new)
    )
    if by_length:
        return "meaning", "The learning rate follows the length: it goes on as if the new length had been planned."
    return "safe", "The run ends sooner or later than planned."


def _network_arguments(old: Mapping[str, Any], new: Mapping[str, Any]) -> Verdict:
    try:
        before, now = (key_values(values["network_args"], "network_args") for values in (old, new))
    except Problems:
        return "meaning", "The arguments cannot be read."
    changed = {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}
    if changed & {"include_patterns", "exclude_patterns"}:
        return (
            "impossible",
            "Other layers would be trained, and the saved LoRA has no weights for them. Start a new run.",
        )
    if changed - {"verbose"}:
        return "meaning", "The LoRA learns with other dropout or other learning rates."
    return ("safe", "It only says more or less.") if changed else None


def _dimension_from_weights(old: Mapping[str, Any], new: Mapping[str, Any]) -> Verdict:
    return "impossible", "It decides the rank, which must stay. Give the same options as before."


# --- the table ----------------------------------------------------------------------------------------------------


def _options(kind: Kind, why: str, *names: str) -> dict[str, Verdict | Rule]:
    return dict.fromkeys(names, (kind, why))


#: Every option of training -> its kind and the sentence, or a rule that looks at the values.
TABLE: dict[str, Verdict | Rule] = {
    "task": _task,
    "optimizer_type": _optimizer,
    "network_alpha": _alpha,
    "network_args": _network_arguments,
    "dim_from_weights": _dimension_from_weights,
    "seed": _seed,
    "fp8_base": _fp8,
    "fp8_scaled": _fp8,
    "max_train_steps": _length,
    "max_train_epochs": _length,
    **_options("impossible", _SHAPE, "network_module", "network_dim"),
    **_options(
        "meaning", _MODEL, "base_weights", "base_weights_multiplier", "mixed_precision", "rope_bf16_rounding",
        "force_nabla_attention", "nabla_method", "nabla_P", "nabla_wT", "nabla_wH", "nabla_wW", "nabla_add_sta",
    ),
    **_options("meaning", _CONDITIONS, "i2v_mode", "i2v_cond_prob", "i2v_stills"),
    **_options(
        "meaning", _LEARNING, "gradient_accumulation_steps", "optimizer_args", "max_grad_norm", "network_dropout",
        "scale_weight_norms",
    ),
    **_options(
        "meaning", _SCHEDULE, "learning_rate", "lr_scheduler", "lr_warmup_steps", "lr_decay_steps",
        "lr_scheduler_num_cycles", "lr_scheduler_power", "lr_scheduler_timescale", "lr_scheduler_min_lr_ratio",
        "lr_scheduler_type", "lr_scheduler_args",
    ),
    **_options(
        "meaning", _TIMESTEPS, "timestep_sampling", "discrete_flow_shift", "sigmoid_scale", "logit_mean", "logit_std",
        "mode_scale", "min_timestep", "max_timestep", "preserve_distribution_shape", "num_timestep_buckets",
        "weighting_scheme",
    ),
    **_options(
        "safe", _CACHES, "dit", "vae", "text_encoder_qwen", "text_encoder_clip", "dataset_config", "cache_missing",
        "nabla_resize", "nabla_stretch",
    ),
    **_options("safe", _SPEED, "max_data_loader_n_workers", "persistent_data_loader_workers"),
    **_options("safe", _ROUNDING, "device", "attention"),
    **_options(
        "safe", _MEMORY, "gradient_checkpointing", "gradient_checkpointing_cpu_offload", "blocks_to_swap"
    ),
    **_options("safe", "Only when a run that goes wrong is ended.", "max_nonfinite_steps"),
    **_options("safe", "Nothing is trained then.", "show_timesteps"),
    **_options(
        "safe", _MEASURE, "validate_every_n_steps", "validate_every_n_epochs", "validation_timesteps",
        "max_validation_items",
    ),
    **_options("safe", _START, "network_weights"),
    **_options("safe", _OUTPUT, "output_dir", "output_name"),
    **_options(
        "safe", _SAVING, "save_every_n_epochs", "save_every_n_steps", "save_last_n_epochs", "save_last_n_steps",
        "save_state", "save_state_on_train_end", "save_last_n_epochs_state", "save_last_n_steps_state",
        "save_precision", "no_metadata", "training_comment", "metadata_title", "metadata_author",
        "metadata_description", "metadata_license", "metadata_tags",
    ),
    **_options(
        "safe", _SAMPLES, "sample_prompts", "sample_every_n_steps", "sample_every_n_epochs", "sample_at_first",
        "scheduler_scale", "offload_dit_during_sampling", "vae_tiling", "text_cache_dir",
    ),
    **_options(
        "safe", _TRACKING, "logging_dir", "log_with", "log_prefix", "log_tracker_name", "log_tracker_config",
        "wandb_run_name", "log_config", "ddp_timeout",
    ),
    **_options("safe", "It says where the state is.", "resume"),
}  # fmt: skip

#: Facts that are no options -> what a change means. All of them belong to data or model, so all change the meaning.
FACTS: dict[str, str] = {
    DATASET_FACT: "The dataset has changed: items, captions or their caches. The epoch begins again, so some of its "
    "items are seen twice.",
    BATCHES_FACT: "Batches are made in another way. The epoch begins again, so some of its items are seen twice.",
    BASE_FACT: "The frozen model is another one, to which the LoRA must adapt.",
    PROCESSES_FACT: "A step takes as many batches as there are processes, so steps and epochs are of another length.",
}
#: Differences after which the place in the epoch means nothing: it begins again.
RESTARTS_EPOCH = frozenset({"seed", DATASET_FACT, BATCHES_FACT})


def differences(
    old_options: Mapping[str, Any],
    new_options: TrainOptions,
    old_facts: Mapping[str, Any],
    new_facts: Mapping[str, Any],
) -> list[Difference]:
    """What has changed, the gravest first, in the order of the options; --resume itself is left out.

    Options that the old run did not have count with their default. A fact that one side does not know is not compared.

    Args:
        old_options: as a state's record or a run's options.toml has them (there, None is left out).
        old_facts: the record's `extra`; read are dataset_fingerprint, base_fingerprint, batches_per_epoch, processes,
            and `seed`, the one that was drawn when the options have none.
        new_facts: the same of the run that goes on.
    """
    defaults = {spec.name: spec.default for spec in specs(TrainOptions)}
    old = {**defaults, **{name: value for name, value in old_options.items() if name in defaults}}
    new = new_options.model_dump(mode="json")
    if old["seed"] is None:
        old["seed"] = old_facts.get("seed")
    found: list[Difference] = []
    for name in defaults:
        if name == "resume" or old[name] == new[name]:
            continue
        entry = TABLE[name]
        verdict = entry(old, new) if callable(entry) else entry
        if verdict is not None:
            found.append(Difference(name, old[name], new[name], *verdict))
    for name, why in FACTS.items():
        before, now = old_facts.get(name), new_facts.get(name)
        if before is not None and now is not None and before != now:
            found.append(Difference(name, before, now, "meaning", why))
    return sorted(found, key=lambda difference: _ORDER.index(difference.kind))


def restarts_epoch(found: list[Difference]) -> bool:
    """Whether the position inside the epoch is of no use after these differences: the epoch then begins again."""
    return any(difference.name in RESTARTS_EPOCH for difference in found)
