"""Writes model cards from the results of the questions, and the index of `model_cards/`. Needs no trained model.

    python examples/softmax_bottleneck/cards.py                                 the index, and the cards that it names
    python examples/softmax_bottleneck/cards.py --list                          the names of all cards
    python examples/softmax_bottleneck/cards.py --card fixed_steps/mixture-K15-D32 --out my-cards

A card describes the model of seed 0 of one configuration, and compares it with the other heads of its question.
"""

import json
import math
import shlex
import shutil
import statistics
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from experiment import folder_name
from huggingface_hub import EvalResult
from models import Head, Size, new_softmax_model, with_head
from results import DEFAULT_OUT
from training import Recipe

from hf_mos.tools.card import model_card

QUESTIONS = (
    "retrofit",
    "fixed_steps",
    "until_convergence",
    "where_it_pays",
    "where_it_pays_to_convergence",
)
RESULTS = Path(__file__).parent / "results"
CARDS = Path(__file__).parents[2] / "model_cards"
SEARCHED = ("learning_rate", "head_learning_rate")

# The cards that are kept, by the question that a reader has.
INDEX = {
    "retrofit/mixture-K4-D32": "What does a mixture of 4 gain on a trained model?",
    "retrofit/mixture-K1-D32": "Does one softmax with a trained latent (K=1) gain?",
    "until_convergence/mixture-K4-D32-converged": "What does a mixture gain in training from scratch?",
    "where_it_pays_to_convergence/mixture-K4-D64-converged": "Where does it not pay?",
}

Runs = list[dict[str, Any]]


class Card(NamedTuple):
    """A mixture with the runs of one configuration, and the other heads of the same question and text."""

    question: str
    runs: Runs  # seed 0 first
    controls: list[Runs]

    @property
    def settings(self) -> dict[str, Any]:
        return self.runs[0]["settings"]

    @property
    def name(self) -> str:
        recipe = self.settings["recipe"]
        suffix = f"D{self.settings['size']['hidden_size']}"
        if recipe["to_convergence"]:
            suffix += (
                "-converged" if recipe["patience"] == Recipe.patience else f"-converged-patience{recipe['patience']}"
            )
        return f"{self.question}/{head_of(self.runs).name} {suffix}".replace(" ", "-").replace("=", "")


def all_cards(results: Path) -> dict[str, Card]:
    """The cards of all results in a folder, by name."""
    files = {question: results / f"{question}.json" for question in QUESTIONS}
    if not any(file.exists() for file in files.values()):
        raise typer.BadParameter(
            f"--results: expected a folder with one of {', '.join(QUESTIONS)}.json, given {results}"
        )
    cards = {}
    for question, file in files.items():
        found = [
            run
            for run in (json.loads(file.read_text("utf-8"))["runs"] if file.exists() else [])
            if run["settings"].get("recipe", {}).get("train_backbone")  # neither a measured cost nor the head alone
        ]
        configurations = [chosen(configuration) for configuration in groups(found, *SEARCHED)]
        for runs in configurations:
            if head_of(runs).kind == "mixture":
                same_text = [other for other in configurations if text_of(other) == text_of(runs)]
                controls = [other for other in same_text if head_of(other).kind in ("softmax", "contexts")]
                card = Card(question, runs, controls)
                cards[card.name] = card
    return cards


def groups(runs: Runs, *ignored: str) -> list[Runs]:
    """Groups the runs that differ in nothing but the seed and the ignored parts of their recipe."""
    found: dict[str, Runs] = {}
    for run in runs:
        settings = run["settings"]
        recipe = {name: value for name, value in settings["recipe"].items() if name not in ignored}
        found.setdefault(json.dumps({**settings, "recipe": recipe, "seed": None}, sort_keys=True), []).append(run)
    return list(found.values())


def chosen(configuration: Runs) -> Runs:
    """The runs with the chosen learning rates: those with the most seeds, then of the lowest loss. Seed 0 first."""
    best = max(groups(configuration), key=lambda runs: (len(runs), -mean(runs, "valid_nats")))
    return sorted(best, key=lambda run: run["settings"]["seed"])


def text_of(runs: Runs) -> tuple[str, int]:
    return runs[0]["settings"]["text"], runs[0]["settings"]["vocab_size"]


def head_of(runs: Runs) -> Head:
    return Head.from_settings(runs[0]["settings"]["head"])


def mean(runs: Runs, field: str) -> float:
    return statistics.mean(run["result"][field] for run in runs)


def perplexity(runs: Runs, split: str = "valid") -> float:
    return statistics.mean(math.exp(run["result"][f"{split}_nats"]) for run in runs)


def results_of(run: dict[str, Any]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=run["settings"]["text"],
            dataset_name=run["settings"]["text"],
            dataset_split=split,
            metric_type="perplexity",
            metric_name="perplexity per token",
            metric_value=round(math.exp(run["result"][f"{field}_nats"]), 2),
        )
        for split, field in (("validation", "valid"), ("test", "test"))
    ]


