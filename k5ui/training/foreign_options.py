"""Where a command for musubi-tuner means something else here: rules that change its flags, each with a note.

A rule gets the flags as they were written (lists of words, True for switches) and whether the command is for another
trainer, changes the flags, and yields what a person should know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

#: Flags that have no counterpart -> the ending of the key of the sentence that says why.
LEFT_OUT: dict[str, str] = (
    dict.fromkeys(
        ("split_attn", "guidance_scale", "img_in_txt_in_offloading", "vae_dtype", "no_vae_load", "metadata_reso",
         "metadata_arch", "config_file", "run_dir", "override_dit", "fp8_fast", "fp8_vl", "fp8_t5", "fp8_llm",
         "text_encoder", "text_encoder1", "text_encoder2", "clip", "t5", "lowvram"),
        "no_effect",
    )
    | dict.fromkeys(
        ("compile", "compile_backend", "compile_mode", "compile_dynamic", "compile_fullgraph",
         "compile_cache_size_limit", "dynamo_backend", "dynamo_mode", "dynamo_fullgraph", "dynamo_dynamic"),
        "compile",
    )
    | dict.fromkeys(
        ("use_pinned_memory_for_block_swap", "block_swap_h2d_only", "block_swap_ring_size", "disable_numpy_memmap",
         "cuda_allow_tf32", "cuda_cudnn_benchmark", "full_bf16", "full_fp16"),
        "memory",
    )
    | dict.fromkeys(
        ("huggingface_repo_id", "huggingface_repo_type", "huggingface_path_in_repo", "huggingface_token",
         "huggingface_repo_visibility", "save_state_to_huggingface", "resume_from_huggingface", "async_upload"),
        "hub",
    )
    | dict.fromkeys(("ddp_gradient_as_bucket_view", "ddp_static_graph"), "ddp")
    | {"wandb_api_key": "key"}
)  # fmt: skip
#: What musubi-tuner does where a command says nothing, and we do something else.
_DEFAULTS = {"learning_rate": ["2e-6"], "network_dim": ["4"], "network_alpha": ["1"]}
_OF_OTHER_MODELS = (
    "flux_shift", "flux2_shift", "qwen_shift", "krea2_shift", "ideogram4_shift", "qinglong_flux", "qinglong_qwen",
)  # fmt: skip
_SAMPLERS = ("logit_normal", "mode")


@dataclass(frozen=True)
class Remark:
    """A note to be: the flag, how it was taken, the ending of the sentence's key and what is filled in."""

    name: str
    kind: str
    text: str
    values: dict[str, object] = field(default_factory=dict)


def _last(given: dict[str, Any], name: str) -> str | None:
    value = given.get(name)
    if isinstance(value, list):
        return str(value[-1]) if value else None
    return value if isinstance(value, str) else None


def _defaults(given: dict[str, Any], foreign: bool) -> Iterator[Remark]:
    if not foreign:
        return
    for name, value in _DEFAULTS.items():
        if name not in given and not (name == "network_alpha" and "dim_from_weights" in given):
            given[name] = value
            yield Remark(name, "changed", "default", {"value": value[0]})


def _timesteps(given: dict[str, Any], foreign: bool) -> Iterator[Remark]:
    """`sigma` draws uniformly and ignores the shift; two weighting schemes change only how it draws; its limits count
    from the noisy end."""
    name = "timestep_sampling"
    sampling = _last(given, name)
    if sampling == "sigma" or (sampling is None and foreign):
        scheme = _last(given, "weighting_scheme")
        chosen = scheme if scheme in _SAMPLERS else "uniform"
        given[name] = [chosen]
        yield Remark(name, "changed", "sigma" if chosen == "uniform" else "sigma_scheme", {"value": chosen})
        yield from _turned_limits(given)
        if given.pop("discrete_flow_shift", None) is not None:
            yield Remark("discrete_flow_shift", "left_out", "sigma_shift")
    elif sampling in _OF_OTHER_MODELS:
        given[name] = ["shift"]
        yield Remark(name, "changed", "other_sampling", {"value": sampling})
    elif sampling == "shift" and foreign and "discrete_flow_shift" not in given:
        given["discrete_flow_shift"] = ["1.0"]
        yield Remark("discrete_flow_shift", "changed", "default", {"value": "1.0"})


def _turned_limits(given: dict[str, Any]) -> Iterator[Remark]:
    low, high = _last(given, "min_timestep"), _last(given, "max_timestep")
    try:
        turned = {
            "min_timestep": None if high is None else 1000.0 - float(high),
            "max_timestep": None if low is None else 1000.0 - float(low),
        }
    except ValueError:
        return
    if low is None and high is None:
        return
    for name, value in turned.items():
        given.pop(name, None)
        if value is not None:
            given[name] = [f"{value:g}"]
    yield Remark("min_timestep", "changed", "limits")


def _weighting(given: dict[str, Any], foreign: bool) -> Iterator[Remark]:
    """What is left of the schemes that choose timesteps: with other samplings they have no effect there."""
    if _last(given, "weighting_scheme") in _SAMPLERS:
        scheme = _last(given, "weighting_scheme")
        del given["weighting_scheme"]
        if _last(given, "timestep_sampling") == scheme:
            yield Remark("weighting_scheme", "changed", "scheme", {"value": scheme})
        else:
            yield Remark("weighting_scheme", "left_out", "no_effect")


def _attention(given: dict[str, Any], foreign: bool) -> Iterator[Remark]:
    if given.get("sage_attn") is True or _last(given, "attention") == "sage_attn":
        given.pop("sage_attn", None)
        given.pop("attention", None)
        yield Remark("sage_attn", "left_out", "sage")
    switches = [name for name in ("flash_attn", "flash3", "xformers", "sdpa") if given.get(name) is True]
    for name in switches[1:]:
        del given[name]
        yield Remark(name, "left_out", "one_attention", {"value": switches[0]})


def _network(given: dict[str, Any], foreign: bool) -> Iterator[Remark]:
    words = given.get("network_args")
    texts = [str(word) for word in words] if isinstance(words, list) else []
    dropped = [word for word in texts if word.partition("=")[0].strip() in ("conv_dim", "conv_alpha")]
    if dropped:
        given["network_args"] = [word for word in texts if word not in dropped]
        yield Remark("network_args", "left_out", "conv", {"value": ", ".join(dropped)[:80]})
    if foreign and any(word.startswith("exclude_patterns") for word in texts):
        yield Remark("network_args", "changed", "exclude")
    if foreign and given.get("gradient_checkpointing_cpu_offload") is True:
        yield Remark("gradient_checkpointing_cpu_offload", "changed", "works_here")
    value = _last(given, "dim_from_weights")
    if value is not None and value.lower() not in ("true", "false"):
        given["dim_from_weights"] = True
        given.setdefault("network_weights", [value])
        yield Remark("dim_from_weights", "changed", "dim_path")


def _length_of_samples(given: dict[str, Any], foreign: bool) -> Iterator[Remark]:
    if foreign and "sample_prompts" in given:
        yield Remark("sample_prompts", "changed", "latent_frames")


RULES: tuple[Callable[[dict[str, Any], bool], Iterator[Remark]], ...] = (
    _defaults,
    _timesteps,
    _weighting,
    _attention,
    _network,
    _length_of_samples,
)
