"""The flags of the mixture head: `--num-mixtures`, `--shortlist-size`, ..., with the help texts of `MoSConfig`.

A flag that is not given is absent from the options, so `MoSConfig` or the loaded model decides. The fields are read
from the text of the class, whose module imports torch: `--help` needs no torch.
"""

import argparse
import ast
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from .flags import check_numbers, new_flag, with_flags

CONFIGURATION = Path(__file__).parents[1] / "remote_code" / "configuration_mos.py"
TYPES: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}
ALL = "all"  # the value of --shortlist-size for `None`, all classes
TIE = "tie_word_embeddings"  # a field of the backbone's own config
TIE_HELP = "Tie the decoder to the input embedding, or give the decoder its own weights. Default: as in the model."


BYTES_WITH_ADAM = 16  # of a weight in fp32: itself, its gradient and two states


class Flag(NamedTuple):
    """A flag of the head, named as the option of `from_causal_lm`."""

    name: str
    type: type  # of its value
    help: str
    default: Any  # for the help; None: none is shown
    metavar: str | None = None  # the form of its value in the help, where the type does not tell it


def head_flags() -> list[Flag]:
    """The flags, one for each option of `from_causal_lm`."""
    return [*(flag_of(*field) for field in head_fields()), Flag(TIE, bool, TIE_HELP, None)]


@functools.cache
def head_fields() -> list[tuple[str, type, Any, str]]:
    """The name, type, default and help text of each option of `MoSConfig`: `name: int | None = option(64, "help")`."""
    return [*read_fields(ast.parse(CONFIGURATION.read_text(encoding="utf-8")))]


def read_fields(module: ast.Module) -> Iterator[tuple[str, type, Any, str]]:
    body = next(node.body for node in module.body if isinstance(node, ast.ClassDef) and node.name == "MoSConfig")
    for node in body:
        value = node.value if isinstance(node, ast.AnnAssign) else None
        if isinstance(node, ast.AnnAssign) and isinstance(value, ast.Call) and ast.unparse(value.func) == "option":
            default, help = map(ast.literal_eval, value.args)
            yield ast.unparse(node.target), TYPES[ast.unparse(node.annotation).partition(" |")[0]], default, help


def flag_of(name: str, value_type: type, default: Any, help: str) -> Flag:
    if name == "shortlist_size":
        return Flag(name, str, help.replace("None:", f"{ALL}:"), default, metavar=f"INT|{ALL}")
    return Flag(name, value_type, help, default)


def read_head_options(given: dict[str, Any]) -> dict[str, Any]:
    """The options of `from_causal_lm` out of the values of the flags, checked before a model is loaded.

    Raises:
        ValueError: a value is out of range.
    """
    options = dict(given)
    if isinstance(size := options.get("shortlist_size"), str):
        if size != ALL and not size.isdecimal():
            raise ValueError(f"shortlist_size: expected an int of at least 1, or {ALL}, given {size!r}")
        options["shortlist_size"] = None if size == ALL else int(size)
    check_head_options(options)
    return options


def check_head_options(options: dict[str, Any], config: Any = None) -> None:
    """Raises a ValueError where an option of `from_causal_lm` is unknown or out of range, for the model of the config.

    The head itself takes a larger rank than the hidden size for a full one; asked for by hand it is a mistake.
    """
    own = {name: value for name, value in options.items() if name != TIE}
    if own:
        from ..remote_code.configuration_mos import check_options

        check_options(own)
        check_numbers(own)
    width = None if config is None else getattr(config.get_text_config(), "hidden_size", None)
    if isinstance(width, int) and (own.get("shift_rank") or 0) > width:
        raise ValueError(f"shift_rank: expected at most the hidden size, {width}, given {own['shift_rank']}")


def head_cost(
    num_mixtures: int,
    shortlist_size: int | None,
    shift_rank: int | None,
    hidden_size: int,
    vocab_size: int,
    num_tokens: int | None = None,
) -> float:
    """The multiplications of a head for a token, in those of one softmax, which reads the V rows of the decoder.

    On all classes each of the K components reads V rows. On a shortlist the components share one product with V rows,
    and each reads M rows again. The prior has K rows of that width and the shift K r, and the widening is applied K
    times to r numbers. Where the shortlists of a training step have more rows than the decoder, the step multiplies
    decoder and widening once, and the components read M rows of width r.

    Args:
        num_tokens: of a training step; `None`: a step of decoding.
    """
    K, D, V = num_mixtures, hidden_size, vocab_size
    r = D if shift_rank is None else min(shift_rank, D)
    widening = K * r if r < D else 0
    if shortlist_size is None:
        rows: float = K * V + widening
    elif r == D or num_tokens is None or num_tokens * shortlist_size < V:
        rows = V + K * min(shortlist_size, V) + widening
    else:
        rows = V + K * min(shortlist_size, V) * r / D + r + V * r / num_tokens
    return (rows + K * r + K) / V


def num_new_weights(head: Any) -> int:
    """The weights that the head adds to a softmax model."""
    return sum(weight.numel() for name, weight in head.named_parameters() if "." in name)


def describe_head(model: Any, num_tokens: int | None = None) -> str:
    """What the head of a mixture adds to its softmax model, in a sentence: weights, memory, multiplications."""
    head = model.mos_head
    K, M, r, (V, D) = head.num_mixtures, head.shortlist_size, head.shift_rank, head.weight.shape
    new = num_new_weights(head)
    cost = head_cost(K, M, r, D, V, num_tokens)
    where = "all classes" if M is None else f"the {min(M, V)} likeliest classes"
    return (
        f"mixture of {K} softmaxes on {where}, shifts of rank {r}: {new:,} new weights, "
        f"{new / model.num_parameters():.1%} of the model ({new * BYTES_WITH_ADAM / 1e6:,.0f} MB with gradients and "
        f"Adam's states in fp32); {cost:.2f} of the multiplications of one softmax head"
    )


def with_head_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a typer command the flags, in place of its parameter `head_options`, a dict of those given."""
    import typer  # a card needs none

    def option(known: Flag) -> Any:
        default = False if known.default is None else str(known.default)
        return typer.Option(help=known.help, metavar=known.metavar, show_default=default)

    flags = [new_flag(known.name, Annotated[known.type | None, option(known)]) for known in head_flags()]
    return with_flags(command, "head_options", flags, read_head_options)


def add_head_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags to a parser, spelled `--num-mixtures` or `--num_mixtures`."""
    group = parser.add_argument_group("mixture head", "Without a flag, MoSConfig or the loaded model decides.")
    for flag in head_flags():
        names = dict.fromkeys(f"--{name}" for name in (flag.name.replace("_", "-"), flag.name))
        given: dict[str, Any] = {"type": flag.type, "metavar": flag.metavar}
        if flag.type is bool:
            given = {"action": argparse.BooleanOptionalAction}
        default = "" if flag.default is None else f" (default: {flag.default})"
        group.add_argument(*names, **given, default=argparse.SUPPRESS, help=flag.help + default)
