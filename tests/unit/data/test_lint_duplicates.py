"""Copies are found whatever was done to them; other clips of the same kind of scene are not."""

from __future__ import annotations

import base64
import random
import time
from pathlib import Path

import numpy
import pytest
from PIL import Image

from backend.data.items import MediaFacts
from backend.data.lint.duplicates import alike_pairs, group_pairs
from backend.data.lint.facts import Fact
from backend.data.lint.looks import WORDS, Look, look_of, look_of_still
from backend.data.lint.measure import Measurement, measure_still, measure_video
from backend.data.lint.media import Checked, duplicate_findings
from backend.data.scan import Source
from backend.data.stamps import Stamp
from backend.data.watchdog import MediaReader
from tests.unit.data.clips import Pixels, write_clip
from tests.unit.data.dataset_folder import make_entry
from tests.unit.data.lint_clips import Draw, panned, scene, slow, with_ball

_TINY_BYTES = WORDS * 96


def _resized(draw: Draw, size: tuple[int, int]) -> Draw:
    return lambda number: numpy.asarray(Image.fromarray(draw(number)).resize(size, Image.Resampling.BICUBIC))


def _levels(draw: Draw, gain: float, offset: float) -> Draw:
    return lambda number: numpy.clip(draw(number) * gain + offset, 0, 255).astype(numpy.uint8)


def _look(path: Path, folder: Path, reader: MediaReader) -> Look:
    entry = make_entry(folder, "video", target_frames=[25])
    info = reader.probe(path)
    media = MediaFacts(info.width, info.height, info.frames, info.fps or 0, info.seconds or 0, info.variable_rate)
    look = measure_video(Source(str(path), "video", path.name, path.stem), entry, media, reader).look
    assert look is not None
    return look


def test_copies_are_found_and_other_clips_of_the_scene_are_not(tmp_path: Path) -> None:
    """Traps: a hash of one frame takes two takes of one scene for copies; one that sees only light takes colours so."""

    def write(name: str, draw: Draw, size: tuple[int, int] = (160, 96), **options: object) -> Path:
        return write_clip(tmp_path / f"{name}.mp4", 40, size, draw=draw, **options)  # type: ignore[arg-type]

    for_all = slow(1)
    copies = [
        write("original", for_all),
        write("quality", for_all, options={"crf": "38"}),
        write("smaller", _resized(for_all, (96, 58)), (96, 58)),
        write("larger", _resized(for_all, (320, 192)), (320, 192)),
        write("brighter", _levels(for_all, 1.0, 20)),
        write("contrast", _levels(for_all, 0.85, 8)),
        write("rate", for_all, rate=30),
        write("codec", for_all, codec="mpeg4", options={"qscale": "4"}),
    ]
    others = [
        write("another scene", slow(2)),
        write("further on", panned(1, lambda number: 400 + 1.5 * number)),
        write("faster", panned(1, lambda number: 6.0 * number)),
        write("other colours", lambda number: for_all(number)[:, :, [1, 2, 0]]),
        write("backwards", lambda number: panned(1, lambda n: 4.0 * n)(39 - number)),
        write("ball", with_ball(1)),
    ]
    with MediaReader(1) as reader:
        looks = [_look(path, tmp_path, reader) for path in (*copies, *others)]
    pairs = alike_pairs(looks)
    groups = group_pairs(len(looks), [(one, two) for one, two, _ in pairs])
    assert groups == [list(range(len(copies)))]
    assert all(one < two for one, two, _ in pairs)


def test_stills_are_compared_whole_and_in_quarters(tmp_path: Path) -> None:
    picture = scene(3, (300, 200))
    marked = picture.copy()
    marked[:100, :150] = scene(4, (150, 100))  # one quarter is another picture
    Image.fromarray(picture).save(tmp_path / "a.png")
    Image.fromarray(picture).resize((150, 100)).save(tmp_path / "b.jpg", quality=60)
    Image.fromarray(marked).save(tmp_path / "c.png")
    Image.fromarray(scene(5, (300, 200))).save(tmp_path / "d.png")
    looks = [measure_still(str(tmp_path / name)).look for name in ("a.png", "b.jpg", "c.png", "d.png")]
    assert None not in looks
    assert [pair[:2] for pair in alike_pairs([look for look in looks if look])] == [(0, 1)]


