"""A small Llama of the documentation inside Python, fine-tuned with a mixture and with its own head.

`compare_heads.py --tiny` runs it; it downloads nothing. The text is the docstrings of the standard library and pydoc's
topics. It trains a BPE tokenizer and a small Llama on it: the checkpoint. It fine-tunes the checkpoint with its own
head and with a mixture of softmaxes, for the same steps on the same data in the same order, and once more with its own
head for the seconds that the mixture took.
"""

import argparse
import json
import math
import platform
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from python_documentation import python_documentation
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
from tokenizers import ByteLevelBPETokenizer

END_OF_TEXT = "<|endoftext|>"
PROMPT = "Return a new"
STEPS, CHECKPOINT_STEPS = 400, 4  # of a fine-tuning, and how many times as many make the checkpoint
MAX_DOCUMENTS = 3000
HEADS = {"softmax": "its own head", "mixture": "mixture of softmaxes"}
LONGER = "softmax for the seconds of the mixture"


@dataclass(frozen=True)
class Settings:
    """The settings of a run, the same for both heads."""

    steps: int  # of each fine-tuning
    num_mixtures: int
    seed: int
    vocab_size: int = 512
    block_size: int = 32  # tokens
    batch_size: int = 16  # blocks
    checkpoint_learning_rate: float = 1e-2
    learning_rate: float = 3e-3  # of both fine-tunings
    hidden_size: int = 16
    num_hidden_layers: int = 1
    num_attention_heads: int = 2
    validation_share: int = 10  # every 10th document

    @property
    def options(self) -> dict[str, Any]:
        """Those of the mixture: none for the default."""
        return {} if self.num_mixtures == 16 else {"num_mixtures": self.num_mixtures}


@dataclass
class Run:
    """The cost of one training, and the perplexity of the validation text after it."""

    name: str
    num_steps: int
    perplexity: float
    seconds: float  # that the processor spent on the steps
    parameters: int
    steps: list[int]
    losses: list[float]  # nats per token, the mean over the steps since the one before


def make_everything(work: Path, arguments: argparse.Namespace, console: Console) -> Path:
    """Runs the whole experiment in `work`, and returns the folder of its result."""
    started = time.perf_counter()
    steps = arguments.steps or STEPS
    settings = Settings(steps=steps, num_mixtures=arguments.num_mixtures, seed=arguments.seed)
    console.rule("The documentation inside this Python")
    documents = python_documentation(arguments.max_documents or MAX_DOCUMENTS)
    train_blocks, validation_blocks = tokenize(documents, work, settings)
    print(
        f"{len(documents):,} texts, {sum(map(len, documents)) / 1e6:.1f} million characters; "
        f"{train_blocks.size:,} tokens to train on, {validation_blocks.size:,} to validate"
    )
    console.rule("The checkpoint: a small Llama")
    checkpoint = train_checkpoint(work, replace(settings, steps=CHECKPOINT_STEPS * settings.steps))
    print(f"validation perplexity {checkpoint.perplexity:.2f}")
    runs = {}
    for head, title in HEADS.items():
        console.rule(f"The checkpoint fine-tuned with {title}")
        runs[head] = finetune(work, settings, head)
        print(f"validation perplexity {runs[head].perplexity:.2f}")
    longer = replace(settings, steps=steps_of_equal_seconds(runs))
    console.rule(f"And with {HEADS['softmax']} for the seconds of the mixture: {longer.steps} steps")
    runs[LONGER] = finetune(work, longer, "softmax")
    print(f"validation perplexity {runs[LONGER].perplexity:.2f}")
    result = work / "mixture"
    console.rule("Loaded in a fresh process through AutoModelForCausalLM")
    (paragraph,) = generate_paragraphs([result], PROMPT)
    print(paragraph)
    console.rule("Results")
    title = f"The same checkpoint fine-tuned for {settings.steps} steps, seed {settings.seed}"
    console.print(terminal_table(title, COLUMNS, table_rows(runs, settings)))
    curves = {
        f"{HEADS.get(head, head)} (validation perplexity {run.perplexity:.1f})": (run.steps, run.losses)
        for head, run in runs.items()
    }
    plot_losses(result / "loss.png", "Same checkpoint and data", "fine-tuning step", curves)
    write_results(result, settings, checkpoint, runs, paragraph, time.perf_counter() - started)
    write_card(result, settings, checkpoint, runs, command_line(settings, arguments))
    return result


def steps_of_equal_seconds(runs: dict[str, Run]) -> int:
    """The number of steps that the softmax takes in the seconds of the mixture."""
    softmax, mixture = runs["softmax"], runs["mixture"]
    return max(1, round(softmax.num_steps * mixture.seconds / softmax.seconds))


# --------------------------------------------------------------------------------------------------------------- text


