"""The `hf-mos` command. Each command checks its options, calls a module beside this one, and prints the result."""

import contextlib
import functools
import json
import logging
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

from .exit_codes import DONE, FAILED, INTERRUPTED, REFUSED, OptionError, before_work
from .head_options import with_head_options
from .places import check_checkpoint, check_exists, check_file, check_is_no_folder, write_whole
from .texts import ASSISTANT_ONLY_HELP, SPLIT, TEXT_COLUMN, TEXT_COLUMN_HELP, check_file_options

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
except ModuleNotFoundError as error:
    sys.exit(f"hf-mos: expected {error.name}, which is not installed: install hf_mos with its extra 'cli'")
except KeyboardInterrupt:
    sys.exit(INTERRUPTED)

app = typer.Typer(
    name="hf-mos",
    help="Put a mixture of softmaxes on any causal language model, train it, measure it, share it.",
    epilog="Exit codes: 0 done, 1 the work failed, 2 an argument or option was refused before any work.",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich cuts the names of options to the width of the terminal
    pretty_exceptions_enable=False,
)
console, errors = Console(), Console(stderr=True)

# transformers imports torchao where it is installed; these warn of its binaries and its enums at each import.
CHATTY_AT_IMPORT = ("torchao", "torch.utils._pytree")

# What is missing where an optional package is not installed; for the others it is `cli`.
EXTRAS = {"fastapi": "serve", "uvicorn": "serve", "openai": "serve", "pydantic": "serve", "matplotlib": "inspect"}
PAGE_CHARACTERS = 1000  # the beginning of a file that its page shows token by token

# Options of other names in earlier versions.
RENAMED = {
    "--file": "--validation-file",
    "--dataset": "--dataset-name",
    "--dataset-config": "--dataset-config-name",
    "--untie": "--no-tie-word-embeddings",
}

# For a command that hands its options to a parser of its own, `--help` included.
PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True}

Model = Annotated[str, typer.Argument(help="Folder or Hub id of a causal LM.", show_default=False)]
Revision = Annotated[str | None, typer.Option(help="Commit, branch or tag of the model.", show_default=False)]
TextColumn = Annotated[str, typer.Option(help=TEXT_COLUMN_HELP)]
Dtype = Annotated[str, typer.Option(help="Dtype of the weights: auto (as saved), float32, bfloat16, float16.")]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, mps, or auto: over all devices.", show_default="the fastest"),
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run the repository's own code.")]
Out = Annotated[Path, typer.Argument(help="Folder for the checkpoint.", show_default=False)]
MaxShardSize = Annotated[str, typer.Option(help="Maximum size of a file of weights.")]
Force = Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")]
Window = Annotated[
    int | None, typer.Option(help="Tokens read at a time.", show_default="the model's positions, at most 2048")
]
Stride = Annotated[
    int | None, typer.Option(help="Tokens by which the window slides.", show_default="half of the window")
]
Tokenizer = Annotated[
    str | None, typer.Option(help="Folder or Hub id of a tokenizer, if not the model's own.", show_default=False)
]
MixtureFolder = Annotated[Path, typer.Argument(help="Folder with a mixture.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")]


def run() -> NoReturn:
    """The console script: the library's errors are messages, unless `--debug` asks for the traceback."""
    for name in CHATTY_AT_IMPORT:
        logging.getLogger(name).setLevel(logging.ERROR)
    # What a library prints of its own accord is not the result.
    aside = contextlib.redirect_stdout(sys.stderr) if "--json" in sys.argv else contextlib.nullcontext()
    for argument in sys.argv[1:]:
        if (old := argument.partition("=")[0]) in RENAMED:
            errors.print(f"[bold red]error:[/] {old}: expected {RENAMED[old]}, given an old name", soft_wrap=True)
            sys.exit(REFUSED)
    try:
        with aside:
            app()
    except KeyboardInterrupt:
        errors.print("interrupted")
        sys.exit(INTERRUPTED)
    except Exception as error:
        if sys.argv[1:2] == ["--debug"]:
            raise
        fail(message_of(error), REFUSED if isinstance(error, OptionError) else FAILED)
    sys.exit(DONE)


