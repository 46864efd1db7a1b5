"""Paper A, step 1: an image encoder aligned with the generator's token embeddings (DREAM-OOD, eq. 2).

The anchors Gamma are what the generator is conditioned on: with Stable Diffusion (--diffusion: hub id or folder) the
rows of the text model's input token-embedding table for the words of the classes; with the diffusion model in --dir,
which learns a table of class embeddings, the rows of that. The encoder h is trained so that the cosine of z = h(x)
with the anchor of its class is large; the anchors stay frozen. Sampling around z then yields embeddings that the
generator can decode.

reads    the ID data set (--data), or train.npy, test.npy and labels that are in --dir already; tokenizer/ and
         text_encoder/ of Stable Diffusion; without it diffusion/, pseudo_labels.npy, test_pseudo_labels.npy
writes   anchors.npy (C, d) float32, id_embeddings.npy (N, d) float32 of all training images without augmentation,
         id_labels.npy (N,) int64, text_encoder.pt; with Stable Diffusion class_words.txt, a line per class

python train_text_encoder.py                            # digits 0-5: accuracy about 0.99, seconds on two cores
python train_text_encoder.py --data cifar100 --dir runs/cifar100 --diffusion CompVis/stable-diffusion-v1-4
"""

import argparse
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from diffusers import UNet2DModel
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

ARCHS = "small|resnet18|resnet34|resnet50|resnet18-imagenet|resnet34-imagenet|resnet50-imagenet"  # else CIFAR stem
RECIPES = {  # option: help, value per recipe
    # cifar100, imagenet100: as released (a CIFAR stem at 224 px too; resnet34-imagenet is 15 times cheaper).
    # cifar10 is not in paper A: as for CIFAR-100. cifar10-30min: ours, about a minute at 50 TFLOP/s.
    "recipe": ("column of the table RECIPES", "digits", "cifar10", "cifar100", "imagenet100", "cifar10-30min"),
    "seed": ("seed of every random number, 0 for the first run", 0, 0, 0, 0, 0),
    "image_size": ("stored height and width of images, px", 8, 32, 32, 256, 32),
    "arch": (f"encoder, {ARCHS}", "small", "resnet34", "resnet34", "resnet34", "resnet18"),
    "t": ("temperature of the cosine logits", 0.1, 0.1, 0.1, 0.1, 0.1),
    "epochs": ("passes over the training images", 40, 200, 200, 100, 20),
    "batch_size": ("images per step", 64, 256, 256, 160, 256),
    "lr": ("learning rate of SGD, cosine per step to 1e-6", 0.1, 0.1, 0.1, 0.1, 0.1),
    "weight_decay": ("weight decay, 0 for none", 5e-4, 5e-4, 5e-4, 5e-4, 5e-4),
    "crop": ("px of the views of images over 64 px, 0 for all of them", 0, 0, 0, 224, 0),
    "amp": ("precision of the network, auto|bf16|none ; auto: bf16 on CUDA of Ampere or later", *["auto"] * 5),
    "shift": ("augmentation up to 64 px: largest shift, px, 0 for none", 1, 4, 4, 0, 4),
    "degrees": ("augmentation up to 64 px: largest turn, degrees, 0 for none", 10, 0, 0, 0, 0),
    "zoom": ("augmentation up to 64 px: largest scale factor", 1.1, 1.0, 1.0, 1.0, 1.0),
    "flip": ("augmentation: 1 to mirror at random, 0 for not", 0, 1, 1, 1, 1),
}

# Words of the released class lists where they differ from the data set's names: "class: word", or "class: word: phrase"
# if the prompt says more than the word whose token is the anchor. All classes of ImageNet-100. One change: the released
# prompts say chimpanzee, in which the anchored token chimp does not occur, so that no outlier of that class is one.
CLASS_WORDS = """
apple: apples; aquarium_fish: fish: aquarium fish; bottle: bottles; bowl: bowls; can: cans; chimpanzee: chimp;
cup: cups; keyboard: keyboard: computer keyboard; lawn_mower: mower: lawn-mower; maple_tree: maple; mushroom: mushrooms;
oak_tree: oak; orange: oranges; orchid: orchids; palm_tree: palm; pear: pears; pickup_truck: truck: pickup truck;
pine_tree: pine; plate: plates; poppy: poppies; rose: roses; sunflower: sunflowers;
sweet_pepper: peppers: sweet peppers; tulip: tulips; willow_tree: willow;
n01498041: stingray: stingray in the water; n01514859: hen; n01582220: magpie; n01608432: kite: kite bird;
n01616318: vulture; n01687978: agama; n01776313: tick: tick bite; n01806567: quail: quail bird; n01833805: hummingbird;
n01882714: koala; n01910747: jellyfish; n01944390: snail; n01985128: crawfish; n02007558: flamingo; n02071294: orca;
n02085620: chihuahua; n02114855: coyote; n02123045: tabby; n02128385: leopard; n02129165: lion; n02129604: tiger;
n02165456: ladybug; n02190166: fly; n02219486: ant; n02226429: grasshopper; n02279972: monarch; n02317335: starfish;
n02326432: hare; n02342885: hamster; n02363005: beaver; n02391049: zebra; n02395406: pig; n02403003: ox: ox animal;
n02422699: impala: impala animal; n02442845: mink; n02444819: otter; n02480855: gorilla; n02510455: panda;
n02640242: sturgeon; n02672831: accordion; n02687172: carrier; n02701002: ambulance; n02730930: apron;
n02769748: backpack; n02782093: balloon; n02787622: banjo; n02793495: barn; n02799071: baseball; n02802426: basketball;
n02814860: beacon; n02840245: binder; n02906734: broom; n02948072: candle; n02980441: castle; n02999410: chain;
n03014705: chest: chest box; n03028079: church; n03032252: cinema; n03125729: cradle; n03160309: dam; n03179701: desk;
n03220513: dome; n03249569: drum; n03291819: envelope; n03384352: forklift; n03388043: fountain; n03450230: gown;
n03481172: hammer; n03594734: jean; n03594945: jeep; n03627232: knot; n03642806: laptop; n03649909: mower;
n03661043: library; n03676483: lipstick; n03724870: mask; n03733281: maze; n03759954: microphone; n03761084: microwave;
n03773504: missile; n03804744: nail: wire nail; n03916031: perfume; n03938244: pillow; n04004767: printer;
n04026417: purse; n04090263: rifle; n04133789: sandal; n04153751: screw; n04296562: stage; n04330267: stove;
n04371774: swing; n04404412: television; n04465501: tractor; n04485082: tripod; n04507155: umbrella; n04536866: violin;
n04579432: whistle; n04606251: wreck; n07714990: broccoli; n07745940: strawberry
"""

