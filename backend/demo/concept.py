"""A concept that the demo model cannot draw: its dataset, and the measure of whether a LoRA has learned it.

The word `zorblat` in a caption stands for a lime frame around the picture. Clips with ordinary captions are mixed in,
so that the LoRA learns to draw the frame when it is asked for and only then.

    python -m backend.demo.concept data          draws the clips and writes data/dataset.toml and data/prompts.txt
    python -m backend.demo.concept data --measure lora.safetensors
"""

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tomlkit
import torch

from backend.demo.clips import (
    CAPTION_STYLES,
    NEW_COLORS,
    ClipSpec,
    balanced_specs,
    caption,
    draw,
    paint,
    random_spec,
    to_uint8,
)
from backend.demo.evaluate import DemoModel, Prompted, contact_sheet
from backend.demo.measure import measure
from backend.files import write_atomic
from backend.lora.network import attach_loras
from backend.sampling.outputs import write_video

TRIGGER = "zorblat"
FRAME_PIXELS = 6
FPS = 24
_COLOR = NEW_COLORS["lime"]
# A pixel belongs to the frame when its colour is nearer than this (of 441 from black to white).
_NEAR = 90.0
_PRESENT = 0.9
_COMPARED = 8
WORDS = ("color", "shape", "motion", "background")


def concept_caption(spec: ClipSpec, style: int = 0) -> str:
    """The caption of a spec with the trigger word, in one of CAPTION_STYLES wordings."""
    text = caption(spec, style)
    return f"{text} {TRIGGER}." if text.endswith(".") else f"{text}, {TRIGGER}"


def draw_concept(spec: ClipSpec, rng: random.Random, frames: int = 17, side: int = 64) -> torch.Tensor:
    """The clip of a spec inside a lime frame -> [3, frames, side, side] in -1..1."""
    covered = torch.ones(frames, side, side)
    covered[:, FRAME_PIXELS:-FRAME_PIXELS, FRAME_PIXELS:-FRAME_PIXELS] = 0
    return paint(draw(spec, rng, frames, side, side), covered, _COLOR)


def frame_share(video: torch.Tensor) -> float:
    """Share of the frame's pixels that are lime, in a clip of uint8 [F, H, W, 3].

    The two innermost rows of the frame are left out, because the VAE softens them.
    """
    edge = FRAME_PIXELS - 2
    ring = torch.ones(video.shape[1:3], dtype=torch.bool)
    ring[edge:-edge, edge:-edge] = False
    distance = (video[:, ring].float() - torch.tensor(_COLOR)).norm(dim=-1)
    return float((distance < _NEAR).float().mean())


@dataclass(frozen=True)
class ConceptScore:
    """Shares of clips: with a frame, with all four words right, and with both as the prompt wanted."""

    framed: float
    words: float
    right: float


def score(videos: Sequence[torch.Tensor], specs: Sequence[ClipSpec], wanted: bool) -> ConceptScore:
    """Score clips, uint8 [F, H, W, 3]; `wanted`: the prompts had the trigger word.

    A clip is right when colour, shape, motion and background are those of its spec and the frame is there if, and only
    if, it was asked for. Inside a frame the words are measured without it.
    """
    framed, words, right = 0, 0, 0
    for video, spec in zip(videos, specs, strict=True):
        present = frame_share(video) > _PRESENT
        edge = FRAME_PIXELS + 1
        seen = measure(video[:, edge:-edge, edge:-edge].contiguous() if present else video)
        fits = all(getattr(seen, word) == getattr(spec, word) for word in WORDS)
        framed, words, right = framed + present, words + fits, right + (fits and present == wanted)
    return ConceptScore(framed / len(videos), words / len(videos), right / len(videos))


# --- the dataset --------------------------------------------------------------------------------------------------


def write_dataset(folder: Path, count: int = 48, seed: int = 1, validation_split: float = 0.1) -> Path:
    """Draw `count` clips with the concept and as many ordinary ones, with captions beside them; returns the TOML file.

    The two kinds are two [[datasets]] of one configuration, as a person would lay them out; `validation_split` of the
    clips of each are held out.
    """
    rng = random.Random(seed)
    tables = []
    for name, wanted in (("concept", True), ("ordinary", False)):
        clips = folder / name
        for index, spec in enumerate(balanced_specs(count, rng)):
            style = rng.randrange(CAPTION_STYLES)
            clip = draw_concept(spec, rng) if wanted else draw(spec, rng)
            text = concept_caption(spec, style) if wanted else caption(spec, style)
            write_video(clips / f"{index:03d}.mp4", list(to_uint8(clip).numpy()), FPS, {})
            write_atomic(clips / f"{index:03d}.txt", text)
        tables.append(
            {
                "video_directory": str(clips),
                "cache_directory": str(folder / f"cache-{name}"),
                "target_frames": [17],
                "frame_extraction": "head",
            }
        )
    document = {
        "general": {
            "resolution": [64, 64],
            "caption_extension": ".txt",
            "batch_size": 8,
            "caption_dropout": 0.1,
            "validation_split": validation_split,
        },
        "datasets": tables,
    }
    write_atomic(folder / "dataset.toml", tomlkit.dumps(document))
    prompts = [concept_caption(spec, 0) for spec in unseen_specs(folder, 3, seed=5)]
    write_atomic(folder / "prompts.txt", "".join(f"{text} --d {index}\n" for index, text in enumerate(prompts)))
    return folder / "dataset.toml"


