"""MoSLMHead: the mixture of softmaxes that stands where a causal LM had its vocabulary projection."""

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from .configuration_mos import MoSConfig
from .mos_chunks import tokens_per_chunk
from .mos_decoder import is_shared, shared_cross_entropy
from .mos_inference import infer_log_probs
from .mos_latents import SubspaceLatents
from .mos_log_probs import cap_logits, mix_log_probs, mos_log_probs
from .mos_loss import mos_cross_entropy
from .mos_matmul import multiply
from .mos_token_scores import ScoreOptions, score, token_scores

ACTIVATIONS = {"identity": nn.Identity, "tanh": nn.Tanh}


class MoSLMHead(nn.Module):
    """Equivalent to: `mos_log_probs(activation(latent(h)).view(..., K, E), prior(h), decoder.weight)`.

    K latents, each a projection of the hidden state, share one decoder; the prior weighs their softmaxes. The
    parameters have the names of the paper's code: `prior`, `latent`, `decoder`. With `latent_rank` the latents are
    `h + basis(activation(shift(h))_k)` instead, see [`SubspaceLatents`], and `shift` stands for `latent`, beside a
    `basis` of fixed orthonormal directions.

    `head(hidden_states)` gives log-probabilities; `head(hidden_states, targets=..., reduction=...)` gives the loss,
    without a vocabulary-wide tensor. `temperature` in generation acts on the mixture, not on each component, as what
    it divides are the mixture's log-probabilities.

    Args:
        config: K, the latents, dropout, softcap; and, where no `decoder` is given, the decoder's shape.
        decoder: the vocabulary projection (V, D) to take over, module and weights; `None` makes a new one.

    Raises:
        ValueError: the decoder's width cannot be the latents' width.

    Initialisation: every latent is the hidden state itself (the identity projection, or a shift of zero), so the
    mixture predicts what one softmax with its decoder predicts, whatever the prior. The prior has random weights of
    standard deviation 1 / sqrt(D), so that the mixture weights differ from token to token, each component gets the
    gradients of other tokens, and the components part. Under equal weights their gradients would be equal and they
    would stay clones for ever. The basis is fixed: Adam moves a trained one at random while the shift is still zero,
    and none of the gain was left then (`examples/softmax_bottleneck/defaults.py`).
    Measured by `python examples/benchmarks/initialisation.py --threads 1` (K = 4, D = 32, V = 2048, 400 steps from the
    same checkpoint; largest change of a log-probability at step 0, then validation perplexity, where one softmax
    reaches 118):

        identity, random prior (the default)          2e-6    113
        shift of zero, random prior, latent_rank 8    2e-6    116
        identity, three times the prior's spread      2e-6    116
        identity, equal weights: clones               2e-6    117
        identity and noise of 0.02, equal weights     0.98    112

    Source: Yang et al. 2018, arXiv 1711.03953, section 2.3.
    """

    basis: Tensor  # (E, R)

    def __init__(self, config: MoSConfig, decoder: nn.Linear | None = None) -> None:
        super().__init__()
        if decoder is None:
            input_size, bias = config.hidden_size, bool(config.decoder_bias)
            decoder = nn.Linear(config.latent_size or input_size, config.vocab_size, bias=bias)
        else:
            input_size = decoder.in_features
            decoder = _fit_decoder(decoder, config)
        self.num_mixtures = K = config.num_mixtures
        self.input_size = input_size
        self.latent_size = decoder.in_features
        self.latent_rank = config.latent_rank
        self.softcap = config.softcap
        self.balance_coefficient = config.balance_coefficient
        dtype, device = decoder.weight.dtype, decoder.weight.device
        prior_dtype = torch.promote_types(dtype, torch.float32)
        self.prior = nn.Linear(input_size, K, bias=config.prior_bias, dtype=prior_dtype, device=device)
        if self.latent_rank is None:
            self.latent = nn.Linear(
                input_size, K * self.latent_size, bias=config.latent_bias, dtype=dtype, device=device
            )
        else:
            self.shift = nn.Linear(
                input_size, K * self.latent_rank, bias=config.latent_bias, dtype=dtype, device=device
            )
            basis = torch.empty(self.latent_size, self.latent_rank, dtype=dtype, device=device)
            self.register_buffer("basis", basis, persistent=False)
        self.activation = ACTIVATIONS[config.latent_activation]()
        self.dropout = nn.Dropout(config.latent_dropout)
        self.decoder = decoder
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialises all but the decoder, as the class's docstring says."""
        init.normal_(self.prior.weight, std=self.input_size**-0.5)
        if self.latent_rank is not None:
            init.copy_(self.basis, cosine_directions(self.latent_size, self.latent_rank).to(self.basis))
        if (self.latent if self.latent_rank is None else self.shift).weight.numel() == 0:
            pass  # ZeRO-3 has taken it away, while a checkpoint is loaded
        elif self.latent_rank is not None:
            init.zeros_(self.shift.weight)
        elif isinstance(self.activation, nn.Identity):
            eye = torch.eye(self.latent_size, self.input_size)
            init.copy_(self.latent.weight, eye.repeat(self.num_mixtures, 1).to(self.latent.weight))
        else:
            init.xavier_uniform_(self.latent.weight)
        for layer in (self.prior, self.shift if self.latent_rank is not None else self.latent):
            if layer.bias is not None:
                init.zeros_(layer.bias)

    def forward(
        self,
        hidden_states: Tensor,
        targets: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        chunk_size: int | None = None,
        scores: ScoreOptions | None = None,
    ) -> Any:
        """Log-probabilities, or with `targets` the loss, or with `scores` too what else is asked about each token.

        Args:
            hidden_states: (..., D).
            targets: (...), class indices aligned with the hidden states (not shifted), or `None`.
            reduction, ignore_index, chunk_size: as in `mos_cross_entropy`.
            scores: what to return of each target, none of which is ignored, in place of the loss.

        Returns:
            Without targets (..., V), natural log-probabilities in fp32 or wider. With targets the loss in nats; with
            `scores` those of `mos_token_scores.py`, each over the flattened targets.
        """
        leading = hidden_states.shape[:-1]
        if targets is not None and targets.shape != leading:
            raise ValueError(f"targets: expected {tuple(leading)}, given {tuple(targets.shape)}")
        hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
        prior_logits, latents = self.prior_logits(hidden_states), self.latents(hidden_states)
        if targets is None:
            return self._log_probs(latents, prior_logits).unflatten(0, leading)
        if scores is not None:
            return self._token_scores(latents, prior_logits, targets.flatten(), scores)
        options: dict[str, Any] = {"reduction": reduction, "ignore_index": ignore_index, "chunk_size": chunk_size}
        targets = targets.flatten()
        if _may_read(self.decoder):
            bias = self.decoder.bias
            loss = mos_cross_entropy(
                latents, prior_logits, self.decoder.weight, targets, decoder_bias=bias, softcap=self.softcap, **options
            )
        elif is_shared(self.decoder) and not torch.compiler.is_compiling():
            loss = shared_cross_entropy(self.decoder, latents, prior_logits, targets, softcap=self.softcap, **options)
        else:
            loss = self._loss_through_decoder(latents, prior_logits, targets, **options)
        if self.training and self.balance_coefficient:
            loss = loss + self._balance_loss(prior_logits, targets != ignore_index, reduction)
        return loss.view(leading) if reduction == "none" else loss

    def _balance_loss(self, prior_logits: Tensor, counts: Tensor, reduction: str) -> Tensor:
        """What each token that counts adds to the loss, reduced as the loss is."""
        weights = F.softmax(prior_logits, dim=-1) * counts.unsqueeze(-1)
        mean_weights = weights.sum(0) / counts.sum().clamp(min=1)
        variation = self.num_mixtures * mean_weights.square().sum() - 1  # variance / mean^2, as the mean is 1 / K
        balance = self.balance_coefficient * variation * counts
        if reduction == "none":
            return balance
        return balance.sum() if reduction == "sum" else balance.sum() / counts.sum().clamp(min=1)

    def prior_logits(self, hidden_states: Tensor) -> Tensor:
        """The prior's raw output (..., K) for hidden states (..., D); in the prior's own dtype under autocast too."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self.prior(hidden_states.to(self.prior.weight.dtype))

    def latents(self, hidden_states: Tensor) -> Tensor | SubspaceLatents:
        """The latents (..., K, E) for hidden states (..., D)."""
        projection = self.latent if self.latent_rank is None else self.shift
        if projection.weight.is_floating_point():  # not of a quantizer, whose dtype is that of its codes
            hidden_states = hidden_states.to(projection.weight.dtype)
        outputs = self.dropout(self.activation(_project(projection, hidden_states)))
        outputs = outputs.unflatten(-1, (self.num_mixtures, -1))
        if self.latent_rank is None:
            return outputs
        return SubspaceLatents(hidden_states.to(outputs), outputs, self.basis.to(outputs))

    def _log_probs(self, latents: Tensor | SubspaceLatents, prior_logits: Tensor) -> Tensor:
        if not _may_read(self.decoder):
            return self._log_probs_through_decoder(latents, prior_logits)
        weight = self.decoder.weight.to((latents if isinstance(latents, Tensor) else latents.hidden_states).dtype)
        differentiable = torch.is_grad_enabled() or torch.compiler.is_compiling()
        log_probs = mos_log_probs if differentiable else infer_log_probs
        return log_probs(latents, prior_logits, weight, decoder_bias=self.decoder.bias, softcap=self.softcap)

    def _log_probs_through_decoder(self, latents: Tensor | SubspaceLatents, prior_logits: Tensor) -> Tensor:
        dense = latents.dense() if isinstance(latents, SubspaceLatents) else latents
        component_logits = self.decoder(dense)
        return mix_log_probs(cap_logits(component_logits, self.softcap), prior_logits.to(component_logits.device))

    def _loss_through_decoder(
        self,
        latents: Tensor | SubspaceLatents,
        prior_logits: Tensor,
        targets: Tensor,
        reduction: str,
        ignore_index: int,
        chunk_size: int | None,
    ) -> Tensor:
        """The loss by autograd through a call of the decoder: a chunk of tokens at a time, each computed twice."""

        def chunk_nll(latents: Tensor, prior_logits: Tensor, targets: Tensor) -> Tensor:
            log_probs = self._log_probs_through_decoder(latents, prior_logits)
            return F.nll_loss(log_probs, targets, ignore_index=ignore_index, reduction="none")

        dense = latents.dense() if isinstance(latents, SubspaceLatents) else latents
        size = chunk_size or self._tokens_per_call(dense.device)
        chunks = zip(dense.split(size), prior_logits.split(size), targets.split(size), strict=True)
        nll = torch.cat([checkpoint(chunk_nll, *chunk, use_reentrant=False) for chunk in chunks])
        if reduction == "none":
            return nll
        return nll.sum() if reduction == "sum" else nll.sum() / (targets != ignore_index).sum().clamp(min=1)

    def _token_scores(
        self, latents: Tensor | SubspaceLatents, prior_logits: Tensor, targets: Tensor, options: ScoreOptions
    ) -> tuple[Tensor | None, ...]:
        if _may_read(self.decoder):
            weight, bias = self.decoder.weight, self.decoder.bias
            return token_scores(
                latents, prior_logits, weight, targets, options, decoder_bias=bias, softcap=self.softcap
            )

        def chunk_scores(latents: Tensor, prior_logits: Tensor, targets: Tensor) -> tuple[Tensor | None, ...]:
            return score(self._log_probs_through_decoder(latents, prior_logits), targets, options)

        dense = latents.dense() if isinstance(latents, SubspaceLatents) else latents
        size = self._tokens_per_call(dense.device)
        chunks = zip(dense.split(size), prior_logits.split(size), targets.split(size), strict=True)
        parts = [checkpoint(chunk_scores, *chunk, use_reentrant=False) for chunk in chunks]
        return tuple(None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True))

    def _tokens_per_call(self, device: torch.device) -> int:
        """How many tokens the decoder is called for at a time. Not every adapter names its width."""
        decoder = self.decoder
        V = decoder.out_features if hasattr(decoder, "out_features") else decoder.weight.shape[0]
        return tokens_per_chunk(self.num_mixtures, V, 24, device)

    def extra_repr(self) -> str:
        return f"num_mixtures={self.num_mixtures}, latent_rank={self.latent_rank}, softcap={self.softcap}"


def _may_read(projection: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether this is a plain projection whose weight may be read, or must be called.

    An adapter, a quantizer, an offloading hook or a sharded tensor puts something else in its place, and its weight
    alone is then not what it computes.
    """
    hooked = projection._forward_hooks or projection._forward_pre_hooks or hasattr(projection, "_hf_hook")
    return type(projection) is nn.Linear and type(projection.weight) in (nn.Parameter, Tensor) and not hooked


