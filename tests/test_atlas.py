"""The atlas of predicted maps, and the designs that put the prediction to a test, at a small size."""

import inspect
import math
import re

import numpy as np
import pytest
import torch

from directional_bias import share, variance_along
from models import build_model
from NADs_scripts import atlas, designs
from tests.helpers import refusal, rows
from utils import files, tables
from utils.directions import canonical_frequency
from utils.last_layer import last_linear

FEW = {"logreg": "paper", "lenet": "paper", "tests.tiny_networks:nan_head": "tiny"}  # the last takes 8×8 pixels only
PREDICTIONS = rows(designs.ROOT / "results" / "designs" / "predictions.csv")
CELLS = [[y, x] for y in range(-16, 15, 2) for x in range(-16, 15, 2)]


@pytest.fixture
def few(tmp_path, monkeypatch):
    for name, value in {"ROOT": tmp_path, "architectures": lambda: FEW, "FINDINGS": {}}.items():
        monkeypatch.setattr(atlas, name, value)
    atlas.main(["--output", str(tmp_path)])
    return tmp_path


def test_atlas_has_a_row_and_a_map_for_each_architecture_and_continues(few, capsys):
    table = rows(few / "atlas.csv")
    assert [row["architecture"] for row in table] == list(FEW)
    assert [bool(row["why_not"]) for row in table] == [False, False, True]
    maps = np.load(few / "maps.npy", allow_pickle=False)
    assert maps.shape == (2, 16, 16)
    np.testing.assert_allclose(maps[0], 1, rtol=1e-3)  # logistic regression has no preference
    assert float(table[1]["band_0"]) > 1.5 > 0.3 > float(table[1]["band_7"])
    assert {path.name for path in few.glob("*.png")} == {"sheet.png"}
    before = {path: path.stat().st_mtime_ns for path in (few / "runs" / "atlas").glob("*.json")}
    atlas.main(["--output", str(few)])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "architectures: 3, 3 of them done" in capsys.readouterr().out


def test_atlas_names_the_nearest_by_the_rms_factor(few, capsys):
    table = [{"architecture": name, "why_not": ""} for name in ("like", "unlike", "logreg")]
    tables.write_rows(few / "atlas.csv", table)
    files.save_array(few / "maps.npy", np.stack([np.full((16, 16), value) for value in (2.0, 8.0, 1.0)]))
    atlas.main(["--arch", "LogReg", "--output", str(few)])
    found = re.findall(r"(\w+): its shares differ by a factor of ([\d.]+)", capsys.readouterr().out)
    assert found == [("like", "2.00"), ("unlike", "8.00")]
    unmapped = "--arch", "tests.tiny_networks:nan_head", "--output", few
    assert "shapes cannot be multiplied (1x9216" in refusal(capsys, atlas.main, *unmapped)
    files.save_array(few / "maps.npy", np.ones((2, 16, 16)))
    assert "(2, 16, 16) for 3 rows" in refusal(capsys, atlas.main, *unmapped)


def test_roughness_is_zero_for_a_map_that_depends_on_the_radius_band_alone():
    largest = math.hypot(16, 16)
    shares = [2.0 ** -min(7, int(8 * math.hypot(*cell) / largest)) for cell in CELLS]
    row = atlas.row_of("lenet", "paper", {"frequencies": CELLS, "shares": shares})
    assert float(row["roughness"]) == pytest.approx(0, abs=1e-6)
    assert [float(row[f"band_{band}"]) for band in range(8)] == pytest.approx(
        [2.0**-band for band in range(8)], rel=1e-3
    )


@pytest.mark.parametrize("design", designs.DESIGNS, ids=lambda design: design.__name__)
def test_designs_are_short_networks_with_a_linear_layer_of_their_own(design):
    assert len(inspect.getsource(design).splitlines()) <= 10
    network = build_model(f"NADs_scripts.designs:{design.__name__}", 1, 2)
    assert last_linear(network.eval(), torch.zeros(1, 32, 32)).out_features == 2


def test_the_committed_predictions_come_out_again():
    images = designs.quarter_map()
    directions = torch.stack(list(images.values()))
    found = variance_along(directions, arch=designs.WHOLE["strided"], num_networks=designs.NUM_NETWORKS)
    committed = {designs.key_of(row): float(row["share"]) for row in PREDICTIONS if row["network"] == "strided"}
    assert list(committed) == list(images)
    np.testing.assert_allclose(share(*found), list(committed.values()), rtol=1e-3)


def test_summary_ranks_and_finds_where_accuracy_passes():
    cells = [(0, 2 * k) for k in range(8)]
    shares = {(y, x): 2.0**-x for y, x in cells}
    found = designs.summary(shares, dict(zip(cells, (99, 90, 80, 74, 60, 55, 50, 50), strict=True)))
    assert (found["learnt"], found["unlearnt"]) == (3, 3)
    assert float(found["auc_share"]) == float(found["auc_low_frequency"]) == float(found["spearman_above_chance"]) == 1
    assert (float(found["learnt_from"]), float(found["unlearnt_up_to"])) == pytest.approx((2.0**-4, 2.0**-10), abs=1e-3)
    nothing = designs.summary(shares, dict.fromkeys(cells, 50.0))
    assert nothing["auc_share"] == nothing["learnt_from"] == ""


def test_folding_means_over_the_symmetric_cells_and_unfolding_gives_them_back():
    whole = {canonical_frequency(y, x): float(abs(y) + abs(x)) for y, x in CELLS}
    assert designs.folded({(0, -2): 1.0, (-2, 0): 3.0}) == {(0, 2): 2.0}
    assert designs.unfolded(designs.folded(whole)) == whole and len(designs.folded(whole)) == 45


def test_designs_script_reports_what_is_in_results(tmp_path, monkeypatch, capsys):
    for name in ("predictions.csv", "accuracies.csv"):
        (tmp_path / name).write_bytes((designs.ROOT / "results" / "designs" / name).read_bytes())
    before = (tmp_path / "accuracies.csv").read_text()
    monkeypatch.setattr(designs, "RUNS", tmp_path)  # without trainings
    designs.main(["--output", str(tmp_path)])
    assert "auc_share" in capsys.readouterr().out
    assert (tmp_path / "accuracies.csv").read_text() == before
    assert (tmp_path / "maps.png").exists() and (tmp_path / "accuracies.png").exists()
