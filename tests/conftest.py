"""What the tests share: one thread, so that sums are taken in one order; the published files, where there are some."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from tests.helpers import orthonormal
from utils import plotting, workers

torch.set_num_threads(1)
settings.register_profile("project", deadline=None)  # the machine may be busy
settings.load_profile("project")


def pytest_collection_modifyitems(items):
    """Skip the tests marked `gpu` where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def one_thread():
    """Whatever a test has launched, the next one has one thread again."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def reference():
    """The folder with the authors' published numbers and arrays."""
    folder = os.environ.get("NADS_REFERENCE")
    if not folder:
        pytest.skip("needs the authors' published files: set NADS_REFERENCE to their folder")
    return Path(folder)


@pytest.fixture(scope="session")
def nads_file(tmp_path_factory):
    """NADs of 32×32 pixels, as a file."""
    path = tmp_path_factory.mktemp("nads") / "nads.npy"
    np.save(path, orthonormal(1024).astype(np.float32))
    return path


@pytest.fixture
def one_process(monkeypatch):
    """Stay in this process: starting copies of a command costs seconds."""
    monkeypatch.setattr(workers, "num_cores", lambda: 1)


@pytest.fixture
def no_figures(monkeypatch):
    """Figures cost more than these trainings: leave empty files in their place."""
    monkeypatch.setattr(plotting, "save_figure", lambda _, path: path.touch())
