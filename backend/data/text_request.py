"""What a request to cache captions says about its text caches, before any encoder is loaded."""

from __future__ import annotations

from backend.config.cache import CacheTextOptions
from backend.config.tasks import TASKS, default_weights
from backend.data.recipes import TextRecipe
from backend.text.locate import CLIP, QWEN, EncoderFiles, EncoderKind, find_encoder, locate_encoder

QUANTISED = "nf4"
"""The number format that the caches of a quantised Qwen2.5-VL tell."""


def encoder_paths(options: CacheTextOptions) -> tuple[str | None, str | None]:
    """Qwen2.5-VL and CLIP: what the options name, else what belongs to the task; None: nobody has said it."""
    defaults = default_weights(TASKS[options.task]) if options.task is not None else None
    qwen = options.text_encoder_qwen or (defaults.text_encoder_qwen if defaults else None)
    clip = options.text_encoder_clip or (defaults.text_encoder_clip if defaults else None)
    return qwen, clip


def text_recipe(options: CacheTextOptions, text_dtype: str | None = None) -> TextRecipe:
    """The recipe of the caches that `options` would write.

    An encoder that nobody has named, and a hub model that is not on this machine, is not compared; nothing is fetched.
    `text_dtype` is the number format that the device would compute in; None: it is compared only when the options name
    it.

    Raises:
        UserError: an encoder is named, but it is not there, is damaged or of another kind.
    """
    qwen, clip = encoder_paths(options)
    return _recipe(options, _found(qwen, QWEN), _found(clip, CLIP), text_dtype)


def recipe_of(options: CacheTextOptions, qwen: EncoderFiles, clip: EncoderFiles, text_dtype: str) -> TextRecipe:
    """The recipe for encoders that are located already."""
    return _recipe(options, qwen.fingerprint, clip.fingerprint, text_dtype)


def locate_encoders(options: CacheTextOptions) -> tuple[EncoderFiles, EncoderFiles]:
    """The files of Qwen2.5-VL and CLIP; a hub model that is not on this machine is fetched.

    Raises:
        UserError: one of them is not named, not there, damaged or of another kind.
    """
    qwen, clip = encoder_paths(options)
    assert qwen is not None
    assert clip is not None
    return locate_encoder(qwen, QWEN), locate_encoder(clip, CLIP)


def _recipe(options: CacheTextOptions, qwen: str | None, clip: str | None, text_dtype: str | None) -> TextRecipe:
    return TextRecipe(
        qwen=qwen,
        clip=clip,
        text_dtype=QUANTISED if options.quantized_qwen else options.dtype or text_dtype,
        max_length=options.qwen_max_length,
        clip_max_length=options.clip_max_length,
    )


def _found(location: str | None, kind: EncoderKind) -> str | None:
    files = find_encoder(location, kind) if location is not None else None
    return files.fingerprint if files is not None else None
