"""The layers of a run as networks: degrees, masks as images, and a table, at the start and at the end.

Masks come as a mapping layer name -> bool (out, in). Of a layer kind all layers are pooled, because a page with every
layer of a deep model shows nothing. The end may be missing: a run that has not ended has only its start.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from llm_cht.report.plots import END, GREY, START, drawn, kind_of, panels, share_axis

Masks = Mapping[str, Tensor]

IMAGE_SIDE = 192  # cells of a mask image along its longer side
_PREFERRED = ("q", "v", "gate", "down")
_SHADES = LinearSegmentedColormap.from_list("links", ["#ffffff", "#9fc3dc", "#1f5f8b", "#0b2239"])


@dataclass(frozen=True)
class KindRow:
    """One line of the table of layer kinds; the fields of the end are None where the run has not ended."""

    kind: str
    layers: int
    shapes: tuple[tuple[int, ...], ...]  # (out, in), each once
    links_start: int
    links_end: int | None
    sparsity: float  # at the end, else at the start
    kept: float | None  # share of the first links that exist at the end
    unlinked: str  # outputs / inputs without a link, at the end, else at the start


def kinds_of(masks: Masks) -> dict[str, list[str]]:
    """The layers of each kind, kinds in the order of the model."""
    kinds: dict[str, list[str]] = {}
    for name in masks:
        kinds.setdefault(kind_of(name), []).append(name)
    return kinds


def kind_table(start: Masks, end: Masks | None) -> list[KindRow]:
    """Figures of each layer kind, its layers pooled."""
    rows = []
    for kind, layers in kinds_of(start).items():
        last = start if end is None else end
        before = sum(int(start[name].sum()) for name in layers)
        now = sum(int(last[name].sum()) for name in layers)
        kept = None if end is None else sum(int((start[name] & end[name]).sum()) for name in layers) / before
        unlinked = [sum(int((~last[name].any(dim)).sum()) for name in layers) for dim in (1, 0)]
        rows.append(
            KindRow(
                kind=kind,
                layers=len(layers),
                shapes=tuple(dict.fromkeys(tuple(start[name].shape) for name in layers)),
                links_start=before,
                links_end=None if end is None else now,
                sparsity=1 - now / sum(start[name].numel() for name in layers),
                kept=kept,
                unlinked=f"{unlinked[0]:,} / {unlinked[1]:,}",
            )
        )
    return rows


@drawn
def degrees(start: Masks, end: Masks | None, side: str) -> Figure:
    """Histograms of the links per neuron of one ``side``, ``outputs`` or ``inputs``, for each layer kind."""
    kinds = kinds_of(start)
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    figure, axes = panels(rows, columns, 0.4 + 1.75 * rows)
    for ax in axes.flat[len(kinds) :]:
        ax.set_axis_off()
    for ax, (kind, layers) in zip(axes.flat, kinds.items(), strict=False):
        dim = 1 if side == "outputs" else 0
        before = np.concatenate([start[name].sum(dim).numpy() for name in layers])
        after = None if end is None else np.concatenate([end[name].sum(dim).numpy() for name in layers])
        _histograms(ax, before, after)
        ax.set_title(f"{kind}, {side}")
    for ax in axes[:, 0]:
        ax.set_ylabel(f"share of {side}")
    for ax in axes[-1]:
        ax.set_xlabel(f"links per {side.removesuffix('s')}")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    spare = axes.flat[-1] if len(kinds) < rows * columns else None
    if spare is not None:
        spare.legend(handles, labels, loc="center left")
    else:
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def _histograms(ax: Axes, before: np.ndarray, after: np.ndarray | None) -> None:
    """Both histograms on common whole-numbered bins, in shares of all neurons."""
    both = before if after is None else np.concatenate([before, after])
    low, high = int(both.min()), int(both.max())
    width = max(1, -(-(high - low + 1) // 45))
    edges = np.arange(low, high + width + 1, width) - 0.5
    first = np.histogram(before, edges)[0] / len(before)
    ax.stairs(first, edges, fill=True, color=START, label="start")
    if after is not None:
        last = np.histogram(after, edges)[0] / len(after)
        ax.stairs(last, edges, color=END, linewidth=1.4, label="end")
        _cut(ax, first, last, edges)
    share_axis(ax.yaxis)
    ax.yaxis.set_major_locator(MaxNLocator(3))
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _cut(ax: Axes, first: np.ndarray, last: np.ndarray, edges: np.ndarray) -> None:
    """Cut a spike at the start (all neurons may have the same degree) and say how high it is, so the end is legible."""
    if first.max() <= 3 * last.max():
        return
    peak = int(first.argmax())
    ax.set_ylim(0, 2 * float(last.max()))
    text = f" to {100 * first[peak]:.0f} %"
    ax.annotate(text, (edges[peak + 1], 1), xycoords=ax.get_xaxis_transform(), va="top", color=GREY)


def pictured_layers(masks: Masks) -> list[str]:
    """At most four layers for the images: those of the middle block, of kinds that differ in what they do."""
    kinds = kinds_of(masks)
    chosen = [kind for kind in _PREFERRED if kind in kinds] or list(kinds)[:4]
    return [kinds[kind][len(kinds[kind]) // 2] for kind in chosen]


def image(mask_OI: Tensor) -> Tensor:
    """The mask as shares of existing links in at most ``IMAGE_SIDE`` by ``IMAGE_SIDE`` equal cells, fp32 (out, in)."""
    num_out, num_in = mask_OI.shape
    return adaptive_avg_pool2d(mask_OI.float()[None], (min(IMAGE_SIDE, num_out), min(IMAGE_SIDE, num_in)))[0]


@drawn
def mask_images(start: Masks, end: Masks | None) -> Figure:
    """A few masks, the start above the end, in one scale of shades per layer."""
    layers = pictured_layers(start)
    moments = {"start": start} if end is None else {"start": start, "end": end}
    figure, axes = panels(len(moments), len(layers), 0.5 + 2.45 * len(moments))
    for axes_of_layer, name in zip(axes.T, layers, strict=True):
        images = {moment: image(masks[name]) for moment, masks in moments.items()}
        top = float(torch.stack(list(images.values())).quantile(0.998))
        for ax, (moment, picture) in zip(axes_of_layer, images.items(), strict=True):
            shown = _show(ax, picture, start[name].shape, top)
            ax.set_title(f"{kind_of(name)} at the {moment}")
        bar = figure.colorbar(shown, ax=list(axes_of_layer), location="bottom", shrink=0.8, aspect=30, pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.xaxis.set_major_locator(MaxNLocator(3))
        share_axis(bar.ax.xaxis)
    for ax in axes[-1]:
        ax.set_xlabel("input")
    for ax in axes[:, 0]:
        ax.set_ylabel("output")
    return figure


def _show(ax: Axes, picture: Tensor, shape: Sequence[int], top: float) -> Any:
    num_out, num_in = shape
    for dim in (0, 1):  # cells of several pixels stay sharp when the page scales the image
        picture = picture.repeat_interleave(max(1, 2 * IMAGE_SIDE // picture.shape[dim]), dim)
    shown = ax.imshow(
        picture.numpy(),
        cmap=_SHADES,
        vmin=0,
        vmax=top,
        aspect="auto",
        interpolation="none",
        extent=(0, num_in, num_out, 0),
    )
    ax.grid(False)
    ax.set_xticks([0, num_in], ["0", f"{num_in:,}"], color=GREY)
    ax.set_yticks([0, num_out], ["0", f"{num_out:,}"], color=GREY)
    for spine in ax.spines.values():
        spine.set_visible(True)
    return shown
