"""The caching of latents, whole: look at the datasets, read ahead, encode, write behind, and continue where it was."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import closing
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch

from backend.caching.debug_views import debug_view
from backend.caching.encoding import LatentEncoder, reproducible_kernels
from backend.caching.latent_work import (
    LatentJob,
    LatentPlan,
    counted_notice,
    look_at_datasets,
    plan_latents,
    require_space,
    source_notices,
)
from backend.caching.ledger_command import prune_caches, run_ledger
from backend.caching.reading_ahead import ReadAhead
from backend.caching.share import Share
from backend.caching.writing import WriteBehind
from backend.config.cache import CacheLatentsOptions
from backend.config.cache_checks import check_cache_latents
from backend.config.dataset import load_dataset_config
from backend.data.cache_files import write_latent_cache
from backend.data.clips import read_item
from backend.data.formats import MediaError
from backend.data.items import source_stamp
from backend.data.latent_request import latent_recipe, nabla_mode, vae_path
from backend.data.media import MediaReader
from backend.data.recipes import LatentRecipe
from backend.data.scaling import Pixels
from backend.data.stamps import content_hash
from backend.errors import EngineError, Problems, Stopped, UserError
from backend.model.device import device_of_process
from backend.progress import Reporter

# Decoded frames that may wait for the encoder: three clips of 5 s at 512 x 768.
_AHEAD_BYTES = 512 << 20
_HASHES_REMEMBERED = 1024


def cache_latents(options: CacheLatentsOptions, reporter: Reporter, run_dir: Path | None = None) -> list[str]:
    """Do what `options` ask for; returns the cache folders, or the files of a report.

    Raises:
        Problems: anything that is wrong with the request or the datasets, found before the VAE is loaded; a full disk.
        EngineError: a fault of one phase.
        Stopped: somebody asked for it; caches that were written are whole.
    """
    problems = check_cache_latents(options, run_dir)
    if problems:
        raise Problems(problems)
    share = Share.of_process()
    config = load_dataset_config(str(options.dataset_config))
    if options.check:
        recipe = latent_recipe(options)
        return run_ledger(config, options, reporter, recipe, None, run_dir) if share.first else []
    if share.first:
        for notice in config.notices:
            reporter.warning(notice)
    device, recipe = _settle(options, share)
    reporter.phase("scan", "Looking at the datasets")
    # Several processes on one machine share its cores; one core is left to the encoder. Two at least: while one waits
    # for the disk or starts a file, the other decodes.
    workers = options.num_workers or max(2, ((os.cpu_count() or 2) - 1) // share.local_count)
    with MediaReader(workers) as reader:
        found = look_at_datasets(config, recipe, reader, reporter)
        if share.first:
            for entry, ledger in found:
                for notice in source_notices(entry, ledger):
                    reporter.warning(notice)
        plan = plan_latents(found, options.batch_size)
        work = _Work(options, reporter, recipe, plan, share.take(plan.groups), reader, workers)
        if options.debug_mode is not None:
            work.show()
        else:
            work.encode(device)
    if options.prune and share.first:
        prune_caches(config, options, reporter, recipe, None, run_dir)
    return [ledger.cache_directory for _, ledger in found]


def _settle(options: CacheLatentsOptions, share: Share) -> tuple[torch.device, LatentRecipe]:
    """Where to compute and how; what only shows items needs neither a device nor a VAE."""
    if options.debug_mode is not None:
        return torch.device("cpu"), LatentRecipe(nabla=nabla_mode(options))
    device = device_of_process(options.device, share.local_rank, cpu_only=share.cpu_only)
    # On a GPU half precision is what other trainers cache with.
    return device, latent_recipe(options, options.vae_dtype or ("float32" if device.type == "cpu" else "float16"))


class _Task(NamedTuple):
    """A job and the number of the group that it is encoded with."""

    group: int
    job: LatentJob


class _Frames(NamedTuple):
    """What was read of a job: its frames, and the hash of its source's content."""

    pixels: Pixels
    source_hash: str


