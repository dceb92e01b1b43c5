"""A run's folder: files that appear whole or not at all, items that survive a kill, settings that must agree."""

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
KEYS = ["index", "repetition"]
CHECKPOINT = "{}-" + files.digest(b"{}") + ".pt"  # of a run without settings
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


def test_only_old_temporary_files_are_removed(tmp_path):
    for name, age in (("old", 4000), ("new", 10)):
        path = tmp_path / f".{name}.csv.0.tmp"
        path.touch()
        os.utime(path, times=(path.stat().st_mtime - age,) * 2)
    files.remove_stale(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".new.csv.0.tmp"]


# --- The folder


def with_results(folder):
    """The folder, in which one item is finished."""
    (folder / "items").mkdir(exist_ok=True)
    (folder / "items" / "0_0.json").write_text('{"index": "0", "repetition": "0"}')
    return folder


def test_a_new_run_keeps_its_settings_and_its_command(tmp_path):
    runs.open_run(tmp_path / "a" / "b", {"sigma": 3.0, "arch": "lenet"}, {})
    config = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert config["settings"] == {"sigma": 3.0, "arch": "lenet"} and config["command"]


def test_every_argument_counts_among_the_settings_unless_it_is_named():
    args = {"sigma": 3.0, "arch": "LeNet", "device": torch.device("cuda", 1), "output": "here", "published": None}
    args |= {"seeds": 4, "workers": 3, "a_new_one": (7, 8)}
    expected = {"sigma": 3.0, "arch": "lenet", "device": "cuda", "a_new_one": [7, 8], "nads": "1f"}
    assert runs.settings(Namespace(**args), "seeds", arch="lenet", nads="1f") == expected


def test_the_same_settings_and_a_new_one_with_its_default_open_the_run_again(tmp_path):
    runs.open_run(tmp_path, {"sigma": 0.1, "name": None}, {})
    with_results(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    runs.open_run(tmp_path, {"sigma": 0.1, "name": None, "measure": "accuracy"}, {"measure": "accuracy"})
    assert (tmp_path / "config.json").read_bytes() == before
    with pytest.raises(ValueError, match=r"\(measure was 'accuracy', now 'steps'\)"):
        runs.open_run(tmp_path, {"sigma": 0.1, "name": None, "measure": "steps"}, {"measure": "accuracy"})


@pytest.mark.parametrize("finished", ["items/0_0.json", "items/0_0.pt", "accuracies.csv", "part-0.pt"])
def test_other_settings_are_refused_naming_each_that_differs_once_there_is_something_to_protect(tmp_path, finished):
    runs.open_run(tmp_path, {"sigma": 2.0}, {})
    settings = {"sigma": 3.0, "arch": "lenet", "old": 1}
    runs.open_run(tmp_path, settings, {})  # nothing was finished
    (tmp_path / "items").mkdir()
    (tmp_path / finished).touch()
    with pytest.raises(ValueError, match="other settings") as error:
        runs.open_run(tmp_path, {"sigma": 1.0, "arch": "lenet", "new": 2}, {})
    message = str(error.value)
    assert "(new was None, now 2; old was 1, now None; sigma was 3.0, now 1.0)" in message
    assert message.startswith(str(tmp_path)) and "\n" not in message
    assert json.loads((tmp_path / "config.json").read_text())["settings"] == settings


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null"])
def test_a_broken_configuration_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"^\S*config.json cannot be read: delete it, or choose another folder$"):
        runs.open_run(tmp_path, {}, {})


def test_the_commit_is_of_this_repository_and_of_no_other(tmp_path, monkeypatch):
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=runs.ROOT)
    expected = head.stdout[:12] if head.returncode == 0 else ""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))  # as in a hook of another repository
    assert runs.commit().removesuffix("-dirty") == expected
    (tmp_path / "sources").mkdir()
    monkeypatch.setattr(runs, "ROOT", tmp_path / "sources")  # a copy without git within another repository
    assert runs.commit() == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runs.commit() == ""  # a machine without git


# --- Items


def do(folder, items, work):
    runs.open_run(folder, {}, {})
    return runs.do_items(folder, KEYS, items, work, what="squares", device=CPU)


def square(item, _=None):
    return {"square": item[0] ** 2}


