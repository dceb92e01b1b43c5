"""What the step of the differences does to the NADs: results/nad_step.png and results/nad_step.csv.

    python NADs_scripts/step_effect.py

LeNet, 400 networks a step, the last layer integrated out; overlap with the shipped NADs/LeNet_NADs.npy (step 100).
The exact gradient (autograd) sees only the linear region around the point, while a step of 100 crosses many: its
spectrum is flatter and its directions differ.
"""

import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nad_computation import ROOT, compute_nads
from utils import cli, plotting, runs
from utils.covariance import subspace_overlap
from utils.directions import load_nads

STEPS = ("0.01", "1", "10", "100", "1000", "autograd")
SIZES = (1, 5, 20, 50, 100, 200, 500)


@cli.one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Compute the NADs for each step, save the table and draw the figure."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--num-networks", type=cli.positive_int, default=400, help="for each step")
    parser.add_argument("--seed", type=cli.natural, default=1, help="not that of the shipped NADs, 0")
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="folder")
    args = parser.parse_args(argv)
    shipped = load_nads(ROOT / "NADs" / "LeNet_NADs.npy", 1024).numpy()
    overlaps, spectra = {}, {}
    for step in tqdm(STEPS, desc="steps"):
        variant = {"jacobian": "autograd"} if step == "autograd" else {"step": float(step)}
        nads, _ = compute_nads("lenet", num_networks=args.num_networks, seed=args.seed, **variant)
        label = step if step == "autograd" else f"s = {step}"
        overlaps[label] = np.array([subspace_overlap(nads.directions, shipped, k) for k in SIZES])
        spectra[label] = nads.singular_values
    args.output.mkdir(parents=True, exist_ok=True)
    rows = [
        {"step": label} | {f"overlap_{k}": f"{value:.4f}" for k, value in zip(SIZES, values, strict=True)}
        | {f"singular_value_{i}": f"{spectra[label][i]:.5g}" for i in (0, 100, 500, 1023)}
        for label, values in overlaps.items()
    ]  # fmt: skip
    runs.write_rows(args.output / "nad_step.csv", rows)
    plotting.save_figure(plotting.step_figure(np.array(SIZES), overlaps, spectra), args.output / "nad_step.png")
    print(f"table: {args.output / 'nad_step.csv'}\nfigure: {args.output / 'nad_step.png'}")


if __name__ == "__main__":
    main()