class _Work:
    """The items of this process, and what has become of them."""

    def __init__(
        self,
        options: CacheLatentsOptions,
        reporter: Reporter,
        recipe: LatentRecipe,
        plan: LatentPlan,
        groups: list[list[LatentJob]],
        reader: MediaReader,
        workers: int,
    ) -> None:
        self.options, self.reporter, self.recipe, self.plan, self.groups = options, reporter, recipe, plan, groups
        self.reader, self.workers = reader, workers
        self.failed: list[tuple[LatentJob, Exception]] = []
        self.written = 0
        self.meter = reporter.item_meter(0, "items")
        self._hash_of = lru_cache(maxsize=_HASHES_REMEMBERED)(content_hash)

    def encode(self, device: torch.device) -> None:
        """Encode and write what is missing, or everything."""
        skip = self.options.skip_existing
        groups = [[job for job in group if self.plan.wanted(job, skip_existing=skip)] for group in self.groups]
        tasks = [_Task(number, job) for number, group in enumerate(groups) for job in group]
        valid = sum(map(len, self.groups)) - len(tasks)
        if not tasks:
            self.reporter.phase("vae", f"Nothing to cache: all {valid} latents can be used as they are.")
            return
        assert self.recipe.vae_dtype is not None
        require_space([task.job for task in tasks], self.plan, self.recipe.vae_dtype)
        with reproducible_kernels(cudnn=not self.options.disable_cudnn_backend):
            self.reporter.phase("load", "Loading the VAE")
            encoder = LatentEncoder.load(str(vae_path(self.options)), self.recipe, device)
            kept = f"; {valid} can be used as they are" if valid else ""
            self.reporter.phase("vae", f"Encoding {len(tasks)} items on {device}{kept}")
            try:
                self._encode_all(tasks, [len(group) for group in groups], encoder)
            except Stopped as stop:
                # Only now, when the writer has ended, is it known how many there are.
                raise Stopped(f"{stop} {self._so_far(len(tasks))}") from None
            except UserError as error:
                raise UserError(f"{error.message} {self._so_far(len(tasks))}", error.field) from error
            except OSError as error:
                raise EngineError(
                    f"A cache could not be written: {error}. {self._so_far(len(tasks))}", "save"
                ) from error
        self._tell_failures(len(tasks))
        self.reporter.say(f"{self.written} latents were written.")

    def show(self) -> None:
        """Show what would be encoded."""
        tasks = [_Task(number, job) for number, group in enumerate(self.groups) for job in group]
        workers = self.workers
        if self.options.debug_mode == "console":
            tasks = tasks[: self.options.console_num_images]
            workers = 1  # One after the other, so that they come in order.
        self.reporter.phase("decode", f"Showing {len(tasks)} items; nothing is encoded")
        view = debug_view(self.options)
        with closing(self._read(tasks, workers)) as read:
            for task, frames in read:
                self._stop_if_requested()
                if frames is not None:
                    path = view(task.job, frames.pixels)
                    if path is not None:
                        self.reporter.say(f"Written: {path}")
                self.meter.done(item=task.job.item.source.identity, dataset=task.job.entry.index)
        self._tell_failures(len(tasks))

    def _encode_all(self, tasks: list[_Task], sizes: list[int], encoder: LatentEncoder) -> None:
        """Read, encode in groups, write; `sizes` says how many tasks each group has."""
        self._stop_if_requested()
        gathered: dict[int, list[tuple[LatentJob, _Frames]]] = {}
        left = len(tasks)
        writer = WriteBehind()
        try:
            with closing(self._read(tasks, self.workers)) as read:
                for task, frames in read:
                    left -= 1
                    sizes[task.group] -= 1
                    members = gathered.setdefault(task.group, [])
                    if frames is None:
                        self.meter.done(item=task.job.item.source.identity, dataset=task.job.entry.index)
                    else:
                        members.append((task.job, frames))
                    if sizes[task.group] == 0:
                        self._encode_group(gathered.pop(task.group), encoder, writer)
                        if left:
                            self._stop_if_requested()
        finally:
            writer.finish()

    def _encode_group(
        self, members: list[tuple[LatentJob, _Frames]], encoder: LatentEncoder, writer: WriteBehind
    ) -> None:
        if not members:
            return
        encoded = encoder.encode([job.item for job, _ in members], [frames.pixels for _, frames in members])
        for (job, frames), (latents, image) in zip(members, encoded, strict=True):
            writer.put(partial(self._write, job, frames.source_hash, latents, image))

    def _write(self, job: LatentJob, source_hash: str, latents: torch.Tensor, image: torch.Tensor) -> None:
        metadata = self.recipe.metadata(job.entry, job.item, job.item.stamp, source_hash)
        write_latent_cache(job.path, latents, image, metadata)
        self.written += 1
        self.meter.done(item=job.item.source.identity, dataset=job.entry.index)

    def _read(self, tasks: list[_Task], workers: int) -> Generator[tuple[_Task, _Frames | None]]:
        """Every task with its frames, or None if it failed, in the order in which they are ready."""
        self.meter = self.reporter.item_meter(len(tasks), "items")
        with ReadAhead(
            tasks,
            self._read_one,
            lambda task: task.job.pixel_bytes,
            workers=workers,
            limit_bytes=_AHEAD_BYTES,
            stopper=self.reader.close,
            waiting=self._stop_if_requested,
        ) as ahead:
            for task, result in ahead:
                if isinstance(result, _Frames):
                    yield task, result
                elif isinstance(result, UserError | EngineError):
                    # One bad file, also one that our own reading fails at, costs its items and not the night.
                    self.failed.append((task.job, result))
                    yield task, None
                else:
                    raise result

    def _read_one(self, task: _Task) -> _Frames:
        job = task.job
        if source_stamp(job.item.source) != job.item.stamp:
            raise UserError(f"{job.item.source.location} was changed a moment ago. Cache it again.")
        # Before the decoding: what changes the file meanwhile then makes the cache stale and not wrong.
        try:
            digest = self._hash_of(job.item.source.location)
        except OSError as error:
            raise UserError(f"{job.item.source.location} cannot be read: {error.strerror or error}.") from error
        return _Frames(read_item(self.reader, job.entry, job.item), digest)

    def _stop_if_requested(self) -> None:
        if self.reporter.requested() is not None:
            raise Stopped("Stopped as asked.")

    def _so_far(self, total: int) -> str:
        return f"{self.written} of {total} latents are written; continue with --skip_existing."

    def _tell_failures(self, total: int) -> None:
        """Say which items could not be read.

        Raises:
            Problems, EngineError: none of them could.
        """
        if not self.failed:
            return
        first = self.failed[0][1]
        if len(self.failed) == total:
            raise first
        listed = list(dict.fromkeys(f"{job.item.source.identity}: {_reason(error)}" for job, error in self.failed))
        self.reporter.warning(counted_notice(None, listed, len(self.failed), total, "items could not be read"))


def _reason(error: Exception) -> str:
    return error.reason if isinstance(error, MediaError) else str(error).splitlines()[0]
