"""Paper B, steps 1 and 2: pseudo-labels by SCAN, then a class-conditional diffusion model.

SCAN (Van Gansbeke et al., ECCV 2020) finds C clusters; a UNet then predicts the noise of x_t given c_d = (pseudo-label,
t), the label at times dropped for classifier-free guidance. --labels dataset skips SCAN: the upper bound of paper B.

reads    the ID data set (--data), or the arrays that are in --dir already
writes   data.json, {train,test}.npy (N, H, W, 3) uint8, {train,test}.labels.npy (N,) int64 if known; scan.pt,
         {,test_}pseudo_labels.npy (N,) int64, pseudo_confidence.npy (N,) float32; diffusion/, diffusion_samples.png;
         <stage>_log.jsonl, the losses of every stage

python train_scan_diffusion.py                                         # digits 0-5: ACC above 0.99, minutes on a laptop
python train_scan_diffusion.py --data cifar10 --dir runs/cifar10        # SCAN as published, the UNet is ours; one GPU
python train_scan_diffusion.py --labels dataset --dir runs/known        # the true labels in place of SCAN's clusters
"""

import argparse
import copy
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
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from PIL import Image
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits, load_sample_images
from sklearn.metrics import adjusted_rand_score, confusion_matrix, normalized_mutual_info_score
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import rgb_to_grayscale
from torchvision.utils import save_image
from tqdm import tqdm

