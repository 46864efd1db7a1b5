"""Scores, metrics, tables and pictures for the detectors in --dir, or for anybody's scores.

Paper A: the energy; beside it phi (VOS's score), msp, maxlogit, knn (Sun et al., 2022), mahalanobis
(Lee et al., 2018), relative-mahalanobis (Ren et al., 2021). Paper B: distance, voting and their sum
Score(x) = sum_{i<=k} |f(x) - f(x_d^i)|^2 + alpha sum_{i<=k} 1[I(x_v^i) = 1], with x_d near x in
D_in, x_v in D_in and D_out at 1 : 1; and bin, its binary head. Every score is an OOD score:
higher is more OOD; "score > threshold is OOD" reproduces fpr95.

reads    classifier_*.pt, train.npy, test.npy (N, H, W, 3) uint8, OOD sets; where there: test
         labels, sd_outliers.npy and .csv, sd_reconstructions_test.npy; with --scores files (N,)
         alone
writes   results.json (fractions), results.md (percent), roc.png, scores.png, tsne.png,
         scores/<method>.<score>.<set>.npy (N,) float32 in data-set order

python evaluate.py                                          # digits 0-5 against 6-9 and photographs
python evaluate.py --dir runs/cifar10 --ood-data cifar100 svhn textures
python evaluate.py --dir runs/mine --scores id.npy ood.npy  # any detector; no model, no data set
"""

import argparse
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from scipy.optimize import linear_sum_assignment
from sklearn.covariance import EmpiricalCovariance
from sklearn.datasets import load_digits, load_sample_images
from sklearn.manifold import TSNE
from sklearn.metrics import average_precision_score, confusion_matrix, roc_curve
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from torchvision import datasets
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import v2
from tqdm import tqdm
from transformers import AutoConfig, AutoModel

RECIPES = {  # option: (value, or one for each of COLUMNS), help
    "seed": (0, "seed of every random number"),
    "k": (2, "sd: neighbours that are summed, k of paper B"),
    "knn_k": ((10, 50, 50, 50), "knn: the score is the distance to this neighbour"),
    "batch_size": (256, "images per forward pass"),
}


def energy(logits, T=1.0):
    """E(x) = T logsumexp(f(x) / T): the negative free energy, large for ID. (B, C) -> (B,)."""
    return T * torch.logsumexp(logits / T, dim=1)


def logit_scores(logits):
    """MSP, MaxLogit and paper A's energy score, (N,) each, from logits (N, C)."""
    E = energy(logits)
    others = logits.scatter(1, logits.argmax(1, keepdim=True), -math.inf)
    log_doubt = torch.logsumexp(others, 1) - E  # log(1 - max softmax), which is never rounded to 0
    return {"msp": log_doubt, "maxlogit": -logits.max(1).values, "energy": -E}


def phi_score(logits, phi):
    """VOS's score: the log-odds (N,) that phi gives OOD for the energy of logits (N, C)."""
    ood, inside = phi(energy(logits)[:, None]).unbind(1)
    return ood - inside


