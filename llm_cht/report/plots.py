"""The pictures of a run that follow its steps: learning, learning rate, density, exploration, moved links, cost.

Each function takes records of ``metrics.jsonl`` (in order of step) and returns one SVG. Rejected: a plotting library
with JavaScript (megabytes in every page, nothing on paper), and ``pyplot`` (global state in a library).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from io import StringIO
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

Records = Sequence[Mapping[str, Any]]
P = ParamSpec("P")

INK, GREY, PALE, GRID = "#20262e", "#7b838d", "#c3c9d0", "#e8ebee"
BLUE, RED, AMBER = "#1f5f8b", "#b8432f", "#d9983a"
START, END = "#b4bbc3", BLUE
ATTENTION_COLOURS = ("#123f63", "#2f7fb5", "#3aa69b", "#86b3d9")
MLP_COLOURS = ("#8c2f1b", "#d9772b", "#c9a227", "#7a5195")

WIDTH = 10.2  # inches of every figure, so that text has one size on the page
_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_SHARP = "image-rendering:crisp-edges;image-rendering:pixelated"
_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": PALE,
    "axes.grid": True,
    "axes.labelcolor": GREY,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 8,
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "llm_cht",
    "text.color": INK,
    "xtick.color": PALE,
    "xtick.labelcolor": GREY,
    "ytick.color": PALE,
    "ytick.labelcolor": GREY,
}


def drawn(draw: Callable[P, Figure]) -> Callable[P, str]:
    """Turn a function that builds a figure into one that returns its SVG, in the one style of the report.

    Text stays text and takes the font of the page; matplotlib lays it out with the wider DejaVu Sans, so it fits.
    Images may be scaled smoothly: their pixels never match those of the screen.
    """

    @wraps(draw)
    def svg(*args: P.args, **kwargs: P.kwargs) -> str:
        with mpl.rc_context(_STYLE):
            buffer = StringIO()
            draw(*args, **kwargs).savefig(buffer, format="svg", metadata={"Date": None})
        return buffer.getvalue().replace("'DejaVu Sans'", _FONTS).replace(_SHARP, "")

    return svg


def panels(rows: int, columns: int, height: float, **grid: Any) -> tuple[Figure, np.ndarray]:
    """An empty figure of the page's width, ``height`` inches high, and its axes (rows, columns)."""
    layout = ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.05, wspace=0.03, hspace=0.04)
    figure = Figure(figsize=(WIDTH, height), layout=layout)
    return figure, figure.subplots(rows, columns, squeeze=False, **grid)


def compact(value: float) -> str:
    """A number in at most four characters and a unit: 940, 12.3 k, 4.56 M, 1.2 G."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def column(records: Records, name: str) -> np.ndarray:
    """One figure of all records as fp64; nan where it is absent or null."""
    return np.array([np.nan if record.get(name) is None else record[name] for record in records], dtype=float)


def kind_of(layer: str) -> str:
    """Kind of a layer, by the last part of its name: ``model.layers.0.self_attn.q_proj`` is a ``q``.

    GPT-2 calls two kinds ``c_proj``: of ``attn`` and of ``mlp``.
    """
    *_, above, last = ["", *layer.split(".")]
    return f"{above}.{last}" if last == "c_proj" else last.removesuffix("_proj")


_ATTENTION = ("out", "query", "key", "value", "attn", "c_attn")


def kind_colours(kinds: Sequence[str]) -> dict[str, str]:
    """A colour per kind: cool ones for attention (q, k, v, o ...), warm ones for the rest."""
    attention = [kind for kind in kinds if len(kind) == 1 or kind.startswith(_ATTENTION)]
    rest = [kind for kind in kinds if kind not in attention]
    colours = {kind: ATTENTION_COLOURS[i % len(ATTENTION_COLOURS)] for i, kind in enumerate(attention)}
    return colours | {kind: MLP_COLOURS[i % len(MLP_COLOURS)] for i, kind in enumerate(rest)}


def share_axis(axis: Any) -> None:
    """Label an axis of fractions in percent."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))


def _steps(ax: Axes, title: str, ylabel: str) -> None:
    ax.set_title(title)
    ax.set_ylabel(ylabel)
    ax.set_xlabel("optimizer step")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.margins(x=0.015)


