"""The VAE against diffusers at equal tiling, its frame counts, its files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from backend.errors import EngineError, UserError
from backend.vae.hunyuan import Vae, load_vae, to_uint8, to_unit_range
from backend.vae.tiling import Tiling

CPU = torch.device("cpu")
DEMO = Path(__file__).resolve().parents[3] / "backend" / "demo" / "weights"
FRAMES = [1, 5, 17, 49, 81, 121, 241]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random HunyuanVideo VAE as diffusers saves it: four levels, so the strides are the real ones."""
    from diffusers import AutoencoderKLHunyuanVideo

    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = AutoencoderKLHunyuanVideo(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    path = tmp_path_factory.mktemp("weights") / "vae"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def reference(folder: Path) -> Any:
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo.from_pretrained(folder)


def load(path: Path, tiling: Tiling | None = None, dtype: torch.dtype = torch.float32) -> Vae:
    return load_vae(path, device=CPU, dtype=dtype, tiling=tiling or Tiling())


def random_pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def assert_equal_to_rounding(mine: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5)


def one_by_one(code: Any, clips: torch.Tensor) -> torch.Tensor:
    """Batches are added up in another order than single clips, and random weights make that visible."""
    with torch.no_grad():
        return torch.cat([code(clip[None]) for clip in clips])


@pytest.mark.parametrize("frames", FRAMES)
def test_frame_counts(folder, frames) -> None:
    """Trap B6: 121 frames are 31 latents and 31 latents are 121 frames, framewise and with tiles too."""
    tiles = [Tiling(spatial_enabled=True, spatial_tile=16, spatial_stride=8)] if frames in (5, 49, 121) else []
    for tiling in (Tiling(), *tiles):
        vae = load(folder, tiling)
        latents = vae.encode(random_pixels(1, 3, frames, 16, 24))
        assert latents.shape == (1, 16, (frames - 1) // 4 + 1, 2, 3)
        assert latents.dtype == torch.float32
        assert vae.decode(latents).shape == (1, 3, frames, 16, 24)


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 16), (32, 20), (8, 8), (64, 48)])
def test_frame_counts_of_other_windows(folder, window, stride) -> None:
    vae = load(folder, Tiling(temporal_window=window, temporal_stride=stride))
    for frames in (49, 77):
        latents = vae.encode(random_pixels(1, 3, frames, 16, 16))
        assert latents.shape[2] == (frames - 1) // 4 + 1
        assert vae.decode(latents).shape[2] == frames


@pytest.mark.parametrize(
    ("shape", "tiling"),
    [
        ((2, 3, 1, 32, 16), Tiling()),
        ((1, 3, 17, 24, 32), Tiling()),
        ((2, 3, 33, 16, 32), Tiling()),
        ((1, 3, 37, 32, 24), Tiling(temporal_window=8, temporal_stride=4)),
        ((1, 3, 45, 24, 16), Tiling(temporal_enabled=False)),
        ((1, 3, 9, 40, 72), Tiling(spatial_enabled=True, spatial_tile=32, spatial_stride=24)),
        ((2, 3, 21, 40, 32), Tiling(spatial_enabled=True, spatial_tile=32, spatial_stride=16)),
    ],
)
def test_equals_diffusers_at_equal_tiling(folder, reference, shape, tiling) -> None:
    """Scaling: multiplied after encoding, divided before decoding."""
    if tiling.spatial_enabled:
        size, step = tiling.spatial_tile, tiling.spatial_stride
        reference.enable_tiling(size, size, 16, step, step, 12)
    else:
        reference.disable_tiling()
    reference.tile_sample_min_num_frames = tiling.temporal_window
    reference.tile_sample_stride_num_frames = tiling.temporal_stride
    framewise = tiling.temporal_enabled and shape[2] > tiling.temporal_window + 1
    reference.use_framewise_encoding = reference.use_framewise_decoding = framewise
    vae, pixels = load(folder, tiling), random_pixels(*shape, seed=shape[2])
    factor = reference.config.scaling_factor
    expected = one_by_one(lambda clip: reference.encode(clip).latent_dist.mode() * factor, pixels)
    decoded = one_by_one(lambda latents: reference.decode(latents / factor).sample, expected)
    latents = vae.encode(pixels)
    assert_equal_to_rounding(latents, expected)
    assert_equal_to_rounding(vae.decode(expected), decoded)


def test_diffusers_defaults_are_ours_for_long_clips(folder) -> None:
    from diffusers import AutoencoderKLHunyuanVideo

    vae, untouched, pixels = (
        load(folder),
        AutoencoderKLHunyuanVideo.from_pretrained(folder),
        random_pixels(1, 3, 61, 16, 16),
    )
    with torch.no_grad():
        expected = untouched.encode(pixels).latent_dist.mode() * vae.scaling_factor
        decoded = untouched.decode(expected / vae.scaling_factor).sample
    assert_equal_to_rounding(vae.encode(pixels), expected)
    assert_equal_to_rounding(vae.decode(expected), decoded)


