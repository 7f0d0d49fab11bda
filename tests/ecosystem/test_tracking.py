"""Checks that trackers receive the loss and the mixture's statistics from the Trainer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import random_tokens, tiny_mos
from transformers import Trainer, TrainingArguments

from hf_mos.training.callbacks import MixtureUsage

MIXTURE = {
    "mixture_entropy",
    "smallest_mixture_weight",
    "mixture_divergence",
    "responsibility_0",
    "responsibility_2",
    "divergence_0_1",
}


def train(folder: Path, tracker: str) -> list[dict[str, float]]:
    """Three steps; returns what the Trainer logged."""
    rows = [{"input_ids": row, "labels": row} for row in random_tokens(8)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=3,
        use_cpu=True,
        report_to=tracker,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        per_device_train_batch_size=4,
        dataloader_pin_memory=False,
        run_name="mixture",
        project="mos",
    )
    trainer = Trainer(tiny_mos(), arguments, train_dataset=rows)
    MixtureUsage(components=True).add_to(trainer)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("default")
def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    logged = train(tmp_path, "tensorboard")
    folder = next((tmp_path / "runs").rglob("events.out.tfevents.*")).parent
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"train/{name}" for name in {*MIXTURE, "loss"}} <= tags
    for name in ("loss", "mixture_entropy", "responsibility_2"):
        written = events.Scalars(f"train/{name}")
        assert [event.step for event in written] == [1, 2, 3]
        assert [event.value for event in written] == pytest.approx([entry[name] for entry in logged], rel=1e-5)


def test_trackio(tmp_path: Path) -> None:
    code = """
import json, sys
from pathlib import Path
import trackio
from test_tracking import train
logged = train(Path(sys.argv[1]), "trackio")
from trackio.sqlite_storage import SQLiteStorage
project = SQLiteStorage.get_projects()[0]
run = SQLiteStorage.get_runs(project)[0]
print(json.dumps({"logged": logged, "stored": SQLiteStorage.get_logs(project, run)}, default=str))
"""
    folders = [Path(__file__).parent, Path(__file__).parents[1]]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    result = json.loads(process.stdout.splitlines()[-1])
    stored = [entry for entry in result["stored"] if "train/loss" in entry]
    assert {f"train/{name}" for name in MIXTURE} <= stored[0].keys()
    for name in ("loss", "mixture_entropy", "divergence_0_1"):
        values = [entry[f"train/{name}"] for entry in stored]
        assert values == pytest.approx([entry[name] for entry in result["logged"]], rel=1e-5)
