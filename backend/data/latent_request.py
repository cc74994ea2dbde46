"""From the options of the latent command to the recipe of its caches, without torch: for the command and the page."""

from __future__ import annotations

from backend.config.cache import CacheLatentsOptions, DatasetOptions
from backend.config.tasks import TASKS, default_weights
from backend.data.buckets import Nabla
from backend.data.recipes import LatentRecipe
from backend.errors import UserError
from backend.vae.locate import locate_vae
from backend.vae.tiling import Tiling

_SMALL_TILE, _SMALL_STRIDE = 256, 192


def vae_path(options: CacheLatentsOptions) -> str | None:
    """The VAE that `options` means: the one it names, or that of its demo task; None: nobody has said."""
    if options.vae is not None:
        return options.vae
    return default_weights(TASKS[options.task]).vae if options.task is not None else None


def nabla_mode(options: DatasetOptions) -> Nabla:
    """How the sizes of NABLA are reached, as `backend.data.buckets.choose_bucket` takes it."""
    if not options.nabla_resize:
        return False
    return "stretch" if options.nabla_stretch else True


def latent_tiling(options: CacheLatentsOptions) -> Tiling | None:
    """--vae_tiling: None (auto) follows the size of each clip, on cuts frames above 256 px, off never cuts frames.

    In time clips are cut alike in all three, or the same clip would be coded differently here and in generation.
    """
    if options.vae_tiling == "on":
        return Tiling(spatial_enabled=True, spatial_tile=_SMALL_TILE, spatial_stride=_SMALL_STRIDE)
    return Tiling(spatial_enabled=False) if options.vae_tiling == "off" else None


def latent_recipe(options: CacheLatentsOptions, vae_dtype: str | None = None) -> LatentRecipe:
    """How `options` would have latents made.

    Args:
        vae_dtype: the number format that the device settles ("float16"); None: the one of the options, and if they
            say nothing either, it is not compared.

    Raises:
        UserError: field "vae"; a VAE is named that is not there or cannot be read.
    """
    path = vae_path(options)
    fingerprint = None
    if path is not None:
        try:
            fingerprint = locate_vae(path).fingerprint()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}. Check the file.", "vae") from error
    return LatentRecipe(
        vae=fingerprint,
        vae_dtype=vae_dtype or options.vae_dtype,
        posterior=options.posterior,
        seed=options.seed,
        tiling=latent_tiling(options),
        nabla=nabla_mode(options),
    )