# Data sets by name: class of torchvision.datasets and what it reads in --data-root
TORCHVISION = {"cifar10": "CIFAR10 cifar-10-batches-py/", "cifar100": "CIFAR100 cifar-100-python/"}
TORCHVISION |= {"svhn": "SVHN train_32x32.mat and test_32x32.mat", "stl10": "STL10 stl10_binary/"}
TORCHVISION |= {"mnist": "MNIST MNIST/raw/", "fashion-mnist": "FashionMNIST FashionMNIST/raw/"}
TORCHVISION |= {
    "textures": "DTD dtd/dtd/",
    "places365": "Places365 categories_places365.txt, places365_val.txt, val_256/",
}
CHECKPOINT = f".checkpoint.{Path(__file__).stem}.{{}}.pt"  # in --dir, one per stage, until the script is done


def fail(message, status=1):
    """End the script with one line on standard error; status 2 is for the command line."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(status)


def parse_recipe(parser):
    """Add an option per row of RECIPES, parse, and fill in args.data, args.device and what the recipe gives."""
    parser.error = lambda message: fail(f"{message}; see --help", 2)
    for option, (text, *values) in RECIPES.items():
        choices = next((word.split("|") for word in text.split() if "|" in word), None)
        choices = values if option == "recipe" else choices
        text += f" (default: {'of the data set' if option == 'recipe' else ', '.join(map(str, values))})"
        parser.add_argument("--" + option.replace("_", "-"), help=text, choices=choices, type=type(values[0]))
    args, columns = parser.parse_args(), RECIPES["recipe"][1:]
    by_hand = str(args.dir) if (args.dir / "train.npy").exists() else "digits:0-5"
    args.data = getattr(args, "data", None) or read_description(args.dir).get("name", by_hand)
    devices = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    args.device = args.device or devices[0]
    name = args.recipe or Path(args.data.split(":")[0]).stem
    if name not in columns:
        fail(f"no recipe for a data set '{name}'; mend the name, or give --recipe {'|'.join(columns)}", 2)
    if args.device.split(":")[0] not in devices:
        fail(f"there is no --device {args.device} here; give {', '.join(devices)}", 2)
    for option, (text, *values) in RECIPES.items():
        given, least = getattr(args, option), "at least" if "0 for" in text else "above"
        setattr(args, option, value := values[columns.index(name)] if given is None else given)
        if not isinstance(value, str) and not (0 < value < math.inf or value == 0 and least != "above"):
            fail(f"--{option.replace('_', '-')} is {value}; it must be {least} 0", 2)
    print("recipe", "  ".join(f"{option}={getattr(args, option)}" for option in RECIPES))
    return args


def save(path, content):
    """Write a .npy, .pt or text file under a temporary name, then rename: what has its final name is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".partial.{path.name}")
    kinds = {".npy": np.save, ".pt": lambda file, content: torch.save(content, file)}
    kinds.get(path.suffix, Path.write_text)(temporary, content)
    os.replace(temporary, path)


def load_array(path, shape, dtype, writer):
    """Map an .npy file and check it: None in `shape` is any length, labels (int) are >= 0, floats are finite."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        fits = array.dtype == dtype and array.size and len(shape) == array.ndim
    except Exception:  # NumPy raises of every kind on damaged files
        fail(f"{path} is {'not a complete .npy array' if path.exists() else 'missing'}; run {writer}")
    if not fits or any(n not in (None, m) for n, m in zip(shape, array.shape, strict=True)):  # None: any
        fail(f"{path} holds {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}; run {writer} again")
    if array.dtype.kind == "f" and not np.isfinite(array).all() or array.dtype.kind == "i" and array.min() < 0:
        fail(f"{path} holds NaN, infinite or negative values; run {writer} again")
    return array


def read_description(folder):
    """data.json of the shared directory; {} where there is none (arrays brought by hand)."""
    try:
        return dict(json.loads((folder / "data.json").read_text())) if (folder / "data.json").exists() else {}
    except (ValueError, TypeError):
        fail(f"{folder / 'data.json'} is damaged; delete it and run the first script again")


def read_picture(source, size):
    """A file, an image or (H, W, 3) uint8 array -> (size, size, 3) uint8: short side to size, centre square.

    White shows through transparent parts. ValueError for damaged files, 16 bits and other kinds; CMYK is converted.
    """
    try:
        source = source[0] if isinstance(source, tuple) else source  # (image, label) of torchvision
        image = Image.open(source) if isinstance(source, Path) else source
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        deep = re.search("I;16|;16[BLN]", f"{image.mode} {getattr(image, 'tile', '')}")
        if deep or image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK"):
            raise ValueError(f"{'16-bit' if deep else image.mode}, wanted is 8-bit grey or RGB")
        if image.mode == "CMYK":  # ImageNet has some
            tqdm.write(f"{source} is CMYK; converted to RGB", file=sys.stderr)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return np.array(v2.functional.center_crop(v2.functional.resize(image.convert("RGB"), size), size))
    except Exception as error:  # Pillow raises of every kind on damaged files
        raise ValueError(f"{source} cannot be read as a picture ({error}); mend it or remove it") from error


def make_room(path, shape):
    """Map of a new .npy of uint8 images to be filled, if the disk has room: a full one under a map is a bus error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(path.parent).free < math.prod(shape):
        fail(f"the images take {math.prod(shape) / 2**30:.1f} GiB, more than is free in {path.parent}; make room")
    return np.lib.format.open_memmap(path, "w+", np.uint8, shape)


