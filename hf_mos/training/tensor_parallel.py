"""The softmax over a vocabulary whose rows lie in many processes (tensor parallelism).

    R rows of logits, V classes, of which this process holds V_r
    largest       = max over the processes of max_V_r(logits)                                  (R, 1)
    total         = sum over the processes of sum_V_r(exp(logits - largest))                   (R, 1)
    target_logit  = the logit of the target minus the largest, from the process that holds it  (R, 1)
    component_nll = log(total) - target_logit                                                  (R, 1)

Three numbers a row cross the network, and with a shortlist the M largest logits of each process, never all logits.
This module does not travel with a checkpoint: without it every process holds the whole decoder.
Source: Megatron-LM, arXiv 1909.08053, section 3.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..remote_code.mos_head import MoSLMHead

TENSOR_PARALLEL = "tp"  # a mesh's name for the dimension that shards the vocabulary


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
        """Log-softmax over the whole vocabulary of logits (..., V_r), in place."""
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

    def gather_classes(self, log_probs: Tensor) -> Tensor:
        """The log-probabilities (N, V) of all classes, from each process's (N, V_r)."""
        processes = torch.distributed.get_world_size(self.group)
        per_process = -(-self.num_classes // processes)
        padded = F.pad(log_probs, (0, per_process - log_probs.shape[1]))
        parts = [torch.empty_like(padded) for _ in range(processes)]
        torch.distributed.all_gather(parts, padded.contiguous(), self.group)
        return torch.cat(parts, dim=1)[:, : self.num_classes]

    def _find(self, target_rows: Tensor, num_here: int) -> tuple[Tensor, Tensor]:
        place = target_rows - self.start
        return place.clamp(0, num_here - 1), (place >= 0) & (place < num_here)


def shard_of(weight: Any) -> VocabularyShard | None:
    """The vocabulary shard whose rows this process holds of a weight; `None` where it is sharded in no such way."""
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None or mesh.mesh_dim_names != (TENSOR_PARALLEL,) or not weight.placements[0].is_shard(0):
        return None
    per_process = -(-weight.shape[0] // mesh.size())
    if (mesh.size() - 1) * per_process >= weight.shape[0]:  # a process holds no class
        return None
    return VocabularyShard(weight.shape[0], mesh.get_local_rank() * per_process, mesh.get_group())


MoSLMHead.shard_of = staticmethod(shard_of)  # type: ignore[assignment]