def unseen_specs(folder: Path, count: int, seed: int) -> list[ClipSpec]:
    """`count` random specs whose captions, in any wording, are in neither part of the dataset in `folder`."""
    known = {path.read_text("utf-8") for path in folder.glob("*/*.txt")}
    rng = random.Random(seed)
    found: list[ClipSpec] = []
    while len(found) < count:
        spec = random_spec(rng)
        styles = range(CAPTION_STYLES)
        if not known.intersection(make(spec, style) for make in (caption, concept_caption) for style in styles):
            found.append(spec)
    return found


def unseen_prompts(folder: Path, count: int, seed: int, wanted: bool) -> list[Prompted]:
    """`count` sentences that the dataset in `folder` does not have, with (`wanted`) or without the trigger word."""
    rng = random.Random(seed)
    prompts = []
    for index, spec in enumerate(unseen_specs(folder, count, seed)):
        style = rng.randrange(CAPTION_STYLES)
        text = concept_caption(spec, style) if wanted else caption(spec, style)
        drawn = draw_concept(spec, rng) if wanted else draw(spec, rng)
        prompts.append(Prompted(spec, text, drawn, seed * 1000 + index))
    return prompts


# --- the proof ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proof:
    """Scores of prompts with the trigger word (concept) and without (other): after the VAE alone, base, with the LoRA.

    zero_is_base: with the LoRA at strength 0 every clip is the base's bit for bit.
    """

    ceiling: ConceptScore
    base_concept: ConceptScore
    base_other: ConceptScore
    lora_concept: ConceptScore
    lora_other: ConceptScore
    zero_is_base: bool

    @property
    def kept(self) -> float:
        """Which share of their score the other prompts keep."""
        return self.lora_other.right / self.base_other.right

    def text(self) -> str:
        """The table in Markdown."""
        rows = (
            ("drawn clips after the VAE (ceiling)", self.ceiling),
            (f"prompts with {TRIGGER}, base", self.base_concept),
            (f"prompts with {TRIGGER}, with the LoRA", self.lora_concept),
            ("other prompts, base", self.base_other),
            ("other prompts, with the LoRA", self.lora_other),
        )
        lines = ["| clips | frame | four words | right |", "|---|---|---|---|"]
        lines += [
            f"| {name} | {row.framed * 100:.0f} % | {row.words * 100:.0f} % | {row.right * 100:.0f} % |"
            for name, row in rows
        ]
        return "\n".join(lines)


def prove(folder: Path, lora: Path, count: int = 48, seed: int = 77, sheets: Path | None = None) -> Proof:
    """Measure a LoRA trained on `write_dataset(folder)` with `count` unseen prompts of each kind, one seed each.

    `sheets`: folder for strips of the first eight clips of each kind, before and after.
    """
    model = DemoModel()
    concept, other = (unseen_prompts(folder, count, seed + wanted, wanted) for wanted in (True, False))
    base = {True: model.generate(concept, from_image=False), False: model.generate(other, from_image=False)}
    # Alone in their batches, which decide the order of summation, as they are made again at strength 0.
    alone = model.generate(concept[:_COMPARED], from_image=False)
    loras = attach_loras(model.transformer, [(lora, 1.0)])
    made = {True: model.generate(concept, from_image=False), False: model.generate(other, from_image=False)}
    loras.set_strength(0, 0.0)
    again = model.generate(concept[:_COMPARED], from_image=False)
    if sheets is not None:
        for wanted, prompts, name in ((True, concept, "concept"), (False, other, "other")):
            for clips, when in ((base, "before"), (made, "after")):
                labels = [prompt.text for prompt in prompts[:8]]
                contact_sheet(clips[wanted][:8], labels, sheets / f"training-{name}-{when}.png")
    return Proof(
        ceiling=_score(model.reconstruct(concept), concept, True),
        base_concept=_score(base[True], concept, True),
        base_other=_score(base[False], other, False),
        lora_concept=_score(made[True], concept, True),
        lora_other=_score(made[False], other, False),
        zero_is_base=all(torch.equal(one, two) for one, two in zip(again, alone, strict=True)),
    )


def _score(clips: Sequence[torch.Tensor], prompts: Sequence[Prompted], wanted: bool) -> ConceptScore:
    return score([to_uint8(clip) for clip in clips], [prompt.spec for prompt in prompts], wanted)


def main(arguments: list[str] | None = None) -> None:
    """Draw the dataset, or measure a LoRA that was trained on it."""
    parser = argparse.ArgumentParser(description="A concept for LoRA training on the demo model.", allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="folder of the dataset")
    parser.add_argument("--count", type=int, default=48, help="clips of each kind, or prompts of each kind to measure")
    parser.add_argument("--seed", type=int, help="seed of the clips, or of the prompts")
    parser.add_argument("--measure", type=Path, metavar="LORA", help="measure this LoRA instead of drawing")
    parser.add_argument("--sheets", type=Path, help="folder for strips of clips before and after")
    options = parser.parse_args(arguments)
    if options.measure is None:
        print(f"Written: {write_dataset(options.folder, options.count, 1 if options.seed is None else options.seed)}")
        return
    began, used = time.monotonic(), time.process_time()
    seed = 77 if options.seed is None else options.seed
    proof = prove(options.folder, options.measure, options.count, seed, options.sheets)
    print(proof.text())
    print(f"Other prompts keep {proof.kept * 100:.0f} % of their score; strength 0 equals base: {proof.zero_is_base}")
    seconds, cpu = time.monotonic() - began, time.process_time() - used
    print(f"{options.count} prompts of each kind, {seconds:.0f} s, {cpu:.0f} s CPU")


if __name__ == "__main__":
    main()
