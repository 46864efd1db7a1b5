"""Bad input ends a script with one line: what, which file, what to do. Nothing is lost."""

import logging
import re
import shutil

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
    SCAN: "--labels dataset --pretext-epochs 1 --channels 32,32 --steps 2 --batch-size 8",
    ENCODER: "--epochs 1",
    OUTLIERS: "--K 6 --boundary 6 --draw 6 --candidates 16 --per-class 4 --steps 2",
    SD: "--steps 2",
    CLASSIFIER: "--epochs 1 --dream-epochs 1 --sd-epochs 1",
    EVALUATE: "--ood-data digits:6-7 --bootstrap 2",
}
BYTES = {  # ways to spoil a file
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) * 2 // 3],
    "header": lambda data: data[:40],
    "text": lambda data: b"text",
    "archive": lambda data: b"PK\x03\x04" + data,
}
ARRAY = {  # ways to spoil an array
    "none": lambda array: array[:0],
    "length": lambda array: array[:-1],
    "width": lambda array: array.repeat(2, -1),
    "axis": lambda array: array[..., None],
    "type": lambda array: array.astype(np.int16),
    "object": lambda array: array.astype(object),
    "negative": lambda array: array - 1,
    "nan": lambda array: array + np.nan,
    "inf": lambda array: array + np.inf,
}


def damage(path, how):
    if how == "missing":
        path.unlink()
    elif how in BYTES:
        path.write_bytes(BYTES[how](path.read_bytes()))
    else:
        np.save(path, ARRAY[how](np.load(path)), allow_pickle=True)


