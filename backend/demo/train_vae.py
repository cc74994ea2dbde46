"""Train the demo's VAE in two stages: single frames first, then the decoder's view of time.

Image stage: only the current-frame tap of every temporal kernel learns, the taps on past frames start at zero. Such a
network treats a clip frame by frame, so the first latent of a clip is close to the latent of its first frame alone,
which is what image-to-video conditions on.
Decoder stage: the encoder is frozen (latents stay valid for the transformer) and the decoder learns whole clips.
"""

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoCausalConv3d
from torch import nn

from backend.demo.clips import balanced_specs, draw, to_uint8
from backend.demo.measure import scores
from backend.demo.muon import Muon
from backend.demo.scenes import scene

FRAMES, SIDE = 17, 64
# An AutoencoderKLHunyuanVideo; its annotations do not know what its methods return.
VaeModel = Any


@dataclass(frozen=True)
class VaeStage:
    """Budget and rates of one stage."""

    seconds: float
    rate: float
    batch: int
    hold: float = 0.3
    seed: int = 1


def new_vae() -> VaeModel:
    """A fresh VAE of the HunyuanVideo family: 16 latent channels, 8 x smaller in space, 4 x in time, 2.04 M parameters.

    One normalisation group: with 8 groups on 8 channels the mean colour would be lost.
    """
    vae: VaeModel = AutoencoderKLHunyuanVideo(
        block_out_channels=(8, 16, 32, 64),  # type: ignore[arg-type]
        layers_per_block=1,
        norm_num_groups=1,
        latent_channels=16,
        scaling_factor=1.0,
    )
    with torch.no_grad():
        # Small posterior noise from the start.
        vae.quant_conv.weight[16:] *= 0.1
        vae.quant_conv.bias[16:] = -5.0
        for module in vae.modules():
            if isinstance(module, HunyuanVideoCausalConv3d) and module.conv.kernel_size[0] == 3:
                module.conv.weight[:, :, 2] *= math.sqrt(3)
                module.conv.weight[:, :, :2] = 0
    return vae


def _single_frame_forward(module: HunyuanVideoCausalConv3d) -> Callable[[torch.Tensor], torch.Tensor]:
    convolution, padding = module.conv, module.time_causal_padding[:4]

    def forward(frames: torch.Tensor) -> torch.Tensor:
        # The causal padding repeats the one frame, so the kernel's taps add up; only the current one learns.
        kernel = convolution.weight[:, :, 2] + convolution.weight[:, :, :2].detach().sum(2)
        image = F.pad(frames[:, :, 0], padding, mode="replicate")
        return F.conv2d(image, kernel, convolution.bias, stride=convolution.stride[1:]).unsqueeze(2)

    return forward


@contextmanager
def single_frame_convolutions(vae: nn.Module) -> Iterator[None]:
    """Replace the causal 3-D convolutions by equal, much faster 2-D ones; inputs must have one frame."""
    modules = [m for m in vae.modules() if isinstance(m, HunyuanVideoCausalConv3d) and m.conv.kernel_size[0] == 3]
    for module in modules:
        module.forward = _single_frame_forward(module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _optimizer(parameters: list[nn.Parameter], rate: float) -> Muon:
    kernels = [p for p in parameters if p.ndim == 5 and min(p.shape[0], p[0].numel()) >= 8]
    chosen = {id(p) for p in kernels}
    return Muon(kernels, [p for p in parameters if id(p) not in chosen], rate, rate, matrix_rms="fixed")


def _rate_factor(step: int, progress: float, hold: float) -> float:
    """Warm-up over 30 steps, then constant until `hold` of the budget, then a cosine down to 2 %."""
    warm = min(1.0, (step + 1) / 30)
    if progress < hold:
        return warm
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - hold) / (1 - hold))))


def picture_loss(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """L1 + 4 MSE + half the L1 of differences of neighbouring pixels (keeps edges crisp); tensors [B, 3, F, H, W]."""
    error = made - wanted
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 4 * error.square().mean() + 0.5 * edges


def psnr(made: torch.Tensor, wanted: torch.Tensor) -> float:
    """Mean over clips of the peak signal-to-noise ratio in dB; tensors [B, 3, F, H, W] in -1..1."""
    error = (made.clamp(-1, 1) - wanted).square().flatten(1).mean(1)
    return float((-10 * (error / 4 + 1e-9).log10()).mean())


@dataclass(frozen=True)
class VaeReport:
    """What a VAE keeps of true clips: PSNR (dB) of clips and of first frames alone, spread of latents, right words."""

    clip_psnr: float
    image_psnr: float
    latent_std: float
    words: dict[str, float]


@torch.no_grad()
def assess(vae: VaeModel, count: int = 24, seed: int = 9000) -> VaeReport:
    """Encode and decode `count` clips drawn for the purpose; the share of right words is the transformer's ceiling."""
    rng = random.Random(seed)
    specs = balanced_specs(count, rng)
    clips = torch.stack([draw(spec, rng, FRAMES, SIDE, SIDE) for spec in specs])
    latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in clips.split(4)])
    made = torch.cat([vae.decode(chunk).sample for chunk in latents.split(4)])
    first = clips[:, :, :1]
    image = vae.decode(vae.encode(first).latent_dist.mean).sample
    words, _ = scores([to_uint8(clip) for clip in made], specs)
    return VaeReport(psnr(made, clips), psnr(image, first), float(latents.std()), words)


