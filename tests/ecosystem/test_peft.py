"""Checks PEFT's adapters on a mixture: predictions stay the same after saving, loading, merging and unloading."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import HEADS, greedy, logged_losses, random_tokens, run_python, tiny_causal_lm, tiny_mos
from peft import (
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_mos import MoSForCausalLM

pytestmark = [
    pytest.mark.filterwarnings("default:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("default:fan_in_fan_out is set"),  # of GPT-2, whose layers are Conv1D
    pytest.mark.filterwarnings("default:Input and output embeddings are no longer tied after merging"),
    pytest.mark.filterwarnings("default:Setting `save_embedding_layers` to `True`"),  # of an adapter on the decoder
    pytest.mark.filterwarnings("default:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter"),
]

TOKENS = random_tokens()


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "init_lora_weights": True, **options})


def full_mos() -> MoSForCausalLM:
    """Of components that differ on all classes; the others have the default shortlist."""
    return tiny_mos(shortlist_size=None)


def untied_mos() -> MoSForCausalLM:
    return MoSForCausalLM.from_causal_lm(tiny_causal_lm("llama-tied"), num_mixtures=3, tie_word_embeddings=False)


def tied_mos() -> MoSForCausalLM:
    return tiny_mos("llama-tied")


def gpt2_mos() -> MoSForCausalLM:
    return tiny_mos("gpt2")


def gemma2_mos() -> MoSForCausalLM:
    return MoSForCausalLM.from_causal_lm(tiny_causal_lm("gemma2"), num_mixtures=3, tie_word_embeddings=False)


ALL = {"prior", "shift", "decoder"}  # the parts of the head; `lm_head` itself is the decoder

# The base, the adapter, and the parts of the head that train with it.
ADAPTERS: dict[str, tuple[Callable[[], MoSForCausalLM], PeftConfig, set[str]]] = {
    "without targets": (tiny_mos, lora(), set()),
    "without targets, gpt2": (gpt2_mos, lora(), set()),
    "prior and shift saved": (
        tiny_mos,
        lora(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head.prior", "lm_head.shift"]),
        {"prior", "shift"},
    ),
    "head saved": (tiny_mos, lora(target_modules=["q_proj"], modules_to_save=["lm_head"]), ALL),
    "head saved, all classes": (full_mos, lora(target_modules=["q_proj"], modules_to_save=["lm_head"]), ALL),
    "tied head saved": (tied_mos, lora(target_modules=["q_proj"], modules_to_save=["lm_head"]), ALL),
    "prior and shift": (tiny_mos, lora(target_modules=["lm_head.prior", "lm_head.shift"]), {"prior", "shift"}),
    "decoder": (tiny_mos, lora(target_modules=["lm_head"]), {"decoder"}),
    "decoder, all classes": (full_mos, lora(target_modules=["lm_head"]), {"decoder"}),
    "decoder with a softcap": (gemma2_mos, lora(target_modules=["lm_head"]), {"decoder"}),
    "untied decoder": (untied_mos, lora(target_modules=["lm_head"]), {"decoder"}),
    "all-linear": (tiny_mos, lora(target_modules="all-linear"), {"prior", "shift"}),
    "all-linear, tied": (tied_mos, lora(target_modules="all-linear"), {"prior", "shift"}),
    "all-linear, gpt2": (gpt2_mos, lora(target_modules="all-linear"), {"prior", "shift"}),
    "DoRA": (tiny_mos, lora(target_modules=["q_proj", "shift"], use_dora=True), {"shift"}),
    "DoRA on the decoder": (tiny_mos, lora(target_modules=["lm_head"], use_dora=True), {"decoder"}),
    "rank-stabilised": (tiny_mos, lora(target_modules=["q_proj", "shift"], use_rslora=True), {"shift"}),
    "tokens": (tied_mos, lora(target_modules=["q_proj"], trainable_token_indices=TOKENS[0, :4].tolist()), set()),
    "IA3": (
        tiny_mos,
        IA3Config(
            task_type="CAUSAL_LM", target_modules=["v_proj", "shift", "down_proj"], feedforward_modules=["down_proj"]
        ),
        {"shift"},
    ),
}


def losses_of_training(model: Any, autocast: bool = False) -> list[float]:
    """Every trained parameter gets a gradient within the steps."""
    model.train()
    parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.Adam(parameters.values(), lr=2e-2)
    losses, moved = [], set()
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        moved |= {name for name, weight in parameters.items() if weight.grad is not None and weight.grad.any()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    assert moved == parameters.keys()
    return losses


@torch.no_grad()
def predictions(model: Any) -> tuple[Tensor, Tensor]:
    outputs = model(input_ids=TOKENS, labels=TOKENS)
    return outputs.logits, outputs.loss


def assert_same(model: Any, expected: tuple[Tensor, Tensor], atol: float = 1e-5) -> None:
    for ours, theirs in zip(predictions(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-5)


def trained_in_head(model: Any) -> set[str]:
    """The parts of the head that have trained parameters, apart from single tokens of a tied decoder."""
    trained = (name for name, weight in model.named_parameters() if weight.requires_grad and "lm_head." in name)
    trained = (name.partition("lm_head.")[2] for name in trained if "token_adapter" not in name)
    return {next((part for part in ("prior", "shift") if f"{part}." in name), "decoder") for name in trained}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters(case: str, tmp_path: Path) -> None:
    new_base, config, in_head = ADAPTERS[case]
    base = new_base()
    before = predictions(base)
    model = get_peft_model(base, copy.deepcopy(config))
    assert_same(model, before)
    assert trained_in_head(model) == in_head

    losses = losses_of_training(model)
    assert losses[-1] < 0.95 * losses[0]
    expected = predictions(model)
    assert not torch.allclose(expected[1], before[1], atol=1e-2)
    log_probs = expected[0][:, :-1].gather(-1, TOKENS[:, 1:, None])
    torch.testing.assert_close(expected[1], -log_probs.mean())
    assert model.base_model.model.mos_head.prior.weight.dtype == torch.float32

    model.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(new_base(), tmp_path / "adapter").eval()
    assert_same(reloaded, expected)
    with reloaded.disable_adapter():
        assert_same(reloaded, before)
    if not config.modules_to_save:  # which PEFT leaves in the model
        assert_same(reloaded.unload(), before)

    merged = model.merge_and_unload()
    assert isinstance(merged, MoSForCausalLM)
    assert not any("lora" in name or "modules_to_save" in name for name in merged.state_dict())
    assert_same(merged, expected, atol=3e-4)  # a merge rounds the sum of two weights, and the logits are up to 60
    merged.save_pretrained(tmp_path / "merged")
    assert_same(MoSForCausalLM.from_pretrained(tmp_path / "merged"), expected, atol=3e-4)


@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_a_copy_of_a_tied_head_that_is_a_softmax_is_refused(names: list[str]) -> None:
    """PEFT puts a plain projection in the place of a head that is tied to a saved embedding."""
    model = get_peft_model(
        tied_mos(), lora(target_modules=["q_proj"], modules_to_save=names, ensure_weight_tying=True)
    )
    with pytest.raises(ValueError, match="ensure_weight_tying: expected False"):
        model(TOKENS, labels=TOKENS)


def test_an_adapter_on_a_tied_decoder(tmp_path: Path) -> None:
    """It trains and is loaded again. PEFT warns that merging it would change the embedding, as for a softmax model."""
    with pytest.warns(
        UserWarning, match="Model has `tie_word_embeddings=True` and a tied layer is part of the adapter"
    ):
        model = get_peft_model(tied_mos(), lora(target_modules=["lm_head"]))
    losses = losses_of_training(model)
    assert losses[-1] < losses[0]
    expected = predictions(model)
    model.save_pretrained(tmp_path)
    assert_same(PeftModel.from_pretrained(tied_mos(), tmp_path).eval(), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("new_base", [tiny_mos, full_mos, gemma2_mos])
def test_gradients_through_an_adapted_decoder(new_base: Callable[[], MoSForCausalLM], reduction: str) -> None:
    """Those of the loss are those of the log-probabilities, down to the adapter's weights."""
    model = get_peft_model(new_base(), lora(target_modules=["lm_head"])).train()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    adapter, head = model.base_model.model.lm_head, model.base_model.model.mos_head
    for layer in (head.prior, head.shift):
        layer.requires_grad_(True)
    hidden_states = torch.randn(10, 32, requires_grad=True)
    targets = TOKENS.flatten()[:10].clone()
    targets[3] = -100
    token_weights = torch.rand(10) if reduction == "none" else torch.tensor(1.0)
    loss = (head(hidden_states, targets=targets, reduction=reduction, decoder=adapter) * token_weights).sum()
    log_probs = head(hidden_states, decoder=adapter)
    nll = torch.nn.functional.nll_loss(log_probs, targets, reduction=reduction)
    wanted = [hidden_states, *(weight for weight in adapter.parameters() if weight.requires_grad)]
    assert len(wanted) == 5  # two of the adapter, the prior, the shift
    gradients = torch.autograd.grad(loss, wanted)
    expected = torch.autograd.grad((nll * token_weights).sum(), wanted)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_head_alone_leaves_the_backbone_and_the_decoder(tmp_path: Path) -> None:
    model = get_peft_model(tiny_mos(), lora(target_modules=["lm_head.prior", "lm_head.shift"]))
    assert all(".lm_head." in name for name, weight in model.named_parameters() if weight.requires_grad)
    frozen = {name: weight.clone() for name, weight in model.named_parameters() if not weight.requires_grad}
    losses_of_training(model)
    for name, weight in model.named_parameters():
        assert name not in frozen or torch.equal(weight, frozen[name])


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ],
    ids=["prompt", "prefix"],
)
def test_virtual_tokens(config: PeftConfig, tmp_path: Path) -> None:
    model = get_peft_model(tiny_mos(), config)
    losses = losses_of_training(model)
    assert losses[-1] < losses[0]
    expected = predictions(model)
    log_probs = expected[0][:, -TOKENS.shape[1] : -1].gather(-1, TOKENS[:, 1:, None])
    if config.peft_type == "PREFIX_TUNING":  # a prompt predicts the first token as well
        torch.testing.assert_close(expected[1], -log_probs.mean())
    model.save_pretrained(tmp_path)
    assert_same(PeftModel.from_pretrained(tiny_mos(), tmp_path).eval(), expected)


