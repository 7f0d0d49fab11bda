"""Fine-tunes a causal language model with a mixture of softmaxes for its head, with the Trainer.

    hf-mos train --model gpt2 --num-mixtures 4 --train-file book.txt --output-dir out
    accelerate launch -m hf_mos.tools.train --model Qwen/Qwen3-0.6B-Base --latent-rank 32 \\
        --dataset-name Salesforce/wikitext --dataset-config-name wikitext-103-raw-v1 \\
        --bf16 --learning-rate 1e-4 --per-device-train-batch-size 4 --output-dir out

The text is packed into blocks of `--block-size` tokens. `--head softmax` trains the same model with its own head, to
compare. A `--model` that has a mixture already is trained on. `--from-scratch` takes a config and draws new weights.
The output folder holds the model with its tokenizer, its card and its metrics; every option of TrainingArguments works
(`--push-to-hub`, `--resume-from-checkpoint last`, `--gradient-checkpointing`, ...), and perplexity is exp(nats per
token).
"""

import argparse
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from huggingface_hub import CommitInfo, EvalResult, HfApi
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.distributed import DistributedConfig

from ..configuration_mos import MoSConfig
from ..modeling_mos import MoSForCausalLM
from ..training.callbacks import MixtureUsage, StopOnNonFiniteLoss, last_whole_checkpoint
from .card import CARD_FILE, model_card
from .head_options import add_head_options, check_head_options
from .loading import hub_options, load_tokenizer
from .provenance import describe_machine, own_command
from .push import pin_card
from .texts import FILE_READERS

LONGEST_DEFAULT_BLOCK = 1024
STREAMED_ROWS = 10_000  # rows packed together; the tokens after their last full block are dropped


