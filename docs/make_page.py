"""docs/index.html: the atlas, the maps and the NADs to click through, in one file that loads nothing.

    python docs/make_page.py

The numbers of results/ and NADs/ go, as JSON, into docs/template.html, as they stand in their files. The relative
sensitivities of the atlas and the singular values are rounded to four digits. What has no file is left out.

docs/page.png is the top of the page:

    SCREENSHOT=docs/page.png python -m pytest tests/test_page.py -k browser
"""

import base64
import json
import re
import sys
from pathlib import Path

import numpy as np
from scipy.cluster import hierarchy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from directional_bias import DATA, KEYS, ROOT, SIGMA
from models import canonical_name, paper_name
from poison_cifar import EPSILON
from studies import designs
from studies.atlas import short_name
from utils import cli, files, plotting, runs, tables
from utils.directions import canonical_frequency, frequency_grid
from utils.nads import load_array

FREQUENCY = KEYS["fourier"]
GRID = [(y, x) for y in frequency_grid(32) for x in frequency_grid(32)]  # the order of all maps in the page
FIRST, EVERY, NEAREST = 64, 16, 5  # the first NADs and every 16th after them; the architectures most like one
CURVES = {"-sigma1": "the NADs of NADs/, σ = 1", "-bf16-sigma1": "the NADs of NADs/, σ = 1, in bf16"}
CURVES |= {"-sampled-sigma1": "NADs by the paper's protocol, σ = 1", "-bf16": "the NADs of NADs/, σ = 3, in bf16"}
CURVES |= {"-published_nads-sigma1": "the published NADs, σ = 1"}
KINDS = {"poison": "poison", "original": "none", "flip": "flip"}  # trainings on CIFAR-10: --transform
STUDIES = {"stability/maps.csv": "stability.py", "atlas/atlas.csv": "atlas.py"}  # tables in results/studies/
STUDIES |= {"designs/predictions.csv": "designs.py", "designs/accuracies.csv": "designs.py --train all"}


def commands(results: Path) -> list[list[str]]:
    """Rows (file, command), of runs from their config.json; a number in the page is linked to one."""
    table = []
    for path in sorted(results.glob("*/*/config.json")):
        command = files.read_json(path, "command")["command"]
        command = re.sub(r"( --frequency -?\d+ -?\d+)+", " --frequency …", command)
        table.append([f"`{path.parent.relative_to(results).as_posix()}/{runs.ROWS}`", f"`python {command}`"])
    return table + [[f"`studies/{file}`", f"`python studies/{command}`"] for file, command in STUDIES.items()]


def on_map(values: dict[tuple[int, int], float], digits: int = 6) -> str:
    """Values by canonical frequency in the order of GRID, blanks between, “-” where there is none."""
    cells = [values.get(canonical_frequency(*cell)) for cell in GRID]
    return " ".join("-" if value is None else f"{value:.{digits}g}" for value in cells)


