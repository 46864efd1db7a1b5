"""Bad input ends a script with one line that says what and where, status 2 for usage and 1 otherwise, and no change."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

SCAN = "train_scan_diffusion"
ENCODER = "train_text_encoder"
OUTLIERS = "sample_outliers"
SD = "sample_sd_outliers"
CLASSIFIER = "train_classifier"
EVALUATE = "evaluate"
SMALL = {  # so that a case that is wrongly accepted ends soon
    SCAN: "--pretext-epochs 1 --scan-epochs 1 --selflabel-epochs 1 --channels 16,16 --steps 2 --batch-size 8",
    ENCODER: "--epochs 1",
    OUTLIERS: "--K 6 --boundary 6 --draw 6 --candidates 16 --per-class 4 --steps 2",
    SD: "--steps 2",
    CLASSIFIER: "--epochs 1",
    EVALUATE: "--ood-data digits:6-7 --bootstrap 2",
}
ID_DATA = {"new", "data.json", "train.npy", "test.npy", "train.labels.npy", "test.labels.npy"}


@pytest.fixture
def folder(tiny_run, tmp_path):
    """A copy of the tiny run's directory, named run, the only thing in tmp_path."""
    ignore = shutil.ignore_patterns("scores", "*.png", "*.md", "*_test.*", "scan.pt", "text_encoder.pt")
    copy = shutil.copytree(tiny_run, tmp_path / "run", ignore=ignore)
    for path in (tiny_run / "test_pseudo_labels.npy", tiny_run / "test.npy"):
        shutil.copy(path, copy)
    return copy


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def stops(load, tmp_path, monkeypatch, capfd):
    """stops(status, script, *args, say=(...)): the script ends so, says each of `say` in its line, and writes nothing.

    `say` are regular expressions. Progress bars do not count as lines.
    """

    def stops(status, script, *args, say=(), stores_id_data=False):
        before = contents(tmp_path)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *SMALL[script].split(), *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            load(script).main()
        error = re.sub(r"\x1b\[A|\r?[^\r\n|]*\d+%\|[^\]\r\n]*\]", "", capfd.readouterr().err)
        lines = [line for line in re.split(r"[\r\n]+", error) if line.strip()]
        assert len(lines) == 1 and lines[0].startswith(f"{script}.py: "), error
        for pattern in say:
            assert re.search(pattern, lines[0]), f"'{pattern}' is not in: {lines[0]}"
        assert end.value.code == status, lines[0]
        after = contents(tmp_path)
        new = {name.split("/")[-1] for name in set(after) - set(before)}
        assert new <= (ID_DATA if stores_id_data else set())
        assert [name for name in before if after.get(name) != before[name]] == []

    return stops


