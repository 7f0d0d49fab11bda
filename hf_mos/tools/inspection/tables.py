"""Shows an inspection as tables in a terminal."""

import math
import statistics
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..evaluate import perplexity_of
from .inspect_mixture import OLD_SOFTMAX, Candidate, CorpusInspection, Inspection, Prediction, TextInspection
from .token_texts import visible

SHOWN_COMPONENTS = 8  # of more, the line of a token shows one weight, and no matrix of pairs fits a terminal
# Those of the eight terminal colours that are visible on light and on dark; each component also has its number.
COLORS = ("blue", "yellow", "green", "magenta", "cyan", "red")


def tables(inspection: Inspection) -> Group:
    """A rich renderable: the tokens of the text, then the components over the corpus."""
    parts: list[Any] = []
    if inspection.text is not None:
        parts += [tokens_table(inspection.text)]
    if inspection.corpus is not None:
        parts += [*corpus_tables(inspection.corpus)]
    return Group(*parts)


def component_name(k: int) -> Text:
    return Text(f"component {k}", style=f"bold {color_of(k)}")


def color_of(k: int) -> str:
    return COLORS[k % len(COLORS)]


def tokens_table(text: TextInspection) -> Table:
    """A line for each token, and one for the token after the text."""
    K = len(text.next.mixture_weights)
    table = Table(
        title="Token by token", title_justify="left", box=box.HORIZONTALS, pad_edge=False, padding=(0, 1, 0, 0)
    )
    weights = "weights, %" if K <= SHOWN_COMPONENTS else "weight, %"
    for title in ("token", "nll", "old nll", weights, "led by", "mixture, %", "old softmax, %"):
        justify: Any = "right" if "nll" in title else "left"
        table.add_column(title, justify=justify, no_wrap=True, overflow="ellipsis", min_width=4)
    for token in text.tokens:
        name = Text(visible(token.text), style="bold")
        if token.prediction is None:
            table.add_row(name)
        else:
            table.add_row(name, *prediction_cells(token.prediction, token.token_id))
    table.add_row(Text("next token", style="italic"), *prediction_cells(text.next, None))
    shown = "mixture weights" if K <= SHOWN_COMPONENTS else "largest mixture weight"
    table.caption = (
        "For each token, given the tokens before it: its nll in nats by the mixture and by the old softmax, the "
        f"{shown}, the component with the largest responsibility and its share, and the likeliest token "
        "(✓ if it is the token itself). --json and --html show the predictions of each component."
    )
    table.caption_justify = "left"
    return table


def prediction_cells(prediction: Prediction, actual: int | None) -> Iterator[Text]:
    for nll in (prediction.nll, prediction.softmax_nll):
        yield Text("" if nll is None else f"{nll:.2f}")
    yield weights_cell(prediction.mixture_weights)
    if prediction.responsibilities is None:
        yield Text()
    else:
        k = prediction.responsibilities.index(max(prediction.responsibilities))
        yield Text(f"{k}: {100 * prediction.responsibilities[k]:.0f} %", style=f"bold {color_of(k)}")
    yield likeliest_cell(prediction.top, actual)
    yield likeliest_cell(prediction.softmax_top, actual)


def weights_cell(weights: list[float]) -> Text:
    """All weights, or of many components the largest."""
    shown = list(enumerate(weights))
    if len(shown) > SHOWN_COMPONENTS:
        k, weight = max(shown, key=lambda entry: entry[1])
        return Text(f"{k}: {100 * weight:.0f}", style=color_of(k))
    return Text(" ").join(Text(f"{100 * weight:2.0f}", style=color_of(k)) for k, weight in shown)


def likeliest_cell(candidates: list[Candidate], actual: int | None) -> Text:
    likeliest = candidates[0]
    mark = " ✓" if likeliest.token_id == actual else ""
    cell = Text(f"{visible(likeliest.text)} ", style="bold" if mark else "")
    return cell.append(f"{100 * likeliest.probability:.0f}{mark}", style="dim")


def corpus_tables(corpus: CorpusInspection) -> Iterator[Any]:
    yield components_table(corpus)
    if len(corpus.components) > 1:
        yield divergence_table(corpus)
    yield summary_table(corpus)


def components_table(corpus: CorpusInspection) -> Table:
    table = Table(title=f"Components over {corpus.num_tokens:,} tokens", title_justify="left", box=box.HORIZONTALS)
    table.add_column("")
    for name in ("usage", "responsibility", "leads", "entropy"):
        table.add_column(name, justify="right")
    table.add_column("most responsible for (% of its occurrences)")
    for k, component in enumerate(corpus.components):
        shares = (component.mean_weight, component.responsibility, component.leads)
        tokens = (f"{visible(share.text)} ({100 * share.responsibility:.0f})" for share in component.tokens)
        table.add_row(
            component_name(k),
            *(f"{100 * share:.1f} %" for share in shares),
            f"{component.entropy:.2f}",
            Text("  ".join(tokens)),
        )
    return table


def divergence_table(corpus: CorpusInspection) -> Table:
    """The divergence of each pair of components, or of many components the mean and the extremes."""
    K = len(corpus.components)
    table = Table(
        title=f"Jensen-Shannon divergence, nats (at most {math.log(2):.2f})",
        title_justify="left",
        box=box.HORIZONTALS,
    )
    table.add_column("")
    if K > SHOWN_COMPONENTS:
        pairs = {f"{j} and {k}": corpus.divergence[j][k] for k in range(K) for j in range(k)}
        closest, farthest = min(pairs, key=pairs.__getitem__), max(pairs, key=pairs.__getitem__)
        table.add_column("", justify="right")
        table.add_row("mean of all pairs", f"{statistics.mean(pairs.values()):.4f}")
        table.add_row(f"the closest pair, {closest}", f"{pairs[closest]:.4f}")
        table.add_row(f"the farthest pair, {farthest}", f"{pairs[farthest]:.4f}")
        table.caption, table.caption_justify = "--json has all pairs, and --html draws them.", "left"
        return table
    for k in range(K):
        table.add_column(component_name(k), justify="right")
    for k, row in enumerate(corpus.divergence):
        table.add_row(component_name(k), *(f"{value:.4f}" for value in row))
    return table


def summary_table(corpus: CorpusInspection) -> Table:
    table = Table(title="The mixture and the old softmax", title_justify="left", box=box.HORIZONTALS)
    table.caption, table.caption_justify = OLD_SOFTMAX, "left"
    table.add_column("")
    table.add_column("mixture", justify="right")
    table.add_column("old softmax", justify="right")
    rows: list[tuple[str, ...]] = [("nll per token", f"{corpus.nll:.4f}", f"{corpus.softmax_nll:.4f}")]
    rows.append(("perplexity", *(f"{perplexity_of(nll):,.3f}" for nll in (corpus.nll, corpus.softmax_nll))))
    rows.append(("entropy of the next token", f"{corpus.entropy:.4f}"))
    rows.append(("entropy of the weights", f"{corpus.mixture_weights_entropy:.4f}"))
    if corpus.rank is not None:
        rank = corpus.rank
        shape = f"{rank.contexts:,} contexts x {rank.classes:,} classes"
        rows.append((f"rank, {shape}", f"{rank.mixture:,}", f"{rank.softmax:,}"))
        rows.append(("bound of one softmax", "", f"{rank.bound:,}"))
    for row in rows:
        table.add_row(*row)
    return table
