"""A language whose log-probability matrix has a known rank: how far is each head from its entropy?

    python examples/softmax_bottleneck/synthetic.py --quick
    python examples/softmax_bottleneck/synthetic.py

Each of V contexts has a distribution over V tokens, the softmax of a random matrix of a chosen rank. A model knows the
context (an embedding of D numbers) and learns by the exact expected cross-entropy, so there is no data to run out of,
and the entropy of the language is the floor for any model. One softmax over D numbers has a floor of its own above it
as soon as the rank exceeds D: what is left when it is trained to the end. Printed is the excess over the entropy, in
nats per token, for one softmax, for the mixture at the same D, and for a softmax widened to the mixture's operations.
"""

import time
from typing import Annotated, Any

import torch
import typer
from models import SOFTMAX, Head, contexts, mixture
from plots import plot_synthetic
from results import DEFAULT_OUT, Out, Quick, Results, Seeds, mean, show, spread, start
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn


def language(vocab_size: int, rank: int, spread: float, seed: int) -> Tensor:
    """Log-probabilities (contexts, tokens) whose logits have this rank and this standard deviation, float32."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(vocab_size, rank, generator=generator) for _ in range(2))
    return (spread / rank**0.5 * left @ right.T).log_softmax(-1)


class Model(nn.Module):
    """An embedding of the context, and a head."""

    def __init__(self, head: Head, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.head = head.take_over(nn.Linear(hidden_size, vocab_size, bias=True))

    def forward(self) -> Tensor:
        return self.head(self.embedding.weight)


def learn(head: Head, hidden_size: int, truth: Tensor, steps: int, seed: int) -> dict[str, Any]:
    """The excess of the exact cross-entropy over the entropy, after training."""
    torch.manual_seed(seed)
    model = Model(head, hidden_size, len(truth))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    started = time.process_time()
    for _ in track(range(steps), head.name, console=Console(stderr=True), transient=True):
        optimizer.zero_grad()
        excess(truth, model()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        nats = excess(truth, model()).item()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"excess": nats, "seconds": round(time.process_time() - started, 3), "parameters": parameters}


def excess(truth: Tensor, log_probs: Tensor) -> Tensor:
    """Equivalent to: the cross-entropy minus the entropy, in nats per token, all contexts alike."""
    return (truth.exp() * (truth - log_probs)).sum(-1).mean()


def main(
    vocab_size: Annotated[int, typer.Option(help="V, the number of contexts and of tokens.")] = 256,
    hidden_size: Annotated[int, typer.Option(help="D.")] = 8,
    logit_spread: Annotated[float, typer.Option(help="Standard deviation of the language's logits.")] = 2.0,
    steps: int = 1000,
    seeds: Seeds = 3,
    out: Out = DEFAULT_OUT,
    quick: Quick = False,
) -> None:
    start()
    ranks = [4, 8, 16, 32, 64]
    if quick:
        vocab_size, ranks, steps, seeds = 128, [4, 16, 64], 400, 1
    results = Results(out, "synthetic", quick)
    contenders = {
        "softmax": (SOFTMAX, hidden_size),
        "contexts K=4": (contexts(4), hidden_size),
        "mixture K=4": (mixture(4), hidden_size),
        "mixture K=15": (mixture(15), hidden_size),
        "softmax, 4 x the hidden size": (SOFTMAX, 4 * hidden_size),
    }
    rows, points = [], {name: [] for name in contenders}
    for rank in ranks:
        row: dict[str, Any] = {"rank of the language": rank}
        for name, (head, width) in contenders.items():
            runs = []
            for seed in range(seeds):
                truth = language(vocab_size, rank, logit_spread, seed)
                settings = {"vocab_size": vocab_size, "rank": rank, "logit_spread": logit_spread, "steps": steps}
                settings |= {"hidden_size": width, "head": head.settings, "seed": seed}
                runs.append(results.run(settings, lambda: learn(head, width, truth, steps, seed)))  # noqa: B023
            row[name] = spread([run["excess"] for run in runs], 3)
            points[name].append((rank, mean(runs, "excess")))
        rows.append(row)
    title = f"Excess over the entropy, nats per token, V = {vocab_size}, D = {hidden_size}, {seeds} seeds"
    show(title, rows)
    plot_synthetic(results.path.with_suffix(".png"), title, hidden_size, points)


if __name__ == "__main__":
    typer.run(main)
