"""Every experiment command of the READMEs runs, made small by options that come after its own."""

import re
import shlex
import subprocess
import sys

import pytest

from tests.helpers import READMES, ROOT
from tests.tiny_images import write_folder

BLOCKS = [block for text in READMES.values() for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)]
LINES = [line.split("  #")[0].strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = [line for line in LINES if line.startswith("python ")]
(NETWORK,) = re.findall(r"^```python\n(.*?)^```", READMES[ROOT / "README.md"], re.M | re.S)  # mynets.py, the user's own
SMALL = {
    "directional_bias.py": "--epochs 1 --num-train 20 --num-test 20",
    "nad_computation.py": "--num-networks 2",
    "poison_cifar.py": "--epochs 1 --data {images}",
    "NADs_scripts/figure.py": "--output {output}/nads.png",
    "NADs_scripts/compare.py": "",
    "predict.py": "--arch logreg --image-size 32 --num-channels 1 --num-networks 1",
    "studies/atlas.py": "--arch logreg",
    "studies/designs.py": "--output {output}/designs",
    "studies/stability.py": "",
}


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of images in the layout that the README describes."""
    return write_folder(tmp_path_factory.mktemp("images"), classes=2, train=4, test=4)


def test_the_readme_has_a_command_for_each_experiment():
    scripts = {shlex.split(command)[1] for command in COMMANDS}
    assert {"directional_bias.py", "nad_computation.py", "poison_cifar.py"} <= scripts
    assert scripts <= SMALL.keys(), "a command that this test does not know how to make small"


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_runs(command, tmp_path, images):
    _, script, *options = shlex.split(command)
    options = [option for option in options if option != "--download"]
    options = [str(ROOT / option) if option.startswith("NADs/") else option for option in options]
    (tmp_path / "mynets.py").write_text(NETWORK)
    small = SMALL[script].format(images=images, output=tmp_path).split()
    result = subprocess.run(
        [sys.executable, ROOT / script, *options, *small], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    if script != "NADs_scripts/compare.py":
        (figure,) = re.findall(r"^figure: (.*)$", result.stdout, re.MULTILINE) or [None]
        assert figure is None or (tmp_path / figure).is_file()


def test_the_files_that_the_readmes_name_exist():
    paths = [*READMES, *(ROOT / "docs").glob("*.md"), ROOT / "results" / "differences.md"]
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    links = [path.parent / link for path, text in texts.items() for link in re.findall(r"\]\(((?!http)[^)#]+)", text)]
    assert links and not [link for link in links if not link.exists()]
