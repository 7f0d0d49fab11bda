"""Other implementations of the loss. Each maps the same leaves and targets to a scalar, the mean over tokens."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_mos import mos_cross_entropy, mos_log_probs

Leaves = dict[str, Tensor]
MANY = 16  # components of the larger mixture on a shortlist
SHORTLIST_SIZE = 64


Loss = Callable[[Leaves, Tensor], Tensor]


@dataclass
class Contender:
    name: str
    loss: Loss
    leaves: tuple[str, ...]
    gate: str | None  # the reference whose gradients it must have; None: it is another function
    needs: str | None = None  # a package of Triton kernels, without which, or without CUDA, it is left out

    def runs_on(self, device: str) -> bool:
        return self.needs is None or (device == "cuda" and importlib.util.find_spec(self.needs) is not None)


def make_leaves(
    num_tokens: int,
    num_mixtures: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Leaves, Tensor]:
    torch.manual_seed(0)
    options = {"dtype": dtype, "device": device}
    many = max(MANY, num_mixtures)
    leaves = {
        "hidden_states": torch.randn(num_tokens, hidden_size, **options),
        "latents": torch.randn(num_tokens, num_mixtures, hidden_size, **options),
        "offsets": 0.1 * torch.randn(num_tokens, many, hidden_size, **options),
        "prior_logits": torch.randn(num_tokens, num_mixtures, **options),
        "many_prior_logits": torch.randn(num_tokens, many, **options),
        "decoder_weight": torch.randn(vocab_size, hidden_size, **options) * hidden_size**-0.5,
    }
    targets = torch.randint(0, vocab_size, (num_tokens,), device=device)
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}, targets


def ours(leaves: Leaves, targets: Tensor) -> Tensor:
    return mos_cross_entropy(leaves["latents"], leaves["prior_logits"], leaves["decoder_weight"], targets)


def ours_frozen_decoder(leaves: Leaves, targets: Tensor) -> Tensor:
    return mos_cross_entropy(leaves["latents"], leaves["prior_logits"], leaves["decoder_weight"].detach(), targets)


def ours_one_softmax(leaves: Leaves, targets: Tensor) -> Tensor:
    latents = leaves["hidden_states"].unsqueeze(1)
    return mos_cross_entropy(latents, leaves["prior_logits"][:, :1], leaves["decoder_weight"], targets)


def shortlist(leaves: Leaves, num_mixtures: int | None) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The mean latent with the offsets from it, and the prior logits; `None`: as many as the full mixture has."""
    K = num_mixtures or leaves["latents"].shape[1]
    return (leaves["hidden_states"], leaves["offsets"][:, :K]), leaves["many_prior_logits"][:, :K]


def ours_shortlist(num_mixtures: int | None) -> Loss:
    return lambda leaves, targets: mos_cross_entropy(
        *shortlist(leaves, num_mixtures), leaves["decoder_weight"], targets, shortlist_size=SHORTLIST_SIZE
    )


def shortlist_autograd(num_mixtures: int | None) -> Loss:
    """The one softmax that the mixture equals, as the docstring of `mos_shortlist.py` has it."""

    def loss(leaves: Leaves, targets: Tensor) -> Tensor:
        (mean_latent, offsets), prior_logits = shortlist(leaves, num_mixtures)
        weight = leaves["decoder_weight"]
        z = F.linear(mean_latent, weight)
        classes = z.detach().topk(min(SHORTLIST_SIZE, len(weight))).indices  # (N, M)
        own = z.gather(1, classes).unsqueeze(1) + offsets @ weight[classes].transpose(1, 2)  # (N, K, M)
        mixed = torch.logsumexp(F.log_softmax(prior_logits, dim=-1).unsqueeze(-1) + own, dim=1)
        return F.cross_entropy(z.scatter(1, classes, mixed), targets)

    return loss


def log_space_autograd(leaves: Leaves, targets: Tensor) -> Tensor:
    return F.nll_loss(mos_log_probs(leaves["latents"], leaves["prior_logits"], leaves["decoder_weight"]), targets)


def paper(leaves: Leaves, targets: Tensor) -> Tensor:
    """In probability space with an epsilon, as in the code that Yang et al. published."""
    prior = F.softmax(leaves["prior_logits"], dim=-1)
    component_probs = F.softmax(F.linear(leaves["latents"], leaves["decoder_weight"]), dim=-1)
    probs = (component_probs * prior.unsqueeze(2)).sum(1)
    return F.nll_loss(torch.log(probs + 1e-8), targets)


def torch_linear_cross_entropy(leaves: Leaves, targets: Tensor) -> Tensor:
    """torch's own chunked loss on the K N rows, mixed by a logsumexp."""
    return mixed(
        leaves,
        F.linear_cross_entropy(
            *rows_of(leaves, targets), reduction="none", options=torch.nn.LinearCrossEntropyOptions()
        ),
    )


