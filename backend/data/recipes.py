"""How caches are made: what their content depends on besides the source, as metadata to write and to compare."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from backend.data.buckets import Nabla
from backend.data.cache_facts import (
    ARCHITECTURE,
    FINGERPRINT_VERSION,
    FORMAT_VERSION,
    OURS,
    ExpectedLatent,
    ExpectedText,
)
from backend.data.frames import TARGET_FPS
from backend.data.stamps import Stamp, text_hash
from backend.text.templates import TEMPLATES
from backend.vae.tiling import Tiling, choose_tiling

if TYPE_CHECKING:
    from backend.config.dataset import DatasetEntry
    from backend.data.items import Item


@dataclass(frozen=True)
class LatentRecipe:
    """How latents are made. None means unknown: such a field is not compared.

    Attributes:
        vae: fingerprint of the VAE's weights and configuration.
        vae_dtype: number format of its arithmetic, "float32", "bfloat16" or "float16".
        posterior: "mode" (the mean) or "sample" (seeded per item).
        seed: base of the seeds; it has a meaning with "sample" only.
        tiling: fixed windows and tiles; None: the rule of `backend.vae.tiling.choose_tiling` for each clip's size.
        nabla: how the sizes of NABLA are reached, see `backend.data.buckets.choose_bucket`.
    """

    vae: str | None = None
    vae_dtype: str | None = None
    posterior: Literal["mode", "sample"] | None = None
    seed: int = 0
    tiling: Tiling | None = None
    nabla: Nabla = False

    def shared(self, entry: DatasetEntry, item: Item) -> dict[str, str]:
        """The metadata that is compared; equal for items of equal clip, bucket and crop."""
        width, height = item.bucket.width, item.bucket.height
        tiling = self.tiling or choose_tiling(width, height, item.frames)
        posterior = f"sample, seed {self.seed}" if self.posterior == "sample" else self.posterior
        facts = {
            "bucket": f"{width}x{height}",
            "resize": _resize_text(item),
            "vae_fingerprint": self.vae,
            "vae_dtype": self.vae_dtype,
            # Without a VAE nobody knows what tiling it was asked for.
            "vae_tiling": None if self.vae is None else _tiling_text(tiling),
            "posterior": posterior,
        }
        if item.clip is not None:
            facts |= {
                "frame_count": str(item.clip.frames),
                "clip_start": str(item.clip.start),
                "frame_rate": frame_rate_text(entry.source_fps),
            }
        return {key: value for key, value in facts.items() if value is not None}

    def expected(self, entry: DatasetEntry, item: Item, stamp: Stamp) -> ExpectedLatent:
        """What the item's latent cache must be."""
        width, height = item.bucket.width, item.bucket.height
        return ExpectedLatent(self.shared(entry, item), item.frames, width, height, item.source.location, stamp)

    def metadata(self, entry: DatasetEntry, item: Item, stamp: Stamp, source_hash: str) -> dict[str, str]:
        """All metadata of the item's latent cache: what other tools write, what is compared, and a record for people.

        `stamp` must be taken before the source is decoded, so that a change meanwhile is noticed later.
        """
        width, height = item.named_size
        record = {
            "architecture": ARCHITECTURE,
            "format_version": FORMAT_VERSION,
            "width": str(width),
            "height": str(height),
            OURS: FINGERPRINT_VERSION,
            **self.shared(entry, item),
            "source_name": _plain(item.source.identity),
            "source_size": str(stamp.size),
            "source_mtime_ns": str(stamp.mtime_ns),
            "source_hash": source_hash,
            "source_width": str(item.media.width),
            "source_height": str(item.media.height),
            "resolution": "x".join(str(side) for side in entry.resolution),
            "latents_image": "first and last frame, each encoded as a single image",
            "seed": str(self.seed),
        }
        tiling = self.tiling or choose_tiling(item.bucket.width, item.bucket.height, item.frames)
        record |= tiling.to_metadata()
        if item.clip is not None:
            record |= {
                "frame_extraction": str(entry.frame_extraction),
                "source_frames": str(item.media.frames),
                "source_fps": f"{item.media.fps:g}",
            }
        return record

    def item_seed(self, item: Item) -> int:
        """The seed of one item's posterior sample, 0 to 2**63 - 1: independent of order, batch and process."""
        text = f"{self.seed}:{item.latent_name}"
        return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class TextRecipe:
    """How captions are encoded. None means unknown: such a field is not compared.

    Attributes:
        qwen, clip: fingerprints of the encoders.
        text_dtype: number format of Qwen's arithmetic; "nf4" when it was quantised.
        max_length: token limit; None: the template's own (256 for videos, 512 for images).
        clip_max_length: token limit of CLIP.
    """

    qwen: str | None = None
    clip: str | None = None
    text_dtype: str | None = None
    max_length: int | None = None
    clip_max_length: int = 77

    def shared(self, kind: str) -> dict[str, str]:
        """The metadata that is compared, for the sources of an "image" or a "video" dataset."""
        template = TEMPLATES[kind]
        facts = {
            "template": template.name,
            "template_hash": text_hash(template.text),
            "max_length": str(self.max_length or template.max_length),
            "clip_max_length": str(self.clip_max_length),
            "qwen_fingerprint": self.qwen,
            "clip_fingerprint": self.clip,
            "text_dtype": self.text_dtype,
        }
        return {key: value for key, value in facts.items() if value is not None}

    def expected(self, kind: str, caption: str) -> ExpectedText:
        """What the text cache of a source with this caption must be."""
        return ExpectedText(self.shared(kind), text_hash(caption), kind)

    def metadata(self, kind: str, caption: str) -> dict[str, str]:
        """All metadata of a text cache: what other tools write, and what is compared."""
        return {
            "architecture": ARCHITECTURE,
            "format_version": FORMAT_VERSION,
            "caption1": caption,
            OURS: FINGERPRINT_VERSION,
            **self.shared(kind),
            "template_crop": str(TEMPLATES[kind].crop),
            "caption_hash": text_hash(caption),
        }


def frame_rate_text(source_fps: float | str | None) -> str:
    """How frames are taken: "as stored", or resampled from a given rate or the file's own one."""
    if source_fps is None:
        return "as stored"
    return f"{source_fps if isinstance(source_fps, str) else format(float(source_fps), 'g')} to {TARGET_FPS}"


def _resize_text(item: Item) -> str:
    """With the size before a stretch: another resolution may end in the same bucket."""
    return "crop" if item.cropped is None else f"crop to {item.cropped.width}x{item.cropped.height}, stretch"


def _tiling_text(tiling: Tiling) -> str:
    """Only what is in use: an unused window does not change the result."""
    parts = []
    if tiling.temporal_enabled:
        parts.append(f"time {tiling.temporal_window}/{tiling.temporal_stride}")
    if tiling.spatial_enabled:
        parts.append(f"space {tiling.spatial_tile}/{tiling.spatial_stride}")
    return ", ".join(parts) or "none"


def _plain(text: str) -> str:
    # Names that are not UTF-8 hold surrogates, which no JSON reader outside Python accepts.
    return text.encode("utf-8", "replace").decode("utf-8")
