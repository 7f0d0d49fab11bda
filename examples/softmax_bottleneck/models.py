"""The compared models: one backbone with different heads, all with the loss of this library.

The controls are heads of the same class, so that nothing but the maths differs, in quality and in cost:

    softmax     log_softmax(decoder(h))
    contexts    log_softmax(decoder(sum_k prior_k(h) latent_k(h))), a mixture of contexts: the mixture's parameters
                and one softmax, whose rank is bounded as any softmax's is
    mixture     log(sum_k prior_k(h) softmax(decoder(latent_k(h)))); with one component a softmax of a latent
    paper       the mixture of the paper's latents, `tanh(shift_k(h))`
    layers      the mixture of latents that also read the middle layer
    warmed      the mixture whose shifts grow to their scale in the first half of the training
    late        the mixture that is one softmax in the first half of the training

A head is on all classes unless it has a `shortlist_size`.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import typer
from paper_head import PaperHead
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel

from hf_mos import MoSForCausalLM, MoSLMHead
from hf_mos.remote_code.mos_shortlist import top_classes


class SoftmaxHead(MoSLMHead):
    """Equivalent to: `log_softmax(decoder(h))`, the control, with the mixture's loss for one component."""

    @classmethod
    def take_over(cls, linear: nn.Linear, **options: Any) -> "SoftmaxHead":
        head = super().take_over(linear, **options)
        del head.prior, head.shift
        return head

    def prior_logits(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.new_zeros(*hidden_states.shape[:-1], 1)

    def latents(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.unsqueeze(-2)


class ContextsHead(MoSLMHead):
    """Equivalent to: `log_softmax(decoder(sum_k prior_k(h) latent_k(h)))`, the mixture of contexts of the paper."""

    prior_logits = SoftmaxHead.prior_logits  # of one component

    def latents(self, hidden_states: Tensor) -> Tensor:
        weights = super().prior_logits(hidden_states).softmax(-1)
        context = torch.einsum("...k,...ke->...e", weights, super().latents(hidden_states))
        return context.unsqueeze(-2)


class DropoutHead(MoSLMHead):
    """Equivalent to: MoSLMHead with dropout on its shifts in training."""

    def latents(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.unsqueeze(-2) + F.dropout(self.shifts(hidden_states), DROPOUT, self.training)


class LayersHead(MoSLMHead):
    """Equivalent to: MoSLMHead whose shifts add a linear layer of the state after the middle layer of a Llama.

    Source: Takase et al. 2018, arXiv 1808.10143, section 3, where each component reads one layer.
    """

    @classmethod
    def take_over(cls, linear: nn.Linear, **options: Any) -> "LayersHead":
        head: Any = super().take_over(linear, **options)
        head.middle_shift = nn.Linear(head.in_features, head.num_mixtures * head.in_features, bias=False)
        nn.init.normal_(head.middle_shift.weight, std=1e-18)  # as the shift
        return head

    def read(self, model: PreTrainedModel) -> None:
        """Reads the middle layer of this model from now on."""
        layers: Any = model.model.layers
        layers[len(layers) // 2 - 1].register_forward_hook(self.keep)

    def keep(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        self.middle = output if isinstance(output, Tensor) else output[0]  # (..., D), not normalised

    def latents(self, hidden_states: Tensor) -> Tensor:
        middle = F.rms_norm(self.middle, self.middle.shape[-1:])
        more = self.latent_scale * self.middle_shift(middle).unflatten(-1, (self.num_mixtures, -1))
        return super().latents(hidden_states) + more


class WarmedHead(MoSLMHead):
    """Equivalent to: MoSLMHead whose shifts are multiplied by a share that grows from 0 to 1."""

    progress = 1.0  # of the training; `fit` sets it before each step
    share = staticmethod(lambda progress: min(1.0, 2 * progress))

    def latents(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.unsqueeze(-2) + self.share(self.progress) * self.shifts(hidden_states)


class LateHead(WarmedHead):
    """Equivalent to: MoSLMHead without shifts in the first half; so a trained z chooses the first shortlist."""

    share = staticmethod(lambda progress: float(progress >= 0.5))


class RescoredHead(MoSLMHead):
    """Equivalent to: one softmax of a trained latent, whose M likeliest classes a second latent scores again."""

    prior_logits = SoftmaxHead.prior_logits  # of one component

    def mean_and_offsets(self, hidden_states: Tensor, widens: bool = True) -> tuple[Tensor, Tensor]:
        first, second = super().latents(hidden_states).unbind(-2)
        return first, (second - first).unsqueeze(-2)


class ChosenHead(MoSLMHead):
    """Equivalent to: MoSLMHead with `shortlist_size`, in plain torch, whose shortlist another rule chooses."""

    def chosen(self, z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns candidates (B, T, C) of logits (B, T, V), and which of them are in the shortlist, each once."""
        raise NotImplementedError

    def __call__(self, hidden_states: Tensor, targets: Tensor | None = None, **options: Any) -> Tensor:
        """Takes the place of `forward`: a head with a forward of its own gets the loss of logits without targets."""
        if targets is None:
            return super().__call__(hidden_states, **options)
        mean, offsets = self.mean_and_offsets(hidden_states)
        z = F.linear(mean, self.weight, self.bias)
        classes, is_in = self.chosen(z.detach(), targets)
        log_gate = F.log_softmax(self.prior_logits(hidden_states), dim=-1).unsqueeze(-1)
        shared = z.gather(-1, classes)
        differences = offsets @ self.weight[classes].transpose(-1, -2)
        mixed = torch.logsumexp(log_gate + shared.unsqueeze(-2) + differences, dim=-2)
        logits = z.scatter_add(-1, classes, (mixed - shared) * is_in)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), **options)


class OwnTokensHead(ChosenHead):
    """The M likeliest classes and the tokens of the sequence so far."""

    def chosen(self, z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        _, top = top_classes(z, self.shortlist_size)
        own = targets.roll(1, dims=1).clamp(min=0)  # the tokens themselves; the first one is not known here
        before = torch.ones(own.shape[1], own.shape[1], dtype=torch.bool).tril()
        before[:, 0] = False
        is_first = ~(own.unsqueeze(1) == own.unsqueeze(2)).tril(-1)[..., 1:].any(-1)  # of its kind in the sequence
        own = own.unsqueeze(1).expand(-1, own.shape[1], -1)
        is_new = ~(own.unsqueeze(-1) == top.unsqueeze(-2)).any(-1)
        is_in = before & is_first.unsqueeze(1) & is_new
        return torch.cat([top, own], dim=-1), torch.cat([torch.ones_like(top, dtype=torch.bool), is_in], dim=-1)


class LikelyClassesHead(ChosenHead):
    """The classes that are likelier than `LIKELY`, M at most."""

    def chosen(self, z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        _, top = top_classes(z, self.shortlist_size)
        return top, z.softmax(dim=-1).gather(-1, top) > LIKELY


LIKELY = 1e-3
DROPOUT = 0.1
HEAD_CLASSES = {
    "softmax": SoftmaxHead,
    "contexts": ContextsHead,
    "paper": PaperHead,
    "dropout": DropoutHead,
    "layers": LayersHead,
    "warmed": WarmedHead,
    "late": LateHead,
    "rescored": RescoredHead,
    "own tokens too": OwnTokensHead,
    f"classes above {LIKELY:g}": LikelyClassesHead,
    "mixture": MoSLMHead,
}


@dataclass(frozen=True)
class Head:
    """A kind of HEAD_CLASSES, and its options in MoSConfig; without a `shortlist_size` it is on all classes."""

    kind: str = "mixture"
    options: dict[str, Any] = field(default_factory=dict)
    prior_spread: float = 1.0  # of the prior's first weights, times that of MoSLMHead

    @property
    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.options, "prior_spread": self.prior_spread}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "Head":
        """The head whose `settings` these are."""
        options = dict(settings)
        return cls(options.pop("kind"), prior_spread=options.pop("prior_spread"), options=options)

    @property
    def name(self) -> str:
        if self.kind == "softmax":
            return "softmax"
        options = dict(self.options)
        K, size = (options.pop(name, None) for name in ("num_mixtures", "shortlist_size"))
        parts = [f"{self.kind} K={K or 4}"]
        parts += [f"M={size}"] if size else []
        parts += [f"prior_spread={self.prior_spread:g}"] if self.prior_spread != 1 else []
        return " ".join([*parts, *(f"{name}={value}" for name, value in options.items())])

    @classmethod
    def from_name(cls, name: str) -> "Head":
        """The head whose `name` this is, such as "mixture K=16 M=64 latent_scale=0.5"."""
        kind, *words = re.split(r" (?=\w+=)", name)
        given = dict(word.split("=", 1) for word in words)
        if kind not in HEAD_CLASSES:
            raise ValueError(f"head: expected a kind of {', '.join(HEAD_CLASSES)}, given {kind!r}")
        long = {"K": "num_mixtures", "M": "shortlist_size"}
        numbers = {long.get(key, key): float(text) for key, text in given.items()}
        prior_spread = numbers.pop("prior_spread", 1.0)
        options = {key: value if key == "latent_scale" else int(value) for key, value in numbers.items()}
        return SOFTMAX if kind == "softmax" else cls(kind, options, prior_spread)

    def take_over(self, linear: nn.Linear, softcap: float | None = None, init_seed: int = 0) -> MoSLMHead:
        """Makes a projection, or another head, this head; it keeps its weights."""
        options = {"shortlist_size": None, "latent_scale": 1.0 if self.kind == "paper" else None} | self.options
        options["shift_rank"] = linear.in_features  # as in the kept runs; the softmax and the paper widen nothing
        return HEAD_CLASSES[self.kind].take_over(linear, softcap=softcap, init_seed=init_seed, **options)


def heads_named(names: Iterable[str]) -> list[Head]:
    """The heads that `--heads` names."""
    try:
        return [Head.from_name(name) for name in names]
    except ValueError as error:
        raise typer.BadParameter(f"--heads: {error}") from error


SOFTMAX = Head("softmax", {"num_mixtures": 1})


def mixture(num_mixtures: int = 4, **options: Any) -> Head:
    return Head("mixture", {"num_mixtures": num_mixtures, **options})


def paper(num_mixtures: int = 4) -> Head:
    return Head("paper", {"num_mixtures": num_mixtures})


def rescored(shortlist_size: int) -> Head:
    return Head("rescored", {"num_mixtures": 2, "shortlist_size": shortlist_size})


def contexts(num_mixtures: int = 4, **options: Any) -> Head:
    return Head("contexts", {"num_mixtures": num_mixtures, **options})


@dataclass(frozen=True)
class Size:
    """The size of the backbone, a GPT-2 whose decoder is tied to its embedding."""

    hidden_size: int
    num_layers: int
    num_heads: int = 2
    dropout: float = 0.0

    @property
    def settings(self) -> dict[str, Any]:
        return asdict(self)

    def config(self, vocab_size: int, block_size: int) -> PreTrainedConfig:
        return GPT2Config(
            vocab_size=vocab_size,
            n_embd=self.hidden_size,
            n_layer=self.num_layers,
            n_head=self.num_heads,
            n_positions=block_size,
            resid_pdrop=self.dropout,
            embd_pdrop=self.dropout,
            attn_pdrop=self.dropout,
            bos_token_id=0,
            eos_token_id=0,
        )


@dataclass(frozen=True)
class LlamaSize(Size):
    """The size of a Llama whose decoder is tied to its embedding; its MLP has 8/3 of the width, as Llama's has."""

    @property
    def settings(self) -> dict[str, Any]:
        return {"family": "llama", **asdict(self)}

    def config(self, vocab_size: int, block_size: int) -> PreTrainedConfig:
        return LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=round(self.hidden_size / 12) * 32,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            max_position_embeddings=block_size,
            attention_dropout=self.dropout,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )


def new_softmax_model(size: Size, vocab_size: int, block_size: int, seed: int) -> PreTrainedModel:
    """A model with random weights, which depend on the seed alone and not on the head."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(size.config(vocab_size, block_size))


def with_head(model: PreTrainedModel, head: Head, seed: int) -> MoSForCausalLM:
    """The model with another head in place of its own; it shares its weights with the result."""
    torch.manual_seed(seed)
    result = MoSForCausalLM.from_causal_lm(model, init_seed=seed, **{"shortlist_size": None} | head.options)
    if head.kind != "mixture":
        taken = head.take_over(result.mos_head, result.mos_head.softcap, seed)
        if isinstance(taken, LayersHead):
            taken.read(result)
    if head.prior_spread != 1:
        result.mos_head.prior.weight.data *= head.prior_spread
    return result
