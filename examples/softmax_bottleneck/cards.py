"""The model cards of the mixtures that were trained: one for each configuration, of the model of seed 0.

    python examples/softmax_bottleneck/cards.py --out bottleneck-out --cards model_cards

Reads the results that the questions have left in `--out`, and the models that they saved there.
"""

import json
import math
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from experiment import folder_name
from huggingface_hub import EvalResult
from models import Head
from results import DEFAULT_OUT, Out, versions
from rich.console import Console
from rich.progress import track
from training import Recipe

from hf_mos import MoSForCausalLM
from hf_mos.tools.card import model_card

QUESTIONS = [
    "from_scratch",
    "from_scratch_to_convergence",
    "where_it_pays",
    "where_it_pays_to_convergence",
    "retrofit",
]
SEARCHED = ("learning_rate", "head_learning_rate")

Runs = list[dict[str, Any]]


def groups(runs: Runs, *ignored: str) -> list[Runs]:
    """The runs that differ in nothing but the seed and the ignored parts of their recipe."""
    found: dict[str, Runs] = {}
    for run in runs:
        settings = run["settings"]
        recipe = {name: value for name, value in settings["recipe"].items() if name not in ignored}
        found.setdefault(json.dumps({**settings, "recipe": recipe, "seed": None}, sort_keys=True), []).append(run)
    return list(found.values())


def chosen(configuration: Runs) -> Runs:
    """Those with the learning rates that were chosen: of the most seeds, then of the lowest loss. Seed 0 first."""
    best = max(groups(configuration), key=lambda runs: (len(runs), -mean(runs, "valid_nats")))
    return sorted(best, key=lambda run: run["settings"]["seed"])


def text_of(runs: Runs) -> tuple[str, int]:
    return runs[0]["settings"]["text"], runs[0]["settings"]["vocab_size"]


def head_of(runs: Runs) -> Head:
    return Head.from_settings(runs[0]["settings"]["head"])


def mean(runs: Runs, field: str) -> float:
    return statistics.mean(run["result"][field] for run in runs)


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


def comparison(controls: list[Runs], this: Runs) -> str:
    """The controls of the same question and text, and this mixture, in Markdown."""
    lines = [
        "| head | hidden size | steps | seconds | validation | test | seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, runs in [*((head_of(runs).name, runs) for runs in controls), ("this mixture", this)]:
        valid, test = (
            statistics.mean(math.exp(run["result"][f"{split}_nats"]) for run in runs) for split in ("valid", "test")
        )
        lines.append(
            f"| {name} | {runs[0]['settings']['size']['hidden_size']} | {mean(runs, 'steps'):.0f} "
            f"| {mean(runs, 'seconds'):.0f} | {valid:.2f} | {test:.2f} | {len(runs)} |"
        )
    return "\n".join(lines) + "\n\nThe means over seeds 0, 1, ...; seconds of the processor, one thread."


def description(run: dict[str, Any]) -> str:
    settings, recipe = run["settings"], run["settings"]["recipe"]
    how = "Trained from random weights"
    if settings["checkpoint"]:
        how = "A softmax model, trained until its validation loss no longer fell, was fine-tuned with this head"
    elif recipe["to_convergence"]:
        how += " until its validation loss no longer fell"
    blocks = f"{recipe['batch_size']} blocks of {settings['blocks'][1]} tokens"
    made_with = ", ".join(f"{library} {version}" for library, version in run["versions"].items())
    return (
        f"{how}: {run['result']['steps']} steps of {blocks} of {settings['text']} (vocabulary of "
        f"{settings['vocab_size']}), seed {settings['seed']}, learning rate {recipe['learning_rate']:g}, of the prior "
        f"and the latents {recipe['head_learning_rate'] or recipe['learning_rate']:g}. "
        f"Made with {made_with}; this card at commit {versions().get('commit', 'unknown')}."
    )


def main(
    out: Out = DEFAULT_OUT,
    cards: Annotated[Path, typer.Option(help="Folder of the cards.")] = Path("model_cards"),
) -> None:
    files = {question: out / f"{question}.json" for question in QUESTIONS}
    answered = [question for question, file in files.items() if file.exists()]
    if not answered:
        raise typer.BadParameter(f"--out: expected one of {', '.join(map(str, files.values()))}, found none")
    for question in answered:
        runs = [
            run
            for run in json.loads(files[question].read_text("utf-8"))["runs"]
            if run["settings"].get("recipe", {}).get("train_backbone")  # neither a measured cost nor the head alone
        ]
        configurations = [chosen(configuration) for configuration in groups(runs, *SEARCHED)]
        controls = [found for found in configurations if head_of(found).kind in ("softmax", "contexts")]
        mixtures = [found for found in configurations if head_of(found).kind == "mixture"]
        folder = cards / question.replace("_", "-")
        folder.mkdir(parents=True, exist_ok=True)
        for found in track(mixtures, question, console=Console(stderr=True), transient=True):
            first = found[0]
            head = head_of(found)
            name = folder_name(head.name, first["settings"])
            card = model_card(
                MoSForCausalLM.from_pretrained(out / "models" / name),
                model_id=f"{DEFAULT_OUT}/models/{name}",
                eval_results=results_of(first),
                command=first["command"],
                machine="one thread of a CPU",
                comparison=comparison([runs for runs in controls if text_of(runs) == text_of(found)], found),
                description=description(first),
                limits=["It is evidence, not a tool: a small model of a small text."],
                prompt="the company said",
                language="en",
            )
            suffix = f"D{first['settings']['size']['hidden_size']}"
            if first["settings"]["recipe"]["to_convergence"]:
                patience = first["settings"]["recipe"]["patience"]
                suffix += "-converged" if patience == Recipe.patience else f"-converged-patience{patience}"
            card.save(folder / f"{head.name} {suffix}.md".replace(" ", "-").replace("=", ""))


if __name__ == "__main__":
    typer.run(main)
