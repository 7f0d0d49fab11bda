"""Runs examples/quickstart/compare_heads.py from end to end, with few texts and few steps."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fresh_processes import PROGRAMS, fork_server
from huggingface_hub import ModelCard
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "examples" / "quickstart" / "compare_heads.py"


def arguments_of(out: Path, *options: str) -> list[str]:
    return ["--tiny", "--out", str(out), "--max-documents", "300", *options]


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return fork_server(*PROGRAMS).run(
        str(SCRIPT),
        *arguments_of(out, *options),
        kind="script",
        environment={"HF_HOME": str(out.parent / "home")},
        warnings_are_errors=True,
    )


def start(out: Path, *options: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(out.parent / "home")}
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(SCRIPT), *arguments_of(out, *options)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        # What runs in the background of a script has the interrupt ignored, and hands that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("compare") / "out"
    process = run(out, "--steps", "4", "--num-mixtures", "3")
    assert process.returncode == 0, process.stderr
    return out, process.stdout


def test_prints_one_table_with_what_it_measured(finished: tuple[Path, str]) -> None:
    out, stdout = finished
    results = json.loads((out / "results.json").read_text())
    for head, title in (("softmax", "softmax"), ("mixture", "mixture of 3")):
        run = results["runs"][head]
        assert 1 < run["perplexity"] < 10_000
        assert run["seconds"] > 0
        assert len(run["losses"]) == len(run["steps"]) == 4
        assert all(map(math.isfinite, run["losses"]))
        row = next(line for line in stdout.splitlines() if line.startswith(f"│ {title}"))
        assert f"{run['perplexity']:.2f}" in row
        assert f"{run['parameters']:,}" in row
    longer = results["runs"]["softmax for the seconds of the mixture"]
    softmax, mixture = results["runs"]["softmax"], results["runs"]["mixture"]
    assert longer["num_steps"] == round(4 * mixture["seconds"] / softmax["seconds"])
    assert f"│ softmax, {longer['num_steps']} steps" in stdout
    assert results["runs"]["mixture"]["parameters"] > results["runs"]["softmax"]["parameters"]


def test_the_paragraph_comes_from_a_process_without_hf_mos(finished: tuple[Path, str]) -> None:
    out, stdout = finished
    paragraph = json.loads((out / "results.json").read_text())["paragraph"]
    assert len(paragraph) > 20
    assert paragraph in stdout


def test_leaves_checkpoint_card_and_plot(finished: tuple[Path, str]) -> None:
    out, _ = finished
    assert {"model.safetensors", "modeling_mos.py", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    assert not list(out.glob("*.bin"))
    card = ModelCard.load(out / "README.md")
    measured = json.loads((out / "results.json").read_text())["runs"]
    assert card.data.eval_results[0].metric_value == round(measured["mixture"]["perplexity"], 2)
    assert f"| softmax | {measured['softmax']['perplexity']:.2f} |" in card.text
    assert "--steps 4 --num-mixtures 3 --seed 0" in card.text
    with Image.open(out / "loss.png") as plot:
        assert plot.size[0] > 500
    assert sorted(path.name for path in out.parent.iterdir() if path.name != "home") == ["out"]


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    process = run(tmp_path)
    assert process.returncode != 0
    assert "--out: expected a new folder" in process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_new_result_leaves_the_files_of_the_user(tmp_path: Path) -> None:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        from report import put_in_place
    finally:
        sys.path.remove(str(SCRIPT.parent))
    (out := tmp_path / "out").mkdir()
    (out / "results.json").write_text("old")
    (out / "thesis.tex").write_text("years of work")
    (result := tmp_path / "work" / "result").mkdir(parents=True)
    (result / "results.json").write_text("new")
    put_in_place(result, out)
    assert {path.name: path.read_text() for path in out.iterdir()} == {
        "results.json": "new",
        "thesis.tex": "years of work",
    }


@pytest.mark.parametrize("how", ["interrupt", pytest.param("terminate", marks=pytest.mark.slow)])
def test_a_stopped_run_leaves_nothing(tmp_path: Path, how: str) -> None:
    process = start(tmp_path / "out", "--steps", "100000")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out-unfinished-*/validation.npy")):  # the trainings come after the tokens
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(2)
    if how == "interrupt":
        os.killpg(process.pid, signal.SIGINT)  # a terminal interrupts the children as well
    else:
        process.terminate()
    _, stderr = process.communicate(timeout=60)  # the pipes close when no child is left
    assert process.returncode != 0
    assert "nothing is left behind" in stderr
    assert not list(tmp_path.glob("out*"))
