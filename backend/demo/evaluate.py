"""Measure the demo model with the project's own engine: python -m backend.demo.evaluate [--count N] [--sheets DIR].

Random sentences of the grammar are generated with the demo tasks' defaults and measured; the same for drawn clips that
only went through the VAE, which is the most that the transformer can reach.
"""

import argparse
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from backend.config.tasks import DEFAULT_NEGATIVE_PROMPT, DEMO_WEIGHTS, TASKS
from backend.demo.clips import CAPTION_STYLES, ClipSpec, caption, draw, random_spec, to_uint8
from backend.demo.measure import Measurement, scores
from backend.model.load import load_transformer
from backend.sampling.condition import GivenFrames
from backend.sampling.denoise import TextCondition, denoise
from backend.sampling.schedule import draw_noise, seeded_generator, sigma_grid
from backend.text.cache import PromptEmbeds
from backend.text.embed import embed_prompts
from backend.vae.hunyuan import load_vae
from backend.vae.tiling import Tiling, latent_frames

_CPU = torch.device("cpu")
WORDS = ("color", "shape", "motion", "background", "all")


@dataclass(frozen=True)
class Sampling:
    """How clips are made; the defaults are those of the demo tasks."""

    frames: int = TASKS["k5-demo-t2v"].frames
    side: int = TASKS["k5-demo-t2v"].width
    steps: int = TASKS["k5-demo-t2v"].steps
    guidance: float = TASKS["k5-demo-t2v"].guidance
    scheduler_scale: float = TASKS["k5-demo-t2v"].scheduler_scale
    scale_factor: tuple[float, float, float] = TASKS["k5-demo-t2v"].scale_factor
    negative_prompt: str = DEFAULT_NEGATIVE_PROMPT
    batch: int = 16


@dataclass(frozen=True)
class Prompted:
    """A sentence of the grammar, its drawn clip [3, F, H, W] in -1..1 and its seed."""

    spec: ClipSpec
    text: str
    drawn: torch.Tensor
    seed: int


def random_prompts(count: int, seed: int, sampling: Sampling) -> list[Prompted]:
    """`count` random sentences in random wordings, each with a clip as it should look."""
    rng = random.Random(seed)
    prompts = []
    for index in range(count):
        spec = random_spec(rng)
        text = caption(spec, rng.randrange(CAPTION_STYLES))
        drawn = draw(spec, rng, sampling.frames, sampling.side, sampling.side)
        prompts.append(Prompted(spec, text, drawn, seed * 1000 + index))
    return prompts