def comparison(card: Card) -> str:
    lines = [
        "| head | hidden size | steps | seconds | validation | test | seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, runs in [*((head_of(runs).name, runs) for runs in card.controls), ("this mixture", card.runs)]:
        lines.append(
            f"| {name} | {runs[0]['settings']['size']['hidden_size']} | {mean(runs, 'steps'):.0f} "
            f"| {mean(runs, 'seconds'):.0f} | {perplexity(runs):.2f} | {perplexity(runs, 'test'):.2f} | {len(runs)} |"
        )
    return "\n".join(lines) + "\n\nMeans over the seeds; seconds of the processor (AMD EPYC), one thread."


def command_of(card: Card) -> str:
    """The command that trained the model, with today's paths and the default output folder."""
    today = card.runs[0]["command"].replace("bottleneck/from_scratch.py", "bottleneck/until_convergence.py")
    words = shlex.split(today.replace("examples/bottleneck/", "examples/softmax_bottleneck/"))
    if "--out" in words:
        place = words.index("--out")
        del words[place : place + 2]
    return shlex.join(words)


def description(card: Card) -> str:
    run, settings = card.runs[0], card.settings
    recipe = settings["recipe"]
    how = "Trained from random weights"
    if settings["checkpoint"]:
        how = "A softmax model was trained until its validation loss no longer fell, then fine-tuned with this head"
    elif recipe["to_convergence"]:
        how += " until its validation loss no longer fell"
    blocks = f"{recipe['batch_size']} blocks of {settings['blocks'][1]} tokens"
    made_with = ", ".join(f"{library} {version}" for library, version in run["versions"].items())
    return (
        f"{how}: {run['result']['steps']} steps of {blocks} of {settings['text']} (vocabulary of "
        f"{settings['vocab_size']}), seed {settings['seed']}, learning rate {recipe['learning_rate']:g}, for the "
        f"prior and the latents {recipe['head_learning_rate'] or recipe['learning_rate']:g}. Made with {made_with}."
    )


def write(card: Card, folder: Path) -> Path:
    settings = card.settings
    size = Size(**settings["size"])
    with torch.device("meta"):
        backbone = new_softmax_model(size, settings["vocab_size"], settings["blocks"][1], seed=0)
        model = with_head(backbone, head_of(card.runs), seed=0)
    command = command_of(card)
    written = model_card(
        model,
        model_id=str(DEFAULT_OUT / "models" / folder_name(head_of(card.runs).name, settings)),
        made_by=command,
        eval_results=results_of(card.runs[0]),
        command=command,
        machine="one thread of an AMD EPYC",
        comparison=comparison(card),
        description=description(card),
        limits=["The model is evidence, not a tool: it is small, and so is its text."],
        prompt="the company said",
        language="en",
    )
    path = folder / f"{card.name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    written.save(path)
    return path


def index(cards: dict[str, Card]) -> str:
    """The page that leads to the kept cards."""
    rows = []
    for name, question in INDEX.items():
        softmaxes = softmaxes_beside(cards[name])
        figures = [perplexity(cards[name].runs), *(perplexity(runs) for runs in softmaxes)]
        link = f"[{name.partition('/')[2]}]({name}.md)"
        rows.append(f"| {question} | {link} | {' | '.join(f'{figure:.1f}' for figure in figures)} |")
    table = "\n".join(rows)
    return f"""# Model cards

One card for each question. All models are GPT-2s of 2 layers on Penn Treebank, small enough for two CPU cores.
The figures are validation perplexities, means over the seeds.

| question | card | this mixture | softmax, same steps | softmax, trained longer |
| --- | --- | ---: | ---: | ---: |
{table}

The softmaxes have the hidden size of the mixture. Each card lists the seconds of each model, and more controls.

[`examples/softmax_bottleneck/results`](../examples/softmax_bottleneck/results) holds the results of all {len(cards)}
mixtures. This command writes any card from them; `--list` prints the names:

```bash
python examples/softmax_bottleneck/cards.py --card fixed_steps/mixture-K15-D32 --out my-cards
```

[`template.md`](template.md) is the template of every card that `hf-mos card` writes. Without arguments `cards.py`
writes this page and the cards that it names.
"""


def softmaxes_beside(card: Card) -> tuple[Runs, Runs]:
    """The softmax of the same size and recipe but for the learning rates, and the one that trained the longest."""

    def recipe_of(runs: Runs) -> dict[str, Any]:
        return {name: value for name, value in runs[0]["settings"]["recipe"].items() if name not in SEARCHED}

    same_size = [
        runs
        for runs in card.controls
        if head_of(runs).kind == "softmax" and runs[0]["settings"]["size"] == card.settings["size"]
    ]
    same_steps = next(runs for runs in same_size if recipe_of(runs) == recipe_of(card.runs))
    return same_steps, max(same_size, key=lambda runs: mean(runs, "steps"))


def main(
    card: Annotated[list[str] | None, typer.Option(help="Name of a card; several times for several.")] = None,
    write_all: Annotated[bool, typer.Option("--all", help="Write all cards.")] = False,
    list_names: Annotated[bool, typer.Option("--list", help="Print the names of all cards.")] = False,
    results: Annotated[Path, typer.Option(help="Folder of the questions' JSON.")] = RESULTS,
    out: Annotated[Path, typer.Option(help="Folder of the cards.")] = CARDS,
) -> None:
    cards = all_cards(results)
    if list_names:
        print("\n".join(cards))
        return
    unknown = sorted({*(card or [])} - cards.keys())
    if unknown:
        raise typer.BadParameter(f"--card: expected one of the names that --list prints, given {', '.join(unknown)}")
    names = list(cards) if write_all else card or list(INDEX)
    for name in names:
        print(write(cards[name], out))
    if not card and not write_all:
        for question in QUESTIONS:  # cards that are no longer kept
            for path in (out / question).glob("*.md"):
                if f"{question}/{path.stem}" not in INDEX:
                    path.unlink()
            if (out / question).is_dir() and not any((out / question).iterdir()):
                shutil.rmtree(out / question)
        (out / "README.md").write_text(index(cards), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
