"""The training command as people start it: the guide's launch line, in processes of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from backend.config.state_record import read_record
from backend.events import read_events
from tests.conftest import REPOSITORY
from tests.integration.training_runs import SMALL, guide_words, weights

MODULE = "backend.kandinsky5_train_network"


def test_the_guides_command_line_runs(training_data: Path, tmp_path: Path) -> None:
    """`accelerate launch --num_cpu_threads_per_process 1 --mixed_precision bf16 -m ...`, without a run folder."""
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--num_cpu_threads_per_process", "1", "--mixed_precision", "bf16", "-m", MODULE),
        *("--dataset_config", str(training_data)),
        *guide_words(tmp_path / "out", warmup=2, epochs=1),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 7/7, epoch 1/1" in done.stderr
    assert os.listdir(tmp_path / "out") == ["k5_lora.safetensors"]
    assert len(weights(tmp_path / "out/k5_lora.safetensors")) == 3 * 62


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_signals_save_and_end(number: signal.Signals, training_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [*map(str, SMALL), "--max_train_steps", "100000", "--dataset_config", str(training_data)]
    process = subprocess.Popen(
        [sys.executable, "-m", MODULE, *words, "--run_dir", str(run)], cwd=REPOSITORY, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not any(record["type"] == "step" for record in read_events(run / "events.jsonl").records):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said.decode()
    events = read_events(run / "events.jsonl").records
    assert events[-1]["type"] == "stopped"
    (state,) = (run / "checkpoints").glob("*-state")
    assert read_record(state, hashes=True).position.step == events[-1]["step"] > 0
    assert b"Stopped and saved" in said
