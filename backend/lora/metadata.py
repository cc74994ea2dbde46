"""What a trained LoRA says about itself: the ss_* and modelspec.* keys that other software reads, and our own k5_*."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

from safetensors.torch import save
from torch import Tensor

from backend.config.tasks import TASKS, NablaPreset, TaskPreset
from backend.config.train import TrainOptions
from backend.config.train_arguments import key_values, steps_of
from backend.config.version import PROGRAM
from backend.lora.formats import LoraWeights, lora_tensors

ARCHITECTURE = "Kandinsky-5/lora"
IMPLEMENTATION = "https://github.com/kandinskylab/kandinsky-5"
_SPECIFICATION = "1.0.1"
# What kohya's and A1111's tools read of a file for their short hash.
_LEGACY_OFFSET, _LEGACY_LENGTH = 0x100000, 0x10000


class Place(Protocol):
    """Where training stands: steps done, epoch from 0, batches of this epoch done."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        ...

    @property
    def epoch(self) -> int:
        """Epochs done."""
        ...

    @property
    def batch(self) -> int:
        """Batches of the epoch at hand that are done."""
        ...


def lora_metadata(
    options: TrainOptions, facts: Mapping[str, Any], position: Place, layers: Mapping[str, LoraWeights]
) -> dict[str, str]:
    """The metadata of the kohya file that `layers` go into at `position`; all values are text.

    Of paths only the last part is stored. With --no_metadata there is no more than other software needs to load the
    file, and what the person gave for the file itself (title, author, ...).

    Args:
        facts: what options do not say. session_id (text), started_at and finished_at (seconds since 1970; the end is
            now unless given), seed, total_steps, epochs, dit and vae (paths), base_fingerprint, and dataset: items,
            batches_per_epoch, fingerprint and datasets (with buckets of width, height, frames), as a training set's
            facts() has them. What is missing is stored as "None".
        layers: exactly what is written, in its number format: the hashes are those of the file.
    """
    first = next(iter(layers.values()))
    metadata = {
        "format": "pt",
        "ss_base_model_version": "kandinsky5",
        "ss_network_module": "networks.lora_kandinsky",
        "ss_network_dim": str(first.rank),
        "ss_network_alpha": str(first.alpha),
        "ss_network_args": json.dumps(key_values(options.network_args, "network_args")),
    }
    if options.training_comment is not None or not options.no_metadata:
        metadata["ss_training_comment"] = str(options.training_comment)
    if options.no_metadata:
        return metadata | _given(options)
    metadata |= _text(_run_facts(options, facts, position))
    metadata |= _text(_settings(options))
    metadata |= _specification(options, facts)
    metadata |= _text(_own(options, facts))
    return metadata | file_hashes(lora_tensors(layers), metadata)


