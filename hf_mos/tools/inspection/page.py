"""Writes an inspection as one self-contained HTML page: the text coloured by component, tables and plots.

```python
save_page(inspect_mixture(model, tokenizer, text="The cat sat."), Path("mixture.html"))
```

`render_view` gives the part that an app shows; the app brings `STYLE` and `SCRIPT`.
"""

import dataclasses
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..evaluate import perplexity_of
from ..places import write_whole
from .inspect_mixture import OLD_SOFTMAX, CorpusInspection, Inspection, Prediction, TextInspection, Token
from .token_texts import running, visible

FOLDER = Path(__file__).parent
STYLE = (FOLDER / "page.css").read_text(encoding="utf-8")
SCRIPT = (FOLDER / "page.js").read_text(encoding="utf-8")

# Of Okabe and Ito's colours, which colour-blind readers can distinguish: as many as there are components with a colour
# of their own. Of more components the most used have one, and the others are drawn as one, by their sum.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
MOST_USED, OTHERS, GREY = 5, "others", "#8c8c8c"
INK = "#010203"  # stands for the page's own text colour in a plot
ANNOTATED_COMPONENTS = 10
MOST_TICKS = 8  # of an axis of components; the numbers of more would run together


class Group(NamedTuple):
    """Components that are drawn as one: one component, or all that are not among the most used."""

    label: str
    color: str
    components: list[int]

    def share(self, shares: Sequence[float]) -> float:
        return sum(shares[k] for k in self.components)


class Plot(NamedTuple):
    """A plot as an SVG element, and its description."""

    svg: str
    caption: str


def group_components(inspection: Inspection) -> list[Group]:
    """The components as they are drawn: those most used over the corpus, or else on the text, and the others."""
    if inspection.corpus is not None:
        usage = [component.mean_weight for component in inspection.corpus.components]
    else:
        assert inspection.text is not None
        weights = [p.mixture_weights for p in _predictions(inspection.text) if p is not None]
        usage = [_mean(column) for column in zip(*weights, strict=True)]
    own = list(range(len(usage)))
    if len(usage) > len(COLORS):
        own = sorted(sorted(own, key=usage.__getitem__, reverse=True)[:MOST_USED])
    groups = [Group(str(k), color, [k]) for k, color in zip(own, COLORS, strict=False)]
    others = [k for k in range(len(usage)) if k not in own]
    return [*groups, Group(OTHERS, GREY, others)] if others else groups


def colors_of(groups: list[Group]) -> list[str]:
    """The colour of each component."""
    colors = {k: group.color for group in groups for k in group.components}
    return [colors[k] for k in range(len(colors))]


def _predictions(text: TextInspection) -> list[Prediction | None]:
    return [*(token.prediction for token in text.tokens), text.next]


def check_target(path: Path) -> None:
    """Raises an error if no page can be written there, or matplotlib is not installed."""
    import matplotlib  # noqa: F401

    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"html: expected a file in a folder that is there, given {str(path)!r}")


def save_page(inspection: Inspection, path: Path) -> None:
    """Writes the page of an inspection, atomically."""
    page = render_page(inspection)
    write_whole(path, lambda file: file.write_text(page, encoding="utf-8"))


def render_page(inspection: Inspection) -> str:
    """The page. It loads no other file."""
    title = f"{Path(inspection.model.name).name or inspection.model.backbone}: what its mixture does"
    return _template("page.html").render(title=title, style=STYLE, script=SCRIPT, view=render_view(inspection))


def render_view(inspection: Inspection) -> str:
    """The inspection as HTML for a place that has `STYLE` and `SCRIPT`."""
    text, corpus = inspection.text, inspection.corpus
    groups = group_components(inspection)
    colors = colors_of(groups)
    context: dict[str, Any] = {"model": inspection.model, "text": text, "corpus": corpus, "colors": colors}
    context |= {"old_softmax": OLD_SOFTMAX, "num_others": len(colors) - len(groups) + 1}
    plots: list[Plot] = []
    if text is not None:
        data = _data_for_script(text, groups)
        last = {"space": "", "text": "▸", "label": "", "drawn": "", "style": ""}
        context |= {
            "keys": [
                (group, _mean(group.share(p.mixture_weights) for p in _predictions(text) if p)) for group in groups
            ],
            "spans": [*(_span(token, colors) for token in text.tokens), last],
            "data": data,
            "data_id": hashlib.sha256(data.encode()).hexdigest()[:16],
            "text_figures": _text_figures(text),
        }
        context["text_plot"] = plot_text(text, groups)
    if corpus is not None:
        context["corpus_figures"] = _corpus_figures(corpus)
        plots.append(plot_usage(corpus, groups))
        if len(corpus.components) > 1:
            plots.append(plot_divergence(corpus))
        if corpus.rank is not None:
            plots.append(plot_singular_values(corpus))
    return _template("view.html").render(context, plots=plots)