def read_pictures(pictures, size, path, title):
    """Pictures -> (N, size, size, 3) uint8, in threads; above 64 px as a map of the new file `path`, if any."""
    shape = len(pictures), size, size, 3
    images = make_room(path, shape) if path and size > 64 else np.empty(shape, np.uint8)

    def fill(rows):
        for i in rows:
            images[i] = read_picture(pictures[i], size)
        return len(rows)

    try:
        with ThreadPoolExecutor() as pool, tqdm(total=len(images), desc=title) as bar:
            for count in pool.map(fill, np.array_split(np.arange(len(images)), len(images) // 32 + 1)):
                bar.update(count)
    except Exception as error:
        fail(f"{title}: {' '.join(str(error).split())}")
    return images


def torchvision_set(name, split, root):
    """Part of a set of TORCHVISION, downloaded where it is not in root: (image, label) items, labels, class names."""
    (kind, files), part = TORCHVISION[name].split(" ", 1), "train" if split == "train" else "test"
    options, present = [{"split": part}], False
    if name.startswith("cifar") or name.endswith("mnist"):
        options = [{"train": part == "train"}]
    elif name == "textures":  # paper A uses every texture as OOD
        options = [
            {"split": s} for s in {"train": ["train", "val"], "ood": ["train", "val", "test"]}.get(split, ["test"])
        ]
    elif name == "places365":  # older torchvision refuses to download what is there
        options = [{"split": "train-standard" if part == "train" else "val", "small": True}]
        present = (Path(root) / ("data_256_standard" if part == "train" else "val_256")).is_dir()
    try:
        found = [getattr(torchvision.datasets, kind)(root, download=not present, **option) for option in options]
    except Exception as error:  # of the disk, the network, the format
        reason = " ".join(str(error).split())
        fail(f"{name} is not complete in {root} and no download worked ({reason}); put {files} into {root}")
    labels = [vars(data)[key] for data in found for key in ("targets", "labels", "_labels") if key in vars(data)]
    names = list(getattr(found[0], "classes", "0123456789"))
    return torch.utils.data.ConcatDataset(found), np.concatenate(labels).astype(np.int64), names


def read_folder(place, split):
    """Pictures of a folder (of train, test or val) of class folders or of files; labels, class names; if divided."""
    folders = {folder.name for folder in place.glob("[!.]*") if folder.is_dir()}
    halves, part = folders & {"train", "test", "val"}, "train" if split == "train" else "test"
    if divided := len(halves) > 1 or bool(halves) and halves == folders:  # a class may be called train
        place = place / ("val" if part == "test" and "test" not in halves else part)
        folders = {folder.name for folder in place.glob("[!.]*") if folder.is_dir()}
    names, files = sorted(folders), sorted(place.glob("[!.]*/[!.]*" if folders else "[!.]*"))
    files = [file for file in files if file.name not in ("Thumbs.db", "desktop.ini")]
    if (empty := folders - {file.parent.name for file in files}) or not files:
        fail(f"{place / min(empty, default='')} has no {split} pictures")
    if loose := [f for f in place.glob("*.*") if names and f.suffix.lower() in Image.registered_extensions()]:
        fail(f"{loose[0]} lies beside class folders; a folder holds the one or the other")
    labels = np.array([names.index(file.parent.name) for file in files]) if names else None
    return files, labels, names or None, divided


def read_images(spec, split, size, root="data", path=None):
    """Part train, test or ood (test, or all of a set that is not divided): images (N, size, size, 3), labels, names.

    Above 64 px they are decoded into `path`, if given, a new .npy file, and come as its memory map. An array of the
    right size that is taken whole comes as the map of its own file.
    """
    name, _, subset = spec.partition(":")
    place, labels, names, divided = Path(name), None, None, False
    if name in TORCHVISION:
        (pictures, labels, names), divided = torchvision_set(name, split, root), True
    elif name == "digits":
        (pictures, labels), names = load_digits(return_X_y=True), list("0123456789")
        pictures = np.rint(pictures * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1).repeat(3, axis=3)
    elif name == "patches":  # 520 squares of 32 px
        corners = [(y, x) for y in range(0, 416, 32) for x in range(0, 640, 32)]
        pictures = [photo[y : y + 32, x : x + 32] for photo in load_sample_images().images for y, x in corners]
    elif place.suffix == ".npy" or (place / "train.npy").exists() or (place / "test.npy").exists():
        divided, writer = place.suffix != ".npy", "what wrote it (images: uint8, all of one size; labels: int64)"
        file = place / f"{'train' if split == 'train' else 'test'}.npy" if divided else place
        pictures = load_array(file, (None, None, None, 3), np.uint8, writer)
        if split == "test" and divided:  # of one size with train
            load_array(place / "train.npy", (None, *pictures.shape[1:]), np.uint8, writer)
        if (beside := file.with_suffix(".labels.npy")).exists():
            labels, listed = load_array(beside, pictures.shape[:1], np.int64, writer), place / "classes.txt"
            names = listed.read_text("utf-8", "replace").splitlines() if listed.exists() else None
            if names and len({*names} - {""}) < max(len(names), labels.max() + 1):
                fail(f"{listed} needs a name of its own per class; {beside.name} has labels up to {labels.max()}")
    elif place.is_dir():
        pictures, labels, names, divided = read_folder(place, split)
    else:
        sets = ", ".join(["digits", "patches", *TORCHVISION])
        fail(f"there is no data set {name}: give {sets}, a folder of images or arrays, or a .npy file", 2)
    known, keep = np.zeros(len(pictures), int) if labels is None else np.asarray(labels), np.arange(len(pictures))
    if not divided and split != "ood":  # every fifth image of a class is for testing
        order = known.argsort(kind="stable")
        rank = (keep - np.searchsorted(known[order], known[order]))[order.argsort()]  # within the class
        keep = keep[(rank % 5 == 4) == (split == "test")]
    if subset:
        ends = [n.split("-") for n in subset.split(",")] if re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", subset) else []
        chosen = sorted({c for end in ends for c in range(int(end[0]), min(int(end[-1]), len(known)) + 1)})
        if labels is None or not chosen or not {*chosen} <= {*known.tolist()}:
            there = "no labels" if labels is None else f"{len(np.unique(known))} classes"
            fail(f"{spec}: give classes as 0-5 or 0,3,7; {name} has {there}", 2)
        keep, names = keep[np.isin(known[keep], chosen)], [names[c] if names else str(c) for c in chosen]
        known = np.searchsorted(chosen, known)
    if not len(keep):
        fail(f"{spec} has no {split} pictures: too few of each class to spare a fifth")
    whole, fits = not subset and len(keep) == len(pictures), isinstance(pictures, np.ndarray)
    if fits and pictures.shape[1:3] == (size, size) and (whole or size <= 64):
        images = pictures if whole else pictures[keep]
    else:
        images = read_pictures(torch.utils.data.Subset(pictures, keep), size, path, spec)
    return images, labels if whole or labels is None else known[keep], names


def store_id_data(args):
    """Put the data set args.data into args.dir, an array folder as links, and return what data.json says of it."""
    arrays, names, seen, digest, grey = {}, {}, {}, hashlib.sha256(), True
    for split in ("train", "test"):
        path = args.dir / f".partial.{split}.npy"
        images, labels, names[split] = read_images(args.data, split, args.image_size, args.data_root, path)
        arrays |= {split: images, f"{split}.labels": labels}
        seen[split] = set() if labels is None else {*labels.tolist()}
        for i in tqdm(range(0, len(images), 256), f"reading {split}", delay=1):  # more than the memory may hold
            digest.update(rows := np.ascontiguousarray(images[i : i + 256]))
            grey = grey and bool((rows == rows[..., :1]).all())
    if bool(seen["train"]) != bool(seen["test"]):
        fail(f"{args.data} has labels for {'train' if seen['train'] else 'test'} only; give both or neither")
    if odd := {*(names["train"] or ())} ^ {*(names["test"] or ())} or seen["test"] - seen["train"]:
        fail(f"{args.data}: train and test need the same classes; in one only: {', '.join(sorted(map(str, odd)))}")
    classes = (names["train"] or [*map(str, range(max(seen["train"]) + 1))]) if seen["train"] else None
    data = {"name": args.data, "classes": classes, "image_size": args.image_size, "channels": 1 if grey else 3}
    data |= {"train": len(arrays["train"]), "test": len(arrays["test"]), "digest": digest.hexdigest()[:16]}
    for name, array in reversed(arrays.items()):  # train.npy last: without data.json it counts as brought by hand
        path = args.dir / f"{name}.npy"
        if array is None or args.data == str(args.dir):
            continue
        if not isinstance(array, np.memmap):
            save(path, array)
        elif (source := Path(array.filename).resolve()).name == f".partial.{path.name}":
            os.replace(source, path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.symlink_to(source)
    save(args.dir / "data.json", json.dumps(data, indent=1) + "\n")
    return data


def prepare_data(args):
    """Put the ID data into args.dir once. Returns data.json and, by split, images and labels or None.

    Images up to 64 px are (N, 3, H, W) uint8 on the device, larger ones the memory map (N, H, W, 3) of their file.
    """
    data, again = read_description(args.dir), "this script in an empty --dir"
    held = data.get("name", str(args.dir) if (args.dir / "train.npy").exists() else args.data)
    if held != args.data:
        fail(f"{args.dir} already holds {held}; choose another --dir for {args.data}", 2)
    if not data:
        if args.data == str(args.dir):  # arrays brought by hand keep their size
            args.image_size = load_array(args.dir / "train.npy", (None, None, None, 3), np.uint8, again).shape[1]
        try:
            data = store_id_data(args)
        finally:
            for split in ("train", "test"):
                (args.dir / f".partial.{split}.npy").unlink(missing_ok=True)
    args.image_size, images, labels = data["image_size"], {}, {"train": None, "test": None}
    for split in labels:
        shape = (data[split], data["image_size"], data["image_size"], 3)
        images[split] = load_array(args.dir / f"{split}.npy", shape, np.uint8, again)
        if data["image_size"] <= 64:
            images[split] = torch.from_numpy(np.array(images[split])).permute(0, 3, 1, 2).contiguous().to(args.device)
        if data["classes"]:
            labels[split] = np.array(load_array(args.dir / f"{split}.labels.npy", shape[:1], np.int64, again))
    return data, images, labels


def build_backbone(arch):
    """(B, 3, H, W) in [-1, 1] -> features (B, D); returns also D.

    small: for digits; resnet*: of torchvision, at random, with a CIFAR stem (3 x 3, stride 1, no pooling) or, named
    *-imagenet, its own (7 x 7, stride 2, pooling).
    """
    if arch == "small":
        layers = []
        for a, b, stride in ((3, 32, 1), (32, 64, 1), (64, 128, 2), (128, 128, 2)):
            layers += [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten()), 512
    net = getattr(torchvision.models, arch.removesuffix("-imagenet"))()
    if not arch.endswith("-imagenet"):
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    width, net.fc = net.fc.in_features, nn.Identity()
    return net, width


def ranks():
    """(number of this process, how many torchrun started); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def start(args):
    """Settle --amp and --restart; join torchrun's processes, each on a device of its own."""
    rank, world, kind = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), args.device.split(":")[0]
    native = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)  # of Ampere and later
    args.amp = ("bf16" if native else "none") if args.amp == "auto" else args.amp
    for option in RECIPES:
        if "batch" in option and getattr(args, option) % world:
            fail(f"--{option.replace('_', '-')} {getattr(args, option)} is not a multiple of the {world} processes", 2)
    for path in args.dir.glob(CHECKPOINT.format("*")) if args.restart and not rank else ():
        path.unlink()
    if world > 1:
        if kind == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(hours=9))


