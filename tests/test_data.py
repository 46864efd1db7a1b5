"""Data sets: every form on tiny ones in their original layouts; bad input gives one line and leaves nothing behind."""

import argparse
import gzip
import hashlib
import itertools
import json
import pickle
import struct
import tracemalloc
import urllib.request
import zlib
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

SCAN, ENCODER, EVALUATE = "train_scan_diffusion", "train_text_encoder", "evaluate"
READERS = [SCAN, ENCODER, EVALUATE]
rng = np.random.default_rng


@pytest.fixture(params=READERS)
def reader(request, load):
    """Each script that reads data sets, as a module."""
    return load(request.param)


@pytest.fixture(params=[SCAN, ENCODER])
def first(request, load):
    """Each script that stores the ID data."""
    return load(request.param)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*_, **__):
        raise URLError("no network here")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture
def one_line(capfd):
    """one_line(function, *args, say=(), status=1): it ends the script with one line that says each of `say`."""

    def one_line(function, *args, say=(), status=1):
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            function(*args)
        lines = [line for line in capfd.readouterr().err.replace("\r", "\n").split("\n") if line and "it/s" not in line]
        lines = [line for line in lines if "%|" not in line]
        assert len(lines) == 1 and end.value.code == status, lines
        for text in say:
            assert str(text) in lines[0], lines[0]

    return one_line


def prepare(script, folder, data, size=8, root="data"):
    args = argparse.Namespace(dir=folder, data=str(data), image_size=size, device="cpu", data_root=str(root))
    return script.prepare_data(args)


def pixels(count, side, seed=0):
    return rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def write_pictures(folder, images, suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03}.{suffix}")


# torchvision's sets in their original layouts. Each maker returns {split: (images at their own size, labels)}, names.


def md5(path):
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def make_cifar(root, patch, kind, folder, key, files, meta, names):
    (root / folder).mkdir(parents=True)
    made = {"train": [], "test": []}
    for number, (file, split) in enumerate(files):
        images, labels = pixels(len(names) * 2, 32, number), [*range(len(names))] * 2
        flat = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        (root / folder / file).write_bytes(pickle.dumps({"data": flat, key: labels}))
        made[split].append((images, np.array(labels)))
    (root / folder / meta[0]).write_bytes(pickle.dumps({meta[1]: names}))
    for split in made:
        patch.setattr(kind, f"{split}_list", [[f, md5(root / folder / f)] for f, s in files if s == split])
    patch.setattr(kind, "meta", {"filename": meta[0], "key": meta[1], "md5": md5(root / folder / meta[0])})
    return {s: tuple(np.concatenate(part) for part in zip(*made[s], strict=True)) for s in made}, names


def make_cifar10(root, patch):
    files = [(f"data_batch_{i}", "train") for i in range(1, 6)] + [("test_batch", "test")]
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    meta = "batches.meta", "label_names"
    return make_cifar(root, patch, datasets.CIFAR10, "cifar-10-batches-py", "labels", files, meta, names)


def make_cifar100(root, patch):
    files, names = [("train", "train"), ("test", "test")], [f"class{i:02}" for i in range(100)]
    meta = "meta", "fine_label_names"
    return make_cifar(root, patch, datasets.CIFAR100, "cifar-100-python", "fine_labels", files, meta, names)


def make_svhn(root, patch):
    root.mkdir(parents=True)
    made, listed = {}, dict(datasets.SVHN.split_list)
    for number, split in enumerate(("train", "test")):
        images, labels = pixels(20, 32, number), np.arange(20) % 10
        file = root / f"{split}_32x32.mat"
        savemat(file, {"X": images.transpose(1, 2, 3, 0), "y": np.where(labels, labels, 10)[:, None].astype(np.uint8)})
        listed[split] = [listed[split][0], file.name, md5(file)]
        made[split] = images, labels
    patch.setattr(datasets.SVHN, "split_list", listed)
    return made, list("0123456789")


