"""The loss of the mixture of softmaxes at the cost of its matrix products.

    N tokens, n of them in a chunk, K mixtures, V classes
    component_nll    = logsumexp_V(component_logits) - component_logits[target]        (n, K)
    nll              = -logsumexp_K(log_prior - component_nll)                         (n,)
    responsibilities = softmax_K(log_prior - component_nll)                            (n, K)
    d component_logits = responsibilities_k * (softmax(component_logits_k) - onehot)   (n, K, V), never stored whole
    d prior_logits     = softmax(prior_logits) - responsibilities                      (n, K)

The gradients of a chunk need nothing beyond its own forward pass, in one reused buffer of (n K, V). So autograd's
forward pass makes them and its backward pass hands them over. A training step is three matmuls of (N K) x E x V, two
where the decoder is frozen, one without gradients.
"""

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .mos_chunks import ChunkBuffers, split, split_again
from .mos_latents import Latents, as_latents, latents_of, per_token
from .mos_log_probs import REDUCTIONS, check_shapes, divisor, reduce
from .mos_projections import DecoderUse, Wanted
from .mos_vocabulary import VocabularyShard, WholeVocabulary

T = TypeVar("T")


def mos_cross_entropy(
    latents: Tensor | Latents,
    prior_logits: Tensor,
    decoder_weight: Tensor,
    targets: Tensor,
    *,
    decoder_bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_size: int | None = None,
    shard: VocabularyShard | None = None,
) -> Tensor:
    """Equivalent to: `F.nll_loss(mos_log_probs(latents, prior_logits, decoder_weight), targets)`.

    Exact, in log space, and without an (N, K, V) or (N, V) tensor. Under autocast the matmuls run in its dtype.

    Args:
        latents: (N, K, E), one latent for each token and component, or [`Latents`] that stand for them.
        prior_logits: (N, K), the raw output of the prior.
        decoder_weight: (V, E), the vocabulary projection that all components share.
        targets: (N,), integer class indices, or `ignore_index`.
        decoder_bias: (V,), or `None`.
        softcap: each component's logits become `softcap * tanh(logits / softcap)`; `None` for none.
        ignore_index: targets of this value have no loss and no gradient, and cost nothing.
        reduction: `"mean"` over the targets that are not ignored, `"sum"`, or `"none"`. With `"none"` the backward
            pass computes the component logits again, as their gradients are weighted token by token.
        chunk_size: tokens in a chunk. `None`: as many as a budget of bytes allows, which follows the device's memory.
        shard: the vocabulary shard whose rows `decoder_weight` and `decoder_bias` hold. Each process gets the loss
            over the whole vocabulary and the whole gradient of the latents and the prior logits. `None`: they hold
            all rows.

    Returns:
        The negative log-likelihood in nats, in fp32 (fp64 for fp64): a scalar, or (N,) for `"none"`, zero where
        ignored. If every target is ignored, zero with zero gradients. Differentiable once.

    Raises:
        ValueError: shapes or dtypes do not fit together, a target is out of range (on the CPU; other devices assert),
            or an option is unknown.

    Source: Yang et al. 2018, arXiv 1711.03953, section 2.3; gradients in the forward pass as in Liger's fused linear
    cross-entropy, arXiv 2410.10989.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, given {reduction!r}")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size: expected an int of at least 1, or None, given {chunk_size!r}")
    inputs = LossInputs(prior_logits, decoder_weight, decoder_bias, as_latents(latents))
    _check_inputs(inputs, targets, ignore_index, decoder_weight.shape[0] if shard is None else shard.num_classes)
    options = LossOptions(softcap, ignore_index, chunk_size, work_dtype_of(inputs.latents), shard)
    if torch.compiler.is_compiling() and shard is None:
        return _call_operator(inputs, targets, options, reduction)
    tensors = inputs.flat()
    if not torch.is_grad_enabled():  # autograd would still say that gradients are needed
        tensors = tuple(None if x is None else x.detach() for x in tensors)
    return MoSCrossEntropy.apply(options, reduction, inputs.latents.form, targets, *tensors)


class LossInputs(NamedTuple):
    """The inputs of the loss that can have gradients; `flat` is their order for autograd."""

    prior_logits: Tensor  # (N, K)
    decoder_weight: Tensor  # (V, E)
    decoder_bias: Tensor | None  # (V,)
    latents: Latents  # of (N, K, E)

    def flat(self) -> tuple[Tensor | None, ...]:
        return (self.prior_logits, self.decoder_weight, self.decoder_bias, *self.latents.tensors)

    @classmethod
    def read(cls, form: str, flat: Sequence[Any]) -> "LossInputs":
        prior_logits, decoder_weight, decoder_bias, *latents = flat
        return cls(prior_logits, decoder_weight, decoder_bias, latents_of(form, latents))


class ForEachInput(NamedTuple, Generic[T]):
    """One entry for each tensor of [`LossInputs`], in its order: a gradient, or whether a gradient is wanted."""

    prior_logits: T
    decoder_weight: T
    decoder_bias: T
    latents: tuple[T, ...]

    def flat(self) -> tuple[T, ...]:
        return (self.prior_logits, self.decoder_weight, self.decoder_bias, *self.latents)

    @classmethod
    def read(cls, flat: Sequence[T]) -> "ForEachInput[T]":
        prior_logits, decoder_weight, decoder_bias, *latents = flat
        return cls(prior_logits, decoder_weight, decoder_bias, tuple(latents))


Gradients = ForEachInput[Tensor | None]


class LossOptions(NamedTuple):
    softcap: float | None
    ignore_index: int
    chunk_size: int | None
    work_dtype: torch.dtype  # of the matmuls
    shard: VocabularyShard | None = None  # the shard whose rows the decoder holds; `None`: it holds all rows


@torch.no_grad()
def loss_and_gradients(
    inputs: LossInputs,
    targets: Tensor,
    options: LossOptions,
    wanted: ForEachInput[bool] | None = None,
    token_weights: Tensor | None = None,
) -> tuple[Tensor, Gradients]:
    """Computes each token's nll (N,), and the `wanted` gradients of the sum of `token_weights` (N,) times nll.

    The gradients of `per_token` latents are in `work_dtype`, all others in fp32 or wider.
    """
    work_dtype = options.work_dtype
    wanted = wanted or ForEachInput.read([False] * len(inputs.flat()))
    wants_gradients = any(wanted.flat())
    N, V, device = inputs.prior_logits.shape[0], inputs.decoder_weight.shape[0], inputs.prior_logits.device
    vocabulary = WholeVocabulary(V) if options.shard is None else options.shard
    sum_dtype = torch.promote_types(inputs.latents.dtype, torch.float32)
    with torch.autocast(device.type, enabled=False):
        latents, weight = inputs.latents.to(work_dtype), inputs.decoder_weight.to(work_dtype)
        bias = None if inputs.decoder_bias is None else inputs.decoder_bias.to(work_dtype)
        log_prior = F.log_softmax(inputs.prior_logits.to(sum_dtype), dim=-1)
        decoder = DecoderUse(weight, bias, options.softcap, vocabulary, sum_dtype)
        projection = latents.projection(log_prior, decoder, Wanted(wanted.latents, wanted.decoder_weight))
        log_weights = projection.log_weights
        K = log_weights.shape[1]
        nll = torch.zeros(N, dtype=sum_dtype, device=device)
        d_prior = torch.zeros_like(log_prior) if wanted.prior_logits else None
        d_bias = torch.zeros(V, dtype=sum_dtype, device=device) if wanted.decoder_bias else None

        kept = (targets != options.ignore_index).nonzero().squeeze(1)
        buffers = ChunkBuffers.allocate(
            kept.shape[0],
            K,
            vocabulary.num_classes,
            weight,
            sum_dtype,
            has_slope=options.softcap is not None and wants_gradients,
            trains_decoder=wanted.decoder_weight,
            shared_share=projection.shared_share,
            chunk_size=options.chunk_size,
        )
        for group in split(kept, buffers.group_size, of=N):
            projection.open(group, buffers.group_size)
            for tokens, place in split_again(group, buffers.size):
                target_rows = targets[tokens].long().repeat_interleave(K).unsqueeze(1)  # (n K, 1)
                logits, half, slope = buffers.rows(target_rows.shape[0])  # (n K, V) each
                projection.logits(tokens, place, logits, half, slope)
                component_nll = vocabulary.softmax_(logits, target_rows).view(-1, K)
                log_joint = log_weights[tokens] - component_nll
                chunk_nll = -torch.logsumexp(log_joint, dim=-1, keepdim=True)
                nll[tokens] = chunk_nll.squeeze(1)
                if not wants_gradients:
                    continue
                responsibilities = torch.exp(log_joint + chunk_nll)  # (n, K)
                token_weight = 1.0 if token_weights is None else token_weights[tokens].to(sum_dtype).unsqueeze(1)
                row_weights = (responsibilities * token_weight).view(-1, 1)  # (n K, 1)
                error = vocabulary.subtract_targets_(logits, target_rows)
                error = projection.through_cap(error, slope, row_weights)
                if d_prior is not None:
                    d_prior[tokens] = projection.d_prior_logits(tokens, responsibilities) * token_weight
                if d_bias is not None:
                    d_bias.addmv_(error.t(), row_weights.squeeze(1))
                if work_dtype == sum_dtype:
                    projection.backward(tokens, place, error, row_weights)
                else:
                    projection.backward(tokens, place, torch.mul(error, row_weights, out=half), None)
            if wants_gradients:
                projection.close(group)
        d_latents, d_weight = projection.gradients()
        for gradient in d_latents:
            vocabulary.sum_(gradient)
        return nll, ForEachInput(d_prior, d_weight, d_bias, d_latents)


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Like torch's `once_differentiable`, but raises where a second derivative is asked for.

    torch's raises only if the incoming gradient requires one itself. Else the second derivative is silently wrong.
    """

    def checked(ctx: Any, *d_outputs: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph: expected False, as the loss with labels is differentiable once, given True. "
                "Compute the loss from outputs.logits to differentiate it twice."
            )
        return backward(ctx, *d_outputs)

    return checked


