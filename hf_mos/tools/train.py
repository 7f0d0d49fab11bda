"""Fine-tunes a causal language model with a mixture of softmaxes for its head, with the Trainer.

    hf-mos train --model gpt2 --train-file book.txt --output-dir out
    accelerate launch -m hf_mos.tools.train --model Qwen/Qwen3-0.6B-Base \\
        --dataset-name Salesforce/wikitext --dataset-config-name wikitext-103-raw-v1 \\
        --bf16 --learning-rate 1e-4 --per-device-train-batch-size 4 --output-dir out

`train_options.py` has the options, `blocks.py` the text. The output folder holds the model with its tokenizer, its
card and its metrics.
"""

import contextlib
import functools
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import CommitInfo, EvalResult, HfApi
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.distributed import DistributedConfig
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from ..conversion import output_projection, refuse_remote_code
from ..remote_code.configuration_mos import MODEL_TYPE, default_scale, option_defaults
from ..remote_code.modeling_mos import MoSForCausalLM
from ..remote_code.mos_checkpoint import CONFIG_FILE
from ..training.callbacks import MixtureUsage, StopOnNonFiniteLoss, last_whole_checkpoint
from ..training.hidden_states import HiddenStateRows, bytes_of, freeze_backbone, keep_hidden_states
from .blocks import ValidationSet, ValidationText, cut_windows, load_text, pack
from .card import CARD_FILE, eval_results, model_card
from .evaluate import (
    IGNORED,
    Window,
    check_tokens,
    choose_window,
    collate,
    json_values,
    perplexity_of,
    positions_of,
    target_nll,
)
from .exit_codes import REFUSED, OptionError, before_work
from .head_options import ALL, TIE, check_head_options, describe_head
from .loading import hub_options, is_mixture, load_config, load_tokenizer
from .places import check_is_folder, check_is_no_folder, delete_unchanged, leftovers, write_whole
from .provenance import describe_machine, own_command
from .push import pin_card
from .train_options import LONGEST_DEFAULT_BLOCK, DataOptions, ModelOptions, parse_options

# What a folder of a run holds; other files in the output folder stay.
RUN_FILES = (CONFIG_FILE, CARD_FILE, "*.safetensors", f"{PREFIX_CHECKPOINT_DIR}-*")
AS_RESUMED = "as in the checkpoint to resume from"


