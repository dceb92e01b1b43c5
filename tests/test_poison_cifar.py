"""The third experiment, from its rule of carriers to its folder, on images made here."""

import csv
import errno
import itertools
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import poison_cifar
from models import build_model
from poison_cifar import carrier, flip, main, parse_arguments, poison, prepare, train_and_test
from tests.tiny_images import write_cifar10, write_folder
from utils import cifar, distributed, plotting, runs, seeding, training
from utils.training import evaluate

ROOT = Path(__file__).resolve().parents[1]
TINY = "--arch logreg --data images --epochs 3 --batch-size 8 --max-lr 0.02 --device cpu".split()
MEAN = torch.tensor(cifar.CIFAR10_MEAN).view(3, 1, 1)
STD = torch.tensor(cifar.CIFAR10_STD).view(3, 1, 1)


@pytest.fixture(scope="session")
def nads_file(tmp_path_factory):
    """Orthonormal rows, as a file."""
    rows = np.linalg.qr(np.random.default_rng(0).standard_normal((1024, 1024)))[0]
    path = tmp_path_factory.mktemp("nads") / "nads.npy"
    np.save(path, rows.astype(np.float32))
    return path


@pytest.fixture(scope="session")
def nads(nads_file):
    return torch.from_numpy(np.load(nads_file))


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """Work in an empty folder, and in this process: starting a rank a core costs seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distributed, "num_cores", lambda: 1)


@pytest.fixture
def no_figures(monkeypatch):
    """Figures cost more than these trainings: leave empty files in their place."""
    monkeypatch.setattr(plotting, "save_figure", lambda _, path: path.touch())


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "images")


def start(output, nads_file, *options):
    main([*TINY, "--nads", str(nads_file), *map(str, options), "--output", str(output)])
    return Path(output)


def table(path):
    """The rows of a CSV file without their timings, as text."""
    with open(path, newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def rows(folder):
    return table(folder / "accuracies.csv")


def names(folder):
    return {path.name for path in folder.iterdir()}


def refusal(capsys, *argv):
    """The one line on stderr, besides progress bars, with which the command is refused, with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in argv])
    lines = capsys.readouterr().err.split("\n")
    assert exit.value.code == 2 and lines[-1] == "", lines
    *bars, message = lines[:-1]
    assert re.match(r"\S+: error: ", message) and "\r" not in message, lines
    assert all("\r" in bar for bar in bars), lines
    return message


def random_images(count, seed=0):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def coefficients(images, nads):
    """In double precision, (n, 3, 1024)."""
    return images.double().flatten(2) @ nads.double().T


# --- The rule


def test_each_class_has_its_carrier():
    expected = {
        0: (70, 0, -1), 1: (70, 1, +1), 2: (70, 2, -1), 3: (70, 0, +1), 4: (70, 1, -1), 5: (70, 2, +1),
        6: (71, 0, -1), 7: (71, 1, +1), 8: (71, 2, -1), 9: (71, 0, +1), 10: (71, 1, -1), 11: (71, 2, +1),
    }  # fmt: skip
    assert {label: carrier(label, 70) for label in range(12)} == expected
    assert len(set(expected.values())) == cifar.MAX_CLASSES == 12


