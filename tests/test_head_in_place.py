"""Checks that the head can be named, assigned, hooked, wrapped and replaced as the softmax model's can.

Each way is done to the softmax model and to the mixture made of it, which must then still agree: a fresh mixture
predicts what the softmax predicts.
"""

import copy
import functools
import inspect
import logging
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import compile_regions
from accelerate.utils.other import has_compiled_regions
from cases import cases
from helpers import BACKBONES, HEADS, VOCAB_SIZE, greedy, log_prob_gap, random_tokens, tiny_causal_lm, tiny_mos
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_mos import MoSForCausalLM, MoSLMHead

NAMES = [*BACKBONES, "bert", "cohere", "gpt_neox"]
TOKENS = random_tokens() % 32
CLOSE: dict[str, float] = {"atol": 2e-5, "rtol": 1e-4}


def both(name: str, **options: Any) -> tuple[PreTrainedModel, MoSForCausalLM]:
    softmax = tiny_causal_lm(name)
    return softmax, MoSForCausalLM.from_causal_lm(copy.deepcopy(softmax), num_mixtures=3, **options)


def head_path(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    return next(path for path, module in model.named_modules() if module is head)


def replace_head(model: PreTrainedModel, new: Callable[[nn.Module], Any]) -> None:
    """`model.lm_head = new(model.lm_head)`, by the name that the head has in this model."""
    owner, _, name = head_path(model).rpartition(".")
    holder = model.get_submodule(owner)
    setattr(holder, name, new(getattr(holder, name)))


def drawn(*shape: int) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(7))


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", NAMES)
def test_names_are_the_softmaxs_and_two_new_ones(name: str) -> None:
    softmax, model = both(name)
    head = head_path(softmax)
    assert head_path(model) == head
    new = {f"{head}.prior.weight", f"{head}.shift.weight"}
    assert set(dict(model.named_parameters())) == set(dict(softmax.named_parameters())) | new
    assert model.state_dict().keys() == softmax.state_dict().keys() | new
    assert set(dict(model.named_buffers())) == set(dict(softmax.named_buffers()))
    ours, theirs = dict(model.named_modules()), dict(softmax.named_modules())
    assert ours.keys() == theirs.keys() | {f"{head}.prior", f"{head}.shift"}
    assert all(type(ours[path]) is type(module) for path, module in theirs.items() if path not in ("", head))
    assert isinstance(ours[head], nn.Linear)
    assert ours[head] is model.mos_head


@pytest.mark.parametrize("name", NAMES)
def test_linear_layers_by_their_last_names(name: str) -> None:
    """As adapters and quantizers search them."""
    last_names = [
        {path.split(".")[-1] for path, module in model.named_modules() if isinstance(module, nn.Linear)}
        for model in both(name)
    ]
    assert last_names[1] == last_names[0] | {"prior", "shift"}


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_freezing_by_name(head: dict[str, Any]) -> None:
    _, model = both("llama", **head)
    for path, weight in model.named_parameters():
        weight.requires_grad_(not path.startswith("model.layers.0."))
    before = {path: weight.clone() for path, weight in model.named_parameters()}
    optimizer = torch.optim.AdamW((w for w in model.parameters() if w.requires_grad), lr=1e-2)
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    same = {path for path, weight in model.named_parameters() if torch.equal(before[path], weight)}
    assert same == {path for path in before if path.startswith("model.layers.0.")}
    assert len(same) == 9


