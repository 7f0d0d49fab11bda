"""The model cards of the trained mixtures that are kept as evidence.

    python examples/bottleneck/cards.py --out bottleneck-out --cards model_cards

Reads the results that `from_scratch.py` and `retrofit.py` have left in `--out`, and the models that they saved there.
"""

import json
import math
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from experiment import folder_name
from huggingface_hub import EvalResult
from models import Head, mixture
from results import DEFAULT_OUT, Out, versions

from hf_mos import MoSForCausalLM
from hf_mos.tools.card import model_card

# The question, and the heads whose cards are written.
KEPT = {
    "from_scratch": [mixture(4), mixture(4, latent_activation="tanh"), mixture(4, latent_rank=16)],
    "retrofit": [mixture(4), mixture(4, latent_rank=16)],
}
NAMES = {"from_scratch": "from-scratch", "retrofit": "retrofit"}
HOW = {
    "from_scratch": "Trained from random weights",
    "retrofit": "A softmax model, trained for 8000 steps at most, was fine-tuned with this head",
}


def is_main(run: dict[str, Any]) -> bool:
    """Of the whole model for a fixed number of steps; no checkpoint and no measured cost."""
    recipe = run["settings"].get("recipe", {})
    return bool(recipe) and recipe["train_backbone"] and not recipe["to_convergence"]


def chosen_run(runs: list[dict[str, Any]], head: Head) -> dict[str, Any]:
    """The run of seed 0 with the learning rates that were chosen: those of the most seeds, then of the lowest loss."""
    found = [run for run in runs if run["settings"]["head"] == head.settings and run["settings"]["seed"] == 0]
    return max(found, key=lambda run: (len(same_but_seed(runs, run)), -run["result"]["valid_nats"]))


def same_but_seed(runs: list[dict[str, Any]], chosen: dict[str, Any]) -> list[dict[str, Any]]:
    settings = {**chosen["settings"], "seed": None}
    return [run for run in runs if {**run["settings"], "seed": None} == settings]


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


def comparison(runs: list[dict[str, Any]], chosen: dict[str, Any]) -> str:
    """The softmaxes of as many steps or more and this mixture, in Markdown."""
    softmaxes = [
        run
        for run in runs
        if run["settings"]["head"]["kind"] == "softmax"
        and run["settings"]["seed"] == 0
        and run["settings"]["size"] == chosen["settings"]["size"]
        and run["result"]["steps"] >= chosen["result"]["steps"]
    ]
    best = {}
    for run in sorted(softmaxes, key=lambda run: run["result"]["valid_nats"], reverse=True):
        best[run["result"]["steps"]] = run
    lines = ["| head | steps | seconds | validation | test | seeds |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for name, run in [*(("one softmax", best[steps]) for steps in sorted(best)), ("this mixture", chosen)]:
        same = [other["result"] for other in same_but_seed(runs, run)]
        valid, test = (
            statistics.mean(math.exp(result[f"{split}_nats"]) for result in same) for split in ("valid", "test")
        )
        seconds = statistics.mean(result["seconds"] for result in same)
        lines.append(f"| {name} | {run['result']['steps']} | {seconds:.0f} | {valid:.2f} | {test:.2f} | {len(same)} |")
    return "\n".join(lines) + "\n\nThe means over seeds 0, 1, ...; seconds of the processor, one thread."


def main(
    out: Out = DEFAULT_OUT,
    cards: Annotated[Path, typer.Option(help="Folder of the cards.")] = Path("model_cards"),
) -> None:
    for question, heads in KEPT.items():
        runs = [run for run in json.loads((out / f"{question}.json").read_text("utf-8"))["runs"] if is_main(run)]
        for head in heads:
            run = chosen_run(runs, head)
            settings, made_with = run["settings"], run["versions"]
            name = folder_name(head.name, settings)
            rates = {key: settings["recipe"][key] for key in ("learning_rate", "head_learning_rate")}
            card = model_card(
                MoSForCausalLM.from_pretrained(out / "models" / name),
                model_id=f"{DEFAULT_OUT}/models/{name}",
                eval_results=results_of(run),
                command=run["command"],
                machine="one thread of a CPU",
                comparison=comparison(runs, run),
                description=(
                    f"{HOW[question]} for {settings['recipe']['steps']} steps of {settings['recipe']['batch_size']} "
                    f"blocks of {settings['blocks'][1]} tokens of {settings['text']} (byte-level BPE, "
                    f"{settings['vocab_size']} tokens), seed 0, learning rates {rates}. "
                    f"Made with {', '.join(f'{library} {version}' for library, version in made_with.items())}; "
                    f"this card at commit {versions().get('commit', 'unknown')}."
                ),
                limits=["It is evidence, not a tool: a small model of a small text."],
                prompt="the company said",
                language="en",
            )
            card.save(cards / f"{NAMES[question]}-{head.name.replace(' ', '-').replace('=', '')}.md")


if __name__ == "__main__":
    typer.run(main)
