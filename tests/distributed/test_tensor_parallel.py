"""Checks a vocabulary sharded over two processes: same loss, gradients and generated text as one process."""

import ctypes
import gc
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from helpers import VOCAB_SIZE, LargestTensor, chunks_of, greedy
from processes import WORLD_SIZE, run_on_two
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from training_steps import assert_close_to, joint_batch, make_model
from transformers.distributed import DistributedConfig

from hf_mos import MoSForCausalLM, mos_cross_entropy, mos_log_probs
from hf_mos.remote_code import mos_head
from hf_mos.remote_code.mos_log_probs import infer_log_probs
from hf_mos.training.tensor_parallel import VocabularyShard

# GPT-2 has no plan of its own.
PLANS = {"gpt2": {"transformer.wte": "embedding_rowwise", "lm_head": "colwise_gather_output"}}
HEADS: list[dict[str, Any]] = [{}, {"shortlist_size": 6}]


class Messages(TorchDispatchMode):
    """Records the number of elements of each tensor that goes over the network."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = args[0] if isinstance(args[0], (tuple, list)) else args[:1]
            self.sizes += [tensor.numel() for tensor in tensors if isinstance(tensor, Tensor)]
        return func(*args, **(kwargs or {}))


# ------------------------------------------------------------------------------------------------------------ the loss

N, K, D = 11, 3, 8
CASES: dict[str, dict[str, Any]] = {
    "all classes": {},
    "a shortlist": {"shortlist_size": 3},
    "a shortlist of nearly all classes": {"shortlist_size": 15, "bias": True},
    "a shortlist and a softcap": {"shortlist_size": 4, "softcap": 2.0, "chunk_size": 2},
    "a bias": {"bias": True},
    "a softcap": {"softcap": 2.0, "bias": True},
    "chunks": {"chunk_size": 2},
    "each token": {"reduction": "none"},
    "the sum": {"reduction": "sum"},
    "all ignored": {"ignored": N},
    "a frozen decoder": {"frozen": True},
    "large logits": {"scale": 1e4},
    "half precision": {"dtype": torch.bfloat16, "tolerance": 0.05},
}


def random_inputs(
    num_classes: int,
    shortlist: bool = False,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    frozen: bool = False,
) -> list[Tensor]:
    """The same on all processes: prior logits, weight, bias, and the latents or their mean and offsets."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    latents = [draw(N, D), draw(N, K, D)] if shortlist else [draw(N, K, D)]
    prior, weight, bias = draw(N, K), scale * draw(num_classes, D).to(dtype), draw(num_classes).to(dtype)
    inputs = [prior, weight, bias, *(tensor.to(dtype) for tensor in latents)]
    return [tensor.requires_grad_(not (frozen and i in (1, 2))) for i, tensor in enumerate(inputs)]


def loss_of(inputs: list[Tensor], targets: Tensor, bias: bool, **options: Any) -> tuple[Tensor, list[Tensor | None]]:
    prior, weight, decoder_bias, *parts = inputs
    latents = parts[0] if len(parts) == 1 else tuple(parts)
    with chunks_of(options.pop("chunk_size", None)):
        loss = mos_cross_entropy(
            latents, prior, weight, targets, decoder_bias=decoder_bias if bias else None, **options
        )
    weights = torch.linspace(1, 2, loss.numel()).view(loss.shape)
    (loss * weights).sum().backward()
    return loss.detach(), [tensor.grad for tensor in inputs]


