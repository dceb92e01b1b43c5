"""The first experiment from its command line to its folder, at small sizes; and against the published map."""

import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch

import directional_bias
import nad_computation
import poison_cifar
from directional_bias import compare_with_published, main, parse_arguments, train_on_direction
from tests.helpers import ROOT, count_epochs, orthonormal, refusal, rows, run_on_ranks
from utils import files, seeding, tables
from utils.directions import canonical_frequency, fourier_direction
from utils.training import LOSS_WINDOW

# Data on which accuracies are neither 50 nor 100 %, so that they tell one training from another.
TINY = "--arch logreg --image-size 8 --num-train 60 --num-test 200 --epochs 2 --batch-size 16 --device cpu".split()
pytestmark = pytest.mark.usefixtures("one_process")  # but for the tests that start the script


def start(folder, *options):
    main([*TINY, *map(str, options), "--output", str(folder)])


def refused(capsys, folder, *options):
    return refusal(capsys, main, *TINY, *options, "--output", folder)


def test_a_direction_is_trained_and_tested_on_fresh_samples():
    outcome = train_on_direction(fourier_direction(1, 1, size=8), arch="logreg", num_train=20, num_test=500)
    assert outcome["train_accuracy"] == 100 > outcome["test_accuracy"] > 50
    assert 0 < outcome["final_loss"] < 0.2


def test_the_defaults_are_the_papers():
    args = parse_arguments([])
    expected = {"arch": "lenet", "num_channels": 1, "image_size": 32, "directions": "fourier", "phase": "cosine"}
    expected |= {"num_train": 10_000, "num_test": 10_000, "epsilon": 1.0, "sigma": 3.0, "epochs": 20, "batch_size": 128}
    expected |= {"max_lr": 0.5, "momentum": 0.0, "weight_decay": 0.0, "clip_norm": 0.5, "precision": "fp32", "seeds": 1}
    assert expected.items() <= vars(args).items() and not args.no_pooling
    assert len(directional_bias.make_directions(args)) == 130
    sigmas = {"random": 3.0, "nads": 3.0, "nads --sigma 1": 1.0}
    assert {text: parse_arguments(f"--directions {text}".split()).sigma for text in sigmas} == sigmas
    args.a_new_option = 5  # counts
    free = {"output", "published", "frequency", "nad_index", "num_random", "seeds", "workers"}
    counted = {key for key in vars(args) if key not in free}
    assert directional_bias.settings(args).keys() == counted


def test_130_trainings_fill_the_published_map(tmp_path, capsys):
    start(tmp_path, "--image-size", 32, "--epochs", 1, "--num-train", 30, "--num-test", 20)
    assert {path.name for path in tmp_path.iterdir()} == {"accuracies.csv", "accuracy.png", "config.json", "items"}
    found = [(int(row["frequency_y"]), int(row["frequency_x"])) for row in rows(tmp_path)]
    assert len(found) == 130 and found == sorted(found) and all(canonical_frequency(*k) == k for k in found)
    accuracies = [float(row["test_accuracy"]) for row in rows(tmp_path)]
    text = capsys.readouterr().out
    assert text.startswith("LogReg, trainings: 130; on cpu (")
    mean, low, high = np.mean(accuracies), min(accuracies), max(accuracies)
    assert f"over 130 directions: mean {mean:.1f}, from {low:.1f} to {high:.1f}" in text
    assert f"figure: {tmp_path / 'accuracy.png'}\nrows: {tmp_path / 'accuracies.csv'}\n" in text
    assert json.loads((tmp_path / "config.json").read_text())["settings"]["num_train"] == 30


KINDS = {"--phase sine": 6, "--image-size 1": 1, "--image-size 2": 1, "--image-size 3": 1, "--num-channels 3": 10}


@pytest.mark.parametrize(("options", "number"), KINDS.items(), ids=KINDS)
def test_images_of_any_kind_have_a_map(tmp_path, options, number):
    start(tmp_path, *options.split())
    assert len(rows(tmp_path)) == number and (tmp_path / "accuracy.png").exists()


def test_random_directions_do_not_depend_on_how_many_there_are(tmp_path):
    start(tmp_path / "two", "--directions", "random", "--num-random", 2)
    start(tmp_path / "four", "--directions", "random", "--num-random", 4)
    assert [row["random_index"] for row in rows(tmp_path / "four")] == ["0", "1", "2", "3"]
    assert rows(tmp_path / "four")[:2] == rows(tmp_path / "two")
    assert (tmp_path / "four" / "accuracy.png").stat().st_size > 1000


@pytest.fixture
def nads(tmp_path):
    """A file of NADs of 8×8 images, the last row missing as in the authors' files."""
    np.save(tmp_path / "nads.npy", orthonormal(64)[:-1].astype(np.float32))
    return tmp_path / "nads.npy"


