"""Speed of one DiT forward pass beside diffusers' own class: same weights, same inputs, interleaved runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
import torch

from backend.model.load import load_transformer
from tests.integration.diffusers_oracle import randomise

pytestmark = [pytest.mark.bench, pytest.mark.filterwarnings("ignore")]
REPEATS = 7


def _seconds(run: Callable[[], torch.Tensor]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def test_forward_beside_diffusers(tmp_path: Path) -> None:
    """512 wide, 2 text and 4 visual blocks, head size 64, 2,048 visual and 128 text tokens, float32."""
    from diffusers import Kandinsky5Transformer3DModel

    theirs = randomise(
        Kandinsky5Transformer3DModel(
            in_visual_dim=16, out_visual_dim=16, in_text_dim=256, in_text_dim2=128, time_dim=128, model_dim=512,
            ff_dim=2048, num_text_blocks=2, num_visual_blocks=4, patch_size=(1, 2, 2), axes_dims=(16, 24, 24),
            visual_cond=True, attention_type="regular",
        ),
        0,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    ours = load_transformer(tmp_path, rope_bf16_rounding=True)
    hidden, text, pooled = torch.randn(1, 8, 32, 32, 33), torch.randn(1, 128, 256), torch.randn(1, 128)
    moment = torch.tensor([700.0])
    positions = [torch.arange(8), torch.arange(16), torch.arange(16)]

    def run_ours() -> torch.Tensor:
        return ours(hidden, text, pooled, moment)

    def run_theirs() -> torch.Tensor:
        return theirs(
            hidden_states=hidden, encoder_hidden_states=text, pooled_projections=pooled, timestep=moment,
            visual_rope_pos=positions, text_rope_pos=torch.arange(128), scale_factor=(1.0, 2.0, 2.0),
        ).sample  # fmt: skip

    with torch.no_grad():
        parity = float((run_ours() - run_theirs()).abs().max() / run_theirs().abs().max())
        pairs = [(_seconds(run_ours), _seconds(run_theirs)) for _ in range(REPEATS)]
    ours_seconds, theirs_seconds = (median(values) for values in zip(*pairs, strict=True))
    print("\n| what | ours | diffusers | ratio | parity |\n|---|---|---|---|---|")
    print(
        f"| DiT forward, s | {ours_seconds:.3f} | {theirs_seconds:.3f} "
        f"| {theirs_seconds / ours_seconds:.2f} | {parity:.1e} |"
    )
    assert parity < 1e-4
