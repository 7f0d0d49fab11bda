"""MoSLMHead: the mixture of softmaxes that stands where a causal LM had its vocabulary projection."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from .configuration_mos import MoSConfig
from .mixture_of_softmaxes import cap_logits, mix_log_probs, widen
from .mos_loss import mos_cross_entropy, tokens_per_chunk

ACTIVATIONS = {"identity": nn.Identity, "tanh": nn.Tanh}


class MoSLMHead(nn.Module):
    """Equivalent to: `mos_log_probs(activation(latent(h)).view(..., K, E), prior(h), decoder.weight)`.

    K latents, each a projection of the hidden state, share one decoder; the prior weighs their softmaxes. The
    parameters have the names of the paper's code: `prior`, `latent`, `decoder`.

    `head(hidden_states)` gives log-probabilities; `head(hidden_states, targets=..., reduction=...)` gives the loss,
    without a vocabulary-wide tensor. `temperature` in generation acts on the mixture, not on each component, as what
    it divides are the mixture's log-probabilities.

    Args:
        config: K, the latents, dropout, softcap; and, where no `decoder` is given, the decoder's shape.
        decoder: the vocabulary projection (V, D) to take over, module and weights; `None` makes a new one.

    Raises:
        ValueError: the decoder's width cannot be the latents' width, or its bias contradicts the config.

    Initialisation: with the identity activation every latent is the hidden state itself, so the mixture predicts what
    one softmax with its decoder predicts, whatever the prior. The prior's weights are random with standard deviation
    1 / sqrt(D). So the mixture weights differ from token to token, each component gets the gradients of other tokens,
    and the components part; under equal weights they would stay clones for ever, as their gradients would be equal.
    `examples/benchmarks/initialisation.py` measures this against the alternatives.

    Source: Yang et al. 2018, arXiv 1711.03953, section 2.3.
    """

    def __init__(self, config: MoSConfig, decoder: nn.Linear | None = None) -> None:
        super().__init__()
        if decoder is None:
            input_size, bias = config.hidden_size, bool(config.decoder_bias)
            decoder = nn.Linear(config.latent_size or input_size, config.vocab_size, bias=bias)
        else:
            input_size = decoder.in_features
            decoder = _fit_decoder(decoder, config)
        self.num_mixtures = config.num_mixtures
        self.input_size = input_size
        self.latent_size = decoder.in_features
        self.softcap = config.softcap
        dtype, device = decoder.weight.dtype, decoder.weight.device
        prior_dtype = dtype if dtype.itemsize >= 4 or not dtype.is_floating_point else torch.float32
        K = self.num_mixtures
        self.prior = nn.Linear(input_size, K, bias=config.prior_bias, dtype=prior_dtype, device=device)
        self.latent = nn.Linear(input_size, K * self.latent_size, bias=config.latent_bias, dtype=dtype, device=device)
        self.activation = ACTIVATIONS[config.latent_activation]()
        self.dropout = nn.Dropout(config.latent_dropout)
        self.decoder = decoder
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialises prior and latent, as the class's docstring says. The decoder keeps its weights."""
        init.normal_(self.prior.weight, std=self.input_size**-0.5)
        if isinstance(self.activation, nn.Identity):
            eye = torch.eye(self.latent_size, self.input_size, dtype=torch.float32)
            init.copy_(self.latent.weight, eye.repeat(self.num_mixtures, 1).to(self.latent.weight))
        else:
            init.xavier_uniform_(self.latent.weight)
        for layer in (self.prior, self.latent):
            if layer.bias is not None:
                init.zeros_(layer.bias)

    def forward(
        self,
        hidden_states: Tensor,
        targets: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        chunk_size: int | None = None,
    ) -> Tensor:
        """Log-probabilities, or with `targets` the loss.

        Args:
            hidden_states: (..., D).
            targets: (...), class indices aligned with the hidden states (not shifted), or `None`.
            reduction, ignore_index, chunk_size: as in `mos_cross_entropy`.

        Returns:
            Without targets (..., V), natural log-probabilities in fp32 or wider. With targets the loss in nats.
        """
        prior_logits = self.prior_logits(hidden_states)
        latents = self.latents(hidden_states)
        if targets is None:
            return self._log_probs(latents, prior_logits)
        if targets.shape != hidden_states.shape[:-1]:
            raise ValueError(f"targets: expected {tuple(hidden_states.shape[:-1])}, given {tuple(targets.shape)}")
        flat = (latents.flatten(0, -3), prior_logits.flatten(0, -2))
        flat_targets = targets.flatten()
        if self._reads_decoder():
            loss = mos_cross_entropy(
                *flat,
                self.decoder.weight,
                flat_targets,
                decoder_bias=self.decoder.bias,
                softcap=self.softcap,
                ignore_index=ignore_index,
                reduction=reduction,
                chunk_size=chunk_size,
            )
        else:
            loss = self._loss_through_decoder(*flat, flat_targets, reduction, ignore_index, chunk_size)
        return loss.view(targets.shape) if reduction == "none" else loss

    def prior_logits(self, hidden_states: Tensor) -> Tensor:
        """The prior's raw output (..., K) for hidden states (..., D); in the prior's own dtype under autocast too."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self.prior(hidden_states.to(self.prior.weight.dtype))

    def latents(self, hidden_states: Tensor) -> Tensor:
        """The latents (..., K, E) for hidden states (..., D)."""
        hidden_states = hidden_states.to(self.latent.weight.dtype)
        latents = self.dropout(self.activation(self.latent(hidden_states)))
        return latents.unflatten(-1, (self.num_mixtures, self.latent_size))

    def _reads_decoder(self) -> bool:
        """Whether the decoder is a plain projection that the fast paths may read, or must be called.

        An adapter, a quantizer, an offloading hook or a sharded tensor puts something else in its place, and its
        weight alone is then not what it computes.
        """
        decoder = self.decoder
        hooked = decoder._forward_hooks or decoder._forward_pre_hooks or hasattr(decoder, "_hf_hook")
        return type(decoder) is nn.Linear and type(decoder.weight) in (nn.Parameter, Tensor) and not hooked

    def _component_logits(self, latents: Tensor) -> Tensor:
        if self._reads_decoder():
            component_logits = F.linear(latents, self.decoder.weight.to(latents.dtype), self.decoder.bias)
        else:
            component_logits = self.decoder(latents)
        return cap_logits(component_logits, self.softcap)

    def _log_probs(self, latents: Tensor, prior_logits: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return mix_log_probs(self._component_logits(latents), prior_logits)
        # Without gradients nothing of (N, K, V) has to be kept: one chunk of tokens at a time.
        leading = prior_logits.shape[:-1]
        latents, prior_logits = latents.flatten(0, -3), prior_logits.flatten(0, -2)
        size = tokens_per_chunk(latents, self.decoder.out_features, copies=3)
        log_probs = latents.new_empty(latents.shape[0], self.decoder.out_features, dtype=widen(latents[:0]).dtype)
        for rows, chunk, prior in zip(
            log_probs.split(size), latents.split(size), prior_logits.split(size), strict=True
        ):
            rows.copy_(mix_log_probs(self._component_logits(chunk), prior))
        return log_probs.view(*leading, -1)

    def _loss_through_decoder(
        self,
        latents: Tensor,
        prior_logits: Tensor,
        targets: Tensor,
        reduction: str,
        ignore_index: int,
        chunk_size: int | None,
    ) -> Tensor:
        """The loss by autograd through a call of the decoder: a chunk of tokens at a time, each computed twice."""

        def chunk_nll(latents: Tensor, prior_logits: Tensor, targets: Tensor) -> Tensor:
            log_probs = mix_log_probs(self._component_logits(latents), prior_logits)
            return F.nll_loss(log_probs, targets, ignore_index=ignore_index, reduction="none")

        size = chunk_size or tokens_per_chunk(latents, self.decoder.out_features, copies=6)
        chunks = zip(latents.split(size), prior_logits.split(size), targets.split(size), strict=True)
        nll = torch.cat([checkpoint(chunk_nll, *chunk, use_reentrant=False) for chunk in chunks])
        if reduction == "none":
            return nll
        return nll.sum() if reduction == "sum" else nll.sum() / (targets != ignore_index).sum().clamp(min=1)

    def extra_repr(self) -> str:
        return f"num_mixtures={self.num_mixtures}, softcap={self.softcap}"


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
