"""The first experiment from its command line to its folder, at small sizes; and against the published map."""

import csv
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import directional_bias
from directional_bias import accuracy_map, main, parse_arguments, train_on_direction
from utils import distributed, runs
from utils.directions import canonical_frequency, fourier_direction, frequency_grid

ROOT = Path(__file__).resolve().parents[1]
# Data on which accuracies are neither 50 nor 100 %, so that they tell one training from another.
TINY = "--arch logreg --image-size 8 --num-train 60 --num-test 200 --epochs 2 --batch-size 16 --device cpu".split()


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """Stay in this process: starting a rank a core costs seconds, and two tests below do it."""
    monkeypatch.setattr(distributed, "num_cores", lambda: 1)


def start(folder, *options):
    main([*TINY, *map(str, options), "--output", str(folder)])


def rows(folder):
    """The rows without their timings, as text."""
    with open(folder / "accuracies.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def refusal(capsys, *argv):
    """The one line on stderr with which the command line is refused, with code 2."""
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in argv])
    message = capsys.readouterr().err
    assert exit.value.code == 2 and message.count("\n") == 1 and message.endswith("\n"), message
    return message


# --- One direction


def test_a_direction_is_trained_and_tested_on_fresh_samples():
    outcome = train_on_direction(fourier_direction(1, 1, height=8, width=8), arch="logreg", num_train=20, num_test=500)
    assert outcome["train_accuracy"] == 100 > outcome["test_accuracy"] > 50
    assert 0 < outcome["final_loss"] < 0.2


def test_the_defaults_are_the_papers():
    args = vars(parse_arguments([]))
    expected = dict(
        arch="lenet", num_channels=1, image_size=32, directions="fourier", phase="cosine", num_train=10_000,
        num_test=10_000, epsilon=1.0, sigma=3.0, epochs=20, batch_size=128, max_lr=0.5, momentum=0.0, weight_decay=0.0,
        clip_norm=0.5, precision="fp32", seeds=1, no_pooling=False,
    )  # fmt: skip
    assert expected.items() <= args.items()
    assert len(directional_bias.list_indices(parse_arguments([]))) == 130
    assert parse_arguments(["--directions", "random"]).sigma == 3.0
    assert parse_arguments(["--directions", "nads"]).sigma == 1.0
    assert parse_arguments(["--directions", "nads", "--sigma", "2"]).sigma == 2.0


# --- The three families


def test_130_runs_fill_the_published_map(tmp_path, capsys):
    start(tmp_path, "--image-size", 32, "--epochs", 1, "--num-train", 30, "--num-test", 20)
    assert {"accuracies.csv", "accuracy.npy", "accuracy.png", "config.json"} <= {f.name for f in tmp_path.iterdir()}
    found = rows(tmp_path)
    assert len(found) == 130
    indices = [(int(row["frequency_y"]), int(row["frequency_x"])) for row in found]
    assert indices == sorted(indices) and all(canonical_frequency(*k) == k for k in indices)
    grid = frequency_grid(32)
    values = np.load(tmp_path / "accuracy.npy")
    assert values.shape == (16, 16) and np.isfinite(values).all() and len(np.unique(values)) > 3
    for row, k in zip(found, indices, strict=True):
        for y, x in (k, (-k[0], -k[1])):
            if y in grid and x in grid:
                assert values[grid.index(y), grid.index(x)] == pytest.approx(float(row["test_accuracy"]))
    inner = values[1:, 1:]  # −14 to 14: each frequency beside its negative
    assert np.array_equal(inner, inner[::-1, ::-1])
    text = capsys.readouterr().out
    assert "over 256 cells of the map: mean " in text and f"figure: {tmp_path / 'accuracy.png'}" in text


def test_single_frequencies_leave_gaps_and_a_frequency_and_its_negative_are_one_run(tmp_path):
    start(tmp_path, "--frequency", 2, 0, "--frequency", -2, 0, "--frequency", 0, 0)
    assert [(row["frequency_y"], row["frequency_x"]) for row in rows(tmp_path)] == [("-2", "0"), ("0", "0")]
    values = np.load(tmp_path / "accuracy.npy")
    assert values.shape == (4, 4) and np.isfinite(values).sum() == 3  # −2, 0, 2 of −4, −2, 0, 2
    assert values[1, 2] == values[3, 2]


def test_an_odd_frequency_makes_the_map_finer(tmp_path):
    start(tmp_path, "--frequency", 3, 1)
    assert np.load(tmp_path / "accuracy.npy").shape == (8, 8)


