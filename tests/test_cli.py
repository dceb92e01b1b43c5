"""The command line's types: what they accept, and that they name what they refuse."""

import argparse

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refusals import Refusal
from utils import cli

INDEX = st.integers(0, 10_000)


@given(st.lists(INDEX, min_size=1, max_size=30))
def test_listed_indices_keep_their_order_each_once(indices):
    assert cli.index_list(",".join(map(str, indices))) == list(dict.fromkeys(indices))


@given(st.integers(0, 500), st.integers(1, 500), st.one_of(st.none(), st.integers(1, 600)))
def test_a_range_of_indices_is_pythons(start, length, step):
    text = f"{start}:{start + length}" + ("" if step is None else f":{step}")
    assert cli.index_list(text) == list(range(start, start + length, step or 1))


@given(st.text(alphabet="0123456789,:-+ax ._", max_size=5))
def test_any_text_gives_indices_from_0_or_is_refused_by_name(text):
    try:
        indices = cli.index_list(text)
    except argparse.ArgumentTypeError as error:
        assert repr(text) in str(error)
    else:
        assert indices and min(indices) >= 0 and len(set(indices)) == len(indices)


@pytest.mark.parametrize(
    "text", ["", ",", "1,", "a", "1.5", "5:5", "0:10:0", "0:10:-1", "-3:2", "0:1:2:3", "::", "1,2:3"]
)
def test_bad_index_lists_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a list of indices from 0, like 0,5,10 or 0:1000:50"):
        cli.index_list(text)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (cli.positive_int, ["1", "10000"], ["0", "-1", "1.5", "", "x", "nan", "inf", "1" * 400]),
        (cli.natural, ["0", "7"], ["-1", "0.0", "x"]),
        (cli.positive, ["1e-9", "3"], ["0", "-1", "nan", "inf", "x", "1e999"]),
        (cli.non_negative, ["0", "0.5"], ["-0.1", "nan", "-inf", ""]),
    ],
)
def test_numbers_outside_their_range_are_refused_by_name(kind, good, bad):
    for text in good:
        assert kind(text) == float(text)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^'{text}' is not a"):
            kind(text)


def test_devices_that_the_machine_lacks_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert [cli.device(text) for text in ("cpu", "cuda:0")] == [torch.device("cpu"), torch.device("cuda:0")]
    for text, words in [("cuda:1", "it has 1 GPUs"), ("gpu", "is not a device"), ("meta", "is not a device")]:
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' .*{words}"):
            cli.device(text)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(argparse.ArgumentTypeError, match="'cuda' is not on this machine"):
        cli.device("cuda")


def test_a_recipe_gives_an_option_for_each_setting_with_its_default_and_range(capsys):
    parser = cli.ArgumentParser(None)
    cli.add_recipe_arguments(parser, {"epochs": 20, "max_lr": 0.5, "weight_decay": 5e-4})
    defaults = {"epochs": 20, "max_lr": 0.5, "weight_decay": 5e-4, "precision": None}
    assert vars(parser.parse_args([])) == defaults
    argv = "--epochs 3 --max-lr 1e-3 --weight-decay 0".split()
    assert vars(parser.parse_args(argv)) == defaults | {"epochs": 3, "max_lr": 1e-3, "weight_decay": 0.0}
    for argv in (["--epochs", "1.5"], ["--epochs", "0"], ["--max-lr", "0"], ["--weight-decay", "-1"], ["--epoch", "1"]):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(argv)
    assert capsys.readouterr().err.count("\n") == 5  # one line for each


@cli.one_line_errors
def fail(error):
    raise error


ERRORS = {
    "bad value": Refusal("bad\n  value"),
    "[Errno 28] No space left on device: 'a/b'": OSError(28, "No space left on device", "a/b"),
    "MemoryError": MemoryError(),
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has": torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB.\n  GPU 0 has\n"
    ),
    "CUDA error: device-side assert triggered": torch.AcceleratorError("CUDA error:\ndevice-side assert triggered"),
}


@pytest.mark.parametrize(("words", "error"), ERRORS.items())
def test_bad_input_and_what_the_machine_lacks_end_in_one_line_and_code_2(capsys, words, error):
    with pytest.raises(SystemExit, match="2"):
        fail(error)
    assert capsys.readouterr().err.partition(": ")[2] == f"error: {words}\n"


def test_an_interruption_is_one_line_and_code_130(capsys):
    with pytest.raises(SystemExit, match="130"):
        fail(KeyboardInterrupt())
    assert capsys.readouterr().err == "\nstopped: the same command continues\n"


@pytest.mark.parametrize("error", [ValueError("a user's"), RuntimeError("shapes do not match")])
def test_mistakes_in_the_code_keep_their_traceback(error):
    with pytest.raises(type(error)):
        fail(error)
