"""Shows an inspection as tables in a terminal."""

import math
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from .inspect_mixture import Candidate, CorpusInspection, Inspection, Prediction, TextInspection
from .token_texts import visible

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
    return Text(f"component {k}", style=f"bold {COLORS[k % len(COLORS)]}")


def tokens_table(text: TextInspection) -> Table:
    has_softmax = text.next.softmax_top is not None
    table = Table(title="Token by token", title_justify="left", box=box.HORIZONTALS, show_lines=True, pad_edge=False)
    table.add_column("token")
    table.add_column("nll", justify="right")
    table.add_column("entropy", justify="right")
    table.add_column("mixture, %")
    if has_softmax:
        table.add_column("old softmax, %")
    for k in range(len(text.next.mixture_weights)):
        table.add_column(component_name(k))
    for token in text.tokens:
        name = Text(visible(token.text), style="bold")
        if token.prediction is None:
            table.add_row(name)
        else:
            table.add_row(name, *prediction_cells(token.prediction, token.token_id, has_softmax))
    table.add_row(Text("what follows", style="italic"), *prediction_cells(text.next, None, has_softmax))
    table.caption = (
        "Each token as it is predicted from what stands before it; nll and entropy in nats"
        + (", the old softmax's in brackets" if has_softmax else "")
        + ". w: mixture weight, r: responsibility, in %. ✓: the token itself."
    )
    table.caption_justify = "left"
    return table


def prediction_cells(prediction: Prediction, actual: int | None, has_softmax: bool) -> Iterator[Text]:
    for value, of_softmax in (
        (prediction.nll, prediction.softmax_nll),
        (prediction.entropy, prediction.softmax_entropy),
    ):
        lines = [value, of_softmax] if has_softmax else [value]
        texts = [None if entry is None else f"{entry:.2f}" for entry in lines]
        yield Text("\n".join(text if i == 0 else f"({text})" for i, text in enumerate(texts) if text is not None))
    yield candidates_cell(prediction.top, actual)
    if prediction.softmax_top is not None:
        yield candidates_cell(prediction.softmax_top, actual)
    for k, candidates in enumerate(prediction.component_top):
        color = COLORS[k % len(COLORS)]
        shares = Text(f"w {100 * prediction.mixture_weights[k]:.0f}", style=color)
        if prediction.responsibilities is not None:
            responsibility = prediction.responsibilities[k]
            leads = responsibility == max(prediction.responsibilities)
            shares.append(f"  r {100 * responsibility:.0f}", style=f"bold reverse {color}" if leads else color)
        yield Text("\n").join([shares, candidates_cell(candidates, actual)])


def candidates_cell(candidates: list[Candidate], actual: int | None) -> Text:
    lines = []
    for candidate in candidates:
        is_actual = candidate.token_id == actual
        mark = " ✓" if is_actual else ""
        line = Text(f"{visible(candidate.text)} ", style="bold" if is_actual else "")
        lines.append(line.append(f"{100 * candidate.probability:.1f}{mark}", style="dim"))
    return Text("\n").join(lines)


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
    table = Table(
        title=f"Jensen-Shannon divergence, nats (at most {math.log(2):.2f})",
        title_justify="left",
        box=box.HORIZONTALS,
    )
    table.add_column("")
    for k in range(len(corpus.components)):
        table.add_column(component_name(k), justify="right")
    for k, row in enumerate(corpus.divergence):
        table.add_row(component_name(k), *(f"{value:.4f}" for value in row))
    return table


def summary_table(corpus: CorpusInspection) -> Table:
    has_softmax = corpus.softmax_nll is not None
    table = Table(title="The mixture and the old softmax", title_justify="left", box=box.HORIZONTALS)
    table.add_column("")
    table.add_column("mixture", justify="right")
    if has_softmax:
        table.add_column("old softmax", justify="right")
    rows: list[tuple[str, ...]] = [("nll per token", f"{corpus.nll:.4f}")]
    rows.append(("perplexity", f"{math.exp(corpus.nll):,.3f}"))
    if corpus.softmax_nll is not None:
        rows[0] += (f"{corpus.softmax_nll:.4f}",)
        rows[1] += (f"{math.exp(corpus.softmax_nll):,.3f}",)
    rows.append(("entropy of the next token", f"{corpus.entropy:.4f}"))
    rows.append(("entropy of the weights", f"{corpus.mixture_weights_entropy:.4f}"))
    if corpus.rank is not None:
        rank = corpus.rank
        softmax_rank = () if rank.softmax is None else (f"{rank.softmax:,}",)
        rows.append(
            (f"rank, {rank.contexts:,} contexts x {rank.classes:,} classes", f"{rank.mixture:,}", *softmax_rank)
        )
        rows.append(("bound of one softmax", *([""] if has_softmax else []), f"{rank.bound:,}"))
    for row in rows:
        table.add_row(*row)
    return table