def seeded(*key):
    """A seed for each (seed, stage, step, ...): 32 bits, of which torch's CPU generator takes no more."""
    return int(np.random.SeedSequence([*repr(key).encode()]).generate_state(1)[0])


def draw_share(rand, rows, *shape, device):
    """rand(rows, *shape), the rows of this process of what is drawn for all: the same for any number of processes."""
    rank, world = ranks()
    return rand(rows * world, *shape, device=device)[rank::world]


def batch_of(count, size, step, *key):
    """Items of step 0, 1, ...: `size` more of one random order of `count` items, made by `key`, after another."""
    first, last = step * size, step * size + size - 1
    rounds = range(first // count, last // count + 1)
    orders = [np.random.default_rng(seeded(*key, n)).permutation(count) for n in rounds]
    return np.concatenate(orders)[first % count :][:size]


def crops(source, size, flip, key, items):
    """Items step * N + index of an array or .npy -> uint8 (B, 3, size, size): random crops by key, or centres."""
    images, views = source if isinstance(source, np.ndarray) else np.load(source, mmap_mode="r"), []
    random = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(0.5 * flip)])
    for item in items:
        view = torch.from_numpy(images[item % len(images)].copy()).permute(2, 0, 1)
        torch.manual_seed(seeded(*key, item))  # of the worker process
        views.append(random(view) if key else v2.functional.center_crop(view, size))
    return torch.stack(views)


