"""results/: the tables are what the runs give, each formula on made-up data, and each run as the record wants it."""

import csv
import json
import shlex

import numpy as np
import pytest

import directional_bias
import poison_cifar
from refusals import Refusal
from results import table
from tests.helpers import ROOT
from utils import files, tables

RUNS = sorted(path.parent for name in table.EXPERIMENTS for path in table.RESULTS.glob(f"{name}/*/accuracies.csv"))
SCRIPTS = {"directional_bias": directional_bias, "poison_cifar": poison_cifar, "steps": directional_bias}
FAMILY = {"fourier": ("frequency_y", "frequency_x"), "nads": ("nad_index",), "poison": ("nad_index",)}
RESULT = {"directional_bias": ["train_accuracy", "test_accuracy", "final_loss"]}
RESULT |= {"poison_cifar": ["loss", "train_accuracy", "test_accuracy"], "steps": [*RESULT["directional_bias"], "steps"]}
ORIGIN = ["seconds", "device", "torch", "commit"]


def test_what_is_committed_is_what_the_script_writes():
    for path, text in table.documents().items():
        assert path.read_text(encoding="utf-8") == text, "write it anew: python results/table.py"
    assert len([row for rows in table.reproduction().values() for row in rows if row.headline]) in range(8, 13)


@pytest.mark.parametrize("folder", RUNS, ids=lambda path: path.name)
def test_a_run_has_its_command_settings_and_columns(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    script, *argv = shlex.split(config["command"])
    assert script == f"{SCRIPTS[folder.parent.name].__name__}.py"
    args, saved = SCRIPTS[folder.parent.name].parse_arguments(argv), config["settings"]
    assert args.output.name == folder.name
    for key in saved.keys() & vars(args).keys() - {"arch", "nads", "device"}:
        assert saved[key] == vars(args)[key], key
    assert saved["arch"] == args.arch and "/" not in str(saved["nads"])
    rows = tables.read_rows(folder / "accuracies.csv", ["repetition"])
    kind = args.transform if folder.parent.name == "poison_cifar" else args.directions
    carrying = ["carrying_accuracy"] if kind == "poison" else []
    expected = [*FAMILY.get(kind, ()), "repetition", *RESULT[folder.parent.name], *carrying, *ORIGIN]
    assert rows and all(list(row) == expected for row in rows)
    for row in rows:
        assert 0 <= float(row["test_accuracy"]) <= 100 and row["device"] and row["torch"]
        if kind == "fourier":
            key = int(row["frequency_y"]), int(row["frequency_x"])
            assert key == directional_bias.canonical_frequency(*key)


def test_a_time_is_that_of_a_run_with_the_settings_of_the_command():
    for asked in tables.read_rows(table.RESULTS / "times.csv"):
        command = asked["command"].replace("make demo", "python directional_bias.py --arch lenet")
        _, script, *argv = shlex.split(command)
        for source, options in ((asked["cpu"], "--device cpu"), (asked["h100"], asked["h100_options"])):
            if source and not source.startswith("NADs/"):
                args = vars(SCRIPTS[script.removesuffix(".py")].parse_arguments(argv + options.split()))
                saved = files.read_json(table.RESULTS / source / "config.json", "settings")["settings"]
                for key in saved.keys() & args.keys() - {"arch", "nads", "device"}:
                    assert saved[key] == args[key], (command, key)


def test_no_committed_file_names_a_folder_of_one_machine():
    texts = [path for suffix in ("csv", "json", "md", "py") for path in table.RESULTS.rglob(f"*.{suffix}")]
    assert not [path for path in texts if any(word in path.read_text() for word in ("/work", "/shared/", "/home"))]


# --- Formulas


VERDICTS = [([1], 1, 1, "✓"), ([1.01], 1, 1, "≈"), ([0.5, 3], 1, 1, "≈"), ([3.01, 0], 1, 1, "✗")]
VERDICTS += [([1], 1, 2, "◔"), ([9], 1, 2, "✗"), ([], 0, 2, "–"), ([], 1, 2, "◔")]


@pytest.mark.parametrize(("sizes", "measured", "whole", "symbol"), VERDICTS)
def test_the_verdict_follows_the_rule(sizes, measured, whole, symbol):
    assert table.TOLERANCE["accuracy on CIFAR-10"][:2] == (1, 3)
    assert table.verdict([("accuracy on CIFAR-10", size) for size in sizes], measured, whole) == symbol


@pytest.fixture
def record(tmp_path, monkeypatch):
    """An empty record, and a function that adds a run of rows (keys, accuracy) to it."""
    monkeypatch.setattr(table, "RESULTS", tmp_path)

    def add(run, keys, rows, published=None, **settings):
        (tmp_path / run).mkdir(parents=True)
        lines = [dict(zip(keys, key, strict=True)) | {"test_accuracy": value, "seconds": 2} for key, value in rows]
        tables.write_rows(tmp_path / run / "accuracies.csv", [line | {"device": "CPU"} for line in lines])
        command = f"{run}.py --sigma 3 --frequency 0 2 --frequency -2 4 --output here --seed 1"
        files.save_json(tmp_path / run / "config.json", {"settings": settings, "command": command})
        if published:
            tables.write_rows(tmp_path / run / "published.csv", [published])

    return add


KNOWN = {("LeNet", f"map_{key}"): value for key, value in {"mean": 60.0, "min": 50.0, "max": 100.0}.items()}
KNOWN |= {("LeNet", "map_cells_from_90"): 31.0, ("LeNet", "map_cells_below_55"): 240.0}
AGREEMENT = {"rows": 9, "pearson": 0.9, "spearman": 0.8, "mean_absolute_difference": 4.0}
ASKED = {"kind": "map", "title": "L", "network": "LeNet", "runs": "a/b", "items": "map"}


def quadrant():
    """One training for each of the map's 81 cells besides mirror images: 90 on the horizontal axis, else 52."""
    frequencies = range(-16, 1, 2)
    return [((y, x), 90 if y == 0 else 52) for y in frequencies for x in frequencies]


def test_a_map_is_filled_from_mirror_images_and_summed_up_over_256_cells(record):
    record("a/b", table.FREQUENCY, quadrant(), AGREEMENT)
    summary, cells = table.map_rows(ASKED, KNOWN)
    mean = (16 * 90 + 240 * 52) / 256
    assert summary.here == f"{mean:.1f}, 52.0, 90.0, 16, 240" and summary.published == "60.0, 50.0, 100.0, 31, 240"
    assert summary.verdict == "✗" and summary.number == "81"  # 54.4 for 60, 16 cells for 31
    assert (cells.here, cells.verdict) == ("4.0 points; 0.900", "≈")
    near = KNOWN | {("LeNet", "map_mean"): mean + 0.9, ("LeNet", "map_cells_from_90"): 20}
    assert table.map_rows(ASKED, near)[0].verdict == "✓"


def test_a_part_of_a_map_is_not_judged_by_its_mean(record):
    record("a/b", table.FREQUENCY, [((-2, -2), 70), ((-2, 2), 80), ((0, 0), 40)])
    (row,) = table.map_rows(ASKED, KNOWN)
    assert row.verdict == "◔" and row.here.endswith("(2 of 81 cells)") and row.number == "3"
    assert table.whole_map(table.rows_of("a/b"))[2, 2] == 70 and table.whole_map(table.rows_of("a/b"))[2, -2] == 80
    (row,) = table.map_rows(ASKED | {"items": "nopooling"}, {("LeNet", "nopooling_mean"): 100})
    assert row.verdict == "✗"  # the ablation is as good in every cell
    assert table.map_rows(ASKED | {"runs": "a/none"}, KNOWN)[0].verdict == "–"


def test_a_curve_is_judged_by_its_difference_and_its_number_of_indices(record):
    known = {("LeNet", "nads_spearman"): -0.9}
    for run, number in (("a/b", 20), ("a/part", 19)):
        record(run, ["nad_index"], [((i,), 100 - i) for i in range(number)], AGREEMENT)
        (row,) = table.curve_rows(ASKED | {"runs": run}, known)
        assert (row.published, row.here) == ("−0.90; 0 if equal", "−1.00; 4.0 points")
        assert row.verdict == ("≈" if number == 20 else "◔")
    assert table.curve_rows(ASKED, {})[0].verdict == ""  # nothing is published
    assert table.curve_rows(ASKED | {"runs": "a/none"}, known)[0].verdict == "–"


def test_cifar_takes_the_mean_over_seeds_and_does_not_judge_fewer_epochs(record):
    known = {("LeNet", f"cifar_poison_{index}"): value for index, value in ((0, 20), (10, 50))}
    asked = ASKED | {"items": "poison_0 poison_10 poison_30"}
    record("a/b", ["nad_index"], [((0,), 20), ((0,), 21), ((10,), 52)], epochs=50)
    (row,) = table.cifar_rows(asked, known)
    assert (row.published, row.here, row.verdict, row.number) == ("20, 50", "20.5, 52.0, –", "◔", "3")
    assert table.cifar_rows(asked | {"items": "poison_0 poison_10"}, known)[0].verdict == "≈"
    record("a/none", [], [((), 60)], epochs=15)
    record("a/flip", [], [((), 40)])
    pair = ASKED | {"items": "none flip", "runs": "a/none a/flip"}
    known = {("LeNet", "cifar_none"): 90, ("LeNet", "cifar_flip"): 40}
    (row,) = table.cifar_rows(pair, known)
    assert (row.here, row.verdict, row.sources) == ("60.0, 40.0", "◔", ("a/none", "a/flip"))
    assert table.cifar_rows(pair | {"items": "flip", "runs": "a/flip"}, known)[0].verdict == "✓"


def test_two_runs_are_compared_where_both_have_a_training(record):
    record("a/b", ["nad_index"], [((0,), 50), ((1,), 70), ((2,), 93), ((9,), 1)])
    record("a/c", ["nad_index"], [((0,), 52), ((1,), 70), ((2,), 90)])
    (row,) = table.compared_rows(ASKED | {"runs": "a/b a/c", "items": "nad_index"}, {})
    correlation = np.corrcoef([50, 70, 93], [52, 70, 90])[0, 1]
    assert (row.here, row.number) == (f"1.7 points; 0.3; {correlation:.3f}", "3")


def test_nads_are_compared_on_the_scale_of_the_authors_gradients_and_with_what_a_sample_can_show(record, tmp_path):
    known = {("LeNet", key): value for key, value in {"singular_first": 1, "singular_last": 0.1}.items()}
    known["LeNet", "gradients"] = 5000.0
    columns = ["log_variances", "overlap_100", "smallest_ratio", "largest_ratio", "first", "last"]
    columns += ["expected_log_variances", "expected_overlap_100"]
    scale = (9999 / 4999) ** 0.5
    numbers = [0.99, 0.85, 0.96 * scale, 1.1 * scale, 1.02 * scale, 0.11 * scale, 0.9945, 0.91]
    row = {"a": "NADs/LeNet_NADs.npy", "b": "LeNet_NADs.npy"} | dict(zip(columns, numbers, strict=True))
    (tmp_path / "nads").mkdir()
    tables.write_rows(tmp_path / "nads" / "comparison.csv", [row | {"sampled": n} for n in ("", 10000, 5000)])
    spectrum, directions = table.nad_rows(ASKED, known)
    assert spectrum.here == "0.960 to 1.100; 1.02, 0.11" and spectrum.verdict == "≈"
    assert directions.published == "0.9945, 0.91 (expected of a sample)"
    assert directions.here == "0.99, 0.85" and directions.verdict == "≈"  # 0.0045 and 0.06 below
    point = {"a": row["a"], "networks": "8", "log_variances": "0.97", "overlap_100": "0.8"}
    tables.write_rows(tmp_path / "nads" / "points.csv", [point])
    assert table.nad_rows(ASKED, known)[1].here == "0.99, 0.85 (ours, 8 networks at another point: 0.97, 0.8)"


def test_times_are_medians_of_a_device_by_items_and_workers(record, tmp_path):
    record("a/b", ["nad_index"], [((i,), 50) for i in range(3)])
    path = tmp_path / "a" / "b" / "accuracies.csv"
    text = path.read_text().replace("2,CPU", "600,NVIDIA H100 80GB HBM3", 1).replace("2,CPU", "9,NVIDIA A100", 1)
    path.write_text(text)
    row = {"command": "x", "items": 100, "cpu": "a/b", "cpu_workers": 2, "h100": "a/b", "h100_options": "--workers 6"}
    unknown = row | {"command": "y", "cpu": "a/none", "h100": ""}
    tables.write_rows(tmp_path / "times.csv", [row, unknown])
    assert table.times_table().splitlines()[2:] == ["| `x` | 1.7 min | 2.8 hours with `--workers 6` |"]
    shown = [table.duration(seconds) for seconds in (59, 90, 600, 5400, 36000, 1e6, float("nan"))]
    assert shown == ["59 s", "1.5 min", "10 min", "1.5 hours", "10 hours", "12 days", ""]


def test_all_runs_are_listed_by_device_and_commands_lose_what_says_where(record, tmp_path):
    record("steps/b", ["nad_index"], [((0,), 50), ((1,), 70)])
    before = table.runs_table()
    assert "| [b](steps/b) | CPU | 2 | 60.00 | 2 | `" in before
    path = tmp_path / "steps" / "b" / "accuracies.csv"
    path.write_text(path.read_text().replace("70", "70.0001"))
    assert table.runs_table() != before  # any number
    assert table.command_of("steps/b") == "steps/b.py --sigma 3 --frequency … --seed 1"
    assert table.command_of("NADs/LeNet_NADs.json") == "NADs_scripts/lenet_nad.py"


def test_blocks_are_filled_between_their_markers_and_missing_ones_are_refused():
    text = "a\n<!-- table.py: begin x -->\nold\n<!-- table.py: end x -->\nb\n"
    once = table.filled(text, "x", "new")
    assert "old" not in once and once.startswith("a\n") and once.endswith("\nb\n") and "\nnew\n" in once
    assert table.filled(once, "x", "new") == once
    with pytest.raises(Refusal, match="begin y"):
        table.filled(text, "y", "new")


def test_published_numbers_have_a_source_and_no_other_column():
    with open(ROOT / "results" / "published.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert all(row["source"] and np.isfinite(float(row["value"])) for row in rows)
    assert len({(row["network"], row["quantity"]) for row in rows}) == len(rows)