def test_the_sine_map_leaves_out_the_frequencies_without_a_sine(tmp_path):
    start(tmp_path, "--phase", "sine")
    values = np.load(tmp_path / "accuracy.npy")
    assert len(rows(tmp_path)) == 6 and np.isnan(values).sum() == 4


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_smallest_images_have_a_map(tmp_path, size):
    start(tmp_path, "--image-size", size)
    assert np.isfinite(np.load(tmp_path / "accuracy.npy")).all()


def test_colour_images_and_a_single_channel(tmp_path):
    start(tmp_path / "all", "--num-channels", 3, "--frequency", 2, 0)
    start(tmp_path / "one", "--num-channels", 3, "--channel", 1, "--frequency", 2, 0)
    assert rows(tmp_path / "all") != rows(tmp_path / "one")


def test_random_directions_do_not_depend_on_how_many_there_are(tmp_path):
    start(tmp_path / "two", "--directions", "random", "--num-random", 2)
    start(tmp_path / "four", "--directions", "random", "--num-random", 4)
    assert [row["random_index"] for row in rows(tmp_path / "four")] == ["0", "1", "2", "3"]
    assert rows(tmp_path / "four")[:2] == rows(tmp_path / "two")
    assert np.load(tmp_path / "four" / "accuracy.npy").shape == (4,)
    assert (tmp_path / "four" / "accuracy.png").stat().st_size > 1000


@pytest.fixture
def nads(tmp_path):
    """A file of NADs of 8×8 images, the last row missing as in the authors' files."""
    rows = np.linalg.qr(np.random.default_rng(0).standard_normal((64, 64)))[0].astype(np.float32)
    np.save(tmp_path / "nads.npy", rows[:-1])
    return tmp_path / "nads.npy"


def test_nads_are_trained_at_the_indices_asked_for(tmp_path, nads, capsys):
    start(tmp_path / "run", "--directions", "nads", "--nads", nads, "--nad-index", "0:64:21")
    assert [row["nad_index"] for row in rows(tmp_path / "run")] == ["0", "21", "42", "63"]
    values = np.load(tmp_path / "run" / "accuracy.npy")
    assert values == pytest.approx([float(row["test_accuracy"]) for row in rows(tmp_path / "run")])
    assert (tmp_path / "run" / "accuracy.png").exists() and "over 4 directions: mean" in capsys.readouterr().out


def test_a_row_is_the_training_that_the_function_does(tmp_path, nads):
    start(tmp_path / "run", "--directions", "nads", "--nads", nads, "--nad-index", "5")
    (row,) = rows(tmp_path / "run")
    outcome = train_on_direction(
        torch.from_numpy(np.load(nads)[5]).view(1, 8, 8), arch="logreg", num_train=60, num_test=200, epochs=2,
        batch_size=16, sigma=1.0, seed=directional_bias.seeding.seed_of(0, "nads", 5, 0),
    )  # fmt: skip
    assert {key: float(row[key]) for key in outcome} == pytest.approx(outcome, rel=1e-5)


def test_lenet_learns_a_low_frequency(tmp_path):
    sizes = "--image-size 16 --num-train 2000 --num-test 200 --epochs 6 --sigma 0.3 --frequency 1 0".split()
    main(["--arch", "LeNet", *sizes, "--device", "cpu", "--output", str(tmp_path)])
    assert float(rows(tmp_path)[0]["test_accuracy"]) > 90


# --- Repetitions, divergence


def test_repetitions_give_mean_and_spread(tmp_path, capsys):
    start(tmp_path, "--frequency", 2, 0, "--frequency", 2, 2, "--seeds", 3)
    found = rows(tmp_path)
    assert [row["repetition"] for row in found] == ["0", "1", "2"] * 2
    accuracy = np.array([float(row["test_accuracy"]) for row in found]).reshape(2, 3)
    values = np.load(tmp_path / "accuracy.npy")
    assert np.unique(values[np.isfinite(values)]) == pytest.approx(np.unique(accuracy.mean(1)))
    spread = accuracy.std(axis=1, ddof=1).mean()
    assert f"standard deviation over repetitions: {spread:.2f} points" in capsys.readouterr().out


def test_more_repetitions_keep_those_that_are_there(tmp_path):
    start(tmp_path, "--frequency", 2, 0)
    first = rows(tmp_path)
    start(tmp_path, "--frequency", 2, 0, "--seeds", 2)
    assert rows(tmp_path)[:1] == first and len(rows(tmp_path)) == 2