def test_17_frames_are_coded_whole(folder, reference) -> None:
    """As the official windows of 16 + 1 frames do; diffusers' own rule cuts a second window of four frames off."""
    vae, pixels = load(folder), random_pixels(1, 3, 17, 16, 16)
    with torch.no_grad():
        latents = reference.quant_conv(reference.encoder(pixels)).chunk(2, dim=1)[0] * vae.scaling_factor
        pixels_back = reference.decoder(reference.post_quant_conv(latents / vae.scaling_factor))
    assert_equal_to_rounding(vae.encode(pixels), latents)
    assert_equal_to_rounding(vae.decode(latents), pixels_back)


def test_sample_is_seeded_and_the_mode_is_the_default(folder, reference) -> None:
    """Trap B23: cached latents come out the same every time; the draw is that of diffusers with this generator."""
    vae, pixels = load(folder), random_pixels(1, 3, 5, 16, 16)
    draws = [vae.encode(pixels, generator=torch.Generator().manual_seed(seed)) for seed in (7, 7, 8)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.allclose(draws[0], draws[2])
    reference.use_framewise_encoding, reference.use_tiling = False, False
    with torch.no_grad():
        posterior = reference.encode(pixels).latent_dist
        expected = posterior.sample(torch.Generator().manual_seed(7)) * vae.scaling_factor
    assert_equal_to_rounding(draws[0], expected)
    state = torch.get_rng_state()
    assert torch.equal(vae.encode(pixels), vae.encode(pixels))
    vae.encode(pixels, generator=torch.Generator().manual_seed(7))
    assert torch.equal(torch.get_rng_state(), state)


def test_batch_equals_singles(folder) -> None:
    vae, pixels = load(folder), random_pixels(3, 3, 5, 16, 24)
    together = vae.encode(pixels)
    assert torch.equal(together, torch.cat([vae.encode(clip[None]) for clip in pixels]))
    assert torch.equal(vae.decode(together), torch.cat([vae.decode(latents[None]) for latents in together]))


def test_first_latent_of_a_clip_is_not_its_first_frame_alone(folder) -> None:
    """kandinsky5.md section 4: normalisation runs over time, so image-to-video encodes the first frame separately."""
    vae, pixels = load(folder), random_pixels(1, 3, 9, 32, 32)
    clip, image = vae.encode(pixels)[:, :, :1], vae.encode(pixels[:, :, :1])
    assert (clip - image).norm() > 0.001 * image.norm()


def test_tiling_can_be_replaced(folder) -> None:
    vae, pixels = load(folder, Tiling(temporal_enabled=False)), random_pixels(1, 3, 33, 16, 16)
    whole = vae.encode(pixels)
    vae.tiling = Tiling()
    windows = vae.encode(pixels)
    assert not torch.allclose(whole, windows)
    vae.tiling = Tiling(temporal_enabled=False)
    assert torch.equal(vae.encode(pixels), whole)


@pytest.mark.parametrize(
    "shape", [(3, 5, 16, 16), (1, 4, 5, 16, 16), (1, 3, 4, 16, 16), (1, 3, 5, 20, 16), (1, 3, 5, 16, 9)]
)
def test_wrong_shapes_to_encode(folder, shape) -> None:
    with pytest.raises(ValueError, match=r"4n|multiples|five"):
        load(folder).encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(16, 2, 2, 2), (1, 15, 2, 2, 2), (1, 16, 0, 2, 2)])
def test_wrong_shapes_to_decode(folder, shape) -> None:
    with pytest.raises(ValueError, match=r"channels|five|at least"):
        load(folder).decode(torch.zeros(shape))


def test_values_that_are_no_numbers(folder) -> None:
    with pytest.raises(EngineError, match="not numbers") as caught:
        load(folder).decode(torch.full((1, 16, 1, 2, 2), torch.nan))
    assert caught.value.phase == "vae"


def test_wrong_frame_count_is_never_passed_on(folder, monkeypatch) -> None:
    """Trap B6: if a library change breaks the count, it is an error and not a shifted clip."""
    vae = load(folder)
    monkeypatch.setattr(vae._model, "_decode", lambda z: type("Output", (), {"sample": torch.zeros(1, 3, 7, 16, 16)})())
    with pytest.raises(EngineError, match="instead of"):
        vae.decode(torch.zeros(1, 16, 2, 2, 2))


def test_bfloat16_weights(folder) -> None:
    exact, rough = load(folder), load(folder, dtype=torch.bfloat16)
    pixels = random_pixels(1, 3, 5, 16, 16)
    latents = rough.encode(pixels)
    assert (rough.dtype, latents.dtype) == (torch.bfloat16, torch.float32)
    assert (latents - exact.encode(pixels)).norm() < 0.1 * exact.encode(pixels).norm()
    assert rough.decode(latents).dtype == torch.float32


