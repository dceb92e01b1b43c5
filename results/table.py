"""The tables of the READMEs, from the runs in results/, the NADs in NADs/ and the published numbers.

    python results/table.py

They stand between <!-- table.py: begin NAME --> and <!-- table.py: end NAME --> in README.md, results/README.md and
NADs/README.md. rows.csv says which rows of the reproduction there are, times.csv which commands have a time. maps.png
shows the measured maps side by side.
"""

import json
import math
import os
import re
import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refusals import Refusal
from utils import cli, files, plotting, tables
from utils.directions import canonical_frequency, frequency_grid

ROOT, RESULTS = Path(__file__).resolve().parents[1], Path(__file__).resolve().parent
FREQUENCY = ("frequency_y", "frequency_x")
EXPERIMENTS = ("directional_bias", "poison_cifar", "steps")  # the folders of runs
NUMBERS = {"directional_bias": "1", "NADs": "2", "nads": "2", "poison_cifar": "3"}  # of experiments, by folder
CELLS, CURVE, EPOCHS = 81, 20, 50  # a whole map less mirror images, a whole curve's indices, CIFAR-10's epochs
TOLERANCE = {  # difference from what is published or expected, up to which a row is ✓, and up to which it is ≈
    "mean of a map": (1, 3, "points"),
    "number of a map's 256 cells": (5, 13, "cells"),
    "mean difference of two maps or curves": (2.2, 4.4, "points"),
    "accuracy on CIFAR-10": (1, 3, "points"),
    "singular value": (5, 15, "%"),
    "correlation of log variances": (0.005, 0.05, "below the expected"),
    "overlap": (0.05, 0.15, "below the expected"),
}
SYMBOLS = {"✓": "reproduced", "≈": "near", "◔": "in part", "✗": "outside", "–": "not measured yet"}
SUMMARY = {  # what is said of a map: its words, how it is computed, and the tolerance for it, if it is judged
    "mean": ("mean", np.mean, "mean of a map"),
    "min": ("lowest", np.min, ""),
    "max": ("highest", np.max, ""),
    "cells_from_90": ("cells from 90 %", lambda values: np.sum(values >= 90), "number of a map's 256 cells"),
    "cells_below_55": ("cells below 55 %", lambda values: np.sum(values < 55), "number of a map's 256 cells"),
}


class Row(NamedTuple):
    """A line of the reproduction table."""

    what: str
    published: str = ""
    here: str = ""
    verdict: str = ""  # "" where nothing is published
    number: str = "0"  # of trainings
    sources: tuple[str, ...] = ()  # runs, or files, in results/ or NADs/
    headline: bool = False  # for README.md


def verdict(differences: list[tuple[str, float]], measured: int = 1, whole: int = 1) -> str:
    """The symbol of differences (kind, size) from what is published, where `measured` of `whole` things are known."""
    if not measured:
        return "–"
    if any(size > TOLERANCE[kind][1] for kind, size in differences):
        return "✗"
    if measured < whole:
        return "◔"
    return "✓" if all(size <= TOLERANCE[kind][0] for kind, size in differences) else "≈"


def number(value: float, digits: int = 1) -> str:
    """A number as a table shows it; counts without decimals."""
    return str(value) if isinstance(value, int | np.integer) else f"{value:.{digits}f}".replace("-", "−")


def rows_of(run: str) -> list[dict[str, str]]:
    """The rows of a run, EXPERIMENT/NAME; none if there is no such run."""
    return tables.read_rows(RESULTS / run / "accuracies.csv")


def command_of(source: str) -> str:
    """The command that makes a run or a file, without what only says where it goes."""
    if source.startswith("NADs/"):
        return f"NADs_scripts/{source.removeprefix('NADs/').split('_')[0].lower()}_nad.py"
    if source.startswith("nads/"):
        return "NADs_scripts/compare.py"
    command = files.read_json(RESULTS / source / "config.json", "command")["command"]
    command = re.sub(r" --(output|published) \S+", "", command)
    return re.sub(r"( --frequency -?\d+ -?\d+)+", " --frequency …", command)


def folded(rows: list[dict[str, str]]) -> dict[tuple[int, ...], float]:
    """Accuracies by (|k_y|, |k_x|): mirror images count once."""
    return tables.means([row | {key: str(abs(int(row[key]))) for key in FREQUENCY} for row in rows], FREQUENCY)


