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
_shadowing: dict[str, dict[str, ModuleType]] = defaultdict(dict)  # the user's modules with our names, by folder


@contextmanager
def users_imports() -> Iterator[None]:
    """Import from the working directory first, even modules that have the name of one of ours (`models`, `utils`).

    Afterwards such a name means our module again: a user's module may import its own at the top of a file or in a
    factory, but not in a `forward`. Other names can be imported anywhere.
    """
    folder, path = os.getcwd(), sys.path[:]
    names = _shadowed(Path(folder))
    ours = _take(names)
    sys.modules.update(_shadowing[folder])
    sys.path[:] = [folder, *(entry for entry in path if not (names and Path(entry).resolve() == ROOT))]
    try:
        yield
    finally:
        _shadowing[folder] = _take(names)
        sys.modules.update(ours)
        sys.path[:] = path + [entry for entry in dict.fromkeys(sys.path) if entry not in path]


@lru_cache  # as each draw asks
def _shadowed(folder: Path) -> set[str]:
    """The names of our modules that mean something else to Python in this folder."""
    others = folder.resolve() != ROOT
    return {n for n in OWN_NAMES if others and ((folder / f"{n}.py").exists() or any((folder / n).glob("*.py")))}


def _take(names: set[str]) -> dict[str, ModuleType]:
    """Take the modules of these top-level names out of `sys.modules`."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in names}


def import_factory(arch: str) -> Callable[..., nn.Module]:
    """Import the factory that `package.module:factory` names, within `users_imports`. What its module raises passes."""
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
    """A digest of a network's structure, and of the source of its factory and of its modules' classes; nothing else.

    Within `users_imports`, as `inspect` finds a class's file by its module. A source that cannot be read is left out.
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
