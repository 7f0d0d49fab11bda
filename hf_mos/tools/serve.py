"""Runs transformers' OpenAI-compatible server for a mixture.

It looks a model's class up by name among transformers' own, so the class is put there first. Everything else is
`transformers serve`.
"""

import transformers
import typer
from transformers.cli.serve import Serve

from ..modeling_mos import MoSForCausalLM
from .exit_codes import before_work
from .loading import check_exists

HELP = """Serve a model, mixture or softmax, with transformers' own OpenAI-compatible server.

All options are those of `transformers serve`. The model needs a tokenizer with a chat template for chat completions.

Examples:

$ hf-mos serve gpt2-mos --port 8000

$ curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"model": "gpt2-mos", "prompt": "The"}'
"""


def serve(arguments: list[str], prog: str) -> None:
    """Runs the server until it is interrupted.

    Args:
        arguments: of `transformers serve`: the model, a folder or Hub id, and options.
        prog: how the command calls itself.

    Raises:
        ImportError: the server's packages are not installed.
        OSError: there is no such model.
    """
    if arguments and not arguments[0].startswith("-"):
        with before_work():
            check_exists(arguments[0])
    transformers.MoSForCausalLM = MoSForCausalLM  # type: ignore[attr-defined]
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command(help=HELP)(Serve)
    app(arguments, prog_name=prog, standalone_mode=False)
