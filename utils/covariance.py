"""The covariance of input gradients over random networks, its eigenvectors (the NADs), and how two sets agree."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

AUTHORS_SCALE = 9999  # singular values of 10,000 centred gradients: s² = 9999·λ


class GradientSum:
    """Streaming sums over networks, in float64: Σ Gᵀ G and Σ g over the rows G (R, D) that each contributes.

    Even and odd networks are summed apart, to see how two halves agree. Sums over parts of the networks add up to
    those of the whole. MemoryError if they do not fit the device.
    """

    def __init__(self, dimension: int, device: torch.device | str = "cpu") -> None:
        try:
            self.outer = torch.zeros(2, dimension, dimension, dtype=torch.float64, device=device)
        except RuntimeError:
            if torch.device(device).type != "cpu":
                raise
            size = f"{16 * dimension**2 / 1e9:.0f} GB"
            raise MemoryError(f"no room for the covariances of {dimension} pixels: {size}") from None
        self.rows = torch.zeros(2, dimension, dtype=torch.float64, device=device)
        self.numbers: set[int] = set()  # of the networks

    def add(self, number: int, rows: torch.Tensor) -> None:
        """Add the rows (R, D) of network `number`."""
        rows = rows.double()
        self.outer[number % 2].addmm_(rows.T, rows)
        self.rows[number % 2] += rows.sum(0)
        self.numbers.add(number)

    def merge(self, other: "GradientSum") -> None:
        """Add the sums over other networks."""
        self.outer += other.outer.to(self.outer.device)
        self.rows += other.rows.to(self.rows.device)
        self.numbers |= other.numbers

    def state(self) -> dict[str, Any]:
        """All sums as CPU tensors, for a checkpoint."""
        return {"outer": self.outer.cpu(), "rows": self.rows.cpu(), "numbers": sorted(self.numbers)}

    @classmethod
    def from_state(cls, state: Any, name: object, dimension: int) -> "GradientSum":
        """The sums that `state` gave; ValueError, with the checkpoint's name, if they are not those of D pixels."""
        sums = cls(dimension)
        try:
            whole = state["outer"].shape == sums.outer.shape and state["rows"].shape == sums.rows.shape
            sums.outer, sums.rows, sums.numbers = state["outer"], state["rows"], set(state["numbers"])
        except (LookupError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise ValueError(f"the checkpoint {name} does not hold what it should: delete it to start again")
        return sums

    def covariance(self, estimator: str, halves: tuple[int, ...] = (0, 1)) -> torch.Tensor:
        """The covariance (D, D) of the gradient, from the even networks (0), the odd ones (1) or all of them.

        sampled: one gradient g per network, mean removed: (Σ g gᵀ − N ḡ ḡᵀ)/(N − 1).
        marginal: E[g gᵀ] = E[σ_w² Δᵀ Δ], the mean of the networks' outer products; the mean of g is zero.
        """
        num_networks = sum(number % 2 in halves for number in self.numbers)
        outer = self.outer[list(halves)].sum(0)
        if estimator == "marginal":
            return outer / num_networks
        mean = self.rows[list(halves)].sum(0) / num_networks
        return (outer - num_networks * torch.outer(mean, mean)) / (num_networks - 1)

    def agreement(self, estimator: str, k: int) -> float:
        """Overlap of the first k NADs of the even with those of the odd networks; nan of fewer than four networks."""
        if len(self.numbers) < 4:
            return float("nan")
        even, odd = (nads_from_covariance(self.covariance(estimator, (half,))).directions for half in (0, 1))
        return subspace_overlap(even, odd, k)


@dataclass(frozen=True)
class NADs:
    """Neural anisotropy directions, most important first."""

    directions: np.ndarray  # (D, D), float32, orthonormal rows
    singular_values: np.ndarray  # (D,) or, in the authors' files, (D − 1,); on the authors' scale: √(9999·λ)


def nads_from_covariance(covariance: torch.Tensor) -> NADs:
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


def subspace_overlap(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """‖A_k B_kᵀ‖²_F / k of the first k orthonormal rows of two bases (·, D): 1 if they span the same, k/D by chance."""
    limit = min(len(a), len(b))
    if not 1 <= k <= limit:
        raise ValueError(f"k={k} is beyond the directions at hand: expected 1 to {limit}")
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
