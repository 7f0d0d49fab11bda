"""The latents: the K hidden states (..., K, E) that the decoder sees.

A kind is the way in which a head computes them: [`Shifted`] or [`Projected`]. A form is the way in which the latents
of some tokens are held until the decoder multiplies them: [`Latents`], [`SubspaceLatents`] or [`ShortlistLatents`]. To
add a kind, write its class here and name it in `kind_of`. To add a form, write its class here and name it in `FORMS`,
and write its projection in `mos_projections.py`. The options are fields of `configuration_mos.py`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_mos import MoSConfig
from .mos_matmul import project
from .mos_projections import Projection, SubspaceProjection, Tokens
from .mos_shortlist import ShortlistProjection, top_classes
from .mos_vocabulary import cap_logits, widen

Form = TypeVar("Form", bound="Latents")


class Latents:
    """The latents of N tokens, in full: one tensor (..., K, E). The base of the other forms.

    A leading (...) in a shape stands for N or any shape.
    """

    per_token: ClassVar[tuple[bool, ...]] = (True,)  # whether each of `tensors` has rows of its own for each token

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors  # (..., K, E)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def shape(self) -> torch.Size:
        """(..., K, E)"""
        return self.tensors[0].shape

    def check(self) -> None:
        """Raises a ValueError where the tensors do not fit together."""

    def dense(self) -> Tensor:
        """The latents themselves, (..., K, E)."""
        return self.tensors[0]

    def components(
        self, decoder: Callable[[Tensor], Tensor], prior_logits: Tensor, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """The log-weights (..., K) of the mixture's components and their logits (..., K, V), in fp32 or wider."""
        logits = cap_logits(widen(decoder(self.dense())), softcap)
        return F.log_softmax(widen(prior_logits.to(logits.device)), dim=-1), logits

    def read_components(
        self, weight: Tensor, bias: Tensor | None, prior_logits: Tensor, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """`components` by a decoder whose weight can be read; fewer of them where these are the same mixture."""
        return self.components(lambda latents: F.linear(latents, weight, bias), prior_logits, softcap)

    @property
    def form(self) -> str:
        """The form, as [`latents_of`] reads it."""
        return type(self).__name__

    def like(self: Form, tensors: Iterable[Tensor]) -> Form:
        """Latents of the same form with other tensors."""
        return type(self)(*tensors)

    def to(self: Form, dtype: torch.dtype) -> Form:
        return self.like(tensor.to(dtype) for tensor in self.tensors)

    def __getitem__(self: Form, tokens: Tokens) -> Form:
        """The latents of some of the N tokens."""
        pairs = zip(self.tensors, self.per_token, strict=False)
        return self.like(tensor[tokens] if has_rows else tensor for tensor, has_rows in pairs)

    def projection(self, *arguments: Any) -> Projection:
        """The form's projection, of `tensors` and the arguments `log_prior, decoder, wanted`."""
        return Projection(self.tensors[0], *arguments)

    def for_inference(self) -> "Latents":
        """The form that costs the least for these tokens without gradients."""
        return self


class SubspaceLatents(Latents):
    """Equivalent to: the latents `hidden_states.unsqueeze(-2) + shifts @ basis.T`, (..., K, E).

    The components differ inside one subspace of rank R that they share. So their logits are one product of full width
    that all share and K of width R: `h @ W.T + shift_k @ (W @ basis).T`, 1 + K R / E softmax heads instead of K.

    Args: hidden_states (..., E), shifts (..., K, R), basis (E, R).
    """

    per_token = (True, True, False)

    def __init__(self, hidden_states: Tensor, shifts: Tensor, basis: Tensor) -> None:
        super().__init__(hidden_states, shifts, basis)
        self.hidden_states, self.shifts, self.basis = hidden_states, shifts, basis

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.shifts.shape[:-1], self.hidden_states.shape[-1]))

    def check(self) -> None:
        (*leading, _), E = self.shifts.shape[:-1], self.shape[-1]
        if tuple(leading) != self.hidden_states.shape[:-1] or self.basis.shape != (E, self.shifts.shape[-1]):
            shapes = ", ".join(str(tuple(part.shape)) for part in self.tensors)
            raise ValueError(f"latents: expected (..., E), (..., K, R) and (E, R), given {shapes}")

    def dense(self) -> Tensor:
        return self.hidden_states.unsqueeze(-2) + self.shifts @ self.basis.T

    def projection(self, *arguments: Any) -> Projection:
        return SubspaceProjection(self.hidden_states, self.shifts, self.basis, *arguments)

    def for_inference(self) -> Latents:
        """Full latents for so few tokens that these cost less than `weight @ basis`, a matmul at half the speed."""
        N, K, R = self.shifts.shape
        return Latents(self.dense()) if 2 * R >= N * (K - 1) else self


