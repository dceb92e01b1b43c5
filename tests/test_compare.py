"""NADs_scripts: what compare.py prints and refuses; what a sample does to a spectrum."""

import numpy as np
import pytest

from NADs_scripts import compare
from NADs_scripts.compare import sampled_nads
from tests.helpers import orthonormal, refusal, rows
from utils.nads import subspace_overlap

SPECTRUM = np.geomspace(2, 0.01, 64).astype(np.float32)


def basis():
    return orthonormal(64).astype(np.float32)


def save(folder, name, directions, values=None):
    np.save(folder / f"{name}_NADs.npy", directions)
    if values is not None:
        np.save(folder / f"{name}_eigenvals.npy", values)
    return str(folder / f"{name}_NADs.npy")


@pytest.mark.parametrize(("rows_a", "rows_b", "values_b"), [(64, 64, 64), (64, 63, 63), (63, 63, 63), (63, 63, 64)])
def test_a_file_agrees_with_itself_scaled_also_with_a_row_less(tmp_path, capsys, rows_a, rows_b, values_b):
    a = save(tmp_path, "A", basis()[:rows_a], SPECTRUM[:rows_a])
    b, table = save(tmp_path, "B", basis()[:rows_b], 2 * SPECTRUM[:values_b]), tmp_path / "table.csv"
    for _ in range(2):
        compare.main([a, b, "--table", str(table)])
    lines = capsys.readouterr().out.splitlines()[:6]
    assert [line.split(":")[0] for line in lines[:4]] == [f"overlap of the first {k:3d}" for k in (1, 5, 20, 50)]
    assert all(": 1.000 (by chance" in line for line in lines[:4])
    assert lines[4].startswith("correlation of log variances: 1.0000; singular values: 2 to 0.01")
    assert lines[5] == "by those of B: median 0.500, from 0.500 to 0.500"
    row = rows(table)[1]
    assert row == rows(table)[0] and (row["a"], row["b"], row["overlap_50"]) == (a, "B_NADs.npy", "1.0000")
    assert {row["smallest_ratio"], row["median_ratio"], row["largest_ratio"]} == {"0.5000"} and row["first"] == "2"


def test_all_sizes_of_the_papers_images_are_compared_and_without_both_spectra_only_the_overlap(tmp_path, capsys):
    identity = np.eye(1024, dtype=np.float32)
    a = save(tmp_path, "A", identity, np.ones(1024))
    compare.main([a, save(tmp_path, "B", np.roll(identity, 100, axis=0)[:1023])])
    lines = zip((1, 5, 20, 50, 100, 200, 500), [0, 0, 0, 0, 0, 0.5, 0.8], strict=True)
    expected = [f"overlap of the first {k:3d}: {v:.3f} (by chance {k / 1024:.3f})" for k, v in lines]
    assert capsys.readouterr().out.splitlines() == expected


@pytest.mark.parametrize(
    ("directions", "words"),
    [(np.ones((64, 64)), "are not orthonormal"), (np.eye(64)[:60], "has shape (60, 64)"), (np.eye(32), "(32, 32)")],
)
def test_arrays_that_are_not_nads_of_one_size_are_refused(tmp_path, capsys, directions, words):
    good, bad = save(tmp_path, "A", basis()), save(tmp_path, "B", directions)
    assert words in refusal(capsys, compare.main, good, bad)
    assert "there is no array at" in refusal(capsys, compare.main, good, tmp_path / "none.npy")
    assert "the following arguments are required: b" in refusal(capsys, compare.main, good)


@pytest.mark.parametrize("values", [SPECTRUM[:50], SPECTRUM[None], np.float32(1)])
def test_a_spectrum_of_another_length_is_refused(tmp_path, capsys, values):
    a = save(tmp_path, "A", basis(), values)
    assert "A_eigenvals.npy has shape" in refusal(capsys, compare.main, a, a)


def test_a_sample_of_a_flat_spectrum_has_the_edges_of_marchenko_and_pastur():
    number, dimension = 2_000, 200
    values = sampled_nads(np.full(dimension, 3.0), number).singular_values
    edges = 3 * (1 + np.array([1, -1]) * (dimension / number) ** 0.5)
    np.testing.assert_allclose(values[[0, -1]], edges, rtol=0.03)
    assert np.sqrt(np.mean(values**2)) == pytest.approx(3, rel=0.01)


def test_a_spectrum_is_compared_as_a_sample_shows_it(tmp_path, capsys):
    a, table = save(tmp_path, "A", basis(), SPECTRUM), tmp_path / "table.csv"
    seen = sampled_nads(SPECTRUM, 100).singular_values
    b, bare = save(tmp_path, "B", basis()[:63], seen[:63] * np.linspace(0.9, 1.1, 63)), save(tmp_path, "C", basis())
    compare.main([a, b, "--sampled", "100", "--table", str(table)])
    (row,) = rows(table)
    assert (row["a"], row["sampled"], row["overlap_50"]) == (a, "100", "1.0000")
    assert (row["smallest_ratio"], row["largest_ratio"]) == (f"{1 / 1.1:.4f}", f"{1 / 0.9:.4f}")
    said = capsys.readouterr().out
    assert f"singular values: {seen[0]:.5g} to {seen[62]:.5g}\n" in said
    assert f"expected of a sample: {float(row['expected_overlap_50']):.3f})" in said
    assert f"expected of a sample: {row['expected_log_variances']}\n" in said
    table.write_text("other,columns\n1,2\n")
    assert "has other columns than a, b, sampled" in refusal(capsys, compare.main, a, b, "--table", table)
    assert "--sampled 64: expected more than 64" in refusal(capsys, compare.main, a, b, "--sampled", 64)
    assert "spectra beside both files" in refusal(capsys, compare.main, a, bare, "--sampled", 100)


def test_what_is_expected_of_a_sample_is_what_a_sample_along_other_directions_shows(tmp_path, capsys):
    """Draw gradients of a known covariance, take their NADs, and compare: as far as expected, to their own scatter."""
    directions, number, table = basis().astype(float), 400, tmp_path / "table.csv"
    a = save(tmp_path, "A", basis(), SPECTRUM)
    gradients = np.random.default_rng(1).standard_normal((number, 64)) * SPECTRUM @ directions
    _, values, rows_b = np.linalg.svd(gradients - gradients.mean(0), full_matrices=False)
    b = save(tmp_path, "B", rows_b.astype(np.float32), values / np.sqrt(number - 1))
    compare.main([a, b, "--sampled", str(number), "--table", str(table)])
    (row,) = rows(table)
    for k in (5, 20, 50):  # a single direction scatters more
        assert float(row[f"expected_overlap_{k}"]) == pytest.approx(float(row[f"overlap_{k}"]), abs=0.06)
    assert float(row["expected_log_variances"]) > 0.99 and abs(float(row["median_ratio"]) - 1) < 0.03
    many = sampled_nads(SPECTRUM, 100_000)
    assert subspace_overlap(many.directions, np.eye(64), 20) > 0.999
    np.testing.assert_allclose(many.singular_values, SPECTRUM, rtol=0.02)
