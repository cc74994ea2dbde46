"""One run of generation, whole: check, embed the text, encode given images, denoise every clip, decode, write.

Each part of the model is loaded once for a run, however many prompts it has, and only one of them occupies the device
at a time: text encoders, then the VAE for given images, then the DiT, then the VAE again.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch

from backend.config.checks import check_generate, weight_paths
from backend.config.generate import GenerateOptions
from backend.config.prompts import ClipRequest, plan_clips
from backend.config.tasks import TASKS
from backend.errors import Problems, Stopped
from backend.model.attention import resolve_attention
from backend.model.device import empty_cache, resolve_device, resolve_dtype
from backend.progress import Reporter, StepMeter, StopRequest
from backend.sampling.clip_vae import ClipVae
from backend.sampling.clips import Clip, denoise_clip, finished_latents
from backend.sampling.outputs import read_latent
from backend.sampling.phases import phase
from backend.sampling.prompt_embeds import check_text_sizes, embed_clips
from backend.sampling.save import save_clip
from backend.sampling.settings import clip_settings, loras_record, weights_record
from backend.sampling.transformer import SamplingTransformer
from backend.text.cache import PromptEmbeds
from backend.vae.tiling import SPATIAL_FACTOR, pixel_frames


def generate(options: GenerateOptions, reporter: Reporter, run_dir: Path | None = None) -> list[str]:
    """Make every clip that `options` asks for; returns the paths of the files, as the journal names them.

    Raises:
        Problems: anything that is wrong with the request, found before weights are loaded.
        EngineError: a fault of one phase.
        Stopped: somebody asked for it; clips that were denoised by then are written first.
    """
    problems = check_generate(options, run_dir)
    if problems:
        raise Problems(problems)
    if options.latent_path is not None:
        _LatentDecoding(options, reporter, run_dir).run()
    else:
        _Generation(options, reporter, run_dir).run()
    return reporter.outputs


class _Run:
    """What making and mere decoding share: device, formats, the VAE that is loaded once, and the writing."""

    def __init__(self, options: GenerateOptions, reporter: Reporter, run_dir: Path | None) -> None:
        self.options = options
        self.reporter = reporter
        self.task = TASKS[options.task]
        self.paths = weight_paths(options)
        self.device = resolve_device(options.device)
        self.dtype = resolve_dtype(options.dtype, self.device)
        self.vae = ClipVae(self.paths.vae or "", self.device, self.dtype, options.vae_tiling, reporter)
        self.plan = plan_clips(options, run_dir)
        for notice in self.plan.notices:
            reporter.warning(notice)

    def write(self, clip: ClipRequest, latents: torch.Tensor, settings: dict[str, Any], number: int) -> None:
        """Decode (unless only latents are asked for) and write the files of one clip.

        Args:
            latents: [16, F, H, W] float32.
        """
        pixels = None
        if self.options.output_type != "latent":
            message = f"Decoding clip {number}/{len(self.plan.clips)}" if len(self.plan.clips) > 1 else "Decoding"
            with phase(self.reporter, "decode", message):
                pixels, tiling = self.vae.decode(latents)
                settings = settings | {"vae_tiling": tiling.to_metadata()}
        with phase(self.reporter, "save", "Writing"):
            for written in save_clip(clip, self.options, latents, pixels, settings):
                self.reporter.sample(
                    written.path,
                    written.kind,
                    width=settings["width"],
                    height=settings["height"],
                    frames=settings["frames"],
                    fps=settings["fps"],
                    seconds=settings["seconds"],
                    seed=settings["seed"],
                    prompt=settings["options"].get("prompt", ""),
                    item=number,
                )


class _Generation(_Run):
    """From prompts to files."""

    def run(self) -> None:
        self.attention = resolve_attention(self._attention_name(), device=self.device, dtype=self.dtype)
        embeds = self._embed()
        clips = self._prepare_clips()
        self._stop_if_requested()
        with phase(self.reporter, "load", "Loading the DiT"):
            transformer = SamplingTransformer(
                self.options, self.paths.dit or "", self.device, self.dtype, self.attention
            )
        check_text_sizes(transformer.config, embeds)
        if transformer.notice:
            self.reporter.warning(transformer.notice)
        self.records = weights_record(self.options), loras_record(self.options)
        stop = self._denoise_all(transformer, clips, embeds)
        del transformer
        gc.collect()
        empty_cache(self.device)
        for clip in clips:
            if clip.latents is not None:
                self._write_clip(clip)
        if stop is not None:
            raise Stopped(f"Stopped as asked; {len(self.reporter.outputs)} file(s) were written.")

    def _attention_name(self) -> str | None:
        return None if self.options.attention == "auto" else self.options.attention

    def _stop_if_requested(self) -> None:
        if self.reporter.requested() is not None:
            raise Stopped("Stopped as asked, before the first step.")

    def _embed(self) -> dict[str, PromptEmbeds]:
        message = "Reading the prompt" if len(self.plan.clips) == 1 else "Reading the prompts"
        with phase(self.reporter, "text", message):
            return embed_clips(
                self.plan.clips,
                self.paths,
                device=self.device,
                dtype=self.dtype,
                max_tokens=self.task.max_text_tokens,
                cache_dir=self.options.text_cache_dir,
                reporter=self.reporter,
            )

    def _prepare_clips(self) -> list[Clip]:
        """The given frames of each clip (image to video); one generator a clip, noise drawn first."""
        clips = []
        for number, request in enumerate(self.plan.clips, start=1):
            clip = Clip(number, request)
            if request.image is not None:
                _, generator = clip.draw_noise()
                with phase(self.reporter, "vae", "Encoding the image"):
                    clip.given = self.vae.encode_given(request, generator)
            clips.append(clip)
        return clips

    def _denoise_all(
        self, transformer: SamplingTransformer, clips: list[Clip], embeds: dict[str, PromptEmbeds]
    ) -> StopRequest | None:
        """Denoise the clips in order; returns the request that ended it early, if one did."""
        meter = self.reporter.step_meter(len(clips), sum(clip.request.steps for clip in clips))
        for clip in clips:
            with phase(self.reporter, "denoise", f"Denoising: {clip.request.prompt[:80]}"):
                stop = self._denoise(transformer, clip, embeds, meter)
            if self.options.offload_dit_during_sampling and clip.latents is not None:
                transformer.to_cpu()
                self._write_clip(clip)
                clip.latents = None
                transformer.to_device()
            if stop is not None:
                return stop
        return None

    def _denoise(
        self, transformer: SamplingTransformer, clip: Clip, embeds: dict[str, PromptEmbeds], meter: StepMeter
    ) -> StopRequest | None:
        steps = clip.request.steps
        requests: list[StopRequest] = []

        def before_step(index: int) -> bool:
            if index:
                meter.step(clip.number, index, steps)
            asked = self.reporter.requested()
            if asked is not None:
                requests.append(asked)
                clip.notes["stopped_at_step"] = index
            return asked is not None

        meter.begin_clip()
        channels = transformer.config.in_channels
        latents = denoise_clip(transformer, clip, embeds, self.device, self.dtype, channels, before_step)
        if not requests:
            meter.step(clip.number, steps, steps)
        elif requests[0] == "stop" or clip.notes["stopped_at_step"] == 0:
            return requests[0]
        clip.latents = finished_latents(clip, latents)
        return requests[0] if requests else None

    def _write_clip(self, clip: Clip) -> None:
        assert clip.latents is not None
        computed = {"device": str(self.device), "dtype": str(self.dtype).removeprefix("torch.")}
        computed |= {"attention": self.attention.name} | clip.notes
        settings = clip_settings(clip.request, *self.records, computed)
        self.write(clip.request, clip.latents, settings, clip.number)


class _LatentDecoding(_Run):
    """From a latent file to a clip or images."""

    def run(self) -> None:
        assert self.options.latent_path is not None
        with phase(self.reporter, "load", "Reading the latents"):
            latents, settings = read_latent(self.options.latent_path)
        # What the tensor itself says beats what the file's text says of it.
        frames, fps = pixel_frames(latents.shape[1]), self.options.fps
        settings = {"seed": None, **settings, "options": settings["options"] | {"fps": fps}}
        settings |= {"width": latents.shape[3] * SPATIAL_FACTOR, "height": latents.shape[2] * SPATIAL_FACTOR}
        settings |= {"frames": frames, "fps": fps, "seconds": round(frames / fps, 4)}
        self.write(self.plan.clips[0], latents, settings, 1)