def test_trainings_that_all_diverged_are_an_error_that_names_the_rate(tmp_path, capsys):
    options = ["--max-lr", "1e38", "--clip-norm", "1e30", "--frequency", "2", "0"]
    with pytest.raises(SystemExit) as exit:
        start(tmp_path, *options)
    captured = capsys.readouterr()
    assert exit.value.code == 2 and "try a smaller --max-lr than 1e+38" in captured.err
    assert "1 of 1 trainings diverged" in captured.out
    assert rows(tmp_path)[0]["test_accuracy"] == "nan"


def test_a_repetition_that_diverged_is_left_out_of_the_mean():
    values = [("0", "60"), ("1", "nan"), ("2", "70")]
    found = [{"nad_index": "4", "repetition": r, "test_accuracy": v} for r, v in values]
    mean, spread, number = runs.mean_and_spread(found, ["nad_index"])[(4,)]
    assert number == 2 and mean == 65 and spread == pytest.approx(50**0.5)


# --- Against published numbers


def published(path, values, *, column="logreg", end="\n"):
    """A CSV file with an accuracy for each (k_y, k_x)."""
    lines = [f"frequency_y,frequency_x,{column}", *(f"{y},{x},{value}" for (y, x), value in values.items())]
    path.write_text("\n".join(lines) + end)
    return path


def test_a_map_compared_with_itself_agrees(tmp_path, capsys):
    start(tmp_path)
    grid = frequency_grid(8)
    values = np.load(tmp_path / "accuracy.npy")
    own = {(y, x): values[i, j] for i, y in enumerate(grid) for j, x in enumerate(grid)}
    capsys.readouterr()
    # The same command only reports again; the last line counts, whether or not it ends.
    start(tmp_path, "--published", published(tmp_path / "own.csv", own, end=""))
    text = capsys.readouterr().out
    assert (
        "against own.csv, 16 directions, 9 experiments: Pearson 1.000, Spearman 1.000, mean absolute difference 0.00"
        in text
    )
    assert (tmp_path / "published.png").stat().st_size > 1000


def test_mirror_images_are_averaged_before_they_are_compared(tmp_path, capsys):
    args = parse_arguments([*TINY, "--published", str(tmp_path / "map.csv"), "--output", str(tmp_path)])
    theirs = {(-2, 2): 60, (2, 2): 70, (0, 0): 80, (0, 2): 55, (0, -2): 57, (-4, -4): ""}
    published(tmp_path / "map.csv", theirs)
    ours = {(-2, -2): 64.0, (-2, 2): 68.0, (0, 0): 81.0, (0, -2): 58.0, (-4, -4): 50.0}
    directional_bias.compare_with_published(ours, args)
    # (65, 66) twice, (80, 81), (56, 58) twice: every published cell counts
    text = capsys.readouterr().out
    assert "5 directions, 3 experiments: " in text and "Spearman 1.000, mean absolute difference 1.40 points" in text


def test_a_flat_map_has_no_correlation_and_no_warning(tmp_path, capsys):
    args = parse_arguments([*TINY, "--published", str(tmp_path / "map.csv"), "--output", str(tmp_path)])
    flat = {(0, x): 100.0 for x in (-4, -2, 0)}
    published(tmp_path / "map.csv", flat)
    directional_bias.compare_with_published(flat, args)
    assert "Pearson nan, Spearman nan, mean absolute difference 0.00" in capsys.readouterr().out


def test_fewer_than_three_common_directions_are_too_few(tmp_path, capsys):
    file = published(tmp_path / "map.csv", {(0, 0): 50, (0, 2): 60})
    start(tmp_path / "run", "--frequency", 0, 0, "--published", file)
    out = capsys.readouterr().out
    assert "has 1 of these directions: at least 3 are needed" in out and "figure: " in out


@pytest.mark.parametrize(
    "content",
    ["", "frequency_y,frequency_x,lenet\n0,0,50\n", "frequency_y,frequency_x,logreg\n0,zero,50\n",
     "frequency_y,frequency_x,logreg\n0,0,good\n", "frequency_x,logreg\n0,50\n", "\x00\xff\n1\n"],
)  # fmt: skip
def test_published_numbers_that_cannot_be_read_are_refused_before_any_training(tmp_path, capsys, content):
    (tmp_path / "map.csv").write_text(content, encoding="latin-1")
    message = refusal(capsys, *TINY, "--published", tmp_path / "map.csv", "--output", tmp_path / "run")
    assert "map.csv is not a CSV file with numbers in columns frequency_y, frequency_x, logreg" in message
    assert not (tmp_path / "run").exists()


