"""The published hyper-parameters, retyped from the papers' facts, against what every script prints for a data set."""

import json

import pytest

COLUMNS = ["digits", "cifar10", "cifar100", "imagenet100", "cifar10-30min"]
SCAN = {  # SCAN on CIFAR-10: the steps of paper B's pseudo-labels
    "arch": "resnet18",
    "augment": "colour",
    "tau": 0.1,  # NT-Xent, 500 epochs, batch 512, SGD lr 0.4, cosine
    "pretext_epochs": 500,
    "pretext_batch": 512,
    "pretext_lr": 0.4,
    "K": 20,  # nearest neighbours by inner product
    "lambda_e": 5.0,  # Adam 1e-4, 50 epochs, batch 128
    "scan_lr": 1e-4,
    "scan_epochs": 50,
    "scan_batch": 128,
    "starts": 1,
    "confidence": 0.99,  # Adam 1e-4, batch 1000, 200 epochs
    "selflabel_lr": 1e-4,
    "selflabel_batch": 1000,
    "selflabel_epochs": 200,
}
DIFFUSION = {"p_drop": 0.1, "lr": 2e-4, "t_max": 1000, "flip": 1, "channels": "128,256,256,256", "layers": 2}
ENCODER = {"arch": "resnet34", "t": 0.1, "lr": 0.1, "weight_decay": 5e-4, "flip": 1}  # as released, both data sets
SAMPLING = {"K": 300, "candidates": 1500, "keep": 2, "draw": 50, "inlier_sigma": 0.01, "guidance": 7.5}
DREAM = {"arch": "resnet34", "optimizer": "sgd", "weight_decay": 5e-4, "flip": 1}
# lineage of paper B: ViT-B/16 of ImageNet-21k, 6 blocks frozen, SGD 4e-4, weight decay 5e-5, batch 16 + 16, lambda 0.5
VIT = {"sd_arch": "vit:google/vit-base-patch16-224-in21k", "freeze_blocks": 6, "sd_lr": 4e-4, "sd_weight_decay": 5e-5}
VIT |= {"sd_batch": 16, "lam": 0.5}
PUBLISHED = {  # (script, data set): figures. What a paper does not give for a data set is that of the nearest one.
    ("train_scan_diffusion", "cifar10"): SCAN | DIFFUSION | {"image_size": 32, "dropout": 0.1},
    ("train_scan_diffusion", "cifar100"): {k: v for k, v in SCAN.items() if k != "scan_batch"} | {"image_size": 32},
    ("train_scan_diffusion", "imagenet100"): {k: SCAN[k] for k in SCAN if k not in ("arch", "scan_batch")},
    ("train_text_encoder", "cifar10"): ENCODER | {"epochs": 200, "batch_size": 256, "shift": 4, "image_size": 32},
    ("train_text_encoder", "cifar100"): ENCODER | {"epochs": 200, "batch_size": 256, "shift": 4, "image_size": 32},
    ("train_text_encoder", "imagenet100"): ENCODER | {"epochs": 100, "batch_size": 160, "image_size": 256},
    ("sample_outliers", "cifar10"): SAMPLING | {"boundary": 50, "sigma": 0.07, "guidance": 2.0},  # our own generator
    ("sample_outliers", "cifar100"): SAMPLING | {"boundary": 50, "sigma": 0.07},
    ("sample_outliers", "imagenet100"): SAMPLING | {"boundary": 200, "sigma": 0.03, "per_class": 1000},  # 100,000
    ("sample_sd_outliers", "cifar10"): {"S": 100, "w": 2.0},  # the headline setting
    ("sample_sd_outliers", "cifar100"): {"S": 100, "w": 2.0},
    ("sample_sd_outliers", "imagenet100"): {"S": 100, "w": 2.0},
    ("train_classifier", "cifar10"): DREAM | VIT | {"epochs": 200, "lr": 0.1, "batch_size": 256, "beta": 2.5},
    ("train_classifier", "cifar100"): DREAM
    | VIT
    | {"epochs": 200, "lr": 0.1, "batch_size": 256, "beta": 2.5, "phi_hidden": 0, "init": "random", "shift": 4}
    | {"dream_epochs": 0, "dream_lr": 0.0, "dream_batch": 0},
    ("train_classifier", "imagenet100"): DREAM
    | VIT
    | {"beta": 1.0, "phi_hidden": 512, "init": "ce", "dream_epochs": 20, "dream_lr": 1e-3, "dream_batch": 80}
    | {"epochs": 100, "batch_size": 160, "inlier_batch": 256, "lr": 0.1},  # DREAM-ID: 160 + 256
    ("evaluate", "cifar10"): {"k": 2},
    ("evaluate", "cifar100"): {"k": 2},
    ("evaluate", "imagenet100"): {"k": 2},
}
SCRIPTS = list(dict.fromkeys(script for script, _ in PUBLISHED))
READS_DATA = ("train_scan_diffusion", "train_text_encoder")


@pytest.fixture
def printed(load, tmp_path, monkeypatch, capsys):
    """printed(script, *options): the options in force and the recipe as printed, {option: text}."""

    def printed(script, *options):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", [f"{script}.py", *map(str, options)])
        args = load(script).parse_args()
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("recipe "))
        return args, dict(part.split("=", 1) for part in line.removeprefix("recipe ").split("  "))

    return printed