def test_a_row_is_the_training_along_its_nad_that_the_function_does(tmp_path, nads, no_figures, capsys):
    start(tmp_path, "--directions", "nads", "--nads", nads, "--nad-index", "0:64:21")
    assert [row["nad_index"] for row in rows(tmp_path)] == ["0", "21", "42", "63"]
    v, seed = torch.from_numpy(np.load(nads)[21]).view(1, 8, 8), seeding.seed_of(0, "nads", 21, 0)
    sizes = {"arch": "logreg", "num_train": 60, "num_test": 200, "epochs": 2, "batch_size": 16}
    outcome = train_on_direction(v, seed=seed, **sizes)
    assert {key: float(rows(tmp_path)[1][key]) for key in outcome} == pytest.approx(outcome, rel=1e-5)
    assert "over 4 directions: mean" in capsys.readouterr().out


def test_repetitions_give_a_spread_and_more_of_them_keep_those_that_are_there(tmp_path, no_figures, capsys):
    start(tmp_path, "--frequency", 2, 0, "--frequency", 2, 2)
    first = rows(tmp_path)
    assert "standard deviation" not in capsys.readouterr().out
    start(tmp_path, "--frequency", 2, 0, "--frequency", 2, 2, "--seeds", 3)
    found = rows(tmp_path)
    assert [row["repetition"] for row in found] == ["0", "1", "2"] * 2 and found[::3] == first
    accuracy = np.array([float(row["test_accuracy"]) for row in found]).reshape(2, 3)
    text = capsys.readouterr().out
    assert f"mean {accuracy.mean():.1f}, from" in text and "trainings: 6, 2 of them finished" in text
    assert f"standard deviation over repetitions: {accuracy.std(axis=1, ddof=1).mean():.2f}, the mean" in text


# --- Against published numbers


def published(path, values, end="\n"):
    """A CSV file with an accuracy for each (k_y, k_x)."""
    lines = ["frequency_y,frequency_x,logreg", *(f"{y},{x},{value}" for (y, x), value in values.items())]
    path.write_text("\n".join(lines) + end)
    return path


def test_a_map_compared_with_itself_agrees(tmp_path, capsys):
    start(tmp_path)
    own = {(-int(r["frequency_y"]), -int(r["frequency_x"])): r["test_accuracy"] for r in rows(tmp_path)}
    capsys.readouterr()
    # The same command only reports again; the last line counts, whether or not it ends.
    start(tmp_path, "--published", published(tmp_path / "own.csv", own, end=""))
    said = "against own.csv, 10 of its rows: Pearson 1.000, Spearman 1.000, mean absolute difference 0.00 points"
    assert said in capsys.readouterr().out and (tmp_path / "published.png").stat().st_size > 1000
    values = {"rows": "10", "pearson": "1.0000", "spearman": "1.0000", "mean_absolute_difference": "0.000"}
    assert rows(tmp_path / "published.csv") == [values]


FOUR = {(-2, 2): 60, (2, 2): 70, (0, 0): 80, (0, 2): 57, (-4, -4): "", (4, 1): 99}
PAIRS = {  # the first: (60, 68), (70, 64), (80, 81), (57, 58); every published row that has a training counts
    "4 of its rows: Pearson 0.842, Spearman 0.800, mean absolute difference 4.00 points": FOUR,
    "Pearson nan, Spearman nan, mean absolute difference 22.33 points": {(0, 0): 50, (-2, 2): 50, (2, -2): 50},
    "has 2 of these directions: at least 3 are needed to compare": {(0, 0): 50, (0, 2): 60, (3, 1): 70},
}


@pytest.mark.parametrize(("said", "theirs"), PAIRS.items(), ids=["rows", "a flat map", "too few"])
def test_published_rows_are_compared_with_the_training_of_their_frequency(tmp_path, no_figures, said, theirs):
    file = published(tmp_path / "map.csv", theirs)
    args = parse_arguments([*TINY, "--published", str(file), "--output", str(tmp_path)])
    theirs = tables.read_published(file, ("frequency_y", "frequency_x"), "logreg")
    ours = {(-2, -2): 64.0, (-2, 2): 68.0, (0, 0): 81.0, (0, -2): 58.0, (-4, -4): 50.0}
    assert said in compare_with_published(ours, theirs, args)


@pytest.mark.parametrize("end", ["", "lenet\n0,0,50", "logreg\n0,zero,50", "logreg\n0,0,good", "\x00\xff\n1"])
def test_published_numbers_that_cannot_be_read_are_refused_before_any_training(tmp_path, capsys, end):
    (tmp_path / "map.csv").write_text(f"frequency_y,frequency_x,{end}\n", encoding="latin-1")
    message = refused(capsys, tmp_path / "run", "--published", tmp_path / "map.csv")
    assert "map.csv is not a CSV file with numbers in columns" in message or "map.csv is damaged" in message
    assert not (tmp_path / "run").exists()


