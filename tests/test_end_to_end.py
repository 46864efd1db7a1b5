"""One run of the six real scripts: every file of the shared directory, its shape, type, range and meaning."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score, roc_auc_score

C, D, SIDE, PER_CLASS, K = 3, 64, 8, 12, 6  # of tiny_run
OOD = ["digits:6-7", "patches"]
SCORES = {"frozen": {"knn", "mahalanobis", "relative-mahalanobis"}}
SCORES["ce"] = SCORES["frozen"] | {"msp", "maxlogit", "energy"}
SCORES["dream"] = SCORES["ce"] | {"phi"}
SCORES["sd"] = {"distance", "voting", "distance+voting", "bin", "mahalanobis", "relative-mahalanobis"}
SMALL = ["--K", K, "--boundary", 6, "--draw", 6, "--candidates", 16, "--per-class", PER_CLASS, "--steps", 4]


def digit_counts(digits):
    return np.bincount(load_digits().target, minlength=10)[list(digits)]


N_TEST = int((digit_counts(range(3)) // 5).sum())  # every fifth image of a class
N_TRAIN = int(digit_counts(range(3)).sum()) - N_TEST
M = C * PER_CLASS
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


def array(folder, name):
    return np.load(folder / f"{name}.npy", allow_pickle=False)


def table(folder, name):
    with open(folder / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def column(rows, name, kind=int):
    return np.array([kind(row[name]) for row in rows])


def records(folder):
    def reject(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((folder / "results.json").read_text(), parse_constant=reject)


@pytest.mark.parametrize("name", IMAGES)
def test_images(tiny_run, name):
    images = array(tiny_run, name)
    assert images.shape == (IMAGES[name], SIDE, SIDE, 3) and images.dtype == np.uint8
    assert (images == images[..., :1]).all()  # digits are grey
    assert images.std() > 5 and len(np.unique(images.reshape(len(images), -1), axis=0)) > 0.9 * len(images)


@pytest.mark.parametrize("name", LABELS)
def test_labels(tiny_run, name):
    labels = array(tiny_run, name)
    assert labels.shape == (LABELS[name],) and labels.dtype == np.int64
    assert set(labels.tolist()) <= set(range(C))


@pytest.mark.parametrize("name", FLOATS)
def test_floats(tiny_run, name):
    values = array(tiny_run, name)
    assert values.shape == FLOATS[name] and values.dtype == np.float32 and np.isfinite(values).all()
    assert values.std() > 0


def test_description_and_id_data(tiny_run):
    data = json.loads((tiny_run / "data.json").read_text())
    assert data["name"] == "digits:0-2" and data["classes"] == ["0", "1", "2"] and data["image_size"] == SIDE
    assert data["train"] == N_TRAIN and data["test"] == N_TEST and data["digest"]
    pictures, target = load_digits(return_X_y=True)
    pictures = pictures[target < 3]
    both = np.concatenate([array(tiny_run, name)[..., 0].reshape(-1, 64) for name in ("train", "test")])
    labels = np.concatenate([array(tiny_run, f"{name}.labels") for name in ("train", "test")])
    known = {row.tobytes(): label for row, label in zip(np.rint(pictures * 255 / 16), target[target < 3], strict=True)}
    assert [known[row.tobytes()] for row in both.astype(float)] == labels.tolist()
    assert np.bincount(labels).tolist() == digit_counts(range(3)).tolist()


def test_pseudo_labels_and_confidence(tiny_run):
    assert len(np.unique(array(tiny_run, "pseudo_labels"))) == C
    confidence = array(tiny_run, "pseudo_confidence")
    assert (confidence >= 1 / C - 1e-6).all() and (confidence <= 1).all()


def test_diffusion_loads_and_owns_the_anchors(tiny_run):
    unet = UNet2DModel.from_pretrained(tiny_run / "diffusion" / "unet", low_cpu_mem_usage=False)
    scheduler = DDPMScheduler.from_pretrained(tiny_run / "diffusion" / "scheduler")
    assert unet.config.num_class_embeds == C + 1 and unet.config.sample_size == SIDE
    assert scheduler.config.num_train_timesteps == 1000 and scheduler.config.beta_schedule == "linear"
    assert scheduler.config.prediction_type == "epsilon"
    np.testing.assert_array_equal(unet.class_embedding.weight[:-1].detach().numpy(), array(tiny_run, "anchors"))
    assert not list((tiny_run / "diffusion").rglob("*.bin"))
    log = [json.loads(line) for line in (tiny_run / "diffusion_log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 60 and all(0 < line["loss"] < 10 for line in log)


def test_checkpoints(tiny_run):
    paths = {path.name: torch.load(path, weights_only=True) for path in tiny_run.glob("*.pt")}
    methods = {f"classifier_{method}.pt" for method in ("ce", "dream", "dream-id", "sd", "frozen")}
    assert set(paths) == {"scan.pt", "text_encoder.pt"} | methods
    for name, content in paths.items():
        assert content["config"]["seed"] == 0
        if name in methods:
            assert f"classifier_{content['config']['method']}.pt" == name
            assert content["config"]["classes"] == (0 if "frozen" in name else C)
            assert all(value.isfinite().all() for value in content["model"].values())
    assert any(key.startswith("phi") for key in paths["classifier_dream.pt"]["model"])
    assert {f"heads.{head}.weight" for head in ("g_bin", "g_in", "g_out")} <= set(paths["classifier_sd.pt"]["model"])


@pytest.mark.parametrize("name", ["outlier", "inlier"])
def test_embeddings_of_paper_a(tiny_run, name):
    rows, labels = table(tiny_run, f"{name}s"), array(tiny_run, f"{name}_labels")
    assert list(rows[0]) == ["index", "class", "source", "d_K", "cosine", "seed"]
    assert np.bincount(labels).tolist() == [PER_CLASS] * C
    assert column(rows, "index").tolist() == list(range(M)) and column(rows, "class").tolist() == labels.tolist()
    assert len(set(column(rows, "seed"))) == M
    v, z = array(tiny_run, f"{name}_embeddings").astype(float), array(tiny_run, "id_embeddings").astype(float)
    norms = np.linalg.norm(array(tiny_run, "anchors").astype(float), axis=1)
    np.testing.assert_allclose(np.linalg.norm(v, axis=1), norms[labels], rtol=1e-4)
    v, z = v / np.linalg.norm(v, axis=1, keepdims=True), z / np.linalg.norm(z, axis=1, keepdims=True)
    source, id_labels = column(rows, "source"), array(tiny_run, "id_labels")
    assert (id_labels[source] == labels).all()
    np.testing.assert_allclose(column(rows, "cosine", float), (v * z[source]).sum(1), atol=1e-4)
    for i in range(0, M, 5):  # brute force in float64
        distances = np.sort(np.linalg.norm(z[id_labels == labels[i]] - v[i], axis=1))
        assert float(rows[i]["d_K"]) == pytest.approx(distances[K - 1], abs=1e-3)


def test_outliers_are_farther_than_inliers(tiny_run):
    d_K = {name: column(table(tiny_run, name), "d_K", float).mean() for name in ("outliers", "inliers")}
    assert d_K["outliers"] > d_K["inliers"]


@pytest.mark.parametrize("stem", ["sd_outliers", "sd_outliers_test", "sd_reconstructions_test"])
def test_manifest_of_paper_b(tiny_run, stem):
    rows = table(tiny_run, stem)
    assert list(rows[0]) == ["index", "source", "y", "c_r", "seed"] and len(rows) == IMAGES[stem]
    y, c_r = column(rows, "y"), column(rows, "c_r")
    labels = array(tiny_run, "test_pseudo_labels" if stem.endswith("test") else "pseudo_labels")
    assert column(rows, "index").tolist() == column(rows, "source").tolist() == list(range(len(rows)))
    assert (y == labels).all() and set(c_r) <= set(range(C)) and len(set(column(rows, "seed"))) == len(rows)
    assert (c_r == y).all() if "reconstructions" in stem else (c_r != y).all()
    if "reconstructions" not in stem:  # every other class is drawn
        assert {(a, b) for a, b in zip(y, c_r, strict=True)} == {(a, b) for a in set(y) for b in range(C) if a != b}


def test_pictures(tiny_run):
    sheets = {"diffusion_samples", "outliers", "inliers", "sd_outliers", "sd_outliers_test", "sd_reconstructions_test"}
    assert {path.stem for path in tiny_run.glob("*.png")} >= sheets | {"roc", "scores", "tsne"}
    for path in tiny_run.glob("*.png"):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"))
        assert min(pixels.shape) >= 64 and len(np.unique(pixels)) > 10, path.name


def test_results(tiny_run):
    results, sizes = records(tiny_run), {"digits:6-7": int(digit_counts([6, 7]).sum()), "patches": 520}
    found = {(r["method"], r["score"], r["ood"]) for r in results}
    assert len(found) == len(results)
    assert found >= {(method, score, ood) for method in SCORES for score in SCORES[method] for ood in OOD}
    assert {("dream-id", ood) for ood in OOD} <= {(r["method"], r["ood"]) for r in results}
    shares = ["auroc", "fpr95", "fpr95_ood", "aupr_in", "aupr_out", "id_accuracy"]
    fields = {"method", "score", "id", "ood", "n_id", "n_ood", "auroc_ci", "fpr95_ci", "threshold", "seed", *shares}
    for r in results:
        assert set(r) == fields and r["id"] == "digits:0-2" and r["seed"] == 0
        assert r["n_id"] == N_TEST and r["n_ood"] == sizes.get(r["ood"], N_TEST)
        assert (r["id_accuracy"] is None) == (r["method"] == "frozen")  # features alone name no class
        assert all(0 <= r[share] <= 1 for share in shares if r[share] is not None)
        for interval in (r["auroc_ci"], r["fpr95_ci"]):
            assert len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1
    for method in {r["method"] for r in results}:
        assert len({r["id_accuracy"] for r in results if r["method"] == method}) == 1


def test_scores_reproduce_the_results(tiny_run):
    for r in records(tiny_run):
        name = f"{r['method']}.{r['score']}"
        in_scores = array(tiny_run / "scores", f"{name}.id")
        out_scores = array(tiny_run / "scores", f"{name}.{r['ood'].replace(':', '-')}")
        assert in_scores.dtype == out_scores.dtype == np.float32
        assert in_scores.shape == (r["n_id"],) and out_scores.shape == (r["n_ood"],)
        both, is_ood = np.concatenate([in_scores, out_scores]), np.arange(r["n_id"] + r["n_ood"]) >= r["n_id"]
        assert roc_auc_score(is_ood, both) == pytest.approx(r["auroc"], abs=1e-9), name
        assert average_precision_score(is_ood, both) == pytest.approx(r["aupr_out"], abs=1e-9), name
        assert average_precision_score(~is_ood, -both) == pytest.approx(r["aupr_in"], abs=1e-9), name
        assert (in_scores <= r["threshold"]).mean() >= 0.95
        assert (out_scores <= r["threshold"]).mean() == pytest.approx(r["fpr95"], abs=1e-12), name


def test_report_names_every_record(tiny_run):
    text = (tiny_run / "results.md").read_text()
    for r in records(tiny_run):
        line = rf"^\| {re.escape(r['method'])} \| {re.escape(r['score'])} \|.*{100 * r['auroc']:.1f}"
        assert r["ood"] in text and re.search(line, text, re.M), r


def test_nothing_is_left_half_written(tiny_run):
    assert not [path for path in tiny_run.rglob("*") if "partial" in path.name]


@pytest.fixture
def inputs(tiny_run, tmp_path):
    """Copy of what the two samplers read."""
    ignore = shutil.ignore_patterns("*.pt", "scores", "*.png", "*outlier*", "*inlier*", "results*")
    return shutil.copytree(tiny_run, tmp_path / "run", ignore=ignore)


JOBS = {"outliers": ("sample_outliers", *SMALL), "sd_outliers": ("sample_sd_outliers", "--steps", 4)}


@pytest.mark.parametrize("name", JOBS)
def test_seed_alone_decides_the_images(tiny_run, inputs, main, name):
    first = array(tiny_run, name)
    main(*JOBS[name], "--dir", inputs)
    np.testing.assert_array_equal(array(inputs, name), first)
    assert (inputs / f"{name}.csv").read_bytes() == (tiny_run / f"{name}.csv").read_bytes()
    main(*JOBS[name], "--dir", inputs, "--batch-size", 7, "--restart")
    assert np.abs(array(inputs, name).astype(int) - first).max() <= 1
    assert (inputs / f"{name}.csv").read_bytes() == (tiny_run / f"{name}.csv").read_bytes()
    main(*JOBS[name], "--dir", inputs, "--seed", 1)
    different = (array(inputs, name) != first).any(axis=(1, 2, 3))
    assert different.mean() > 0.9


def test_selection_by_distance_beats_the_released_one_and_chance(inputs, main, capsys):
    percentile = {}
    for selection in ("knn", "official", "random"):
        main("sample_outliers", *SMALL, "--candidates", 100, "--dir", inputs, "--selection", selection)
        percentile[selection] = float(re.search(r"percentile of d_K.* ([\d.]+)", capsys.readouterr().out)[1])
        assert array(inputs, "outliers").shape == (M, SIDE, SIDE, 3)
    assert percentile["knn"] > 0.98
    assert 0.3 < percentile["random"] < 0.7 and 0.2 < percentile["official"] < 0.9


def test_arrays_brought_by_hand(tiny_run, tmp_path, main):
    folder = tmp_path / "mine"
    folder.mkdir()
    given = {name: array(tiny_run, name)[:count] for name, count in (("train", 150), ("test", 40))}
    for name, images in given.items():
        np.save(folder / f"{name}.npy", images)
    epochs = (
        "--pretext-epochs",
        3,
        "--pretext-batch",
        64,
        "--scan-epochs",
        6,
        "--scan-batch",
        64,
        "--selflabel-epochs",
        1,
    )
    unet = "--channels", "16,16", "--steps", 5, "--batch-size", 16
    main("train_scan_diffusion", "--dir", folder, "--recipe", "digits", "--clusters", 2, *epochs, *unet)
    for name, images in given.items():
        np.testing.assert_array_equal(array(folder, name), images)
    assert set(array(folder, "pseudo_labels")) == {0, 1} and len(array(folder, "test_pseudo_labels")) == 40
    unet = UNet2DModel.from_pretrained(folder / "diffusion" / "unet", low_cpu_mem_usage=False)
    assert unet.config.num_class_embeds == 3
    data = json.loads((folder / "data.json").read_text())
    assert data["train"] == 150 and data["test"] == 40 and not data["classes"]


def test_candidates_keep_the_papers_cosine(tiny_run):
    """sigma is given for d = 768, where the cosine is 0.46; unscaled it would be 0.87 at d = 64."""
    assert np.load(tiny_run / "anchors.npy").shape[1] == 64
    cosine = np.loadtxt(tiny_run / "outliers.csv", delimiter=",", skiprows=1)[:, 4]
    assert 0.2 < cosine.mean() < 0.6
