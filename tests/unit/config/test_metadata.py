"""Settings inside files: read back from all four kinds, refused in one sentence from whatever is damaged."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import av
import numpy
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from backend.config.metadata import EXIF_IFD, EXIF_USER_COMMENT, SETTINGS_KEY, encode_settings, read_settings
from backend.errors import UserError

SETTINGS = {"version": 1, "options": {"prompt": "кот 🎬"}, "seed": 7}
KINDS = ("mp4", "png", "webp", "safetensors")


def _write(path: Path, text: str) -> Path:
    """A small file with `text` under the key, made without the project's writers."""
    image = Image.fromarray(numpy.zeros((16, 16, 3), numpy.uint8))
    if path.suffix == ".png":
        info = PngInfo()
        info.add_text(SETTINGS_KEY, text)
        image.save(path, pnginfo=info)
    elif path.suffix == ".webp":
        exif = Image.Exif()
        exif[EXIF_IFD] = {EXIF_USER_COMMENT: b"ASCII\0\0\0" + text.encode()}
        image.save(path, exif=exif.tobytes())
    elif path.suffix == ".mp4":
        with av.open(str(path), "w", options={"movflags": "use_metadata_tags"}) as container:
            container.metadata[SETTINGS_KEY] = text
            stream = container.add_stream("libx264", rate=24)
            stream.width = stream.height = 16
            stream.pix_fmt = "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
            container.mux(stream.encode(None))
    else:
        header = json.dumps({"__metadata__": {SETTINGS_KEY: text}}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header)
    return path


def test_encoding_is_one_line_of_ascii() -> None:
    text = encode_settings(SETTINGS | {"x": "a\nb\u2028"})
    assert text.isascii()
    assert "\n" not in text
    assert json.loads(text)["options"] == SETTINGS["options"]
    with pytest.raises(ValueError):
        encode_settings({"x": float("nan")})


@pytest.mark.parametrize("kind", KINDS)
def test_settings_are_read_from_every_kind(tmp_path: Path, kind: str) -> None:
    path = _write(tmp_path / f"a.{kind}", encode_settings(SETTINGS))
    assert read_settings(path) == SETTINGS
    upper = path.rename(tmp_path / f"B.{kind.upper()}")
    assert read_settings(str(upper)) == SETTINGS


_DAMAGED = {
    "empty": "", "brace": "{", "number": "5", "list": "[]", "null": "null", "options": '{"options": 5}',
    "none": '{"seed": 1}', "nan": '{"options": {}, "x": NaN}', "huge number": '{"options": {"x": ' + "9" * 5000 + "}}",
    "deep": "[" * 30_000, "too long": '{"options": {"x": "' + "x" * 1_000_001 + '"}}',
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name"),
    # An EXIF comment and a chunk of a PNG cannot even be written that long.
    [(kind, name) for kind in KINDS for name in _DAMAGED if name != "too long" or kind in ("mp4", "safetensors")],
)
def test_damaged_settings_are_one_sentence(tmp_path: Path, kind: str, name: str) -> None:
    with pytest.raises(UserError, match=r"damaged|carries no settings"):
        read_settings(_write(tmp_path / f"a.{kind}", _DAMAGED[name]))


@pytest.mark.parametrize("kind", KINDS)
def test_files_without_settings_and_files_of_another_kind(tmp_path: Path, kind: str) -> None:
    for content in (b"", b"text", random.Random(1).randbytes(5000)):
        path = tmp_path / f"a.{kind}"
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"cannot? be read|that can be read|carries no settings"):
            read_settings(path)


def test_missing_files_folders_and_unknown_suffixes(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(b"x")
    for path, words in (
        (tmp_path / "none.mp4", "does not exist"),
        (tmp_path, "does not exist"),
        (tmp_path / "a.gif", "cannot hold settings"),
        (tmp_path / ("x" * 5000 + ".mp4"), "does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            read_settings(path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own words about damaged EXIF data
@pytest.mark.parametrize("kind", KINDS)
def test_300_damaged_files_never_raise_anything_else(tmp_path: Path, kind: str) -> None:
    """Bits flipped, ends cut, parts repeated: the answer is settings or one sentence."""
    rng = random.Random(kind)
    whole = _write(tmp_path / f"whole.{kind}", encode_settings(SETTINGS)).read_bytes()
    path, refused = tmp_path / f"a.{kind}", 0
    for _ in range(300):
        content = bytearray(whole)
        action = rng.randrange(3)
        if action == 0:
            for _ in range(rng.randint(1, 20)):
                content[rng.randrange(len(content))] = rng.randrange(256)
        elif action == 1:
            del content[rng.randrange(len(content)) :]
        else:
            start = rng.randrange(len(content))
            content[start:start] = content[: rng.randrange(200)]
        path.write_bytes(content)
        try:
            assert isinstance(read_settings(path)["options"], dict)
        except UserError as error:
            assert "\n" not in error.message
            refused += 1
    assert refused > 50


def test_a_playlist_named_like_a_clip_is_not_followed(tmp_path: Path) -> None:
    """A file that tells FFmpeg to open other files or addresses is only a clip that cannot be read."""
    _write(tmp_path / "secret.mp4", encode_settings(SETTINGS))
    for number, text in enumerate((
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{tmp_path / 'secret.mp4'}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile {tmp_path / 'secret.mp4'}\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n",
    )):  # fmt: skip
        (tmp_path / f"{number}.mp4").write_text(text)
        with pytest.raises(UserError, match="not a video that can be read"):
            read_settings(tmp_path / f"{number}.mp4")
