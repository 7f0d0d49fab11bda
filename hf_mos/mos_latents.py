"""The kinds of latents: the K hidden states (..., K, E) that the decoder sees, each kind in its cheapest form.

A kind is one class. Its instances hold the latents of some tokens; its class methods make the head's modules, compute
the latents with them, and describe the kind. To add a kind: write its class here and name it in `kind_of` and `KINDS`,
its projection in `mos_projections.py`, and its field in `configuration_mos.py`.
"""

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_mos import MoSConfig
from .mos_matmul import project
from .mos_projections import Projection, SubspaceProjection, Tokens

Kind = TypeVar("Kind", bound="Latents")


class Latents:
    """The latents of N tokens, in full: `activation(latent(h)).view(..., K, E)`. The base of the other kinds.

    A leading (...) in a shape stands for N or any shape. `head` is a [`MoSLMHead`].
    """

    layer = "latent"  # the name of the head's projection
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

    def to(self: Kind, dtype: torch.dtype) -> Kind:
        return type(self)(*(tensor.to(dtype) for tensor in self.tensors))

    def __getitem__(self: Kind, tokens: Tokens) -> Kind:
        """The latents of some of the N tokens."""
        pairs = zip(self.tensors, self.per_token, strict=True)
        return type(self)(*(tensor[tokens] if has_rows else tensor for tensor, has_rows in pairs))

    def projection(self, *arguments: Any) -> Projection:
        """The kind's projection, of `tensors` and the arguments `weight, wanted, wants_weight, sum_dtype`."""
        return Projection(self.tensors[0], *arguments)

    def for_inference(self) -> "Latents":
        """The kind that costs the least for these tokens without gradients."""
        return self

    @classmethod
    def add_modules(cls, head: Any, config: MoSConfig, like: Tensor) -> None:
        """Adds the modules that compute the latents to the head, with the dtype and device of `like`."""
        head.latent = linear_like(like, head.input_size, head.num_mixtures * head.latent_size, config.latent_bias)

    @classmethod
    def reset_parameters(cls, head: Any) -> None:
        """Initialises the weights of these modules; the biases are zero in every kind."""
        if head.latent.weight.numel() == 0:
            return  # ZeRO-3 has emptied it, as it does while it loads a checkpoint
        if isinstance(head.activation, nn.Identity):
            eye = torch.eye(head.latent_size, head.input_size)
            init.copy_(head.latent.weight, eye.repeat(head.num_mixtures, 1).to(head.latent.weight))
        else:
            init.xavier_uniform_(head.latent.weight)

    @classmethod
    def of(cls: type[Kind], head: Any, hidden_states: Tensor) -> Kind:
        """Computes the latents of hidden states (..., D)."""
        hidden_states, outputs = cls.activate(head, hidden_states)
        return cls(outputs)

    @classmethod
    def activate(cls, head: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden states in the layer's dtype, and `dropout(activation(layer(hidden_states)))` (..., K, _)."""
        layer = getattr(head, cls.layer)
        if layer.weight.is_floating_point():  # a quantizer's weight has the dtype of its codes
            hidden_states = hidden_states.to(layer.weight.dtype)
        outputs = head.dropout(head.activation(project(layer, hidden_states)))
        return hidden_states, outputs.unflatten(-1, (head.num_mixtures, -1))

    @staticmethod
    def is_exact(config: MoSConfig) -> bool:
        """Whether a fresh head predicts what one softmax with its decoder predicts."""
        return config.latent_activation == "identity"

    @staticmethod
    def cost(head: Any) -> float:
        """Multiplications with the decoder, in those of one softmax."""
        return float(head.num_mixtures)

    @staticmethod
    def describe(config: MoSConfig) -> str:
        """One line for a model card."""
        return f"full projections, {config.latent_activation} activation"


class SubspaceLatents(Latents):
    """Equivalent to: the latents `hidden_states.unsqueeze(-2) + shifts @ basis.T`, (..., K, E).

    The components differ inside one subspace of rank R that they share. So their logits are one product of full width
    that all share and K of width R: `h @ W.T + shift_k @ (W @ basis).T`, 1 + K R / E softmax heads instead of K.

    Args: hidden_states (..., E), shifts (..., K, R), basis (E, R).
    """

    layer = "shift"
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
        """Full latents for so few tokens that these cost less than `weight @ basis`."""
        N, K, R = self.shifts.shape
        return Latents(self.dense()) if R >= N * (K - 1) else self

    @classmethod
    def add_modules(cls, head: Any, config: MoSConfig, like: Tensor) -> None:
        R = head.latent_rank
        head.shift = linear_like(like, head.input_size, head.num_mixtures * R, config.latent_bias)
        basis = torch.empty(head.latent_size, R, dtype=like.dtype, device=like.device)
        head.register_buffer("basis", basis, persistent=False)

    @classmethod
    def reset_parameters(cls, head: Any) -> None:
        init.copy_(head.basis, cosine_directions(*head.basis.shape).to(head.basis))
        init.zeros_(head.shift.weight)

    @classmethod
    def of(cls, head: Any, hidden_states: Tensor) -> "SubspaceLatents":
        hidden_states, shifts = cls.activate(head, hidden_states)
        return cls(hidden_states.to(shifts), shifts, head.basis.to(shifts))

    @staticmethod
    def is_exact(config: MoSConfig) -> bool:
        return True

    @staticmethod
    def cost(head: Any) -> float:
        return 1 + head.num_mixtures * head.latent_rank / head.latent_size

    @staticmethod
    def describe(config: MoSConfig) -> str:
        return f"shifts in one shared subspace of rank {config.latent_rank}, {config.latent_activation} activation"


KINDS: dict[str, type[Latents]] = {kind.__name__: kind for kind in (Latents, SubspaceLatents)}


def kind_of(config: MoSConfig) -> type[Latents]:
    """The kind of latents that a config asks for."""
    return Latents if config.latent_rank is None else SubspaceLatents


def as_latents(latents: Tensor | Latents) -> Latents:
    """Wraps a bare tensor (..., K, E) as full latents."""
    return Latents(latents) if isinstance(latents, Tensor) else latents


def linear_like(like: Tensor, input_size: int, output_size: int, bias: bool) -> nn.Linear:
    return nn.Linear(input_size, output_size, bias=bias, dtype=like.dtype, device=like.device)


def cosine_directions(size: int, count: int) -> Tensor:
    """Equivalent to: rows 1, ..., `count` of the orthonormal DCT-II of `size` numbers, as columns (size, count), fp32.

    Every process and every checkpoint computes these directions instead of storing them. Row 0, the constant one,
    comes last: a layer norm leaves nothing in that direction.
    """
    position = torch.arange(size, dtype=torch.float64, device="cpu") + 0.5
    frequency = torch.arange(1, count + 1, dtype=torch.float64, device="cpu") % size
    directions = torch.cos(torch.pi / size * torch.outer(position, frequency))
    return (directions / directions.norm(dim=0)).float()
