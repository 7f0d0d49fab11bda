"""Callbacks for the Trainer: stop a run with a non-finite loss, and log how the mixture is used.

```python
trainer = Trainer(model, arguments, callbacks=[StopOnNonFiniteLoss()], ...)
MixtureUsage().add_to(trainer)
trainer.train(resume_from_checkpoint=last_whole_checkpoint(arguments.output_dir))
```
"""

import json
import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..remote_code.configuration_mos import option_defaults
from ..remote_code.modeling_mos import shift
from ..remote_code.mos_checkpoint import STAGING_PREFIX, check_files, read_header
from ..remote_code.mos_head import MoSLMHead, is_own
from .adapters import NOTICEABLE
from .mixture_statistics import MixtureStatistics, StatisticsSum, predict_in_chunks

logger = logging.get_logger(__name__)

# One in so many tokens of a batch is looked at. On a shortlist a log makes one product as wide as V where the loss
# makes three; on all classes it also compares the components on V. So a log takes 1.4 % of a step for K = 16 on 64,
# 1.2 % for K = 4 on all classes, 1.9 % for K = 16 on all (512 tokens, D = 576, V = 49152, 2 layers).
SAMPLED_ON_SHORTLIST, SAMPLED_ON_ALL, ENOUGH_TOKENS = 32, 64, 128


# ------------------------------------------------------------------------------------------------------------ the loss


