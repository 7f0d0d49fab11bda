"""The kinds of latents: the K hidden states (..., K, E) that the decoder sees, each kind in its cheapest form.

A kind is one class. Its instances hold the latents of some tokens; its class methods make the head's modules, compute
the latents with them, and describe the kind. To add a kind: write its class here and name it in `kind_of`, its
projection in `mos_projections.py`, and its field in `configuration_mos.py`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_mos import MoSConfig
from .mos_matmul import project
from .mos_projections import FullProjection, Projection, SubspaceProjection, Tokens

Kind = TypeVar("Kind", bound="Latents")


class Head(Protocol):
    """The part of [`MoSLMHead`] that a kind reads; `latent`, `shift` and `basis` are modules that a kind adds."""

    num_mixtures: int
    input_size: int
    latent_size: int
    latent_rank: int | None
    activation: nn.Module
    dropout: nn.Dropout
    latent: nn.Linear
    shift: nn.Linear
    basis: Tensor  # (E, R)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None: ...


class Latents(ABC):
    """The latents of N tokens; a leading (...) in the shapes below stands for N or any shape."""

    per_token: ClassVar[tuple[bool, ...]]  # whether each of `tensors` has rows of its own for each token

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The fields of the kind, in the order of its constructor."""
        return tuple(vars(self).values())

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    def to(self: Kind, dtype: torch.dtype) -> Kind:
        return type(self)(*(tensor.to(dtype) for tensor in self.tensors))

    def __getitem__(self: Kind, tokens: Tokens) -> Kind:
        """The latents of some of the N tokens."""
        pairs = zip(self.tensors, self.per_token, strict=True)
        return type(self)(*(tensor[tokens] if has_rows else tensor for tensor, has_rows in pairs))

    @property
    @abstractmethod
    def shape(self) -> torch.Size: ...  # (..., K, E)

    @abstractmethod
    def check(self) -> None: ...  # raises a ValueError where the tensors do not fit together

    @abstractmethod
    def dense(self) -> Tensor: ...  # the latents themselves, (..., K, E)

    @abstractmethod
    def projection(self, *arguments: Any) -> Projection:
        """The kind's projection, made of `tensors` and the arguments `weight, wanted, wants_weight, sum_dtype`."""

    def for_inference(self) -> "Latents":
        """The kind that costs the least for these tokens without gradients."""
        return self

    @classmethod
    @abstractmethod
    def add_modules(cls, head: Head, config: MoSConfig, like: Tensor) -> None:
        """Adds the modules that compute the latents to the head, with the dtype and device of `like`."""

    @classmethod
    @abstractmethod
    def reset_parameters(cls, head: Head) -> None: ...  # initialises their weights; biases are zero in every kind

    @classmethod
    @abstractmethod
    def of(cls: type[Kind], head: Head, hidden_states: Tensor) -> Kind: ...  # for hidden states (..., D)

    @staticmethod
    @abstractmethod
    def is_exact(config: MoSConfig) -> bool: ...  # whether a fresh head predicts as one softmax with its decoder does

    @staticmethod
    @abstractmethod
    def cost(head: Head) -> float: ...  # multiplications with the decoder, in those of one softmax

    @staticmethod
    @abstractmethod
    def describe(config: MoSConfig) -> str: ...  # one line for a model card


@dataclass(frozen=True, eq=False)
class FullLatents(Latents):
    """Equivalent to: `activation(latent(h)).view(..., K, E)`, a projection of the hidden state for each component."""

    per_token = (True,)
    values: Tensor  # (..., K, E)

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def check(self) -> None:
        pass

    def dense(self) -> Tensor:
        return self.values

    def projection(self, *arguments: Any) -> Projection:
        return FullProjection(self.values, *arguments)

    @classmethod
    def add_modules(cls, head: Head, config: MoSConfig, like: Tensor) -> None:
        head.latent = linear_like(like, head.input_size, head.num_mixtures * head.latent_size, config.latent_bias)

    @classmethod
    def reset_parameters(cls, head: Head) -> None:
        if head.latent.weight.numel() == 0:
            return  # ZeRO-3 has emptied it, as it does while it loads a checkpoint
        if isinstance(head.activation, nn.Identity):
            eye = torch.eye(head.latent_size, head.input_size)
            init.copy_(head.latent.weight, eye.repeat(head.num_mixtures, 1).to(head.latent.weight))
        else:
            init.xavier_uniform_(head.latent.weight)

    @classmethod
    def of(cls, head: Head, hidden_states: Tensor) -> "FullLatents":
        return cls(activate(head, head.latent, in_dtype_of(head.latent, hidden_states)))

    @staticmethod
    def is_exact(config: MoSConfig) -> bool:
        return config.latent_activation == "identity"

    @staticmethod
    def cost(head: Head) -> float:
        return float(head.num_mixtures)

    @staticmethod
    def describe(config: MoSConfig) -> str:
        return f"full projections, {config.latent_activation} activation"


