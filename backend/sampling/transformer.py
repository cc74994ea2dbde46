"""The DiT as sampling uses it: loaded once, LoRAs beside it, in 8 bit or with blocks in CPU memory if asked."""

from __future__ import annotations

import torch

from backend.config.generate import GenerateOptions
from backend.config.tasks import TASKS
from backend.errors import Problem
from backend.lora.network import attach_loras
from backend.model.attention import AttentionBackend
from backend.model.device import empty_cache
from backend.model.load import load_transformer
from backend.model.nabla import NablaConfig
from backend.model.offload import BlockSwap
from backend.model.quantize import quantise_blocks
from backend.sampling.settings import lora_strengths


class SamplingTransformer:
    """Callable as `denoise` needs it, with everything fixed that does not change between steps.

    Attributes:
        config: sizes of the loaded model.
        notice: something the person should know about how it runs, or None.
    """

    def __init__(
        self,
        options: GenerateOptions,
        path: str,
        device: torch.device,
        dtype: torch.dtype,
        attention: AttentionBackend,
    ) -> None:
        task = TASKS[options.task]
        self._device = device
        self._scale_factor = task.scale_factor
        preset = task.nabla
        self._nabla = None if preset is None else NablaConfig(**vars(preset))
        on_host = options.fp8_base or options.blocks_to_swap > 0
        self._model = load_transformer(
            path,
            device=torch.device("cpu") if on_host else device,
            dtype=dtype,
            attention=attention,
            rope_bf16_rounding=options.rope_bf16_rounding,
        )
        self.config = self._model.config
        self.notice = self._notice(options)
        if options.fp8_base:
            quantise_blocks(self._model)
        attach_loras(self._model, lora_strengths(options))
        self._swap = BlockSwap(self._model, options.blocks_to_swap, device) if self._swaps(options) else None
        self.to_device()

    def _swaps(self, options: GenerateOptions) -> bool:
        return options.blocks_to_swap > 0 and self._device.type != "cpu"

    def _notice(self, options: GenerateOptions) -> Problem | None:
        if options.blocks_to_swap and self._device.type == "cpu":
            return Problem("blocks_to_swap", "changes nothing on a CPU: every block is in CPU memory already.")
        if self._nabla is not None:
            return Problem(
                "attention",
                "this task was trained with NABLA; its mask is applied exactly, but in a plain way that is slower than "
                "the sparse kernel of the official code.",
            )
        return None

    def to_cpu(self) -> None:
        """Park the model in CPU memory, so that the VAE has the device for itself."""
        self._model.to(torch.device("cpu"))
        empty_cache(self._device)

    def to_device(self) -> None:
        """Bring the model (but for swapped blocks) to the device."""
        if self._swap is not None:
            self._swap.place()
        else:
            self._model.to(self._device)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        text_embeds: torch.Tensor,
        pooled_embeds: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> torch.Tensor:
        """Velocity [1, F, H, W, 16] for inputs on the device."""
        return self._model(
            hidden_states, text_embeds, pooled_embeds, timesteps, scale_factor=self._scale_factor, nabla=self._nabla
        )
