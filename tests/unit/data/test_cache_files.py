"""Cache files: what other tools find in them, the same bytes each time, and every way of not being valid."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from backend.data.cache_facts import ExpectedLatent, ExpectedText
from backend.data.cache_files import (
    check_latent_cache,
    check_text_cache,
    read_latent_cache,
    read_text_cache,
    write_latent_cache,
    write_text_cache,
)
from backend.data.cache_names import is_unfinished, text_cache_name
from backend.data.items import Item, build_items, look_at
from backend.data.recipes import LatentRecipe, TextRecipe
from backend.data.scan import scan_dataset
from backend.data.stamps import content_hash, stamp_of
from backend.errors import EngineError, UserError
from backend.vae.tiling import Tiling
from tests.unit.data.dataset_folder import (
    LATENTS,
    TEXT,
    add_image,
    add_video,
    cache_item,
    cache_text,
    foreign_latent,
    foreign_text,
    latent_tensors,
    look_at_text,
    make_entry,
    raw_cache,
)


def _header(path: Path) -> dict:
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length])


def _video(folder: Path, facts: str = "80 60 9 24", **keys: object):
    entry = make_entry(folder, "video", **keys)
    add_video(folder / "source" / "clip.mp4", facts)
    items = build_items(entry, scan_dataset(entry).sources, look=look_at_text).items
    return entry, items[0]


def _image(folder: Path, **keys: object):
    entry = make_entry(folder, **keys)
    if not (folder / "source" / "still.png").exists():
        add_image(folder / "source" / "still.png")
    return entry, build_items(entry, scan_dataset(entry).sources).items[0]


def _expected(entry, item: Item, recipe: LatentRecipe = LATENTS) -> ExpectedLatent:
    return recipe.expected(entry, item, stamp_of(item.source.location))


# --- contents -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_clip_holds_the_tensors_and_metadata_of_other_tools(dtype: torch.dtype, tmp_path: Path) -> None:
    entry, item = _video(tmp_path)
    clip, image = (tensor.to(dtype) for tensor in latent_tensors(item))
    path = tmp_path / item.latent_name
    metadata = LATENTS.metadata(entry, item, item.stamp, "0123456789abcdef")
    size = write_latent_cache(path, clip, image, metadata)
    assert path.name == f"clip_00000-005_{item.bucket.width:04d}x{item.bucket.height:04d}_k5.safetensors"
    assert size == path.stat().st_size
    name = str(dtype).removeprefix("torch.")
    height, width = item.bucket.height // 8, item.bucket.width // 8
    with safe_open(path, framework="pt") as handle:
        stored = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
        told = handle.metadata()
    assert set(stored) == {f"latents_2x{height}x{width}_{name}", f"latents_image_2x{height}x{width}_{name}"}
    assert torch.equal(stored[f"latents_2x{height}x{width}_{name}"], clip)
    assert torch.equal(stored[f"latents_image_2x{height}x{width}_{name}"], image)
    assert told == metadata
    known = {"architecture": "kandinsky5", "format_version": "1.0.1", "frame_count": "5"}
    known |= {"width": str(item.bucket.width), "height": str(item.bucket.height)}
    assert {key: told[key] for key in known} == known
    for key in ("source_size", "source_mtime_ns", "source_hash", "resolution", "source_fps", "frame_extraction",
                "vae_fingerprint", "seed", "vae_tiling_temporal_window", "clip_start", "source_name"):  # fmt: skip
        assert key in told
    back = read_latent_cache(path)
    assert back.ours
    assert torch.equal(back.latents, clip)
    assert back.latents_image is not None
    assert torch.equal(back.latents_image, image)
    assert check_latent_cache(path, _expected(entry, item)).state == "valid"


def test_a_still_is_named_by_its_own_size_and_tells_no_frame_count(tmp_path: Path) -> None:
    entry, item = _image(tmp_path)
    assert item.latent_name == "still_0080x0060_k5.safetensors"
    cache_item(entry, item)
    metadata = read_latent_cache(Path(entry.cache_directory) / item.latent_name).metadata
    assert (metadata["width"], metadata["height"]) == ("80", "60")
    assert "frame_count" not in metadata


def test_a_text_holds_the_tensors_and_metadata_of_other_tools(tmp_path: Path) -> None:
    text, pooled = torch.randn(7, 24).bfloat16(), torch.randn(12)
    path = tmp_path / text_cache_name("clip")
    write_text_cache(path, text, pooled, TEXT.metadata("video", 'две "кошки"'))
    with safe_open(path, framework="pt") as handle:
        stored = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
        told = handle.metadata()
    assert set(stored) == {"text_embeds_bfloat16", "pooled_embed_float32", "attention_mask"}
    assert torch.equal(stored["text_embeds_bfloat16"], text)
    assert torch.equal(stored["pooled_embed_float32"], pooled)
    assert stored["attention_mask"].dtype == torch.bool
    assert stored["attention_mask"].tolist() == [True] * 7
    known = {"architecture": "kandinsky5", "format_version": "1.0.1", "caption1": 'две "кошки"'}
    known |= {"template": "video", "max_length": "256", "qwen_fingerprint": "qwen-1", "clip_fingerprint": "clip-1"}
    assert {key: told[key] for key in known} == known
    assert TEXT.metadata("image", "x")["template"] == "image"
    assert TEXT.metadata("image", "x")["max_length"] == "512"
    back = read_text_cache(path, "video")
    assert torch.equal(back.text, text)
    assert torch.equal(back.pooled, pooled)


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    """The library shuffles metadata from run to run; the order in which keys were put together must not show either."""
    entry, item = _video(tmp_path)
    clip, image = latent_tensors(item)
    metadata = LATENTS.metadata(entry, item, item.stamp, "0123456789abcdef")
    backwards = dict(reversed(metadata.items()))
    write_latent_cache(tmp_path / "a", clip, image, metadata)
    write_latent_cache(tmp_path / "b", clip.clone(), image.clone(), backwards)
    # A view that is not contiguous holds the same numbers.
    write_latent_cache(tmp_path / "c", clip.transpose(2, 3).contiguous().transpose(2, 3), image, metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    length = struct.unpack("<Q", (tmp_path / "a").read_bytes()[:8])[0]
    assert length % 8 == 0
    assert list(_header(tmp_path / "a")["__metadata__"]) == sorted(metadata)


def test_a_source_name_that_is_not_utf8_is_stored_readably(tmp_path: Path) -> None:
    entry, item = _video(tmp_path)
    item = item._replace(source=item.source._replace(identity="caf\udce9.mp4"))
    path = tmp_path / "x.safetensors"
    write_latent_cache(path, *latent_tensors(item), LATENTS.metadata(entry, item, item.stamp, "0"))
    with safe_open(path, framework="pt") as handle:
        assert handle.metadata()["source_name"] == "caf?.mp4"


def test_wrong_tensors_and_values_that_are_no_numbers_are_never_written(tmp_path: Path) -> None:
    entry, item = _video(tmp_path)
    clip, image = latent_tensors(item)
    metadata = LATENTS.metadata(entry, item, item.stamp, "0")
    path = tmp_path / "x.safetensors"
    for bad_clip, bad_image in (
        (clip[:8], image), (clip[:, :1], image), (clip, image[:, :1]), (clip.half(), image),
        (clip.double(), image.double()),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            write_latent_cache(path, bad_clip, bad_image, metadata)
    broken = clip.clone()
    broken[3, 1, 2, 1] = torch.nan
    with pytest.raises(EngineError, match="not numbers") as caught:
        write_latent_cache(path, broken, image, metadata)
    assert caught.value.phase == "vae"
    with pytest.raises(ValueError):
        write_text_cache(path, torch.zeros(0, 24), torch.zeros(12), {})
    with pytest.raises(EngineError):
        write_text_cache(path, torch.full((2, 4), torch.inf), torch.zeros(12), {})
    assert not path.exists()
    assert not list(tmp_path.glob(".*"))


def test_item_seeds_depend_on_the_item_and_the_base_only(tmp_path: Path) -> None:
    _, item = _video(tmp_path)
    seed = replace(LATENTS, seed=1).item_seed(item)
    assert seed == replace(LATENTS, seed=1).item_seed(item._replace(stamp=item.stamp._replace(mtime_ns=5)))
    assert seed != replace(LATENTS, seed=2).item_seed(item)
    assert seed != replace(LATENTS, seed=1).item_seed(item._replace(latent_name="other"))
    assert 0 <= seed < 1 << 63


# --- verdicts on our own files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vae": "vae-2"}, "VAE: was vae-1, now vae-2"),
        ({"vae_dtype": "bfloat16"}, "VAE number format: was float32, now bfloat16"),
        ({"posterior": "sample", "seed": 7}, "posterior: was mode, now sample, seed 7"),
        ({"tiling": Tiling(temporal_window=32, temporal_stride=16)}, "VAE tiling: was none, now time 32/16"),
    ],
)
def test_a_clip_is_stale_for_each_way_of_making_it(change: dict, reason: str, tmp_path: Path) -> None:
    entry, item = _video(tmp_path)
    cache_item(entry, item)
    path = Path(entry.cache_directory) / item.latent_name
    verdict = check_latent_cache(path, _expected(entry, item, replace(LATENTS, **change)))
    assert verdict == ("stale", (reason,), False)
    # What nobody knows is not compared: without a VAE only the dataset counts.
    assert check_latent_cache(path, _expected(entry, item, LatentRecipe())).state == "valid"


def test_an_unused_seed_and_an_equal_tiling_change_nothing(tmp_path: Path) -> None:
    entry, item = _video(tmp_path)
    cache_item(entry, item)
    path = Path(entry.cache_directory) / item.latent_name
    same = Tiling(temporal_enabled=False, spatial_enabled=False, spatial_tile=256, spatial_stride=128)
    for recipe in (replace(LATENTS, seed=9), replace(LATENTS, tiling=same)):
        assert check_latent_cache(path, _expected(entry, item, recipe)).state == "valid"
    sampled = replace(LATENTS, posterior="sample", seed=1)
    cache_item(entry, item, sampled)
    assert check_latent_cache(path, _expected(entry, item, sampled)).state == "valid"
    verdict = check_latent_cache(path, _expected(entry, item, replace(sampled, seed=2)))
    assert verdict.reasons == ("posterior: was sample, seed 1, now sample, seed 2",)


def test_a_clip_is_stale_for_each_setting_of_the_dataset(tmp_path: Path) -> None:
    """The names are kept equal on purpose, so that only what the file says can tell."""
    entry, item = _video(tmp_path, "80 60 40 24")
    cache_item(entry, item)
    path = Path(entry.cache_directory) / item.latent_name
    other, changed = _video(tmp_path, "80 60 40 24", target_frames=[9])
    verdict = check_latent_cache(path, _expected(other, changed))
    assert verdict.reasons[0] == "frames: was 5, now 9"
    assert all(reason.startswith("frames") for reason in verdict.reasons)
    other, changed = _video(tmp_path, "80 60 40 24", resolution=[128, 96])
    bucket = f"{changed.bucket.width}x{changed.bucket.height}"
    verdict = check_latent_cache(path, _expected(other, changed))
    assert verdict.reasons == (f"resolution: was {item.bucket.width}x{item.bucket.height}, now {bucket}",)
    other, changed = _video(tmp_path, "80 60 40 24", source_fps=12.0)
    assert check_latent_cache(path, _expected(other, changed)).reasons == ("frame rate: was as stored, now 12 to 24",)
    clip = type(item.clip)(3, 5)
    verdict = check_latent_cache(path, _expected(entry, item._replace(clip=clip)))
    assert verdict.reasons == ("clip start: was 0, now 3",)


def test_extraction_and_batch_do_not_matter_when_the_frames_are_the_same(tmp_path: Path) -> None:
    entry, item = _video(tmp_path)
    cache_item(entry, item)
    other, same = _video(tmp_path, frame_extraction="chunk", batch_size=4, num_repeats=3)
    path = Path(entry.cache_directory) / item.latent_name
    assert same.latent_name == item.latent_name
    assert check_latent_cache(path, _expected(other, same)).state == "valid"


def test_a_changed_source_is_noticed_and_a_touched_one_is_not_stale(tmp_path: Path) -> None:
    entry, item = _image(tmp_path)
    cache_item(entry, item)
    path, source = Path(entry.cache_directory) / item.latent_name, item.source.path
    status = source.stat()
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns + 5_000_000_000))
    assert check_latent_cache(path, _expected(entry, item)).state == "valid"
    raw = source.read_bytes()
    source.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert check_latent_cache(path, _expected(entry, item)).reasons == ("source: its content changed",)
    source.write_bytes(raw + b"!")
    verdict = check_latent_cache(path, _expected(entry, item))
    assert verdict.reasons == (f"source: had {len(raw)} bytes, now {len(raw) + 1}",)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"qwen": "qwen-2"}, "Qwen encoder: was qwen-1, now qwen-2"),
        ({"clip": "clip-2"}, "CLIP encoder: was clip-1, now clip-2"),
        ({"text_dtype": "nf4"}, "text number format: was bfloat16, now nf4"),
        ({"max_length": 512}, "token limit: was 256, now 512"),
    ],
)
def test_a_text_is_stale_for_each_way_of_making_it(change: dict, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a_k5_te.safetensors"
    cache_text(path, "video", "a clip")
    assert check_text_cache(path, TEXT.expected("video", "a clip")).state == "valid"
    assert check_text_cache(path, TextRecipe().expected("video", "a clip")).state == "valid"
    assert check_text_cache(path, replace(TEXT, **change).expected("video", "a clip")) == ("stale", (reason,), False)


def test_a_text_is_stale_when_caption_or_template_changed(tmp_path: Path) -> None:
    path = tmp_path / "a_k5_te.safetensors"
    cache_text(path, "image", "a clip")
    assert check_text_cache(path, TEXT.expected("image", "a clip!")).reasons == ("caption: changed",)
    reasons = check_text_cache(path, TEXT.expected("video", "a clip")).reasons
    assert reasons[0] == "template: was image, now video"
    assert [reason.split(":")[0] for reason in reasons] == ["template", "template text", "token limit"]


# --- files of other tools -----------------------------------------------------------------------------------------


def test_a_latent_cache_of_another_tool_is_read_when_its_frames_and_size_fit(tmp_path: Path) -> None:
    entry, item = _video(tmp_path, "80 60 40 24", target_frames=[25])
    height, width = item.bucket.height // 8, item.bucket.width // 8
    path = foreign_latent(tmp_path / item.latent_name, (7, height, width), 25)
    verdict = check_latent_cache(path, _expected(entry, item))
    assert verdict.state == "foreign"
    assert verdict.usable
    assert not read_latent_cache(path).ours
    foreign_latent(path, (5, height, width), 25)
    verdict = check_latent_cache(path, _expected(entry, item))
    assert verdict == ("stale", ("frames: 5 latent frames, 25 frames have 7",), False)
    with pytest.raises(UserError, match="5 latent frames"):
        read_latent_cache(path)
    foreign_latent(path, (7, height * 2, width), 25)
    verdict = check_latent_cache(path, _expected(entry, item))
    size = f"{item.bucket.width}x{item.bucket.height}"
    assert verdict.reasons == (f"resolution: made for {width * 8}x{height * 16}, now {size}",)


def test_a_text_cache_of_another_tool_is_refused_for_videos_and_read_for_stills(tmp_path: Path) -> None:
    """Trap T1: other tools write the texts of videos with the template for images."""
    path = foreign_text(tmp_path / "a_k5_te.safetensors", "a clip")
    verdict = check_text_cache(path, TEXT.expected("video", "a clip"))
    assert verdict.state == "foreign"
    assert not verdict.usable
    assert "template for images" in verdict.reasons[0]
    with pytest.raises(UserError, match="template for images"):
        read_text_cache(path, "video")
    verdict = check_text_cache(path, TEXT.expected("image", "a clip"))
    assert verdict.state == "foreign"
    assert verdict.usable
    assert read_text_cache(path, "image").text.shape == (3, 24)
    assert check_text_cache(path, TEXT.expected("image", "other")) == ("stale", ("caption: changed",), False)
    path.write_bytes(path.read_bytes()[:-3] + bytes(3))
    with pytest.raises(UserError, match="no token"):
        read_text_cache(path, "image")


# --- damage -------------------------------------------------------------------------------------------------------


def test_damaged_caches_are_broken_with_one_sentence_each(tmp_path: Path) -> None:
    entry, item = _video(tmp_path)
    expected = _expected(entry, item)
    height, width = item.bucket.height // 8, item.bucket.width // 8
    path = tmp_path / "x_k5.safetensors"
    assert check_latent_cache(path, expected).state == "missing"
    cache_item(entry, item)
    good = (Path(entry.cache_directory) / item.latent_name).read_bytes()
    path.mkdir()
    _assert_broken(path, expected)
    path.rmdir()
    for raw in (b"", b"x", good[:7], good[:100], good[:-1], good + b"\0", b"\xff" * 64, good[:8] + b"x" + good[9:]):
        path.write_bytes(raw)
        _assert_broken(path, expected)
    shape, architecture = [16, 2, height, width], {"architecture": "kandinsky5", "frame_count": "5"}
    name = f"latents_2x{height}x{width}_float16"
    image = {f"latents_image_2x{height}x{width}_float16": ("F16", shape)}
    for tensors, metadata in (
        ({name: ("F16", shape)} | image, {"architecture": "hunyuan_video"}),
        ({name: ("F16", shape)} | image, None),
        (image, architecture),
        ({name: ("F32", shape)} | image, architecture),
        ({name: ("F16", [16, 3, height, width])} | image, architecture),
        ({name: ("F16", [8, 2, height, width])} | image, architecture),
        ({name: ("F16", shape), "latents_image_2x1x1_float16": ("F16", [16, 2, 1, 1])}, architecture),
        ({name: ("F16", shape)}, architecture | {"fingerprint_version": "1"}),
        ({name: ("F16", shape)} | image, architecture | {"fingerprint_version": "1"}),
        ({name: ("F16", shape), f"latents_2x{height}x{width}_float32": ("F32", shape)} | image, architecture),
    ):
        raw_cache(path, tensors, metadata)
        _assert_broken(path, expected)


def test_damaged_texts_are_broken(tmp_path: Path) -> None:
    path, expected = tmp_path / "x_k5_te.safetensors", TEXT.expected("image", "a")
    assert check_text_cache(path, expected).state == "missing"
    text, pooled = {"text_embeds_bfloat16": ("BF16", [3, 24])}, {"pooled_embed_float32": ("F32", [12])}
    known = {"architecture": "kandinsky5", "caption1": "a"}
    for tensors, metadata in (
        (text, known), (pooled, known), (text | pooled, {}), ({"text_embeds_float16": ("F16", [72])} | pooled, known),
        (text | pooled | {"attention_mask": ("BOOL", [4])}, known),
        ({"text_embeds_bfloat16": ("BF16", [0, 24])} | pooled, known),
    ):  # fmt: skip
        raw_cache(path, tensors, metadata)
        _assert_broken(path, expected)


def _assert_broken(path: Path, expected: ExpectedLatent | ExpectedText) -> None:
    check = check_latent_cache if isinstance(expected, ExpectedLatent) else check_text_cache
    verdict = check(path, expected)
    assert verdict.state == "broken"
    assert not verdict.usable
    (reason,) = verdict.reasons
    assert path.name in reason
    assert "ownload" not in reason
    with pytest.raises(UserError):
        read_latent_cache(path) if check is check_latent_cache else read_text_cache(path, "image")


def test_numbers_that_are_none_are_found_when_a_file_is_read(tmp_path: Path) -> None:
    entry, item = _video(tmp_path)
    cache_item(entry, item)
    path = Path(entry.cache_directory) / item.latent_name
    raw = bytearray(path.read_bytes())
    raw[-4:] = struct.pack("<f", float("nan"))
    path.write_bytes(raw)
    with pytest.raises(UserError, match="not numbers"):
        read_latent_cache(path)


_WRITER = """
import sys, torch
from pathlib import Path
from backend.data.cache_files import write_latent_cache
folder = Path(sys.argv[1])
clip, image = torch.ones(16, 2, 128, 128), torch.ones(16, 2, 128, 128)
print("ready", flush=True)
for number in range(10**9):
    metadata = {"architecture": "kandinsky5", "frame_count": "5"}
    write_latent_cache(folder / f"{number % 5}_00000-005_1024x1024_k5.safetensors", clip, image, metadata)
