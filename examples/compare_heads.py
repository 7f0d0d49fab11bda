"""Compares the mixture with the softmax on real text, in a few minutes on two CPU cores. Downloads nothing.

    python examples/compare_heads.py --out quickstart-out          (make quickstart runs it)

The text is the documentation inside Python: the docstrings of the standard library and pydoc's topics. The script
trains a BPE tokenizer and a small Llama on it: the checkpoint. It fine-tunes the checkpoint with its own head and with
a mixture of softmaxes, for the same steps on the same data in the same order, and once more with its own head for the
seconds that the mixture took. Each training is a process of its own, so that its peak memory is its own. A fresh
process then loads the mixture through AutoModelForCausalLM and writes a paragraph.

The output folder holds the mixture with its tokenizer, its model card, results.json and loss.png. It appears at the
end; an interrupted run leaves nothing.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from python_documentation import python_documentation
from rich.console import Console
from rich.table import Table
from tokenizers import ByteLevelBPETokenizer

END_OF_TEXT = "<|endoftext|>"
PROMPT = "Return a new"
RESULTS_FILE = "results.json"
HEADS = {"softmax": "its own head", "mixture": "mixture of softmaxes"}
LONGER = "softmax for the seconds of the mixture"

# Loads the checkpoint as a user does: without hf_mos, by the code beside the weights.
RELOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils.logging import disable_progress_bar
disable_progress_bar()
folder, prompt = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
set_seed(0)
inputs = tokenizer(prompt, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=100, do_sample=True, temperature=0.7, top_p=0.9)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
"""


@dataclass(frozen=True)
class Settings:
    """The settings of a run, the same for both heads."""

    steps: int  # of each training: the checkpoint's, and each fine-tuning
    num_mixtures: int
    seed: int
    vocab_size: int = 2048
    block_size: int = 64  # tokens
    batch_size: int = 32  # blocks
    checkpoint_learning_rate: float = 5e-3
    learning_rate: float = 2e-2  # of both fine-tunings: near the best for the softmax
    hidden_size: int = 32
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    validation_share: int = 20  # every 20th document


@dataclass
class Run:
    """The cost of one training, and the perplexity of the validation text after it."""

    name: str
    num_steps: int
    perplexity: float
    seconds: float
    peak_memory_mb: float  # above that of the process before the model was loaded
    parameters: int
    steps: list[int]
    losses: list[float]  # nats per token, the mean over the steps since the one before


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated, nothing is left behind"))
    # Waiting threads that spin slow down a machine with other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    out = arguments.out.resolve()
    check_output_folder(out)
    settings = Settings(steps=arguments.steps, num_mixtures=arguments.num_mixtures, seed=arguments.seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}-unfinished-", dir=out.parent) as work:
        make_everything(Path(work), settings, arguments, Console())
        put_in_place(Path(work, "mixture"), out)
    print(f"\nEverything is in {out}: the checkpoint, its card (README.md), {RESULTS_FILE} and loss.png.")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("quickstart-out"), help="folder for the results")
    parser.add_argument("--steps", type=positive_int, default=800, help="optimizer steps of each training")
    parser.add_argument("--num-mixtures", type=positive_int, default=4, help="softmaxes in the mixture")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the data")
    parser.add_argument("--max-documents", type=positive_int, help="use fewer documents (default: all)")
    return parser.parse_args()


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, given {text!r}")
    return int(text)


def check_output_folder(out: Path) -> None:
    if out.exists() and not (out / RESULTS_FILE).is_file():
        raise SystemExit(f"--out: expected a new folder or one that this script made, given {out}")


