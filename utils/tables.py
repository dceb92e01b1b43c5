"""CSV tables: of a run, of somebody else; means and spreads."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.files import replacing

# The columns of the paper's authors, in dft_accuracies.csv and nads.csv, by their names here.
AUTHORS_COLUMNS = {"frequency_y": "y", "frequency_x": "x", "nad_index": "index"}
AUTHORS_COLUMNS |= dict(logreg="acc_lr", lenet="acc_ln", vgg11="acc_vgg", resnet18="acc_rn", densenet121="acc_dn")


def mean_and_spread(rows: list[dict[str, str]], keys: Sequence[str], column: str = "test_accuracy") -> dict[tuple, Any]:
    """An accuracy by `keys`, of rows that did not diverge: (mean, standard deviation or nan, number) of each key."""
    values: dict[tuple[int, ...], list[float]] = {}
    for row in rows:
        if math.isfinite(accuracy := float(row[column])):
            values.setdefault(tuple(int(row[key]) for key in keys), []).append(accuracy)
    return {
        key: (float(np.mean(group)), float(np.std(group, ddof=1)) if len(group) > 1 else math.nan, len(group))
        for key, group in values.items()
    }


def means(rows: list[dict[str, str]], keys: Sequence[str]) -> dict[tuple[int, ...], float]:
    """The mean test accuracy by `keys`, of rows that did not diverge."""
    return {index: mean for index, (mean, _, _) in mean_and_spread(rows, keys).items()}


def read_published(path: Path, keys: Sequence[str], column: str) -> list[tuple[tuple[int, ...], float]]:
    """The numbers in a column of somebody's CSV file that are not empty, each after the keys of its row."""
    try:
        rows = published_rows(path)
        found = [(tuple(int(row[key]) for key in keys), float(row[column])) for row in rows if row[column]]
        if not found:
            raise ValueError("it has none")
        return found
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        columns, reason = ", ".join((*keys, column)), f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not a CSV file with numbers in columns {columns} ({reason})") from None


def published_rows(path: Path) -> list[dict[str, str]]:
    """The rows of somebody's CSV file; the authors' with the columns here, and frequencies for their cells 0 to 15."""
    rows = list(csv.DictReader(path.read_text().splitlines()))
    for row in rows:
        for ours, theirs in AUTHORS_COLUMNS.items():
            if theirs in row and ours not in row:
                row[ours] = str(2 * int(row[theirs]) - 16) if theirs in ("x", "y") else row[theirs]
    return rows


def read_rows(path: Path, keys: Sequence[str] = ()) -> list[dict[str, str]]:
    """The finished rows of a CSV file, none if there is no file. A last line cut short by a kill does not count.

    A row with too few or too many cells, or whose columns `keys` are not whole numbers, is a ValueError.
    """
    if not path.exists():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    reader, rows = csv.DictReader(io.StringIO(whole.decode(errors="replace"))), []
    try:
        for row in reader:
            for key in keys:
                int(row[key])
            if None in row or None in row.values():
                raise ValueError
            rows.append(row)
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        line = reader.line_num + isinstance(error, csv.Error)  # raised before the line is counted
        raise ValueError(f"line {line} of {path} is damaged: delete the line, or the file to start again") from None
    return rows


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a CSV file, whole or not at all. The first row's keys are the header."""
    with replacing(path) as temporary:
        temporary.write_text(csv_text(rows, header=True))


def csv_text(rows: Sequence[dict[str, Any]], *, header: bool) -> str:
    """The text of a CSV file with these rows."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