def compare_losses() -> None:
    rank = torch.distributed.get_rank()
    for num_classes in (20, 17, 2):  # also where the processes hold unequal shares
        targets = torch.arange(N) % num_classes
        for name, case in CASES.items():
            options = {"bias": False, **case}
            ignored, tolerance = options.pop("ignored", 2), options.pop("tolerance", 1e-5)
            drawing = {key: options.pop(key) for key in ("scale", "dtype", "frozen") if key in options}
            drawing["shortlist"] = "shortlist_size" in options
            labels = targets.masked_fill(torch.arange(N) < ignored, -100)
            expected, gradients = loss_of(random_inputs(num_classes, **drawing), labels, **options)
            here = slice(*(min(i * -(-num_classes // WORLD_SIZE), num_classes) for i in (rank, rank + 1)))
            inputs = random_inputs(num_classes, **drawing)
            inputs[1:3] = [tensor.detach()[here].requires_grad_(tensor.requires_grad) for tensor in inputs[1:3]]
            shard = VocabularyShard(num_classes, here.start, torch.distributed.group.WORLD)
            loss, ours = loss_of(inputs, labels, shard=shard, **options)
            assert_near(loss, expected, tolerance, name)
            for i, (mine, whole) in enumerate(zip(ours, gradients, strict=True)):
                assert (mine is None) == (whole is None)
                if mine is not None:
                    assert_near(mine, whole[here] if i in (1, 2) else whole, tolerance, f"{name}, gradient {i}")


def compare_inference() -> None:
    rank = torch.distributed.get_rank()
    group = torch.distributed.group.WORLD
    for num_classes in (20, 17, 2, 1):  # the last leaves one process without a class
        here = slice(*(min(i * -(-num_classes // WORLD_SIZE), num_classes) for i in (rank, rank + 1)))
        for size in (None, 4):
            inputs = random_inputs(num_classes, shortlist=size is not None)
            prior, weight, bias, *parts = (tensor.detach() for tensor in inputs)
            latents = parts[0] if size is None else tuple(parts)
            shard = VocabularyShard(num_classes, here.start, group)
            for adds in (False, True):
                options = {"shortlist_size": size, "softcap": 2.0, "add_log_partition": adds}
                expected = mos_log_probs(latents, prior, weight, decoder_bias=bias, **options)[:, here]
                given = infer_log_probs(
                    latents, prior, weight[here], decoder_bias=bias[here], vocabulary=shard, **options
                )
                assert given.shape == expected.shape
                if expected.numel():
                    assert_near(given, expected, 1e-5, f"{num_classes} classes, {options}")


def assert_near(given: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    size = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(given / size, expected / size, rtol=0, atol=tolerance, msg=lambda m: f"{name}: {m}")


def read_peak(reset: bool = False) -> int:
    """Bytes that this process holds, or held at most since the last reset."""
    if reset:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, so that it counts when it is taken again
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure(weight: Tensor, shard: VocabularyShard | None) -> tuple[int, int, list[int]]:
    """What a step of the loss needs on top of what is there: elements of its largest tensor, bytes; and messages."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(512, 4, weight.shape[1], generator=generator).requires_grad_()
    prior = torch.randn(512, 4, generator=generator).requires_grad_()
    targets = torch.arange(512)
    weight.grad = None
    before = read_peak(reset=True)
    with LargestTensor() as largest, Messages() as messages:
        mos_cross_entropy(latents, prior, weight, targets, shard=shard).backward()
    return largest.numel, read_peak() - before, messages.sizes


def compare_memory() -> None:
    V, D = 50_000, 64
    rank = torch.distributed.get_rank()
    weight = torch.randn(V, D, generator=torch.Generator().manual_seed(1))
    whole = weight.clone().requires_grad_()
    half = weight[rank * V // 2 : (rank + 1) * V // 2].clone().requires_grad_()
    measure(whole, None)  # once, so that torch has loaded what it needs
    largest, peak, _ = measure(whole, None)
    shard = VocabularyShard(V, rank * V // 2, torch.distributed.group.WORLD)
    measure(half, shard)
    largest_here, peak_here, messages = measure(half, shard)
    assert largest_here <= 0.51 * largest
    assert peak_here <= 0.6 * peak, f"{peak_here / 2**20:.1f} MiB of {peak / 2**20:.1f} MiB"
    # The latents' gradient once, and for each row of logits its largest, its sum and its target's.
    assert messages.count(512 * 4 * D) == 1
    assert sum(messages) == 512 * 4 * D + 512 * 4 * 3
    if rank == 0:
        print(f"{peak / 2**20:.1f} MiB in one process, {peak_here / 2**20:.1f} MiB in each of two")


def compare_loss() -> None:
    compare_losses()
    compare_inference()
    compare_memory()


def test_the_loss_is_that_of_one_process_in_half_the_memory() -> None:
    """And no logits travel. The log-probabilities of inference are those of one process too."""
    print(run_on_two(compare_loss))


# ----------------------------------------------------------------------------------------------------------- the model


def load_parallel(folder: Path, name: str) -> MoSForCausalLM:
    config = DistributedConfig(tp_size=WORLD_SIZE, tp_plan=PLANS.get(name))
    return MoSForCausalLM.from_pretrained(folder, distributed_config=config).train()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare_models(folder: str) -> None:
    for name in ("gpt2", "llama-tied", "llama"):
        for options in HEADS:
            path = Path(folder, "-".join((name, *options)))
            alone = make_model(name, **options)
            if torch.distributed.get_rank() == 0:
                alone.save_pretrained(path)
            torch.distributed.barrier()
            model = load_parallel(path, name)
            decoder = model.lm_head.weight
            assert decoder.to_local().shape[0] in (VOCAB_SIZE // 2, VOCAB_SIZE // 2 + 1)
            assert (decoder is model.get_input_embeddings().weight) == alone.config.tie_word_embeddings

            batch = joint_batch(0)
            with mock.patch.object(mos_head, "mos_cross_entropy", wraps=mos_cross_entropy) as fused:
                loss = model(**batch).loss
            assert fused.call_args.kwargs["shard"].num_classes == VOCAB_SIZE
            expected = alone(**batch).loss
            torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
            loss.backward()
            expected.backward()
            for key, parameter in model.named_parameters():
                reference = alone.get_parameter(key).grad
                torch.testing.assert_close(whole(parameter.grad), reference, rtol=0, atol=1e-5, msg=key)
                assert reference.abs().max() > 1e-3, f"{key} has hardly a gradient"

            model.eval()
            alone.eval()
            prompt = batch["input_ids"][:, :5]
            with torch.no_grad():
                logits = alone(batch["input_ids"]).logits
                torch.testing.assert_close(model(batch["input_ids"]).logits, logits, rtol=0, atol=1e-5)
            differentiable = model(batch["input_ids"]).logits
            torch.testing.assert_close(differentiable, logits, rtol=0, atol=1e-5)
            assert torch.equal(greedy(model, prompt), greedy(alone, prompt))

            with torch.no_grad():
                for one in (model, alone):
                    for parameter in one.parameters():
                        parameter -= 0.1 * parameter.grad
            model.save_pretrained(path.with_suffix(".saved"))
            assert_close_to(MoSForCausalLM.from_pretrained(path.with_suffix(".saved")), dict(alone.named_parameters()))


def test_a_model_is_that_of_one_process(tmp_path: Path) -> None:
    """Loss, gradients, logits, what it generates and what it saves; 97 classes are 49 and 48."""
    run_on_two(compare_models, tmp_path)
