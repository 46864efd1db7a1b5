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
    return shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("scores"))


@pytest.fixture
def stops(main, tmp_path, monkeypatch, capfd):
    """stops(status, command, pattern): so a script ends on --dir run, the pattern in its one line.

    Progress bars are no line. Old files stay; new ones are unfinished by name, scores, or ID data.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.StreamHandler, "emit", lambda *_: None)  # of libraries

    def stops(status, command, pattern):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
        script, *options = command.split()
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main(script, "--dir", "run", *SMALL[script].split(), *options)
        code = end.value.code
        error = capfd.readouterr().err + (f"\n{code}" if isinstance(code, str) else "")
        lines = re.findall(r"^(?!.*(?:it/s|s/it)).*\S.*$", error.replace("\r", "\n"), re.M)
        assert len(lines) == 1, error
        assert re.search(pattern, lines[0]), f"{pattern} is not in: {lines[0]}"
        assert (1 if isinstance(code, str) else code) == status
        for path, data in before.items():
            assert path.read_bytes() == data
        new = [str(path) for path in tmp_path.rglob("*.*") if path not in before]
        known = r"/\.partial|/\.job|/scores/|/data\.json$|/(train|test)(\.labels)?\.npy$"
        assert [path for path in new if not re.search(known, path)] == []

    return stops


def test_load_array(load, tmp_path):
    path = tmp_path / "a.npy"
    floats = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.save(path, floats)
    assert np.array_equal(load(EVALUATE).load_array(path, (4, None), np.float32, ""), floats)
    pattern = rf"{re.escape(str(path))} .*; run make.py( again)?"
    cases = [(floats, how) for how in ["missing", *BYTES, *ARRAY] if how != "negative"]
    for array, how in [*cases, (floats.astype(int), "none"), (floats.astype(int), "negative")]:
        np.save(path, array)
        damage(path, how)
        with pytest.raises(SystemExit) as end:
            load(EVALUATE).load_array(path, (4, 3), array.dtype, "make.py")
        assert re.fullmatch(pattern, end.value.code), how


ARRAYS = {
    SCAN: "train:cut test:length train.labels:negative test.labels:missing pseudo_labels:cut",
    ENCODER: "train:type test:missing pseudo_labels:negative test_pseudo_labels:length",
    OUTLIERS: "anchors:nan id_embeddings:width id_labels:length train:axis",
    SD: "train:object pseudo_labels:type",
    f"{SD} --split test": "test:empty test_pseudo_labels:length",
    f"{CLASSIFIER} --method ce": "train:archive train.labels:length",
    f"{CLASSIFIER} --method ce --labels pseudo": "pseudo_labels:missing",
    f"{CLASSIFIER} --method dream-id": "inliers:width inlier_labels:length id_labels:missing",
    f"{CLASSIFIER} --method ce dream sd": "outliers:missing sd_outliers:type",
    EVALUATE: "train:cut test:missing test.labels:length outliers:axis sd_outliers:axis",
    f"{EVALUATE} --seed 1": "sd_reconstructions_test:type",
}
CASES = [(command, *case.split(":")) for command in ARRAYS for case in ARRAYS[command].split()]


@pytest.mark.parametrize(("command", "name", "how"), CASES)
def test_arrays(folder, stops, command, name, how):
    damage(folder / f"{name}.npy", how)
    stops(1, command, rf"run/{re.escape(name)}\.npy .*run .*(\.py|script)")


@pytest.mark.parametrize(
    ("command", "name", "how", "pattern"),
    [
        (f"{SCAN} --labels scan", "scan.pt", "cut", r"scan\.pt .*delete"),
        (ENCODER, "diffusion/unet/config.json", "empty", "run/diffusion .*run train_scan"),
        (OUTLIERS, "diffusion/unet/config.json", "missing", "run/diffusion .*run train_scan"),
        (SD, "diffusion/unet/*.safetensors", "cut", "run/diffusion .*run train_scan"),
        (f"{CLASSIFIER} --method frozen", "scan.pt", "empty", r"scan\.pt .*run train_scan"),
        (f"{CLASSIFIER} --method dream", "classifier_ce.pt", "cut", "ce.pt .*--method"),
        (f"{CLASSIFIER} --method sd", "sd_outliers.csv", "missing", r"\.csv .*run sample_sd"),
        (EVALUATE, "sd_outliers.csv", "missing", r"\.csv .*run sample_sd"),
        (EVALUATE, "classifier_ce.pt", "cut", r"_ce\.pt .*run train_classifier"),
    ],
)
def test_other_files(folder, stops, command, name, how, pattern):
    (path,) = folder.glob(name)
    damage(path, how)
    stops(1, command, pattern)


def test_files_of_another_run(folder, stops):
    labels = np.load(folder / "pseudo_labels.npy")
    np.save(folder / "pseudo_labels.npy", labels + 1)
    stops(1, ENCODER, r"pseudo_labels\.npy .* 3 classes")
    stops(1, SD, r"labels up to 3 .* 3 classes; run train_scan_diffusion\.py")
    np.save(folder / "id_labels.npy", labels + 1)
    stops(1, OUTLIERS, r"id_labels\.npy .* 3 classes")
    np.save(folder / "id_labels.npy", labels)
    np.save(folder / "anchors.npy", np.load(folder / "anchors.npy")[::-1])
    stops(1, OUTLIERS, r"anchors\.npy .*run train_text_encoder\.py")
    stops(
        1,
        f"{CLASSIFIER} --method dream --filter none --init ce --arch resnet18",
        r"_ce\.pt .*--arch",
    )
    content = torch.load(folder / "classifier_ce.pt", weights_only=True)
    torch.save(content | {"digest": [0]}, folder / "classifier_ce.pt")
    stops(1, EVALUATE, r"classifier_ce\.pt .*run train_classifier\.py")
    for path in folder.glob("classifier_*.pt"):
        path.unlink()
    stops(1, EVALUATE, r"classifier_\*\.pt; run train_classifier\.py")


def test_unfinished_training_of_other_options(folder, stops):
    path = folder / ".checkpoint.encoder.pt"
    torch.save({"options": {"seed": 4}, "step": 1, "parts": {}}, path)
    stops(1, ENCODER, r"\.checkpoint\.encoder\.pt has seed 4, not 0.*--restart")
    damage(path, "cut")
    stops(1, ENCODER, r"\.checkpoint\.encoder\.pt .*--restart")


def test_pictures(folder, stops, tmp_path):
    for name in ("train/a/1.png", "test/a/1.png", "test/a/2.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (90, 80), (1, 2, 3)).save(path)
    damage(path, "cut")
    stops(1, f"{SCAN} --dir new --data photos", r"photos/test/a/2\.png is no picture")
    Image.fromarray(np.full((90, 80), 999, np.uint16)).save(path)
    stops(1, f"{EVALUATE} --ood-data photos", r"photos/test/a/2\.png is no picture")


def test_arrays_brought_by_hand(folder, stops):
    (folder / "data.json").unlink()
    kept = (folder / "test.npy").rename(folder / "kept.npy")
    stops(1, SCAN, r"run/test\.npy")
    kept.rename(folder / "test.npy")
    (folder / "test.labels.npy").unlink()
    stops(1, SCAN, r"run/test\.labels\.npy|same classes")


def test_files_that_cannot_be_written(folder, stops):
    (folder / "train.npy").unlink()  # as after a kill: the data set is stored again
    (folder / ".partial.test.npy").mkdir()
    stops(1, f"{SCAN} --data digits:0-2", r"\.partial\.test\.npy")


def test_score_files(stops, tmp_path):
    for how in ("missing", "none", "cut", "axis", "object", "nan", "inf"):
        for name in ("id.npy", "bad.npy"):
            np.save(tmp_path / name, np.arange(5.0))
        damage(tmp_path / "bad.npy", how)
        stops(1, f"{EVALUATE} --dir new --scores id.npy bad.npy", r"^bad\.npy ")
    stops(2, f"{EVALUATE} --dir new --scores id.npy", "--scores takes two")


USAGE = {
    f"{SD} --S 5 --steps 6": "--S is at least --steps",
    f"{SD} --S 1000": "below 1000",
    f"{SD} --sampler ddim": "'ddim'.*dpmpp",
    f"{OUTLIERS} --keep 17": "--keep <= --candidates",
    f"{OUTLIERS} --draw 7": "--draw <= --boundary",
    f"{OUTLIERS} --guidance 0.9": "--guidance >= 1",
    f"{CLASSIFIER} --method ce odin": "'odin'.*dream",
    f"{EVALUATE} --bootstrap 0": "--bootstrap",
    f"{ENCODER} --nosuch 1": "--nosuch",
    f"{ENCODER} --device {'mps' if torch.cuda.is_available() else 'cuda'}": "--device.*cpu",
    **{f"{script} --recipe nosuch": "'nosuch'.*digits" for script in SMALL},
}
VALUES = {
    f"{OUTLIERS} --K 200": "id_labels.npy has too few images.*--K 200",
    f"{SCAN} --clusters 4": "3 classes; give --clusters with --labels scan",
    f"{CLASSIFIER} --method ce --arch nosuch": "nosuch",
    f"{CLASSIFIER} --method ce --arch vit:no/folder": "vit:no/folder gives no vision model",
    f"{ENCODER} --lr 1e30": "encoder: the loss is nan at .*; lower the learning rate",
    **{f"{script} --diffusion no/id": "n in no/id .*--diff" for script in (ENCODER, OUTLIERS, SD)},
    f"{SCAN} --data digits:0-3": "run holds digits:0-2.* --dir for digits:0-3",
    f"{EVALUATE} --ood-data digits:2-4": "digits:2-4 overlaps .*digits:0-2",
    f"{SCAN} --dir one --data digits:0": "1 classes; give --clusters",
    f"{ENCODER} --dir new": r"new/diffusion .*run train_scan_diffusion\.py",
    f"{OUTLIERS} --dir new": r"new/anchors\.npy .*run train_text_encoder\.py",
    f"{SD} --dir new": r"new/diffusion .*run train_scan_diffusion\.py",
    f"{CLASSIFIER} --dir new": r"new/train\.npy .*run train_scan_diffusion\.py",
    f"{EVALUATE} --dir new": r"new/train\.npy .*run train_scan_diffusion\.py",
}


def test_options(folder, stops):
    for command, pattern in USAGE.items():
        stops(2, command, rf"^{command.split()[0]}\.py: error: .*{pattern}")
    for command, pattern in VALUES.items():
        stops(1, command, pattern)


def test_data_sets(folder, stops):
    for data in ("nosuch", "no.npy", "digits:0-10", "digits:a", "patches:0", "digits:9-8"):
        stops(1, f"{SCAN} --dir new --data {data}", f"^{data}.*(cannot be read|class)")
        stops(1, f"{EVALUATE} --ood-data {data}", f"^{data}.*(cannot be read|give classes)")


def test_a_real_process(tmp_path, run):
    done = run(SD, cwd=tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert list(tmp_path.iterdir()) == []