"""


def test_a_killed_writer_leaves_whole_files_only(tmp_path: Path, repository: Path) -> None:
    """Ten kills at different moments of one long series of writes, each followed by a look at every file."""
    program = tmp_path / "writer.py"
    program.write_text(_WRITER, encoding="utf-8")
    copies = tmp_path / "copies"
    writer = subprocess.Popen(
        [sys.executable, str(program), str(tmp_path / "cache")],
        cwd=repository, env={**os.environ, "PYTHONPATH": str(repository)}, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("cache/[!.]*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        # A stopped process at a random moment is what a kill leaves; the last one is a real kill.
        for _ in range(9):
            writer.send_signal(signal.SIGSTOP)
            shutil.copytree(tmp_path / "cache", copies)
            writer.send_signal(signal.SIGCONT)
            time.sleep(0.01)
            _assert_whole(copies)
            shutil.rmtree(copies)
    finally:
        writer.kill()
        writer.communicate()
    _assert_whole(tmp_path / "cache")


def _assert_whole(folder: Path) -> None:
    finished = [path for path in folder.iterdir() if not path.name.startswith(".")]
    assert finished
    assert all(is_unfinished(path.name) for path in folder.iterdir() if path.name.startswith("."))
    for path in finished:
        assert bool((read_latent_cache(path).latents == 1).all())


def test_look_at_a_real_picture(tmp_path: Path) -> None:
    _, item = _image(tmp_path)
    stamp, media = look_at(item.source)
    assert media[:3] == (80, 60, 1)
    assert stamp == stamp_of(item.source.location)
    assert content_hash(item.source.location) == content_hash(str(item.source.path))