ARCHS = "small|resnet18|resnet34|resnet50|resnet18-imagenet|resnet34-imagenet|resnet50-imagenet"  # else CIFAR stem
UNET = "128,256,256,256"  # 35.75M parameters, 12.1 GFLOP per image of 32 px; with half the channels 8.95M, 3.0
RECIPES = {  # option: help, value per recipe
    # cifar10: SCAN as published; the poster gives no figures of its diffusion model, those here are ours. cifar100 and
    # imagenet100 are not in paper B: SCAN as published for CIFAR-10; but its entropy wants at least 10 C images per
    # step, so scan_batch is ours, and so are the networks for ImageNet-100 (UNet: 2.1 GiB per image in float32).
    # cifar10-30min: all of paper B on one GPU, our estimate at 50 TFLOP/s: SimCLR 100 x 6.7 s, SCAN loss 25 x 7 s,
    # self-labelling 40 x 4.4 s, UNet (9 GFLOP per image and step) 6000 x 46 ms: 22 minutes; outliers 1, detector 5.
    "recipe": ("column of the table RECIPES", "digits", "cifar10", "cifar100", "imagenet100", "cifar10-30min"),
    "seed": ("seed of every random number, 0 for the first run", 0, 0, 0, 0, 0),
    "image_size": ("stored height and width of images, px", 8, 32, 32, 256, 32),
    "arch": (f"clustering network, {ARCHS}", "small", "resnet18", "resnet18", "resnet34-imagenet", "resnet18"),
    "crop": ("SCAN: px of the views of images over 64 px, 0 for all of them", 0, 0, 0, 224, 0),
    "amp": ("precision of the networks, auto|bf16|none ; auto: bf16 on CUDA of Ampere or later", *["auto"] * 5),
    "augment": ("views, affine|colour : geometry, or the sets of SCAN", "affine", *["colour"] * 4),
    "pretext_epochs": ("SimCLR: epochs", 100, 500, 500, 500, 100),
    "pretext_batch": ("SimCLR: images per step", 256, 512, 512, 512, 512),
    "pretext_lr": ("SimCLR: learning rate of SGD, cosine to a thousandth", 0.2, 0.4, 0.4, 0.4, 0.4),
    "tau": ("SimCLR: temperature of NT-Xent", 0.1, 0.1, 0.1, 0.1, 0.1),
    "K": ("SCAN: nearest neighbours per image", 5, 20, 20, 20, 20),
    "starts": ("SCAN loss: starts, of which the one of lowest loss is kept", 3, 1, 1, 1, 1),
    "scan_epochs": ("SCAN loss: epochs", 40, 50, 50, 50, 25),
    "scan_batch": ("SCAN loss: images per step; its entropy wants at least 10 C", 128, 128, 1000, 1000, 128),
    "lambda_e": ("SCAN loss: weight of the entropy, 0 for none", 5.0, 5.0, 5.0, 5.0, 5.0),
    "scan_lr": ("SCAN loss: learning rate of Adam", 1e-3, 1e-4, 1e-4, 1e-4, 1e-4),
    "selflabel_epochs": ("self-labelling: epochs, 0 for none", 20, 200, 200, 200, 40),
    "selflabel_batch": ("self-labelling: images per step", 256, 1000, 1000, 1000, 1000),
    "selflabel_lr": ("self-labelling: learning rate of Adam", 1e-4, 1e-4, 1e-4, 1e-4, 1e-4),
    "confidence": ("self-labelling: least softmax confidence of a trusted image", 0.99, 0.99, 0.99, 0.99, 0.99),
    "channels": ("UNet: widths", "32,64", UNET, UNET, "128,128,256,256,512", "64,128,128,128"),
    "layers": ("UNet: residual blocks per resolution", 1, 2, 2, 2, 2),
    "attention": ("UNet: px at which it attends, beside the middle, 0 for none", 16, 16, 16, 16, 16),
    "dropout": ("UNet: dropout, 0 for none", 0.0, 0.1, 0.1, 0.1, 0.0),
    "flip": ("diffusion: 1 if a mirrored image keeps its class, 0 for not", 0, 1, 1, 1, 1),
    "steps": ("diffusion: training steps", 1500, 200_000, 200_000, 200_000, 6000),
    "batch_size": ("diffusion: images per step", 64, 128, 128, 32, 256),
    "lr": ("diffusion: learning rate of AdamW", 2e-3, 2e-4, 2e-4, 2e-4, 4e-4),
    "ema": ("diffusion: decay of the weight average", 0.995, 0.9999, 0.9999, 0.9999, 0.999),
    "p_drop": ("diffusion: share of images trained without label, 0 for none", 0.1, 0.1, 0.1, 0.1, 0.1),
    "t_max": ("diffusion: train on t < t_max <= 1000; paper A needs 1000", 1000, 1000, 1000, 1000, 250),
}


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
    parser.add_argument("--restart", action="store_true", help="begin anew, not where a run was stopped")
    parser.add_argument("--checkpoint-every", type=float, default=60.0, help="seconds, 0: every step (default: 60)")
    parser.add_argument("--compile", action="store_true", help="compile the networks with torch.compile")
    parser.add_argument(
        "--labels",
        choices=("scan", "dataset"),
        default="scan",
        help="by SCAN, or the data set's own (default: %(default)s)",
    )
    parser.add_argument("--clusters", type=int, help="C (default: the data set's number of classes)")
    parser.add_argument("--data-root", default="data", help="folder of torchvision's data sets (default: %(default)s)")
    parser.add_argument("--device", help="torch device (default: cuda, mps or cpu)")
    if int(os.environ.get("RANK", 0)):
        sys.stdout = open(os.devnull, "w")  # of several processes the first one speaks
    args = parse_recipe(parser)
    shares, clusters = max(args.p_drop, args.confidence, args.dropout), 2 if args.clusters is None else args.clusters
    if args.t_max > 1000 or shares >= 1 or clusters < 2 or not re.fullmatch(r"[1-9]\d+(,[1-9]\d+)*", args.channels):
        fail("--t-max <= 1000; --p-drop, --dropout, --confidence < 1; --clusters > 1; --channels like 32,64", 2)
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


def turn_hue(x, turn):
    """Hue of x (B, 3, H, W) in [0, 1] moved by turn (B, 1, 1, 1), 1 for a whole turn; value and chroma stay."""
    low = x.amin(1, keepdim=True)
    chroma = x.amax(1, keepdim=True).sub_(low)
    r, g, b = (x - low).div_(chroma.clamp(min=1e-8)).split(1, 1)
    hue = torch.where(r == 1, g - b, torch.where(g == 1, 2 + b - r, 4 + r - g)) / 6 + turn
    hue = (hue + hue.new_tensor([3, 5, 4]).view(3, 1, 1) / 3).frac_()  # red, green and blue peak at 0
    return hue.mul_(6).sub_(3).abs_().sub_(1).clamp_(0, 1).mul_(chroma).add_(low)


