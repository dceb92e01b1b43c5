"""Draw nads.png, the first NADs of the five architectures in NADs/, in pixel space and in the Fourier domain.

python NADs_scripts/figure.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import ARCHITECTURES, paper_name
from nad_computation import ROOT
from utils import cli, plotting
from utils.nads import load_nads


@cli.one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Load, draw, save."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "nads.png", help="file")
    args = parser.parse_args(argv)
    names = [paper_name(arch) for arch in ARCHITECTURES]
    nads = {name: load_nads(ROOT / "NADs" / f"{name}_NADs.npy", 32**2)[:8].view(-1, 1, 32, 32) for name in names}
    figure = plotting.nads_figure({name: directions.numpy() for name, directions in nads.items()})
    plotting.save_figure(figure, args.output)
    print(f"figure: {args.output}")


if __name__ == "__main__":
    main()