class FramePool:
    """Clips drawn ahead and renewed a little at a time, so that drawing never holds up training."""

    def __init__(self, rng: random.Random, size: int) -> None:
        self.rng = rng
        self.clips = [scene(rng, FRAMES, SIDE, SIDE) for _ in range(size)]

    def frames(self, count: int, renew: int = 2) -> torch.Tensor:
        """Random single frames, mirrored at random -> [count, 3, 1, side, side]."""
        for _ in range(renew):
            self.clips[self.rng.randrange(len(self.clips))] = scene(self.rng, FRAMES, SIDE, SIDE)
        chosen = []
        for _ in range(count):
            frame = self.clips[self.rng.randrange(len(self.clips))][:, self.rng.randrange(FRAMES)].unsqueeze(1)
            if self.rng.random() < 0.5:
                frame = frame.flip(-1)
            chosen.append(frame)
        return torch.stack(chosen)


def _run(
    vae: VaeModel,
    stage: VaeStage,
    parameters: list[nn.Parameter],
    loss_of: Callable[[], torch.Tensor],
    folder: Path,
) -> None:
    """The loop of both stages: steps until the time is over, a line and a checkpoint every two minutes."""
    optimizer = _optimizer(parameters, stage.rate)
    began, said, losses, step = time.monotonic(), time.monotonic(), [], 0
    while (spent := time.monotonic() - began) < stage.seconds:
        optimizer.scale(_rate_factor(step, spent / stage.seconds, stage.hold))
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if torch.isfinite(norm):
            optimizer.step()
        losses.append(loss.item())
        step += 1
        if time.monotonic() - said > 120:
            print(f"{spent:6.0f} s  step {step}  loss {sum(losses) / len(losses):.4f}", flush=True)
            vae.save_pretrained(folder)
            losses, said = [], time.monotonic()
    vae.save_pretrained(folder)


def train_images(vae: VaeModel, stage: VaeStage, folder: Path) -> None:
    """Image stage: encoder and decoder learn single frames; sets the scaling factor to 1 / spread of the latents."""
    pool = FramePool(random.Random(stage.seed), 32 if stage.seconds < 60 else 300)
    torch.manual_seed(stage.seed)

    def loss_of() -> torch.Tensor:
        frames = pool.frames(stage.batch)
        posterior = vae.encode(frames).latent_dist
        made = vae.decode(posterior.mean + posterior.std * torch.randn_like(posterior.mean)).sample
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return picture_loss(made, frames) + 1e-5 * divergence

    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    vae.train()
    with single_frame_convolutions(vae):
        _run(vae, stage, list(vae.parameters()), loss_of, folder)
    vae.eval()
    vae.register_to_config(scaling_factor=round(1 / assess(vae).latent_std, 5))
    vae.save_pretrained(folder)


def train_decoder(vae: VaeModel, stage: VaeStage, folder: Path) -> None:
    """Decoder stage: whole clips and some single frames through the frozen encoder, latents slightly disturbed.

    The transformer's latents are never exact, so the decoder learns to forgive a little noise.
    """
    rng = random.Random(stage.seed)
    torch.manual_seed(stage.seed)
    frozen = (*vae.encoder.parameters(), *vae.quant_conv.parameters())
    for weight in frozen:
        weight.requires_grad_(False)
    pool = FramePool(rng, 32 if stage.seconds < 60 else 200)

    def disturbed_loss(clips: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            latents = vae.encode(clips).latent_dist.mean
        level = 0.04 / vae.config.scaling_factor * torch.rand(len(clips), 1, 1, 1, 1)
        return picture_loss(vae.decode(latents + level * torch.randn_like(latents)).sample, clips)

    def loss_of() -> torch.Tensor:
        if rng.random() < 0.25:
            return disturbed_loss(torch.stack([scene(rng, FRAMES, SIDE, SIDE) for _ in range(stage.batch)]))
        with single_frame_convolutions(vae):
            return disturbed_loss(pool.frames(stage.batch * 8))

    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    vae.train()
    _run(vae, stage, [p for p in vae.parameters() if p.requires_grad], loss_of, folder)
    vae.eval()
    for weight in frozen:
        weight.requires_grad_(True)
    vae.save_pretrained(folder)
