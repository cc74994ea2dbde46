"""The training code of the demo model: exact where it can be, and a smoke run of every build stage."""

import random
from dataclasses import replace

import pytest
import torch

from backend.demo import build, train_dit, train_vae
from backend.demo.clips import ClipSpec, caption
from backend.demo.dataset import CaptionTable, encode_shard, every_caption, read_shard
from backend.demo.muon import Muon, orthogonalize


def test_newton_schulz_brings_singular_values_near_one():
    generator = torch.Generator().manual_seed(0)
    for shape in ((24, 60), (60, 24), (16, 4, 3, 3, 3)):
        matrix = torch.randn(*shape, generator=generator)
        values = torch.linalg.svdvals(orthogonalize(matrix).flatten(1))
        assert orthogonalize(matrix).shape == matrix.shape
        assert float(values.min()) > 0.4
        assert float(values.max()) < 1.5


def test_muon_solves_a_linear_problem():
    torch.manual_seed(0)
    wanted, weight, bias = (
        torch.randn(8, 12),
        torch.nn.Parameter(torch.zeros(8, 12)),
        torch.nn.Parameter(torch.zeros(8)),
    )
    optimizer = Muon([weight], [bias], matrix_rate=0.1, other_rate=0.05)
    inputs = torch.randn(256, 12)
    target = inputs @ wanted.T + 1

    def loss() -> torch.Tensor:
        return (inputs @ weight.T + bias - target).square().mean()

    before = float(loss().detach())
    for step in range(200):
        optimizer.scale(1 - step / 200)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert float(loss().detach()) < 0.02 * before


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    model = train_vae.new_vae().eval()
    model.use_framewise_encoding = model.use_framewise_decoding = False
    return model


@torch.no_grad()
def test_two_dimensional_convolutions_equal_the_causal_ones_on_one_frame(vae):
    frames = torch.rand(2, 3, 1, 32, 32) * 2 - 1
    for weight in vae.parameters():
        weight += 0.01 * torch.randn_like(weight)
    usual = vae.decode(vae.encode(frames).latent_dist.mean).sample
    with train_vae.single_frame_convolutions(vae):
        fast = vae.decode(vae.encode(frames).latent_dist.mean).sample
    again = vae.decode(vae.encode(frames).latent_dist.mean).sample
    assert torch.allclose(usual, fast, atol=1e-4, rtol=1e-4)
    assert torch.equal(usual, again)


def test_image_stage_leaves_the_taps_on_past_frames_at_zero(tmp_path):
    model = train_vae.new_vae()
    train_vae.train_images(model, train_vae.VaeStage(seconds=1, rate=1e-3, batch=2), tmp_path)
    kernels = [weight for name, weight in model.named_parameters() if weight.ndim == 5 and weight.shape[2] == 3]
    assert kernels
    assert not any(bool(weight.detach()[:, :, :2].any()) for weight in kernels)
    assert (tmp_path / "config.json").exists()
    assert model.config.scaling_factor != 1.0


def test_decoder_stage_changes_no_latent(tmp_path):
    model = train_vae.new_vae()
    clip = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    model.use_framewise_encoding = False
    with torch.no_grad():
        before = model.eval().encode(clip).latent_dist.mean
    train_vae.train_decoder(model, train_vae.VaeStage(seconds=1, rate=1e-3, batch=1), tmp_path)
    with torch.no_grad():
        assert torch.equal(before, model.encode(clip).latent_dist.mean)
    assert all(weight.requires_grad for weight in model.parameters())


def tiny_table(texts: list[str]) -> CaptionTable:
    generator = torch.Generator().manual_seed(0)
    return CaptionTable(
        {
            text: (torch.randn(len(text.split()), 128, generator=generator), torch.randn(64, generator=generator))
            for text in texts
        }
    )


