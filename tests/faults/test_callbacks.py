"""Checks the callbacks: a failing run stops and can resume, and a starved component is reported."""

import contextlib
import functools
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCAB_SIZE, LargestTensor, logged_losses, random_tokens, run_python, tiny_causal_lm, tiny_mos
from killing import kill_at_every_change
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_mos import MoSForCausalLM, MoSLMHead
from hf_mos.training.callbacks import MixtureUsage, StopOnNonFiniteLoss, last_whole_checkpoint
from hf_mos.training.mixture_statistics import mixture_statistics, predict_in_chunks

ROWS = [{"input_ids": row, "labels": row} for row in random_tokens(16, 8)]


class Poison(TrainerCallback):
    """Makes the loss of one step NaN: a weight that is read is, and then is not."""

    def __init__(self, step: int, value: float = float("nan")) -> None:
        self.step, self.value = step, value

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            model.lm_head.prior.weight.data[0, 0] = self.value


def trainer(folder: Path, model: MoSForCausalLM, callbacks: list[TrainerCallback], **options: Any) -> Trainer:
    options = {"max_steps": 6, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-3} | options
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True, **options
    )
    return Trainer(model, arguments, train_dataset=ROWS, callbacks=callbacks)


# ------------------------------------------------------------------------------------------- a loss that is not finite


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"logging_steps": 100}])
def test_a_loss_that_is_not_finite_stops_the_run(options: dict[str, Any], tmp_path: Path) -> None:
    run = trainer(tmp_path, tiny_mos(), [StopOnNonFiniteLoss(), Poison(5)], **options)
    with pytest.raises(FloatingPointError, match=r"loss of step 5 is not finite.*checkpoint-4"):
        run.train()
    assert run.state.global_step == 4
    weights = run.model.lm_head.shift.weight
    assert weights.isfinite().all()  # step 5 has changed nothing
    assert get_last_checkpoint(str(tmp_path)).endswith("checkpoint-4")
    assert MoSForCausalLM.from_pretrained(tmp_path / "checkpoint-4").lm_head.prior.weight.isfinite().all()
    # The same model can be trained on, without the callback's hook.
    assert not run.model._forward_hooks


def test_interrupted_runs_leave_no_hooks(tmp_path: Path) -> None:
    """As those of a notebook, and of `auto_find_batch_size`."""

    class Interrupt(TrainerCallback):
        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            raise KeyboardInterrupt

    model = tiny_mos()
    for callbacks in ([Interrupt()], [Interrupt()], []):
        run = trainer(tmp_path, model, [StopOnNonFiniteLoss(), *callbacks])
        MixtureUsage().add_to(run)
        with pytest.raises(KeyboardInterrupt) if callbacks else contextlib.nullcontext():
            run.train()
    for module in (model, model.mos_head.prior):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