@pytest.mark.parametrize("options", [{}, {"shortlist_size": None}], ids=str)
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("names", [None, ["default", "other"]], ids=str)
def test_adapters_of_positions_and_of_rows_on_the_decoder(
    names: list[str] | None, name: str, options: dict[str, Any]
) -> None:
    """An activated LoRA adapts the tokens from its invocation on; with `adapter_names` each row has its own."""
    softmax = tiny_causal_lm(name)
    activated = {} if names else {"alora_invocation_tokens": [int(TOKENS[0, 5])]}
    tokens = TOKENS.clone()
    tokens[:, 5] = TOKENS[0, 5]
    found = []
    for base in (softmax, MoSForCausalLM.from_causal_lm(copy.deepcopy(softmax), **options)):
        model = get_peft_model(base, lora(target_modules=["lm_head"], init_lora_weights=False, **activated))
        if names:
            model.add_adapter("other", lora(target_modules=["lm_head"], init_lora_weights=False))
        generator = torch.Generator().manual_seed(0)
        for path, weight in sorted(model.named_parameters()):
            if "lora_" in path:
                weight.data = torch.randn(weight.shape, generator=generator)
        given = {"input_ids": tokens, **({"adapter_names": names} if names else {})}
        with torch.no_grad():
            logits = model.eval()(**given).logits.log_softmax(-1)
        found.append((logits, model.generate(**given, max_new_tokens=5, do_sample=False)))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-4, rtol=1e-4)
    assert torch.equal(found[1][1], found[0][1])


