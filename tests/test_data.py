"""Data sets: every form, on tiny ones in their original layouts; published hyper-parameters."""

import argparse
import gc
import json
import os
import pickle
import shutil
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from sklearn.datasets import load_digits, load_sample_images

SCAN = "train_scan_diffusion"
PUBLISHED = {  # script and column: figures of the papers
    "train_scan_diffusion cifar10": "tau=0.1 pretext_epochs=500 pretext_batch=512 pretext_lr=0.4 "
    "K=20 lambda_e=5.0 scan_epochs=50 scan_batch=128 scan_lr=0.0001 selflabel_lr=0.0001 area=0.2 "
    "selflabel_batch=1000 selflabel_epochs=200 confidence=0.99 operations=4 p_drop=0.1 lr=0.0002 "
    "arch=resnet18 channels=128,256,256,256 layers=2 attention=16 dropout=0.1 image_size=32",
    "train_text_encoder cifar100": "arch=resnet34 t=0.1 lr=0.1 weight_decay=0.0005 epochs=200 "
    "batch_size=256 crop=0 area=1.0 shift=4 flip=1 multi_token=first",
    "train_text_encoder imagenet100": "arch=resnet34 t=0.1 lr=0.1 epochs=100 batch_size=160",
    "sample_outliers cifar100": "K=300 boundary=50 draw=50 candidates=1500 keep=2 sigma=0.07",
    "sample_outliers imagenet100": "K=300 boundary=200 draw=50 candidates=1500 keep=2 sigma=0.03 "
    "inlier_sigma=0.01 per_class=1000 scheduler=pndm steps=50 guidance=7.5",
    "sample_sd_outliers cifar10": "S=100 w=2.0",
    "train_classifier cifar100": "beta=2.5 phi_hidden=0 init=random dream_epochs=200 dream_lr=0.1 "
    "arch=resnet34 dream_batch_size=256 weight_decay=0.0005 momentum=0.9 schedule=cosine",
    "train_classifier imagenet100": "beta=1.0 phi_hidden=512 init=ce dream_epochs=20 lr=0.1 "
    "dream_batch_size=80 dream_lr=0.001 epochs=100 batch_size=160 inlier_batch=256 crop=224",
    "train_classifier cifar10": "sd_arch=vit:google/vit-base-patch16-224-in21k freeze_blocks=6 "
    "lam=0.5 sd_lr=0.0004 sd_weight_decay=5e-05 sd_momentum=0.0 sd_batch_size=8",
    "evaluate cifar10": "k=2",
}
COMMANDS = [  # words, recipe in data.json, then what is in force: recipe, image size
    ("", None, "digits", 8),
    ("--data=data/imagenet100:0-9", None, "imagenet100", 256),
    ("--data cifar100 --image-size 16", None, "cifar100", 16),
    ("--recipe imagenet100 --data cifar10", None, "imagenet100", 256),
    ("", "cifar100", "cifar100", 32),
    ("--recipe cifar10", "imagenet100", "cifar10", 32),
]


def parse(load, patch, script, words):
    patch.setattr("sys.argv", [script, *words.split()])
    return load(script).parse_args()


@pytest.mark.parametrize("place", PUBLISHED)
def test_published_figures(load, monkeypatch, place):
    script, column = place.split()
    args = parse(load, monkeypatch, script, f"--recipe {column}")
    assert {f"{name}={value}" for name, value in vars(args).items()} >= {*PUBLISHED[place].split()}


@pytest.mark.parametrize(("words", "held", "recipe", "size"), COMMANDS)
def test_which_recipe(load, tmp_path, monkeypatch, words, held, recipe, size):
    if held:
        (tmp_path / "data.json").write_text(json.dumps({"recipe": held, "data": "mine"}))
    args = parse(load, monkeypatch, SCAN, f"--dir {tmp_path} {words}")
    assert (args.recipe, args.image_size) == (recipe, size)
    assert args.data == "mine" if held else args.data in (words or "digits:0-5")
    later = parse(load, monkeypatch, "sample_sd_outliers", f"--dir {tmp_path}")
    assert later.recipe == (held or "digits")


