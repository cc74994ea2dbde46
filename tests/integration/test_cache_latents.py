"""The guide's command caches real clips: names, numbers and metadata, against diffusers' own VAE."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from safetensors.torch import load_file, save_file

from backend.config.cache import CacheLatentsOptions
from backend.config.dataset import load_dataset_config
from backend.data.cache_files import read_latent_cache
from backend.data.clips import read_item
from backend.data.items import Item
from backend.data.latent_request import latent_recipe
from backend.data.ledger import check_dataset
from backend.data.media import MediaReader
from backend.data.sizes import latent_bytes
from tests.integration.cache_command import VAE, cache, caches, inodes, read_cache, written_again
from tests.real_clips import caption, real_clip, real_dataset, real_still
from tests.unit.data.dataset_folder import foreign_latent, read_name_as_others


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of the real dataset, cached once."""
    config = real_dataset(tmp_path_factory.mktemp("real"))
    run = cache(config)
    assert run.code == 0, run.stderr
    assert run.of("progress")[-1]["done"] == 12
    assert [record["phase"] for record in run.of("phase")] == ["scan", "load", "vae"]
    assert "1 of 6 sources give no clip" in run.stderr
    assert "phone_short.mp4: has 8 frames, and the shortest clip of this dataset has 9" in run.stderr
    return config


@pytest.fixture(scope="module")
def oracle() -> AutoencoderKLHunyuanVideo:
    """The demo's VAE in diffusers' own class."""
    return AutoencoderKLHunyuanVideo.from_pretrained(VAE, torch_dtype=torch.float32).eval()


def _items(config: Path) -> list[tuple[Path, Item, numpy.ndarray]]:
    """Every item with its cache and its frames, uint8 [F, H, W, 3]."""
    found = []
    with MediaReader() as reader:
        for entry in load_dataset_config(config).enabled:
            for row in check_dataset(entry).latents:
                path = Path(entry.cache_directory) / row.item.latent_name
                found.append((path, row.item, read_item(reader, entry, row.item)))
    return found


def _unit(frames: numpy.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0


@torch.no_grad()
def _encode(oracle: AutoencoderKLHunyuanVideo, frames: numpy.ndarray, seed: int | None = None) -> torch.Tensor:
    """[16, F', H/8, W/8] as diffusers encodes; a seed draws from the posterior."""
    posterior = oracle.encode(_unit(frames)).latent_dist
    if seed is None:
        latents = posterior.mode()
    else:
        latents = posterior.sample(torch.Generator().manual_seed(seed))
    return (latents * oracle.config.scaling_factor)[0]


def test_names_tensors_and_metadata(dataset: Path) -> None:
    """What other tools read from a name and a header is what is there; the tensor names hold the tensors' own sizes."""
    for path, item, frames in _items(dataset):
        tensors, metadata = read_cache(path)
        clip = item.clip is not None
        _, size, place = read_name_as_others(path.name, clip)
        count, height, width = frames.shape[0], frames.shape[1] // 8, frames.shape[2] // 8
        assert size == ((frames.shape[2], frames.shape[1]) if clip else (item.media.width, item.media.height))
        assert place == ((item.clip.start, count) if item.clip is not None else None)
        latent = (count - 1) // 4 + 1
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} == {
            f"latents_{latent}x{height}x{width}_float32": ((16, latent, height, width), torch.float32),
            f"latents_image_2x{height}x{width}_float32": ((16, 2, height, width), torch.float32),
        }
        assert metadata["architecture"] == "kandinsky5"
        assert metadata["format_version"] == "1.0.1"
        assert metadata.get("frame_count") == (str(count) if clip else None)
        assert (metadata["width"], metadata["height"]) == (str(size[0]), str(size[1]))
        assert int(metadata["source_size"]) == os.stat(item.source.location).st_size
        assert metadata["posterior"] == "sample, seed 0"
        assert metadata["vae_dtype"] == "float32"
        assert 0 <= latent_bytes(item, "float32") - path.stat().st_size < 4096, "what the space is reckoned by"
    names = set(caches(dataset.parent))
    assert "cache_clips/bunny_00000-017_0080x0048_k5.safetensors" in names
    assert "cache_stills/street_0200x0120_k5.safetensors" in names
    assert len(names) == 12


