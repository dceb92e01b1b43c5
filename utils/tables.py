"""CSV tables, of a run or of somebody else, and means and spreads of their rows."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refusals import Refusal
from utils.files import replacing

# The columns of the paper's authors, in dft_accuracies.csv and nads.csv, by their names here.
AUTHORS_COLUMNS = {"frequency_y": "y", "frequency_x": "x", "nad_index": "index"}
AUTHORS_COLUMNS |= dict(logreg="acc_lr", lenet="acc_ln", vgg11="acc_vgg", resnet18="acc_rn", densenet121="acc_dn")


class Spread(NamedTuple):
    """An accuracy over several trainings."""

    mean: float
    spread: float  # standard deviation; nan for a single training
    number: int  # of trainings


def mean_and_spread(
    rows: list[dict[str, str]], keys: Sequence[str], column: str = "test_accuracy"
) -> dict[tuple[int, ...], Spread]:
    """Mean, spread and number of the values in a column, by `keys`. Trainings that diverged do not count."""
    values: dict[tuple[int, ...], list[float]] = {}
    for row in rows:
        if math.isfinite(value := float(row[column])):
            values.setdefault(tuple(int(row[key]) for key in keys), []).append(value)
    return {
        key: Spread(float(np.mean(group)), float(np.std(group, ddof=1)) if len(group) > 1 else math.nan, len(group))
        for key, group in values.items()
    }


def means(rows: list[dict[str, str]], keys: Sequence[str]) -> dict[tuple[int, ...], float]:
    """The mean test accuracy by `keys`. Trainings that diverged do not count."""
    return {index: found.mean for index, found in mean_and_spread(rows, keys).items()}


def read_published(path: Path, keys: Sequence[str], column: str) -> list[tuple[tuple[int, ...], float]]:
    """The numbers in a column of somebody's CSV file, each after the keys of its row. An empty cell is no number."""
    rows = published_rows(path)
    try:
        numbers = [(tuple(int(row[key]) for key in keys), float(row[column])) for row in rows if row[column]]
        if not numbers:
            raise ValueError("it has none")
        return numbers
    except (KeyError, ValueError) as error:
        columns, reason = ", ".join((*keys, column)), f"{type(error).__name__}: {error}"
        raise Refusal(f"{path} is not a CSV file with numbers in columns {columns} ({reason})") from None


def published_rows(path: Path) -> list[dict[str, str]]:
    """The rows of somebody's CSV file; the authors' with the columns here, and frequencies for their cells 0 to 15."""
    if not path.is_file():
        raise Refusal(f"there is no file {path}")
    rows = read_rows(path)
    for row in rows:
        for ours, theirs in AUTHORS_COLUMNS.items():
            if theirs in row and ours not in row:
                try:
                    row[ours] = str(2 * int(row[theirs]) - 16) if theirs in ("x", "y") else row[theirs]
                except ValueError:
                    raise Refusal(f"{path}: {row[theirs]!r} in column {theirs} is not a cell from 0 to 15") from None
    return rows


def read_rows(path: Path, keys: Sequence[str] = ()) -> list[dict[str, str]]:
    """The rows of a CSV file as text; none if there is no file.

    Raises:
        Refusal: with the line, if a row has too few or too many cells or its columns `keys` are not whole numbers.
    """
    if not path.exists():
        return []
    content, rows = path.read_bytes(), []
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _damaged(path, content[: error.start].count(b"\n") + 1, "it is not UTF-8") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        columns = reader.fieldnames or []
        if repeated := sorted({name for name in columns if columns.count(name) > 1}):
            raise _damaged(path, 1, f"two columns are named {repeated[0]!r}")
        for row in reader:
            if None in row or None in row.values():
                raise _damaged(path, reader.line_num, f"expected {len(columns)} cells")
            for key in keys:
                if key not in row:
                    raise _damaged(path, 1, f"there is no column {key}")
                try:
                    int(row[key])
                except ValueError:
                    raise _damaged(path, reader.line_num, f"{key} is {row[key]!r}, no whole number") from None
            rows.append(row)
    except csv.Error as error:
        raise _damaged(path, reader.line_num + 1, str(error)) from None  # raised before the line is counted
    return rows


def _damaged(path: Path, line: int, reason: str) -> Refusal:
    return Refusal(f"line {line} of {path} is damaged ({reason}): mend or delete it")


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a CSV file, whole or not at all. A row may lack a column: its cell is then empty."""
    text = io.StringIO()
    columns = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with replacing(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")
