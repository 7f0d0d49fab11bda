"""The softmax over a vocabulary whose classes several processes share.

    R rows of component logits, V classes, of which this process holds the logits of V_r
    largest      = max over the processes of max_V_r(logits)                              (R, 1)
    total        = sum over the processes of sum_V_r(exp(logits - largest))               (R, 1)
    target_logit = the logit of the target minus the largest, from the process that holds it     (R, 1)
    component_nll = log(total) - target_logit                                             (R, 1)

Three numbers a row cross the network, never logits.

Source: Shoeybi et al. 2019, Megatron-LM, arXiv 1909.08053, section 3.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class VocabularyShard(NamedTuple):
    """The classes `start` ... of `num_classes` whose decoder rows this process holds; the group holds all of them.

    The processes of the group must be given the same latents, prior logits and targets.
    """

    num_classes: int  # V, of the whole vocabulary
    start: int
    group: Any  # torch.distributed.ProcessGroup

    def softmax_(self, logits: Tensor, target_rows: Tensor) -> Tensor:
        """Softmax over the whole vocabulary of the logits (R, V_r), in place; returns the component_nll (R, 1).

        Args:
            logits: of the classes that this process holds.
            target_rows: (R, 1), classes of the whole vocabulary.
        """
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

    def subtract_targets_(self, probs: Tensor, target_rows: Tensor) -> Tensor:
        """Equivalent to: `probs - onehot(target)`, of the classes that this process holds, in place."""
        place, is_here = self._find(target_rows, probs.shape[1])
        return probs.scatter_add_(1, place, -is_here.to(probs.dtype))

    def sum_(self, part: Tensor | None) -> None:
        """Adds up in place what the classes of each process add to something; `None`: to nothing."""
        if part is not None:
            torch.distributed.all_reduce(part, group=self.group)

    def _find(self, target_rows: Tensor, num_here: int) -> tuple[Tensor, Tensor]:
        place = target_rows - self.start
        return place.clamp(0, num_here - 1), (place >= 0) & (place < num_here)
