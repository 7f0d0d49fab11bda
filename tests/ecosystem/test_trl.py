"""Checks TRL's unmodified trainers on a mixture: they use the mixture's own loss and log-probabilities."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from helpers import HEADS, VOCAB_SIZE, logged_losses, random_tokens, run_python, tiny_causal_lm, tiny_mos
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from hf_mos import MoSForCausalLM

pytestmark = pytest.mark.filterwarnings("default")  # TRL warns of its own changes to come

ROWS = 8  # of a dataset
HEAD = {"lm_head.prior.weight", "lm_head.shift.weight", "lm_head.weight"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCAB_SIZE)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w0"
    )


def text(seed: int, length: int) -> str:
    return " ".join(f"w{token}" for token in random_tokens(1, length, seed)[0].tolist())


def texts() -> Dataset:
    return Dataset.from_list([{"text": text(seed, 6 + seed % 5)} for seed in range(ROWS)])


def completions() -> Dataset:
    return Dataset.from_list([{"prompt": text(s, 4), "completion": " " + text(s + 100, 5)} for s in range(ROWS)])


def preferences() -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": text(s, 4), "chosen": " " + text(s + 100, 5), "rejected": " " + text(s + 200, 3 + s % 4)}
            for s in range(ROWS)
        ]
    )


def arguments(kind: Any, folder: Path, **options: Any) -> Any:
    return kind(
        output_dir=str(folder),
        **{
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "max_steps": 1,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "lr_scheduler_type": "constant",
            "learning_rate": 1e-3,
            "dataloader_pin_memory": False,
            "gradient_checkpointing": False,
            **options,
        },
    )


def first_log(trainer: Any) -> dict[str, float]:
    return next(entry for entry in trainer.state.log_history if "loss" in entry)


def changed(model: PreTrainedModel, before: dict[str, Tensor]) -> set[str]:
    return {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}


def snapshot(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def sft(model: Any, tokenizer: Any, folder: Path, data: Dataset | None = None, **options: Any) -> SFTTrainer:
    parts = {name: options.pop(name) for name in ("peft_config", "compute_metrics") if name in options}
    data = texts() if data is None else data
    return SFTTrainer(
        model=model,
        args=arguments(SFTConfig, folder, **options),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        **parts,
    )


def batch_of(trainer: SFTTrainer) -> dict[str, Tensor]:
    return trainer.data_collator(list(trainer.train_dataset))


@torch.no_grad()
def own_metrics(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, float]:
    """Loss, entropy and accuracy from the mixture's log-probabilities."""
    batch = dict(batch)
    targets = batch.pop("labels")[:, 1:]
    log_probs = model(**batch).logits[:, :-1]
    counts = targets != -100
    log_probs, targets = log_probs[counts], targets[counts]
    return {
        "loss": float(F.nll_loss(log_probs, targets)),
        "entropy": float(-(log_probs.exp() * log_probs).sum(-1).mean()),
        "mean_token_accuracy": float((log_probs.argmax(-1) == targets).float().mean()),
    }


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gemma2", "mamba"])
def test_sft_trains_the_mixture(name: str, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_mos(name)
    before = snapshot(model)
    trainer = sft(model, tokenizer, tmp_path, max_steps=12, learning_rate=1e-2)
    expected = own_metrics(model, batch_of(trainer))
    evaluated = trainer.evaluate()
    trainer.train()
    log = first_log(trainer)
    for key, value in expected.items():
        assert log[key] == pytest.approx(value, abs=1e-4), key
        assert evaluated[f"eval_{key}"] == pytest.approx(value, abs=1e-4), key
    assert logged_losses(trainer)[-1] < 0.8 * logged_losses(trainer)[0]
    missing = (HEAD & before.keys()) - changed(model, before)
    assert not missing


def test_sft_has_the_gradients_of_the_models_own_loss(tokenizer: Any, tmp_path: Path) -> None:
    for head in HEADS:
        model = tiny_mos(**head).train()
        trainer = sft(model, tokenizer, tmp_path)
        batch = batch_of(trainer)
        parameters = list(model.parameters())
        expected = torch.autograd.grad(model(**batch).loss, parameters)
        gradients = torch.autograd.grad(trainer.compute_loss(model, dict(batch)), parameters)
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"bf16": True},
        {"label_smoothing_factor": 0.1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_sft_with(options: dict, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_mos()
    before = snapshot(model)
    trainer = sft(model, tokenizer, tmp_path, **options)
    batch = batch_of(trainer)
    expected = own_metrics(model, batch)["loss"]
    if "label_smoothing_factor" in options:
        with torch.no_grad():
            log_probs = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[:, :-1]
        expected = 0.9 * expected - 0.1 * float(log_probs[batch["labels"][:, 1:] != -100].mean())
    trainer.train()
    assert logged_losses(trainer)[0] == pytest.approx(expected, abs=0.05 if "bf16" in options else 1e-4)
    assert changed(model, before) >= HEAD


def test_sft_on_completions_alone(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_mos()
    trainer = sft(model, tokenizer, tmp_path, completions())
    batch = batch_of(trainer)
    assert (batch["labels"] == -100).any()
    expected = own_metrics(model, batch)["loss"]
    trainer.train()
    assert logged_losses(trainer)[0] == pytest.approx(expected, abs=1e-4)


def test_sft_with_the_dft_loss(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_mos()
    trainer = sft(model, tokenizer, tmp_path, loss_type="dft")
    batch = batch_of(trainer)
    targets = batch["labels"][:, 1:]
    with torch.no_grad():
        log_probs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    log_probs = log_probs[targets != -100].gather(-1, targets[targets != -100].unsqueeze(-1))
    trainer.train()
    assert logged_losses(trainer)[0] == pytest.approx(float(-(log_probs.exp() * log_probs).mean()), abs=1e-4)


def test_sft_joins_the_router_loss_of_a_mixture_of_experts(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_mos("mixtral")
    model.config.output_router_logits = True
    trainer = sft(model, tokenizer, tmp_path)
    batch = batch_of(trainer)
    with torch.no_grad():
        expected = float(model(**batch).loss)
    assert own_metrics(model, batch)["loss"] < expected - 1e-4
    trainer.train()
    assert logged_losses(trainer)[0] == pytest.approx(expected, abs=1e-4)
    assert "aux_loss" in first_log(trainer)


def test_metrics_get_the_mixtures_log_probabilities(tokenizer: Any, tmp_path: Path) -> None:
    def perplexity(prediction: Any) -> dict[str, float]:
        logits = torch.tensor(prediction.predictions)[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, torch.tensor(prediction.label_ids)[:, 1:].flatten())
        return {"perplexity": math.exp(loss)}

    trainer = sft(tiny_mos(), tokenizer, tmp_path, compute_metrics=perplexity)
    metrics = trainer.evaluate()
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]), rel=1e-4)


def test_sft_with_adapters(tokenizer: Any, tmp_path: Path) -> None:
    adapters = LoraConfig(target_modules=["q_proj", "shift"], modules_to_save=["lm_head.prior"], task_type="CAUSAL_LM")
    model = tiny_mos()
    trainer = sft(model, tokenizer, tmp_path, peft_config=adapters, max_steps=8, learning_rate=3e-2)
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    before = snapshot(trainer.model)
    expected = own_metrics(trainer.model, batch_of(trainer))["loss"]
    trainer.train()
    assert logged_losses(trainer)[0] == pytest.approx(expected, abs=1e-4)
    assert logged_losses(trainer)[-1] < logged_losses(trainer)[0]
    assert changed(trainer.model, before) == trained
    assert any("shift.lora_B" in name for name in trained)
    assert any("prior.modules_to_save" in name for name in trained)


@pytest.mark.parametrize("with_adapters", [False, True])
def test_one_learning_rate_is_enough(tokenizer: Any, tmp_path: Path, with_adapters: bool) -> None:
    """The losses are those of parameter groups in which the head learns `latent_scale` times as fast."""
    # Adam does not see the size of a gradient, but clipping by the norm would.
    options: dict[str, Any] = {"max_steps": 5, "learning_rate": 1e-2, "weight_decay": 0.0, "max_grad_norm": 0.0}
    if with_adapters:
        saved = ["lm_head.prior", "lm_head.shift"]
        options["peft_config"] = LoraConfig(target_modules=["q_proj"], modules_to_save=saved, task_type="CAUSAL_LM")
    found = []
    for scale in (10.0, 1.0):
        model = MoSForCausalLM.from_causal_lm(tiny_causal_lm(), num_mixtures=3, latent_scale=scale)
        with torch.no_grad():
            # Away from the start, where the gradient of the prior is zero and Adam follows its rounding.
            generator = torch.Generator().manual_seed(0)
            for layer in (model.lm_head.prior, model.lm_head.shift):
                layer.weight.copy_(0.1 / scale * torch.randn(layer.weight.shape, generator=generator))
        torch.manual_seed(0)
        trainer = sft(model, tokenizer, tmp_path, **options)
        if scale == 1:
            weights = [(name, weight) for name, weight in trainer.model.named_parameters() if weight.requires_grad]
            new = [weight for name, weight in weights if ".prior." in name or ".shift." in name]
            old = [weight for name, weight in weights if ".prior." not in name and ".shift." not in name]
            groups = [{"params": old}, {"params": new, "lr": 1e-1}]
            trainer.optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)
        trainer.train()
        found.append(logged_losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=2e-3)
    assert found[0][-1] < found[0][0]


def test_an_adapter_on_the_decoder_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    adapters = LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="Applying a PEFT adapter to `lm_head` is not supported"):
        sft(tiny_mos(), tokenizer, tmp_path, peft_config=adapters)