class StopOnNonFiniteLoss(TrainerCallback):
    """Ends a run whose loss is NaN or infinite, before that step changes a weight.

    The Trainer by itself logs such a loss as the average of those before it and goes on. A loss that the model returns
    is looked at before each step of the optimizer, on all processes together; one that is computed outside of the
    model when it is logged. DeepSpeed steps within the backward pass, and has taken that step when the run ends.

    Raises:
        FloatingPointError: from `trainer.train()`; it names the step and the last whole checkpoint.
    """

    def __init__(self) -> None:
        self.is_bad: Tensor | None = None
        self.hook: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        args.logging_nan_inf_filter = False  # so that a log shows the loss itself
        self.is_bad = None
        forget_hooks(model, StopOnNonFiniteLoss)
        self.hook = model.register_forward_hook(self.look)

    def look(self, model: nn.Module, inputs: Any, outputs: Any) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else None
        if model.training and isinstance(loss, Tensor):
            is_bad = ~loss.detach().isfinite().all()
            self.is_bad = is_bad if self.is_bad is None else self.is_bad | is_bad

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.is_bad is None:
            return
        is_bad, self.is_bad = self.is_bad.int(), None
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(is_bad, torch.distributed.ReduceOp.MAX)
        if is_bad:
            self.stop(args, f"the loss of step {state.global_step + 1} is not finite; the weights are those before it")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if not math.isfinite(logs.get("loss", 0.0)):
            self.stop(args, f"the loss that was logged at step {state.global_step} is {logs['loss']}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.hook.remove()

    def stop(self, args: TrainingArguments, fault: str) -> None:
        self.hook.remove()
        last = last_whole_checkpoint(args.output_dir) if args.output_dir else None
        raise FloatingPointError(f"{fault}. Last whole checkpoint: {last}")


def forget_hooks(module: nn.Module, kind: type) -> None:
    """Removes the hooks that callbacks of this kind left when a training was interrupted."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), kind)]:
            del hooks[key]


# --------------------------------------------------------------------------------------------------------- the mixture


class MixtureUsage(TrainerCallback):
    """Logs the use of the mixture beside the loss, and warns where a component starves or none differs from another.

    The logs are three numbers, on a sample of the last batch before the log, of all processes together:

    - `mixture_entropy`: of the mixture weights, the mean over tokens; at most log K nats, 0 for one softmax a token;
    - `smallest_mixture_weight`: the mean weight of the component that is used least; at most 1 / K;
    - `mixture_divergence`: Jensen-Shannon, the mean over pairs of components; 0 while they are equal, at most log 2.

    Args:
        components: log `responsibility_0` ..., the share of the targets that each component accounts for, and
            `divergence_0_1` ..., the divergence of each two, too.
        max_tokens: how many tokens are looked at, a sample of the batch. `None`: one in 32, on all classes one in 64,
            at most 128, so that a log takes less than 2 % of a step. The warning looks at the mean of the last 128.
        starved_below: the mean weight under which a component starves, as a share of 1 / K.
        starved_for: warn where a component has starved, or all have been equal, at each log of so many steps, and at
            three logs at least.

    Raises:
        ValueError: on training, the model has no mixture.
    """

    def __init__(
        self,
        components: bool = False,
        max_tokens: int | None = None,
        starved_below: float = 0.1,
        starved_for: int = 50,
    ) -> None:
        for name, number in (("max_tokens", max_tokens), ("starved_for", starved_for)):
            if number is not None and number < 1:
                raise ValueError(f"{name}: expected at least 1, given {number!r}")
        if not 0 <= starved_below <= 1:
            raise ValueError(f"starved_below: expected a number in [0, 1], given {starved_below!r}")
        self.components, self.max_tokens = components, max_tokens
        self.starved_below, self.starved_for = starved_below, starved_for
        self.head: Any = None
        self.targets: Tensor | None = None  # of the batch, -100 where ignored
        self.sample: tuple[Tensor, Tensor] | None = None
        self.mean_weights: Tensor | None = None  # over the last `ENOUGH_TOKENS`, for the warning
        # The steps of the logs, without a gap, at which a component has starved, and at which no shift has moved.
        self.starved: dict[int, list[int]] = {}
        self.still: list[int] = []

    def add_to(self, trainer: Trainer) -> None:
        """Inserts this callback before the tracker callbacks, so that they report its numbers."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.head = getattr(model, "mos_head", None)
        if self.head is None:
            raise ValueError(f"model: expected a mixture of softmaxes, given {type(model).__name__}")
        self.starved, self.still, self.mean_weights = {}, [], None
        warn_of_small_steps(self.head, kwargs.get("optimizer"))
        self.decoder = model.get_output_embeddings()  # the head, or what is around it
        # Under prompt tuning the model inside gets the labels that belong to its tokens.
        called = model.get_base_model() if hasattr(model, "get_base_model") else model
        for module in (called, self.head.prior):
            forget_hooks(module, MixtureUsage)
        # The head itself has no hook, for which the model would compute the loss from logits.
        self.hooks = [
            called.register_forward_pre_hook(self.note_targets, with_kwargs=True),
            self.head.prior.register_forward_pre_hook(self.keep),
        ]

    def note_targets(self, model: nn.Module, inputs: Any, arguments: dict[str, Any]) -> None:
        labels, targets = arguments.get("labels"), arguments.get("shift_labels")
        if targets is None and labels is not None:
            targets = shift(labels)
        self.targets = targets if model.training else None

    def keep(self, prior: nn.Module, inputs: tuple[Tensor]) -> None:
        """Keeps some of the hidden states, times the scale, and their targets."""
        if self.targets is None:
            return
        scaled, targets = inputs[0].detach().flatten(0, -2), self.targets.flatten().to(inputs[0].device)
        counted = (targets != -100).nonzero().flatten()
        if not len(counted) or len(scaled) not in (len(targets), len(counted)):
            return
        one_in = SAMPLED_ON_ALL if self.head.shortlist_size is None else SAMPLED_ON_SHORTLIST
        sampled = min(math.ceil(len(counted) / one_in), ENOUGH_TOKENS)
        step = math.ceil(len(counted) / (sampled if self.max_tokens is None else self.max_tokens))
        counted = counted[::step]
        # TRL's call reads the hidden states of these tokens alone.
        self.sample = scaled[counted] if len(scaled) == len(targets) else scaled[::step], targets[counted]

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if "loss" not in logs or self.head is None:
            return
        head = whole_head(self.head)
        decoder = self.decoder if head is self.head else None
        total = StatisticsSum(head.num_mixtures)
        was_training = head.training
        head.eval()  # a subclass may have dropout
        if self.sample is not None:
            scaled, targets = self.sample
            self.warn_of_still(head, scaled / head.latent_scale, state.global_step)
            for tokens, predictions in predict_in_chunks(head, scaled / head.latent_scale, decoder):
                total.add(predictions, targets[tokens])
        head.train(was_training)
        self.sample = None
        if torch.distributed.is_initialized():
            total.add_up_over_processes(args.device)
        if total.count == 0:
            logger.warning_once(
                "MixtureUsage: expected labels in a call of the model since the last log, given none that counts, so "
                "the mixture is not logged. With label_smoothing_factor the Trainer keeps the labels to itself."
            )
            return
        statistics = total.result()
        entries = usage_logs(statistics, self.components)
        logs.update(entries)
        state.log_history[-1].update(entries)
        now = statistics.mean_weights
        before = now if self.mean_weights is None else self.mean_weights
        self.mean_weights = before.lerp(now, min(1.0, total.count / ENOUGH_TOKENS))
        self.warn_of_starved(self.mean_weights, state.global_step)

    def warn_of_starved(self, mean_weights: Tensor, step: int) -> None:
        threshold = self.starved_below / len(mean_weights)
        starved = [k for k, weight in enumerate(mean_weights.tolist()) if weight < threshold]
        before, self.starved = self.starved, {k: [*self.starved.get(k, []), step] for k in starved}
        for k, steps in self.starved.items():
            if persists(steps, self.starved_for) and not persists(before.get(k, []), self.starved_for):
                logger.warning(
                    f"step {step}: component {k} of the mixture has starved since step {steps[0]}: its mean weight is "
                    f"{mean_weights[k]:.2e}, below {threshold:.2e}"
                )

    @torch.no_grad()
    def warn_of_still(self, head: MoSLMHead, hidden_states: Tensor, step: int) -> None:
        """Warns where all components stay equal."""
        can_tell = is_own(head) and head.num_mixtures > 1
        is_still = can_tell and float(head.shifts(hidden_states).abs().amax()) < NOTICEABLE
        before, self.still = self.still, [*self.still, step] if is_still else []
        if persists(self.still, self.starved_for) and not persists(before, self.starved_for):
            logger.warning(
                f"step {step}: the components of the mixture have all been equal since step {self.still[0]}, so it is "
                "one softmax: nothing moves the shift. Train its weight, or put a LoRA adapter on it"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for hook in self.hooks:
            hook.remove()


def whole_head(head: MoSLMHead) -> MoSLMHead:
    """The head, or a copy with gathered weights if these are sharded. Every process must call this."""
    weights: dict[str, Any] = {name: parameter.detach() for name, parameter in head.named_parameters()}
    if any(hasattr(parameter, "ds_id") for parameter in head.parameters()):  # sharded by ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(head.parameters())):
            weights = {name: parameter.detach().clone() for name, parameter in head.named_parameters()}
    elif any(hasattr(weight, "full_tensor") for weight in weights.values()):
        weights = {name: w.full_tensor() if hasattr(w, "full_tensor") else w for name, w in weights.items()}
    else:
        return head
    V, D = weights["weight"].shape
    # FSDP2 makes a class of the head's.
    own_class: Any = next(each for each in type(head).__mro__ if not each.__name__.startswith("FSDP"))
    options = {name: getattr(head, name) for name in (*option_defaults(), "softcap")}
    whole = own_class.take_over(nn.Linear(D, V, bias="bias" in weights, device="meta"), **options)
    whole.load_state_dict(weights, assign=True)
    return whole


def warn_of_small_steps(head: Any, optimizer: Any) -> None:
    """Warns of an Adafactor that steps in proportion to a weight, where it trains a new shift."""
    inner, weight = getattr(optimizer, "optimizer", optimizer), head.shift.weight  # out of accelerate's
    if not type(inner).__name__.endswith("Adafactor"):
        return
    groups = [group for group in inner.param_groups if any(weight is each for each in group["params"])]
    own = getattr(weight, "to_local", lambda: weight)()  # of a sharded weight
    # torch's has no `scale_parameter`: it always steps so.
    if any(group.get("scale_parameter", True) for group in groups) and own.numel() and own.abs().amax() < NOTICEABLE:
        logger.warning(
            "optimizer: Adafactor steps in proportion to a weight, and the shift of a new mixture is next to zero, so "
            "it moves far less than the other weights. Take AdamW, or transformers' Adafactor with "
            "scale_parameter=False, or give the shift a group of its own with a higher learning rate"
        )


def persists(steps: list[int], least: int) -> bool:
    return len(steps) >= 3 and steps[-1] - steps[0] >= least


def usage_logs(statistics: MixtureStatistics, components: bool) -> dict[str, float]:
    K = len(statistics.mean_weights)
    divergences = {f"divergence_{j}_{k}": float(statistics.divergence[j, k]) for k in range(K) for j in range(k)}
    responsibilities = {f"responsibility_{k}": float(statistics.responsibilities[k]) for k in range(K)}
    return {
        "mixture_entropy": statistics.entropy,
        "smallest_mixture_weight": float(statistics.mean_weights.min()),
        "mixture_divergence": sum(divergences.values()) / max(len(divergences), 1),
        **(responsibilities | divergences if components else {}),
    }


# ----------------------------------------------------------------------------------------------------- the checkpoints


def last_whole_checkpoint(output_dir: str | Path) -> str | None:
    """Equivalent to: `transformers.trainer_utils.get_last_checkpoint`, without incomplete checkpoints.

    Those are skipped with a warning that says what is wrong with them. `None`: there is no whole one.
    """
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    folders = [path for path in Path(output_dir).glob("*") if pattern.fullmatch(path.name) and path.is_dir()]
    for folder in sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        fault = next(faults_of(folder), None)
        if fault is None:
            return str(folder)
        logger.warning(f"{folder} is skipped: {fault}")
    return None


def faults_of(folder: Path) -> Iterator[str]:
    """Yields each sign that a save of the Trainer was interrupted; the Trainer writes the state last."""
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        if state["global_step"] != int(folder.name.rpartition("-")[2]):
            yield f"trainer_state.json: expected the step of the folder's name, given {state['global_step']}"
    except FileNotFoundError:
        yield "it has no trainer_state.json, which is written last"
    except (ValueError, KeyError, TypeError) as error:
        yield f"trainer_state.json cannot be read: {error!r}"
    if any(folder.glob(f"{STAGING_PREFIX}*")):
        yield "the saving of its model was cut off"
    try:
        check_files(folder, None)
        for path in folder.rglob("*.safetensors"):
            read_header(path)
    except (OSError, ValueError) as error:
        yield str(error)
    for path in folder.glob("*.pt*"):
        if path.is_file() and not zipfile.is_zipfile(path):
            yield f"{path.name} is cut short"
    patterns = ("*.safetensors", "*/*.safetensors", "*/*.distcp", "*/*.pt")
    if not any(next(folder.glob(pattern), None) for pattern in patterns):
        yield "it holds no weights"
