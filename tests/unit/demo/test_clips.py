"""The grammar of the demo: captions and clips."""

import random
import subprocess
import sys

import pytest
import torch

from backend.demo import clips
from backend.demo.clips import ClipSpec


def test_captions_read_back_in_every_wording():
    rng = random.Random(1)
    for _ in range(200):
        spec = clips.random_spec(rng)
        for style in range(clips.CAPTION_STYLES):
            assert clips.parse_caption(clips.caption(spec, style)) == spec


def test_parse_caption_names_the_missing_word():
    with pytest.raises(ValueError, match="no shape"):
        clips.parse_caption("a red thing moves left on a black background")
    with pytest.raises(ValueError, match="no background"):
        clips.parse_caption("a red circle moves left")


def test_captions_of_the_clip_shapes_that_a_lora_may_teach():
    spec = ClipSpec("lime", "heart", "grow", "navy")
    assert clips.parse_caption(clips.caption(spec)) == spec


@pytest.mark.parametrize("size", [None, "small", "big"])
@pytest.mark.parametrize("motion", clips.MOTIONS)
def test_shapes_stay_inside_the_picture(motion: str, size: str | None):
    corners = [point for shape in clips.SHAPES if shape != "circle" for point in clips._polygon(shape)]
    left, right = min(x for x, _ in corners), max(x for x, _ in corners)
    top, bottom = min(y for _, y in corners), max(y for _, y in corners)
    for seed in range(50):
        x, y, radius = clips.track(motion, size, 17, 64, 64, random.Random(seed))
        assert float((x + left * radius).min()) >= 0
        assert float((x + right * radius).max()) <= 64
        assert float((y + top * radius).min()) >= 0
        assert float((y + bottom * radius).max()) <= 64


def test_clip_layout_range_and_repeatability():
    spec = clips.random_spec(random.Random(3))
    first = clips.draw(spec, random.Random(4), frames=9, height=48, width=80)
    again = clips.draw(spec, random.Random(4), frames=9, height=48, width=80)
    other = clips.draw(spec, random.Random(5), frames=9, height=48, width=80)
    assert first.shape == (3, 9, 48, 80)
    assert first.dtype == torch.float32
    assert float(first.abs().max()) <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_one_frame_is_the_middle_of_the_path():
    still = clips.draw(ClipSpec("white", "circle", "left", "black"), random.Random(0), frames=1)
    columns = (still[0, 0] + 1).sum(0)
    middle = float((columns * (torch.arange(64) + 0.5)).sum() / columns.sum())
    assert abs(middle - 32) < 4


def test_polygon_distance_of_a_square_is_exact():
    x = torch.tensor([[0.0, 2.0, 0.85, 1.85]])
    y = torch.tensor([[0.0, 0.0, 0.0, 1.85]])
    expected = torch.tensor([[-0.85, 1.15, 0.0, 2**0.5]])
    assert torch.allclose(clips.shape_distance("square", x, y), expected, atol=1e-6)


def test_polygon_sign_agrees_with_a_winding_count():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 1, 4000, generator=generator) * 3 - 1.5
    for shape in ("triangle", "star", "heart", "cross", "arrow"):
        corners = clips._polygon(shape)
        turn = torch.zeros_like(x)
        for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]], strict=True):
            ux, uy, vx, vy = ax - x, ay - y, bx - x, by - y
            turn += torch.atan2(ux * vy - uy * vx, ux * vx + uy * vy)
        inside = turn.abs() > 3
        assert torch.equal(inside, clips.shape_distance(shape, x, y) < 0), shape


def test_balanced_specs_use_every_word_equally_often():
    specs = clips.balanced_specs(64, random.Random(0))
    for field, words in (("color", clips.COLORS), ("shape", clips.SHAPES), ("background", clips.BACKGROUNDS)):
        counts = [sum(getattr(spec, field) == word for spec in specs) for word in words]
        assert max(counts) - min(counts) <= 1, field
    counts = [sum(spec.motion == motion for spec in specs) for motion in clips.MOTIONS]
    assert max(counts) - min(counts) <= 1


def test_to_uint8_rounds_and_orders_frames_first():
    clip = torch.zeros(3, 2, 4, 5)
    clip[0] = 1
    clip[1] = -1.2
    frames = clips.to_uint8(clip)
    assert frames.shape == (2, 4, 5, 3)
    assert frames.dtype == torch.uint8
    assert frames[0, 0, 0].tolist() == [255, 0, 128]


def test_clips_and_measure_load_no_engine():
    code = (
        "import sys, backend.demo.clips, backend.demo.measure; "
        "print([name for name in ('diffusers', 'transformers', 'gradio', 'av', 'pydantic') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() == "[]"
