"""A run is a folder: its settings, one small file for each finished item, and a table once all are finished.

    config.json      the settings on which its numbers depend, and the command
    items/           a finished item's row (.json), or the checkpoint of one in training (.pt)
    accuracies.csv   all rows, by whoever finds all items finished; its rows count as finished, too

No process waits for another, and none writes another's file.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from refusals import Refusal
from utils import files, tables, workers

CONFIG, ITEMS, ROWS = "config.json", "items", "accuracies.csv"  # in a run's folder
ROOT = Path(__file__).resolve().parents[1]
FREE = ("output", "published", "workers")  # arguments on which no number depends

Item = tuple[int, ...]  # the values of the columns that name it
Row = dict[str, str]


def settings(args: Namespace, *free: str, **derived: Any) -> dict[str, Any]:
    """What a run's numbers depend on: all of its arguments less FREE and `free`.

    `derived` settings stand in for an argument of that name, or are known only once a file has been read.
    """
    kept = {key: value for key, value in vars(args).items() if key not in {*FREE, *free}}
    return json.loads(json.dumps(kept | {"device": args.device.type} | derived, default=str))


def open_run(folder: Path, settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Create a run's folder, or check that the run in it has the same settings.

    A setting that the run does not have came later: then it had the default.

    Raises:
        Refusal: the folder holds rows, sums or checkpoints of other settings; the message names those that differ.
    """
    before = read_config(folder)
    differing = {key: before.get(key, defaults.get(key)) for key in {**before, **settings}} if before else {}
    differing = {key: value for key, value in differing.items() if value != settings.get(key)}
    if differing and _has_results(folder):
        changes = "; ".join(f"{key} was {differing[key]!r}, now {settings.get(key)!r}" for key in sorted(differing))
        advice = "give the same, choose another folder, or delete this one"
        raise Refusal(f"{folder} holds a run with other settings ({changes}): {advice}")
    if differing or not before:
        folder.mkdir(parents=True, exist_ok=True)
        files.save_json(folder / CONFIG, {"settings": settings, "command": command()})
    files.remove_stale(folder)
    files.remove_stale(folder / ITEMS)


