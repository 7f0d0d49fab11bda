"""MoSForCausalLM: any causal LM of transformers with its head taken off and a mixture of softmaxes in its place."""

import copy
import dataclasses
import functools
import inspect
import os
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from .configuration_mos import NO_SOFTCAP, SOFTCAP_FIELDS, MoSConfig, take_softcap
from .mos_checkpoint import (
    SavedCheckpoint,
    check_files,
    check_loaded,
    own_class_name,
    replace_checkpoint,
    whole_state_dict,
)
from .mos_head import MoSLMHead
from .mos_token_scores import SCORES, ScoreOptions, TokenScores

logger = logging.get_logger(__name__)

# The Trainer shifts the labels for label smoothing, and pipelines accept a model, only where its class is named here.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["mos"] = "MoSForCausalLM"

# What save_pretrained passes on to push_to_hub.
HUB_ARGUMENTS = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr")


class HeadlessProjection(nn.Module):
    """Equivalent to: the identity, in the place of the backbone's vocabulary projection.

    The backbone then returns hidden states where it returned logits. Some architectures read the projection's dtype
    and bias. fp16 is widened, as it does not hold what some do to their logits next (`NO_SOFTCAP`).
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(0, dtype=dtype, device=device), persistent=False)
        self.bias = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.float() if hidden_states.dtype == torch.float16 else hidden_states


class MoSForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal LM whose head is a mixture of softmaxes.

    Equivalent to: `backbone` without its vocabulary projection, then [`MoSLMHead`]. `outputs.logits` are the mixture's
    natural log-probabilities in fp32: their softmax is the mixture, so generation, sampling and cross-entropy read
    them rightly. `temperature` and `repetition_penalty` act on the mixture, not on each component.

    Use [`~MoSForCausalLM.from_causal_lm`] to convert a model, `from_pretrained` to load a converted one.

    Args:
        config ([`MoSConfig`]): the backbone's config and the head's options.
        backbone (`PreTrainedModel`, *optional*): a causal LM to take apart and keep. `None` makes a new one.
    """

    config_class = MoSConfig
    base_model_prefix = "backbone"
    # The backbone decides, and checks for itself.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = {"lm_head.prior"}  # in bf16 as in fp16
    # The same module, as quantizers look for it: by the end of its name, or by the whole name of its weight.
    _keep_in_fp32_modules = {"prior", "lm_head.prior.weight"}
    backbone: Any
    lm_head: Any
    score_options = ScoreOptions()

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
        self._backbone_arguments = frozenset(inspect.signature(backbone.forward).parameters)
        self.main_input_name = backbone.main_input_name
        self.post_init()
        if self._tp_plan:  # the backbone's
            self._tp_plan["lm_head.decoder"] = "colwise_gather_output"
        if self._fsdp_plan and not config.tie_word_embeddings:  # a tied weight stays with the embedding
            self._fsdp_plan["lm_head"] = "keep_full_weight"

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh: Any) -> Any:
        """As for every model of transformers, but a tied weight is one parameter to FSDP2, with one gradient."""
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
        """No: initialisation here and in the backbones is by transformers' own functions, which spare what is loaded.

        Else a backbone's module without weights of its own is taken for loaded, and with it the buffers that it
        initialises in others.
        """
        return False

    # ---------------------------------------------------------------------------------------------------- conversion

    @classmethod
    def from_causal_lm(
        cls, model: "str | PreTrainedModel", *, num_mixtures: int = 4, **kwargs: Any
    ) -> "MoSForCausalLM":
        r"""Takes the head off a causal LM and puts a mixture in its place, with not one prediction changed.

        The weights are not copied: a model that is passed in shares its weights with the result, so that training
        the one trains the other; it keeps its own head and can still be used.

        Args:
            model (`str` or `PreTrainedModel`):
                A path or Hub id, as for `AutoModelForCausalLM.from_pretrained`, or a causal LM.
            num_mixtures (`int`, defaults to 4):
                K, the number of softmaxes.
            kwargs:
                The fields of [`MoSConfig`]; with a path or id also the arguments of
                `AutoModelForCausalLM.from_pretrained` (`dtype`, `device_map`, `revision`, `trust_remote_code`, ...).

        Raises:
            ValueError: the model has no vocabulary projection that can be taken off, an option is unknown or out of
                range, or it would change the model's predictions.
        """
        fields = {field.name for field in dataclasses.fields(MoSConfig)} & MoSConfig.__annotations__.keys()
        options = {name: kwargs.pop(name) for name in list(kwargs) if name in fields}
        known_options = f"options of MoSConfig ({', '.join(sorted(fields))})"
        if "text_config" in options:
            raise ValueError("text_config: expected none, it is the model's own config")
        if isinstance(model, PreTrainedModel):
            if kwargs:
                raise ValueError(f"expected {known_options}, given {sorted(kwargs)}")
            if isinstance(model, cls) or getattr(model.config, "model_type", None) == MoSConfig.model_type:
                raise ValueError(f"model: expected a causal LM with a softmax head, given {type(model).__name__}")
            backbone = share_weights(model)
        elif isinstance(model, (str, os.PathLike)):
            MoSConfig(text_config={"model_type": "llama"}, num_mixtures=num_mixtures, **options)  # fail before loading
            try:
                backbone = AutoModelForCausalLM.from_pretrained(model, **kwargs)
            except TypeError as error:  # what from_pretrained does not know, it hands to the model's constructor
                raise ValueError(f"expected {known_options} or of from_pretrained: {error}") from error
        else:
            raise ValueError(f"model: expected a path, a Hub id or a causal LM, given {type(model).__name__}")
        projection = output_projection(backbone)
        config = _config_for(backbone, projection, num_mixtures, options)
        module: Any
        for module in backbone.modules():
            module._is_hf_initialized = True  # post_init must not draw its weights again
        result = cls(config, backbone=backbone)
        result.generation_config = backbone.generation_config
        config.name_or_path = backbone.name_or_path  # for cards and tokenizers
        result.name_or_path = ""  # which PEFT takes for the base of an adapter; the softmax model is not that base
        return result.train(backbone.training)

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
        """As for every model of transformers, but at each moment the old checkpoint or the new one loads, whole.

        It needs room for both. Files that are no part of the checkpoint stay, and weights of another layout go. See
        `mos_checkpoint.py`. Adapters and a `distributed_checkpoint` are saved as transformers saves them.

        Where processes share the weights (FSDP2, tensor parallelism) each of them must call this; the first writes,
        and all return when the checkpoint is there.
        """
        is_native = getattr(self.config, "distributed_config", None) is not None  # transformers gathers the weights
        shares_weights = any(hasattr(parameter, "device_mesh") for parameter in self.parameters())
        gathers = shares_weights and (is_native or state_dict is None)
        if gathers and not is_native:
            state_dict = whole_state_dict(self)
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
        """As for every model of transformers, but strict: no layer of the head is left to chance, no pickle is read.

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
            if (folder / generation_file).is_file():  # of a save that was cut off when its weights were already valid
                model.generation_config = GenerationConfig.from_pretrained(folder, str(generation_file))
        return (model, info) if output_loading_info else model

    # ------------------------------------------------------------------------------------------------------- forward

    def __setattr__(self, name: str, value: Any) -> None:
        """As of every module; but TRL's trainers do not get to replace `forward`.

        They would run the backbone and one softmax with the decoder's weight in its place (`add_fused_lm_head`), and
        then call it with `fused_lm_head=True`. That call is answered by `forward` itself, with the mixture's scores.
        """
        function = getattr(value, "__func__", None)
        if name == "forward" and function is not None and "fused_lm_head" in function.__code__.co_varnames:
            self.score_options = read_score_options(function, self.lm_head)
        else:
            super().__setattr__(name, value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The backbone's own output object, with the mixture's log-probabilities as `logits`.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache:
                As the backbone takes them.
            labels: (batch, sequence), as `input_ids`, -100 where ignored. They are shifted here.
            logits_to_keep: the number of last positions, or the positions, whose logits are computed. 0 for all.
            return_dict: `False` returns a tuple.
            num_items_in_batch: what the summed loss is divided by. `None`: the number of labels that count.
            skip_logits: return `logits=None`. `None`: in training mode with labels, as `skip_logits_in_training` says.
                A data collator that adds `skip_logits=True` makes an evaluation that wants the loss alone as lean.
            kwargs: what else the backbone takes, and `shift_labels` (batch, sequence), shifted already, in place of
                `labels`. (The Trainer waits for every argument of the signature that names labels.) With
                `fused_lm_head=True`, as TRL's trainers call a model, [`TokenScores`] are returned.

        Returns:
            The backbone's output class: `loss` in nats per token (with a mixture-of-experts backbone's `aux_loss`
            joined as the backbone does), `logits` (batch, positions, V).
        """
        if hasattr(self.lm_head.decoder, "base_layer") and self.config.tie_word_embeddings:
            logger.warning_once(
                "An adapter is on lm_head.decoder, whose weight is the input embedding too: merging it would change "
                "both. Convert the model with tie_word_embeddings=False first, or do not merge."
            )
        returns_scores = kwargs.pop("fused_lm_head", False)
        shift_labels = kwargs.pop("shift_labels", None)
        targets = shift(labels) if shift_labels is None and labels is not None else shift_labels
        has_labels = targets is not None
        if skip_logits is None:
            skip_logits = has_labels and self.training and self.config.skip_logits_in_training
        if has_labels and self.training and use_cache is None and past_key_values is None:
            use_cache = False  # a cache that nobody reads, and gradient checkpointing cannot have
        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
        }
        arguments = {name: value for name, value in arguments.items() if value is not None}
        for name in ("position_ids", "use_cache"):
            if name not in self._backbone_arguments:
                arguments.pop(name, None)
        slices_itself = "logits_to_keep" in self._backbone_arguments and not has_labels
        if slices_itself:
            arguments["logits_to_keep"] = logits_to_keep
        outputs = self.backbone(**arguments, **kwargs, return_dict=True)
        hidden_states = outputs.logits
        if has_labels and input_ids is not None:
            hidden_states = hidden_states[:, -input_ids.shape[1] :]  # past an image that the backbone put in front
        if returns_scores:
            scored = slice(-1 if shift_labels is None else None)  # the last position predicts nothing in the batch
            aux_loss = getattr(outputs, "aux_loss", None)
            return self._token_scores(hidden_states[:, scored], targets[:, scored], num_items_in_batch, aux_loss)

        kept = hidden_states if slices_itself else keep_positions(hidden_states, logits_to_keep)
        logits = None if skip_logits else self.lm_head(kept)
        loss = None
        if has_labels:
            targets = targets.to(hidden_states.device)
            if logits is None or kept is not hidden_states or torch.is_grad_enabled():
                total = self.lm_head(hidden_states, targets=targets, reduction="sum")
            else:
                total = F.nll_loss(logits.flatten(0, -2), targets.flatten(), reduction="sum")
            loss = total / count_items(targets, num_items_in_batch)
            aux_loss = getattr(outputs, "aux_loss", None)
            if isinstance(aux_loss, Tensor):
                loss = loss + aux_loss_coefficient(self.backbone) * aux_loss.to(loss.device)
        outputs = dataclasses.replace(outputs, loss=loss, logits=logits)
        if return_dict is None:
            return_dict = self.config.return_dict
        return outputs if return_dict else outputs.to_tuple()

    def _token_scores(
        self, hidden_states: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None, aux_loss: Tensor | None
    ) -> TokenScores:
        targets = targets.to(hidden_states.device)
        counts = targets != -100
        flat = self.lm_head(hidden_states[counts], targets=targets[counts], scores=self.score_options)
        # masked_scatter stays differentiable where no label counts
        scores: dict[str, Any] = {
            name: None if part is None else part.new_zeros(counts.shape).masked_scatter(counts, part)
            for name, part in zip(SCORES, flat, strict=True)
        }
        loss = -scores["log_probs"].sum() / count_items(targets, num_items_in_batch)
        if isinstance(aux_loss, Tensor):
            loss = loss + aux_loss_coefficient(self.backbone) * aux_loss.to(loss.device)
        return TokenScores(loss=loss, label_mask=counts, aux_loss=aux_loss, **scores)

    # ---------------------------------------------------------------------------------------------------- embeddings

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head.decoder = new_embeddings
        text_config = self.config.get_text_config()
        if hasattr(text_config, "unpadded_vocab_size"):  # see _without_padding
            text_config.unpadded_vocab_size = new_embeddings.out_features

    def get_decoder(self) -> nn.Module:
        return self.backbone.get_decoder()

    # ------------------------------------------------------- generation, as the backbone does it (see transformers)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.backbone.prepare_inputs_for_generation(*args, **kwargs)

    def _prepare_model_inputs(self, *args: Any, **kwargs: Any) -> Any:
        return self.backbone._prepare_model_inputs(*args, **kwargs)

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.backbone._prepare_cache_for_generation(*args, **kwargs)

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.backbone._update_model_kwargs_for_generation(*args, **kwargs)

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.backbone._prepare_position_ids_for_generation(*args, **kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        self.backbone._validate_model_kwargs(model_kwargs)

    @property
    def _is_stateful(self) -> bool:  # type: ignore[override]
        return self.backbone._is_stateful

    @property
    def _can_compile_fullgraph(self) -> bool:  # type: ignore[override]
        return self.backbone._can_compile_fullgraph

    @property
    def supports_gradient_checkpointing(self) -> bool:  # type: ignore[override]
        return self.backbone.supports_gradient_checkpointing


def new_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """A causal LM of random weights: of the class that transformers maps the config to, else that the config names.

    It names the one that was converted, see `MoSForCausalLM.__init__`. The text model of a composite one needs that.
    """
    named: Any = getattr(transformers, (config.architectures or [""])[0], None)
    if named is None or type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM.from_config(config)
    return named._from_config(config)


def output_projection(model: PreTrainedModel) -> nn.Linear:
    """The model's vocabulary projection; ValueError where there is none that can be taken off."""

    def refuse(expected: str, given: str) -> NoReturn:
        raise ValueError(f"model: expected a causal LM {expected}, given {type(model).__name__} {given}")

    if model.config.is_encoder_decoder:
        refuse("without an encoder", "that has one")
    if "labels" not in inspect.signature(model.forward).parameters:
        refuse("whose forward takes labels", "that is no language model by itself")
    projection = model.get_output_embeddings()
    if not isinstance(projection, nn.Linear):
        found = "none" if projection is None else type(projection).__name__
        refuse("whose output embeddings are one nn.Linear", f"with {found}")
    mapping: Any = AutoModelForCausalLM._model_mapping
    mapped = type(model.config) in mapping
    loaded = mapping[type(model.config)] if mapped else getattr(transformers, type(model).__name__, None)
    if loaded is None or not isinstance(model, loaded):
        name = "no class of transformers" if loaded is None else loaded.__name__
        refuse("of the class that its config is loaded as", f"for which that is {name}")
    return projection


def behead(backbone: PreTrainedModel) -> tuple[nn.Linear, str]:
    """Puts a pass-through where the vocabulary projection was, and removes what the backbone says of its weights.

    Returns:
        The projection, as the decoder of the mixture, and the path of the weight in the backbone that it is tied to
        where it is tied.
    """
    projection = backbone.get_output_embeddings()
    path = _path_of(projection, backbone)
    own_ties = backbone._tied_weights_keys or {}
    partners = {**{source: target for target, source in own_ties.items()}, **own_ties}  # some tie the embedding to it
    tied_to = partners.get(f"{path}.weight") or f"{_path_of(backbone.get_input_embeddings(), backbone)}.weight"
    backbone.set_output_embeddings(HeadlessProjection(projection.weight.dtype, projection.weight.device))
    if f"{path}.bias" in own_ties:  # some BERT-like heads hold the projection's bias a second time
        owner_path, _, name = own_ties[f"{path}.bias"].rpartition(".")
        owner: Any = backbone.get_submodule(owner_path)
        setattr(owner, name, None)
        owner._is_hf_initialized = True  # its initialisation would ask for the bias
    for field in SOFTCAP_FIELDS:  # most read it from their config at each call (see take_softcap), some have copied it
        if hasattr(backbone, field):
            setattr(backbone, field, NO_SOFTCAP)
    if hasattr(backbone, "logit_softcap"):
        backbone.logit_softcap = nn.Identity()
    for name in ("_tied_weights_keys", "all_tied_weights_keys", "_tp_plan", "_pp_plan", "_fsdp_plan"):
        entries = getattr(backbone, name, None)
        if entries:
            others = {k: v for k, v in entries.items() if not (k.startswith(path) or str(v).startswith(path))}
            setattr(backbone, name, others)
    return _without_padding(projection, backbone.config), tied_to


def _path_of(module: nn.Module, root: nn.Module) -> str:
    return next(name for name, candidate in root.named_modules() if candidate is module)


def _without_padding(projection: nn.Linear, config: PreTrainedConfig) -> nn.Linear:
    """The projection, without the rows beyond the vocabulary that some backbones cut off their logits."""
    classes = getattr(config.get_text_config(), "unpadded_vocab_size", None)
    if classes is None or classes >= projection.out_features:
        return projection
    decoder: Any = nn.Linear(projection.in_features, classes, bias=False, device="meta")
    decoder.weight = nn.Parameter(projection.weight[:classes], requires_grad=projection.weight.requires_grad)
    decoder._is_hf_initialized = getattr(projection, "_is_hf_initialized", False)
    return decoder


def reads_softcap(backbone: PreTrainedModel) -> bool:
    """Whether a softcap in the config is applied; some vision-language models do not do what their text model does."""
    forwards = [vars(base)["forward"] for base in type(backbone).__mro__ if "forward" in vars(base)]
    names = {name for forward in forwards for name in inspect.unwrap(forward).__code__.co_names}
    return not names.isdisjoint({*SOFTCAP_FIELDS, "logit_softcap"})


def aux_loss_coefficient(backbone: PreTrainedModel) -> float:
    """What a mixture-of-experts backbone multiplies its balancing loss by."""
    holders = (backbone, backbone.config.get_text_config())
    names = ("router_aux_loss_coef", "aux_loss_coef")
    return next(getattr(holder, name) for holder in holders for name in names if hasattr(holder, name))


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model's modules and configs around the very same tensors."""
    modules = [*model.modules()]
    kept = (value for module in modules for value in vars(module).values() if isinstance(value, Tensor))
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers(), *kept)}
    return copy.deepcopy(model, memo)


