"""Regenerate NADs/VGG11_NADs.npy and NADs/VGG11_eigenvals.npy: 400 networks, the last layer integrated out.

VGG-11 with batch norm. The first and the last published singular values are 0.063818 and 0.0012778.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nad_computation import regenerate

if __name__ == "__main__":
    regenerate("vgg11", "--num-networks", "400")