# --- Continuing


def test_a_training_that_is_interrupted_continues_from_its_last_epoch(tmp_path, monkeypatch, no_figures):
    options = ["--frequency", 2, 0, "--epochs", 5]
    start(tmp_path / "whole", *options)
    monkeypatch.setattr(files, "CHECKPOINT_SECONDS", 0)
    count_epochs(monkeypatch, stop=3)
    with pytest.raises(SystemExit, match="130"):
        start(tmp_path / "run", *options)
    assert list((tmp_path / "run" / "items").glob("-2_0_0-*.pt"))
    trained = count_epochs(monkeypatch)
    for _ in range(2):  # a finished run trains nothing again
        start(tmp_path / "run", *options)
    assert trained == [3, 4] and rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert not list((tmp_path / "run").glob("items/*.pt"))


def test_other_settings_on_the_same_folder_are_refused_and_other_spellings_are_not(tmp_path, nads, capsys, no_figures):
    options = ["--directions", "nads", "--nad-index", "0", "--nads"]
    start(tmp_path / "run", *options, nads)
    np.save(tmp_path / "copy.npy", np.load(nads))
    start(tmp_path / "run", *options, tmp_path / "copy.npy", "--arch", "LogReg")
    np.save(tmp_path / "other.npy", np.eye(64))
    message = refused(capsys, tmp_path / "run", *options, tmp_path / "other.npy", "--epochs", 3, "--precision", "bf16")
    assert "(epochs was 2, now 3; nads was '" in message and "; precision was 'fp32', now 'bf16')" in message


@pytest.mark.parametrize("script", [directional_bias, nad_computation, poison_cifar])
def test_an_edited_network_is_another_setting(tmp_path, monkeypatch, script):
    monkeypatch.setattr("sys.path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "edited_net", raising=False)
    found = []
    for edit in ("", "  # edited"):
        (tmp_path / "edited_net.py").write_text(f"from torch import nn\ndef net():\n    return nn.Linear(1, 2){edit}\n")
        options = ["--transform", "none"] if script is poison_cifar else []
        found.append(script.settings(script.parse_arguments(["--arch", "edited_net:net", *options])))
    assert found[0]["arch"] != found[1]["arch"]


@pytest.mark.parametrize("script", [directional_bias, nad_computation, poison_cifar])
def test_the_help_names_every_option(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{option.replace('_', '-')}" in text for option in vars(script.parse_arguments([])))


def test_runs_of_other_noise_or_without_pooling_have_folders_of_their_own():
    endings = {"": "", "--sigma 3": "", "--sigma 1": "-sigma1", "--no-pooling --sigma 1": "-nopooling-sigma1"}
    for options, ending in endings.items():
        assert parse_arguments(options.split()).output.name == f"LeNet{ending}-fourier"


@pytest.mark.parametrize("number", [2, 3])
def test_workers_and_torchrun_share_the_cells_and_the_rows_are_those_of_one(tmp_path, number, no_figures, capfd):
    start(tmp_path / "workers", "--seeds", 2, "--workers", number)
    assert f", {number} workers; results in" in capfd.readouterr().out
    start(tmp_path / "one", "--seeds", 2)
    assert len(rows(tmp_path / "one")) == 20 and rows(tmp_path / "workers") == rows(tmp_path / "one")
    if number == 2:
        options = [*TINY, "--seeds", 2, "--output", "torchrun"]
        assert "2 workers" in run_on_ranks("directional_bias", *options, folder=tmp_path)[0]
        assert rows(tmp_path / "torchrun") == rows(tmp_path / "one")


def test_steps_are_counted_until_the_loss_is_small(tmp_path, capsys):
    start(tmp_path, "--measure", "steps", "--frequency", 0, 0, "--frequency", 2, 0, "--epochs", 40, "--max-lr", 3)
    steps = [float(row["steps"]) for row in rows(tmp_path)]
    assert all(LOSS_WINDOW <= value <= 160 for value in steps) and (tmp_path / "steps.png").stat().st_size > 1000
    text = capsys.readouterr().out
    assert "the training loss falls below 0.1 for 2 of 2 directions" in text
    assert f"small over 2 directions: mean {np.mean(steps):.1f}" in text
    args = parse_arguments(["--measure", "steps"])
    assert (args.epochs, args.sigma, str(args.output)) == (8, 0.5, "runs/steps/LeNet-fourier")
    assert parse_arguments(["--measure", "steps", "--sigma", "1"]).output.name == "LeNet-sigma1-fourier"


# --- Shells and systems


def run_in_a_shell(command, folder, **environment):
    """How a shell ends that runs this command of experiment 1, small, in a folder; what it prints, and the rows."""
    script = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'directional_bias.py'))} {shlex.join(TINY)}"
    command = command.replace("SCRIPT", f"{script} --frequency 0 2 --frequency 2 2")
    environment = {name: value for name, value in (os.environ | environment).items() if value is not None}
    shell = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
    return shell, rows(folder / "run")


