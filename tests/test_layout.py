"""The rules of the house: who imports whom, which room touches what, and how much there is to read."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GROUND = ("models", "utils")
ROOMS = (*GROUND, "NADs_scripts", "studies", "results", "docs", "benchmarks", "tests")
PAPERS = ["directional_bias", "nad_computation", "poison_cifar"]  # not what a user puts beside them
SCRIPTS = [*PAPERS, "predict"]
# What each may import of the project. The notebook and the tests may import all of it but each other.
ALLOWED = {"models": {"models"}, "utils": {"utils"}} | {script: {*GROUND, *PAPERS} for script in PAPERS}
ALLOWED["predict"] = {*GROUND, "directional_bias"}
ALLOWED["docs"] = {*GROUND, *SCRIPTS, "NADs_scripts", "studies", "docs"}
IN_ROOMS = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
FILES = sorted([*(ROOT / f"{script}.py" for script in SCRIPTS), *IN_ROOMS])
MAX_LINES = 3_670  # of models, utils, NADs_scripts and the scripts of the experiments; it may only fall
MAX_STUDIES = 695  # of predict.py and studies


def room(path):
    """The top-level package or script that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


OWN_FILES = [path for path in FILES if room(path) != "tests"]
own_files = pytest.mark.parametrize("path", OWN_FILES, ids=lambda path: str(path.relative_to(ROOT)))


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(node, own):
    """The top-level names of the modules that an import statement anywhere in the code imports."""
    for statement in ast.walk(node):
        if isinstance(statement, ast.Import):
            yield from (alias.name.split(".")[0] for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            yield own if statement.level else statement.module.split(".")[0]


def definitions(node):
    return {s.name for s in node.body if isinstance(s, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}


@own_files
def test_imports_go_one_way(path):
    used = set(imported(tree(path), room(path)))
    allowed = ALLOWED.get(room(path), {*GROUND, *SCRIPTS, room(path)})
    assert used & {*ROOMS, *SCRIPTS} <= allowed
    assert not {"matplotlib", "seaborn", "pylab"} & used or path == ROOT / "utils" / "plotting.py"
    assert "argparse" not in used or room(path) != "models"


@own_files
def test_only_workers_reads_the_environment_of_ranks(path):
    strings = {s.value for s in ast.walk(tree(path)) if isinstance(s, ast.Constant) and isinstance(s.value, str)}
    used = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"} & strings
    assert not used or path == ROOT / "utils" / "workers.py"


def test_a_notebook_defines_nothing_that_the_project_defines():
    known = set().union(*(definitions(tree(path)) for path in OWN_FILES))
    for path in ROOT.glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        lines = [line for c in cells if c["cell_type"] == "code" for line in "".join(c["source"]).splitlines()]
        code = ast.parse("\n".join("pass" if line.startswith(("%", "!")) else line for line in lines))
        assert not definitions(code) & known
        assert not {"tests", "NADs_scripts"} & set(imported(code, ""))


def test_the_formatter_decides_the_layout_without_exceptions():
    assert not [path for path in FILES if re.search(r"#\s*fmt:", path.read_text(encoding="utf-8"))]


def test_what_must_be_read_to_trust_a_number_is_small():
    counts = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in OWN_FILES}
    studies = {path: count for path, count in counts.items() if room(path) in ("predict", "studies")}
    paper = {p: n for p, n in counts.items() if room(p) not in ("predict", "studies", "results", "benchmarks", "docs")}
    assert sum(paper.values()) <= MAX_LINES, sorted(paper.items(), key=lambda item: -item[1])[:5]
    assert sum(studies.values()) <= MAX_STUDIES, studies
