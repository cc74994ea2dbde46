"""What the demo's transformer learns from: latents of drawn clips in shards, and the embeddings of every caption.

Both are kept as safetensors files, so encoding and training may run at the same time in two processes.
"""

import itertools
import json
import random
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer, Qwen2_5_VLForConditionalGeneration

from backend.demo.clips import BACKGROUNDS, CAPTION_STYLES, COLORS, MOTIONS, SHAPES, SIZES, ClipSpec, caption, draw, random_spec
from backend.files import atomic_path

Embedding = tuple[torch.Tensor, torch.Tensor]


class CaptionEncoder:
    """The demo's two text encoders: captions -> (tokens [S, 128] after the template's crop, pooled [64]), float32."""

    def __init__(self, weights: Path, template: str, crop: int) -> None:
        self.template, self.crop = template, crop
        self.tokenizer = AutoTokenizer.from_pretrained(weights / "tokenizer")
        self.clip_tokenizer = CLIPTokenizer.from_pretrained(weights / "tokenizer_2")
        qwen = Qwen2_5_VLForConditionalGeneration.from_pretrained(weights / "text_encoder", dtype=torch.float32)
        self.qwen = qwen.eval().requires_grad_(False)
        clip = CLIPTextModel.from_pretrained(weights / "text_encoder_2", dtype=torch.float32)
        self.clip = clip.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> list[Embedding]:
        """Embed captions; equal lengths share a batch, so nothing is ever padded."""
        ids = [self.tokenizer(self.template.format(text))["input_ids"] for text in captions]
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        tokens: dict[int, torch.Tensor] = {}
        for _, same in itertools.groupby(order, key=lambda index: len(ids[index])):
            for chunk in _chunks(list(same), 64):
                batch = torch.tensor([ids[index] for index in chunk])
                hidden = self.qwen(input_ids=batch, output_hidden_states=True)["hidden_states"][-1]
                tokens.update(zip(chunk, hidden[:, self.crop :].clone(), strict=True))
        pooled = []
        for chunk in _chunks(captions, 256):
            inputs = self.clip_tokenizer(chunk, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
            pooled.append(self.clip(**inputs)["pooler_output"])
        return [(tokens[index], vector) for index, vector in enumerate(torch.cat(pooled))]


def _chunks(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def every_caption() -> list[str]:
    """All captions of the grammar in all wordings."""
    specs = itertools.product(COLORS, SHAPES, MOTIONS, BACKGROUNDS, (None, *SIZES))
    return [caption(ClipSpec(*words), style) for words in specs for style in range(CAPTION_STYLES)]


class CaptionTable:
    """Embeddings of captions, kept in one file per encoder and template."""

    def __init__(self, embeddings: dict[str, Embedding]) -> None:
        self.embeddings = embeddings

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
def encode_shard(vae: AutoencoderKLHunyuanVideo, path: Path, count: int, frames: int, seed: int) -> None:
    """Draw and encode `count` random clips -> a shard: latents [N, F', 8, 8, 16] and first [N, 1, 8, 8, 16], both scaled.

    `first` is the first frame encoded alone, as image-to-video gives it.
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
