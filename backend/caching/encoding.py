"""Frames to latents: every item on its own, so that its numbers do not depend on its neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy
import torch

from backend.data.items import Item
from backend.data.recipes import LatentRecipe
from backend.data.scaling import Pixels
from backend.errors import EngineError
from backend.vae.hunyuan import Vae, load_vae, to_unit_range
from backend.vae.tiling import Tiling, choose_tiling

VAE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_ADVICE = "Use --vae_tiling on, a smaller resolution or fewer frames, and close other programs that use the device."


class LatentEncoder:
    """A VAE and a recipe: what turns the frames of items into what their caches hold.

    A batch goes to the device in one piece; the VAE then takes its clips one by one. A batched computation would give
    other last bits, so that a cache would depend on which items were missing when it was made.
    """

    def __init__(self, vae: Vae, recipe: LatentRecipe) -> None:
        self._vae, self._recipe = vae, recipe

    @classmethod
    def load(cls, path: str | Path, recipe: LatentRecipe, device: torch.device) -> LatentEncoder:
        """Load the VAE in the recipe's number format.

        Raises:
            UserError: field "vae"; see `backend.vae.hunyuan.load_vae`.
        """
        assert recipe.vae_dtype is not None
        return cls(load_vae(path, device=device, dtype=VAE_DTYPES[recipe.vae_dtype], tiling=Tiling()), recipe)

    def encode(self, items: Sequence[Item], clips: Sequence[Pixels]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(latents [16, F', H/8, W/8], first and last frame [16, 2, H/8, W/8]) of each item, on the CPU.

        Both are in the VAE's number format. The first and the last frame are encoded as single images, as generation
        does with a given image; in a clip's own latents they are not the same numbers. With the posterior "sample" the
        noise of each of these encodes starts from the item's own seed.

        Args:
            items: of one bucket and length.
            clips: uint8 [F, H, W, 3] each.

        Raises:
            EngineError: phase "vae"; out of memory, or values that are not numbers.
        """
        first = items[0]
        tiling = self._recipe.tiling or choose_tiling(first.bucket.width, first.bucket.height, first.frames)
        self._vae.tiling = tiling
        with out_of_memory_told(f"{first.frames} frames of {first.bucket.width} x {first.bucket.height}"):
            pixels = torch.from_numpy(numpy.stack(clips)).to(self._vae.device)
            return [self._encode_one(item, pixels[index]) for index, item in enumerate(items)]

    def _encode_one(self, item: Item, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        clip = to_unit_range(frames.permute(3, 0, 1, 2)[None])
        latents = self._posterior(item, clip)
        if item.frames == 1:
            image = latents.repeat(1, 2, 1, 1)
        else:
            ends = [self._posterior(item, end) for end in (clip[:, :, :1], clip[:, :, -1:])]
            image = torch.cat(ends, dim=1)
        return latents, image

    def _posterior(self, item: Item, clip: torch.Tensor) -> torch.Tensor:
        generator = None
        if self._recipe.posterior == "sample":
            generator = torch.Generator().manual_seed(self._recipe.item_seed(item))
        latents = self._vae.encode(clip, generator=generator)[0].to(self._vae.dtype).cpu()
        if not bool(torch.isfinite(latents).all()):
            raise EngineError(
                f"The latents of {item.source.identity} are too large for {self._recipe.vae_dtype}. "
                "Use --vae_dtype bfloat16 or float32.",
                "vae",
            )
        return latents


@contextmanager
def out_of_memory_told(what: str) -> Iterator[None]:
    """Turn what torch raises when memory is exhausted into a sentence with advice.

    Raises:
        EngineError: phase "vae"; every other fault of torch too.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EngineError(f"The device ran out of memory while it encoded {what}. {_ADVICE}", "vae") from error
    except MemoryError as error:
        raise EngineError(f"Memory ran out while {what} were encoded. {_ADVICE}", "vae") from error
    except RuntimeError as error:
        if "allocate memory" in str(error):  # The CPU's allocator has no type of its own for it.
            raise EngineError(f"Memory ran out while {what} were encoded. {_ADVICE}", "vae") from error
        raise EngineError(f"Encoding {what} failed: {error}", "vae") from error


@contextmanager
def reproducible_kernels(*, cudnn: bool) -> Iterator[None]:
    """Only algorithms that give the same bits each time; `cudnn` off does without that library."""
    with torch.backends.cudnn.flags(enabled=cudnn, benchmark=False, deterministic=True):
        yield
