"""CIFAR-10, or a folder of such images, as tensors."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import datasets
from tqdm import tqdm

from utils import runs

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
        tensors = (self.train_images, self.train_labels, self.test_images, self.test_labels)
        return ImageData(*(tensor.to(device) for tensor in tensors), self.classes)


def load_images(root: Path, *, download: bool = False, cache: Path = Path("runs/decoded")) -> ImageData:
    """CIFAR-10 as torchvision keeps it below `root`, or the images root/train/CLASS/*.png|jpg and root/test/CLASS/*.

    Args:
        root: the folder.
        download: let torchvision fetch CIFAR-10 into it; its checksums are on either way.
        cache: folder for the decoded images of a folder, so that they are decoded once.

    Raises:
        ValueError: neither of the two is there, or it is damaged, or an image is not 32×32 in colour.
    """
    if (root / "train").is_dir():
        return _load_folder(root, cache)
    try:
        train, test = (datasets.CIFAR10(root, train=train, download=download) for train in (True, False))
    except RuntimeError as error:
        raise ValueError(
            f"there is no whole CIFAR-10 in {root} ({error}): fetch it with --download, "
            "or name a folder with train/CLASS/*.png and test/CLASS/*.png"
        ) from None
    arrays = (
        array
        for split in (train, test)
        for array in (torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets))
    )
    return ImageData(*arrays, tuple(train.classes))


def _load_folder(root: Path, cache: Path) -> ImageData:
    files = {
        split: sorted(p for p in (root / split).glob("*/*") if p.suffix.lower() in ENDINGS)
        for split in ("train", "test")
    }
    classes = {split: sorted({path.parent.name for path in paths}) for split, paths in files.items()}
    if classes["train"] != classes["test"]:
        odd = sorted(set(classes["train"]) ^ set(classes["test"]))
        raise ValueError(f"{root} has classes with images in only one of train and test: {', '.join(odd)}")
    names = tuple(classes["train"])
    if not 2 <= len(names) <= MAX_CLASSES:
        raise ValueError(f"{root}/train has {len(names)} classes with images: expected 2 to {MAX_CLASSES}")
    listing = "\n".join(f"{p.resolve()} {p.stat().st_size} {p.stat().st_mtime_ns}" for ps in files.values() for p in ps)
    cached = cache / f"{runs.digest(listing.encode())}.pt"
    if cached.exists():
        images = runs.load_checkpoint(cached)
    else:
        images = {split: _decode(paths, f"decoding {split} images") for split, paths in files.items()}
        cache.mkdir(parents=True, exist_ok=True)
        runs.save_checkpoint(cached, images)
    labels = {split: torch.tensor([names.index(path.parent.name) for path in paths]) for split, paths in files.items()}
    return ImageData(images["train"], labels["train"], images["test"], labels["test"], names)


def _decode(paths: list[Path], what: str) -> torch.Tensor:
    images = torch.empty(len(paths), 3, SIZE, SIZE, dtype=torch.uint8)
    for index, path in enumerate(tqdm(paths, desc=what)):
        try:
            with Image.open(path) as image:
                if image.mode != "RGB" or image.size != (SIZE, SIZE):
                    width, height = image.size
                    raise ValueError(
                        f"it is {height}x{width} of mode {image.mode}: expected {SIZE}x{SIZE} of mode RGB (colour)"
                    )
                images[index] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL's, for damaged files
            raise ValueError(f"{path} cannot be used: {error}") from None
    return images


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """Bytes to floats in [0, 1]."""
    return images.float() / 255


def channel_statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images (n, 3, H, W), for pixels in [0, 1]."""
    counts = [
        np.bincount(images[:, channel].cpu().numpy().ravel(), minlength=256) for channel in range(images.shape[1])
    ]
    values = np.arange(256) / 255
    means = [float(np.average(values, weights=count)) for count in counts]
    stds = [
        float(np.average((values - mean) ** 2, weights=count) ** 0.5) for mean, count in zip(means, counts, strict=True)
    ]
    return tuple(means), tuple(stds)


def flip_and_crop(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror each image of a batch (n, C, H, W) with probability 1/2 and shift it by up to 4 pixels, zeros around."""
    n, _, height, width = images.shape
    device = images.device
    mirror = torch.rand(n, 1, 1, 1, generator=generator, device=device) < 0.5
    images = torch.where(mirror, images.flip(3), images)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(9, (2, n, 1), generator=generator, device=device)
    rows = (top + torch.arange(height, device=device))[:, None, :, None]  # (n, 1, H, 1)
    columns = (left + torch.arange(width, device=device))[:, None, None, :]  # (n, 1, 1, W)
    sample = torch.arange(n, device=device)[:, None, None, None]
    channel = torch.arange(images.shape[1], device=device)[:, None, None]
    return padded[sample, channel, rows, columns]
