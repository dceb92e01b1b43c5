"""What happens to the three scripts when processes die: nothing lost, nobody left, and in the end the same numbers."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import rows, start_script, wait_until
from tests.tiny_images import write_folder

COMMANDS = {
    "directional_bias": "--arch logreg --image-size 8 --num-train 600 --num-test 200 --epochs 32 --seeds 3",
    "nad_computation": "--arch lenet --num-networks 60",
    "poison_cifar": "--arch lenet --nad-index 0:6 --epochs 6 --data images",
}
RESULTS = {"directional_bias": "accuracies.csv", "nad_computation": "LeNet_NADs.npy", "poison_cifar": "accuracies.csv"}
# A process group of its own, all of which Ctrl-C reaches, as for a command on a terminal.
GROUP = "import os, signal, sys; os.setpgrp(); signal.signal(signal.SIGINT, signal.SIG_DFL); "
ON_A_TERMINAL = ["-c", GROUP + "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with images, and in it what each script gives with one process to which nothing happens."""
    folder = tmp_path_factory.mktemp("a folder")  # with a blank in its name
    write_folder(folder / "images", train=40, test=40)
    for script in COMMANDS:
        finish(folder, script, f"{script}-whole", "--workers", 1)
    return folder


def start(folder, script, output, *options, launcher=()):
    """The script with two workers, unless the options say otherwise."""
    options = [*COMMANDS[script].split(), "--device", "cpu", "--workers", 2, "--output", output, *options]
    return start_script(script, *options, folder=folder, launcher=launcher)


def finish(folder, script, output, *options):
    """Run the command to its end, which is a good one."""
    with start(folder, script, output, *options) as process:
        out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return out


def descendants(process):
    """The process numbers of the workers that a command has started."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def alive(process):
    """Whether a process of this number runs; one that has ended may wait for its parent to look."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def same(folder, script, output):
    """Whether a run ended with the numbers of the whole one: rows to the digit, NADs to rounding."""
    one, other = (folder / name / RESULTS[script] for name in (output, f"{script}-whole"))
    if one.suffix == ".csv":
        return rows(one) == rows(other)
    values = [np.load(path.with_name("LeNet_eigenvals.npy")) for path in (one, other)]
    return np.allclose(*values, rtol=1e-6) and np.allclose(np.load(one)[:5], np.load(other)[:5], atol=1e-5)


def said(errors):
    """The lines on stderr that are no progress bars."""
    lines = [line.rpartition("\r")[2] for line in errors.splitlines()]
    return [line for line in lines if line.strip() and not re.search(r"(s/it|it/s|\?it)", line)]


@pytest.mark.parametrize("script", COMMANDS)
def test_a_worker_that_dies_is_one_line_leaves_the_others_alone_and_the_run_continues(folder, script):
    output = f"{script}-worker"
    with start(folder, script, output) as process:
        wait_until(lambda: len(descendants(process)) == 2, process)
        os.kill(descendants(process)[-1], signal.SIGKILL)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 137 and said(errors) == ["a worker was ended by SIGKILL: the same command continues"]
    finish(folder, script, output, "--workers", 3)
    assert same(folder, script, output)


@pytest.mark.parametrize("script", COMMANDS)
def test_runs_killed_at_random_moments_end_with_the_same_numbers_and_leave_nobody(folder, script):
    output, moments = f"{script}-killed", random.Random(script)
    for _ in range(3):
        with start(folder, script, output) as process:
            wait_until(lambda: len(descendants(process)) == 2, process)
            workers = descendants(process)
            time.sleep(moments.uniform(0, 5))
            process.send_signal(signal.SIGKILL)
            process.communicate()
        wait_until(lambda workers=workers: not any(map(alive, workers)), seconds=2)
    finish(folder, script, output)
    assert same(folder, script, output)


def test_a_worker_ends_if_its_command_is_gone_before_it_began(folder):
    code = "from utils.copies import be_copy; be_copy()"
    command = [sys.executable, "-c", code, "1", str(folder / "nothing.py")]  # its parent is not process 1
    (folder / "nothing.py").write_text("import time; time.sleep(60)")
    assert subprocess.run(command, cwd=Path(__file__).parents[1], timeout=30, check=False).returncode == 1


def test_an_error_is_one_line_and_code_2(folder):
    with start(folder, "directional_bias", "diverged", "--max-lr", "1e38", "--clip-norm", "1e30") as process:
        out, errors = process.communicate(timeout=300)
    (message,) = said(errors)
    assert process.returncode == 2 and message.endswith("finite loss: try a smaller --max-lr than 1e+38")
    assert "2 workers" in out and "30 of 30 trainings diverged" in out


def test_ctrl_c_is_one_line_at_once_and_leaves_nobody(folder):
    process = start(folder, "directional_bias", "interrupted", "--seeds", 4000, launcher=ON_A_TERMINAL)
    with process:
        wait_until(lambda: any((folder / "interrupted").glob("items/*.json")), process)
        workers = descendants(process)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=5)
    assert process.returncode == 130 and said(errors) == ["stopped: the same command continues"]
    assert len(workers) == 2 and not any(map(alive, workers))
