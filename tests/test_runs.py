"""A run's folder: files that appear whole or not at all, rows that survive a kill, settings that must agree."""

import errno
import json
import os
import pickle
import subprocess
from argparse import Namespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import Trap
from utils import files, runs, tables

CPU = torch.device("cpu")
WRITERS = {
    "array": lambda path: files.save_array(path, np.arange(1000)),
    "json": lambda path: files.save_json(path, {"a": 1}),
    "checkpoint": lambda path: files.save_checkpoint(path, {"x": torch.ones(1000)}),
    "rows": lambda path: tables.write_rows(path, [{"a": 1}]),
}


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("before", [None, b"the old content"])
def test_a_full_disk_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch, write, call, before):
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(OSError, match="No space left"):
        write(path)
    assert [file.name for file in tmp_path.iterdir()] == ([] if before is None else ["file"])
    assert before is None or path.read_bytes() == before


# --- The folder


def enter(folder, settings=None):
    """Open and close a run."""
    with runs.open_run(folder, settings or {}, CPU):
        return json.loads((folder / "config.json").read_text())


def test_a_new_run_keeps_its_settings_the_commit_the_versions_and_the_devices_name(tmp_path, monkeypatch):
    config = enter(tmp_path / "a" / "b", {"sigma": 3.0, "arch": "lenet"})
    assert config["settings"] == {"sigma": 3.0, "arch": "lenet"}
    found = config["environment"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=runs.__file__[:-8])
    assert (found["commit"] or "").removesuffix("-dirty") == head.stdout.strip()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runs.environment(CPU)["commit"] is None  # a machine without git
    assert found["torch"] == torch.__version__ and found["device"] == runs.device_name(CPU) and found["device"]
    assert found.keys() >= {"python", "numpy", "torchvision", "threads", "ranks", "command"}


def test_every_argument_counts_among_the_settings_unless_it_is_named():
    args = {"sigma": 3.0, "arch": "LeNet", "device": torch.device("cuda", 1), "output": "here", "published": None}
    args |= {"seeds": 4, "a_new_one": 7}
    expected = {"sigma": 3.0, "arch": "lenet", "device": "cuda", "a_new_one": 7, "nads": "1f"}
    assert runs.settings(Namespace(**args), "seeds", arch="lenet", nads="1f") == expected


def test_the_same_settings_open_the_run_again(tmp_path):
    for _ in range(2):  # a tuple comes back from JSON as a list, and a path as text
        enter(tmp_path, {"sigma": 0.1, "sizes": (1, 2), "name": None, "data": tmp_path})


def test_other_settings_are_refused_naming_each_that_differs(tmp_path):
    enter(tmp_path, {"sigma": 3.0, "arch": "lenet", "old": 1})
    content = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ValueError, match="other settings") as error:
        enter(tmp_path, {"sigma": 1.0, "arch": "lenet", "new": 2})
    message = str(error.value)
    assert "(new was None, now 2; old was 1, now None; sigma was 3.0, now 1.0)" in message
    assert message.startswith(str(tmp_path)) and "\n" not in message
    assert (tmp_path / "config.json").read_bytes() == content


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null"])
def test_a_broken_configuration_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    message = r"^\S*config.json cannot be read: choose another folder$"
    with pytest.raises(ValueError, match=message):
        enter(tmp_path)


def test_a_run_is_open_once_at_a_time(tmp_path):
    with runs.open_run(tmp_path, {}, CPU), pytest.raises(ValueError, match="is in use by another process"):
        enter(tmp_path)
    enter(tmp_path)


# --- Published numbers


def test_the_authors_own_files_are_read_as_they_are(tmp_path):
    (path := tmp_path / "dft_accuracies.csv").write_text("x,y,acc_lr,acc_ln,acc_vgg\n0,15,100,50.5,\n8,8,100,80,60\n")
    keys = ("frequency_y", "frequency_x")
    assert tables.read_published(path, keys, "lenet") == [((14, -16), 50.5), ((0, 0), 80.0)]
    assert tables.read_published(path, keys, "vgg11") == [((0, 0), 60.0)]
    with pytest.raises(ValueError, match="numbers in columns frequency_y, frequency_x, resnet18"):
        tables.read_published(path, keys, "resnet18")
    (path := tmp_path / "nads.csv").write_text("index,acc_ln,eig_ln,acc_dn\n3,97.5,0.1,\n7,,0.05,60\n")
    assert tables.read_published(path, ("nad_index",), "lenet") == [((3,), 97.5)]
    assert tables.read_published(path, ("nad_index",), "densenet121") == [((7,), 60.0)]