SHELLS = {  # the command in a shell, and variables of its environment
    "closed descriptors": ("SCRIPT --workers 2 --output run <&- >&- 2>&-", {}),
    "a reader that leaves": ("SCRIPT --output run | head -1", {}),
    "no path of its own": ("SCRIPT --output run", {"PYTHONSAFEPATH": "1"}),
    "a left-over variable": ("SCRIPT --output run", {"WORLD_SIZE": "4"}),
    "a folder in HOME": ("HOME=$PWD SCRIPT --output=~/run", {}),
    "a blank in TMPDIR": ("mkdir 'a b'; TMPDIR=$PWD/'a b' SCRIPT --workers 2 --output run", {}),
    "a terminal without σ": ("SCRIPT --help > help && SCRIPT --output run", {"PYTHONIOENCODING": "latin-1"}),
    "a folder that cannot be written": ("mkdir run w; chmod a-w w; cd w; SCRIPT --output ../run", {}),
    "few open files": ("ulimit -n 64; SCRIPT --workers 2 --output run", {}),
    "LaTeX in figures": ("echo 'text.usetex: True' > matplotlibrc; SCRIPT --output run", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("command", "environment"), SHELLS.values(), ids=SHELLS)
def test_the_rows_do_not_depend_on_the_shell(tmp_path, command, environment):
    start(tmp_path / "expected", "--frequency", 0, 2, "--frequency", 2, 2)
    shell, found = run_in_a_shell(command, tmp_path, **environment)
    assert found == rows(tmp_path / "expected") and (tmp_path / "run" / "accuracy.png").exists(), shell.stderr


# --- Bad input

BAD = {
    "--arch lenat": "unknown architecture 'lenat': did you mean lenet",
    "--arch lenet": "at least 16x16",
    "--no-pooling": "logreg does not accept pooling=False",
    "--frequency 5 0": "frequency 5 along y is outside the image: expected -4 to 4 for 8 pixels",
    "--image-size 2 --phase sine": "no sine",
    "--sigma -1": "'-1' is not a number from 0",
    "--precision tf32": "precision tf32 needs a CUDA device",
    "--published /no/such/file.csv": "/no/such/file.csv",
    "--directions nads --nads /no/such/nads.npy": "/no/such/nads.npy",
    "--directions nads --nads EYE --nad-index 0,64": "NAD index 64 does not exist: expected 0 to 63",
    "--directions nads --nads EYE --num-channels 3": "has shape (64, 64): expected (192, 192), or one row less",
    "--nad-index 3": "--nad-index belongs to --directions nads, not fourier",
    "--num-random 3": "--num-random belongs to --directions random, not fourier",
    "--directions random --phase cosine": "--phase belongs to --directions fourier, not random",
    "--directions nads --frequency 0 2": "--frequency belongs to --directions fourier, not nads",
}


@pytest.mark.parametrize(("options", "words"), BAD.items(), ids=BAD)
def test_bad_input_is_one_line_and_code_2(tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    np.save(tmp_path / "eye.npy", np.eye(64))
    options = options.replace("EYE", str(tmp_path / "eye.npy")).split()
    assert words in refused(capsys, tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


# --- The paper's numbers


@pytest.mark.slow
@pytest.mark.parametrize("k", [(0, -2), (-4, -2), (-2, -6)])
def test_lenet_learns_as_much_of_a_frequency_as_published(reference, k):
    keys = ("frequency_y", "frequency_x")
    table = dict(tables.read_published(reference / "fourier_accuracies.csv", keys, "lenet"))
    theirs = (table[k] + table[-k[0], k[1]]) / 2
    ours = train_on_direction(fourier_direction(*k), seed=1)["test_accuracy"]
    assert ours == pytest.approx(theirs, abs=8)  # a training's standard deviation is 2.7


@pytest.mark.slow
def test_without_pooling_lenet_learns_what_it_does_not_learn_with_it():
    v, sizes = fourier_direction(-8, -3, size=16), {"num_train": 4000, "num_test": 1000, "sigma": 1.0, "epochs": 10}
    assert train_on_direction(v, pooling=False, **sizes)["test_accuracy"] > 99
    assert train_on_direction(v, pooling=True, **sizes)["test_accuracy"] < 75