@dataclass(frozen=True, eq=False)
class SubspaceLatents(Latents):
    """Equivalent to: the latents `hidden_states.unsqueeze(-2) + shifts @ basis.T`, (..., K, E).

    The components differ inside one subspace of rank R that they share. So their logits are one product of full width
    that all share and K of width R: `h @ W.T + shift_k @ (W @ basis).T`, 1 + K R / E softmax heads instead of K.
    """

    per_token = (True, True, False)
    hidden_states: Tensor  # (..., E)
    shifts: Tensor  # (..., K, R)
    basis: Tensor  # (E, R)

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
        return FullLatents(self.dense()) if R >= N * (K - 1) else self

    @classmethod
    def add_modules(cls, head: Head, config: MoSConfig, like: Tensor) -> None:
        R = head.latent_rank or 0
        head.shift = linear_like(like, head.input_size, head.num_mixtures * R, config.latent_bias)
        basis = torch.empty(head.latent_size, R, dtype=like.dtype, device=like.device)
        head.register_buffer("basis", basis, persistent=False)

    @classmethod
    def reset_parameters(cls, head: Head) -> None:
        init.copy_(head.basis, cosine_directions(*head.basis.shape).to(head.basis))
        init.zeros_(head.shift.weight)

    @classmethod
    def of(cls, head: Head, hidden_states: Tensor) -> "SubspaceLatents":
        hidden_states = in_dtype_of(head.shift, hidden_states)
        shifts = activate(head, head.shift, hidden_states)
        return cls(hidden_states.to(shifts), shifts, head.basis.to(shifts))

    @staticmethod
    def is_exact(config: MoSConfig) -> bool:
        return True

    @staticmethod
    def cost(head: Head) -> float:
        return 1 + head.num_mixtures * (head.latent_rank or 0) / head.latent_size

    @staticmethod
    def describe(config: MoSConfig) -> str:
        return f"shifts in one shared subspace of rank {config.latent_rank}, {config.latent_activation} activation"


KINDS: dict[str, type[Latents]] = {kind.__name__: kind for kind in (FullLatents, SubspaceLatents)}


def kind_of(config: MoSConfig) -> type[Latents]:
    """The kind of latents that a config asks for."""
    return FullLatents if config.latent_rank is None else SubspaceLatents


def as_latents(latents: Tensor | Latents) -> Latents:
    """Wraps a bare tensor (..., K, E) as full latents."""
    return FullLatents(latents) if isinstance(latents, Tensor) else latents


def linear_like(like: Tensor, input_size: int, output_size: int, bias: bool) -> nn.Linear:
    return nn.Linear(input_size, output_size, bias=bias, dtype=like.dtype, device=like.device)


def activate(head: Head, layer: nn.Linear, hidden_states: Tensor) -> Tensor:
    """Equivalent to: `dropout(activation(layer(hidden_states)))`, split over the components: (..., K, _)."""
    outputs = head.dropout(head.activation(project(layer, hidden_states)))
    return outputs.unflatten(-1, (head.num_mixtures, -1))


def in_dtype_of(layer: nn.Linear, hidden_states: Tensor) -> Tensor:
    """The hidden states in the dtype of a layer's weight; a quantizer's weight has the dtype of its codes instead."""
    return hidden_states.to(layer.weight.dtype) if layer.weight.is_floating_point() else hidden_states


def cosine_directions(size: int, count: int) -> Tensor:
    """Equivalent to: rows 1, ..., `count` of the orthonormal DCT-II of `size` numbers, as columns (size, count), fp32.

    Every process and every checkpoint computes these directions instead of storing them. Row 0, the constant one,
    comes last: a layer norm leaves nothing in that direction.
    """
    position = torch.arange(size, dtype=torch.float64, device="cpu") + 0.5
    frequency = torch.arange(1, count + 1, dtype=torch.float64, device="cpu") % size
    directions = torch.cos(torch.pi / size * torch.outer(position, frequency))
    return (directions / directions.norm(dim=0)).float()
