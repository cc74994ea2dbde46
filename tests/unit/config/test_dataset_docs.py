"""The page of dataset keys: every key is on it, what it says of ranges is true, and its example works."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend.config.dataset import (
    DEFAULTS,
    FOREIGN_KEYS,
    ImageKeys,
    VideoKeys,
    dataset_config,
    dataset_ranges,
    load_dataset_config,
)
from backend.config.dataset_docs import EXAMPLE, dataset_page
from backend.config.dataset_document import DatasetDocument
from backend.errors import Problems


def test_every_key_and_every_ignored_one_has_a_row() -> None:
    rows = [line.split(" | ")[0] for line in dataset_page().splitlines() if line.startswith("| `")]
    for key in {*ImageKeys.model_fields, *VideoKeys.model_fields, *FOREIGN_KEYS}:
        assert f"| `{key}`" in rows, key


def test_the_example_loads_without_a_notice_and_reads_the_same_elsewhere(tmp_path: Path) -> None:
    assert EXAMPLE in dataset_page()
    path = tmp_path / "example.toml"
    path.write_text(EXAMPLE, encoding="utf-8")
    config = load_dataset_config(path)
    assert [entry.kind for entry in config.datasets] == ["video", "video", "image"]
    assert config.datasets[0].exclude == ("broken.mp4", "drafts/*")
    assert config.datasets[2].caption_prefix == "sks style"
    assert not config.notices
    assert not DatasetDocument.open(path).notices()


@pytest.mark.parametrize("key", [key for key, text in dataset_ranges().items() if " to " in text and key != "exclude"])
def test_the_ranges_on_the_page_are_the_real_ones(key: str) -> None:
    """The ends are accepted, what lies just beyond is not."""
    low, high = (float(word) for word in dataset_ranges()[key].split(" each")[0].split(" to "))
    kind = float if isinstance(DEFAULTS[key], float) or key == "source_fps" else int

    def accepted(number: float) -> bool:
        value = [kind(number)] if key == "target_frames" else kind(number)
        try:
            dataset_config({"datasets": [{"video_directory": "/a", key: value}]})
        except (Problems, ValueError):
            return False
        return True

    assert accepted(low)
    assert accepted(high)
    step = 1 if kind is int else 0.01
    assert not accepted(high + step)
    assert low == 0 or not accepted(low - step if kind is int else low / 2)
