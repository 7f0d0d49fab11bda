"""Writes the model card of a mixture, from `model_card_template.md` beside this file."""

import csv
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..remote_code.configuration_mos import MoSConfig
from ..remote_code.modeling_mos import MoSForCausalLM
from .head_options import head_cost, num_new_weights
from .places import check_checkpoint, read_json

CARD_FILE = "README.md"
EMISSIONS_FILE = "emissions.csv"  # written by the Trainer's CodeCarbon callback
TEMPLATE = Path(__file__).with_name("model_card_template.md")
PIN_IT = ": put its hash\nwhere `main` stands"
# What a card takes from the output of `hf-mos evaluate --json`, and of which type.
RESULT_TYPES: dict[str, Any] = {
    **dict.fromkeys(("data", "command", "machine"), str),
    **dict.fromkeys(("window", "stride"), int),
    **dict.fromkeys(("perplexity", "bits_per_byte"), int | float | None),
    "split": str | None,
}
TAGS = ["mixture-of-softmaxes", "custom_code"]


def model_card(
    model: MoSForCausalLM,
    *,
    model_id: str,
    eval_results: Sequence[EvalResult] = (),
    command: str | None = None,
    machine: str | None = None,
    comparison: str | None = None,
    description: str | None = None,
    limits: Sequence[str] = (),
    prompt: str = "The",
    revision: str = "main",
    base_model: str | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    datasets: str | list[str] | None = None,
    emissions: dict[str, Any] | None = None,
    made_by: str | None = None,
) -> ModelCard:
    """Makes a card: the head, the measurements, how to load the model, and its limits.

    Args:
        model: the model that the card describes.
        model_id: the Hub id or folder that the card's code loads it from.
        eval_results: what was measured; goes into the card's `model-index` too.
        command: the command that measures `eval_results` again. Required with them.
        machine: where they were measured.
        comparison: further measurements as Markdown, such as a table of the softmax and the mixture.
        description: how the model was made, as Markdown.
        limits: sentences that join the list of limits.
        prompt: the prompt in the card's code.
        revision: the commit that the card's code pins.
        base_model, license, language, datasets: metadata of the Hub, see `ModelCardData`.
        made_by: the command that makes the checkpoint in the folder `model_id`, where it is not published.
        emissions: `co2_eq_emissions` of the Hub's metadata; `emissions`, in grams, is one of its keys.

    Returns:
        A `ModelCard`; `.save(folder / "README.md")` writes it, `.push_to_hub(id)` sends it.

    Raises:
        ValueError: there are measurements and no command that prints them again.
    """
    if eval_results and not command:
        raise ValueError("command: expected the command that measures the eval_results again, given none")
    model_name = model_id.rstrip("/").rsplit("/", 1)[-1]
    card_data = ModelCardData(
        model_name=model_name,
        eval_results=list(eval_results) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        base_model=base_model,
        license=license,
        language=language,
        datasets=datasets,
    )
    if emissions is not None:
        card_data["co2_eq_emissions"] = emissions
    head: Any = model.mos_head
    (V, D), M = head.weight.shape, head.shortlist_size
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        model_name=model_name,
        model_id=model_id,
        backbone=model.backbone_class.__name__,
        base_model=base_model,
        num_mixtures=head.num_mixtures,
        hidden_size=D,
        vocab_size=V,
        shortlist_size=M,
        shift_rank=head.shift_rank,
        num_new=num_new_weights(head),
        tied=head.weight is model.get_input_embeddings().weight,
        num_parameters=model.num_parameters(),
        head_cost=head_cost(head.num_mixtures, M, head.shift_rank, D, V),
        eval_results=eval_results,
        command=command,
        machine=machine,
        comparison=comparison,
        description=description,
        limits=limits,
        prompt=prompt,
        revision=revision,
        emissions=emissions,
        made_by=made_by,
    )