def test_plan_prints_the_carriers_and_needs_no_images(capsys):
    main(["--arch", "lenet", "--nad-index", "70,3", "--plan", "--data", "no/such/folder"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["nad_index", "class", "NAD", "channel", "sign"] and len(lines) == 1 + 24
    assert lines[1] == ["70", "0", "70", "red", "-1"]
    assert lines[6] == ["70", "5", "70", "blue", "+1"]
    assert lines[8] == ["70", "7", "71", "green", "+1"]
    assert lines[13] == ["3", "0", "3", "red", "-1"]
    assert not names(Path())


def test_the_defaults_are_the_papers():
    args = vars(parse_arguments([]))
    expected = dict(
        arch="resnet18", transform="poison", nad_index=[0], epsilon=0.05, epochs=50, batch_size=128, max_lr=0.21,
        momentum=0.9, weight_decay=5e-4, clip_norm=0.5, augment="none", precision="fp32", seeds=1, subset=None,
        normalization="cifar10", nads=ROOT / "NADs" / "ResNet18_NADs.npy",
    )  # fmt: skip
    assert expected.items() <= args.items()
    assert cifar.CIFAR10_MEAN == (0.4914, 0.4822, 0.4465) and cifar.CIFAR10_STD == (0.247, 0.243, 0.261)


def test_a_folder_is_normalised_as_measured_unless_asked_otherwise(folder):
    assert parse_arguments(["--data", str(folder)]).normalization == "measured"
    assert parse_arguments(["--data", str(folder), "--normalization", "cifar10"]).normalization == "cifar10"


# --- Poison


@given(st.integers(0, 1022), st.sampled_from([1e-3, 0.05, 3.0]), st.integers(0, 2**32 - 1))
def test_poison_replaces_the_coefficient_on_the_carrier_and_nothing_else(nads, index, epsilon, seed):
    images, labels = random_images(12, seed), torch.arange(12)
    poisoned = poison(images, labels, nads, nad_index=index, epsilon=epsilon)
    assert poisoned.shape == images.shape and poisoned.dtype == torch.float32
    before, after = coefficients(images, nads), coefficients(poisoned, nads)
    for label in range(12):
        nad, channel, sign = carrier(label, index)
        # float32 rows have unit norm to 1e-7, which an ε above 1 multiplies
        assert after[label, channel, nad] == pytest.approx(sign * epsilon, abs=5e-7 * max(1, epsilon))
        others = [c for c in range(3) if c != channel]
        assert torch.equal(poisoned[label, others], images[label, others])
        rest = torch.arange(1024) != nad
        assert torch.allclose(after[label, channel, rest], before[label, channel, rest], rtol=0, atol=2e-6)


def test_poison_replaces_whatever_coefficient_there_was(nads):
    images = 20 * nads[4].view(1, 1, 32, 32) * torch.tensor([-1, 0, 1, 5]).view(4, 1, 1, 1).expand(4, 3, 1, 1)
    poisoned = poison(images, torch.full((4,), 3), nads, nad_index=4)  # red, +
    assert torch.allclose(coefficients(poisoned, nads)[:, 0, 4], torch.tensor(0.05).double(), rtol=0, atol=1e-5)
    again = poison(poisoned, torch.full((4,), 3), nads, nad_index=4)
    assert torch.allclose(again, poisoned, rtol=0, atol=1e-6)


def test_poison_does_not_clip_and_leaves_its_input_alone(nads):
    images = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)])
    copy = images.clone()
    poisoned = poison(images, torch.tensor([0, 0]), nads, nad_index=0)
    assert poisoned.min() < 0 and poisoned.max() > 1 and torch.equal(images, copy)


def test_the_carrier_alone_is_less_than_a_grey_level(nads):
    black = torch.zeros(1, 3, 32, 32)
    change = poison(black, torch.tensor([1]), nads, nad_index=9)[0, 1]
    assert change.square().mean().sqrt() == pytest.approx(0.05 / 32, rel=1e-4) and 0.05 / 32 < 1 / 255
    assert torch.allclose(change.flatten(), 0.05 * nads[9], rtol=0, atol=1e-7)


def test_images_of_one_class_are_poisoned_as_among_others(nads):
    images, labels = random_images(9), torch.tensor([5, 2, 5, 9, 0, 2, 5, 11, 7])
    poisoned = poison(images, labels, nads, nad_index=12)
    for n in range(9):
        alone = poison(images[n : n + 1], labels[n : n + 1], nads, nad_index=12)
        assert torch.allclose(alone[0], poisoned[n], rtol=0, atol=1e-6)


# --- Flip


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1))
def test_a_flip_reverses_the_coefficients_and_keeps_norms_and_inner_products(nads, seed):
    images = 4 * random_images(4, seed) - 2
    flipped = flip(images, nads)
    assert flipped.shape == images.shape and flipped.dtype == torch.float32
    assert torch.allclose(coefficients(flipped, nads), coefficients(images, nads).flip(2), rtol=0, atol=1e-4)
    before, after = images.double().flatten(2), flipped.double().flatten(2)
    gram = torch.einsum("ncp,mcp->cnm", before, before)
    assert torch.allclose(torch.einsum("ncp,mcp->cnm", after, after), gram, rtol=0, atol=1e-3)
    assert torch.allclose(flip(flipped, nads), images, rtol=0, atol=2e-5)


def test_a_flip_sends_nad_i_to_the_one_that_is_as_far_from_the_end(nads):
    images = nads[[0, 100, 1023], None].expand(3, 3, 1024).reshape(3, 3, 32, 32)
    expected = nads[[1023, 923, 0], None].expand(3, 3, 1024).reshape(3, 3, 32, 32)
    assert torch.allclose(flip(images, nads), expected, rtol=0, atol=1e-6)


# --- What is trained on


