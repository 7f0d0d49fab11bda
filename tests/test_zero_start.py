"""A new shift changes no prediction, and is trained whatever trains it, or a warning says that it is not."""

import copy
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_tokens, tiny_causal_lm
from transformers import Trainer, TrainingArguments

from hf_mos import MoSForCausalLM
from hf_mos.training.callbacks import MixtureUsage

TOKENS = random_tokens()
# Full and low rank, on all classes and on a shortlist.
HEADS = {
    "all classes": {"shortlist_size": None},
    "shortlist": {},
    "all classes, low rank": {"shortlist_size": None, "shift_rank": 4},
    "shortlist, low rank": {"shift_rank": 4},
}
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs the extra `peft`")
pytestmark = pytest.mark.filterwarnings("default")  # some of PEFT's adapters warn of themselves


def new_mixture(head: str = "shortlist", name: str = "llama", dtype: torch.dtype = torch.float32) -> MoSForCausalLM:
    return MoSForCausalLM.from_causal_lm(tiny_causal_lm(name).to(dtype), num_mixtures=4, **HEADS[head])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("head", HEADS)
def test_a_new_shift_is_lost_in_rounding(head: str, name: str, dtype: torch.dtype) -> None:
    """Log-probabilities, losses and the first step of AdamW are those of a shift of zero, to the bit."""
    model = new_mixture(head, name, dtype)
    zero = copy.deepcopy(model)
    assert model.lm_head.shift.weight.any() == (dtype != torch.float16)
    torch.nn.init.zeros_(zero.lm_head.shift.weight)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, zero(TOKENS).logits)
    losses = [each.train()(TOKENS, labels=TOKENS).loss for each in (model, zero)]
    assert torch.equal(*losses)
    for each, loss in zip((model, zero), losses, strict=True):
        loss.backward()
        eps = 1e-4 if dtype == torch.float16 else 1e-8  # which fp16 does not have
        torch.optim.AdamW(each.parameters(), lr=1e-2, weight_decay=0.0, eps=eps).step()
    for ours, theirs in zip(model.parameters(), zero.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def train(model: Any, steps: int, learning_rate: float = 1e-2) -> list[float]:
    model.train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adapter(kind: str, targets: Any) -> Any:
    """The config of an adapter of PEFT, with the options that a tiny model needs."""
    from peft import LoraConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    small: dict[str, dict[str, Any]] = {
        "OFT": {"r": 0, "oft_block_size": 4},
        "BOFT": {"boft_block_size": 4},
        "C3A": {"block_size": 4},
        "ADALORA": {"total_step": 100, "tinit": 1, "tfinal": 1},
        "VBLORA": {"vector_length": 4, "num_vectors": 16, "topk": 2},
        "FOURIERFT": {"n_frequency": 16, "scaling": 1.0},
        "WAVEFT": {"n_frequency": 16, "scaling": 1.0},
        "GRALORA": {"r": 4, "gralora_k": 2},
        "ROAD": {"group_size": 4},
        "TINYLORA": {"r": 2},
        "FROD": {},
        "RANDLORA": {"r": 4, "randlora_alpha": 1},
    }
    name, _, start = kind.partition(" ")
    options = small.get(name, {"r": 4, "feedforward_modules": []})
    if name == "DORA":
        return LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=4, use_dora=True)
    config = {key.value: value for key, value in PEFT_TYPE_TO_CONFIG_MAPPING.items()}[name]
    known = {field.name for field in dataclasses.fields(config)}
    options = {key: value for key, value in options.items() if key in known}
    return config(
        task_type="CAUSAL_LM", target_modules=targets, **options | ({"init_lora_weights": start} if start else {})
    )