def make_textures(root, patch):
    base, names, made, everything = root / "dtd" / "dtd", ["banded", "woven"], {}, []
    (base / "labels").mkdir(parents=True)
    for number, split in enumerate(("train", "val", "test")):
        images, lines = pixels(4, 40, number), []
        for i, image in enumerate(images):
            name = names[i % 2]
            (base / "images" / name).mkdir(parents=True, exist_ok=True)
            lines.append(f"{name}/{name}_{split}{i}.png")  # lossless, so that pixels can be compared
            Image.fromarray(image).save(base / "images" / lines[-1])
        (base / "labels" / f"{split}1.txt").write_text("\n".join(lines) + "\n")
        made[split] = images, np.arange(4) % 2
        everything.append(made[split])
    made["ood"] = tuple(np.concatenate(part) for part in zip(*everything, strict=True))
    made["train"] = tuple(np.concatenate(part) for part in zip(*everything[:2], strict=True))
    return made, names


def make_places365(root, patch):
    root.mkdir(parents=True)
    names, made, lists = ["/a/airfield", "/y/yard"], {}, {}
    (root / "categories_places365.txt").write_text("".join(f"{n} {i}\n" for i, n in enumerate(names)))
    for number, (part, listed, split) in enumerate(
        [("train-standard", "data_256_standard", "train"), ("val", "val_256", "test")]
    ):
        images = pixels(6, 36, number)
        write_pictures(root / listed, images)
        lines = [f"{'/' if split == 'train' else ''}{i:03}.png {i % 2}\n" for i in range(6)]
        file = root / f"places365_{part.replace('-', '_')}.txt"
        file.write_text("".join(lines))
        lists[part] = file.name, md5(file)
        made[split] = images, np.arange(6) % 2
    patch.setattr(datasets.Places365, "_FILE_LIST_META", lists)
    categories = "categories_places365.txt"
    patch.setattr(datasets.Places365, "_CATEGORIES_META", (categories, md5(root / categories)))
    return made, names


def make_idx(root, kind, names):
    raw, made = root / kind / "raw", {}
    raw.mkdir(parents=True)
    for number, (split, prefix) in enumerate((("train", "train"), ("test", "t10k"))):
        images, labels = pixels(20, 28, number)[..., 0], (np.arange(20) % 10).astype(np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 20, 28, 28) + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 20) + labels.tobytes())
        made[split] = images[..., None].repeat(3, axis=3), labels
    return made, names


def make_mnist(root, patch):
    return make_idx(root, "MNIST", datasets.MNIST.classes)


def make_fashion(root, patch):
    return make_idx(root, "FashionMNIST", datasets.FashionMNIST.classes)


def make_stl10(root, patch):
    folder, names, made = root / "stl10_binary", [f"thing{i}" for i in range(10)], {}
    folder.mkdir(parents=True)
    for number, split in enumerate(("train", "test")):
        images, labels = pixels(10, 96, number), np.arange(10)
        (folder / f"{split}_X.bin").write_bytes(images.transpose(0, 3, 2, 1).tobytes())  # columns first, as original
        (folder / f"{split}_y.bin").write_bytes((labels + 1).astype(np.uint8).tobytes())
        made[split] = images, labels
    (folder / "unlabeled_X.bin").write_bytes(b"")
    (folder / "class_names.txt").write_text("\n".join(names) + "\n")
    lists = {"train_list": ("train_X.bin", "train_y.bin", "unlabeled_X.bin"), "test_list": ("test_X.bin", "test_y.bin")}
    for key, files in lists.items():
        patch.setattr(datasets.STL10, key, [[file, md5(folder / file)] for file in files])
    return made, names


MAKERS = {
    "cifar10": make_cifar10,
    "cifar100": make_cifar100,
    "svhn": make_svhn,
    "textures": make_textures,
    "places365": make_places365,
    "fashion-mnist": make_fashion,
    "mnist": make_mnist,
    "stl10": make_stl10,
}


def test_every_set_of_the_table_is_tested(reader):
    assert set(reader.TORCHVISION) == set(MAKERS)