def change(path, damage):
    """Make the array in `path` stale or damaged."""
    if damage == "missing":
        path.unlink()
        return
    data, array = path.read_bytes(), np.load(path)
    if damage == "length":
        np.save(path, array[:-1])
    elif damage == "shape":  # labels get a second axis, all else loses a column or a channel
        np.save(path, array[:, None] if array.ndim == 1 else array[..., :-1])
    elif damage == "dtype":
        np.save(path, array.astype({"u": np.float32, "i": np.int32, "f": np.float64}[array.dtype.kind]))
    elif damage == "truncated":
        path.write_bytes(data[: len(data) - 100])
    elif damage == "header":
        path.write_bytes(data[:40])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "archive":
        with open(path, "wb") as file:
            np.savez(file, array)
    elif damage == "pickled":
        np.save(path, np.array([{"a": 1}] * len(array), dtype=object), allow_pickle=True)
    else:
        array[len(array) // 2] = {"nan": np.nan, "inf": np.inf, "negative": -1}[damage]
        np.save(path, array)


ALWAYS = ["missing", "length", "shape", "dtype", "truncated", "pickled"]
READ = [  # script, options, array that it reads, what of ALWAYS is no fault there
    (SCAN, "", "train", []),
    (SCAN, "", "test", []),
    (SCAN, "", "train.labels", []),
    (ENCODER, "", "train", []),
    (ENCODER, "", "test", []),
    (ENCODER, "", "pseudo_labels", []),
    (ENCODER, "", "test_pseudo_labels", []),
    (OUTLIERS, "", "anchors", []),
    (OUTLIERS, "", "id_embeddings", []),
    (OUTLIERS, "", "id_labels", []),
    (OUTLIERS, "", "train", []),
    (SD, "", "train", []),
    (SD, "", "pseudo_labels", []),
    (SD, "--split test", "test", []),
    (SD, "--split test", "test_pseudo_labels", []),
    (CLASSIFIER, "--method ce", "train", []),
    (CLASSIFIER, "--method ce --labels dataset", "train.labels", []),
    (CLASSIFIER, "--method dream", "outliers", ["length"]),
    (CLASSIFIER, "--method dream-id", "inliers", []),
    (CLASSIFIER, "--method dream-id", "inlier_labels", []),
    (CLASSIFIER, "--method dream-id", "id_labels", []),
    (CLASSIFIER, "--method sd", "pseudo_labels", []),
    (CLASSIFIER, "--method sd", "sd_outliers", []),
    (EVALUATE, "", "test", []),
    (EVALUATE, "", "train", []),
    (EVALUATE, "", "test.labels", ["missing"]),
    (EVALUATE, "", "sd_outliers", []),
]
KIND = {"anchors": ["nan", "inf"], "id_embeddings": ["nan", "inf"]}
CASES = [
    (*case[:3], damage)
    for case in READ
    for damage in [*ALWAYS, *KIND.get(case[2], ["negative"] if "labels" in case[2] else [])]
    if damage not in case[3]
]
CASES += [(OUTLIERS, "", "id_embeddings", damage) for damage in ("header", "empty", "archive")]


@pytest.mark.parametrize(("script", "options", "name", "damage"), CASES)
def test_stale_arrays(folder, stops, script, options, name, damage):
    change(folder / f"{name}.npy", damage)
    where = rf"{re.escape(name)}\.npy" if damage not in ("length", "shape") else r"\.npy"  # which of two is stale?
    stops(1, script, "--dir", folder, *options.split(), say=[where, r"(run|delete) .*(\w+\.py|script)"])


def test_anchors_of_another_model(folder, stops):
    anchors = np.load(folder / "anchors.npy")
    np.save(folder / "anchors.npy", anchors[::-1])
    stops(1, OUTLIERS, "--dir", folder, say=["anchors.npy", "train_text_encoder.py"])


@pytest.mark.parametrize("script", [ENCODER, OUTLIERS, SD])
@pytest.mark.parametrize("damage", ["missing", "config", "weights"])
def test_diffusion_model_damaged(folder, stops, script, damage):
    unet = folder / "diffusion" / "unet"
    if damage == "missing":
        shutil.rmtree(folder / "diffusion")
    elif damage == "config":
        (unet / "config.json").write_text("{")
    else:
        (path := unet / "diffusion_pytorch_model.safetensors").write_bytes(path.read_bytes()[:500])
    stops(1, script, "--dir", folder, say=["diffusion", "run train_scan_diffusion.py"])


@pytest.mark.parametrize("script", [OUTLIERS, SD])
@pytest.mark.parametrize("text", ["{", "{}"])
def test_training_notes_damaged(folder, stops, script, text):
    (folder / "diffusion" / "training.json").write_text(text)
    stops(1, script, "--dir", folder, say=["diffusion"])


def test_model_of_the_cheap_mode_makes_no_images_from_noise(folder, stops):
    (folder / "diffusion" / "training.json").write_text(json.dumps({"t_max": 250}))
    stops(1, OUTLIERS, "--dir", folder, say=["250", "train_scan_diffusion.py", "--t-max 1000"])
    stops(2, SD, "--dir", folder, "--S", 250, say=["--S", "250"])


@pytest.mark.parametrize("script", [SCAN, ENCODER, OUTLIERS, SD, CLASSIFIER, EVALUATE])
@pytest.mark.parametrize("text", ['{"name": "digits', '["digits"]'])
def test_description_damaged(folder, stops, script, text):
    (folder / "data.json").write_text(text)
    stops(1, script, "--dir", folder, say=["data.json"])


def test_pseudo_labels_changed_since_the_outliers(folder, stops):
    labels = np.load(folder / "pseudo_labels.npy")
    np.save(folder / "pseudo_labels.npy", (labels + 1) % 3)
    stops(1, CLASSIFIER, "--dir", folder, "--method", "sd", say=["sd_outliers", "run sample_sd_outliers.py"])


@pytest.mark.parametrize("damage", ["missing", "text", "short", "past the end"])
def test_manifest_damaged(folder, stops, damage):
    path = folder / "sd_outliers.csv"
    lines = path.read_text().splitlines()
    if damage == "missing":
        path.unlink()
    else:
        last = {"text": "a,b,c,d,e", "short": lines[-2], "past the end": "430,99999,0,1,0"}[damage]
        path.write_text("\n".join([*lines[: -2 if damage == "short" else -1], last]) + "\n")
    stops(1, CLASSIFIER, "--dir", folder, "--method", "sd", say=["sd_outliers", "run sample_sd_outliers.py"])


def test_labels_beyond_the_model(folder, stops):
    for name in ("pseudo_labels", "test_pseudo_labels", "id_labels"):
        labels = np.load(folder / f"{name}.npy")
        labels[0] = 7
        np.save(folder / f"{name}.npy", labels)
    stops(1, ENCODER, "--dir", folder, say=["pseudo_labels.npy", "train_scan_diffusion.py"])
    stops(1, SD, "--dir", folder, say=["pseudo_labels.npy"])
    stops(1, OUTLIERS, "--dir", folder, say=["id_labels.npy", "train_text_encoder.py"])


@pytest.mark.parametrize("damage", ["text", "truncated", "other data"])
def test_classifier_damaged(folder, stops, damage):
    path = folder / "classifier_dream.pt"
    if damage == "other data":
        content = torch.load(path, weights_only=True)
        torch.save(content | {"digest": "0" * 16}, path)
    else:
        path.write_bytes(b"no weights" if damage == "text" else path.read_bytes()[:1000])
    stops(1, EVALUATE, "--dir", folder, say=["classifier_dream.pt", "run train_classifier.py"])


def test_classifier_that_gives_nan(folder, stops):
    content = torch.load(folder / "classifier_ce.pt", weights_only=True)
    content["model"]["heads.g_in.bias"][0] = torch.nan
    torch.save(content, folder / "classifier_ce.pt")
    stops(1, EVALUATE, "--dir", folder, say=["classifier_ce.pt", "NaN", "train_classifier.py"])


@pytest.mark.parametrize(("name", "status"), [("nosuch", 2), ("no/such/folder", 2), ("nosuch.npy", 1)])
def test_unknown_data_set(folder, stops, tmp_path, name, status):
    stops(status, SCAN, "--dir", tmp_path / "new", "--data", name, "--recipe", "digits", say=[name])
    stops(status, EVALUATE, "--dir", folder, "--ood-data", name, say=[name])


@pytest.mark.parametrize("classes", ["0-12", "10", "a", "3-1", "-1", "0-", "0,,1", "1.5"])
def test_class_range(folder, stops, tmp_path, classes):
    stops(2, SCAN, "--dir", tmp_path / "new", "--data", f"digits:{classes}", say=[f"digits:{classes}"])
    stops(2, EVALUATE, "--dir", folder, "--ood-data", f"digits:{classes}", say=[f"digits:{classes}"])


def test_classes_of_a_data_set_without_any(folder, stops):
    stops(2, EVALUATE, "--dir", folder, "--ood-data", "patches:0-1", say=["patches:0-1"])


@pytest.mark.parametrize("script", [SCAN, ENCODER])
def test_directory_of_other_data(folder, stops, script):
    stops(2, script, "--dir", folder, "--data", "digits:0-3", say=["digits:0-2", "digits:0-3", "--dir"])


@pytest.mark.parametrize("script", [SCAN, CLASSIFIER, EVALUATE])
def test_no_recipe_of_that_name(folder, stops, script):
    data = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps(data | {"name": "photos"}))
    stops(2, script, "--dir", folder, say=["photos", "--recipe"])


