"""One run of generation, whole: check, embed the text, encode given images, denoise every clip, decode, write.

Each part of the model is loaded once for a run, however many prompts it has, and only one of them occupies the device
at a time: text encoders, then the VAE for given images, then the DiT, then the VAE again.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from backend.config.checks import check_generate, weight_paths
from backend.config.generate import GenerateOptions
from backend.config.prompts import ClipRequest, plan_clips
from backend.config.tasks import TASKS, latent_frames
from backend.errors import EngineError, K5Error, Problems, Stopped, UserError
from backend.model.attention import resolve_attention
from backend.model.device import empty_cache, resolve_device, resolve_dtype
from backend.progress import Reporter, StepMeter, StopRequest
from backend.sampling.condition import GivenFrames, fit_image, load_image, normalise_first_frames
from backend.sampling.denoise import TextCondition, denoise
from backend.sampling.outputs import read_latent
from backend.sampling.save import save_clip
from backend.sampling.schedule import draw_noise, seeded_generator, sigma_grid
from backend.sampling.settings import clip_settings, loras_record, weights_record
from backend.sampling.transformer import SamplingTransformer
from backend.text.cache import PromptEmbeds
from backend.text.embed import embed_prompts
from backend.vae.hunyuan import Vae, load_vae
from backend.vae.tiling import SPATIAL_FACTOR, Tiling, choose_tiling, pixel_frames


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


@contextmanager
def _phase(reporter: Reporter, name: str, message: str) -> Iterator[None]:
    """A phase of the run: announced, and named in whatever goes wrong inside it."""
    reporter.phase(name, message)
    try:
        yield
    except K5Error:
        raise
    except torch.OutOfMemoryError as error:
        advice = "Use a smaller size, fewer frames, --fp8_base or --blocks_to_swap."
        raise EngineError(f"The device ran out of memory while it worked on '{message}'. {advice}", name) from error
    except (RuntimeError, ValueError, MemoryError, OSError) as error:
        raise EngineError(f"{message}: {error}", name) from error


@dataclass
class _Clip:
    """A clip on its way: its request, its given frames, and at last its latents."""

    number: int
    request: ClipRequest
    given: GivenFrames | None = None
    latents: torch.Tensor | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def draw_noise(self) -> tuple[torch.Tensor, torch.Generator]:
        """The noise of its seed and the generator behind it; drawn when needed, as that of many clips is gigabytes."""
        generator = seeded_generator(self.request.seed)
        size = latent_frames(self.request.frames), self.request.height // 8, self.request.width // 8
        return draw_noise(generator, *size), generator


class _Run:
    """What making and mere decoding share: device, formats, the VAE that is loaded once, and the writing."""

    def __init__(self, options: GenerateOptions, reporter: Reporter, run_dir: Path | None) -> None:
        self.options = options
        self.reporter = reporter
        self.task = TASKS[options.task]
        self.paths = weight_paths(options)
        self.device = resolve_device(options.device)
        self.dtype = resolve_dtype(options.dtype, self.device)
        self.plan = plan_clips(options, run_dir)
        for notice in self.plan.notices:
            reporter.warning(notice)

    @cached_property
    def vae(self) -> Vae:
        """The VAE, loaded at its first use and kept in CPU memory between uses."""
        assert self.paths.vae is not None
        self.reporter.phase("vae", "Loading the VAE")
        return load_vae(self.paths.vae, device=torch.device("cpu"), dtype=self.dtype, tiling=Tiling())

    @contextmanager
    def vae_on_device(self, width: int, height: int, frames: int) -> Iterator[Vae]:
        """The VAE on the device, cut as the options and the size of the clip ask for."""
        self.vae.tiling = self.tiling(width, height, frames)
        try:
            yield self.vae.to(self.device)
        finally:
            self.vae.to(torch.device("cpu"))
            empty_cache(self.device)

    def tiling(self, width: int, height: int, frames: int) -> Tiling:
        """--vae_tiling: auto follows the size, on cuts frames above 256 px, off decodes whole frames."""
        chosen = choose_tiling(width, height, frames)
        if self.options.vae_tiling == "off":
            return Tiling(temporal_enabled=chosen.temporal_enabled, spatial_enabled=False)
        if self.options.vae_tiling == "on":
            return Tiling(spatial_enabled=True, spatial_tile=256, spatial_stride=192)
        return chosen

    def write(self, clip: ClipRequest, latents: torch.Tensor, settings: dict[str, Any], number: int) -> None:
        """Decode (unless only latents are asked for) and write the files of one clip.

        Args:
            latents: [16, F, H, W] float32.
        """
        pixels = None
        if self.options.output_type != "latent":
            message = f"Decoding clip {number}/{len(self.plan.clips)}" if len(self.plan.clips) > 1 else "Decoding"
            with (
                _phase(self.reporter, "decode", message),
                self.vae_on_device(settings["width"], settings["height"], settings["frames"]) as vae,
            ):
                settings = settings | {"vae_tiling": vae.tiling.to_metadata()}
                pixels = vae.decode(latents[None])[0]
        with _phase(self.reporter, "save", "Writing"):
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
        with _phase(self.reporter, "load", "Loading the DiT"):
            transformer = SamplingTransformer(
                self.options, self.paths.dit or "", self.device, self.dtype, self.attention
            )
        self._check_text_sizes(transformer, embeds)
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
        """Embeddings of every prompt of the run, negative prompts only where guidance uses them."""
        texts = [clip.prompt for clip in self.plan.clips]
        texts += [clip.negative_prompt for clip in self.plan.clips if abs(clip.guidance - 1.0) > 1e-6]
        texts = list(dict.fromkeys(texts))
        with _phase(
            self.reporter, "text", "Reading the prompt" if len(self.plan.clips) == 1 else "Reading the prompts"
        ):
            embedded = embed_prompts(
                texts,
                qwen=self.paths.text_encoder_qwen or "",
                clip=self.paths.text_encoder_clip or "",
                device=self.device,
                dtype=self.dtype,
                cache_dir=text_cache_folder(self.options),
                template="video",
                max_length=self.task.max_text_tokens,
                on_progress=lambda message, done, total: self.reporter.progress(done, total, "prompts", message),
                on_warning=lambda text: self.reporter.warning(UserError(text, "prompt").problems[0]),
            )
        return dict(zip(texts, embedded, strict=True))

    def _check_text_sizes(self, transformer: SamplingTransformer, embeds: dict[str, PromptEmbeds]) -> None:
        config, sample = transformer.config, next(iter(embeds.values()))
        pairs = (
            ("text_encoder_qwen", sample.text.shape[-1], config.in_text_dim),
            ("text_encoder_clip", sample.pooled.shape[-1], config.in_text_dim2),
        )
        for name, found, expected in pairs:
            if found != expected:
                raise UserError(
                    f"gives {found} numbers a token, but this DiT was trained with {expected}. Choose its own encoder.",
                    name,
                )

    def _prepare_clips(self) -> list[_Clip]:
        """The given frames of each clip (image to video); one generator a clip, noise drawn first."""
        clips = []
        for number, request in enumerate(self.plan.clips, start=1):
            clip = _Clip(number, request)
            if request.image is not None:
                _, generator = clip.draw_noise()
                with (
                    _phase(self.reporter, "vae", "Encoding the image"),
                    self.vae_on_device(request.width, request.height, 1) as vae,
                ):
                    first = self._encode(vae, request.image, "image", request, generator)
                    last = request.image_last
                    clip.given = GivenFrames(
                        first, self._encode(vae, last, "image_last", request, generator) if last else None
                    )
            clips.append(clip)
        return clips

    def _encode(self, vae: Vae, path: str, name: str, request: ClipRequest, generator: torch.Generator) -> torch.Tensor:
        pixels = fit_image(load_image(path, name), request.width, request.height)
        latents = vae.encode(pixels.to(self.device, self.dtype), generator=generator)
        return latents.permute(0, 2, 3, 4, 1).float().cpu()

    def _denoise_all(
        self, transformer: SamplingTransformer, clips: list[_Clip], embeds: dict[str, PromptEmbeds]
    ) -> StopRequest | None:
        """Denoise the clips in order; returns the request that ended it early, if one did."""
        meter = self.reporter.step_meter(len(clips), sum(clip.request.steps for clip in clips))
        for clip in clips:
            with _phase(self.reporter, "denoise", f"Denoising: {clip.request.prompt[:80]}"):
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
        self, transformer: SamplingTransformer, clip: _Clip, embeds: dict[str, PromptEmbeds], meter: StepMeter
    ) -> StopRequest | None:
        request = clip.request
        requests: list[StopRequest] = []

        def before_step(index: int) -> bool:
            if index:
                meter.step(clip.number, index, request.steps)
            asked = self.reporter.requested()
            if asked is not None:
                requests.append(asked)
                clip.notes["stopped_at_step"] = index
            return asked is not None

        meter.begin_clip()
        given = clip.given and GivenFrames(
            clip.given.first.to(self.device), clip.given.last.to(self.device) if clip.given.last is not None else None
        )
        latents = denoise(
            transformer,
            clip.draw_noise()[0].to(self.device),
            self._condition(embeds[request.prompt]),
            self._condition(embeds[request.negative_prompt]) if request.negative_prompt in embeds else None,
            sigma_grid(request.steps, request.scheduler_scale).to(self.device),
            request.guidance,
            given,
            before_step,
            transformer.config.in_channels,
        )
        if requests:
            if requests[0] == "stop" or clip.notes["stopped_at_step"] == 0:
                return requests[0]
        else:
            meter.step(clip.number, request.steps, request.steps)
        if given is not None:
            latents = normalise_first_frames(latents)
        if not bool(torch.isfinite(latents).all()):
            raise EngineError("The model gave values that are not numbers. Use --dtype float32 or bfloat16.", "denoise")
        clip.latents = latents[0].permute(3, 0, 1, 2).float().cpu().contiguous()
        return requests[0] if requests else None

    def _condition(self, embeds: PromptEmbeds) -> TextCondition:
        return TextCondition(
            embeds.text[None].to(self.device, self.dtype), embeds.pooled[None].to(self.device, self.dtype)
        )

    def _write_clip(self, clip: _Clip) -> None:
        assert clip.latents is not None
        computed = {"device": str(self.device), "dtype": str(self.dtype).removeprefix("torch.")}
        computed |= {"attention": self.attention.name} | clip.notes
        settings = clip_settings(clip.request, *self.records, computed)
        self.write(clip.request, clip.latents, settings, clip.number)


class _LatentDecoding(_Run):
    """From a latent file to a clip or images."""

    def run(self) -> None:
        assert self.options.latent_path is not None
        with _phase(self.reporter, "load", "Reading the latents"):
            latents, settings = read_latent(self.options.latent_path)
        # What the tensor itself says beats what the file's text says of it.
        frames, fps = pixel_frames(latents.shape[1]), self.options.fps
        settings = {"seed": None, **settings, "options": settings["options"] | {"fps": fps}}
        settings |= {"width": latents.shape[3] * SPATIAL_FACTOR, "height": latents.shape[2] * SPATIAL_FACTOR}
        settings |= {"frames": frames, "fps": fps, "seconds": round(frames / fps, 4)}
        self.write(self.plan.clips[0], latents, settings, 1)


def text_cache_folder(options: GenerateOptions) -> Path:
    """Where text embeddings are kept: the folder asked for, else the user's cache folder."""
    if options.text_cache_dir is not None:
        return Path(options.text_cache_dir)
    return Path.home() / ".cache" / "k5-studio" / "text"
