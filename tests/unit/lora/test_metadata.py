"""What a trained LoRA says about itself: keys that other software reads, hashes of the file, and no path."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from backend.config.options import from_mapping
from backend.config.train import TrainOptions
from backend.lora.formats import LoraWeights, lora_tensors, read_lora, write_lora
from backend.lora.metadata import file_hashes, lora_metadata
from tests.unit.lora.models import random_lora, skeleton

# Every key of reference/kandinsky5.md 8.
EXPECTED = {
    "ss_session_id", "ss_training_started_at", "ss_training_finished_at", "ss_output_name", "ss_learning_rate",
    "ss_num_train_items", "ss_num_batches_per_epoch", "ss_num_epochs", "ss_epoch", "ss_steps",
    "ss_gradient_checkpointing", "ss_gradient_checkpointing_cpu_offload", "ss_gradient_accumulation_steps",
    "ss_max_train_steps", "ss_lr_warmup_steps", "ss_lr_scheduler", "ss_base_model_version", "ss_network_module",
    "ss_network_dim", "ss_network_alpha", "ss_network_args", "ss_network_dropout", "ss_mixed_precision", "ss_seed",
    "ss_training_comment", "ss_optimizer", "ss_max_grad_norm", "ss_fp8_base", "ss_full_fp16", "ss_full_bf16",
    "ss_weighting_scheme", "ss_logit_mean", "ss_logit_std", "ss_mode_scale", "ss_guidance_scale",
    "ss_timestep_sampling", "ss_sigmoid_scale", "ss_discrete_flow_shift", "ss_datasets", "ss_sd_model_name",
    "ss_vae_name", "modelspec.sai_model_spec", "modelspec.architecture", "modelspec.implementation",
    "modelspec.title", "modelspec.date", "modelspec.resolution", "sshs_model_hash", "sshs_legacy_hash", "k5_task",
    "k5_i2v_mode", "k5_frames", "k5_scheduler_scale", "k5_dataset_fingerprint", "k5_base_fingerprint", "k5_nabla",
}  # fmt: skip
MINIMUM = {"format", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha",
           "ss_network_args"}  # fmt: skip
SECRET = "/home/somebody/private"
FACTS: Mapping[str, Any] = {
    "session_id": "4711",
    "started_at": 1_795_000_000.5,
    "finished_at": 1_795_003_600.0,
    "seed": 42,
    "total_steps": 200,
    "epochs": 10,
    "dit": f"{SECRET}/models/pro.safetensors",
    "vae": f"{SECRET}/vae/",
    "base_fingerprint": "abc123",
    "dataset": {
        "items": 12,
        "batches_per_epoch": 20,
        "fingerprint": "def456",
        "datasets": [
            {"num_repeats": 2, "buckets": [{"width": 768, "height": 512, "frames": 121, "items": 9}]},
            {"num_repeats": 1, "buckets": [{"width": 512, "height": 512, "frames": 1, "items": 3}]},
        ],
    },
}


class _Position(NamedTuple):
    step: int
    epoch: int
    batch: int


def _options(**values: Any) -> TrainOptions:
    return from_mapping(TrainOptions, {"task": "k5-pro-i2v-5s-sd", **values})


def _layers(dtype: torch.dtype = torch.float32, rank: int = 4) -> dict[str, LoraWeights]:
    return random_lora(skeleton(), rank=rank, alpha=2.0, dtype=dtype)


def _metadata(**values: Any) -> dict[str, str]:
    return lora_metadata(_options(**values), FACTS, _Position(120, 6, 0), _layers())


def test_all_keys_are_there_and_all_are_text() -> None:
    metadata = _metadata()
    assert metadata.keys() >= EXPECTED
    assert all(isinstance(value, str) for value in metadata.values())


def test_what_the_keys_say() -> None:
    metadata = _metadata(
        learning_rate=1e-4, lr_warmup_steps="10%", lr_scheduler="cosine", optimizer_type="AdamW8bit",
        optimizer_args=["weight_decay=0.1", "betas=(0.9,0.99)"], network_args=["loraplus_lr_ratio=4"],
        network_dropout=0.1, fp8_base=True, gradient_checkpointing_cpu_offload=True, output_name="mine",
        training_comment="a remark", metadata_title="My LoRA", metadata_author="Ada", metadata_license="CC0",
        metadata_tags="a,b", metadata_description="long", min_timestep=100.0, mixed_precision="bf16",
    )  # fmt: skip
    expected = {
        "ss_base_model_version": "kandinsky5",
        "ss_network_module": "networks.lora_kandinsky",
        "ss_network_dim": "4",
        "ss_network_alpha": "2.0",
        "ss_network_args": '{"loraplus_lr_ratio": 4}',
        "ss_network_dropout": "0.1",
        "ss_learning_rate": "0.0001",
        "ss_lr_warmup_steps": "20",
        "ss_lr_scheduler": "cosine",
        "ss_optimizer": "AdamW8bit(weight_decay=0.1,betas=(0.9,0.99))",
        "ss_gradient_checkpointing": "True",
        "ss_gradient_checkpointing_cpu_offload": "True",
        "ss_fp8_base": "True",
        "ss_mixed_precision": "bf16",
        "ss_num_train_items": "12",
        "ss_num_batches_per_epoch": "20",
        "ss_num_epochs": "10",
        "ss_max_train_steps": "200",
        "ss_steps": "120",
        "ss_epoch": "6",
        "ss_seed": "42",
        "ss_session_id": "4711",
        "ss_training_started_at": "1795000000.5",
        "ss_training_finished_at": "1795003600.0",
        "ss_training_comment": "a remark",
        "ss_sd_model_name": "pro.safetensors",
        "ss_vae_name": "vae",
        "modelspec.architecture": "Kandinsky-5/lora",
        "modelspec.title": "My LoRA",
        "modelspec.author": "Ada",
        "modelspec.license": "CC0",
        "modelspec.tags": "a,b",
        "modelspec.description": "long",
        "modelspec.resolution": "768x512",
        "modelspec.date": "2026-11-18T12:06:40",
        "modelspec.timestep_range": "100,1000",
        "k5_task": "k5-pro-i2v-5s-sd",
        "k5_i2v_mode": "first",
        "k5_frames": "[1, 121]",
        "k5_scheduler_scale": "10.0",
        "k5_dataset_fingerprint": "def456",
        "k5_base_fingerprint": "abc123",
        "k5_nabla": "null",
    }
    assert {name: metadata[name] for name in expected} == expected
    assert json.loads(metadata["ss_datasets"]) == FACTS["dataset"]["datasets"]


def test_an_epoch_at_hand_counts() -> None:
    """As in the names of files: within epoch 7 the epoch is 7, at its beginning still 6."""
    assert lora_metadata(_options(), FACTS, _Position(121, 6, 1), _layers())["ss_epoch"] == "7"


def test_sparse_attention_and_task() -> None:
    assert json.loads(_metadata(task="k5-pro-t2v-10s-sd", nabla_wT=7)["k5_nabla"]) == {
        "P": 0.9, "wT": 7, "wH": 3, "wW": 3, "method": "topcdf", "add_sta": True,
    }  # fmt: skip
    forced = _metadata(task="k5-pro-t2v-5s-sd", force_nabla_attention=True, nabla_P=0.6, nabla_method="topk")
    assert json.loads(forced["k5_nabla"])["P"] == 0.6
    assert forced["k5_i2v_mode"] == "None"
    assert _metadata(scheduler_scale=3.0)["k5_scheduler_scale"] == "3.0"


def test_no_path_of_the_machine_is_stored() -> None:
    paths = {
        name: f"{SECRET}/{name}.safetensors"
        for name, field in TrainOptions.model_fields.items()
        if (field.json_schema_extra or {}).get("path") and name != "base_weights"  # type: ignore[union-attr]
    }
    assert len(paths) > 8, "the options have other marks for paths"
    metadata = _metadata(**paths, base_weights=[f"{SECRET}/style.safetensors"], base_weights_multiplier=[0.5])
    assert not [name for name, value in metadata.items() if "somebody" in value or "private" in value]
    assert metadata["k5_network_weights"] == "network_weights.safetensors"
    assert json.loads(metadata["k5_base_weights"]) == [["style.safetensors", 0.5]]
    windows = lora_metadata(_options(), {**FACTS, "dit": r"C:\Users\somebody\pro.safetensors"}, _Position(1, 0, 1),
                            _layers())  # fmt: skip
    assert windows["ss_sd_model_name"] == "pro.safetensors"


def test_no_metadata_keeps_what_loading_needs_and_what_was_written_for_the_file() -> None:
    assert set(_metadata(no_metadata=True)) == MINIMUM
    metadata = _metadata(no_metadata=True, metadata_author="Ada", training_comment="mine")
    assert set(metadata) == MINIMUM | {"modelspec.author", "ss_training_comment"}


def test_missing_facts_are_no_error() -> None:
    metadata = lora_metadata(_options(), {}, _Position(0, 0, 0), _layers())
    assert metadata.keys() >= EXPECTED - {"modelspec.resolution"}
    assert metadata["ss_num_train_items"] == "None"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hash_is_that_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    """sshs_model_hash is SHA-256 of all bytes behind the header, in whatever order the library puts them."""
    layers = _layers(dtype)
    metadata = lora_metadata(_options(), FACTS, _Position(120, 6, 0), layers)
    path = tmp_path / "a.safetensors"
    write_lora(path, layers, metadata=metadata)
    content = path.read_bytes()
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(tensors).hexdigest()
    with safe_open(path, "pt") as handle:
        assert handle.metadata() == metadata
    assert read_lora(path).metadata == metadata


def test_the_legacy_hash_is_that_of_a_file_with_ss_keys_only(tmp_path: Path) -> None:
    """8 digits of SHA-256 of the 64 KiB from 1 MiB on; only keys that begin with ss_ are in that file."""
    tensors = {"a": torch.arange(400_000, dtype=torch.float32)}
    metadata = {"ss_steps": "5", "modelspec.title": "not in it", "format": "pt"}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"ss_steps": "5"})
    content = (tmp_path / "a.safetensors").read_bytes()
    expected = hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    assert file_hashes(tensors, metadata)["sshs_legacy_hash"] == expected
    assert file_hashes(lora_tensors(_layers()), metadata)["sshs_legacy_hash"] == hashlib.sha256(b"").hexdigest()[:8]