def fetch(images, plan, steps, args, size=0, key=(), share=True):
    """Per step: plan(step), the global batch (B,), and this process's share of its images, uint8 (B / world, 3, H, W).

    Tensors are indexed on their device; memory maps are read by workers, cropped to `size` px (0: whole) as in crops.
    """
    (rank, world), blocks = ranks() if share else (0, 1), itertools.repeat(None)
    if not isinstance(images, torch.Tensor):
        items = ((plan(step)[rank::world] + step * len(images)).tolist() for step in steps)
        read = functools.partial(
            crops,
            getattr(images, "filename", None) or images,
            min(size or images.shape[1], images.shape[1]),
            args.flip,
            key,
        )
        every, workers = range(len(images) * (steps.stop + 1)), min(8, os.cpu_count())
        pinned = args.device.startswith("cuda")
        blocks = DataLoader(every, batch_sampler=items, num_workers=workers, collate_fn=read, pin_memory=pinned)
    for step, block in zip(steps, blocks, strict=False):
        index = torch.from_numpy(plan(step)).to(args.device)
        yield index, images[index[rank::world]] if block is None else block.to(args.device, non_blocking=True)


def summed(x):
    """Sum of x over the processes, and in the backward pass of its gradients."""

    def total(part):
        dist.all_reduce(part := part.detach().clone())
        return part

    if x.requires_grad:
        x.register_hook(total)
    return x + (total(x) - x).detach()


def gather(x):
    """Rows (B / processes, ...) of every process -> (B, ...) in the order of the global batch, float, with gradient."""
    (rank, world), x = ranks(), x.float()
    slots = x.new_zeros(len(x), world, *x.shape[1:])
    slots[:, rank] = x
    return summed(slots).flatten(0, 1) if world > 1 else x


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch norm over the images of all processes, on any device; nn.SyncBatchNorm is for CUDA alone."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        count = x.numel() / x.shape[1] * ranks()[1]
        x = x - (mean := summed(x.sum((0, 2, 3))) / count)[:, None, None]
        variance = summed(x.square().sum((0, 2, 3))) / count
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(variance.detach() * count / (count - 1), self.momentum)
        self.num_batches_tracked += 1
        return x * (self.weight * (variance + self.eps).rsqrt())[:, None, None] + self.bias[:, None, None]


def parallel(net, args):
    """Move net to its device; its forward(*inputs): batch norm, gradients over all processes, --amp, --compile."""
    kind, world = args.device.split(":")[0], ranks()[1]
    net.to(args.device, memory_format=torch.channels_last if kind == "cuda" else torch.preserve_format)
    if world > 1 and kind == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for layer in net.modules() if world > 1 and kind != "cuda" else ():
        layer.__class__ = GlobalBatchNorm if type(layer) is nn.BatchNorm2d else layer.__class__
    if args.compile:
        net.compile()
    run = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    return torch.autocast(kind, torch.bfloat16, enabled=args.amp == "bf16")(lambda *inputs: run(*inputs))


