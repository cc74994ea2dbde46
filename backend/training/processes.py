"""The processes that train together: which one this is, what it computes on, and the few things that they exchange.

Only gradients of the LoRA are exchanged, so the model needs no wrapper: every process has the whole frozen model (with
FSDP its share of it, see `backend.training.sharding`) and the whole LoRA, and the sum of all gradients is divided by
the number of batches. A process that was started alone needs no launcher and does not import accelerate.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from backend.config.train import TrainOptions
from backend.errors import EngineError, UserError
from backend.model.device import device_of_process

_TRUE = ("1", "true", "yes", "on")
# The others wait while the first process makes samples, which may take hours; one that dies is noticed at once anyway.
_PATIENCE = timedelta(hours=24)
# Gradients travel in pieces of at most so many numbers (128 MiB), so that no second copy of all of them is needed.
_PIECE = 32 << 20
_SHARDED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
# Inputs of one forward pass travel with what they are: given or not, dtype, number of dimensions, up to five sizes.
_INPUTS = 5
_SIZES = 5
_DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.bool)


class Processes:
    """Process `rank` (from 0) of `count`, computing on `device`; inside a `with` block they can talk to each other.

    Attributes:
        distributed_type: accelerate's name of how they work together ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP").
        sharded: whether the launch asks for FSDP, which splits the frozen model.
    """

    def __init__(self, options: TrainOptions, environment: Mapping[str, str] | None = None) -> None:
        """Read the launch; nothing is connected yet.

        Raises:
            UserError: DeepSpeed is asked for, or FSDP for one process; the environment contradicts itself, or there is
                no such device.
        """
        values = os.environ if environment is None else environment
        for name, shown in _SHARDED.items():
            if values.get(name, "").lower() in _TRUE:
                raise UserError(
                    f"This was launched with {shown}, which is not supported. Launch with --multi_gpu, where each "
                    "process keeps a whole model, or with --use_fsdp --fsdp_version 2, which splits it."
                )
        self.rank, self.count, local_rank = _place(values)
        self.sharded = values.get("ACCELERATE_USE_FSDP", "").lower() in _TRUE
        if self.sharded and self.count == 1:
            raise UserError(
                "FSDP splits the model over several processes, and only one was started. Start at least two "
                "(--num_processes), or launch without FSDP."
            )
        cpu_only = values.get("ACCELERATE_USE_CPU", "").lower() in _TRUE
        self.device = device_of_process(options.device, local_rank, cpu_only=cpu_only)
        # Processes that fall back to a CPU without being told so are a launch for GPUs that this machine lacks.
        self._meant_for_cpu = self.device.type == "cpu" and (cpu_only or options.device == "cpu")
        self.distributed_type = "NO"
        self._patience = timedelta(minutes=options.ddp_timeout) if options.ddp_timeout else _PATIENCE

    @property
    def first(self) -> bool:
        """Whether this process writes the files and speaks for all."""
        return self.rank == 0

    def __enter__(self) -> Processes:
        if self.count == 1:
            return self
        from accelerate import PartialState  # takes seconds, and one process does not need it

        alone = self.device.type == "cpu" and not self._meant_for_cpu
        if not alone:
            try:
                state = PartialState(cpu=self._meant_for_cpu, timeout=self._patience)
            except (ValueError, RuntimeError) as error:
                raise UserError(
                    f"The {self.count} processes could not be connected: {error}. Start all of them with one "
                    "accelerate launch or torchrun."
                ) from error
            self.distributed_type = str(state.distributed_type.value)
            alone = self.distributed_type == "NO" or state.num_processes != self.count or not dist.is_initialized()
        if alone:
            raise UserError(
                f"{self.count} processes were started, but they do not work together: each would train for itself and "
                "write the same files. On CPUs set ACCELERATE_USE_CPU=true before the launch, or add --device cpu; on "
                "GPUs start as many processes as there are GPUs."
            )
        if self.sharded:
            # Accelerate calls it so on GPUs only, and makes whole copies on CPUs; here the model is split on both.
            self.distributed_type = "FSDP"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Wait until all have come here."""
        if self.count > 1:
            with _partners():
                dist.barrier()

    def from_first(self, value: int) -> int:
        """The first process's `value`, below 2**63, in all of them."""
        return int(self._sum(torch.tensor([value if self.first else 0], dtype=torch.int64))[0])

    def any_of(self, found: Collection[str], names: Sequence[str]) -> set[str]:
        """Those of `names` that at least one process has found."""
        total = self._sum(torch.tensor([int(name in found) for name in names], dtype=torch.int64))
        return {name for name, count in zip(names, total.tolist(), strict=True) if count}

    def mesh(self) -> DeviceMesh | None:
        """All processes in a row, to split the model over; None when each has a whole one."""
        return init_device_mesh(self.device.type, (self.count,)) if self.sharded else None

    def send(self, inputs: Sequence[Tensor | None] | None) -> None:
        """For the first process: give the others the inputs of a forward pass; None says that there are no more."""
        header = torch.zeros(1 + _INPUTS * (3 + _SIZES), dtype=torch.int64)
        given = list(inputs or ())
        header[0] = len(given)
        for number, tensor in enumerate(given):
            if tensor is not None:
                place = 1 + number * (3 + _SIZES)
                about = [1, _DTYPES.index(tensor.dtype), tensor.ndim, *tensor.shape]
                header[place : place + len(about)] = torch.tensor(about)
        self._from_first(header.to(self.device))
        for tensor in given:
            if tensor is not None:
                self._from_first(_as_numbers(tensor).contiguous())

    def receive(self) -> list[Tensor | None] | None:
        """For the others: the inputs that the first process has sent, on this one's device, or None for no more."""
        header = torch.zeros(1 + _INPUTS * (3 + _SIZES), dtype=torch.int64, device=self.device)
        self._from_first(header)
        count, *about = header.tolist()
        if count == 0:
            return None
        inputs: list[Tensor | None] = []
        for number in range(count):
            given, dtype, dimensions, *sizes = about[number * (3 + _SIZES) : (number + 1) * (3 + _SIZES)]
            tensor = None
            if given:
                tensor = torch.empty(sizes[:dimensions], dtype=_DTYPES[dtype], device=self.device)
                self._from_first(_as_numbers(tensor))
            inputs.append(tensor)
        return inputs

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum of all processes' `values`, a CPU tensor of one shape and dtype; the same in all."""
        return self._sum(values.clone())

    def mean_gradients(self, parameters: Sequence[torch.nn.Parameter], batches: int) -> None:
        """Replace gradients, each the sum over a process's own batches, by the mean over all `batches`.

        A process that had no batch in this step (None gradients) adds nothing.
        """
        with torch.no_grad():
            if self.count > 1:
                for piece in _pieces(parameters):
                    self._add_up(piece)
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if batches > 1 and gradients:
                torch._foreach_div_(gradients, float(batches))

    def _add_up(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        given = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=self.device)
        gradients = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in parameters
        ]
        flat = torch.cat([given, *(gradient.reshape(-1) for gradient in gradients)])
        with _partners():
            dist.all_reduce(flat)
        sizes = [len(parameters), *(parameter.numel() for parameter in parameters)]
        total, *sums = flat.split(sizes)
        for parameter, gradient, count, values in zip(parameters, gradients, total.tolist(), sums, strict=True):
            # One that no process has a gradient of keeps none: optimizers leave it alone then, as with one process.
            parameter.grad = gradient.copy_(values.view_as(gradient)) if count else None

    def _from_first(self, tensor: Tensor) -> None:
        with _partners():
            dist.broadcast(tensor, 0)

    def _sum(self, values: Tensor) -> Tensor:
        if self.count == 1:
            return values
        moved = values.to(self.device)
        with _partners():
            dist.all_reduce(moved)
        return moved.cpu()


