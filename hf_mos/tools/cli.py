"""The `hf-mos` command. Each command is a few lines over the module of this folder that does the work."""

import sys
from typing import Annotated

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as error:
    sys.exit(f"hf-mos: expected {error.name}, which is not installed: pip install 'hf_mos[cli]'")

from .. import __version__

app = typer.Typer(
    name="hf-mos",
    help="Put a mixture of softmaxes on any causal language model, train it, measure it, share it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
errors = Console(stderr=True)


def print_version(asked: bool) -> None:
    if asked:
        print(f"hf-mos {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    pass


if __name__ == "__main__":
    app()