def test_class_with_fewer_images_than_K(folder, stops):
    smallest = np.bincount(np.load(folder / "id_labels.npy")).min()
    stops(2, OUTLIERS, "--dir", folder, "--K", smallest + 1, say=[f"--K {smallest + 1}", str(smallest)])
    stops(2, OUTLIERS, "--dir", folder, "--boundary", smallest + 1, say=["--boundary", str(smallest)])


def test_more_neighbours_than_images(folder, stops, tmp_path):
    stops(2, SCAN, "--dir", folder, "--K", 431, say=["--K", "431"])
    new = "--dir", tmp_path / "new", "--data", "digits:0-2"
    stops(2, SCAN, *new, "--K", 431, say=["--K", "431"], stores_id_data=True)


@pytest.mark.parametrize("option", ["--k", "--knn-k"])
def test_more_neighbours_than_training_features(folder, stops, option):
    stops(2, EVALUATE, "--dir", folder, option, 500, say=["50[01]", "431"])


@pytest.fixture
def photos(tmp_path):
    """A folder of two class folders with six grey pictures each."""
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(6):
            pixels = np.random.default_rng(i).integers(0, 256, (11, 9), dtype=np.uint8)
            Image.fromarray(pixels).convert("RGB").save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def read_folder(stops, folder, tmp_path, data, status, say):
    """As ID data of the first script and as OOD data of the last."""
    stops(status, SCAN, "--dir", tmp_path / "new", "--data", data, "--recipe", "digits", "--clusters", 2, say=say)
    stops(status, EVALUATE, "--dir", folder, "--ood-data", data, say=say)


