"""Scores, metrics, tables and pictures for the classifiers in the shared directory, or for anybody's scores.

Paper A: energy, phi; beside them msp, maxlogit, knn (Sun et al., 2022), mahalanobis (Lee et al., 2018) and
relative-mahalanobis (Ren et al., 2021). Paper B, with x_d near x in D_in, x_v in D_in and D_out at 1 : 1:
Score(x) = sum_{i<=k} |f(x) - f(x_d^i)|^2 + alpha sum_{i<=k} 1[I(x_v^i) = 1].
Every score is an OOD score: higher is more OOD; "score > threshold is OOD" reproduces fpr95.

reads    classifier_*.pt, train.npy, test.npy (N, H, W, 3) uint8, OOD sets; where there: sd_outliers.npy and .csv,
         sd_reconstructions_test.npy, labels, pseudo_labels.npy; with --scores only files (N,) of real numbers
writes   results.json (fractions; null: no such figure, or an infinite threshold), results.md, roc.png, scores.png,
         tsne.png, scores/<method>.<score>.<set>.npy (N,) float32 in data-set order

python evaluate.py                                               # digits 0-5 against 6-9 and photographs: seconds
python evaluate.py --dir runs/mine --scores id.npy ood.npy       # any detector; no model, no data set
"""

import argparse
import json
import math
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_digits, load_sample_images
from sklearn.manifold import TSNE
from sklearn.metrics import average_precision_score, confusion_matrix
from torch import nn
from torchvision.transforms import v2
from tqdm import tqdm
from transformers import AutoConfig, AutoModel

RECIPES = {  # option: help, value per recipe
    "recipe": ("column of the table RECIPES", "digits", "cifar10", "cifar100", "imagenet100", "cifar10-30min"),
    "seed": ("seed of bootstrap and t-SNE, 0 for the first run", 0, 0, 0, 0, 0),
    "batch_size": ("images per forward pass", 512, 512, 512, 128, 512),
    "k": ("sd: neighbours that are summed, k of paper B", 2, 2, 2, 2, 2),
    "knn_k": ("knn: the score is the distance to this neighbour; ours", 10, 50, 50, 50, 50),
}
MAIN_SCORE = {"ce": "msp", "dream": "energy", "dream-id": "msp", "sd": "distance+voting"}  # in plots
MAIN_SCORE |= {"frozen": "knn", "scores": "given"}
COPIES = "sd_reconstructions_test"  # generated copies of ID test images: AUROC near 0.5 wanted; near 1, artefacts count


# Data sets by name: class of torchvision.datasets and what it reads in --data-root
TORCHVISION = {"cifar10": "CIFAR10 cifar-10-batches-py/", "cifar100": "CIFAR100 cifar-100-python/"}
TORCHVISION |= {"svhn": "SVHN train_32x32.mat and test_32x32.mat", "stl10": "STL10 stl10_binary/"}
TORCHVISION |= {"mnist": "MNIST MNIST/raw/", "fashion-mnist": "FashionMNIST FashionMNIST/raw/"}
TORCHVISION |= {
    "textures": "DTD dtd/dtd/",
    "places365": "Places365 categories_places365.txt, places365_val.txt, val_256/",
}


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


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/digits"), help="shared directory (default: %(default)s)")
    sets = f"OOD: as --data of the first script, or {', '.join(TORCHVISION)} (default: digits:6-9 patches)"
    parser.add_argument("--ood-data", nargs="+", metavar="SET", default=["digits:6-9", "patches"], help=sets)
    parser.add_argument("--data-root", default="data", help="folder of torchvision's data sets (default: %(default)s)")
    parser.add_argument("--scores", nargs="+", type=Path, metavar="NPY", help="judge these instead: ID, then OOD sets")
    parser.add_argument("--alpha", type=float, help="sd: weight of a vote (default: median ID distance score / k)")
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples per interval (default: %(default)s)")
    parser.add_argument("--device", help="torch device (default: cuda, mps or cpu)")
    parser.set_defaults(data="digits" if "--scores" in sys.argv else None)  # score files need no recipe
    args = parse_recipe(parser)
    args.names = [path.name for path in args.scores[1:]] if args.scores else args.ood_data
    named = args.names and len({"id", *args.names}) > len(args.names)
    mixed = args.scores and any(args.dir.glob("classifier_*.pt"))  # would replace the results of these
    if not named or args.bootstrap < 1 or not 0 <= (args.alpha or 0) < math.inf or mixed:
        fail("give OOD sets of different names, --bootstrap >= 1, --alpha >= 0, and --scores a --dir of its own", 2)
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