def test_rates_by_layer() -> None:
    _, model = both("llama")
    rates = {"model.layers.0.": 0.01, "model.layers.1.": 0.1, "lm_head.": 1.0}
    groups = [
        {"params": [weight for path, weight in model.named_parameters() if path.startswith(prefix)], "lr": rate}
        for prefix, rate in rates.items()
    ]
    before = {path: weight.clone() for path, weight in model.named_parameters()}
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    torch.optim.AdamW(groups, weight_decay=0.0).step()
    for prefix, rate in rates.items():
        steps = [(w - before[path]).abs().max() for path, w in model.named_parameters() if path.startswith(prefix)]
        assert max(steps).item() == pytest.approx(rate, rel=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_of_the_softmax_goes_in_and_out(name: str) -> None:
    head = head_path(tiny_causal_lm(name))
    new = {f"{head}.prior.weight", f"{head}.shift.weight"}
    source, target = tiny_causal_lm(name, seed=1), tiny_causal_lm(name)
    _, model = both(name)
    missing, unexpected = model.load_state_dict(source.state_dict(), strict=False)
    assert (set(missing), set(unexpected)) == (new, set())
    assert log_prob_gap(model, source, input_ids=TOKENS) < 1e-4
    missing, unexpected = target.load_state_dict(model.state_dict(), strict=False)
    assert (set(missing), set(unexpected)) == (set(), new)
    assert log_prob_gap(target, source, input_ids=TOKENS) == 0


# --------------------------------------------------------------------------------- assigned, hooked, wrapped, replaced


class CastOutputToFloat(nn.Sequential):
    """As notebooks for training in 8 bits write it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class Adapter(nn.Module):
    """As an adapter's layer: the head, and a correction of low rank."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down, self.up = nn.Linear(32, 2, bias=False), nn.Linear(2, VOCAB_SIZE, bias=False)
        self.down.weight.data, self.up.weight.data = drawn(2, 32), drawn(VOCAB_SIZE, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


class Doubled(nn.Module):
    """A parametrization of a weight."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def new_linear(head: nn.Linear) -> nn.Linear:
    new = nn.Linear(32, VOCAB_SIZE, bias=head.bias is not None)
    new.weight.data = drawn(VOCAB_SIZE, 32)
    if new.bias is not None:
        new.bias.data = drawn(VOCAB_SIZE)
    return new


def halve_by_subclass(model: PreTrainedModel) -> None:
    head: Any = model.get_output_embeddings()
    given = type(head)

    class Half(given):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * super().forward(x)

    head.__class__ = Half


def with_weight_drawn(model: PreTrainedModel) -> nn.Module:
    """The head with a weight that has no row of zeros, as the embedding of padding is."""
    model.get_output_embeddings().weight.data = drawn(VOCAB_SIZE, 32)
    return model.get_output_embeddings()


def assign_forward(model: PreTrainedModel, forward: Callable[[Any, Any], Any]) -> None:
    head: Any = model.get_output_embeddings()
    head.forward = forward(head.forward, head)


def set_weight(model: PreTrainedModel, name: str, value: Any) -> None:
    setattr(model.get_output_embeddings(), name, value)


def on_head(method: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[[PreTrainedModel], Any]:
    return lambda model: method(model.get_output_embeddings(), *arguments, **options)


# The ways that leave the head's logits as they are with a constant added to a token's logits, as one softmax does.
WAYS: dict[str, Callable[[PreTrainedModel], Any]] = {
    "weight": lambda model: set_weight(model, "weight", nn.Parameter(drawn(VOCAB_SIZE, 32))),
    "weight.data": lambda model: setattr(model.get_output_embeddings().weight, "data", drawn(VOCAB_SIZE, 32)),
    "bias": lambda model: set_weight(model, "bias", nn.Parameter(drawn(VOCAB_SIZE))),
    "frozen": lambda model: model.get_output_embeddings().requires_grad_(False),
    "set_output_embeddings": lambda model: model.set_output_embeddings(new_linear(model.get_output_embeddings())),
    "new nn.Linear": lambda model: replace_head(model, new_linear),
    "nn.Sequential": lambda model: replace_head(model, nn.Sequential),
    "two nn.Sequential": lambda model: replace_head(model, lambda head: nn.Sequential(nn.Sequential(head))),
    "CastOutputToFloat": lambda model: replace_head(model, CastOutputToFloat),
    "adapter": lambda model: replace_head(model, Adapter),
    "torch.compile": lambda model: replace_head(model, lambda head: torch.compile(head, backend="eager")),
    "subclass": halve_by_subclass,
    "forward": lambda model: assign_forward(model, lambda old, head: lambda x: 0.5 * old(x)),
    "another forward": lambda model: assign_forward(
        model, lambda old, head: lambda x: F.linear(x, 0.5 * head.weight, head.bias)
    ),
    "hook": on_head(nn.Module.register_forward_hook, lambda module, args, output: 0.5 * output),
    "hook with kwargs": on_head(
        nn.Module.register_forward_hook, lambda module, args, kwargs, output: 0.5 * output, with_kwargs=True
    ),
    "hook that reads": on_head(nn.Module.register_forward_hook, lambda module, args, output: None),
    "pre-hook": on_head(nn.Module.register_forward_pre_hook, lambda module, args: (0.5 * args[0],)),
    "pre-hook with kwargs": on_head(
        nn.Module.register_forward_pre_hook,
        lambda module, args, kwargs: ((0.5 * args[0],), kwargs),
        with_kwargs=True,
    ),
    "accelerate's hook": on_head(add_hook_to_module, ModelHook()),
    "pruning": on_head(prune.l1_unstructured, "weight", 0.3),
    "parametrization": on_head(parametrize.register_parametrization, "weight", Doubled()),
    "weight norm": lambda model: parametrizations.weight_norm(with_weight_drawn(model)),
    "autocast to float of the model": lambda model: model.float(),
}
# The softmax model's softcap acts on what the hook, the wrapper or the forward returns; the mixture's inside.
BEHIND_SOFTCAP = {"another forward", "subclass", "forward", "hook", "hook with kwargs"}


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's compiler on itself
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # the same
@pytest.mark.parametrize(
    ("way", "name", "head"),
    cases(
        WAYS,
        ["llama", "gpt2", "gemma2", "cohere", "bert"],
        HEADS,
        # Both heads; a head inside another module, with a bias; a softcap.
        quick=[
            (way, name, head)
            for way in WAYS
            for name, head in [*(("llama", head) for head in HEADS), ("bert", HEADS[1]), ("gemma2", HEADS[1])]
        ],
    ),
)
def test_does_what_the_softmax_model_does(way: str, name: str, head: dict[str, Any]) -> None:
    if name == "bert" and way == "adapter":
        pytest.skip("refused, as the test below checks")
    if name == "cohere" and way == "bias":
        pytest.skip("the softmax scales the bias too, the mixture the hidden states")
    if name == "gemma2" and way in BEHIND_SOFTCAP:
        pytest.skip("the softmax's softcap acts after it, the mixture's before")
    softmax, model = both(name, **head)
    for candidate in (softmax, model):
        WAYS[way](candidate)
    assert log_prob_gap(model, softmax, input_ids=TOKENS) < 1e-4
    labels = TOKENS.clone()
    labels[0, :3] = -100
    with torch.no_grad():
        losses = [candidate(TOKENS, labels=labels).loss for candidate in (softmax, model)]
    torch.testing.assert_close(losses[1], losses[0], **CLOSE)
    assert torch.equal(greedy(model, TOKENS), greedy(softmax, TOKENS))
    gradients = []
    for candidate in (softmax, model):
        loss = candidate.train()(TOKENS, labels=labels, num_items_in_batch=7).loss
        loss.backward()
        gradients.append({path: weight.grad for path, weight in candidate.named_parameters()})
        losses.append(loss.detach())
    torch.testing.assert_close(losses[3], losses[2], **CLOSE)
    for path, expected in gradients[0].items():
        if expected is None:
            assert gradients[1][path] is None, path
        else:
            torch.testing.assert_close(gradients[1][path], expected, msg=lambda m, p=path: f"{p}: {m}", **CLOSE)


def test_an_adapter_on_a_head_inside_another_module_is_refused() -> None:
    _, model = both("bert")
    replace_head(model, Adapter)
    with pytest.raises(ValueError, match=r"cls\.predictions\.decoder: expected no adapter on a head inside another"):
        model(TOKENS)


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "mamba"])  # which reads the weight of its head
def test_an_identity_returns_the_hidden_states(name: str, head: dict[str, Any]) -> None:
    softmax, model = both(name, **head)
    for candidate in (softmax, model):
        replace_head(candidate, lambda head: nn.Identity())
    with torch.no_grad():
        expected, given = (candidate(TOKENS).logits for candidate in (softmax, model))
    torch.testing.assert_close(given, expected, **CLOSE)
    assert model.mos_head is None


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bert"])
@pytest.mark.parametrize("wrapper", [nn.Sequential, CastOutputToFloat], ids=lambda wrapper: wrapper.__name__)
def test_a_trained_mixture_in_a_wrapper_stays_the_mixture(wrapper: Any, name: str, head: dict[str, Any]) -> None:
    model = tiny_mos(name, **head)
    wrapped = copy.deepcopy(model)
    replace_head(wrapped, wrapper)
    assert isinstance(wrapped.mos_head, MoSLMHead)
    assert log_prob_gap(wrapped, model, input_ids=TOKENS) < 1e-5
    assert torch.equal(greedy(wrapped, TOKENS), greedy(model, TOKENS))
    for training in (False, True):
        losses = [candidate.train(training)(TOKENS, labels=TOKENS).loss for candidate in (model, wrapped)]
        torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    expected = {id_of(path): weight.grad for path, weight in model.named_parameters()}
    for path, weight in wrapped.named_parameters():
        torch.testing.assert_close(weight.grad, expected[id_of(path)], atol=1e-5, rtol=1e-4)


class OfPosition(nn.Sequential):
    """Reads the sequences: adds to the logits of the positions after the first one, or keeps the last."""

    keeps_last = False

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x[:, -1:] if self.keeps_last else x)
        positions = torch.arange(x.shape[1]).view(1, -1, *[1] * (x.dim() - 2))
        return logits if self.keeps_last else logits + positions * drawn(VOCAB_SIZE)


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_wrapper_sees_sequences(name: str, head: dict[str, Any]) -> None:
    """As adapters of some positions, or of some rows of the batch, do."""
    softmax = tiny_causal_lm(name)
    model = MoSForCausalLM.from_causal_lm(copy.deepcopy(softmax), **head)
    for candidate in (softmax, model):
        replace_head(candidate, OfPosition)
    with torch.no_grad():
        expected, given = (candidate(TOKENS).logits.log_softmax(-1) for candidate in (softmax, model))
        torch.testing.assert_close(given, expected, **CLOSE)
        model.get_output_embeddings().keeps_last = True
        with pytest.raises(ValueError, match="decoder: expected the logits of"):
            model(TOKENS)


class Masked(nn.Sequential):
    """Classes that are never predicted."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).masked_fill(torch.arange(VOCAB_SIZE) >= VOCAB_SIZE - 5, -torch.inf)


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_masked_classes_train(head: dict[str, Any]) -> None:
    softmax = tiny_causal_lm("llama")
    model = MoSForCausalLM.from_causal_lm(copy.deepcopy(softmax), **head)
    for candidate in (softmax, model):
        replace_head(candidate, Masked)
        candidate.train()(TOKENS.clamp(max=VOCAB_SIZE - 6), labels=TOKENS.clamp(max=VOCAB_SIZE - 6)).loss.backward()
    given = dict(model.named_parameters())
    for path, weight in softmax.named_parameters():
        torch.testing.assert_close(given[path].grad, weight.grad, atol=1e-5, rtol=1e-4)
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


def id_of(path: str) -> str:
    return (
        path.replace(".0.prior", ".prior")
        .replace(".0.shift", ".shift")
        .replace("lm_head.0.", "lm_head.")
        .replace("decoder.0.", "decoder.")
    )


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_what_hooks_see(name: str, head: dict[str, Any]) -> None:
    model = tiny_mos(name, **head)
    seen: dict[str, Any] = {}

    def hook(key: str) -> Callable[..., None]:
        return lambda module, args, output: seen.update({key: (tuple(args[0].shape), tuple(output.shape))})

    mos_head: Any = model.mos_head
    for key, layer in (("head", mos_head), ("prior", mos_head.prior), ("shift", mos_head.shift)):
        layer.register_forward_hook(hook(key))
    for training, labels in ((False, None), (False, TOKENS), (True, TOKENS), (True, None)):
        seen.clear()
        inputs = {} if labels is None else {"labels": labels}
        model.train(training)(TOKENS, **inputs)
        assert seen == {
            "head": ((2, 12, 32), (2, 12, VOCAB_SIZE)),
            "prior": ((2, 12, 32), (2, 12, 3)),
            "shift": ((2, 12, 32), (2, 12, 96)),
        }


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_hooks_of_one_sample_on_the_new_layers(name: str, head: dict[str, Any]) -> None:
    """As tools that need each sample's gradient, such as private training, read inputs and gradients of outputs."""
    model = tiny_mos(name, **head).train()
    inputs: dict[str, Tensor] = {}
    samples: dict[str, Tensor] = {}
    mos_head: Any = model.mos_head
    for key in ("prior", "shift"):
        layer = getattr(mos_head, key)
        layer.register_forward_hook(lambda module, args, output, key=key: inputs.update({key: args[0].detach()}))
        layer.register_full_backward_hook(
            lambda module, d_inputs, d_outputs, key=key: samples.update(
                {key: torch.einsum("bti,bto->boi", inputs[key].float(), d_outputs[0].float())}
            )
        )
    model(TOKENS, labels=TOKENS, num_items_in_batch=1).loss.backward()
    for key in ("prior", "shift"):
        assert samples[key].shape[0] == 2
        torch.testing.assert_close(samples[key].sum(0), getattr(mos_head, key).weight.grad, atol=1e-3, rtol=1e-3)


# -------------------------------------------------------------------------------------- saved, tied, resized, compiled


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "gpt_neox"])
@pytest.mark.parametrize("way", ["weight", "weight.data"])
def test_an_assigned_weight_is_saved(way: str, name: str, head: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_mos(name, **head)
    if model.config.tie_word_embeddings:
        model = MoSForCausalLM.from_causal_lm(tiny_causal_lm(name), num_mixtures=3, tie_word_embeddings=False, **head)
    before = log_prob_gap(model, copy.deepcopy(model), input_ids=TOKENS)
    other = copy.deepcopy(model)
    WAYS[way](model)
    assert before == 0
    assert log_prob_gap(model, other, input_ids=TOKENS) > 0.1
    assert dict(model.named_parameters()).keys() == dict(other.named_parameters()).keys()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.get_output_embeddings().weight, drawn(VOCAB_SIZE, 32))
    assert log_prob_gap(model, loaded, input_ids=TOKENS) == 0


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gemma2", "bert"])
def test_a_tied_weight_is_one_parameter(name: str, tmp_path: Path) -> None:
    softmax, model = both(name)
    for candidate in (softmax, model):
        candidate.set_input_embeddings(copy.deepcopy(candidate.get_input_embeddings()))
        candidate.get_input_embeddings().weight.data = drawn(VOCAB_SIZE, 32)
        assert candidate.get_output_embeddings().weight is not candidate.get_input_embeddings().weight
        candidate.tie_weights()
        assert candidate.get_output_embeddings().weight is candidate.get_input_embeddings().weight
    assert log_prob_gap(model, softmax, input_ids=TOKENS) < 1e-4
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert log_prob_gap(model, loaded, input_ids=TOKENS) == 0


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_resizing(name: str, head: dict[str, Any], tmp_path: Path) -> None:
    softmax, model = both(name, **head)
    head_class = type(model.get_output_embeddings())
    tokens = TOKENS % 30
    for size in (VOCAB_SIZE + 6, 60):
        for candidate in (softmax, model):
            torch.manual_seed(0)
            candidate.resize_token_embeddings(size, mean_resizing=False)
        assert type(model.mos_head) is type(model.get_output_embeddings()) is head_class
        assert log_prob_gap(model, softmax, input_ids=tokens) < 1e-4
        losses = [candidate(tokens, labels=tokens).loss for candidate in (softmax, model)]
        torch.testing.assert_close(losses[1], losses[0], **CLOSE)
        model.save_pretrained(tmp_path)
        assert log_prob_gap(AutoModelForCausalLM.from_pretrained(tmp_path), model, input_ids=tokens) == 0


