"""The head of a checkpoint of the paper's own code, as a `PaperHead`.

    prior.weight (K, D)
    latent.0.weight (K E, D), latent.0.bias (K E,)
    decoder.weight (V, E), decoder.bias (V,)

That code's latents are `tanh(latent(h))`, and it mixes probabilities where this head mixes in log space.

Source: github.com/zihangdai/mos, `model.py`.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from paper_head import PaperHead
from safetensors.torch import load_file
from torch import Tensor, nn

NAMES = {
    "prior.weight": "prior.weight",
    "latent.0.weight": "shift.weight",
    "latent.0.bias": "shift.bias",
    "decoder.weight": "weight",
    "decoder.bias": "bias",
}


def load_paper_head(
    checkpoint: Mapping[str, Tensor] | str | Path, *, prefix: str = "", dropout: float = 0.0
) -> PaperHead:
    """Equivalent to: the end of the paper's `RNNModel.forward`, from the hidden states (..., D) on.

    Args:
        checkpoint: a state dict, or the path of one: `.safetensors`, or a file of `torch.save(model.state_dict())`,
            read without running what is pickled in it. Keys of the rest of the model are ignored.
        prefix: the beginning of the head's keys, such as `"module."` under `DataParallel`.
        dropout: dropout probability on the latents in training, the original's `dropoutl`.

    Returns:
        A head in evaluation mode with K, D, E and V as the tensors have them, in their dtype (the prior in fp32 or
        wider). `head(hidden_states)` are log-probabilities (..., V).

    Raises:
        ValueError: the file holds more than tensors, or a tensor is missing or does not fit the others.
        FileNotFoundError: there is no such file.
    """
    tensors = checkpoint if isinstance(checkpoint, Mapping) else read_state_dict(Path(checkpoint))
    missing = [prefix + name for name in NAMES if prefix + name not in tensors]
    if missing:
        raise ValueError(f"checkpoint: expected {missing}, given {sorted(tensors)}")
    found = {name: tensors[prefix + name] for name in NAMES}
    check_shapes(found)
    (K, D), (V, E) = found["prior.weight"].shape, found["decoder.weight"].shape
    dtype = found["decoder.weight"].dtype
    decoder = nn.Linear(E, V, dtype=dtype)
    head = PaperHead.take_over(decoder, num_mixtures=K, shortlist_size=None, latent_scale=1.0)
    head.shift = nn.Linear(D, K * E, dtype=dtype)  # the paper's hidden states may be wider than its latents
    head.prior = nn.Linear(D, K, bias=False, dtype=torch.promote_types(dtype, torch.float32))
    head.load_state_dict({ours: found[theirs] for theirs, ours in NAMES.items()})
    head.dropout = dropout
    return head.eval()


def read_state_dict(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: expected a state dict, given a pickle of other objects, which is not run. Where you trust the "
            "file, save its model.state_dict() with the code that made it."
        ) from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path}: expected a state dict, given {type(loaded).__name__}")
    return loaded


def check_shapes(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        dimensions = 2 if name.endswith("weight") else 1
        if tensor.dim() != dimensions:
            raise ValueError(f"{name}: expected {dimensions} dimensions, given {tuple(tensor.shape)}")
    (K, D), (V, E) = tensors["prior.weight"].shape, tensors["decoder.weight"].shape
    expected = {"latent.0.weight": (K * E, D), "latent.0.bias": (K * E,), "decoder.bias": (V,)}
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{name}: expected {shape} beside a prior of {(K, D)} and a decoder of {(V, E)}, "
                f"given {tuple(tensors[name].shape)}"
            )
