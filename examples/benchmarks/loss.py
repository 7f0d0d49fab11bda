"""The loss against its floor and its peers: time, and memory beyond inputs and gradients.

The floor is the time of the three matmuls of a training step, each by the faster of torch's own matmul and oneDNN, and
in chunks of the fastest size.

    python examples/benchmarks/loss.py
    python examples/benchmarks/loss.py --num-tokens 256 --hidden-size 768 --vocab-size 50257 --json
    python examples/benchmarks/loss.py --device cuda --dtype bfloat16 --num-tokens 8192 --hidden-size 2048 \\
        --vocab-size 128256

Before anything is timed, every contender's loss and gradients are compared with autograd in float64; a wrong one ends
the run. Times are medians of calls in turn, forward and backward. On CUDA the kernels of liger-kernel and
cut-cross-entropy are timed too where these are installed, and a contender that runs out of memory is left out.
`--dry-run` checks a command on the CPU at a small size. Needs: pip install '.[examples]'.
"""

import json
import subprocess
import sys
from functools import partial
from typing import Annotated

import torch
import typer
from contenders import CONTENDERS, gradients, largest_error, make_leaves
from measure import peak_bytes, report, time_in_turn

FLOOR, BARE = "the floor", "three bare products"
CHUNKS = (256, 10**9)  # rows in which the floor's products are tried
TOLERANCE = 1e-3  # of the gate, in fp32; the paper's epsilon alone is an error of that order where p is small


def bare_products(leaves, keep):
    """The matmuls (N K) x D x V of a training step, into existing tensors."""
    rows, weight = leaves["latents"].detach().flatten(0, 1), leaves["decoder_weight"].detach()
    logits, d_rows, d_weight = keep
    torch.mm(rows, weight.t(), out=logits)
    torch.mm(logits, weight, out=d_rows)
    torch.mm(logits.t(), rows, out=d_weight)


def onednn(left, right):
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")


LIBRARIES = {"torch": torch.mm, "oneDNN": onednn}


def floor_calls(leaves, keep, device):
    """Each product of a training step by each library and in each chunk: a call for every (product, choice)."""
    rows, weight = leaves["latents"].detach().flatten(0, 1), leaves["decoder_weight"].detach()
    logits, d_rows, d_weight = keep

    def make_logits(multiply, part):
        logits[part] = multiply(rows[part], weight.t())

    def make_d_rows(multiply, part):
        d_rows[part] = multiply(logits[part], weight)

    def make_d_weight(multiply, part):
        if multiply is torch.mm:
            d_weight.addmm_(logits[part].t(), rows[part])
        else:
            d_weight.add_(multiply(logits[part].t(), rows[part]))

    def in_chunks(product, multiply, size):
        for start in range(0, len(rows), size):
            product(multiply, slice(start, start + size))

    on_cpu = device == "cpu" and rows.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    libraries = LIBRARIES if on_cpu else {"torch": torch.mm}
    return {
        (product.__name__, f"{library}, {min(size, len(rows))} rows"): partial(in_chunks, product, multiply, size)
        for product in (make_logits, make_d_rows, make_d_weight)
        for library, multiply in libraries.items()
        for size in CHUNKS
        if size < len(rows) or size == CHUNKS[-1]
    }


def floor_of(seconds):
    """The sum of the fastest times of the products, and the choices that reach it."""
    best = {}
    for (product, choice), value in seconds.items():
        if value < best.get(product, (float("inf"), ""))[0]:
            best[product] = (value, choice)
    return sum(value for value, _ in best.values()), "; ".join(choice for _, choice in best.values())


def fits(name, contender, leaves, targets):
    """Whether a GPU has the memory for it; each contender is called once to see."""
    if leaves["latents"].device.type == "cpu":
        return True
    try:
        gradients(contender.loss, leaves, targets, contender.leaves)
    except torch.cuda.OutOfMemoryError:
        print(f"{name}: out of memory", file=sys.stderr)
        torch.cuda.empty_cache()
        return False
    return True


