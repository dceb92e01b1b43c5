"""NADs_scripts/compare.py: what it prints, and what it refuses in one line."""

import numpy as np
import pytest

from NADs_scripts import compare
from NADs_scripts.sampling_effect import sampled_spectrum

SPECTRUM = np.geomspace(2, 0.01, 64).astype(np.float32)


def basis(dimension=64, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((dimension, dimension)))[0].T.astype(np.float32)


def save(folder, name, rows, values=None):
    np.save(folder / f"{name}_NADs.npy", rows)
    if values is not None:
        np.save(folder / f"{name}_eigenvals.npy", values)
    return str(folder / f"{name}_NADs.npy")


def refusal(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        compare.main(argv)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1
    return error


def test_a_file_agrees_with_itself_scaled(tmp_path, capsys):
    a = save(tmp_path, "A", basis(), SPECTRUM)
    b = save(tmp_path, "B", basis(), 2 * SPECTRUM)
    compare.main([a, b])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:4]] == [f"overlap of the first {k:3d}" for k in (1, 5, 20, 50)]
    assert all(": 1.000 (by chance" in line for line in lines[:4])
    assert lines[4:] == [
        "correlation of log variances along B: 1.0000",
        "median ratio of singular values:      0.500",
    ]


@pytest.mark.parametrize("rows_a", [64, 63])
@pytest.mark.parametrize("values_b", [64, 63])
def test_the_authors_files_of_one_row_less_are_accepted(tmp_path, capsys, rows_a, values_b):
    a = save(tmp_path, "A", basis()[:rows_a], SPECTRUM[:rows_a])
    b = save(tmp_path, "B", basis()[:63], SPECTRUM[:values_b])
    compare.main([a, b])
    out = capsys.readouterr().out
    assert out.count(": 1.000 (by chance") == 4 and "1.0000\n" in out and out.endswith(" 1.000\n")


def test_all_sizes_of_the_papers_images_are_compared_and_1023_rows_do(tmp_path, capsys):
    rows = np.eye(1024, dtype=np.float32)
    compare.main([save(tmp_path, "A", rows), save(tmp_path, "B", np.roll(rows, 100, axis=0)[:1023])])
    out = capsys.readouterr().out.splitlines()
    expected = [0, 0, 0, 0, 0, 0.5, 0.8]
    sizes = (1, 5, 20, 50, 100, 200, 500)
    lines = zip(sizes, expected, strict=True)
    assert out == [f"overlap of the first {k:3d}: {v:.3f} (by chance {k / 1024:.3f})" for k, v in lines]


@pytest.mark.parametrize("values", [(None, None), (SPECTRUM, None), (None, SPECTRUM)])
def test_without_both_spectra_only_the_overlap_is_printed(tmp_path, capsys, values):
    compare.main([save(tmp_path, "A", basis(), values[0]), save(tmp_path, "B", basis(seed=1), values[1])])
    out = capsys.readouterr().out
    assert out.count("overlap") == 4 and "variances" not in out


def test_a_file_of_another_name_has_no_spectrum(tmp_path, capsys):
    np.save(tmp_path / "a.npy", basis())
    compare.main([str(tmp_path / "a.npy")] * 2)
    assert "variances" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (np.ones((64, 64)), "are not orthonormal"),
        (np.eye(64)[:60], "has shape (60, 64)"),
        (np.zeros(64), "has shape (64,)"),
        (np.array(1.0), "has shape ()"),
        (np.full((64, 64), np.nan), "are not orthonormal"),
        (np.array(["a"]), "is not a readable .npy array"),
        (np.zeros((0, 0)), ""),
    ],
)
def test_arrays_that_are_not_nads_are_refused(tmp_path, capsys, rows, words):
    bad, good = save(tmp_path, "A", rows), save(tmp_path, "B", basis())
    assert words in refusal([bad, good], capsys)
    assert refusal([good, bad], capsys)


def test_files_that_cannot_be_read_or_are_not_of_one_size_are_refused(tmp_path, capsys):
    good = save(tmp_path, "A", basis())
    assert "there is no array at" in refusal([good, str(tmp_path / "none.npy")], capsys)
    (tmp_path / "text.npy").write_text("not an array")
    assert "is not a readable .npy array" in refusal([str(tmp_path / "text.npy"), good], capsys)
    assert "has shape (32, 32): expected (64, 64)" in refusal([good, save(tmp_path, "B", basis(32))], capsys)
    assert "the following arguments are required: b" in refusal([good], capsys)


@pytest.mark.parametrize("values", [SPECTRUM[:50], SPECTRUM[None], np.float32(1)])
def test_a_spectrum_of_another_length_is_refused(tmp_path, capsys, values):
    a = save(tmp_path, "A", basis(), values)
    assert "A_eigenvals.npy has shape" in refusal([a, a], capsys)


def test_a_sample_of_a_flat_spectrum_has_the_edges_of_marchenko_and_pastur():
    number, dimension, variance = 4_000, 400, 4.0
    values = sampled_spectrum(np.full(dimension, (9999 * variance) ** 0.5), number)
    ratio = (dimension / number) ** 0.5
    edges = np.sqrt(number * variance) * np.array([1 + ratio, 1 - ratio])
    np.testing.assert_allclose(values[[0, -1]], edges, rtol=0.02)
    assert np.sqrt(np.mean(values**2)) == pytest.approx(np.sqrt(number * variance), rel=0.01)
