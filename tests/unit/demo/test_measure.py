"""The measure: certain on drawn clips, and not fooled by wrong labels."""

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from backend.demo import clips
from backend.demo.clips import ClipSpec, draw, to_uint8
from backend.demo.measure import measure, scores

WORDS = ("color", "shape", "motion", "background")


@pytest.fixture(scope="module")
def drawn() -> tuple[list[torch.Tensor], list[ClipSpec]]:
    rng = random.Random(21)
    specs = clips.balanced_specs(32, rng)
    return [draw(spec, rng) for spec in specs], specs


def test_drawn_clips_are_read_without_a_mistake(drawn):
    videos, specs = drawn
    table, _ = scores([to_uint8(video) for video in videos], specs)
    assert table == dict.fromkeys((*WORDS, "all"), 1.0)


def test_blurred_clips_are_still_read(drawn):
    videos, specs = drawn
    soft = [F.avg_pool2d(video.transpose(0, 1), 3, 1, 1, count_include_pad=False).transpose(0, 1) for video in videos]
    table, _ = scores([to_uint8(video) for video in soft], specs)
    assert table["all"] >= 0.95


def test_wrong_labels_fall_below_every_bar(drawn):
    videos, specs = drawn
    shuffled = random.Random(2).sample(specs, len(specs))
    table, _ = scores([to_uint8(video) for video in videos], shuffled)
    assert table["color"] < 0.4
    assert table["shape"] < 0.5
    assert table["motion"] < 0.4
    assert table["background"] < 0.5


def test_one_wrong_word_is_found(drawn):
    videos, specs = drawn
    for field, value in (("color", "red"), ("shape", "star"), ("motion", "grow"), ("background", "navy")):
        wrong = [spec for spec in specs if getattr(spec, field) != value]
        seen = [measure(to_uint8(video)) for video, spec in zip(videos, specs, strict=True) if spec in wrong][:6]
        expected = [replace(spec, **{field: value}) for spec in wrong][:6]
        assert all(getattr(a, field) != getattr(b, field) for a, b in zip(seen, expected, strict=True))


def test_an_empty_picture_has_no_shape():
    found = measure(torch.full((17, 64, 64, 3), 128, dtype=torch.uint8))
    assert (found.color, found.shape, found.motion, found.background) == (None, None, None, "gray")


def test_a_shape_that_stands_still_is_called_still():
    clip = draw(ClipSpec("red", "circle", "left", "black"), random.Random(0), frames=1)
    assert measure(to_uint8(clip.expand(3, 17, 64, 64))).motion == "still"


def test_new_shapes_and_colors_can_be_asked_for():
    names = (*clips.SHAPES, *clips.NEW_SHAPES)
    for shape in clips.NEW_SHAPES:
        clip = to_uint8(draw(ClipSpec("lime", shape, "up", "gray"), random.Random(3)))
        found = measure(clip, shapes=names)
        assert (found.shape, found.color) == (shape, "lime")


def test_other_sizes_and_numpy_arrays():
    clip = to_uint8(draw(ClipSpec("blue", "star", "down", "beige"), random.Random(3), frames=5, height=128, width=96))
    found = measure(clip.numpy())
    assert (found.color, found.shape, found.motion, found.background) == ("blue", "star", "down", "beige")


def test_anything_but_uint8_video_is_refused():
    with pytest.raises(ValueError, match="uint8"):
        measure(torch.zeros(17, 64, 64, 3))
    with pytest.raises(ValueError, match="uint8"):
        measure(torch.zeros(3, 17, 64, 64, dtype=torch.uint8))