def same_set(spec, other, folder):
    """Whether two data sets, the first of which is kept in `folder`, are one, whatever classes they take of it."""
    a, b = Path(spec.partition(":")[0]), Path(other.partition(":")[0])
    if {str(a), str(b)} & {"digits", "patches", *TORCHVISION} and a.stem == b.stem:  # cifar10 and data/cifar10
        return True
    parts = ("", "train", "test", "val", "train.npy", "test.npy")
    return b.resolve() in {(home / part).resolve() for home in (a, folder) for part in parts}


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


def in_format_of(id_images, images):
    """Images (M, H, W, 3) uint8 in the format of the ID data: grey if that is grey, at the grey levels that it has.

    Digits have 17 levels, photographs 256: else a detector could tell images by their format, whatever they show.
    """
    sample = np.asarray(id_images[:1000])
    if (sample == sample[..., :1]).all():
        images = np.rint(images @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)[..., None].repeat(3, axis=3)
    levels = np.unique(sample).astype(int)
    if len(levels) == 256:
        return images  # as they are, a memory map stays one
    return levels[np.abs(np.arange(256)[:, None] - levels).argmin(1)].astype(np.uint8)[images]


class Transformer(nn.Module):
    """A vision model of the package transformers: (B, 3, H, W) in [-1, 1], resized to its own side -> features (B, D).

    Feature: the CLS token after the final norm (ViT, DeiT, DINOv2, CLIP); what the model pools where it has none.
    plan: the model's configuration, and the side in px, mean and std of the images it was trained on.
    """

    def __init__(self, plan):
        super().__init__()
        config = AutoConfig.for_model(**plan["config"])
        # ViT's pooler would put a tanh layer of another task on the CLS token
        self.options = {"add_pooling_layer": False} if config.model_type in ("vit", "deit") else {}
        self.model, self.side = AutoModel.from_config(config, **self.options), plan["side"]
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(plan[name]).view(-1, 1, 1))

    def forward(self, x):
        x = F.interpolate(x, (self.side, self.side), mode="bilinear", antialias=True)
        outputs = self.model(pixel_values=((x + 1) / 2 - self.mean) / self.std)
        pooled = outputs.get("pooler_output")
        return outputs.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)


class Detector(nn.Module):
    """A backbone f with the linear heads of one method, on images (B, 3, H, W) in [-1, 1].

    g_in (C) for ce, dream, dream-id; g_bin (2), g_in (C), g_out (C) for sd; phi (1 -> 2) on the energy for dream; none
    for frozen. plan: of a Transformer as f, in place of arch.
    """

    def __init__(self, method, arch, classes, phi_hidden, plan=None):
        super().__init__()
        self.f, width = (Transformer(plan), plan["width"]) if plan else build_backbone(arch)
        sizes = {"g_bin": 2, "g_in": classes, "g_out": classes} if method == "sd" else {"g_in": classes}
        sizes = {} if method == "frozen" else sizes
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})
        if method == "dream" and phi_hidden:
            self.phi = nn.Sequential(nn.Linear(1, phi_hidden), nn.ReLU(), nn.Linear(phi_hidden, 2))
        elif method == "dream":
            self.phi = nn.Linear(1, 2)

    def forward(self, x):
        """Features (B, D) and the logits of every head, by name."""
        features = self.f(x)
        return features, {name: head(features) for name, head in self.heads.items()}


