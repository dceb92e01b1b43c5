"""What the record says of the prediction: where learning sets in, by all trainings at σ = 3 in results/."""

from directional_bias import LEARNT, UNLEARNT
from NADs_scripts import designs
from tests import helpers
from tests.helpers import ROOT
from utils import tables

KEYS = ("frequency_y", "frequency_x")


def values_of(name, network, column="share"):
    rows = helpers.rows(ROOT / "results" / f"{name}.csv")
    return {designs.key_of(row): float(row[column]) for row in rows if row["network"] == network}


def test_learning_sets_in_at_a_share_of_one_half():
    """By the shares of 24 untrained networks, or 8 of the designs."""
    found = {}
    measured = {"LeNet": "LeNet", "VGG11": "VGG11-bf16", "ResNet18": "ResNet18-bf16", "LogReg": "LogReg"}
    measured["DenseNet121"] = "DenseNet121-bf16"  # of its five cells three are on an axis
    for network, name in (measured | {"LeNet without pooling": "LeNet-nopooling"}).items():
        shares = values_of("prediction/maps", network)
        means = tables.means(helpers.rows(ROOT / "results" / "directional_bias" / f"{name}-fourier"), KEYS)
        found[network] = [(shares[key], mean) for key, mean in means.items()]
    for network in {row["network"] for row in helpers.rows(ROOT / "results" / "designs" / "accuracies.csv")}:
        shares = designs.folded(values_of("designs/predictions", network))
        accuracies = designs.folded(values_of("designs/accuracies", network, "test_accuracy"))
        found[network] = [(shares[key], accuracy) for key, accuracy in accuracies.items()]
    assert len(found) == 6 + 14
    exceptions = {network for network, pairs in found.items() for share, a in pairs if share > 0.53 and a <= UNLEARNT}
    assert exceptions == {"regnet_x_400mf", "tanh"}  # and DenseNet-121, by the number of its published cells
    assert not [network for network, pairs in found.items() for share, a in pairs if share < 0.45 and a > LEARNT]
