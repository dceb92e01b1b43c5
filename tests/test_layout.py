"""The house's rules (one-way imports): who imports whom, and which room touches what."""

import ast
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GROUND = ("models", "utils")
ROOMS = (*GROUND, "NADs_scripts", "benchmarks", "tests")
SCRIPTS = ["directional_bias", "nad_computation", "poison_cifar"]  # not what a user puts beside them
# What each may import of the project. The notebook and the tests may import all of it but each other.
ALLOWED = {"models": {"models"}, "utils": {"utils"}} | {script: {*GROUND, *SCRIPTS} for script in SCRIPTS}
IN_ROOMS = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
FILES = sorted([*(ROOT / f"{script}.py" for script in SCRIPTS), *IN_ROOMS])
OWN_FILES = [path for path in FILES if "tests" not in path.parts[len(ROOT.parts) :]]  # without the tests


def room(path):
    """The top-level package or script that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def name(path):
    return str(path.relative_to(ROOT))


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


def strings(node):
    return {s.value for s in ast.walk(node) if isinstance(s, ast.Constant) and isinstance(s.value, str)}


def notebook_code(path):
    """The code of a notebook's cells, without the lines that are IPython's own."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    lines = [line for c in cells if c["cell_type"] == "code" for line in "".join(c["source"]).splitlines()]
    return ast.parse("\n".join("pass" if line.startswith(("%", "!")) else line for line in lines))


def test_there_is_something_to_check():
    assert {"models", "utils", "directional_bias", "tests"} <= {room(path) for path in FILES}


@pytest.mark.parametrize("path", OWN_FILES, ids=name)
def test_imports_go_one_way(path):
    project = {*ROOMS, *SCRIPTS}
    used = set(imported(tree(path), room(path))) & project
    allowed = ALLOWED.get(room(path), {*GROUND, *SCRIPTS, room(path)})
    assert used <= allowed, f"{name(path)} imports {sorted(used - allowed)}"


@pytest.mark.parametrize("path", OWN_FILES, ids=name)
def test_only_plotting_knows_matplotlib(path):
    used = {"matplotlib", "seaborn", "pylab"} & set(imported(tree(path), room(path)))
    assert not used or name(path) == "utils/plotting.py"


@pytest.mark.parametrize("path", OWN_FILES, ids=name)
def test_only_distributed_reads_the_ranks_environment(path):
    used = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"} & strings(tree(path))
    assert not used or name(path) == "utils/distributed.py"


@pytest.mark.parametrize("path", [path for path in OWN_FILES if room(path) == "models"], ids=name)
def test_models_read_no_command_line(path):
    assert not {"argparse", "utils"} & set(imported(tree(path), "models"))


def test_a_notebook_defines_nothing_that_the_project_defines():
    known = set().union(*(definitions(tree(path)) for path in OWN_FILES))
    for path in ROOT.glob("*.ipynb"):
        code = notebook_code(path)
        assert not definitions(code) & known
        assert not {"tests", "NADs_scripts"} & set(imported(code, ""))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_what_it_does_and_has_a_main_that_takes_argv(script):
    code = tree(ROOT / f"{script}.py")
    assert ast.get_docstring(code)
    main = next(node for node in code.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert [argument.arg for argument in main.args.args] == ["argv"]
    assert [ast.literal_eval(default) for default in main.args.defaults] == [None]
