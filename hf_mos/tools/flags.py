"""Flags that several commands share: each command has one parameter in their place."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

KEYWORD = inspect.Parameter.KEYWORD_ONLY

TOO_LARGE = 2**63  # for an integer of torch
# The least number that an option takes, and the one that it has to be below, where these are not 0 and `TOO_LARGE`.
BOUNDS: dict[str, tuple[int, int]] = {
    "init_seed": (0, 2**64),  # torch's seed
    "seed": (0, 2**32),  # numpy's
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor", "validation_share"), (0, 1)),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), (1, TOO_LARGE)),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps"), (1, TOO_LARGE)),
    **dict.fromkeys(("tp_size", "fsdp_size"), (1, TOO_LARGE)),
    # Below 0 these mean: none.
    **dict.fromkeys(("max_steps", "local_rank", "max_grad_norm", "save_total_limit"), (-TOO_LARGE, TOO_LARGE)),
}


def check_numbers(options: dict[str, Any]) -> None:
    """Raises a ValueError for a number out of the bounds of its option, and so for NaN and infinity."""
    for name, value in options.items():
        least, below = BOUNDS.get(name, (0, TOO_LARGE))
        if isinstance(value, int | float) and not least <= value < below:
            raise ValueError(f"--{name.replace('_', '-')}: expected a number in [{least}, {below}), given {value}")


def new_flag(name: str, annotation: Any) -> inspect.Parameter:
    """A flag without a value unless it is given; the annotation is that of a typer option."""
    return inspect.Parameter(name, KEYWORD, default=None, annotation=annotation)


def with_flags(
    command: Callable[..., None], name: str, flags: list[inspect.Parameter], read: Callable[[dict[str, Any]], Any]
) -> Callable[..., None]:
    """Gives a typer command the flags, in place of its parameter `name`.

    The parameter gets `read` of the values that are given, by name; a ValueError of `read` is an error of usage.
    """
    import typer  # a card and a script with argparse need none

    own = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    for parameter in own.parameters.values():
        parameters += flags if parameter.name == name else [parameter.replace(kind=KEYWORD)]

    @functools.wraps(command)
    def called_with_flags(**given: Any) -> None:
        values = {each.name: given.pop(each.name, None) for each in flags}
        try:
            found = read({name: value for name, value in values.items() if value is not None})
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        command(**given, **{name: found})

    called_with_flags.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    called_with_flags.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called_with_flags
