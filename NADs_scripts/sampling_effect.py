"""What sampling does to the ends of a spectrum: results/sampling_effect.csv.

    python NADs_scripts/sampling_effect.py

The spectrum of a sample is wider than that of the covariance it is drawn from: its small values are too small. The
authors' is that of 5,000 or 10,000 gradients, the one in NADs/ is nearly free of this. So as many Gaussian vectors are
drawn with the covariance in NADs/, and their singular values are set beside the published ones: the first and the last,
and with --published, a folder of their files (LeNet_eigenvals.npy and so on), the range of the ratios over all.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nad_computation import ROOT
from utils import cli, runs
from utils.covariance import AUTHORS_SCALE
from utils.directions import load_array

# Number of gradients, and the first and the last of the 1,023 published singular values.
PUBLISHED = {
    "LeNet": (10_000, 0.18941, 0.0023126),
    "VGG11": (10_000, 0.063818, 0.0012778),
    "ResNet18": (5_000, 0.042828, 0.00023923),
    "DenseNet121": (10_000, 0.0023270, 1.4886e-6),
}


def sampled_spectrum(singular_values: np.ndarray, number: int, seed: int = 0) -> np.ndarray:
    """Singular values, falling, of `number` centred Gaussian vectors of a covariance with these √(9999·λ), (D,)."""
    spread = singular_values / np.sqrt(AUTHORS_SCALE)
    vectors = np.random.default_rng(seed).standard_normal((number, len(spread))) * spread
    return np.linalg.svd(vectors - vectors.mean(0), compute_uv=False)


@cli.one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Print and write the table: published values, by those of the covariance and by those of its sample."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--published", type=Path, help="folder of the authors' spectra, as many as there are")
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="folder")
    args = parser.parse_args(argv)
    if args.published and not args.published.is_dir():
        parser.error(f"there is no folder {args.published}")
    rows = []
    for name, (number, *published) in PUBLISHED.items():
        values = load_array(ROOT / "NADs" / f"{name}_eigenvals.npy")
        sampled = sampled_spectrum(values, number)
        row = {"network": name, "gradients": number}
        for end, place, value in zip(("first", "last"), (0, len(values) - 2), published, strict=True):
            exact = values[place] * np.sqrt((number - 1) / AUTHORS_SCALE)
            row |= {f"{end}_published": value, f"{end}_published_by_exact": f"{value / exact:.3f}"}
            row[f"{end}_published_by_sampled"] = f"{value / sampled[place]:.3f}"
        row |= {f"{end}_of_all_by_sampled": "" for end in ("smallest", "largest")}
        if args.published and (file := args.published / f"{name}_eigenvals.npy").is_file():
            theirs = load_array(file)
            ratios = theirs / sampled[: len(theirs)]
            ends = {"smallest": ratios.min(), "largest": ratios.max()}
            row |= {f"{end}_of_all_by_sampled": f"{ratio:.3f}" for end, ratio in ends.items()}
        rows.append(row)
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    args.output.mkdir(parents=True, exist_ok=True)
    runs.write_rows(args.output / "sampling_effect.csv", rows)
    print(f"table: {args.output / 'sampling_effect.csv'}")


if __name__ == "__main__":
    main()