class MoSCrossEntropy(torch.autograd.Function):
    """`mos_cross_entropy` without its checks."""

    @staticmethod
    def forward(
        ctx: Any, options: LossOptions, reduction: str, form: str, targets: Tensor, *tensors: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(targets, *tensors)
        ctx.options, ctx.reduction, ctx.form = options, reduction, form
        inputs, ctx.gradients = LossInputs.read(form, tensors), None
        if reduction == "none":  # the gradients wait for each token's weight
            return loss_and_gradients(inputs, targets, options)[0]
        nll, ctx.gradients = loss_and_gradients(inputs, targets, options, wanted_of(ctx))
        return reduce(nll, targets != options.ignore_index, reduction)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        targets, *tensors = ctx.saved_tensors
        inputs, options = LossInputs.read(ctx.form, tensors), ctx.options
        gradients: Gradients
        if ctx.reduction == "none":
            _, gradients = loss_and_gradients(inputs, targets, options, wanted_of(ctx), token_weights=grad_output)
        else:
            # Handed over, so that they can be scaled in place.
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:  # a second backward pass through a retained graph
                _, gradients = loss_and_gradients(inputs, targets, options, wanted_of(ctx))
            scale = grad_output / divisor(targets != options.ignore_index, ctx.reduction)
            gradients = ForEachInput.read([None if x is None else x.mul_(scale) for x in gradients.flat()])
        return (None, None, None, None, *in_dtype_of(inputs, gradients))


def wanted_of(ctx: Any) -> ForEachInput[bool]:
    """The inputs of an autograd function that need gradients; its other four arguments come before them."""
    return ForEachInput.read(ctx.needs_input_grad[4:])


def in_dtype_of(inputs: LossInputs, gradients: Gradients) -> tuple[Tensor | None, ...]:
    """The gradients, flat, each in the dtype of its input."""
    pairs = zip(inputs.flat(), gradients.flat(), strict=True)
    return tuple(None if x is None or gradient is None else gradient.to(x.dtype) for x, gradient in pairs)


def _free_name() -> str:
    """An unused operator name, as a process may import the package and its remote-code copies."""
    names = (f"cross_entropy_{number}" if number else "cross_entropy" for number in count())
    return next(f"hf_mos::{name}" for name in names if not hasattr(torch.ops.hf_mos, name))


def _call_operator(inputs: LossInputs, targets: Tensor, options: LossOptions, reduction: str) -> Tensor:
    latents = list(inputs.latents.tensors)
    tensors = (inputs.prior_logits, inputs.decoder_weight, inputs.decoder_bias)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (*tensors, *latents)]
    loss, _ = cross_entropy_operator(
        *tensors, latents, inputs.latents.form, targets, None, *options[:4], reduction, wanted
    )
    return loss


