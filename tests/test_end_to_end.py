"""One run of the six scripts: every file of the shared directory, its shape, range and meaning."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import SMALL
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score, roc_auc_score

C, D, SIDE, PER_CLASS, K = 3, 128, 8, 12, 6  # of tiny_run
M = C * PER_CLASS
TARGET = load_digits().target
COUNTS = np.bincount(TARGET)
N_TEST = int((COUNTS[:C] // 5).sum())  # every fifth image of a class
N_TRAIN = int(COUNTS[:C].sum()) - N_TEST
IMAGES = dict.fromkeys(["outliers", "inliers"], M) | {"train": N_TRAIN, "sd_outliers": N_TRAIN}
IMAGES |= dict.fromkeys(["test", "sd_outliers_test", "sd_reconstructions_test"], N_TEST)
LABELS = dict.fromkeys(["train.labels", "pseudo_labels", "id_labels"], N_TRAIN)
LABELS |= dict.fromkeys(["test.labels", "test_pseudo_labels"], N_TEST)
LABELS |= dict.fromkeys(["outlier_labels", "inlier_labels"], M)
FLOATS = dict.fromkeys(["outlier_embeddings", "inlier_embeddings"], (M, D))
FLOATS |= {"anchors": (C, D), "id_embeddings": (N_TRAIN, D), "pseudo_confidence": (N_TRAIN,)}
FEATURES = {"distance", "knn", "mahalanobis", "relative-mahalanobis"}
ALL = FEATURES | {"msp", "maxlogit", "energy"}
SCORES = {"ce": ALL | {"gen", "react", "vim", "fdbd"}, "dream": ALL | {"phi"}}
SCORES |= {"ce-pseudo": ALL, "dream-id": ALL, "frozen": FEATURES}
SCORES["sd"] = FEATURES - {"knn"} | {"voting", "distance+voting", "bin"}


def array(folder, name):
    return np.load(folder / f"{name}.npy", allow_pickle=False)


def table(folder, name):
    return np.genfromtxt(folder / f"{name}.csv", delimiter=",", names=True)


@pytest.mark.parametrize("name", IMAGES)
def test_images(tiny_run, name):
    images = array(tiny_run, name)
    assert (images.shape, images.dtype) == ((IMAGES[name], SIDE, SIDE, 3), np.uint8)
    assert (images == images[..., :1]).all()  # digits are grey
    assert set(np.unique(images)) <= set(np.unique(array(tiny_run, "train")))  # at 17 levels
    assert len(np.unique(images, axis=0)) > 0.9 * len(images)


@pytest.mark.parametrize("name", [*LABELS, *FLOATS])
def test_labels_and_embeddings(tiny_run, name):
    values = array(tiny_run, name)
    if name in LABELS:
        assert (values.shape, values.dtype) == ((LABELS[name],), np.int64)
        assert set(values) == set(range(C))
    else:
        assert (values.shape, values.dtype) == (FLOATS[name], np.float32)
        assert np.isfinite(values).all()
        assert values.std() > 0
    if name == "pseudo_confidence":
        assert 1 / C - 1e-6 <= values.min() <= values.max() <= 1


def test_description_and_id_data(tiny_run):
    data = json.loads((tiny_run / "data.json").read_text())
    expected = {"data": "digits:0-2", "recipe": "digits", "classes": ["0", "1", "2"]}
    expected |= {"image_size": SIDE, "train": N_TRAIN, "test": N_TEST}
    assert data == expected | {"digest": data["digest"]}
    pictures = np.rint(load_digits().data * 255 / 16).astype(np.uint8)
    known = {row.tobytes(): label for row, label in zip(pictures, TARGET, strict=True)}
    for split in ("train", "test"):
        rows = [row.tobytes() for row in array(tiny_run, split)[..., 0]]
        assert [known.pop(row) for row in rows] == array(tiny_run, f"{split}.labels").tolist()
    assert min(known.values()) == C


def test_weights(tiny_run):
    for method in [*SCORES, "frozen"]:
        held = torch.load(tiny_run / f"classifier_{method}.pt", weights_only=True)
        assert (held["config"]["method"], held["config"]["seed"]) == (method, 0)
        assert len(held["labels"]) == N_TRAIN
        assert all(value.isfinite().all() for value in held["model"].values())
    pretext = torch.load(tiny_run / "scan.pt", weights_only=True)["pretext"]
    assert all(torch.equal(held["model"][f"f.{key}"], value) for key, value in pretext.items())
    folder = tiny_run / "diffusion"
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet", low_cpu_mem_usage=False)
    assert (unet.config.num_class_embeds, unet.config.sample_size) == (C + 1, SIDE)
    rows = unet.class_embedding.weight[:-1].detach().numpy()
    np.testing.assert_array_equal(rows, array(tiny_run, "anchors"))
    assert DDPMScheduler.from_pretrained(folder, subfolder="scheduler").config.beta_end == 0.02


@pytest.mark.parametrize(("name", "cosine"), [("outlier", 0.46), ("inlier", 0.96)])
def test_embeddings_of_paper_a(tiny_run, name, cosine):
    rows = table(tiny_run, f"{name}s")
    labels = array(tiny_run, f"{name}_labels")
    id_labels = array(tiny_run, "id_labels")
    assert rows.dtype.names == ("index", "class", "source", "d_K", "cosine", "seed")
    assert labels.tolist() == np.repeat(np.arange(C), PER_CLASS).tolist() == rows["class"].tolist()
    assert len(set(rows["seed"])) == len(set(rows["index"])) == M
    source = rows["source"].astype(int)
    assert (id_labels[source] == labels).all()
    v = array(tiny_run, f"{name}_embeddings").astype(float)
    norms = np.linalg.norm(array(tiny_run, "anchors"), axis=1)
    np.testing.assert_allclose(np.linalg.norm(v, axis=1), norms[labels], rtol=1e-4)
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    z = array(tiny_run, "id_embeddings").astype(float)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    np.testing.assert_allclose(rows["cosine"], (v * z[source]).sum(1), atol=1e-4)
    assert rows["cosine"].mean() == pytest.approx(cosine, abs=0.15)  # of d = 768: 0.78 unscaled
    distances = np.linalg.norm(v[:, None] - z, axis=2)
    distances[labels[:, None] != id_labels] = np.inf
    np.testing.assert_allclose(rows["d_K"], np.sort(distances, axis=1)[:, K - 1], atol=1e-3)


@pytest.mark.parametrize("name", ["sd_outliers", "sd_outliers_test", "sd_reconstructions_test"])
def test_manifest_of_paper_b(tiny_run, name):
    rows = table(tiny_run, name)
    assert rows.dtype.names == ("index", "source", "y", "c_r", "seed")
    labels = array(tiny_run, "test_pseudo_labels" if name.endswith("test") else "pseudo_labels")
    assert rows["index"].tolist() == rows["source"].tolist() == list(range(IMAGES[name]))
    assert rows["y"].tolist() == labels.tolist()
    assert len(set(rows["seed"])) == len(labels)
    pairs = {(a, b) for a in range(C) for b in range(C) if (a == b) == ("reconstr" in name)}
    assert set(zip(rows["y"], rows["c_r"], strict=True)) == pairs


PLOTS = {"roc", "scores", "tsne", "misses", "filter"}
PLOTS |= {"outlier_embeddings", "inlier_embeddings"}


def test_pictures_and_nothing_half_written(tiny_run):
    sheets = set(IMAGES) - {"train", "test"}
    assert {path.stem for path in tiny_run.glob("*.png")} == sheets | PLOTS
    for path in tiny_run.glob("*.png"):
        picture = Image.open(path).convert("L")
        assert min(picture.size) >= 64 and len(picture.getcolors()) > 10, path.name
    assert not list(tiny_run.rglob(".*"))


def test_results(tiny_run):
    records = json.loads((tiny_run / "results.json").read_text(), parse_constant=pytest.fail)
    sizes = {"digits:6-7": COUNTS[6] + COUNTS[7], "patches": 520}
    sizes |= dict.fromkeys(["sd_reconstructions_test", "sd_outliers_test"], N_TEST)
    keys = [(r["method"], r["score"], r["ood"]) for r in records]
    found = [(method, score, ood) for method in SCORES for score in SCORES[method] for ood in sizes]
    assert sorted(keys) == sorted(found)
    text = (tiny_run / "results.md").read_text()
    for r in records:
        assert (r["id"], r["seed"], r["n_id"]) == ("digits:0-2", 0, N_TEST)
        assert r["n_ood"] == sizes[r["ood"]]
        assert (r["id_accuracy"] is None) == (r["method"] == "frozen")  # it names no class
        assert 0 <= r["auroc_ci"][0] <= r["auroc_ci"][1] <= 1
        assert f"| {r['method']} | {r['given']} | {r['score']} | {r['auroc']:.1%} [" in text
        name = f"{r['method']}.{r['score']}"
        a = array(tiny_run / "scores", f"{name}.id")
        b = array(tiny_run / "scores", f"{name}.{r['ood'].replace(':', '-')}")
        assert a.dtype == b.dtype == np.float32
        both = np.concatenate([a, b])
        is_ood = np.arange(r["n_id"] + r["n_ood"]) >= r["n_id"]
        assert r["auroc"] == pytest.approx(roc_auc_score(is_ood, both), abs=1e-9), name
        assert r["aupr_out"] == pytest.approx(average_precision_score(is_ood, both), abs=1e-9)
        assert r["aupr_in"] == pytest.approx(average_precision_score(~is_ood, -both), abs=1e-9)
        assert (a > r["threshold"]).mean() <= 0.05
        assert 1 - (b > r["threshold"]).mean() == pytest.approx(r["fpr95"], abs=1e-12), name
    assert "ce-pseudo takes SD outliers for" in text
    assert re.search(
        r"Fréchet distance .* sd_outliers [\d.]+, outliers [\d.]+, between halves", text
    )
    images = sum(sizes.values()) + N_TEST
    assert len((tiny_run / "scores.csv").read_text().splitlines()) == 1 + images


@pytest.fixture
def inputs(tiny_run, tmp_path):
    """Copy of what the two samplers read."""
    ignore = shutil.ignore_patterns("*.pt", "scores", "*.png", "*outlier*", "*inlier*", "results*")
    return shutil.copytree(tiny_run, tmp_path / "run", ignore=ignore)


JOBS = {
    "outliers": ["sample_outliers", *SMALL],
    "sd_outliers": ["sample_sd_outliers", "--steps", 4],
}
JOBS["inliers"] = ["sample_outliers", "--inliers", *SMALL]


@pytest.mark.parametrize("name", JOBS)
def test_seed_alone_decides_the_images(tiny_run, inputs, main, name):
    first = array(tiny_run, name)
    main(*JOBS[name], "--dir", inputs, "--batch-size", 50)
    np.testing.assert_array_equal(array(inputs, name), first)
    assert (inputs / f"{name}.csv").read_bytes() == (tiny_run / f"{name}.csv").read_bytes()
    main(*JOBS[name], "--dir", inputs, "--seed", 1)
    assert (array(inputs, name) != first).any(axis=(1, 2, 3)).mean() > 0.9


def test_selection_by_distance_beats_the_released_one_and_chance(inputs, main, capsys):
    for selection, low, high in (("knn", 0.98, 1), ("official", 0.2, 0.9), ("random", 0.3, 0.7)):
        more = "--candidates", 100, "--per-class", 24, "--selection", selection, "--restart"
        main("sample_outliers", *SMALL, *more, "--dir", inputs)
        found = re.search(r"mean percentile of d_K ([\d.]+)", capsys.readouterr().out)
        assert low < float(found[1]) <= high, selection


def test_arrays_brought_by_hand(tiny_run, tmp_path, main, capsys):
    """Of another size than the recipe's. SCAN is done again for other options of it alone."""
    for name in ("train", "test"):
        np.save(tmp_path / f"{name}.npy", array(tiny_run, name)[:150].repeat(2, 1).repeat(2, 2))
    scan = "--clusters 2 --starts 1 --pretext-epochs 2 --scan-epochs 4 --selflabel-epochs 1"
    unet = "--channels 32,32 --steps 2 --batch-size 8"
    for more in ([], ["--lr", 1e-3, "--p-drop", 0.2], ["--lambda-e", 4, "--until", "labels"]):
        main("train_scan_diffusion", "--dir", tmp_path, *scan.split(), *unet.split(), *more)
        assert ("simclr step" in capsys.readouterr().out) == ("--lr" not in more)
    train = array(tmp_path, "train")[:, ::2, 1::2]
    np.testing.assert_array_equal(train, array(tiny_run, "train")[:150])
    assert set(array(tmp_path, "pseudo_labels")) == {0, 1}
    data = json.loads((tmp_path / "data.json").read_text())
    assert (data["data"], data["image_size"], data["classes"]) == ("arrays", 16, [])


