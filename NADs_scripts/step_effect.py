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

from models import build_model
from nad_computation import ROOT, compute_nads, draw_point
from utils import cli, plotting, runs
from utils.covariance import GradientSum, NADs, nads_from_covariance, subspace_overlap
from utils.differences import autograd_jacobian
from utils.directions import load_nads
from utils.last_layer import draw_network, last_linear, weight_rms, without

STEPS = ("0.01", "1", "10", "100", "1000", "autograd")
SIZES = (1, 5, 20, 50, 100, 200, 500)


def exact_nads(arch: str, *, num_networks: int, image_size: int = 32, seed: int = 0) -> NADs:
    """The NADs that `compute_nads` finds, from the gradient itself in place of differences: a step of zero."""
    point = draw_point(image_size=image_size, seed=seed)
    sums = GradientSum(point.numel())
    for number in range(num_networks):
        network = draw_network(lambda: build_model(arch, 1, 1, image_size), "cpu", seed, "network", number)
        layer = last_linear(network, point)
        sums.add(number, weight_rms(layer) * autograd_jacobian(without(network, layer), point))
    return nads_from_covariance(sums.covariance("marginal"))


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
        options = {"num_networks": args.num_networks, "seed": args.seed}
        if step == "autograd":
            label, nads = step, exact_nads("lenet", **options)
        else:
            label, (nads, _) = f"s = {step}", compute_nads("lenet", step=float(step), **options)
        overlaps[label] = np.array([subspace_overlap(nads.directions, shipped, k) for k in SIZES])
        spectra[label] = nads.singular_values
    args.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for label, values in overlaps.items():
        row = {"step": label} | {f"overlap_{k}": f"{value:.4f}" for k, value in zip(SIZES, values, strict=True)}
        rows.append(row | {f"singular_value_{i}": f"{spectra[label][i]:.5g}" for i in (0, 100, 500, 1023)})
    runs.write_rows(args.output / "nad_step.csv", rows)
    plotting.save_figure(plotting.step_figure(np.array(SIZES), overlaps, spectra), args.output / "nad_step.png")
    print(f"table: {args.output / 'nad_step.csv'}\nfigure: {args.output / 'nad_step.png'}")


if __name__ == "__main__":
    main()