def test_demo_vae_brings_a_picture_back() -> None:
    """The trained one: a square on a plain ground survives encoding and decoding."""
    vae = load(DEMO / "vae")
    clip = torch.full((1, 3, 17, 64, 64), -0.2)
    clip[:, 0, :, 20:44, 20:44] = 0.8
    back = vae.decode(vae.encode(clip))
    assert back.shape == clip.shape
    assert (back - clip).pow(2).mean() < 0.01
    assert vae.encode(clip).std() < 3


def test_path_forms_give_the_same_vae(folder, tmp_path) -> None:
    lone = tmp_path / "one.safetensors"
    shutil.copy(folder / WEIGHTS, lone)
    shutil.copy(folder / "config.json", tmp_path / "config.json")
    prefixed = tmp_path / "prefixed"
    prefixed.mkdir()
    save_file({f"vae.{name}": tensor for name, tensor in load_file(lone).items()}, prefixed / "repack.safetensors")
    shutil.copy(folder / "config.json", prefixed)
    pixels = random_pixels(1, 3, 5, 16, 16)
    forms = [folder, folder.parent, folder / WEIGHTS, lone, str(prefixed), prefixed / "repack.safetensors"]
    vaes = [load(form) for form in forms]
    expected = vaes[0].encode(pixels)
    assert all(torch.equal(vae.encode(pixels), expected) for vae in vaes)
    assert len({vae.config_fingerprint for vae in vaes[:4]}) == 1
    assert load(DEMO / "vae").config_fingerprint != vaes[0].config_fingerprint


def test_file_without_configuration_gets_the_hunyuan_one(folder, tmp_path, monkeypatch) -> None:
    """The published VAE has 248 tensors; the tiny one cannot be taken for it."""
    from diffusers import AutoencoderKLHunyuanVideo

    shutil.copy(folder / WEIGHTS, tmp_path / "vae.safetensors")
    (tmp_path / "config.json").write_text('{"architectures": ["Other"]}')
    with pytest.raises(UserError, match="of another shape"):
        load(tmp_path / "vae.safetensors")
    with torch.device("meta"):
        published = AutoencoderKLHunyuanVideo()
    assert len(published.state_dict()) == 248
    assert published.config.scaling_factor == 0.476986


def _rewrite(path: Path, change: Any) -> None:
    save_file(change(load_file(path)), path)


def _drop(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "decoder.conv_in.conv.bias"}


WRONG_FILES = {
    "missing": (lambda f: _rewrite(f / WEIGHTS, _drop), r"1 missing \(decoder.conv_in.conv.bias\)"),
    "unexpected": (lambda f: _rewrite(f / WEIGHTS, lambda t: t | {"extra": torch.ones(1)}), r"1 unexpected \(extra\)"),
    "shape": (lambda f: _rewrite(f / WEIGHTS, lambda t: t | {"quant_conv.bias": torch.ones(1)}), "of another shape"),
    "number format": (
        lambda f: _rewrite(f / WEIGHTS, lambda t: t | {"quant_conv.bias": torch.ones(32, dtype=torch.int8)}),
        "number format",
    ),
    "cut": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "incomplete"),
    "no file": (lambda f: (f / WEIGHTS).unlink(), "no .safetensors file"),
    "several": (
        lambda f: (
            [shutil.copy(f / WEIGHTS, f / name) for name in ("a.safetensors", "b.safetensors")]
            and (f / WEIGHTS).unlink()
        ),
        "several",
    ),
    "config text": (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
    "config list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "other class": (
        lambda f: (f / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "latent_channels": 16})),
        "belongs to a AutoencoderKL",
    ),
    "strange key": (lambda f: (f / "config.json").write_text('{"depth": 3}'), "does not describe"),
    "compression": (lambda f: (f / "config.json").write_text('{"spatial_compression_ratio": 16}'), "does not describe"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_files_are_one_mistake_with_the_field(folder, tmp_path, name) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    change, message = WRONG_FILES[name]
    change(copy)
    with pytest.raises(UserError, match=message) as caught:
        load(copy)
    assert caught.value.field == "vae"
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (DEMO / "transformer", "not a VAE but: .*DiT"),
        (DEMO / "transformer" / WEIGHTS, "not a VAE but: .*DiT"),
        (DEMO / "text_encoder" / "model.safetensors", "not a VAE but"),
        (Path("/no/such/vae.safetensors"), "does not exist"),
        (Path(__file__), "not a .safetensors file"),
    ],
)
def test_other_models_and_places_are_named(path, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(path)
    assert caught.value.field == "vae"


def test_pixels_to_bytes_and_back() -> None:
    """Official: x / 127.5 - 1, and back by cutting the fraction off; rounding errors may lose one step, never more."""
    values = torch.arange(256, dtype=torch.uint8)
    unit = to_unit_range(values)
    assert (unit[0].item(), unit[255].item()) == (-1.0, 1.0)
    back = to_uint8(unit)
    assert back.dtype == torch.uint8
    lost = values.int() - back.int()
    assert set(lost.tolist()) <= {0, 1}
    assert to_uint8(torch.tensor([-7.0, 7.0, 0.0, 0.5])).tolist() == [0, 255, 127, 191]
    assert to_uint8(unit.to(torch.float64)).tolist() == back.tolist()
