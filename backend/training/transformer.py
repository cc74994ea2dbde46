"""The DiT as training uses it: frozen, in 8 bit, its blocks checkpointed and swapped or split as asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from backend.config.tasks import TASKS, TaskPreset, WeightPaths
from backend.config.train import TrainOptions
from backend.errors import Problem, UserError
from backend.lora.merge import merge_loras
from backend.model.attention import AttentionBackend
from backend.model.checkpointing import HostMemory, checkpoint_blocks
from backend.model.device import empty_cache
from backend.model.load import load_transformer
from backend.model.nabla import NablaConfig, check_nabla_size
from backend.model.offload import swap_layers
from backend.model.quantize import quantise_blocks
from backend.training.inputs import ModelInputs
from backend.training.sharding import shard_blocks

_FORCED_P = 0.9


class TrainingTransformer:
    """Loads and prepares the base model; LoRA layers are attached to `model` afterwards and are all that learns.

    In this order: weights loaded, `--base_weights` merged into them, quantised, frozen, checkpointed, swapped, split
    over the processes or else moved to the device. The model is in eval mode, so that only attached layers that are
    switched to training drop anything.

    Attributes:
        model: the DiT.
        attention: name of the attention implementation.
        config: its sizes.
        nabla: parameters of sparse attention, or None for dense attention.
        notices: what the person should know about how it runs.
        around: entered with the arguments of `velocity` around every forward pass, or None.
    """

    def __init__(
        self,
        options: TrainOptions,
        paths: WeightPaths,
        device: torch.device,
        dtype: torch.dtype,
        attention: AttentionBackend,
        mesh: DeviceMesh | None = None,
    ) -> None:
        """Load and prepare; `dtype` is float32 or bfloat16.

        With `mesh` the blocks are split over its processes, each of which loads the whole model into CPU memory before.

        Raises:
            UserError: an attention backend without gradients, weights or LoRAs that do not fit, more blocks to swap
                than there are.
        """
        if options.task is None or paths.dit is None:
            raise ValueError("A task and the path of its DiT are settled before the model is loaded.")
        if not attention.trains:
            raise UserError(f"{attention.name} has no gradients, so it cannot train. Use sdpa.", "attention")
        task = TASKS[options.task]
        self.device = device
        self.attention = attention.name
        self.nabla = nabla_config(options, task)
        self.notices: list[Problem] = []
        self.around: Callable[[Sequence[Tensor | None]], AbstractContextManager[None]] | None = None
        self._split = mesh is not None
        self._scale_factor = task.scale_factor
        swaps = options.blocks_to_swap > 0 and device.type != "cpu"
        quantised = options.fp8_base or options.fp8_scaled
        self.model = load_transformer(
            paths.dit,
            device=torch.device("cpu") if quantised or swaps or self._split else device,
            dtype=dtype,
            attention=attention,
            rope_bf16_rounding=options.rope_bf16_rounding,
        )
        self.config = self.model.config
        merge_loras(self.model, base_weights(options), field="base_weights")
        if quantised:
            quantise_blocks(self.model)
        self.model.requires_grad_(False)
        self._checkpoint(options)
        if swaps:
            swap_layers(self.model, options.blocks_to_swap, device)
        elif options.blocks_to_swap:
            self._notice("blocks_to_swap", "changes nothing on a CPU: every block is in CPU memory already.")
        if self.nabla is not None:
            self._notice(
                "attention",
                "this model trains with NABLA; its mask is applied exactly, but in a plain way that is slower than the "
                "sparse kernel of the official code.",
            )
        if mesh is not None:
            shard_blocks(self.model, mesh)
        else:
            self.to_device()

    def _checkpoint(self, options: TrainOptions) -> None:
        offloads = options.gradient_checkpointing_cpu_offload
        if offloads and self.device.type == "cpu":
            self._notice(
                "gradient_checkpointing_cpu_offload",
                "works as --gradient_checkpointing on a CPU: what it remembers is in CPU memory already.",
            )
        if offloads or options.gradient_checkpointing:
            checkpoint_blocks(self.model, HostMemory() if offloads and self.device.type != "cpu" else None)

    def _notice(self, field: str, message: str) -> None:
        self.notices.append(Problem(field, message))

    def check_size(self, latent_height: int, latent_width: int) -> None:
        """Refuse a size that the model cannot take; to be asked for every bucket before the first step.

        Raises:
            UserError: NABLA needs multiples of 128 pixels (16 latents), dense attention of 16 pixels.
        """
        if self.nabla is not None:
            check_nabla_size(latent_height, latent_width)
        _, rows, columns = self.config.patch_size
        if latent_height % rows or latent_width % columns:
            raise UserError(
                f"{latent_width * 8} x {latent_height * 8} pixels do not divide into the model's patches. "
                "Use sides that are multiples of 16."
            )

    def __call__(self, inputs: ModelInputs) -> Tensor:
        """Velocity, float32 [B, F, H, W, 16], of inputs on the device; gradients reach the attached LoRA."""
        return self.velocity(
            inputs.hidden_states, inputs.text, inputs.pooled, inputs.timesteps, text_mask=inputs.text_mask
        )

    @torch.no_grad()
    def predict_no_grad(self, inputs: ModelInputs) -> Tensor:
        """As calling it, for measurements: no dropout, and nothing is kept for a backward pass."""
        with self.evaluating():
            return self(inputs)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put every module into eval mode (no dropout) for the block, and back afterwards what was in training."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def velocity(
        self,
        hidden_states: Tensor,
        text_embeds: Tensor,
        pooled_embeds: Tensor,
        timesteps: Tensor,
        *,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Velocity from separate tensors, as the sampling loop has them; shapes as in `Kandinsky5Transformer`."""
        arguments = (hidden_states, text_embeds, pooled_embeds, timesteps)
        with nullcontext() if self.around is None else self.around((*arguments, text_mask)):
            return self.model(*arguments, text_mask=text_mask, scale_factor=self._scale_factor, nabla=self.nabla)

    def to_cpu(self) -> None:
        """Park the model, LoRA included, in CPU memory, so that something else has the device for itself.

        Not for a model that is split over processes.
        """
        self.model.to(torch.device("cpu"))
        empty_cache(self.device)

    def to_device(self) -> None:
        """Bring the model (but for the weights of swapped layers) to the device; parameters keep their identity.

        A model that is split over processes never leaves it.
        """
        if not self._split:
            self.model.to(self.device)


def base_weights(options: TrainOptions) -> list[tuple[str, float]]:
    """Each LoRA of `--base_weights` with its strength; missing strengths are 1."""
    strengths = [*options.base_weights_multiplier, *([1.0] * len(options.base_weights))]
    return list(zip(options.base_weights, strengths, strict=False))


def nabla_config(options: TrainOptions, task: TaskPreset) -> NablaConfig | None:
    """NABLA as the task has it, each parameter replaced by its flag; None when neither task nor options want it."""
    if task.nabla is None and not options.force_nabla_attention:
        return None
    preset = NablaConfig(_FORCED_P) if task.nabla is None else NablaConfig(**vars(task.nabla))
    given = {name: getattr(options, f"nabla_{name}") for name in ("P", "wT", "wH", "wW", "method", "add_sta")}
    return NablaConfig(**vars(preset) | {name: value for name, value in given.items() if value is not None})