def card_of_folder(
    folder: Path, *, model_id: str | None = None, results: Sequence[Path] = (), **fields: Any
) -> ModelCard:
    """Makes the card of a checkpoint in a folder, without reading its weights.

    Args:
        folder: as `save_pretrained` leaves it. CodeCarbon's `emissions.csv` in it goes into the card.
        model_id: `None`: the folder's name.
        results: what `hf-mos evaluate --json` printed, in files.
        fields: further arguments of [`model_card`].

    Raises:
        ValueError: there is no checkpoint of a mixture in the folder, or a file of results is none, or of another
            model by its name.
    """
    check_checkpoint(folder)
    config = MoSConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = MoSForCausalLM(config)
    own_name = folder.resolve().name
    model_id = model_id or own_name
    measured = [read_results(file, {own_name, Path(model_id).name}) for file in results]
    if measured:
        fields["eval_results"] = [result for evaluation in measured for result in eval_results(evaluation)]
        fields["command"] = "` and `".join(dict.fromkeys(evaluation["command"] for evaluation in measured))
        fields["machine"] = ", ".join(dict.fromkeys(evaluation["machine"] for evaluation in measured))
    emissions = read_emissions(folder / EMISSIONS_FILE) if (folder / EMISSIONS_FILE).is_file() else None
    return model_card(model, model_id=model_id, emissions=emissions, **fields)


def read_results(file: Path, names: set[str]) -> dict[str, Any]:
    """Reads the results of a model of one of these names, in whatever folder or namespace of the Hub."""
    evaluation = read_json(file)
    expected = f"{file}: expected what hf-mos evaluate --json prints"
    if missing := sorted(RESULT_TYPES.keys() - evaluation.keys()):
        raise ValueError(f"{expected}, given one without {missing}")
    for name, types in RESULT_TYPES.items():
        if not isinstance(evaluation[name], types):
            raise ValueError(f"{expected}, given {name} of type {type(evaluation[name]).__name__}")
    model = str(evaluation.get("model", ""))
    if model and Path(model).resolve().name not in names:
        raise ValueError(f"{file}: expected results of {' or '.join(sorted(names))}, given those of {model!r}")
    return evaluation


def eval_results(evaluation: dict[str, Any]) -> list[EvalResult]:
    """The measures of an evaluation for a card, without those that are `None` or not finite."""
    how = f"window {evaluation['window']}, stride {evaluation['stride']}"
    how += ", the assistant's turns alone" if evaluation.get("assistant_only") else ""
    measures = (("perplexity", f"perplexity per token, {how}", 3), ("bits_per_byte", f"bits per byte, {how}", 4))
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=evaluation["data"],
            dataset_name=evaluation["data"],
            dataset_split=evaluation["split"],
            metric_type=measure,
            metric_name=name,
            metric_value=round(evaluation[measure], digits),
        )
        for measure, name, digits in measures
        if evaluation[measure] is not None and math.isfinite(evaluation[measure])
    ]


def read_emissions(file: Path) -> dict[str, Any] | None:
    """Reads the last row of CodeCarbon's table, in the form of the Hub's metadata; `None` where there is no row."""
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    if not rows:
        return None
    row = rows[-1]
    hardware = row.get("gpu_model") or row.get("cpu_model")
    place = row.get("country_name")
    return {
        "emissions": round(1000 * float(row["emissions"]), 3),  # from kg to g
        "source": "codecarbon",
        **({"geographical_location": place} if place else {}),
        **({"hardware_used": hardware} if hardware else {}),
    }


def address(text: str, model_id: str, revision: str) -> str:
    """Puts `model_id` and `revision` into the code of a card; leaves cards of other tools unchanged."""
    text = re.sub(r'"(revision|code_revision)": "[^"]*"', rf'"\1": "{revision}"', text)
    text = re.sub(r'from_pretrained\("[^"]*", \*\*trusted\)', f'from_pretrained("{model_id}", **trusted)', text)
    return text if revision == "main" else text.replace(PIN_IT, "")
