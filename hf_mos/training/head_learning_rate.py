"""Sets a separate learning rate for the parameters that a conversion adds beside trained ones."""

from torch.optim import Optimizer

from ..modeling_mos import MoSForCausalLM


def set_head_learning_rate(optimizer: Optimizer, model: MoSForCausalLM, learning_rate: float) -> None:
    """Moves the parameters of the prior and the latents to parameter groups with this learning rate.

    Call it before a scheduler is made of the optimizer, which reads the rates of the groups. The decoder, which the
    model had before, stays where it is.

    Args:
        optimizer: over the parameters of the model, before its first step.
        model: the model.
        learning_rate: of the new groups; all else is as in the groups that the parameters come from.

    Raises:
        ValueError: `learning_rate` is negative.
    """
    if learning_rate < 0:
        raise ValueError(f"head_learning_rate: expected 0 or more, given {learning_rate}")
    added = {id(p) for name, p in model.lm_head.named_parameters() if not name.startswith("decoder.")}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in added]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in added]
            optimizer.add_param_group(group | {"params": moved, "lr": learning_rate})