def _mark_end(ax: Axes, topology: Records) -> None:
    """A dotted line where the topology stops to change."""
    if topology:
        ax.axvline(topology[-1]["step"], color=GREY, linewidth=0.9, linestyle=(0, (1, 2.5)), zorder=1)


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over a centred window, narrowed at the start, cut at the end; non-finite values are left out."""
    good = np.isfinite(values)
    sums = np.concatenate([[0], np.cumsum(np.where(good, values, 0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    index = np.arange(len(values))
    reach = np.minimum(window // 2, index)
    low, high = index - reach, np.minimum(index + reach + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])


@drawn
def learning(train: Records, validation: Records, topology: Records, unigram: float | None) -> Figure:
    """Training loss; validation perplexity on a logarithmic axis beside that of a unigram model; BLEU where it is."""
    translated = any("bleu" in record for record in validation)
    figure, axes = panels(1, 3 if translated else 2, 3.1)
    left, right = axes[0, :2]
    steps, loss = column(train, "step"), column(train, "loss")
    smooth = _smooth(loss, max(5, len(loss) // 40))
    left.plot(steps, loss, color=PALE, linewidth=0.9, label="each record")
    left.plot(steps, smooth, color=BLUE, label="moving mean")
    _steps(left, "Training loss", "nats per token")
    left.legend(loc="upper right")
    perplexity = column(validation, "perplexity")
    right.set_yscale("log")
    right.set_ylim(*_log_limits([*perplexity, np.nan if unigram is None else unigram]))
    right.plot(column(validation, "step"), perplexity, color=BLUE, marker="o", markersize=3.5)
    if unigram is not None:
        right.axhline(unigram, color=RED, linewidth=1.1, linestyle=(0, (5, 3)))
        right.annotate(
            f"unigram model {unigram:,.4g}",
            (1, unigram),
            (-2, 3),
            xycoords=right.get_yaxis_transform(),
            textcoords="offset points",
            ha="right",
            color=RED,
        )
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    right.yaxis.set_minor_locator(NullLocator())
    right.yaxis.set_minor_formatter(NullFormatter())
    _steps(right, "Validation perplexity", "perplexity (log scale)")
    if translated:
        last = axes[0, 2]
        scores = column(validation, "bleu")
        last.plot(column(validation, "step"), scores, color=BLUE, marker="o", markersize=3.5)
        last.set_ylim(0, max(1.0, 1.15 * np.nanmax(scores)))
        _steps(last, "BLEU of validation sentences", "BLEU")
    for ax in axes[0]:
        ax.set_xlim(left.get_xlim())
        _mark_end(ax, topology)
    return figure


def _log_limits(values: Sequence[float]) -> tuple[float, float]:
    """Limits that leave room around the finite values, and at least a factor of 3 between them."""
    finite = [value for value in values if np.isfinite(value)] or [1.0]
    low, high = min(finite) / 1.15, max(finite) * 1.4
    spread = max(1.0, np.sqrt(3 * low / high))
    return low / spread, high * spread


@drawn
def learning_rate(train: Records, topology: Records) -> Figure:
    """The learning rate of the run, and a close view of three re-warm-ups in its middle (if there are updates)."""
    updates = column(topology, "step")
    steps, lr = column(train, "step"), column(train, "lr")
    base = lr / column(train, "rewarm")
    figure, axes = panels(1, 2 if len(updates) else 1, 2.8, width_ratios=[3, 2] if len(updates) else [1])
    whole = axes[0, 0]
    if len(updates):
        whole.plot(steps, base, color=AMBER, linewidth=1.1, label="without re-warm-up")
    whole.plot(steps, lr, color=BLUE, linewidth=1.0, label="learning rate")
    _steps(whole, "The whole run", "learning rate")
    if len(updates):
        whole.legend(loc="upper right")
        close = axes[0, 1]
        first = max(0, len(updates) // 2 - 1)
        shown = updates[first : first + 3]
        interval = float(np.median(np.diff(updates))) if len(updates) > 1 else updates[0]
        low, high = shown[0] - 0.3 * interval, shown[-1] + interval
        inside = (steps >= low) & (steps <= high)
        for update in shown:
            close.axvline(update, color=RED, linewidth=1.2, linestyle=(0, (1, 2)), zorder=3)
        close.plot(steps[inside], base[inside], color=AMBER, linewidth=1.1)
        close.plot(steps[inside], lr[inside], color=BLUE, marker="o", markersize=3)
        _steps(close, "Close view of the re-warm-ups", "learning rate")
        close.set_xlim(low, high)
        whole.axvspan(low, high, color=GRID, zorder=0)
        close.set_ylim(bottom=0)
    whole.set_ylim(bottom=0)
    for ax in axes[0]:
        ax.ticklabel_format(axis="y", style="plain")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    return figure


@drawn
def density(train: Records, topology: Records) -> Figure:
    """Density of the sparse layers after each step and its average so far; sparsity on the right-hand axis."""
    figure, axes = panels(1, 1, 2.6)
    ax = axes[0, 0]
    steps = column(train, "step")
    ax.plot(steps, column(train, "average_density"), color=AMBER, linestyle=(0, (5, 3)), label="average so far")
    ax.plot(steps, column(train, "density"), color=BLUE, drawstyle="steps-post", label="density")
    _steps(ax, "Density of the sparse layers", "density")
    top = np.nanmax(np.concatenate([column(train, "density"), column(train, "average_density")]))
    ax.set_ylim(0, min(1.0, 1.3 * top))
    share_axis(ax.yaxis)
    right = ax.secondary_yaxis("right", functions=(lambda value: 1 - value, lambda value: 1 - value))
    right.set_ylabel("sparsity")
    right.spines["right"].set_visible(False)
    share_axis(right.yaxis)
    ax.legend(loc="upper right", ncols=2)
    _mark_end(ax, topology)
    return figure


@drawn
def exploration(topology: Records) -> Figure:
    """ITOP, ANP and ELM overlap after each update: the whole model in black, the means of the layer kinds in colour."""
    figure, axes = panels(1, 3, 3.1)
    kinds = list(dict.fromkeys(kind_of(layer) for layer in topology[-1]["layers"]))
    colours = kind_colours(kinds)
    steps = column(topology, "step")
    titles = {"itop": "ITOP rate", "anp": "Active neurons (ANP)", "overlap": "ELM overlap"}
    labels = {"itop": "share of positions ever linked", "anp": "share of neurons", "overlap": "share of regrown links"}
    for ax, (name, title) in zip(axes[0], titles.items(), strict=True):
        if name != "anp":
            for kind in kinds:
                ax.plot(steps, _kind_mean(topology, kind, name), color=colours[kind], linewidth=1.1, label=kind)
        ax.plot(steps, column(topology, name), color=INK, linewidth=2.0, label="all layers", **_dots(steps))
        _steps(ax, title, labels[name])
        share_axis(ax.yaxis)
    active = axes[0, 1]
    active.set_ylim(min(0.95, active.get_ylim()[0]), 1.002)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles[-1:] + handles[:-1], names[-1:] + names[:-1], loc="outside lower center", ncols=len(names))
    return figure


def _kind_mean(topology: Records, kind: str, name: str) -> np.ndarray:
    """Mean of a per-layer figure over the layers of one kind, per update; nan where no layer has it."""
    means = []
    for record in topology:
        values = [layer[name] for key, layer in record["layers"].items() if kind_of(key) == kind]
        known = [value for value in values if value is not None]
        means.append(sum(known) / len(known) if known else np.nan)
    return np.array(means)


def _dots(steps: np.ndarray) -> dict[str, Any]:
    """Markers for series that are too short to be seen as lines."""
    return {"marker": "o", "markersize": 3} if len(steps) < 12 else {}


@drawn
def moved(topology: Records) -> Figure:
    """Links gained (up) and lost (down) at each update, the losses by cause."""
    figure, axes = panels(1, 1, 2.8)
    ax = axes[0, 0]
    steps = column(topology, "step")
    width = steps[-1] - steps[-2] if len(steps) > 1 else steps[0]
    edges = np.stack([steps - 0.4 * width, steps + 0.4 * width], axis=1).ravel()
    floor = np.zeros(len(steps))
    gained = column(topology, "regrown")
    ax.stairs(_gapped(gained), edges, baseline=_gapped(floor), fill=True, color=BLUE, label="regrown")
    for name, colour in (("removed", RED), ("percolated", AMBER), ("pruned", START)):
        lost = column(topology, name)
        if lost.any():
            ax.stairs(_gapped(floor - lost), edges, baseline=_gapped(floor), fill=True, color=colour, label=name)
        floor -= lost
    ax.axhline(0, color=GREY, linewidth=0.8)
    _steps(ax, "Links gained and lost at each update", "links")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(abs(value))))
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def _gapped(heights: np.ndarray) -> np.ndarray:
    """Heights of bars with a zero between each two: all bars become one path, a bar each would fill megabytes."""
    return np.stack([heights, np.zeros(len(heights))], axis=1).ravel()[:-1]


@drawn
def cost(train: Records, topology: Records) -> Figure:
    """Tokens per second, peak memory and, if there were updates, the seconds that each of them took."""
    figure, axes = panels(1, 3 if topology else 2, 2.7)
    speed, memory = axes[0, :2]
    steps, tokens = column(train, "step"), column(train, "tokens_per_second")
    speed.plot(steps, tokens, color=BLUE, linewidth=1.0)
    speed.set_ylim(0, 1.15 * np.nanmax(tokens))
    _steps(speed, "Training speed", "tokens per second")
    speed.yaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    megabytes = column(train, "peak_memory_mb")
    memory.plot(steps, megabytes / 1000, color=BLUE)
    memory.set_ylim(0, 1.15 * np.nanmax(megabytes) / 1000)
    _steps(memory, "Peak memory", "GB (1e9 bytes)")
    if topology:
        seconds = axes[0, 2]
        steps = column(topology, "step")
        seconds.plot(steps, column(topology, "seconds_update"), color=RED, linewidth=1.1, **_dots(steps))
        seconds.set_ylim(0, 1.15 * np.nanmax(column(topology, "seconds_update")))
        _steps(seconds, "Topology update", "seconds")
    return figure