@pytest.mark.parametrize("frozen", [(), ("weight",), ("prior.weight", "shift.weight"), ("weight", "shift.weight")])
@pytest.mark.parametrize("tied", [False, True])
def test_resizing_keeps_what_is_frozen(tied: bool, frozen: tuple[str, ...]) -> None:
    """transformers gives all weights of a resized head the flag of one, and would train what was frozen."""
    model = MoSForCausalLM.from_causal_lm(tiny_causal_lm("llama", tie_word_embeddings=tied))
    for name in frozen:
        model.lm_head.get_parameter(name).requires_grad_(False)
    before = {name: weight.requires_grad for name, weight in model.named_parameters()}
    for size in (VOCAB_SIZE + 6, 60):
        model.resize_token_embeddings(size, mean_resizing=False)
        assert {name: weight.requires_grad for name, weight in model.named_parameters()} == before


@pytest.mark.parametrize(
    "way", ["weight norm", "spectral norm of the shift", "pruned", "bias", "sequence", "compiled"]
)
def test_a_head_whose_weights_cannot_be_loaded_is_not_saved(way: str, tmp_path: Path) -> None:
    """The softmax model writes such a head, and from_pretrained then draws another one."""
    changes: dict[str, Callable[[Any], Any]] = {
        "weight norm": lambda model: parametrizations.weight_norm(model.lm_head),
        "spectral norm of the shift": lambda model: parametrizations.spectral_norm(model.lm_head.shift),
        "pruned": lambda model: prune.l1_unstructured(model.lm_head, "weight", 0.5),
        "bias": lambda model: setattr(model.lm_head, "bias", nn.Parameter(torch.ones(VOCAB_SIZE))),
        "sequence": lambda model: setattr(model, "lm_head", nn.Sequential(model.lm_head)),
        "compiled": lambda model: setattr(model, "lm_head", torch.compile(model.lm_head, backend="eager")),
    }
    model = tiny_mos()
    changes[way](model)
    with pytest.raises(ValueError, match=r"lm_head: expected the weights \['prior.weight', .*, given \["):
        model.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_a_head_that_is_taken_away_is_the_softmax_models_error() -> None:
    for take in (lambda model: setattr(model, "lm_head", None), lambda model: delattr(model, "lm_head")):
        errors = []
        for model in (tiny_causal_lm(), tiny_mos()):
            take(model)
            with pytest.raises((TypeError, AttributeError)) as error:
                model(TOKENS)
            errors.append(error.type)
        assert errors[0] is errors[1]