def resume(stage, parts, args):
    """Load a stage's checkpoint, if there is one, into parts: what else it holds. Ends where options differ from it."""
    path, free = args.dir / CHECKPOINT.format(stage), ("device", "compile", "restart", "checkpoint_every")
    given = vars(getattr(args, "given", args))  # without what one method changes
    now = {o: str(v) for o, v in given.items() if o not in free and not isinstance(v, Path)}
    state = {"config": now, "step": 0, "curve": torch.zeros(0, 2)}
    for file in sorted(args.dir.glob(CHECKPOINT.format("*"))):
        try:
            held = torch.load(file, args.device if file == path else "cpu", weights_only=True, mmap=file != path)
            config = held["config"]
        except Exception:  # torch, pickle and zipfile know many
            fail(f"{file} is damaged; give --restart to delete it and begin anew")
        for option in (option for option in now if now[option] != config.get(option)):
            change = f"--{option.replace('_', '-')} {config.get(option)}, now {now[option]}"
            fail(f"{file} is of a run with {change}; go on with that, or give --restart to delete it and begin anew")
        if file == path:
            for name, part in parts.items():
                part.load_state_dict(held[name])
            state = {name: value for name, value in held.items() if name not in parts}
            print(f"{stage}: going on from step {held['step']}")
    if dist.is_initialized():
        dist.barrier()  # from here on the first process writes
    return state


def record(stage, state, parts, curve, steps, args):
    """Write what resume reads, and the losses of `curve` (steps done, 2) to <stage>_log.jsonl; ends what diverged."""
    if len(curve) >= min(100, steps) and not curve[-100:, 1].isfinite().any():
        fail(f"{stage} diverged, its gradients are not finite; lower the learning rate and give --restart")
    if ranks()[0] == 0:
        held = {name: part.state_dict() for name, part in parts.items()}
        save(args.dir / CHECKPOINT.format(stage), state | held | {"step": len(curve), "curve": curve.clone()})
        lines = enumerate(curve[:, 0].tolist(), 1)
        lines = [json.dumps({"step": step, "loss": loss if math.isfinite(loss) else None}) for step, loss in lines]
        save(args.dir / f"{stage}_log.jsonl", "\n".join(lines) + "\n")


def fit(stage, net, loss_of, batches, steps, optimizer, args, end=1.0, warmup=0, clip=math.inf, ema=None):
    """Steps on loss_of(*batch); the learning rate rises over `warmup` steps and falls on a cosine to `end` of its top.

    Random numbers depend on (seed, stage, step) alone and the rest is kept by record(): a run that is killed and
    started again ends in the same weights. A step whose gradient is not finite is left out.
    """
    for group in optimizer.param_groups:
        group["top"] = group["lr"]
        for p in group["params"] if "momentum" in group else ():  # else a first step that is left out would spoil it
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    parts = {"net": net, "optimizer": optimizer} | ({"ema": ema} if ema else {})
    state = resume(stage, parts, args)
    curve, begin = torch.tensor([[math.nan, 0.0]], device=args.device).repeat(steps, 1), state["step"]
    curve[:begin], saved = state["curve"], time.monotonic()  # per step: loss, norm of the gradient
    bar = tqdm(batches(range(begin, steps)), stage, steps, initial=begin, disable=ranks()[0] > 0)
    net.train()
    for step, batch in enumerate(bar, begin):
        torch.manual_seed(seeded(args.seed, stage, step))
        gone = max(0, step - warmup) / max(1, steps - warmup)
        fall = end + (1 - end) * (1 + math.cos(math.pi * gone)) / 2
        for group in optimizer.param_groups:
            group["lr"] = group["top"] * fall * min(1.0, (step + 1) / (warmup + 1))
        if (loss := loss_of(*batch)) is not None:
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.found_inf = (~norm.isfinite()).float()  # 1: fused optimisers leave the step out
            optimizer.step()
            curve[step] = torch.stack([gather(loss.detach()[None]).mean(), norm])
        if ema:
            ema.step(net.parameters())
        if step + 1 == steps or time.monotonic() - saved >= args.checkpoint_every:
            record(stage, state, parts, curve[: step + 1], steps, args)
            bar.set_postfix(loss=curve[step, 0].item(), left_out=(~curve[:, 1].isfinite()).sum().item())
            saved = time.monotonic()