class CardTrainer(Trainer):
    """A Trainer that measures the loss as `evaluate` does, and writes and pushes the model card of a mixture.

    Args:
        validation: the windows to evaluate on, and `validation_text` their text; `None`: no evaluation.
        assistant_only: the windows count the assistant's turns alone.
        base_model: the Hub id of the model that was converted.
    """

    def __init__(
        self,
        *,
        validation: ValidationSet | None,
        validation_text: ValidationText | None,
        assistant_only: bool,
        base_model: str | None,
        **kwargs: Any,
    ) -> None:
        self.validation, self.validation_text = validation, validation_text
        self.assistant_only, self.base_model = assistant_only, base_model
        self.is_saved = False  # the trained model, which an evaluation may then round
        super().__init__(
            eval_dataset=None if validation is None else validation.windows,
            data_collator=collate_either,
            compute_metrics=mean_nats,
            **kwargs,
        )

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Returns no loss, and the nats and the number of targets of each window."""
        inputs = self._prepare_inputs(inputs)
        nats = target_nll(model, **inputs).sum(-1)
        return None, nats, (inputs["targets"] != IGNORED).sum(-1).to(nats.device)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Like the Trainer's, but with every window: `dataloader_drop_last` is for batches to train on."""
        with self.argument("dataloader_drop_last", False):
            return super().get_eval_dataloader(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Like the Trainer's, but not again in `push_to_hub`: `--bf16-full-eval` has rounded the weights by then."""
        if not self.is_saved:
            super().save_model(*args, **kwargs)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        """Like the Trainer's, but the file of the arguments, which is pushed too, has no token."""
        with self.argument("hub_token", None):
            super()._save(*args, **kwargs)

    def save_metrics(self, split: str, metrics: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Like the Trainer's, but null for the perplexity of a model that diverged: JSON has no number for it."""
        super().save_metrics(split, json_values(metrics), *args, **kwargs)

    @contextlib.contextmanager
    def argument(self, name: str, value: Any) -> Iterator[None]:
        """Gives an argument of the training another value for a while."""
        before = getattr(self.args, name)
        setattr(self.args, name, value)
        try:
            yield
        finally:
            setattr(self.args, name, before)

    def has_ended(self, checkpoint: str) -> bool:
        """Whether the run of a checkpoint has made all its steps; the Trainer would make one more."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # these load weights when they train
            return False
        *_, max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME))).global_step >= max_steps

    def load_end(self, checkpoint: str) -> None:
        """Loads the state and the weights of a run that has ended, in place of `train`."""
        self.state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
        self._load_from_checkpoint(checkpoint)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Equivalent to: the Trainer's, or 0 where hidden states are in the tokens' place."""
        return 0 if "hidden_states" in inputs else super().floating_point_ops(inputs)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Like the Trainer's, but not of tied weights, which a checkpoint holds under one of their names."""
        tied = self.accelerator.unwrap_model(self.model).all_tied_weights_keys
        missing = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(type(load_result)(missing, load_result.unexpected_keys))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, MoSForCausalLM):
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            card = model_card(
                model,
                model_id=self.hub_model_id or Path(str(self.args.output_dir)).resolve().name,
                eval_results=self.eval_results(),
                command=own_command(),
                machine=f"{self.args.world_size} x {describe_machine(self.args.device)}",
                base_model=self.base_model,
            )
            write_whole(Path(str(self.args.output_dir), CARD_FILE), card.save)

    def eval_results(self) -> list[EvalResult]:
        losses = [entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry]
        if not losses:
            return []
        assert self.validation is not None
        assert self.validation_text is not None
        nats = losses[-1] * self.validation.num_tokens
        return eval_results(
            {
                "data": self.validation_text.data,
                "split": self.validation_text.split,
                "assistant_only": self.assistant_only,
                "window": self.validation.window,
                "stride": self.validation.stride,
                "perplexity": perplexity_of(losses[-1]),
                "bits_per_byte": nats / (math.log(2) * self.validation.num_bytes),
            }
        )


def collate_either(rows: Sequence[Any]) -> dict[str, Tensor]:
    """The batch of blocks to train on, or of windows to evaluate on."""
    return collate(rows) if isinstance(rows[0], Window) else default_data_collator(list(rows))


def mean_nats(prediction: EvalPrediction) -> dict[str, float]:
    """The nats per token and the perplexity, of the nats and the number of targets of each window."""
    nats, counts = (
        np.asarray(part, dtype=np.float64).sum() for part in (prediction.predictions, prediction.label_ids)
    )
    loss = float(nats / counts)
    return {"loss": loss, "perplexity": perplexity_of(loss)}


def main() -> None:
    try:
        train(*parse_options())
    except OptionError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(REFUSED)


def train(model_options: ModelOptions, data_options: DataOptions, training_arguments: TrainingArguments) -> None:
    """Trains and evaluates the model, saves it with its card, and pushes it if asked.

    Raises:
        OptionError: an option is refused, before any text is read.
        ValueError: the text has no such column or is too short, or the model and the tokenizer do not fit together.
    """
    with before_work():
        resume_from = checkpoint_to_resume(training_arguments)
        output = Path(str(training_arguments.output_dir))
        check_is_no_folder(output / CARD_FILE)
        goes_on = resume_from is not None and Path(resume_from).resolve().parent == output.resolve()
        if not goes_on:
            check_output(output, model_options)
        config = read_config(model_options)
        block_size = choose_block_size(data_options.block_size, config)
        window, stride = choose_window(config, block_size, None)
    set_seed(training_arguments.seed)

    tokenizer = load_tokenizer(
        model_options.source,
        model_options.tokenizer,
        revision=model_options.revision,
        trust_remote_code=model_options.trust_remote_code,
    )
    with training_arguments.main_process_first(desc="reading the text"):
        rows, validation_text = load_text(data_options)
        blocks = pack(rows, tokenizer, block_size, data_options)
    validation = None
    if validation_text is not None:
        validation = cut_windows(validation_text, tokenizer, data_options.assistant_only, window, stride)
    model = model_to_train(model_options, config, tokenizer)
    if resume_from is not None:
        check_resumed(Path(resume_from), model)
    if validation is not None:
        check_tokens(model, validation.windows)
    batch_size = training_arguments.train_batch_size * training_arguments.world_size
    if training_arguments.dataloader_drop_last and has_length(blocks) and len(blocks) < batch_size:
        raise ValueError(
            f"--dataloader-drop-last: expected at least a batch, {batch_size} blocks, given {len(blocks)}"
        )

    if model_options.freeze_backbone:
        assert isinstance(model, MoSForCausalLM)
        freeze_backbone(model, False if model_options.freeze_decoder else None)
        blocks = hidden_state_rows(model, blocks, output / "_hidden_states", training_arguments)

    is_hub_id = model_options.model is not None and not Path(model_options.model).exists()
    trainer = CardTrainer(
        model=model,
        args=training_arguments,
        train_dataset=blocks,
        validation=validation,
        validation_text=validation_text,
        assistant_only=data_options.assistant_only,
        base_model=model_options.model if is_hub_id else None,
        processing_class=tokenizer,
        callbacks=[StopOnNonFiniteLoss()],
    )
    if isinstance(model, MoSForCausalLM):
        MixtureUsage(model_options.log_components).add_to(trainer)
        if trainer.is_world_process_zero():
            num_tokens = training_arguments.per_device_train_batch_size * block_size
            print(describe_head(model, num_tokens), file=sys.stderr)
    if resume_from is not None and trainer.is_world_process_zero():
        print(f"resuming from {resume_from}", file=sys.stderr)
    if model_options.force and not goes_on:
        with training_arguments.main_process_first(local=False, desc="deleting the checkpoints of another run"):
            delete_checkpoints(output, kept=resume_from)
    with saying_how_to_resume(trainer):
        metrics = train_or_load(trainer, resume_from)
        former = leftovers(output, before=resume_from if goes_on else None) if model_options.force or goes_on else {}
        save_and_evaluate(trainer, metrics, former)
        if training_arguments.push_to_hub:
            pin(trainer, trainer.push_to_hub())
        else:
            trainer.create_model_card()


def train_or_load(trainer: CardTrainer, resume_from: str | None) -> dict[str, float] | None:
    """Trains, and returns the metrics; `None` where the run to resume had made all its steps, which is loaded."""
    if resume_from is not None and trainer.has_ended(resume_from):
        trainer.load_end(resume_from)
        return None
    return trainer.train(resume_from_checkpoint=resume_from).metrics


def save_and_evaluate(
    trainer: CardTrainer, metrics: dict[str, float] | None, former: dict[Path, os.stat_result]
) -> None:
    """Saves the trained model, deletes what a former one left, evaluates, and writes the metrics of both."""
    trainer.save_model(_internal_call=True)  # else it would be pushed here, without the card
    trainer.is_saved = True
    if trainer.is_world_process_zero():
        delete_unchanged(former)
    if metrics is not None:
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
    if (validation := trainer.validation) is not None:
        metrics = trainer.evaluate()
        metrics["perplexity"] = metrics.pop("eval_perplexity")
        metrics |= {"eval_window": validation.window, "eval_stride": validation.stride}
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.save_state()


def check_output(folder: Path, options: ModelOptions) -> None:
    """Raises a ValueError where the run would overwrite another run, or with --force the model that it starts from."""
    check_is_folder(folder, "--output-dir")
    if options.force:
        source = Path(options.source).resolve()
        is_checkpoint = source.name.startswith(PREFIX_CHECKPOINT_DIR) and source.parent == folder.resolve()
        if source == folder.resolve() or is_checkpoint:
            raise ValueError(f"--output-dir: expected another folder than that of --model, given {str(folder)!r}")
        return
    held = sorted(path.name for pattern in RUN_FILES for path in folder.glob(pattern))
    if held:
        has_checkpoints = any(name.startswith(PREFIX_CHECKPOINT_DIR) for name in held)
        resume = ", --resume-from-checkpoint last" if has_checkpoints else ""
        raise ValueError(
            f"--output-dir: expected a folder without a run{resume} or --force, given {str(folder)!r}, "
            f"which holds {', '.join(held)}"
        )


def check_resumed(checkpoint: Path, model: PreTrainedModel) -> None:
    """Raises an OptionError where the head is not that of the checkpoint, whose weights fit other options too."""
    saved, _ = PreTrainedConfig.get_config_dict(checkpoint)
    is_saved, is_made = saved.get("model_type") == MODEL_TYPE, isinstance(model, MoSForCausalLM)
    if is_saved != is_made:
        kinds = {True: "mixture", False: "softmax"}
        raise OptionError(f"--head: expected {kinds[is_saved]}, {AS_RESUMED}, given {kinds[is_made]}")
    if is_made:
        made = {name: getattr(model.config, name) for name in option_defaults() if name != "init_seed"}
        with before_work():
            refuse_other_options(made, saved, AS_RESUMED)


def refuse_other_options(given: dict[str, Any], found: dict[str, Any], where: str) -> None:
    """Raises a ValueError for an option of the head whose value is not the one `found` there."""
    for name, value in given.items():
        if found[name] != value:
            shown = [ALL if size is None else repr(size) for size in (found[name], value)]
            raise ValueError(f"--{name.replace('_', '-')}: expected {shown[0]}, {where}, given {shown[1]}")


def delete_checkpoints(folder: Path, kept: str | None) -> None:
    """Deletes the checkpoints of another run, which would be taken for those of the new one."""
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if path.is_dir() and (kept is None or path.resolve() != Path(kept).resolve()):
            shutil.rmtree(path)


@contextlib.contextmanager
def saying_how_to_resume(trainer: CardTrainer) -> Iterator[None]:
    """Prints the sentence of [`how_to_resume`] where the run is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        if trainer.is_world_process_zero():
            print(how_to_resume(trainer), file=sys.stderr)
        raise


def how_to_resume(trainer: CardTrainer) -> str:
    """The sentence for a run that was interrupted."""
    at = f"interrupted at step {trainer.state.global_step}"
    checkpoint = last_whole_checkpoint(str(trainer.args.output_dir))
    if checkpoint is not None and not has_optimizer(checkpoint):
        return (
            f"{at}. {checkpoint} has no optimizer to go on with (--save-only-model); --model {checkpoint} starts anew"
        )
    if checkpoint is None and trainer.is_saved:
        return f"{at}, after the trained model was saved in {trainer.args.output_dir}"
    if checkpoint is None:
        return f"{at}, before a checkpoint was saved; --save-steps {trainer.args.save_steps} saves one that often"
    words = own_command(("--resume-from-checkpoint", "--resume_from_checkpoint", "--force"), keep_folders=True)
    return f"{at}. To go on from {checkpoint}:\n{words} --resume-from-checkpoint last"


def checkpoint_to_resume(training_arguments: TrainingArguments) -> str | None:
    """The folder of the checkpoint; `last` (or `true`) names the last complete one in the output folder."""
    asked = training_arguments.resume_from_checkpoint
    if asked is None:
        return None
    folder = Path(str(training_arguments.output_dir))
    checkpoint = last_whole_checkpoint(folder) if asked.lower() in ("last", "true") else asked
    if checkpoint is None:
        raise ValueError(f"--resume-from-checkpoint: expected a whole checkpoint in {folder}, given none")
    if not Path(checkpoint).is_dir():
        raise ValueError(f"--resume-from-checkpoint: expected a folder, given {checkpoint!r}")
    if not has_optimizer(checkpoint):  # the Trainer would begin with a new one, and the first learning rate
        raise ValueError(
            f"--resume-from-checkpoint: expected a checkpoint with its optimizer, given {checkpoint!r}, which was "
            f"saved by --save-only-model; --model {checkpoint} starts a new run from it"
        )
    training_arguments.resume_from_checkpoint = checkpoint
    return checkpoint


def has_optimizer(checkpoint: str) -> bool:
    """Whether a checkpoint has the state of its optimizer: the Trainer's, FSDP's or DeepSpeed's."""
    return any(next(Path(checkpoint).glob(pattern), None) for pattern in ("optimizer*", "global_step*"))


def pin(trainer: CardTrainer, commit: CommitInfo | None) -> None:
    """Writes the pushed commit, which only the main process knows, into the card on the Hub."""
    if commit is None or not isinstance(trainer.accelerator.unwrap_model(trainer.model), MoSForCausalLM):
        return
    card = Path(str(trainer.args.output_dir), CARD_FILE).read_text(encoding="utf-8")
    pin_card(
        HfApi(token=trainer.args.hub_token), str(trainer.hub_model_id), card, commit.oid, trainer.args.hub_revision
    )


# -------------------------------------------------------------------------------------------------------------- model


def read_config(options: ModelOptions) -> PreTrainedConfig:
    """Loads the config of the model, and checks the options against it."""
    config = load_config(options.source, **hub_options(options.revision, options.trust_remote_code))
    check_head_options(options.head_options, config)
    converts = options.head == "mixture" and not is_mixture(config)
    if converts:
        refuse_remote_code(type(config), repr(options.source))
    if max(options.tp_size, options.fsdp_size) > 1 and (converts or options.from_scratch is not None):
        raise ValueError(
            "--tp-size, --fsdp-size: expected a --model that has a mixture already (see hf-mos convert), "
            f"given {options.source!r}"
        )
    if not is_mixture(config):
        return config
    if options.head == "softmax":
        raise ValueError(f"--head softmax: expected a model without a mixture, given {options.model!r}")
    if options.from_scratch is not None:  # the scale of a trained model does not suit a new one
        for name, value in ({"latent_scale": None} | options.head_options).items():
            setattr(config, name, value)
        return config
    found = {name: getattr(config, name) for name in (*option_defaults(), TIE)}
    refuse_other_options(options.head_options, found, "as in the model")
    return config


def model_to_train(
    options: ModelOptions, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Loads or makes the causal LM, with a mixture in place of its head unless its own head is asked for."""
    loading: dict[str, Any] = {"dtype": options.dtype, **hub_options(options.revision, options.trust_remote_code)}
    if options.attn_implementation is not None:
        loading["attn_implementation"] = options.attn_implementation
    converts = options.head == "mixture" and not is_mixture(config)
    if max(options.tp_size, options.fsdp_size) > 1:
        loading["distributed_config"] = DistributedConfig(tp_size=options.tp_size, fsdp_size=options.fsdp_size)
    if options.from_scratch is not None:
        for each in (config, config.get_text_config()):
            if hasattr(each, "vocab_size"):
                each.vocab_size = len(tokenizer)
            for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
                setattr(each, token, getattr(tokenizer, token))
        dtype = torch.float32 if options.dtype == "auto" else getattr(torch, options.dtype)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if converts:
            scale = default_scale(output_projection(model).in_features, from_scratch=True)
            model = MoSForCausalLM.from_causal_lm(model, **{"latent_scale": scale} | options.head_options)
    elif converts:
        model = MoSForCausalLM.from_causal_lm(options.source, **options.head_options, **loading)
    else:
        model = AutoModelForCausalLM.from_pretrained(options.source, **loading)
    # Else transformers divides the summed loss of some architectures (GPT-2, BERT) by all labels, and so the loss and
    # the gradients of a softmax by more than those of the mixture.
    model.loss_type = "ForCausalLM"
    rows = model.get_input_embeddings().num_embeddings  # the weight may be sharded
    if len(tokenizer) > rows:
        raise ValueError(f"--tokenizer: expected at most the model's {rows} tokens, given {len(tokenizer)}")
    return model


def hidden_state_rows(
    model: MoSForCausalLM, blocks: Any, folder: Path, training_arguments: TrainingArguments
) -> HiddenStateRows:
    """Runs the backbone once over the blocks, in the training's precision; the main process does the work."""
    device = training_arguments.device
    nn.Module.to(model, device)
    dtype = torch.bfloat16 if training_arguments.bf16 else torch.float16
    mixed = torch.autocast(device.type, dtype, enabled=training_arguments.bf16 or training_arguments.fp16)
    with training_arguments.main_process_first(desc="running the backbone"), mixed:
        print(f"the hidden states of the text: {bytes_of(model, blocks):,} bytes in {folder}", file=sys.stderr)
        bar = functools.partial(tqdm, desc="running the backbone", disable=training_arguments.disable_tqdm)
        batch_size = training_arguments.per_device_train_batch_size
        return keep_hidden_states(model, blocks, folder, batch_size=batch_size, track=bar)


def choose_block_size(asked: int | None, config: PreTrainedConfig) -> int:
    positions = positions_of(config)
    if asked is None:
        return min(positions or LONGEST_DEFAULT_BLOCK, LONGEST_DEFAULT_BLOCK)
    if positions is not None and asked > positions:
        raise ValueError(f"--block-size: expected at most the model's {positions} positions, given {asked}")
    return asked


if __name__ == "__main__":
    main()