def test_quality_floor(tmp_path, main, capsys):
    """Short but real: no step of either paper may quietly become useless."""
    scan = "--pretext-epochs 15 --pretext-batch 128 --starts 1 --scan-epochs 12"
    unet = "--selflabel-epochs 4 --channels 32,64 --steps 400 --batch-size 32"
    for script, options in (
        ("train_scan_diffusion", f"--data digits:0,4,6,7 {scan} {unet}"),
        ("train_text_encoder", "--epochs 8"),
        ("sample_outliers", "--per-class 100 --steps 10 --candidates 300"),
        ("sample_sd_outliers", "--steps 10"),
        ("train_classifier", "--method ce dream sd --epochs 8 --dream-epochs 12 --sd-epochs 8"),
        ("evaluate", "--ood-data patches digits:1-3 --bootstrap 1"),
    ):
        main(script, "--dir", tmp_path, *options.split())
    accuracy = re.search(r"4 self-labelling +ACC ([\d.]+)", capsys.readouterr().out)
    assert float(accuracy[1]) >= 0.9
    records = json.loads((tmp_path / "results.json").read_text())
    auroc = {(r["score"], r["ood"]): r["auroc"] for r in records}
    assert auroc["energy", "patches"] >= 0.9
    assert auroc["distance+voting", "digits:1-3"] >= 0.9
