"""Processes that share a run: who does what, how many there are, and how their command ends."""

import contextlib
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils import workers


def of_environment(monkeypatch, **values):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@given(st.integers(1, 7), st.integers(0, 30))
def test_each_item_is_done_by_one_process(number, count):
    with pytest.MonkeyPatch.context() as patch:
        parts = []
        for rank in range(number):
            of_environment(patch, RANK=str(rank), WORLD_SIZE=str(number))
            parts += workers.own_part(range(count))
    assert sorted(parts) == list(range(count))


def test_a_process_is_alone_unless_it_has_a_rank(monkeypatch):
    of_environment(monkeypatch, WORLD_SIZE="4")  # left over in a shell
    assert (workers.rank(), workers.world_size(), list(workers.own_part("abc"))) == (0, 1, ["a", "b", "c"])
    of_environment(monkeypatch, RANK="one", WORLD_SIZE="4")
    with pytest.raises(ValueError, match="the environment variable RANK is 'one': expected a whole number"):
        workers.rank()
    for size in ({}, {"WORLD_SIZE": "3"}):
        of_environment(monkeypatch, RANK="3", **size)
        with pytest.raises(ValueError, match=r"RANK is 3 and WORLD_SIZE is (None|3): expected a larger WORLD_SIZE"):
            workers.rank()


def test_gpus_are_dealt_out_unless_one_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    of_environment(monkeypatch, RANK="7", WORLD_SIZE="8", LOCAL_RANK="3")
    devices = {"cuda": "cuda:1", "cuda:0": "cuda:0", "cpu": "cpu"}
    assert {text: str(workers.own_device(torch.device(text))) for text in devices} == devices


def test_small_networks_have_a_copy_per_core_as_far_as_there_are_items_and_memory(monkeypatch):
    of_environment(monkeypatch)
    monkeypatch.setattr(workers, "num_cores", lambda: 8)
    monkeypatch.setattr(workers, "free_memory", lambda: 5.5e9)
    numbers = [workers.default_number(*case) for case in [(True, 130), (True, 3), (True, 0), (False, 130)]]
    assert numbers == [6, 3, 1, 1] and workers.default_number(True, 130, 1e9) == 3
    of_environment(monkeypatch, RANK="0")
    assert workers.default_number(True, 130) == 1


def test_cores_and_memory_respect_the_control_group(monkeypatch):
    limits = {
        "cpu.max": "150000 100000",
        "memory.max": "3000",
        "memory.current": "1000",
        "memory.stat": "inactive_file 300\nslab 9",
    }
    monkeypatch.setattr(workers, "_control_group", limits.get)
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert workers.num_cores() == 2 and workers.free_memory() == 2300
    limits |= {"cpu.max": "max 100000", "memory.max": "max"}
    assert workers.num_cores() == 16 and workers.free_memory() > 1e6


SCRIPT = """
import os, sys, time
rank = os.environ["RANK"]
print(rank, os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"], *sys.argv[1:], flush=True)
if rank == "1":
    exec(sys.argv[1])
"""


def run(tmp_path, monkeypatch, end, capfd):
    """How a command with three copies ends, whose second does `end`; and what they print."""
    of_environment(monkeypatch)
    (script := tmp_path / "a script.py").write_text(SCRIPT)
    code = 0
    try:
        workers.run_copies(str(script), [end], 3, contextlib.nullcontext(lambda: None))
    except SystemExit as error:
        code = error.code
    out, errors = capfd.readouterr()
    assert sorted(out.splitlines()) == [f"{rank} 3 {rank} {end}" for rank in range(3)]
    return code, errors


@pytest.mark.parametrize(("end", "code"), [("pass", 0), ("sys.exit(2)", 2), ("os.kill(os.getpid(), 9)", 137)])
def test_the_exit_code_is_the_worst_of_the_copies(tmp_path, monkeypatch, capfd, end, code):
    errors = "a worker was ended by SIGKILL: the same command continues\n" if code == 137 else ""
    assert run(tmp_path, monkeypatch, end, capfd) == (code, errors)


def test_a_copy_that_fails_leaves_the_others_alone(tmp_path, monkeypatch, capfd):
    code, errors = run(tmp_path, monkeypatch, "raise KeyError('mine')", capfd)
    assert code == 1 and errors.count("Traceback") == 1 and "KeyError: 'mine'" in errors


def test_one_is_enough_for_one_and_a_copy_starts_no_more(monkeypatch):
    of_environment(monkeypatch, RANK="0", WORLD_SIZE="2")
    for number in (0, 1, 5):
        workers.run_copies("no script", [], number, None)
    assert not workers.is_copy() and "utils.copies" not in sys.modules
