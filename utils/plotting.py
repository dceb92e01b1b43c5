"""Figures: arrays in, a matplotlib Figure out, which needs no closing. Nothing else here knows matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from scipy.cluster import hierarchy

from utils.directions import canonical_frequency, frequency_grid
from utils.files import replacing

# A decorator of what draws or saves. It begins from matplotlib's defaults, whatever a user's matplotlibrc says.
in_style = style.context(Path(__file__).with_name("figures.mplstyle"), after_reset=True)
SIGNED = "RdBu_r"
SCALES = {  # of maps, the same for all networks
    "accuracy": {"vmin": 50, "vmax": 100},  # %, in the style's own colours
    "sensitivity": {"norm": LogNorm(1 / 16, 16, clip=True), "cmap": SIGNED},  # white at 1
    "steps": {"norm": LogNorm(30, 1000), "cmap": "viridis_r"},
}
BEYOND = {"accuracy": "min", "sensitivity": "both", "steps": "neither"}  # the ends of a scale that values may pass
LABELS = {"accuracy": "test accuracy (%)", "sensitivity": "relative sensitivity"}
LABELS |= {"steps": "steps until the training loss is small"}


def plain(text: str) -> str:
    """Text that is not ours, as it stands: matplotlib takes what is between two $ for mathematics."""
    return text.replace("$", r"\$")


@in_style
def save_figure(figure: Figure, path: Path) -> None:
    """Write the figure to `path` (png), whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


@in_style
def style_colors() -> dict[str, Any]:
    """The figures' colours as #rrggbb, for what is drawn elsewhere: each scale's ends with its 256, and the lines'."""
    norm, accuracy = SCALES["sensitivity"]["norm"], SCALES["accuracy"]
    hexes = [matplotlib.colormaps[name](range(256)) for name in (SIGNED, matplotlib.rcParams["image.cmap"])]
    hexes = ["".join(map(to_hex, colors)) for colors in hexes]
    return {
        "sensitivity": {"ends": (norm.vmin, norm.vmax), "colors": hexes[0]},
        "accuracies": {"ends": (accuracy["vmin"], accuracy["vmax"]), "colors": hexes[1]},
        "lines": list(map(to_hex, matplotlib.rcParams["axes.prop_cycle"].by_key()["color"])),
    }


def map_array(values: Mapping[tuple[int, int], float], size: int, frequencies: Sequence[int]) -> np.ndarray:
    """Values by canonical frequency as an array, rows k_y and columns k_x; nan where there is none."""
    return np.array([[values.get(canonical_frequency(y, x, size), np.nan) for x in frequencies] for y in frequencies])


def draw_map(axes: Axes, values: Mapping[tuple[int, int], float], size: int, scale: str) -> AxesImage:
    """Draw values by their canonical frequency over k_y (up) and k_x, DC in the middle; cells without one stay grey."""
    coarse = frequency_grid(size)
    frequencies = coarse if all(y in coarse and x in coarse for y, x in values) else frequency_grid(size, 1)
    half = (frequencies[1] - frequencies[0]) / 2 if len(frequencies) > 1 else 1
    edges = (frequencies[0] - half, frequencies[-1] + half)
    axes.set(facecolor="0.85", xticks=(ticks := frequencies[:: max(1, len(frequencies) // 4)]), yticks=ticks)
    return axes.imshow(map_array(values, size, frequencies), origin="lower", extent=(*edges, *edges), **SCALES[scale])


@in_style
def map_figure(values: Mapping[tuple[int, int], float], size: int, title: str, *, scale: str = "accuracy") -> Figure:
    """A map of values by frequency on one of the SCALES."""
    figure = Figure(figsize=(4.9, 3.9))
    axes = figure.add_subplot(title=plain(title))
    image = draw_map(axes, values, size, scale)
    axes.set(xlabel="horizontal frequency (cycles per image)", ylabel="vertical frequency (cycles per image)")
    figure.colorbar(image, label=LABELS[scale], extend=BEYOND[scale])
    return figure


@in_style
def prediction_figure(networks: dict[str, tuple[dict, dict, dict]], size: int) -> Figure:
    """One column for each network: its predicted map, and below it the measured and the published one, if any has one.

    For each name: relative sensitivity, and the two accuracies (%), by canonical frequency.
    """
    labels = ("predicted", "measured here", "published")
    kinds = [kind for kind in range(3) if any(maps[kind] for maps in networks.values())]
    figure = Figure(figsize=(2.1 * len(networks) + 0.6, 2.2 * len(kinds) + 0.3))
    grid = figure.subplots(len(kinds), len(networks), squeeze=False)
    for axes_row, kind in zip(grid, kinds, strict=True):
        scale = "accuracy" if kind else "sensitivity"
        for axes, maps in zip(axes_row, networks.values(), strict=True):
            image = draw_map(axes, maps[kind], size, scale)
            axes.set(xticks=[], yticks=[])
        axes_row[0].set_ylabel(labels[kind])
        figure.colorbar(image, ax=axes_row.tolist(), label=LABELS[scale])
    for axes, name in zip(grid[0], networks, strict=True):
        axes.set_title(plain(name).replace(" without", "\nwithout"))
    return figure


@in_style
def sheet_figure(maps: np.ndarray, names: Sequence[str], links: np.ndarray) -> Figure:
    """Maps of relative sensitivity (n, 16, 16) beside scipy's dendrogram of them, in its order and with its colours."""
    columns, rows = 8, -(-len(maps) // 8)
    figure = Figure(figsize=(13.0, 1.1 * rows + 1.0))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 3.2))
    axes = left.add_subplot()
    options = {"leaf_font_size": 7, "color_threshold": links[-6:, 2].min()}  # six groups of one colour each
    tree = hierarchy.dendrogram(links, orientation="left", labels=list(names), ax=axes, **options)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    grid = right.subplots(rows, columns)
    for panel in grid.flat:
        panel.set_axis_off()
    for panel, leaf, color in zip(grid.flat, tree["leaves"], tree["leaves_color_list"], strict=False):
        image = panel.imshow(maps[leaf], origin="lower", **SCALES["sensitivity"])
        panel.set_title(names[leaf], fontsize=7, color=color, pad=2)
    label = "relative sensitivity (1: to a random direction)"
    right.colorbar(image, ax=grid, location="bottom", shrink=0.5, aspect=40, label=label, extend="both")
    return figure


@in_style
def curve_figure(
    x: np.ndarray, curves: dict[str, np.ndarray], *, title: str, spread: np.ndarray | None = None, **labels: Any
) -> Figure:
    """Curves over a common x, shapes (k,), each with its label; a band of ± spread, (k,), if one is given.

    `labels` are those of matplotlib's `Axes.set`.
    """
    figure = Figure(figsize=(5.2, 3.4))
    axes = figure.add_subplot(title=plain(title), **labels)
    axes.xaxis.get_major_locator().set_params(integer=True)  # x counts epochs, or NADs
    for label, y in curves.items():
        (line,) = axes.plot(x, y, label=plain(label), marker="o" if len(x) < 40 else "", markersize=3)
        if spread is not None:
            axes.fill_between(x, y - spread, y + spread, color=line.get_color(), alpha=0.25, linewidth=0)
    if len(curves) > 1:
        axes.legend()
    return figure


@in_style
def scatters_figure(panels: Mapping[str, tuple[np.ndarray, np.ndarray]], **labels: Any) -> Figure:
    """Two measurements of the same things (k,), a panel for each title; on linear scales with the line of equality."""
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(9.0, 2.3 * rows) if columns > 1 else (3.8, 3.7))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False, subplot_kw=labels)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, (x, y)) in zip(grid.flat, panels.items(), strict=False):
        if axes.get_xscale() == "linear":
            ends = (min(x.min(), y.min()), max(x.max(), y.max()))
            axes.plot(ends, ends, color="0.7", linewidth=1, zorder=0)
            axes.set_aspect("equal")
        axes.scatter(x, y, s=11, alpha=0.7)
        axes.set_title(plain(title))
        axes.label_outer()
    return figure