def refuse_if_changed(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to write into a folder that a command with other settings has taken since `read_config` gave these."""
    if read_config(folder) != settings:
        raise Refusal(f"another command with other settings has begun in {folder}: choose another folder")


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of the run in a folder, empty if there is none."""
    path = folder / CONFIG
    return files.read_json(path, "settings")["settings"] if path.exists() else {}


def _has_results(folder: Path) -> bool:
    return (folder / ROWS).exists() or any(folder.glob("part-*.pt")) or any((folder / ITEMS).glob("[!.]*"))


def command() -> str:
    """The command as it could be typed again, its program without a folder."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def commit() -> str:
    """The commit of this code, "-dirty" after an edit; empty if it does not lie in a repository of its own."""
    git = shutil.which("git")
    if not git:
        return ""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"  # several processes ask at once

    def ask(*words: str) -> str:
        result = subprocess.run([git, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        return result.stdout.strip()

    if ask("rev-parse", "--show-toplevel") != str(ROOT):
        return ""
    return ask("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def device_name(device: torch.device) -> str:
    """The model of a GPU or of this machine's CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def origin(device: torch.device) -> dict[str, str]:
    """What a number may depend on besides the settings, for its row."""
    return {"device": device_name(device), "torch": torch.__version__, "commit": commit()}


def announce(what: str, wanted: int, finished: int, device: torch.device, folder: Path, number: int = 1) -> None:
    """Say what is about to be done, on what, how much of it is there already, and where the results go."""
    if not workers.speaks():
        return
    processes = max(number, workers.world_size())
    shared = f", {processes} workers" if processes > 1 else ""
    already = f", {finished} of them finished" if finished else ""
    if device.type == "cpu" and shutil.which("nvidia-smi") and not torch.cuda.is_available():
        print(f"torch {torch.__version__} cannot use this machine's GPU: see docs/on_a_gpu.md", file=sys.stderr)
    print(f"{what}: {wanted}{already}; on {device} ({device_name(device)}){shared}; results in {folder}", flush=True)


def share(
    script: str,
    argv: Sequence[str] | None,
    args: Namespace,
    keys: Sequence[str],
    items: Sequence[Item],
    *,
    what: str,
    small: bool,
    memory: float = 0,
) -> None:
    """Say what is about to be done; if several processes are to share it, start copies of the command and wait.

    `memory` is what each needs besides its libraries, in bytes.
    """
    finished = finished_rows(args.output, keys).keys() & set(items)
    missing = len(items) - len(finished)
    number = min(args.workers or workers.default_number(small, missing, memory), missing)
    announce(what, len(items), len(finished), args.device, args.output, number)
    workers.set_threads(small)
    workers.run_copies(script, argv, number, progress(args.output, keys, items, what))


def path_of(folder: Path, item: Item, ending: str = ".json") -> Path:
    """An item's file: its row, or with another ending its checkpoint."""
    return folder / ITEMS / f"{'_'.join(map(str, item))}{ending}"


def finished_rows(folder: Path, keys: Sequence[str]) -> dict[Item, Row]:
    """The rows of all finished items by what names them, in their order.

    Raises:
        Refusal: a file cannot be read; the message names it.
    """
    paths = sorted((folder / ITEMS).glob("[!.]*.json"))
    rows = [*tables.read_rows(folder / ROWS, keys), *(files.read_json(path, *keys) for path in paths)]
    by_item = {tuple(int(row[key]) for key in keys): row for row in rows}
    return {item: by_item[item] for item in sorted(by_item)}


@contextmanager
def progress(folder: Path, keys: Sequence[str], items: Sequence[Item], what: str) -> Iterator[Callable[[], None]]:
    """A bar that counts the items which have a file in the folder, whoever finished them; gives what refreshes it."""
    tabled = {tuple(int(row[key]) for key in keys) for row in tables.read_rows(folder / ROWS, keys)}
    names = {path_of(folder, item).name for item in items if item not in tabled}
    finished = len(items) - len(names)

    def count() -> int:
        return finished + len(names & set(os.listdir(folder / ITEMS)))

    (folder / ITEMS).mkdir(parents=True, exist_ok=True)
    hidden = not workers.speaks() or count() == len(items)
    with tqdm(total=len(items), initial=count(), desc=what, disable=hidden) as bar:

        def refresh() -> None:
            if not hidden and count() > bar.n:
                bar.update(count() - bar.n)

        yield refresh


def do_items(
    folder: Path,
    keys: Sequence[str],
    items: Sequence[Item],
    work: Callable[[Item, Path], dict[str, float]],
    *,
    what: str,
    device: torch.device,
) -> list[Row] | None:
    """Do this process's part of the items that are not finished; return all rows if then all items are finished.

    `keys` are columns, whole numbers that together name an item, and `items` their values. `work(item, checkpoint)`
    does one item and returns the rest of its row; until then it may keep its state in the file `checkpoint`. A copy
    returns no rows: the command that started it reports.
    """
    rows, made, config = finished_rows(folder, keys), origin(device), read_config(folder)
    tag = files.digest(json.dumps(config).encode())  # no checkpoint of other settings is continued
    here = made["torch"].partition("+")[0]
    others = {(row.get("torch") or here).partition("+")[0] for row in rows.values()} - {here}
    if others and workers.speaks():
        print(f"{folder} has rows of torch {', '.join(others)}; this is {here}", file=sys.stderr)
    with progress(folder, keys, items, what) as refresh:
        for item in workers.own_part(items):
            checkpoint = path_of(folder, item, f"-{tag}.pt")
            if item not in rows:
                start = time.perf_counter()
                results = {name: f"{value:.6g}" for name, value in work(item, checkpoint).items()}
                seconds = {"seconds": f"{time.perf_counter() - start:.2f}"}
                row = {key: str(value) for key, value in zip(keys, item, strict=True)} | results | seconds | made
                refuse_if_changed(folder, config)
                files.save_json(path_of(folder, item), row)
                refresh()
            checkpoint.unlink(missing_ok=True)
    rows = finished_rows(folder, keys)
    if workers.is_copy() or not rows.keys() >= set(items):
        return None
    tables.write_rows(folder / ROWS, list(rows.values()))
    return list(rows.values())


def print_diverged(folder: Path, rows: Sequence[Row], keys: Sequence[str], max_lr: float) -> None:
    """Say which trainings of a run diverged.

    Raises:
        Refusal: all of them did.
    """
    diverged = [tuple(int(row[key]) for key in keys) for row in rows if row["test_accuracy"] == "nan"]
    if diverged:
        print(f"{len(diverged)} of {len(rows)} trainings diverged and are left out ({', '.join(keys)}): {diverged}")
    if len(diverged) == len(rows):
        raise Refusal(f"no training in {folder} ended with a finite loss: try a smaller --max-lr than {max_lr}")
