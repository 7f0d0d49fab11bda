"""How the head uses its decoder: it reads the weight, gathers it, holds a vocabulary shard of it, or calls the module.

Each use has the same three methods: `log_probs`, `loss` and `scores`. [`use_of`] chooses one for a decoder.
"""

from collections.abc import Callable
from typing import Any, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .mos_chunks import AUTOGRAD_BYTES_PER_LOGIT, tokens_per_chunk
from .mos_latents import Latents, latents_of
from .mos_log_probs import infer_log_probs, mix_log_probs, reduce
from .mos_loss import mos_cross_entropy
from .mos_matmul import is_hooked, is_transformed, may_read
from .mos_token_scores import ScoreOptions, Scores, score, token_scores
from .mos_vocabulary import VocabularyShard

ENGINES = ("torch.distributed.fsdp.", "deepspeed.")  # modules whose hooks gather a weight
TENSOR_PARALLEL = "tp"  # a mesh's name for the dimension that shards the vocabulary


class Reduction(TypedDict, total=False):
    """As in `mos_cross_entropy`."""

    reduction: str
    ignore_index: int
    chunk_size: int | None


class CalledDecoder:
    """Calls the decoder, as an adapter, a quantizer or a hook makes its weight alone incomplete.

    Autograd makes the gradients, a chunk of tokens at a time; the backward pass computes each chunk again.
    """

    def __init__(self, decoder: Any, softcap: float | None) -> None:
        self.decoder, self.softcap = decoder, softcap

    def log_probs(self, latents: Latents, prior_logits: Tensor, add_log_partition: bool = False) -> Tensor:
        """Equivalent to: `mos_log_probs(latents, prior_logits, decoder.weight)`."""
        log_weights, component_logits = latents.components(self.decoder, prior_logits, self.softcap)
        return mix_log_probs(component_logits, log_weights, add_log_partition)

    def loss(self, latents: Latents, prior_logits: Tensor, targets: Tensor, **options: Unpack[Reduction]) -> Tensor:
        """Equivalent to: `mos_cross_entropy(latents, prior_logits, decoder.weight, targets)`."""

        def chunk_nll(latents: Latents, prior_logits: Tensor, targets: Tensor) -> Tensor:
            log_probs = self.log_probs(latents, prior_logits)
            return F.nll_loss(log_probs, targets, ignore_index=options["ignore_index"], reduction="none")

        nll = torch.cat(self._in_chunks(chunk_nll, options["chunk_size"], latents, prior_logits, targets))
        return reduce(nll, targets != options["ignore_index"], options["reduction"])

    def scores(self, latents: Latents, prior_logits: Tensor, targets: Tensor, options: ScoreOptions) -> Scores:
        """Equivalent to: `score(self.log_probs(latents, prior_logits), targets, options)`."""

        def chunk_scores(latents: Latents, prior_logits: Tensor, targets: Tensor) -> Scores:
            return score(self.log_probs(latents, prior_logits), targets, options)

        parts = self._in_chunks(chunk_scores, None, latents, prior_logits, targets)
        return tuple(None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True))

    def _in_chunks(
        self,
        function: Callable[..., Any],
        chunk_size: int | None,
        latents: Latents,
        prior_logits: Tensor,
        targets: Tensor,
    ) -> list[Any]:
        (N, K), form = prior_logits.shape, latents.form

        def in_chunk(prior_logits: Tensor, targets: Tensor, *tensors: Tensor) -> Any:
            return function(latents_of(form, tensors), prior_logits, targets)

        # Not every adapter names its width.
        V = self.decoder.out_features if hasattr(self.decoder, "out_features") else self.decoder.weight.shape[0]
        size = chunk_size or tokens_per_chunk(K, V, AUTOGRAD_BYTES_PER_LOGIT, targets.device)
        chunks = (slice(start, start + size) for start in range(0, max(N, 1), size))
        return [
            checkpoint(in_chunk, prior_logits[part], targets[part], *latents[part].tensors, use_reentrant=False)
            for part in chunks
        ]


class FollowedDecoder(CalledDecoder):
    """Calls the decoder for all tokens at once, in operations that torch.func, tracing and the like can follow."""

    def _in_chunks(self, function: Callable[..., Any], chunk_size: int | None, *inputs: Any) -> list[Any]:
        return [function(*inputs)]


class ReadDecoder(CalledDecoder):
    """Reads the decoder's weight: the fused loss, and its kin for log-probabilities and scores."""

    def log_probs(self, latents: Latents, prior_logits: Tensor, add_log_partition: bool = False) -> Tensor:
        weight, bias = self.decoder.weight.to(latents.dtype), self.decoder.bias
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            log_weights, logits = latents.read_components(weight, bias, prior_logits, self.softcap)
            return mix_log_probs(logits, log_weights, add_log_partition)
        options: dict[str, Any] = {"softcap": self.softcap, "add_log_partition": add_log_partition}
        return infer_log_probs(latents, prior_logits, weight, decoder_bias=bias, **options)

    def loss(self, latents: Latents, prior_logits: Tensor, targets: Tensor, **options: Unpack[Reduction]) -> Tensor:
        weight, bias = self.decoder.weight, self.decoder.bias
        return mos_cross_entropy(
            latents, prior_logits, weight, targets, decoder_bias=bias, softcap=self.softcap, **options
        )

    def scores(self, latents: Latents, prior_logits: Tensor, targets: Tensor, options: ScoreOptions) -> Scores:
        weight, bias = self.decoder.weight, self.decoder.bias
        return token_scores(latents, prior_logits, weight, targets, options, decoder_bias=bias, softcap=self.softcap)


