"""One run of the six scripts: every file of the shared directory, its shape, range and meaning."""

import csv
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
IMAGES = {
    "train": N_TRAIN,
    "test": N_TEST,
    "outliers": M,
    "inliers": M,
    "sd_outliers": N_TRAIN,
    "sd_outliers_test": N_TEST,
    "sd_reconstructions_test": N_TEST,
}
LABELS = {
    "train.labels": N_TRAIN,
    "test.labels": N_TEST,
    "pseudo_labels": N_TRAIN,
    "test_pseudo_labels": N_TEST,
    "id_labels": N_TRAIN,
    "outlier_labels": M,
    "inlier_labels": M,
}
FLOATS = {
    "anchors": (C, D),
    "id_embeddings": (N_TRAIN, D),
    "outlier_embeddings": (M, D),
    "inlier_embeddings": (M, D),
    "pseudo_confidence": (N_TRAIN,),
}
FEATURES = {"knn", "mahalanobis", "relative-mahalanobis"}
LOGITS = {"msp", "maxlogit", "energy"}
SCORES = {
    "ce": FEATURES | LOGITS,
    "dream": FEATURES | LOGITS | {"phi"},
    "dream-id": FEATURES | LOGITS,
    "sd": FEATURES - {"knn"} | {"distance", "voting", "distance+voting", "bin"},
    "frozen": FEATURES,
}


def array(folder, name):
    return np.load(folder / f"{name}.npy", allow_pickle=False)


