"""From networks to neural anisotropy directions (NADs): central differences, covariance, eigenvectors; files of them.

The paper, section 3: the NADs of an architecture are the eigenvectors of the covariance, over its random
initialisation, of the gradient of f at a point x; the gradient is estimated by central differences with a large step s.
"""

import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import one_hot

from refusals import Refusal
from utils import files

AUTHORS_SCALE = 9999  # singular values of 10,000 centred gradients: s² = 9999·λ
CHUNK_PIXELS = {"cpu": 2**16, "cuda": 2**20}  # of the images evaluated at once: a CPU's caches like no more

Features = Callable[[torch.Tensor], torch.Tensor]  # images (N, C, H, W) -> (N, F)


@dataclass(frozen=True)
class NADs:
    """Neural anisotropy directions, most important first."""

    directions: np.ndarray  # (D, D), float32, orthonormal rows
    singular_values: np.ndarray  # (D,) or, in the authors' files, (D − 1,); on the authors' scale: √(9999·λ)


@torch.no_grad()
def central_differences(
    function: Features, point: torch.Tensor, *, step: float, directions: torch.Tensor | None = None
) -> torch.Tensor:
    """Δ_i = (h(x + s·v_i) − h(x − s·v_i)) / 2s at an image x (C, H, W) with step s, along unit vectors v (n, C, H, W).

    Without directions they are the pixels e_i, D = C·H·W. Returns (F, n), for the pixels (F, D), where row f
    is the gradient estimate of feature f. Images of CHUNK_PIXELS pixels together are evaluated at once.
    """
    numbers = torch.arange(point.numel() if directions is None else len(directions), device=point.device)
    differences = []
    for chunk in numbers.split(max(1, CHUNK_PIXELS[point.device.type] // point[0].numel() // 2)):
        along = one_hot(chunk, point.numel()).view(-1, *point.shape) if directions is None else directions[chunk]
        shift = step * along.to(point.dtype)  # s·v_i
        up, down = function(torch.cat([point + shift, point - shift])).to(point.dtype).chunk(2)
        differences.append((up - down) / (2 * step))
    return torch.cat(differences).T


def nads_of_gradients(gradients: torch.Tensor) -> NADs:
    """The paper's protocol: the principal components of N gradients (N, D), mean removed; N ≥ 2."""
    centred = gradients.double() - gradients.double().mean(0)
    return nads_of_covariance(centred.T @ centred / (len(gradients) - 1))


def nads_of_covariance(covariance: torch.Tensor) -> NADs:
    """The eigenvectors of a covariance (D, D) by falling eigenvalue λ.

    An eigenvector's sign is free. It is chosen so that the projection on a fixed Gaussian vector is positive: two
    estimates of one direction then agree in sign, unless their noise is as large as that projection.
    """
    eigenvalues, vectors = torch.linalg.eigh(covariance.double().cpu())  # ascending, columns
    rows = vectors.T.flip(0)
    reference = torch.from_numpy(np.random.default_rng(0).standard_normal(len(rows)))
    rows = rows * torch.where(rows @ reference < 0, -1.0, 1.0)[:, None]
    singular_values = (AUTHORS_SCALE * eigenvalues.flip(0).clamp(min=0)).sqrt()
    return NADs(rows.float().numpy(), singular_values.numpy())


# --- Sums over networks, for more gradients than memory holds, and so that a run can be interrupted and shared


class GradientSums:
    """Σ Gᵀ G and Σ g in float64 over the rows G (R, D) of each network; even and odd networks apart.

    The halves show how far the NADs would differ with other networks. Sums over parts of the networks add up to those
    of the whole. MemoryError if they do not fit the device.
    """

    def __init__(self, dimension: int, device: torch.device | str = "cpu") -> None:
        try:
            self.outer = torch.zeros(2, dimension, dimension, dtype=torch.float64, device=device)
        except RuntimeError:
            if torch.device(device).type != "cpu":
                raise
            size = f"{16 * dimension**2 / 1e9:.0f} GB"
            raise MemoryError(f"no room for the covariances of {dimension} pixels: {size}") from None
        self.total = torch.zeros(2, dimension, dtype=torch.float64, device=device)
        self.numbers: set[int] = set()  # of the networks
        self.seconds = 0.0  # that all processes together took

    def add(self, number: int, rows: torch.Tensor) -> None:
        """Add the rows (R, D) of network `number`."""
        rows = rows.double()
        self.outer[number % 2].addmm_(rows.T, rows)
        self.total[number % 2] += rows.sum(0)
        self.numbers.add(number)

    def save(self, path: Path) -> None:
        """Write the sums, whole or not at all."""
        state = {"outer": self.outer.cpu(), "total": self.total.cpu(), "numbers": sorted(self.numbers)}
        state["seconds"] = self.seconds
        files.save_checkpoint(path, state)

    def add_file(self, path: Path) -> None:
        """Add what `save` wrote; nothing if its networks are in these sums already (the file of a copied part).

        Raises:
            Refusal: they are not sums of D pixels, or of some networks that are in these sums and some that are not.
        """
        state: Any = files.load_checkpoint(path)
        try:
            fits = state["outer"].shape == self.outer.shape and state["total"].shape == self.total.shape
            numbers, seconds = set(state["numbers"]), state["seconds"]
        except (LookupError, TypeError, AttributeError):
            fits = False
        if not fits:
            raise Refusal(f"the checkpoint {path} does not hold sums of {self.total.shape[1]} pixels: delete it")
        if numbers <= self.numbers:
            return
        if numbers & self.numbers:
            twice = sorted(numbers & self.numbers)
            raise Refusal(f"{path} and another part both have network {twice[0]} ({len(twice)} in all): delete one")
        self.outer += state["outer"].to(self.outer.device)
        self.total += state["total"].to(self.total.device)
        self.numbers |= numbers
        self.seconds += seconds

    def covariance(self, estimator: str, halves: tuple[int, ...] = (0, 1)) -> torch.Tensor:
        """The covariance (D, D) of the gradient, from the even networks (0), the odd ones (1) or all of them.

        sampled: one gradient g per network, mean removed: (Σ g gᵀ − N ḡ ḡᵀ)/(N − 1).
        marginal: E[g gᵀ] = E[σ_w² Δᵀ Δ], the mean of the networks' outer products; the mean of g is zero.
        """
        num_networks = sum(number % 2 in halves for number in self.numbers)
        outer = self.outer[list(halves)].sum(0)
        if estimator == "marginal":
            return outer / num_networks
        mean = self.total[list(halves)].sum(0) / num_networks
        return (outer - num_networks * torch.outer(mean, mean)) / (num_networks - 1)

    def agreement(self, estimator: str, k: int) -> float:
        """Overlap of the first k NADs of the even with those of the odd networks; nan of fewer than four networks."""
        if len(self.numbers) < 4:
            return float("nan")
        even, odd = (nads_of_covariance(self.covariance(estimator, (half,))).directions for half in (0, 1))
        return subspace_overlap(even, odd, k)


def read_sums(paths: Iterable[Path], dimension: int) -> GradientSums:
    """The sums of several files together."""
    sums = GradientSums(dimension)
    for path in sorted(paths, key=lambda path: len(files.load_checkpoint(path, "numbers") or []), reverse=True):
        sums.add_file(path)
    return sums


# --- How two sets agree


def subspace_overlap(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """‖A_k B_kᵀ‖²_F / k of the first k orthonormal rows of two bases (·, D): 1 if they span the same, k/D by chance."""
    limit = min(len(a), len(b))
    if not 1 <= k <= limit:
        raise Refusal(f"k={k} is beyond the directions at hand: expected 1 to {limit}")
    return float(np.square(a[:k].astype(np.float64) @ b[:k].astype(np.float64).T).sum() / k)


def log_variance_correlation(a: NADs, b: NADs) -> float:
    """Pearson correlation of log variances along the rows of B (as far as both spectra reach): B's own, and A's."""
    n = min(len(a.singular_values), len(b.singular_values))
    scaled = a.singular_values[:, None] * a.directions[: len(a.singular_values)].astype(np.float64)
    along_b = np.square(scaled @ b.directions[:n].astype(np.float64).T).sum(0)  # b_iᵀ C_A b_i, up to a factor
    with np.errstate(divide="ignore"):
        logs = np.log(along_b), np.log(np.square(b.singular_values[:n]))
    finite = np.isfinite(logs[0]) & np.isfinite(logs[1])
    return float(np.corrcoef(logs[0][finite], logs[1][finite])[0, 1])


def singular_value_ratios(a: NADs, b: NADs) -> np.ndarray:
    """A's i-th singular value by B's, as far as both reach, where B's is not zero."""
    n = min(len(a.singular_values), len(b.singular_values))
    positive = b.singular_values[:n] > 0
    return a.singular_values[:n][positive] / b.singular_values[:n][positive]


# --- Files


def load_array(path: str | Path) -> np.ndarray:
    """Read an array of numbers from a .npy file, as float64; a Refusal if there is none."""
    if not Path(path).is_file():
        raise Refusal(f"there is no array at {path}: name a .npy file (nad_computation.py makes NADs)")
    try:
        with open(path, "rb") as file:
            array = np.load(file, allow_pickle=False)
        return np.asarray(array, dtype=np.float64)
    except (ValueError, TypeError, EOFError, OSError, MemoryError, zipfile.BadZipFile) as error:
        raise Refusal(f"{path} is not a readable .npy array of numbers ({error})") from None


def load_nads(path: str | Path, dimension: int) -> torch.Tensor:
    """Read NADs from a .npy file, (D, D) float32: orthonormal rows, most important first.

    The authors' files (D − 1, D) lack the last row; it is the one direction orthogonal to all others, and is put back.

    Raises:
        Refusal: no such file, not such an array for the dimension D, or rows that are not orthonormal (to 1e-3).
    """
    rows = load_array(path)
    if rows.ndim != 2 or rows.shape[1] != dimension or rows.shape[0] not in (dimension - 1, dimension):
        raise Refusal(f"{path} has shape {rows.shape}: expected ({dimension}, {dimension}), or one row less")
    with np.errstate(all="ignore"):
        error = np.abs(rows @ rows.T - np.eye(len(rows))).max()
    if not error < 1e-3:  # nan fails too
        raise Refusal(f"the rows of {path} are not orthonormal: U Uᵀ differs from I by {error:.2g}")
    if len(rows) == dimension - 1:
        residual = np.eye(dimension) - rows.T @ rows  # projector onto the missing direction
        last = residual[:, np.argmax(np.diag(residual))]
        rows = np.vstack([rows, last / np.linalg.norm(last)])
    return torch.from_numpy(rows).float()