def whole_map(rows: list[dict[str, str]]) -> dict[tuple[int, ...], float]:
    """Accuracies at the map's 256 cells: of the cell itself, or else of its mirror image, if one was trained."""
    cells, images, grid = tables.means(rows, FREQUENCY), folded(rows), product(frequency_grid(32), repeat=2)
    found = {cell: cells.get(canonical_frequency(*cell), images.get(tuple(map(abs, cell)))) for cell in grid}
    return {cell: value for cell, value in found.items() if value is not None}


def map_rows(asked: dict[str, str], known: dict) -> list[Row]:
    """A map's summary, judged if it is whole (or the ablation), and its cells one by one where they were compared."""
    kind, title, network, run = (asked[key] for key in ("items", "title", "network", "runs"))
    stated = {key: known[network, f"{kind}_{key}"] for key in SUMMARY if (network, f"{kind}_{key}") in known}
    what = f"{title}: {', '.join(SUMMARY[key][0] for key in stated)}"
    theirs = ", ".join(f"{value:.0f}" if "cells" in key else number(value) for key, value in stated.items())
    if not (rows := rows_of(run)):
        return [Row(what, theirs, verdict="–")]
    values, measured = np.array(list(whole_map(rows).values())), len(folded(rows))
    ours = {key: SUMMARY[key][1](values) for key in stated}
    judged = [(SUMMARY[key][2], abs(ours[key] - stated[key])) for key in stated if SUMMARY[key][2]]
    symbol = verdict(judged if measured == CELLS or kind != "map" else [], measured, CELLS)
    here = ", ".join(map(number, ours.values())) + ("" if measured == CELLS else f" ({measured} of {CELLS} cells)")
    lines = [Row(what, theirs, here, symbol, str(len(rows)), (run,))]
    for found in tables.read_rows(RESULTS / run / "published.csv"):
        flat, difference = found["pearson"] == "nan", float(found["mean_absolute_difference"])
        what = f"{title}, cell by cell: mean difference" + ("" if flat else "; correlation")
        theirs, here = ("0 if equal", "") if flat else ("0; 1 if equal", f"; {number(float(found['pearson']), 3)}")
        symbol = verdict([("mean difference of two maps or curves", difference)], measured, CELLS)
        lines.append(Row(what, theirs, f"{number(difference)} points{here}", symbol, str(len(rows)), (run,)))
    return lines


def nad_rows(asked: dict[str, str], known: dict) -> list[Row]:
    """The NADs of a network: their spectrum as a sample of the authors' size shows it, and their directions."""
    title, network, file = asked["title"], asked["network"], "nads/comparison.csv"
    gradients, first, last = (known[network, key] for key in ("gradients", "singular_first", "singular_last"))
    ends, source = f"{first:.4g}, {last:.4g}", f"NADs/{network}_NADs.json"
    if network == "LogReg":  # its own spectrum is that of a sample
        values = np.load(ROOT / "NADs" / "LogReg_eigenvals.npy").astype(float)
        ours = np.array([values[0], values[1022], np.sqrt(np.mean(values**2))])
        theirs = np.array([first, last, known[network, "singular_rms"]])
        symbol = verdict([("singular value", 100 * size) for size in np.abs(ours / theirs - 1)])
        shown = (", ".join(f"{value:.4g}" for value in three) for three in (theirs, ours))
        return [Row(f"{title}: first and last singular value; root mean square", *shown, symbol, "", (source,))]
    compared = [row for row in tables.read_rows(RESULTS / file) if row["b"] == f"{network}_NADs.npy"]
    plain = next(row for row in compared if row["a"] == f"NADs/{network}_NADs.npy" and not row["sampled"])
    sample = next(row for row in compared if row["a"] == plain["a"] and row["sampled"] == f"{gradients:.0f}")
    lines, scale = [], np.sqrt(9999 / (gradients - 1))  # ours are on the scale of 10,000 gradients
    for row in (sample, *(row for row in compared if row["a"].startswith("runs/"))):
        by = f"our covariance sampled {gradients:,.0f} times" if row is sample else "by the paper's protocol"
        what = f"{title}, {by}: 1,023 singular values, ratio to the published; first, last"
        low, high, *own = (float(row[key]) / scale for key in ("smallest_ratio", "largest_ratio", "first", "last"))
        here = f"{number(low, 3)} to {number(high, 3)}; {own[0]:.4g}, {own[1]:.4g}"
        symbol = verdict([("singular value", 100 * abs(ratio - 1)) for ratio in (low, high)])
        lines.append(Row(what, f"1; {ends}", here, symbol, "", (source, file) if row is sample else (file,)))
    kinds = {"log_variances": "correlation of log variances", "overlap_100": "overlap"}
    differences = [(kind, float(sample[f"expected_{key}"]) - float(plain[key])) for key, kind in kinds.items()]
    expected, here = (", ".join(row[f"{by}{key}"] for key in kinds) for row, by in ((sample, "expected_"), (plain, "")))
    others = [row for row in tables.read_rows(RESULTS / "nads" / "points.csv") if row["a"] == plain["a"]]
    for row in others:
        here += f" (ours, {row['networks']} networks at another point: {', '.join(row[key] for key in kinds)})"
    what = f"{title}: correlation of log variances along the published NADs; overlap of the first 100"
    return [*lines, Row(what, f"{expected} (expected of a sample)", here, verdict(differences), "", (source, file))]