def test_an_unknown_fused_head_is_refused() -> None:
    model = tiny_mos()

    def forward(self: Any, fused_lm_head: bool = False) -> None: ...

    with pytest.raises(ValueError, match="expected the fused head of TRL"):
        model.forward = forward.__get__(model)


FROM_A_FOLDER = """
warnings.simplefilter("default")
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
arguments = SFTConfig(
    sys.argv[2], max_steps=1, use_cpu=True, bf16=False, report_to="none", trust_remote_code=True, disable_tqdm=True,
    gradient_checkpointing=False, save_strategy="no", logging_steps=1,
)
data = Dataset.from_list([{"text": "w3 w4 w5 w6 w7"}] * 4)
try:
    trainer = SFTTrainer(sys.argv[1], arguments, train_dataset=data)
except ValueError as error:
    sys.exit(print(error))
model = trainer.model
prior = model.lm_head.prior.weight.clone()
batch = trainer.data_collator(list(trainer.train_dataset))
expected = model.eval()(**batch).loss.item()
trainer.train()
assert abs(trainer.state.log_history[0]["loss"] - expected) < 1e-4
assert not prior.equal(model.lm_head.prior.weight)
print("trained")
"""


def test_sft_of_a_checkpoint_needs_hf_mos(tokenizer: Any, tmp_path: Path) -> None:
    """The code beside the weights does not have what TRL asks for, and says so before a step."""
    tiny_mos().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    folders = tmp_path / "model", tmp_path / "out"
    assert "trained" in run_python("import hf_mos" + FROM_A_FOLDER, *folders, cache=tmp_path, without_hf_mos=False)
    assert "forward: expected `import hf_mos`" in run_python(FROM_A_FOLDER, *folders, cache=tmp_path)


