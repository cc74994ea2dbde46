"""Mistakes in a request to cache latents are found together, without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from backend.config.cache import CacheLatentsOptions
from backend.config.cache_checks import check_cache_latents
from backend.config.tasks import TASKS, default_weights
from backend.data.latent_request import latent_recipe, latent_tiling, nabla_mode, vae_path
from backend.errors import UserError
from backend.vae.tiling import Tiling

VAE = str(default_weights(TASKS["k5-demo-t2v"]).vae)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "stills").mkdir()
    path = tmp_path / "dataset.toml"
    path.write_text(
        f"[[datasets]]\nimage_directory = '{tmp_path / 'stills'}'\ncache_directory = '{tmp_path / 'cache'}'\n"
    )
    return path


def _fields(**values: object) -> dict[str | None, str]:
    return {problem.field: problem.message for problem in check_cache_latents(CacheLatentsOptions(**values))}


def test_nothing_wrong(config: Path) -> None:
    assert not _fields(dataset_config=str(config), vae=VAE)
    assert not _fields(dataset_config=str(config), task="k5-demo-i2v")
    assert not _fields(dataset_config=str(config), debug_mode="console", console_back="#102030", console_num_images=2)
    assert not _fields(dataset_config=str(config), check=True), "a report needs no VAE"


def test_all_together(config: Path, tmp_path: Path) -> None:
    wrong = _fields(prune=True, keep_cache=True, nabla_stretch=True, console_num_images=3)
    assert set(wrong) == {"dataset_config", "vae", "prune", "nabla_stretch", "console_num_images"}
    assert "is missing" in wrong["dataset_config"]
    assert "is missing" in wrong["vae"]
    config.write_text(config.read_text() + "resolution = 'big'\nbatch_sise = 2\n")
    wrong = _fields(dataset_config=str(config), vae=str(tmp_path / "none"))
    assert set(wrong) == {"datasets[0].resolution", "datasets[0].batch_sise", "vae"}


def test_weights_of_another_kind(config: Path) -> None:
    wrong = _fields(dataset_config=str(config), vae=str(Path(VAE).parent / "transformer"))
    assert "Kandinsky 5" in wrong["vae"]
    assert "not a VAE" in wrong["vae"]


def test_folders(config: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert "is a file, not a folder" in _fields(dataset_config=str(config), vae=VAE)["datasets[0].cache_directory"]
    (tmp_path / "stills").rmdir()
    assert "datasets[0].image_directory" in _fields(dataset_config=str(config), vae=VAE, check=True)
    config.write_text(config.read_text() + "enabled = false\n")
    assert "no dataset that is enabled" in _fields(dataset_config=str(config), vae=VAE)["dataset_config"]


def test_debug_modes_refuse_what_means_nothing(config: Path) -> None:
    wrong = _fields(dataset_config=str(config), debug_mode="video", skip_existing=True, prune=True, console_back="red")
    assert set(wrong) == {"skip_existing", "prune", "console_back"}
    wrong = _fields(dataset_config=str(config), debug_mode="console", console_back="no colour")
    assert "is no colour" in wrong["console_back"]


def test_the_recipe_of_options(tmp_path: Path) -> None:
    recipe = latent_recipe(CacheLatentsOptions(task="k5-demo-t2v"))
    assert recipe == latent_recipe(CacheLatentsOptions(vae=VAE))
    assert recipe.vae is not None
    assert len(recipe.vae) == 16
    assert (recipe.vae_dtype, recipe.posterior, recipe.tiling, recipe.nabla) == (None, "sample", None, False)
    assert latent_recipe(CacheLatentsOptions()).vae is None
    assert vae_path(CacheLatentsOptions(task="k5-pro-t2v-5s-sd")) is None
    assert latent_recipe(CacheLatentsOptions(vae_dtype="float16"), "bfloat16").vae_dtype == "bfloat16"
    assert latent_recipe(CacheLatentsOptions(vae_dtype="float16")).vae_dtype == "float16"
    with pytest.raises(UserError, match="does not exist"):
        latent_recipe(CacheLatentsOptions(vae=str(tmp_path / "none")))


def test_tiling_and_nabla() -> None:
    assert latent_tiling(CacheLatentsOptions(vae_tiling="auto")) is None
    assert latent_tiling(CacheLatentsOptions(vae_tiling="off")) == Tiling(spatial_enabled=False)
    on = latent_tiling(CacheLatentsOptions(vae_tiling="on"))
    assert on is not None
    assert (on.spatial_enabled, on.spatial_tile, on.spatial_stride) == (True, 256, 192)
    assert nabla_mode(CacheLatentsOptions()) is False
    assert nabla_mode(CacheLatentsOptions(nabla_resize=True)) is True
    assert nabla_mode(CacheLatentsOptions(nabla_resize=True, nabla_stretch=True)) == "stretch"


def test_neither_checks_nor_recipes_load_torch() -> None:
    modules = "backend.config.cache_checks, backend.data.latent_request, backend.data.sizes"
    program = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == 0