class ShortlistLatents(Latents):
    """The latents `mean_latent.unsqueeze(-2) + offsets`, or `+ offsets @ basis.T`, on a shortlist of classes alone.

    Equivalent to: a mixture whose K components differ on the `size` likeliest classes of the mean latent's softmax,
    have that latent's logits elsewhere, and whose weights are in proportion to `softmax(prior_logits)_k` times the
    component's partition function. `mos_shortlist.py` has the maths. A decoder that can only be called (an adapter, a
    quantizer) costs K + 1 products.

    Args: mean_latent (..., E), offsets (..., K, E), or offsets (..., K, R) and a basis (E, R).
    """

    per_token = (True, True, False)

    def __init__(self, mean_latent: Tensor, offsets: Tensor, basis: Tensor | None = None, *, size: int) -> None:
        super().__init__(*(tensor for tensor in (mean_latent, offsets, basis) if tensor is not None))
        self.mean_latent, self.offsets, self.basis, self.size = mean_latent, offsets, basis, size

    @classmethod
    def around_mean(cls, hidden_states: Tensor, shifts: Tensor, basis: Tensor | None, size: int) -> "ShortlistLatents":
        """The latents `hidden_states.unsqueeze(-2) + shifts`, or `+ shifts @ basis.T`, by their mean and offsets.

        The mean reaches every class and trains as the latent of one softmax does. If the classes outside the shortlist
        kept the hidden state's logits, a head that trains alone could not change them.
        """
        mean = shifts.mean(dim=-2)
        offsets = shifts - mean.unsqueeze(-2)
        return cls(hidden_states + (mean if basis is None else mean @ basis.T), offsets, basis, size=size)

    @property
    def form(self) -> str:
        return f"{type(self).__name__} {self.size}"

    def like(self, tensors: Iterable[Tensor]) -> "ShortlistLatents":
        return ShortlistLatents(*tensors, size=self.size)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.offsets.shape[:-1], self.mean_latent.shape[-1]))

    def check(self) -> None:
        E, R = self.mean_latent.shape[-1], self.offsets.shape[-1]
        fits = R == E if self.basis is None else self.basis.shape == (E, R)
        if self.offsets.shape[:-2] != self.mean_latent.shape[:-1] or not fits:
            shapes = ", ".join(str(tuple(part.shape)) for part in self.tensors)
            raise ValueError(f"latents: expected (..., E), (..., K, E), or (..., K, R) and (E, R), given {shapes}")

    def dense(self) -> Tensor:
        offsets = self.offsets if self.basis is None else self.offsets @ self.basis.T
        return self.mean_latent.unsqueeze(-2) + offsets

    def components(
        self, decoder: Callable[[Tensor], Tensor], prior_logits: Tensor, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        shared, own = widen(decoder(self.mean_latent)), widen(decoder(self.dense()))  # (..., V), (..., K, V)
        shortlist = top_classes(shared.detach(), self.size).unsqueeze(-2).expand(*own.shape[:-1], -1)  # (..., K, M)
        shared = shared.unsqueeze(-2).expand_as(own)
        logits = cap_logits(shared.scatter(-1, shortlist, own.gather(-1, shortlist)), softcap)
        log_gate = F.log_softmax(widen(prior_logits.to(logits.device)), dim=-1)
        return F.log_softmax(log_gate + torch.logsumexp(logits, dim=-1), dim=-1), logits

    def read_components(
        self, weight: Tensor, bias: Tensor | None, prior_logits: Tensor, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """The one softmax that the mixture equals, as `mos_shortlist.py` has it, while its rows are fewer than logits.

        For logits with gradients it takes 1/50 of the time of `components` (N = 256, K = 16, D = 256, V = 32000).
        """
        *_, K, width = self.offsets.shape
        if self.size * width >= K * weight.shape[0]:
            return super().read_components(weight, bias, prior_logits, softcap)
        z = widen(F.linear(self.mean_latent, weight, bias))  # (..., V)
        shortlist = top_classes(z.detach(), self.size)  # (..., M)
        rows = weight if self.basis is None else weight @ self.basis
        # Many tokens share a row: in fp32 its gradient is the exact sum.
        rows = F.embedding(shortlist, widen(rows)).to(self.offsets.dtype)  # (..., M, E) or (..., M, R)
        differences = widen(self.offsets @ rows.transpose(-1, -2))  # (..., K, M)
        chosen = cap_logits(z.gather(-1, shortlist).unsqueeze(-2) + differences, softcap)
        log_gate = F.log_softmax(widen(prior_logits.to(z.device)), dim=-1)
        mixed = torch.logsumexp(log_gate.unsqueeze(-1) + chosen, dim=-2)
        logits = cap_logits(z, softcap).scatter(-1, shortlist, mixed.to(z.dtype))
        return torch.zeros_like(log_gate[..., :1]), logits.unsqueeze(-2)

    def for_inference(self) -> Latents:
        """Without the basis: `weight @ basis` costs more than wide offsets of a thousand tokens."""
        return self if self.basis is None else self.like((self.mean_latent, self.offsets @ self.basis.T))

    def projection(self, *arguments: Any) -> Projection:
        return ShortlistProjection(self.mean_latent, self.offsets, self.basis, self.size, *arguments)


class Shifted:
    """The kind that adds to the hidden state; `head` is a [`MoSLMHead`].

    Equivalent to: `hidden_states.unsqueeze(-2) + latent_scale * shift(hidden_states).view(..., K, E)`.

    With `latent_rank` the shifts have R numbers each and `basis` (E, R) widens them. The shifts start at zero, so
    every latent starts as the hidden state, to the bit in every dtype, and weight decay pulls towards one softmax.

    The scale decides how fast the components part at the learning rate of all other weights; see [`scaled`].
    """

    @staticmethod
    def add_modules(head: Any, config: MoSConfig, dtype: torch.dtype, device: torch.device) -> None:
        """Adds the modules that compute the latents to the head."""
        D, E, R = head.input_size, head.latent_size, config.latent_rank
        if D != E:
            raise ValueError(f"latent_size: expected {D}, the width of the hidden state that shifts add to, given {E}")
        head.shift = nn.Linear(D, head.num_mixtures * (R or E), config.latent_bias, dtype=dtype, device=device)
        if R is not None:
            # No checkpoint fills a buffer on the meta device that it does not hold.
            basis = torch.empty(E, R, dtype=dtype, device=None if device.type == "meta" else device)
            head.register_buffer("basis", basis, persistent=False)

    @staticmethod
    def reset_parameters(head: Any) -> None:
        """Initialises the weights of these modules; the biases are zero in every kind."""
        init.zeros_(head.shift.weight)
        if head.latent_rank is not None:
            init.copy_(head.basis, cosine_directions(*head.basis.shape).to(head.basis))

    @staticmethod
    def latents(head: Any, hidden_states: Tensor) -> Latents:
        """Computes the latents of hidden states (..., D)."""
        hidden_states = in_dtype_of(head.shift, hidden_states)
        shifts = scaled(lambda h: activate(head, head.shift, h), hidden_states, head.latent_scale)
        basis = None if head.latent_rank is None else head.basis.to(shifts)
        if head.shortlist_size is not None:
            return ShortlistLatents.around_mean(hidden_states.to(shifts), shifts, basis, head.shortlist_size)
        if basis is None:
            return Latents(hidden_states.unsqueeze(-2) + shifts)
        return SubspaceLatents(hidden_states.to(shifts), shifts, basis)

    @staticmethod
    def is_exact(config: MoSConfig) -> bool:
        """Whether a fresh head predicts what one softmax with its decoder predicts."""
        return True

    @staticmethod
    def cost(head: Any) -> float:
        """Multiplications with the decoder, in those of one softmax."""
        K, E, R, M = head.num_mixtures, head.latent_size, head.latent_rank, head.shortlist_size
        if M is not None:
            return (
                1 + (M * K * (R or E) + (head.decoder.weight.shape[0] * R if R else 0)) / head.decoder.weight.numel()
            )
        return float(K) if R is None else 1 + K * R / E

    @staticmethod
    def describe(config: MoSConfig) -> str:
        """One line for a model card."""
        rank = "" if config.latent_rank is None else f", in one shared subspace of rank {config.latent_rank}"
        shortlist = "" if config.shortlist_size is None else f", on a shortlist of {config.shortlist_size} classes"
        activation = "" if config.latent_activation == "identity" else f"{config.latent_activation} of "
        return f"the hidden state plus {config.latent_scale:.3g} times {activation}a shift{rank}{shortlist}"


class Projected(Shifted):
    """The paper's kind, for its checkpoints and for training from scratch.

    Equivalent to: `activation(latent(hidden_states)).view(..., K, E)`. A trained model's predictions change.
    """

    @staticmethod
    def add_modules(head: Any, config: MoSConfig, dtype: torch.dtype, device: torch.device) -> None:
        outputs = head.num_mixtures * head.latent_size
        head.latent = nn.Linear(head.input_size, outputs, config.latent_bias, dtype=dtype, device=device)

    @staticmethod
    def reset_parameters(head: Any) -> None:
        if head.latent.weight.numel():  # ZeRO-3 empties it while it loads a checkpoint
            init.xavier_uniform_(head.latent.weight)

    @staticmethod
    def latents(head: Any, hidden_states: Tensor) -> Latents:
        return Latents(activate(head, head.latent, in_dtype_of(head.latent, hidden_states)))

    @staticmethod
    def is_exact(config: MoSConfig) -> bool:
        return False

    @staticmethod
    def describe(config: MoSConfig) -> str:
        return f"full projections, {config.latent_activation} activation"


def kind_of(config: MoSConfig) -> type[Shifted]:
    """The kind of latents that a config asks for."""
    return Shifted if config.adds_shifts else Projected


def activate(head: Any, layer: nn.Linear, hidden_states: Tensor) -> Tensor:
    """Equivalent to: `dropout(activation(layer(hidden_states)))`, (..., K, _)."""
    outputs = head.dropout(head.activation(project(layer, hidden_states)))
    return outputs.unflatten(-1, (head.num_mixtures, -1))


def in_dtype_of(layer: nn.Linear, hidden_states: Tensor) -> Tensor:
    # A quantizer's weight has the dtype of its codes, or is no tensor.
    is_plain = isinstance(layer.weight, Tensor) and layer.weight.is_floating_point()
    return hidden_states.to(layer.weight.dtype) if is_plain else hidden_states


def scaled(function: Callable[[Tensor], Tensor], hidden_states: Tensor, scale: float) -> Tensor:
    """Equivalent to: `scale * function(hidden_states)`, but its weights get the gradient that they have at scale 1.

    The gradient of the hidden states is the true one, so the weights before the head learn as they must. For the
    weights in `function` the scale acts as a parameter group of `scale` times the learning rate does, under every
    optimizer, SGD too: they learn that many times as fast, and clipping by the norm of all gradients leaves the rest
    as it is. The true gradient, `scale` times as large, would count `scale` times as much in that norm.
    """
    outputs = function(with_gradient(hidden_states, scale * hidden_states))
    return with_gradient(scale * outputs, outputs)


def with_gradient(value: Tensor, of: Tensor) -> Tensor:
    """Equivalent to: `value`, to the bit, with the gradient of `of`."""
    return value.detach() + (of - of.detach()) if torch.is_grad_enabled() else value


FORMS: dict[str, type[Latents]] = {form.__name__: form for form in (Latents, SubspaceLatents, ShortlistLatents)}


def latents_of(form: str, tensors: Sequence[Any]) -> Latents:
    """Latents of a form, named by [`Latents.form`], with these tensors."""
    name, _, size = form.partition(" ")
    return ShortlistLatents(*tensors, size=int(size)) if size else FORMS[name](*tensors)


def per_token(form: str) -> tuple[bool, ...]:
    return FORMS[form.partition(" ")[0]].per_token


def as_latents(latents: Tensor | Latents) -> Latents:
    """Wraps a bare tensor (..., K, E) as full latents."""
    return Latents(latents) if isinstance(latents, Tensor) else latents


def cosine_directions(size: int, count: int) -> Tensor:
    """Equivalent to: rows 1, ..., `count` of the orthonormal DCT-II of `size` numbers, as columns (size, count), fp32.

    Every process and every checkpoint computes these directions instead of storing them. Row 0, the constant one,
    comes last: a layer norm leaves nothing in that direction.
    """
    position = torch.arange(size, dtype=torch.float64, device="cpu") + 0.5
    frequency = torch.arange(1, count + 1, dtype=torch.float64, device="cpu") % size
    directions = torch.cos(torch.pi / size * torch.outer(position, frequency))
    return (directions / directions.norm(dim=0)).float()
