"""Dense attention through one call signature: torch's SDPA always, faster libraries where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from backend.errors import UserError
from backend.model.device import compute_capability

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AttentionBackend:
    """A way to compute softmax(q k^T / sqrt(D)) v.

    Calls that carry a mask always go to SDPA: the other libraries take none, and the result is the same function.
    """

    name: str
    kernel: Kernel | None = None
    trains: bool = True

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, key_mask: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Shapes: query [B, S, H, D]; key, value [B, K, H, D]; key_mask bool [B, K], True = a key that counts; mask
        bool, broadcastable to [B, H, S, K], True = attend. Returns [B, S, H, D] in the query's dtype.

        Raises:
            UserError: gradients are asked of a backend that has none.
        """
        if key_mask is not None:
            keys = key_mask[:, None, None, :]
            mask = keys if mask is None else mask & keys
        if self.kernel is None or mask is not None:
            return sdpa(query, key, value, mask)
        if not self.trains and torch.is_grad_enabled() and query.requires_grad:
            raise UserError(f"The attention backend {self.name} cannot train; choose sdpa for training.", "attention")
        return self.kernel(query, key, value)


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """torch's scaled_dot_product_attention in the [B, S, H, D] layout; mask bool, broadcastable to [B, H, S, K]."""
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)


@dataclass(frozen=True)
class _Library:
    """An optional attention library: its module, how to get it, which devices and formats it serves."""

    module: str
    how_to_get: str
    build: Callable[[ModuleType], Kernel]
    dtypes: tuple[torch.dtype, ...] = _HALF
    capability: tuple[int, int] = (8, 0)
    exact_capability: bool = False
    trains: bool = True

    def refusal(self, name: str, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this library cannot serve `device` and `dtype`, None when it can."""
        found = compute_capability(device)
        if found is None:
            return f"{name} needs an NVIDIA GPU, but the device is {device.type}"
        fits = found[0] == self.capability[0] if self.exact_capability else found >= self.capability
        if not fits:
            need = f"{self.capability[0]}.{self.capability[1]}"
            exactly = "" if self.exact_capability else " or newer"
            return f"{name} needs a GPU of compute capability {need}{exactly}, and this one has {found[0]}.{found[1]}"
        if dtype not in self.dtypes:
            return f"{name} computes in bfloat16 and float16 only, but the model is in {str(dtype).split('.')[-1]}"
        return None


def _flash_kernel(module: ModuleType) -> Kernel:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Some versions return (output, log-sum-exp).
        result = module.flash_attn_func(query, key, value, softmax_scale=1 / math.sqrt(query.shape[-1]), causal=False)
        return result[0] if isinstance(result, tuple) else result

    return attend


def _sage_kernel(module: ModuleType) -> Kernel:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return module.sageattn(query, key, value, tensor_layout="NHD", is_causal=False)

    return attend


def _xformers_kernel(module: ModuleType) -> Kernel:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return module.memory_efficient_attention(query, key, value)

    return attend


_LIBRARIES: dict[str, _Library] = {
    "flash3": _Library(
        "flash_attn_interface",
        "build FlashAttention 3 from the hopper folder of the flash-attention repository",
        _flash_kernel,
        capability=(9, 0),
        exact_capability=True,
    ),
    "flash_attn": _Library("flash_attn", "pip install flash-attn --no-build-isolation", _flash_kernel),
    "sage_attn": _Library("sageattention", "pip install sageattention", _sage_kernel, trains=False),
    "xformers": _Library(
        "xformers.ops", "pip install xformers", _xformers_kernel, dtypes=(*_HALF, torch.float32), capability=(7, 0)
    ),
}
# SageAttention computes in int8, so it is taken only when it is asked for; xformers has no kernel that SDPA lacks.
_AUTOMATIC = ("flash3", "flash_attn")


def available_backends() -> list[str]:
    """Names of the installed backends, sdpa first; nothing is imported to find out."""
    return ["sdpa", *(name for name, library in _LIBRARIES.items() if _installed(library))]


def _installed(library: _Library) -> bool:
    return importlib.util.find_spec(library.module.partition(".")[0]) is not None


def resolve_attention(
    name: str | None = None, *, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> AttentionBackend:
    """The backend called `name`; None or "auto" takes the best installed one that serves `device` and `dtype`.

    Without a device it is the CPU, without a dtype float32.

    Raises:
        UserError: unknown name, library missing or broken, or it cannot serve this device or number format.
    """
    device, dtype = device or torch.device("cpu"), dtype or torch.float32
    if name is None or name == "auto":
        return _automatic(device, dtype)
    if name == "sdpa":
        return AttentionBackend("sdpa")
    if name not in _LIBRARIES:
        known = ", ".join(["sdpa", *_LIBRARIES])
        raise UserError(f"{name!r} is not an attention backend. Use one of: {known}.", "attention")
    library = _LIBRARIES[name]
    if not _installed(library):
        raise UserError(f"{name} is not installed ({library.how_to_get}). Or use sdpa.", "attention")
    refusal = library.refusal(name, device, dtype)
    if refusal:
        raise UserError(f"{refusal}. Use sdpa, which serves every device and format.", "attention")
    return _load(name, library)


def _automatic(device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    for name in _AUTOMATIC:
        library = _LIBRARIES[name]
        if library.refusal(name, device, dtype) is None and _installed(library):
            # Nobody asked for this library by name, so a broken installation of it is no reason to fail.
            with suppress(UserError):
                return _load(name, library)
    return AttentionBackend("sdpa")


def _load(name: str, library: _Library) -> AttentionBackend:
    try:
        kernel = library.build(importlib.import_module(library.module))
    except (ImportError, OSError) as error:
        raise UserError(
            f"{name} is installed but does not import ({error}); it was probably built for another torch. "
            f"Install it again ({library.how_to_get}), or use sdpa.",
            "attention",
        ) from error
    return AttentionBackend(name, kernel, library.trains)