@torch.no_grad()
def predict(net, images, args, batch=1024):
    """Outputs (N, D) of net, which is in eval mode, for plain images, uint8: a tensor (N, 3, H, W), or the centre crops
    of a memory map (N, H, W, 3)."""
    parts = np.array_split(np.arange(len(images)), -(-len(images) // (batch if images.shape[1] == 3 else 64)))
    views = fetch(images, parts.__getitem__, range(len(parts)), args, args.crop, share=False)
    bar = tqdm(views, "features", len(parts), delay=1, leave=False, disable=ranks()[0] > 0)
    return torch.cat([net(x.float() / 127.5 - 1).float() for _, x in bar])


def augment(images, args):
    """Training view of images (B, 3, H, W) uint8 -> float in [-1, 1], on the device, each image by its own draw.

    Shift by up to args.shift px (whole pixels when nothing else is on: a padded random crop), turn by up to
    args.degrees, scale by up to args.zoom, mirror if args.flip; black comes in from outside.
    """
    x, side = images.float() / 255, images.shape[-1]
    angle, zoom, dx, dy, mirror = (draw_share(torch.rand, len(x), 5, device=x.device) * 2 - 1).unbind(1)
    angle, zoom = angle * math.radians(args.degrees), args.zoom**zoom
    mirror = mirror.sign() if args.flip else torch.ones_like(mirror)
    if args.degrees == 0 and args.zoom == 1:
        dx, dy = ((d * (args.shift + 0.5)).round() / args.shift if args.shift else 0 * d for d in (dx, dy))
    dx, dy = dx * args.shift * 2 / side, dy * args.shift * 2 / side
    theta = [mirror * zoom * angle.cos(), -zoom * angle.sin(), dx, mirror * zoom * angle.sin(), zoom * angle.cos(), dy]
    grid = F.affine_grid(torch.stack(theta, 1).view(-1, 2, 3), x.shape, align_corners=False)
    return F.grid_sample(x, grid, align_corners=False) * 2 - 1


def load_anchors(folder):
    """Gamma (C, d) float32: the class-embedding table of a diffusion model, without the null class (its last row)."""
    if not (folder / "unet" / "config.json").exists():
        fail(f"{folder} holds no diffusion model; run train_scan_diffusion.py, or give --diffusion")
    notes = folder / "training.json"
    try:
        unet = UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False)
        t_max = json.loads(notes.read_text())["t_max"] if notes.exists() else 1000
    except Exception as error:  # diffusers, safetensors and json know many
        fail(f"{folder} does not load ({str(error).splitlines()[0]}); run train_scan_diffusion.py again")
    if not unet.config.num_class_embeds:
        fail(f"the diffusion model in {folder} knows no classes; train it with train_scan_diffusion.py")
    if t_max < 1000:
        print(f"note: this model knows t < {t_max} alone; sample_outliers.py needs one trained with --t-max 1000")
    return unet.class_embedding.weight[:-1].detach().clone()


def is_stable_diffusion(checkpoint):
    """Whether --diffusion names a text-to-image checkpoint (folder or hub id), not a class-conditional model."""
    hub_id = not Path(checkpoint).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint)
    return (Path(checkpoint) / "text_encoder").is_dir() or bool(hub_id)


def load_text_model(checkpoint):
    """Tokenizer and text model (CLIP) of a Stable Diffusion checkpoint, float32 on the CPU."""
    try:
        tokenizer = CLIPTokenizer.from_pretrained(checkpoint, subfolder="tokenizer")
        part = {"subfolder": "text_encoder", "output_loading_info": True}
        text_model, found = CLIPTextModel.from_pretrained(checkpoint, **part)
        if found["missing_keys"]:  # transformers would go on with random weights
            raise ValueError(f"text_encoder lacks {sorted(found['missing_keys'])[0]}: saved by another transformers?")
    except Exception as error:  # the hub, transformers and safetensors know many
        fail(f"no Stable Diffusion in {checkpoint} ({str(error).splitlines()[0]}); give --diffusion a hub id or folder")
    return tokenizer, text_model.eval()


def read_class_words(path):
    """Lines "word" or "word: phrase" -> [(word whose token is the anchor, phrase of the prompt)], class by class."""
    lines = path.read_text().strip().splitlines() if path.exists() else []
    parts = [[part.strip() for part in line.split(":")] for line in lines]
    if not parts or any(not all(line) or len(line) > 2 for line in parts):
        fail(f"{path} must hold a line per class, 'word' or 'word: phrase'; mend it, or run train_text_encoder.py")
    return [(line[0], line[-1]) for line in parts]


def default_words(names):
    """The released words of CLASS_WORDS where a class of that name has one, else the name: [(word, phrase)]."""
    known = dict(item.strip().split(": ", 1) for item in CLASS_WORDS.split(";"))
    parts = [known.get(name, name.replace("_", " ")).split(": ") for name in names]
    return [(part[0], part[-1]) for part in parts]


def token_anchors(tokenizer, text_model, words, multi_token):
    """Gamma (C, d): rows of the input token-embedding table for [(word, phrase)]; prints which.

    Of a word of several tokens multi_token takes the first row (as the released code does), the mean, or stops.
    """
    table, Gamma = text_model.get_input_embeddings().weight.detach(), []
    several, unknown = [], tokenizer.unk_token_id
    print(f"{'class':>5}  {'prompt says':24}{'tokens of the anchored word':32}row of the table")
    for c, (word, phrase) in enumerate(words):
        ids = tokenizer(word, add_special_tokens=False).input_ids
        if not ids or unknown in ids:
            fail(
                f"'{word}', the word of class {c}, is not in the tokenizer's vocabulary; give another in --class-words"
            )
        tokens = tokenizer.convert_ids_to_tokens(ids)
        several += [f"{word} ({' '.join(tokens)})"] * (len(ids) > 1)
        row = f"mean of {ids}" if multi_token == "mean" and len(ids) > 1 else ids[0]
        print(f"{c:5}  {phrase:24}{' '.join(tokens):32}{row}" + " (first)" * (row == ids[0] and len(ids) > 1))
        Gamma.append(table[ids].mean(0) if multi_token == "mean" else table[ids[0]])
    if several and multi_token == "error":
        fail(f"{len(several)} words have several tokens: {', '.join(several[:5])}; give others in --class-words", 2)
    return torch.stack(Gamma)


def cosine_logits(z, Gamma, t):
    """Eq. 2: s_c = cos(z, Gamma_c) / t. z (B, d), Gamma (C, d) -> (B, C)."""
    return F.normalize(z) @ F.normalize(Gamma).T / t