def table(folder, name):
    """Columns of a .csv, by name, as float64."""
    with open(folder / f"{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {column: np.array([float(row[column]) for row in rows]) for column in rows[0]}


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def records(tiny_run):
    return json.loads((tiny_run / "results.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("name", IMAGES)
def test_images(tiny_run, name):
    images = array(tiny_run, name)
    assert images.shape == (IMAGES[name], SIDE, SIDE, 3)
    assert images.dtype == np.uint8
    assert (images == images[..., :1]).all()  # digits are grey
    assert set(np.unique(images)) <= set(np.unique(array(tiny_run, "train")))  # at 17 levels
    different = np.unique(images.reshape(len(images), -1), axis=0)
    assert images.std() > 5
    assert len(different) > 0.9 * len(images)


@pytest.mark.parametrize("name", LABELS)
def test_labels(tiny_run, name):
    labels = array(tiny_run, name)
    assert labels.shape == (LABELS[name],)
    assert labels.dtype == np.int64
    assert set(labels.tolist()) == set(range(C))


@pytest.mark.parametrize("name", FLOATS)
def test_floats(tiny_run, name):
    values = array(tiny_run, name)
    assert values.shape == FLOATS[name]
    assert values.dtype == np.float32
    assert np.isfinite(values).all()
    assert values.std() > 0


def test_description_and_id_data(tiny_run):
    data = json.loads((tiny_run / "data.json").read_text())
    expected = {"data": "digits:0-2", "recipe": "digits", "image_size": SIDE}
    expected |= {"train": N_TRAIN, "test": N_TEST, "classes": ["0", "1", "2"]}
    assert data == expected | {"digest": data["digest"]}
    pictures = np.rint(load_digits().data * 255 / 16).astype(np.uint8)
    known = {row.tobytes(): label for row, label in zip(pictures, TARGET, strict=True)}
    held = []
    for split in ("train", "test"):
        images = array(tiny_run, split)[..., 0].reshape(-1, 64)
        labels = [known[row.tobytes()] for row in images]
        assert labels == array(tiny_run, f"{split}.labels").tolist()
        held += [row.tobytes() for row in images]
    assert sorted(held) == sorted(row.tobytes() for row in pictures[TARGET < C])


def test_confidence_is_a_softmax_maximum(tiny_run):
    confidence = array(tiny_run, "pseudo_confidence")
    assert (confidence >= 1 / C - 1e-6).all()
    assert (confidence <= 1).all()


def test_diffusion_loads_and_owns_the_anchors(tiny_run):
    folder = tiny_run / "diffusion"
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet", low_cpu_mem_usage=False)
    schedule = DDPMScheduler.from_pretrained(folder, subfolder="scheduler").config
    assert (unet.config.num_class_embeds, unet.config.sample_size) == (C + 1, SIDE)
    assert (schedule.num_train_timesteps, schedule.beta_schedule) == (1000, "linear")
    assert schedule.prediction_type == "epsilon"
    rows = unet.class_embedding.weight[:-1].detach().numpy()
    np.testing.assert_array_equal(rows, array(tiny_run, "anchors"))


def test_weights(tiny_run):
    held = {path.stem: torch.load(path, weights_only=True) for path in tiny_run.glob("*.pt")}
    assert set(held) == {"scan", "text_encoder", *(f"classifier_{method}" for method in SCORES)}
    assert all(content["config"]["seed"] == 0 for content in held.values())
    for method in SCORES:
        content = held[f"classifier_{method}"]
        assert content["config"]["method"] == method
        assert content["digest"] == json.loads((tiny_run / "data.json").read_text())["digest"]
        assert content["labels"].shape == (N_TRAIN,)
        assert all(value.isfinite().all() for value in content["model"].values())
    assert any(key.startswith("phi") for key in held["classifier_dream"]["model"])
    heads = {f"heads.{head}.weight" for head in ("g_bin", "g_in", "g_out")}
    assert heads <= set(held["classifier_sd"]["model"])
    pretext = held["scan"]["pretext"]
    frozen = held["classifier_frozen"]["model"]
    assert all(torch.equal(frozen[f"f.{key}"], value) for key, value in pretext.items())


@pytest.mark.parametrize("name", ["outlier", "inlier"])
def test_embeddings_of_paper_a(tiny_run, name):
    rows = table(tiny_run, f"{name}s")
    labels = array(tiny_run, f"{name}_labels")
    id_labels = array(tiny_run, "id_labels")
    assert list(rows) == ["index", "class", "source", "d_K", "cosine", "seed"]
    assert labels.tolist() == np.repeat(np.arange(C), PER_CLASS).tolist() == rows["class"].tolist()
    assert rows["index"].tolist() == list(range(M))
    assert len(set(rows["seed"])) == M
    source = rows["source"].astype(int)
    assert (id_labels[source] == labels).all()
    norms = np.linalg.norm(array(tiny_run, "anchors"), axis=1)
    v = array(tiny_run, f"{name}_embeddings").astype(float)
    np.testing.assert_allclose(np.linalg.norm(v, axis=1), norms[labels], rtol=1e-4)
    v = unit(v)
    z = unit(array(tiny_run, "id_embeddings").astype(float))
    np.testing.assert_allclose(rows["cosine"], (v * z[source]).sum(1), atol=1e-4)
    distances = np.linalg.norm(v[:, None] - z, axis=2)
    distances[labels[:, None] != id_labels] = np.inf
    np.testing.assert_allclose(rows["d_K"], np.sort(distances, axis=1)[:, K - 1], atol=1e-3)


def test_outliers_are_farther_than_inliers_at_the_papers_cosine(tiny_run):
    outliers = table(tiny_run, "outliers")
    inliers = table(tiny_run, "inliers")
    assert outliers["d_K"].mean() > inliers["d_K"].mean()
    # sigma is given for d = 768: 1 / sqrt(1 + d sigma^2) is 0.46 there, and 0.78 unscaled here
    assert outliers["cosine"].mean() == pytest.approx(0.46, abs=0.1)
    assert inliers["cosine"].mean() == pytest.approx(1 / np.sqrt(1 + 768 * 0.01**2), abs=0.05)


@pytest.mark.parametrize("name", ["sd_outliers", "sd_outliers_test", "sd_reconstructions_test"])
def test_manifest_of_paper_b(tiny_run, name):
    rows = table(tiny_run, name)
    assert list(rows) == ["index", "source", "y", "c_r", "seed"]
    labels = array(tiny_run, "test_pseudo_labels" if name.endswith("test") else "pseudo_labels")
    assert rows["index"].tolist() == rows["source"].tolist() == list(range(IMAGES[name]))
    assert rows["y"].tolist() == labels.tolist()
    assert len(set(rows["seed"])) == len(labels)
    pairs = set(zip(rows["y"], rows["c_r"], strict=True))
    same = "reconstructions" in name
    assert pairs == {(a, b) for a in range(C) for b in range(C) if (a == b) == same}


def test_pictures(tiny_run):
    sheets = set(IMAGES) - {"train", "test"}
    assert {path.stem for path in tiny_run.glob("*.png")} == sheets | {"roc", "scores", "tsne"}
    for path in tiny_run.glob("*.png"):
        pixels = np.asarray(Image.open(path).convert("L"))
        assert min(pixels.shape) >= 64, path.name
        assert len(np.unique(pixels)) > 10, path.name


def test_results(tiny_run, records):
    sizes = {"digits:6-7": COUNTS[6] + COUNTS[7], "patches": 520, "sd_reconstructions_test": N_TEST}
    keys = [(r["method"], r["score"], r["ood"]) for r in records]
    expected = {
        (method, score, ood) for method in SCORES for score in SCORES[method] for ood in sizes
    }
    assert len(keys) == len(expected)
    assert set(keys) == expected
    shares = ["auroc", "fpr95", "fpr95_ood", "aupr_in", "aupr_out", "id_accuracy"]
    text = (tiny_run / "results.md").read_text()
    for r in records:
        assert (r["id"], r["seed"], r["n_id"]) == ("digits:0-2", 0, N_TEST)
        assert r["n_ood"] == sizes[r["ood"]]
        assert (r["id_accuracy"] is None) == (r["method"] == "frozen")  # it names no class
        assert all(0 <= r[share] <= 1 for share in shares if r[share] is not None)
        for low, high in (r["auroc_ci"], r["fpr95_ci"]):
            assert 0 <= low <= high <= 1
        assert f"| {r['method']} | {r['score']} | {r['auroc']:.1%} [" in text
    assert "ce takes SD outliers for" in text


def test_scores_reproduce_the_results(tiny_run, records):
    for r in records:
        name = f"{r['method']}.{r['score']}"
        a = array(tiny_run / "scores", f"{name}.id")
        b = array(tiny_run / "scores", f"{name}.{r['ood'].replace(':', '-')}")
        assert a.dtype == b.dtype == np.float32
        assert (len(a), len(b)) == (r["n_id"], r["n_ood"])
        both = np.concatenate([a, b])
        is_ood = np.arange(len(both)) >= len(a)
        assert r["auroc"] == pytest.approx(roc_auc_score(is_ood, both), abs=1e-9), name
        assert r["aupr_out"] == pytest.approx(average_precision_score(is_ood, both), abs=1e-9)
        assert r["aupr_in"] == pytest.approx(average_precision_score(~is_ood, -both), abs=1e-9)
        assert (a > r["threshold"]).mean() <= 0.05
        assert 1 - (b > r["threshold"]).mean() == pytest.approx(r["fpr95"], abs=1e-12), name


def test_nothing_is_left_half_written(tiny_run):
    hidden = [path.name for path in tiny_run.rglob(".*")]
    assert hidden == []


@pytest.fixture
def inputs(tiny_run, tmp_path):
    """Copy of what the two samplers read."""
    ignore = shutil.ignore_patterns("*.pt", "scores", "*.png", "*outlier*", "*inlier*", "results*")
    return shutil.copytree(tiny_run, tmp_path / "run", ignore=ignore)


@pytest.mark.parametrize("name", ["outliers", "inliers", "sd_outliers"])
def test_seed_alone_decides_the_images(tiny_run, inputs, main, name):
    paper_a = ["sample_outliers", *SMALL, *["--inliers"] * (name == "inliers")]
    job = ["sample_sd_outliers", "--steps", 4] if name == "sd_outliers" else paper_a
    first = array(tiny_run, name)
    main(*job, "--dir", inputs, "--batch-size", 50)
    np.testing.assert_array_equal(array(inputs, name), first)
    assert (inputs / f"{name}.csv").read_bytes() == (tiny_run / f"{name}.csv").read_bytes()
    main(*job, "--dir", inputs, "--seed", 1)
    different = (array(inputs, name) != first).any(axis=(1, 2, 3))
    assert different.mean() > 0.9


def test_selection_by_distance_beats_the_released_one_and_chance(inputs, main, capsys):
    percentile = {}
    for selection in ("knn", "official", "random"):
        more = "--candidates", 100, "--per-class", 24, "--selection", selection, "--restart"
        main("sample_outliers", *SMALL, *more, "--dir", inputs)
        found = re.search(r"mean percentile of d_K ([\d.]+)", capsys.readouterr().out)
        percentile[selection] = float(found[1])
    assert percentile["knn"] > 0.98
    assert 0.3 < percentile["random"] < 0.7
    assert 0.2 < percentile["official"] < 0.9


def test_arrays_brought_by_hand(tiny_run, tmp_path, main, capsys):
    """Of another size than the recipe's; the second run takes the first one's labels."""
    given = {}
    for name, count in (("train", 120), ("test", 40)):
        given[name] = array(tiny_run, name)[:count].repeat(2, axis=1).repeat(2, axis=2)
        np.save(tmp_path / f"{name}.npy", given[name])
    scan = "--clusters 2 --pretext-epochs 3 --pretext-batch 60 --scan-epochs 6 --scan-batch 60"
    unet = "--starts 1 --selflabel-epochs 1 --channels 32,32 --steps 3 --batch-size 8"
    for _ in range(2):
        main("train_scan_diffusion", "--dir", tmp_path, *scan.split(), *unet.split())
    assert "which has the same options" in capsys.readouterr().out
    for name, images in given.items():
        np.testing.assert_array_equal(array(tmp_path, name), images)
    assert set(array(tmp_path, "pseudo_labels")) == {0, 1}
    assert len(array(tmp_path, "test_pseudo_labels")) == 40
    folder = tmp_path / "diffusion"
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet", low_cpu_mem_usage=False)
    assert (unet.config.num_class_embeds, unet.config.sample_size) == (3, 16)
    data = json.loads((tmp_path / "data.json").read_text())
    expected = {"data": str(tmp_path), "image_size": 16, "train": 120, "test": 40, "classes": None}
    assert expected.items() <= data.items()


def test_quality_floor(tmp_path, main, capsys):
    """Short but real: no step of either paper may quietly become useless."""
    scan = "--pretext-epochs 15 --pretext-batch 128 --starts 1 --scan-epochs 12"
    unet = "--selflabel-epochs 4 --channels 32,64 --steps 400 --batch-size 32"
    steps = {
        "train_scan_diffusion": f"--data digits:0,4,6,7 {scan} {unet}",
        "train_text_encoder": "--epochs 8",
        "sample_outliers": "--per-class 100 --steps 10 --candidates 300",
        "sample_sd_outliers": "--steps 10",
        "train_classifier": "--method dream sd --dream-epochs 12 --sd-epochs 8",
        "evaluate": "--ood-data patches digits:1-3 --bootstrap 1",
    }
    for script, options in steps.items():
        main(script, "--dir", tmp_path, *options.split())
    accuracy = re.search(r"4 self-labelling +ACC ([\d.]+)", capsys.readouterr().out)
    assert float(accuracy[1]) >= 0.9
    records = json.loads((tmp_path / "results.json").read_text())
    auroc = {(r["score"], r["ood"]): r["auroc"] for r in records}
    assert auroc["energy", "patches"] >= 0.9
    assert auroc["distance+voting", "digits:1-3"] >= 0.9