def smooth(x):
    """Mean of 3 x 3 pixels of x (B, 3, H, W), the middle one five times; pixels on the edge stay, as in Pillow."""
    rows, result = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :], x.clone()
    inner = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    result[..., 1:-1, 1:-1] = inner.add_(x[..., 1:-1, 1:-1], alpha=4).div_(13)
    return result


OPERATIONS = {  # on x (B, 3, H, W) in [0, 1] with m (B, 1, 1, 1) in [0, 1); ranges of SCAN's released code
    "autocontrast": lambda x, m: v2.functional.autocontrast(x),
    "equalize": lambda x, m: v2.functional.equalize(x),
    "solarize": lambda x, m: torch.where(x >= m, 1 - x, x),
    "posterize": lambda x, m: (x * (levels := 2 ** (4 + 4 * m).floor())).floor().minimum(levels - 1) / levels,
    "color": lambda x, m: torch.lerp(rgb_to_grayscale(x), x, 0.05 + 0.9 * m),
    "contrast": lambda x, m: torch.lerp(rgb_to_grayscale(x).mean((2, 3), keepdim=True), x, 0.05 + 0.9 * m),
    "brightness": lambda x, m: x * (0.05 + 0.9 * m),
    "sharpness": lambda x, m: torch.lerp(smooth(x), x, 0.05 + 0.9 * m),
}  # and, as numbers 8 to 13: identity, rotate, shear x, shear y, translate x, translate y
DRAWS = 13  # random numbers per view


def warp(x, theta, **how):
    """Square images x (B, 3, H, H) through theta (B, 2, 3): place p in [-1, 1] of the result shows theta p of x."""
    at = (2 * torch.arange(x.shape[-1], device=x.device) + 1) / x.shape[-1] - 1
    along_x, along_y, shift = theta[..., None, None].unbind(2)  # no matrix product: exact whatever TF32 and autocast
    grid = along_x * at + (along_y * at[:, None] + shift)  # (B, 2, H, H)
    return F.grid_sample(x, grid.permute(0, 2, 3, 1), align_corners=False, **how)


def simclr_view(x, u):
    """SimCLR's random view of x (B, 3, H, H) in [0, 1], image by image from u (B, DRAWS) uniform in [0, 1)."""
    area, ratio, left, top, flip, jitter, *light, saturate, turn, drop = u[:, :11].unbind(1)
    # RandomResizedCrop, area 0.2 to 1, ratio 3/4 to 4/3 as far as it fits (torchvision draws again), and flip.
    area = 0.2 + 0.8 * area
    stretch = torch.exp((2 * ratio - 1) * (-area.log()).clamp(max=math.log(4 / 3)) / 2)
    w, h, zero = area.sqrt() * stretch, area.sqrt() / stretch, torch.zeros_like(area)
    theta = (w * torch.where(flip < 0.5, -1.0, 1.0), zero, (2 * left - 1) * (1 - w), zero, h, (2 * top - 1) * (1 - h))
    x = warp(x, torch.stack(theta, 1).view(-1, 2, 3), padding_mode="border")
    # ColorJitter(0.4, 0.4, 0.4, 0.1) with p = 0.8, in this order; torchvision's order is random.
    mix = ((jitter < 0.8) * (2 * torch.stack([*light, saturate, turn]) - 1)).view(4, -1, 1, 1, 1)
    x = x.mul_(1 + 0.4 * mix[0]).clamp_(0, 1)
    x = x.lerp_(rgb_to_grayscale(x).mean((2, 3), keepdim=True), -0.4 * mix[1]).clamp_(0, 1)
    x = turn_hue(x.lerp_(rgb_to_grayscale(x), -0.4 * mix[2]).clamp_(0, 1), 0.1 * mix[3])
    return torch.where((drop < 0.2).view(-1, 1, 1, 1), rgb_to_grayscale(x), x)


