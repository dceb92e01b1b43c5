"""Images to train on in seconds, in the two forms that the third experiment reads; and a network with dropout."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn
from torchvision import datasets

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def draw(count: int, label: int, seed: int) -> np.ndarray:
    """Noise around a grey level that hints at the class, (count, 32, 32, 3) bytes."""
    noise = np.random.default_rng((seed, label)).integers(0, 200, (count, 32, 32, 3))
    return (noise + 5 * label).astype(np.uint8)


def write_folder(root: Path, *, classes: int = 3, train: int = 8, test: int = 6, ending: str = "png") -> Path:
    """Images root/train/CLASS/N.png and root/test/CLASS/N.png of the classes a, b, c and so on."""
    for seed, (split, count) in enumerate({"train": train, "test": test}.items()):
        for label in range(classes):
            folder = root / split / "abcdefghijklmnopqrstuvwxyz"[label]
            folder.mkdir(parents=True)
            for number, pixels in enumerate(draw(count, label, seed)):
                Image.fromarray(pixels).save(folder / f"{number}.{ending}")
    return root


def write_cifar10(root: Path, monkeypatch, *, batch_size: int = 20) -> tuple[np.ndarray, list[int]]:
    """The files of CIFAR-10's python version with so many images each, and torchvision told their checksums.

    Returns:
        The training images (n, 32, 32, 3) and their labels, in the order of the batches.
    """
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    images, labels = [], []

    def write(name: str, content: dict) -> str:
        data = pickle.dumps(content, protocol=2)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    def write_batch(name: str, seed: int) -> list[str]:
        classes = [n % 10 for n in range(batch_size)]
        pixels = np.concatenate([draw(1, label, seed * 1000 + n) for n, label in enumerate(classes)])
        if name != "test_batch":
            images.append(pixels)
            labels.extend(classes)
        rows = pixels.transpose(0, 3, 1, 2).reshape(batch_size, 3072)  # red, green, blue, each row by row
        return [name, write(name, {"batch_label": name, "labels": classes, "data": rows, "filenames": [name] * 20})]

    monkeypatch.setattr(datasets.CIFAR10, "train_list", [write_batch(f"data_batch_{n}", n) for n in range(1, 6)])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [write_batch("test_batch", 6)])
    meta = write("batches.meta", {"label_names": list(CIFAR10_CLASSES), "num_vis": 3072})
    monkeypatch.setattr(datasets.CIFAR10, "meta", datasets.CIFAR10.meta | {"md5": meta})
    return np.concatenate(images), labels


def with_dropout(num_channels: int, num_classes: int, image_size: int) -> nn.Module:
    """Logistic regression on the pixels that dropout leaves."""
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(num_channels * image_size**2, num_classes))