# --- Continuing


def test_the_same_command_continues_where_it_stopped(tmp_path, monkeypatch):
    start(tmp_path / "whole")
    trained = []

    def train_three(direction, **options):
        trained.append(direction)
        if len(trained) > 3:
            raise KeyboardInterrupt
        return train_on_direction(direction, **options)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(directional_bias, "train_on_direction", train_three)
        start(tmp_path / "run")
    assert len(rows(tmp_path / "run")) == 3
    with open(tmp_path / "run" / "accuracies.csv", "a") as file:
        file.write("0,-2,0,61.6")  # a row that a kill cut short
    start(tmp_path / "run")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert np.array_equal(np.load(tmp_path / "run" / "accuracy.npy"), np.load(tmp_path / "whole" / "accuracy.npy"))


def test_a_finished_run_trains_nothing_again(tmp_path, monkeypatch):
    start(tmp_path)
    before = (tmp_path / "accuracies.csv").read_bytes()
    monkeypatch.setattr(directional_bias, "train_on_direction", None)
    start(tmp_path)
    assert (tmp_path / "accuracies.csv").read_bytes() == before


def test_the_accuracies_do_not_depend_on_the_order_of_the_directions(tmp_path):
    forward = ["--frequency", 0, 0, "--frequency", 2, 2]
    start(tmp_path / "a", *forward)
    start(tmp_path / "b", *forward[3:], *forward[:3])
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sigma", 2], "sigma was 3.0, now 2.0"),
        (["--epochs", 3, "--seed", 1], "epochs was 2, now 3; seed was 0, now 1"),
        (["--precision", "bf16"], "precision was 'fp32', now 'bf16'"),
        (["--phase", "sine"], "phase was 'cosine', now 'sine'"),
    ],
)
def test_other_settings_on_the_same_folder_are_refused_with_the_differing_keys(tmp_path, capsys, options, words):
    start(tmp_path, "--frequency", 2, 0)
    before = (tmp_path / "accuracies.csv").read_bytes()
    capsys.readouterr()
    message = refusal(capsys, *TINY, "--frequency", 2, 0, *options, "--output", tmp_path)
    assert words in message and "arch" not in message
    assert (tmp_path / "accuracies.csv").read_bytes() == before


def test_a_run_of_another_device_whose_random_numbers_are_others_is_refused(tmp_path, capsys):
    start(tmp_path, "--frequency", 2, 0)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    capsys.readouterr()
    message = refusal(capsys, *TINY, "--frequency", 2, 0, "--output", tmp_path)
    assert "(device was 'cuda', now 'cpu')" in message


def test_another_file_of_nads_on_the_same_folder_is_refused_and_a_copy_is_not(tmp_path, nads, capsys):
    options = ["--directions", "nads", "--nad-index", "0", "--nads"]
    start(tmp_path / "run", *options, nads)
    np.save(tmp_path / "copy.npy", np.load(nads))
    start(tmp_path / "run", *options, tmp_path / "copy.npy")
    np.save(tmp_path / "other.npy", np.eye(64))
    capsys.readouterr()
    assert "nads was" in refusal(capsys, *TINY, *options, tmp_path / "other.npy", "--output", tmp_path / "run")


def test_runs_of_other_noise_or_without_pooling_have_folders_of_their_own():
    options = (["--sigma", "3"], ["--sigma", "1"], ["--no-pooling"], ["--no-pooling", "--sigma", "1"])
    names = [parse_arguments(["--arch", "lenet", *option]).output.name for option in options]
    ending = ("-fourier", "-sigma1-fourier", "-nopooling-fourier", "-nopooling-sigma1-fourier")
    assert names == [f"LeNet{end}" for end in ending]


def test_another_spelling_of_the_architecture_is_the_same_run(tmp_path):
    start(tmp_path, "--frequency", 2, 0)
    start(tmp_path, "--frequency", 2, 0, "--arch", "LogReg")


# --- The estimate