def test_usage_is_logged_under_prompt_tuning(tmp_path: Path) -> None:
    """PEFT puts tokens before those of the batch, and labels to them."""
    peft = pytest.importorskip("peft")
    prompted = peft.get_peft_model(tiny_mos(), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    run = trainer(tmp_path, prompted, [])
    MixtureUsage().add_to(run)
    run.train()
    assert all("mixture_entropy" in entry for entry in run.state.log_history if "loss" in entry)


def test_a_loss_computed_outside_the_model_stops_the_run_when_logged(tmp_path: Path) -> None:
    run = trainer(tmp_path, tiny_mos(), [StopOnNonFiniteLoss()])
    run.compute_loss_func = lambda outputs, labels, **kwargs: torch.tensor(math.inf, requires_grad=True) * 1
    with pytest.raises(FloatingPointError, match=r"logged at step 1 is (inf|nan)"):
        run.train()


def test_the_stock_trainer_goes_on(tmp_path: Path) -> None:
    run = trainer(tmp_path, tiny_mos(), [Poison(3)])
    run.train()
    losses = logged_losses(run)
    assert run.state.global_step == 6
    assert losses[2:] == [0.0] * 4
    assert not run.model.lm_head.prior.weight.isfinite().all()


def test_a_sound_run_is_left_alone(tmp_path: Path) -> None:
    losses = []
    for callbacks in ([], [StopOnNonFiniteLoss(), MixtureUsage()]):
        run = trainer(tmp_path / str(len(losses)), tiny_mos(), callbacks)
        run.train()
        losses.append(logged_losses(run))
    assert losses[0] == losses[1]


def test_the_process_ends_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in Path(__file__).parents[:2]:
        monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    code = """
from pathlib import Path
from test_callbacks import Poison, StopOnNonFiniteLoss, tiny_mos, trainer
trainer(Path(sys.argv[1]), tiny_mos(), [StopOnNonFiniteLoss(), Poison(3)]).train()
"""
    with pytest.raises(AssertionError, match="FloatingPointError: the loss of step 3 is not finite"):
        run_python(code, tmp_path / "out", cache=tmp_path, without_hf_mos=False)


# ------------------------------------------------------------------------------------------------------------ resuming


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trainer(folder, tiny_mos(), []).train()
    return folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no state": (lambda folder: (folder / "trainer_state.json").unlink(), "no trainer_state.json"),
    "half a state": (lambda folder: truncate(folder / "trainer_state.json"), "trainer_state.json cannot be read"),
    "half the weights": (lambda folder: truncate(folder / "model.safetensors"), "model.safetensors: expected"),
    "half the optimizer": (lambda folder: truncate(folder / "optimizer.pt"), "optimizer.pt is cut short"),
    "half the random state": (lambda folder: truncate(folder / "rng_state.pth"), "rng_state.pth is cut short"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    "a save cut off": (lambda folder: (folder / "_saving_1").mkdir(), "saving of its model was cut off"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_resuming_skips_a_checkpoint_cut_short(
    fault: str, run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-6") == get_last_checkpoint(str(folder))
    assert not caplog.records
    spoil, words = FAULTS[fault]
    spoil(folder / "checkpoint-6")
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-4")
    assert "checkpoint-6 is skipped" in caplog.text
    assert words in caplog.text
    run = trainer(folder, tiny_mos(), [])
    run.train(resume_from_checkpoint=last_whole_checkpoint(folder))
    again, first = (MoSForCausalLM.from_pretrained(f / "checkpoint-6").state_dict() for f in (folder, run_folder))
    assert all(torch.equal(again[key], first[key]) for key in first)


def test_no_whole_checkpoint(tmp_path: Path) -> None:
    assert last_whole_checkpoint(tmp_path / "none") is None
    (tmp_path / "checkpoint-7").mkdir()
    assert last_whole_checkpoint(tmp_path) is None


@pytest.mark.slow
def test_a_run_killed_while_saving_resumes_from_a_whole_checkpoint(run_folder: Path, tmp_path: Path) -> None:
    """Killed at every write of checkpoint-6; the files of each are judged, and a few are resumed from."""

    def fresh() -> Path:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        shutil.copytree(run_folder, folder, ignore=shutil.ignore_patterns("checkpoint-6"))
        return folder

    def resume(folder: Path) -> None:
        trainer(folder, tiny_mos(), []).train(resume_from_checkpoint=str(folder / "checkpoint-4"))

    found = []
    for folder in kill_at_every_change(resume, fresh):
        checkpoint = last_whole_checkpoint(folder)
        found.append(Path(checkpoint).name)
        MoSForCausalLM.from_pretrained(checkpoint)
        json.loads(Path(checkpoint, "trainer_state.json").read_text())
    assert found == sorted(found)
    assert found[-1] == "checkpoint-6"
    assert found.count("checkpoint-4") > 20


# ------------------------------------------------------------------------------------------------------------ starving


def starve(model: MoSForCausalLM) -> MoSForCausalLM:
    """Component 1 gets next to nothing on every token: one number of GPT-2's hidden state is 10 on each."""
    head = model.lm_head
    with torch.no_grad():
        model.transformer.ln_f.weight[0], model.transformer.ln_f.bias[0] = 0, 10
        head.prior.weight.mul_(0.1)
        head.prior.weight[:, 0] = 0
        head.prior.weight[1, 0] = -6 / (10 * head.latent_scale)
    return model


@pytest.mark.parametrize("components", [False, True])
def test_usage_is_logged(components: bool, tmp_path: Path) -> None:
    run = trainer(tmp_path, tiny_mos(num_mixtures=4), [])
    MixtureUsage(components).add_to(run)
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(entries) == 6
    pairs = [(j, k) for k in range(4) for j in range(k)]
    for entry in entries:
        assert 0 <= entry["mixture_entropy"] <= math.log(4)
        assert 0 < entry["smallest_mixture_weight"] <= 1 / 4
        assert 0 < entry["mixture_divergence"] < math.log(2)
        usual = {"loss", "grad_norm", "learning_rate", "epoch", "step"}
        assert len(entry.keys() - usual) == (3 + 4 + len(pairs) if components else 3)
        if components:
            divergences = [entry[f"divergence_{j}_{k}"] for j, k in pairs]
            assert entry["mixture_divergence"] == pytest.approx(sum(divergences) / len(pairs))
            assert sum(entry[f"responsibility_{k}"] for k in range(4)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("wrapped", [False, True])
def test_usage_is_that_of_the_batch_and_the_loss_makes_no_logits(
    wrapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny_mos(), random_tokens(16, 8)[:4]
    with torch.no_grad():
        hidden_states = model.head_inputs(input_ids=batch)[:, :-1].flatten(0, 1)
    expected = mixture_statistics(model.mos_head, hidden_states, batch[:, 1:].flatten())
    if wrapped:
        model.lm_head = torch.nn.Sequential(model.lm_head)
    else:
        monkeypatch.setattr(MoSLMHead, "log_probs", lambda *args: pytest.fail("logits were computed"))
    run = trainer(tmp_path, model, [], max_steps=1, save_strategy="no", learning_rate=0.0)
    run.train_dataset = ROWS[:4]
    MixtureUsage(components=True, max_tokens=1000).add_to(run)
    run.train()
    entry = run.state.log_history[0]
    assert entry["mixture_entropy"] == pytest.approx(expected.entropy, rel=1e-5)
    assert entry["smallest_mixture_weight"] == pytest.approx(float(expected.mean_weights.min()), rel=1e-5)
    assert entry["responsibility_1"] == pytest.approx(float(expected.responsibilities[1]), rel=1e-5)
    assert entry["divergence_0_1"] == pytest.approx(float(expected.divergence[0, 1]), rel=1e-5)


def test_a_mixture_that_is_not_logged_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With label smoothing the Trainer takes the labels out of the call of the model."""
    run = trainer(tmp_path, tiny_mos(), [], max_steps=3, label_smoothing_factor=0.1)
    MixtureUsage().add_to(run)
    run.train()
    assert not any("mixture_entropy" in entry for entry in run.state.log_history)
    assert caplog.text.count("With label_smoothing_factor the Trainer keeps the labels to itself.") == 1


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ({"max_tokens": 0}, "max_tokens: expected at least 1, given 0"),
        ({"starved_for": 0}, "starved_for: expected at least 1, given 0"),
        ({"starved_below": 2.0}, r"starved_below: expected a number in \[0, 1\], given 2.0"),
    ],
)
def test_options_of_usage_are_refused_by_name(option: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        MixtureUsage(**option)


def test_a_component_that_starves_for_long_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(tmp_path, starve(tiny_mos("gpt2")), [], max_steps=9, learning_rate=1e-5)
    MixtureUsage(starved_for=4).add_to(run)
    run.train()
    warning = "step 5: component 1 of the mixture has starved since step 1: its mean weight is"
    assert caplog.text.count("has starved") == 1  # once, not at each log
    assert warning in caplog.text


def test_a_component_that_starves_now_and_then_is_not_named(caplog: pytest.LogCaptureFixture) -> None:
    usage, rare = MixtureUsage(), torch.tensor([0.001, 0.999])
    for step in range(1, 400):
        usage.warn_of_starved(rare if step % 40 else rare.flip(0), step)
    assert not caplog.text
    for step in range(500, 2501, 500):  # of logs that are far apart, three
        usage.warn_of_starved(rare if step > 500 else rare.flip(0), step)
    assert caplog.text.count("has starved") == 1
    assert "step 2000: component 0 of the mixture has starved since step 1000" in caplog.text


def test_statistics_are_those_of_the_definition() -> None:
    model = tiny_mos(num_mixtures=2, shortlist_size=None).double()
    head, hidden = model.lm_head, torch.randn(5, 32, dtype=torch.float64)
    targets = torch.randint(0, VOCAB_SIZE, (5,))
    scale = head.latent_scale
    weights = head.prior(scale * hidden).softmax(-1)
    p = ((hidden.unsqueeze(1) + scale * head.shift(hidden).view(5, 2, 32)) @ head.weight.T).softmax(-1)
    joint = weights * p[torch.arange(5), :, targets]
    middle = p.mean(1)
    kl = [(p[:, k] * (p[:, k] / middle).log()).sum(-1) for k in range(2)]
    statistics = mixture_statistics(head, hidden, targets)
    assert torch.allclose(statistics.mean_weights, weights.mean(0))
    assert statistics.entropy == pytest.approx((-weights * weights.log()).sum(-1).mean().item())
    assert torch.allclose(
        statistics.responsibilities.double(), (joint / joint.sum(-1, keepdim=True)).mean(0), atol=1e-6
    )
    assert statistics.divergence[0, 1].item() == pytest.approx((sum(kl) / 2).mean().item(), abs=1e-6)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(("name", "shortlist_size"), [("llama", 5), ("gemma2", 64), ("gpt2", 1), ("llama-tied", 97)])
def test_statistics_on_a_shortlist_are_those_of_the_whole_components(
    name: str, shortlist_size: int, wrapped: bool
) -> None:
    """Without the (n, K, V) log-probabilities of the components, of which a wrapped decoder has no other way."""
    head = tiny_mos(name, num_mixtures=4, shortlist_size=shortlist_size).double().mos_head
    hidden, targets = torch.randn(9, 32, dtype=torch.float64), torch.randint(0, VOCAB_SIZE, (9,))
    with torch.no_grad():
        prior_logits, logits = head.components(hidden)
        log_prior, whole = prior_logits.log_softmax(-1), logits.log_softmax(-1)
    p = whole.exp()
    joint = log_prior + whole[torch.arange(9), :, targets]
    middle = (p.unsqueeze(1) + p.unsqueeze(2)) / 2
    entropies = -(p * whole).sum(-1)
    of_middle = -(middle * middle.log()).sum(-1)
    expected = of_middle - (entropies.unsqueeze(1) + entropies.unsqueeze(2)) / 2

    decoder = torch.nn.Sequential(head) if wrapped else head
    ((_, predictions),) = predict_in_chunks(head, hidden, decoder)
    same = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    same(predictions.log_weights, log_prior)
    same(predictions.component_entropies(), entropies)
    same(predictions.log_probs(), (log_prior.unsqueeze(-1) + whole).logsumexp(1))
    same(predictions.component_nll(targets), -whole[torch.arange(9), :, targets])
    same(predictions.divergence(), expected)
    same(predictions.top(7)[0], whole.topk(7).values)
    assert torch.equal(predictions.top(7)[1], whole.topk(7).indices)
    statistics = mixture_statistics(head, hidden, targets)
    same(statistics.mean_weights, log_prior.exp().mean(0))
    assert statistics.entropy == pytest.approx(-(log_prior.exp() * log_prior).sum(-1).mean().item(), rel=1e-12)
    same(statistics.responsibilities, joint.softmax(-1).mean(0))
    same(statistics.divergence, expected.mean(0).clamp(min=0))


@pytest.mark.parametrize("options", [{"num_mixtures": 16}, {"num_mixtures": 4, "shortlist_size": None}], ids=str)
def test_a_log_costs_little_beside_a_step(options: dict[str, Any], tmp_path: Path) -> None:
    """At most 2 % of the multiplications of a step, and on a shortlist no tensor of V for each component."""
    V = 4096
    model = MoSForCausalLM.from_causal_lm(tiny_causal_lm("llama", vocab_size=V), **options)
    logs, largest = FlopCounterMode(display=False), LargestTensor()

    class Counted(MixtureUsage):
        def on_log(self, *args: Any, **kwargs: Any) -> None:
            with logs, largest:
                super().on_log(*args, **kwargs)

    run = trainer(tmp_path, model, [], max_steps=1, save_strategy="no")
    run.train_dataset = [{"input_ids": row, "labels": row} for row in random_tokens(256, 4)]
    Counted().add_to(run)
    with FlopCounterMode(display=False) as both:
        run.train()
    assert run.state.log_history[0]["mixture_divergence"] >= 0
    assert logs.get_total_flops() < 0.02 * (both.get_total_flops() - logs.get_total_flops())
    if "shortlist_size" not in options:
        assert largest.numel <= 32 * V  # the logits of 32 tokens, and the decoder of width 32