def _template(name: str) -> Any:
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True)
    environment.filters["visible"] = visible
    return environment.get_template(name)


def _span(token: Token, colors: list[str]) -> dict[str, str]:
    """A token as the page shows it without scripts: in the colour of the responsible component.

    Its number is drawn where it is no longer than the token: else it would reach over that of the next.
    """
    label, style = "", ""
    if token.prediction is not None and token.prediction.responsibilities is not None:
        shares = token.prediction.responsibilities
        k = max(range(len(shares)), key=shares.__getitem__)
        label = str(k)
        style = f"--mos-component: {colors[k]}; --mos-shade: {15 + 45 * shares[k]:.0f}%"
    text = running(token.text)
    word = text.lstrip(" ") or text
    drawn = label if len(label) <= len(word.rstrip("\n")) else ""
    return {"space": text[: len(text) - len(word)], "text": word, "label": label, "drawn": drawn, "style": style}


def _data_for_script(text: TextInspection, groups: list[Group]) -> str:
    """The data for the script, as JSON."""
    tokens = [*({"token_id": t.token_id, "text": t.text, "prediction": t.prediction} for t in text.tokens)]
    tokens.append({"token_id": None, "text": "", "prediction": text.next})
    components = [{"label": str(k), "color": color} for k, color in enumerate(colors_of(groups))]
    others = next(({"label": OTHERS, "color": GREY} for group in groups if group.label == OTHERS), None)
    data: dict[str, Any] = {"components": components, "others": others, "most": MOST_USED}
    data |= {"tokens": tokens, "first": _first_shown(text)}

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return plain(vars(value))
        if isinstance(value, dict):
            return {key: visible(entry) if key == "text" else plain(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [plain(entry) for entry in value]
        return float(f"{value:.5g}") if isinstance(value, float) else value  # the page shows five digits

    return json.dumps(plain(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _first_shown(text: TextInspection) -> int:
    """The token that the page shows first: the one with the largest gain over the old softmax."""

    def gain(index: int) -> float:
        prediction = text.tokens[index].prediction
        if prediction is None or prediction.nll is None:
            return -math.inf
        return (prediction.softmax_nll or 0.0) - prediction.nll

    return max(range(len(text.tokens)), key=gain)


def _text_figures(text: TextInspection) -> list[tuple[str, str]]:
    predictions = [token.prediction for token in text.tokens if token.prediction is not None]
    figures = []
    if predictions:
        figures.append(("nll per token", f"{_mean(p.nll for p in predictions):.3f}"))
        figures.append(("old softmax's nll", f"{_mean(p.softmax_nll for p in predictions):.3f}"))
    everywhere: list[Prediction] = [*predictions, text.next]
    figures.append(("entropy of the weights", f"{_mean(p.mixture_weights_entropy for p in everywhere):.3f}"))
    figures.append(("entropy of the next token", f"{_mean(p.entropy for p in everywhere):.3f}"))
    return figures


def _corpus_figures(corpus: CorpusInspection) -> list[tuple[str, str]]:
    figures = [("nll per token", f"{corpus.nll:.4f}")]
    figures.append(("old softmax's nll", f"{corpus.softmax_nll:.4f}"))
    figures.append(("perplexity", f"{perplexity_of(corpus.nll):,.2f}"))
    figures.append(("entropy of the weights", f"{corpus.mixture_weights_entropy:.3f}"))
    figures.append(("entropy of the next token", f"{corpus.entropy:.3f}"))
    if corpus.rank is not None:
        figures.append(("rank", f"{corpus.rank.mixture:,}"))
        figures.append(("old softmax's rank", f"{corpus.rank.softmax:,}"))
        figures.append(("bound of one softmax", f"{corpus.rank.bound:,}"))
    return figures


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


# ----------------------------------------------------------------------------------------------------------- the plots


def plot_text(text: TextInspection, groups: list[Group]) -> Plot:
    predictions = _predictions(text)

    def draw(figure: Any) -> None:
        weights_axes, nll_axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        edges = [i - 0.5 for i in range(len(predictions) + 1)]
        bottom = [0.0] * len(predictions)
        for group in groups:
            weights = [group.share(p.mixture_weights) if p else 0.0 for p in predictions]
            top = [below + weight for below, weight in zip(bottom, weights, strict=True)]
            weights_axes.stairs(top, edges, baseline=bottom, fill=True, color=group.color, label=group.label)
            bottom = top
        weights_axes.set(ylabel="mixture weights", ylim=(0, 1), xlim=(-0.5, len(predictions) - 0.5))
        weights_axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.05), frameon=False, labelcolor=INK)
        scored = [i for i, p in enumerate(predictions) if p and p.nll is not None]
        lines = [("old softmax", "softmax_nll", COLORS[5], "--"), ("mixture", "nll", COLORS[0], "-")]
        for label, field, color, style in lines if scored else []:
            values = [getattr(predictions[i], field) for i in scored]
            nll_axes.plot(scored, values, style, color=color, label=label, linewidth=1.2)
        nll_axes.set(ylabel="nll", xlabel="token", ylim=(0, None))
        if scored:
            nll_axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, labelcolor=INK)

    caption = "Top: the mixture weights with which each token is predicted. Bottom: its nll."
    return Plot(svg(draw, 11, 3.4, caption), caption)


def plot_usage(corpus: CorpusInspection, groups: list[Group]) -> Plot:
    usage = [component.mean_weight for component in corpus.components]
    responsibilities = [component.responsibility for component in corpus.components]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        hatched: Any = {"alpha": 0.5, "hatch": "///", "edgecolor": INK}
        for i, group in enumerate(groups):
            alike = len(group.components) / len(usage)
            axes.bar(i - 0.2, group.share(usage), 0.36, color=group.color)
            axes.bar(i + 0.2, group.share(responsibilities), 0.36, color=group.color, **hatched)
            axes.hlines(alike, i - 0.45, i + 0.45, color=INK, linewidth=0.8, linestyle=":")
        axes.set(xlabel="component", ylabel="share", xticks=range(len(groups)))
        axes.set_xticklabels([group.label for group in groups])

    caption = "Usage (plain) and responsibility (hatched) of each component; dotted: if all were used alike."
    return Plot(svg(draw, 5, 3.2, caption), caption)


def plot_divergence(corpus: CorpusInspection) -> Plot:
    K = len(corpus.components)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        mesh = axes.pcolormesh(corpus.divergence, cmap="cividis", vmin=0, edgecolors="none")
        axes.invert_yaxis()
        named = range(0, K, -(-K // MOST_TICKS))
        ticks = [k + 0.5 for k in named]
        axes.set(xticks=ticks, yticks=ticks, aspect="equal", xlabel="component", ylabel="component")
        axes.set_xticklabels(named)
        axes.set_yticklabels(named)
        largest = max(map(max, corpus.divergence))
        for j in range(K if K <= ANNOTATED_COMPONENTS else 0):
            for k in range(K):
                value = corpus.divergence[j][k]
                ink = "black" if value > largest / 2 else "white"
                axes.text(k + 0.5, j + 0.5, f"{value:.2f}", ha="center", va="center", color=ink)
        bar = figure.colorbar(mesh, ax=axes)
        bar.outline.set_edgecolor(INK)
        bar.ax.tick_params(colors=INK)

    caption = f"Jensen-Shannon divergence of each two components, in nats; at most {math.log(2):.2f}."
    return Plot(svg(draw, 5, 3.2, caption), caption)


def plot_singular_values(corpus: CorpusInspection) -> Plot:
    rank = corpus.rank
    assert rank is not None

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        lines = (
            ("mixture", rank.singular_values, COLORS[0], "-"),
            ("old softmax", rank.softmax_singular_values, COLORS[5], "--"),
        )
        for label, values, color, style in lines:
            shares = [value / values[0] for value in values]
            axes.plot(range(1, len(shares) + 1), shares, style, color=color, label=label)
        axes.axvline(rank.bound, color=INK, linewidth=0.8, linestyle=":")
        axes.set(xlabel="singular value", ylabel="share of the largest", yscale="log", xscale="log")
        axes.legend(frameon=False, labelcolor=INK)

    caption = f"Singular values of the log-probability matrix; dotted: {rank.bound:,}, the bound of one softmax."
    return Plot(svg(draw, 5, 3.2, caption), caption)


def svg(draw: Callable[[Any], None], width: float, height: float, label: str) -> str:
    """A figure of `width` x `height` inches as an SVG element, in the page's own text colour, without a background."""
    import matplotlib
    from markupsafe import escape
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {f"{name}.color": INK for name in ("text", "xtick", "ytick", "hatch")}
    style |= {f"axes.{name}": INK for name in ("edgecolor", "labelcolor")}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    style |= {"svg.fonttype": "none", "svg.hashsalt": "hf_mos", "font.family": "sans-serif"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = own_ids(drawing, prefix=hashlib.sha256(drawing.encode()).hexdigest()[:8])
    drawing = drawing.replace(INK, "currentColor")
    return drawing.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


def own_ids(drawing: str, prefix: str) -> str:
    """An SVG element whose ids are unique on the page; ids without a reference are removed."""
    used = set(re.findall(r"""(?:url\(|href=")#([^)"]+)""", drawing))
    drawing = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", drawing)
    return re.sub(r"""( id="|url\(#|href="#)""", rf"\g<1>{prefix}-", drawing)
