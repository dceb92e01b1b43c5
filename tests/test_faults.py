"""What happens to the three scripts when processes die: one line, nothing lost, and in the end the same numbers."""

import os
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import TORCHRUN, rows, start_script, wait_until
from tests.tiny_images import write_folder
from utils import distributed

COMMANDS = {
    "directional_bias": "--arch logreg --image-size 8 --num-train 600 --num-test 200 --epochs 32 --seeds 3",
    "nad_computation": "--arch lenet --num-networks 60",
    "poison_cifar": "--arch lenet --nad-index 0:6 --epochs 6 --data images",
}
# A process group of its own, all of which Ctrl-C reaches, as for a command on a terminal.
GROUP = "import os, signal, sys; os.setpgrp(); signal.signal(signal.SIGINT, signal.SIG_DFL); "
ON_A_TERMINAL = ["-c", GROUP + "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"]
RESULTS = {"directional_bias": "accuracies.csv", "nad_computation": "LeNet_NADs.npy", "poison_cifar": "accuracies.csv"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(distributed.num_cores() < 2, reason="needs 2 cores, for a rank each"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with images of two classes, and in it what each script gives when nothing happens to it."""
    folder = tmp_path_factory.mktemp("faults")
    write_folder(folder / "images", train=40, test=40)
    for script in COMMANDS:
        with start(folder, script, f"{script}-whole") as process:
            _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    return folder


def start(folder, script, output, *options, launcher=()):
    """The script with its ranks, one on each core, or those of a launcher."""
    where = "--checkpoints" if script == "nad_computation" else "--output"
    options = [*COMMANDS[script].split(), "--device", "cpu", where, output, *options]
    return start_script(script, *options, folder=folder, launcher=launcher)


def ranks_of(process):
    """The process numbers of the ranks that a script or a launcher has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes()]


def result(folder, script, output):
    """The numbers that a run ended with, without its timings."""
    path = folder / output / RESULTS[script]
    return np.load(path, allow_pickle=False).tolist() if path.suffix == ".npy" else rows(path)


def said(errors):
    """The lines on stderr that are no progress bars."""
    lines = [line.rpartition("\r")[2] for line in errors.splitlines()]
    return [line for line in lines if line.strip() and not re.search(r"(s/it|it/s|\?it)", line)]


@pytest.mark.parametrize("script", COMMANDS)
def test_a_rank_that_dies_ends_the_run_in_one_line_and_it_resumes(folder, script):
    output = f"{script}-rank"
    with start(folder, script, output) as process:
        wait_until(lambda: (folder / output / "config.json").exists(), process)
        os.kill(ranks_of(process)[-1], signal.SIGKILL)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 1 and said(errors) == ["a rank was ended by SIGKILL: the same command continues"]
    with start(folder, script, output) as process:
        assert process.wait(timeout=600) == 0
    assert result(folder, script, output) == result(folder, script, f"{script}-whole")


@pytest.mark.parametrize("script", COMMANDS)
def test_runs_killed_at_random_moments_end_with_the_same_numbers(folder, script):
    output = folder / f"{script}-killed"
    moments = random.Random(script)
    # The sums over networks are written once a minute: a test of that script's own makes it write sooner.
    for begun in ("config.json", "config.json" if script == "nad_computation" else "*.csv"):
        with start(folder, script, output.name) as process:
            wait_until(lambda begun=begun: any(output.glob(begun)), process)
            ranks = ranks_of(process)
            time.sleep(moments.uniform(0, 2))
            process.send_signal(signal.SIGKILL)
            process.communicate()
        for rank in ranks:  # they notice, and end
            wait_until(lambda rank=rank: not Path(f"/proc/{rank}").exists())
    with start(folder, script, output.name) as process:
        _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert result(folder, script, output.name) == result(folder, script, f"{script}-whole")
    assert not list(output.glob(".*.tmp"))


def test_ranks_end_with_a_torchrun_that_is_killed(folder):
    with start(folder, "directional_bias", "torchrun", "--epochs", "1000000", launcher=[*TORCHRUN, "2"]) as process:
        wait_until(lambda: (folder / "torchrun" / "config.json").exists(), process)
        ranks = ranks_of(process)
        process.kill()
        process.communicate(timeout=60)  # until nobody holds its output any longer
    assert len(ranks) == 2
    for rank in ranks:
        wait_until(lambda rank=rank: not Path(f"/proc/{rank}").exists())


def test_an_error_in_a_rank_is_one_line_and_code_2(folder):
    with start(folder, "directional_bias", "diverged", "--max-lr", "1e38", "--clip-norm", "1e30") as process:
        out, errors = process.communicate(timeout=300)
    (message,) = said(errors)
    assert process.returncode == 2 and message.endswith("finite loss: try a smaller --max-lr than 1e+38")
    assert "ranks: 2" in out and "30 of 30 trainings diverged" in out


def test_ctrl_c_is_one_line_and_leaves_no_rank(folder):
    process = start(folder, "directional_bias", "interrupted", "--seeds", 4000, launcher=ON_A_TERMINAL)
    with process:
        wait_until(lambda: (folder / "interrupted" / "accuracies.csv").exists(), process)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)  # until no rank holds its output any longer
    assert process.returncode == 130 and said(errors) == ["stopped: the same command continues"]