def file_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """sshs_model_hash and sshs_legacy_hash of a safetensors file with `tensors`, by which tools recognise a LoRA.

    The first is SHA-256 of all bytes after the header; the second the first 8 digits of SHA-256 of the 64 KiB from
    1 MiB on, in a file whose metadata are those of `metadata` that begin with ss_. As kohya's scripts compute both.
    """
    lasting = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    content = memoryview(save(dict(tensors), lasting))
    begin = 8 + int.from_bytes(content[:8], "little")
    legacy = content[_LEGACY_OFFSET : _LEGACY_OFFSET + _LEGACY_LENGTH]
    return {
        "sshs_model_hash": hashlib.sha256(content[begin:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(legacy).hexdigest()[:8],
    }


def _run_facts(options: TrainOptions, facts: Mapping[str, Any], position: Place) -> dict[str, Any]:
    dataset = facts.get("dataset", {})
    total = facts.get("total_steps", options.max_train_steps)
    return {
        "ss_session_id": facts.get("session_id"),
        "ss_training_started_at": facts.get("started_at"),
        "ss_training_finished_at": facts.get("finished_at", time.time()),
        "ss_output_name": options.output_name,
        "ss_num_train_items": dataset.get("items"),
        "ss_num_batches_per_epoch": dataset.get("batches_per_epoch"),
        "ss_num_epochs": facts.get("epochs"),
        "ss_epoch": position.epoch + (1 if position.batch else 0),
        "ss_steps": position.step,
        "ss_max_train_steps": total,
        "ss_lr_warmup_steps": steps_of(options.lr_warmup_steps, total, "lr_warmup_steps"),
        "ss_seed": facts.get("seed", options.seed),
        "ss_datasets": json.dumps(dataset.get("datasets", [])),
        "ss_sd_model_name": _last_part(facts.get("dit", options.dit)),
        "ss_vae_name": _last_part(facts.get("vae", options.vae)),
    }


def _settings(options: TrainOptions) -> dict[str, Any]:
    arguments = ",".join(options.optimizer_args)
    return {
        "ss_learning_rate": options.learning_rate,
        "ss_gradient_checkpointing": options.gradient_checkpointing or options.gradient_checkpointing_cpu_offload,
        "ss_gradient_checkpointing_cpu_offload": options.gradient_checkpointing_cpu_offload,
        "ss_gradient_accumulation_steps": options.gradient_accumulation_steps,
        "ss_lr_scheduler": options.lr_scheduler_type or options.lr_scheduler,
        "ss_network_dropout": options.network_dropout,
        "ss_mixed_precision": options.mixed_precision,
        "ss_optimizer": options.optimizer_type + (f"({arguments})" if arguments else ""),
        "ss_max_grad_norm": options.max_grad_norm,
        "ss_scale_weight_norms": options.scale_weight_norms,
        "ss_fp8_base": options.fp8_base or options.fp8_scaled,
        # The LoRA itself is always trained in float32.
        "ss_full_fp16": False,
        "ss_full_bf16": False,
        "ss_weighting_scheme": options.weighting_scheme,
        "ss_logit_mean": options.logit_mean,
        "ss_logit_std": options.logit_std,
        "ss_mode_scale": options.mode_scale,
        # This family has no guidance embedded in the model.
        "ss_guidance_scale": 1.0,
        "ss_timestep_sampling": options.timestep_sampling,
        "ss_sigmoid_scale": options.sigmoid_scale,
        "ss_discrete_flow_shift": options.discrete_flow_shift,
    }


def _specification(options: TrainOptions, facts: Mapping[str, Any]) -> dict[str, str]:
    finished = datetime.fromtimestamp(float(facts.get("finished_at", time.time())), tz=UTC)
    written = {
        "modelspec.sai_model_spec": _SPECIFICATION,
        "modelspec.architecture": ARCHITECTURE,
        "modelspec.implementation": IMPLEMENTATION,
        "modelspec.title": options.output_name,
        "modelspec.date": finished.replace(microsecond=0, tzinfo=None).isoformat(),
    }
    buckets = _buckets(facts)
    if buckets:
        largest = max(buckets, key=lambda bucket: (bucket["width"] * bucket["height"], bucket["width"]))
        written["modelspec.resolution"] = f"{largest['width']}x{largest['height']}"
    if options.min_timestep is not None or options.max_timestep is not None:
        low = 0.0 if options.min_timestep is None else options.min_timestep
        high = 1000.0 if options.max_timestep is None else options.max_timestep
        written["modelspec.timestep_range"] = f"{low:g},{high:g}"
    return written | _given(options)


def _given(options: TrainOptions) -> dict[str, str]:
    """What the person wrote for the file, which is stored in any case."""
    given = {
        "title": options.metadata_title,
        "author": options.metadata_author,
        "description": options.metadata_description,
        "license": options.metadata_license,
        "tags": options.metadata_tags,
    }
    return {f"modelspec.{name}": value for name, value in given.items() if value is not None}


def _own(options: TrainOptions, facts: Mapping[str, Any]) -> dict[str, Any]:
    task = TASKS[options.task] if options.task is not None else None
    image_to_video = task is not None and task.mode == "i2v"
    scale = options.scheduler_scale if options.scheduler_scale is not None else task and task.scheduler_scale
    multipliers = [*options.base_weights_multiplier, *([1.0] * len(options.base_weights))]
    merged = [[_last_part(path), one] for path, one in zip(options.base_weights, multipliers, strict=False)]
    return {
        "k5_program": PROGRAM,
        "k5_task": options.task,
        "k5_i2v_mode": options.i2v_mode if image_to_video else None,
        "k5_i2v_cond_prob": options.i2v_cond_prob if image_to_video else None,
        "k5_frames": json.dumps(sorted({bucket["frames"] for bucket in _buckets(facts)})),
        "k5_scheduler_scale": scale,
        "k5_dataset_fingerprint": facts.get("dataset", {}).get("fingerprint"),
        "k5_base_fingerprint": facts.get("base_fingerprint"),
        "k5_base_weights": json.dumps(merged),
        "k5_network_weights": _last_part(options.network_weights),
        "k5_nabla": json.dumps(_nabla(options, task)),
        "k5_min_timestep": options.min_timestep,
        "k5_max_timestep": options.max_timestep,
        "k5_preserve_distribution_shape": options.preserve_distribution_shape,
        "k5_num_timestep_buckets": options.num_timestep_buckets,
    }


def _nabla(options: TrainOptions, task: TaskPreset | None) -> dict[str, Any] | None:
    """The settings of the sparse attention that was trained with; None where attention was dense."""
    if not options.force_nabla_attention and (task is None or task.nabla is None):
        return None
    preset = (task.nabla if task is not None else None) or NablaPreset(0.9)
    names = ("P", "wT", "wH", "wW", "method")
    settings = {name: getattr(options, f"nabla_{name}") for name in names}
    settings = {name: getattr(preset, name) if value is None else value for name, value in settings.items()}
    return settings | {"add_sta": options.nabla_add_sta}


def _buckets(facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    datasets = facts.get("dataset", {}).get("datasets", [])
    return [bucket for dataset in datasets for bucket in dataset.get("buckets", [])]


def _last_part(path: str | None) -> str | None:
    """File or folder name without where it lies, also of a path of the other kind of system."""
    return None if path is None else re.split(r"[\\/]", str(path).rstrip("\\/"))[-1]


def _text(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}
