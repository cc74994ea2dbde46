"""The encoder's own duties: advice when memory runs out, numbers that fit their format, a device for each process."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch

from backend.caching.encoding import LatentEncoder, reproducible_kernels
from backend.data.buckets import Bucket
from backend.data.frames import ClipRange
from backend.data.items import Item, MediaFacts
from backend.data.recipes import LatentRecipe
from backend.data.scan import Source
from backend.data.stamps import Stamp
from backend.errors import EngineError, UserError
from backend.model.device import device_of_process

ITEM = Item(
    Source("/nowhere/a.mp4", "video", "a.mp4", "a"),
    MediaFacts(32, 32, 5, 24.0, 5 / 24, False),
    ClipRange(0, 5),
    Bucket(32, 32),
    "a_00000-005_0032x0032_k5.safetensors",
    "a_k5_te.safetensors",
    Stamp(1, 2, 3),
)
CLIP = numpy.zeros((5, 32, 32, 3), dtype=numpy.uint8)


class FakeVae:
    """Gives what it is told to, or raises it."""

    device = torch.device("cpu")
    tiling: Any = None

    def __init__(self, answer: Exception | float, dtype: torch.dtype = torch.float32) -> None:
        self.answer, self.dtype = answer, dtype

    def encode(self, pixels: torch.Tensor, *, generator: torch.Generator | None = None) -> torch.Tensor:
        if isinstance(self.answer, Exception):
            raise self.answer
        return torch.full((1, 16, (pixels.shape[2] - 1) // 4 + 1, 4, 4), self.answer)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90 GiB."),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_advice_when_memory_runs_out(error: Exception) -> None:
    encoder = LatentEncoder(FakeVae(error), LatentRecipe(posterior="mode"))  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"5 frames of 32 x 32.*--vae_tiling on, a smaller resolution") as caught:
        encoder.encode([ITEM], [CLIP])
    assert caught.value.phase == "vae"


def test_other_faults_name_the_phase() -> None:
    encoder = LatentEncoder(FakeVae(RuntimeError("a kernel failed")), LatentRecipe(posterior="mode"))  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="a kernel failed") as caught:
        encoder.encode([ITEM], [CLIP])
    assert caught.value.phase == "vae"


def test_numbers_that_do_not_fit_half_precision() -> None:
    recipe = LatentRecipe(posterior="mode", vae_dtype="float16")
    encoder = LatentEncoder(FakeVae(1e6, torch.float16), recipe)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"a\.mp4 are too large for float16.*--vae_dtype bfloat16 or float32"):
        encoder.encode([ITEM], [CLIP])
    latents, image = LatentEncoder(FakeVae(2.0, torch.float16), recipe).encode([ITEM], [CLIP])[0]  # type: ignore[arg-type]
    assert (latents.shape, image.shape, latents.dtype) == ((16, 2, 4, 4), (16, 2, 4, 4), torch.float16)


def test_cudnn_is_switched_off_and_on_again() -> None:
    before = torch.backends.cudnn.enabled
    with reproducible_kernels(cudnn=False):
        assert not torch.backends.cudnn.enabled
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.enabled is before


def test_each_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(device_of_process(None, rank)) for rank in (0, 1)] == ["cuda:0", "cuda:1"]
    assert str(device_of_process("cuda", 1)) == "cuda:1"
    assert str(device_of_process("cuda:0", 1)) == "cuda:0"
    assert str(device_of_process(None, 1, cpu_only=True)) == "cpu"
    assert str(device_of_process("cpu", 1)) == "cpu"
    with pytest.raises(UserError, match="cuda:2 does not exist"):
        device_of_process(None, 2)
