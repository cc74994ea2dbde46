"""What is wrong with images and videos, judged from what was measured and from the settings of their dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from backend.data.buckets import Nabla, plan_source
from backend.data.frames import TARGET_FPS, shortest_clip
from backend.data.items import MediaFacts, usable_frames
from backend.data.lint.duplicates import alike_pairs, group_pairs
from backend.data.lint.facts import Fact
from backend.data.lint.finding import Finding
from backend.data.lint.measure import Span
from backend.data.scan import Source

if TYPE_CHECKING:
    from backend.config.dataset import DatasetEntry

# Rates this near to 24 are 24: 23.976 is. Up to 5 % (25 a second) the speed is off by less than people notice.
_RATE_TOLERANCE = 0.01
_RATE_UNNOTICED = 0.05
# Enlarged by this factor a picture is visibly soft; by 2, three quarters of its pixels are made up.
_SOFT, _MADE_UP = 1.3, 2.0
# Bars must take this share of the side after the crop, or training hardly sees them.
_BAR_SEEN = 0.01
# From this share of black frames on, a clip is nothing but black.
_ALL_BLACK = 0.95


class Checked(NamedTuple):
    """A source of a dataset and what is known of it."""

    entry: DatasetEntry
    source: Source
    fact: Fact


def broken_finding(dataset: int, identity: str, reason: str) -> Finding:
    """A source that cannot be used."""
    return Finding("broken", "error", dataset, (identity,), reason, {}, ("exclude",))


def source_findings(checked: Checked, nabla: Nabla = False) -> list[Finding]:
    """All findings about one source by itself."""
    entry, source, fact = checked
    found = [_size(checked, nabla)]
    if source.kind == "video" and not fact.measurement.clips:
        found.append(_too_short(checked))
    else:
        found += [_black(checked), _bars(checked, nabla), _frozen(checked), _cut(checked)]
    if source.kind == "video" and fact.media.variable_rate and entry.source_fps != "auto":
        found.append(_variable(checked))
    return [finding for finding in found if finding is not None]


def rate_findings(entry: DatasetEntry, checked: Sequence[Checked]) -> list[Finding]:
    """One finding for each rate other than 24 of the videos of a dataset that takes frames as they are."""
    if entry.kind != "video" or entry.source_fps is not None:
        return []
    rates: dict[float, list[str]] = {}
    for _, source, fact in checked:
        rate = fact.media.fps
        if rate and not fact.media.variable_rate and abs(rate / TARGET_FPS - 1) > _RATE_TOLERANCE:
            rates.setdefault(round(rate, 2), []).append(source.identity)
    return [_odd_rate(entry, rate, identities) for rate, identities in sorted(rates.items())]


def duplicate_findings(checked: Sequence[Checked]) -> list[Finding]:
    """One finding for each group of sources that are the same or look alike, over all datasets.

    A file that several datasets use (at several sizes, say) is no duplicate of itself. Flat pictures have no look and
    are only compared by their content.
    """
    once: dict[tuple[str, str], Checked] = {}
    for one in checked:
        once.setdefault((one.source.kind, one.source.location), one)
    found = []
    for kind in ("image", "video"):
        found += _duplicates([one for one in once.values() if one.source.kind == kind])
    return found


def _duplicates(checked: Sequence[Checked]) -> list[Finding]:
    looking = [place for place, one in enumerate(checked) if one.fact.measurement.look is not None]
    looks = [look for one in checked if (look := one.fact.measurement.look) is not None]
    bits = {(looking[one], looking[two]): differing for one, two, differing in alike_pairs(looks)}
    first_of: dict[str, int] = {}
    for place, one in enumerate(checked):
        first = first_of.setdefault(one.fact.content, place)
        if first != place:
            bits[first, place] = 0
    return [
        _alike([checked[place] for place in group], _worst(group, bits))
        for group in group_pairs(len(checked), list(bits))
    ]


def _worst(group: Sequence[int], bits: Mapping[tuple[int, int], int]) -> int:
    members = set(group)
    return max(differing for pair, differing in bits.items() if members.issuperset(pair))


def _alike(group: Sequence[Checked], bits: int) -> Finding:
    exact = len({one.fact.content for one in group}) == 1
    what = "are the same file" if exact else "look alike"
    message = (
        f"{len(group)} sources {what}, so training sees this content {len(group)} times as often as others. "
        "Exclude all but the best one, unless that is wanted."
    )
    values = {"datasets": [one.entry.index for one in group], "exact": exact, "differing_bits": bits, "of_bits": 320}
    identities = tuple(one.source.identity for one in group)
    return Finding("near_duplicate", "warning", group[0].entry.index, identities, message, values, ("exclude",))


def _too_short(checked: Checked) -> Finding:
    entry, source, fact = checked
    frames, needed = usable_frames(entry, fact.media), shortest_clip(entry)
    message = (
        f"It has {frames} frames and the shortest clip of this dataset has {needed}, so nothing of it is trained. "
        "Add a smaller length to target_frames, or exclude it."
    )
    values = {"frames": frames, "needed_frames": needed, "seconds": [round(fact.media.seconds, 3)]}
    return Finding("too_short", "error", entry.index, (source.identity,), message, values, ("exclude",))


def _size(checked: Checked, nabla: Nabla) -> Finding | None:
    entry, source, fact = checked
    width, height = fact.media.width, fact.media.height
    bucket, _ = plan_source((width, height), entry, nabla=nabla)
    factor = max(bucket.width / width, bucket.height / height)
    if factor < _SOFT:
        return None
    small = factor >= _MADE_UP
    message = (
        f"It has {width} x {height} pixels and is enlarged {factor:.1f} times to {bucket.width} x {bucket.height}"
        + (", so most of its detail is made up" if small else ", so it is soft")
        + "; the model learns that softness. Use a larger source, a smaller resolution or bucket_no_upscale, "
        "or exclude it."
    )
    values = {"width": width, "height": height, "bucket": [bucket.width, bucket.height], "factor": round(factor, 3)}
    kind, severity = ("too_small", "warning") if small else ("upscaled", "info")
    return Finding(kind, severity, entry.index, (source.identity,), message, values, ("exclude",))  # type: ignore[arg-type]


def _black(checked: Checked) -> Finding | None:
    entry, source, fact = checked
    measured = fact.measurement
    if not measured.black:
        return None
    share = measured.black / measured.frames
    values = {"frames": measured.black, "of_frames": measured.frames, "seconds": _plain(measured.black_seconds)}
    if share >= _ALL_BLACK:
        what = "It is black" if source.kind == "image" else "All that is used of it is black"
        message = f"{what}, so there is nothing to learn from it. Exclude it."
        return Finding("black", "error", entry.index, (source.identity,), message, values, ("exclude",))
    message = (
        f"{measured.black} of the {measured.frames} frames that are used are black ({_spans(measured.black_seconds)}); "
        "the model learns to go black. Cut them off, or exclude it."
    )
    return Finding("black", "warning", entry.index, (source.identity,), message, values, ("exclude",))


def _frozen(checked: Checked) -> Finding | None:
    entry, source, fact = checked
    measured = fact.measurement
    if not measured.frozen:
        return None
    message = (
        f"The picture stands still in {measured.frozen} of the {measured.frames} frames that are used "
        f"({_spans(measured.frozen_seconds)}); the model learns to hold still. Cut it, or exclude it."
    )
    values = {"frames": measured.frozen, "of_frames": measured.frames, "seconds": _plain(measured.frozen_seconds)}
    return Finding("frozen", "warning", entry.index, (source.identity,), message, values, ("exclude",))


def _cut(checked: Checked) -> Finding | None:
    entry, source, fact = checked
    measured = fact.measurement
    if not measured.cuts:
        return None
    at = ", ".join(f"{second:.2f}" for second in measured.cuts[:5]) + (", ..." if len(measured.cuts) > 5 else "")
    message = (
        f"{measured.cut_clips} of its {measured.clips} clips change to another shot (at {at} s); the model learns to "
        "jump. Split the file there or use shorter clips, or exclude it."
    )
    values = {"seconds": list(measured.cuts), "clips": measured.cut_clips, "of_clips": measured.clips}
    return Finding("hard_cut", "warning", entry.index, (source.identity,), message, values, ("exclude",))


def _bars(checked: Checked, nabla: Nabla) -> Finding | None:
    entry, source, fact = checked
    bars = fact.measurement.bars
    if bars is None or not _seen(bars, fact.media, entry, nabla):
        return None
    width, height = fact.media.width, fact.media.height
    left, top = round(bars[0] * width), round(bars[1] * height)
    right, bottom = round(bars[2] * width), round(bars[3] * height)
    where = " and ".join(
        text
        for text, there in (
            (f"{top} px above and {bottom} px below", top),
            (f"{left} px on the left and {right} px on the right", left),
        )
        if there
    )
    message = f"It has black bars (about {where}), which the model learns to draw. Crop the file, or exclude it."
    values = {"box": [left, top, width - right, height - bottom], "bars": [left, top, right, bottom]}
    return Finding("letterbox", "warning", entry.index, (source.identity,), message, values, ("exclude",))


def _seen(bars: Sequence[float], media: MediaFacts, entry: DatasetEntry, nabla: Nabla) -> bool:
    """Whether the crop to the bucket leaves something of the bars."""
    _, plan = plan_source((media.width, media.height), entry, nabla=nabla)
    (width, height), (left, top, right, bottom) = plan.scaled, plan.crop
    cropped = (left / width, top / height, 1 - right / width, 1 - bottom / height)
    return any(bar - cut >= _BAR_SEEN for bar, cut in zip(bars, cropped, strict=True))


def _variable(checked: Checked) -> Finding:
    entry, source, fact = checked
    message = (
        "Its frames are not evenly spaced in time, so taken one after the other their motion stutters. "
        'Set source_fps = "auto" for the dataset, or convert the file to a steady 24 frames per second.'
    )
    values = {"fps": round(fact.media.fps, 3)}
    return Finding(
        "variable_rate", "warning", entry.index, (source.identity,), message, values, ("set_source_fps_auto", "exclude")
    )


def _odd_rate(entry: DatasetEntry, rate: float, identities: Sequence[str]) -> Finding:
    speed = TARGET_FPS / rate
    count = f"{len(identities)} videos have" if len(identities) > 1 else "It has"
    message = (
        f"{count} {rate:g} frames per second, and frames are taken one by one as if it were {TARGET_FPS}: motion is "
        f'learned at {speed:.2f} times its speed. Set source_fps = "auto" for the dataset.'
    )
    severity = "info" if abs(rate / TARGET_FPS - 1) < _RATE_UNNOTICED else "warning"
    values = {"fps": rate, "speed": round(speed, 4), "sources": len(identities)}
    return Finding(
        "odd_fps", severity, entry.index, tuple(identities), message, values, ("set_source_fps_auto", "exclude"),
        subject=f"{rate:g}",
    )  # fmt: skip


def _spans(spans: Sequence[Span]) -> str:
    shown = ", ".join(f"{start:.2f} to {end:.2f} s" for start, end in spans[:5])
    return shown + (", ..." if len(spans) > 5 else "")


def _plain(spans: Sequence[Span]) -> list[list[float]]:
    return [[start, end] for start, end in spans]
