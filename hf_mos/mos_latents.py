"""The kinds of latents: the K hidden states that the decoder sees, (..., K, E)."""

from typing import NamedTuple

from torch import Tensor


class SubspaceLatents(NamedTuple):
    """Equivalent to: the latents `hidden_states.unsqueeze(-2) + shifts @ basis.T`, (..., K, E).

    The components differ inside one subspace of rank R that they share, so their logits are one product of full width
    that all share and K of width R: `h @ W.T + shift_k @ (W @ basis).T`, 1 + K R / E softmax heads instead of K.
    """

    hidden_states: Tensor  # (..., E)
    shifts: Tensor  # (..., K, R)
    basis: Tensor  # (E, R)

    def dense(self) -> Tensor:
        return self.hidden_states.unsqueeze(-2) + self.shifts @ self.basis.T
