"""Names of cache files, read back by a second reader that works as other tools do."""

from __future__ import annotations

import pytest

from backend.data.cache_names import (
    is_unfinished,
    latent_cache_name,
    parse_latent_name,
    parse_text_name,
    text_cache_name,
    unconditional_cache_name,
)
from tests.unit.data.dataset_folder import read_name_as_others


def test_names_are_those_of_other_tools() -> None:
    assert latent_cache_name("a_b", 80, 60) == "a_b_0080x0060_k5.safetensors"
    assert latent_cache_name("a", 1920, 1080, 24, 121) == "a_00024-121_1920x1080_k5.safetensors"
    assert latent_cache_name("a", 12000, 10000, 123456, 1001) == "a_123456-1001_12000x10000_k5.safetensors"
    assert text_cache_name("a b") == "a b_k5_te.safetensors"


@pytest.mark.parametrize("key", ["a", "a_b", "x_00000-025", "a_0064x0064_k5", "[1] x", "ж", "_", "a_k5_te", "x.y"])
def test_names_are_read_back_as_others_read_them(key: str) -> None:
    still, clip, text = latent_cache_name(key, 80, 60), latent_cache_name(key, 64, 48, 5, 25), text_cache_name(key)
    assert read_name_as_others(still, False) == (key, (80, 60), None)
    assert read_name_as_others(clip, True) == (key, (64, 48), (5, 25))
    assert parse_latent_name(still, "image") == (key, 80, 60, None, None)
    assert parse_latent_name(clip, "video") == (key, 64, 48, 5, 25)
    assert parse_text_name(text) == key
    assert parse_latent_name(text, "image") is None
    assert parse_text_name(still) is None


@pytest.mark.parametrize(
    "name",
    ["a.safetensors", "a_k5.safetensors", "a_64x48_k5.safetensors", "_k5.safetensors", "a_0064x0048_k5.safetensor",
     "0064x0048_k5.safetensors", ".a_0064x0048_k5.safetensors", "a_00000-1_0064x0048_k5.safetensors"],
)  # fmt: skip
def test_names_that_are_no_caches(name: str) -> None:
    assert parse_latent_name(name, "video") is None


def test_the_empty_caption_and_unfinished_files_are_no_caches_of_sources() -> None:
    assert parse_text_name(unconditional_cache_name("video")) is None
    assert is_unfinished(".clip_00000-005_0064.0a1b2c3d.tmp.safetensors")
    assert not is_unfinished("clip.0a1b2c3d.tmp.safetensors")
    assert not is_unfinished(unconditional_cache_name("video"))