class ShardedDecoder(CalledDecoder):
    """Reads the rows of this process's vocabulary shard (tensor parallelism); the processes share the softmax."""

    def loss(self, latents: Latents, prior_logits: Tensor, targets: Tensor, **options: Unpack[Reduction]) -> Tensor:
        weight, bias = self.decoder.weight, self.decoder.bias
        return mos_cross_entropy(
            latents,
            prior_logits,
            weight.to_local(),
            targets,
            decoder_bias=None if bias is None else bias.to_local(),
            softcap=self.softcap,
            shard=_shard_of(weight),
            **options,
        )


class GatheredDecoder(CalledDecoder):
    """Reads the weight between the hooks that gather it around the decoder's forward (FSDP2, ZeRO-3).

    The loss runs in place of that forward: it sees the gathered weight, and the engine sees when the weight is needed.
    """

    def loss(self, latents: Latents, prior_logits: Tensor, targets: Tensor, **options: Unpack[Reduction]) -> Tensor:
        form = latents.form

        def loss_of(*tensors: Tensor) -> Tensor:
            use = ShardedDecoder if hasattr(self.decoder.weight, "device_mesh") else ReadDecoder
            gathered = use(self.decoder, self.softcap)
            return gathered.loss(latents_of(form, tensors), prior_logits, targets, **options)

        return _call_as(self.decoder, loss_of, *latents.tensors)


def use_of(decoder: nn.Module, softcap: float | None) -> CalledDecoder:
    """The cheapest use that this decoder allows."""
    if is_transformed():
        return FollowedDecoder(decoder, softcap)
    if may_read(decoder):
        return ReadDecoder(decoder, softcap)
    is_linear = type(decoder).forward is nn.Linear.forward and not hasattr(decoder, "_hf_hook")
    if not is_linear or torch.compiler.is_compiling():
        return CalledDecoder(decoder, softcap)
    weight: Any = decoder.weight
    if type(getattr(weight, "_local_tensor", weight)) not in (nn.Parameter, Tensor):
        return CalledDecoder(decoder, softcap)
    hooks = [*decoder._forward_pre_hooks.values(), *decoder._forward_hooks.values()]
    if hooks and all((getattr(hook, "__module__", None) or "").startswith(ENGINES) for hook in hooks):
        return GatheredDecoder(decoder, softcap)
    shards = _is_sharded(weight) and not is_hooked(decoder)
    return ShardedDecoder(decoder, softcap) if shards else CalledDecoder(decoder, softcap)


def device_of(decoder: nn.Module) -> torch.device:
    """The device that computes with the decoder; an offloaded weight lies on the meta device between two calls."""
    hook = getattr(decoder, "_hf_hook", None)  # accelerate's
    devices = [getattr(each, "execution_device", None) for each in getattr(hook, "hooks", [hook])]
    executing = next((device for device in devices if device is not None), None)
    weight: Any = decoder.weight
    return weight.device if executing is None else torch.device(executing)


def _call_as(decoder: nn.Module, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Computes `function(*inputs)` in place of the decoder's forward, between its hooks."""
    own = vars(decoder).get("forward")
    results = []

    def forward(*inputs: Tensor) -> Tensor:
        results.append(function(*inputs))
        return results[0]

    decoder.forward = forward
    try:
        output = decoder(*inputs)
    finally:
        del decoder.forward
        if own is not None:
            decoder.forward = own
    # FSDP2 hooks the result itself. Its mixed precision rounds what the module returns, which would round the loss.
    return output if output.dtype == results[0].dtype else results[0]


def _is_sharded(weight: Any) -> bool:
    """Whether the weight is sharded over the vocabulary, and over nothing else."""
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None or mesh.mesh_dim_names != (TENSOR_PARALLEL,) or not weight.placements[0].is_shard(0):
        return False
    return (mesh.size() - 1) * _classes_per_process(weight) < weight.shape[0]  # every process holds a class


def _classes_per_process(weight: Any) -> int:
    return -(-weight.shape[0] // weight.device_mesh.size())


def _shard_of(weight: Any) -> VocabularyShard:
    if not _is_sharded(weight):
        raise ValueError(
            f"lm_head.decoder.weight: expected it sharded over the vocabulary on a mesh of one dimension, "
            f"{TENSOR_PARALLEL!r}, given {weight.placements} on {weight.device_mesh}"
        )
    mesh = weight.device_mesh
    return VocabularyShard(weight.shape[0], mesh.get_local_rank() * _classes_per_process(weight), mesh.get_group())