def test_items_that_lack_a_row_are_done_and_come_back_in_the_order_of_their_keys(tmp_path):
    begun = []

    def interrupted(item, checkpoint):
        assert not checkpoint.exists()
        checkpoint.touch()
        begun.append(item)
        if item == (9, 1):
            raise KeyboardInterrupt
        return square(item)

    items = [(10, 0), (-2, 0), (9, 1)]
    with pytest.raises(KeyboardInterrupt):
        do(tmp_path, items, interrupted)
    assert {path.name for path in (tmp_path / "items").iterdir()} == {
        "10_0.json",
        "-2_0.json",
        CHECKPOINT.format("9_1"),
    }
    (tmp_path / "items" / CHECKPOINT.format("9_1")).rename(
        tmp_path / "items" / CHECKPOINT.format("10_0")
    )  # of a kill just after the row
    rows = do(tmp_path, items[::-1], square)
    assert begun == items and not list((tmp_path / "items").glob("*.pt"))
    expected = [("-2", "0", "4"), ("9", "1", "81"), ("10", "0", "100")]
    assert [(row["index"], row["repetition"], row["square"]) for row in rows] == expected
    assert tables.read_rows(tmp_path / runs.ROWS) == rows and all(float(row["seconds"]) >= 0 for row in rows)
    assert list(rows[0])[-3:] == ["device", "torch", "commit"] and rows[0]["torch"] == torch.__version__


def test_a_process_that_finds_items_missing_writes_no_table(tmp_path, monkeypatch):
    items = [(number, 0) for number in range(5)]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert do(tmp_path, items, square) is None and not (tmp_path / runs.ROWS).exists()
    assert len(list((tmp_path / "items").glob("*.json"))) == 2
    monkeypatch.setenv("RANK", "0")
    assert len(do(tmp_path, items, square)) == 5 and (tmp_path / runs.ROWS).exists()


def test_a_table_without_items_continues_and_its_columns_and_rows_are_kept(tmp_path):
    (tmp_path / runs.ROWS).write_text("index,repetition,square,seconds\r1,0,1,2.5\r2,0,4,2.5", newline="")
    rows = do(tmp_path, [(1, 0), (3, 0)], square)
    assert [row["square"] for row in rows] == ["1", "4", "9"] and rows[0]["seconds"] == "2.5"
    assert [row["torch"] for row in tables.read_rows(tmp_path / runs.ROWS)] == ["", "", torch.__version__]


def test_a_command_with_other_settings_that_began_later_is_noticed_and_its_checkpoint_is_not_continued(tmp_path):
    def other(item, checkpoint):
        checkpoint.touch()  # of this command
        checkpoint.unlink()
        runs.open_run(tmp_path, {"sigma": 1.0}, {})  # nothing was finished
        return square(item)

    with pytest.raises(ValueError, match="another command with other settings has begun in"):
        do(tmp_path, [(1, 0)], other)
    assert not list((tmp_path / "items").iterdir())


def test_rows_of_another_torch_are_pointed_out(tmp_path, capsys):
    do(tmp_path, [(1, 0)], square)
    path = tmp_path / "items" / "1_0.json"
    path.write_text(path.read_text().replace(torch.__version__, "1.0+cpu"))
    do(tmp_path, [(1, 0), (2, 0)], square)
    assert f"{tmp_path} has rows of torch 1.0; this is {torch.__version__.partition('+')[0]}" in capsys.readouterr().err


def test_the_bar_counts_what_any_process_finished(tmp_path, capsys):
    do(tmp_path, [(0, 0)], square)
    with runs.progress(tmp_path, KEYS, [(0, 0), (1, 0), (2, 0)], "squares") as refresh:
        (tmp_path / "items" / "2_0.json").touch()
        refresh()
    assert "| 2/3 [" in capsys.readouterr().err.split("\r")[-1]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"index": "0"}'])
def test_a_damaged_item_is_refused_by_name_and_left_alone(tmp_path, content):
    path = with_results(tmp_path) / "items" / "0_0.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"items/0_0.json cannot be read: delete it"):
        do(tmp_path, [(3, 0)], None)
    assert path.read_text() == content


@pytest.mark.parametrize("line", ["x,0", "1", "1,0,2", "\xff,0"])
def test_a_damaged_table_is_refused_by_its_line_and_left_alone(tmp_path, line):
    path = tmp_path / runs.ROWS
    path.write_text(f"index,repetition\n\n0,0\n{line}\n2,0\n", encoding="latin-1", newline="")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"accuracies.csv"):
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
    with pytest.raises(FileNotFoundError):  # not the file's fault
        files.load_checkpoint(tmp_path / "nothing.pt")


@given(st.data())
def test_a_checkpoint_cut_anywhere_is_refused_in_one_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("checkpoint") / "state.pt"
    files.save_checkpoint(path, {"x": torch.ones(100)})
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    refuse(path)
