"""What the tests of the scripts share."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def refusal(capsys, main, *argv):
    """The one line on stderr, besides progress bars, with which a command ends with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in argv])
    lines = capsys.readouterr().err.split("\n")
    messages = [line for line in lines if re.match(r"\S+: error: ", line)]
    assert exit_.value.code == 2 and len(messages) == 1, lines
    assert all("\r" in line or not line or line == messages[0] for line in lines), lines
    return messages[0]


def rows(path):
    """The rows of a CSV file, or of the one in a run's folder, without their timings, as text."""
    path = Path(path) / "accuracies.csv" if Path(path).is_dir() else path
    with open(path, newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def start_script(script, *options, folder, launcher=()):
    """A script as a process of its own in a folder: its name, like directional_bias, and its options."""
    command = [sys.executable, *launcher, str(ROOT / f"{script}.py"), *map(str, options)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, text=True, **pipes, env=os.environ | {"PYTHONUNBUFFERED": "1"})
