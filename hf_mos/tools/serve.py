"""Runs transformers' OpenAI-compatible server for a mixture.

The server searches for a model's class inside transformers, so this module first puts the mixture's class there. The
server lists the models of the Hub cache; here it lists the served model instead. The rest is `transformers serve`.
"""

import socket
import time
from itertools import pairwise
from typing import Any

import transformers
import typer
from huggingface_hub.errors import CacheNotFound
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel
from transformers.cli.serve import Serve
from transformers.cli.serving.model_manager import ModelManager

from .exit_codes import before_work
from .loading import hub_options, is_mixture, load_config
from .places import check_exists

HELP = """Serve a model, mixture or softmax, with transformers' own OpenAI-compatible server.

Takes the options of `transformers serve`. Chat completions need a tokenizer with a chat template.

Examples:

$ hf-mos serve gpt2-mos --port 8000

$ curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"model": "gpt2-mos", "prompt": "The"}'
"""

models_of_the_cache = ModelManager.get_gen_models
load_by_name = ModelManager._load_model


def list_models(manager: ModelManager) -> list[dict[str, Any]]:
    """The models that a client may ask for: the one that is served, else those of the Hub cache."""
    if manager.force_model is not None:
        return [{"id": manager.force_model, "object": "model", "created": int(time.time()), "owned_by": ""}]
    try:
        return models_of_the_cache()
    except CacheNotFound:
        return []


def load_model(manager: ModelManager, name: str, *args: Any, **options: Any) -> PreTrainedModel:
    """Loads a model, after its class is put where the server looks: by name, or by config where it reads images."""
    model, revision = name.split("@", 1)
    config: Any = load_config(model, **hub_options(revision, manager.trust_remote_code))
    if is_mixture(config):
        models: Any = AutoModelForCausalLM._model_mapping
        setattr(transformers, config.architectures[0], models[type(config)])
        AutoModelForMultimodalLM.register(type(config), models[type(config)], exist_ok=True)
    return load_by_name(manager, name, *args, **options)


def check_address(arguments: list[str]) -> None:
    """Raises a ValueError where the server could not listen. It would then serve nothing, and not end."""
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--") else [word])]
    given = dict(pairwise(words))
    host, port = given.get("--host", "localhost"), given.get("--port", "8000")
    if port.isdecimal():
        try:
            socket.create_server((host, int(port))).close()
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"--host, --port: expected an address to listen on, given {host}:{port}: {error}"
            ) from error


def serve(arguments: list[str], prog: str) -> None:
    """Runs the server until it is interrupted.

    Args:
        arguments: of `transformers serve`: the model, a folder or Hub id, and options.
        prog: how the command calls itself.

    Raises:
        ImportError: the server's packages are not installed.
        OSError: there is no such model.
        OptionError: the model can only be a folder, and there is no such folder; or the port is in use.
    """
    if arguments and not arguments[0].startswith("-"):
        with before_work():
            check_exists(arguments[0])
            check_address(arguments)
    ModelManager.get_gen_models = list_models  # type: ignore[assignment,method-assign]
    ModelManager._load_model = load_model  # type: ignore[assignment,method-assign]
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command(help=HELP)(Serve)
    app(arguments, prog_name=prog, standalone_mode=False)
