"""Checks that the benchmarks run, and that they print no time if a gradient is wrong."""

import json
from pathlib import Path

import pytest
from fresh_processes import PROGRAMS, fork_server
from helpers import part_components, tiny_causal_lm
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from hf_mos import MoSForCausalLM

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"
SIZES = ["--num-tokens", "16", "--hidden-size", "16", "--vocab-size", "64"]


def run(script, *arguments):
    return fork_server(*PROGRAMS).run(str(BENCHMARKS / script), *arguments, "--threads", "1", kind="script")


@pytest.mark.slow
def test_loss_prints_time_and_memory_of_every_contender():
    result = run("loss.py", *SIZES, "--rounds", "1", "--only", "mos_cross_entropy", "--only", "paper", "--json")
    assert result.returncode == 0, result.stderr
    rows = {row[""]: row for row in json.loads(result.stdout)["rows"]}
    assert rows.keys() == {"the floor", "three bare products", "mos_cross_entropy", "paper"}
    assert all(row["seconds"] > 0 for row in rows.values())


@pytest.mark.slow
def test_a_dry_run_checks_the_command_of_a_gpu_without_one():
    large = ["--num-tokens", "8192", "--hidden-size", "2048", "--vocab-size", "128256", "--only", "mos_cross_entropy"]
    result = run("loss.py", "--device", "cuda", "--dtype", "bfloat16", *large, "--dry-run", "--json")
    assert result.returncode == 0, result.stderr
    settings = json.loads(result.stdout)["settings"]
    assert (settings["device"], settings["dtype"], settings["num_tokens"]) == ("cpu", "bfloat16", 16)


def test_a_wrong_gradient_ends_the_run_before_anything_is_timed(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import contenders
    import loss

    wrong = contenders.CONTENDERS["mos_cross_entropy"]
    monkeypatch.setattr(wrong, "loss", lambda leaves, targets: 1.01 * contenders.ours(leaves, targets))
    monkeypatch.setattr(loss, "time_in_turn", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit, match="mos_cross_entropy: wrong by"):
        loss.main(16, 2, 16, 64, threads=1, only=["mos_cross_entropy"])


def test_decoding():
    sizes = [
        "--hidden-size",
        "64",
        "--vocab-size",
        "100",
        "--prompt-tokens",
        "8",
        "--new-tokens",
        "2",
        "--rounds",
        "1",
    ]
    result = run("decode.py", *sizes)
    assert result.returncode == 0, result.stderr
    assert "tokens per second" in " ".join(result.stdout.split())


def save_mixtures(folder, text):
    """A full mixture and one on a shortlist, each with a tokenizer."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text], vocab_size=300)
    for name, size in (("full", None), ("shortlist", 8)):
        mixture = MoSForCausalLM.from_causal_lm(
            tiny_causal_lm(vocab_size=bpe.get_vocab_size()), num_mixtures=2, shortlist_size=size
        )
        part_components(mixture)
        mixture.save_pretrained(folder / name)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="a")
        tokenizer.save_pretrained(folder / name)


def test_steps_with_a_cache_differ_from_one_pass_by_rounding(tmp_path):
    save_mixtures(tmp_path, "the cat sat on the mat. " * 100)
    folders = [str(tmp_path / name) for name in ("full", "shortlist")]
    found = {}
    for dtype in ("float32", "bfloat16"):
        script = str(BENCHMARKS / "step_by_step.py")
        result = fork_server(*PROGRAMS).run(script, *folders, "--new-tokens", "8", "--dtype", dtype, kind="script")
        assert result.returncode == 0, result.stderr
        lines = [line.rpartition(": ") for line in result.stdout.splitlines()]
        found[dtype] = {name: float(words.split()[0]) for name, _, words in lines}
    assert len(found["float32"]) == 4
    assert all(gap < 0.002 < found["bfloat16"][name] for name, gap in found["float32"].items())


def test_row_skipping_takes_a_full_mixture_alone(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 100)
    save_mixtures(tmp_path, text.read_text())
    result = run("row_skipping.py", str(tmp_path / "full"), "--text-file", str(text), "--json")
    assert result.returncode == 0, result.stderr
    shares = [row["share of rows"] for row in json.loads(result.stdout)["rows"]]
    assert shares == sorted(shares)  # a higher threshold skips more rows
    refused = run("row_skipping.py", str(tmp_path / "shortlist"), "--text-file", str(text))
    assert refused.returncode == 1
    assert "model: expected a full mixture, given a shortlist of 8 classes" in refused.stderr
