"""Loading images, both forms, and what is done to them before any experiment."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import datasets

from tests.tiny_images import CIFAR10_CLASSES, draw, write_cifar10, write_folder
from utils import cifar
from utils.cifar import channel_statistics, load_images


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "images")


def same(one, other):
    return one.classes == other.classes and all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("train_images", "train_labels", "test_images", "test_labels")
    )


def image(*shape):
    return np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)


# --- CIFAR-10


def test_cifar10_is_read_in_the_order_of_its_batches(tmp_path, monkeypatch):
    images, labels = write_cifar10(tmp_path, monkeypatch)
    data = load_images(tmp_path)
    assert data.train_images.dtype == torch.uint8 and data.train_images.is_contiguous()
    assert np.array_equal(data.train_images.permute(0, 2, 3, 1).numpy(), images)
    assert data.train_labels.tolist() == labels and data.train_labels.dtype == torch.int64
    assert data.test_images.shape == (20, 3, 32, 32) and data.test_labels.tolist() == [*range(10)] * 2
    assert data.classes == CIFAR10_CLASSES


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_damaged_cifar10_is_refused_by_its_checksums_saying_what_to_do(tmp_path, monkeypatch, name):
    write_cifar10(tmp_path, monkeypatch)
    with open(tmp_path / "cifar-10-batches-py" / name, "r+b") as file:
        file.write(b"!")
    with pytest.raises(ValueError, match=r"no whole CIFAR-10 in .*corrupted.*: fetch it with --download, or name a f"):
        load_images(tmp_path)
    with pytest.raises(ValueError, match=f"name the folder above it, {tmp_path}$"):
        load_images(tmp_path / "cifar-10-batches-py")


def test_download_fetches_what_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR10, "url", (tmp_path / "server").as_uri())
    with pytest.raises(OSError, match=r"No such file .*server"):
        load_images(tmp_path / "here", download=True)


# --- A folder of images


def test_a_folder_is_read_in_the_order_of_its_names(folder):
    data = load_images(folder)
    assert data.classes == ("a", "b", "c")
    assert data.train_labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert data.test_labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    for seed, (images, count) in enumerate([(data.train_images, 8), (data.test_images, 6)]):
        expected = np.concatenate([draw(count, label, seed) for label in range(3)])
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), expected)


def test_jpeg_and_png_and_capital_endings_are_read_and_other_and_hidden_files_are_not(folder, capsys):
    for name in ("x.JPG", "y.jpeg", "z.PNG"):
        kind = "PNG" if name.endswith("PNG") else "JPEG"
        Image.fromarray(image(32, 32, 3)).save(folder / "train" / "b" / name, format=kind)
    (folder / "train" / "b" / "notes.txt").write_text("no image")
    for split in ("train", "test"):
        shutil.copytree(folder / split / "a", folder / split / ".ipynb_checkpoints")
        shutil.copy(folder / split / "a" / "0.png", folder / split / "a" / "._0.png")
    (folder / "train" / "README").write_text("no class")
    (folder / "train" / "empty").mkdir()
    data = load_images(folder)
    assert data.train_labels.bincount().tolist() == [8, 11, 8] and data.classes == ("a", "b", "c")
    counts = "27 training and 18 test images of 3 classes; 1 files of other kinds are left out"
    assert capsys.readouterr().out == f"{folder}: {counts}\n"


def test_a_folder_is_decoded_once_with_a_progress_bar(folder, monkeypatch, capsys):
    first = load_images(folder)
    text = capsys.readouterr().err
    assert "decoding train images" in text and "decoding test images" in text and "24/24" in text
    monkeypatch.setattr(cifar, "_decode", None)
    assert same(load_images(folder), first)
    assert capsys.readouterr().err == ""
    monkeypatch.chdir(folder)  # by any name of the folder
    assert same(load_images(Path("../images")), first)


def test_a_changed_a_new_and_a_removed_image_are_decoded_again(folder):
    data = load_images(folder)
    path = folder / "train" / "a" / "0.png"
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(path)
    changed = load_images(folder)
    assert not changed.train_images[0].any() and torch.equal(changed.train_images[1:], data.train_images[1:])
    path.unlink()
    assert torch.equal(load_images(folder).train_images, data.train_images[1:])
    Image.fromarray(draw(1, 0, 0)[0]).save(path)
    assert same(load_images(folder), data)
    os.utime(path, ns=(0, 0))  # the same size at another time
    assert same(load_images(folder), data)
    assert {path.name for path in folder.iterdir()} == {"train", "test", "decoded.pt"}  # one file, whatever changes


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (Image.fromarray(image(32, 32)), "it is 32x32 of mode L: expected 32x32 of mode RGB (colour)"),
        (Image.fromarray(image(32, 32, 3)).quantize(16), "it is 32x32 of mode P"),
        (Image.fromarray(image(28, 32, 3)), "it is 28x32 of mode RGB: expected 32x32"),
        (b"no image", "cannot identify image file"),
        ("cut", "truncated"),
    ],
    ids=["grey", "palette", "28x32", "no image", "cut"],
)
def test_an_image_that_does_not_fit_is_refused_by_name(folder, content, words):
    path = folder / "test" / "b" / "3.png"
    if content == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content.save(path)
    with pytest.raises(ValueError) as error:
        load_images(folder)
    message = str(error.value)
    assert message.startswith(f"{path} cannot be used: ") and words in message and "\n" not in message


def test_classes_in_only_one_of_train_and_test_are_named(folder):
    for split, name in (("train", "dog"), ("test", "cat")):
        (folder / split / name).mkdir()
        Image.fromarray(image(32, 32, 3)).save(folder / split / name / "0.png")
    with pytest.raises(ValueError, match=r"images in only one of train and test: cat, dog$"):
        load_images(folder)


@pytest.mark.parametrize("classes", [0, 1, 2, 12, 13])
def test_2_to_12_classes_are_read_and_others_are_refused(tmp_path, classes):
    (tmp_path / "images" / "train").mkdir(parents=True)
    write_folder(tmp_path / "images", classes=classes, train=1, test=1)
    if 2 <= classes <= 12:
        assert load_images(tmp_path / "images").train_labels.tolist() == list(range(classes))
    else:
        with pytest.raises(ValueError, match=f"has {classes} classes with images: expected 2 to 12"):
            load_images(tmp_path / "images")


# --- Numbers


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_the_measured_mean_and_standard_deviation_are_numpys(count, channels, seed):
    generator = np.random.default_rng(seed)
    images = generator.integers(0, generator.integers(2, 257), (count, channels, 7, 5)).astype(np.uint8)
    mean, std = channel_statistics(torch.from_numpy(images))
    values = images.astype(np.float64) / 255
    assert (*mean, *std) == pytest.approx([*values.mean((0, 2, 3)), *values.std((0, 2, 3))], abs=1e-12)


def test_a_constant_channel_is_refused():
    images = torch.stack([torch.arange(256, dtype=torch.uint8), torch.full((256,), 7)]).view(1, 2, 16, 16)
    with pytest.raises(ValueError, match="a colour channel of the training images is constant"):
        channel_statistics(images)