def test_a_row_of_other_columns_is_not_added_to_a_table(tmp_path):
    runs.append_row(tmp_path / "table.csv", {"a": 1, "b": 2})
    before = (tmp_path / "table.csv").read_bytes()
    with pytest.raises(ValueError, match=r"table.csv has other columns than a, c: name another file"):
        runs.append_row(tmp_path / "table.csv", {"a": 3, "c": 4})
    assert (tmp_path / "table.csv").read_bytes() == before


# --- Items


def do(folder, items, work):
    with runs.open_run(folder, {}, CPU):
        return runs.do_items(folder, ["index", "repetition"], items, work, what="squares", device=CPU)


def test_items_that_lack_a_row_are_done_and_come_back_in_the_order_of_their_keys(tmp_path, capsys):
    done = []

    def square(item, checkpoint):
        assert not checkpoint.exists()
        checkpoint.touch()
        done.append(item)
        if item == (9, 1):
            raise KeyboardInterrupt
        return {"square": item[0] ** 2}

    items = [(10, 0), (-2, 0), (9, 1)]
    with pytest.raises(KeyboardInterrupt):
        do(tmp_path, items, square)
    assert [path.name for path in tmp_path.glob("checkpoint*")] == ["checkpoint-9_1.pt"]
    (tmp_path / "checkpoint-9_1.pt").rename(tmp_path / "checkpoint-10_0.pt")  # of a kill just after the row
    capsys.readouterr()
    found = do(tmp_path, items[::-1], lambda item, _: {"square": item[0] ** 2})
    assert done == items and not list(tmp_path.glob("checkpoint*"))
    assert [(row["index"], row["repetition"], row["square"]) for row in found] == [
        ("-2", "0", "4"),
        ("9", "1", "81"),
        ("10", "0", "100"),
    ]
    assert tables.read_rows(tmp_path / runs.ROWS) == found and all(float(row["seconds"]) >= 0 for row in found)
    said = capsys.readouterr().out
    assert said.startswith(f"squares: 3, 2 of them done; cpu ({runs.device_name(CPU)}), ranks: 1, threads of each: ")
    assert said.endswith(f"; results in {tmp_path}\n")


def test_mean_and_spread_leave_out_what_diverged():
    values = [("0", "60"), ("1", "nan"), ("2", "70")]
    found = [{"nad_index": "4", "repetition": r, "test_accuracy": v} for r, v in values]
    mean, spread, number = tables.mean_and_spread(found, ["nad_index"])[(4,)]
    assert (mean, number) == (65, 2) and spread == pytest.approx(50**0.5)


# --- Rows

ROWS = [{"index": str(i), "name": text} for i, text in enumerate(["plain", "", "a,b", 'quo"te', "σ"])]


def append_all(path, rows):
    for row in rows:
        runs.append_row(path, row)


@pytest.mark.parametrize("line", ["x,0", "1", "1,0,2", ",", "\xff,0", "1,0\r1", "1," + "1" * 200_000])
def test_a_damaged_row_is_named_and_nothing_is_lost(tmp_path, line):
    path = tmp_path / runs.ROWS
    path.write_text(f"index,repetition\n\n0,0\n{line}\n2,0\n", encoding="latin-1", newline="")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"line [45] of .*accuracies.csv is damaged \(.+\): mend or delete it"):
        do(tmp_path, [(3, 0)], None)
    assert path.read_bytes() == before


# --- Checkpoints


def refuse(path):
    with pytest.raises(ValueError, match=r"cannot be read \(.+\): delete it to start again$") as error:
        files.load_checkpoint(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"nothing of the kind", b"PK\x03\x04", pickle.dumps(Trap()), b"\x80\x02."])
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "state.pt").write_bytes(content)
    refuse(tmp_path / "state.pt")


def test_a_checkpoint_that_would_run_code_or_is_not_there_is_refused(tmp_path):
    torch.save({"x": Trap()}, tmp_path / "state.pt")
    refuse(tmp_path / "state.pt")
    refuse(tmp_path / "nothing.pt")


@given(st.data())
def test_a_checkpoint_cut_anywhere_is_refused_in_one_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("checkpoint") / "state.pt"
    files.save_checkpoint(path, {"x": torch.ones(100)})
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    refuse(path)