def _place(values: Mapping[str, str]) -> tuple[int, int, int]:
    """Rank, count and rank on this machine, as launchers say it in the environment."""
    try:
        rank, count = int(values.get("RANK", 0)), int(values.get("WORLD_SIZE", 1))
        local_rank = int(values.get("LOCAL_RANK", rank))
    except ValueError:
        raise UserError("RANK, WORLD_SIZE and LOCAL_RANK in the environment must be whole numbers.") from None
    if not 0 <= rank < count or local_rank < 0:
        raise UserError(f"RANK is {rank} and WORLD_SIZE is {count}. Start all processes with one launcher.")
    return rank, count, local_rank


def _as_numbers(tensor: Tensor) -> Tensor:
    """The same memory as something that every backend can send: gloo knows no bool."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def _pieces(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    piece: list[torch.nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if piece and size + parameter.numel() > _PIECE:
            yield piece
            piece, size = [], 0
        piece.append(parameter)
        size += parameter.numel()
    if piece:
        yield piece


@contextmanager
def _partners() -> Iterator[None]:
    """Say in words what a broken exchange means: its own text speaks of sockets."""
    try:
        yield
    except RuntimeError as error:
        raise EngineError(
            f"Another process has ended or does not answer, so this one ends too; its own message says why. ({error})",
            "train",
        ) from error