@pytest.mark.parametrize("options", [{}, {"shortlist_size": None}], ids=str)
def test_rotations_of_the_decoder(options: dict[str, Any]) -> None:
    """OFT takes an input of four dimensions for that of a convolution."""
    softmax = tiny_causal_lm("llama")
    found = []
    for base in (softmax, MoSForCausalLM.from_causal_lm(copy.deepcopy(softmax), **options)):
        config = OFTConfig(target_modules=["lm_head"], oft_block_size=4, r=0, task_type="CAUSAL_LM")
        torch.manual_seed(0)
        model = get_peft_model(base, config)
        for path, weight in model.named_parameters():
            if "oft_" in path:
                weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
        losses = [candidate(TOKENS, labels=TOKENS).loss for candidate in (model.train(), model.eval())]
        found.append((*losses, model(TOKENS).logits.log_softmax(-1)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj", "lm_head"]], ids=str)
def test_gradient_checkpointing(target_modules: Any) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(tiny_mos(), lora(target_modules=target_modules, init_lora_weights=False)).train()
        if checkpointing:
            model.enable_input_require_grads()
            base = model.base_model.model
            getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        gradients.append([weight.grad for weight in model.parameters() if weight.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj", "lm_head"]], ids=str)
def test_half_precision(target_modules: Any) -> None:
    model = get_peft_model(tiny_mos().to(torch.bfloat16), lora(target_modules=target_modules))
    losses = losses_of_training(model)
    assert losses[-1] < 0.9 * losses[0]
    model = get_peft_model(tiny_mos(), lora(target_modules=target_modules))
    losses = losses_of_training(model, autocast=True)
    assert losses[-1] < 0.9 * losses[0]


def test_the_trainer_trains_adapters(tmp_path: Path) -> None:
    model = get_peft_model(tiny_mos(), lora(target_modules="all-linear", modules_to_save=["lm_head.prior"]))
    rows = [{"input_ids": row, "labels": row} for row in random_tokens(8)]
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=6, logging_steps=1, save_steps=6,
        learning_rate=1e-2, per_device_train_batch_size=4, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = logged_losses(trainer)
    assert losses[-1] < losses[0]
    model.eval()
    assert_same(PeftModel.from_pretrained(tiny_mos(), tmp_path / "checkpoint-6").eval(), predictions(model))


@pytest.mark.parametrize("case", ["prior and shift", "decoder", "prior and shift saved"])
def test_adapters_of_transformers_itself(case: str, tmp_path: Path) -> None:
    _, config, _ = ADAPTERS[case]
    model = tiny_mos()
    before = predictions(model)
    if config.modules_to_save:  # transformers trains adapters alone
        config = lora(target_modules=config.target_modules)
    model.add_adapter(copy.deepcopy(config))
    losses = losses_of_training(model)
    assert losses[-1] < losses[0]
    expected = predictions(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    other = tiny_mos()
    other.load_adapter(str(tmp_path))
    assert_same(other.eval(), expected)
    other.disable_adapters()
    assert_same(other, before)


FRESH = """
warnings.filterwarnings("default", ".is_gradient_checkpointing. is deprecated")
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
model = PeftModel.from_pretrained(base, sys.argv[2])
tokens = torch.arange(3, 15).view(2, 6)
print(type(model.base_model.model.mos_head.prior).__name__)
print(model(input_ids=tokens, labels=tokens).loss.item())
auto = AutoPeftModelForCausalLM.from_pretrained(
    sys.argv[2], trust_remote_code=True
)
print(auto(input_ids=tokens, labels=tokens).loss.item())
print(model.merge_and_unload().generate(tokens, max_new_tokens=4, do_sample=False).tolist())
"""


@pytest.mark.parametrize("case", ["decoder", "prior and shift saved"])
def test_an_adapter_in_a_fresh_process(case: str, tmp_path: Path) -> None:
    tiny_mos().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, copy.deepcopy(ADAPTERS[case][1]))
    losses_of_training(model)
    model.save_pretrained(tmp_path / "adapter")
    assert PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path == str(tmp_path / "base")
    tokens = torch.arange(3, 15).view(2, 6)
    with torch.no_grad():
        loss = float(model(input_ids=tokens, labels=tokens).loss)
    lines = run_python(FRESH, tmp_path / "base", tmp_path / "adapter", cache=tmp_path).splitlines()
    kind, *printed, generated = [line for line in lines if not line.startswith("[20")]
    assert kind == ("Linear" if case == "decoder" else "ModulesToSaveWrapper")
    assert [float(value) for value in printed] == pytest.approx([loss, loss], abs=1e-5)
    assert generated == str(greedy(model, tokens, 4).tolist())


@pytest.mark.parametrize("shift_rank", [None, 4])
@pytest.mark.parametrize(
    "parts",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head.prior", "lm_head.shift"]},
        {"target_modules": "all-linear"},  # the adapter holds no weight of the head itself
        {"target_modules": ["q_proj"]},
    ],
    ids=str,
)
def test_an_adapter_on_a_freshly_converted_base(parts: dict[str, Any], shift_rank: int | None, tmp_path: Path) -> None:
    """The same conversion takes it, in whatever process, as its first weights are the same."""
    tiny_causal_lm().save_pretrained(tmp_path / "softmax")
    base = MoSForCausalLM.from_causal_lm(tmp_path / "softmax", num_mixtures=3, shift_rank=shift_rank)
    model = get_peft_model(base, lora(**parts))
    losses_of_training(model)
    expected = predictions(model)
    model.save_pretrained(tmp_path / "adapter")
    # AutoPeftModelForCausalLM loads what is named there, and would drop the adapter's weights of the head in silence.
    assert not PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path
    assert f"base_model: {tmp_path / 'softmax'}\n" in (tmp_path / "adapter" / "README.md").read_text()
    torch.manual_seed(7)
    converted = MoSForCausalLM.from_causal_lm(tmp_path / "softmax", num_mixtures=3, shift_rank=shift_rank)
    assert_same(PeftModel.from_pretrained(converted, tmp_path / "adapter").eval(), expected)


def test_a_model_with_an_adapter_is_not_converted(tmp_path: Path) -> None:
    """It could be saved, but not loaded; merged first, it can."""
    softmax = tiny_causal_lm()
    softmax.save_pretrained(tmp_path / "softmax")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "softmax")
    adapted = get_peft_model(base, lora(target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight += 0.1
    adapted.save_pretrained(tmp_path / "adapter")
    advice = r"expected .*given .*Merge it first: PeftModel.merge_and_unload\(\)"
    for given in (adapted, base, str(tmp_path / "adapter")):
        with pytest.raises(ValueError, match=advice):
            MoSForCausalLM.from_causal_lm(given)
    with torch.no_grad():
        expected = adapted(input_ids=TOKENS).logits.log_softmax(-1)
        model = MoSForCausalLM.from_causal_lm(adapted.merge_and_unload())
        torch.testing.assert_close(model(input_ids=TOKENS).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_an_adapter_without_targets_finds_those_of_the_softmax_model(name: str) -> None:
    adapted = [get_peft_model(model, LoraConfig()) for model in (tiny_causal_lm(name), tiny_mos(name))]
    softmax, mixture = ([key for key, _ in model.named_parameters() if "lora_" in key] for model in adapted)
    assert mixture == softmax
    assert len(mixture) > 0


SOFTMAX_ADAPTERS = {
    "layers": lora(target_modules=["q_proj", "v_proj"]),
    "without targets": lora(),
    "decoder": lora(target_modules=["q_proj", "lm_head"]),
    "embedding": lora(target_modules=["embed_tokens"]),
    "all-linear": lora(target_modules="all-linear"),
    "DoRA": lora(target_modules=["q_proj", "lm_head"], use_dora=True),
}


@pytest.mark.parametrize("options", [{}, *HEADS], ids=str)
@pytest.mark.parametrize("case", SOFTMAX_ADAPTERS)
def test_an_adapter_of_the_softmax_model_is_one_of_the_mixture(case: str, options: dict, tmp_path: Path) -> None:
    """The mixture with it predicts what the softmax model with it does, until the mixture is trained."""
    tiny_causal_lm().save_pretrained(tmp_path / "softmax")
    softmax = get_peft_model(tiny_causal_lm(), copy.deepcopy(SOFTMAX_ADAPTERS[case]))
    losses_of_training(softmax)
    softmax.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = softmax(input_ids=TOKENS).logits.log_softmax(-1)
        loss = softmax(input_ids=TOKENS, labels=TOKENS).loss
    base = MoSForCausalLM.from_causal_lm(tmp_path / "softmax", num_mixtures=3, **options)
    with torch.no_grad():
        assert not torch.allclose(base(input_ids=TOKENS).logits, expected, atol=0.1)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert_same(model, (expected, loss))
    merged = model.merge_and_unload()
    assert isinstance(merged, MoSForCausalLM)
    assert_same(merged, (expected, loss))