def rows_of(leaves: Leaves, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The K N rows, the decoder's weight and the rows' targets, for losses of one softmax."""
    latents = leaves["latents"]
    return latents.flatten(0, 1), leaves["decoder_weight"], targets.repeat_interleave(latents.shape[1])


def mixed(leaves: Leaves, nll: Tensor) -> Tensor:
    """The mixture's loss from the nll of its K N rows."""
    log_prior = F.log_softmax(leaves["prior_logits"].float(), dim=-1)
    return -torch.logsumexp(log_prior - nll.float().view(log_prior.shape), dim=-1).mean()


def softmax_heads(leaves: Leaves, targets: Tensor) -> Tensor:
    """K separate softmax heads, as `cross_entropy(h @ W.T)`."""
    losses = [F.cross_entropy(h @ leaves["decoder_weight"].T, targets) for h in leaves["latents"].unbind(1)]
    return torch.stack(losses).mean()


def one_softmax_head(leaves: Leaves, targets: Tensor) -> Tensor:
    return F.cross_entropy(leaves["hidden_states"] @ leaves["decoder_weight"].T, targets)


def compiled_autograd(leaves: Leaves, targets: Tensor) -> Tensor:
    return torch.compile(log_space_autograd, dynamic=False)(leaves, targets)


def cut_cross_entropy(leaves: Leaves, targets: Tensor) -> Tensor:
    """Apple's kernel on the K N rows, mixed by a logsumexp (arXiv 2411.09009)."""
    from cut_cross_entropy import linear_cross_entropy

    return mixed(leaves, linear_cross_entropy(*rows_of(leaves, targets), reduction="none"))


def liger_softmax_heads(leaves: Leaves, targets: Tensor) -> Tensor:
    """Liger's kernel on the K N rows, as K softmax heads: its gradients are those of a mean (arXiv 2410.10989)."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(*rows_of(leaves, targets))


DENSE = ("latents", "prior_logits", "decoder_weight")
SHORTLIST = ("hidden_states", "offsets", "many_prior_logits", "decoder_weight")
ONE = ("hidden_states", "decoder_weight")

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("mos_cross_entropy", ours, DENSE, "log_space_autograd"),
        Contender("mos_cross_entropy, frozen decoder", ours_frozen_decoder, DENSE[:2], "log_space_autograd"),
        Contender("mos_cross_entropy, shortlist", ours_shortlist(None), SHORTLIST, "shortlist_autograd"),
        Contender("mos_cross_entropy, shortlist, K = 16", ours_shortlist(MANY), SHORTLIST, "many_shortlist_autograd"),
        Contender("mos_cross_entropy, K = 1", ours_one_softmax, ONE, "one softmax head"),
        Contender("log_space_autograd", log_space_autograd, DENSE, "log_space_autograd"),
        Contender("log_space_autograd, compiled", compiled_autograd, DENSE, "log_space_autograd", needs="triton"),
        Contender("paper", paper, DENSE, "log_space_autograd"),
        Contender("linear_cross_entropy", torch_linear_cross_entropy, DENSE, "log_space_autograd"),
        Contender("cut-cross-entropy", cut_cross_entropy, DENSE, "log_space_autograd", needs="cut_cross_entropy"),
        Contender("Liger", liger_softmax_heads, ("latents", "decoder_weight"), None, needs="liger_kernel"),
        Contender("K softmax heads", softmax_heads, ("latents", "decoder_weight"), None),
        Contender("one softmax head", one_softmax_head, ONE, None),
    )
}
REFERENCES = {
    "log_space_autograd": log_space_autograd,
    "shortlist_autograd": shortlist_autograd(None),
    "many_shortlist_autograd": shortlist_autograd(MANY),
    "one softmax head": one_softmax_head,
}


def gradients(loss: Loss, leaves: Leaves, targets: Tensor, names: tuple[str, ...]):
    """The loss and the gradients of the named leaves; every other leaf gets none."""
    wanted = [leaves[name] for name in names]
    value = loss(leaves, targets)
    return value.detach(), torch.autograd.grad(value, wanted)


def largest_error(contender: Contender, leaves: Leaves, targets: Tensor) -> float:
    """The largest relative error of loss and gradients against autograd in float64."""
    if contender.gate is None:
        return 0.0
    exact_leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    exact = gradients(REFERENCES[contender.gate], exact_leaves, targets, contender.leaves)
    given = gradients(contender.loss, leaves, targets, contender.leaves)
    pairs = zip((given[0], *given[1]), (exact[0], *exact[1]), strict=True)
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)