def make_everything(work: Path, settings: Settings, arguments: argparse.Namespace, console: Console) -> None:
    started = time.perf_counter()
    console.rule("The documentation inside this Python")
    documents = python_documentation(arguments.max_documents)
    train_blocks, validation_blocks = tokenize(documents, work, settings)
    print(
        f"{len(documents):,} texts, {sum(map(len, documents)) / 1e6:.1f} million characters; "
        f"{train_blocks.size:,} tokens to train on, {validation_blocks.size:,} to validate"
    )
    console.rule("The checkpoint: a small Llama")
    checkpoint = in_fresh_process(train_checkpoint, work, settings)
    print(f"validation perplexity {checkpoint.perplexity:.2f}")
    runs = {}
    for head, title in HEADS.items():
        console.rule(f"The checkpoint fine-tuned with {title}")
        runs[head] = in_fresh_process(finetune, work, settings, head)
        print(f"validation perplexity {runs[head].perplexity:.2f}")
    longer = replace(settings, steps=steps_of_equal_seconds(runs))
    console.rule(f"And with {HEADS['softmax']} for the seconds of the mixture: {longer.steps} steps")
    runs[LONGER] = in_fresh_process(finetune, work, longer, "softmax")
    print(f"validation perplexity {runs[LONGER].perplexity:.2f}")
    result = work / "mixture"
    console.rule("Loaded in a fresh process through AutoModelForCausalLM")
    paragraph = generate_paragraph(result)
    print(paragraph)
    console.rule("Results")
    console.print(results_table(runs, settings))
    plot_losses(runs, result / "loss.png")
    write_results(result, settings, checkpoint, runs, paragraph, time.perf_counter() - started)
    write_card(result, settings, checkpoint, runs, command_line(arguments))


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


def in_fresh_process(function: Callable[..., Run], *arguments: Any) -> Run:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_result, args=(sender, function, *arguments), daemon=True)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:  # it has printed why
        raise SystemExit(f"{function.__name__} failed") from None
    except BaseException:
        process.terminate()
        raise
    finally:
        process.join()


def send_result(sender: Connection, function: Callable[..., Run], *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt reaches the parent too, which ends this process
    sender.send(function(*arguments))


def train_checkpoint(work: Path, settings: Settings) -> Run:
    """A Llama with random weights, trained and saved as any checkpoint is."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    with PeakMemory() as memory:
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
        model = LlamaForCausalLM(config)
        return train("checkpoint", model, work, settings, settings.checkpoint_learning_rate, memory)


def finetune(work: Path, settings: Settings, head: str) -> Run:
    """The checkpoint with its own head, or with a mixture in its place; all else is the same."""
    from transformers import AutoModelForCausalLM, set_seed

    from hf_mos import MoSForCausalLM

    with PeakMemory() as memory:
        set_seed(settings.seed)
        checkpoint = str(work / "checkpoint")
        if head == "mixture":
            model = MoSForCausalLM.from_causal_lm(checkpoint, num_mixtures=settings.num_mixtures)
        else:
            model = AutoModelForCausalLM.from_pretrained(checkpoint)
        return train(head, model, work, settings, settings.learning_rate, memory)


def train(name: str, model: Any, work: Path, settings: Settings, learning_rate: float, memory: "PeakMemory") -> Run:
    """Trains the model with the Trainer, measures it on the validation text, saves it with its tokenizer as `name`."""
    from transformers import AutoTokenizer, ProgressCallback, Trainer, TrainingArguments
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # hides the bars of loading and saving, not the Trainer's

    class Progress(ProgressCallback):
        """A bar without log lines, which would break it; they are in results.json and loss.png."""

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            pass

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
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress)
    started = time.perf_counter()
    trainer.train()
    seconds, peak_memory_mb = time.perf_counter() - started, memory.peak_mb()
    nats_per_token = trainer.evaluate()["eval_loss"]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    model.save_pretrained(work / name)
    tokenizer.save_pretrained(work / name)
    return Run(
        name=name,
        num_steps=settings.steps,
        perplexity=math.exp(nats_per_token),
        seconds=seconds,
        peak_memory_mb=peak_memory_mb,
        parameters=model.num_parameters(),
        steps=[entry["step"] for entry in logs],
        losses=[entry["loss"] for entry in logs],
    )


def load_blocks(path: Path) -> list[dict[str, np.ndarray]]:
    return [{"input_ids": block, "labels": block} for block in np.load(path)]


class PeakMemory:
    """The peak of this process's resident memory since the start, above its memory at the start."""

    def __init__(self, interval: float = 0.01) -> None:
        self.interval = interval
        self.process = psutil.Process()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self.start = self.peak = self.process.memory_info().rss
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stopped.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.stopped.wait(self.interval):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def peak_mb(self) -> float:
        return (self.peak - self.start) / 2**20


# ------------------------------------------------------------------------------------------------------------ results


def generate_paragraph(checkpoint: Path) -> str:
    command = [sys.executable, "-c", RELOAD, str(checkpoint), PROMPT]
    with tempfile.TemporaryDirectory() as elsewhere:  # where no hf_mos folder lies on the path
        return subprocess.run(command, cwd=elsewhere, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


COLUMNS = ("head", "validation perplexity", "seconds", "peak memory, MB", "parameters")


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
            f"{run.peak_memory_mb:.0f}",
            f"{run.parameters:,}",
        )
        for name, run in runs.items()
    ]


