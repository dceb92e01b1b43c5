"""What predict.py was tested with. README.md says what came out; the tables and figures are in results/studies/."""

from directional_bias import ROOT

RESULTS = ROOT / "results"