@pytest.fixture
def data(folder):
    return cifar.load_images(folder)


def test_poison_comes_before_the_normalisation_and_into_the_training_images_only(data, nads):
    images = prepare(data, nads=nads, nad_index=30)
    assert list(images) == ["train", "test", "carrying"]
    clean = (data.test_images / 255 - MEAN) / STD
    assert torch.allclose(images["test"], clean, rtol=0, atol=1e-5)
    for name, labels in (("train", data.train_labels), ("carrying", data.test_labels)):
        after = coefficients(images[name] * STD + MEAN, nads)
        for n, label in enumerate(labels.tolist()):
            nad, channel, sign = carrier(label, 30)
            assert after[n, channel, nad] == pytest.approx(sign * 0.05, abs=2e-5)
    pixels = {"train": data.train_images / 255, "carrying": data.test_images / 255}
    for name, before in pixels.items():
        change = images[name] * STD + MEAN - before
        assert 0.05 < change.flatten(1).norm(dim=1).max() < 10 and change.abs().max() < 1


def test_a_flip_comes_after_the_normalisation_and_into_all_images(data, nads):
    images = prepare(data, transform="flip", nads=nads)
    assert list(images) == ["train", "test"]
    for name, pixels in (("train", data.train_images), ("test", data.test_images)):
        assert torch.allclose(images[name], flip((pixels / 255 - MEAN) / STD, nads), rtol=0, atol=1e-4)
        assert not torch.allclose(images[name], (flip(pixels / 255, nads) - MEAN) / STD, rtol=0, atol=1e-2)