def test_latents_equal_diffusers_and_decode_to_the_clip(dataset: Path, oracle: AutoencoderKLHunyuanVideo) -> None:
    """Sampled with the item's own seed; decoded, the clip comes back as well as the VAE itself brings it back."""
    recipe = latent_recipe(CacheLatentsOptions(vae=VAE))
    worst = math.inf
    for number, (path, item, frames) in enumerate(_items(dataset)):
        cached = read_latent_cache(path)
        seed = recipe.item_seed(item)
        assert torch.equal(cached.latents, _encode(oracle, frames, seed)), path.name
        if number % 3:
            continue  # Decoding takes longest, and every third item is of another length and size.
        with torch.no_grad():
            decoded = oracle.decode(cached.latents[None] / oracle.config.scaling_factor).sample
            plain = oracle.decode(_encode(oracle, frames)[None] / oracle.config.scaling_factor).sample
        ours, own = _psnr(decoded, frames), _psnr(plain, frames)
        assert abs(ours - own) < 0.3, f"{path.name}: {ours:.2f} dB, the VAE's own is {own:.2f} dB"
        worst = min(worst, ours)
    assert worst > 15.0, f"{worst:.2f} dB is no picture"


def _psnr(pixels: torch.Tensor, frames: numpy.ndarray) -> float:
    error = (pixels.clamp(-1, 1) - _unit(frames)).square().mean().item()
    return 10 * math.log10(4.0 / error)


def test_first_and_last_frame_are_single_images(dataset: Path, oracle: AutoencoderKLHunyuanVideo) -> None:
    """Trap T7 and the causal VAE: a slice of the clip's latents is not what generation gets from an image."""
    recipe = latent_recipe(CacheLatentsOptions(vae=VAE))
    for path, item, frames in _items(dataset):
        cached = read_latent_cache(path)
        image = cached.latents_image
        assert image is not None
        seed = recipe.item_seed(item)
        assert torch.equal(image[:, :1], _encode(oracle, frames[:1], seed))
        assert torch.equal(image[:, 1:], _encode(oracle, frames[-1:], seed))
        if item.clip is None:
            assert torch.equal(image, cached.latents.repeat(1, 2, 1, 1))
        else:
            assert not torch.allclose(image[:, 0], cached.latents[:, 0], atol=1e-3)


def test_mode_tiles_batches_and_number_formats(tmp_path: Path, oracle: AutoencoderKLHunyuanVideo) -> None:
    """--posterior mode, --vae_tiling on, --batch_size and --vae_dtype do what they say, and batches change no bit."""
    for number in range(3):
        real_still(tmp_path / "stills" / f"{number}.png", "bikes", (320, 64), number * 5)
    config = _write(tmp_path, f"image_directory = '{tmp_path / 'stills'}'\nresolution = [320, 64]")
    results = {}
    for label, words in {
        "plain": ["--posterior", "mode"],
        "batch": ["--posterior", "mode", "--batch_size", "3", "--num_workers", "3"],
        "tiles": ["--posterior", "mode", "--vae_tiling", "on"],
        "half": ["--posterior", "mode", "--vae_dtype", "bfloat16", "--disable_cudnn_backend"],
        "seed": ["--seed", "1"],
    }.items():
        assert cache(config, *words).code == 0
        results[label] = caches(tmp_path / "cache")
        latents = read_latent_cache(tmp_path / "cache" / "0_0320x0064_k5.safetensors").latents
        frames = _items(config)[0][2]
        if label == "tiles":
            oracle.enable_tiling(256, 256, None, 192, 192)
        expected = _encode(oracle, frames)
        oracle.disable_tiling()
        if label == "half":
            assert latents.dtype == torch.bfloat16
            assert (latents.float() - expected).norm() / expected.norm() < 0.05
        else:
            assert torch.equal(latents, expected) is (label != "seed")
    assert results["plain"] == results["batch"]
    assert len({results[label]["0_0320x0064_k5.safetensors"] for label in results}) == 4
    assert results["plain"] != results["tiles"]


