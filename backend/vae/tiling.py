"""How long and large clips are cut for the VAE: explicit numbers, chosen by a fixed rule, stored with the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from backend.errors import UserError

TEMPORAL_FACTOR = 4
SPATIAL_FACTOR = 8

# Up to this many pixels a frame is coded in one piece.
_WHOLE_FRAME = 512 * 768
_METADATA_PREFIX = "vae_tiling_"


def latent_frames(frames: int) -> int:
    """Latent frames of a clip of `frames` pixel frames: (n - 1) / 4 + 1.

    Raises:
        ValueError: `frames` is not 4n + 1.
    """
    if frames < 1 or (frames - 1) % TEMPORAL_FACTOR:
        raise ValueError(f"A clip has 4n + 1 frames (1, 5, 9, ...), not {frames}.")
    return (frames - 1) // TEMPORAL_FACTOR + 1


def pixel_frames(latents: int) -> int:
    """Pixel frames of `latents` latent frames: 4 (n - 1) + 1.

    Raises:
        ValueError: there is no latent frame.
    """
    if latents < 1:
        raise ValueError(f"A clip has at least one latent frame, not {latents}.")
    return (latents - 1) * TEMPORAL_FACTOR + 1


@dataclass(frozen=True)
class Tiling:
    """Windows in time and tiles in space, in pixels and pixel frames; coding in pieces changes the numbers.

    A clip of more than `temporal_window` + 1 frames is coded in windows of that many frames, `temporal_stride` apart,
    blended linearly where they overlap; shorter clips are coded whole. Frames larger than `spatial_tile` in either
    direction are coded in square tiles, `spatial_stride` apart, when `spatial_enabled` is set.
    """

    temporal_enabled: bool = True
    temporal_window: int = 16
    temporal_stride: int = 12
    spatial_enabled: bool = False
    spatial_tile: int = 512
    spatial_stride: int = 384

    def __post_init__(self) -> None:
        for size, stride, factor, what in (
            (self.temporal_window, self.temporal_stride, TEMPORAL_FACTOR, "temporal window"),
            (self.spatial_tile, self.spatial_stride, SPATIAL_FACTOR, "spatial tile"),
        ):
            # Sizes that are no multiples would give wrong numbers of frames or pixels.
            if size % factor or stride % factor or not 0 < stride <= size:
                raise ValueError(
                    f"A {what} of {size}, {stride} apart: both must be multiples of {factor}, stride <= size."
                )

    def splits_time(self, frames: int) -> bool:
        """Whether a clip of `frames` pixel frames is coded in several windows."""
        return self.temporal_enabled and frames > self.temporal_window + 1

    def to_metadata(self) -> dict[str, str]:
        """Strings for a file's metadata; `from_metadata` reads them back."""
        return {_METADATA_PREFIX + name: str(int(value)) for name, value in asdict(self).items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Tiling:
        """Read what `to_metadata` wrote; other keys are left alone.

        Raises:
            UserError: a key is missing or its value is out of range.
        """
        try:
            values: dict[str, Any] = {field.name: int(metadata[_METADATA_PREFIX + field.name]) for field in fields(cls)}
            values |= {name: bool(value) for name, value in values.items() if name.endswith("_enabled")}
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"The file does not say how the VAE was tiled ({error}). Cache it again.") from error


def choose_tiling(width: int, height: int, frames: int) -> Tiling:
    """The tiling for clips of this size in pixels and pixel frames; the same on every machine.

    Rule: more than 17 frames are coded in windows of 16 + 1 frames, 12 apart; frames of up to 512 x 768 pixels are
    coded in one piece, larger ones in tiles of 512 pixels, 384 apart (no tile is larger than the largest whole frame).
    Free memory plays no part, so that a cache made on one machine is the cache that another one would make.
    """
    return Tiling(temporal_enabled=frames > 17, spatial_enabled=width * height > _WHOLE_FRAME)