def results_table(runs: dict[str, Run], settings: Settings) -> Table:
    table = Table(title=f"The same checkpoint fine-tuned for {settings.steps} steps, seed {settings.seed}")
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if i else "left")
    for row in table_rows(runs, settings):
        table.add_row(*row)
    return table


def markdown_table(runs: dict[str, Run], settings: Settings) -> str:
    rows = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1)), *table_rows(runs, settings)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot_losses(runs: dict[str, Run], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for head, run in runs.items():
        label = f"{HEADS.get(head, head)} (validation perplexity {run.perplexity:.1f})"
        axes.plot(run.steps, run.losses, label=label)
    axes.set(xlabel="fine-tuning step", ylabel="training loss, nats per token", title="Same checkpoint and data")
    axes.legend()
    figure.savefig(path, dpi=150)


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
    from huggingface_hub import EvalResult

    from hf_mos import MoSForCausalLM
    from hf_mos.tools.card import model_card

    python = platform.python_version()
    measured = EvalResult(
        task_type="text-generation",
        dataset_type="python-documentation",
        dataset_name=f"Docstrings and pydoc topics of Python {python}",
        dataset_split="validation",
        metric_type="perplexity",
        metric_name="perplexity per token",
        metric_value=round(runs["mixture"].perplexity, 2),
    )
    tokens = settings.steps * settings.batch_size * settings.block_size
    card = model_card(
        MoSForCausalLM.from_pretrained(result),
        model_id="quickstart-out",
        eval_results=[measured],
        command=command,
        machine=machine(),
        comparison=markdown_table(runs, settings),
        description=(
            f"A small Llama was trained for {tokens:,} tokens on the documentation inside Python {python} (validation "
            f"perplexity {checkpoint.perplexity:.2f}), then fine-tuned for as many with its own head and with this "
            "one, on the same data in the same order, and once more with its own head for the seconds that this one "
            "took. Peak memory is what the process held above its start."
        ),
        limits=["It is a demonstration: a small model of a small text, good for nothing else."],
        prompt=PROMPT,
        language="en",
    )
    card.save(result / "README.md")


def machine() -> str:
    return f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} CPU cores"


def command_line(arguments: argparse.Namespace) -> str:
    options = [f"--steps {arguments.steps}", f"--num-mixtures {arguments.num_mixtures}", f"--seed {arguments.seed}"]
    if arguments.max_documents:
        options.append(f"--max-documents {arguments.max_documents}")
    return " ".join(["python examples/compare_heads.py", *options])


def put_in_place(result: Path, out: Path) -> None:
    """Moves the finished folder to its name, and only then deletes a former one."""
    former = result.with_name("former")
    if out.exists():
        out.rename(former)
    result.rename(out)
    if former.exists():
        shutil.rmtree(former)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted, nothing is left behind")