@pytest.mark.parametrize("name", MAKERS)
def test_torchvision_sets(reader, tmp_path, monkeypatch, name):
    root = tmp_path / "root"
    made, names = MAKERS[name](root, monkeypatch)
    side = made["train"][0].shape[1]
    for split, (images, labels) in (made | {"ood": made.get("ood", made["test"])}).items():
        if split != "val":
            got, y, classes = reader.read_images(name, split, side, str(root))
            assert got.dtype == np.uint8 and (np.array(got) == images).all(), split
            assert y.dtype == np.int64 and (y == labels).all() and classes == list(names)
    images, labels = made["test"]
    got, y, classes = reader.read_images(f"{name}:1", "test", side, str(root))
    assert (got == images[labels == 1]).all() and set(y) == {0} and classes == [names[1]]
    smaller = reader.read_images(name, "test", 16, str(root))[0]
    expected = Image.fromarray(images[0]).resize((16, 16), Image.Resampling.BILINEAR)
    assert (smaller[0] == np.asarray(expected)).all()


@pytest.mark.parametrize("name", MAKERS)
def test_no_network_and_nothing_on_disk(reader, tmp_path, one_line, name):
    files = reader.TORCHVISION[name].split(" ", 1)[1]
    one_line(reader.read_images, name, "ood", 32, str(tmp_path / "root"), say=[name, tmp_path / "root", "put", files])


def test_lists_of_places_without_pictures(reader, tmp_path, monkeypatch, one_line):
    make_places365(tmp_path / "root", monkeypatch)
    (tmp_path / "root" / "val_256").rename(tmp_path / "root" / "elsewhere")
    one_line(reader.read_images, "places365", "ood", 32, str(tmp_path / "root"), say=["places365", "val_256"])


def test_damaged_set(reader, tmp_path, monkeypatch, one_line):
    make_cifar10(tmp_path / "root", monkeypatch)
    file = tmp_path / "root" / "cifar-10-batches-py" / "data_batch_2"
    file.write_bytes(file.read_bytes()[:-9])
    one_line(reader.read_images, "cifar10", "train", 32, str(tmp_path / "root"), say=["cifar10", "cifar-10-batches-py"])


def test_download_where_there_is_a_network(reader, tmp_path, monkeypatch):
    """MNIST's four archives, answered by a stand-in for the network."""
    source = tmp_path / "source"
    made, _ = make_idx(source, "MNIST", datasets.MNIST.classes)
    archives, resources = {}, []
    for name, _ in datasets.MNIST.resources:
        file = tmp_path / name
        file.write_bytes(gzip.compress((source / "MNIST" / "raw" / name.removesuffix(".gz")).read_bytes()))
        archives[name] = file
        resources.append((name, md5(file)))
    monkeypatch.setattr(datasets.MNIST, "resources", resources)

    def answer(request, **_):
        url = request if isinstance(request, str) else request.full_url
        response = urllib.response.addinfourl(open(archives[url.split("/")[-1]], "rb"), {}, url, 200)
        response.length = None
        return response

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    images, labels, _ = reader.read_images("mnist", "test", 28, str(tmp_path / "root"))
    assert (images == made["test"][0]).all() and (labels == made["test"][1]).all()


@pytest.mark.parametrize("split", ["train", "test", "ood"])
def test_a_path_called_like_a_set_is_a_path(reader, tmp_path, split):
    arrays = tmp_path / "cifar10"
    arrays.mkdir()
    for part in ("train", "test"):
        np.save(arrays / f"{part}.npy", pixels(3, 8, part == "test"))
    assert (reader.read_images(str(arrays), split, 8)[0] == pixels(3, 8, split != "train")).all()


# Folders of pictures


def make_folder(root, halves=("train", "test"), classes=("cat", "dog"), count=3, side=12):
    made = {}
    for number, (half, name) in enumerate(itertools.product(halves, classes)):
        made[half, name] = pixels(count, side, number)
        write_pictures(root / half / name, made[half, name])
    return made


@pytest.mark.parametrize("test", ["test", "val"])
def test_divided_class_folders(reader, tmp_path, test):
    made = make_folder(tmp_path / "set", ("train", test))
    for litter in ("Thumbs.db", "desktop.ini", ".DS_Store"):
        (tmp_path / "set" / test / "cat" / litter).write_text("")
    for split, half in (("train", "train"), ("test", test), ("ood", test)):
        images, labels, names = reader.read_images(str(tmp_path / "set"), split, 12)
        assert (images == np.concatenate([made[half, "cat"], made[half, "dog"]])).all()
        assert labels.tolist() == [0, 0, 0, 1, 1, 1] and labels.dtype == np.int64 and names == ["cat", "dog"]
    images, labels, names = reader.read_images(f"{tmp_path / 'set'}:1", "test", 12)
    assert (images == made[test, "dog"]).all() and labels.tolist() == [0, 0, 0] and names == ["dog"]


