"""Flags that several commands share: each command has one parameter in their place."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

KEYWORD = inspect.Parameter.KEYWORD_ONLY


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
