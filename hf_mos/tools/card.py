"""The model card of a mixture model, from `model_card_template.md` beside this file."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..modeling_mos import MoSForCausalLM

TEMPLATE = Path(__file__).with_name("model_card_template.md")
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
) -> ModelCard:
    """A card that says what the head is, what was measured, how to load the model and what it cannot do.

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
    head = model.lm_head
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        model_name=model_name,
        model_id=model_id,
        backbone=type(model.backbone).__name__,
        base_model=base_model,
        num_mixtures=head.num_mixtures,
        hidden_size=head.input_size,
        latent_size=head.latent_size,
        vocab_size=head.decoder.out_features,
        latents=describe_latents(model),
        tied=head.decoder.weight is model.get_input_embeddings().weight,
        num_parameters=model.num_parameters(),
        head_cost=head_cost(model),
        eval_results=eval_results,
        command=command,
        machine=machine,
        comparison=comparison,
        description=description,
        limits=limits,
        prompt=prompt,
        revision=revision,
    )


def describe_latents(model: MoSForCausalLM) -> str:
    head, config = model.lm_head, model.config
    kind = (
        "full projections" if head.latent_rank is None else f"shifts in one shared subspace of rank {head.latent_rank}"
    )
    return f"{kind}, {config.latent_activation} activation"


def head_cost(model: MoSForCausalLM) -> float:
    """Multiplications of the vocabulary product, in products of one softmax: K, or 1 + K R / E with shared latents."""
    head = model.lm_head
    if head.latent_rank is None:
        return float(head.num_mixtures)
    return 1 + head.num_mixtures * head.latent_rank / head.latent_size
