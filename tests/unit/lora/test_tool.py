"""The LoRA tool as people call it: verbs, mistakes all at once, and what each verb writes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from backend.config.lora_tool import VERBS
from backend.config.tasks import DEMO_WEIGHTS
from backend.events import read_events
from backend.lora.formats import LoraWeights, read_lora, write_lora
from backend.lora.metadata import file_hashes
from backend.lora.targets import linear_targets
from backend.lora_tool import main
from backend.model.load import load_transformer
from tests.unit.lora.models import random_lora, skeleton
from tests.unit.lora.test_convert import _random
from tests.unit.model.helpers import SMALL_HEADS, random_weights

DIT = DEMO_WEIGHTS / "transformer"


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return _written(tmp_path / "lora.safetensors", scale=0.02)


def _written(path: Path, scale: float = 0.02, step: int = 100, alpha: float = 2.0) -> Path:
    layers = {
        name: LoraWeights(pair.down / 14, pair.up * scale, pair.alpha) for name, pair in _random(alpha=alpha).items()
    }
    metadata = {"ss_steps": str(step), "ss_output_name": "test", "k5_task": "k5-demo-t2v"}
    tensors = {}
    for name, pair in layers.items():
        stem = "lora_unet_" + name.replace(".", "_")
        tensors |= {f"{stem}.lora_down.weight": pair.down, f"{stem}.lora_up.weight": pair.up}
        tensors[f"{stem}.alpha"] = torch.tensor(pair.alpha)
    write_lora(path, layers, "kohya", metadata | file_hashes(tensors, metadata))
    return path


def _hash(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as handle:
        return handle.metadata()


def test_verbs_are_listed_and_a_wrong_one_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {verb} " in shown for verb in VERBS)
    for words in ([], ["inspekt"]):
        assert main(words) == 2
        assert "merge" in capsys.readouterr().err


def test_every_mistake_is_reported_at_once(tmp_path: Path, lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "--lora_weight", str(lora), "no.safetensors", "--lora_multiplier", "1", "2", "3"]) == 2
    said = capsys.readouterr().err
    for field in ("--dit: Give", "--output: Give", "--lora_weight: no.safetensors", "3 strengths for 2 LoRAs"):
        assert field in said
    assert main(["convert", "--input", str(lora), "--output", str(lora)]) == 2
    said = capsys.readouterr().err
    assert "is an input too" in said
    assert "Say which names" in said
    assert main(["average", "--lora_weight", str(lora), "--output", "x.txt", "--sigma_rel", "0.1", "--beta2", "1"]) == 2
    said = capsys.readouterr().err
    for part in ("One file has no average", "must end in .safetensors", "--beta2: --sigma_rel"):
        assert part in said
    assert main(["resize", "--rank", "4"]) == 2
    assert "--rank is not a flag. Did you mean --new_rank?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "needs"),
    [("inspect", 1), ("convert", 3), ("merge", 3), ("average", 2), ("resize", 3), ("check", 1)],
)
def test_an_empty_request_says_what_each_verb_needs(verb: str, needs: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb]) == 2
    assert capsys.readouterr().err.count("Give the") + (verb == "convert") == needs


def test_inspect_is_readable_and_json(lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--lora_weight", str(lora)]) == 0
    text = capsys.readouterr().out
    for part in ("kohya names, float32", "rank        4", "alpha       2", "demo: 62 of 62 layers", "k5_task: k5-demo"):
        assert part in text
    assert "Note:" not in text
    assert main(["inspect", "--lora_weight", str(lora), "--json", "--layers"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] == {"model": "demo", "layers": 62, "usual_layers": 62}
    assert report["hash_matches"] is True
    assert len(report["layer_table"]) == 62
    row, pair = report["layer_table"][0], next(iter(read_lora(lora).layers.values()))
    exact = pair.alpha / pair.rank * float((pair.up.double() @ pair.down.double()).norm())
    assert abs(row["effect"] - exact) < 1e-9 * exact


def test_inspect_says_when_weights_do_nothing_or_were_changed(
    tmp_path: Path, lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = read_lora(lora)
    layers = {
        stem: LoraWeights(pair.down, pair.up * (index > 2), pair.alpha)
        for index, (stem, pair) in enumerate(file.layers.items())
    }
    changed = tmp_path / "changed.safetensors"
    write_lora(changed, layers, "comfyui", file.metadata)
    assert main(["inspect", "--lora_weight", str(changed)]) == 0
    text = capsys.readouterr().out
    assert "3 of 62 layers change nothing" in text
    assert "is that of other weights" in text
    assert "fits        no known model" in text


def test_convert_refreshes_the_hashes_and_keeps_the_rest(tmp_path: Path, lora: Path) -> None:
    out = tmp_path / "c.safetensors"
    assert main(["convert", "--input", str(lora), "--output", str(out), "--target", "comfyui"]) == 0
    metadata = _metadata(out)
    assert metadata["sshs_model_hash"] == _hash(out)
    assert metadata["k5_task"] == "k5-demo-t2v"
    assert all(key.startswith("diffusion_model.") for key in load_file(out))
    back = tmp_path / "back.safetensors"
    assert main(["convert", "--input", str(out), "--output", str(back), "--target", "kohya"]) == 0
    start, found = load_file(lora), load_file(back)
    assert {key: (tensor.dtype, tensor.tolist()) for key, tensor in start.items()} == {
        key: (tensor.dtype, tensor.tolist()) for key, tensor in found.items()
    }
    assert _metadata(back) == _metadata(lora)
    half = tmp_path / "half.safetensors"
    words = ["--target", "kohya", "--save_precision", "bf16"]
    assert main(["convert", "--input", str(lora), "--output", str(half), *words]) == 0
    assert _metadata(half)["sshs_model_hash"] == _hash(half) != _hash(lora)


def test_merge_with_two_loras_equals_both_beside_the_weights(tmp_path: Path, lora: Path) -> None:
    out, run = tmp_path / "merged", tmp_path / "run"
    words = ["--lora_weight", str(lora), str(lora), "--lora_multiplier", "1", "-0.5", "--run_dir", str(run)]
    assert main(["merge", "--dit", str(DIT), *words, "--save_merged_model", str(out)]) == 0
    events = read_events(run / "events.jsonl").records
    assert events[-1]["type"] == "finished"
    assert [Path(path).parent for path in events[-1]["outputs"]] == [out]
    progress = [record for record in events if record["type"] == "progress"]
    assert progress[-1]["done"] == progress[-1]["total"] == 166
    merged, base = load_transformer(out, dtype=torch.float32), load_transformer(DIT, dtype=torch.float32)
    lora_layers = read_lora(lora).layers
    for name, target in linear_targets(base).items():
        pair = lora_layers.get("lora_unet_" + name.replace(".", "_"))
        after, before = merged.get_submodule(name).weight, target.layer.weight
        if pair is None:
            assert torch.equal(after, before)
        else:  # The demo's weights are half precision: one rounding of the exact sum.
            exact = before.double() + 0.5 * pair.alpha / pair.rank * (pair.up.double() @ pair.down.double())
            assert float((after == exact.half().float()).double().mean()) > 0.99, name


def test_average_of_checkpoints(tmp_path: Path) -> None:
    paths = [_written(tmp_path / f"r-{index}.safetensors", 0.01 * index, step) for index, step in ((1, 300), (2, 100))]
    out = tmp_path / "average.safetensors"
    assert main(["average", "--lora_weight", *map(str, paths), "--output", str(out), "--beta", "0.75"]) == 0
    first, second, found = (load_file(path) for path in (paths[1], paths[0], out))
    for key, tensor in found.items():
        exact = 0.75 * first[key].double() + 0.25 * second[key].double()
        assert torch.allclose(tensor.double(), exact, rtol=1e-6, atol=1e-9), key
    assert _metadata(out)["ss_steps"] == "300"
    assert _metadata(out)["sshs_model_hash"] == _hash(out)
    unsorted = tmp_path / "unsorted.safetensors"
    words = ["--lora_weight", *map(str, paths), "--output", str(unsorted), "--beta", "0.75", "--no_sort"]
    assert main(["average", *words]) == 0
    assert unsorted.read_bytes() != out.read_bytes()
    other = _written(tmp_path / "other.safetensors", alpha=3.0, step=900)
    assert (
        main(["average", "--lora_weight", str(paths[0]), str(other), "--output", str(tmp_path / "n.safetensors")]) == 2
    )
    assert not (tmp_path / "n.safetensors").exists()


def test_resize_writes_rank_alpha_and_hashes_of_the_result(
    tmp_path: Path, lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small.safetensors"
    assert main(["resize", "--input", str(lora), "--output", str(out), "--new_rank", "2"]) == 0
    assert "rank 4 -> 2" in capsys.readouterr().err
    metadata = _metadata(out)
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "1.0")
    assert metadata["sshs_model_hash"] == _hash(out)
    assert {(pair.rank, pair.alpha) for pair in read_lora(out).layers.values()} == {(2, 1.0)}
    same = tmp_path / "same.safetensors"
    assert main(["resize", "--input", str(lora), "--output", str(same), "--new_rank", "8"]) == 0
    for (stem, pair), (_, again) in zip(
        sorted(read_lora(lora).layers.items()), sorted(read_lora(same).layers.items()), strict=True
    ):
        exact = pair.alpha / pair.rank * (pair.up.double() @ pair.down.double())
        found = again.alpha / again.rank * (again.up.double() @ again.down.double())
        assert torch.allclose(found, exact, rtol=1e-5, atol=1e-7), stem


def test_check_measures_the_difference_on_the_demo(
    tmp_path: Path, lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--lora_weight", str(lora)]) == 0
    assert "Loads here with 62 of 62 keys (62 of 62 layers of the demo model)" in capsys.readouterr().out
    shown = []
    for strength in ("1", "0.5", "0"):
        words = ["--lora_weight", str(lora), "--task", "k5-demo-t2v", "--lora_multiplier", strength]
        assert main(["check", *words, "--device", "cpu"]) == 0
        said = capsys.readouterr()
        assert "at strength 0 it is the base's bit for bit" in said.out
        shown.append(float(said.out.split("differs from base by ")[1].split(" %")[0]))
        assert ("changes nothing at all" in said.err) == (strength == "0")
    assert shown[0] > shown[1] > shown[2] == 0.0


def test_check_refuses_what_does_not_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lite = tmp_path / "lite.safetensors"
    write_lora(lite, _random("lite", rank=1, alpha=1.0))
    assert main(["check", "--lora_weight", str(lite), "--dit", str(DIT)]) == 2
    assert "was made for a Kandinsky 5 Lite model (width 1792), this is a Kandinsky 5 Demo" in capsys.readouterr().err
    layers = _random()
    layers["visual_transformer_blocks.5.self_attention.to_query"] = next(iter(layers.values()))
    write_lora(tmp_path / "more.safetensors", layers)
    assert main(["check", "--lora_weight", str(tmp_path / "more.safetensors")]) == 2
    assert "1 of 63 entries match no layer" in capsys.readouterr().err


def test_models_of_other_sizes_are_told_by_a_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora, dit = tmp_path / "other.safetensors", tmp_path / "dit.safetensors"
    save_file(dict(random_weights(SMALL_HEADS)), dit)
    write_lora(lora, random_lora(skeleton(SMALL_HEADS), rank=4, alpha=4.0))
    out = ["--output", str(tmp_path / "out.safetensors")]
    for words in (
        ["convert", "--target", "comfyui", "--lora_weight", str(lora)],
        ["resize", "--new_rank", "2", "--lora_weight", str(lora)],
        ["average", "--no_sort", "--lora_weight", str(lora), str(lora)],
    ):
        assert main([*words, *out]) == 2
        assert "Give --dit for a model of another size" in capsys.readouterr().err
        assert main([*words, *out, "--dit", str(dit)]) == 0
        assert len(read_lora(tmp_path / "out.safetensors").layers) == 26
    assert main(["check", "--lora_weight", str(lora), "--dit", str(dit), "--header_only"]) == 0
    assert "26 of 26 layers of the custom model" in capsys.readouterr().out


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_help_of_every_verb(verb: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(verb), "--help"]) == 0
    assert "--lora_weight" in capsys.readouterr().out
