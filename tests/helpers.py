"""What the tests share: how a script ends, what it leaves, its epochs, its ranks."""

import csv
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from utils import training
from utils.training import learning_rate

ROOT = Path(__file__).resolve().parents[1]
READMES = [ROOT / "README.md", ROOT / "NADs" / "README.md", *(ROOT / "results").rglob("README.md")]
READMES = {path: path.read_text(encoding="utf-8") for path in READMES}
LEFT_OUT = ("seconds", "device", "torch", "commit")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def orthonormal(dimension, seed=0):
    """Random orthonormal rows, in float64."""
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((dimension, dimension)))[0].T


class Trap:
    """What a pickle could do."""

    def __reduce__(self):
        """Fail the test that loads it."""
        return (pytest.fail, ("unpickled",))


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
    """The rows of a CSV file, or of the one in a run's folder, without their timings and origin, as text."""
    path = Path(path) / "accuracies.csv" if Path(path).is_dir() else path
    with open(path, newline="") as file:
        return [{key: value for key, value in row.items() if key not in LEFT_OUT} for row in csv.DictReader(file)]


def count_epochs(monkeypatch, *, stop=None):
    """A list that grows by the number of each epoch as it begins; the keyboard stops the one after so many."""
    begun = []

    def counting(max_lr, epoch, step, *rest):
        if step == 0 and len(begun) == stop:
            raise KeyboardInterrupt
        begun.extend([epoch] if step == 0 else [])
        return learning_rate(max_lr, epoch, step, *rest)

    monkeypatch.setattr(training, "learning_rate", counting)
    return begun


def wait_until(condition, process=None, *, seconds=300):
    """Until it holds, as it must within so many seconds and while a process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and (process is None or process.poll() is None), "it did not come to this"
        time.sleep(0.01)


def start_script(script, *options, folder, launcher=()):
    """A script as a process of its own in a folder: its name, like directional_bias, and its options."""
    command = [sys.executable, *launcher, str(ROOT / f"{script}.py"), *map(str, options)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, text=True, **pipes, env=os.environ | {"PYTHONUNBUFFERED": "1"})


def run_on_ranks(script, *options, folder, ranks=2):
    """What a script prints, on stdout and on stderr, that ends well on so many ranks of torchrun."""
    with start_script(script, *options, folder=folder, launcher=[*TORCHRUN, str(ranks)]) as process:
        out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return out, errors