def read_score_options(function: Any, head: MoSLMHead) -> ScoreOptions:
    """What TRL's `add_fused_lm_head` was asked for, as the function that it made holds it."""
    if head.balance_coefficient:
        raise ValueError(
            "balance_coefficient: expected 0 with a trainer of TRL, which makes its loss of the log-probabilities "
            f"alone, given {head.balance_coefficient}. Load the model with balance_coefficient=0.0."
        )
    given = inspect.getclosurevars(function).nonlocals
    if not {"temperature", "outputs"} <= given.keys() or not set(given["outputs"]) <= set(SCORES):
        raise ValueError(
            f"forward: expected the fused head of TRL 1.16, whose options are temperature and outputs of {SCORES}, "
            f"given one with {sorted(given)} and {given.get('outputs')}. Install trl==1.16."
        )
    return ScoreOptions(float(given["temperature"]), tuple(given["outputs"]))


def shift(labels: Tensor) -> Tensor:
    """Labels moved one to the left, so that each position holds the token that it predicts."""
    return F.pad(labels, (0, 1), value=-100)[..., 1:]


def keep_positions(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    return hidden_states[:, logits_to_keep]


def count_items(targets: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """What the summed loss is divided by; never zero, as a batch in which no label counts has a loss of zero."""
    if num_items_in_batch is None:
        num_items_in_batch = (targets != -100).sum()
    return torch.as_tensor(num_items_in_batch, device=targets.device).clamp(min=1)


def _config_for(
    backbone: PreTrainedModel, projection: nn.Linear, num_mixtures: int, options: dict[str, Any]
) -> MoSConfig:
    """The config of the conversion; ValueError where an option would change the model's predictions."""
    tied = projection.weight is backbone.get_input_embeddings().weight
    softcap = take_softcap(backbone.config)
    softcap = softcap if reads_softcap(backbone) else None
    own = {"tie_word_embeddings": tied, "softcap": softcap, "decoder_bias": projection.bias is not None}
    for name in ("softcap", "decoder_bias"):
        if options.get(name) not in (None, own[name]):
            raise ValueError(f"{name}: expected {own[name]!r}, as the model has it, given {options[name]!r}")
    if options.get("tie_word_embeddings") and not tied:
        raise ValueError("tie_word_embeddings: expected False, the model's own head is not tied, given True")
    given = {name: value for name, value in options.items() if value is not None}
    config = MoSConfig(text_config=backbone.config, num_mixtures=num_mixtures, **{**own, **given})
    if config.latent_size not in (None, projection.in_features):
        raise ValueError(
            f"latent_size: expected {projection.in_features}, the head's width, given {config.latent_size}"
        )
    if config.latent_activation != "identity" and config.latent_rank is None:
        logger.warning(
            f"latent_activation={config.latent_activation!r} changes the model's predictions until it is trained; "
            "only 'identity' is exact at step 0."
        )
    config.dtype = backbone.dtype
    return config
