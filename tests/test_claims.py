"""Each number under “here” in the READMEs' tables is that of a file in results/ or NADs/, rounded as it stands."""

import json
import re
from decimal import Decimal
from itertools import product

import numpy as np
from scipy import stats

from tests import helpers
from tests.helpers import READMES, ROOT
from utils import tables
from utils.directions import canonical_frequency, frequency_grid

README = "\n".join(READMES.values())
KEYS = ("frequency_y", "frequency_x")


def table_of(text, first):
    """The rows, as lists of cells, of the table whose header begins with the cell `first`."""
    lines = text.split(f"\n| {first} |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def says(text, values):
    """Whether the numbers in a text (not that in a name like bf16) are these values, rounded as they stand there."""
    found = re.findall(r"(?<!\w)[−+-]?\d+(?:\.\d+)?(?:e-?\d+)?", text)
    numbers = [Decimal(number.replace("−", "-")) for number in found]
    halves = [0.501 * 10.0 ** number.as_tuple().exponent for number in numbers]
    return len(numbers) == len(values) and all(np.abs(np.array(numbers, float) - values) < halves)


def rows(name):
    return helpers.rows(ROOT / "results" / f"{name}.csv")


def column(name, key="test_accuracy"):
    return np.array([float(row[key]) for row in rows(name)])


def pick(name, first, *keys):
    """Values of the one row of a table whose first column ends so."""
    (row,) = (row for row in rows(name) if next(iter(row.values())).endswith(first))
    return [float(row[key]) for key in keys]


def on_map(name):
    """Accuracies at those of the map's 256 cells that were trained."""
    means = tables.means(rows(f"directional_bias_{name}"), KEYS)
    cells = (canonical_frequency(*cell) for cell in product(frequency_grid(32), repeat=2))
    return np.array([means[cell] for cell in cells if cell in means])


def ablation(name):
    values = on_map(f"lenet_{name}")
    return [len(values), len(rows(f"directional_bias_lenet_{name}")), values.mean(), values.min()]


def folded(name):
    """Accuracies by frequency, of which the mirror images count as one."""
    return tables.means([row | {key: abs(int(row[key])) for key in KEYS} for row in rows(name)], KEYS)


def part(name):
    """Of the 81 cells but for mirror images: how many, lowest at, highest at, how many ≥ 90 %, how many < 55 %."""
    means = folded(f"directional_bias_{name}_bf16")
    low, high = min(means, key=means.get), max(means, key=means.get)
    learnt, chance = sum(mean >= 90 for mean in means.values()), sum(mean < 55 for mean in means.values())
    return [len(means), 81, means[low], *low, means[high], *high, learnt, 90, chance, 55]


def along_nads(name):
    curve = pick(f"{name}_published", "", "spearman", "mean_absolute_difference")
    return [stats.spearmanr(column(name, "nad_index"), column(name))[0], len(rows(name)), *curve]


def of_precision(name):
    """bf16 less fp32, of the seeds that have both: mean over cells, lowest, highest; mean spread of fp32 over seeds."""
    bf16, fp32 = (tables.means(rows(f"precision_{name}_{kind}"), (*KEYS, "repetition")) for kind in ("bf16", "fp32"))
    shifts = {}
    for *cell, seed in bf16.keys() & fp32.keys():
        shifts.setdefault(tuple(cell), []).append(bf16[*cell, seed] - fp32[*cell, seed])
    shift, spreads = list(map(np.mean, shifts.values())), tables.mean_and_spread(rows(f"precision_{name}_fp32"), KEYS)
    return [np.mean(shift), min(shift), max(shift), np.nanmean([spread for _, spread, _ in spreads.values()])]


def along_a_few(name):
    """Accuracies along single NADs, each with its index."""
    found = tables.means(rows(f"nad_accuracies_{name}_bf16"), ["nad_index"])
    return [value for (index,), mean in found.items() for value in (mean, index)]


def here():
    """The numbers in the cell “here” of the reproduction table, by the first cell of the row."""
    six = ("first", "last", "smallest_ratio", "largest_ratio", "log_variances", "overlap_100")
    ours, vgg11, sampled = (
        pick("published_comparison", f"{file}_NADs.npy", *six) for file in ("NADs/LeNet", "VGG11", "sampled/LeNet")
    )
    by_gpu, by_cpu = (tables.means(rows(name), KEYS) for name in ("lenet_map_gpu", "directional_bias_lenet"))
    both = np.array([(by_gpu[cell], by_cpu[cell]) for cell in by_cpu])
    cells = folded("directional_bias_vgg11_bf16")
    vgg11_map = np.array([cells[abs(y), abs(x)] for y, x in product(frequency_grid(32), repeat=2)])
    (logreg, lenet), files = map(on_map, ("logreg", "lenet")), sorted((ROOT / "NADs").glob("*_eigenvals.npy"))
    spectra = {file.name.split("_")[0]: np.load(file).astype(float) for file in files}
    ends = {name: values[[0, 1022]] for name, values in spectra.items()}
    poisoned = np.array(list(tables.mean_and_spread(rows("poison_lenet"), ["nad_index"]).values()))
    errors = ("", "pearson", "mean_absolute_difference")
    in_samples = {
        name: pick("sampling_effect", f"{name}_NADs.npy", "smallest_ratio", "largest_ratio", "first", "last")
        for name in ("LeNet", "VGG11", "ResNet18", "DenseNet121")
    }
    return {
        "LogReg: mean, range": [logreg.mean(), logreg.min(), logreg.max()],
        "LeNet: mean, range": [lenet.mean(), lenet.min(), lenet.max()],
        "LeNet: cells ≥ 90 %, cells < 55 %": [sum(lenet >= 90), sum(lenet < 55)],
        "LeNet: correlation with the published map; mean difference": pick("directional_bias_lenet_published", *errors),
        "VGG-11 (bn): mean, range, cells ≥ 90 %, < 55 %": [
            *(len(vgg11_map), len(rows("directional_bias_vgg11_bf16")), vgg11_map.mean(), vgg11_map.min()),
            *(vgg11_map.max(), sum(vgg11_map >= 90), sum(vgg11_map < 55)),
        ],
        "ResNet-18: mean, range, cells ≥ 90 %, < 55 %": part("resnet18"),
        "ResNet-18: at these cells, correlation with the published map; mean difference": pick(
            "directional_bias_resnet18_bf16_published", "", *errors[1:]
        ),
        "DenseNet-121: mean, range, cells ≥ 90 %, < 55 %": part("densenet121"),
        "LeNet from a GPU, against that from a CPU: cells, correlation; mean difference": [
            *(len(both), np.corrcoef(both.T)[0, 1], np.abs(both[:, 0] - both[:, 1]).mean())
        ],
        "bf16 against fp32, LeNet at six cells, three seeds each": of_precision("lenet"),
        "bf16 against fp32, VGG-11 at six cells, three seeds each": of_precision("vgg11"),
        "LeNet without pooling, σ = 1": ablation("nopooling_sigma1"),
        "the same with pooling": ablation("sigma1"),
        "the same without pooling at σ = 3": ablation("nopooling"),
        "LogReg": ends["LogReg"],
        "LogReg: rms": [np.sqrt(np.mean(spectra["LogReg"] ** 2))],
        "LeNet; all 1,023 by the published": [*ends["LeNet"], *ours[2:4]],
        "LeNet: log variances along the published NADs; overlap at k = 100": ours[4:],
        "LeNet by the paper's protocol: first, last; ratios; log variances; overlap": sampled,
        "VGG-11 (bn); all 1,023 by the published": [*ends["VGG11"], *vgg11[2:4]],
        "VGG-11 (bn): log variances along the published NADs; overlap at k = 100": vgg11[4:],
        "ResNet-18 (√2 × published)": ends["ResNet18"],
        "DenseNet-121": ends["DenseNet121"],
        "LeNet: all 1,023, as a sample of 10,000 shows ours, by the published": in_samples["LeNet"][:2],
        "VGG-11 (bn): the same": in_samples["VGG11"][:2],
        "ResNet-18: first and last, as a sample of 5,000 shows ours (√2 × published)": in_samples["ResNet18"][2:],
        "DenseNet-121: first and last, as a sample of 10,000 shows ours": in_samples["DenseNet121"][2:],
        "LeNet, NADs by the paper's protocol": along_nads("nad_accuracies_lenet_sampled"),
        "LeNet, the NADs in `NADs/`": along_nads("nad_accuracies_lenet"),
        "VGG-11 (bn), its NADs": along_a_few("vgg11"),
        "ResNet-18, its NADs": along_a_few("resnet18"),
        "ResNet-18, its NADs, σ = 3": along_a_few("resnet18_sigma3"),
        "LeNet: original → flipped": [column(f"{name}_lenet").mean() for name in ("original", "flip")],
        "VGG-11 (bn): original → flipped": [column(f"{name}_vgg11_bf16")[0] for name in ("original", "flip")],
        "ResNet-18 poisoned at 0, 400, 15 epochs instead of 50": column("poison_resnet18_bf16_15epochs"),
        "ResNet-18 poisoned at 0": column("poison_resnet18_bf16"),
        "ResNet-18: original → flipped, 15 epochs instead of 50": [
            column(f"{name}_resnet18_bf16_15epochs")[0] for name in ("original", "flip")
        ],
        "LeNet poisoned at 0, 10, 30, 100, 200, 400, 800": [*poisoned[:, 0], *poisoned[poisoned[:, 2] == 3, 1]],
    }


def test_the_numbers_of_the_reproduction_table_are_those_of_the_files():
    table = [row for row in table_of(README, "what") if not row[0].startswith("**")]
    assert all(len(row) == 5 and row[3] in ("✓", "≈", "◔", "✗", "–", "") for row in table)
    said = {row[0]: row[2] for row in table if row[2] and not row[2].endswith("(measured earlier)")}
    found = here()
    assert said.keys() == found.keys() and len({row[0] for row in table}) == len(table)
    assert not [(what, cell, found[what]) for what, cell in said.items() if not says(cell, found[what])]


def test_the_numbers_of_the_table_of_nads_are_those_of_their_json():
    table = table_of(README, "file")
    assert len(table) == 5
    for name, _, estimator, num_networks, agreement in table:
        about = json.loads((ROOT / "NADs" / name.strip("`")).with_suffix(".json").read_text())
        assert (estimator, num_networks) == (about["estimator"], f"{about['num_networks']:,}")
        assert says(agreement, [about["agreement"]["split_half_overlap"]]) and about["agreement"]["k"] == 100


def test_the_numbers_in_where_it_differs_are_those_of_the_files():
    said, along = " ".join(README.split()), column("nad_accuracies_lenet_published_nads")
    flipped, original = (column(f"{name}_lenet", "train_accuracy").mean() for name in ("flip", "original"))
    assert "it gives {:.1f} and {:.1f} (published".format(*along) in said
    small, same = (pick("nad_step", f"step/{step}/LeNet_NADs.npy", "overlap_100")[0] for step in ("0.01", "100"))
    assert f"an overlap of {small:.3f} with those of `NADs/`; with 100 and another seed {same:.3f}" in said
    assert f"{flipped:.1f} % training accuracy" in said and f"against {original:.1f} for the original" in said
    tried = {row["variant"]: float(row["train_accuracy"]) for row in rows("flip_lenet_variants")}
    more, small, smaller = (tried[f"--{option}"] for option in ("epochs 150", "max-lr 0.05", "max-lr 0.02"))
    assert f"(150: {more:.1f} %), nor a smaller learning rate (0.05: {small:.1f}, 0.02: {smaller:.1f})" in said
    before, own = (tried[name] for name in tried if name.startswith("flipped before") and "--" not in name)
    assert f"normalising ({before:.1f}, by the statistics of the flipped images {own:.1f})" in said
    assert f"nor the authors' own NADs ({tried['--nads THEIRS/LeNet_NADs.npy']:.1f})" in said
    fitted = column("flip_vgg11_bf16", "train_accuracy")[0]
    apart = column("original_vgg11_bf16")[0] - column("flip_vgg11_bf16")[0]
    resnet = column("flip_resnet18_bf16_15epochs", "train_accuracy")[0]
    assert f"a flipped ResNet-18, in 15 epochs, to {resnet:.2f} % too" in said
    assert f"fit it, to {fitted:.2f} %" in said and f"The two are {apart:.2f} points apart" in said
    cells = tables.means(rows("directional_bias_resnet18_bf16"), KEYS)
    others = [float(row["test_accuracy"]) for row in rows("resnet18_cell_variants")]
    assert f"it is {cells[-6, 0]:.1f} %" in said and f"are others, gives {others[0]:.1f}" in said
    assert "with `--max-lr 0.1` it is {:.1f}, with 0.05 {:.1f}, both on a CPU".format(*others[1:]) in said
    tested = column("flip_lenet_variants")
    assert f"test accuracy is {tested.min():.1f} to {tested.max():.1f} in all" in said
