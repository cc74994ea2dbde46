"""Adds LoRAs to a DiT checkpoint on disk: one tensor at a time, so that 40 GB need the memory of one layer."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from backend.config.checkpoint import CheckpointInfo, TensorInfo, identify
from backend.config.safetensors_header import INDEX_SUFFIX
from backend.errors import UserError
from backend.files import atomic_path, fsync_folder, require_free_space, write_atomic, write_problem
from backend.lora.architecture import known_layers
from backend.lora.convert import PRECISIONS
from backend.lora.formats import LoraWeights, read_lora
from backend.lora.merge import merged_weight
from backend.lora.network import check_strength
from backend.lora.targets import resolve
from backend.lora.tensor_stream import TORCH_DTYPES, TensorStream

METADATA_KEY = "k5_merged_loras"
_FLOATS = ("F64", "F32", "F16", "BF16")
_FORMAT_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Plan:
    """What is to be written: the checkpoint, the pairs of each of its layers, the format (None: as it is)."""

    info: CheckpointInfo
    parts: Mapping[str, Sequence[tuple[LoraWeights, float]]]
    dtype: torch.dtype | None
    metadata: dict[str, str]

    def format_of(self, tensor: TensorInfo) -> str:
        """The number format that a tensor gets in the output."""
        return _FORMAT_NAMES[self.dtype] if self.dtype is not None and tensor.dtype in _FLOATS else tensor.dtype


def merge_checkpoint(
    dit: str | Path,
    loras: Sequence[tuple[str | Path, float]],
    output: str | Path,
    precision: str | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write the checkpoint `dit` plus LoRAs, each with its strength, to `output`; returns the written files.

    A file that ends in .safetensors gets everything; another path becomes a new folder with the files, names and
    config.json of the input. Differences are added in float32 and rounded once to the tensor's own format, or to
    `precision`. Tensors without a LoRA are copied bit for bit. Whole or absent.

    Raises:
        UserError: the checkpoint is no DiT, is quantised or damaged, a LoRA does not fit, the format cannot hold a
            result, no space is left.
    """
    output = Path(output)
    plan = _plan(dit, loras, precision)
    header = plan.info.header
    needed = sum(tensor.elements * _bytes_of(plan.format_of(tensor)) for tensor in header.tensors.values())
    require_free_space(output.parent, needed + 1_000_000, "output")
    count = _Counter(len(header.tensors), progress)
    if output.suffix == ".safetensors":
        with atomic_path(output) as temporary:
            _write(plan, list(header.tensors), temporary, count)
        return [output]
    with _new_folder(output) as folder:
        for source in header.paths:
            mine = [tensor for tensor, info in header.tensors.items() if info.file == source]
            with atomic_path(folder / source.name) as temporary:
                _write(plan, mine, temporary, count)
        _copy_beside(plan, folder, needed)
    return [output / source.name for source in header.paths]