def strong_view(x, u):
    """SCAN's strong view of x (B, 3, H, H) in [0, 1], image by image from u (B, DRAWS) uniform in [0, 1)."""
    side, (flip, *place) = x.shape[-1], u[:, :5].unbind(1)
    kind, m = (u[:, 5:9] * 14).long(), u[:, 9:13]  # (B, 4): four of 14 operations, one may come again
    # Flip, crop of the image padded by an eighth (SCAN pads nothing at 32 px), and the geometric operations, which
    # come before the others here: one sampling for all. Turns and shears are about the centre, what comes in is black.
    most = (math.pi / 6, 0.1, 0.1, 0.2, 0.2)  # radians, lean, half sides
    angle, lean_x, lean_y, dx, dy = ((kind == 9 + i) * (2 * m - 1) * most[i] for i in range(5))
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(m)
    steps = torch.stack([cos, lean_x - sin, dx, lean_y + sin, cos, dy, zero, zero, zero + 1], 2).view(-1, 4, 3, 3)
    theta = steps[:, 0]
    for k in range(1, 4):
        theta = (theta[..., None] * steps[:, k, None]).sum(2)
    theta[:, 0] *= torch.where(flip < 0.5, -1.0, 1.0)[:, None]
    theta[:, :2, 2] += 2 * ((torch.stack(place[:2], 1) * (side // 8 * 2 + 1)).floor() - side // 8) / side
    x = warp(x, theta[:, :2], mode="nearest")
    # The others in the order drawn, each on the images that drew it.
    order, counts = kind.argsort(0), F.one_hot(kind, 14).sum(0).tolist()
    m = m.gather(0, order).view(-1, 4, 1, 1, 1)
    for k in range(4):
        parts = order[:, k].split(counts[k]), m[:, k].split(counts[k])
        for operation, i, m_i in zip(OPERATIONS.values(), *parts, strict=False):
            if len(i):
                x.index_copy_(0, i, operation(x.index_select(0, i), m_i))
    # Cutout: a grey square of half the side around a random pixel; SCAN's side is random, up to half.
    corner = (torch.stack(place[2:]) * side).floor() - side // 4
    hidden = torch.arange(side, device=x.device) - corner[..., None]  # (2, B, H)
    hidden = (hidden >= 0) & (hidden < side // 2)
    return x.masked_fill_(hidden[0, :, None, :, None] & hidden[1, :, None, None], 0.5)


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


def view(images, augment="none", strong=False):
    """(B, 3, H, W) uint8 -> float in [-1, 1]: plain, SimCLR's view or SCAN's strong one."""
    x = images.to(torch.float32, copy=True).div_(255)
    if augment == "affine":
        zoom, angle, lean, dx, dy, light = (draw_share(torch.rand, len(x), 6, device=x.device) * 2 - 1).unbind(1)
        zoom, angle, lean, dx, dy = 1.2**zoom, 0.3 * angle, 0.2 * lean, 0.2 * dx, 0.2 * dy
        theta = (zoom * angle.cos(), lean - zoom * angle.sin(), dx, zoom * angle.sin(), zoom * angle.cos(), dy)
        grid = F.affine_grid(torch.stack(theta, 1).view(-1, 2, 3), x.shape, align_corners=False)
        x = F.grid_sample(x, grid, align_corners=False) * (1 + 0.4 * light).view(-1, 1, 1, 1)
        x = (x + 0.05 * draw_share(torch.randn, *x.shape, device=x.device)).clamp(0, 1)
    elif augment == "colour":
        change, u = strong_view if strong else simclr_view, draw_share(torch.rand, len(x), DRAWS, device=x.device)
        size = 128 if x.device.type == "cpu" else max(1, len(x))  # what 128 images need stays in a CPU's cache
        for part, draws in zip(x.split(size), u.split(size), strict=True):
            part.copy_(change(part, draws))
    return x.mul_(2).sub_(1)


def nt_xent(z1, z2, tau):
    """NT-Xent (SimCLR, eq. 1). z1, z2: (B, D) unit projections of two views of the same images."""
    z = torch.cat([z1, z2])
    similarity = (z @ z.T / tau).fill_diagonal_(-torch.inf)
    return F.cross_entropy(similarity, torch.arange(len(z), device=z.device).roll(len(z1)))


def nearest_neighbours(z, K):
    """The K rows of largest inner product with each row of z (N, D), itself left out: (N, K) int64."""
    rows = torch.arange(len(z), device=z.device).split(1024)
    return torch.cat([(z[i] @ z.T).scatter(1, i[:, None], -torch.inf).topk(K).indices for i in rows])


def scan_loss(logits, neighbour_logits, lambda_e):
    """SCAN, eq. 2: -mean log <p(x), p(x_k)> - lambda_e H(mean p). Both (B, C)."""
    p, p_k = logits.softmax(1), neighbour_logits.softmax(1)
    p_mean = p.mean(0).clamp(min=1e-8)
    return -(p * p_k).sum(1).clamp(min=1e-8).log().mean() + lambda_e * (p_mean * p_mean.log()).sum()


def selflabel_loss(logits, strong_logits, confidence):
    """SCAN, stage 4: CE of the strong view with confident labels, weighted by 1 / class count; None to skip it."""
    p, label = logits.softmax(1).max(1)
    mask = p > confidence  # True: trusted
    count = label[mask].bincount(minlength=logits.shape[1])  # a cluster without any would die out
    return F.cross_entropy(strong_logits[mask], label[mask], weight=mask.sum() / count) if count.all() else None


def report(stage, assigned, labels, clusters):
    """Print cluster sizes and, where labels are known, ACC (Hungarian), NMI and ARI."""
    quality = ""
    if labels is not None:
        table = confusion_matrix(labels, assigned)
        accuracy = table[linear_sum_assignment(table, maximize=True)].sum() / len(labels)
        nmi, ari = normalized_mutual_info_score(labels, assigned), adjusted_rand_score(labels, assigned)
        quality = f"ACC {accuracy:.3f}  NMI {nmi:.3f}  ARI {ari:.3f}  "
    print(f"{stage:22s} {quality}cluster sizes", *np.bincount(assigned, minlength=clusters))


def train_scan(images, labels, clusters, args):
    """The four stages on images as in predict: backbone with cluster head, SimCLR's backbone. Labels: to report."""

    def learn(stage, net, loss_of, epochs, batch, optimizer, plan=lambda index, step: index, end=1.0):
        size = min(batch, len(images)) // ranks()[1] * ranks()[1]
        batch_at = lambda step: plan(batch_of(len(images), size, step, args.seed, stage), step)  # noqa: E731
        batches = functools.partial(fetch, images, batch_at, args=args, size=args.crop)
        fit(stage, net, loss_of, batches, epochs * len(images) // size, optimizer, args, end)
        net.eval()

    kmeans = KMeans(clusters, n_init=10, random_state=args.seed % 2**32)
    if isinstance(images, torch.Tensor):
        x = images.flatten(1).cpu().numpy().astype(np.float32) / 255
        found = kmeans.fit(x[:: -(-len(x) // 10_000)]).predict(x)  # fitted to at most 10,000 images
        report("k-means on raw pixels", found, labels, clusters)
    # 1. Pretext task: two random views of an image attract each other and repel those of all others.
    torch.manual_seed(seeded(args.seed, "simclr"))
    backbone, width = build_backbone(args.arch)
    pretext = nn.Sequential(backbone, nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 128)))
    forward = parallel(pretext, args)

    def simclr(index, x):
        z = gather(forward(torch.cat([view(x, args.augment), view(x, args.augment)])))
        return nt_xent(*F.normalize(z).chunk(2), args.tau)

    optimizer = torch.optim.SGD(pretext.parameters(), args.pretext_lr, momentum=0.9, weight_decay=1e-4, fused=True)
    learn("simclr", pretext, simclr, args.pretext_epochs, args.pretext_batch, optimizer, end=1e-3)
    z = F.normalize(predict(pretext, images, args))
    report("1 SimCLR + k-means", kmeans.fit_predict(z.cpu().numpy()), labels, clusters)
    # 2. The K nearest neighbours in the pretext space are mostly of the image's own class.
    neighbours = nearest_neighbours(z, args.K).cpu().sort(1)[0].numpy()  # (N, K), in an order that rounding keeps
    if labels is not None:
        print(f"2 neighbours           purity {(labels[neighbours] == labels[:, None]).mean():.3f}")
    # 3. An image and a random neighbour agree on a cluster, the mean prediction stays spread out; the best start stays.
    trials = []
    for start in range(1, args.starts + 1):
        torch.manual_seed(seeded(args.seed, "scan", start))
        net = nn.Sequential(copy.deepcopy(backbone), nn.Linear(width, clusters))
        forward = parallel(net, args)

        def pairs(index, step, start=start):
            one = np.random.default_rng(seeded(args.seed, "neighbour", start, step)).integers(args.K, size=len(index))
            return np.concatenate([index, neighbours[index, one]])

        def scan(index, x, forward=forward):
            return scan_loss(*gather(forward(view(x, args.augment, strong=True))).chunk(2), args.lambda_e)

        optimizer = torch.optim.Adam(net.parameters(), args.scan_lr, weight_decay=1e-4, fused=True)
        learn(f"scan-{start}", net, scan, args.scan_epochs, args.scan_batch, optimizer, pairs)
        logits = predict(net, images, args)
        partners = logits[torch.from_numpy(neighbours.flatten()).to(logits.device)]
        loss = scan_loss(logits.repeat_interleave(args.K, 0), partners, args.lambda_e).item()
        trials.append((loss, start, net, logits.argmax(1).cpu().numpy()))
        if args.starts > 1:
            report(f"  start {start}, loss {loss:.3f}", trials[-1][3], labels, clusters)
    _, _, net, assigned = min(trials)
    report("3 SCAN loss", assigned, labels, clusters)
    # 4. The strong view learns the label that the network is sure of on the plain image.
    forward = parallel(net, args)

    def self_labelling(index, x):
        strong = view(x, args.augment, strong=True)
        with torch.no_grad():
            net.eval()
            logits = gather(forward(view(x)))
        net.train()
        return selflabel_loss(logits, gather(forward(strong)), args.confidence)

    optimizer = torch.optim.Adam(net.parameters(), args.selflabel_lr, weight_decay=1e-4, fused=True)
    learn("selflabel", net, self_labelling, args.selflabel_epochs, args.selflabel_batch, optimizer)
    return net, backbone


def train_diffusion(images, channels, labels, classes, args):
    """Paper B: min E ||eps_theta(x_t, c_d) - eps||^2, t ~ U[0, t_max), on images as in predict and labels (N,)."""
    side, widths = images.shape[2], [int(n) for n in args.channels.split(",")]
    down = ["AttnDownBlock2D" if side >> level == args.attention else "DownBlock2D" for level in range(len(widths))]
    blocks = {"down_block_types": down, "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)]}
    blocks |= {"norm_num_groups": math.gcd(32, *widths), "dropout": args.dropout, "layers_per_block": args.layers}
    blocks |= {"block_out_channels": widths, "num_class_embeds": classes + 1}  # the last class is the null condition
    torch.manual_seed(seeded(args.seed, "unet"))
    unet, scheduler = UNet2DModel(side, channels, channels, **blocks), DDPMScheduler(1000, 1e-4, 0.02, "linear")
    forward, (rank, world) = parallel(unet, args), ranks()

    def denoising(index, x):
        u, y = draw_share(torch.rand, len(x), 3, device=x.device), labels[index[rank::world]]
        x = view(x)[:, :channels]  # grey data: one channel
        x = torch.where((u[:, 0] < 0.5 * args.flip).view(-1, 1, 1, 1), x.flip(3), x)
        t, eps = (u[:, 1] * args.t_max).long(), draw_share(torch.randn, *x.shape, device=x.device)
        c_d = torch.where(u[:, 2] < args.p_drop, classes, y)
        if rank:  # the dropout of each process is its own
            torch.manual_seed(torch.initial_seed() % 2**32 + rank)
        return F.mse_loss(forward(scheduler.add_noise(x, eps, t), t, c_d).sample.float(), eps)

    ema = EMAModel(unet.parameters(), args.ema)
    optimizer = torch.optim.AdamW(unet.parameters(), args.lr, fused=True)
    plan = lambda step: batch_of(len(images), args.batch_size, step, args.seed, "diffusion")  # noqa: E731
    batches = functools.partial(fetch, images, plan, args=args)
    warmup = {"end": 1e-4, "warmup": args.steps // 10}
    fit("diffusion", unet, denoising, batches, args.steps, optimizer, args, clip=1.0, ema=ema, **warmup)
    ema.copy_to(unet.eval().requires_grad_(False).parameters())
    # A sheet of samples per class, from images of the class noised to t_max: at 1000 nothing of them is left.
    torch.manual_seed(seeded(args.seed, "samples"))
    solver = DPMSolverMultistepScheduler.from_config(scheduler.config, thresholding=True, sample_max_value=1.0)
    timesteps = sorted({round((args.t_max - 1) * (i / 19) ** 2) for i in range(20)}, reverse=True)
    c_d = torch.arange(min(classes, 20), device=labels.device).repeat_interleave(12)
    own = ((labels == c_d[:, None]) + 1e-9).multinomial(1).flatten().cpu().numpy()
    own = view(next(fetch(images, lambda _: own, range(1), args, share=False))[1])[:, :channels]
    x = scheduler.add_noise(own, torch.randn_like(own), torch.full_like(c_d, args.t_max - 1))
    samples = []
    for part, c in tqdm(list(zip(x.split(12), c_d.split(12), strict=True)), "samples", delay=1, disable=rank > 0):
        solver.set_timesteps(timesteps=timesteps)
        for t in solver.timesteps:
            part = solver.step(unet(part, t, c).sample, t, part).prev_sample
        samples.append(part)
    x = torch.cat(samples)
    sheet = F.interpolate(x / 2 + 0.5, None, max(1, 64 // side))
    return unet, scheduler, sheet


def main():
    args = parse_args()
    start(args)
    rank, world = ranks()
    if rank:
        dist.barrier()  # the first process puts the data into --dir, then the others read them
    data, images, labels = prepare_data(args)
    if world > 1 and rank == 0:
        dist.barrier()
    classes = args.clusters or len(data["classes"] or [])
    if not classes or args.labels == "dataset" and classes != len(data["classes"] or []):
        fail(f"{args.data} has no such labels: give --clusters, and not --labels dataset", 2)
    if args.K >= data["train"] or data["image_size"] % 2 ** args.channels.count(","):
        fail(f"--K {args.K} must be below {data['train']}, --channels fewer for {data['image_size']} px", 2)
    args.inputs, confidence = data["digest"], np.ones(data["train"], np.float32)
    if args.labels == "scan":
        net, pretext = train_scan(images["train"], labels["train"], classes, args)
        p = {split: predict(net, images[split], args).softmax(1).max(1) for split in images}
        report("4 self-labelling", p["train"].indices.cpu().numpy(), labels["train"], classes)
        if len(p["train"].indices.unique()) < classes:
            fail(f"a cluster of {classes} is empty; try another --seed or fewer --clusters")
        labels, confidence = {split: p[split].indices.cpu().numpy() for split in p}, p["train"].values.cpu().numpy()
        config = {option: value for option, value in vars(args).items() if option != "dir"} | {"classes": classes}
        parts = {"backbone": net[0], "head": net[1], "pretext": pretext}  # pretext: what SimCLR learnt, no cluster
        content = {name: part.state_dict() for name, part in parts.items()}
    if rank == 0:
        if args.labels == "scan":
            save(args.dir / "scan.pt", content | {"config": config, "digest": data["digest"]})
        shutil.rmtree(args.dir / "diffusion", ignore_errors=True)  # it knows the classes of the labels that go now
        arrays = {"pseudo_labels": labels["train"], "test_pseudo_labels": labels["test"]}
        for name, array in (arrays | {"pseudo_confidence": confidence}).items():
            save(args.dir / f"{name}.npy", array)
    y = torch.from_numpy(labels["train"]).to(args.device)
    unet, scheduler, sheet = train_diffusion(images["train"], data["channels"], y, classes, args)
    if rank == 0:
        save_image(sheet, args.dir / "diffusion_samples.png", nrow=12)
        for name, part in {"unet": unet, "scheduler": scheduler}.items():
            part.save_pretrained((partial := args.dir / ".partial.diffusion") / name)
        save(partial / "training.json", json.dumps({"t_max": args.t_max}) + "\n")
        os.replace(partial, args.dir / "diffusion")
        for path in args.dir.glob(CHECKPOINT.format("*")):
            path.unlink()
    print(f"wrote pseudo-labels and diffusion/ to {args.dir}")
    print_next(args, "train_text_encoder.py", "sample_sd_outliers.py")


if __name__ == "__main__":
    main()
