"""What the demo's transformer learns from: latents of drawn clips in shards, and the embeddings of every caption.

Both are kept as safetensors files, so encoding and training may run at the same time in two processes.
"""

import itertools
import json
import random
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from backend.demo.clips import (
    BACKGROUNDS,
    CAPTION_STYLES,
    COLORS,
    MOTIONS,
    SHAPES,
    SIZES,
    ClipSpec,
    caption,
    draw,
    random_spec,
)
from backend.demo.train_vae import VaeModel
from backend.files import atomic_path
from backend.text.embed import embed_prompts

Embedding = tuple[torch.Tensor, torch.Tensor]


def _chunks(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def every_caption() -> list[str]:
    """All captions of the grammar in all wordings."""
    specs = itertools.product(COLORS, SHAPES, MOTIONS, BACKGROUNDS, (None, *SIZES))
    return [caption(ClipSpec(*words), style) for words in specs for style in range(CAPTION_STYLES)]


class CaptionTable:
    """Embeddings of captions: (tokens [S, 128] after the template's crop, pooled [64]), float32."""

    def __init__(self, embeddings: dict[str, Embedding]) -> None:
        self.embeddings = embeddings

    @classmethod
    def embed(cls, texts: list[str], weights: Path) -> "CaptionTable":
        """Embed texts exactly as generation does, with the text encoders of a weights folder, in float32."""
        embeds = embed_prompts(
            texts,
            qwen=weights / "text_encoder",
            clip=weights / "text_encoder_2",
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        return cls({text: (one.text, one.pooled) for text, one in zip(texts, embeds, strict=True)})

    def __getitem__(self, text: str) -> Embedding:
        return self.embeddings[text]

    def save(self, path: Path) -> None:
        """Write atomically: one tensor of tokens and one of pooled vectors for each length."""
        tensors, names = {}, {}
        by_length: dict[int, list[str]] = {}
        for text, (tokens, _) in self.embeddings.items():
            by_length.setdefault(len(tokens), []).append(text)
        for length, texts in by_length.items():
            tensors[f"tokens_{length}"] = torch.stack([self.embeddings[text][0] for text in texts])
            tensors[f"pooled_{length}"] = torch.stack([self.embeddings[text][1] for text in texts])
            names[str(length)] = json.dumps(texts)
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, names)

    @classmethod
    def load(cls, path: Path) -> "CaptionTable":
        """Read a file written by `save`."""
        embeddings = {}
        with safe_open(path, "pt") as handle:
            for length, texts in handle.metadata().items():
                tokens, pooled = handle.get_tensor(f"tokens_{length}"), handle.get_tensor(f"pooled_{length}")
                embeddings.update({text: (tokens[i], pooled[i]) for i, text in enumerate(json.loads(texts))})
        return cls(embeddings)


@torch.no_grad()
def encode_shard(vae: VaeModel, path: Path, count: int, frames: int, seed: int) -> None:
    """Draw and encode `count` random clips into a shard: latents [N, F', 8, 8, 16] and first [N, 1, 8, 8, 16].

    Both are scaled; `first` is the first frame encoded alone, as image-to-video gives it.
    """
    rng = random.Random(seed)
    specs = [random_spec(rng) for _ in range(count)]
    latents, first = [], []
    for chunk in _chunks(specs, 4):
        clips = torch.stack([draw(spec, rng, frames) for spec in chunk])
        latents.append(vae.encode(clips).latent_dist.mean)
        first.append(vae.encode(clips[:, :, :1]).latent_dist.mean)
    scale = vae.config.scaling_factor
    tensors = {
        name: (torch.cat(parts) * scale).permute(0, 2, 3, 4, 1).contiguous()
        for name, parts in (("latents", latents), ("first", first))
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"specs": json.dumps([asdict(spec) for spec in specs])})


def read_shard(path: Path) -> tuple[torch.Tensor, torch.Tensor, list[ClipSpec]]:
    """Latents, first-frame latents and specs of a shard."""
    with safe_open(path, "pt") as handle:
        specs = [ClipSpec(**fields) for fields in json.loads(handle.metadata()["specs"])]
        return handle.get_tensor("latents"), handle.get_tensor("first"), specs
