"""Sets of values to begin with, each for one situation; the sentences that explain them are in the texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from k5ui.text.loader import Texts


@dataclass(frozen=True)
class Preset:
    """Values by option name; options that any preset sets and this one does not go back to their defaults."""

    id: str
    values: Mapping[str, Any] = field(default_factory=dict)


_PRO_T2V = "k5-pro-t2v-5s-sd"
_COMMON = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": "5%", "save_state": True}
PRESETS: tuple[Preset, ...] = (
    Preset(
        "demo",
        {
            "task": "k5-demo-t2v", "network_dim": 16, "learning_rate": 2e-3, "lr_scheduler": "cosine",
            "lr_warmup_steps": "20", "discrete_flow_shift": 3.0, "max_train_steps": 300, "save_every_n_steps": 100,
            "save_state": True, "sample_every_n_steps": 50,
        },
    ),
    Preset(
        "quick",
        {"max_train_steps": 30, "save_every_n_steps": 30, "sample_every_n_steps": 15},
    ),
    Preset(
        "pro24",
        {
            "task": _PRO_T2V, "network_dim": 32, "learning_rate": 1e-4, "max_train_epochs": 50,
            "save_every_n_epochs": 5, "fp8_base": True, "gradient_checkpointing": True, "blocks_to_swap": 20,
            "optimizer_type": "AdamW8bit", "offload_dit_during_sampling": True, **_COMMON,
        },
    ),
    Preset(
        "pro80",
        {
            "task": _PRO_T2V, "network_dim": 64, "learning_rate": 1e-4, "max_train_epochs": 50,
            "save_every_n_epochs": 5, "gradient_checkpointing": True, **_COMMON,
        },
    ),
    Preset(
        "i2v",
        {
            "task": "k5-pro-i2v-5s-sd", "network_dim": 32, "learning_rate": 1e-4, "max_train_epochs": 50,
            "save_every_n_epochs": 5, "fp8_base": True, "gradient_checkpointing": True, "blocks_to_swap": 20,
            "i2v_cond_prob": 0.9, "offload_dit_during_sampling": True, **_COMMON,
        },
    ),
)  # fmt: skip
_BY_ID = {preset.id: preset for preset in PRESETS}
_NAMES = frozenset(name for preset in PRESETS for name in preset.values)


def apply(preset: str, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """`values` with a preset; None: there is none of this id. A preset without a task keeps the task."""
    chosen = _BY_ID.get(preset)
    if chosen is None:
        return None
    kept = {name: value for name, value in values.items() if name not in _NAMES}
    if "task" not in chosen.values and "task" in values:
        kept["task"] = values["task"]
    return kept | dict(chosen.values)


def matching(values: Mapping[str, Any]) -> str | None:
    """The preset that a form still is, None when something that presets set was changed."""
    for preset in PRESETS:
        names = _NAMES if "task" in preset.values else _NAMES - {"task"}
        if {name: value for name, value in values.items() if name in names} == dict(preset.values):
            return preset.id
    return None


def preset_table(texts: Texts) -> list[dict[str, str]]:
    """Presets for the page: id, title, a sentence."""
    return [
        {"id": preset.id, "title": texts(f"train.preset.{preset.id}"), "text": texts(f"train.preset_text.{preset.id}")}
        for preset in PRESETS
    ]
