"""The training form under hostile hands: an exposed app trains inside its roots, with code that it knows."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from k5ui.training.fields import SPECS
from tests.security.server import Server
from tests.unit.k5ui.training_kit import Training

OUTSIDE = "outside the folders"
SECRET = "the secret of somebody else"


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Training]:
    """An exposed app whose only root is its workspace, with a dataset that is ready."""
    (tmp_path / "workspace").mkdir()
    training = Training(tmp_path / "workspace", exposed=True)
    yield training
    training.services.close()


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of somebody else, with one file of each kind."""
    folder = tmp_path / "outside"
    (folder / "state").mkdir(parents=True)
    (folder / "prompts.txt").write_text(f"{SECRET} --q 1\n")
    (folder / "tracker.toml").write_text(f'[wandb]\nproject = "{SECRET}"\n')
    (folder / "image.png").write_bytes(b"\x89PNG")
    (folder / "lora.safetensors").write_bytes(b"x" * 100)
    return folder


def refused(desk: Training, *fields: str) -> str:
    """All answers to the form as it is; nothing was started, and nothing of the secret is said."""
    state = desk.state()
    answer = desk.ask("start_train", {"queue": False})
    text = json.dumps([state, answer])
    assert SECRET not in text
    assert desk.services.store.list() == []
    assert set(fields) <= {problem["field"] for problem in answer["problems"]}
    return json.dumps(answer)


PATHS = {
    "dit": "{outside}/lora.safetensors",
    "vae": "{outside}",
    "text_encoder_qwen": "{outside}/state",
    "text_encoder_clip": "/etc",
    "network_weights": "{outside}/lora.safetensors",
    "base_weights": ["{outside}/lora.safetensors"],
    "sample_prompts": "{outside}/prompts.txt",
    "output_dir": "{outside}/made",
    "logging_dir": "{outside}/made",
    "text_cache_dir": "{outside}/made",
    "log_tracker_config": "{outside}/tracker.toml",
    "resume": "{outside}/state",
}


def test_every_path_of_a_training_is_known() -> None:
    """An option with a path that is added later has to be attacked here too."""
    assert set(PATHS) == {name for name, spec in SPECS.items() if spec.path is not None} - {"dataset_config"}


def test_no_option_names_a_path_outside(desk: Training, outside: Path) -> None:
    """Whole paths, paths with .., links inside that lead out; files are not even said to be there."""
    (desk.services.workspace / "link").symlink_to(outside)
    for name, value in PATHS.items():
        for way in (str(outside), f"{desk.services.workspace}/../outside", f"{desk.services.workspace}/link"):
            given = json.loads(json.dumps(value).replace("{outside}", way))
            desk.done("set_train", name, given)
            assert OUTSIDE in refused(desk, name), (name, given)
        desk.done("set_train", name, None)
    assert not (outside / "made").exists()
    assert desk.problems() == {}


def test_an_import_opens_nothing_outside(desk: Training, outside: Path) -> None:
    (outside / "set.toml").write_text(f"[[datasets]]\nimage_directory = '{outside}'\n")
    flags = f"--task k5-demo-t2v --dataset_config {outside}/set.toml --output_dir {outside}/made --dit {outside}/x"
    notes = desk.done("import_train", flags)["notes"]
    assert [note["name"] for note in notes] == ["dataset_config"]
    assert OUTSIDE in refused(desk, "output_dir", "dit")
    assert len(desk.state()["datasets"]) == 1
    assert not (outside / "made").exists()


def test_resuming_from_outside(desk: Training, outside: Path) -> None:
    for path in (str(outside / "state"), f"{desk.services.workspace}/../outside/state", "../outside/state", "/"):
        answer = desk.ask("resume_train", path)
        assert OUTSIDE in json.dumps(answer)
    assert "resume" not in desk.state()["values"]


def test_prompts_show_no_image_of_outside(desk: Training, outside: Path) -> None:
    """In the lines of the page, and in a prompt file that lies inside."""
    desk.set(task="k5-demo-i2v", sample_every_n_steps=10)
    for path in (outside / "image.png", "/etc/passwd", "../../etc/passwd"):
        for flag in ("--i", "--ei"):
            desk.set(prompts=f"a cat {flag} {path}")
            assert OUTSIDE in refused(desk, "sample_prompts")
    desk.set(prompts=None)
    inside = desk.services.workspace / "prompts.json"
    inside.write_text(json.dumps([{"prompt": "a cat", "image_path": str(outside / "image.png")}]))
    desk.set(sample_prompts=str(inside))
    assert OUTSIDE in refused(desk, "sample_prompts")