@pytest.fixture(params=[SCAN])
def script(load, request, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", None)  # no network
    return load(request.param)


def options(data, folder, size=8):
    place = {"dir": folder / "run", "data": str(data), "data_root": str(folder), "rank": 0}
    return argparse.Namespace(**place, recipe="digits", image_size=size)


def read(script, spec, folder, split="test", size=8):
    """Images of a data set as they are stored, labels, class names."""
    args = options(spec, folder, size)
    dataset, labels, names = script.read_dataset(str(spec), split, args)
    script.decode(dataset, folder / "read.npy", size)
    return np.load(folder / "read.npy"), labels, names


def prepare(script, data, folder, size=8):
    """data.json and every array of folder/run, by name."""
    description = script.prepare_data(options(data, folder, size))
    return description, {path.stem: np.load(path) for path in (folder / "run").glob("*.npy")}


def one_line(say, function, *args):
    """function(*args) ends its script with one line that contains `say`."""
    with pytest.raises(SystemExit) as end:
        function(*args)
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    assert str(say) in end.value.code


def pixels(count, side, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def write_pictures(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.png")


def test_digits_and_patches(script, tmp_path):
    images, labels, names = read(script, "digits:0-5", tmp_path)
    digits = load_digits()
    keep = digits.target < 6
    levels = [round(x * 255 / 16) for x in digits.images[keep].flat]  # 17 of them
    assert all(images[..., c].ravel().tolist() == levels for c in range(3))
    assert labels.tolist() == digits.target[keep].tolist() and names == list("012345")
    images, labels, names = read(script, "patches", tmp_path, size=32)
    photos = load_sample_images().images
    assert images.shape == (520, 32, 32, 3) and labels is None and names == []
    assert np.array_equal(images[[0, 283]], [photos[0][:32, :32], photos[1][32:64, 96:128]])


@pytest.mark.parametrize("data", ["digits:0-2", "patches"])
def test_every_fifth_image_of_a_class_is_for_testing(script, tmp_path, data):
    images, labels, names = read(script, data, tmp_path)
    description, files = prepare(script, data, tmp_path)
    y = np.zeros(520, int) if labels is None else labels
    place = np.array([(y[:i] == y[i]).sum() for i in range(len(y))])  # within its class
    for part, rows in (("test", place % 5 == 4), ("train", place % 5 != 4)):
        assert np.array_equal(files[part], images[rows]) and description[part] == rows.sum()
        assert names == [] or np.array_equal(files[f"{part}.labels"], y[rows])
    assert len(files) == (4 if names else 2) and description["classes"] == names
    keys = ["classes", "data", "digest", "image_size", "recipe", "test", "train"]
    assert sorted(description) == keys and description["recipe"] == "digits"


@pytest.mark.parametrize(
    ("spec", "classes"),
    [("0-5", "012345"), ("0,3,7", "037"), ("0,1,4-6", "01456"), ("7,3", "37"), ("0-3,2", "0123")],
)
def test_class_grammar(script, tmp_path, spec, classes):
    images, labels, names = read(script, f"digits:{spec}", tmp_path)
    everything, target, _ = read(script, "digits", tmp_path)
    rows = [str(c) in classes for c in target]
    assert names == list(classes) and np.array_equal(images, everything[rows])
    assert labels.tolist() == [classes.index(str(c)) for c in target[rows]]


def test_what_is_not_there_is_one_line(script, tmp_path):
    for classes in ("x", "10", "8-10", "1.5", "-3", "5-0", "0--2", "99999999999999"):
        one_line(f"digits:{classes}", read, script, f"digits:{classes}", tmp_path)
    for spec in ("patches:0", "nothing", "nothing.npy", "cifar10", "textures", "places365"):
        one_line(spec, read, script, spec, tmp_path)


def make_cifar100(root):
    folder = root / "cifar-100-python"
    folder.mkdir()
    names = [f"thing{c:02}" for c in range(100)]
    made = {}
    for i, split in enumerate(("train", "test")):
        images = pixels(200, 32, i)
        made[split] = images, [*range(100)] * 2
        planes = images.transpose(0, 3, 1, 2).reshape(200, -1)
        content = {"data": planes, "fine_labels": made[split][1]}
        (folder / split).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    return made, names


def make_svhn(root):
    labels = np.arange(20) % 10
    y = np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)
    made = {"train": (pixels(20, 32, 0), labels), "test": (pixels(20, 32, 1), labels)}
    for split, (images, _) in made.items():
        savemat(root / f"{split}_32x32.mat", {"X": images.transpose(1, 2, 3, 0), "y": y})
    return made, list("0123456789")


@pytest.mark.parametrize("script", [SCAN, "evaluate"], indirect=True)
@pytest.mark.parametrize("maker", [make_cifar100, make_svhn])
def test_torchvision_sets_without_a_network(script, tmp_path, monkeypatch, maker):
    name = maker.__name__.removeprefix("make_")
    made, classes = maker(tmp_path)
    for module in ("utils", "cifar", "svhn"):
        path = f"torchvision.datasets.{module}.check_integrity"
        monkeypatch.setattr(path, lambda path, *_: Path(path).exists())
    for split, (images, labels) in made.items():
        got, y, names = read(script, name, tmp_path, split, 32)
        assert np.array_equal(got, images) and np.array_equal(y, labels) and names == classes


def make_folder(root, side=12):
    for part in ("train", "test"):
        for i, name in enumerate(("cat", "dog")):
            write_pictures(root / part / name, pixels(3, side, i + 2 * (part == "test")))
    return root


@pytest.mark.parametrize("side", [12, 256])
def test_class_folders_are_stored_bit_for_bit(script, tmp_path, side):
    folder = make_folder(tmp_path / "set", side)
    description, _ = prepare(script, folder, tmp_path, side)
    for i, part in enumerate(("train", "test")):
        images, labels = script.load_split(part, description, options(folder, tmp_path))
        assert np.array_equal(images, [*pixels(3, side, 2 * i), *pixels(3, side, 2 * i + 1)])
        assert labels.tolist() == [0, 0, 0, 1, 1, 1] and description["classes"] == ["cat", "dog"]
    (folder / "test" / "dog").rename(folder / "test" / "wolf")
    one_line("the same classes", prepare, script, folder, tmp_path / "other", side)
    shutil.rmtree(folder / "test")  # else it would be tested on what it was trained on
    one_line("the same classes", prepare, script, folder, tmp_path / "other", side)


def test_pictures_of_every_size_and_mode(script, tmp_path):
    """The short side is resized, the centre square kept; all become RGB."""
    for turn in (0, 1):
        picture = np.rot90(pixels(1, 64)[0][:32], turn)
        write_pictures(tmp_path / f"set{turn}" / "any", [picture])
        resized = Image.fromarray(picture).resize((16, 32) if turn else (32, 16), Image.BILINEAR)
        for size, whole in ((16, np.asarray(resized)), (32, picture)):
            centre = np.rot90(np.rot90(whole, -turn)[:, size // 2 :][:, :size], turn)
            (stored,), _, _ = read(script, tmp_path / f"set{turn}", tmp_path, size=size)
            assert np.array_equal(stored, centre)
    grey = pixels(1, 8)[0][..., 0]
    colours = np.dstack([grey, 255 - grey, grey // 2])
    arrays = grey, np.dstack([grey, grey]), np.dstack([colours, grey]), grey > 127
    write_pictures(tmp_path / "modes" / "any", arrays)
    flat = np.full((8, 8, 3), (200, 30, 60), np.uint8)
    Image.fromarray(flat).convert("CMYK").save(tmp_path / "modes" / "any" / "4.jpg", quality=100)
    images, _, _ = read(script, tmp_path / "modes", tmp_path)
    expected = [grey, grey, colours, np.where(grey > 127, 255, 0)]
    assert all((image.T == x.T).all() for image, x in zip(images, expected, strict=False))
    assert np.abs(images[4].astype(int) - flat).max() < 8


@pytest.mark.parametrize("case", ["uint16", "float32", "cut PNG", "cut JPEG", "text", ""])
def test_bad_pictures_are_one_line(script, tmp_path, monkeypatch, case):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    path = make_folder(tmp_path / "set") / "train" / "cat" / "1.png"
    image = pixels(1, 200)[0]
    if "cut" in case:
        Image.fromarray(image).save(path, case.split()[1])
        path.write_bytes(path.read_bytes()[:9000])
    elif case in ("uint16", "float32"):
        Image.fromarray(image[..., 0].astype(case)).save(path, "TIFF")
    else:
        path.write_text(case)
    one_line(path, prepare, script, tmp_path / "set", tmp_path, 12 if case else 80)
    assert not (tmp_path / "run" / "train.npy").exists()
    gc.collect()  # above 64 px the loader has processes, which end now


FORMS = [("arrays", True), ("arrays:1-2", True), ("arrays/train.npy", True), ("run", True)]
FORMS += [("arrays/train.npy", False), ("arrays/train.npy:1-2", True), ("run", False)]


@pytest.mark.parametrize(("place", "labels"), FORMS)
def test_arrays(script, tmp_path, place, labels):
    """A folder of arrays, one file (every fifth of a class is for testing), or put into --dir."""
    by_hand = place == "run"
    folder = tmp_path / ("run" if by_hand else "arrays")
    folder.mkdir()
    parts = {"train": pixels(15, 12), "test": pixels(6, 12, 1)}
    for part, images in parts.items():
        np.save(folder / f"{part}.npy", images)
        if labels:
            np.save(folder / f"{part}.labels.npy", np.arange(len(images)) % 3)
            (folder / "classes.txt").write_text("cat\ndog\neel\n")
    if "npy" in place:
        rows = np.arange(15) >= 12 if labels else np.arange(15) % 5 == 4
        parts = {"train": parts["train"][~rows], "test": parts["train"][rows]}
    for size in (8 if by_hand else 12, 8):  # the second time everything is there
        args = options("arrays" if by_hand else tmp_path / place, tmp_path, size)
        description = script.prepare_data(args)
        assert args.image_size == description["image_size"] == 12
    first = 1 if ":" in place else 0
    assert description["classes"] == (["cat", "dog", "eel"][first:] if labels else [])
    for part, images in parts.items():
        y = np.arange(len(images)) % 3
        got, got_labels = script.load_split(part, description, args)
        assert np.array_equal(got, images[y >= first]) and description[part] == len(got)
        assert got_labels is None or np.array_equal(got_labels, y[y >= first] - first)
    one_line("choose another --dir", prepare, script, "digits:0-5", tmp_path)


@pytest.mark.parametrize("moment", ["test.labels", "train.labels", "data", "test", "train"])
def test_an_interrupted_first_step_begins_anew(script, tmp_path, monkeypatch, moment):
    real = os.replace

    def replace(source, target):
        if target.stem == moment:
            raise KeyboardInterrupt
        real(source, target)

    _, undisturbed = prepare(script, "digits:0-2", tmp_path / "clean")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", replace)
        prepare(script, "digits:0-2", tmp_path)
    _, files = prepare(script, "digits:0-2", tmp_path)
    assert files.keys() == undisturbed.keys()
    assert all(np.array_equal(files[name], undisturbed[name]) for name in undisturbed)
