"""Networks of the user: imported by name, and told apart by their source."""

import hashlib
import importlib
import inspect
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from torch import nn

from models.libraries import LIBRARIES, near
from refusals import Refusal

ROOT = Path(__file__).resolve().parents[1]
OWN_NAMES = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/*.py")}
NOT_THE_USERS = {"torch", *LIBRARIES, *sys.stdlib_module_names}  # packages whose source does not enter a digest
_shadowed_modules: dict[str, dict[str, ModuleType]] = defaultdict(dict)  # of the user, by working directory


@contextmanager
def users_imports() -> Iterator[None]:
    """Import from the working directory first, even modules that have the name of one of ours (`models`, `utils`).

    Afterwards such a name means our module again. So the user's modules may import theirs at the top of a file and,
    as factories are called in here too, in a factory; but not in a `forward`. Other names can be imported anywhere:
    the working directory stays on the path, at its end.
    """
    folder, path = os.getcwd(), sys.path[:]
    shadowed = _shadowed(Path(folder))
    ours = _take(shadowed)
    sys.modules.update(_shadowed_modules[folder])
    sys.path[:] = [folder, *(entry for entry in path if not (shadowed and Path(entry).resolve() == ROOT))]
    try:
        yield
    finally:
        _shadowed_modules[folder] = _take(shadowed)
        sys.modules.update(ours)
        sys.path[:] = path + [entry for entry in dict.fromkeys(sys.path) if entry not in path]


@lru_cache  # as each draw asks
def _shadowed(folder: Path) -> set[str]:
    """The names of our modules that mean something else to Python in this folder."""
    if folder.resolve() == ROOT:
        return set()
    return {name for name in OWN_NAMES if (folder / f"{name}.py").exists() or any((folder / name).rglob("*.py"))}


def _take(names: set[str]) -> dict[str, ModuleType]:
    """Take the modules of these top-level names out of `sys.modules`."""
    taken = [name for name in sys.modules if name.partition(".")[0] in names] if names else []
    return {name: sys.modules.pop(name) for name in taken}


def import_factory(arch: str) -> Callable[..., nn.Module]:
    """Import the factory that `package.module:factory` names, within `users_imports`.

    What the module itself raises passes through.
    """
    name, _, attribute = arch.partition(":")
    if not all(name.split(".")):
        raise Refusal(f"{arch!r} names no module: expected package.module:factory")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise  # of an import in the module
        raise Refusal(f"cannot import {name!r} of {arch!r}: {error}") from None
    factory = getattr(module, attribute, None)
    if not callable(factory):
        similar = near(attribute, set(dir(module)) - {attribute})
        raise Refusal(f"module {name!r} has no function or class {attribute!r}{similar}")
    return factory


def digest(factory: Callable[..., nn.Module], model: nn.Module) -> str:
    """A digest of a network's structure, and of the source of its factory and of the classes of all its modules.

    Within `users_imports`, as `inspect` finds the file of a class by the name of its module. What else these call is
    not in it. A source that cannot be read, as of a class typed in at a prompt, is left out.
    """
    classes = {kind for part in model.modules() for kind in type(part).__mro__}
    sources = sorted({_source(kind) for kind in [factory, *classes]})
    shapes = [f"{name} {tuple(parameter.shape)}" for name, parameter in model.named_parameters()]
    structure = re.sub(r" at 0x\w+", "", repr(model))
    return hashlib.blake2b("\n".join([structure, *shapes, *sources]).encode(), digest_size=4).hexdigest()


def _source(kind: Callable) -> str:
    try:
        known = getattr(kind, "__module__", "").partition(".")[0] in NOT_THE_USERS
        return "" if known else inspect.getsource(kind)
    except (OSError, TypeError):
        return ""