# Adapters that multiply the weight they adapt, by PEFT's names. They cannot train a new shift.
MULTIPLY = {"BOFT", "DELORA", "FROD", "HIRA", "HRA", "IA3", "OFT", "PEANUT", "PSOFT", "ROAD", "TINYLORA"}
# Adapters that add to the weight, or replace it.
ADD = {
    *(
        "ADALORA",
        "ADAMSS",
        "BEFT",
        "C3A",
        "DEFT",
        "FOURIERFT",
        "GLORA",
        "GRALORA",
        "LILY",
        "LN_TUNING",
        "LOHA",
        "LOKR",
    ),
    *("LORA", "MISS", "OSF", "PVERA", "RANDLORA", "SHIRA", "SUPERTUNING", "UNILORA", "VBLORA", "VERA", "WAVEFT"),
}
# Those of layers of attention, of tokens or of tasks, and one that fails on the softmax model too.
OTHER = {"ADAPTION_PROMPT", "TRAINABLE_TOKENS", "POLY", "SHADOW"}
STARTS = {"DORA", "LORA pissa", "LORA pissa_niter_4", "LORA olora", "LORA orthogonal", "LORA gaussian"}


@needs_peft
def test_every_adapter_is_of_a_kind_that_is_tested() -> None:
    """PEFT's adapters of layers that exist in this release; a new one has to be named above."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    of_layers = {
        kind.value
        for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
        if "target_modules" in {field.name for field in dataclasses.fields(config)}
    }
    assert of_layers <= ADD | MULTIPLY | OTHER


@needs_peft
@pytest.mark.parametrize("head", ["all classes", "shortlist, low rank"])
@pytest.mark.parametrize("kind", sorted(ADD | MULTIPLY | STARTS))
def test_an_adapter_trains_a_new_shift_or_says_that_it_cannot(
    kind: str, head: str, caplog: pytest.LogCaptureFixture
) -> None:
    from peft import get_peft_model

    if kind == "GRALORA" and "low rank" in head:
        pytest.skip("GraLoRA adapts no layer whose inputs have four dimensions")
    torch.manual_seed(0)
    model = new_mixture(head)
    losses = train(get_peft_model(model, adapter(kind, ["shift"])), 8)
    assert all(torch.tensor(losses).isfinite())
    with torch.no_grad():
        shifts = model.mos_head.shifts(model.head_inputs(TOKENS)).abs().amax()
    if kind in MULTIPLY:
        assert losses[-1] == losses[0]
        assert shifts < 1e-10
        assert caplog.text.count("cannot train it") == 1  # once, not at each step
        assert f"the adapter ({kind.lower()}) multiplies a weight" in caplog.text
    else:
        assert shifts > 1e-3
        assert min(losses) < losses[0]  # some draw at random in each step
        assert not caplog.text


@needs_peft
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ["LORA", "DORA", "LORA pissa"])
@pytest.mark.parametrize(
    "targets", ["all-linear", ["lm_head.shift"], ["lm_head"], ["prior", "shift"], ["widening", "shift"]], ids=str
)
def test_no_adapter_of_a_new_mixture_makes_nan(kind: str, targets: Any, head: str) -> None:
    """The loss falls as that of the softmax model falls with the same adapter on its own head."""
    from peft import get_peft_model

    torch.manual_seed(0)
    softmax = train(get_peft_model(tiny_causal_lm(), adapter(kind, ["lm_head"])), 12)
    low_rank = "low rank" in head
    losses = train(get_peft_model(new_mixture(head), adapter(kind, targets)), 12)
    assert all(torch.tensor(losses).isfinite())
    assert losses[0] - losses[-1] > (0.1 if low_rank else 0.5) * (softmax[0] - softmax[-1])


@needs_peft
@pytest.mark.parametrize("head", HEADS)
def test_an_adapter_that_makes_nan_of_a_weight_of_zeros_is_refused(head: str) -> None:
    """Mixtures that were saved before they were trained may have one."""
    from peft import get_peft_model

    model = new_mixture(head)
    torch.nn.init.zeros_(model.lm_head.shift.weight)
    adapted = get_peft_model(model, adapter("DORA", ["shift"])).train()
    with pytest.raises(ValueError, match=r"shift: expected finite numbers, given nan by the adapter \(lora\)"):
        adapted(input_ids=TOKENS, labels=TOKENS)


@needs_peft
def test_the_advice_is_right(caplog: pytest.LogCaptureFixture) -> None:
    from peft import get_peft_model

    config = adapter("OFT", "all-linear")
    config.modules_to_save = ["lm_head.shift"]
    model = new_mixture()
    train(get_peft_model(model, config), 4)
    assert not caplog.text
    with torch.no_grad():
        assert model.mos_head.shifts(model.head_inputs(TOKENS)).abs().amax() > 1e-3


@needs_peft
@pytest.mark.parametrize("head", HEADS)
def test_an_adapter_of_a_trained_shift_is_not_warned_of(head: str, caplog: pytest.LogCaptureFixture) -> None:
    from peft import get_peft_model

    model = new_mixture(head)
    train(model, 4)
    train(get_peft_model(model, adapter("IA3", ["shift"])), 4)
    assert not caplog.text


def run_trainer(model: Any, folder: Path, optimizer: torch.optim.Optimizer | None = None, *, steps: int) -> None:
    rows = [{"input_ids": row, "labels": row} for row in random_tokens(16)]
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True, max_steps=steps,
        logging_steps=1, save_strategy="no", learning_rate=1e-3,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
    MixtureUsage(starved_below=0.0, starved_for=4).add_to(trainer)
    trainer.train()


@pytest.mark.parametrize("head", ["all classes", "shortlist, low rank"])
def test_components_that_stay_equal_are_named(head: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = new_mixture(head)
    model.lm_head.shift.requires_grad_(False)
    run_trainer(model, tmp_path, steps=7)
    assert caplog.text.count("all been equal") == 1
    assert "step 5: the components of the mixture have all been equal since step 1" in caplog.text
    caplog.clear()
    run_trainer(new_mixture(head), tmp_path, steps=5)
    assert "equal" not in caplog.text


def optimizers(model: Any) -> dict[str, torch.optim.Optimizer]:
    from transformers.optimization import Adafactor

    return {
        "torch": torch.optim.Adafactor(model.parameters(), lr=1e-2),
        "transformers": Adafactor(model.parameters(), lr=1e-2, scale_parameter=True, relative_step=False),
        "unscaled": Adafactor(model.parameters(), lr=1e-3, scale_parameter=False, relative_step=False),
        "AdamW": torch.optim.AdamW(model.parameters(), lr=1e-3),
    }


@pytest.mark.parametrize("head", ["all classes", "shortlist, low rank"])
@pytest.mark.parametrize("name", ["torch", "transformers", "unscaled", "AdamW"])
def test_an_adafactor_that_hardly_moves_the_shift_is_named(
    name: str, head: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = new_mixture(head)
    run_trainer(model, tmp_path, optimizers(model)[name], steps=1)
    assert ("Adafactor steps in proportion" in caplog.text) == (name in ("torch", "transformers"))
    step = model.lm_head.shift.weight.detach().abs().amax()
    assert (step < 1e-4) == (name in ("torch", "transformers"))
    caplog.clear()
    run_trainer(model, tmp_path, optimizers(model)[name], steps=1)  # no longer new
    assert "Adafactor" not in caplog.text


@needs_peft
def test_the_look_at_an_adapter_leaves_other_hooks_removable() -> None:
    from peft import get_peft_model

    model = get_peft_model(new_mixture(), adapter("LORA", ["shift"]))
    shift = model.get_base_model().lm_head.shift
    calls: list[int] = []
    handle = shift.register_forward_hook(lambda *_: calls.append(1))
    train(model, 1)
    assert calls
    handle.remove()
    calls.clear()
    train(model, 1)
    assert not calls