def message_of(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        package = error.name.partition(".")[0]
        extra = EXTRAS.get(package, "cli")
        return f"expected {package}, which is not installed: install hf_mos with its extra {extra!r}"
    text = str(error).strip()
    if isinstance(error, (ValueError, OSError, ImportError, FloatingPointError)) and text:
        return text
    return f"{type(error).__name__}: {text}\n--debug before the command shows where"


def fail(message: str, code: int = FAILED) -> NoReturn:
    errors.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    sys.exit(code)


def print_version(asked: bool) -> None:
    if asked:
        print(f"hf-mos {version('hf_mos')}")
        raise typer.Exit


@app.callback()
def main(
    print_version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


# ------------------------------------------------------------------------------------------------------------ commands


@app.command("convert")
@with_head_options
def convert_command(
    model: Model,
    out: Out,
    head_options: dict[str, Any],
    dtype: Dtype = "auto",
    device: Device = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    max_shard_size: MaxShardSize = "50GB",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Replace a model's softmax with a mixture, without a change of its predictions.

    Saves safetensors, the head's code, tokenizer and generation config, and reloads them. Prints the exactness gap:
    the largest difference between the log-probabilities of the two heads on the same hidden states, in float64.

    Examples:

    $ hf-mos convert gpt2 gpt2-mos

    $ hf-mos convert Qwen/Qwen3-0.6B-Base qwen-mos --dtype bfloat16

    $ hf-mos convert gpt2 gpt2-mos --num-mixtures 4 --shortlist-size all
    """
    with before_work():
        check_exists(model)
    from .convert import convert

    conversion = convert(
        model,
        out,
        dtype=dtype,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        max_shard_size=max_shard_size,
        overwrite=force,
        **head_options,
    )
    if as_json:
        print_json(vars(conversion) | {"is_exact": conversion.is_exact})
    else:
        M = conversion.shortlist_size
        mixed_on = "on all classes" if M is None else f"on a shortlist of {M} classes"
        print_table(
            out.name,
            {
                "folder": str(out),
                "softmaxes mixed": f"{conversion.num_mixtures}, {mixed_on}",
                "parameters": f"{conversion.num_parameters:,}, {conversion.num_new_parameters:,} of them new",
                "dtype": conversion.dtype,
                "exactness gap": f"{conversion.gap:.2g} nats between the heads on the same hidden states, in float64",
                "change": f"at most {conversion.change:.2g} nats in the reloaded model; "
                f"rounding explains {conversion.rounding:.2g}",
                "tokenizer": "saved" if conversion.has_tokenizer else "none found",
            },
        )
    if not conversion.is_exact:
        fail(
            f"expected a gap of at most {conversion.tolerance:g} and a change of at most {conversion.rounding:.2g}, "
            f"given {conversion.gap:.2g} and {conversion.change:.2g}"
        )


@app.command("export")
def export_command(
    mixture: Annotated[str, typer.Argument(help="Folder or Hub id of a mixture.", show_default=False)],
    out: Out,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    revision: Revision = None,
    max_shard_size: MaxShardSize = "50GB",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Save the softmax model inside a mixture, for tools that know no mixture, such as llama.cpp and MLX.

    Saves the layers and the decoder, config, tokenizer and generation config, as the softmax model's own class does,
    without our code, and reloads them. The shifts and the prior are lost. Before training they change nothing. Of a
    trained mixture the result is usually worse than the mixture on text like the training text: measure it with
    `hf-mos evaluate`, and fine-tune it.

    Example:

    $ hf-mos export gpt2-mos gpt2-softmax
    """
    with before_work():
        check_exists(mixture)
    from .export import export

    exported = export(
        mixture,
        out,
        dtype=dtype,
        device=device,
        revision=revision,
        max_shard_size=max_shard_size,
        overwrite=force,
    )
    if as_json:
        print_json(vars(exported) | {"is_same": exported.is_same, "is_written": exported.is_written})
    else:
        lost = "nothing" if exported.is_same else "what the shifts and the prior have learnt"
        print_table(
            out.name,
            {
                "folder": str(out),
                "class": exported.model_class,
                "parameters": f"{exported.num_parameters:,}",
                "dtype": exported.dtype,
                "lost": lost,
                "change": f"at most {exported.change:.2g} nats from the mixture, on random tokens",
                "tokenizer": "saved" if exported.has_tokenizer else "none found",
            },
        )
    if not exported.is_written:
        expected = f"expected a reloaded model that differs by at most {exported.rounding:.2g}"
        fail(f"{expected}, given {exported.reload_change:.2g}")


@app.command("evaluate")
def evaluate_command(
    model: Model,
    validation_file: Annotated[
        Path | None, typer.Option(help="Text, or rows of .json, .jsonl, .csv, .parquet.", show_default=False)
    ] = None,
    dataset_name: Annotated[
        str | None, typer.Option(help="Hub id or folder, for load_dataset.", show_default=False)
    ] = None,
    dataset_config_name: Annotated[
        str | None, typer.Option(help="Configuration of the dataset.", show_default=False)
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = SPLIT,
    text_column: TextColumn = TEXT_COLUMN,
    assistant_only: Annotated[bool, typer.Option("--assistant-only", help=ASSISTANT_ONLY_HELP)] = False,
    join_rows: Annotated[
        bool, typer.Option("--join-rows", help="Join all rows into one text, such as the lines of WikiText.")
    ] = False,
    window: Window = None,
    stride: Stride = None,
    prefix_token_id: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Token before each text.",
            show_default="the tokenizer's for a text's beginning, else end",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 1,
    tokenizer: Tokenizer = None,
    dtype: Dtype = "auto",
    device: Device = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure nats per token, perplexity and bits per byte of a model, mixture or softmax, on text.

    Each token is counted once. Small strides give each token more context and take longer. Bits per byte compare
    models with different tokenizers; perplexity does not.

    Examples:

    $ hf-mos evaluate gpt2-mos --validation-file book.txt --stride 256

    \b
    $ hf-mos evaluate gpt2 --dataset-name Salesforce/wikitext \\
        --dataset-config-name wikitext-2-raw-v1 --join-rows
    """
    if (validation_file is None) == (dataset_name is None):
        given = "neither" if validation_file is None else "both"
        raise typer.BadParameter(f"expected --validation-file or --dataset-name, one of the two, given {given}")
    with before_work():
        check_file_options(validation_file, text_column, dataset_config_name, split)
        check_exists(model)
    from .chat import join, render
    from .evaluate import choose_window, evaluate
    from .loading import check_options, load_model, load_tokenizer
    from .provenance import describe_machine, own_command
    from .texts import read_dataset, read_texts

    with before_work():
        config = check_options(model, tokenizer, revision, dtype, device, trust_remote_code)
        choose_window(config, window, stride)
    data: dict[str, str | None] = {"data": dataset_name, "split": split}
    if validation_file is not None:
        rows, data = read_texts(validation_file, text_column), {"data": validation_file.name, "split": None}
    else:
        assert dataset_name is not None
        rows = read_dataset(dataset_name, dataset_config_name, split, text_column)
    loaded_tokenizer = load_tokenizer(model, tokenizer, revision=revision, trust_remote_code=trust_remote_code)
    texts = render(loaded_tokenizer, rows, assistant_only, str(data["data"]))
    if join_rows:
        texts = [join(texts)]
    loaded = load_model(model, revision=revision, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    result = evaluate(
        loaded,
        loaded_tokenizer,
        texts,
        window=window,
        stride=stride,
        batch_size=batch_size,
        prefix_token_id=prefix_token_id,
        track=functools.partial(track, description="evaluating"),
    )
    if as_json:
        machine = {"dtype": str(loaded.dtype).removeprefix("torch."), "machine": describe_machine(loaded.device)}
        measured = {"model": model, "revision": revision, **data, **result.to_dict(), **machine}
        measured["assistant_only"] = assistant_only
        print_json(measured | {"command": own_command()})
        return
    print_table(
        f"{model} on {data['data']}",
        {
            "nats per token": f"{result.nats_per_token:.4f}",
            "perplexity": f"{result.perplexity:.3f}",
            "bits per byte": f"{result.bits_per_byte:.4f}",
            "tokens": f"{result.num_tokens:,}",
            "bytes": f"{result.num_bytes:,}",
            "window, stride": f"{result.window}, {result.stride}",
        },
    )


@app.command("inspect")
def inspect_command(
    model: Model,
    text: Annotated[str | None, typer.Option(help="A text to inspect token by token.", show_default=False)] = None,
    validation_file: Annotated[
        Path | None,
        typer.Option(
            help="Text, or rows of .json, .jsonl, .csv, .parquet, to inspect on average.", show_default=False
        ),
    ] = None,
    text_column: TextColumn = TEXT_COLUMN,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write a page with plots here. Without --text it also shows the beginning of the validation file.",
            show_default=False,
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of candidates and tokens in each list.")] = 5,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the file, at most.", show_default="all")
    ] = None,
    rank_contexts: Annotated[
        int,
        typer.Option(min=0, help="Contexts whose rank is measured; choose more than the hidden size."),
    ] = 2048,
    window: Window = None,
    stride: Stride = None,
    tokenizer: Tokenizer = None,
    dtype: Dtype = "auto",
    device: Device = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Show how a mixture predicts: a text token by token, a file on average.

    For each token: the mixture weights, the responsibilities, and the predictions of each component, of the mixture
    and of the old softmax. For a file: usage and responsibility of each component, the divergences between components,
    and the rank of the log-probability matrix beside the bound of one softmax.

    Examples:

    $ hf-mos inspect gpt2-mos --text "The cat sat on the mat."

    $ hf-mos inspect gpt2-mos --validation-file book.txt --max-tokens 20000 --html mixture.html
    """
    if text is None and validation_file is None:
        raise typer.BadParameter("expected --text or --validation-file, given neither")
    with before_work():
        check_file_options(validation_file, text_column)
        check_exists(model)
    from .chat import Text, beginning, render
    from .evaluate import choose_window
    from .inspection.inspect_mixture import inspect_mixture, refuse_softmax
    from .loading import check_options, load_model, load_tokenizer
    from .texts import read_texts

    with before_work():
        config = check_options(model, tokenizer, revision, dtype, device, trust_remote_code)
        refuse_softmax(config, model)
        choose_window(config, window, stride)
        if html is not None:
            from .inspection.page import check_target, save_page

            check_target(html)
    rows = None if validation_file is None else read_texts(validation_file, text_column)
    loaded_tokenizer = load_tokenizer(model, tokenizer, revision=revision, trust_remote_code=trust_remote_code)
    corpus = None if rows is None else render(loaded_tokenizer, rows, False, str(validation_file))
    shown: Text | None = text
    if text is None and html is not None and corpus is not None:
        shown = next((beginning(entry, PAGE_CHARACTERS) for entry in corpus if entry), None)
    inspection = inspect_mixture(
        load_model(model, revision=revision, dtype=dtype, device=device, trust_remote_code=trust_remote_code),
        loaded_tokenizer,
        text=shown,
        corpus=corpus,
        top=top,
        window=window,
        stride=stride,
        max_tokens=max_tokens,
        rank_contexts=rank_contexts,
        track=functools.partial(track, description="inspecting"),
    )
    if html is not None:
        save_page(inspection, html)
    if as_json:
        print_json(inspection.to_json())
    elif html is not None:
        console.print(f"wrote {html}", markup=False)
    else:
        from .inspection.tables import tables

        console.print(tables(inspection))


@app.command("train", context_settings=PASS_ON, add_help_option=False)
def train_command(context: typer.Context) -> None:
    """Fine-tune a model with a mixture, with the Trainer. Every option of TrainingArguments works.

    Example:

    $ hf-mos train --model gpt2 --train-file book.txt --output-dir gpt2-mos
    """
    from .train_options import parse_options

    options = parse_options(context.args, prog=context.command_path)
    from .train import train  # the help needs less

    train(*options)


@app.command("card")
def card_command(
    folder: MixtureFolder,
    model_id: Annotated[
        str | None, typer.Option(help="Folder or Hub id that the card's code loads.", show_default="the folder's name")
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            help="Output of `hf-mos evaluate --json`, in a file; may be repeated.",
            show_default=False,
        ),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the model with a softmax.", show_default=False)
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="Licence, as the Hub names it: apache-2.0.", show_default=False)
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option(help="Language of the model, such as en; may be repeated.", show_default=False)
    ] = None,
    training_dataset: Annotated[
        list[str] | None,
        typer.Option(help="Hub id of a training dataset; may be repeated.", show_default=False),
    ] = None,
    description: Annotated[
        str | None, typer.Option(help="How the model was made, as Markdown.", show_default=False)
    ] = None,
    limit: Annotated[
        list[str] | None, typer.Option(help="A sentence for the list of limits; may be repeated.", show_default=False)
    ] = None,
    prompt: Annotated[str, typer.Option(help="Prompt of the code in the card.")] = "The",
    model_revision: Annotated[str, typer.Option(help="The commit that the card's code loads.")] = "main",
    force: Annotated[bool, typer.Option("--force", help="Replace the card in the folder.")] = False,
) -> None:
    """Write a model card: what the head is, what was measured, how to load it, what it cannot do.

    The measurements go into the card's model-index, which the Hub reads. CodeCarbon's measurements (emissions.csv)
    go in too.

    Examples:

    $ hf-mos evaluate gpt2-mos --validation-file book.txt --json > results.json

    $ hf-mos card gpt2-mos --model-id user/gpt2-mos --results results.json --base-model gpt2 --license mit
    """
    with before_work():
        check_checkpoint(folder)
        for file in results or []:
            check_file(file)
    from .card import CARD_FILE, card_of_folder

    with before_work():
        target = folder / CARD_FILE
        check_is_no_folder(target)
        if target.exists() and not force:
            raise ValueError(f"{target}: expected no card, or --force, given a card")
    card = card_of_folder(
        folder,
        model_id=model_id,
        results=results or [],
        base_model=base_model,
        license=license,
        language=language,
        datasets=training_dataset,
        description=description,
        limits=limit or [],
        prompt=prompt,
        revision=model_revision,
    )
    write_whole(target, card.save)
    console.print(str(target), soft_wrap=True)


@app.command("push")
def push_command(
    folder: MixtureFolder,
    repo: Annotated[str, typer.Argument(help="user/name; created if it does not exist.", show_default=False)],
    revision: Annotated[
        str | None, typer.Option(help="Branch; created if it does not exist.", show_default="the default branch")
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public", help="Visibility of a new repository.", show_default="as the account has it"
        ),
    ] = None,
    message: Annotated[str, typer.Option(help="Message of the commit.")] = "Upload a mixture of softmaxes",
    token: Annotated[
        str | None,
        typer.Option(
            help="Token of the Hub with the right to write.", envvar="HF_TOKEN", show_default="of `hf auth login`"
        ),
    ] = None,
    pin: Annotated[
        bool, typer.Option(help="Write the commit into the card's code, in a second commit of the card alone.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Send a folder's weights, code, tokenizer and card to the Hub, in one commit: all of it, or nothing.

    Checkpoints, optimizer states and logs of a training run are not sent. A folder without a card gets one.

    Example:

    $ hf-mos push gpt2-mos user/gpt2-mos --private
    """
    with before_work():
        check_checkpoint(folder)
    from .card import CARD_FILE, card_of_folder
    from .push import push

    if not (folder / CARD_FILE).exists():
        write_whole(folder / CARD_FILE, card_of_folder(folder, model_id=repo).save)
    pushed = push(folder, repo, branch=revision, private=private, message=message, token=token, pin=pin)
    if as_json:
        print_json(vars(pushed))
        return
    print_table(
        pushed.repo, {"commit": pushed.url, "files": str(len(pushed.files)), "revision to load": pushed.revision}
    )


@app.command("serve", context_settings=PASS_ON, add_help_option=False)
def serve_command(context: typer.Context) -> None:
    """Serve a model with transformers' own OpenAI-compatible server. Every option of `transformers serve` works.

    Example:

    $ hf-mos serve gpt2-mos --port 8000
    """
    from .serve import serve

    serve(context.args, prog=context.command_path)


# -------------------------------------------------------------------------------------------------------------- output


def print_json(result: dict[str, Any] | str) -> None:
    """On the standard output itself, see `run`."""
    from .evaluate import json_values

    text = result if isinstance(result, str) else json.dumps(json_values(result), indent=2, allow_nan=False)
    print(text, file=sys.__stdout__, flush=True)


def print_table(title: str, rows: dict[str, str]) -> None:
    table = Table(title=escape(title), show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, escape(value))
    console.print(table)


def track(items: Any, description: str) -> Any:
    """The items one by one, with a bar on stderr."""
    from rich.progress import track as rich_track

    return rich_track(items, description=description, console=errors, transient=True)


if __name__ == "__main__":
    run()
