"""The fused loss with a decoder that several processes share.

Where weights are sharded over the data-parallel processes (FSDP2, ZeRO-3), an engine gathers a weight in hooks around
the forward of its module. The loss takes the place of the decoder's own forward there, so that it sees the weight
whole, and the engine sees when it is needed.

Where the vocabulary is sharded (tensor parallelism), the weight stays what it is, and the processes share the softmax:
see `mos_vocabulary.py`.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .mos_latents import SubspaceLatents
from .mos_loss import mos_cross_entropy
from .mos_vocabulary import VocabularyShard

ENGINES = ("torch.distributed.fsdp.", "deepspeed.")  # where hooks that gather a weight are defined
TENSOR_PARALLEL = "tp"  # what a mesh calls the dimension that shares the vocabulary


def is_shared(decoder: nn.Module) -> bool:
    """Whether this is a plain projection whose weight several processes share in a way that the fused loss knows."""
    if type(decoder).forward is not nn.Linear.forward or hasattr(decoder, "_hf_hook"):
        return False
    weight = decoder.weight
    is_plain = type(getattr(weight, "_local_tensor", weight)) in (nn.Parameter, Tensor)
    hooks = _hooks(decoder)
    is_gathered = bool(hooks) and all((getattr(hook, "__module__", None) or "").startswith(ENGINES) for hook in hooks)
    return is_plain and (is_gathered or (not hooks and _holds_classes(weight)))


def shared_cross_entropy(
    decoder: Any, latents: Tensor | SubspaceLatents, prior_logits: Tensor, targets: Tensor, **options: Any
) -> Tensor:
    """Equivalent to: `mos_cross_entropy(latents, prior_logits, decoder.weight, targets, **options)`.

    Args:
        decoder: a projection that [`is_shared`].
        latents, prior_logits, targets, options: as in `mos_cross_entropy`.
    """

    def loss(*tensors: Tensor) -> Tensor:
        latents = tensors[0] if len(tensors) == 1 else SubspaceLatents(*tensors)
        weight, bias, shard = decoder.weight, decoder.bias, None
        if hasattr(weight, "device_mesh"):
            shard = _shard(weight)
            weight, bias = (None if tensor is None else tensor.to_local() for tensor in (weight, bias))
        return mos_cross_entropy(latents, prior_logits, weight, targets, decoder_bias=bias, shard=shard, **options)

    tensors = latents if isinstance(latents, SubspaceLatents) else (latents,)
    return _call_as(decoder, loss, *tensors) if _hooks(decoder) else loss(*tensors)


def _call_as(decoder: nn.Module, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function(*inputs)` in the place of the decoder's forward, between its hooks."""
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
    # FSDP2's hooks are on the result itself. Its mixed precision rounds what it returns, which would be the loss.
    return output if output.dtype == results[0].dtype else results[0]


def _hooks(module: nn.Module) -> list[Any]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def _holds_classes(weight: Any) -> bool:
    """Whether the weight is sharded over the vocabulary, and by nothing else."""
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None or mesh.mesh_dim_names != (TENSOR_PARALLEL,) or not weight.placements[0].is_shard(0):
        return False
    return (mesh.size() - 1) * _classes_per_process(weight) < weight.shape[0]  # nobody is left without a class


def _classes_per_process(weight: Any) -> int:
    return -(-weight.shape[0] // weight.device_mesh.size())


def _shard(weight: Any) -> VocabularyShard:
    if not _holds_classes(weight):
        raise ValueError(
            f"lm_head.decoder.weight: expected it sharded over the vocabulary on a mesh of one dimension, "
            f"{TENSOR_PARALLEL!r}, given {weight.placements} on {weight.device_mesh}"
        )
    mesh = weight.device_mesh
    return VocabularyShard(weight.shape[0], mesh.get_local_rank() * _classes_per_process(weight), mesh.get_group())
