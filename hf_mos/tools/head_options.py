"""The flags of the mixture head, made from the fields of `MoSConfig`: `--num-mixtures`, `--latent-rank`, ...

A flag that is not given is absent from the options, so `MoSConfig` or the loaded model decides.
"""

import argparse
import dataclasses
import functools
import inspect
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

import typer
from transformers import PreTrainedConfig

from ..configuration_mos import LATENT_ACTIVATIONS, MoSConfig

WIDER_THAN_ANY = 2**20  # hidden sizes
CHOICES = {"latent_activation": LATENT_ACTIVATIONS}


def head_fields() -> list[dataclasses.Field]:
    """The fields of `MoSConfig` that are flags."""
    return [field for field in dataclasses.fields(MoSConfig) if field.metadata.get("as_flag")]


def check_head_options(options: dict[str, Any], config: PreTrainedConfig | None = None) -> None:
    """Raises a ValueError where an option is out of range, before a model is loaded.

    Args:
        config: of the model; `None`: not known yet, so any width passes.
    """
    any_model = {"model_type": "llama", "hidden_size": WIDER_THAN_ANY, "tie_word_embeddings": True}
    MoSConfig(text_config=any_model if config is None else config, **options)


def with_head_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a typer command a flag for each field, in place of its parameter `head_options`, a dict of those given."""
    own = inspect.signature(command, eval_str=True)
    flags = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                (Literal[CHOICES[field.name]] if field.name in CHOICES else value_type(field)) | None,
                typer.Option(help=help_of(field), show_default=False if field.default is None else str(field.default)),
            ],
        )
        for field in head_fields()
    ]
    parameters = []
    for parameter in own.parameters.values():
        parameters += flags if parameter.name == "head_options" else [parameter]

    @functools.wraps(command)
    def with_flags(*args: Any, **kwargs: Any) -> None:
        given = {flag.name: kwargs.pop(flag.name) for flag in flags}
        options = {name: value for name, value in given.items() if value is not None}
        try:
            check_head_options(options)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        command(*args, head_options=options, **kwargs)

    keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    with_flags.__signature__ = own.replace(parameters=keyword)  # type: ignore[attr-defined]
    with_flags.__annotations__ = {parameter.name: parameter.annotation for parameter in keyword}
    return with_flags


def add_head_options(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each field to a parser, spelled `--num-mixtures` or `--num_mixtures`."""
    group = parser.add_argument_group("mixture head", "What is not given is as MoSConfig or the loaded model has it.")
    for field in head_fields():
        names = dict.fromkeys(f"--{name}" for name in (field.name.replace("_", "-"), field.name))
        given: dict[str, Any] = {"type": value_type(field), "choices": CHOICES.get(field.name)}
        if value_type(field) is bool:
            given = {"action": argparse.BooleanOptionalAction}
        default = "" if field.default is None else f" (default: {field.default})"
        group.add_argument(*names, **given, default=argparse.SUPPRESS, help=help_of(field) + default)


def value_type(field: dataclasses.Field) -> type:
    """The type of a field without its `None`."""
    if isinstance(field.type, types.UnionType):
        return next(member for member in get_args(field.type) if member is not type(None))
    assert isinstance(field.type, type)
    return field.type


def help_of(field: dataclasses.Field) -> str:
    return field.metadata["help"]
