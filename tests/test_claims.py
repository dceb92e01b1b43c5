"""Each number under “here” in the READMEs' tables is that of a file in results/ or NADs/, rounded as it stands."""

import json
import re
from decimal import Decimal
from itertools import product

import numpy as np
import torch
from scipy import stats

from directional_bias import LEARNT, UNLEARNT, auc, limits, share, variance_along
from NADs_scripts import designs
from tests import helpers
from tests.helpers import READMES, ROOT
from utils import tables
from utils.directions import canonical_frequency, fourier_map, frequency_grid, load_nads

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


def test_how_vgg11_is_predicted_is_said_as_measured():
    means = tables.means(rows("directional_bias_vgg11_bf16"), KEYS)
    rule = 100 * auc(-np.array([np.hypot(*cell) for cell in means]), np.array(list(means.values())))
    pairs = sum(mean > LEARNT for mean in means.values()) * sum(mean <= UNLEARNT for mean in means.values())
    by_four = [row for row in rows("prediction/stability") if (row["network"], row["networks"]) == ("VGG11", "4")]
    low, *_, high = sorted(100 * float(row["auc_measured"]) for row in by_four)
    said = " ".join(README.split())
    assert f"VGG-11: {low:.1f} to {high:.1f} % of the {pairs} pairs measured here (the rule {rule:.1f} %)" in said
    assert f"at chance ({means[0, -8]:.1f} and {means[0, -16]:.1f} % in VGG-11)" in said
    shares = shares_of("prediction/maps", "VGG11")
    assert f"shares of {shares[0, -8]:.2f} and {shares[0, -16]:.2f} in VGG-11" in said


def test_how_lenet_and_resnet18_are_ranked_is_said_as_measured():
    said, by_four = " ".join(README.split()), [row for row in rows("prediction/stability") if row["networks"] == "4"]
    of = lambda name, which: [100 * float(r[f"auc_{which}"]) for r in by_four if r["network"] == name]  # noqa: E731
    here, theirs = of("LeNet", "measured"), of("LeNet", "published")
    assert f"LeNet: {min(here):.1f} to {max(here):.1f} % of the pairs of the map measured here" in said
    assert f"{min(theirs):.1f} to {max(theirs):.1f} % of the published one; ResNet-18: 100.0 % of" in said
    assert {*of("ResNet18", "published"), *of("ResNet18", "measured")} == {100.0}
    accuracies = column("directional_bias_resnet18_bf16")
    pairs = sum(accuracies > LEARNT) * sum(accuracies <= UNLEARNT)
    assert f"and of the {pairs} pairs measured here" in said
    reach = max(float(row["unlearnt_up_to_published"]) for row in by_four if row["network"] == "LeNet")
    assert f"one unlearnt cell of LeNet reaches {reach:.2f} by one of three seeds" in said


def shares_of(name, network, column="share"):
    return {designs.key_of(row): float(row[column]) for row in rows(name) if row["network"] == network}


def test_learning_sets_in_at_a_share_of_one_half():
    """Of all trainings at σ = 3 in results/: by the shares of 24 untrained networks, or 8 of the designs."""
    found = {}
    measured = {"LeNet": "lenet", "VGG11": "vgg11_bf16", "ResNet18": "resnet18_bf16", "LogReg": "logreg"}
    measured["DenseNet121"] = "densenet121_bf16"  # of its five cells three are on an axis
    for network, name in (measured | {"LeNet without pooling": "lenet_nopooling"}).items():
        shares = shares_of("prediction/maps", network)
        means = tables.means(rows(f"directional_bias_{name}"), KEYS)
        found[network] = [(shares[key], mean) for key, mean in means.items()]
    for network in {row["network"] for row in rows("designs/accuracies")}:
        shares = designs.folded(shares_of("designs/predictions", network))
        accuracies = designs.folded(shares_of("designs/accuracies", network, "test_accuracy"))
        found[network] = [(shares[key], accuracy) for key, accuracy in accuracies.items()]
    assert len(found) == 6 + 14
    exceptions = {network for network, pairs in found.items() for share, a in pairs if share > 0.53 and a <= UNLEARNT}
    assert exceptions == {"regnet_x_400mf", "tanh"}  # and DenseNet-121, by the number of its published cells
    assert not [network for network, pairs in found.items() for share, a in pairs if share < 0.45 and a > LEARNT]


def test_where_learning_sets_in_by_the_default_of_four_networks_and_with_less_noise():
    said, four = " ".join(README.split()), [row for row in rows("prediction/stability") if row["networks"] == "4"]
    four = [row for row in four if row["network"] in ("LeNet", "VGG11")]
    up_to = max(float(row["unlearnt_up_to_measured"]) for row in four)
    start = min(float(row["learnt_from_measured"]) for row in four)
    assert f"unlearnt cells of LeNet and VGG-11 reach {up_to:.2f}, and learnt ones begin at {start:.2f}" in said
    cells, along = rows("directional_bias_lenet_sigma1"), rows("nad_accuracies_lenet")
    images = fourier_map(frequencies=[designs.key_of(row) for row in cells])
    nads = load_nads(ROOT / "NADs" / "LeNet_NADs.npy", 1024)[[int(row["nad_index"]) for row in along]]
    for table, directions, learnt, unlearnt in (
        (cells, torch.stack([images[designs.key_of(row)] for row in cells]), (0.035, 0.055), (0, 0.045)),
        (along, nads.view(-1, 1, 32, 32), (1.0, 1.5), (0.45, 0.535)),
    ):
        accuracies = np.array([float(row["test_accuracy"]) for row in table])
        for seed in range(3):
            found = limits(share(*variance_along(directions, sigma=1.0, seed=seed)), accuracies)
            assert unlearnt[0] <= found[0] <= unlearnt[1] and learnt[0] <= found[1] <= learnt[1], found
    assert "from a share of 0.04 to 0.05, by seed" in said and "at chance up to 0.53 and above 75 % from 1.0" in said