def main(
    num_tokens: int = 512,
    num_mixtures: int = 4,
    hidden_size: int = 256,
    vocab_size: int = 32000,
    rounds: int = 7,
    threads: int = 2,
    device: str = "cpu",
    dtype: str = "float32",
    only: Annotated[list[str] | None, typer.Option(help="Time only these contenders.")] = None,
    with_floor: Annotated[bool, typer.Option("--floor/--no-floor", help="Time the bare products too.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the command on the CPU, at a small size.")] = False,
    memory_of: Annotated[str | None, typer.Option(hidden=True)] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    torch.set_num_threads(threads)
    if dry_run:
        device, rounds = "cpu", 1
        num_tokens, hidden_size, vocab_size = min(num_tokens, 16), min(hidden_size, 64), min(vocab_size, 512)
    sizes = (num_tokens, num_mixtures, hidden_size, vocab_size)
    torch_dtype = getattr(torch, dtype)
    contenders = {name: c for name, c in CONTENDERS.items() if c.runs_on(device) and (not only or name in only)}

    if memory_of is not None:
        contender = CONTENDERS[memory_of]
        gradients(contender.loss, *make_leaves(2, num_mixtures, 8, 16, torch_dtype, device), contender.leaves)
        leaves, targets = make_leaves(*sizes, torch_dtype, device)
        print(peak_bytes(lambda: gradients(contender.loss, leaves, targets, contender.leaves)[1], device))
        return

    small, small_targets = make_leaves(min(num_tokens, 32), *sizes[1:], torch_dtype, device)
    tolerance = TOLERANCE if torch_dtype == torch.float32 else 32 * torch.finfo(torch_dtype).eps
    for name, contender in contenders.items():
        error = largest_error(contender, small, small_targets)
        if not error <= tolerance:
            raise SystemExit(f"{name}: wrong by {error:.1e} of the loss or a gradient, more than {tolerance:.0e}")

    leaves, targets = make_leaves(*sizes, torch_dtype, device)
    contenders = {name: c for name, c in contenders.items() if fits(name, c, leaves, targets)}
    calls, products = {}, {}
    if with_floor:
        rows = num_tokens * num_mixtures
        shapes = [(rows, vocab_size), (rows, hidden_size), (vocab_size, hidden_size)]
        keep = [torch.zeros(shape, dtype=torch_dtype, device=device) for shape in shapes]
        calls[BARE] = lambda: bare_products(leaves, keep)
        products = floor_calls(leaves, keep, device)
    for name, contender in contenders.items():
        calls[name] = lambda c=contender: gradients(c.loss, leaves, targets, c.leaves)
    if not only:
        calls["mos_cross_entropy, evaluation"] = lambda: torch.no_grad()(CONTENDERS["mos_cross_entropy"].loss)(
            leaves, targets
        )
    seconds = time_in_turn(calls | products, rounds, device)
    choices = "not timed"
    if products:
        floor, choices = floor_of({name: seconds.pop(name) for name in products})
        seconds = {FLOOR: floor} | seconds

    table = []
    floor, one = (seconds.get(name, float("nan")) for name in (FLOOR, "one softmax head"))
    for name, value in seconds.items():
        row = {"": name, "seconds": value, "of the floor": value / floor, "of one softmax": value / one}
        row["extra MB"] = memory(name) / 1e6 if name in contenders else "-"
        table.append(row)
    settings = {
        "num_tokens": num_tokens,
        "num_mixtures": num_mixtures,
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
        "dtype": dtype,
        "device": device,
        "the floor's products": choices,
        "blas": "MKL" if torch.backends.mkl.is_available() else "no MKL",
    }
    title = "Loss, forward and backward: " + ", ".join(f"{key} {value}" for key, value in settings.items())
    report(title, table, settings, json_)


def memory(name: str) -> int:
    """Measures memory in a fresh process, by a hidden flag of this script."""
    command = [sys.executable, *sys.argv, "--memory-of", name]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    typer.run(main)
