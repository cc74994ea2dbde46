"""From a batch of caches to what the model is given and what it should say: noise, times, given frames, captions.

The contract is that of generation: model time is 1000 * sigma, the text stands once (T3, B5), given frames are clean
with mask 1, condition channels are zero, and what is given has no loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from backend.config.tasks import TASKS
from backend.training.draws import generator
from backend.training.timesteps import MODEL_TIME, draw_sigmas, loss_weights
from backend.training.training_set import Batch, pad_texts

if TYPE_CHECKING:
    from backend.config.train_steps import TrainStepsOptions


@dataclass(frozen=True)
class ModelInputs:
    """One batch as the model takes it; B samples of F latent frames. Everything but masks is float32.

    Attributes:
        hidden_states: [B, F, H, W, in_channels]: the noisy latent with given frames clean, then, where the model has
            them, 16 condition channels (zeros) and the mask (1 on given frames).
        text, text_mask: [B, S, D], padded on the right, and bool [B, S]; None: all texts are equally long.
        pooled: [B, P].
        timesteps, sigmas: [B]; timesteps are 1000 * sigmas.
        target: [B, F, H, W, 16], noise - latents.
        loss_mask: bool [B, F], False on given frames.
        weights: [B], of the loss.
    """

    hidden_states: Tensor
    text: Tensor
    text_mask: Tensor | None
    pooled: Tensor
    timesteps: Tensor
    sigmas: Tensor
    target: Tensor
    loss_mask: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> ModelInputs:
        """The same on `device`."""
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return replace(self, **moved)


def make_inputs(
    batch: Batch,
    options: TrainStepsOptions,
    seed: int,
    epoch: int,
    b: int,
    in_channels: int,
    device: torch.device,
) -> ModelInputs:
    """Draw everything random of micro-batch `b` of `epoch` and put its inputs together on `device`.

    Args:
        in_channels: of the model: 16, or 33 with condition channels and mask.

    Raises:
        UserError: the options of the timesteps contradict each other.
    """
    count = batch.size
    noise = torch.randn(latent_shape(batch), generator=generator(seed, epoch, b, "noise"))
    sigmas = draw_sigmas(options, count, seed, epoch, b, batch.first_slot)
    chosen = torch.rand(count, generator=generator(seed, epoch, b, "frames")) < options.i2v_cond_prob
    dropped = torch.rand(count, generator=generator(seed, epoch, b, "captions")) < batch.caption_dropout
    given = given_frames(batch, options, chosen)
    weights = loss_weights(sigmas, options.weighting_scheme)
    return assemble(drop_captions(batch, dropped), noise, sigmas, given, weights, in_channels).to(device)


def latent_shape(batch: Batch) -> tuple[int, ...]:
    """(B, F, H, W, 16): the shape of a batch's noise and targets."""
    count, channels, frames, height, width = batch.latents.shape
    return count, frames, height, width, channels


def given_frames(batch: Batch, options: TrainStepsOptions, chosen: Tensor) -> Tensor:
    """Which frames are given: bool [B, F]; `chosen` bool [B] says which clips get their frames at all.

    Image to video gives the first frame, with `--i2v_mode first_last` the last one too. A still is trained as text to
    video: its only frame would be the answer itself (T20). Text to video gives none.
    """
    count, frames = batch.size, batch.latents.shape[2]
    given = torch.zeros(count, frames, dtype=torch.bool)
    if frames == 1 or options.task is None or TASKS[options.task].mode != "i2v":
        return given
    clips = chosen & torch.tensor([kind == "video" for kind in batch.kinds])
    given[:, 0] = clips
    if options.i2v_mode == "first_last":
        given[:, -1] = clips
    return given


def drop_captions(batch: Batch, dropped: Tensor) -> Batch:
    """The batch with text and pooled vector of the `dropped` samples (bool [B]) those of the empty caption.

    Raises:
        ValueError: the batch has no empty caption.
    """
    if not bool(dropped.any()):
        return batch
    empty_text, empty_pooled = batch.empty_text, batch.empty_pooled
    if empty_text is None or empty_pooled is None:
        raise ValueError("Captions are dropped, and the batch has no empty one.")
    lengths = [batch.text.shape[1]] * batch.size if batch.text_mask is None else batch.text_mask.sum(1).tolist()
    texts = [
        empty_text if drop else text[:length]
        for text, length, drop in zip(batch.text, lengths, dropped.tolist(), strict=True)
    ]
    text, mask = pad_texts(texts)
    pooled = torch.where(dropped[:, None], empty_pooled, batch.pooled)
    return replace(batch, text=text, text_mask=mask, pooled=pooled)


def assemble(
    batch: Batch, noise: Tensor, sigmas: Tensor, given: Tensor, weights: Tensor, in_channels: int
) -> ModelInputs:
    """Put inputs together from everything drawn, on the CPU.

    x = (1 - sigma) latents + sigma noise, and the target is noise - latents. Given frames are the cached single-image
    latents, clean (T6), with mask 1 there only (T5, B3); the condition channels stay zero (B4).

    Args:
        noise: [B, F, H, W, 16]. sigmas, weights: [B]. given: bool [B, F], in the first and the last frame only.

    Raises:
        ValueError: frames are given, and the model has no channels for them or the batch no single-image latents.
    """
    clean = batch.latents.permute(0, 2, 3, 4, 1)
    amount = sigmas[:, None, None, None, None]
    noisy = (1 - amount) * clean + amount * noise
    extra = in_channels - clean.shape[-1]
    if extra not in (0, clean.shape[-1] + 1):
        raise ValueError(f"A model with {in_channels} input channels is none of Kandinsky 5.")
    if bool(given.any()):
        if not extra or batch.latents_image is None:
            raise ValueError("Frames are given, but the model has no mask channel or the batch no first frames.")
        images = batch.latents_image.permute(0, 2, 3, 4, 1)
        for place, frame in ((0, 0), (-1, 1)):
            noisy[:, place] = torch.where(given[:, place, None, None, None], images[:, frame], noisy[:, place])
    if extra:
        condition = noisy.new_zeros((*noisy.shape[:-1], extra))
        condition[..., -1] = given[:, :, None, None].float()
        noisy = torch.cat([noisy, condition], dim=-1)
    return ModelInputs(
        hidden_states=noisy,
        text=batch.text,
        text_mask=batch.text_mask,
        pooled=batch.pooled,
        timesteps=MODEL_TIME * sigmas,
        sigmas=sigmas,
        target=noise - clean,
        loss_mask=~given,
        weights=weights,
    )
