"""A run's folder: files that appear whole or not at all, rows that survive a kill, settings that must agree."""

import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils import runs

WRITERS = {
    "array": lambda path: runs.save_array(path, np.arange(1000)),
    "json": lambda path: runs.save_json(path, {"a": 1}),
    "checkpoint": lambda path: runs.save_checkpoint(path, {"x": torch.ones(1000)}),
    "rows": lambda path: runs.write_rows(path, [{"a": 1}]),
}


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- Whole or not at all


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


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="No space left"), runs.replacing(tmp_path / "file") as temporary:
        temporary.write_bytes(b"half")
        full_disk()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_written_file_stands_alone_and_replaces_the_old_one(tmp_path, write):
    (tmp_path / "file").write_bytes(b"old")
    write(tmp_path / "file")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() != b"old"


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with runs.replacing(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


# --- The folder


def test_a_new_run_keeps_its_settings_and_versions(tmp_path):
    with runs.open_run(tmp_path / "a" / "b", {"sigma": 3.0, "arch": "lenet"}) as folder:
        config = json.loads((folder / "config.json").read_text())
    assert config["settings"] == {"sigma": 3.0, "arch": "lenet"}
    assert config["environment"]["torch"] == torch.__version__
    assert {"python", "numpy", "gpu", "threads", "ranks", "command"} <= config["environment"].keys()


def test_the_same_settings_open_the_run_again(tmp_path):
    settings = {"sigma": 0.1, "sizes": (1, 2), "name": None}  # a tuple comes back from JSON as a list
    for _ in range(2):
        with runs.open_run(tmp_path, settings):
            pass


def test_other_settings_are_refused_naming_each_that_differs(tmp_path):
    with runs.open_run(tmp_path, {"sigma": 3.0, "arch": "lenet", "old": 1}):
        pass
    content = (tmp_path / "config.json").read_bytes()
    with (
        pytest.raises(ValueError, match="other settings") as error,
        runs.open_run(tmp_path, {"sigma": 1.0, "arch": "lenet", "new": 2}),
    ):
        pass
    message = str(error.value)
    assert "sigma was 3.0, now 1.0" in message and "old was 1, now None" in message and "new was None, now 2" in message
    assert "arch" not in message and str(tmp_path) in message and "\n" not in message
    assert (tmp_path / "config.json").read_bytes() == content


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"settings": '])
def test_a_broken_configuration_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    message = r"^\S*config.json cannot be read: delete the folder, or choose another$"
    with pytest.raises(ValueError, match=message), runs.open_run(tmp_path, {}):
        pass


def test_a_run_is_open_once_at_a_time(tmp_path):
    with (
        runs.open_run(tmp_path, {}),
        pytest.raises(ValueError, match="is in use by another process"),
        runs.open_run(tmp_path, {}),
    ):
        pass
    with runs.open_run(tmp_path, {}):
        pass


def test_another_process_keeps_a_run_closed_until_it_ends(tmp_path):
    with runs.open_run(tmp_path, {}):
        pass
    hold = (
        "import fcntl, sys; fcntl.flock(f := open(sys.argv[1], 'w'), fcntl.LOCK_EX); print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="in use by another process"), runs.open_run(tmp_path, {}):
            pass
        other.kill()
    with runs.open_run(tmp_path, {}):
        pass


def test_an_output_that_cannot_be_a_folder_is_an_os_error(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="file"), runs.open_run(folder, {}):
            pass


# --- Rows

ROWS = [{"index": str(i), "name": text} for i, text in enumerate(["plain", "", "a,b", 'quo"te', "σ"])]


def append_all(path, rows):
    for row in rows:
        runs.append_row(path, row)


def test_rows_come_back_as_they_were_appended(tmp_path):
    path = tmp_path / "rows.csv"
    assert runs.read_rows(path) == []
    append_all(path, ROWS)
    assert runs.read_rows(path) == ROWS
    assert path.read_text().startswith("index,name\n0,plain\n")


@given(st.data())
def test_wherever_a_kill_cuts_the_file_whole_rows_count_and_the_next_row_repairs_it(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    append_all(path, ROWS)
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    whole = ROWS[: max(0, content[:cut].count(b"\n") - 1)]
    assert runs.read_rows(path) == whole
    runs.append_row(path, ROWS[len(whole) % len(ROWS)])
    assert runs.read_rows(path) == [*whole, ROWS[len(whole) % len(ROWS)]]
    append_all(path, ROWS[len(whole) + 1 :])
    assert path.read_bytes() == content or len(whole) == len(ROWS)


@pytest.mark.parametrize("line", ["x,damaged", "1", "1,a,b", ",", "\xff,a", "1,a\rb", "1," + "a" * 200_000])
def test_a_damaged_row_is_named_and_nothing_is_lost(tmp_path, line):
    path = tmp_path / "rows.csv"
    path.write_text(f"index,name\n\n0,plain\n{line}\n2,good\n", encoding="latin-1", newline="")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"line 4 of .*rows.csv is damaged: delete the line"):
        runs.sort_rows(path, ["index"])
    assert path.read_bytes() == before


def test_rows_without_the_columns_that_name_them_are_damaged(tmp_path):
    path = tmp_path / "rows.csv"
    append_all(path, [{"index": 1, "value": 2}])
    with pytest.raises(ValueError, match=r"line 2 of .* is damaged"):
        runs.read_rows(path, ["nad_index"])


def test_rows_are_sorted_by_the_given_key_and_numbers_not_letters_decide(tmp_path):
    path = tmp_path / "rows.csv"
    append_all(path, [{"index": i, "value": v} for i, v in [(10, "a"), (-2, "b"), (9, "c")]])
    rows = runs.sort_rows(path, ["index"])
    assert [row["index"] for row in rows] == ["-2", "9", "10"]
    assert runs.read_rows(path) == rows
    assert path.read_text() == "index,value\n-2,b\n9,c\n10,a\n"


def test_sorting_drops_the_line_that_a_kill_cut_short(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("index\n2\n1\n3")
    runs.sort_rows(path, ["index"])
    assert path.read_text() == "index\n1\n2\n"


def test_the_order_of_arrival_leaves_no_trace_after_sorting(tmp_path):
    contents = set()
    for name, order in (("a", ROWS), ("b", ROWS[::-1])):
        append_all(tmp_path / name, order)
        runs.sort_rows(tmp_path / name, ["index"])
        contents.add((tmp_path / name).read_bytes())
    assert len(contents) == 1


# --- Checkpoints


def test_a_checkpoint_comes_back(tmp_path):
    state = {"sum": torch.arange(6.0, dtype=torch.float64).view(2, 3), "count": 7, "name": "lenet", "list": [1, 2]}
    runs.save_checkpoint(tmp_path / "state.pt", state)
    loaded = runs.load_checkpoint(tmp_path / "state.pt")
    assert torch.equal(loaded.pop("sum"), state.pop("sum")) and loaded == state


def unreadable(path):
    with pytest.raises(ValueError, match=r"cannot be read \(.+\): delete it to start again$") as error:
        runs.load_checkpoint(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


class Trap:
    """What a pickle could do."""

    def __reduce__(self):
        """Fail the test that loads it."""
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize("content", [b"", b"nothing of the kind", b"PK\x03\x04", pickle.dumps(Trap()), b"\x80\x02."])
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "state.pt").write_bytes(content)
    unreadable(tmp_path / "state.pt")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    torch.save({"x": Trap()}, tmp_path / "state.pt")
    unreadable(tmp_path / "state.pt")


@given(st.data())
def test_a_checkpoint_cut_anywhere_is_refused_in_one_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("checkpoint") / "state.pt"
    runs.save_checkpoint(path, {"x": torch.ones(100)})
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    unreadable(path)


def test_a_missing_checkpoint_is_refused_in_one_line(tmp_path):
    unreadable(Path(tmp_path / "nothing.pt"))
