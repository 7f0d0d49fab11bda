"""Checks that compiled and exported models give the results of the eager model."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import cases
from helpers import BACKBONES, HEADS, VOCAB_SIZE, greedy, random_tokens, tiny_mos
from torch import Tensor, nn

from hf_mos import MoSForCausalLM

pytestmark = [  # torch's compiler on itself, and on the backbones
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache.:UserWarning"),
    pytest.mark.filterwarnings("ignore:# The axis name. length will not be used:UserWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
]

WITH_DYNAMIC_LENGTH = [name for name in BACKBONES if name != "mamba"]  # its scan is unrolled when exported


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


class LogProbs(nn.Module):
    """The model as a function of tensors alone."""

    def __init__(self, model: MoSForCausalLM) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def inputs(batch: int = 2, length: int = 12) -> tuple[Tensor, Tensor]:
    tokens = random_tokens(batch, length)
    return tokens, torch.ones_like(tokens)


@pytest.mark.parametrize(
    ("name", "head"),
    cases(BACKBONES, HEADS, quick=[("llama", HEADS[0]), ("llama", HEADS[1]), ("gemma2", HEADS[1])]),
)
def test_compiled_logits(name: str, head: dict) -> None:
    model = tiny_mos(name, **head)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = random_tokens()
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(input_ids=tokens).logits, model(input_ids=tokens).logits, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize(
    ("name", "head"),
    cases(["llama-tied", "gpt2", "gemma2"], HEADS, quick=[("llama-tied", HEADS[0]), ("llama-tied", HEADS[1])]),
)
def test_compiled_training_step(name: str, head: dict) -> None:
    tokens = random_tokens()
    results = []
    for compile_it in (False, True):
        model = tiny_mos(name, **head).train()
        function = torch.compile(model, fullgraph=True, backend="aot_eager") if compile_it else model
        loss = function(input_ids=tokens, labels=tokens).loss
        loss.backward()
        results.append((loss.detach(), {key: weight.grad for key, weight in model.named_parameters()}))
    (eager_loss, eager), (compiled_loss, compiled) = results
    torch.testing.assert_close(compiled_loss, eager_loss)
    for key, gradient in eager.items():
        torch.testing.assert_close(compiled[key], gradient, atol=1e-5, rtol=1e-4, msg=key)


@torch.no_grad()
def test_compiled_after_calls_from_many_threads() -> None:
    """Which role the head plays is of each thread alone, and of no call that has ended."""
    model = tiny_mos().eval()
    tokens = random_tokens()
    expected = model(tokens).logits

    def serve(_: int) -> None:
        for _ in range(40):
            assert torch.equal(model(tokens).logits, expected)

    with ThreadPoolExecutor(4) as pool:
        [*pool.map(serve, range(4))]
        again = pool.submit(serve, 0)
        compiled = torch.compile(model, backend="eager")(tokens, use_cache=False).logits
        again.result()
    torch.testing.assert_close(compiled, expected)


@pytest.mark.slow
def test_compiled_with_inductor() -> None:
    model = tiny_mos()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (12, 9):
            tokens = random_tokens(2, length)
            torch.testing.assert_close(
                compiled(input_ids=tokens).logits, model(input_ids=tokens).logits, atol=1e-5, rtol=1e-5
            )


@pytest.mark.slow
def test_compiled_decoding_with_a_static_cache() -> None:
    model = tiny_mos("gemma2")
    tokens = random_tokens()
    expected = greedy(model, tokens)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(greedy(model, tokens, cache_implementation="static"), expected)


@pytest.mark.parametrize(
    ("name", "head"),
    cases(WITH_DYNAMIC_LENGTH, HEADS, quick=[("llama", HEADS[0]), ("gemma2", HEADS[1])]),
)
def test_exported_with_dynamic_shapes(name: str, head: dict) -> None:
    model = LogProbs(tiny_mos(name, **head))
    dynamic = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("length", min=4, max=96)}
    with torch.no_grad():
        program = torch.export.export(model, inputs(), dynamic_shapes=(dynamic, dynamic))
        for batch, length in ((2, 12), (3, 7), (5, 30)):
            example = inputs(batch, length)
            exported = program.module()(*example)
            assert exported.shape == (batch, length, VOCAB_SIZE)
            torch.testing.assert_close(exported, model(*example), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("name", ["llama-tied", "gemma2"])
def test_onnx(name: str, head: dict, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = LogProbs(tiny_mos(name, **head))
    dynamic = {0: "batch", 1: "length"}
    with torch.no_grad():
        torch.onnx.export(
            model,
            inputs(),
            tmp_path / "model.onnx",
            dynamo=True,
            dynamic_shapes=(dynamic, dynamic),
            input_names=["input_ids", "attention_mask"],
            verbose=False,
        )
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        for batch, length in ((2, 12), (3, 7)):
            tokens, mask = inputs(batch, length)
            (log_probs,) = session.run(None, {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()})
            torch.testing.assert_close(torch.from_numpy(log_probs), model(tokens, mask), atol=1e-4, rtol=1e-4)