@pytest.mark.parametrize("inside", [[], ["cat", "dog"], ["train/cat", "test/cat"]])
def test_empty_folder(folder, stops, tmp_path, inside):
    (tmp_path / "photos").mkdir()
    for name in inside:
        (tmp_path / "photos" / name).mkdir(parents=True)
    read_folder(stops, folder, tmp_path, tmp_path / "photos", 1, ["photos", "no (train|ood) pictures"])


@pytest.mark.parametrize("damage", ["text", "truncated", "empty"])
def test_picture_that_cannot_be_read(folder, stops, tmp_path, photos, damage):
    picture = photos / "dog" / "3.png"
    data = picture.read_bytes()
    picture.write_bytes({"text": b"no picture", "truncated": data[: len(data) // 2], "empty": b""}[damage])
    read_folder(stops, folder, tmp_path, photos, 1, [r"dog.3\.png"])


def test_picture_in_a_flat_folder_that_cannot_be_read(folder, stops, tmp_path, photos):
    (photos / "cat" / "notes.txt").write_text("no picture")
    read_folder(stops, folder, tmp_path, photos / "cat", 1, [r"notes\.txt"])


@pytest.mark.parametrize("damage", ["dtype", "shape", "truncated", "pickled"])
@pytest.mark.parametrize("part", ["train", "test"])
def test_array_folder_damaged(folder, stops, tmp_path, part, damage):
    (tmp_path / "arrays").mkdir()
    for name in ("train", "test"):
        shutil.copy(folder / f"{name}.npy", tmp_path / "arrays")
    change(tmp_path / "arrays" / f"{part}.npy", damage)
    options = "--recipe", "digits", "--clusters", 2
    stops(1, SCAN, "--dir", tmp_path / "new", "--data", tmp_path / "arrays", *options, say=[rf"{part}\.npy"])
    if part == "test":
        stops(1, EVALUATE, "--dir", folder, "--ood-data", tmp_path / "arrays", say=[r"test\.npy"])


@pytest.mark.parametrize("damage", ["length", "dtype", "negative"])
def test_labels_beside_an_array_damaged(folder, stops, tmp_path, damage):
    shutil.copy(folder / "train.npy", tmp_path / "mine.npy")
    shutil.copy(folder / "train.labels.npy", tmp_path / "mine.labels.npy")
    change(tmp_path / "mine.labels.npy", damage)
    read_folder(stops, folder, tmp_path, tmp_path / "mine.npy", 1, [r"mine\.labels\.npy"])


def test_half_of_the_arrays_brought_by_hand(folder, stops, tmp_path):
    (tmp_path / "mine").mkdir()
    shutil.copy(folder / "train.npy", tmp_path / "mine")
    stops(1, SCAN, "--dir", tmp_path / "mine", "--recipe", "digits", "--clusters", 2, say=["mine", "test"])


def test_no_number_of_clusters(folder, stops, tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("train", "test"):
        shutil.copy(folder / f"{name}.npy", tmp_path / "mine")
    stops(2, SCAN, "--dir", tmp_path / "mine", "--recipe", "digits", say=["--clusters"], stores_id_data=True)


@pytest.mark.parametrize(
    ("script", "options"),
    [
        (SD, "--S -1"),
        (SD, "--S 0"),
        (SD, "--S 1000"),
        (SD, "--S 1001"),
        (SD, "--S 1.5"),
        (SD, "--S 5 --steps 6"),
        (SD, "--w -0.1"),
        (SD, "--w nan"),
        (SD, "--w inf"),
        (SD, "--steps 0"),
        (SD, "--batch-size 0"),
        (SD, "--sampler ddim"),
        (SD, "--split all"),
        (OUTLIERS, "--sigma -0.1"),
        (OUTLIERS, "--sigma nan"),
        (OUTLIERS, "--K 0"),
        (OUTLIERS, "--K -1"),
        (OUTLIERS, "--guidance 0.9"),
        (OUTLIERS, "--per-class 0"),
        (OUTLIERS, "--keep 17"),
        (OUTLIERS, "--draw 7"),
        (OUTLIERS, "--selection best"),
        (CLASSIFIER, "--beta -1"),
        (CLASSIFIER, "--lam -1"),
        (CLASSIFIER, "--zoom 0.5"),
        (CLASSIFIER, "--lr 0"),
        (CLASSIFIER, "--method ce odin"),
        (EVALUATE, "--alpha -1"),
        (EVALUATE, "--alpha nan"),
        (EVALUATE, "--alpha inf"),
        (EVALUATE, "--bootstrap 0"),
        (EVALUATE, "--k 0"),
        (EVALUATE, "--k -1"),
        (EVALUATE, "--knn-k 0"),
        (ENCODER, "--t 0"),
        (ENCODER, "--epochs -1"),
        (SCAN, "--K 0"),
        (SCAN, "--tau 0"),
        (SCAN, "--t-max 1001"),
        (SCAN, "--t-max 0"),
        (SCAN, "--p-drop 1"),
        (SCAN, "--confidence 1"),
        (SCAN, "--clusters 1"),
        (SCAN, "--clusters -2"),
        (SCAN, "--labels mine"),
        (SCAN, "--augment nosuch"),
        (SCAN, "--channels 16,x"),
        *((script, "--arch nosuch") for script in (SCAN, ENCODER, CLASSIFIER)),
        *((script, "--seed -1") for script in (SCAN, OUTLIERS, SD, EVALUATE)),
        *((script, "--recipe nosuch") for script in SMALL),
        *((script, "--nosuch 1") for script in SMALL),
        *((script, "--batch-size many") for script in SMALL),
    ],
)
def test_options_out_of_range(folder, stops, script, options):
    last = [option for option in options.split() if option.startswith("--")][0]
    stops(2, script, "--dir", folder, *options.split(), say=[rf"{last}\b"])


@pytest.mark.parametrize("options", ["--w 0", "--S 999", "--S 1 --steps 1"])
def test_ends_of_the_ranges_are_allowed(folder, load, monkeypatch, options):
    """w = 0 is plain conditional sampling."""
    argv = [f"{SD}.py", *SMALL[SD].split(), "--dir", str(folder), "--split", "test", *options.split()]
    monkeypatch.setattr(sys, "argv", argv)
    load(SD).main()
    assert (folder / "sd_outliers_test.npy").exists()


@pytest.mark.parametrize("case", ["nan", "missing", "empty", "matrix", "text", "pickled"])
def test_score_files(folder, stops, tmp_path, case):
    np.save(tmp_path / "id.npy", np.arange(5.0))
    content = {"nan": [0.0, np.nan], "empty": [], "matrix": [[1.0]], "text": ["a"], "pickled": [{}]}
    if case != "missing":
        np.save(tmp_path / "ood.npy", np.array(content[case]), allow_pickle=True)
    for pair in (["id.npy", "ood.npy"], ["ood.npy", "id.npy"]):
        stops(1, EVALUATE, "--dir", tmp_path / "new", "--scores", *pair, say=[r"ood\.npy"])


def test_scores_of_one_class(stops, tmp_path):
    np.save(tmp_path / "id.npy", np.arange(5.0))
    stops(2, EVALUATE, "--dir", tmp_path / "new", "--scores", "id.npy")


def test_method_without_its_input(folder, stops):
    for name in ("outliers.npy", "sd_outliers.npy", "inliers.npy"):
        (folder / name).unlink()
    stops(1, CLASSIFIER, "--dir", folder, "--method", "ce", "dream", say=[r"outliers\.npy", "run sample_outliers.py"])
    stops(1, CLASSIFIER, "--dir", folder, "--method", "sd", say=[r"sd_outliers\.npy", "run sample_sd_outliers.py"])
    stops(1, CLASSIFIER, "--dir", folder, "--method", "dream-id", say=[r"inliers\.npy", "sample_outliers.py --inliers"])
