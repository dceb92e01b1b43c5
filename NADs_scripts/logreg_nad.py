"""Regenerate NADs/LogReg_NADs.npy and NADs/LogReg_eigenvals.npy: 10,000 sampled networks.

Its covariance is isotropic, so the spectrum is sampling noise: Marchenko-Pastur edges 1.227 and 2.382, rms 1.804.
The marginal estimator would give the identity. The first and the last published singular values are 2.3697 and 1.2344.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nad_computation import regenerate

if __name__ == "__main__":
    regenerate("logreg", "--estimator", "sampled", "--num-networks", "10000")