@torch.no_grad()
def sequence_log_probs(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Of each row's completion, the sum of its tokens' log-probabilities."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    log_probs = model(**inputs).logits[:, :-1].gather(-1, batch["input_ids"][:, 1:].unsqueeze(-1)).squeeze(-1)
    return (log_probs * batch["completion_mask"][:, 1:]).sum(-1)


def dpo(model: Any, tokenizer: Any, folder: Path, **options: Any) -> DPOTrainer:
    parts = {name: options.pop(name) for name in ("peft_config", "ref_model") if name in options}
    return DPOTrainer(
        model=model,
        args=arguments(DPOConfig, folder, beta=0.5, **options),
        train_dataset=preferences(),
        processing_class=tokenizer,
        **parts,
    )


def check_dpo(trainer: DPOTrainer, policy: Any, reference: Any) -> None:
    """The first step's loss, log-probabilities and rewards against sums of the mixture's log-probabilities."""
    batch = trainer.data_collator(list(trainer.train_dataset))
    chosen, rejected = sequence_log_probs(policy, batch).chunk(2)
    chosen_reference, rejected_reference = sequence_log_probs(reference, batch).chunk(2)
    chosen_rewards, rejected_rewards = 0.5 * (chosen - chosen_reference), 0.5 * (rejected - rejected_reference)
    expected = {
        "loss": float(-F.logsigmoid(chosen_rewards - rejected_rewards).mean()),
        "logps/chosen": float(chosen.mean()),
        "logps/rejected": float(rejected.mean()),
        "rewards/chosen": float(chosen_rewards.mean()),
        "rewards/rejected": float(rejected_rewards.mean()),
    }
    trainer.train()
    log = first_log(trainer)
    for key, value in expected.items():
        assert log[key] == pytest.approx(value, abs=2e-4), key


def test_dpo_with_a_reference(tokenizer: Any, tmp_path: Path) -> None:
    model, reference = tiny_mos(), tiny_mos(seed=1)
    before = snapshot(model)
    trainer = dpo(model, tokenizer, tmp_path, ref_model=reference, max_steps=8)
    check_dpo(trainer, model, reference)
    assert logged_losses(trainer)[-1] < 0.8 * logged_losses(trainer)[0]
    assert changed(model, before) >= HEAD


def test_dpo_takes_the_checkpoint_for_its_reference(tokenizer: Any, tmp_path: Path) -> None:
    tiny_mos().save_pretrained(tmp_path / "model")
    model = MoSForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.lm_head.shift.weight += 0.05 / model.lm_head.latent_scale * torch.randn(model.lm_head.shift.weight.shape)
    trainer = dpo(model, tokenizer, tmp_path / "out")
    assert isinstance(trainer.ref_model, MoSForCausalLM)
    check_dpo(trainer, model, MoSForCausalLM.from_pretrained(tmp_path / "model"))


@pytest.mark.parametrize("precomputed", [False, True])
def test_dpo_with_adapters_takes_the_model_without_them(precomputed: bool, tokenizer: Any, tmp_path: Path) -> None:
    adapters = LoraConfig(target_modules=["q_proj", "shift", "prior"], task_type="CAUSAL_LM")
    options = {"precompute_ref_log_probs": precomputed, "learning_rate": 3e-2, "max_steps": 4}
    trainer = dpo(tiny_mos(), tokenizer, tmp_path, peft_config=adapters, **options)
    assert trainer.ref_model is None
    before = snapshot(trainer.model)
    check_dpo(trainer, trainer.model, tiny_mos())
    assert logged_losses(trainer)[-1] < logged_losses(trainer)[0]
    assert any("prior.lora_B" in name for name in changed(trainer.model, before))


def test_kto(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{**row, "label": i % 2 == 0} for i, row in enumerate(completions())]
    model, reference = tiny_mos(), tiny_mos(seed=1)
    before = snapshot(model)
    trainer = KTOTrainer(
        model=model,
        ref_model=reference,
        args=arguments(KTOConfig, tmp_path),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    expected = sequence_log_probs(model, batch)[torch.tensor([row["label"] for row in trainer.train_dataset])].mean()
    trainer.train()
    assert first_log(trainer)["logps/chosen"] == pytest.approx(float(expected), abs=2e-4)
    assert changed(model, before) >= HEAD


@pytest.mark.parametrize(
    ("kind", "config", "options"),
    [
        (GRPOTrainer, GRPOConfig, {"temperature": 0.7, "entropy_coef": 0.1}),
        (RLOOTrainer, RLOOConfig, {"temperature": 0.9}),
    ],
    ids=["grpo", "rloo"],
)
def test_reinforcement(kind: Any, config: Any, options: dict, tokenizer: Any, tmp_path: Path) -> None:
    """The trainer's log-probabilities of what it has sampled are the mixture's at the temperature of the sampling."""
    seen = []

    class Spy(kind):
        def _get_per_token_logps_and_entropies(self, model: Any, *inputs: Any, **kw: Any) -> Any:
            result = super()._get_per_token_logps_and_entropies(model, *inputs, **kw)
            input_ids, mask, keep = inputs[:3]
            with torch.no_grad():
                logits = model(input_ids=input_ids, attention_mask=mask).logits[:, -keep - 1 : -1]
            log_probs = (logits / options["temperature"]).log_softmax(-1)
            expected = log_probs.gather(-1, input_ids[:, -keep:].unsqueeze(-1)).squeeze(-1)
            counts = mask[:, -keep:].bool()
            seen.append(float((result[0] - expected)[counts].abs().max()))
            return result

    tiny_mos().save_pretrained(tmp_path / "model")  # which the trainer loads again, for its reference
    model = MoSForCausalLM.from_pretrained(tmp_path / "model")
    before = snapshot(model)
    prompts = Dataset.from_list([{"prompt": text(seed, 4)} for seed in range(8)])
    trainer = Spy(
        model=model,
        reward_funcs=lambda completions, **kwargs: [float(len(set(text.split()))) for text in completions],
        args=arguments(config, tmp_path / "out", num_generations=4, max_completion_length=6, beta=0.1, **options),
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    trainer.train()
    assert seen
    assert max(seen) < 1e-4
    assert changed(model, before) >= HEAD


def test_a_head_that_trl_casts_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    """The forward that TRL gives the head is that of one softmax."""
    tiny_mos().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32: expected False"):
        GRPOTrainer(
            model=MoSForCausalLM.from_pretrained(tmp_path / "model"),
            reward_funcs=lambda completions, **kwargs: [0.0 for _ in completions],
            args=arguments(GRPOConfig, tmp_path / "out", num_generations=4, cast_lm_head_to_fp32=True),
            train_dataset=Dataset.from_list([{"prompt": text(seed, 4)} for seed in range(8)]),
            processing_class=tokenizer,
        )


def test_distillation_stops_instead_of_training_one_softmax(tokenizer: Any, tmp_path: Path) -> None:
    trainer = DistillationTrainer(
        model=tiny_mos(),
        teacher_model=tiny_causal_lm(seed=1),
        args=arguments(DistillationConfig, tmp_path),
        train_dataset=completions(),
        processing_class=tokenizer,
    )
    with pytest.raises(ValueError, match="model: expected one softmax with this trainer of TRL"):
        trainer.train()


def test_a_reward_model_has_the_layers_of_the_mixture(tokenizer: Any, tmp_path: Path) -> None:
    mixture = tiny_mos()
    mixture.save_pretrained(tmp_path / "model")
    trainer = RewardTrainer(
        model=str(tmp_path / "model"),
        args=arguments(RewardConfig, tmp_path),
        train_dataset=preferences(),
        processing_class=tokenizer,
    )
    assert type(trainer.model).__name__ == "LlamaForSequenceClassification"
    layers = dict(trainer.model.model.named_parameters())
    for name, weight in mixture.model.named_parameters():
        assert torch.equal(layers[name], weight), name
    trainer.train()
    assert math.isfinite(logged_losses(trainer)[0])


def test_a_peft_model_is_taken_as_it_is(tokenizer: Any, tmp_path: Path) -> None:
    adapters = LoraConfig(target_modules=["shift"], task_type="CAUSAL_LM")
    trainer = sft(get_peft_model(tiny_mos(), adapters), tokenizer, tmp_path)
    expected = own_metrics(trainer.model, batch_of(trainer))["loss"]
    trainer.train()
    assert logged_losses(trainer)[0] == pytest.approx(expected, abs=1e-4)