def choose(script, name, folder):
    """Options and files that say that the data set is `name`, without --recipe."""
    if script in READS_DATA:
        return "--data", name
    folder.mkdir(exist_ok=True)
    (folder / "data.json").write_text(json.dumps({"name": name}))
    return "--dir", folder


@pytest.mark.parametrize(("script", "data"), PUBLISHED)
@pytest.mark.parametrize("place", ["{}", "data/arrays/{}", "{}:0-5"])
def test_the_data_set_picks_the_published_figures(printed, tmp_path, script, data, place):
    args, text = printed(script, *choose(script, place.format(data), tmp_path / "run"))
    for option, value in PUBLISHED[script, data].items():
        assert getattr(args, option) == value and text[option] == str(value), option


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_every_column_and_recipe_overrules_the_data_set(printed, load, tmp_path, script):
    table = load(script).RECIPES
    assert list(table["recipe"][1:]) == COLUMNS
    for column in COLUMNS:
        _, text = printed(script, *choose(script, "cifar100", tmp_path / "run"), "--recipe", column)
        assert text == {option: str(row[1:][COLUMNS.index(column)]) for option, row in table.items()}


OTHER = {"arch": "resnet50", "sd_arch": "resnet18-imagenet", "frozen_arch": "scan", "channels": "16,16", "t_max": 900}
OTHER |= {"confidence": 0.5, "p_drop": 0.5, "dropout": 0.5, "warmup": 0.5, "optimizer": "adamw", "augment": "affine"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_figure_is_overridable(printed, load, tmp_path, script):
    for option, (text, *values) in load(script).RECIPES.items():
        if option == "recipe":
            continue
        value = values[COLUMNS.index("imagenet100")]
        choices = next((word.split("|") for word in text.split() if "|" in word), [])
        other = next((word for word in choices if word != value), None)
        other = OTHER.get(option, other if isinstance(value, str) else value + 1)
        assert other != value, option
        more = ["--keep", 2, "--candidates", 1501, "--boundary", 201] if script == "sample_outliers" else []
        flag = "--" + option.replace("_", "-")
        args, text = printed(script, *choose(script, "imagenet100", tmp_path / "run"), *more, flag, other)
        assert getattr(args, option) == other and text[option] == str(other)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--arch", "resnet"], "--arch is resnet"),
        (["--arch", "same"], "--arch is same"),
        (["--sd-arch", "vit:"], "--sd-arch is vit:"),
        (["--frozen-arch", "resnet18"], "--frozen-arch is resnet18"),
        (["--warmup", "1"], "--warmup is 1"),
        (["--optimizer", "adam"], "invalid choice"),
    ],
)
def test_a_wrong_choice_is_one_line(printed, capsys, options, word):
    with pytest.raises(SystemExit) as end:
        printed("train_classifier", "--recipe", "digits", *options)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and word in line


def test_a_start_that_is_missing_is_one_line(printed, capsys):
    with pytest.raises(SystemExit) as end:
        printed("train_classifier", "--recipe", "digits", "--method", "dream", "--init", "ce")
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 1 and "classifier_ce.pt" in line and "--method ce" in line


def test_methods_take_their_own_rows(printed, load):
    script = load("train_classifier")
    args, _ = printed("train_classifier", "--recipe", "imagenet100", "--sd-arch", "resnet18", "--method", "ce")
    rows = {method: script.settings(method, args) for method in script.INPUTS}
    seen = {method: (own.arch, own.epochs, own.batch_size, own.lr, own.weight_decay) for method, own in rows.items()}
    assert seen["ce"] == seen["dream-id"] == ("resnet34", 100, 160, 0.1, 5e-4)
    assert seen["dream"] == ("resnet34", 20, 80, 1e-3, 5e-4)
    assert seen["sd"] == ("resnet18", 3, 16, 4e-4, 5e-5)
    assert seen["frozen"][0] == "pretext"
    digits, _ = printed("train_classifier", "--recipe", "digits", "--epochs", "7", "--sd-lr", "0.5", "--method", "ce")
    assert script.settings("sd", digits).epochs == 7 and script.settings("sd", digits).lr == 0.5
    assert script.settings("dream", digits).lr == script.settings("ce", digits).lr == 0.1


def test_the_30_minute_recipe_fits(load):
    """Floating-point operations of paper B at the 50 TFLOP/s assumed: at most 28 minutes, the rest is overhead."""
    row = {option: values[-1] for option, (_, *values) in load("train_scan_diffusion").RECIPES.items()}
    sd = {option: values[-1] for option, (_, *values) in load("train_classifier").RECIPES.items()}
    sampling = {option: values[-1] for option, (_, *values) in load("sample_sd_outliers").RECIPES.items()}
    resnet18, unet, images = 1.11e9, 3.0e9, 50_000  # forward, one image of 32 px; a training step costs three
    assert row["arch"] == sd["arch"] == "resnet18" and sd["sd_arch"] == "same" and row["channels"] == "64,128,128,128"
    work = images * 2 * 3 * resnet18 * (row["pretext_epochs"] + row["scan_epochs"])
    work += images * 4 * resnet18 * row["selflabel_epochs"]
    work += row["steps"] * row["batch_size"] * 3 * unet
    work += images * sampling["steps"] * 2 * unet
    work += images * 2 * 3 * resnet18 * sd["epochs"]
    assert 15 * 60 < work / 50e12 < 28 * 60
