"""Four-bit weights (nf4) for the Linears of a text encoder, by the bitsandbytes library."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from backend.errors import UserError

QUANT_TYPE = "nf4"


def make_four_bit(model: nn.Module, dtype: torch.dtype, label: str) -> int:
    """Replace every Linear of `model` (still without memory) by one with nf4 weights; returns how many.

    `dtype` is the format of inputs, arithmetic and results. Embeddings and norms stay as they are.

    Raises:
        UserError: bitsandbytes is missing or does not work here.
    """
    library = _library(label)
    count = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                with torch.device("meta"):
                    layer = library.nn.Linear4bit(
                        child.in_features,
                        child.out_features,
                        bias=child.bias is not None,
                        compute_dtype=dtype,
                        quant_type=QUANT_TYPE,
                    )
                setattr(module, name, layer)
                count += 1
    return count


def is_four_bit(layer: nn.Module) -> bool:
    """Whether `layer` is one that `make_four_bit` made; asked for every tensor, so it imports nothing."""
    return isinstance(layer, nn.Linear) and type(layer).__name__ == "Linear4bit"


def quantise_weight(weight: torch.Tensor, device: torch.device) -> Any:
    """The nf4 parameter of one Linear: `weight` [out, in] of any float format, quantised on `device` and left there."""
    library = _library("the encoder")
    # Blocks of 64 weights share a scale, which is taken from float32 values whatever format the file has.
    parameter = library.nn.Params4bit(weight.float(), requires_grad=False, quant_type=QUANT_TYPE)
    return parameter.to(device)


def _library(label: str) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"{label} in 4 bits needs the library bitsandbytes, which is not installed. Install it with: "
            "pip install bitsandbytes, or leave --quantized_qwen out.",
            "quantized_qwen",
        )
    try:
        import bitsandbytes.nn
    except Exception as error:  # a native library that does not fit the machine fails in many ways
        reason = next(iter(str(error).splitlines()), "")[:200] or type(error).__name__
        raise UserError(
            f"The library bitsandbytes does not work here ({reason}). Install a build for this machine, or leave "
            "--quantized_qwen out.",
            "quantized_qwen",
        ) from error
    return bitsandbytes
