"""Figures: arrays in, a matplotlib Figure out. Nothing else in the project knows matplotlib."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure

from utils.runs import replacing

STYLE = Path(__file__).with_name("figures.mplstyle")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in the project's style, sizes in inches; it belongs to no window and needs no closing."""
    with style.context(STYLE):
        return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    """Write the figure to `path` (png), whole or not at all."""
    with style.context(STYLE), replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def accuracy_map_figure(accuracies: np.ndarray, frequencies: Sequence[int], title: str) -> Figure:
    """The map of test accuracy over frequencies, as published: DC in the middle, 50–100 %; gaps stay grey.

    Args:
        accuracies: percent, (k, k), rows k_y and columns k_x in the order of `frequencies`; nan where not measured.
        frequencies: the k frequencies of both axes, in cycles per image, evenly spaced.
        title: above the map.
    """
    with style.context(STYLE):
        figure = new_figure(4.6, 3.9)
        axes = figure.add_subplot()
        half = (frequencies[1] - frequencies[0]) / 2
        edges = (frequencies[0] - half, frequencies[-1] + half)
        axes.set_facecolor("0.85")
        image = axes.imshow(accuracies, vmin=50, vmax=100, origin="lower", extent=(*edges, *edges))
        axes.set(xlabel="horizontal frequency (cycles per image)", ylabel="vertical frequency (cycles per image)")
        axes.set_title(title)
        axes.set_xticks(frequencies[::4])
        axes.set_yticks(frequencies[::4])
        figure.colorbar(image, label="test accuracy (%)", extend="min")
    return figure


def curve_figure(
    x: np.ndarray, curves: dict[str, np.ndarray], *, xlabel: str, ylabel: str, title: str,
    spread: dict[str, np.ndarray] | None = None, logy: bool = False,
) -> Figure:  # fmt: skip
    """Curves over a common x, shapes (k,), each with its label; a band of ± spread where one is given."""
    with style.context(STYLE):
        figure = new_figure(5.2, 3.4)
        axes = figure.add_subplot()
        for label, y in curves.items():
            (line,) = axes.plot(x, y, label=label, marker="o" if len(x) < 40 else "", markersize=3)
            if spread is not None and label in spread:
                low, high = y - spread[label], y + spread[label]
                axes.fill_between(x, low, high, color=line.get_color(), alpha=0.25, linewidth=0)
        if logy:
            axes.set_yscale("log")
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_title(title)
        if len(curves) > 1:
            axes.legend()
    return figure


def scatter_figure(x: np.ndarray, y: np.ndarray, *, xlabel: str, ylabel: str, title: str) -> Figure:
    """Two measurements of the same things against each other, shapes (k,), with the line of equality."""
    with style.context(STYLE):
        figure = new_figure(3.8, 3.7)
        axes = figure.add_subplot()
        ends = (min(x.min(), y.min()), max(x.max(), y.max()))
        axes.plot(ends, ends, color="0.7", linewidth=1, zorder=0)
        axes.scatter(x, y, s=12, alpha=0.7)
        axes.set(xlabel=xlabel, ylabel=ylabel, aspect="equal")
        axes.set_title(title)
    return figure
