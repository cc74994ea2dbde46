"""Train the demo's transformer by flow matching under exactly the contract that generation uses.

Model time is 1000 * sigma, the target is noise - clean; for image-to-video samples frame 0 is the clean latent of the
first frame encoded alone, its mask is 1 and it has no loss; the condition channels stay zero; the unconditional pass is
trained with the empty prompt and with the family's default negative prompt.
"""

import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import Kandinsky5Transformer3DModel
from torch import nn

from backend.demo.clips import CAPTION_STYLES, ClipSpec, caption
from backend.demo.dataset import CaptionTable, read_shard
from backend.demo.muon import Muon

_STYLE_WEIGHTS = (4, 2, 2, 2)


@dataclass(frozen=True)
class DitSettings:
    """Budget, rates and mixture of the training samples.

    time_mean, time_spread: sigma = sigmoid(normal(mean, spread)); layout and motion are decided in the noise, so
    the mean is above 0.
    wide_scale_share: share of steps with RoPE scale (1, 3.16, 3.16) instead of (1, 2, 2).
    """

    seconds: float
    batch: int = 64
    matrix_rate: float = 2.5e-3
    other_rate: float = 2e-3
    hold: float = 0.25
    time_mean: float = 0.6
    time_spread: float = 1.4
    unconditional_share: float = 0.12
    image_share: float = 0.35
    wide_scale_share: float = 0.25
    average: float = 0.998
    seed: int = 0


@dataclass
class Batch:
    """Latents [B, F, h, w, 16], first-frame latents [B, 1, h, w, 16] and the text of equally long captions."""

    latents: torch.Tensor
    first: torch.Tensor
    tokens: torch.Tensor
    pooled: torch.Tensor


def new_transformer() -> Kandinsky5Transformer3DModel:
    """A fresh transformer of the family: 3.98 M parameters, 3 heads of 64, 2 text and 5 visual blocks."""
    return Kandinsky5Transformer3DModel(
        in_visual_dim=16,
        out_visual_dim=16,
        in_text_dim=128,
        in_text_dim2=64,
        time_dim=64,
        model_dim=192,
        ff_dim=512,
        num_text_blocks=2,
        num_visual_blocks=5,
        patch_size=(1, 2, 2),
        axes_dims=(16, 24, 24),
        visual_cond=True,
        attention_type="regular",
    )