@pytest.mark.parametrize("way", ["set_output_embeddings", "new nn.Linear"])
def test_a_head_that_is_replaced_by_a_softmax_is_named(way: str, caplog: pytest.LogCaptureFixture) -> None:
    """Tools that swap each `nn.Linear`, for a quantized one or one in fp8, would drop the mixture in silence."""
    model = tiny_mos("llama")
    model(TOKENS)
    assert not caplog.records
    WAYS[way](model)
    logging.getLogger("hf_mos.remote_code.modeling_mos").warning_once.cache_clear()
    for _ in range(2):
        model(TOKENS)
    assert [record.getMessage() for record in caplog.records] == [
        f"lm_head: expected a MoSLMHead, given {model.lm_head}: this is one softmax"
    ]


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's compiler on itself
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # the same
@pytest.mark.parametrize(("name", "head"), cases(["llama", "gpt2"], HEADS, quick=[("llama", HEADS[1])]))
def test_regions_are_compiled(name: str, head: dict[str, Any]) -> None:
    torch.compiler.reset()
    model = tiny_mos(name, **head)
    compiled = compile_regions(model, backend="aot_eager")
    assert has_compiled_regions(compiled)
    assert not has_compiled_regions(model)
    assert log_prob_gap(compiled, model, input_ids=TOKENS) < 1e-5
    losses = [candidate.train()(TOKENS, labels=TOKENS).loss for candidate in (model, compiled)]
    torch.testing.assert_close(losses[1], losses[0])