class DemoModel:
    """Transformer and VAE of a weights folder in the engine's classes, float32 on the CPU."""

    def __init__(self, weights: Path = DEMO_WEIGHTS, sampling: Sampling | None = None) -> None:
        self.weights = weights
        self.sampling = sampling or Sampling()
        self.transformer = load_transformer(weights / "transformer", device=_CPU, dtype=torch.float32)
        # As the engine chooses for so few and so small frames: neither temporal windows nor tiles.
        tiling = Tiling(temporal_enabled=False, spatial_enabled=False)
        self.vae = load_vae(weights / "vae", device=_CPU, dtype=torch.float32, tiling=tiling)

    def embed(self, prompts: Sequence[str]) -> list[PromptEmbeds]:
        """Text embeddings with the video template, as generation makes them."""
        qwen, clip = self.weights / "text_encoder", self.weights / "text_encoder_2"
        return embed_prompts(prompts, qwen=qwen, clip=clip, device=_CPU, dtype=torch.float32)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompted], from_image: bool) -> list[torch.Tensor]:
        """Clips [3, F, H, W] of the prompts; `from_image` gives each the first frame of its drawn clip.

        Prompts of equal length share a batch; every clip has the noise of its own seed.
        """
        *texts, negative = self.embed([*(prompt.text for prompt in prompts), self.sampling.negative_prompt])
        order = sorted(range(len(prompts)), key=lambda index: len(texts[index].text))
        clips: dict[int, torch.Tensor] = {}
        for _, group in itertools.groupby(order, key=lambda index: len(texts[index].text)):
            same = list(group)
            for start in range(0, len(same), self.sampling.batch):
                chunk = same[start : start + self.sampling.batch]
                made = self._batch([prompts[i] for i in chunk], [texts[i] for i in chunk], negative, from_image)
                clips.update(zip(chunk, made, strict=True))
        return [clips[index] for index in range(len(prompts))]

    def _batch(
        self, prompts: list[Prompted], texts: list[PromptEmbeds], negative: PromptEmbeds, from_image: bool
    ) -> torch.Tensor:
        sampling, count = self.sampling, len(prompts)
        size = latent_frames(sampling.frames), sampling.side // 8, sampling.side // 8
        noise = torch.cat([draw_noise(seeded_generator(prompt.seed), *size) for prompt in prompts])
        given = None
        if from_image:
            first = torch.stack([prompt.drawn[:, :1] for prompt in prompts])
            given = GivenFrames(self.vae.encode(first).permute(0, 2, 3, 4, 1))
        positive = TextCondition(torch.stack([t.text for t in texts]), torch.stack([t.pooled for t in texts]))
        without = TextCondition(negative.text.expand(count, -1, -1), negative.pooled.expand(count, -1))
        sigmas = sigma_grid(sampling.steps, sampling.scheduler_scale)
        latents = denoise(self._velocity, noise, positive, without, sigmas, sampling.guidance, given)
        return self.vae.decode(latents.permute(0, 4, 1, 2, 3)).clamp(-1, 1)

    def _velocity(
        self,
        hidden_states: torch.Tensor,
        text_embeds: torch.Tensor,
        pooled_embeds: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> torch.Tensor:
        scale_factor = self.sampling.scale_factor
        return self.transformer(hidden_states, text_embeds, pooled_embeds, timesteps, scale_factor=scale_factor)

    @torch.no_grad()
    def reconstruct(self, prompts: Sequence[Prompted]) -> list[torch.Tensor]:
        """The drawn clips after the VAE: the most that the transformer can reach."""
        return [self.vae.decode(self.vae.encode(p.drawn[None]))[0].clamp(-1, 1) for p in prompts]


@dataclass(frozen=True)
class Row:
    """One row of the table: shares of right words, PSNR of given first frames in dB, seconds a clip."""

    name: str
    words: dict[str, float]
    first_psnr: list[float]
    seconds: float
    clips: list[torch.Tensor]
    seen: list[Measurement]

    def text(self) -> str:
        """The row in Markdown."""
        cells = [f"{self.words[word] * 100:.0f} %" for word in WORDS]
        psnr = f"{sum(self.first_psnr) / len(self.first_psnr):.1f} dB" if self.first_psnr else "-"
        least = f"{min(self.first_psnr):.1f} dB" if self.first_psnr else "-"
        cells += [psnr, least, f"{self.seconds:.2f} s"]
        return f"| {self.name} | {len(self.clips)} | {' | '.join(cells)} |"


HEADER = """| clips | n | colour | shape | motion | background | all four | frame 0, mean | frame 0, least | time |
|---|---|---|---|---|---|---|---|---|---|"""


def _psnr(made: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(-10 * ((made - wanted).square().mean() / 4 + 1e-10).log10())


def measured(name: str, prompts: Sequence[Prompted], clips: list[torch.Tensor], seconds: float, given: bool) -> Row:
    """Measure clips against their prompts; `given`: the first frame was known, so its PSNR means something."""
    words, seen = scores([to_uint8(clip) for clip in clips], [prompt.spec for prompt in prompts])
    first = (
        [_psnr(clip[:, 0], prompt.drawn[:, 0]) for clip, prompt in zip(clips, prompts, strict=True)] if given else []
    )
    return Row(name, words, first, seconds / len(clips), clips, seen)


def evaluate(model: DemoModel, prompts: Sequence[Prompted]) -> list[Row]:
    """The rows: VAE alone, text to video, image to video."""
    rows = []
    for name, make, given in (
        ("VAE alone (ceiling)", model.reconstruct, True),
        ("text to video", lambda p: model.generate(p, from_image=False), False),
        ("image to video", lambda p: model.generate(p, from_image=True), True),
    ):
        began = time.monotonic()
        clips = make(prompts)
        rows.append(measured(name, prompts, clips, time.monotonic() - began, given))
    return rows


def contact_sheet(
    clips: Sequence[torch.Tensor], labels: Sequence[str], path: Path, columns: int = 2, every: int = 4
) -> None:
    """Write a PNG with one clip [3, F, H, W] a strip (every n-th frame, twice the size) under its label."""
    strips = []
    for clip, label in zip(clips, labels, strict=True):
        frames = to_uint8(clip)[::every]
        picture = Image.fromarray(torch.cat(list(frames), dim=1).numpy())
        picture = picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST)
        strip = Image.new("RGB", (picture.width + 8, picture.height + 18), (32, 32, 32))
        strip.paste(picture, (0, 14))
        ImageDraw.Draw(strip).text((2, 1), label, fill=(255, 255, 255))
        strips.append(strip)
    rows = -(-len(strips) // columns)
    sheet = Image.new("RGB", (strips[0].width * columns, strips[0].height * rows))
    for index, strip in enumerate(strips):
        sheet.paste(strip, (index // rows * strip.width, index % rows * strip.height))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, print the table."""
    parser = argparse.ArgumentParser(description="Measure the demo model.", allow_abbrev=False)
    parser.add_argument("--count", type=int, default=64, help="prompts")
    parser.add_argument("--seed", type=int, default=64, help="seed of the prompts and of the clips")
    parser.add_argument("--weights", type=Path, default=DEMO_WEIGHTS, help="weights folder, diffusers layout")
    parser.add_argument("--steps", type=int, default=Sampling.steps)
    parser.add_argument("--guidance", type=float, default=Sampling.guidance)
    parser.add_argument("--scheduler_scale", type=float, default=Sampling.scheduler_scale)
    parser.add_argument("--negative_prompt", default=DEFAULT_NEGATIVE_PROMPT)
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets of the first 16 clips of each kind")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    sampling = replace(
        Sampling(),
        steps=options.steps,
        guidance=options.guidance,
        scheduler_scale=options.scheduler_scale,
        negative_prompt=options.negative_prompt,
    )
    prompts = random_prompts(options.count, options.seed, sampling)
    rows = evaluate(DemoModel(options.weights, sampling), prompts)
    print(HEADER)
    for row in rows:
        print(row.text())
    if options.sheets:
        for row, name in zip(rows, ("vae", "t2v", "i2v"), strict=True):
            contact_sheet(row.clips[:16], [p.text for p in prompts[:16]], options.sheets / f"demo-{name}.png")


if __name__ == "__main__":
    main()