def test_nabla_sizes(tmp_path: Path) -> None:
    """--nabla_resize covers and crops to multiples of 128; --nabla_stretch changes the aspect, as others do."""
    real_clip(tmp_path / "clips" / "a.mp4", "bunny", (192, 108), 6)
    config = _write(tmp_path, f"video_directory = '{tmp_path / 'clips'}'\nresolution = [192, 112]\ntarget_frames = [5]")
    expected = {"": (192, 112), "--nabla_resize": (128, 128), "--nabla_stretch": (256, 128)}
    words: list[str] = []
    for flag, (width, height) in expected.items():
        words += [flag] if flag else []
        assert cache(config, *words).code == 0
        name = f"a_00000-005_{width:04d}x{height:04d}_k5.safetensors"
        cached = read_latent_cache(tmp_path / "cache" / name)
        assert cached.latents.shape == (16, 2, height // 8, width // 8), flag
        assert ("stretch" in cached.metadata["resize"]) is (flag == "--nabla_stretch")
        again = inodes(tmp_path / "cache")
        run = cache(config, *words, "--skip_existing")
        assert not written_again(again, tmp_path / "cache"), run.stderr


def test_skip_existing_means_valid(tmp_path: Path) -> None:
    """Exactly what changed is cached again: source, frames, size, VAE, seed; a new time alone changes nothing."""
    clips, folder = tmp_path / "clips", tmp_path / "cache"
    for name, start in (("a", 0), ("b", 6), ("c", 12)):
        caption(real_clip(clips / f"{name}.mp4", "phone", (88, 72), 10, start=start), name)
    base = f"video_directory = '{clips}'\nresolution = [64, 48]\n"
    config = _write(tmp_path, base + "target_frames = [5, 9]")
    assert cache(config).code == 0

    def again(*words: str, vae: str = VAE) -> set[str]:
        before = inodes(folder)
        run = cache(config, "--skip_existing", *words, vae=vae)
        assert run.code == 0, run.stderr
        new = written_again(before, folder)
        assert ("Nothing to cache" in run.stderr) is not bool(new)
        return {name.removesuffix("_0064x0048_k5.safetensors") for name in new}

    assert not again()
    os.utime(clips / "a.mp4", ns=(1, 1))
    assert not again(), "the content is the same"
    real_clip(clips / "b.mp4", "phone", (88, 72), 10, start=30)
    assert again() == {"b_00000-005", "b_00000-009"}
    assert not again()
    (folder / "c_00000-005_0064x0048_k5.safetensors").unlink()
    foreign_latent(folder / "c_00000-009_0064x0048_k5.safetensors", (3, 6, 8), 9)
    assert again() == {"c_00000-005"}, "another tool's cache with the right frames is left alone"
    _write(tmp_path, base + "target_frames = [9, 7]")
    assert not again(), "7 frames are rounded down to 5, which are there"
    _write(tmp_path, base + "target_frames = [9]\nsource_fps = 12")
    assert again() == {"a_00000-009", "b_00000-009"}, "the frame rate is another one; foreign files do not tell theirs"
    _write(tmp_path, base + "target_frames = [5, 9]")
    assert again() == {"a_00000-009", "b_00000-009"}
    assert again("--seed", "7") == {"a_00000-005", "a_00000-009", "b_00000-005", "b_00000-009", "c_00000-005"}
    assert len(again("--seed", "7", vae=_other_vae(tmp_path))) == 5
    _write(tmp_path, f"video_directory = '{clips}'\nresolution = [48, 64]\ntarget_frames = [5, 9]")
    assert len(again()) == 6


def _other_vae(folder: Path) -> str:
    """The demo's VAE with one weight changed."""
    copy = folder / "vae"
    shutil.copytree(VAE, copy)
    file = copy / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    name = next(name for name in state if name.endswith("quant_conv.weight"))
    state[name] = state[name] * 1.01
    save_file(state, file, {"format": "pt"})
    return str(copy)


def test_two_sources_with_one_stem(tmp_path: Path) -> None:
    """The traps of section 1.6: one stem in two formats and in two folders, and each keeps a cache of its own."""
    stills = tmp_path / "stills"
    real_still(stills / "x.png", "bikes", (64, 64), 0)
    real_still(stills / "x.jpg", "bunny", (64, 64), 0)
    real_still(stills / "more" / "x.png", "phone", (64, 64), 0)
    config = _write(tmp_path, f"image_directory = '{stills}'\nresolution = 64\nrecursive = true")
    assert cache(config).code == 0
    found = caches(tmp_path / "cache")
    assert len(found) == len(set(found.values())) == 3
    sources = {read_cache(tmp_path / "cache" / name)[1]["source_name"] for name in found}
    assert sources == {"x.png", "x.jpg", "more/x.png"}


def _write(folder: Path, table: str) -> Path:
    config = folder / "dataset.toml"
    config.write_text(f"[[datasets]]\ncache_directory = '{folder / 'cache'}'\n{table}\n", encoding="utf-8")
    return config
