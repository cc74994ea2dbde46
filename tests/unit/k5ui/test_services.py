"""Submitting, checking, listing and remembering, with real run folders and no engine."""

from __future__ import annotations

import json
import os
import time
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from backend.config.generate import GenerateOptions
from backend.config.options import load_toml, parse_command_line
from backend.errors import Problems, UserError
from k5ui.requests import check_image, seeds
from k5ui.services import MAX_COUNT, Services

FORM = {"task": "k5-demo-t2v", "prompt": "a red circle", "steps": 2}


@pytest.fixture
def services(workspace: Path) -> Services:
    return Services(workspace)


def options_of(services: Services, run_id: str) -> GenerateOptions:
    return GenerateOptions(**load_toml(services.store.get(run_id).folder / "options.toml"))


def picture(path: Path, size: tuple[int, int] = (64, 64)) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 30, 30)).save(path)
    return str(path)


def fields(error: pytest.ExceptionInfo[Problems]) -> set[str | None]:
    return {problem.field for problem in error.value.problems}


# --- submitting ---------------------------------------------------------------------------------------------------


def test_a_run_is_complete_before_it_is_queued(services: Services) -> None:
    (run_id,) = services.submit_generate(FORM, 1)
    options = options_of(services, run_id)
    assert options.prompt == "a red circle"
    assert options.dit is not None
    assert Path(options.dit).is_dir()
    assert options.output is None, "the engine writes into the run's own outputs"
    assert options.text_cache_dir == str(services.workspace / "cache" / "text")
    assert services.queue.pending() == [run_id]
    (row,) = services.run_pages()
    assert (row["state"], row["prompt"], row["task"], row["seed"]) == ("queued", "a red circle", "k5-demo-t2v", 42)


def test_several_clips_have_seeds_that_follow_each_other(services: Services) -> None:
    runs = services.submit_generate(FORM | {"seed": 2**63 - 2}, 3)
    assert [options_of(services, run).seed for run in runs] == [2**63 - 2, 2**63 - 1, 0]
    assert services.queue.pending() == runs


def test_a_drawn_seed_is_written_down() -> None:
    first = seeds(-1, 2)
    assert first[1] == first[0] + 1
    assert 0 <= first[0] < 2**32
    assert seeds(-1, 1) != seeds(-1, 1) or seeds(-1, 1) != seeds(-1, 1)
    assert seeds(7, 1) == [7]


def test_what_widgets_send_becomes_what_options_need(services: Services) -> None:
    """Numbers come as floats, empty fields as empty text."""
    form = FORM | {
        "steps": 3.0,
        "frames": 17.0,
        "guidance": 4,
        "negative_prompt": " ",
        "device": "",
        "lora_weight": [""],
    }
    (run_id,) = services.submit_generate(form)
    options = options_of(services, run_id)
    assert (options.steps, options.frames, options.guidance) == (3, 17, 4.0)
    assert (options.negative_prompt, options.device, options.lora_weight) == (None, None, [])


def test_a_request_cannot_choose_where_it_writes(services: Services, tmp_path: Path) -> None:
    (run_id,) = services.submit_generate(FORM | {"output": str(tmp_path / "x.mp4"), "text_cache_dir": "/etc"})
    options = options_of(services, run_id)
    assert options.output is None
    assert options.text_cache_dir == str(services.workspace / "cache" / "text")


@pytest.mark.parametrize(
    ("form", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"steps": 2.5}, "steps"),
        ({"stesp": 2}, "stesp"),
        ({"task": "k5-nothing"}, "task"),
        ({"task": "k5-demo-i2v"}, "image"),
        ({"lora_weight": ["/nowhere.safetensors"]}, "lora_weight"),
        ({"dit": "bad\0path"}, "dit"),
        ({"task": "k5-pro-t2v-5s-sd"}, "dit"),
    ],
)
def test_mistakes_name_their_field_and_make_no_run(services: Services, form: dict, field: str) -> None:
    with pytest.raises(Problems) as error:
        services.submit_generate(FORM | form)
    assert field in fields(error)
    assert services.runs() == []
    assert services.queue.pending() == []
    problems, _ = services.check_generate(FORM | form)
    assert field in {problem.field for problem in problems}


@pytest.mark.parametrize("count", [0, -1, MAX_COUNT + 1, 1.5, True, "2"])
def test_the_number_of_clips_is_bounded(services: Services, count) -> None:
    with pytest.raises(UserError):
        services.submit_generate(FORM, count)


