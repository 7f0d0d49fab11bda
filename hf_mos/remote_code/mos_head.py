"""MoSLMHead: the mixture of softmaxes in place of a causal LM's vocabulary projection."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from operator import itemgetter
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from .configuration_mos import default_rank, default_scale
from .mos_decoder import AUTOGRAD_BYTES_PER_LOGIT, ROW_BYTES, tokens_per_chunk
from .mos_log_probs import Latents, components, infer_log_probs, mean_and_rest, mix_log_probs, reduce
from .mos_loss import mos_cross_entropy
from .mos_matmul import is_bare, is_plain, is_recorded, is_transformed, project
from .mos_shortlist import shortlist_logits

# Which module plays which role at this moment, as (module, role). While the layers run, the head hands on its "input";
# while a wrapper such as an adapter is called for logits, the head in it is the plain "decoder".
_role: ContextVar[tuple[nn.Module, str] | None] = ContextVar("hf_mos_role", default=None)
_traced_role: list[Any] = [None]  # the same while torch.compile traces, which cannot follow a ContextVar; else `None`


@contextlib.contextmanager
def role(module: Any, name: str) -> Iterator[None]:
    token = None if torch.compiler.is_dynamo_compiling() else _role.set((module, name))
    if token is None:
        _traced_role[0] = (module, name)
    try:
        yield
    finally:
        _traced_role[0] = None
        if token is not None:
            _role.reset(token)


def role_of(module: Any) -> str | None:
    playing = _traced_role[0] if torch.compiler.is_dynamo_compiling() else _role.get()
    return None if playing is None or playing[0] is not module else playing[1]


class MoSLMHead(nn.Linear):
    """Equivalent to: `mos_log_probs(latents(h), prior_logits(h), weight, decoder_bias=bias)`.

    An `nn.Linear`, the decoder that K components share, with children. `shift` maps a hidden state to K codes of r
    numbers, and `widening` maps each code to D numbers, which are added to the hidden state: the K latents. `prior`
    gives the components' weights. `mos_shortlist.py` tells what a shortlist changes.

        latents_k = h + latent_scale * widening(shift(h)_k)              (..., K, D); no widening where r is D
        log_gate  = log_softmax(prior(latent_scale * h))                 (..., K), fp32

    Args:
        in_features, out_features, bias, device, dtype: of the decoder, (V, D), as for `nn.Linear`.
        options: as in `MoSConfig`, and softcap, as in `mos_log_probs`.

    Initialisation: rounding loses `shift`, of 1e-18, so the mixture predicts what one softmax does. The weights of the
    prior, times `latent_scale`, and of the widening are random, of standard deviation 1 / sqrt(D) and 1 / sqrt(r). So
    components get different gradients and diverge; with an equal prior they stay equal (`initialisation.py`).

    To compute other latents, override `latents`, and call `take_over`. Source: Yang et al. 2018, arXiv 1711.03953.
    """

    shard_of: Any = None  # hf_mos.training.tensor_parallel sets it

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.add_mixture(**options)

    @classmethod
    def take_over(cls, linear: nn.Linear, **options: Any) -> "MoSLMHead":
        """Turns a vocabulary projection into a head, in place: its weight, hooks and place in the model stay."""
        change_class(linear, cls)
        linear.add_mixture(**options)  # type: ignore[operator]
        return linear  # type: ignore[return-value]

    def add_mixture(
        self,
        num_mixtures: int = 16,
        shortlist_size: int | None = 64,
        shift_rank: int | None = None,
        latent_scale: float | None = None,
        init_seed: int = 0,
        softcap: float | None = None,
    ) -> None:
        """Adds the prior and the shift; `options` of the class."""
        D, dtype, device = self.in_features, self.weight.dtype, device_of(self)
        self.num_mixtures, self.shortlist_size, self.softcap = num_mixtures, shortlist_size, softcap
        self.shift_rank = min(shift_rank or default_rank(num_mixtures, D, self.out_features), D)
        self.latent_scale, self.init_seed = latent_scale or default_scale(D), init_seed
        self.num_classes: int | None = None  # the classes that count; `None`: all rows of the weight
        given: dict[str, Any] = {"bias": False, "device": device}
        self.prior = nn.Linear(D, num_mixtures, dtype=torch.promote_types(dtype, torch.float32), **given)
        self.shift = nn.Linear(D, num_mixtures * self.shift_rank, dtype=dtype, **given)
        self.widening = nn.Linear(self.shift_rank, D, dtype=dtype, **given) if self.shift_rank < D else None
        self.weight_names = {name for name, _ in self.named_parameters()}  # in a checkpoint
        self.reset_mixture()

    @torch.no_grad()
    def reset_mixture(self) -> None:
        """Initialises the prior and the shift, as the class's docstring says, and to the bit the same each time."""
        draw_(self.prior.weight, self.in_features**-0.5 / self.latent_scale, self.init_seed)
        draw_(self.shift.weight, 1e-18, self.init_seed)  # not 0: DoRA divides by norms, PiSSA factors the weight
        if self.widening is not None:
            draw_(self.widening.weight, self.shift_rank**-0.5, self.init_seed)

    def prior_logits(self, hidden_states: Tensor) -> Tensor:
        """The logits of the prior (..., K) for hidden states (..., D); in its own dtype under autocast too."""
        casts = not hidden_states.is_meta and torch.is_autocast_enabled(hidden_states.device.type)
        with torch.autocast(hidden_states.device.type, enabled=False) if casts else contextlib.nullcontext():
            return self.prior(self.latent_scale * in_dtype_of(self.prior, hidden_states))

    def latents(self, hidden_states: Tensor) -> Tensor:
        """The latents (..., K, D) for hidden states (..., D). A subclass may compute others."""
        return in_dtype_of(self.shift, hidden_states).unsqueeze(-2) + self.shifts(hidden_states)

    def shifts(self, hidden_states: Tensor) -> Tensor:
        """What the latents add to the hidden state, (..., K, D)."""
        return self.widen(self.codes(hidden_states))

    def codes(self, hidden_states: Tensor) -> Tensor:
        """The shifts before they are widened, (..., K, r)."""
        codes = project(self.shift, in_dtype_of(self.shift, hidden_states))
        return self.latent_scale * codes.unflatten(-1, (self.num_mixtures, -1))

    def widen(self, codes: Tensor) -> Tensor:
        return codes if self.widening is None else project(self.widening, codes)

    def mean_and_offsets(self, hidden_states: Tensor, widens: bool = True) -> tuple[Tensor, Tensor]:
        """Equivalent to: `m = latents(h).mean(-2); (m, latents(h) - m.unsqueeze(-2))`, of (..., D) and (..., K, D).

        The sum of a hidden state and a small shift is rounded; so the shifts are taken as they are. With
        `widens=False` the offsets are codes (..., K, r), which the widening has still to multiply.
        """
        if not is_own(self):
            return mean_and_rest(self.latents(hidden_states))
        mean, offsets = mean_and_rest(self.shifts(hidden_states) if widens else self.codes(hidden_states))
        return hidden_states.to(mean) + (mean if widens else self.widen(mean)), offsets

    def keeps_codes(self, num_tokens: int, decoder: nn.Module | None) -> bool:
        """Whether the loss gets codes, and multiplies decoder and widening: V rows, fewer than all shortlists have."""
        pays = self.shortlist_size is not None and num_tokens * self.shortlist_size >= self.out_features
        own = is_own(self) and self.widening is not None and is_bare(self.widening)
        return pays and own and self.read_decoder(decoder) is not None and not self.weight.is_meta

    def components(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The log-weights (..., K) and the logits (..., K, V) of the components, in fp32 or wider. Differentiable."""
        latents, prior_logits = self.latents_and_prior(hidden_states)
        return components(self.as_decoder(None), latents, prior_logits, self.softcap, self.shortlist_size)

    def latents_and_prior(self, hidden_states: Tensor, widens: bool = True) -> tuple[Latents, Tensor]:
        """The latents, on a shortlist their mean and offsets, and the prior's logits."""
        prior_logits = self.prior_logits(hidden_states)  # first: gradients are summed in this order, to the bit
        if self.shortlist_size is None:
            return self.latents(hidden_states), prior_logits
        return self.mean_and_offsets(hidden_states, widens), prior_logits

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (name := role_of(self)) is not None:
            return hand_on(*args) if name == "input" else F.linear(args[0], *self.weight_and_bias(args[0].dtype))
        result = super().__call__(*args, **kwargs)
        return result.real if isinstance(result, Tensor) and result.is_complex() else result

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        add_log_partition: bool = False,
        decoder: nn.Module | None = None,
        function: Callable[..., Any] | None = None,
    ) -> Any:
        """Computes log-probabilities, or with `targets` the loss.

        Args:
            hidden_states: (..., D).
            targets: (...), class indices aligned with the hidden states (not shifted), or `None`.
            reduction, ignore_index: as in `mos_cross_entropy`; add_log_partition: as in `mix_log_probs`.
            decoder: a module around this head, such as an adapter, that is called as the decoder in its place.
            function: computes something else of the targets, `function(head, latents, prior_logits, targets, decoder)`
                of N tokens, inside this forward, where engines have gathered the weights.

        Returns:
            Natural log-probabilities (..., V) in fp32 or wider; with targets the loss in nats, or `function`'s result.
        """
        leading = hidden_states.shape[:-1]
        if targets is not None and targets.shape != leading:
            raise ValueError(f"targets: expected {tuple(leading)}, given {tuple(targets.shape)}")
        # The layers see the batch as it is, whose hooks may count its sequences; the decoder sees N tokens.
        keeps_codes = targets is not None and function is None and self.keeps_codes(targets.numel(), decoder)
        parts = self.latents_and_prior(hidden_states, widens=not keeps_codes)
        if targets is None and decoder is not None:  # an adapter may tell sequences and positions apart
            return self.log_probs(*parts, decoder, add_log_partition)
        latents, prior_logits = each(lambda x: x.reshape(-1, *x.shape[len(leading) :]), parts)
        if targets is None:
            log_probs = self.log_probs(latents, prior_logits, None, add_log_partition)
            return log_probs.view(*leading, log_probs.shape[-1])
        if function is not None:
            return function(self, latents, prior_logits, targets.flatten(), decoder)
        loss = self.loss(latents, prior_logits, targets.flatten(), decoder, reduction, ignore_index)
        loss = loss.view(leading) if reduction == "none" else loss
        # FSDP2's mixed precision rounds each real number that a module returns, and no complex one.
        return torch.complex(loss, torch.zeros_like(loss)) if hasattr(self, "_get_fsdp_state") else loss

    def log_probs(
        self, latents: Latents, prior_logits: Tensor, decoder: nn.Module | None = None, add_log_partition: bool = False
    ) -> Tensor:
        """Equivalent to: `mos_log_probs(latents, prior_logits, weight)`, (N, V)."""
        tensors, M = self.read_decoder(decoder), self.shortlist_size
        if tensors is not None:
            weight, bias, shard = tensors
            weight = weight.to((latents if isinstance(latents, Tensor) else latents[0]).dtype)
            is_small = M is not None and len(prior_logits) * M * weight.shape[1] * weight.itemsize <= ROW_BYTES
            if M is not None and shard is None and (is_small or is_recorded()):
                logits = shortlist_logits(weight, bias, latents, prior_logits, self.softcap, M)  # type: ignore[arg-type]
                return logits if add_log_partition else F.log_softmax(logits, dim=-1)  # of one softmax
            if not is_recorded():
                given: dict[str, Any] = {"softcap": self.softcap, "shortlist_size": M, "vocabulary": shard}
                given |= {"decoder_bias": bias, "add_log_partition": add_log_partition}
                log_probs = infer_log_probs(latents, prior_logits, weight, **given)
                return log_probs if shard is None else shard.gather_classes(log_probs)
        log_weights, logits = components(self.as_decoder(decoder), latents, prior_logits, self.softcap, M)
        return mix_log_probs(logits, log_weights, add_log_partition)

    def loss(
        self,
        latents: Latents,
        prior_logits: Tensor,
        targets: Tensor,
        decoder: nn.Module | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
    ) -> Tensor:
        """Equivalent to: `mos_cross_entropy(latents, prior_logits, weight, targets)`."""
        tensors = self.read_decoder(decoder)
        if tensors is not None and not self.weight.is_meta:  # the fused loss reads which targets count
            weight, bias, shard = tensors
            given: dict[str, Any] = {"softcap": self.softcap, "shortlist_size": self.shortlist_size, "shard": shard}
            given |= {"reduction": reduction, "ignore_index": ignore_index}
            if not isinstance(latents, Tensor) and latents[1].shape[-1] < self.in_features:
                given["widening"] = self.widening.weight  # type: ignore[union-attr]
            return mos_cross_entropy(latents, prior_logits, weight, targets, decoder_bias=bias, **given)

        def chunk_nll(latents: Latents, prior_logits: Tensor, targets: Tensor) -> Tensor:
            log_probs = self.log_probs(latents, prior_logits, decoder)
            return F.nll_loss(log_probs, targets, ignore_index=ignore_index, reduction="none")

        nll = torch.cat(self.in_chunks(chunk_nll, latents, prior_logits, targets))
        return reduce(nll, targets != ignore_index, reduction)

    def in_chunks(self, function: Callable[..., Any], *inputs: Any) -> list[Any]:
        """The results of a function of some tokens, chunk by chunk; the backward pass computes each chunk again."""
        if is_transformed():  # it would follow a checkpoint wrongly
            return [function(*inputs)]
        N, V, device = inputs[-1].shape[0], self.weight.shape[0], inputs[-1].device
        size = tokens_per_chunk(self.num_mixtures, V, AUTOGRAD_BYTES_PER_LOGIT, device)
        chunks = [itemgetter(slice(start, start + size)) for start in range(0, max(N, 1), size)]
        return [checkpoint(function, *each(chunk, inputs), use_reentrant=False) for chunk in chunks]

    def read_decoder(self, decoder: nn.Module | None) -> tuple[Tensor, Tensor | None, Any] | None:
        """The decoder's weight, bias and vocabulary shard; `None` where reading these is not enough."""
        if decoder is not None or is_transformed():  # what follows every operation follows no loop of our own
            return None
        weight, bias = self.weight_and_bias()
        if self.shard_of is not None and (shard := self.shard_of(weight)) is not None:
            return weight.to_local(), None if bias is None else bias.to_local(), shard
        return (weight, bias, None) if is_plain(weight) else None

    def as_decoder(self, wrapper: nn.Module | None) -> Callable[[Tensor], Tensor]:
        """The function that makes logits of latents: this layer's own, or that of the module around it."""
        kind = f"{type(wrapper)} {getattr(wrapper, 'lora_variant', '')}"  # two of PEFT's read (batch, sequence, D)

        def decode(rows: Tensor) -> Tensor:
            if wrapper is None:
                return F.linear(rows, *self.weight_and_bias(rows.dtype))
            with role(self, "decoder"):
                if rows.dim() < 4 or not ("ALora" in kind or ".oft." in kind):
                    return wrapper(rows)
                return torch.stack([wrapper(latent) for latent in rows.unbind(-2)], dim=-2)

        return decode

    def weight_and_bias(self, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
        """The rows of the classes that count; with a `dtype` as whole tensors of it, where the weight is plain."""
        weight: Any = self.weight
        bias: Any = self.bias
        if dtype is not None and hasattr(weight, "full_tensor"):
            weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
        if self.num_classes is not None and self.num_classes < weight.shape[0]:
            weight, bias = weight[: self.num_classes], None if bias is None else bias[: self.num_classes]
        return weight if dtype is None or not is_plain(weight) else weight.to(dtype), bias

    def extra_repr(self) -> str:
        names = ("num_mixtures", "shortlist_size", "shift_rank", "latent_scale", "softcap")
        return ", ".join([super().extra_repr(), *(f"{name}={getattr(self, name)}" for name in names)])


def is_own(head: Any) -> bool:
    """Whether a head makes latents and prior as `MoSLMHead` does, which is what the files of a checkpoint define."""
    names = ("latents", "shifts", "codes", "widen", "prior_logits")
    return all(name not in vars(head) and getattr(type(head), name) is getattr(MoSLMHead, name) for name in names)


def draw_(weight: Any, std: float, seed: int) -> None:
    """Fills a weight with normal numbers, the same on each device and in each process that holds a shard."""
    if weight.is_meta or getattr(weight, "_is_hf_initialized", False):  # as `init` does
        return
    generator = torch.Generator().manual_seed(seed)
    values = std * torch.randn(weight.shape, generator=generator, dtype=torch.float32, device="cpu")
    if hasattr(weight, "device_mesh"):
        distribute = torch.distributed.tensor.distribute_tensor
        values = distribute(values, weight.device_mesh, weight.placements, src_data_rank=None)
    init.copy_(weight, values)


def change_class(module: nn.Module, cls: Any) -> None:
    """Sets the class of a module, and of the forward that accelerate keeps of an offloaded one."""
    kept = vars(module).get("_old_forward")
    if getattr(kept, "__func__", None) is type(module).forward:
        vars(module)["_old_forward"] = MethodType(cls.forward, module)
    module.__class__ = cls


def hand_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    """Equivalent to: the identity; fp16 is upcast, as it cannot hold what some models compute next (`NO_SOFTCAP`)."""
    return hidden_states.float() if hidden_states.dtype == torch.float16 else hidden_states


def each(function: Callable[[Tensor], Tensor], parts: Any) -> Any:
    """The function's result for each tensor of a tuple of tensors and tuples."""
    return function(parts) if isinstance(parts, Tensor) else tuple(each(function, part) for part in parts)


def in_dtype_of(layer: nn.Module, hidden_states: Tensor) -> Tensor:
    # A quantizer's weight has the dtype of its codes, or is no tensor.
    weight: Any = getattr(layer, "weight", None)
    is_float = isinstance(weight, Tensor) and weight.is_floating_point()
    return hidden_states.to(weight.dtype) if is_float else hidden_states


def device_of(linear: nn.Linear) -> torch.device:
    """The device that computes with a layer; an offloaded weight lies on the meta device between two calls."""
    hook = getattr(linear, "_hf_hook", None)  # accelerate's
    devices = [getattr(part, "execution_device", None) for part in getattr(hook, "hooks", [hook])]
    executing = next((device for device in devices if device is not None), None)
    return linear.weight.device if executing is None else torch.device(executing)
