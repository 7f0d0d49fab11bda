"""The backbone: a causal LM with its head taken off, and the facts about it that the mixture needs.

No architecture has code of its own here: the work goes by the interfaces that transformers gives every causal LM.
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .configuration_mos import NO_SOFTCAP, SOFTCAP_FIELDS


def new_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """Makes a causal LM with random weights, of the class that transformers maps the config to.

    For a config without such a class (the text model of a composite one) it is the class that the config names.
    """
    named: Any = getattr(transformers, (config.architectures or [""])[0], None)
    if named is None or type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM.from_config(config)
    return named._from_config(config)


def behead(backbone: PreTrainedModel) -> tuple[nn.Linear, str]:
    """Replaces the vocabulary projection by a pass-through; deletes its tying, parallelism and softcap entries.

    Returns the projection, and the path of the backbone's weight that it is tied to in a tied model.
    """
    projection = backbone.get_output_embeddings()
    path = path_of(projection, backbone)
    own_ties = backbone._tied_weights_keys or {}
    partners = {**{source: target for target, source in own_ties.items()}, **own_ties}  # some tie the embedding to it
    tied_to = partners.get(f"{path}.weight") or f"{path_of(backbone.get_input_embeddings(), backbone)}.weight"
    backbone.set_output_embeddings(HeadlessProjection(projection.weight.dtype, projection.weight.device))
    if f"{path}.bias" in own_ties:  # some BERT-like heads hold the projection's bias a second time
        owner_path, _, name = own_ties[f"{path}.bias"].rpartition(".")
        owner: Any = backbone.get_submodule(owner_path)
        setattr(owner, name, None)
        owner._is_hf_initialized = True  # its initialisation would read the bias
    for field in SOFTCAP_FIELDS:  # most models read it from their config at each call (see take_softcap), some copy it
        if hasattr(backbone, field):
            setattr(backbone, field, NO_SOFTCAP)
    if hasattr(backbone, "logit_softcap"):
        backbone.logit_softcap = nn.Identity()
    for name in ("_tied_weights_keys", "all_tied_weights_keys", "_tp_plan", "_pp_plan", "_fsdp_plan"):
        entries = getattr(backbone, name, None)
        if entries:
            others = {k: v for k, v in entries.items() if not (k.startswith(path) or str(v).startswith(path))}
            setattr(backbone, name, others)
    return _without_padding(projection, backbone.config), tied_to


def path_of(module: nn.Module, root: nn.Module) -> str:
    return next(name for name, candidate in root.named_modules() if candidate is module)


def _without_padding(projection: nn.Linear, config: PreTrainedConfig) -> nn.Linear:
    """Removes the rows beyond the vocabulary, whose logits some backbones cut off."""
    classes = getattr(config.get_text_config(), "unpadded_vocab_size", None)
    if classes is None or classes >= projection.out_features:
        return projection
    decoder: Any = nn.Linear(projection.in_features, classes, bias=False, device="meta")
    decoder.weight = nn.Parameter(projection.weight[:classes], requires_grad=projection.weight.requires_grad)
    decoder._is_hf_initialized = getattr(projection, "_is_hf_initialized", False)
    return decoder


def add_aux_loss(loss: Tensor, aux_loss: Any, backbone: PreTrainedModel) -> Tensor:
    """Adds a mixture-of-experts backbone's router loss, if there is one, with the backbone's own coefficient."""
    if not isinstance(aux_loss, Tensor):
        return loss
    holders = (backbone, backbone.config.get_text_config())
    names = ("router_aux_loss_coef", "aux_loss_coef")
    coefficient = next(getattr(holder, name) for holder in holders for name in names if hasattr(holder, name))
    return loss + coefficient * aux_loss.to(loss.device)


class HeadlessProjection(nn.Module):
    """Equivalent to: the identity, in place of the backbone's vocabulary projection.

    The backbone then returns hidden states as its logits. Some architectures read the projection's dtype and bias.
    fp16 is widened, as it cannot hold the results of some architectures' next step (`NO_SOFTCAP`).
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        # No checkpoint fills a buffer on the meta device that it does not hold.
        weight = torch.empty(0, dtype=dtype, device=None if device.type == "meta" else device)
        self.register_buffer("weight", weight, persistent=False)
        self.bias = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.float() if hidden_states.dtype == torch.float16 else hidden_states