def by_network(path: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of a table by its column “network”."""
    rows = tables.read_rows(path)
    return {name: [row for row in rows if row["network"] == name] for name in dict.fromkeys(r["network"] for r in rows)}


def predicted(results: Path) -> dict[str, dict]:
    """The predicted maps, by the network's short name: the atlas, the stability study, the designs."""
    entries: dict[str, dict] = {}
    rows = [row for row in tables.read_rows(results / "studies" / "atlas" / "atlas.csv") if not row["why_not"]]
    maps = load_array(results / "studies" / "atlas" / "maps.npy") if rows else []
    for row, values in zip(rows, maps, strict=True):
        facts = {key: row[key] for key in row if key not in ("architecture", "seconds", "why_not") and row[key]}
        sensitivity = on_map(dict(zip(GRID, values.flat, strict=True)), 4)
        entry = {"id": row["architecture"], "facts": facts, "atlas": True, "sensitivity": sensitivity}
        entries[short_name(row["architecture"])] = entry | {"file": "studies/atlas/atlas.csv"}
    for file in ("studies/stability/maps.csv", "studies/designs/predictions.csv"):
        known = set(entries)
        for name, of_network in by_network(results / file).items():
            if name not in known:
                arch, _, variant = name.partition(" ")
                arch = designs.NETWORKS.get(arch) or canonical_name(arch)
                means = tables.mean_and_spread(of_network, FREQUENCY, "sensitivity")
                sensitivity = {key: result.mean for key, result in means.items()}
                about = {"about": designs.DESIGNS[name][0]} if name in designs.DESIGNS else {}
                if "designs" in file:  # one of each pair of mirror images
                    sensitivity |= {canonical_frequency(y, -x): value for (y, x), value in sensitivity.items()}
                id_ = f"{arch}-{variant.replace(' ', '-')}" if variant else arch
                entry = {"id": id_, "atlas": not (rows or variant or about)} | about
                entries[name] = entry | {"sensitivity": on_map(sensitivity), "file": file}
    return entries


def add_measured(entries: dict[str, dict], results: Path) -> None:
    """Add to each entry its maps of measured accuracy."""
    by_id = {entry["id"]: entry for entry in entries.values()}
    pattern = r"([A-Za-z\d]+)(-bf16)?(-nopooling)?(?:-sigma([\d.]+))?-fourier"
    sources = []
    for path in sorted(results.glob(f"directional_bias/*/{runs.ROWS}")):
        if match := re.fullmatch(pattern, path.parent.name):
            arch, bf16, no_pooling, sigma = match.groups()
            published = tables.read_rows(path.with_name("published.csv"))
            arch = canonical_name(arch)
            entry = by_id.get(f"{arch}-without-pooling" if no_pooling else arch)
            cells = tables.means(tables.read_rows(path, FREQUENCY), FREQUENCY)
            # The paper's map is at σ = 3 with pooling; its ablation fits σ = 1.
            of_paper, file = bool(no_pooling) == bool(sigma), path.relative_to(results).as_posix()
            sources.append((entry, cells, sigma or f"{SIGMA:g}", bf16, file, published, of_paper))
    for name, rows in by_network(results / "studies" / "designs" / "accuracies.csv").items():
        cells = designs.unfolded(designs.folded(tables.means(rows, FREQUENCY)))
        file = "studies/designs/accuracies.csv"
        sources.append((entries.get(name), cells, f"{SIGMA:g}", True, file, [], False))
    for entry, cells, sigma, bf16, file, published, of_paper in sources:
        if entry and cells:
            one = {"sigma": sigma, "precision": "bf16" if bf16 else "fp32", "values": on_map(cells), "file": file}
            one |= {"kind": "the paper’s" if of_paper else "found here", "symmetric": file.startswith("studies/")}
            entry.setdefault("measured", []).append(one | {"published": published[0] if published else None})
            entry["measured"].sort(key=lambda one: -float(one["sigma"]))  # the paper's first


def likeness(entries: dict[str, dict]) -> dict | None:
    """The tree of the atlas, scipy's linkage as in its sheet. Adds to each entry the maps nearest to it."""
    logs = {name: np.log2(np.array(entry["sensitivity"].split(), float)) for name, entry in entries.items()}
    atlas = [name for name, entry in entries.items() if entry["atlas"]]
    for name, entry in entries.items():
        rms = {other: np.sqrt(np.mean((logs[other] - logs[name]) ** 2)) for other in atlas if other != name}
        entry["near"] = [[other, f"{2 ** rms[other]:.2f}"] for other in sorted(rms, key=rms.get)[:NEAREST]]
    if len(atlas) < 2:
        return None
    links = hierarchy.linkage(np.stack([logs[name] for name in atlas]), "ward", optimal_ordering=True)
    tree = hierarchy.dendrogram(links, no_plot=True)
    lines = [np.round(tree[key], 3).tolist() for key in ("icoord", "dcoord")]
    return {"names": [atlas[leaf] for leaf in tree["leaves"]], "lines": lines, "colors": tree["color_list"]}


def nads(results: Path) -> dict[str, dict]:
    """By architecture: NADs as bytes around zero, singular values, accuracies along NADs and with them as carriers."""
    by_name: dict[str, dict] = {}
    for path in sorted((ROOT / "NADs").glob("*_NADs.npy")):
        rows, values = load_array(path), load_array(path.with_name(path.name.replace("_NADs", "_eigenvals")))
        about = json.loads(path.with_suffix(".json").read_text())
        curves = []
        for kind, label in CURVES.items():
            name = f"directional_bias/{path.stem.removesuffix('_NADs')}{kind}-nads/{runs.ROWS}"
            accuracies = tables.means(tables.read_rows(results / name), ["nad_index"])
            points = [[index, f"{accuracy:.6g}"] for (index,), accuracy in accuracies.items()]
            curves += [{"label": label, "file": name, "points": points}] if points else []
        trained = trainings(results, about["arch"])
        poison = [row for of_recipe in trained.values() if "poison" in of_recipe for row in of_recipe["poison"]["rows"]]
        used = [row["nad_index"] for row in poison] + [point[0] for curve in curves for point in curve["points"]]
        indices = sorted({*range(FIRST), *range(FIRST, len(rows), EVERY), *used, len(rows) - 1})
        chosen = rows[indices]
        scaled = np.round(127 * chosen / np.abs(chosen).max(axis=1, keepdims=True)).astype(np.int8)
        by_name[path.stem.removesuffix("_NADs")] = {
            **{key: about[key] for key in ("arch", "estimator", "num_networks")},
            "file": f"NADs/{path.name}",
            "command": f"python NADs_scripts/{about['arch']}_nad.py",
            "indices": indices,
            "rows": base64.b64encode(scaled.tobytes()).decode(),
            "singular": " ".join(f"{value:.4g}" for value in values),
            "curves": curves,
            "trained": trained,
        }
    return by_name


def trainings(results: Path, arch: str) -> dict[str, dict[str, dict]]:
    """The trainings on CIFAR-10 by recipe, as the tables' names give it ("bf16, 15 epochs"), and by kind of images.

    One row for each NAD, or one in all: accuracy on clean test images, its spread over trainings (0 of one), and on
    those that carry the NAD.
    """
    by_recipe: dict[str, dict[str, dict]] = {}
    for kind, transform in KINDS.items():
        for path in sorted(results.glob(f"poison_cifar/{paper_name(arch)}-*/{runs.ROWS}")):
            pattern = rf"{paper_name(arch)}(?:-(bf16))?-{transform}(?:-(\d+)epochs)?"
            if match := re.fullmatch(pattern, path.parent.name):
                precision, epochs = match.groups()
                recipe = (precision or "fp32") + (f", {epochs} epochs" if epochs else "")
                rows = accuracies_of(tables.read_rows(path), carrying=kind == "poison")
                picture = image(next(path.parent.glob("images-*.png"), path.with_name("none")))
                file = path.relative_to(results).as_posix()
                by_recipe.setdefault(recipe, {})[kind] = {"file": file, "rows": rows, "image": picture}
    return by_recipe


def accuracies_of(rows: list[dict[str, str]], *, carrying: bool) -> list[dict]:
    """Means over trainings, by NAD where there is one."""
    keys = ["nad_index"] if carrying else []
    carried = tables.mean_and_spread(rows, keys, "carrying_accuracy") if carrying else {}
    return [
        {"clean": mean, "spread": spread if number > 1 else 0, "trainings": number}
        | ({"nad_index": index[0], "carrying": carried[index][0]} if carrying else {})
        for index, (mean, spread, number) in tables.mean_and_spread(rows, keys).items()
    ]


def image(path: Path) -> str:
    """A picture as an address that holds it; none where there is no file."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" if path.exists() else ""


def page(results: Path) -> str:
    """The whole page."""
    entries = predicted(results)
    add_measured(entries, results)
    skipped = [row for row in tables.read_rows(results / "studies" / "atlas" / "atlas.csv") if row["why_not"]]
    content = {
        "settings": {"sigma": SIGMA, "epsilon": DATA["epsilon"], "poison": EPSILON},
        "grid": frequency_grid(32),
        "colors": plotting.style_colors(),
        "tree": likeness(entries),
        "entries": entries,
        "skipped": {short_name(row["architecture"]): row["why_not"] for row in skipped},
        "nads": nads(results),
        "commands": commands(results),
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return (Path(__file__).with_name("template.html")).read_text(encoding="utf-8").replace("{{data}}", text)


@cli.one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Write the page, whole or not at all."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the tables")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "index.html", help="the page")
    args = parser.parse_args(argv)
    with files.replacing(args.output) as temporary:
        temporary.write_text(page(args.results), encoding="utf-8")
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