def tokenize(documents: list[str], work: Path, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Trains the tokenizer on the training texts and writes both sets as blocks of tokens, (blocks, block_size)."""
    from transformers import PreTrainedTokenizerFast

    validation = documents[:: settings.validation_share]
    train = [text for i, text in enumerate(documents) if i % settings.validation_share]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        train, vocab_size=settings.vocab_size, special_tokens=[END_OF_TEXT], show_progress=sys.stderr.isatty()
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
    tokenizer.save_pretrained(work / "tokenizer")

    def pack(texts: list[str], name: str) -> np.ndarray:
        end = [tokenizer.eos_token_id]
        tokens = [token for ids in tokenizer(texts).input_ids for token in ids + end]
        whole = len(tokens) // settings.block_size * settings.block_size
        blocks = np.array(tokens[:whole]).reshape(-1, settings.block_size)
        np.save(work / f"{name}.npy", blocks)
        return blocks

    return pack(train, "train"), pack(validation, "validation")


# ----------------------------------------------------------------------------------------------------------- training


def train_checkpoint(work: Path, settings: Settings) -> Run:
    """A Llama with random weights, trained and saved as any checkpoint is."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=3 * settings.hidden_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        num_key_value_heads=settings.num_attention_heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return train("checkpoint", LlamaForCausalLM(config), work, settings, settings.checkpoint_learning_rate)


def finetune(work: Path, settings: Settings, head: str) -> Run:
    """The checkpoint with its own head, or with a mixture in its place; all else is the same."""
    from transformers import AutoModelForCausalLM, set_seed

    from hf_mos import MoSForCausalLM

    set_seed(settings.seed)
    checkpoint = str(work / "checkpoint")
    if head == "mixture":
        model = MoSForCausalLM.from_causal_lm(checkpoint, **settings.options)
    else:
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
    return train(head, model, work, settings, settings.learning_rate)


def train(name: str, model: Any, work: Path, settings: Settings, learning_rate: float) -> Run:
    """Trains the model with the Trainer, measures it on the validation text, saves it with its tokenizer as `name`."""
    from transformers import AutoTokenizer, Trainer, TrainingArguments
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # hides the bars of loading and saving, not the Trainer's

    training_arguments = TrainingArguments(
        output_dir=str(work / f"{name}-trainer"),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=learning_rate,
        warmup_steps=max(1, settings.steps // 20),
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        seed=settings.seed,
        logging_steps=max(1, settings.steps // 50),
        save_strategy="no",
        report_to="none",
        prediction_loss_only=True,
        use_cpu=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    trainer = Trainer(
        model=model,
        args=training_arguments,
        train_dataset=load_blocks(work / "train.npy"),
        eval_dataset=load_blocks(work / "validation.npy"),
        processing_class=tokenizer,
    )
    show_bar_alone(trainer)
    started = time.process_time()
    trainer.train()
    seconds = time.process_time() - started
    nats_per_token = trainer.evaluate()["eval_loss"]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    model.save_pretrained(work / name)
    tokenizer.save_pretrained(work / name)
    return Run(
        name=name,
        num_steps=settings.steps,
        perplexity=math.exp(nats_per_token),
        seconds=seconds,
        parameters=model.num_parameters(),
        steps=[entry["step"] for entry in logs],
        losses=[entry["loss"] for entry in logs],
    )


def load_blocks(path: Path) -> list[dict[str, np.ndarray]]:
    return [{"input_ids": block, "labels": block} for block in np.load(path)]


# ------------------------------------------------------------------------------------------------------------ results


COLUMNS = ("head", "validation perplexity", "processor seconds", "parameters")


def table_rows(runs: dict[str, Run], settings: Settings) -> list[tuple[str, ...]]:
    titles = {
        "softmax": "softmax",
        "mixture": f"mixture of {settings.num_mixtures}",
        LONGER: f"softmax, {runs[LONGER].num_steps} steps",
    }
    return [
        (
            titles[name],
            f"{run.perplexity:.2f}",
            f"{run.seconds:.0f}",
            f"{run.parameters:,}",
        )
        for name, run in runs.items()
    ]


def write_results(
    result: Path, settings: Settings, checkpoint: Run, runs: dict[str, Run], paragraph: str, seconds: float
) -> None:
    content = {
        "settings": asdict(settings),
        "machine": machine(),
        "checkpoint": asdict(checkpoint),
        "runs": {name: asdict(run) for name, run in runs.items()},
        "paragraph": paragraph,
        "total_seconds": seconds,
    }
    (result / RESULTS_FILE).write_text(json.dumps(content, indent=2) + "\n")


def write_card(result: Path, settings: Settings, checkpoint: Run, runs: dict[str, Run], command: str) -> None:
    from hf_mos import MoSForCausalLM
    from hf_mos.tools.card import model_card

    python = platform.python_version()
    tokens = settings.steps * settings.batch_size * settings.block_size
    card = model_card(
        MoSForCausalLM.from_pretrained(result),
        model_id="quickstart-out",
        eval_results=[perplexity_for_card(runs["mixture"].perplexity, "Docstrings and pydoc topics")],
        command=command,
        machine=machine(),
        comparison=markdown_table(COLUMNS, table_rows(runs, settings)),
        description=(
            f"A small Llama was trained for {CHECKPOINT_STEPS * tokens:,} tokens on the documentation inside Python "
            f"{python} (validation perplexity {checkpoint.perplexity:.2f}), then fine-tuned for {tokens:,} with its "
            "own head and with this one, on the same data in the same order, and once more with its own head for the "
            "seconds that this one took."
        ),
        limits=["It is a demonstration: a small model of a small text, good for nothing else."],
        prompt=PROMPT,
        language="en",
    )
    card.save(result / "README.md")
