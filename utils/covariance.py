"""The covariance of input gradients over random networks, its eigenvectors (the NADs), and how two sets agree."""

from dataclasses import dataclass

import numpy as np
import torch

AUTHORS_SCALE = 9999  # singular values of 10,000 centred gradients: s² = 9999·λ


class GradientSum:
    """Streaming sums over networks, in float64: Σ Gᵀ G and Σ g over the rows G (R, D) that each contributes.

    A network sampled whole contributes one row, its gradient. One whose last layer is integrated out contributes a
    row a feature. Sums of two parts of the networks add up to those of the whole.
    """

    def __init__(self, dimension: int, device: torch.device | str = "cpu") -> None:
        self.outer = torch.zeros(dimension, dimension, dtype=torch.float64, device=device)  # (D, D)
        self.rows = torch.zeros(dimension, dtype=torch.float64, device=device)  # (D,)
        self.num_networks = 0

    def add(self, rows: torch.Tensor) -> None:
        """Add one network's rows (R, D)."""
        rows = rows.double()
        self.outer.addmm_(rows.T, rows)
        self.rows += rows.sum(0)
        self.num_networks += 1

    def merge(self, other: "GradientSum") -> None:
        """Add the sums over other networks."""
        self.outer += other.outer.to(self.outer.device)
        self.rows += other.rows.to(self.rows.device)
        self.num_networks += other.num_networks

    def state(self) -> torch.Tensor:
        """All sums in one CPU tensor (D + 2, D), for checkpoints and for summing over ranks."""
        count = torch.zeros_like(self.rows)
        count[0] = self.num_networks
        return torch.cat([self.outer, self.rows[None], count[None]]).cpu()

    @classmethod
    def from_state(cls, state: torch.Tensor, device: torch.device | str = "cpu") -> "GradientSum":
        """The sums that `state` wrote."""
        sums = cls(state.shape[1], device)
        sums.outer.copy_(state[:-2])
        sums.rows.copy_(state[-2])
        sums.num_networks = int(state[-1, 0])
        return sums

    def sampled_covariance(self) -> torch.Tensor:
        """Covariance of gradients sampled one a network, mean removed: (Σ g gᵀ − N ḡ ḡᵀ)/(N − 1), shape (D, D)."""
        mean = self.rows / self.num_networks
        return (self.outer - self.num_networks * torch.outer(mean, mean)) / (self.num_networks - 1)

    def marginal_covariance(self, weight_variance: float) -> torch.Tensor:
        """E[g gᵀ] = σ_w² E[Δ Δᵀ], the last layer integrated out; the mean is zero. Shape (D, D)."""
        return weight_variance * self.outer / self.num_networks


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
    """Pearson correlation of log variances along the rows of B: those of B's own spectrum with A's covariance there.

    Where a spectrum lacks its last value, the last row of B is left out.
    """
    n = min(len(a.singular_values), len(b.singular_values))
    scaled = a.singular_values[:, None] * a.directions[: len(a.singular_values)].astype(np.float64)
    along_b = np.square(scaled @ b.directions[:n].astype(np.float64).T).sum(0)  # b_iᵀ C_A b_i, up to a factor
    with np.errstate(divide="ignore"):
        logs = np.log(along_b), np.log(np.square(b.singular_values[:n]))
    finite = np.isfinite(logs[0]) & np.isfinite(logs[1])
    return float(np.corrcoef(logs[0][finite], logs[1][finite])[0, 1])


def median_singular_value_ratio(a: NADs, b: NADs) -> float:
    """The median over i of A's i-th singular value by B's."""
    n = min(len(a.singular_values), len(b.singular_values))
    positive = b.singular_values[:n] > 0
    return float(np.median(a.singular_values[:n][positive] / b.singular_values[:n][positive]))