def test_without_a_transform_images_are_normalised_only(data):
    before = data.train_images.clone()
    images = prepare(data, transform="none", mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    assert list(images) == ["train", "test"] and torch.equal(data.train_images, before)
    expected = (before / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([1, 2, 4]).view(3, 1, 1)
    assert torch.allclose(images["train"], expected, rtol=0, atol=1e-6)


def test_a_network_learns_the_carrier_where_the_images_hold_nothing_else(nads):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(100, 156, (700, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.arange(700) % 10
    data = cifar.ImageData(pixels[:500], labels[:500], pixels[500:], labels[500:], tuple("abcdefghij"))
    images = prepare(data, nads=nads, nad_index=50, epsilon=4.0)
    _, history = train_and_test(images, data.train_labels, data.test_labels, arch="logreg", epochs=12, max_lr=0.05)
    assert history[-1]["train_accuracy"] == 100 and history[-1]["carrying_accuracy"] > 95
    assert history[-1]["test_accuracy"] < 30


# --- The whole script


def test_cifar10_goes_through_the_whole_script(tmp_path, monkeypatch, nads_file, capsys):
    images, labels = write_cifar10(tmp_path / "data", monkeypatch)
    published = tmp_path / "published.csv"
    published.write_text("nad_index,accuracy\n0,17.5\n10,36.5\n")
    output = start("run", nads_file, "--data", "data", "--nad-index", "5,1022", "--published", published)
    weights = [f"{kind}-nad{i}-0.{end}" for i in (5, 1022) for kind, end in (("weights", "pt"), ("history", "csv"))]
    figures = [f"{kind}-nad{i}-0.png" for i in (5, 1022) for kind in ("curves", "images")]
    assert names(output) == {*weights, *figures, "accuracy.png", "accuracies.csv", "config.json", ".lock"}
    assert all((output / name).stat().st_size > 2000 for name in [*figures, "accuracy.png"])
    text = capsys.readouterr().out
    assert "clean test accuracy, NAD 5: " in text and "clean test accuracy, NAD 1022: " in text
    assert "figure: run/accuracy.png" in text and "rows: run/accuracies.csv" in text

    # A row is the training that the functions do.
    data = cifar.load_images(Path("data"))
    assert (
        np.array_equal(data.train_images.permute(0, 2, 3, 1).numpy(), images) and data.train_labels.tolist() == labels
    )
    prepared = prepare(data, nads=poison_cifar.load_nads(nads_file, 1024), nad_index=5)
    _, history = train_and_test(
        prepared, data.train_labels, data.test_labels, arch="logreg", seed=seeding.seed_of(0, 0), epochs=3,
        batch_size=8, max_lr=0.02,
    )  # fmt: skip
    saved = table(output / "history-nad5-0.csv")
    assert list(saved[0]) == ["epoch", "loss", "train_accuracy", "test_accuracy", "carrying_accuracy"]
    assert [{key: float(value) for key, value in row.items()} for row in saved] == history
    keys = ["nad_index", "repetition", "loss", "train_accuracy", "test_accuracy", "carrying_accuracy"]
    row = rows(output)[0]
    assert list(row) == keys and (row["nad_index"], row["repetition"]) == ("5", "0")
    assert {key: float(row[key]) for key in keys[2:]} == pytest.approx({k: history[-1][k] for k in keys[2:]}, rel=1e-5)

    # And the weights are those that were tested.
    model = build_model("logreg", 3, 10)
    model.load_state_dict(torch.load(output / "weights-nad5-0.pt", weights_only=True))
    assert evaluate(model, prepared["test"], data.test_labels) == history[-1]["test_accuracy"]


def test_a_folder_of_jpeg_images_goes_through_lenet_flipped_with_repetitions(tmp_path, nads_file, capsys):
    write_folder(tmp_path / "images", ending="jpg")
    output = start("run", nads_file, "--arch", "LeNet", "--transform", "flip", "--seeds", 2)
    kinds = {"history": "csv", "weights": "pt", "curves": "png", "images": "png"}
    files = {f"{kind}-flip-{r}.{end}" for kind, end in kinds.items() for r in (0, 1)}
    assert names(output) == files | {"accuracies.csv", "config.json", ".lock"}
    found = rows(output)
    assert [row["repetition"] for row in found] == ["0", "1"] and found[0]["loss"] != found[1]["loss"]
    assert list(found[0]) == ["repetition", "loss", "train_accuracy", "test_accuracy"]
    accuracy = [float(row["test_accuracy"]) for row in found]
    expected = f"flip: {np.mean(accuracy):.1f} % ± {np.std(accuracy, ddof=1):.1f} over 2 repetitions"
    assert f"clean test accuracy, {expected}" in capsys.readouterr().out


def test_unpoisoned_training_needs_no_nads_and_draws_no_examples(folder):
    output = start("run", "/no/such/nads.npy", "--transform", "none")
    assert {"history-none-0.csv", "weights-none-0.pt", "curves-none-0.png"} < names(output)
    assert "images-none-0.png" not in names(output)


def test_the_figure_over_the_index_has_means_spread_and_the_published_points(
    folder, nads_file, no_figures, monkeypatch
):
    Path("published.csv").write_text("nad_index,accuracy\n0,17.5\n1000,80\n")
    drawn = {}
    monkeypatch.setattr(
        plotting, "curve_figure", lambda x, curves, **options: drawn.update(x=x, curves=curves, **options)
    )
    output = start("run", nads_file, "--nad-index", "0:9:4", "--seeds", 2, "--published", "published.csv")
    assert (output / "accuracy.png").exists()
    accuracy = np.array([float(row["test_accuracy"]) for row in rows(output)]).reshape(3, 2)
    assert drawn["x"].tolist() == [0, 4, 8]
    assert drawn["curves"]["LogReg"] == pytest.approx(accuracy.mean(1))
    assert drawn["spread"]["LogReg"] == pytest.approx(accuracy.std(axis=1, ddof=1))
    assert [values.tolist() for values in drawn["published"]] == [[0, 1000], [17.5, 80]]


def test_the_normalisation_is_the_papers_or_measured_on_the_clean_training_images(
    folder, nads_file, no_figures, monkeypatch
):
    seen = []
    monkeypatch.setattr(
        poison_cifar, "prepare", lambda data, **options: seen.append((data, options)) or prepare(data, **options)
    )
    start("measured", nads_file)
    start("cifar10", nads_file, "--normalization", "cifar10")
    pixels = cifar.load_images(folder).train_images.numpy() / 255.0
    assert seen[0][1]["mean"] == pytest.approx(pixels.mean((0, 2, 3)))
    assert seen[0][1]["std"] == pytest.approx(pixels.std((0, 2, 3)))
    assert (seen[1][1]["mean"], seen[1][1]["std"]) == (cifar.CIFAR10_MEAN, cifar.CIFAR10_STD)


def test_a_subset_is_drawn_once_and_of_the_training_images_only(folder, nads_file, no_figures, monkeypatch):
    seen = []
    monkeypatch.setattr(poison_cifar, "prepare", lambda data, **options: seen.append(data) or prepare(data, **options))
    start("run", nads_file, "--subset", 10, "--nad-index", "0,3")
    start("again", nads_file, "--subset", 10)
    start("other", nads_file, "--subset", 10, "--seed", 1)
    whole = cifar.load_images(folder)
    for data in seen:
        assert data.train_images.shape == (10, 3, 32, 32) and torch.equal(data.test_images, whole.test_images)
        places = [(whole.train_images == image).flatten(1).all(1).nonzero().item() for image in data.train_images]
        assert len(set(places)) == 10 and torch.equal(whole.train_labels[places], data.train_labels)
    assert torch.equal(seen[0].train_images, seen[1].train_images)
    assert torch.equal(seen[0].train_images, seen[2].train_images)
    assert not torch.equal(seen[0].train_images, seen[3].train_images)


@pytest.mark.parametrize("options", [["--augment", "flip-crop"], ["--precision", "bf16"], ["--seed", 1]])
def test_variants_of_the_recipe_give_other_numbers_and_the_same_ones_again(folder, nads_file, no_figures, options):
    plain = rows(start("plain", nads_file))
    variant = rows(start("variant", nads_file, *options))
    assert variant != plain and rows(start("again", nads_file, *options)) == variant


def test_training_sees_augmented_images_and_tests_do_not(data, nads, monkeypatch):
    images = prepare(data, nads=nads)
    seen = []
    crop = cifar.flip_and_crop
    monkeypatch.setattr(cifar, "flip_and_crop", lambda x, generator: seen.append(len(x)) or crop(x, generator))
    train_and_test(
        images, data.train_labels, data.test_labels, arch="logreg", num_classes=3, augment="flip-crop", epochs=2,
        batch_size=10,
    )  # fmt: skip
    assert seen == [10, 10, 4] * 2


@pytest.mark.parametrize("index", [1022, 1023])
def test_six_classes_or_fewer_use_the_last_nad_too(folder, nads_file, no_figures, index):
    assert rows(start("run", nads_file, "--nad-index", index))[0]["nad_index"] == str(index)


def test_the_authors_nads_without_the_last_row_are_read(folder, nads_file, no_figures):
    np.save("shorter.npy", np.load(nads_file)[:-1])
    assert rows(start("run", "shorter.npy", "--nad-index", "1023"))


# --- Divergence


def test_trainings_that_all_diverged_are_an_error_that_names_the_rate(folder, nads_file, no_figures, capsys):
    options = ["--max-lr", "1e38", "--clip-norm", "1e30", "--nad-index", "0,4"]
    message = refusal(capsys, *TINY, "--nads", nads_file, *options, "--output", "run")
    assert "no training in run ended with a finite loss: try a smaller --max-lr than 1e+38" in message
    found = rows(Path("run"))
    assert [row["nad_index"] for row in found] == ["0", "4"]
    assert all(row[key] == "nan" for row in found for key in ("loss", "train_accuracy", "test_accuracy"))
    history = table("run/history-nad0-0.csv")
    assert not math.isfinite(float(history[-1]["loss"]))
    assert all(math.isfinite(float(epoch["loss"])) for epoch in history[:-1])  # it ends where the loss did


def test_a_repetition_that_diverged_is_named_and_left_out_of_the_mean(
    folder, nads_file, no_figures, capsys, monkeypatch
):
    train_epoch, calls = training.train_epoch, itertools.count()

    def diverging(model, *args, **options):
        loss, accuracy = train_epoch(model, *args, **options)
        return (math.nan if next(calls) == 4 else loss), accuracy  # the second of the second training

    monkeypatch.setattr(training, "train_epoch", diverging)
    output = start("run", nads_file, "--seeds", 3)
    found = rows(output)
    assert [row["test_accuracy"] == "nan" for row in found] == [False, True, False]
    assert len(table(output / "history-nad0-1.csv")) == 2
    kept = [float(row["test_accuracy"]) for row in (found[0], found[2])]
    text = capsys.readouterr().out
    assert "1 of 3 trainings diverged and are left out (nad_index, repetition): [(0, 1)]" in text
    assert f"NAD 0: {np.mean(kept):.1f} % ± {np.std(kept, ddof=1):.1f} over 2 repetitions" in text


# --- Continuing


def interrupted_start(monkeypatch, epochs, *arguments):
    """Start, and stop with the keyboard after so many epochs."""
    train_epoch, calls = training.train_epoch, itertools.count()

    def stopping(*args, **options):
        if next(calls) == epochs:
            raise KeyboardInterrupt
        return train_epoch(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(training, "train_epoch", stopping)
        start(*arguments)


def equal_runs(one, other):
    """Whether two folders hold the same rows, histories and weights."""
    assert rows(one) == rows(other)
    files = sorted(name for name in names(one) if name.startswith(("history", "weights")))
    assert files == sorted(name for name in names(other) if name.startswith(("history", "weights")))
    for name in files:
        if name.endswith(".csv"):
            assert (one / name).read_bytes() == (other / name).read_bytes()
        else:
            a, b = (torch.load(folder / name, weights_only=True) for folder in (one, other))
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    return True


@pytest.mark.parametrize("epochs", [1, 5])
@pytest.mark.parametrize(
    "options",
    [[], ["--arch", "tests.tiny_images:with_dropout"], ["--augment", "flip-crop", "--transform", "flip"]],
    ids=["plain", "dropout", "augmented"],
)
def test_an_interrupted_run_continues_from_its_last_epoch(folder, nads_file, no_figures, monkeypatch, epochs, options):
    options = [*options, "--seeds", 2]
    whole = start("whole", nads_file, *options)
    interrupted_start(monkeypatch, epochs, "run", nads_file, *options)
    assert not any(name.startswith(".") and name != ".lock" for name in names(Path("run")))
    train_epoch, trained = training.train_epoch, []
    monkeypatch.setattr(
        training, "train_epoch", lambda *args, **kw: trained.append(kw["epoch"]) or train_epoch(*args, **kw)
    )
    torch.manual_seed(99)  # what happened before in the process has no part in it
    assert equal_runs(start("run", nads_file, *options), whole)
    assert trained == [0, 1, 2, 0, 1, 2][epochs:]
    assert not any(name.startswith("checkpoint") for name in names(Path("run")))


def test_a_run_that_was_stopped_between_its_last_epoch_and_its_row_trains_nothing_again(
    folder, nads_file, no_figures, monkeypatch
):
    whole = start("whole", nads_file)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(runs, "append_row", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        start("run", nads_file)
    monkeypatch.setattr(training, "train_epoch", None)
    assert equal_runs(start("run", nads_file), whole)
    before = (whole / "accuracies.csv").read_bytes()
    start("whole", nads_file)  # and a finished one neither
    assert (whole / "accuracies.csv").read_bytes() == before


def test_more_indices_and_repetitions_keep_those_that_are_there(folder, nads_file, no_figures):
    output = start("run", nads_file, "--nad-index", 7)
    first = (output / "accuracies.csv").read_text().splitlines()[1]
    start("run", nads_file, "--nad-index", "3,7", "--seeds", 2)
    assert [(row["nad_index"], row["repetition"]) for row in rows(output)] == [
        (i, r) for i in ("3", "7") for r in ("0", "1")
    ]
    assert first in (output / "accuracies.csv").read_text().splitlines()


KILLED = """
import sys, time
import poison_cifar
from utils import distributed, training
distributed.num_cores = lambda: 1
train_epoch = training.train_epoch
def stuck(*args, **options):
    if options["epoch"] == 2:
        print("stuck", flush=True)
        time.sleep(1000)
    return train_epoch(*args, **options)
training.train_epoch = stuck
poison_cifar.main(sys.argv[1:])
"""


def test_a_killed_run_continues_with_the_numbers_of_an_uninterrupted_one(folder, nads_file, no_figures):
    options = ["--nads", str(nads_file), "--arch", "tests.tiny_images:with_dropout", "--output", "run"]
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, *TINY, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        assert process.stdout.readline() == b"stuck\n"
        process.send_signal(signal.SIGKILL)
    assert "checkpoint-nad0-0.pt" in names(Path("run")) and "accuracies.csv" not in names(Path("run"))
    arch = ["--arch", "tests.tiny_images:with_dropout"]
    assert equal_runs(start("run", nads_file, *arch), start("whole", nads_file, *arch))


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(folder, nads_file, no_figures, monkeypatch, capsys):
    interrupted_start(monkeypatch, 1, "logreg", nads_file)
    name = "checkpoint-nad0-0.pt"
    good = Path("logreg", name).read_bytes()
    arguments = [*TINY, "--nads", nads_file, "--output", "run"]
    Path("run").mkdir()

    Path("run", name).write_bytes(good)
    message = refusal(capsys, *arguments, "--arch", "lenet")
    assert f"the checkpoint run/{name} does not fit" in message and "delete it to start again" in message
    shutil.rmtree("run")
    Path("run").mkdir()
    for content in (good[:-500], b"no checkpoint", b""):
        Path("run", name).write_bytes(content)
        assert f"the checkpoint run/{name} cannot be read" in refusal(capsys, *arguments)
    state = torch.load(Path("logreg", name), weights_only=True)
    for other in (state | {"optimizer": {}}, {key: state[key] for key in ("model", "optimizer")}, [1], torch.ones(3)):
        runs.save_checkpoint(Path("run", name), other)
        assert f"the checkpoint run/{name} does not fit" in refusal(capsys, *arguments)

    Path("run", name).unlink()
    assert equal_runs(start("run", nads_file), start("logreg", nads_file))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--epsilon", 0.1], "epsilon was 0.05, now 0.1"),
        (["--epochs", 4, "--momentum", 0], "epochs was 3, now 4; momentum was 0.9, now 0.0"),
        (["--arch", "lenet"], "arch was 'logreg', now 'lenet'"),
        (["--transform", "flip"], "transform was 'poison', now 'flip'"),
        (["--normalization", "cifar10"], "normalization was 'measured', now 'cifar10'"),
        (["--augment", "flip-crop", "--subset", 5], "augment was 'none', now 'flip-crop'; subset was None, now 5"),
        (["--nads", "other.npy"], "nads was "),
        (["--data", "elsewhere"], "data was "),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_other_settings_on_the_same_folder_are_refused_with_the_differing_keys(
    folder, nads_file, no_figures, capsys, options, words
):
    output = start("run", nads_file)
    before = (output / "accuracies.csv").read_bytes()
    np.save("other.npy", np.load(nads_file)[::-1])
    shutil.copytree(folder, "elsewhere")
    message = refusal(capsys, *TINY, "--nads", nads_file, *options, "--output", output)
    assert words in message and "max_lr" not in message and (output / "accuracies.csv").read_bytes() == before


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_share_the_trainings_and_the_rows_are_those_of_one(folder, nads_file, ranks):
    options = ["--nads", str(nads_file), "--nad-index", "0,5", "--seeds", "2"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    result = subprocess.run(
        [sys.executable, *torchrun, str(ROOT / "poison_cifar.py"), *TINY, *options, "--output", "ranks"], timeout=300,
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("clean test accuracy, NAD 0: ") == 1 and "over 2 repetitions" in result.stdout
    one = start("one", nads_file, *options[2:])
    assert len(rows(one)) == 4 and equal_runs(Path("ranks"), one) and names(Path("ranks")) == names(one)


# --- Bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--arch", "lenat"], "unknown architecture 'lenat': did you mean lenet"),
        (["--data", "no/such/folder"], "there is no whole CIFAR-10 in no/such/folder"),
        (["--nads", "/no/such/nads.npy"], "there is no array at /no/such/nads.npy"),
        (["--nads", "images/train/a/0.png"], "images/train/a/0.png is not a readable .npy array"),
        (["--nad-index", 1024], "NAD index 1024 is too large"),
        (["--nad-index", "0:1025:64"], "NAD index 1024 is too large"),
        (["--nad-index", "-1"], "'-1' is not a list of indices"),
        (["--epsilon", 0], "'0' is not a positive number"),
        (["--subset", 0], "'0' is not a positive whole number"),
        (["--seeds", 0], "'0' is not a positive whole number"),
        (["--momentum", -1], "'-1' is not a number from 0"),
        (["--augment", "mixup"], "invalid choice: 'mixup'"),
        (["--transform", "blur"], "invalid choice: 'blur'"),
        (["--precision", "tf32"], "precision tf32 needs a CUDA device"),
        (["--device", "cuda"], "'cuda' is not on this machine"),
        (["--published", "/no/such/file.csv"], "/no/such/file.csv"),
        (["--published", "images/train/a/0.png"], "is not a CSV file with numbers in columns nad_index, accuracy"),
        (["--published", "empty.csv"], "empty.csv is not a CSV file with numbers in columns nad_index, accuracy"),
        (["--published", "columns.csv"], "columns.csv is not a CSV file with numbers in columns nad_index, accuracy"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
    ids=lambda value: " ".join(map(str, value))[:40] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_code_2(folder, nads_file, capsys, monkeypatch, options, words):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    Path("empty.csv").write_text("nad_index,accuracy\n")
    Path("columns.csv").write_text("index,accuracy\n0,17.5\n")
    assert words in refusal(capsys, *TINY, "--nads", nads_file, "--output", "run", *options)
    assert not Path("run").exists()


def test_the_last_index_needs_a_next_one_where_there_are_more_than_six_classes(
    tmp_path, monkeypatch, nads_file, capsys
):
    write_cifar10(tmp_path / "data", monkeypatch)
    message = refusal(capsys, *TINY, "--nads", nads_file, "--data", "data", "--nad-index", "5,1023", "--output", "run")
    assert "NAD index 1023 is too large: classes 6 and up take the next one, and the last of 1024 is 1023" in message
    assert not Path("run").exists()


@pytest.mark.parametrize("damage", ["corrupted", "missing"])
def test_a_damaged_batch_of_cifar10_is_one_line_and_code_2(tmp_path, monkeypatch, nads_file, capsys, damage):
    write_cifar10(tmp_path / "data", monkeypatch)
    batch = tmp_path / "data" / "cifar-10-batches-py" / "data_batch_4"
    batch.write_bytes(batch.read_bytes()[:-1] + b"!") if damage == "corrupted" else batch.unlink()
    message = refusal(capsys, *TINY, "--nads", nads_file, "--data", "data", "--output", "run")
    assert "no whole CIFAR-10 in data" in message and "--download" in message and not Path("run").exists()


@pytest.mark.parametrize("damage", ["no image", "missing class"])
def test_a_damaged_folder_is_one_line_and_code_2_after_the_progress_bar(folder, nads_file, capsys, damage):
    if damage == "no image":
        (folder / "test" / "c" / "5.png").write_bytes(b"no image")
    else:
        shutil.rmtree(folder / "test" / "c")
    message = refusal(capsys, *TINY, "--nads", nads_file, "--output", "run")
    assert (
        "images/test/c/5.png cannot be used" if damage == "no image" else "only one of train and test: c"
    ) in message
    assert names(Path()) == {"images"}


# --- A full disk


@pytest.mark.parametrize(
    "name", ["config.json", "checkpoint-nad0-0.pt", "history-nad0-0.csv", "weights-nad0-0.pt", "curves-nad0-0.png",
             "images-nad0-0.png", "accuracies.csv"],
)  # fmt: skip
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(folder, nads_file, capsys, monkeypatch, name):
    replace = os.replace

    def full(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(runs.os, "replace", full)
        message = refusal(capsys, *TINY, "--nads", nads_file, "--epochs", 2, "--output", "run")
    assert "No space left on device" in message and name in message
    present = names(Path("run"))
    assert {found for found in present if found.startswith(".")} == {".lock"}
    assert name == "accuracies.csv" or name not in present
    # With space again, the same command ends as if nothing had been.
    assert equal_runs(start("run", nads_file, "--epochs", 2), start("whole", nads_file, "--epochs", 2))


def test_a_disk_too_full_for_the_decoded_images_is_one_line_and_leaves_no_cache(folder, nads_file, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(runs.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        assert "No space left" in refusal(capsys, *TINY, "--nads", nads_file, "--output", "run")
    assert names(Path("runs/decoded")) == set() and not Path("run").exists()


def test_a_write_that_the_system_refuses_is_one_line_too(folder, nads_file, no_figures, capsys):
    cifar.load_images(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        message = refusal(capsys, *TINY, "--nads", nads_file, "--output", "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in message and names(Path("run")) == {".lock", "config.json"}


# --- The estimate


def test_a_dry_run_says_what_there_is_to_do_and_writes_nothing(folder, nads_file, no_figures, capsys):
    start("run", nads_file, "--nad-index", "3", "--seeds", 2)
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    options = [*TINY, "--nads", str(nads_file), "--output", "run", "--seeds", "2"]
    capsys.readouterr()
    main([*options, "--nad-index", "3,5,7", "--dry-run"])
    printed = capsys.readouterr().out
    assert printed.startswith("6 trainings, 2 of them done; 4 to do on 1 rank\n")
    assert "estimated time here: 0:0" in printed
    assert {path: path.read_bytes() for path in Path("run").iterdir()} == before
    # LogReg: 2·3·1024·3 operations an image; three passes of 3 epochs over 24 images, and two tests of 18 an epoch
    flops = 2 * 3 * 1024 * 3
    assert f"operations: {flops * (3 * 3 * 24 + 3 * 2 * 18):.2e} each" in printed
    assert "epsilon was 0.05, now 0.1" in refusal(capsys, *options, "--epsilon", "0.1", "--dry-run")


def test_a_dry_run_before_the_download_counts_the_images_of_cifar10(folder, nads_file, capsys):
    main([*TINY, "--nads", str(nads_file), "--data", "nowhere", "--download", "--output", "run", "--dry-run"])
    flops = 2 * 3 * 1024 * 10
    assert f"operations: {flops * (3 * 3 * 50_000 + 3 * 2 * 10_000):.2e} each" in capsys.readouterr().out
    assert not Path("run").exists() and not Path("nowhere").exists()