def curve_rows(asked: dict[str, str], known: dict) -> list[Row]:
    """Accuracy along NADs: its order, and the mean difference from the published curve."""
    run, spearman = asked["runs"], known.get((asked["network"], "nads_spearman"))
    what = f"{asked['title']}: Spearman of index and accuracy; mean difference"
    theirs = "" if spearman is None else f"{number(spearman, 2)}; 0 if equal"
    if not (means := tables.means(rows_of(run), ["nad_index"])):
        return [Row(what, theirs, verdict="–" if theirs else "")]
    here, judged = number(stats.spearmanr(list(means), list(means.values()))[0], 2), []
    for found in tables.read_rows(RESULTS / run / "published.csv"):
        judged.append(("mean difference of two maps or curves", float(found["mean_absolute_difference"])))
        here += f"; {number(judged[0][1])} points"
    symbol = verdict(judged, len(means) if judged else 1, CURVE) if theirs else ""
    return [Row(what, theirs, here, symbol, str(len(rows_of(run))), (run,))]


def cifar_rows(asked: dict[str, str], known: dict) -> list[Row]:
    """Clean test accuracy on CIFAR-10 by what the images are (none, flip, poison_10), in one run or each in its own."""
    items, runs = asked["items"].split(), asked["runs"].split()
    stated = {item: known[key] for item in items if (key := (asked["network"], f"cifar_{item}")) in known}
    theirs, here, differences, trainings, found = ", ".join(f"{v:g}" for v in stated.values()), [], [], 0, {}
    for item, run in zip(items, runs * (len(items) // len(runs)), strict=True):
        key = tuple(int(index) for index in item.split("_")[1:])
        accuracy = tables.mean_and_spread(rows_of(run), ["nad_index"][: len(key)]).get(key)
        here.append(number(accuracy.mean) if accuracy else "–")
        if accuracy:
            found[item], trainings = run, trainings + accuracy.number
            differences.append(("accuracy on CIFAR-10", abs(accuracy.mean - stated.get(item, accuracy.mean))))
    # A training of fewer epochs is another experiment: its difference is not judged.
    configs = [files.read_json(RESULTS / run / "config.json", "settings")["settings"] for run in found.values()]
    short = any(config.get("epochs", EPOCHS) < EPOCHS for config in configs)
    symbol = verdict([] if short else differences, len(found), len(items) + short) if theirs else ""
    here = ", ".join(here) if found else ""
    return [Row(asked["title"], theirs, here, symbol, str(trainings), tuple(dict.fromkeys(found.values())))]


def compared_rows(asked: dict[str, str], known: dict) -> list[Row]:
    """Two runs of the same trainings, the first less the second."""
    what, runs = f"{asked['title']}: mean absolute difference; mean difference; correlation", asked["runs"].split()
    a, b = (tables.means(rows_of(run), asked["items"].split()) for run in runs)
    x, y = np.array([(a[key], b[key]) for key in a.keys() & b.keys()]).T
    shown = number(np.abs(x - y).mean()), number((x - y).mean()), number(np.corrcoef(x, y)[0, 1], 3)
    return [Row(what, "", "{} points; {}; {}".format(*shown), "", str(len(x)), tuple(runs))]


def steps_rows(asked: dict[str, str], known: dict) -> list[Row]:
    """How fast directions are learnt, and how well untrained networks and the rule of low frequencies rank that."""
    run, title = asked["runs"], asked["title"]
    steps = np.array([float(row["steps"]) for row in rows_of(run)])
    what, learnt = f"{title}: directions learnt; fewest, median and most steps", steps[np.isfinite(steps)]
    if not len(learnt):
        return [Row(what)]
    here = f"{len(learnt)} of {len(steps)}; {learnt.min():.0f}, {np.median(learnt):.0f}, {learnt.max():.0f}"
    lines = [Row(what, "", here, "", str(len(steps)), (run,))]
    for row in tables.read_rows(RESULTS / asked["items"] / "comparison.csv"):
        what = f"{title}, by {row['score']}: rank correlation with the steps; among those learnt"
        here = "; ".join(number(float(row[key]), 2) for key in ("spearman", "spearman_of_learnt"))
        lines.append(Row(what, "", here, "", str(len(steps)), (run,)))
    return lines


KINDS = {
    "steps": steps_rows,
    "map": map_rows,
    "nads": nad_rows,
    "curve": curve_rows,
    "cifar": cifar_rows,
    "compared": compared_rows,
}


def reproduction() -> dict[str, list[Row]]:
    """The rows that rows.csv asks for, by the title of their section."""
    known = tables.read_rows(RESULTS / "published.csv")
    known, sections = {(row["network"], row["quantity"]): float(row["value"]) for row in known}, {}
    for asked in tables.read_rows(RESULTS / "rows.csv"):
        for i, row in enumerate(KINDS[asked["kind"]](asked, known), 1):
            row = row._replace(headline=str(i) in asked["headline"].split())
            sections.setdefault(asked["section"], []).append(row)
    return sections


def markdown(header: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ("---",) * len(header), *lines])


def reproduction_table(sections: dict[str, list[Row]]) -> str:
    """All rows, with links from results/, and how many have each verdict."""
    header, lines = ("what", "published", "here", "", "trainings", "command", "in"), []
    for title, rows in sections.items():
        lines.append((f"**{title}**", *[""] * 6))
        for row in rows:
            commands = ", ".join(f"`{command}`" for command in dict.fromkeys(map(command_of, row.sources)))
            paths = [(ROOT if source.startswith("NADs/") else RESULTS) / source for source in row.sources]
            links = ", ".join(f"[{path.name}]({os.path.relpath(path, RESULTS)})" for path in paths)
            lines.append((*row[:5], commands, links))
    return f"{markdown(header, lines)}\n\n{verdicts_line(sections)}"


def headlines_table(sections: dict[str, list[Row]]) -> str:
    """For README.md: how many rows have each verdict, and the headlines by the number of their experiment."""
    rows = [row for rows in sections.values() for row in rows if row.headline and row.sources]
    lines = [(NUMBERS[row.sources[0].split("/")[0]], *row[:4]) for row in rows]
    return f"{verdicts_line(sections)}\n\n{markdown(('experiment', 'what', 'published', 'here', ''), lines)}"


def verdicts_line(sections: dict[str, list[Row]]) -> str:
    """How many rows have each verdict, in a sentence."""
    verdicts = [row.verdict for rows in sections.values() for row in rows if row.verdict]
    counts = ", ".join(f"{verdicts.count(symbol)} {symbol} ({meaning})" for symbol, meaning in SYMBOLS.items())
    return f"Of {len(verdicts)} rows with a published number: {counts}."


def times_table() -> str:
    """How long the commands of times.csv take on 2 CPU cores and on an H100, where a run says so."""
    lines = []
    for asked in tables.read_rows(RESULTS / "times.csv"):
        options, items = asked["h100_options"], int(asked["items"])
        workers = re.search(r"--workers (\d+)", options)
        cpu = duration(seconds_of_one(asked["cpu"], "CPU") * items / int(asked["cpu_workers"] or 1))
        h100 = duration(seconds_of_one(asked["h100"], "H100") * items / int(workers[1] if workers else 1))
        if cpu or h100:
            lines.append((f"`{asked['command']}`", cpu, h100 + (f" with `{options}`" if options and h100 else "")))
    return markdown(("command", "2 CPU cores", "H100"), lines)


def seconds_of_one(source: str, device: str) -> float:
    """The median time of a training of a run, or the mean time of a network of NADs/, on a "CPU" or an "H100"; or nan.

    Times of the workers of a run overlap.
    """
    rows = rows_of(source) if source else []
    if source.startswith("NADs/"):
        about = json.loads((ROOT / source).read_text(encoding="utf-8"))
        seconds = about.get("seconds", math.nan) / about["num_networks"]
        rows = [{"seconds": str(seconds), "device": made_with(about).get("device", "CPU")}]
    kinds = [("H100" if "H100" in row["device"] else "" if "NVIDIA" in row["device"] else "CPU") for row in rows]
    seconds = [row["seconds"] for row, kind in zip(rows, kinds, strict=True) if kind == device and row["seconds"]]
    return float(np.median([float(value) for value in seconds])) if seconds else math.nan


def duration(seconds: float) -> str:
    """A time in the largest unit of which it has one and a half, with two digits; empty if it is nan."""
    for unit, size in (("days", 86400), ("hours", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{0 if seconds >= 10 * size else 1}f} {unit}".replace(".0 ", " ")
    return "" if math.isnan(seconds) else f"{seconds:.0f} s"


def runs_table() -> str:
    """All runs, by device: their mean accuracy, the median time of a training, and the digest of accuracies.csv."""
    lines = []
    for path in sorted(path for name in EXPERIMENTS for path in RESULTS.glob(f"{name}/*/accuracies.csv")):
        rows, folder, digest = tables.read_rows(path), path.parent, files.digest(path.read_bytes())[:8]
        for device in sorted({row["device"] for row in rows}):
            own = [row for row in rows if row["device"] == device]
            seconds = [float(row["seconds"]) for row in own if row["seconds"]]
            accuracy = np.nanmean([float(row["test_accuracy"]) for row in own])
            numbers = (str(len(own)), number(accuracy, 2), f"{np.median(seconds):,.0f}" if seconds else "")
            lines.append((f"[{folder.name}]({folder.parent.name}/{folder.name})", device, *numbers, f"`{digest}`"))
    return markdown(("run", "device", "trainings", "mean test accuracy", "seconds of one, median", "rows"), lines)


def made_with(about: dict) -> dict:
    """What a JSON file of NADs/ says of the device and torch."""
    return about.get("environment") or about.get("versions") or about


def nads_table() -> str:
    """How the arrays of NADs/ were made, from the JSON files beside them."""
    lines = []
    for path in sorted((ROOT / "NADs").glob("*_NADs.json")):
        about = json.loads(path.read_text(encoding="utf-8"))
        made, halves = made_with(about), f"{about['agreement']['split_half_overlap']:.2f}"
        device, points = made.get("device", "CPU"), tables.read_rows(RESULTS / "nads" / "points.csv")
        other = [
            f"{row['overlap_100']} ({row['networks']} networks)" for row in points if row["b"] == path.stem + ".npy"
        ]
        numbers = (
            about["estimator"],
            f"{about['num_networks']:,}",
            halves,
            "".join(other),
            device,
            made.get("torch", ""),
        )
        lines.append((f"`{path.stem}.npy`", f"`NADs_scripts/{about['arch']}_nad.py`", *numbers))
    return markdown(
        ("file", "script", "estimator", "networks", "two halves", "another point", "device", "torch"), lines
    )


def filled(text: str, name: str, block: str) -> str:
    """A text with the block between its two markers."""
    begin, end = (f"<!-- table.py: {edge} {name} -->" for edge in ("begin", "end"))
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise Refusal(f"expected once, in this order: {begin} and {end}")
    return f"{text.split(begin)[0]}{begin}\n\n{block}\n\n{end}{text.split(end)[1]}"


def documents() -> dict[Path, str]:
    """The files with tables, as they should be."""
    sections = reproduction()
    rule = [(kind, *(f"{bound:g} {unit}" for bound in bounds)) for kind, (*bounds, unit) in TOLERANCE.items()]
    blocks = {
        ("README.md", "times"): times_table(),
        ("README.md", "reproduction"): headlines_table(sections),
        ("results/README.md", "reproduction"): reproduction_table(sections),
        ("results/README.md", "rule"): markdown(("difference in", "✓ up to", "≈ up to"), rule),
        ("results/README.md", "runs"): runs_table(),
        ("NADs/README.md", "nads"): nads_table(),
    }
    texts = {ROOT / name: (ROOT / name).read_text(encoding="utf-8") for name, _ in blocks}
    for (name, marker), block in blocks.items():
        texts[ROOT / name] = filled(texts[ROOT / name], marker, block)
    return texts


@cli.one_line_errors
def main() -> None:
    """Write the tables and the figure."""
    for path, text in documents().items():
        path.write_text(text, encoding="utf-8")
    runs = {"LeNet": "LeNet", "VGG-11": "VGG11-bf16", "ResNet-18": "ResNet18-bf16"}
    shown = {title: ({}, whole_map(rows_of(f"directional_bias/{run}-fourier")), {}) for title, run in runs.items()}
    plotting.save_figure(plotting.prediction_figure(shown, 32), RESULTS / "maps.png")


if __name__ == "__main__":
    main()
