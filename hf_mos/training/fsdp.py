"""A tied decoder under FSDP2, where `from_pretrained` gets a `distributed_config`.

This module does not travel with a checkpoint: without it transformers trains the embedding and the decoder apart, as
those of a softmax model.
"""

from typing import Any

from ..remote_code.modeling_mos import MoSForCausalLM


def maybe_distribute_model(cls: Any, model: Any, distributed_config: Any, mesh: Any) -> Any:
    """Like `PreTrainedModel.maybe_distribute_model`, but FSDP2 gets a tied weight as one parameter."""
    shards = mesh is not None and getattr(distributed_config, "dp_size", distributed_config.fsdp_size) > 1
    if shards and model.config.tie_word_embeddings:
        if distributed_config.tp_size > 1:  # transformers then trains the embedding and the decoder apart
            raise ValueError("tie_word_embeddings: expected False with both fsdp_size and tp_size, given True")
        model.tie_weights(recompute_mapping=False)
    return super(MoSForCausalLM, cls).maybe_distribute_model(model, distributed_config, mesh)


MoSForCausalLM.maybe_distribute_model = classmethod(maybe_distribute_model)  # type: ignore[assignment]