@torch.library.custom_op(_free_name(), mutates_args=())
def cross_entropy_operator(
    prior_logits: Tensor,
    decoder_weight: Tensor,
    decoder_bias: Tensor | None,
    latents: list[Tensor],
    form: str,
    targets: Tensor,
    token_weights: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    chunk_size: int | None,
    work_dtype: torch.dtype,
    reduction: str,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    """Opaque to torch.compile; returns the loss and one gradient per input, empty where not wanted."""
    options = LossOptions(softcap, ignore_index, chunk_size, work_dtype)
    inputs = LossInputs(prior_logits, decoder_weight, decoder_bias, latents_of(form, latents))
    waits = reduction == "none" and token_weights is None
    wants = None if waits else ForEachInput.read(wanted)
    nll, gradients = loss_and_gradients(inputs, targets, options, wants, token_weights)
    loss = reduce(nll, targets != ignore_index, reduction)
    return loss, [prior_logits.new_empty(0) if gradient is None else gradient for gradient in gradients.flat()]


@cross_entropy_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    *tensors, latents, form, targets, token_weights, _, _, _, work_dtype, reduction, wanted = arguments
    sum_dtype = torch.promote_types(latents[0].dtype, torch.float32)
    loss = targets.new_empty(targets.shape if reduction == "none" else (), dtype=sum_dtype)
    waits = reduction == "none" and token_weights is None
    # Gradients that all tokens add to are summed in fp32.
    has_rows = per_token(form)[: len(latents)]
    dtypes = [*[sum_dtype] * 3, *(work_dtype if each else sum_dtype for each in has_rows)]
    return loss, [
        torch.empty_like(x, dtype=dtype) if want and not waits else loss.new_empty(0)
        for x, want, dtype in zip((*tensors, *latents), wanted, dtypes, strict=True)
    ]


def _save_for_operator(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    *tensors, latents, form, targets, _, softcap, ignore_index, chunk_size, work_dtype, reduction, wanted = inputs
    ctx.form, ctx.options = form, LossOptions(softcap, ignore_index, chunk_size, work_dtype)
    ctx.reduction, ctx.wanted = reduction, wanted
    ctx.save_for_backward(targets, *tensors, *latents, *output[1])


@differentiable_once
def _backward_of_operator(ctx: Any, grad_output: Tensor, _: list[Tensor]) -> tuple[Any, ...]:
    targets, *saved = ctx.saved_tensors
    tensors, gradients = saved[: len(ctx.wanted)], saved[len(ctx.wanted) :]
    if ctx.reduction == "none":
        weighing = (grad_output, *ctx.options[:4], ctx.reduction, ctx.wanted)
        _, gradients = cross_entropy_operator(*tensors[:3], tensors[3:], ctx.form, targets, *weighing)
    else:
        scale = grad_output / divisor(targets != ctx.options.ignore_index, ctx.reduction)
        gradients = [gradient * scale for gradient in gradients]
    prior, weight, bias, *latents = (
        gradient.to(x.dtype) if want else None
        for gradient, x, want in zip(gradients, tensors, ctx.wanted, strict=True)
    )
    return (prior, weight, bias, latents, *(None,) * 9)


cross_entropy_operator.register_autograd(_backward_of_operator, setup_context=_save_for_operator)


def work_dtype_of(latents: Latents) -> torch.dtype:
    """The dtype of the matmuls: that of autocast where it is on, else that of the latents."""
    device_type = latents.tensors[0].device.type
    if torch.is_autocast_enabled(device_type) and latents.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return latents.dtype


def _check_inputs(inputs: LossInputs, targets: Tensor, ignore_index: int, num_classes: int) -> None:
    prior_logits, decoder_weight, decoder_bias, latents = inputs
    if prior_logits.dim() != 2:
        raise ValueError(f"prior_logits: expected (N, K), given {tuple(prior_logits.shape)}")
    check_shapes(latents, prior_logits, decoder_weight, decoder_bias)
    if targets.shape != prior_logits.shape[:1]:
        raise ValueError(f"targets: expected ({prior_logits.shape[0]},), given {tuple(targets.shape)}")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets: expected integer class indices, given {targets.dtype}")
    if latents.dtype != decoder_weight.dtype and not torch.is_autocast_enabled(targets.device.type):
        raise ValueError(f"latents: expected the decoder's {decoder_weight.dtype}, given {latents.dtype}")
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = (targets != ignore_index) & ((targets < 0) | (targets >= num_classes))
        if outside.any():
            raise ValueError(
                f"targets: expected class indices below {num_classes}, or {ignore_index}, "
                f"given {int(targets[outside][0])}"
            )
