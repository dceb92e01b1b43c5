"""The notebook runs from top to bottom, and what is committed of it is in order."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

PATH = Path(__file__).resolve().parents[1] / "NADs.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(PATH, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_committed_outputs_are_those_of_one_run_from_top_to_bottom(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]


def test_the_committed_outputs_name_no_path_of_the_machine_that_made_them(notebook):
    texts = [str(output) for cell in code_cells(notebook) for output in cell.outputs]
    assert not [text for text in texts if re.search(r"[\"' ](/[a-z]+){2,}", re.sub(r"'image/png': '[^']*'", "", text))]


def test_it_shows_figures_and_stays_small_enough_for_a_web_view(notebook):
    figures = [o for cell in code_cells(notebook) for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(figures) >= 6 and PATH.stat().st_size < 2_000_000


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(notebook):
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": PATH.parent}}).execute()
    assert all(cell.execution_count for cell in code_cells(notebook))
