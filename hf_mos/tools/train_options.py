"""The options of `hf-mos train`, their checks, and their help."""

import argparse
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from .exit_codes import OptionError, before_work
from .flags import check_numbers
from .head_options import add_head_options, head_flags, read_head_options
from .places import check_file
from .texts import ASSISTANT_ONLY_HELP, FILE_READERS, TEXT_COLUMN, TEXT_COLUMN_HELP, reader_of

LONGEST_DEFAULT_BLOCK = 1024
SHOWN_CHOICES = 4

HELP = """\
Fine-tunes a causal language model with a mixture of softmaxes as its head, with the Trainer.

Examples:

  %(prog)s --model gpt2 --train-file book.txt --output-dir gpt2-mos
  %(prog)s --model gpt2 --train-file book.txt --output-dir gpt2-mos --resume-from-checkpoint last
  accelerate launch -m hf_mos.tools.train --model Qwen/Qwen3-0.6B-Base \\
      --dataset-name Salesforce/wikitext --dataset-config-name wikitext-103-raw-v1 \\
      --bf16 --learning-rate 1e-4 --per-device-train-batch-size 4 --output-dir qwen-mos

Packs the text into blocks of --block-size tokens. Computes the perplexity of the validation text as hf-mos evaluate
does: each token counts once, with the tokens before it."""

# The options that --help explains in other words than transformers'.
TRAINING_HELP = {
    "output_dir": "Folder for the model, its tokenizer, its card and its metrics. Required.",
    "force": "Replace the model, the card and the checkpoints that the output folder holds.",
    "learning_rate": "Peak learning rate.",
    "lr_scheduler_type": "How the learning rate falls: linear, cosine, constant, ...",
    "warmup_steps": "Steps in which the learning rate rises to its peak; a share of all steps if below 1.",
    "num_train_epochs": "Passes over the training text.",
    "max_steps": "Number of optimizer steps, instead of epochs; -1: use --num-train-epochs.",
    "per_device_train_batch_size": "Number of blocks in a batch on each device.",
    "gradient_accumulation_steps": "Number of batches in an optimizer step.",
    "gradient_checkpointing": "Recompute activations in the backward pass, to save memory.",
    "bf16": "Train in bf16 mixed precision.",
    "seed": "Seed of random weights and of the order of the blocks, which is the dataset's with --streaming. The head "
    "has its own, --init-seed.",
    "logging_steps": "Print the loss every INT steps.",
    "log_components": "Log the share of each component and the divergence of each pair, for a tracker.",
    "eval_strategy": "When to evaluate during training: no, steps or epoch.",
    "eval_steps": "With --eval-strategy steps: evaluate every INT steps. Default: as often as the loss is printed.",
    "eval_on_start": "Evaluate before the first step too.",
    "per_device_eval_batch_size": "Number of windows in an evaluation batch on each device.",
    "save_steps": "Save a checkpoint every INT steps.",
    "save_total_limit": "Keep at most INT checkpoints.",
    "resume_from_checkpoint": "Continue an interrupted run from a checkpoint; last: the last complete one.",
    "report_to": "Trackers that receive the log, such as tensorboard or wandb.",
    "push_to_hub": "Push the model, its code, its tokenizer and its card to the Hub.",
    "hub_model_id": "user/name on the Hub; without it, the name of the output folder.",
    "use_cpu": "Train on the CPU.",
    "help": "Show this help.",
}