def _project(projection: nn.Module, hidden_states: Tensor) -> Tensor:
    """Equivalent to: `projection(hidden_states)`; without gradients by the faster product."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _may_read(projection):
        return projection(hidden_states)
    outputs = multiply(hidden_states.flatten(0, -2), projection.weight, projection.bias)
    return outputs.unflatten(0, hidden_states.shape[:-1])


def cosine_directions(size: int, count: int) -> Tensor:
    """Equivalent to: rows 1, ..., `count` of the orthonormal DCT-II of `size` numbers, as columns (size, count), fp32.

    Directions that every process and every checkpoint has without storing them. Row 0, the constant one, comes last:
    a layer norm leaves nothing in that direction.
    """
    position = torch.arange(size, dtype=torch.float64, device="cpu") + 0.5
    frequency = torch.arange(1, count + 1, dtype=torch.float64, device="cpu") % size
    directions = torch.cos(torch.pi / size * torch.outer(position, frequency))
    return (directions / directions.norm(dim=0)).float()


def _fit_decoder(decoder: nn.Linear, config: MoSConfig) -> nn.Linear:
    """The decoder itself where it fits the config, else a new one of the same vocabulary."""
    D, V = decoder.in_features, decoder.out_features
    E = config.latent_size or D
    has_bias = decoder.bias is not None
    bias = has_bias if config.decoder_bias is None else config.decoder_bias
    if E == D and bias == has_bias:
        return decoder
    if E != D and config.tie_word_embeddings:
        raise ValueError(f"latent_size: expected {D}, the width of the tied decoder, given {E}")
    fitted = nn.Linear(E, V, bias=bias, dtype=decoder.weight.dtype, device=decoder.weight.device)
    if E == D:
        fitted.weight = decoder.weight
        if bias:
            init.zeros_(fitted.bias)
    return fitted
