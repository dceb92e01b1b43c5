"""Where a run is launched: what it says of a GPU that it cannot use."""

import shutil
import sys

import pytest
import torch

from utils import distributed


def said(capsys, monkeypatch, device="cpu", *, rank=None, tool="/bin/nvidia-smi", archs=None, terminal=False):
    """What launching work on a device prints on stderr, on a machine with a GPU; `archs` if torch can start it."""
    monkeypatch.setattr(shutil, "which", {"nvidia-smi": tool}.get)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: archs is not None)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: archs)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(distributed, "_be_rank", lambda *_: None)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    distributed.launch(lambda: None, device=torch.device(device))
    return capsys.readouterr().err


@pytest.mark.parametrize(("device", "archs"), [("cpu", None), ("cuda", ["sm_75", "sm_90"]), ("cuda:0", ["sm_87"])])
def test_a_gpu_that_torch_cannot_use_is_one_line_on_what_to_do_and_red_on_a_terminal(
    capsys, monkeypatch, device, archs
):
    text = said(capsys, monkeypatch, device, archs=archs)
    what_to_do = "update its driver, or install another torch (README)"
    assert text == f"torch {torch.__version__} cannot use this GPU: {what_to_do}\n"
    assert said(capsys, monkeypatch, device, archs=archs, terminal=True) == f"\033[31m{text[:-1]}\033[0m\n"


@pytest.mark.parametrize(
    ("device", "options"),
    [
        ("cuda", {"archs": ["sm_75", "sm_80"]}),  # its kernels run on 8.6
        ("cpu", {"archs": []}),  # by choice
        ("cpu", {"rank": "1"}),
    ],
)
def test_a_gpu_that_is_used_or_not_wanted_is_passed_over_and_so_is_what_rank_0_says(
    capsys, monkeypatch, device, options
):
    assert said(capsys, monkeypatch, device, **options) == ""


def test_no_more_ranks_are_started_than_there_is_work_for(monkeypatch):
    monkeypatch.setattr(distributed.mp, "spawn", lambda *_, nprocs, **__: started.append(nprocs))
    monkeypatch.setattr(distributed, "num_cores", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: started.append(f"{number} threads"))
    started = []
    for small, items in [(True, None), (True, 9), (True, 3), (True, 1), (False, 9)]:
        distributed.launch(lambda: None, device=torch.device("cpu"), small=small, items=items)
    assert started == [4, 4, 3, "1 threads", "4 threads"]


def test_rank_0_says_it_for_all(capsys, monkeypatch):
    assert "cannot use this GPU" in said(capsys, monkeypatch, rank="0")


@pytest.mark.skipif(distributed.Path("/proc/driver/nvidia").exists(), reason="needs a machine without a GPU")
def test_a_machine_without_a_gpu_is_passed_over(capsys, monkeypatch):
    assert said(capsys, monkeypatch, tool=None) == ""