def test_class_folders_alone(reader, tmp_path):
    made = make_folder(tmp_path / "set", [""], ["apple", "bus", "train"], 5)  # the last is a vehicle, no half
    train, y, names = reader.read_images(str(tmp_path / "set"), "train", 12)
    test, y_test, _ = reader.read_images(str(tmp_path / "set"), "test", 12)
    everything, _, _ = reader.read_images(str(tmp_path / "set"), "ood", 12)
    assert names == ["apple", "bus", "train"] and y.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and len(everything) == 15
    assert y_test.tolist() == [0, 1, 2] and (test == np.stack([made["", name][4] for name in names])).all()
    assert (train[:4] == made["", "apple"][:4]).all()


def test_flat_folder(reader, tmp_path):
    write_pictures(tmp_path / "flat", pixels(7, 12))
    images, labels, names = reader.read_images(str(tmp_path / "flat"), "ood", 12)
    assert (images == pixels(7, 12)).all() and labels is None and names is None


def test_short_side_and_centre(reader, tmp_path):
    image = pixels(1, 64)[0]
    write_pictures(tmp_path / "flat", [np.concatenate([image * 0, image, image * 0], axis=1)])
    (got,) = reader.read_images(str(tmp_path / "flat"), "ood", 64)[0]
    assert (got == image).all()


