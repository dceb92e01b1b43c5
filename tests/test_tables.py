"""utils/tables: CSV files as spreadsheets and editors leave them, and what cannot be read, with its line."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refusals import Refusal
from utils import tables

ROWS = [{"index": "0", "name": "plain"}, {"index": "-1", "name": 'a,"b"'}, {"index": "2", "name": "σ"}]
TEXT = 'index,name\n0,plain\n-1,"a,""b"""\n2,σ\n'


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("last", ["", "\n", "\n\n"])
def test_line_ends_a_mark_at_the_start_and_a_missing_last_newline_are_fine(tmp_path, end, mark, last):
    text = mark + (TEXT.rstrip("\n") + last).replace("\n", end)
    (path := tmp_path / "rows.csv").write_bytes(text.encode())
    assert tables.read_rows(path, ["index"]) == ROWS


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("x,0", "line 3 of .*index is 'x', no whole number"),
        ("1", "line 3 of .*expected 2 cells"),
        ("1,0,2", "line 3 of .*expected 2 cells"),
        ("\xff,0", "line 3 of .*not UTF-8"),
        ("1," + "1" * 200_000, "line 3 of .*field larger"),
    ],
)
def test_what_cannot_be_read_is_refused_with_file_and_line(tmp_path, line, said):
    (path := tmp_path / "rows.csv").write_text(f"index,name\n0,a\n{line}\n", encoding="latin-1")
    with pytest.raises(Refusal, match=said):
        tables.read_rows(path, ["index"])


def test_two_columns_of_one_name_and_a_missing_column_are_refused(tmp_path):
    (path := tmp_path / "rows.csv").write_text("a,a\n1,2\n")
    with pytest.raises(Refusal, match=r"line 1 of .*two columns are named 'a'"):
        tables.read_rows(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(Refusal, match=r"line 1 of .*there is no column c"):
        tables.read_rows(path, ["c"])


@given(st.lists(st.fixed_dictionaries({"a": st.text("ab,\"' σ\n", max_size=5), "b": st.integers()}), min_size=1))
def test_what_is_written_is_read(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    tables.write_rows(path, rows)
    assert tables.read_rows(path, ["b"]) == [{"a": row["a"], "b": str(row["b"])} for row in rows]


def test_no_file_has_no_rows_but_published_numbers_must_be_there(tmp_path):
    assert tables.read_rows(tmp_path / "none.csv") == []
    with pytest.raises(Refusal, match="there is no file"):
        tables.read_published(tmp_path / "none.csv", ["index"], "lenet")


def test_a_spread_has_names_and_unpacks():
    rows = [{"k": "1", "test_accuracy": value} for value in ("60", "70", "nan")] + [{"k": "2", "test_accuracy": "5"}]
    found = tables.mean_and_spread(rows, ["k"])
    mean, spread, number = found[1,]
    assert (found[1,].mean, mean, number, found[1,].number) == (65, 65, 2, 2)
    assert found[1,].spread == spread == pytest.approx(50**0.5)
    assert math.isnan(found[2,].spread) and tables.means(rows, ["k"]) == {(1,): 65, (2,): 5}