@in_style
def image_rows_figure(rows: dict[str, np.ndarray], titles: Sequence[str]) -> Figure:
    """Rows of images, each (k, 3, H, W) in [0, 1] (clipped for display), with a title over each column."""
    figure = Figure(figsize=(0.95 * len(titles) + 0.8, 1.05 * len(rows) + 0.3))
    grid = figure.subplots(len(rows), len(titles), squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for axes_row, (label, images) in zip(grid, rows.items(), strict=True):
        axes_row[0].set_ylabel(label.replace(", ", ",\n"))
        for axes, image in zip(axes_row, images, strict=True):
            axes.imshow(image.transpose(1, 2, 0).clip(0, 1))
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(plain(title))
    return figure


@in_style
def nads_figure(
    directions: dict[str, np.ndarray], spectra: dict[str, np.ndarray] | None = None, indices: Sequence[int] = range(99)
) -> Figure:
    """NADs (k, C, H, W) of each architecture, by default the first, over their Fourier energy; below, spectra (D,)."""
    k = max(len(rows) for rows in directions.values())
    heights = [1] * 2 * len(directions) + ([2.2] if spectra else [])
    figure = Figure(figsize=(1.05 * k + 0.6, 2.1 * len(directions) + (2.4 if spectra else 0)))
    grid = figure.add_gridspec(len(heights), k, height_ratios=heights)
    for group, (name, rows) in enumerate(directions.items()):
        for column, direction in enumerate(rows):
            pixels, energy = (figure.add_subplot(grid[2 * group + below, column]) for below in (0, 1))
            draw_direction(pixels, energy, direction)
            if group == 0:
                pixels.set_title(f"NAD {indices[column]}")
            if column == 0:
                pixels.set_ylabel(f"{plain(name)}\npixels")
                energy.set_ylabel("Fourier\nenergy")
    if spectra:
        axes = figure.add_subplot(grid[-1, :], yscale="log", xlabel="NAD index", ylabel="singular value")
        for name, values in spectra.items():
            axes.plot(values, label=plain(name))
        if len(spectra) > 1:
            axes.legend()
    return figure


def draw_direction(pixels: Axes, energy: Axes, direction: np.ndarray) -> None:
    """Draw a direction (C, H, W), as colours around grey, and its energy in the Fourier domain over all channels."""
    limit = np.abs(direction).max()
    if len(direction) == 3:
        pixels.imshow(0.5 + direction.transpose(1, 2, 0) / (2 * limit))
    else:
        pixels.imshow(direction.mean(0), vmin=-limit, vmax=limit, cmap=SIGNED)
    spectrum = np.square(np.abs(np.fft.fftshift(np.fft.fft2(direction), axes=(-2, -1)))).sum(0)
    energy.imshow(spectrum / spectrum.max(), vmin=0, vmax=1, origin="lower")
    for axes in (pixels, energy):
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(True)
