"""MoSLMHead: the mixture of softmaxes in place of a causal LM's vocabulary projection."""

from typing import Unpack, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_mos import MoSConfig
from .mos_decoder import Reduction, device_of, use_of
from .mos_latents import Latents, in_dtype_of, kind_of, with_gradient
from .mos_log_probs import divisor, reduce
from .mos_token_scores import SCORES, ScoreOptions, Scores

ACTIVATIONS = {"identity": nn.Identity, "tanh": nn.Tanh}


class MoSLMHead(nn.Module):
    """Equivalent to: `mos_log_probs(latents(h), prior(h), decoder.weight)`.

    K latents, each a function of the hidden state, share one decoder; the prior weighs their softmaxes. The latents
    are `h + latent_scale * shift(h)_k`, and the prior's logits are `prior(latent_scale * h)`. `mos_latents.py` has the
    kinds of latents, each with its modules: `shift`, with `latent_rank` also a `basis` of fixed orthonormal
    directions, or the paper's `latent`.

    Args:
        config: K, the latents, dropout, softcap; and, where no `decoder` is given, the decoder's shape.
        decoder: the vocabulary projection (V, D) to take over, module and weights; `None` makes a new one.

    Raises:
        ValueError: the decoder's width cannot be the latents' width.

    Initialisation: every shift is zero, so every latent is the hidden state itself and the mixture predicts what one
    softmax with its decoder predicts, whatever the prior. The prior's logits have random weights of standard deviation
    1 / sqrt(D), so that the mixture weights differ from token to token, each component gets the gradients of other
    tokens, and the components part. Under equal weights their gradients would be equal and they would stay clones for
    ever (`python examples/benchmarks/initialisation.py --threads 1` compares). The basis is
    fixed: Adam moves a trained one at random while the shift is still zero, and then none of the gain was left
    (`examples/softmax_bottleneck/defaults.py`).

    Source: Yang et al. 2018, arXiv 1711.03953, section 2.3.
    """

    # The modules of the kind of latents; a head has those of one kind.
    latent: nn.Linear
    shift: nn.Linear
    basis: Tensor  # (E, R)

    def __init__(self, config: MoSConfig, decoder: nn.Linear | None = None) -> None:
        super().__init__()
        if decoder is None:
            input_size, bias = config.hidden_size, bool(config.decoder_bias)
            decoder = nn.Linear(config.latent_size or input_size, config.vocab_size, bias=bias)
        else:
            input_size = decoder.in_features
            decoder = _fit_decoder(decoder, config)
        self.num_mixtures = config.num_mixtures
        self.input_size: int = input_size
        self.latent_size = decoder.in_features
        self.latent_rank = config.latent_rank
        self.shortlist_size = config.shortlist_size
        assert config.latent_scale is not None  # MoSConfig replaces it
        self.latent_scale = config.latent_scale
        self.softcap = config.softcap
        self.balance_coefficient = config.balance_coefficient
        dtype, device = decoder.weight.dtype, device_of(decoder)
        prior_dtype = torch.promote_types(dtype, torch.float32)
        self.prior = nn.Linear(input_size, self.num_mixtures, config.prior_bias, dtype=prior_dtype, device=device)
        self.kind = kind_of(config)
        self.kind.add_modules(self, config, dtype, device)
        self.activation = ACTIVATIONS[config.latent_activation]()
        self.dropout = nn.Dropout(config.latent_dropout)
        self.decoder = decoder
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialises all but the decoder, as the class's docstring says."""
        init.normal_(self.prior.weight, std=self.input_size**-0.5 / self.latent_scale)
        self.kind.reset_parameters(self)
        for layer in self.children():
            if isinstance(layer, nn.Linear) and layer is not self.decoder and layer.bias is not None:
                init.zeros_(layer.bias)

    @overload
    def forward(self, hidden_states: Tensor, *, add_log_partition: bool = False) -> Tensor: ...

    @overload
    def forward(self, hidden_states: Tensor, targets: Tensor, **options: Unpack[Reduction]) -> Tensor: ...

    @overload
    def forward(self, hidden_states: Tensor, targets: Tensor, *, scores: ScoreOptions) -> Scores: ...

    def forward(
        self,
        hidden_states: Tensor,
        targets: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        chunk_size: int | None = None,
        scores: ScoreOptions | None = None,
        add_log_partition: bool = False,
    ) -> Tensor | Scores:
        """Computes log-probabilities, with `targets` the loss, with `scores` too the scores of each token.

        Args:
            hidden_states: (..., D).
            targets: (...), class indices aligned with the hidden states (not shifted), or `None`.
            reduction, ignore_index, chunk_size: as in `mos_cross_entropy`.
            scores: the scores to return in place of the loss; then no target may be ignored.
            add_log_partition: without targets, as in `mix_log_probs`.

        Returns:
            Without targets (..., V), natural log-probabilities in fp32 or wider. With targets the loss in nats; with
            `scores` the scores of `mos_token_scores.py`, each over the flattened targets.
        """
        leading = hidden_states.shape[:-1]
        if targets is not None and targets.shape != leading:
            raise ValueError(f"targets: expected {tuple(leading)}, given {tuple(targets.shape)}")
        hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
        prior_logits, latents = self.prior_logits(hidden_states), self.latents(hidden_states)
        decoder = use_of(self.decoder, self.softcap)
        if targets is None:
            return decoder.log_probs(latents, prior_logits, add_log_partition).unflatten(0, leading)
        targets = targets.flatten()
        if scores == ScoreOptions() and not torch.is_grad_enabled():  # the loss makes no distribution
            options = Reduction(reduction="none", ignore_index=ignore_index, chunk_size=chunk_size)
            nll = decoder.loss(latents, prior_logits, targets, **options)
            return (-nll, *(None,) * (len(SCORES) - 1))
        if scores is not None:
            return decoder.scores(latents, prior_logits, targets, scores)
        loss = decoder.loss(
            latents, prior_logits, targets, reduction=reduction, ignore_index=ignore_index, chunk_size=chunk_size
        )
        if self.training and self.balance_coefficient:
            loss = loss + self._balance_loss(prior_logits, targets != ignore_index, reduction)
        return loss.view(leading) if reduction == "none" else loss

    def prior_logits(self, hidden_states: Tensor) -> Tensor:
        """The logits of the prior (..., K) for hidden states (..., D); in its own dtype under autocast too."""
        hidden_states, scale = in_dtype_of(self.prior, hidden_states), self.latent_scale
        with torch.autocast(hidden_states.device.type, enabled=False):
            # As `scaled`, but not for a bias, which does not depend on the width.
            logits = self.prior(with_gradient(scale * hidden_states, scale**2 * hidden_states))
            return with_gradient(logits, logits / scale)

    def latents(self, hidden_states: Tensor) -> Latents:
        """The latents of (..., K, E) for hidden states (..., D)."""
        return self.kind.latents(self, hidden_states)

    def _balance_loss(self, prior_logits: Tensor, counts: Tensor, reduction: str) -> Tensor:
        """The balance loss, added to each token that counts and reduced as the loss is.

        On a shortlist the weights are the gate's: those of the mixture would need another pass over all classes.
        """
        weights = F.softmax(prior_logits, dim=-1) * counts.unsqueeze(-1)
        mean_weights = weights.sum(0) / divisor(counts, "mean")
        variation = self.num_mixtures * mean_weights.square().sum() - 1  # variance / mean^2, as the mean is 1 / K
        return reduce(self.balance_coefficient * variation * counts, counts, reduction)

    def extra_repr(self) -> str:
        names = ("num_mixtures", "latent_rank", "shortlist_size", "latent_scale", "softcap")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


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