@pytest.fixture
def folder(tiny_run, tmp_path):
    """A copy of the tiny run's directory, named run, in the folder that the scripts run in."""
    others = shutil.ignore_patterns("scores", "*.png", "*.md", "text_encoder.pt")
    return shutil.copytree(tiny_run, tmp_path / "run", ignore=others)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def stops(main, tmp_path, monkeypatch, capfd):
    """stops(status, command, pattern): so a script ends, with the pattern in its one line.

    What was there stays as it is. New files are unfinished by their name, scores, or ID data.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.StreamHandler, "emit", lambda *_: None)  # of libraries

    def stops(status, command, pattern):
        before = contents(tmp_path)
        script, *options = command.split()
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main(script, *SMALL[script].split(), *options)
        code = end.value.code
        error = capfd.readouterr().err + (f"\n{code}" if isinstance(code, str) else "")
        lines = [line for line in re.split(r"[\r\n]+", error) if line.strip()]
        lines = [line for line in lines if not re.search("it/s|s/it", line)]  # progress bars
        assert len(lines) == 1, error
        assert re.search(pattern, lines[0]), f"{pattern} is not in: {lines[0]}"
        assert (1 if isinstance(code, str) else code) == status
        after = contents(tmp_path)
        assert [path for path in before if after.get(path) != before[path]] == []
        new = {path.relative_to(tmp_path) for path in after.keys() - before.keys()}
        known = r"/\.partial|/scores/|/data\.json$|/(train|test)(\.labels)?\.npy$"
        assert [path for path in new if not re.search(known, str(path))] == []

    return stops


def test_load_array(load, tmp_path):
    path = tmp_path / "a.npy"
    floats = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.save(path, floats)
    assert np.array_equal(load(EVALUATE).load_array(path, (4, None), np.float32, ""), floats)
    cases = [(floats, how) for how in ["missing", *BYTES, *ARRAY] if how != "negative"]
    for array, how in [*cases, (floats.astype(int), "none"), (floats.astype(int), "negative")]:
        np.save(path, array)
        damage(path, how)
        with pytest.raises(SystemExit) as end:
            load(EVALUATE).load_array(path, (4, 3), array.dtype, "make.py")
        assert re.fullmatch(rf"{re.escape(str(path))} .*; run make.py( again)?", end.value.code), (
            how
        )


ARRAYS = {
    SCAN: "train:cut test:length train.labels:negative test.labels:missing pseudo_labels:cut",
    ENCODER: "train:type test:missing pseudo_labels:negative test_pseudo_labels:length",
    OUTLIERS: "anchors:nan id_embeddings:width id_labels:length train:axis",
    SD: "train:object pseudo_labels:type",
    f"{SD} --split test": "test:empty test_pseudo_labels:length",
    f"{CLASSIFIER} --method ce": "train:text train.labels:length",
    f"{CLASSIFIER} --method ce --labels pseudo": "pseudo_labels:missing",
    f"{CLASSIFIER} --method ce dream": "outliers:missing",
    f"{CLASSIFIER} --method dream-id": "inliers:width inlier_labels:length id_labels:missing",
    f"{CLASSIFIER} --method ce sd": "sd_outliers:type",
    EVALUATE: "train:cut test:missing train.labels:cut test.labels:length sd_outliers:axis",
    f"{EVALUATE} --seed 1": "sd_reconstructions_test:type",
}
CASES = [(command, *case.split(":")) for command in ARRAYS for case in ARRAYS[command].split()]


@pytest.mark.parametrize(("command", "name", "how"), CASES)
def test_arrays(folder, stops, command, name, how):
    damage(folder / f"{name}.npy", how)
    stops(1, f"{command} --dir run", rf"run/{re.escape(name)}\.npy .*run .*(\.py|script)")


@pytest.mark.parametrize(
    ("command", "name", "how", "pattern"),
    [
        (SCAN, "data.json", "cut", r"data\.json"),
        (f"{SCAN} --labels scan", "scan.pt", "cut", r"scan\.pt .*delete"),
        (ENCODER, "diffusion/unet/config.json", "text", "run/diffusion .*run train_scan"),
        (OUTLIERS, "diffusion/unet/config.json", "missing", "run/diffusion .*run train_scan"),
        (SD, "diffusion/unet/*.safetensors", "cut", "run/diffusion .*run train_scan"),
        (f"{CLASSIFIER} --method frozen", "scan.pt", "text", r"scan\.pt .*run train_scan"),
        (f"{CLASSIFIER} --method dream --init ce", "classifier_ce.pt", "cut", "ce.pt .*--method"),
        (f"{CLASSIFIER} --method sd", "sd_outliers.csv", "cut", r"\.csv .*run sample_sd"),
        (f"{CLASSIFIER} --method sd", "sd_outliers.csv", "missing", r"\.csv .*run sample_sd"),
        (EVALUATE, "sd_outliers.csv", "missing", r"\.csv .*run sample_sd"),
        (EVALUATE, "classifier_ce.pt", "cut", r"_ce\.pt .*run train_classifier"),
    ],
)
def test_other_files(folder, stops, command, name, how, pattern):
    (path,) = folder.glob(name)
    damage(path, how)
    stops(1, f"{command} --dir run", pattern)


def test_nothing_there(stops):
    stops(1, f"{ENCODER} --dir new", r"new/diffusion .*run train_scan_diffusion\.py")
    stops(1, f"{OUTLIERS} --dir new", r"new/anchors\.npy .*run train_text_encoder\.py")
    stops(1, f"{SD} --dir new", r"new/diffusion .*run train_scan_diffusion\.py")
    stops(1, f"{CLASSIFIER} --dir new", r"new/train\.npy .*run train_scan_diffusion\.py")
    stops(1, f"{EVALUATE} --dir new", r"new/train\.npy .*run train_scan_diffusion\.py")


def test_no_stable_diffusion(folder, stops):
    for script in (ENCODER, OUTLIERS, SD):
        stops(1, f"{script} --dir run --diffusion no/folder", "no Stable Diffusion in no/folder")
    (folder.parent / "words").write_text("zero\none\n")
    command = f"{ENCODER} --dir run --diffusion no/folder --class-words words"
    stops(1, command, "2 class words for 3 classes.*--class-words")


def test_files_of_another_run(folder, stops):
    labels = np.load(folder / "pseudo_labels.npy")
    for name in ("pseudo_labels", "id_labels"):
        np.save(folder / f"{name}.npy", labels + 1)
    stops(1, f"{ENCODER} --dir run", r"pseudo_labels\.npy .* 3 classes")
    stops(1, f"{SD} --dir run", r"labels up to 3 .* 3 classes; run train_scan_diffusion\.py")
    stops(1, f"{OUTLIERS} --dir run", r"id_labels\.npy .* 3 classes")
    np.save(folder / "id_labels.npy", labels)
    np.save(folder / "anchors.npy", np.load(folder / "anchors.npy")[::-1])
    stops(1, f"{OUTLIERS} --dir run", r"anchors\.npy .*run train_text_encoder\.py")
    options = "--method dream --init ce --arch resnet18"
    stops(1, f"{CLASSIFIER} --dir run {options}", r"_ce\.pt .*--arch")
    content = torch.load(folder / "classifier_ce.pt", weights_only=True)
    torch.save(content | {"digest": [0]}, folder / "classifier_ce.pt")
    stops(1, f"{EVALUATE} --dir run", r"classifier_ce\.pt .*run train_classifier\.py")
    for path in folder.glob("classifier_*.pt"):
        path.unlink()
    stops(1, f"{EVALUATE} --dir run", r"classifier_\*\.pt; run train_classifier\.py")


def test_unfinished_work_of_other_options(folder, stops):
    (folder / ".partial.outliers").mkdir()
    (folder / ".partial.outliers" / "options.json").write_text("{}")
    stops(1, f"{OUTLIERS} --dir run", r"\.partial\.outliers.* other options.*--restart")
    path = folder / ".checkpoint.encoder.pt"
    torch.save({"options": {"seed": 4}, "step": 1, "parts": {}}, path)
    stops(1, f"{ENCODER} --dir run", r"\.checkpoint\.encoder\.pt has seed 4, not 0.*--restart")
    damage(path, "cut")
    stops(1, f"{ENCODER} --dir run", r"\.checkpoint\.encoder\.pt .*--restart")


SETS = ["nosuch", "no.npy", "digits:0-10", "digits:a", "digits:9-8", "patches:0"]


@pytest.mark.parametrize("data", SETS)
def test_data_sets(folder, stops, data):
    stops(1, f"{SCAN} --dir new --data {data}", f"^{data}.*(cannot be read|class)")
    stops(1, f"{EVALUATE} --dir run --ood-data {data}", f"^{data}.*(cannot be read|give classes)")


def test_other_data(folder, stops):
    stops(1, f"{SCAN} --dir run --data digits:0-3", "holds digits:0-2.* --dir for digits:0-3")
    stops(1, f"{EVALUATE} --dir run --ood-data digits:2-4", "digits:2-4 overlaps .*digits:0-2")


@pytest.mark.parametrize("how", ["cut", "16 bits"])
def test_pictures(folder, stops, tmp_path, how):
    for name in ("train/a/1.png", "test/a/1.png", "test/a/2.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (90, 80), (1, 2, 3)).save(path)
    if how == "cut":
        damage(path, how)
    else:
        Image.fromarray(np.full((90, 80), 999, np.uint16)).save(path)
    stops(1, f"{SCAN} --dir new --data photos", r"photos/test/a/2\.png is no picture")
    stops(1, f"{EVALUATE} --dir run --ood-data photos", r"photos/test/a/2\.png is no picture")


def test_arrays_brought_by_hand(folder, stops):
    mine = folder.parent / "mine"
    mine.mkdir()
    for name in ("train", "train.labels"):
        shutil.copy(folder / f"{name}.npy", mine)
    stops(1, f"{SCAN} --dir mine", r"mine/test\.npy")
    shutil.copy(folder / "test.npy", mine)
    stops(1, f"{SCAN} --dir mine", "mine.* same classes")


def test_disk_is_full(folder, stops, load, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(load(SCAN), "write_images", full)
    (folder / "train.npy").unlink()  # as after a kill: stored again, labels kept until then
    stops(1, f"{SCAN} --dir run --data digits:0-2", "No space left on device")


def test_score_files(stops, tmp_path):
    (tmp_path / "ood").mkdir()
    for how in ("missing", "none", "cut", "axis", "object", "nan", "inf"):
        for name in ("id.npy", "bad.npy", "ood/id.npy"):
            np.save(tmp_path / name, np.arange(5.0))
        damage(tmp_path / "bad.npy", how)
        stops(1, f"{EVALUATE} --dir new --scores id.npy bad.npy", r"^bad\.npy ")
        stops(1, f"{EVALUATE} --dir new --scores bad.npy id.npy", r"^bad\.npy ")
    stops(2, f"{EVALUATE} --dir new --scores id.npy", "--scores takes two")
    stops(2, f"{EVALUATE} --dir new --scores id.npy ood/id.npy", "--scores")


OPTIONS = {  # by exit status
    2: {
        f"{SD} --S 5 --steps 6": "--S is at least --steps",
        f"{SD} --S 1000": "below 1000",
        f"{SD} --sampler ddim": "'ddim'.*dpmpp",
        f"{OUTLIERS} --keep 17": "--keep <= --candidates",
        f"{OUTLIERS} --draw 7": "--draw <= --boundary",
        f"{OUTLIERS} --guidance 0.9": "--guidance >= 1",
        f"{CLASSIFIER} --method ce odin": "'odin'.*dream",
        f"{EVALUATE} --bootstrap 0": "--bootstrap",
        f"{EVALUATE} --k two": "--k: invalid int value: 'two'",
        f"{SCAN} --until never": "'never'.*labels",
        f"{ENCODER} --nosuch 1": "--nosuch",
        f"{ENCODER} --device {'mps' if torch.cuda.is_available() else 'cuda'}": "--device.*cpu",
        **{f"{script} --recipe nosuch": "'nosuch'.*digits" for script in SMALL},
    },
    1: {
        f"{OUTLIERS} --K 200": "id_labels.npy has too few images.*--K 200",
        f"{SCAN} --clusters 4": "3 classes; give --clusters with --labels scan",
        f"{CLASSIFIER} --method ce --arch vit:no/folder": "vit:no/folder gives no vision model",
        f"{CLASSIFIER} --method ce --arch nosuch": "nosuch",
        f"{ENCODER} --lr 1e30": "encoder: the loss is nan at .*; lower the learning rate",
    },
}


@pytest.mark.parametrize("status", OPTIONS)
def test_options(folder, stops, status):
    for command, pattern in OPTIONS[status].items():
        stops(status, f"{command} --dir run", pattern)


def test_a_real_process(tmp_path, run):
    done = run(SD, cwd=tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert list(tmp_path.iterdir()) == []