def test_a_dry_run_says_what_there_is_to_do_and_writes_nothing(tmp_path, capsys):
    start(tmp_path / "run", "--frequency", 2, 0)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    capsys.readouterr()
    start(tmp_path / "run", "--frequency", 2, 0, "--frequency", 0, 2, "--frequency", 2, 2, "--dry-run")
    printed = capsys.readouterr().out
    assert printed.startswith("3 trainings, 1 of them done; 2 to do on 1 rank\n")
    assert "estimated time here: 0:0" in printed
    # LogReg: 2·64·2 operations an image; three passes of 2 epochs over 60 images, and a test of 200
    assert f"operations: {2 * 64 * 2 * (3 * 2 * 60 + 200):.2e} each" in printed
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    message = refusal(capsys, *TINY, "--output", tmp_path / "run", "--epsilon", 2, "--dry-run")
    assert "epsilon was 1.0, now 2.0" in message
    start(tmp_path / "new", "--dry-run")
    assert not (tmp_path / "new").exists()


# --- Several processes


def command(folder, *options):
    return [str(ROOT / "directional_bias.py"), *TINY, *map(str, options), "--output", str(folder)]


def test_a_run_that_was_killed_and_continued_has_the_rows_of_an_uninterrupted_one(tmp_path):
    options = ["--seeds", 4, "--num-train", 600, "--epochs", 6]
    # With its ranks, one a core; killed as soon as two rows are there, and with it all that it started.
    with subprocess.Popen([sys.executable, *command(tmp_path / "run", *options)], stderr=subprocess.DEVNULL) as process:
        table = tmp_path / "run" / "accuracies.csv"
        deadline = time.monotonic() + 120
        while not (table.exists() and table.read_bytes().count(b"\n") >= 3):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    with open(tmp_path / "run" / ".lock") as lock:
        while True:  # its ranks notice and end
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    time.sleep(0.2)  # the ranks that do not hold the lock
    assert 2 <= len(rows(tmp_path / "run")) < 40
    start(tmp_path / "run", *options)
    start(tmp_path / "whole", *options)
    assert len(rows(tmp_path / "run")) == 40
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_share_the_cells_and_the_rows_are_those_of_one(tmp_path, ranks):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    subprocess.run(
        [sys.executable, *torchrun, *command(tmp_path / "ranks", "--seeds", 2)], check=True, timeout=300,
        capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    start(tmp_path / "one", "--seeds", 2)
    assert len(rows(tmp_path / "one")) == 20
    assert rows(tmp_path / "ranks") == rows(tmp_path / "one")
    assert np.array_equal(np.load(tmp_path / "ranks" / "accuracy.npy"), np.load(tmp_path / "one" / "accuracy.npy"))


def test_ctrl_c_is_one_line_and_leaves_no_rank(tmp_path):
    options = ["--seeds", 40, "--num-train", 600, "--epochs", 6]
    with subprocess.Popen(
        [sys.executable, *command(tmp_path / "run", *options)], stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "accuracies.csv").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert "\nstopped: the same command continues\n" in errors


def test_several_ranks_refuse_a_run_in_one_line_too(tmp_path):
    start(tmp_path, "--frequency", 2, 0)
    result = subprocess.run(
        [sys.executable, *command(tmp_path, "--sigma", 2)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 2 and not result.stdout
    assert re.fullmatch(r"directional_bias\.py: error: .*\(sigma was 3\.0, now 2\.0\): [^\n]*\n", result.stderr)


# --- Bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--arch", "lenat"], "unknown architecture 'lenat': did you mean lenet"),
        (["--arch", "lenet"], "at least 16x16"),
        (["--no-pooling"], "logreg does not accept pooling=False"),
        (["--frequency", 5, 0], "frequency 5 along y is outside the image: expected -4 to 4 for 8 pixels"),
        (["--frequency", 0, -5], "frequency -5 along x is outside the image"),
        (["--frequency", 8, 8], "frequency 8 along y is outside the image"),
        (["--frequency", 1], "expected 2 arguments"),
        (["--frequency", 1, "x"], "invalid int value: 'x'"),
        (["--frequency", -4, 4, "--phase", "sine"], "sine image of frequency (-4, 4) is zero everywhere"),
        (["--image-size", 2, "--phase", "sine"], "no sine"),
        (["--channel", 1], "channel 1 does not exist: expected 0 to 0"),
        (["--sigma", -1], "'-1' is not a number from 0"),
        (["--sigma", "nan"], "'nan' is not a number from 0"),
        (["--epsilon", 0], "'0' is not a positive number"),
        (["--epochs", 0], "'0' is not a positive whole number"),
        (["--num-train", 0], "'0' is not a positive whole number"),
        (["--batch-size", "1e3"], "'1e3' is not a positive whole number"),
        (["--seeds", 0], "'0' is not a positive whole number"),
        (["--num-test", "9" * 400], "is not a positive whole number"),
        (["--max-lr", "inf"], "'inf' is not a positive number"),
        (["--precision", "tf32"], "precision tf32 needs a CUDA device"),
        (["--precision", "fp16"], "invalid choice: 'fp16'"),
        (["--device", "cuda"], "'cuda' is not on this machine"),
        (["--device", "abacus"], "'abacus' is not a device"),
        (["--directions", "up"], "invalid choice: 'up'"),
        (["--published", "/no/such/file.csv"], "/no/such/file.csv"),
        (["--unknown"], "unrecognized arguments: --unknown"),
        (["--directions", "nads", "--nads", "/no/such/nads.npy"], "/no/such/nads.npy"),
        (["--directions", "nads", "--nad-index", "3,-1"], "'3,-1' is not a list of indices"),
        (["--nad-index", "3"], "--nad-index belongs to --directions nads, not fourier"),
        (["--directions", "nads", "--frequency", 0, 2], "--frequency belongs to --directions fourier, not nads"),
        (["--arch", "tests.tiny_networks:of_another_size"], "the network does not take 1x8x8 images: mat1 and mat2"),
    ],
    ids=lambda value: " ".join(map(str, value))[:40] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_code_2(tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert words in refusal(capsys, *TINY, "--output", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no array", "not a readable .npy array"),
        (np.eye(63), r"has shape (63, 63): expected (64, 64), or one row less"),
        (2 * np.eye(64), "are not orthonormal"),
        (np.full((64, 64), np.nan), "are not orthonormal"),
        (np.eye(64), "NAD index 64 does not exist: expected 0 to 63"),
    ],
    ids=["broken", "wrong shape", "not orthonormal", "nan", "too few"],
)
def test_bad_files_of_nads_are_one_line_and_code_2(tmp_path, capsys, content, words):
    file = tmp_path / "nads.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.save(file, content)
    options = ["--directions", "nads", "--nads", file, "--nad-index", "0,64"]
    assert words in refusal(capsys, *TINY, *options, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_output_that_cannot_be_written_is_one_line_and_code_2(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "file" in refusal(capsys, *TINY, "--output", tmp_path / "file")
    assert "Not a directory" in refusal(capsys, *TINY, "--output", tmp_path / "file" / "run")
    if os.geteuid() != 0:  # root writes everywhere
        tmp_path.chmod(0o500)
        assert "Permission denied" in refusal(capsys, *TINY, "--output", tmp_path / "run")
        tmp_path.chmod(0o700)


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    text = capsys.readouterr().out
    options = """arch directions frequency nad-index nads no-pooling seeds num-train num-test sigma epsilon epochs
        batch-size max-lr momentum weight-decay clip-norm seed device precision output phase channel published"""
    assert exit.value.code == 0 and all(f"--{option}" in text for option in options.split())


# --- The paper's numbers


def test_the_map_puts_k_y_in_rows_and_dc_in_the_middle():
    frequencies = frequency_grid(8)
    values = accuracy_map({(-2, 0): 70.0, (0, 0): 90.0}, frequencies, 8)
    assert values[2, 2] == 90 and values[1, 2] == values[3, 2] == 70 and np.isnan(values).sum() == 13


@pytest.mark.slow
@pytest.mark.parametrize("k", [(0, -2), (-4, -2), (-2, -6)])
def test_lenet_learns_as_much_of_a_frequency_as_published(reference, k):
    with open(reference / "fourier_accuracies.csv", newline="") as file:
        table = {
            (int(row["frequency_y"]), int(row["frequency_x"])): float(row["lenet"]) for row in csv.DictReader(file)
        }
    theirs = (table[k] + table[-k[0], k[1]]) / 2
    ours = train_on_direction(fourier_direction(*k), seed=1)["test_accuracy"]
    assert ours == pytest.approx(theirs, abs=8)  # a training's standard deviation is 2.7


@pytest.mark.slow
def test_without_pooling_lenet_learns_what_it_does_not_learn_with_it():
    v = fourier_direction(-8, -3, height=16, width=16)
    sizes = dict(num_train=4000, num_test=1000, sigma=1.0, epochs=10)
    assert train_on_direction(v, pooling=False, **sizes)["test_accuracy"] > 99
    assert train_on_direction(v, pooling=True, **sizes)["test_accuracy"] < 75