def train_encoder(images, labels, Gamma, args):
    """Minimise CE(cos(h(x), Gamma) / t, y) over h. images as in fetch, labels (N,) on the device."""
    torch.manual_seed(seeded(args.seed, "encoder"))
    backbone, width = build_backbone(args.arch)
    h = nn.Sequential(backbone, nn.Linear(width, Gamma.shape[1]))
    forward, size = parallel(h, args), min(args.batch_size, len(images)) // ranks()[1] * ranks()[1]

    def alignment(index, x):
        x = augment(x, args) if isinstance(images, torch.Tensor) else x.float() / 127.5 - 1  # the rest is done there
        return F.cross_entropy(cosine_logits(gather(forward(x)), Gamma, args.t), labels[index])

    optimizer = torch.optim.SGD(
        h.parameters(), args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay, fused=True
    )
    plan = lambda step: batch_of(len(images), size, step, args.seed, "encoder")  # noqa: E731
    batches = functools.partial(fetch, images, plan, args=args, size=args.crop, key=(args.seed, "crop"))
    fit("encoder", h, alignment, batches, args.epochs * len(images) // size, optimizer, args, end=1e-6 / args.lr)
    return h.eval()


def print_next(args, *commands):
    """Print what can be run now, with --dir and the recipe where the data set's name does not pick it."""
    recipe = f" --recipe {args.recipe}" * (Path(args.data.split(":")[0]).stem != args.recipe)
    print("next:", ", or ".join(f"python {command} --dir {args.dir}{recipe}" for command in commands))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/digits"), help="shared directory (default: %(default)s)")
    sets = f"ID: NAME[:CLASSES] of digits, patches, {', '.join(TORCHVISION)}, or a folder or .npy"
    sets += " (default: what is in --dir, else digits:0-5)"
    parser.add_argument("--data", help=sets)
    parser.add_argument("--data-root", default="data", help="folder of torchvision's data sets (default: %(default)s)")
    parser.add_argument("--diffusion", help="Stable Diffusion, hub id or folder (default: diffusion/ of --dir)")
    text = "Stable Diffusion: anchor of a class word of several tokens (default: %(default)s, as released)"
    parser.add_argument("--multi-token", choices=("first", "mean", "error"), default="first", help=text)
    text = "Stable Diffusion: a line per class, 'word' or 'word: phrase of the prompt' (default: the released words)"
    parser.add_argument("--class-words", type=Path, help=text)
    parser.add_argument("--restart", action="store_true", help="begin anew, not where a run was stopped")
    parser.add_argument("--checkpoint-every", type=float, default=60.0, help="seconds, 0: every step (default: 60)")
    parser.add_argument("--compile", action="store_true", help="compile the networks with torch.compile")
    parser.add_argument("--device", help="torch device (default: cuda, mps or cpu)")
    if int(os.environ.get("RANK", 0)):
        sys.stdout = open(os.devnull, "w")  # of several processes the first one speaks
    args = parse_recipe(parser)
    args.diffusion = args.diffusion or str((args.dir / "diffusion").absolute())
    if args.zoom < 1:
        fail(f"--zoom is {args.zoom}; it must be at least 1", 2)
    return args


def load_labels(args, data, classes):
    """Pseudo-labels by split, which are the classes that the model in --diffusion knows."""
    labels = {}
    for split, name in {"train": "pseudo_labels", "test": "test_pseudo_labels"}.items():
        labels[split] = load_array(args.dir / f"{name}.npy", (data[split],), np.int64, "train_scan_diffusion.py")
        if labels[split].max() >= classes:
            fail(f"{name}.npy has more than the {classes} classes of {args.diffusion}; run train_scan_diffusion.py")
    return labels


def main():
    args = parse_args()
    start(args)
    text = load_text_model(args.diffusion) if is_stable_diffusion(args.diffusion) else None
    Gamma = None if text else load_anchors(Path(args.diffusion))
    rank, world = ranks()
    if rank:
        dist.barrier()  # the first process puts the data into --dir, then the others read them
    data, images, labels = prepare_data(args)
    if world > 1 and rank == 0:
        dist.barrier()
    if text:
        if not data["classes"]:
            fail(f"{args.data} has no class labels to prompt Stable Diffusion with; use train_scan_diffusion.py")
        words = read_class_words(args.class_words) if args.class_words else default_words(data["classes"])
        if len(words) != len(data["classes"]):
            fail(f"{args.class_words} has {len(words)} lines, {args.data} {len(data['classes'])} classes; mend it", 2)
        Gamma = token_anchors(*text, words, args.multi_token)
        if rank == 0:
            save(args.dir / "class_words.txt", "".join(f"{word}: {phrase}\n" for word, phrase in words))
    else:
        labels = load_labels(args, data, len(Gamma))
    Gamma = Gamma.to(args.device)

    args.inputs = f"{data['digest']}-{zlib.crc32(Gamma.cpu().numpy().tobytes() + labels['train'].tobytes()):08x}"
    y = {split: torch.from_numpy(np.array(labels[split])).to(args.device) for split in labels}
    h = train_encoder(images["train"], y["train"], Gamma, args)
    z = {split: predict(h, images[split], args) for split in images}
    for split in z:
        accuracy = (cosine_logits(z[split], Gamma, args.t).argmax(1) == y[split]).float().mean().item()
        print(f"accuracy by nearest anchor, {split}: {accuracy:.3f} (n = {len(z[split])})")
    if not z["train"].isfinite().all():
        fail("training diverged: embeddings are not finite; lower --lr")
    config = {option: value for option, value in vars(args).items() if not isinstance(value, Path)}
    config |= {"d": Gamma.shape[1], "classes": data["classes"]}
    if rank == 0:
        save(args.dir / "text_encoder.pt", {"encoder": h.state_dict(), "config": config, "digest": data["digest"]})
        save(args.dir / "anchors.npy", Gamma.cpu().numpy())
        save(args.dir / "id_embeddings.npy", z["train"].cpu().numpy())
        save(args.dir / "id_labels.npy", np.array(labels["train"]))
        for path in args.dir.glob(CHECKPOINT.format("*")):
            path.unlink()
    print(f"wrote anchors {tuple(Gamma.shape)} and id_embeddings {tuple(z['train'].shape)} to {args.dir}")
    print_next(args, "sample_outliers.py" + f" --diffusion {args.diffusion}" * bool(text))


if __name__ == "__main__":
    main()
