"""CIFAR-10, or a folder of such images, as tensors."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import datasets
from tqdm import tqdm

from refusals import Refusal
from utils import files, workers

SIZE = 32
MAX_CLASSES = 12  # the poisoning rule has so many carriers
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.247, 0.243, 0.261)
ENDINGS = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class ImageData:
    """Training and test images of 32×32 pixels in three channels."""

    train_images: torch.Tensor  # (n, 3, 32, 32), uint8
    train_labels: torch.Tensor  # (n,), int64
    test_images: torch.Tensor  # (m, 3, 32, 32), uint8
    test_labels: torch.Tensor  # (m,), int64
    classes: tuple[str, ...]

    def to(self, device: torch.device) -> "ImageData":
        """The same, with its tensors on the device."""
        train = self.train_images.to(device), self.train_labels.to(device)
        return ImageData(*train, self.test_images.to(device), self.test_labels.to(device), self.classes)


def load_images(root: Path, *, download: bool = False) -> ImageData:
    """CIFAR-10 as torchvision keeps it below `root`, or the images root/train/CLASS/*.png|jpg and root/test/CLASS/*.

    torchvision's checksums are on, whether it fetches the files or not. The images of a folder are decoded once, and
    kept in root/decoded.pt. Hidden files and folders do not count.

    Raises:
        Refusal: neither is there, or it is damaged, or an image is not 32×32 in colour.
    """
    if (root / "train").is_dir():
        return _load_folder(root)
    try:
        train, test = (datasets.CIFAR10(root, train=train, download=download) for train in (True, False))
    except RuntimeError as error:
        advice = "fetch it with --download, or name a folder with train/CLASS/*.png and test/CLASS/*.png"
        if (root / "data_batch_1").exists():
            advice = f"name the folder above it, {root.parent}"
        raise Refusal(f"there is no whole CIFAR-10 in {root} ({error}): {advice}") from None
    images = [torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous() for split in (train, test)]
    labels = [torch.tensor(split.targets) for split in (train, test)]
    return ImageData(images[0], labels[0], images[1], labels[1], tuple(train.classes))


def _load_folder(root: Path) -> ImageData:
    listed = {split: sorted((root / split).glob("[!.]*/[!.]*")) for split in ("train", "test")}
    paths = {split: [path for path in listed[split] if path.suffix.lower() in ENDINGS] for split in listed}
    classes = {split: {path.parent.name for path in paths[split]} for split in paths}
    if odd := sorted(classes["train"] ^ classes["test"]):
        raise Refusal(f"{root} has classes with images in only one of train and test: {', '.join(odd)}")
    names = tuple(sorted(classes["train"]))
    if not 2 <= len(names) <= MAX_CLASSES:
        raise Refusal(f"{root}/train has {len(names)} classes with images: expected 2 to {MAX_CLASSES}")
    if workers.speaks():
        others = sum(len(listed[split]) - len(paths[split]) for split in paths)
        counts = f"{len(paths['train'])} training and {len(paths['test'])} test images of {len(names)} classes"
        print(f"{root}: {counts}" + (f"; {others} files of other kinds are left out" if others else ""))
    images = _decoded(root, paths)
    labels = {split: torch.tensor([names.index(path.parent.name) for path in paths[split]]) for split in paths}
    return ImageData(images["train"], labels["train"], images["test"], labels["test"], names)


def _decoded(root: Path, paths: dict[str, list[Path]]) -> dict[str, torch.Tensor]:
    """The images of both splits: from root/decoded.pt if it is of these files, else decoded and kept there."""
    files_now = [(path, path.stat()) for split in paths for path in paths[split]]
    lines = [f"{path.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}" for path, stat in files_now]
    listing, cache = files.digest("\n".join(lines).encode()), root / "decoded.pt"
    if cache.exists():
        kept = files.load_checkpoint(cache)
        if kept.get("listing") == listing:
            return kept
    images = {split: _decode(paths[split], f"decoding {split} images") for split in paths}
    with contextlib.suppress(OSError):  # a folder that cannot be written is decoded each time
        files.save_checkpoint(cache, images | {"listing": listing})
    return images


def digest(data: ImageData) -> str:
    """A short name for these images and labels."""
    tensors = (data.train_images, data.train_labels, data.test_images, data.test_labels)
    return files.digest(b"".join(tensor.numpy() for tensor in tensors))


def _decode(paths: list[Path], what: str) -> torch.Tensor:
    images = torch.empty(len(paths), 3, SIZE, SIZE, dtype=torch.uint8)
    for index, path in enumerate(tqdm(paths, desc=what, disable=not workers.speaks())):
        try:
            with Image.open(path) as image:
                if image.mode != "RGB" or image.size != (SIZE, SIZE):
                    found = f"{image.height}x{image.width} of mode {image.mode}"
                    raise ValueError(f"it is {found}: expected {SIZE}x{SIZE} of mode RGB (colour)")
                images[index] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL's, for damaged files
            raise Refusal(f"{path} cannot be used: {error}") from None
    return images


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """Bytes to floats in [0, 1]."""
    return images.float() / 255


def channel_statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images (n, C, H, W), for pixels in [0, 1]; never 0."""
    values, means, stds = np.arange(256) / 255, [], []
    for channel in images.unbind(1):
        counts = np.bincount(channel.cpu().numpy().ravel(), minlength=256)
        means.append(float(np.average(values, weights=counts)))
        stds.append(float(np.average((values - means[-1]) ** 2, weights=counts) ** 0.5))
    if min(stds) < 1e-6:
        raise Refusal("a colour channel of the training images is constant: it cannot be normalised")
    return tuple(means), tuple(stds)