def test_shares_along_resnet18s_nads_are_as_said_and_learning_sets_in_at_one_half_there_too():
    means = tables.means(rows("nad_accuracies_resnet18_sigma3_bf16"), ["nad_index"])
    nads = load_nads(ROOT / "NADs" / "ResNet18_NADs.npy", 1024)[[index for (index,) in means]].view(-1, 1, 32, 32)
    shares, accuracies = share(*variance_along(nads, arch="resnet18")), np.array(list(means.values()))
    said = " ".join(README.split()).split("the shares by four networks are ")[1]
    assert says(said.split(" %.")[0], [*shares, *accuracies])
    assert all(accuracies[shares > 0.53] > UNLEARNT) and all(accuracies[shares < 0.45] <= LEARNT)


def test_with_a_tenth_of_the_strength_four_networks_rank_lenets_cells_worse_than_the_rule():
    images, means = fourier_map(), tables.means(rows("directional_bias_lenet"), KEYS)
    accuracies, directions = np.array([means[cell] for cell in images]), torch.stack(list(images.values()))
    weak = [auc(share(*variance_along(directions, step=1.0, seed=seed)), accuracies) for seed in range(3)]
    assert max(weak) < auc(-np.array([np.hypot(*cell) for cell in images]), accuracies)


def test_shares_of_the_maps_are_as_they_are_said_to_be():
    for name in ("LogReg", "LeNet without pooling", "ResNet18 without pooling"):
        assert min(shares_of("prediction/maps", name).values()) > 0.5
    resnet, densenet = shares_of("prediction/maps", "ResNet18"), shares_of("prediction/maps", "DenseNet121")
    unlearnt = {key for key in resnet if key[0] % 4 == key[1] % 4 == 2}
    assert {key for key, share in resnet.items() if share < 0.3} == unlearnt and len(unlearnt) == 32
    assert not [share for share in resnet.values() if 0.3 < share < 0.45]
    assert {key for key, share in densenet.items() if share > 0.88} == {key for key in densenet if 0 in key}
    assert max(share for key, share in densenet.items() if 0 not in key) < 0.32


def test_the_numbers_of_the_table_of_designs_are_those_of_their_summary():
    found = {f"`{row['network']}`": row for row in rows("designs/summary")}
    table = {name: cells for name, _, *cells in table_of(README, "network")}
    assert table.keys() == found.keys()
    columns = [("cells", "learnt", "unlearnt"), ("lowest", "highest"), ("auc_share",), ("auc_low_frequency",)]
    columns += [("spearman_above_chance",), ("unlearnt_up_to",), ("learnt_from",)]
    for name, cells in table.items():
        for keys, cell in zip(columns, cells, strict=True):
            values = [float(found[name][key]) for key in keys if found[name][key]]
            assert says(cell.replace("–", " "), values), (name, cell, values)


def test_what_the_atlas_is_said_to_show_is_in_its_table():
    atlas = {
        row["architecture"].removeprefix("torchvision:"): row for row in rows("atlas/atlas")[5:]
    }  # not the paper's
    mapped = [name for name, row in atlas.items() if not row["why_not"]]
    said = " ".join(README.split())
    assert f"An atlas of {len(mapped) + 5} architectures" in said and f"{len(mapped)} of the {len(atlas)}" in said
    of = lambda column, *names: [float(atlas[name][column]) for name in names]  # noqa: E731
    resnets = [f"resnet{layers}" for layers in (18, 34, 50, 101, 152)]
    rough, agreed = of("roughness", *resnets), of("agreement", "resnet18", "resnet152")
    spoken = "deviation of {:.2f} and {:.2f}, against {:.2f} to {:.2f}"
    assert spoken.format(*rough[3:], *sorted(rough[:3])[::2]) in said and min(rough[3:]) > 1.4 * max(rough[:3])
    assert "two of torchvision's ResNet-18 agree to {:.2f}, of ResNet-152 to {:.2f}".format(*agreed) in said
    vggs = of("median", "vgg11", "vgg13", "vgg16", "vgg19")
    assert vggs == sorted(vggs) and f"from 11 to 19 layers, {vggs[0]:.2f} to {vggs[-1]:.2f}" in said
    flat = [name for name in mapped if name.startswith(("convnext", "swin", "vit_b_32", "vit_l_32"))]
    assert min(of("smallest", *flat)) > 0.89 and max(of("largest", *flat)) < 1.17
    assert f"they agree to {max(of('agreement', *flat)):.2f} at most" in said
    assert min(of("smallest", "vit_b_16")) > 1.25 and max(of("largest", "vit_b_16")) < 1.45
