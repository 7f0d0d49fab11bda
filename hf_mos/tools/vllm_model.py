"""The mixture's head in vLLM: each model of vLLM, with its head replaced by a mixture of softmaxes.

`MoSLlamaForCausalLM` and the like are made when they are asked for: vLLM's own class behind [`Mixture`]. vLLM's
logits processor computes the logits of every architecture, so a mixture's takes its place. It returns
log-probabilities on the scale of the softmax's logits (`mix_log_probs`), whose softmax is the mixture. So all that
vLLM does with logits is right: sampling, penalties, masks, log-probabilities.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.transformers.causal import CausalMixin

from ..remote_code.configuration_mos import PREFIX
from ..remote_code.mos_checkpoint import non_finite
from ..remote_code.mos_head import MoSLMHead
from ..remote_code.mos_log_probs import infer_log_probs
from ..training.tensor_parallel import VocabularyShard
from .vllm_plugin import VLLM_VERSION

if not hasattr(LogitsProcessor, "_apply_head"):
    raise ImportError(f"vllm: expected LogitsProcessor._apply_head, as {VLLM_VERSION} has it, given none")

HEAD = "lm_head."  # in every architecture that vLLM has


class MixtureLogits(LogitsProcessor):
    """vLLM's logits processor with a mixture as its head.

    Args:
        native: the processor of the model's own head.
        config: the one that vLLM sees (`served_config`).
        decoder: the vocabulary projection, of which each process holds a shard under tensor parallelism.
        source: the checkpoint, for messages.
    """

    def __init__(
        self, native: LogitsProcessor, config: PreTrainedConfig, decoder: ParallelLMHead, source: str
    ) -> None:
        # A linear scale of the logits reaches the head with the hidden states. A softcap acts in each component.
        super().__init__(native.vocab_size, native.org_vocab_size)
        self.hidden_scale = native.scale
        # Of the prior and the shift, which do not depend on the number of classes. The model holds the decoder.
        like = nn.Linear(decoder.embedding_dim, 1, bias=False, dtype=native.head_dtype)
        self.mixture = MoSLMHead.take_over(
            like,
            num_mixtures=config.num_mixtures,
            shortlist_size=config.shortlist_size,
            shift_rank=config.shift_rank,
            latent_scale=config.latent_scale,
            softcap=native.soft_cap,
        ).requires_grad_(False)
        del self.mixture.weight
        self.decoder = (decoder,)
        self.is_tied, self.source = config.tie_word_embeddings, source
        self.renamings = renamings_of(config)
        self.is_loaded = self.may_have_bias = False
        self.vocabulary = None
        if decoder.tp_size > 1:
            start = decoder.shard_indices.org_vocab_start_index
            self.vocabulary = VocabularyShard(decoder.org_vocab_size, start, get_tp_group().device_group)

    def _apply_head(self, lm_head: Any, hidden_states: Tensor, embedding_bias: Tensor | None) -> Tensor:
        """Computes the logits of the classes that this process holds; -inf for the rows that pad them."""
        (decoder,) = self.decoder
        num_classes = decoder.shard_indices.num_org_elements
        if self.hidden_scale != 1:
            hidden_states = hidden_states * self.hidden_scale
        leading = hidden_states.shape[:-1]
        hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
        mixture, dtype = self.mixture, self.mixture.shift.weight.dtype
        hidden_states = hidden_states.to(dtype)
        latents = mixture.latents if mixture.shortlist_size is None else mixture.mean_and_offsets
        logits = infer_log_probs(
            latents(hidden_states),
            mixture.prior_logits(hidden_states),
            decoder.weight[:num_classes].to(dtype),
            shortlist_size=mixture.shortlist_size,
            decoder_bias=None if decoder.bias is None else decoder.bias[:num_classes].to(dtype),
            softcap=mixture.softcap,
            add_log_partition=True,
            vocabulary=self.vocabulary,
            matmul=self.multiply if dtype == decoder.weight.dtype else None,
        )
        if padding := decoder.num_embeddings_per_partition - num_classes:
            logits = F.pad(logits, (0, padding), value=float("-inf"))
        return logits.unflatten(0, leading)

    def multiply(self, rows: Tensor) -> Tensor:
        """The decoder's logits by vLLM's own matmul, which has the weight packed on the CPU; without padding."""
        (decoder,) = self.decoder
        logits = decoder.quant_method.apply(decoder, rows, bias=decoder.bias)
        return logits[:, : decoder.shard_indices.num_org_elements].contiguous()

    def tensors(self) -> dict[str, tuple[nn.Parameter, tuple[int, ...]]]:
        """The head's tensors by their names in a checkpoint, each with its shape there."""
        (decoder,) = self.decoder
        tensors = {f"{HEAD}{name}": (p, tuple(p.shape)) for name, p in self.mixture.named_parameters()}
        if not self.is_tied:
            tensors[f"{HEAD}weight"] = (decoder.weight, (decoder.org_vocab_size, decoder.embedding_dim))
        if decoder.bias is not None:
            tensors[f"{HEAD}bias"] = (decoder.bias, (decoder.org_vocab_size,))
        return tensors

    def load(self, weights: Iterable[tuple[str, Tensor]], loaded: set[str]) -> Iterator[tuple[str, Tensor]]:
        """Loads the head's tensors of a checkpoint, adds their names to `loaded`, and returns all others.

        Raises:
            ValueError: a tensor of the head is missing, one too many, of another shape than the config says, or not
                finite.
        """
        tensors = self.tensors()
        for name_in_file, tensor in weights:
            name = name_in_file
            for renaming in self.renamings:
                name, _ = renaming.rename_source_key(name)
            if not name.startswith(HEAD):
                yield name_in_file, tensor
                continue
            if name == f"{HEAD}weight" and self.is_tied:
                continue
            if name == f"{HEAD}bias" and name not in tensors and self.may_have_bias:
                (decoder,) = self.decoder
                with decoder.weight.device:
                    decoder._register_bias()
                tensors = self.tensors()
            if name not in tensors:
                raise ValueError(f"{self.source}: expected the weights that the config names, given {name} too")
            parameter, shape = tensors[name]
            if tuple(tensor.shape) != shape:
                given = tuple(tensor.shape)
                raise ValueError(f"{self.source}: {name}: expected {shape}, as the config says, given {given}")
            if (bad := non_finite(tensor)) is not None:
                raise ValueError(f"{self.source}: {name}: expected finite values, given {bad}")
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)
            loaded.add(name)
        if not self.is_loaded and (missing := tensors.keys() - loaded):
            expected = ", ".join(f"{name} of shape {tensors[name][1]}" for name in sorted(missing))
            raise ValueError(f"{self.source}: expected the checkpoint of a mixture, given one without {expected}")
        self.is_loaded = True  # parts may follow, as training beside the server sends them