def test_caption_table_and_shards_read_back(tmp_path, vae):
    table = tiny_table(["", "a red circle", "a blue star", "moving left slowly today"])
    table.save(tmp_path / "captions.safetensors")
    loaded = CaptionTable.load(tmp_path / "captions.safetensors")
    for text, (tokens, pooled) in table.embeddings.items():
        assert torch.equal(loaded[text][0], tokens)
        assert torch.equal(loaded[text][1], pooled)
    encode_shard(vae, tmp_path / "shard.safetensors", count=3, frames=5, seed=1)
    latents, first, specs = read_shard(tmp_path / "shard.safetensors")
    assert latents.shape == (3, 2, 8, 8, 16)
    assert first.shape == (3, 1, 8, 8, 16)
    assert all(isinstance(spec, ClipSpec) for spec in specs)
    assert caption(specs[0]) in every_caption()


class Recorder(torch.nn.Module):
    """Stands for the transformer: remembers its inputs and predicts zero."""

    def forward(self, hidden_states, timestep, scale_factor, **rest):
        self.inputs, self.time, self.scale_factor = hidden_states, timestep, scale_factor
        return torch.zeros_like(hidden_states[..., :16])


def test_image_to_video_samples_follow_the_inference_contract():
    """Traps B3, B4, B18: frame 0 is the clean image latent without loss, mask 1 only there, condition channels zero."""
    torch.manual_seed(0)
    model = Recorder()
    clean, first = torch.full((6, 3, 4, 4, 16), 2.0), torch.full((6, 1, 4, 4, 16), 7.0)
    batch = train_dit.Batch(clean, first, torch.zeros(6, 5, 128), torch.zeros(6, 64))
    settings = train_dit.DitSettings(1, image_share=1.0)
    loss = train_dit.sample_loss(model, batch, settings, random.Random(0))
    latents, condition, mask = model.inputs[..., :16], model.inputs[..., 16:32], model.inputs[..., 32:]
    assert torch.equal(latents[:, :1], first)
    assert not condition.any()
    assert bool((mask[:, 0] == 1).all())
    assert not mask[:, 1:].any()
    sigma = model.time / 1000
    assert float(sigma.min()) > 0
    assert float(sigma.max()) < 1
    # noise - clean, recovered from the noisy frames: the loss of a model that says zero is its mean square.
    s = sigma.view(-1, 1, 1, 1, 1)
    target = (latents[:, 1:] - clean[:, 1:]) / s
    assert torch.allclose(loss, target.square().mean(), rtol=1e-4)


def test_text_to_video_samples_have_no_mask():
    model = Recorder()
    batch = train_dit.Batch(
        torch.zeros(4, 2, 4, 4, 16), torch.ones(4, 1, 4, 4, 16), torch.zeros(4, 5, 128), torch.zeros(4, 64)
    )
    train_dit.sample_loss(model, batch, train_dit.DitSettings(1, image_share=0.0), random.Random(0))
    assert not model.inputs[..., 16:].any()


def test_average_starts_fast_and_saves_the_mean(tmp_path):
    model = train_dit.new_transformer()
    average = train_dit.Average(model, 0.5)
    weight = next(model.parameters())
    start = weight.detach().clone()
    with torch.no_grad():
        weight += 1
    average.update()
    assert torch.allclose(average.mean[0], start + (1 - min(0.5, 2 / 21)), atol=1e-5)
    average.save(tmp_path)
    assert torch.allclose(weight, start + 1)
    assert (tmp_path / "config.json").exists()


@pytest.mark.slow
def test_every_stage_of_the_build_runs(tmp_path):
    builder = build.Builder(tmp_path / "work", tmp_path / "weights", minutes=0.2, clips=16)
    assert replace(builder, minutes=1).seconds("transformer") == pytest.approx(27)
    builder.run(None)
    written = {
        str(path.relative_to(tmp_path / "weights")) for path in (tmp_path / "weights").rglob("*") if path.is_file()
    }
    assert "transformer/diffusion_pytorch_model.safetensors" in written
    assert "vae/diffusion_pytorch_model.safetensors" in written
    assert "tokenizer/tokenizer.json" in written
    total = sum(path.stat().st_size for path in (tmp_path / "weights").rglob("*") if path.is_file())
    assert total < 25_000_000
    # Finished stages are skipped: a second run changes nothing.
    stamp = (tmp_path / "weights" / "vae" / "config.json").stat().st_mtime_ns
    builder.run(None)
    assert (tmp_path / "weights" / "vae" / "config.json").stat().st_mtime_ns == stamp