def test_modes_that_are_converted(reader, tmp_path):
    grey, alpha = pixels(1, 8)[0][..., 0], np.full((8, 8), 255, np.uint8)
    alpha[:4] = 0
    over_white = np.where(alpha, grey, 255)[..., None].repeat(3, axis=2)
    colours = np.dstack([grey, 255 - grey, grey // 2])
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.fromarray(grey).save(flat / "0.png")
    Image.fromarray(np.dstack([grey, alpha])).save(flat / "1.png")
    Image.fromarray(np.dstack([colours, alpha])).save(flat / "2.png")
    Image.fromarray(grey > 127).save(flat / "3.png")
    palette = Image.fromarray(grey % 16).convert("P")
    palette.putpalette(bytes(itertools.chain.from_iterable((i, 2 * i, 3 * i) for i in range(16))))
    palette.save(flat / "4.png")
    palette.save(flat / "5.png", transparency=3)
    images = reader.read_images(str(flat), "ood", 8)[0]
    table = np.array([(i, 2 * i, 3 * i) for i in range(16)], np.uint8)[grey % 16]
    expected = [grey[..., None].repeat(3, 2), over_white, np.where(alpha[..., None], colours, 255)]
    expected += [np.where(grey > 127, 255, 0)[..., None].repeat(3, 2), table]
    expected += [np.where((grey % 16 == 3)[..., None], 255, table)]
    for i, image in enumerate(expected):
        assert (images[i] == image).all(), i


def png(bits, kind, rows):
    """A PNG of given bit depth and colour type; Pillow writes none of 16-bit colour."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    side = len(rows)
    head = struct.pack(">IIBBBBB", side, side, bits, kind, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def bad_picture(path, case):
    """Writes it in place of a good one; returns what the line must say."""
    image = Image.fromarray(pixels(1, 12)[0])
    if case == "16-bit grey":
        Image.fromarray(rng(0).integers(0, 2**16, (12, 12), dtype=np.uint16)).save(path)
        return "16-bit"
    if case in ("16-bit colour", "16-bit alpha"):
        kind, channels = {"16-bit colour": (2, 3), "16-bit alpha": (6, 4)}[case]
        path.write_bytes(png(16, kind, [rng(i).bytes(12 * channels * 2) for i in range(12)]))
        return "16-bit"
    if case == "float":
        Image.fromarray(rng(0).random((12, 12), np.float32)).save(path, "TIFF")
        return "F, wanted is 8-bit"
    if case == "folder":
        path.unlink()
        path.mkdir()
        return "directory"
    if case.startswith("truncated"):
        image.resize((200, 200)).save(path, case.split()[1])
    data = path.read_bytes()
    path.write_bytes({"text": b"no picture", "empty": b""}.get(case, data[: len(data) * 2 // 3]))
    return "mend it or remove it"


@pytest.mark.parametrize(
    "case",
    ["16-bit grey", "16-bit colour", "16-bit alpha", "float", "truncated PNG", "truncated JPEG", "text"]
    + ["empty", "folder"],
)
@pytest.mark.parametrize("layout", ["classes", "flat"])
def test_bad_pictures(reader, tmp_path, one_line, case, layout):
    make_folder(tmp_path / "set")
    say = bad_picture(tmp_path / "set" / "test" / "cat" / "001.png", case)
    place = tmp_path / "set" if layout == "classes" else tmp_path / "set" / "test" / "cat"
    if (case, layout) == ("folder", "flat"):
        say = "no ood pictures"  # a folder makes it a folder of class folders
        one_line(reader.read_images, str(place), "ood", 12, say=["001.png", say])
    else:
        one_line(reader.read_images, str(place), "ood", 12, say=["001.png", say])


def test_cmyk_is_converted_with_a_line(reader, tmp_path, capsys):
    colours = np.zeros((12, 12, 3), np.uint8)
    colours[:6], colours[6:] = (200, 30, 60), (20, 160, 220)
    (tmp_path / "flat").mkdir()
    Image.fromarray(colours).convert("CMYK").save(tmp_path / "flat" / "a.jpg", quality=95)
    images, _, _ = reader.read_images(str(tmp_path / "flat"), "ood", 12)
    assert np.abs(images[0].astype(int) - colours).mean() < 12
    assert "a.jpg is CMYK; converted to RGB" in capsys.readouterr().err


def test_several_bad_pictures_give_one_line(reader, tmp_path, one_line):
    write_pictures(tmp_path / "flat", pixels(200, 12))
    for i in (20, 60, 100, 140):
        (tmp_path / "flat" / f"{i:03}.png").write_bytes(b"")
    one_line(reader.read_images, str(tmp_path / "flat"), "ood", 12, say=["020.png"])


@pytest.mark.parametrize("case", ["no picture of a class", "only train", "only test", "train of files", "not there"])
def test_wrong_layouts(reader, tmp_path, one_line, case):
    split, status, say = "test", 1, "pictures"
    make_folder(tmp_path / "set")
    for picture in (tmp_path / "set" / "test" / "dog").iterdir():
        picture.unlink()
    if case == "no picture of a class":
        say = "dog has no test pictures"
    elif case == "only train":
        (tmp_path / "set" / "test").rename(tmp_path / "other")
        say = "no test pictures"
    elif case == "only test":
        (tmp_path / "set" / "train").rename(tmp_path / "other")
        split, say = "train", "train has no train pictures"
    elif case == "train of files":
        (tmp_path / "set" / "train" / "cat" / "000.png").rename(tmp_path / "set" / "train" / "loose.png")
        split, say = "train", "loose.png"
    else:
        (tmp_path / "set").rename(tmp_path / "other")
        status, say = 2, "there is no data set"
    one_line(reader.read_images, str(tmp_path / "set"), split, 12, say=[say, tmp_path / "set"], status=status)


def test_train_and_test_of_other_classes(first, tmp_path, one_line):
    make_folder(tmp_path / "set")
    (tmp_path / "set" / "test" / "dog").rename(tmp_path / "set" / "test" / "wolf")
    one_line(prepare, first, tmp_path / "run", tmp_path / "set", say=["dog, wolf"])
    assert not (tmp_path / "run").exists()


# Arrays


def make_arrays(root, side=8, classes=3):
    root.mkdir()
    for part, count in (("train", 9), ("test", 6)):
        np.save(root / f"{part}.npy", pixels(count, side, part == "test"))
        np.save(root / f"{part}.labels.npy", np.arange(count) % classes)
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in ("cat", "dog", "eel")[:classes]))
    return root


@pytest.mark.parametrize("spec", ["", ":1-2"])
def test_array_folder(first, tmp_path, spec):
    arrays, run = make_arrays(tmp_path / "arrays"), tmp_path / "run"
    data, images, labels = prepare(first, run, f"{arrays}{spec}")
    keep = {p: np.load(arrays / f"{p}.labels.npy") >= (1 if spec else 0) for p in ("train", "test")}
    assert data["classes"] == ["cat", "dog", "eel"][bool(spec) :] and data["train"] == keep["train"].sum()
    for part in keep:
        source = np.load(arrays / f"{part}.npy")[keep[part]]
        assert (images[part].permute(0, 2, 3, 1).numpy() == source).all()
        assert (labels[part] == np.load(arrays / f"{part}.labels.npy")[keep[part]] - bool(spec)).all()
        for name in (part, f"{part}.labels"):
            stored = run / f"{name}.npy"
            assert stored.is_symlink() is not bool(spec)
            assert spec or stored.resolve() == (arrays / f"{name}.npy").resolve()
    digest = hashlib.sha256(np.load(run / "train.npy").tobytes() + np.load(run / "test.npy").tobytes())
    assert data["digest"] == digest.hexdigest()[:16] and json.loads((run / "data.json").read_text()) == data
    again, more, _ = prepare(first, run, f"{arrays}{spec}")
    assert again == data and all(torch.equal(more[part], images[part]) for part in keep)
    assert sorted(path.name for path in run.iterdir()) == sorted(
        ["data.json", "train.npy", "test.npy", "train.labels.npy", "test.labels.npy"]
    )


def test_array_folder_of_another_size_is_copied(first, tmp_path):
    arrays = make_arrays(tmp_path / "arrays", side=20)
    _, images, _ = prepare(first, tmp_path / "run", arrays)
    assert images["train"].shape == (9, 3, 8, 8) and not (tmp_path / "run" / "train.npy").is_symlink()
    expected = Image.fromarray(np.load(arrays / "train.npy")[0]).resize((8, 8), Image.Resampling.BILINEAR)
    assert (images["train"][0].permute(1, 2, 0).numpy() == np.asarray(expected)).all()


def test_the_users_arrays_stay_as_they_are(first, tmp_path):
    """New ID data replaces the links of an earlier run, never what they point to."""
    arrays, run = make_arrays(tmp_path / "arrays"), tmp_path / "run"
    before = {path.name: path.read_bytes() for path in arrays.iterdir()}
    prepare(first, run, arrays)
    for name in ("data.json", "train.npy"):
        (run / name).unlink()
    prepare(first, run, "digits:0-1")
    assert {path.name: path.read_bytes() for path in arrays.iterdir()} == before
    assert not any(path.is_symlink() for path in run.iterdir())


def test_arrays_brought_by_hand(first, tmp_path):
    run = make_arrays(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    data, images, _ = prepare(first, run, run)
    assert data["image_size"] == 8 and images["test"].shape == (6, 3, 8, 8)
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.name != "data.json"} == before


def test_single_array(reader, tmp_path):
    np.save(tmp_path / "mine.npy", pixels(20, 8))
    images, labels, names = reader.read_images(str(tmp_path / "mine.npy"), "ood", 8)
    assert (images == pixels(20, 8)).all() and labels is None and names is None
    np.save(tmp_path / "mine.labels.npy", np.arange(20) % 2 + 3)
    images, labels, names = reader.read_images(f"{tmp_path / 'mine.npy'}:4", "test", 8)
    assert (images == pixels(20, 8)[[9, 19]]).all() and labels.tolist() == [0, 0] and names == ["4"]


def test_a_fifth_of_each_class_is_for_testing(reader, tmp_path):
    y = rng(0).permutation(np.repeat([0, 1, 2], [20, 11, 4]))
    np.save(tmp_path / "mine.npy", np.arange(35, dtype=np.uint8)[:, None, None, None].repeat(3, 3))
    np.save(tmp_path / "mine.labels.npy", y)
    test = [i for i in range(35) if (y[:i] == y[i]).sum() % 5 == 4]
    for chosen in ([0, 1, 2], [1], [1, 2]):
        spec = f"{tmp_path / 'mine.npy'}:{','.join(map(str, chosen))}"
        got = {split: reader.read_images(spec, split, 1)[0].ravel()[::3].tolist() for split in ("train", "test")}
        assert got["test"] == [i for i in test if y[i] in chosen]
        assert got["train"] == [i for i in range(35) if y[i] in chosen and i not in test]


ARRAY_FAULTS = {
    "no test": "test.npy is missing",
    "labels of one half": "labels for train only",
    "labels too short": "train.labels.npy",
    "label negative": "train.labels.npy holds NaN, infinite or negative",
    "label without name": "classes.txt needs a name",
    "same name twice": "classes.txt needs a name",
    "name missing": "classes.txt needs a name",
    "names not text": "classes.txt needs a name",
    "labels of 32 bits": "expected int64",
    "sizes mixed": "all of one size",
    "16-bit": "holds uint16",
    "floats": "holds float32",
    "grey": "expected uint8 (None, None, None, 3)",
    "channels first": "expected uint8",
    "truncated": "not a complete .npy array",
    "class in test only": "in one only: 3",
    "test of another size": "train.npy holds uint8 (9, 8, 8, 3), expected uint8 (None, 9, 9, 3)",
}


@pytest.mark.parametrize("case", ARRAY_FAULTS)
def test_bad_arrays(first, tmp_path, one_line, case):
    arrays = make_arrays(tmp_path / "arrays")
    images, labels, names = arrays / "train.npy", arrays / "train.labels.npy", arrays / "classes.txt"
    x, y = np.load(images), np.load(labels)
    if case == "no test":
        (arrays / "test.npy").unlink()
    elif case == "labels of one half":
        (arrays / "test.labels.npy").unlink()
    elif case == "labels too short":
        np.save(labels, y[:-1])
    elif case == "label negative":
        np.save(labels, y - 1)
    elif case == "label without name":
        np.save(labels, y + 1)
    elif case in ("same name twice", "name missing", "names not text"):
        names.write_bytes({"s": b"cat\ncat\neel\n", "n": b"cat\ndog\n"}[case[0]] if "text" not in case else b"\xff\n\n")
    elif case == "labels of 32 bits":
        np.save(labels, y.astype(np.int32))
    elif case == "sizes mixed":
        mixed = np.empty(2, object)
        mixed[:] = [x[0], x[0, :4]]
        np.save(images, mixed, allow_pickle=True)
    elif case in ("16-bit", "floats"):
        np.save(images, x.astype(np.uint16 if case == "16-bit" else np.float32))
    elif case in ("grey", "channels first"):
        np.save(images, x[..., 0] if case == "grey" else x.transpose(0, 3, 1, 2))
    elif case == "truncated":
        images.write_bytes(images.read_bytes()[:-50])
    elif case == "test of another size":
        np.save(arrays / "test.npy", pixels(6, 9))
    elif case == "class in test only":
        names.unlink()
        np.save(arrays / "test.labels.npy", np.arange(6) % 4)
    one_line(prepare, first, tmp_path / "run", arrays, say=[ARRAY_FAULTS[case]])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("classes", ["0-9", "3", "x", "1-0", "99999999999999"])
def test_classes_that_are_not_there(reader, tmp_path, one_line, classes):
    arrays = make_arrays(tmp_path / "arrays")
    one_line(reader.read_images, f"{arrays}:{classes}", "ood", 8, say=[f"arrays:{classes}", "3 classes"], status=2)
    (arrays / "test.labels.npy").unlink()
    one_line(reader.read_images, f"{arrays}:0", "ood", 8, say=["no labels"], status=2)


# Above 64 px


def test_large_pictures_are_mapped(first, tmp_path):
    made = make_folder(tmp_path / "set", count=40, side=96)
    prepare_size = 80
    Image.init()
    tracemalloc.start()
    data, images, labels = prepare(first, tmp_path / "run", tmp_path / "set", prepare_size)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.8 * 160 * 80 * 80 * 3  # NumPy tells tracemalloc of what it holds, maps apart
    assert data["image_size"] == 80 and data["train"] == 80 and labels["test"].tolist() == [0] * 40 + [1] * 40
    for half, array in images.items():
        assert isinstance(array, np.memmap) and not array.flags.writeable and array.shape == (80, 80, 80, 3)
        for i in (0, 79):
            source = Image.fromarray(made[half, ("cat", "dog")[i // 40]][i % 40])
            assert (array[i] == np.asarray(source.resize((80, 80), Image.Resampling.BILINEAR))).all()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(
        ["data.json", "train.npy", "test.npy", "train.labels.npy", "test.labels.npy"]
    )
    digest = hashlib.sha256(images["train"].tobytes() + images["test"].tobytes()).hexdigest()[:16]
    assert data["digest"] == digest and prepare(first, tmp_path / "run", tmp_path / "set", 80)[0] == data


def test_large_pictures_leave_nothing_half_written(first, tmp_path, one_line):
    make_folder(tmp_path / "set", side=96)
    (tmp_path / "set" / "test" / "dog" / "002.png").write_bytes(b"")
    one_line(prepare, first, tmp_path / "run", tmp_path / "set", 96, say=["002.png"])
    assert list((tmp_path / "run").iterdir()) == []


def test_no_room_for_large_pictures(first, tmp_path, one_line, monkeypatch):
    make_folder(tmp_path / "set", side=96)
    usage = argparse.Namespace(free=1000)
    monkeypatch.setattr(first.shutil, "disk_usage", lambda path: usage)
    one_line(prepare, first, tmp_path / "run", tmp_path / "set", 96, say=["GiB", tmp_path / "run", "make room"])


def test_large_array_folder_is_linked_or_copied_by_rows(first, tmp_path):
    arrays = make_arrays(tmp_path / "arrays", side=70)
    _, images, _ = prepare(first, tmp_path / "whole", arrays, 70)
    assert (tmp_path / "whole" / "train.npy").is_symlink() and (images["test"] == np.load(arrays / "test.npy")).all()
    _, images, _ = prepare(first, tmp_path / "part", f"{arrays}:0,2", 70)
    keep = np.load(arrays / "train.labels.npy") != 1
    assert not (tmp_path / "part" / "train.npy").is_symlink()
    assert isinstance(images["train"], np.memmap) and (images["train"] == np.load(arrays / "train.npy")[keep]).all()


# The ID classes are no OOD data


@pytest.mark.parametrize(
    ("spec", "ood", "same"),
    [
        ("digits:0-5", "digits:6-9", True),
        ("digits", "digits", True),
        ("cifar10", "cifar100", False),
        ("data/cifar10", "cifar10", True),
        ("cifar10", "arrays/cifar10:0-3", True),
        ("set", "./set", True),
        ("set", "set/test", True),
        ("set:0", "set/test.npy:1", True),
        ("set", "other/set", False),
        ("run", "run/sd_outliers_test.npy", False),
        ("set", "run/train.npy", True),
        ("set", "run/other.npy", False),
        ("set", "textures", False),
    ],
)
def test_same_set(load, tmp_path, monkeypatch, spec, ood, same):
    monkeypatch.chdir(tmp_path)
    assert load(EVALUATE).same_set(spec, ood, tmp_path / "run") is same


@pytest.mark.parametrize("ood", ["digits", "digits:2-3", "digits:0", "RUN", "RUN/test.npy"])
def test_ood_data_that_overlaps_with_the_id_data(tiny_run, load, monkeypatch, one_line, ood):
    ood = ood.replace("RUN", str(tiny_run))
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--dir", str(tiny_run), "--ood-data", "patches", ood])
    before = sorted(path.name for path in tiny_run.iterdir())
    one_line(load(EVALUATE).main, say=[f"{ood} overlaps", "digits:0-2"], status=2)
    assert sorted(path.name for path in tiny_run.iterdir()) == before


def test_ood_data_from_a_torchvision_set(tiny_run, load, tmp_path, monkeypatch, main):
    made, _ = make_svhn(tmp_path / "root", monkeypatch)
    run = tmp_path / "run"
    run.mkdir()
    for file in ("data.json", "train.npy", "test.npy", "classifier_ce.pt"):
        (run / file).symlink_to(tiny_run / file)
    options = "--ood-data", "svhn", "svhn:0-3", "--data-root", tmp_path / "root", "--bootstrap", 2
    main(EVALUATE, "--dir", run, *options)
    records = json.loads((run / "results.json").read_text())
    assert {(r["ood"], r["n_ood"]) for r in records} == {("svhn", 20), ("svhn:0-3", 8)}
    assert not list(run.glob(".*"))