def test_flat_pictures_have_no_look() -> None:
    """Trap: all black (or white) clips would be copies of each other."""
    flat = numpy.full((WORDS, 72, 128, 3), 7, numpy.uint8)
    assert look_of(flat) is None
    assert look_of_still(flat[0]) is None
    assert look_of(numpy.zeros((WORDS, 4, 128, 3), numpy.uint8)) is None


def _random_looks(count: int, seed: int) -> list[Look]:
    rng = numpy.random.default_rng(seed)
    return [Look(rng.bytes(8 * WORDS).hex(), base64.b64encode(rng.bytes(_TINY_BYTES)).decode()) for _ in range(count)]


def _flipped(look: Look, bits: int, seed: int) -> Look:
    value = int(look.hashes, 16)
    for place in random.Random(seed).sample(range(64 * WORDS), bits):
        value ^= 1 << place
    return Look(f"{value:0{16 * WORDS}x}", look.tiny)


def test_ten_thousand_looks_take_seconds() -> None:
    looks = _random_looks(10_000, 1)
    rng = random.Random(2)
    expected = set()
    for number in range(200):
        original, copy = rng.sample(range(9000), 1)[0], 9000 + number
        looks[copy] = _flipped(looks[original], rng.randrange(30), number)
        expected.add((original, copy))
    started = time.perf_counter()
    pairs = alike_pairs(looks)
    seconds = time.perf_counter() - started
    print(f"\nduplicates among 10,000: {seconds:.2f} s")
    assert expected <= {pair[:2] for pair in pairs}
    # Two copies of one original are a pair as well; nothing else is.
    of = {copy: original for original, copy in expected}
    assert all(of.get(one, one) == of[two] for one, two, _ in pairs)
    assert seconds < 20


def test_groups_do_not_depend_on_the_order_and_equal_a_slow_search() -> None:
    rng = random.Random(5)
    for _ in range(50):
        count = rng.randrange(1, 30)
        pairs = [tuple(sorted(rng.sample(range(count), 2))) for _ in range(rng.randrange(0, 12))] if count > 1 else []
        groups = group_pairs(count, pairs)  # type: ignore[arg-type]
        shuffled = [pair[::-1] for pair in rng.sample(pairs, len(pairs))]
        assert group_pairs(count, shuffled) == groups  # type: ignore[arg-type]
        reached = {place: {place} for place in range(count)}
        for _ in range(count):
            for one, two in pairs:
                reached[one] = reached[two] = reached[one] | reached[two]
        slow_groups = {frozenset(places) for places in reached.values() if len(places) > 1}
        assert {frozenset(group) for group in groups} == slow_groups
        assert groups == sorted(sorted(group) for group in groups)


def _checked(folder: Path, name: str, content: str, look: Look | None, index_kind: str = "video") -> Checked:
    entry = make_entry(folder, index_kind)
    source = Source(str(folder / "source" / name), index_kind, name, name)
    fact = Fact(Stamp(1, 1, 1), MediaFacts(64, 48, 25, 24, 1, False), content, Measurement(25, clips=1, look=look))
    return Checked(entry, source, fact)


def test_duplicates_over_datasets_and_a_file_in_two_of_them(tmp_path: Path) -> None:
    """Trap: one folder in two tables (two resolutions) is no duplicate."""
    first, second = tmp_path / "a", tmp_path / "b"
    look, *_ = _random_looks(1, 3)
    one = _checked(first, "one.mp4", "c1", look)
    same_file = one._replace(entry=make_entry(second, "video"))
    assert duplicate_findings([one, same_file]) == []
    exact = _checked(second, "copy.mp4", "c1", None)
    close = _checked(second, "close.mp4", "c2", _flipped(look, 9, 1))
    [finding] = duplicate_findings([one, same_file, exact, close])
    assert finding.identities == ("one.mp4", "copy.mp4", "close.mp4")
    assert finding.values["differing_bits"] == 9
    assert finding.values["exact"] is False
    [exactly] = duplicate_findings([one, exact])
    assert exactly.values["exact"] is True
    assert "same file" in exactly.message


@pytest.mark.parametrize("seed", range(3))
def test_a_look_is_the_same_again(seed: int) -> None:
    pixels: Pixels = numpy.stack([scene(seed * 10 + number) for number in range(WORDS)])
    look = look_of(pixels)
    assert look is not None
    assert look == look_of(pixels.copy())
    assert len(look.hashes) == 16 * WORDS
    assert len(base64.b64decode(look.tiny)) == _TINY_BYTES