def sd_scores(f, D_in, D_out, k, alpha):
    """Paper B's score and its two sums, (N,) each, from features: f of x, D_in, D_out of outliers.

    alpha: without one the median of distance / k over D_in, an image not being its own neighbour.
    """
    if alpha is None:
        alpha = knn(D_in, D_in, k + 1)[0][:, 1:].square().mean(1).median().item()
    n = min(len(D_in), len(D_out))
    inliers = D_in[torch.arange(n) * len(D_in) // n]
    outliers = D_out[torch.arange(n) * len(D_out) // n]
    x_v = knn(f, torch.cat([inliers, outliers]), k)[1]
    distance = knn(f, D_in, k)[0].square().sum(1)
    voting = (x_v >= n).sum(1)
    return {"distance": distance, "voting": voting, "distance+voting": distance + alpha * voting}


def mahalanobis_scores(f, D_in, labels):
    """Squared Mahalanobis distance (N,) to the nearest class mean; that minus the one to all D_in.

    f (N, D), D_in (M, D) with labels (M,): NumPy. P is of all classes together, P_0 of all D_in.
    """
    classes, index = np.unique(labels, return_inverse=True)
    means = np.stack([D_in[index == c].mean(0) for c in range(len(classes))])
    P = EmpiricalCovariance(assume_centered=True).fit(D_in - means[index]).precision_
    P_0 = EmpiricalCovariance().fit(D_in).precision_
    near = np.full(len(f), np.inf)
    for mean in means:
        near = np.minimum(near, squared_length(f - mean, P))
    background = squared_length(f - D_in.mean(0), P_0)
    return {"mahalanobis": near, "relative-mahalanobis": near - background}


def squared_length(x, P):
    """x^T P x (N,) of the rows of x (N, D)."""
    return (x @ P * x).sum(1)


def auroc_fpr95(in_scores, out_scores):
    """AUROC, half credit for ties; share of OOD (M,) up to t, which keeps 95 % of ID (N,); t."""
    ordered = np.sort(in_scores)
    t = ordered[-(-19 * len(ordered) // 20) - 1]  # in whole numbers: 0.95 N rounds wrongly
    beaten = np.searchsorted(ordered, out_scores) + np.searchsorted(ordered, out_scores, "right")
    return beaten.mean() / (2 * len(ordered)), (out_scores <= t).mean(), t


def metrics(in_scores, out_scores, resamples, seed):
    """The figures of one record; intervals: 95 % of resamples of ID (N,) and OOD (M,) scores."""
    auroc, fpr95, threshold = auroc_fpr95(in_scores, out_scores)
    _, fpr95_ood, _ = auroc_fpr95(-out_scores, -in_scores)  # the roles exchanged
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        some_in = rng.choice(in_scores, len(in_scores))
        some_out = rng.choice(out_scores, len(out_scores))
        drawn.append(auroc_fpr95(some_in, some_out)[:2])
    auroc_ci, fpr95_ci = np.percentile(drawn, [2.5, 97.5], axis=0).T.tolist()
    scores = np.concatenate([in_scores, out_scores])
    is_ood = np.arange(len(scores)) >= len(in_scores)
    return {
        "n_id": len(in_scores),
        "n_ood": len(out_scores),
        "auroc": float(auroc),
        "auroc_ci": auroc_ci,
        "fpr95": float(fpr95),
        "fpr95_ci": fpr95_ci,
        "fpr95_ood": float(fpr95_ood),
        "aupr_in": float(average_precision_score(~is_ood, -scores)),
        "aupr_out": float(average_precision_score(is_ood, scores)),
        "threshold": float(threshold),
    }


class Detector(nn.Module):
    """A backbone f with the linear heads of one method, on images (B, 3, H, W) in [-1, 1].

    g_in (C) for ce, dream, dream-id; g_bin (2), g_in (C), g_out (C) for sd; none for frozen; for
    dream also phi (1 -> 2), on the energy. vit: of a VisionTransformer as f, else None.
    """

    def __init__(self, method, arch, classes, phi_hidden, vit):
        super().__init__()
        self.f = VisionTransformer(vit) if vit else build_backbone(arch)
        self.heads = nn.ModuleDict()
        if method != "frozen":
            self.heads["g_in"] = nn.Linear(self.f.width, classes)
        if method == "sd":
            self.heads["g_bin"] = nn.Linear(self.f.width, 2)
            self.heads["g_out"] = nn.Linear(self.f.width, classes)
        if method == "dream":
            hidden = [nn.Linear(1, phi_hidden), nn.ReLU()] if phi_hidden else []
            self.phi = nn.Sequential(*hidden, nn.Linear(phi_hidden or 1, 2))

    def forward(self, x):
        """Features (B, D) and the logits of every head, by name."""
        features = self.f(x)
        return features, {name: head(features) for name, head in self.heads.items()}


def parse_args():
    parser = recipe_parser()
    text = "OOD sets, as --data of train_scan_diffusion.py"
    sets = ["digits:6-9", "patches"]
    parser.add_argument("--ood-data", nargs="+", metavar="SET", default=sets, help=text)
    parser.add_argument("--data-root", default="data", help="folder of torchvision's data sets")
    text = "judge these .npy files (N,) and nothing else: ID, then OOD sets"
    parser.add_argument("--scores", nargs="+", type=Path, metavar="NPY", help=text)
    text = "sd: weight of a vote; without it the median ID distance score / k"
    parser.add_argument("--alpha", type=float, help=text)
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples per interval")
    args = parser.parse_args()
    names = {path.name for path in args.scores or []}
    if args.scores and len(names) < max(2, len(args.scores)):
        parser.error("--scores takes two files or more, ID, then OOD sets, of different names")
    if args.bootstrap < 1:
        parser.error("--bootstrap must be at least 1")
    return args


def main():
    args = parse_args()
    (args.dir / "scores").mkdir(parents=True, exist_ok=True)
    print("options", vars(args))
    if args.scores:
        sets = {path.name: load_scores(path) for path in args.scores}
        id_name = args.scores[0].name
        scored = {("scores", "given"): {"id": sets.pop(id_name)} | sets}
        facts = {"scores": {"id_accuracy": None, "seed": args.seed}}
        notes = []
    else:
        id_name = read_description(args.dir).get("data", str(args.dir))
        scored, facts, notes = score_detectors(args)
    records = []
    for (method, score), sets in tqdm(scored.items(), "bootstrap", delay=1):
        for ood in list(sets)[1:]:
            record = {"method": method, "score": score, "id": id_name, "ood": ood}
            figures = metrics(sets["id"], sets[ood], args.bootstrap, args.seed)
            records.append(record | figures | facts[method])
    save(args.dir / "results.json", json.dumps(records, indent=1) + "\n")
    text = results_table(records) + "".join(f"- {note}\n" for note in notes)
    save(args.dir / "results.md", text)
    shown = {key: sets for key, sets in scored.items() if MAIN_SCORE[key[0]] == key[1]}
    save(args.dir / "roc.png", plot_roc(shown))
    save(args.dir / "scores.png", plot_scores(shown))
    print(f"{text}\nwrote results.json, results.md, plots to {args.dir}")


# ---- plumbing: not the paper's method; same name, same text in every script ----

COLUMNS = ("digits", "cifar10", "cifar100", "imagenet100")  # of RECIPES
TORCHVISION = {  # data sets of torchvision, by name; split is train or test
    "cifar10": lambda root, split, fit: datasets.CIFAR10(
        root, split == "train", fit, download=True
    ),
    "cifar100": lambda root, split, fit: datasets.CIFAR100(
        root, split == "train", fit, download=True
    ),
    "svhn": lambda root, split, fit: datasets.SVHN(root, split, fit, download=True),
    "textures": lambda root, split, fit: ConcatDataset(
        [
            datasets.DTD(root, part, transform=fit, download=True)
            for part in ("train", "val", "test")
        ]
    ),
    "places365": lambda root, split, fit: datasets.Places365(
        root, "val", True, not Path(root, "val_256").exists(), transform=fit
    ),
}
MAIN_SCORE = {  # of each method, in plots
    "frozen": "knn",
    "ce": "msp",
    "dream": "energy",
    "dream-id": "msp",
    "sd": "distance+voting",
    "scores": "given",
}


def recipe_parser(default="digits"):
    """Parser with --dir, --recipe, --device and the rows of RECIPES, at the recipe's values.

    The recipe is --recipe, else that of data.json, else `default`.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
        add_help=False,
    )
    parser.add_argument("--dir", type=Path, default=Path("runs/digits"), help="shared directory")
    parser.add_argument("--recipe", choices=COLUMNS, help="column of the table RECIPES")
    known, _ = parser.parse_known_args()
    recipe = known.recipe or read_description(known.dir).get("recipe", default)
    parser.set_defaults(recipe=recipe)
    device = "cpu"
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator().type
    parser.add_argument("--device", choices=(device, "cpu"), default=device, help="torch device")
    parser.add_argument("--help", action="help")
    for option, (value, text, *choices) in RECIPES.items():
        if isinstance(value, tuple):
            value = value[COLUMNS.index(recipe)]
        parser.add_argument(
            f"--{option.replace('_', '-')}",
            type=type(value),
            default=value,
            choices=choices or None,
            help=f"{text} (default: {value})",
        )
    return parser


def save(path, content):
    """Write a .npy, .pt, .png or text file under a temporary name, then rename it."""
    temporary = path.with_name(f".partial.{path.name}")
    if path.suffix == ".npy":
        np.save(temporary, content)
    elif path.suffix == ".pt":
        torch.save(content, temporary)
    elif path.suffix == ".png":
        content.savefig(temporary)
    else:
        temporary.write_text(content)
    os.replace(temporary, path)


def load_array(path, shape, dtype, writer):
    """Map an .npy file and check it: None in shape is any length; labels >= 0, floats finite."""
    try:
        array = np.lib.format.open_memmap(path, mode="c")
        same = [n in (None, m) for n, m in zip(shape, array.shape, strict=True)]
    except Exception:  # NumPy raises of every kind on damaged files
        sys.exit(f"{path} is missing, damaged or not {shape}; run {writer}")
    if array.dtype != dtype or not all(same):
        sys.exit(f"{path} holds {array.dtype} {array.shape}, not {shape}; run {writer} again")
    negative = dtype == np.int64 and array.min() < 0
    if negative or (dtype == np.float32 and not np.isfinite(array).all()):
        sys.exit(f"{path} holds negative labels, or values not finite; run {writer} again")
    return array


def load_weights(path, device, remedy):
    """Content of a .pt file."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception:  # torch, pickle and zipfile raise of every kind
        sys.exit(f"{path} is missing or damaged; {remedy}")


def read_description(folder):
    """data.json of the shared directory; {} where there is none, beside arrays brought by hand."""
    path = folder / "data.json"
    return json.loads(path.read_text()) if path.exists() else {}


def knn(queries, bank, k):
    """Distances and rows (N, k), nearest first, of the bank (M, d) around queries (N, d)."""
    centre = bank.mean(0)  # a large common offset would cost cdist its digits
    bank = bank - centre
    nearest = [torch.cdist(q - centre, bank).topk(k, largest=False) for q in queries.split(1024)]
    distances, rows = zip(*nearest, strict=True)
    return torch.cat(distances), torch.cat(rows)


def to_float(images):
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def plain_view(images, args):
    """(B, H, W, 3) uint8 -> (B, 3, side, side) in [-1, 1], cropped at the centre if at all."""
    x = to_float(images)
    return v2.functional.center_crop(x, args.crop) if args.crop else x


def match_levels(id_images, images):
    """Images (B, H, W, 3) uint8 at the grey levels of the ID images, of which digits have 17.

    Else a detector could tell generated images by their levels, whatever they show.
    """
    sample = id_images[:: len(id_images) // 100 + 1]
    if (sample == sample[..., :1]).all():
        images = images.mean(3, keepdims=True).round().astype(int).repeat(3, 3)
    levels = np.unique(sample)
    nearest = np.abs(np.arange(256)[:, None] - levels).argmin(1)
    return levels[nearest][images]


def build_backbone(arch):
    """Network from (B, 3, H, W) in [-1, 1] to features (B, width).

    small: for digits. resnet*: of torchvision, at random, with a CIFAR stem (3 x 3, stride 1, no
    pooling) or, named *-imagenet, its own.
    """
    if arch == "small":
        net = nn.Sequential(
            Conv2dNormActivation(3, 32),
            Conv2dNormActivation(32, 64),
            Conv2dNormActivation(64, 128, stride=2),
            Conv2dNormActivation(128, 128, stride=2),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        net.width = 512
        return net
    net = torchvision.models.get_model(arch.removesuffix("-imagenet"))
    if not arch.endswith("-imagenet"):
        net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        net.maxpool = nn.Identity()
    net.width = net.fc.in_features
    net.fc = nn.Identity()
    return net


class VisionTransformer(nn.Module):
    """ViT, DeiT or DINOv2 of transformers: (B, 3, H, W) in [-1, 1], resized, to the CLS token (B,
    width).

    vit: the model's configuration, and side, mean and std of the images it was trained on.
    """

    def __init__(self, vit):
        super().__init__()
        self.vit = vit
        self.model = AutoModel.from_config(AutoConfig.for_model(**vit["config"]))
        self.width = self.model.config.hidden_size

    def forward(self, x):
        side = self.vit["side"]
        x = v2.functional.resize(x / 2 + 0.5, [side, side])
        x = v2.functional.normalize(x, self.vit["mean"], self.vit["std"])
        return self.model(pixel_values=x).last_hidden_state[:, 0]  # after the final norm


def read_dataset(spec, split, args):
    """Part train or test (all, of a set without parts) of NAME[:CLASSES].

    Returns items (picture, label), labels (N,) int64 and class names, or None and [].
    """
    name, _, subset = spec.partition(":")
    try:
        dataset = open_dataset(name, split, args)
        chosen = class_numbers(subset)
    except Exception as error:  # of torchvision, the disk, the network
        sys.exit(f"{spec} cannot be read: {error!r:.200}")
    labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if labels is None and not subset:
        return dataset, None, []
    labels = np.asarray([] if labels is None else labels, np.int64)
    names = getattr(dataset, "classes", None) or [str(c) for c in np.unique(labels)]
    impossible = set(chosen) - set(range(len(names))) or bool(subset) != bool(chosen)
    if impossible or labels.max(initial=0) >= len(names):
        sys.exit(f"{spec}: {name} has {len(names)} class names; give classes as 0-5 or 0,3,7")
    if subset:
        rows = np.flatnonzero(np.isin(labels, chosen))
        dataset = Subset(dataset, rows)
        labels = np.searchsorted(chosen, labels[rows])
        names = [names[c] for c in chosen]
    return dataset, labels, names


def class_numbers(text):
    """Class numbers of "0-5" or "0,1,4-6"; [] of ""."""
    numbers = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return sorted(numbers)


def open_dataset(name, split, args):
    """Data set of (picture, label), by name, from a folder of pictures or arrays, or one .npy."""
    size = args.image_size
    fit = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])
    place = Path(name)
    file = place if place.suffix == ".npy" else place / f"{split}.npy"
    if name == "digits":
        digits = load_digits()
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        return ArrayImages(pixels.repeat(3, 3), digits.target, fit)
    if name == "patches":  # 520 squares of 32 px from two photographs
        photos = np.stack(load_sample_images().images)[:, :416].reshape(2, 13, 32, 20, 32, 3)
        return ArrayImages(photos.swapaxes(2, 3).reshape(-1, 32, 32, 3), None, fit)
    if name in TORCHVISION:
        return TORCHVISION[name](args.data_root, split, fit)
    if file.exists():
        return read_arrays(file, fit)
    if (place / split).is_dir():
        place = place / split
    return datasets.ImageFolder(place, fit, loader=open_picture)


def read_arrays(path, transform):
    """Data set of an .npy file of images, with .labels.npy and classes.txt beside it, if any."""
    images = load_array(path, (None, None, None, 3), np.uint8, "what wrote it")
    dataset = ArrayImages(images, None, transform)
    beside = path.with_suffix(".labels.npy")
    if beside.exists():
        dataset.targets = load_array(beside, images.shape[:1], np.int64, "what wrote it")
    names = path.with_name("classes.txt")
    if names.exists():
        dataset.classes = names.read_text().splitlines()
    return dataset


class ArrayImages(Dataset):
    """Images (N, H, W, 3) uint8 as a data set of torchvision's kind."""

    def __init__(self, images, targets, transform):
        self.images = images
        self.targets = targets
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), 0


def open_picture(path):
    """A picture as RGB; damaged ones and 16-bit grey, which Pillow would cut off, are errors."""
    try:
        with Image.open(path) as picture:
            if picture.mode[0] in "IF":
                raise ValueError(f"mode {picture.mode}, not 8 bits")
            return picture.convert("RGB")
    except Exception as error:  # Pillow raises of every kind
        raise ValueError(f"{path} is no picture to read: {error}") from error


def decode(dataset, path, size):
    """Write the pictures of a data set to an .npy file, (N, size, size, 3) uint8."""
    loader = DataLoader(dataset, 8, num_workers=0 if size <= 64 else min(16, os.cpu_count()))
    blocks = tqdm((x.permute(0, 2, 3, 1).numpy() for x, _ in loader), f"reading {path.name}")
    try:
        write_images(path, (len(dataset), size, size, 3), blocks)
    except Exception as error:  # of open_picture, in a process of the loader's
        sys.exit(str(error).strip().splitlines()[-1])


def write_images(path, shape, blocks):
    """Stream blocks (B, H, W, 3) of uint8 into an .npy file of that shape."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(block.tobytes())


def load_scores(path):
    """Scores (N,) of any real type, as float64."""
    try:
        scores = np.lib.format.open_memmap(path, mode="r").astype(np.float64)
    except Exception as error:  # NumPy raises of every kind on damaged files
        sys.exit(f"{path} is no .npy file of numbers ({error})")
    if scores.ndim != 1 or not scores.size or not np.isfinite(scores).all():
        sys.exit(f"{path} must hold finite scores (N,), N > 0; it holds {scores.shape}")
    return scores


def load_sets(args):
    """Images (N, H, W, 3) uint8 by name: train, id, each OOD set, what paper B generated."""
    writer = "train_scan_diffusion.py"
    data = read_description(args.dir)
    images = {"train": load_array(args.dir / "train.npy", (None, None, None, 3), np.uint8, writer)}
    if max(args.k, args.knn_k) >= len(images["train"]):
        sys.exit(f"--k or --knn-k is not below {len(images['train'])} images; lower it")
    shape = (None, *images["train"].shape[1:])
    images["id"] = load_array(args.dir / "test.npy", shape, np.uint8, writer)
    args.image_size = shape[1]
    for spec in args.ood_data:
        path = args.dir / ".partial.ood.npy"
        dataset, _, names = read_dataset(spec, "test", args)
        decode(dataset, path, args.image_size)
        images[spec] = load_array(path, shape, np.uint8, "this script again")
        path.unlink()  # the map stays
        same = spec.partition(":")[0] == data.get("data", "").partition(":")[0]
        if same and (not names or set(names) & set(data["classes"] or names)):
            sys.exit(
                f"{spec} overlaps with the ID data {data['data']}; name another set or classes"
            )
    for name in ("sd_reconstructions_test", "sd_outliers"):
        path = args.dir / f"{name}.npy"
        if path.exists():
            images[name] = load_array(path, shape, np.uint8, "sample_sd_outliers.py")
    return images


def load_detector(path, args):
    """Network of a classifier_*.pt, in evaluation mode, its options and its training labels."""
    held = load_weights(path, "cpu", "run train_classifier.py again")
    if held["digest"] != read_description(args.dir).get("digest"):
        sys.exit(f"{path} is of other ID data; run train_classifier.py again")
    config = argparse.Namespace(**held["config"])
    net = Detector(config.method, config.arch, config.classes, config.phi_hidden, config.vit)
    net.load_state_dict(held["model"])
    return net.eval().to(args.device), config, held["labels"].numpy()


def features_and_logits(net, images, train, config, args):
    """f(x) (N, D) and logits by head of images (N, H, W, 3) uint8, at the grey levels of train."""
    features = []
    logits = []
    starts = range(0, len(images), args.batch_size)
    for start in tqdm(starts, "features", delay=1, leave=False):
        rows = match_levels(train, images[start : start + args.batch_size])
        x = plain_view(torch.from_numpy(rows).to(args.device), config)
        f, heads = net(x)
        features.append(f)
        logits.append(heads)
    heads = {name: torch.cat([part[name] for part in logits]) for name in logits[0]}
    return torch.cat(features), heads


@torch.no_grad()
def score_detectors(args):
    """{(method, score): {set: (N,) float32}}, {method: facts} and notes, of all classifier_*.pt.

    The sets are ID, the OOD sets, and generated copies of ID test images if there are any.
    """
    images = load_sets(args)
    scored = {}
    facts = {}
    notes = []
    for method in MAIN_SCORE:
        path = args.dir / f"classifier_{method}.pt"
        if not path.exists():
            continue
        net, config, labels = load_detector(path, args)
        features = {}
        logits = {}
        for name, batch in images.items():
            embedded = features_and_logits(net, batch, images["train"], config, args)
            features[name], logits[name] = embedded
        labels = labels[: len(images["train"])]
        for score, values in method_scores(method, net, features, logits, labels, args).items():
            scored[method, score] = values
            for name, part in values.items():
                file = re.sub(r"[^\w.,+-]+", "-", f"{method}.{score}.{name}")
                save(args.dir / "scores" / f"{file}.npy", part)
        accuracy = id_accuracy(logits["id"], labels, args)
        facts[method] = {"id_accuracy": accuracy, "seed": config.seed}
        if method == "ce" and "sd_outliers" in images:
            notes += flip_report(logits["sd_outliers"]["g_in"], args)
    if not scored:
        sys.exit(f"{args.dir} holds no classifier_*.pt; run train_classifier.py")
    save(args.dir / "tsne.png", plot_tsne(features, args))
    return scored, facts, notes


def method_scores(method, net, features, logits, labels, args):
    """{score: {set: (N,) float32}} of a detector, from its features and logits by set."""
    tested = [name for name in features if name not in ("train", "sd_outliers")]
    f = torch.cat([features[name] for name in tested])
    heads = {head: torch.cat([logits[name][head] for name in tested]) for head in logits["id"]}
    D_in = features["train"]
    if method == "sd":
        if "sd_outliers" not in features:
            sys.exit(f"{args.dir} has no sd_outliers.npy for sd; run sample_sd_outliers.py")
        scores = sd_scores(f, D_in, features["sd_outliers"], args.k, args.alpha)
        scores["bin"] = heads["g_bin"].diff()[:, 0]  # log-odds of class 1, an outlier
    else:
        scores = {"knn": knn(F.normalize(f), F.normalize(D_in), args.knn_k)[0][:, -1]}
        if method != "frozen":
            scores |= logit_scores(heads["g_in"])
        if method == "dream":
            scores["phi"] = phi_score(heads["g_in"], net.phi)
    scores = {score: values.cpu().numpy() for score, values in scores.items()}
    scores |= mahalanobis_scores(f.cpu().double().numpy(), D_in.cpu().double().numpy(), labels)
    ends = np.cumsum([len(features[name]) for name in tested])[:-1]
    split = {}
    for score, values in scores.items():
        parts = np.split(values.astype(np.float32), ends)
        split[score] = dict(zip(tested, parts, strict=True))
    return split


def id_accuracy(logits, labels, args):
    """Accuracy on ID test images; Hungarian matching if the labels learnt are not the data's."""
    path = args.dir / "test.labels.npy"
    if "g_in" not in logits or not path.exists():
        return None
    y = load_array(path, (len(logits["g_in"]),), np.int64, "train_scan_diffusion.py")
    table = confusion_matrix(y, logits["g_in"].argmax(1).cpu())
    known = args.dir / "train.labels.npy"
    if known.exists():
        known = load_array(known, labels.shape, np.int64, "train_scan_diffusion.py")
        if np.array_equal(known, labels):
            return table.trace() / table.sum()
    return table[linear_sum_assignment(table, maximize=True)].sum() / table.sum()


def read_outlier_labels(args):
    """y and c_r, (N,) each, of sd_outliers.csv."""
    path = args.dir / "sd_outliers.csv"
    try:
        return np.loadtxt(path, np.int64, delimiter=",", skiprows=1, usecols=(2, 3)).T
    except (OSError, ValueError) as error:
        sys.exit(f"{path} does not load ({error}); run sample_sd_outliers.py again")


def flip_report(logits, args):
    """What the ce classifier takes SD outliers for: y, c_r, another class, or none surely."""
    y, c_r = read_outlier_labels(args)
    if logits.shape[1] != max(y.max(), c_r.max()) + 1:  # clusters that are no classes
        return []
    confidence, label = logits.softmax(1).cpu().max(1)
    doubt = confidence.numpy() < 0.5
    label = label.numpy()
    seen = np.select([doubt, label == y, label == c_r], ["unsure", "y", "c_r"], "other")
    shares = [f"{kind} {(seen == kind).mean():.1%}" for kind in ("y", "c_r", "other", "unsure")]
    return [f"ce takes SD outliers for {', '.join(shares)}"]


def results_table(records):
    """Markdown, in percent, a table per OOD set."""
    head = (
        "| method | score | AUROC | FPR95 | FPR95-OOD | AUPR-in | AUPR-out | ID accuracy | seed |"
    )
    text = (
        "# Results in percent\n\n95 % intervals. FPR95: OOD taken for ID; FPR95-OOD: ID for OOD.\n"
    )
    for ood in dict.fromkeys(record["ood"] for record in records):
        rows = [record for record in records if record["ood"] == ood]
        counts = f"(n = {rows[0]['n_id']}) against {ood} (n = {rows[0]['n_ood']})"
        text += f"\n## {rows[0]['id']} {counts}\n\n{head}\n{'|---' * 9}|\n"
        for r in rows:
            cells = [r["method"], r["score"]]
            for figure in ("auroc", "fpr95"):
                low, high = r[f"{figure}_ci"]
                cells.append(f"{r[figure]:.1%} [{low:.1%}, {high:.1%}]")
            for figure in ("fpr95_ood", "aupr_in", "aupr_out", "id_accuracy"):
                cells.append("-" if r[figure] is None else f"{r[figure]:.1%}")
            text += f"| {' | '.join(cells)} | {r['seed']} |\n"
    return text + "\n"


def plot_roc(shown):
    """ROC curves, a panel per OOD set; shown: {(method, score): {set: (N,)}}, the first set ID."""
    names = list(next(iter(shown.values())))[1:]
    figure = Figure((5 * len(names), 4), dpi=150, layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for key, sets in shown.items():
            scores = np.concatenate([sets["id"], sets[name]])
            is_ood = np.arange(len(scores)) >= len(sets["id"])
            x, y, _ = roc_curve(is_ood, scores)
            axis.plot(x, y, label=", ".join(key))
        axis.set(title=name, xlabel="ID taken for OOD", ylabel="OOD found")
        axis.legend()
    return figure


def plot_scores(shown):
    """Histograms of scores, a panel per detector."""
    figure = Figure((5 * len(shown), 4), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, (key, sets) in zip(axes, shown.items(), strict=True):
        low, high = np.percentile(np.concatenate(list(sets.values())), [0.5, 99.5])
        for name, values in sets.items():
            weights = np.full(len(values), 1 / len(values))
            values = values.clip(low, high)  # tails go into the outer bins
            kind = "stepfilled" if name == "id" else "step"
            axis.hist(values, 40, range=(low, high), weights=weights, histtype=kind, label=name)
        axis.set(title=", ".join(key), xlabel="score (higher: more OOD)", ylabel="share of images")
        axis.legend()
    return figure


def plot_tsne(features, args):
    """t-SNE of up to 300 features of each set: ID blue, OOD red, SD outliers a colour per y."""
    thinned = {}
    for name, f in features.items():
        if name != "train":
            thinned[name] = f[:: len(f) // 300 + 1].cpu().numpy()
    points = np.concatenate(list(thinned.values()))
    places = TSNE(init="random", random_state=args.seed).fit_transform(points)
    figure = Figure((6, 5), dpi=150, layout="constrained")
    axis = figure.subplots()
    colours = {"id": "C0", "sd_reconstructions_test": "C9"}
    if "sd_outliers" in features:
        y, _ = read_outlier_labels(args)
        colours["sd_outliers"] = colormaps["tab20"](y[:: len(y) // 300 + 1] % 20)
    for (name, f), marker in zip(thinned.items(), "os^Dv<>P*X" * 9, strict=False):
        colour = colours.get(name, "C3")
        axis.scatter(*places[: len(f)].T, s=9, c=colour, marker=marker, label=name)
        places = places[len(f) :]
    axis.legend()
    return figure


if __name__ == "__main__":
    main()
