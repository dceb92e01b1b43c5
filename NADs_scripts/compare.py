"""Compare two files of NADs: do their first k rows span the same, and do their spectra agree?

    python NADs_scripts/compare.py A_NADs.npy B_NADs.npy

Overlap is 1 for the same subspace and k/D by chance. Where both spectra (A_eigenvals.npy) lie beside the files, it
also prints the correlation of log variances of A along B's rows, and the ratios of singular values, A by B: median and
range over all. With --table the same goes into a row of a CSV file.

The spectrum of a sample is wider than that of the covariance it is drawn from. The authors' spectra are those of 10,000
gradients (ResNet-18's of 5,000), while those in NADs/ are nearly free of this. --sampled N takes A's spectrum as N
Gaussian gradients of A's covariance show it, and prints how far the NADs of such a sample agree with A itself: no more
can be expected of B.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refusals import Refusal
from utils import cli, files, tables
from utils.nads import (
    AUTHORS_SCALE,
    NADs,
    load_array,
    load_nads,
    log_variance_correlation,
    nads_of_covariance,
    singular_value_ratios,
    subspace_overlap,
)

SIZES = (1, 5, 20, 50, 100, 200, 500)
COLUMNS = [f"overlap_{k}" for k in SIZES]
COLUMNS += ["log_variances", "median_ratio", "smallest_ratio", "largest_ratio", "first", "last", "networks"]
COLUMNS += [*(f"expected_overlap_{k}" for k in SIZES), "expected_log_variances"]


def load_with_spectrum(path: Path, dimension: int) -> NADs:
    """The rows of a file, and the singular values beside it (one or none less); empty where there are none."""
    directions = load_nads(path, dimension).numpy()
    beside = path.with_name(path.name.replace("_NADs", "_eigenvals"))
    if beside == path or not beside.is_file():
        return NADs(directions, np.empty(0))
    values = load_array(beside)
    if values.ndim != 1 or len(values) not in (dimension - 1, dimension):
        raise Refusal(f"{beside} has shape {values.shape}: expected ({dimension},), or one value less")
    return NADs(directions, values)


def sampled_nads(singular_values: np.ndarray, number: int) -> NADs:
    """The NADs that `number` Gaussian gradients show of a covariance: coordinates along its own directions.

    `singular_values` (D,) are those of the covariance, on the authors' scale like what is returned.
    """
    vectors = np.random.default_rng(0).standard_normal((number, len(singular_values))) * singular_values
    return nads_of_covariance(torch.from_numpy(np.cov(vectors, rowvar=False) / AUTHORS_SCALE))


@cli.one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Print the comparison, and add it to a table."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("a", type=cli.path, help="file of NADs")
    parser.add_argument("b", type=cli.path, help="file of NADs to compare with")
    parser.add_argument("--sampled", type=cli.positive_int, metavar="N", help="take A's spectrum from N gradients")
    parser.add_argument("--table", type=cli.path, help="CSV file to add a row to")
    args = parser.parse_args(argv)
    dimension = (load_array(args.a).shape or (0,))[-1]
    a, b = (load_with_spectrum(path, dimension) for path in (args.a, args.b))
    row = {"a": args.a, "b": args.b.name, "sampled": args.sampled or ""} | dict.fromkeys(COLUMNS, "")
    if (description := args.b.with_suffix(".json")).exists():
        row["networks"] = files.read_json(description, "num_networks")["num_networks"]
    sizes = [k for k in SIZES if k <= dimension]
    if args.sampled:
        if args.sampled <= dimension or not (len(a.singular_values) and len(b.singular_values)):
            parser.error(f"--sampled {args.sampled}: expected more than {dimension}, and spectra beside both files")
        itself = NADs(np.eye(dimension), np.pad(a.singular_values, (0, dimension - len(a.singular_values)), "edge"))
        sample = sampled_nads(itself.singular_values, args.sampled)
        expected = {f"expected_overlap_{k}": subspace_overlap(sample.directions, itself.directions, k) for k in sizes}
        expected["expected_log_variances"] = log_variance_correlation(itself, sample)
        row |= {name: f"{value:.4f}" for name, value in expected.items()}
        a = NADs(a.directions, sample.singular_values[: dimension - 1])  # the authors' files lack the last
    for k in sizes:
        overlap = subspace_overlap(a.directions, b.directions, k)
        row[f"overlap_{k}"] = f"{overlap:.4f}"
        sampled = f"; expected of a sample: {expected[f'expected_overlap_{k}']:.3f}" if args.sampled else ""
        print(f"overlap of the first {k:3d}: {overlap:.3f} (by chance {k / dimension:.3f}{sampled})")
    if len(a.singular_values) and len(b.singular_values):
        ratios = singular_value_ratios(a, b)
        found = {"log_variances": log_variance_correlation(a, b), "median_ratio": np.median(ratios)}
        found |= {"smallest_ratio": ratios.min(), "largest_ratio": ratios.max()}
        row |= {name: f"{value:.4f}" for name, value in found.items()}
        last = min(len(a.singular_values), len(b.singular_values)) - 1  # the authors' spectra lack one
        row |= {"first": f"{a.singular_values[0]:.5g}", "last": f"{a.singular_values[last]:.5g}"}
        print(f"correlation of log variances: {row['log_variances']}; singular values: {row['first']} to {row['last']}")
        if args.sampled:
            print(f"correlation of log variances expected of a sample: {row['expected_log_variances']}")
        print(f"by those of B: median {found['median_ratio']:.3f}, from {ratios.min():.3f} to {ratios.max():.3f}")
    if args.table:
        before = tables.read_rows(args.table)
        if before and list(before[0]) != list(row):
            raise Refusal(f"{args.table} has other columns than {', '.join(row)}: name another file")
        tables.write_rows(args.table, [*before, row])


if __name__ == "__main__":
    main()
