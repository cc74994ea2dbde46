"""The Caching tab without a browser: the state of caches, what is started, stopped, tidied up and refused."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from backend.config.options import load_toml
from backend.errors import UserError
from backend.jobs.states import JobState
from k5ui.api import router
from k5ui.caching import ledgers
from k5ui.caching.request import SPECS
from k5ui.tabs.caching import form_of
from k5ui.text.loader import Texts
from tests.unit.k5ui.caching_kit import Studio, end_run, write_journal


@pytest.fixture
def studio(workspace: Path) -> Studio:
    return Studio(workspace)


# --- the state of the caches --------------------------------------------------------------------------------------


def test_nothing_is_cached_yet(studio: Studio) -> None:
    page = studio.checked()
    entry = page["entries"][0]
    assert entry["latents"]["states"] == {"missing": 4}
    assert entry["texts"]["states"] == {"missing": 5}, "four captions and the empty one"
    assert entry["latents"]["reasons"] == []
    assert (page["ready"], page["runs"], page["last"], page["problems"]) == (False, [], [], [])
    needs = page["needs"]
    assert needs["cache_latents"]["items"] == 4
    # 16 channels, 3 frames of 8 x 8, 4 bytes each; nothing of this kind has been run, so the time is not known.
    assert 4 * 16 * 3 * 64 * 4 <= needs["cache_latents"]["bytes"] <= 4 * (16 * 3 * 64 * 4 + 8192)
    assert needs["cache_latents"]["seconds"] is None
    assert needs["free"] > 0


def test_valid_caches_are_ready(studio: Studio) -> None:
    studio.write_caches()
    page = studio.checked()
    assert page["ready"]
    assert page["needs"]["pending"] == {"cache_text": 0, "cache_latents": 0}
    entry = page["entries"][0]
    assert entry["latents"]["usable"] == entry["latents"]["total"] == 4
    assert entry["latents"]["bytes"] + entry["texts"]["bytes"] == sum(
        path.stat().st_size for path in studio.cache.glob("*.safetensors")
    )


def test_what_changed_is_said_in_words_with_names(studio: Studio) -> None:
    studio.write_caches()
    (studio.source / "1.txt").write_text("another caption", "utf-8")
    studio.add("2.png", "picture 2", grey=200)
    damaged = next(studio.cache.glob("3_*_k5.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-10])
    (studio.source / "0.png").unlink()
    studio.add("new.png", None)
    (studio.source / "bad.png").write_bytes(b"no picture")
    entry = studio.entry()
    latents = {(row["state"], row["text"]): row for row in entry["latents"]["reasons"]}
    assert latents[("stale", "the file changed")]["names"] == ["2.png"]
    assert latents[("broken", "damaged or cut off")]["names"] == ["3.png"]
    (text,) = entry["texts"]["reasons"]
    assert (text["state"], text["text"], text["count"], text["names"]) == ("stale", "the caption changed", 1, ["1.png"])
    assert entry["orphans"]["count"] == 2
    assert entry["missing_captions"] == ["bad.png", "new.png"]
    assert (entry["broken_total"], entry["skipped"][0]["name"]) == (1, "bad.png")
    assert studio.page()["needs"]["pending"] == {"cache_text": 1, "cache_latents": 3}, "no caption: nothing to encode"


def test_reasons_follow_the_language(studio: Studio) -> None:
    studio.write_caches()
    (studio.source / "1.txt").write_text("another caption", "utf-8")
    assert studio.entry()["texts"]["reasons"][0]["text"] == "the caption changed"
    studio.services.settings.update(language="ru")
    page = studio.checked(lambda page: page["entries"][0]["texts"]["reasons"][0]["text"] == "подпись изменилась")
    assert page["entries"][0]["kind"] == "image"


def test_number_formats_of_the_form_are_compared(studio: Studio) -> None:
    studio.write_caches()
    studio.ask("change", "vae_dtype", "float16")
    page = studio.checked()
    assert page["entries"][0]["latents"]["states"] == {"stale": 4}
    assert page["entries"][0]["latents"]["reasons"][0]["text"].endswith(": float32 → float16")
    studio.ask("change", "vae_dtype", None)
    assert studio.checked()["ready"]


def test_a_request_never_waits_for_the_check(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ledgers.check_dataset

    def slow(*arguments, **keys):
        time.sleep(1.0)
        return real(*arguments, **keys)

    monkeypatch.setattr(ledgers, "check_dataset", slow)
    began = time.monotonic()
    page = studio.page()
    assert time.monotonic() - began < 0.5
    assert page["checking"]
    assert page["entries"] == []
    assert len(studio.checked()["entries"]) == 1


def test_a_changed_configuration_is_noticed_by_itself(studio: Studio) -> None:
    studio.write_caches()
    assert studio.checked()["ready"]
    studio.write_config(resolution=[64, 7])
    end = time.monotonic() + 10
    while not (page := studio.page())["error"] and time.monotonic() < end:
        time.sleep(0.02)
    assert "resolution" in page["error"]
    assert page["entries"] == []


def test_a_folder_that_is_gone_is_said_at_its_table(studio: Studio) -> None:
    studio.source.rename(studio.source.with_name("elsewhere"))
    page = studio.checked()
    assert str(studio.source) in page["entries"][0]["problem"]
    assert not page["ready"]


def test_torch_stays_away(workspace: Path) -> None:
    """Checking, planning and starting need no torch: the page is there at once."""
    code = (
        "import sys; from pathlib import Path; from tests.unit.k5ui.caching_kit import Studio; "
        f"studio = Studio(Path({os.fspath(workspace)!r})); studio.write_caches(); assert studio.checked()['ready']; "
        "assert studio.ask('cache', studio.id, 'all')['runs']; assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# --- starting -----------------------------------------------------------------------------------------------------


def test_everything_is_captions_then_latents(studio: Studio) -> None:
    studio.checked()
    runs = studio.ask("cache", studio.id, "all", {})["runs"]
    assert [studio.run(run).kind for run in runs] == ["cache_text", "cache_latents"]
    assert studio.services.queue.pending() == runs
    text, latents = (load_toml(studio.run(run).folder / "options.toml") for run in runs)
    assert text["dataset_config"] == latents["dataset_config"] == str(studio.config)
    assert text["skip_existing"]
    assert latents["skip_existing"]
    assert not latents.get("nabla_resize", False)
    assert Path(latents["vae"]).is_dir()
    assert [row["kind"] for row in studio.page()["runs"]] == ["cache_text", "cache_latents"]
    assert "already" in studio.ask("cache", studio.id, "latents", {})["error"]


def test_again_encodes_what_is_valid_too(studio: Studio) -> None:
    studio.write_caches()
    studio.ask("change", "again", True)
    page = studio.checked()
    assert page["needs"]["cache_latents"]["items"] == 4
    assert page["needs"]["pending"]["cache_latents"] == 0
    (run,) = studio.ask("cache", studio.id, "latents", {})["runs"]
    assert not load_toml(studio.run(run).folder / "options.toml")["skip_existing"]


def test_only_stale_starts_what_has_something_to_do(studio: Studio) -> None:
    studio.write_caches()
    studio.checked()
    assert "up to date" in studio.ask("cache", studio.id, "stale", {})["error"]
    (studio.source / "1.txt").write_text("another caption", "utf-8")
    studio.checked(lambda page: page["needs"]["pending"]["cache_text"] == 1)
    (run,) = studio.ask("cache", studio.id, "stale", {"again": True})["runs"]
    assert studio.run(run).kind == "cache_text"
    assert load_toml(studio.run(run).folder / "options.toml")["skip_existing"], "never everything"


def test_a_nabla_task_asks_for_its_sizes(studio: Studio) -> None:
    from k5ui.caching.request import latent_options, wanted

    form = wanted({"values": {"task": "k5-lite-t2v-10s-sd", "nabla_stretch": True}})
    options = latent_options(form, studio.config, studio.services.settings)
    assert options.nabla_resize
    assert options.nabla_stretch
    plain = latent_options(wanted({"values": {"nabla_stretch": True}}), studio.config, studio.services.settings)
    assert not plain.nabla_resize
    assert not plain.nabla_stretch, "left out where it has no meaning"


def test_problems_stand_at_their_field_and_nothing_is_queued(studio: Studio) -> None:
    studio.ask("change", "task", "k5-lite-t2v-5s-sd")
    studio.ask("change", "qwen_max_length", 1)
    page = studio.checked()
    fields = {row["field"] for row in page["problems"]}
    assert {"vae", "qwen_max_length"} <= fields
    answer = studio.ask("cache", studio.id, "all", {})
    assert {"vae", "qwen_max_length"} <= {row["field"] for row in answer["problems"]}
    assert studio.services.store.list() == []


def test_stop_takes_what_waits_out_of_the_queue(studio: Studio) -> None:
    studio.checked()
    studio.ask("cache", studio.id, "all", {})
    assert studio.ask("stop", studio.id) == {}
    assert studio.services.queue.pending() == []
    assert studio.page()["runs"] == []
    assert "Nothing" in studio.ask("stop", studio.id)["error"]


def test_an_exposed_app_stays_inside_its_roots(workspace: Path, tmp_path: Path) -> None:
    """A configuration inside the workspace may name folders outside: nothing there is looked at or written."""
    studio = Studio(workspace, exposed=True)
    assert studio.checked()["error"] is None
    secret = tmp_path / "private"
    secret.mkdir()
    studio.cache = secret / "cached"
    studio.write_config()
    page = studio.checked(lambda page: page["error"])
    assert "cache_directory" in page["error"]
    assert page["entries"] == []
    answer = studio.ask("cache", studio.id, "all", {})
    assert answer["problems"][0]["field"] == "datasets[0].cache_directory"
    assert studio.services.store.list() == []
    assert list(secret.iterdir()) == []


# --- runs ---------------------------------------------------------------------------------------------------------


def test_a_run_at_work_tells_item_rate_and_picture(studio: Studio) -> None:
    studio.services.datasets.scans.look(studio.services.datasets.get(studio.id), 20.0)
    studio.checked()
    (run_id,) = studio.ask("cache", studio.id, "latents", {})["runs"]
    run = studio.run(run_id)
    progress = {"phase": "vae", "done": 2, "total": 4, "unit": "items", "item": "1.png", "dataset": 0, "rate": 2.0}
    write_journal(
        run,
        ("started", 59.8, {"attempt": 1, "pid": os.getpid()}),
        ("phase", 59.9, {"phase": "vae", "message": "Encoding"}),
        ("progress", 60, progress | {"remaining_seconds": 1.0}),
    )
    (row,) = studio.page()["runs"]
    assert (row["item"], row["step"], row["total"], row["unit"]) == ("1.png", 2, 4, "items")
    assert (row["seconds_per_item"], row["phase"]) == (0.5, "vae")
    assert row["frame"].startswith(f"datasets/{studio.id}/thumb/")
    (summary,) = [page for page in studio.services.run_pages() if page["id"] == run_id]
    assert (summary["item_name"], summary["unit"], summary["outputs"]) == ("1.png", "items", [])
    write_journal(
        run,
        ("started", 59.9, {"attempt": 2, "pid": os.getpid()}),
        ("progress", 60, progress | {"item": "?"}),
    )
    assert studio.page()["runs"][0]["frame"] is None, "a name that is no source gives no address"


def test_failures_are_listed_and_facts_of_the_dataset_are_not(studio: Studio) -> None:
    studio.checked()
    (run_id,) = studio.ask("cache", studio.id, "latents", {})["runs"]
    run = studio.run(run_id)
    write_journal(
        run,
        ("started", 0, {"attempt": 1}),
        ("warning", 1, {"message": "1 of 5 sources cannot be read", "field": "datasets[0]"}),
        ("warning", 2, {"message": "1 of 4 items could not be read: 2.png: cut off", "field": None}),
        ("finished", 30, {"outputs": [], "seconds": 30.0}),
    )
    end_run(run)
    assert studio.services.run(run_id)[1].state is JobState.FINISHED
    (last,) = studio.page()["last"]
    assert last["warnings"] == ["1 of 4 items could not be read: 2.png: cut off"]
    (again,) = studio.ask("cache", studio.id, "latents", {})["runs"]
    assert [row["id"] for row in studio.page()["runs"]] == [again]


# --- tidying up ---------------------------------------------------------------------------------------------------


def test_orphans_go_to_the_trash_and_nothing_else_moves(studio: Studio) -> None:
    studio.write_caches()
    (studio.source / "0.png").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in studio.cache.glob("*.safetensors")}
    page = studio.checked()
    assert page["entries"][0]["orphans"]["count"] == 2
    assert page["note"] is None
    assert studio.ask("prune", studio.id) == {}
    page = studio.checked(lambda page: page["note"] and not page["entries"][0]["orphans"]["count"])
    assert "2 files" in page["note"]["text"]
    moved = {path.name for path in (studio.cache / ".k5_trash").glob("*/*")}
    after = {path.name: path.stat().st_mtime_ns for path in studio.cache.glob("*.safetensors")}
    assert {name.split("_")[0] for name in moved} == {"0"}
    assert after == {name: changed for name, changed in before.items() if name not in moved}


def test_no_tidying_up_while_it_is_being_cached(studio: Studio) -> None:
    studio.checked()
    studio.ask("cache", studio.id, "text", {})
    assert "being cached" in studio.ask("prune", studio.id)["error"]


def test_a_source_folder_that_vanished_costs_no_cache(studio: Studio) -> None:
    """An empty folder looks like a drive that is not connected: nothing moves, and the page says why."""
    studio.write_caches()
    for path in studio.source.iterdir():
        path.unlink()
    studio.ask("prune", studio.id)
    page = studio.checked(lambda page: page["note"])
    assert page["note"]["kind"] == "bad"
    assert "connected" in page["note"]["text"]
    assert len(list(studio.cache.glob("*.safetensors"))) == 9


# --- what the page sends ------------------------------------------------------------------------------------------


def test_routes_answer_and_unknown_ids_are_not_found(studio: Studio) -> None:
    app = FastAPI()
    app.include_router(router(studio.services))
    client = TestClient(app)
    assert client.get("/api/caching").json()["chosen"] == studio.id
    assert client.get(f"/api/caching/{studio.id}").json()["name"] == "stills"
    for name in ("..", "0" * 12, "x" * 99, "x" * 999):
        assert client.get(f"/api/caching/{name}").status_code in (404, 422)


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("cache", []),
        ("cache", ["id"]),
        ("cache", [1, "all"]),
        ("cache", ["0" * 12, "all", {}]),
        ("check", [None]),
        ("prune", ["../../etc"]),
        ("stop", {"a": 1}),
        ("change", ["dataset_config", "/etc/passwd"]),
        ("change", ["vae", "/etc/passwd"]),
        ("change", ["again", "yes"]),
        ("change", ["dataset", "0" * 12]),
        ("change", ["seed", [1]]),
    ],
)
def test_odd_requests_get_a_sentence(studio: Studio, verb: str, arguments: object) -> None:
    answer = studio.verbs[verb](arguments)
    assert answer["error"]
    assert studio.services.store.list() == []


def test_what_is_asked_for_must_be_known(studio: Studio) -> None:
    assert "does not do" in studio.ask("cache", studio.id, "everything", {})["error"]
    with pytest.raises(UserError):
        studio.services.caching.page("0" * 12)


def test_the_form_is_kept_and_odd_drafts_do_no_harm(studio: Studio) -> None:
    studio.ask("change", "seed", 7)
    studio.ask("change", "dataset", studio.id)
    overview = studio.services.caching.overview()
    assert overview["values"] == {"task": "k5-demo-t2v", "seed": 7}
    assert overview["chosen"] == studio.id
    studio.services.drafts.save("caching", {"values": [1], "dataset": 5, "again": "x"})
    overview = studio.services.caching.overview()
    assert (overview["values"], overview["again"], overview["chosen"]) == ({"task": "k5-demo-t2v"}, False, studio.id)


@pytest.mark.parametrize("language", ["en", "ru"])
def test_every_option_has_a_field_with_words(language: str) -> None:
    form = form_of(Texts(language))
    options = [form["task"], *(option for group in form["groups"] for option in group["options"])]
    assert {option["name"] for option in options} == set(SPECS)
    assert all(option["label"] and option["help"] for option in options)
    if language == "ru":
        assert all(any("а" <= letter <= "я" for letter in option["help"].lower()) for option in options)