def velocity(
    transformer: nn.Module,
    latents: torch.Tensor,
    mask: torch.Tensor,
    tokens: torch.Tensor,
    pooled: torch.Tensor,
    sigma: torch.Tensor,
    scale_factor: tuple[float, float, float] = (1.0, 2.0, 2.0),
) -> torch.Tensor:
    """One call of the model: latents [B, F, h, w, 16], mask [B, F, h, w, 1], sigma [B] -> velocity like latents."""
    _, frames, height, width, _ = latents.shape
    return transformer(
        hidden_states=torch.cat([latents, torch.zeros_like(latents), mask], -1),
        encoder_hidden_states=tokens,
        timestep=sigma * 1000,
        pooled_projections=pooled,
        visual_rope_pos=[torch.arange(frames), torch.arange(height // 2), torch.arange(width // 2)],
        text_rope_pos=torch.arange(tokens.shape[1]),
        scale_factor=scale_factor,
        return_dict=False,
    )


class Samples:
    """The shards of one folder; new ones are picked up while training runs."""

    def __init__(self, folder: Path, captions: CaptionTable, rng: random.Random) -> None:
        self.folder, self.captions, self.rng = folder, captions, rng
        self.read: set[Path] = set()
        self.clips: list[tuple[torch.Tensor, torch.Tensor]] = []
        # frames of the latent -> length of the caption -> (clip, caption, weight)
        self.groups: dict[int, dict[int, list[tuple[int, str, int]]]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the shards that have appeared since the last time."""
        for path in sorted(set(self.folder.glob("*.safetensors")) - self.read):
            latents, first, specs = read_shard(path)
            self.read.add(path)
            for latent, image, spec in zip(latents, first, specs, strict=True):
                self.clips.append((latent, image))
                self._add(len(self.clips) - 1, spec, latent.shape[0])

    def _add(self, index: int, spec: ClipSpec, frames: int) -> None:
        for style in range(CAPTION_STYLES):
            text = caption(spec, style)
            length = len(self.captions[text][0])
            group = self.groups.setdefault(frames, {}).setdefault(length, [])
            group.append((index, text, _STYLE_WEIGHTS[style]))

    def batch(self, size: int, still_share: float = 0.08, short_share: float = 0.1) -> Batch:
        """A random batch; some are single frames and some shorter clips (when there are any)."""
        kinds = sorted(self.groups, key=lambda frames: -frames)
        frames = kinds[-1] if self.rng.random() < short_share else kinds[0]
        groups = list(self.groups[frames].values())
        group = self.rng.choices(groups, [sum(row[2] for row in rows) for rows in groups])[0]
        rows = self.rng.choices(group, [row[2] for row in group], k=size)
        latents = torch.stack([self.clips[index][0] for index, _, _ in rows])
        first = torch.stack([self.clips[index][1] for index, _, _ in rows])
        texts = [self.captions[text] for _, text, _ in rows]
        if self.rng.random() < still_share:
            latents = first
        return Batch(latents, first, torch.stack([t[0] for t in texts]), torch.stack([t[1] for t in texts]))


def _no_text(batch: Batch, captions: CaptionTable, negatives: list[str], rng: random.Random) -> Batch:
    tokens, pooled = captions[rng.choice(negatives)]
    size = len(batch.latents)
    return Batch(batch.latents, batch.first, tokens.expand(size, -1, -1), pooled.expand(size, -1))


def sample_loss(transformer: nn.Module, batch: Batch, settings: DitSettings, rng: random.Random) -> torch.Tensor:
    """Mean squared error of the velocity over the frames that are not given."""
    clean, size = batch.latents, len(batch.latents)
    noise = torch.randn_like(clean)
    sigma = torch.sigmoid(torch.randn(size) * settings.time_spread + settings.time_mean)
    mixed = clean + (noise - clean) * sigma.view(-1, 1, 1, 1, 1)
    mask = torch.zeros(*clean.shape[:-1], 1)
    if clean.shape[1] > 1:
        given = torch.rand(size) < settings.image_share
        mixed[given, :1] = batch.first[given]
        mask[given, 0] = 1
    scale_factor = (1.0, 3.16, 3.16) if rng.random() < settings.wide_scale_share else (1.0, 2.0, 2.0)
    made = velocity(transformer, mixed, mask, batch.tokens, batch.pooled, sigma, scale_factor)
    error = (made - (noise - clean)).square() * (1 - mask)
    return error.sum() / ((1 - mask).sum() * clean.shape[-1])


class Average:
    """Exponential moving average of the weights: what is saved and evaluated."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model: Any = model
        self.decay, self.steps = decay, 0
        self.mean = [weight.detach().clone() for weight in model.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the current weights; faster in the first steps."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (20 + self.steps))
        torch._foreach_lerp_(self.mean, list(self.model.parameters()), 1 - decay)

    def save(self, folder: Path) -> None:
        """Save the model with the averaged weights, then go on with the current ones."""
        weights = list(self.model.parameters())
        current = [weight.detach().clone() for weight in weights]
        self._copy(weights, self.mean)
        self.model.save_pretrained(folder)
        self._copy(weights, current)

    @staticmethod
    @torch.no_grad()
    def _copy(weights: list[nn.Parameter], values: list[torch.Tensor]) -> None:
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(value)


def _optimizer(transformer: nn.Module, settings: DitSettings) -> Muon:
    matrices, others = [], []
    for name, weight in transformer.named_parameters():
        inner = weight.ndim == 2 and ("attention" in name or "feed_forward" in name)
        (matrices if inner else others).append(weight)
    return Muon(matrices, others, settings.matrix_rate, settings.other_rate)


def _rate_factors(settings: DitSettings) -> Iterator[float]:
    """Warm-up over 40 steps, constant, then a cosine down to 2 % at the end of the time; ends with the budget."""
    began, step = time.monotonic(), 0
    while (progress := (time.monotonic() - began) / settings.seconds) < 1:
        step += 1
        factor = min(1.0, step / 40)
        if progress > settings.hold:
            turn = (progress - settings.hold) / (1 - settings.hold)
            factor *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * turn))
        yield factor


def train_transformer(
    transformer: Kandinsky5Transformer3DModel,
    shards: Path,
    captions: CaptionTable,
    negatives: list[str],
    settings: DitSettings,
    folder: Path,
) -> None:
    """Train until the time is over; the averaged weights are saved to `folder` every two minutes and at the end."""
    rng = random.Random(settings.seed)
    torch.manual_seed(settings.seed)
    samples = Samples(shards, captions, rng)
    optimizer, average = _optimizer(transformer, settings), Average(transformer, settings.average)
    transformer.train()
    said, losses = time.monotonic(), []
    for step, factor in enumerate(_rate_factors(settings), 1):
        optimizer.scale(factor)
        batch = samples.batch(settings.batch)
        if rng.random() < settings.unconditional_share:
            batch = _no_text(batch, captions, negatives, rng)
        loss = sample_loss(transformer, batch, settings, rng)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        average.update()
        losses.append(loss.item())
        if time.monotonic() - said > 120:
            mean = sum(losses) / len(losses)
            print(f"step {step}  clips {len(samples.clips)}  rate {factor:.2f}  loss {mean:.4f}", flush=True)
            average.save(folder)
            samples.refresh()
            losses, said = [], time.monotonic()
    average.save(folder)
    transformer.eval()
