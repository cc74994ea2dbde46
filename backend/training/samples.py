"""Clips made while training: prepared once, made whenever asked, never a reason for the training to end.

The LoRA is sampled as it learns, through the very layers that learn. A sample leaves no trace in the training: global
random generators, modes of modules and the place of the model are as before.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from backend.config.checkpoint import identify
from backend.config.metadata import encode_settings, read_settings
from backend.config.state_record import Position
from backend.config.tasks import TASKS, WeightPaths
from backend.config.train import TrainOptions
from backend.errors import EngineError, Problem, UserError
from backend.files import write_atomic
from backend.model.device import empty_cache, random_state_kept
from backend.progress import ItemMeter, Reporter
from backend.sampling.clip_vae import ClipVae
from backend.sampling.clips import Clip, denoise_clip, finished_latents
from backend.sampling.outputs import Written
from backend.sampling.phases import naming_faults
from backend.sampling.prompt_embeds import check_text_sizes, embed_clips
from backend.sampling.save import save_clip
from backend.sampling.settings import clip_settings, loras_record, weights_record
from backend.text.cache import PromptEmbeds
from backend.training.sample_prompts import FIELD, plan_samples
from backend.training.transformer import TrainingTransformer

MANIFEST = "manifest.jsonl"
_COMPARED = ("options", "images", "weights", "loras")
_IN_MANIFEST = (
    "negative_prompt", "width", "height", "frames", "fps", "steps", "guidance", "scheduler_scale", "image",
    "image_last",
)  # fmt: skip


class Sampler:
    """Makes the clips of `--sample_prompts`; one process uses it.

    `prepare` belongs before the DiT is loaded, as encoders and VAE need the device to themselves then.
    """

    def __init__(
        self,
        options: TrainOptions,
        paths: WeightPaths,
        device: torch.device,
        dtype: torch.dtype,
        reporter: Reporter,
        folder: Path,
        seed: int,
    ) -> None:
        """Note what will be needed; nothing is read yet.

        Args:
            folder: the folder of the samples, made when the first one is written.
            seed: of the run; prompts without a seed of their own use it.
        """
        self._options = options
        self._paths = paths
        self._device = device
        self._dtype = dtype
        self._reporter = reporter
        self._folder = folder
        self._seed = seed
        self._vae = ClipVae(paths.vae or "", device, dtype, options.vae_tiling, reporter)
        self._clips: list[Clip] = []
        self._embeds: dict[str, PromptEmbeds] = {}
        self._records: tuple[dict[str, dict[str, str]], list[dict[str, Any]]] = ({}, [])

    def prepare(self) -> None:
        """Read the prompts, encode all texts and given images once, load the VAE into CPU memory, free the encoders.

        An image that cannot be used costs its own samples only, with a warning.

        Raises:
            Problems: a mistake in the prompt file, or weights that are missing, damaged or of another kind.
            EngineError: phase "text" or "vae".
        """
        plan = plan_samples(self._options, self._folder, self._seed)
        for notice in plan.notices:
            self._reporter.warning(notice)
        task = TASKS[self._options.task or ""]
        self._reporter.phase("text", "Reading the sample prompts")
        with naming_faults("text", "Reading the sample prompts"):
            self._embeds = embed_clips(
                plan.clips,
                self._paths,
                device=self._device,
                dtype=self._dtype,
                max_tokens=task.max_text_tokens,
                cache_dir=self._options.text_cache_dir,
                reporter=self._reporter,
            )
        config = identify(self._paths.dit or "").config
        if config is not None:
            check_text_sizes(config, self._embeds)
        with naming_faults("vae", "Loading the VAE"):
            _ = self._vae.loaded
        self._records = weights_record(plan.clips[0].options), loras_record(plan.clips[0].options)
        clips = [Clip(number, request) for number, request in enumerate(plan.clips, start=1)]
        self._clips = [clip for clip in clips if self._encode_given(clip)]

    def _encode_given(self, clip: Clip) -> bool:
        """Given frames of an image-to-video clip; False when its image cannot be used."""
        if clip.request.image is None:
            return True
        self._reporter.phase("vae", f"Encoding the image of sample {clip.number}")
        _, generator = clip.draw_noise()
        try:
            with naming_faults("vae", "Encoding the image"):
                clip.given = self._vae.encode_given(clip.request, generator)
        except (UserError, EngineError) as error:
            self._warn(f"sample {clip.number} will not be made: {error}")
            return False
        return True

    def make(
        self,
        transformer: TrainingTransformer,
        position: Position,
        interrupted: Callable[[], bool] | None = None,
    ) -> int:
        """Make every clip with the LoRA as it is now; returns how many were written.

        A clip that fails gives a warning and the next one is tried. The model is on the device again afterwards. The
        caller announces the phase "sample".

        Args:
            position: where the training stands; it is in names, manifest and settings.
            interrupted: asked before every denoising step; True leaves out this clip and the rest.
        """
        made, phase_before = 0, self._reporter.phase_name
        self._reporter.phase_name = "sample"
        meter = self._reporter.item_meter(max(sum(clip.request.steps for clip in self._clips), 1), "steps")
        asked = interrupted or (lambda: False)
        try:
            with random_state_kept(self._device), transformer.evaluating():
                for clip in self._clips:
                    if asked():
                        break
                    made += self._attempt(transformer, clip, position, asked, meter)
        finally:
            self._reporter.phase_name = phase_before
        return made

    def _attempt(
        self,
        transformer: TrainingTransformer,
        clip: Clip,
        position: Position,
        asked: Callable[[], bool],
        meter: ItemMeter,
    ) -> bool:
        """Make one clip; whatever goes wrong with it is told and does not reach the training."""
        started, made = time.perf_counter(), False
        try:
            latents = self._denoise(transformer, clip, asked, meter)
            if latents is not None:
                written, settings = self._write(transformer, clip, latents, position)
                self._announce(written, settings, clip, position, time.perf_counter() - started)
                made = True
        except Exception as error:  # a sample is a look at the training and never ends it
            self._warn(f"sample {clip.number} of step {position.step} was not made: {_words(error)} Training goes on.")
        if not made:
            gc.collect()  # The failure's frames may still hold the clip.
        empty_cache(self._device)
        # Not among what is caught: a model that cannot come back does end the training.
        transformer.to_device()
        return made

    def _denoise(
        self, transformer: TrainingTransformer, clip: Clip, asked: Callable[[], bool], meter: ItemMeter
    ) -> torch.Tensor | None:
        """Latents [16, F, H, W] on the CPU; None when it was interrupted."""
        stopped: list[int] = []

        def before_step(index: int) -> bool:
            if index:
                meter.done(1, f"sample {clip.number}")
            if asked():
                stopped.append(index)
            return bool(stopped)

        with naming_faults("denoise", f"Denoising sample {clip.number}"):
            latents = denoise_clip(
                transformer.velocity,
                clip,
                self._embeds,
                self._device,
                self._dtype,
                transformer.config.in_channels,
                before_step,
            )
            if stopped:
                return None
            meter.done(1, f"sample {clip.number}")
            return finished_latents(clip, latents)

    def _write(
        self, transformer: TrainingTransformer, clip: Clip, latents: torch.Tensor, position: Position
    ) -> tuple[Written, dict[str, Any]]:
        with naming_faults("decode", f"Decoding sample {clip.number}"):
            if self._options.offload_dit_during_sampling:
                transformer.to_cpu()
            pixels, tiling = self._vae.decode(latents)
        computed = {
            "device": str(self._device),
            "dtype": str(self._dtype).removeprefix("torch."),
            "attention": transformer.attention,
            "nabla": None if transformer.nabla is None else vars(transformer.nabla),
            "training": {
                "name": self._options.output_name,
                "step": position.step,
                "epoch": shown_epoch(position),
                "sample": clip.number,
            },
        }
        settings = clip_settings(clip.request, *self._records, computed) | {"vae_tiling": tiling.to_metadata()}
        with naming_faults("save", f"Writing sample {clip.number}"):
            request = replace(clip.request, output=self._output(clip, position, settings))
            (written,) = save_clip(request, request.options, latents, pixels, settings)
        return written, settings

    def _output(self, clip: Clip, position: Position, settings: dict[str, Any]) -> Path:
        """The file's name: that of step and prompt, with a number more where a clip of other settings has it already.

        A resumed run comes by the same step again and makes the same clip again, which replaces the first one.
        """
        stem = f"{self._options.output_name}-step{position.step:06d}-p{clip.number:02d}"
        suffix, attempt = clip.request.output.suffix, 1
        path = self._folder / f"{stem}{suffix}"
        while path.exists() and not _same_settings(path, settings):
            attempt += 1
            path = self._folder / f"{stem}-{attempt}{suffix}"
        return path

    def _announce(
        self, written: Written, settings: dict[str, Any], clip: Clip, position: Position, seconds: float
    ) -> None:
        request, took = clip.request, round(seconds, 3)
        step, epoch = position.step, shown_epoch(position)
        entry = {
            "step": step,
            "epoch": epoch,
            "index": clip.number,
            "prompt": request.prompt,
            "seed": request.seed,
            "path": written.path.name,
            "kind": written.kind,
            "seconds": settings["seconds"],
            "took_seconds": took,
            "settings": {name: getattr(request, name) for name in _IN_MANIFEST},
        }
        add_to_manifest(self._folder / MANIFEST, entry)
        self._reporter.sample(
            written.path,
            written.kind,
            width=request.width,
            height=request.height,
            frames=request.frames,
            fps=request.fps,
            seconds=settings["seconds"],
            seed=request.seed,
            prompt=request.prompt,
            step=step,
            epoch=epoch,
            index=clip.number,
            took_seconds=took,
        )

    def _warn(self, text: str) -> None:
        self._reporter.warning(Problem(FIELD, text))


def shown_epoch(position: Position) -> int:
    """The epoch as people count: the one at work, from 1; at the end of one that one, 0 before the first step."""
    return position.epoch if position.batch == 0 else position.epoch + 1


def add_to_manifest(path: Path, entry: dict[str, Any]) -> None:
    """Add one sample to the manifest, a file of JSON lines; an entry of the same file name is replaced.

    The file is written anew, so that readers never see half a line.
    """
    lines = path.read_text("utf-8").split("\n") if path.exists() else []
    kept = [line for line in lines if line and _path_of(line) != entry["path"]]
    write_atomic(path, "\n".join([*kept, json.dumps(entry, ensure_ascii=False)]) + "\n")


def _path_of(line: str) -> str | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry.get("path") if isinstance(entry, dict) else None


def _same_settings(path: Path, settings: dict[str, Any]) -> bool:
    try:
        found = read_settings(path)
    except UserError:
        return False
    wanted = json.loads(encode_settings(settings))
    return all(found.get(name) == wanted[name] for name in _COMPARED)


def _words(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text if text.endswith(".") else f"{text}."