class _Counter:
    """Tells `progress` how many tensors are written."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress, self._done = total, progress, 0

    def step(self) -> None:
        """One more."""
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


def _plan(dit: str | Path, loras: Sequence[tuple[str | Path, float]], precision: str | None) -> _Plan:
    info = identify(dit)
    if info.kind != "dit":
        raise UserError(f"{dit} is not a Kandinsky 5 DiT but: {info.summary}. Give the path of the DiT.", "dit")
    if info.unsupported or info.config is None:
        raise UserError(f"{dit}: {info.unsupported} A LoRA cannot be added to quantised weights.", "dit")
    unknown = sorted({tensor.dtype for tensor in info.header.tensors.values()} - set(TORCH_DTYPES))
    if unknown:
        raise UserError(
            f"{dit} holds tensors in {', '.join(unknown)}, which cannot be merged. Use the bf16 one.", "dit"
        )
    targets = known_layers(info.config)
    parts: dict[str, list[tuple[LoraWeights, float]]] = {}
    notes = []
    for path, strength in loras:
        check_strength(strength)
        file = read_lora(path)
        notes.append({"name": file.path.name, "fingerprint": file.fingerprint, "strength": strength})
        for name, pair in resolve(file, targets).items():
            _refuse_other_shape(info, name, pair)
            if strength != 0.0:
                parts.setdefault(name, []).append((pair, strength))
    earlier = json.loads(info.header.metadata.get(METADATA_KEY, "[]"))
    metadata = {**info.header.metadata, METADATA_KEY: json.dumps([*earlier, *notes])}
    return _Plan(info, parts, PRECISIONS[precision] if precision else None, metadata)


def _refuse_other_shape(info: CheckpointInfo, name: str, pair: LoraWeights) -> None:
    key = info.key_map.get(f"{name}.weight")
    shape = info.header.tensors[key].shape if key else None
    if shape != (pair.up.shape[0], pair.down.shape[1]):
        raise UserError(f"The DiT has no {name}.weight that the LoRA fits; it is incomplete. Download it again.", "dit")


def _bytes_of(dtype: str) -> int:
    return TORCH_DTYPES[dtype].itemsize


def _write(plan: _Plan, names: Sequence[str], path: Path, count: _Counter) -> None:
    """Write the tensors `names` (as the files call them), which may come from several files, to one file."""
    header = plan.info.header
    layers = {key: name.removesuffix(".weight") for name, key in plan.info.key_map.items() if name.endswith(".weight")}
    # File by file, so that each input is opened once.
    names = sorted(names, key=lambda name: header.paths.index(header.tensors[name].file))
    announced = {name: (plan.format_of(header.tensors[name]), header.tensors[name].shape) for name in names}
    with TensorStream(path, announced, plan.metadata) as stream:
        for source in header.paths:
            mine = [name for name in names if header.tensors[name].file == source]
            if not mine:
                continue
            try:
                with safe_open(source, framework="pt", device="cpu") as handle:
                    for name in mine:
                        parts = plan.parts.get(layers.get(name, ""), ())
                        stream.write(name, _result(handle.get_tensor(name), parts, announced[name][0], name))
                        count.step()
            except SafetensorError as error:
                raise UserError(f"{source} cannot be read to its end ({error}). Download it again.", "dit") from error


def _result(tensor: Tensor, parts: Sequence[tuple[LoraWeights, float]], dtype: str, name: str) -> Tensor:
    wanted = TORCH_DTYPES[dtype]
    if not parts and tensor.dtype == wanted:
        return tensor
    exact = merged_weight(tensor, parts) if parts else tensor
    rounded = exact.to(wanted)
    if not torch.isfinite(rounded).all() and torch.isfinite(exact).all():
        raise UserError(f"{name} does not fit into {dtype}: a value is too large. Use bf16 or fp32.", "save_precision")
    return rounded


@contextmanager
def _new_folder(final: Path) -> Iterator[Path]:
    """A temporary folder beside `final` that becomes `final` when the block ends well, and is removed otherwise."""
    temporary = final.with_name(f".{final.name[:20]}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        fsync_folder(temporary)
        temporary.rename(final)
        fsync_folder(final.parent)
    except OSError as error:
        problem = write_problem(error, final, "output")
        if problem is error:
            raise
        raise problem from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy_beside(plan: _Plan, folder: Path, total_bytes: int) -> None:
    """The index of the shards, with the size of the new ones, and the config.json of a diffusers folder."""
    header = plan.info.header
    source = header.paths[0].parent
    if len(header.paths) > 1:
        indexes = sorted(path for path in source.iterdir() if path.name.endswith(INDEX_SUFFIX))
        own = [path for path in indexes if header.paths[0].name in path.read_text("utf-8")]
        weight_map = {name: info.file.name for name, info in header.tensors.items()}
        document = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        write_atomic(folder / own[0].name, json.dumps(document, indent=2, sort_keys=True) + "\n")
    config = source / "config.json"
    if plan.info.layout == "diffusers" and config.is_file():
        write_atomic(folder / "config.json", config.read_bytes())
