"""MoSForCausalLM: any causal LM of transformers with its head taken off and a mixture of softmaxes in its place."""

import copy
import dataclasses
import functools
import importlib
import inspect
import os
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from .configuration_mos import MoSConfig
from .mos_backbone import add_aux_loss, behead, new_backbone
from .mos_checkpoint import (
    SavedCheckpoint,
    check_files,
    check_loaded,
    own_class_name,
    replace_checkpoint,
    whole_state_dict,
)
from .mos_delegation import AnswersAsBackbone
from .mos_head import MoSLMHead
from .mos_log_probs import count_items
from .mos_trl import FusedHeadMixin

logger = logging.get_logger(__name__)

# The Trainer shifts the labels for label smoothing, and pipelines accept a model, only where its class is named here.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["mos"] = "MoSForCausalLM"

# The arguments that save_pretrained hands to push_to_hub.
HUB_ARGUMENTS = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr")


class MoSForCausalLM(AnswersAsBackbone, FusedHeadMixin, PreTrainedModel, GenerationMixin):
    """A causal LM whose head is a mixture of softmaxes.

    Equivalent to: `backbone` without its vocabulary projection, then [`MoSLMHead`]. `outputs.logits` are the mixture's
    natural log-probabilities in fp32: their softmax is the mixture, so generation, sampling and cross-entropy read
    them rightly. `temperature` and `repetition_penalty` act on the mixture, not on each component.

    Use [`~MoSForCausalLM.from_causal_lm`] to convert a model, `from_pretrained` to load a converted one.

    Args:
        config ([`MoSConfig`]): the backbone's config and the head's options.
        backbone (`PreTrainedModel`, *optional*): a causal LM to take apart and keep. `None` makes a new one.
    """

    config: MoSConfig
    config_class = MoSConfig
    base_model_prefix = "backbone"
    # The backbone decides which of these it supports, and checks by itself.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = {"lm_head.prior"}  # in bf16 as in fp16
    # Quantizers look for the same module by the end of its name, or by the full name of its weight.
    _keep_in_fp32_modules = {"prior", "lm_head.prior.weight"}
    backbone: PreTrainedModel
    lm_head: MoSLMHead

    def __init__(self, config: MoSConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if backbone is None:
            backbone = new_backbone(config.text_config)
        config.text_config = backbone.config
        config.text_config.architectures = [type(backbone).__name__]
        decoder, tied_to = behead(backbone)
        if not config.tie_word_embeddings and decoder.weight is backbone.get_input_embeddings().weight:
            decoder.weight = copy.deepcopy(decoder.weight)
        self.backbone = backbone
        self.lm_head = MoSLMHead(config, decoder=decoder)
        config.decoder_bias = self.lm_head.decoder.bias is not None
        self._tied_weights_keys = {"lm_head.decoder.weight": f"backbone.{tied_to}"}
        self._backbone_arguments = frozenset(inspect.signature(type(backbone).forward).parameters)
        self.main_input_name = backbone.main_input_name
        self.post_init()
        if self._tp_plan:  # the backbone's
            self._tp_plan["lm_head.decoder"] = "colwise_gather_output"
        if self._fsdp_plan and not config.tie_word_embeddings:  # a tied weight stays with the embedding
            self._fsdp_plan["lm_head"] = "keep_full_weight"
        self.bind_forward()
        self._is_built = True

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh: Any) -> Any:
        """Like `PreTrainedModel.maybe_distribute_model`, but FSDP2 gets a tied weight as one parameter."""
        is_tied = model.config.tie_word_embeddings
        if mesh is not None and is_tied and getattr(distributed_config, "dp_size", distributed_config.fsdp_size) > 1:
            if distributed_config.tp_size > 1:
                raise ValueError(
                    "tie_word_embeddings: expected False with both fsdp_size and tp_size, as transformers then trains "
                    "the embedding and the decoder apart, given True"
                )
            model.tie_weights(recompute_mapping=False)
        return super().maybe_distribute_model(model, distributed_config, mesh)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MoSLMHead):
            module.reset_parameters()
        elif module is self.lm_head.decoder:
            super()._init_weights(module)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Returns False although the class is custom code, so that transformers uses its guarded init functions.

        These skip loaded weights. For custom code transformers would take a backbone's module without weights of its
        own for loaded, together with the buffers that it initialises in other modules.
        """
        return False

    # ---------------------------------------------------------------------------------------------------- conversion

    @classmethod
    def from_causal_lm(
        cls, model: "str | PreTrainedModel", *, num_mixtures: int | None = None, **kwargs: Any
    ) -> "MoSForCausalLM":
        r"""Replaces the head of a causal LM with a mixture. Predictions do not change until it is trained.

        The weights are not copied: a model that is passed in shares its weights with the result, so that training
        one trains the other. The model keeps its own head and can still be used.

        Args:
            model (`str` or `PreTrainedModel`):
                A path or Hub id, as for `AutoModelForCausalLM.from_pretrained`, or a causal LM.
            num_mixtures (`int`, *optional*):
                K, the number of softmaxes. Without it: 4, but where neither `latent_rank`, `shortlist_size`,
                `latent_size` nor `latent_activation` is given and the vocabulary has 4,096 classes or more, the
                cheapest mixture, 16 with `shortlist_size=64`.
            kwargs:
                The fields of [`MoSConfig`]; with a path or id also the arguments of `from_pretrained`.

        Raises:
            ValueError: the model has no vocabulary projection that can be taken off, an option is unknown or out of
                range, or it would change the model's predictions.
        """
        try:
            conversion = importlib.import_module("hf_mos.conversion")  # it does not travel with a checkpoint
        except ModuleNotFoundError as error:
            raise ImportError("from_causal_lm: expected hf_mos, which is not installed: pip install hf_mos") from error
        return conversion.convert_causal_lm(cls, model, num_mixtures, kwargs)

    # ----------------------------------------------------------------------------------------------- save and load

    def save_pretrained(  # type: ignore[override]  # the rest of its arguments are among the kwargs
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        token: str | bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Like `PreTrainedModel.save_pretrained`, but atomic.

        If the process is killed, the folder loads as the old or new checkpoint (`mos_checkpoint.py`). The disk must
        hold both. Files that are no part of a checkpoint stay; weights of another layout are deleted. Adapters and a
        `distributed_checkpoint` are saved as transformers saves them. With sharded weights (FSDP2, tensor parallelism)
        every process must call this; the first writes, and all return when the checkpoint is complete.
        """
        is_native = getattr(self.config, "distributed_config", None) is not None  # transformers gathers the weights
        is_sharded = any(hasattr(parameter, "device_mesh") for parameter in self.parameters())
        gathers = is_sharded and (is_native or state_dict is None)
        if gathers and not is_native:
            state_dict = whole_state_dict(self)
        elif state_dict is None and self.config.tie_word_embeddings and self.lm_head.decoder.weight.is_meta:
            # Offloading parts the tie, and transformers then writes the weight twice.
            state_dict = {key: value for key, value in self.state_dict().items() if key != "lm_head.decoder.weight"}
        write = functools.partial(
            super().save_pretrained, state_dict=state_dict, max_shard_size=max_shard_size, variant=variant, token=token
        )
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        is_writer = is_main_process and not (torch.distributed.is_initialized() and torch.distributed.get_rank())
        is_special = getattr(self, "_hf_peft_config_loaded", False) or kwargs.get("distributed_checkpoint")
        with own_class_name(self):
            if not is_writer or is_special or os.path.isfile(save_directory):
                write(save_directory, is_main_process=is_main_process, push_to_hub=push_to_hub, **hub, **kwargs)
            else:
                folder = Path(save_directory)
                names = replace_checkpoint(folder, variant, functools.partial(write, **kwargs))
                if push_to_hub:
                    repo_id = hub.pop("repo_id", folder.name)
                    SavedCheckpoint(folder, names).push_to_hub(repo_id, token=token, tags=self.model_tags, **hub)
        if gathers:
            torch.distributed.barrier()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        use_safetensors: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Like `PreTrainedModel.from_pretrained`, but strict: the head must be complete, and no pickle is read.

        Raises:
            OSError: a file is missing, cut short or not what its name says.
            ValueError: a tensor of the head is missing, one too many, of another shape than the config says (unless
                `ignore_mismatched_sizes`) or not finite; the checkpoint is not one of this class; its weights are
                pickled; or its index names a file outside its folder.
        """
        if use_safetensors is False:
            raise ValueError("use_safetensors: expected True or None, as pickled weights are not read, given False")
        folder = Path(pretrained_model_name_or_path or "", kwargs.get("subfolder", ""))
        headers = {}
        if pretrained_model_name_or_path is not None and folder.is_dir() and kwargs.get("gguf_file") is None:
            named = getattr(kwargs.get("config"), "transformers_weights", None)
            headers = check_files(folder, kwargs.get("variant"), named)
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path,
            *args,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, in words
            use_safetensors=True,
            **kwargs,
        )
        model, info = loaded
        check_loaded(model, info, pretrained_model_name_or_path, headers, ignore_mismatched_sizes)
        staged = vars(model.config).pop("transformers_weights", None)
        if staged is not None and kwargs.get("generation_config") is None:
            generation_file = PurePosixPath(staged).with_name("generation_config.json")
            if (folder / generation_file).is_file():  # of a save that was interrupted after its weights were written
                model.generation_config = GenerationConfig.from_pretrained(folder, str(generation_file))
        return (model, info) if output_loading_info else model

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        hidden_states: Tensor | None = None,
        skip_logits: bool | None = None,
        add_log_partition: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Equivalent to: the backbone's own forward, with the mixture's log-probabilities as `logits`.

        The signature of a model's `forward` has the backbone's parameters, in the backbone's order, and then these.

        Args:
            input_ids, use_cache: as the backbone takes them.
            labels: (batch, sequence), as `input_ids`, -100 where ignored. They are shifted here.
            logits_to_keep: the number of last positions, or the positions, whose logits are computed. 0 for all.
            return_dict: `False` returns a tuple.
            num_items_in_batch: the divisor of the summed loss. `None`: the number of labels that are not ignored.
            ignore_index: the label of positions that are ignored.
            hidden_states: (batch, sequence, D), the backbone's result of an earlier call, as
                `hf_mos.training.hidden_states` keeps it. The backbone is then not run, and takes no other input.
            skip_logits: return `logits=None`, for example by a data collator in an evaluation that needs only the
                loss. `None`: in training mode with labels, leave the logits out as `skip_logits_in_training` says;
                who then reads `logits` gets a RuntimeError that says how to ask for them.
            add_log_partition: add the logarithm of the components' mean partition function, for logits on the
                softmax's scale: the softmax's own logits at step 0, and the same mixture always. `generate`
                does so, as `repetition_penalty` depends on the scale.
            kwargs: the backbone's other arguments, and `shift_labels` (batch, sequence), already shifted, in place of
                `labels`. (The Trainer requires every argument of the signature whose name contains "label".) With
                `fused_lm_head=True`, TRL's call, [`TokenScores`] are returned.

        Returns:
            The backbone's output class: `loss` in nats per token, plus a mixture-of-experts backbone's `aux_loss` with
            the backbone's coefficient, and `logits` (batch, positions, V). A loss function that was assigned to
            `loss_function` gets the logits of all positions, as a softmax model's does.
        """
        if hasattr(self.lm_head.decoder, "base_layer") and self.config.tie_word_embeddings:
            logger.warning_once(
                "An adapter is on lm_head.decoder, whose weight is the input embedding too: merging it would change "
                "both. Convert the model with tie_word_embeddings=False first, or do not merge."
            )
        returns_scores = kwargs.pop("fused_lm_head", False)
        shift_labels = kwargs.pop("shift_labels", None)
        targets = shift(labels, ignore_index) if shift_labels is None and labels is not None else shift_labels
        has_labels = targets is not None
        leaves_out = has_labels and self.training and self.config.skip_logits_in_training
        skips = leaves_out if skip_logits is None else skip_logits
        if hidden_states is not None and (input_ids is not None or kwargs.get("inputs_embeds") is not None):
            raise ValueError("hidden_states: expected no input_ids and no inputs_embeds with it, given one of them")
        given_cache = any(kwargs.get(name) is not None for name in ("past_key_values", "cache"))  # old and new name
        if has_labels and self.training and use_cache is None and not given_cache:
            use_cache = False  # nobody would read the cache, and gradient checkpointing forbids one
        arguments = {"input_ids": input_ids, **kwargs}
        if "use_cache" in self._backbone_arguments:
            arguments["use_cache"] = use_cache
        runs = hidden_states is None
        slices_itself = runs and "logits_to_keep" in self._backbone_arguments and not has_labels
        if slices_itself:
            arguments["logits_to_keep"] = logits_to_keep
        arguments = {name: value for name, value in arguments.items() if value is not None}
        outputs: Any = self.backbone(**arguments, return_dict=True) if runs else CausalLMOutput(logits=hidden_states)
        states, aux_loss = outputs.logits, getattr(outputs, "aux_loss", None)
        if has_labels and input_ids is not None:
            states = states[:, -input_ids.shape[1] :]  # without the image that the backbone prepends
        if returns_scores:
            scored = slice(-1 if shift_labels is None else None)  # the last position has no target in the batch
            return self.token_scores(states[:, scored], targets[:, scored], num_items_in_batch, aux_loss)

        kept = states if slices_itself else keep_positions(states, logits_to_keep)
        logits = None if skips else self.lm_head(kept, add_log_partition=add_log_partition)
        loss = None
        if has_labels:
            targets = targets.to(states.device)
            if self.loss_function is not ForCausalLMLoss:
                whole = logits if logits is not None and kept is states else self.lm_head(states)
                options = {"num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels}
                options = {name: value for name, value in options.items() if value is not None}
                loss = self.loss_function(logits=whole, labels=labels, vocab_size=whole.shape[-1], **options, **kwargs)
            else:
                if logits is None or kept is not states or add_log_partition or torch.is_grad_enabled():
                    total = self.lm_head(states, targets=targets, reduction="sum", ignore_index=ignore_index)
                else:
                    flat = logits.flatten(0, -2)
                    total = F.nll_loss(flat, targets.flatten(), reduction="sum", ignore_index=ignore_index)
                loss = total / count_items(targets, num_items_in_batch, ignore_index)
            loss = add_aux_loss(loss, aux_loss, self.backbone)
        if logits is None and skip_logits is None:
            logits = LEFT_OUT
        outputs = dataclasses.replace(outputs, loss=loss, logits=logits)
        if return_dict is None:
            return_dict = self.config.return_dict
        return outputs if return_dict else outputs.to_tuple()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head.decoder = new_embeddings
        text_config = self.config.get_text_config()
        if hasattr(text_config, "unpadded_vocab_size"):  # see _without_padding
            text_config.unpadded_vocab_size = new_embeddings.out_features

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the backbone does it, and asks for logits on the softmax's scale (see `forward`)."""
        backbone: Any = self.backbone
        return backbone.prepare_inputs_for_generation(*args, **kwargs) | {"add_log_partition": True}


class LogitsLeftOut(tuple):
    """Stands in `outputs.logits` for logits that were not computed; raises where it is used as a tensor.

    An empty tuple, as the code that moves, gathers or flattens outputs takes tuples apart.
    """

    __slots__ = ()

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            "logits: expected skip_logits=False in the call of the model, or skip_logits_in_training=False in its "
            "config, to read them in training mode with labels; they are left out to save memory"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # as in the question whether it is a named tuple
            raise AttributeError(name)
        self._refuse()

    __getitem__ = __array__ = _refuse  # type: ignore[assignment]
    __add__ = __sub__ = __mul__ = __truediv__ = __matmul__ = __neg__ = _refuse  # type: ignore[assignment]
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rmatmul__ = _refuse  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        return LEFT_OUT._refuse()

    def __repr__(self) -> str:
        return "LogitsLeftOut()"


LEFT_OUT = LogitsLeftOut()


def shift(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Moves the labels one position to the left, so that each position holds its target."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels: expected integer class indices, given {labels.dtype}")
    return F.pad(labels.long(), (0, 1), value=ignore_index)[..., 1:]


def keep_positions(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    return hidden_states[:, logits_to_keep]