class Mixture:
    """Put before a model class of vLLM, this gives it the head of a mixture.

    Raises:
        ValueError: the model cannot be served, or its checkpoint is broken.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        stages = vllm_config.parallel_config.pipeline_parallel_size
        if stages != 1:
            raise ValueError(f"pipeline_parallel_size: expected 1 for a mixture, given {stages}")
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]  # vLLM's class is behind
        model: Any = self
        config = vllm_config.model_config.hf_config
        num_classes = config.get_text_config().vocab_size
        path, native = the_one(model, LogitsProcessor)
        if type(native) is not LogitsProcessor or native.org_vocab_size != num_classes:
            raise ValueError(
                f"{type(self).__name__}: expected vLLM's own LogitsProcessor of {num_classes} classes, given "
                f"{type(native).__name__} of {native.org_vocab_size}"
            )
        decoder = replace_decoder(model, config)
        check_logits_are_final(model, native, decoder.embedding_dim)
        logits = MixtureLogits(native, config, decoder, vllm_config.model_config.model)
        logits.is_loaded = vllm_config.load_config.load_format == "dummy"
        logits.may_have_bias = isinstance(model, CausalMixin)  # which learns of a bias by the checkpoint alone
        model.set_submodule(path, logits)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str] | None:
        """Loads a checkpoint of `MoSForCausalLM`; returns the names of the parameters that it filled."""
        model: Any = self
        _, logits = the_one(model, MixtureLogits)
        loaded_head: set[str] = set()
        loaded = super().load_weights(logits.load(weights, loaded_head))  # type: ignore[misc]
        if loaded is None:
            return None
        filled = {id(logits.tensors()[name][0]) for name in loaded_head}
        return loaded | {name for name, parameter in model.named_parameters() if id(parameter) in filled}


def the_one(model: nn.Module, kind: type[nn.Module]) -> tuple[str, Any]:
    """The path and the module of this kind in the model.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, kind)]
    if len(found) != 1:
        raise ValueError(f"{type(model).__name__}: expected one {kind.__name__}, given {len(found)}")
    return found[0]