def energy(logits, T=1.0):
    """E(x) = T logsumexp(f(x) / T): the negative free energy, large for ID. (B, C) -> (B,)."""
    return T * torch.logsumexp(logits / T, dim=1)


def knn(queries, bank, k, chunk=512, block=4096):
    """Distances and indices (N, k), nearest first, of the rows of bank (M, D) around queries (N, D), float32."""
    if not 0 < k <= len(bank):
        fail(f"k = {k} nearest neighbours asked for among {len(bank)}; choose another k")
    # oneDNN multiplies up to twice as fast as the BLAS behind addmm, best in blocks that stay in the cache
    onednn = bank.device.type == "cpu" and torch.backends.mkldnn.is_available()
    place = torch.Tensor.to_mkldnn if onednn else torch.Tensor.contiguous
    centre, found, blocks = bank.mean(0), [], []
    for rows in bank.split(block):
        rows = rows - centre
        blocks.append((place(rows), place(-rows.square().sum(1) / 2)))
    chunk = max(1, min(chunk, len(queries), 2**26 // len(bank)))
    rough = bank.new_empty(chunk, len(bank))  # q.b - |b|^2 / 2, large: near; at most 256 MiB
    for q in tqdm(queries.split(chunk), desc="neighbours", delay=1, leave=False):
        rough, mine = rough[: len(q)], place(q - centre)
        for (rows, half), columns in zip(blocks, rough.split(block, dim=1), strict=True):
            columns.copy_(F.linear(mine, rows, half).to_dense())
        near = rough.topk(min(k + 8, len(bank))).indices  # a few candidates more, then exactly
        exact = torch.stack([(q - bank.index_select(0, column)).norm(dim=1) for column in near.T], dim=1)
        exact, order = exact.sort(dim=1)
        found.append((exact[:, :k], near.gather(1, order[:, :k])))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def features_and_logits(net, images, args):
    """f(x) (N, D) and the logits of every head, by name, for images (N, H, W, 3) uint8; all on args.device."""
    chunks = tqdm(np.split(images, range(args.batch_size, len(images), args.batch_size)), delay=1, leave=False)
    tensors = (torch.tensor(x, device=args.device).permute(0, 3, 1, 2).float() / 127.5 - 1 for x in chunks)
    parts = [net(v2.functional.center_crop(x, net.crop or x.shape[2])) for x in tensors]
    return torch.cat([f for f, _ in parts]), {name: torch.cat([h[name] for _, h in parts]) for name in parts[0][1]}


def sd_score_terms(f, D_in, D_out, k):
    """The two sums of paper B's score, (N,) each, from features (., D): f of x, D_in of training images, D_out."""
    n = min(len(D_in), len(D_out))
    both = torch.cat([bank[torch.arange(n) * len(bank) // n] for bank in (D_in, D_out)])  # 1 : 1
    return knn(f, D_in, k)[0].square().sum(1), (knn(f, both, k)[1] >= n).sum(1)


def fit_gaussians(D_in, labels):
    """Two mixtures on features D_in (N, D): a Gaussian per class, one covariance for all; and one Gaussian for all.

    Each as W (D, rank) and means (C, rank): |(f - mean_c)^T W|^2 is the squared Mahalanobis distance, with the
    pseudo-inverse where features are constant or repeat each other.
    """
    D_in, fits = D_in.double().cpu(), []  # in float64, which some devices do not have
    for group in (labels, np.zeros_like(labels)):
        group = torch.from_numpy(np.unique(group, return_inverse=True)[1])
        means = torch.stack([D_in[group == c].mean(0) for c in range(group.max() + 1)])
        centred = D_in - means[group]
        variances, axes = torch.linalg.eigh(centred.T @ centred / len(D_in))
        kept = variances > 1e-6 * variances[-1]  # below: rounding of float32 features
        W = axes[:, kept] / variances[kept].sqrt()
        fits.append((W, means @ W))
    return fits


def mahalanobis(f, fit):
    """Squared Mahalanobis distance (N,) of features f (N, D) to the nearest mean; fit: W, means of fit_gaussians."""
    W, means = fit
    exact = torch.cdist(f.double().cpu() @ W, means, compute_mode="donot_use_mm_for_euclid_dist")
    return exact.square().min(1).values


def auroc_fpr95(in_scores, out_scores):
    """AUROC, half credit for ties; share of OOD (M,) taken for ID at the smallest t that keeps 95 % of ID (N,); t."""
    ordered = np.sort(in_scores)
    t = ordered[-(-19 * len(ordered) // 20) - 1]  # whole numbers: 0.95 N rounds wrongly
    beaten = np.searchsorted(ordered, out_scores) + np.searchsorted(ordered, out_scores, "right")
    return beaten.mean() / (2 * len(ordered)), (out_scores <= t).mean(), t


def metrics(in_scores, out_scores, resamples, seed):
    """The figures of one record, exact under ties and with infinities; intervals: 95 % of resamples of ID and OOD."""
    values, place = np.unique(np.concatenate([in_scores, out_scores]), return_inverse=True)
    is_ood, rng = np.arange(len(place)) >= len(in_scores), np.random.default_rng(seed)
    places = place[~is_ood], place[is_ood]
    (auroc, fpr95, t), fpr95_ood = auroc_fpr95(*places), auroc_fpr95(-places[1], -places[0])[1]  # roles exchanged
    drawn = [auroc_fpr95(*(p[rng.integers(len(p), size=len(p))] for p in places))[:2] for _ in range(resamples)]
    auroc_ci, fpr95_ci = np.percentile(drawn, [2.5, 97.5], axis=0).T.tolist()
    result = {"n_id": len(in_scores), "n_ood": len(out_scores), "auroc": auroc, "auroc_ci": auroc_ci, "fpr95": fpr95}
    result |= {"fpr95_ci": fpr95_ci, "fpr95_ood": fpr95_ood, "aupr_in": average_precision_score(~is_ood, -place)}
    threshold = values[t].item() if np.isfinite(values[t]) else None
    return result | {"aupr_out": average_precision_score(is_ood, place), "threshold": threshold}


def labels_of_outliers(logits, arrays, whose_labels):
    """What the ce classifier, by its logits (M, C), takes SD outliers for: y, c_r, another class or none."""
    y, c_r, (confidence, label) = arrays["y"], arrays["c_r"], (part.numpy() for part in logits.softmax(1).cpu().max(1))
    if whose_labels == "dataset" and not np.array_equal(y, arrays["train.labels"]):  # each pseudo-label's most frequent
        votes = [arrays["train.labels"][arrays["pseudo_labels"] == c] for c in range(max(y.max(), c_r.max()) + 1)]
        y, c_r = np.array([np.bincount(v).argmax() if len(v) else -1 for v in votes])[np.stack([y, c_r])]
    kinds = np.select([confidence < 0.5, label == y, label == c_r], ["unsure", "y", "c_r"], "other")
    return ", ".join(f"{kind} {(kinds == kind).mean():.1%}" for kind in ("y", "c_r", "other", "unsure"))


def load_scores(path):
    """Scores (N,) of any real type, infinities allowed."""
    try:
        scores = np.load(path, allow_pickle=False)
        if scores.ndim != 1 or not scores.size or scores.dtype.kind not in "fiub" or np.isnan(scores).any():
            raise ValueError
    except Exception:  # numpy and zipfile know many
        fail(f"{path} is missing or is no .npy array of scores (N,), N > 0, real numbers without NaN")
    return scores.astype(np.float64) if scores.dtype.kind == "b" or scores.dtype.itemsize > 8 else scores


def read_directory(args):
    """What is in --dir and the OOD sets, all checked: [(network, configuration)], {set: images}, arrays by name."""
    data, arrays, nets, first = read_description(args.dir), {}, [], "the first script in an empty --dir"
    methods = [method for method in MAIN_SCORE if (args.dir / f"classifier_{method}.pt").exists()]
    if not methods:
        fail(f"{args.dir} holds no classifier_*.pt; run train_classifier.py, or give --scores ID.npy OOD.npy")
    size = data.get("image_size")
    for name in ("test", "train", "sd_outliers", COPIES):
        path, writer = args.dir / f"{name}.npy", "sample_sd_outliers.py" if "sd" in name else first
        if writer == first or path.exists() or name == "sd_outliers" and "sd" in methods:
            arrays[name] = load_array(path, (data.get(name), size, size, 3), np.uint8, writer)
            size = arrays[name].shape[1]
    if max(args.k, args.knn_k) >= len(arrays["train"]):
        fail(f"--k {args.k} and --knn-k {args.knn_k} must be below {len(arrays['train'])}, the ID training images", 2)
    for name, images in (("test.labels", "test"), ("train.labels", "train"), ("pseudo_labels", "train")):
        if (path := args.dir / f"{name}.npy").exists():
            arrays[name] = load_array(path, arrays[images].shape[:1], np.int64, first)
    if "sd_outliers" in arrays:
        try:
            table = np.loadtxt(args.dir / "sd_outliers.csv", int, delimiter=",", skiprows=1, usecols=(2, 3), ndmin=2)
            arrays["y"], arrays["c_r"] = table.T if len(table) == len(arrays["sd_outliers"]) else ()
        except (OSError, ValueError):
            fail(f"sd_outliers.csv in {args.dir} does not fit sd_outliers.npy; run sample_sd_outliers.py again")
    for method in methods:
        try:
            content = torch.load(args.dir / f"classifier_{method}.pt", map_location="cpu", weights_only=True)
            config, digest = content["config"], content["digest"]
            net = Detector(method, config["arch"], config["classes"], config["phi_hidden"], config.get("plan")).eval()
            net.load_state_dict(content["model"])
            net.crop = min(config.get("crop") or size, size) if size > 64 else 0  # px at the centre, 0 for all
            stale = digest and digest != data.get("digest", digest)
            if stale or (config["method"], config["image_size"]) != (method, size):
                raise ValueError
            nets.append((net, method, config["whose_labels"], config["seed"]))
        except Exception:  # torch, pickle and zipfile know many
            fail(f"classifier_{method}.pt is damaged or not of the data in {args.dir}; run train_classifier.py again")
    ood, spare = {}, args.dir / ".partial.ood.npy"
    for spec in args.ood_data:
        try:
            ood[spec], _, names = read_images(spec, "ood", size, args.data_root, spare)
        finally:
            spare.unlink(missing_ok=True)  # a map of it stays readable
        if same_set(args.data, spec, args.dir) and (not names or {*names} & {*(data.get("classes") or names)}):
            fail(f"{spec} overlaps with the ID data {args.data}; name another set or other classes (NAME:6-9)", 2)
    ood |= {n: arrays[n] for n in {COPIES} & {*arrays}}
    if "sd_outliers" in arrays:
        arrays["sd_outliers"] = in_format_of(arrays["train"], arrays["sd_outliers"])
    sets = {"id": arrays["test"]} | {name: in_format_of(arrays["train"], images) for name, images in ood.items()}
    return nets, sets, arrays


@torch.no_grad()
def score_classifiers(args):
    """{(method, score): {set: (N,) float32}}, {method: facts}, notes, t-SNE's {group: (features, colours)}."""
    (nets, sets, arrays), scored, facts, notes, tsne = read_directory(args), {}, {}, [], {}
    for net, method, whose, seed in nets:
        facts[method], features, net = {"id_accuracy": None, "seed": seed}, {}, net.to(args.device)
        D_in = features_and_logits(net, arrays["train"], args)[0]
        if "sd_outliers" in arrays and (method in ("ce", "sd") or not tsne):
            D_out, logits = features_and_logits(net, arrays["sd_outliers"], args)
            same = np.array_equal(arrays["y"], arrays.get("train.labels"))
            if method == "ce" and (whose == "pseudo" or same or {"pseudo_labels", "train.labels"} <= {*arrays}):
                notes.append(f"ce takes SD outliers for {labels_of_outliers(logits['g_in'], arrays, whose)}")
        if method == "sd":
            loo = knn(D_in, D_in, args.k + 1)[0][:, 1:]  # an image is its own nearest, at 0
            alpha = loo.square().mean(1).median().item() if args.alpha is None else args.alpha
            notes.append(f"sd: alpha = {alpha:.4g}")
        if not D_in.isfinite().all():
            fail(f"classifier_{method}.pt gives features that are NaN; run train_classifier.py again")
        y = arrays.get("train.labels" if whose == "dataset" else "pseudo_labels")
        gaussians = None if y is None else fit_gaussians(D_in, y)
        for name, images in sets.items():
            features[name], logits = features_and_logits(net, images, args)
            if method == "sd":
                distance, voting = sd_score_terms(features[name], D_in, D_out, args.k)
                scores = {"distance": distance, "voting": voting, "distance+voting": distance + alpha * voting}
                scores["bin"] = logits["g_bin"].diff()[:, 0]  # log-odds of class 1: outlier
            elif method == "frozen":
                scores = {}
            else:  # msp is log(1 - max softmax): the same order, and never rounded to 0
                z, E = logits["g_in"], energy(logits["g_in"])
                others = z.scatter(1, z.argmax(1, keepdim=True), -math.inf)
                scores = {"msp": torch.logsumexp(others, 1) - E, "maxlogit": -z.max(1).values, "energy": -E}
                scores |= {"phi": -net.phi(E[:, None]).diff()[:, 0]} if method == "dream" else {}  # log-odds of OOD
            if method != "sd":
                scores["knn"] = knn(F.normalize(features[name]), F.normalize(D_in), args.knn_k)[0][:, -1]
            if gaussians:
                near, background = (mahalanobis(features[name], fit) for fit in gaussians)
                scores |= {"mahalanobis": near, "relative-mahalanobis": near - background}
            for score, values in scores.items():
                scored.setdefault((method, score), {})[name] = values.cpu().numpy().astype(np.float32)
                if values.isnan().any():
                    fail(f"classifier_{method}.pt gives {score} scores that are NaN; run train_classifier.py again")
            if name == "id" and "test.labels" in arrays and "g_in" in logits:
                table = confusion_matrix(arrays["test.labels"], logits["g_in"].argmax(1).cpu())
                # pseudo-labels after Hungarian matching
                hits = table[linear_sum_assignment(table, maximize=True)] if whose == "pseudo" else table.diagonal()
                facts[method]["id_accuracy"] = float(hits.sum() / table.sum())
        if method == "sd" or not tsne:
            features.pop(COPIES, None)
            tsne = {name: (f, np.repeat("C0" if name == "id" else "C3", len(f))) for name, f in features.items()}
            if "sd_outliers" in arrays:  # one colour per pseudo-label, neither blue nor red
                tsne["outliers"] = D_out, np.array([f"C{i}" for i in (1, 2, 4, 5, 6, 7, 8, 9)])[arrays["y"] % 8]
    for key, by_set in scored.items():
        for name, values in by_set.items():
            save(args.dir / "scores" / (re.sub(r"[^\w.,+-]+", "-", ".".join([*key, name])) + ".npy"), values)
    return scored, facts, notes, tsne


def draw(folder, scored, tsne, seed):
    """roc.png, a panel per OOD set; scores.png, one per method; tsne.png of at most 300 images per set."""
    shown = {key: sets for key, sets in scored.items() if MAIN_SCORE[key[0]] == key[1]}
    names = [name for name in next(iter(shown.values())) if name != "id"]
    figures = [Figure((5 * count, 4), layout="constrained") for count in (len(names), len(shown), 1)]
    for axis, name in zip(figures[0].subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for key, sets in shown.items():
            values = np.unique(np.concatenate([sets["id"], sets[name]]))[::-1]
            x, y = (1 - np.searchsorted(np.sort(s), values) / len(s) for s in (sets["id"], sets[name]))
            axis.plot([0, *x], [0, *y], label=", ".join(key))
        axis.set(title=name, xlabel="ID taken for OOD", ylabel="OOD found")
    for axis, (key, sets) in zip(figures[1].subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        inner = np.concatenate(list(sets.values()), dtype=np.float64)
        low, high = np.percentile([*inner[np.abs(inner) < 1e300]] or [0], [0.5, 99.5])
        for name, s in sets.items():  # tails and infinities go into the outer bins
            look = {"alpha": 0.5} if name == "id" else {"histtype": "step"}
            axis.hist(np.clip(s, low, high), 40, range=(low, high), weights=[1 / len(s)] * len(s), label=name, **look)
        axis.set(title=", ".join(key), xlabel="score (higher: more OOD)", ylabel="share of images")
    if tsne:
        thin = [(name, f[:: 1 + len(f) // 300].cpu(), c[:: 1 + len(f) // 300]) for name, (f, c) in tsne.items()]
        points, axis = np.concatenate([f for _, f, _ in thin]), figures[2].subplots()
        mapper = TSNE(perplexity=min(30, (len(points) - 1) / 3), init="random", max_iter=500, random_state=seed % 2**32)
        parts = np.split(mapper.fit_transform(points), np.cumsum([len(f) for _, f, _ in thin])[:-1])
        for (name, _, colours), marker, part in zip(thin, "os^Dv<>P*X" * len(thin), parts, strict=False):
            axis.scatter(*part.T, s=9, c=colours, marker=marker, label=name)
    for name, figure in zip(("roc", "scores", "tsne")[: 2 + bool(tsne)], figures, strict=False):
        for axis in figure.axes:
            axis.legend()
        figure.savefig(folder / f".partial.{name}.png", dpi=150)
        os.replace(folder / f".partial.{name}.png", folder / f"{name}.png")


def main():
    args, notes, tsne = parse_args(), [], {}
    if args.scores:
        scored = {("scores", "given"): dict(zip(["id", *args.names], map(load_scores, args.scores), strict=True))}
        facts, args.data = {"scores": {"id_accuracy": None, "seed": args.seed}}, args.scores[0].name
    else:
        scored, facts, notes, tsne = score_classifiers(args)
    records, jobs = [], [(ood, key) for ood in [*args.names, COPIES] for key in scored if ood in scored[key]]
    text = "# Results in percent\n\n95 % bootstrap intervals. FPR95: OOD taken for ID; FPR95-OOD: ID for OOD.\n"
    heads = f"| method | score | AUROC | FPR95 | FPR95-OOD | AUPR-in | AUPR-out | ID accuracy | seed |\n{'|---' * 9}|\n"
    for ood, key in tqdm(jobs, desc="bootstrap", leave=False):
        r = {"method": key[0], "score": key[1], "id": args.data, "ood": ood} | facts[key[0]]
        r |= metrics(scored[key]["id"], scored[key][ood], args.bootstrap, args.seed)
        if not records or ood != records[-1]["ood"]:
            text += f"\n## {args.data} (n = {r['n_id']}) against {ood} (n = {r['n_ood']})\n\n{heads}"
        cells = [f"{r[m]:.1%} [{r[m + '_ci'][0]:.1%}, {r[m + '_ci'][1]:.1%}]" for m in ("auroc", "fpr95")]
        cells += ["-" if r[m] is None else f"{r[m]:.1%}" for m in ("fpr95_ood", "aupr_in", "aupr_out", "id_accuracy")]
        text += f"| {' | '.join([*key, *cells, str(r['seed'])])} |\n"
        records.append(r)
    save(args.dir / "results.md", text := "".join([text, "\n", *(f"- {note}\n" for note in notes)]))
    save(args.dir / "results.json", json.dumps(records, indent=1, allow_nan=False) + "\n")
    draw(args.dir, scored, tsne, args.seed)
    print(f"{text}wrote results.json, results.md, pictures{'' if args.scores else ', scores/'} to {args.dir}")


if __name__ == "__main__":
    main()