@dataclass
class ModelOptions:
    """The model, and whether it gets a mixture. The flags of the mixture are those of `head_options.py`."""

    model: str | None = field(default=None, metadata={"help": "Path or Hub id of a causal LM, mixture or not."})
    from_scratch: str | None = field(
        default=None, metadata={"help": "Path or Hub id of a config. The weights are new."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Path or Hub id of another tokenizer than the model's."}
    )
    head: Literal["mixture", "softmax"] = field(
        default="mixture", metadata={"help": "softmax: keep the model's own head."}
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32",
        metadata={"help": "Dtype of the weights. Keep float32, and train in mixed precision with --bf16."},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "As in from_pretrained."})
    tp_size: int = field(default=1, metadata={"help": "Under torchrun: processes for tensor parallelism."})
    fsdp_size: int = field(
        default=1, metadata={"help": "Under torchrun: processes over which FSDP2 shards the weights."}
    )
    revision: str | None = field(default=None, metadata={"help": "Commit, branch or tag of the model."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the model repository's own code."})

    head_options: dict[str, Any] = field(default_factory=dict, init=False)  # the fields of MoSConfig that were given

    def __post_init__(self) -> None:
        if (self.model is None) == (self.from_scratch is None):
            raise ValueError("expected --model or --from-scratch, one of the two, given " + given(self, "model"))
        if self.from_scratch is not None and self.tokenizer is None:
            raise ValueError("--tokenizer: expected a path or Hub id with --from-scratch, given none")

    @property
    def source(self) -> str:
        """The path or id to load: of the model, or of the config."""
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
    dataset_name: str | None = field(default=None, metadata={"help": "Hub id, or a folder that load_dataset reads."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    validation_share: float = field(
        default=0.05,
        metadata={
            "help": "Without a validation set: the share of the training set, at its end, to validate on, in [0, 1)."
        },
    )
    block_size: int | None = field(
        default=None,
        metadata={"help": f"Tokens in a block. Default: the model's positions, at most {LONGEST_DEFAULT_BLOCK}."},
    )
    preprocessing_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the dataset during training. Needs --max-steps. Splits no validation set off."},
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
            if not Path(file).is_file():
                raise ValueError(f"{option}: expected a file, given {file!r}, which is none")
            if Path(file).suffix not in FILE_READERS:
                raise ValueError(f"{option}: expected one of {', '.join(FILE_READERS)}, given {file!r}")
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"--validation-share: expected a number in [0, 1), given {self.validation_share}")
        if self.streaming and self.preprocessing_workers is not None:
            raise ValueError("--preprocessing-workers: expected none with --streaming, which tokenizes in the loader")
        if self.block_size is not None and self.block_size < 2:
            raise ValueError(f"--block-size: expected at least 2 tokens, given {self.block_size}")

    @property
    def name(self) -> str:
        return self.dataset_name or Path(str(self.train_file)).name


def given(options: Any, name: str) -> str:
    return "both" if getattr(options, name) is not None else "neither"


class CardTrainer(Trainer):
    """A Trainer that writes and pushes the model card of a mixture."""

    dataset_name: str
    base_model: str | None = None  # a Hub id

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, MoSForCausalLM):
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            card = model_card(
                model,
                model_id=self.hub_model_id or str(self.args.output_dir),
                eval_results=self.eval_results(),
                command=own_command(),
                machine=f"{self.args.world_size} x {describe_machine(self.args.device)}",
                base_model=self.base_model,
            )
            card.save(Path(str(self.args.output_dir), CARD_FILE))

    def eval_results(self) -> list[EvalResult]:
        losses = [entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry]
        if not losses:
            return []
        return [
            EvalResult(
                task_type="text-generation",
                dataset_type=self.dataset_name,
                dataset_name=self.dataset_name,
                dataset_split="validation",
                metric_type="perplexity",
                metric_name="perplexity per token",
                metric_value=round(math.exp(losses[-1]), 3),
            )
        ]


Options = tuple[ModelOptions, DataOptions, TrainingArguments]


def parse_options(arguments: list[str] | None = None, prog: str | None = None) -> Options:
    """Parses a command line; `None`: that of this process."""
    description, _, examples = (__doc__ or "").partition("\n\n")
    parser = HfArgumentParser(
        [ModelOptions, DataOptions, TrainingArguments],  # type: ignore[list-item]
        prog=prog,
        description=description,
        epilog=examples,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add_head_options(parser)
    # TrainingArguments would train into ./trainer_output.
    next(action for action in parser._actions if action.dest == "output_dir").required = True
    model, data, training, *given = parser.parse_args_into_dataclasses(arguments)
    model.head_options = {name: value for namespace in given for name, value in vars(namespace).items()}
    if model.head == "softmax" and model.head_options:
        raise ValueError(f"--head softmax: expected no options of a mixture, given {model.head_options}")
    check_head_options(model.head_options)
    return model, data, training


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the examples."""


def main() -> None:
    train(*parse_options())


def train(model_options: ModelOptions, data_options: DataOptions, training_arguments: TrainingArguments) -> None:
    """Trains and evaluates the model, saves it with its card, and pushes it if asked."""
    if data_options.streaming and training_arguments.max_steps <= 0:
        raise ValueError(
            "--max-steps: expected a number of steps with --streaming, whose length is unknown, given none"
        )
    resume_from = checkpoint_to_resume(training_arguments)
    set_seed(training_arguments.seed)

    tokenizer = load_tokenizer(
        model_options.tokenizer or model_options.source,
        revision=model_options.revision if model_options.tokenizer is None else None,
        trust_remote_code=model_options.trust_remote_code,
    )
    config = load_config(model_options)
    block_size = choose_block_size(data_options.block_size, config)
    with training_arguments.main_process_first(desc="reading the text"):
        text = load_text(data_options)
        blocks = pack(text, tokenizer, block_size, data_options)
    model = model_to_train(model_options, config, tokenizer)

    trainer = CardTrainer(
        model=model,
        args=training_arguments,
        train_dataset=blocks["train"],
        eval_dataset=blocks.get("validation"),
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[StopOnNonFiniteLoss()],
    )
    if isinstance(model, MoSForCausalLM):
        MixtureUsage().add_to(trainer)
    trainer.dataset_name = data_options.name
    if model_options.model is not None and not Path(model_options.model).exists():
        trainer.base_model = model_options.model
    metrics = trainer.train(resume_from_checkpoint=resume_from).metrics
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    if "validation" in blocks:
        metrics = trainer.evaluate()
        metrics["perplexity"] = math.exp(metrics["eval_loss"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.save_model()
    trainer.save_state()
    if training_arguments.push_to_hub:
        pin(trainer, trainer.push_to_hub())
    else:
        trainer.create_model_card()


def checkpoint_to_resume(training_arguments: TrainingArguments) -> str | None:
    """The folder of the checkpoint; `last` (or `true`) names the last complete one in the output folder."""
    asked = training_arguments.resume_from_checkpoint
    if asked is None:
        return None
    folder = Path(str(training_arguments.output_dir))
    checkpoint = last_whole_checkpoint(folder) if asked.lower() in ("last", "true") else asked
    if checkpoint is None:
        raise ValueError(f"--resume-from-checkpoint {asked}: expected a whole checkpoint in {folder}, found none")
    if not Path(checkpoint).is_dir():
        raise ValueError(f"--resume-from-checkpoint: expected a folder, given {checkpoint!r}")
    training_arguments.resume_from_checkpoint = checkpoint
    return checkpoint


def pin(trainer: CardTrainer, commit: CommitInfo | None) -> None:
    """Writes the pushed commit, which only the main process knows, into the card on the Hub."""
    if commit is None or not isinstance(trainer.accelerator.unwrap_model(trainer.model), MoSForCausalLM):
        return
    card = Path(str(trainer.args.output_dir), CARD_FILE).read_text(encoding="utf-8")
    pin_card(
        HfApi(token=trainer.args.hub_token), str(trainer.hub_model_id), card, commit.oid, trainer.args.hub_revision
    )


# -------------------------------------------------------------------------------------------------------------- model


def load_config(options: ModelOptions) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(options.source, **hub_options(options.revision, options.trust_remote_code))
    if config.model_type == MoSConfig.model_type:
        if options.head == "softmax":
            raise ValueError(f"--head softmax: expected a model without a mixture, given {options.model!r}")
        for name, value in options.head_options.items():
            if getattr(config, name) != value:
                raise ValueError(
                    f"--{name.replace('_', '-')}: the model has {getattr(config, name)!r}, given {value!r}"
                )
    return config


def model_to_train(
    options: ModelOptions, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Loads or makes the causal LM, with a mixture in place of its head unless its own head is asked for."""
    loading: dict[str, Any] = {"dtype": options.dtype, **hub_options(options.revision, options.trust_remote_code)}
    if options.attn_implementation is not None:
        loading["attn_implementation"] = options.attn_implementation
    converts = options.head == "mixture" and config.model_type != MoSConfig.model_type
    if max(options.tp_size, options.fsdp_size) > 1:
        if converts or options.from_scratch is not None:
            raise ValueError(
                "--tp-size, --fsdp-size: expected a --model that has a mixture already (see hf-mos convert), "
                f"given {options.source!r}"
            )
        loading["distributed_config"] = DistributedConfig(tp_size=options.tp_size, fsdp_size=options.fsdp_size)
    if options.from_scratch is not None:
        config.vocab_size = len(tokenizer)
        dtype = torch.float32 if options.dtype == "auto" else getattr(torch, options.dtype)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model = MoSForCausalLM.from_causal_lm(model, **options.head_options) if converts else model
    elif converts:
        model = MoSForCausalLM.from_causal_lm(options.source, **options.head_options, **loading)
    else:
        model = AutoModelForCausalLM.from_pretrained(options.source, **loading)
    rows = model.get_input_embeddings().num_embeddings  # the weight may be sharded
    if len(tokenizer) > rows:
        raise ValueError(f"--tokenizer: expected at most the model's {rows} tokens, given {len(tokenizer)}")
    return model


# --------------------------------------------------------------------------------------------------------------- text


def load_text(options: DataOptions) -> DatasetDict | IterableDatasetDict:
    """The training set, and the validation set: given, or split off where the text is not a stream."""
    kind = IterableDatasetDict if options.streaming else DatasetDict
    if options.dataset_name is not None:
        text = load_dataset(options.dataset_name, options.dataset_config_name, streaming=options.streaming)
        if "train" not in text:
            raise ValueError(f"--dataset-name: expected a split named 'train', given {sorted(text)}")
    else:
        files = {"train": options.train_file, "validation": options.validation_file}
        read = {split: read_file(file, options.streaming) for split, file in files.items() if file is not None}
        text = kind(read)
    for split in set(text) & {"train", "validation"}:
        columns = columns_of(text[split])
        if options.text_column not in columns:
            raise ValueError(
                f"--text-column: expected one of {columns} of the {split} set, given {options.text_column!r}"
            )
    if "validation" not in text and options.validation_share > 0 and not options.streaming:
        parts = text["train"].train_test_split(test_size=options.validation_share, shuffle=False)
        text["train"], text["validation"] = parts["train"], parts["test"]
    return kind({split: text[split] for split in ("train", "validation") if split in text})


def columns_of(rows: Dataset | IterableDataset) -> list[str]:
    """The names of the columns; a stream may know them only from its first row."""
    return rows.column_names or list(next(iter(rows), {}))


def read_file(file: str, streaming: bool) -> Dataset | IterableDataset:
    reader = FILE_READERS[Path(file).suffix]
    options = {"keep_linebreaks": True} if reader == "text" else {}
    return load_dataset(reader, data_files=file, split="train", streaming=streaming, **options)


def pack(
    text: DatasetDict | IterableDatasetDict, tokenizer: PreTrainedTokenizerBase, block_size: int, options: DataOptions
) -> dict[str, Dataset | IterableDataset]:
    """Packs the texts into blocks of tokens, one after the other; drops an incomplete block at the end of a set.

    The rows of a dataset are texts of their own and each ends with the tokenizer's end-of-sequence token; the lines of
    a text file are one text.
    """
    is_lines = options.train_file is not None and FILE_READERS[Path(options.train_file).suffix] == "text"
    end = [] if is_lines or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def tokenize(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = tokenizer(rows[options.text_column], add_special_tokens=False, verbose=False).input_ids
        return {"input_ids": [row + end for row in ids]}

    def cut(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        tokens = [token for row in rows["input_ids"] for token in row]
        whole = len(tokens) // block_size * block_size
        blocks = [tokens[start : start + block_size] for start in range(0, whole, block_size)]
        return {"input_ids": blocks, "labels": blocks}

    if options.streaming:
        return {
            split: rows.map(tokenize, batched=True, remove_columns=columns_of(rows)).map(
                cut, batched=True, batch_size=STREAMED_ROWS
            )
            for split, rows in text.items()
        }
    result = {}
    for split, rows in text.items():
        tokens = rows.map(
            tokenize,
            batched=True,
            remove_columns=rows.column_names,
            num_proc=options.preprocessing_workers,
            desc=f"tokenizing the {split} set",
        )
        # One batch drops tokens only at its end; a large set is cut in several batches.
        size = min(max(len(tokens), 1), 100_000)
        blocks = tokens.map(cut, batched=True, batch_size=size, desc=f"packing the {split} set")
        if len(blocks) == 0:
            raise ValueError(f"expected at least {block_size} tokens (--block-size) in the {split} set, given fewer")
        result[split] = blocks
    return result


def choose_block_size(asked: int | None, config: PreTrainedConfig) -> int:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if asked is None:
        return min(positions or LONGEST_DEFAULT_BLOCK, LONGEST_DEFAULT_BLOCK)
    if positions is not None and asked > positions:
        raise ValueError(f"--block-size: expected at most the model's {positions} positions, given {asked}")
    return asked


if __name__ == "__main__":
    main()