def check_logits_are_final(model: Any, native: LogitsProcessor, width: int) -> None:
    """Raises a ValueError where the model changes its logits after the processor: log-probabilities must stay."""

    def numbers(lm_head: VocabParallelEmbedding, *_: Any) -> Tensor:
        count = lm_head.num_embeddings_per_partition
        return -(lm_head.tp_rank * count + torch.arange(count)).float().unsqueeze(0)

    scale, softcap = native.scale, native.soft_cap
    native.scale, native.soft_cap, native._apply_head = 1.0, None, numbers
    logits = model.compute_logits(torch.zeros(1, width))
    native.scale, native.soft_cap = scale, softcap
    del native._apply_head
    # Under tensor parallelism only one process may have them.
    if logits is not None and not torch.equal(logits[0], -torch.arange(native.org_vocab_size).float()):
        raise ValueError(f"{type(model).__name__}: expected a model that returns what its LogitsProcessor computes")


def replace_decoder(model: nn.Module, config: PreTrainedConfig) -> ParallelLMHead:
    """Returns the mixture's decoder, put in the place of the model's own head, which may be quantized or missing."""
    heads = {path: module for path, module in model.named_modules() if isinstance(module, ParallelLMHead)}
    text_config = config.get_text_config()
    D, V = next((head.embedding_dim for head in heads.values()), text_config.hidden_size), text_config.vocab_size
    has_bias = any(head.bias is not None for head in heads.values())
    decoder = ParallelLMHead(V, D, bias=has_bias, prefix="lm_head")
    if config.tie_word_embeddings:
        decoder = decoder.tie_weights(input_embedding(model, V, D))
    for path in heads or ["lm_head"]:
        model.set_submodule(path, decoder)
    return decoder


def input_embedding(model: nn.Module, num_classes: int, size: int) -> VocabParallelEmbedding:
    """The embedding that a tied decoder shares.

    Raises:
        ValueError: there is not one of that shape, or vLLM quantizes it.
    """
    found = [
        module
        for module in model.modules()
        if isinstance(module, VocabParallelEmbedding)
        and not isinstance(module, ParallelLMHead)
        and (module.org_vocab_size, module.embedding_dim) == (num_classes, size)
    ]
    if len(found) != 1 or not isinstance(found[0].quant_method, UnquantizedEmbeddingMethod):
        kinds = ", ".join(type(module.quant_method).__name__ for module in found) or "none"
        raise ValueError(
            f"tie_word_embeddings: expected one embedding of shape {(num_classes, size)} that is not quantized, "
            f"given {kinds}"
        )
    return found[0]


def renamings_of(config: PreTrainedConfig) -> list[WeightRenaming]:
    """The names in a checkpoint that transformers changes for this backbone, also those of the head: `embed_out`."""
    names = [*reversed(config.architectures or []), config.model_type]
    mappings: list[Any] = [get_checkpoint_conversion_mapping(name) for name in names]
    transforms: list[Any] = next((mapping for mapping in mappings if mapping is not None), [])
    return [transform for transform in transforms if isinstance(transform, WeightRenaming)]


def __getattr__(name: str) -> type[nn.Module]:
    """Makes the class of an architecture with a mixture."""
    native_name = name.removeprefix(PREFIX)
    if native_name == name or native_name not in ModelRegistry.models:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    native: Any = ModelRegistry.models[native_name].load_model_cls()
    globals()[name] = type(name, (Mixture, native), {"__module__": __name__})
    return globals()[name]