# --------------------------------------------------------------------------------------------- the model's own forward


class Called:
    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward, self.calls = forward, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.forward(*args, **kwargs)


FORWARDS: dict[str, Callable[[Any], Any]] = {
    "functools.partial": lambda model: functools.partial(model.forward, output_hidden_states=True),
    "partial of the class": lambda model: functools.partial(type(model).forward, model),
    "lambda": lambda model: lambda *args, forward=model.forward, **kwargs: forward(*args, **kwargs),
    "callable object": lambda model: Called(model.forward),
    "method": lambda model: model.forward,
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
@pytest.mark.parametrize("how", FORWARDS)
def test_a_forward_of_an_instance(how: str, name: str) -> None:
    model = tiny_mos(name)
    plain = copy.deepcopy(model)
    given = FORWARDS[how](model)
    model.forward = given
    assert model.forward is given or how == "method"
    with torch.no_grad():
        outputs = model(TOKENS, labels=TOKENS)
        expected = plain(TOKENS, labels=TOKENS)
    assert torch.equal(outputs.loss, expected.loss)
    assert torch.equal(outputs.logits, expected.logits)
    assert (outputs.hidden_states is not None) == (how == "functools.partial")
    if isinstance(given, Called):
        assert given.calls == 1
    assert torch.equal(greedy(model, TOKENS), greedy(plain, TOKENS))
    assert model.train()(TOKENS, labels=TOKENS).loss == plain.train()(TOKENS, labels=TOKENS).loss
    del model.forward
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)


def test_a_loss_function_gets_what_the_softmax_model_gives_it() -> None:
    def own(logits: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
        return logits.float().log_softmax(-1)[..., 0].mean() + labels.float().mean() / vocab_size

    softmax, model = both("llama")
    for candidate in (softmax, model):
        candidate.loss_function = own
    arguments = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "labels": TOKENS}
    torch.testing.assert_close(model(**arguments).loss, softmax(**arguments).loss)


def test_a_forward_of_liger_is_refused() -> None:
    def forward(self: Any, *args: Any, **kwargs: Any) -> None: ...

    forward.__module__ = "liger_kernel.transformers.model.llama"
    _, model = both("llama")
    with pytest.raises(ValueError, match="fused_linear_cross_entropy"):
        model.forward = types.MethodType(forward, model)