def test_images_are_kept_with_the_run(services: Services) -> None:
    """The page's own temporary file goes away; the run must not care."""
    source = Path(picture(services.upload_folder / "abc" / "Start Image.PNG"))
    (run_id,) = services.submit_generate(FORM | {"task": "k5-demo-i2v", "image": str(source)})
    folder = services.store.get(run_id).folder
    source.unlink()
    kept = options_of(services, run_id).image
    assert kept == str(folder / "inputs" / "image.png")
    assert check_image(kept) == "PNG"


def test_dropped_loras_are_kept_and_others_stay_where_they_are(services: Services, tmp_path: Path) -> None:
    header = json.dumps({"a.lora_down.weight": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(4)
    dropped, own = services.upload_folder / "x" / "my lora!.safetensors", tmp_path / "own.safetensors"
    for path in (dropped, own):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    options = services._intake.options(FORM | {"lora_weight": [str(dropped), str(own)]})
    kept = services._intake.keep_files(options, services.workspace / "run" / "inputs")
    dropped.unlink()
    assert kept.lora_weight == [str(services.workspace / "run" / "inputs" / "1-my-lora.safetensors"), str(own)]
    assert Path(kept.lora_weight[0]).read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"<svg/>", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_what_is_no_image_makes_no_run(services: Services, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(Problems) as error:
        services.submit_generate(FORM | {"task": "k5-demo-i2v", "image": str(path)})
    assert fields(error) == {"image"}
    assert services.runs() == []


def test_a_cut_off_image_is_found_before_the_engine_finds_it(services: Services, tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    Image.effect_noise((256, 256), 80).save(path)
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(Problems) as error:
        services.submit_generate(FORM | {"task": "k5-demo-i2v", "image": str(path)}, 2)
    assert fields(error) == {"image"}
    assert services.runs() == []
    assert services.queue.pending() == []


def test_the_command_for_people_parses_back(services: Services) -> None:
    import shlex

    text = services.command_text(FORM | {"prompt": 'it\'s a "red" circle; $(x)'})
    words = shlex.split(text)
    assert words[:3] == ["python", "-m", "backend.kandinsky5_generate_video"]
    assert parse_command_line(GenerateOptions, words[3:], "x", "").options.prompt == 'it\'s a "red" circle; $(x)'


# --- facts --------------------------------------------------------------------------------------------------------


def test_the_facts_of_a_request(services: Services) -> None:
    problems, facts = services.check_generate(FORM | {"guidance": 4.0})
    assert problems == []
    assert (facts["frames"], facts["latent_frames"], facts["tokens"]) == (17, 5, 5 * 4 * 4)
    assert facts["seconds"] == pytest.approx(17 / 24)
    assert facts["passes"] == 4
    assert facts["memory_bytes"] > 0
    assert facts["expected_seconds"] is None, "nothing is invented"
    assert services.check_generate({"task": "k5-demo-t2v", "steps": "x"})[1] == {}


def test_unknown_stays_unknown(services: Services) -> None:
    _, facts = services.check_generate({"task": "k5-pro-t2v-5s-sd", "prompt": "a"})
    assert facts["memory_bytes"] is None
    assert facts["weights"]["dit"] is None
    assert facts["tokens"] == 31 * 32 * 48


def test_equal_runs_before_tell_the_time(services: Services) -> None:
    for seconds in (20.0, 24.0):
        finish(services, services.submit_generate(FORM)[0], seconds)
    finish(services, services.submit_generate(FORM | {"steps": 40})[0], 400.0)
    services._forget()
    _, facts = services.check_generate(FORM | {"prompt": "another prompt", "seed": 5})
    assert (facts["expected_seconds"], facts["expected_runs"]) == ([20.0, 24.0], 2)


# --- runs ---------------------------------------------------------------------------------------------------------


def finish(services: Services, run_id: str, seconds: float = 1.0, names: tuple[str, ...] = ()) -> None:
    """Write what an engine leaves behind."""
    folder, now = services.store.get(run_id).folder, time.time()
    (folder / "outputs").mkdir(exist_ok=True)
    records = [{"type": "started", "attempt": 1, "entry": "x", "pid": 1, "task": "k5-demo-t2v", "versions": {}}]
    for index, name in enumerate(names):
        (folder / "outputs" / name).write_bytes(b"x")
        records.append({"type": "sample", "path": f"outputs/{name}", "kind": "video", "seed": index, "prompt": name})
    records.append({"type": "finished", "outputs": [], "seconds": seconds})
    lines = [json.dumps({"v": 1, "seq": seq, "t": now, **record}) for seq, record in enumerate(records, 1)]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "started.json").write_text(json.dumps({"time": now}))
    (folder / "result.json").write_text(json.dumps({"exit_code": 0, "signal": None, "ended": now}))


def test_clips_are_newest_first_and_bounded(services: Services) -> None:
    first, second = services.submit_generate(FORM, 2)
    finish(services, first, names=("a.mp4", "b.mp4"))
    finish(services, second, names=("c.mp4",))
    services._forget()
    clips = services.clips(60)
    assert {clip["name"] for clip in clips} == {"a.mp4", "b.mp4", "c.mp4"}
    order = [clip["name"] for clip in clips if clip["run_id"] == first]
    assert order == ["b.mp4", "a.mp4"]
    assert len(services.clips(2)) == 2
    assert all(clip["url"].startswith("/api/media/") for clip in clips)


def test_the_version_grows_only_when_something_changed(services: Services) -> None:
    before = services.status()["version"]
    assert services.status()["version"] == before
    (run_id,) = services.submit_generate(FORM)
    after = services.status()
    assert after["version"] > before
    assert after["queue"] == [run_id]
    assert after["running"] is None
    assert after["device"]["memory_total"] >= after["device"]["memory_used"] > 0


def test_stopping_a_waiting_run_takes_it_out_of_the_queue(services: Services) -> None:
    first, second = services.submit_generate(FORM, 2)
    services.stop(first)
    assert services.queue.pending() == [second]
    with pytest.raises(UserError):
        services.kill(first)
    services.enqueue(first)
    services.move(first, 0)
    assert services.queue.pending() == [first, second]
    services.trash(first)
    assert [view.id for view in services.runs()] == [second]
    assert os.listdir(services.workspace / "trash") == [first]


@pytest.mark.parametrize("run_id", ["../x", "", "nobody", "..", "/etc"])
def test_unknown_runs_are_one_sentence(services: Services, run_id: str) -> None:
    for action in (services.stop, services.kill, services.trash, services.enqueue, services.run):
        with pytest.raises(UserError):
            action(run_id)


# --- settings of a clip -------------------------------------------------------------------------------------------


def test_settings_of_a_dropped_picture(services: Services, tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    options = {"prompt": "a red circle", "lora_weight": ["/nowhere/x.safetensors"], "image": str(tmp_path)}
    info.add_text("k5_settings", json.dumps({"version": 1, "options": options, "seed": 3}))
    for folder in (services.upload_folder / "a", tmp_path):
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / "clip.png", pnginfo=info)
    settings = services.settings_of(str(services.upload_folder / "a" / "clip.png"))
    assert settings["options"]["prompt"] == "a red circle"
    assert settings["missing"] == [str(tmp_path), "/nowhere/x.safetensors"]
    for source in (str(tmp_path / "clip.png"), "/etc/passwd", "nonsense", "", "a\0b"):
        with pytest.raises(UserError):
            services.settings_of(source)


def test_lora_files_are_offered_by_name(services: Services, tmp_path: Path) -> None:
    for path in ("loras/b.safetensors", "loras/sub/a.safetensors", "loras/x.txt", "loras/1/2/deep.safetensors"):
        (services.workspace / path).parent.mkdir(parents=True, exist_ok=True)
        (services.workspace / path).touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "C.safetensors").touch()
    services.settings.update(lora_folder=str(tmp_path / "mine"))
    assert [item["name"] for item in services.lora_files()] == ["b.safetensors", "C.safetensors", "sub/a.safetensors"]


# --- exposed ------------------------------------------------------------------------------------------------------


def test_an_exposed_app_reads_its_roots_and_what_its_owner_set(workspace: Path, tmp_path: Path) -> None:
    allowed, outside = tmp_path / "allowed", tmp_path / "outside"
    for folder in (allowed, outside):
        folder.mkdir()
        (folder / "lora.safetensors").write_bytes(b"x")
    settings = f'[models.k5-pro-t2v-5s-sd]\ndit = "{outside}/dit.safetensors"\n'
    (workspace / "settings.toml").write_text(settings)
    services = Services(workspace, [allowed], exposed=True)
    for path, refused in ((allowed, False), (outside, True), (allowed / ".." / "outside", True)):
        problems, _ = services.check_generate(FORM | {"lora_weight": [str(path / "lora.safetensors")]})
        assert any("outside the folders" in problem.message for problem in problems) is refused
    problems, _ = services.check_generate({"task": "k5-pro-t2v-5s-sd", "prompt": "a"})
    assert not any("outside the folders" in problem.message for problem in problems)
    with pytest.raises(Problems):
        services.settings.set_weights("k5-pro-t2v-5s-sd", dit=str(outside / "other"))
    assert not services.settings.inspect(str(outside / "lora.safetensors")).ok
    assert tomllib.loads((workspace / "settings.toml").read_text()) == tomllib.loads(settings)