@dataclass
class ModelOptions:
    """The model, and whether it gets a mixture. The flags of the mixture are those of `head_options.py`."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub id of a causal LM, mixture or not."})
    from_scratch: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a config, instead of --model: train new weights."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a tokenizer, if not the model's own."}
    )
    head: Literal["mixture", "softmax"] = field(
        default="mixture", metadata={"help": "softmax: keep the model's own head, to compare."}
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32",
        metadata={"help": "Dtype of the weights. Keep float32, and train in mixed precision with --bf16."},
    )
    freeze_backbone: bool = field(
        default=False,
        metadata={
            "help": "Train only the head: run the backbone once, keep its hidden states in OUTPUT_DIR/_hidden_states, "
            "and compute only the head in each step."
        },
    )
    freeze_decoder: bool = field(
        default=False, metadata={"help": "With --freeze-backbone: freeze the decoder too. A tied decoder always is."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention, as in from_pretrained."})
    tp_size: int = field(default=1, metadata={"help": "Under torchrun: number of processes for tensor parallelism."})
    fsdp_size: int = field(
        default=1, metadata={"help": "Under torchrun: number of processes over which FSDP2 shards the weights."}
    )
    revision: str | None = field(default=None, metadata={"help": "Commit, branch or tag of the model."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the model repository's own code."})
    log_components: bool = field(default=False, metadata={"help": TRAINING_HELP["log_components"]})
    force: bool = field(default=False, metadata={"help": TRAINING_HELP["force"]})

    head_options: dict[str, Any] = field(default_factory=dict, init=False)  # the fields of MoSConfig that were given

    def __post_init__(self) -> None:
        if (self.model is None) == (self.from_scratch is None):
            raise ValueError("expected --model or --from-scratch, one of the two, given " + given(self, "model"))
        if self.from_scratch is not None and self.tokenizer is None:
            raise ValueError("--tokenizer: expected a folder or Hub id with --from-scratch, given none")

    @property
    def source(self) -> str:
        """The folder or id to load: of the model, or of the config."""
        source = self.from_scratch if self.model is None else self.model
        assert source is not None
        return source


@dataclass
class DataOptions:
    """The text, from files or from a dataset."""

    train_file: str | None = field(default=None, metadata={"help": f"Text for training: {', '.join(FILE_READERS)}."})
    validation_file: str | None = field(
        default=None, metadata={"help": "Text for validation, in the formats of --train-file."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, or a folder that load_dataset reads, instead of files."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    text_column: str = field(default=TEXT_COLUMN, metadata={"help": TEXT_COLUMN_HELP})
    assistant_only: bool = field(default=False, metadata={"help": ASSISTANT_ONLY_HELP})
    validation_share: float = field(
        default=0.05,
        metadata={
            "help": "Without a validation set: validate on this share of the training set, from its end, in [0, 1)."
        },
    )
    block_size: int | None = field(
        default=None,
        metadata={"help": f"Tokens in a block. Default: the model's positions, at most {LONGEST_DEFAULT_BLOCK}."},
    )
    preprocessing_workers: int | None = field(default=None, metadata={"help": "Number of processes that tokenize."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the dataset during training. Needs --max-steps. Splits off no validation set."},
    )

    def __post_init__(self) -> None:
        if (self.train_file is None) == (self.dataset_name is None):
            raise ValueError(
                "expected --train-file or --dataset-name, one of the two, given " + given(self, "train_file")
            )
        if self.validation_file is not None and self.train_file is None:
            raise ValueError("--validation-file: expected with --train-file only, given with --dataset-name")
        for option, file in (("--train-file", self.train_file), ("--validation-file", self.validation_file)):
            if file is None:
                continue
            check_file(Path(file), option)
            if Path(file).suffix.lower() not in FILE_READERS:
                raise ValueError(f"{option}: expected one of {', '.join(FILE_READERS)}, given {file!r}")
        if self.streaming and self.preprocessing_workers is not None:
            raise ValueError("--preprocessing-workers: expected none with --streaming, given a number")
        if self.block_size is not None and self.block_size < 2:
            raise ValueError(f"--block-size: expected at least 2 tokens, given {self.block_size}")

    @property
    def is_lines(self) -> bool:
        """Whether the rows of the training set are the lines of one text."""
        return self.train_file is not None and reader_of(Path(self.train_file)) == "text"


def given(options: Any, name: str) -> str:
    return "both" if getattr(options, name) is not None else "neither"


Options = tuple[ModelOptions, DataOptions, TrainingArguments]


def parse_options(arguments: list[str] | None = None, prog: str | None = None) -> Options:
    """Parses a command line; `None`: that of this process.

    Raises:
        OptionError: an option is unknown, missing or out of range.
    """
    parser = Parser(prog)
    with before_work():
        model, data, training, *others = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
        *namespaces, unknown = others
        if unknown:
            parser.refuse(unknown[0])
        model.head_options = read_head_options({k: v for namespace in namespaces for k, v in vars(namespace).items()})
        if model.head == "softmax" and model.head_options:
            raise ValueError(f"--head softmax: expected no options of a mixture, given {model.head_options}")
        check_frozen(model, data, training)
        check_evaluation(training)
        check_best(training)
        check_validation(data, training)
        if data.streaming and training.max_steps <= 0:
            raise ValueError(
                "--max-steps: expected a number of steps with --streaming, whose length is unknown, given none"
            )
    return model, data, training


def check_evaluation(training: TrainingArguments) -> None:
    """Raises a ValueError for options that the command cannot follow."""
    if training.do_predict:
        raise ValueError("--do-predict: expected False, as hf-mos evaluate measures a test text, given True")
    if (sampling := getattr(training, "train_sampling_strategy", "random")) not in ("random", "sequential"):
        raise ValueError(
            f"--train-sampling-strategy: expected random or sequential, as blocks are of one length, given {sampling}"
        )
    if training.batch_eval_metrics:
        raise ValueError("--batch-eval-metrics: expected False, as the metrics are those of all windows, given True")
    if not training.eval_do_concat_batches:
        raise ValueError("--eval-do-concat-batches: expected True, as windows differ in length, given False")


def check_best(training: TrainingArguments) -> None:
    """Raises a ValueError where a run could not tell its best checkpoint; a perplexity has to fall."""
    metric, evaluates = training.metric_for_best_model, IntervalStrategy(training.eval_strategy).value
    if metric is not None and metric.removeprefix("eval_") not in ("loss", "perplexity"):
        raise ValueError(f"--metric-for-best-model: expected loss or perplexity, given {metric}")
    if metric in ("perplexity", "eval_perplexity"):
        training.greater_is_better = False  # transformers takes any name that does not end in "loss" for a score
    asks = training.load_best_model_at_end or training.save_strategy == SaveStrategy.BEST
    if asks and (metric is None or evaluates == "no"):
        raise ValueError(
            "--load-best-model-at-end, --save-strategy best: expected with --eval-strategy and "
            f"--metric-for-best-model, given {evaluates} and {metric}"
        )


def check_validation(data: DataOptions, training: TrainingArguments) -> None:
    """Raises a ValueError where there is nothing to evaluate on; a dataset may have a validation set of its own."""
    has_share = data.validation_share > 0 and not data.streaming
    if has_share or data.validation_file is not None or data.dataset_name is not None:
        return
    evaluates = IntervalStrategy(training.eval_strategy).value
    if training.eval_on_start or evaluates != "no":
        asked = "--eval-on-start" if training.eval_on_start else f"--eval-strategy {evaluates}"
        raise ValueError(
            f"{asked}: expected --validation-file, or --validation-share above 0 without --streaming, given neither"
        )


def check_frozen(model: ModelOptions, data: DataOptions, training: TrainingArguments) -> None:
    """Raises a ValueError for options that do not go with a frozen backbone."""
    if model.freeze_decoder and not model.freeze_backbone:
        raise ValueError("--freeze-decoder: expected with --freeze-backbone only, given without it")
    if not model.freeze_backbone:
        return
    if model.head == "softmax":
        raise ValueError(
            "--freeze-backbone: expected --head mixture, given softmax. One softmax with a trained latent is "
            "--num-mixtures 1"
        )
    if data.streaming or max(model.tp_size, model.fsdp_size) > 1:
        raise ValueError("--freeze-backbone: expected no --streaming, --tp-size or --fsdp-size with it, given one")
    if training.neftune_noise_alpha is not None:
        raise ValueError("--neftune-noise-alpha: expected none with --freeze-backbone, given a number")


# ---------------------------------------------------------------------------------------------------------------- help


class Parser(HfArgumentParser):
    """Parses the options of the dataclasses and of the head. Its help shows each once, the usual ones by default."""

    def __init__(self, prog: str | None) -> None:
        super().__init__(
            [ModelOptions, DataOptions, TrainingArguments],  # type: ignore[list-item]
            prog=prog,
            usage="%(prog)s --model MODEL --train-file FILE --output-dir DIR [options]",
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        add_head_options(self)
        self.set_defaults(logging_steps=10, logging_first_step=True)  # the Trainer's 500 shows no loss of a short run
        # TrainingArguments would train into ./trainer_output.
        next(action for action in self._actions if action.dest == "output_dir").required = True
        self.add_argument(
            "--help-all",
            action=HelpAll,
            nargs=0,
            default=argparse.SUPPRESS,
            help="Explain every option of TrainingArguments too.",
        )

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        namespace, unknown = super().parse_known_args(*args, **kwargs)
        # Before TrainingArguments computes with them.
        check_numbers({name: value for name, value in vars(namespace).items() if value != self.get_default(name)})
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        raise OptionError(re.sub(r"--\w+/(--[\w-]+)", r"\1", message))  # one spelling of an option

    def refuse(self, unknown: str) -> NoReturn:
        name = unknown.partition("=")[0]
        close = difflib.get_close_matches(name, [spelling(action) for action in self._actions], n=1)
        hint = f" (the closest is {close[0]})" if close and name.startswith("-") else ""
        raise OptionError(f"{name}: expected an option that --help-all lists{hint}, given an unknown one")

    def format_help(self, whole: bool = False) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(HELP.replace("%(prog)s", self.prog))
        for title, actions in self.sections(whole):
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        if not whole:
            formatter.add_text("Every other option of TrainingArguments works too: --help-all.")
        return formatter.format_help()

    def sections(self, whole: bool) -> Iterator[tuple[str, list[argparse.Action]]]:
        actions = {action.dest: action for action in reversed(self._actions)}  # the first of an option and its --no-
        sections = {
            "help": ["help", "help_all"],
            "the training": TRAINING_HELP,
            "the model": ModelOptions.__annotations__,
            "the mixture": [flag.name for flag in head_flags()],
            "the text": DataOptions.__annotations__,
        }
        found = {title: [actions.pop(name) for name in names if name in actions] for title, names in sections.items()}
        if whole:
            found["the other options of TrainingArguments"] = [actions[name] for name in sorted(actions)]
        order = (
            "the model",
            "the mixture",
            "the text",
            "the training",
            "the other options of TrainingArguments",
            "help",
        )
        yield from ((title, found[title]) for title in order if title in found)


class HelpAll(argparse.Action):
    def __call__(self, parser: Any, *arguments: Any, **options: Any) -> None:
        print(parser.format_help(whole=True), end="")
        parser.exit()


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """One spelling of each option, and its default where it has one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"{spelling(action)}, --no-{spelling(action)[2:]}"
        if action.nargs in (0, "?"):
            return spelling(action)
        if len(list(action.choices or ())) > SHOWN_CHOICES:
            return f"{spelling(action)} TEXT"
        return f"{spelling(action)} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        kind: Any = action.type
        return {int: "INT", float: "NUMBER"}.get(kind, "TEXT")

    def _get_help_string(self, action: argparse.Action) -> str:
        text = TRAINING_HELP.get(action.dest) or " ".join((action.help or "").split())
        default = action.default
        if default in (None, False, "", argparse.SUPPRESS) or isinstance(default, (dict, list)):
            return text
        shown = str(getattr(default, "value", default)).replace("%", "%%")
        return f"{text} (default: {shown})"


def spelling(action: argparse.Action) -> str:
    return max(action.option_strings, key=lambda name: (name.startswith("--"), "_" not in name[2:]), default="")