def test_a_dataset_that_leads_out_is_not_trained(desk: Training, outside: Path) -> None:
    (desk.studio.source / "own.png").symlink_to(outside / "image.png")
    (desk.studio.source / "own.txt").write_text("a caption")
    desk.set(cache_missing=True)
    assert "lies outside" in refused(desk)
    (desk.studio.source / "own.png").unlink()
    (desk.studio.source / "own.txt").unlink()
    desk.studio.config.write_text(f"[[datasets]]\nimage_directory = '{outside}'\ncache_directory = '{outside}'\n")
    assert "lies outside" in refused(desk)


@pytest.mark.parametrize(
    "name",
    [
        "os.system", "subprocess.Popen", "builtins.eval", "torch.optim.os.system", "torch.hub.load", "torch.load",
        "mymodule.Optimizer", "torch.optim..AdamW", "torch.optim.AdamW.step", "../evil", "a b", "torch.optim.sys",
    ],
)  # fmt: skip
def test_classes_of_this_machine_are_not_run_for_others(desk: Training, name: str) -> None:
    """A dotted path imports code: only the known ones, and what torch.optim itself has."""
    for field in ("optimizer_type", "lr_scheduler_type"):
        desk.done("set_train", field, name)
        refused(desk, field)
        desk.done("set_train", field, None)


def test_known_classes_are_welcome(desk: Training) -> None:
    for name in ("AdamW", "adamw8bit", "torch.optim.NAdam", "prodigyopt.Prodigy", "schedulefree.AdamWScheduleFree"):
        desk.set(optimizer_type=name)
        assert desk.problems() == {}
    desk.set(optimizer_type=None, lr_scheduler_type="torch.optim.lr_scheduler.CosineAnnealingLR")
    assert desk.problems() == {}


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "..", "a\\..\\b"])
def test_names_are_no_paths(desk: Training, name: str) -> None:
    """They become parts of file names; the output name never is a path, exposed or not."""
    for field in ("output_name", "log_prefix", "log_tracker_name", "wandb_run_name"):
        desk.set(logging_dir=str(desk.services.workspace / "logs"))
        desk.done("set_train", field, name)
        refused(desk, field)
        desk.done("set_train", field, None)


def test_trackers_are_given_no_folder_outside(desk: Training, outside: Path) -> None:
    config = desk.services.workspace / "tracker.toml"
    desk.set(log_tracker_config=str(config))
    for text in (f'[wandb]\ndir = "{outside}"\n', '[tensorboard]\nlog_dir = "../../x"\n', '[wandb]\ntags = ["~/x"]\n'):
        config.write_text(text)
        desk.set(output_name=f"n{len(text)}")
        assert OUTSIDE in refused(desk, "log_tracker_config")
    config.write_text('[wandb]\nproject = "mine"\n')
    desk.set(output_name="last")
    assert desk.problems() == {}


def test_a_run_of_others_is_cloned_inside_the_roots_only(desk: Training, outside: Path) -> None:
    """A run that was made in a terminal may name anything; taken over, it is refused at its fields."""
    run = desk.services.store.get(desk.start())
    text = (run.folder / "options.toml").read_text()
    made = desk.services.store.runs_folder / "terminal"
    made.mkdir()
    (made / "request.json").write_text((run.folder / "request.json").read_text())
    (made / "options.toml").write_text(text + f"output_dir = '{outside}'\n")
    desk.done("clone_train", "terminal")
    assert OUTSIDE in desk.problems()["output_dir"]


def test_the_owner_of_a_machine_may_name_what_he_likes(tmp_path: Path, outside: Path) -> None:
    """On the loopback interface nothing of this is refused for its place."""
    (tmp_path / "workspace").mkdir()
    training = Training(tmp_path / "workspace")
    training.set(output_dir=str(outside / "made"), optimizer_type="mymodule.Optimizer", log_prefix="a/b")
    assert training.problems() == {}
    training.services.close()


# --- through the real server --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["form", "state"])
def test_routes_answer_members_only(exposed: Server, member: Server, path: str) -> None:
    assert exposed.fetch(f"/api/training/{path}").status == 401
    answer = member.fetch(f"/api/training/{path}")
    assert answer.status == 200
    assert str(os.path.expanduser("~/.ssh")) not in answer.text


@pytest.mark.parametrize("path", ["", "form/x", "../status", "%2e%2e/status", "state%00", "preset"])
def test_other_names_do_not_exist(local: Server, path: str) -> None:
    answer = local.fetch(f"/api/training/{path}")
    assert answer.status == 404 or "running" in answer.json()


@pytest.mark.parametrize("value", ["<script>alert(1)</script>", "a\u2028b", "'\"><img src=x>", "$(touch owned)"])
def test_texts_stay_texts(tmp_path: Path, value: Any) -> None:
    """Markup and shell words pass as data, and the command to copy quotes them."""
    training = Training(tmp_path)
    training.set(training_comment=value)
    state = training.state()
    assert state["values"]["training_comment"] == value
    assert f"--training_comment={value}" in shlex.split(state["command"])
    training.services.close()
