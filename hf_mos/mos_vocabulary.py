"""The softmax of component logits over the vocabulary: one process holds all classes, or each holds a shard.

    R rows of component logits, V classes, of which this process holds the logits of V_r
    largest       = max over the processes of max_V_r(logits)                                  (R, 1)
    total         = sum over the processes of sum_V_r(exp(logits - largest))                   (R, 1)
    target_logit  = the logit of the target minus the largest, from the process that holds it  (R, 1)
    component_nll = log(total) - target_logit                                                  (R, 1)

Three numbers a row cross the network, and with a shortlist the M largest logits of each process, never all logits.
Source: Megatron-LM, arXiv 1909.08053, section 3.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class WholeVocabulary(NamedTuple):
    """All classes are here."""

    num_classes: int  # V

    def softmax_(self, logits: Tensor, target_rows: Tensor) -> Tensor:
        """Softmax of the component logits (R, V), in place; returns the component_nll of the targets, both (R, 1).

        The largest probability is exp(-log(total)), which cannot underflow; log(total) is read back from it. So there
        are three passes over the logits, where logsumexp and softmax take six and a copy.
        """
        target_logits = logits.gather(1, target_rows)
        largest = logits.amax(dim=-1, keepdim=True)
        torch.softmax(logits, dim=-1, out=logits)
        return (largest - target_logits) - logits.amax(dim=-1, keepdim=True).log()

    def log_softmax_(self, logits: Tensor) -> Tensor:
        """Log-softmax of component logits (..., V), in place."""
        return torch.log_softmax(logits, dim=-1, out=logits)

    def subtract_targets_(self, probs: Tensor, target_rows: Tensor) -> Tensor:
        """Equivalent to: `probs - onehot(target)`, in place."""
        return probs.scatter_add_(1, target_rows, probs.new_full((), -1.0).expand_as(target_rows))

    def sum_(self, part: Tensor | None) -> None:
        """The part is the whole."""

    def in_shortlist(self, logits: Tensor, size: int) -> Tensor | None:
        """All candidates (n, M) are in the shortlist."""
        return None


class VocabularyShard(NamedTuple):
    """This process holds the decoder's rows from class `start` on; the group holds all.

    The processes of the group must be given the same latents, prior logits and targets.
    """

    num_classes: int  # V, of the whole vocabulary
    start: int
    group: Any  # torch.distributed.ProcessGroup

    def softmax_(self, logits: Tensor, target_rows: Tensor) -> Tensor:
        """As in `WholeVocabulary`, for the logits (R, V_r) and targets of the whole vocabulary."""
        largest = logits.amax(dim=-1, keepdim=True)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, self.group)
        logits.sub_(largest)
        place, is_here = self._find(target_rows, logits.shape[1])
        target_logit = logits.gather(1, place).masked_fill_(~is_here, 0)
        sums = torch.cat([logits.exp_().sum(dim=-1, keepdim=True), target_logit], dim=1)
        self.sum_(sums)
        total, target_logit = sums.split(1, dim=1)
        logits.div_(total)
        return total.log() - target_logit

    def log_softmax_(self, logits: Tensor) -> Tensor:
        """Log-softmax over the whole vocabulary of component logits (..., V_r), in place."""
        here = torch.logsumexp(logits, dim=-1, keepdim=True)  # -inf without a class here
        parts = [torch.empty_like(here) for _ in range(torch.distributed.get_world_size(self.group))]
        torch.distributed.all_gather(parts, here, self.group)
        return logits.sub_(torch.logsumexp(torch.cat(parts, dim=-1), dim=-1, keepdim=True))

    def subtract_targets_(self, probs: Tensor, target_rows: Tensor) -> Tensor:
        """Equivalent to: `probs - onehot(target)`, of the classes that this process holds, in place."""
        place, is_here = self._find(target_rows, probs.shape[1])
        return probs.scatter_add_(1, place, -is_here.to(probs.dtype))

    def sum_(self, part: Tensor | None) -> None:
        """Sums the parts of all processes, in place; `None` stays."""
        if part is not None:
            torch.distributed.all_reduce(part, group=self.group)

    def in_shortlist(self, logits: Tensor, size: int) -> Tensor:
        """Which of this process's candidates (n, M or fewer) are among the M largest of all processes' candidates."""
        count = logits.shape[1]
        offered = F.pad(logits, (0, size - count), value=float("-inf"))
        parts = [torch.empty_like(offered) for _ in range(torch.distributed.get_world_size(self.group))]
        torch.distributed.all_gather(parts, offered, self.group)
        joint = torch.cat(parts, dim=1)
        chosen = torch.zeros_like(joint, dtype=torch.bool)
        chosen.scatter_(1, joint.topk(size, dim=1, sorted=False).indices, True)
        return chosen.split(size, dim=1)[torch.distributed.get_rank(self.group)][:, :count]

    def _find(self, target_rows: Tensor, num_here: int) -> tuple[Tensor, Tensor]:
        place = target_rows - self.start
        return place.clamp(0, num_here - 1), (place >= 0) & (place < num_here)


def widen(x: Tensor) -> Tensor:
    """Equivalent to: `x.float()`, or `x` itself in fp64."""
    return x if x.dtype == torch.float64 else x.float()


def cap_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """Equivalent to: `softcap * tanh(logits / softcap)`; `None` leaves the logits as they are."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def cap_(logits: Tensor, softcap: float, slope: Tensor | None) -> None:
    """Equivalent to: `cap_logits` in place; writes its derivative at each logit to `slope`, if there is one."""
    logits.div_(softcap).tanh_()
    if slope is not None:
        torch.mul(logits, logits, out=slope).neg_().add_(1)
    logits.mul_(softcap)
