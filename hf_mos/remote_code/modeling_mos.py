"""MoSForCausalLM: a causal LM of transformers whose head is a mixture of softmaxes.

The class of a mixture is made when it is first asked for: `MoSLlamaForCausalLM(MoSForCausalLM, LlamaForCausalLM)`. All
that is not said here is the softmax model's: attributes, names, signatures, generation.
"""

import copy
import dataclasses
import functools
import inspect
import os
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.auto import modeling_auto

from .configuration_mos import (
    NO_SOFTCAP,
    PREFIX,
    SOFTCAP_FIELDS,
    MoSConfig,
    adopt,
    config_class_for,
    default_scale,
    find_softcap_field,
    option_defaults,
    take_softcap,
)
from .mos_checkpoint import SavedCheckpoint, check_files, check_loaded, own_class, replace_checkpoint, whole_state_dict
from .mos_head import MoSLMHead, hand_on, is_own, role, role_of
from .mos_log_probs import count_items
from .mos_matmul import has_foreign_hooks

# The arguments that save_pretrained hands to push_to_hub, and those of from_pretrained that find files.
HUB_ARGUMENTS = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr")
FILE_ARGUMENTS = (
    *("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision", "subfolder", "gguf_file"),
    *("trust_remote_code", "_from_auto", "_from_pipeline"),
)
MODEL_ARGUMENTS = ("dtype", "torch_dtype", "quantization_config")  # that a config would take for its own
DROPS_CACHE_WITH_LABELS = (  # model types whose forward has `if labels is not None: use_cache = False`
    *("bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "git", "megatron-bert", "roberta"),
    *("roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)
OWN_ARGUMENTS = ("skip_logits", "add_log_partition", "fused_lm_head")  # of forward, that no softmax model takes


class MoSForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal LM whose head is a mixture of softmaxes.

    Equivalent to: the softmax model with [`MoSLMHead`] in the place of its vocabulary projection. `outputs.logits`
    (batch, sequence, V) are the mixture's natural log-probabilities in fp32. Their softmax is the mixture, on which
    generation, `temperature` and `repetition_penalty` act, not on each component.

    `from_causal_lm`, `from_pretrained` and `MoSForCausalLM(config)` return instances of made classes. `forward` takes
    the softmax model's arguments, and these:

        shift_labels (batch, sequence): labels that are shifted already, in place of `labels`
        num_items_in_batch: the divisor of the summed loss; by default the number of labels that are not ignored
        ignore_index: the label of positions that are ignored, -100
        hidden_states (batch, sequence, D): the result of an earlier `head_inputs`; the layers are then not run
        skip_logits: return `logits=None`; by default in training mode with labels (`skip_logits_in_training`)
        add_log_partition: as in `mix_log_probs`; `generate` asks for it, as `repetition_penalty` depends on the scale
    """

    config: MoSConfig
    config_class = MoSConfig
    backbone_class: Any = None  # the softmax model's class, in a made class
    argument_names: tuple[str, ...] = ()  # of the softmax model's forward
    masks_labels = False  # whether its loss leaves out the labels of tokens that the attention mask hides
    warns_of_softmax = True  # once, where another head took the place of the mixture's
    skip_logits_in_training = True  # a call with labels then makes no tensor as wide as V
    read_fused_forward: Any = None  # hf_mos.training.token_scores sets these three, for TRL
    score_batch: Any = None
    score_options: Any = None

    def __new__(cls, config: Any = None, *args: Any, **kwargs: Any) -> "MoSForCausalLM":
        return super().__new__(model_class_for(backbone_class_of(config)) if cls is MoSForCausalLM else cls)

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        vars(self)["_given_config"] = config
        super().__init__(config, *args, **kwargs)
        del self._given_config

    def post_init(self) -> None:
        self.put_head()
        super().post_init()
        self.describe_head()

    def put_head(self) -> None:
        """Makes the mixture of the vocabulary projection, in its place."""
        config: Any = self.config
        linear: Any = self.get_output_embeddings()
        if isinstance(linear, MoSLMHead):  # a class may call post_init twice
            return
        if not hasattr(config, "num_mixtures"):  # the model is made of a part of the config that was given
            adopt(config, {name: getattr(self._given_config, name) for name in option_defaults()})
        if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
            found = "none" if linear is None else type(linear).__name__
            raise ValueError(f"model: expected a causal LM whose output embeddings are one nn.Linear, given {found}")
        if (softcap := take_softcap(config)) is not None:
            is_read = names_in_forward(self.backbone_class) & {*SOFTCAP_FIELDS, "logit_softcap"}
            config.softcap = softcap if is_read else None  # some vision-language models ignore their text model's
        self._set_softcap(NO_SOFTCAP)
        if not config.tie_word_embeddings and linear.weight is self.get_input_embeddings().weight:
            linear.weight = copy.deepcopy(linear.weight)
        config.latent_scale = config.latent_scale or default_scale(linear.in_features, from_scratch=True)
        head = MoSLMHead.take_over(linear, **{name: getattr(config, name) for name in (*option_defaults(), "softcap")})
        head.num_classes = getattr(config.get_text_config(), "unpadded_vocab_size", None)
        config.shift_rank = head.shift_rank

    def _set_softcap(self, softcap: float) -> None:
        """Sets the softcap of those models that copy it; most read it from their config at each call."""
        for holder, fields in ((self, SOFTCAP_FIELDS), (getattr(self, "logit_softcap", None), ("softcap",))):
            for field in fields:
                if hasattr(holder, field):
                    setattr(holder, field, softcap)

    def return_softcap(self) -> None:
        """Gives the softcap back to the softmax model, whose own head took the place of the mixture."""
        if self.config.softcap is not None and (found := find_softcap_field(self.config)) is not None:
            setattr(*found, self.config.softcap)
            self._set_softcap(self.config.softcap)
            self.config.softcap = None

    def describe_head(self) -> None:
        """Tells transformers about the head: dtypes, parallelism, loss."""
        path = self.head_path()
        self._keep_in_fp32_modules_strict = {*(self._keep_in_fp32_modules_strict or ()), f"{path}.prior"}
        # Quantizers look for the same module by the end of its name, or by the full name of its weight.
        self._keep_in_fp32_modules = {*(self._keep_in_fp32_modules or ()), "prior", f"{path}.prior.weight"}
        # A device map takes the head whole. FSDP wraps such modules by themselves, which a tied weight forbids.
        if not self.config.tie_word_embeddings or self.get_input_embeddings().weight.is_meta:
            self._no_split_modules = {*(self._no_split_modules or ()), MoSLMHead.__name__}
        if self._fsdp_plan and self.config.tie_word_embeddings:  # a tied weight stays with the embedding
            self._fsdp_plan = {name: style for name, style in self._fsdp_plan.items() if name != path}
        self.loss_type = self.loss_type or "ForCausalLM"

    def _expand_parallel_plan(self, plan: dict[str, str]) -> dict[str, str]:
        """Like transformers', but the head itself gathers what the processes of tensor parallelism compute."""
        expanded, path = super()._expand_parallel_plan(plan), self.head_path()
        if f"{path}.weight" in expanded:  # a plan of tensor parallelism, which names weights
            shards = MoSLMHead.shard_of is not None
            return {name: each for name, each in expanded.items() if name != path and (shards or path not in name)}
        return expanded

    def head_path(self) -> str:
        """The name of the head in this model, such as `lm_head`."""
        head = self.get_output_embeddings()
        return next((name for name, module in self.named_modules() if module is head), "output embeddings")

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MoSLMHead):
            module.reset_mixture()

    @classmethod
    def is_custom_code(cls) -> bool:
        """As the softmax model, for transformers' guarded init functions and its conversions of weights."""
        return cls.backbone_class is not None and cls.backbone_class.is_custom_code()

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        made = model_class_for(backbone_class_of(config)) if cls is MoSForCausalLM else cls
        return super(MoSForCausalLM, made)._from_config(config, **kwargs)

    @classmethod
    def from_causal_lm(cls, model: Any, **kwargs: Any) -> Any:
        """Replaces the head of a causal LM with a mixture; `hf_mos.conversion` defines it."""
        raise ImportError("from_causal_lm: expected `import hf_mos`, given the files beside a checkpoint alone")

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
        """Like `PreTrainedModel.save_pretrained`, but atomic: a killed save leaves the old or the new checkpoint.

        The disk must hold both. With sharded weights every process must call this. ValueError where the head is not a
        [`MoSLMHead`], which is what would be loaded.
        """
        head: Any = self.mos_head
        if head is None or not is_own(head):
            expected = f"{self.head_path()}: expected a MoSLMHead, which the files beside the weights define"
            given = type(self.get_output_embeddings() if head is None else head).__name__
            raise ValueError(f"{expected}, given {given}. Save model.state_dict() and the config instead.")
        for name in (*option_defaults(), "softcap"):
            if (made := getattr(head, name)) != (written := getattr(self.config, name)):
                raise ValueError(f"{name}: expected {made} in the config, as in the head, given {written}")
        is_special = getattr(self, "_hf_peft_config_loaded", False) or kwargs.get("distributed_checkpoint")
        weights = {name for name, _ in self.get_output_embeddings().named_parameters()}
        if weights != head.weight_names and state_dict is None and not is_special:
            expected = f"{self.head_path()}: expected the weights {sorted(head.weight_names)}"
            raise ValueError(f"{expected}, which alone can be loaded, given {sorted(weights)}")
        is_native = getattr(self.config, "distributed_config", None) is not None  # transformers gathers the weights
        is_sharded = any(hasattr(parameter, "device_mesh") for parameter in self.parameters())
        gathers = is_sharded and (is_native or state_dict is None)
        if gathers and not is_native:
            state_dict = whole_state_dict(self)
        elif state_dict is None and self.config.tie_word_embeddings and head.weight.is_meta:
            # Offloading parts the tie, and transformers then writes the weight twice.
            tied = f"{self.head_path()}.weight"
            state_dict = {key: value for key, value in self.state_dict().items() if key != tied}
        place = f"{__name__.rpartition('.')[2]}.{PREFIX}{self.backbone_class.__name__}"
        loaders: Any = (transformers.AutoModelForImageTextToText, transformers.AutoModelForMultimodalLM)
        places = {each.__name__: place for each in loaders if self.config.backbone_config_class in each._model_mapping}
        self.config.auto_map = (getattr(self.config, "auto_map", None) or {}) | places
        write = functools.partial(
            super().save_pretrained, state_dict=state_dict, max_shard_size=max_shard_size, variant=variant, token=token
        )
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        is_writer = is_main_process and not (torch.distributed.is_initialized() and torch.distributed.get_rank())
        with own_class(self):
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
        pretrained_model_name_or_path: Any,
        *args: Any,
        config: Any = None,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        use_safetensors: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Like `PreTrainedModel.from_pretrained`, but strict; a softmax model is converted.

        OSError for a file that is missing, cut short or not what its name says. ValueError for a weight that is
        missing, misshapen (unless `ignore_mismatched_sizes`), pickled, or, of the head, not finite or one too many.
        """
        if use_safetensors is False:
            raise ValueError("use_safetensors: expected True or None, as pickled weights are not read, given False")
        if not hasattr(config, "num_mixtures"):
            place = config if isinstance(config, str | os.PathLike) else pretrained_model_name_or_path
            files = {name: kwargs[name] for name in FILE_ARGUMENTS if name in kwargs}
            content, _ = PreTrainedConfig.get_config_dict(place, **files)
            if content.get("model_type") != MoSConfig.model_type:
                kwargs |= {"config": config, "output_loading_info": output_loading_info}
                kwargs |= {"ignore_mismatched_sizes": ignore_mismatched_sizes}
                return cls.from_causal_lm(pretrained_model_name_or_path, *args, **kwargs)
            if isinstance(config, PreTrainedConfig):
                backbone_class_of(config)  # refuses a softmax model's config in words
            models = {name: kwargs.pop(name) for name in MODEL_ARGUMENTS if name in kwargs}
            config, unused = MoSConfig.from_pretrained(place, return_unused_kwargs=True, **kwargs)
            kwargs = unused | files | models
        needed = model_class_for(backbone_class_of(config))
        made = needed if cls is MoSForCausalLM else cls
        if not issubclass(made, needed):
            raise ValueError(f"model: expected the checkpoint of a {made.__name__}, given that of a {needed.__name__}")
        folder = Path(pretrained_model_name_or_path or "", kwargs.get("subfolder", ""))
        headers = {}
        if pretrained_model_name_or_path is not None and folder.is_dir() and kwargs.get("gguf_file") is None:
            headers = check_files(folder, kwargs.get("variant"), getattr(config, "transformers_weights", None))
        kwargs.update(config=config, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True)
        loaded: Any = super(MoSForCausalLM, made).from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model, info = loaded
        check_loaded(model, info, pretrained_model_name_or_path, headers, ignore_mismatched_sizes)  # refuses in words
        if model.config.tie_word_embeddings:
            model._no_split_modules.discard(MoSLMHead.__name__)
        staged = vars(model.config).pop("transformers_weights", None)
        if staged is not None and kwargs.get("generation_config") is None:
            generation_file = PurePosixPath(staged).with_name("generation_config.json")
            if (folder / generation_file).is_file():  # of a save that was interrupted after its weights were written
                model.generation_config = GenerationConfig.from_pretrained(folder, str(generation_file))
        return (model, info) if output_loading_info else model

    @property
    def mos_head(self) -> MoSLMHead | None:
        """The mixture's head, also inside a wrapper such as an adapter; `None` where another head took its place."""
        return find_head(self.get_output_embeddings())

    def _resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        trains = {} if self.mos_head is None else {n: p.requires_grad for n, p in self.mos_head.named_parameters()}
        resized = super()._resize_token_embeddings(*args, **kwargs)
        for name, flag in trains.items():  # transformers gives the whole head the flag of its new weight
            self.mos_head.get_parameter(name).requires_grad_(flag)  # type: ignore[union-attr]
        return resized

    def _get_resized_lm_head(self, old_lm_head: nn.Linear, *args: Any, **kwargs: Any) -> nn.Linear:
        resized = super()._get_resized_lm_head(old_lm_head, *args, **kwargs)
        if not isinstance(old_lm_head, MoSLMHead) or resized is old_lm_head:
            return resized
        old_lm_head.weight, old_lm_head.bias = resized.weight, resized.bias
        old_lm_head.out_features = resized.out_features
        return old_lm_head

    def __getattr__(self, name: str) -> Any:
        found: Any = super().__getattr__(name)
        return HandsOn(found) if role_of(found) == "input" and not isinstance(found, MoSLMHead) else found

    def __setattr__(self, name: str, value: Any) -> None:
        """Like `nn.Module.__setattr__`; a forward of TRL's leaves its options alone, and one of Liger's is refused."""
        function = getattr(value, "__func__", value) if name == "forward" else None
        names = getattr(getattr(function, "__code__", None), "co_varnames", ())
        where = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"
        if "fused_lm_head" not in names and not re.search(r"_ForwardRedirection|^liger_kernel\.", where):
            super().__setattr__(name, value)
        elif self.read_fused_forward is None:
            raise ValueError(f"forward: expected `import hf_mos` before the model is loaded, given {where}")
        else:
            self.score_options = self.read_fused_forward(function)

    def holds(self, module: nn.Module) -> bool:
        """Whether the module is an attribute of this model itself, so that `__getattr__` can replace it."""
        return any(module is child for child in self._modules.values())

    def head_inputs(self, *args: Any, **kwargs: Any) -> Tensor:
        """The hidden states (batch, sequence, D) that the head reads, for the arguments of `forward`."""
        return self._run_layers(**self._by_name(args, kwargs)).logits

    def _run_layers(self, **kwargs: Any) -> Any:
        """The softmax model's own forward, whose head hands on the hidden states as the logits."""
        kwargs = {name: value for name, value in kwargs.items() if value is not None} | {"return_dict": True}
        module: Any = self.get_output_embeddings()
        with role(module if self.holds(module) else find_head(module), "input"):
            return super().forward(**kwargs)

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        names = self.argument_names
        if len(args) > len(names) or kwargs.keys() & {*names[: len(args)]}:
            raise TypeError(f"forward: expected up to {len(names)} positional arguments, each once, given {len(args)}")
        return dict(zip(names, args, strict=False)) | kwargs

    def mix(
        self,
        *,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        hidden_states: Tensor | None = None,
        skip_logits: bool | None = None,
        add_log_partition: bool = False,
        fused_lm_head: bool = False,
        **kwargs: Any,
    ) -> Any:
        """`forward` of all made classes. Returns the softmax model's output class.

        `loss` is in nats per token, plus a mixture-of-experts model's `aux_loss`. A `loss_function` that was assigned,
        and a head that has hooks or a forward of its own, get the logits of all positions, as on the softmax model.
        """
        module: Any = self.get_output_embeddings()
        head = find_head(module)
        assert head is not None
        call: Callable[..., Any] = module if is_transparent(module) else functools.partial(head, decoder=module)
        fuses = not has_foreign_hooks(head) and not has_foreign_hooks(module)
        if type(head).forward is not MoSLMHead.forward or ("forward" in vars(head) and not fuses):
            fuses, call = False, lambda hidden_states, **_: module(hidden_states)
        if labels is not None and self.masks_labels and (mask := kwargs.get("attention_mask")) is not None:
            labels = labels.masked_fill(mask[:, -labels.shape[1] :].to(labels.device) == 0, ignore_index)
        targets: Any = shift(labels, ignore_index) if shift_labels is None and labels is not None else shift_labels
        has_labels = targets is not None
        skips = has_labels and self.training and self.skip_logits_in_training if skip_logits is None else skip_logits
        inputs = [name for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None]
        if hidden_states is not None and inputs:
            raise ValueError(f"hidden_states: expected no {inputs[0]} with it, given both")
        keeps_itself = hidden_states is None and not has_labels and "logits_to_keep" in self.argument_names
        kwargs |= {"logits_to_keep": logits_to_keep} if keeps_itself else {}
        kwargs |= {"use_cache": False} if has_labels and self.config.model_type in DROPS_CACHE_WITH_LABELS else {}
        outputs: Any = self._run_layers(**kwargs) if hidden_states is None else CausalLMOutput(logits=hidden_states)
        states, aux_loss = outputs.logits, getattr(outputs, "aux_loss", None)
        if has_labels and kwargs.get("input_ids") is not None:
            states = states[:, -kwargs["input_ids"].shape[1] :]  # without the image that some models prepend
        if has_labels and targets.numel() == states[..., 0].numel():
            targets = targets.reshape(states.shape[:-1])  # the softmax model's loss flattens labels of any shape
        if fused_lm_head:
            if targets is None:
                raise ValueError("labels: expected labels with fused_lm_head=True, given none")
            scored = slice(-1 if shift_labels is None else None)  # the last position has no target in the batch
            batch = (call, states[:, scored], targets[:, scored], num_items_in_batch, fuses)
            scores = self.score_batch(self.score_options, *batch)
            scores.loss, scores.aux_loss = add_aux_loss(scores.loss, aux_loss, self), aux_loss
            return scores
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        keeps_all = keeps_itself or (isinstance(logits_to_keep, int) and logits_to_keep == 0)
        kept = states if keeps_all else states[:, positions]
        logits = None if skips else call(kept, add_log_partition=add_log_partition)
        loss = of_layers = getattr(outputs, "loss", None)  # such as a router's
        if has_labels:
            targets = targets.to(states.device)
            if not fuses or self.loss_function is not ForCausalLMLoss:
                whole = logits if logits is not None and kept is states else call(states)
                options: dict[str, Any] = {"num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels}
                options |= {name: value for name, value in kwargs.items() if name not in self.argument_names}
                options = {name: value for name, value in options.items() if value is not None}
                options |= {"ignore_index": ignore_index} if ignore_index != -100 else {}
                loss = self.loss_function(logits=whole, labels=labels, vocab_size=whole.shape[-1], **options)
            else:
                options = {"reduction": "sum", "ignore_index": ignore_index}
                if logits is None or kept is not states or add_log_partition or torch.is_grad_enabled():
                    total = call(states, targets=targets, **options)
                else:
                    total = F.nll_loss(logits.flatten(0, -2), targets.flatten(), **options)
                loss = total / count_items(targets, num_items_in_batch, ignore_index)
            loss = add_aux_loss(loss, aux_loss, self) + (0 if of_layers is None else of_layers)
        logits = LEFT_OUT if logits is None and skip_logits is None else logits
        others = {"logits_ngram": None} if hasattr(outputs, "logits_ngram") else {}  # of ProphetNet, for more tokens
        outputs = dataclasses.replace(outputs, loss=loss, logits=logits, **others)
        return outputs if (self.config.return_dict if return_dict is None else return_dict) else outputs.to_tuple()


@functools.cache
def model_class_for(backbone: Any) -> type[MoSForCausalLM]:
    """The class of the mixtures with this softmax model, importable from this module as `MoS` + its name."""
    name = PREFIX + backbone.__name__

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.get_output_embeddings()
        if find_head(module) is None:  # another head took its place: this is a softmax model
            self.return_softcap()
            if self.warns_of_softmax and not torch.compiler.is_compiling():
                self.warns_of_softmax = False
                expected = f"{self.head_path()}: expected a MoSLMHead, given {module}: this is one softmax"
                transformers.logging.get_logger(__name__).warning_once(expected)
        elif is_transparent(module) or self.holds(module):
            return self.mix(**self._by_name(args, kwargs))
        elif hasattr(module, "base_layer"):
            raise ValueError(f"{self.head_path()}: expected no adapter on a head inside another module, given one")
        kwargs = {name: value for name, value in kwargs.items() if name not in OWN_ARGUMENTS}
        return super(MoSForCausalLM, self).forward(*args, **kwargs)

    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = super(MoSForCausalLM, self).prepare_inputs_for_generation(*args, **kwargs)
        return inputs if self.mos_head is None else inputs | {"add_log_partition": True}

    parameters = inspect.signature(backbone.forward).parameters.values()
    named = tuple(each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD))
    members: dict[str, Any] = {"__module__": __name__, "__qualname__": name, "__doc__": MoSForCausalLM.__doc__}
    for ours in (forward, prepare_inputs_for_generation):
        members[ours.__name__] = sign_as(getattr(backbone, ours.__name__), ours)
    asked = ("_can_set_attn_implementation", "_can_set_experts_implementation")
    members |= {name: getattr(backbone, name) for name in asked}  # they read the source of the class's module
    members |= {"backbone_class": backbone, "config_class": config_class_for(backbone.config_class)}
    members |= {"argument_names": named[1:], "masks_labels": "shift_attention_mask" in names_in_forward(backbone)}
    made: Any = type(name, (MoSForCausalLM, backbone), members)
    globals().setdefault(name, made)
    for known, mapping in vars(modeling_auto).items():  # transformers looks up some things by the name of a class
        if known.endswith("_MAPPING_NAMES") and ("FOR_CAUSAL_LM" in known or backbone.__name__ in mapping.values()):
            mapping[name] = name
    if (conversions := get_checkpoint_conversion_mapping(backbone.__name__)) is not None:
        register_checkpoint_conversion_mapping(name, conversions, overwrite=True)
    return made


def sign_as(theirs: Any, ours: Any) -> Any:
    """Gives a function the name and the signature of another, whose arguments it hands on."""
    functools.update_wrapper(ours, theirs)
    ours.__signature__ = inspect.signature(theirs)
    del ours.__wrapped__  # who unwraps it ends here
    return ours


def __getattr__(name: str) -> type[MoSForCausalLM]:
    """Makes the class of the mixtures with a softmax model of transformers: `MoSLlamaForCausalLM`."""
    backbone: Any = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if GenerationMixin not in getattr(backbone, "__mro__", ()):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return model_class_for(backbone)


def backbone_class_of(config: Any) -> Any:
    """The class that `AutoModelForCausalLM` has for the backbone; for one that it does not load, the config's own."""
    if getattr(config, "backbone_config_class", None) is None:  # of the code beside a checkpoint too
        given = type(config).__name__
        raise ValueError(f"config: expected MoSConfig.from_backbone_config(config, num_mixtures=...), given {given}")
    mapping: Any = AutoModelForCausalLM._model_mapping  # type: ignore[attr-defined]
    name = (config.architectures or [""])[0].removeprefix(PREFIX)
    if (found := mapping.get(config.backbone_config_class, None) or getattr(transformers, name, None)) is None:
        raise ValueError(f"architectures: expected a causal LM of transformers, given {config.architectures}")
    return found


def find_head(module: Any) -> MoSLMHead | None:
    """The mixture's head that computes when this module is called."""
    if module is None or isinstance(module, MoSLMHead):
        return module
    if hasattr(module, "modules_to_save"):  # PEFT's copies of a module, one for each adapter
        active = [] if module.disable_adapters else module.active_adapters
        copies = (module.modules_to_save[name] for name in active if name in module.modules_to_save)
        found = find_head(next(copies, module.original_module))
        if found is None and find_head(module.original_module) is not None:
            raise ValueError("ensure_weight_tying: expected False, as its copy of a head is one softmax, given True")
        return found
    return next((each for each in module.modules() if isinstance(each, MoSLMHead)), None)


def is_transparent(module: Any) -> bool:
    """Whether a module hands all arguments to the head in it."""
    names = ("modules_to_save", "_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")
    return isinstance(module, MoSLMHead) or any(hasattr(module, name) for name in names)


class HandsOn:
    """Stands for a module around the head while the layers run: returns its input, and has its attributes."""

    __call__ = staticmethod(hand_on)

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class LogitsLeftOut(tuple):
    """Stands for logits that were not computed: raises where it is used as a tensor, and is moved as a tuple is."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            "logits: expected skip_logits=False in the call of the model, or model.skip_logits_in_training = False, "
            "to read them in training mode with labels; they are left out to save memory"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # as in the question whether it is a named tuple
            raise AttributeError(name)
        self._refuse()

    # A tuple has an answer for these, or raises another error.
    __getitem__ = __add__ = __mul__ = __rmul__ = __truediv__ = __array__ = _refuse  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        return LEFT_OUT._refuse()


LEFT_OUT = LogitsLeftOut()


def shift(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Moves the labels one position to the left, so that each position holds its target."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels: expected integer class indices, given {labels.dtype}")
    return F.pad(labels.long(), (0, 1), value=ignore_index)[..., 1:]


def add_aux_loss(loss: Tensor, aux_loss: Any, model: PreTrainedModel) -> Tensor:
    """Adds a mixture-of-experts model's router loss, if there is one, with the model's own coefficient."""
    if not isinstance(aux_loss, Tensor):
        return loss
    pairs = product((model, model.config.get_text_config()), ("router_aux_loss_coef", "aux_loss_coef"))
    coefficient = next(getattr(holder, name) for holder, name in pairs if hasattr(holder, name))
    return loss + coefficient * aux_loss.to(loss.device)


def names_in_forward(backbone: type[PreTrainedModel]) -> set[str]:
    """The names of all variables and attributes in a model's forward."""
    codes = [inspect.unwrap(vars(base)["forward"]).__code__ for base in backbone.__mro__ if "forward" in vars(base)]
    return {name for code in codes for name in (*code.co_names, *code.co_varnames)}
