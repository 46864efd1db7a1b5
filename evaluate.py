"""Scores, metrics, tables and pictures for the detectors in --dir, or for anybody's scores.

Paper A: the energy; beside it phi (VOS's score), msp, maxlogit, knn (Sun et al., 2022), mahalanobis
(Lee et al., 2018), relative-mahalanobis (Ren et al., 2021), and on ce gen, vim, react and fdbd.
Paper B: distance, voting and their sum
Score(x) = sum_{i<=k} |f(x) - f(x_d^i)|^2 + alpha sum_{i<=k} 1[I(x_v^i) = 1], with x_d near x in
D_in, x_v in D_in and D_out at 1 : 1; and bin, its binary head. Every score is an OOD score:
higher is more OOD; "score > threshold is OOD" reproduces fpr95.

reads    classifier_*.pt, train.npy, test.npy (N, H, W, 3) uint8, OOD sets; where there: test
         labels, outliers.npy, sd_outliers.npy and .csv, sd_outliers_test.npy,
         sd_reconstructions_test.npy; with --scores files (N,) alone; with --aggregate results.json,
         data.json and options of other folders alone
writes   results.json (fractions), results.md (percent), roc.png, scores.png, tsne.png, misses.png,
         scores/<method>.<score>.<set>.npy (N,) float32 in data-set order, scores.csv (a row per
         image: scores, and 1 where flagged at the 95 % threshold); or aggregate.json, aggregate.md

python evaluate.py                                          # digits 0-5 against 6-9 and photographs
python evaluate.py --dir runs/cifar10 --ood-data cifar100 svhn textures
python evaluate.py --dir runs/mine --scores id.npy ood.npy  # any detector; no model, no data set
python evaluate.py --dir runs --aggregate runs/seed0 runs/seed1 runs/seed2 --baseline ce.energy
"""

import argparse
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import scipy
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from sklearn.covariance import EmpiricalCovariance
from sklearn.datasets import load_digits, load_sample_images
from sklearn.manifold import TSNE
from sklearn.metrics import RocCurveDisplay, average_precision_score, confusion_matrix
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


def gen_score(logits, gamma=0.1, M=100):
    """GEN (Liu et al., CVPR 2023): generalised entropy (N,) of the M largest probabilities."""
    p = logits.double().softmax(1).topk(min(M, logits.shape[1])).values
    return (p**gamma * (1 - p) ** gamma).sum(1)


def react_score(f, D_in, g_in):
    """ReAct (Sun et al., NeurIPS 2021): energy of f, cut off at the 90th percentile of D_in."""
    c = float(np.quantile(D_in.cpu(), 0.9))
    return -energy(g_in(f.clamp(max=c)))


def vim_score(f, D_in, g_in):
    """ViM (Wang et al., CVPR 2022): alpha |x^R| - energy, x^R the part of x - o, o = -W^+ b,
    outside the principal subspace of D_in, of half the dimensions, at most 1,000.
    """
    o = -torch.linalg.pinv(g_in.weight) @ g_in.bias
    x = D_in - o
    rest = x.shape[1] - min(1000, x.shape[1] // 2)
    R = torch.linalg.eigh(x.T @ x).eigenvectors[:, :rest]  # of the smallest eigenvalues
    alpha = g_in(D_in).max(1).values.mean() / (x @ R).norm(dim=1).mean()
    return alpha * ((f - o) @ R).norm(dim=1) - energy(g_in(f))


def fdbd_score(f, D_in, g_in):
    """fDBD (Liu and Qin, ICML 2024): mean distance to the other classes' decision boundaries,
    over the distance to the mean of D_in; negative.
    """
    logits = g_in(f)
    top, predicted = logits.max(1)
    between = torch.cdist(g_in.weight, g_in.weight)[predicted]  # |w_predicted - w_c|, (N, C)
    distance = ((top[:, None] - logits) / between).nan_to_num()  # 0 / 0 for the class itself
    return -distance.sum(1) / (logits.shape[1] - 1) / (f - D_in.mean(0)).norm(dim=1)


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
    near = np.min([squared_length(f - mean, P) for mean in means], axis=0)
    background = squared_length(f - D_in.mean(0), P_0)
    return {"mahalanobis": near, "relative-mahalanobis": near - background}


def frechet_distance(a, b):
    """|m_a - m_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^1/2) of features (N, D) and (M, D)."""
    a = a.cpu().double().numpy()
    b = b.cpu().double().numpy()
    S_a = np.cov(a.T)
    S_b = np.cov(b.T)
    roots = np.linalg.eigvals(S_a @ S_b).real.clip(0) ** 0.5
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return means + S_a.trace() + S_b.trace() - 2 * roots.sum()


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
    fpr95_ood = auroc_fpr95(-out_scores, -in_scores)[1]  # the roles exchanged
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
        "auroc": auroc,
        "auroc_ci": auroc_ci,
        "fpr95": fpr95,
        "fpr95_ci": fpr95_ci,
        "fpr95_ood": fpr95_ood,
        "aupr_in": average_precision_score(~is_ood, -scores),
        "aupr_out": average_precision_score(is_ood, scores),
        "threshold": float(threshold),
    }


def paired_difference(values, baseline):
    """Mean of values - baseline over runs, and half its 95 % interval (Student's t)."""
    d = np.subtract(values, baseline)
    width = scipy.stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d))
    return d.mean(), width


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
    text = "sets of ID classes under another shift, for accuracy"
    parser.add_argument("--shift-data", nargs="+", metavar="SET", default=[], help=text)
    text = "judge these .npy files (N,) and nothing else: ID, then OOD sets"
    parser.add_argument("--scores", nargs="+", type=Path, metavar="NPY", help=text)
    parser.add_argument(
        "--alpha", type=float, help="sd: weight of a vote, else median distance / k"
    )
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples per interval")
    text = "mean and deviation over the results of these folders, paired differences to --baseline"
    parser.add_argument("--aggregate", nargs="+", type=Path, metavar="DIR", help=text)
    parser.add_argument("--baseline", default="ce.energy", help="aggregate: METHOD.SCORE")
    args = parser.parse_args()
    names = {path.name for path in args.scores or []}
    if args.bootstrap < 1 or (args.scores and len(names) < max(2, len(args.scores))):
        parser.error("--scores takes two files or more, of different names; --bootstrap 1 or more")
    return args


def main():
    args = parse_args()
    (args.dir / "scores").mkdir(parents=True, exist_ok=True)
    print("options", vars(args))
    if args.aggregate:
        aggregate(args)
        return
    if args.scores:
        sets = {path.name: load_scores(path) for path in args.scores}
        id_name = args.scores[0].name
        scored = {("scores", "given"): {"id": sets.pop(id_name)} | sets}
        facts = {"scores": {"id_accuracy": None, "seed": args.seed, "given": "-"}}
        notes = []
        images = None
    else:
        id_name = read_description(args.dir).get("data", str(args.dir))
        scored, facts, notes, images = score_detectors(args)
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
    if images:
        save(args.dir / "misses.png", plot_misses(shown, images))
    save(args.dir / "scores.csv", scores_table(scored))
    print(f"{text}\nwrote results.json, results.md, scores.csv, plots to {args.dir}")


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
GENERATED = ("sd_outliers", "outliers")  # for training
MAIN_SCORE = {  # of each method, in plots
    "frozen": "knn",
    "ce": "msp",
    "ce-pseudo": "distance",
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
    device = "cuda" if torch.cuda.is_available() else "cpu"
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
    """Map an .npy file of a shape (None is any length) and sound: labels >= 0, floats finite."""
    try:
        array = np.lib.format.open_memmap(path, mode="c")
        good = [n in (None, m) for n, m in zip(shape, array.shape, strict=True)]
        good += [dtype != np.int64 or array.min() >= 0]
        good += [dtype != np.float32 or np.isfinite(array).all()]
    except Exception:  # NumPy raises of every kind on damaged files
        good = [False]
    if not all(good) or array.dtype != dtype:
        sys.exit(f"{path} is missing, damaged or no sound {np.dtype(dtype)} {shape}; run {writer}")
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
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": shape}
        )
        for block in blocks:
            file.write(block.tobytes())


def load_scores(path):
    """Scores (N,) of any real type, as float64."""
    try:
        scores = np.load(path).astype(np.float64)
    except Exception as error:  # NumPy raises of every kind on damaged files
        sys.exit(f"{path} is no .npy file of numbers ({error})")
    if scores.ndim != 1 or not scores.size or not np.isfinite(scores).all():
        sys.exit(f"{path} must hold finite scores (N,), N > 0; it holds {scores.shape}")
    return scores


def read_images(dataset, train, args):
    """Images (N, H, W, 3) uint8 of a data set, mapped, at the grey levels of `train`."""
    path = args.dir / ".partial.ood.npy"
    decode(dataset, path, args.image_size)
    images = np.load(path, mmap_mode="r+")
    path.unlink()  # the map stays
    for part in np.array_split(images, len(images) // 1000 + 1):
        part[:] = match_levels(train, part)
    return images


def load_shifted(train, args):
    """Images (N, H, W, 3) uint8 and labels (N,) of each --shift-data, of ID classes alone."""
    classes = read_description(args.dir).get("classes", [])
    shifted = {}
    for spec in args.shift_data:
        dataset, labels, names = read_dataset(spec, "test", args)
        y = np.array([classes.index(name) if name in classes else -1 for name in names])[labels]
        rows = np.flatnonzero(y >= 0)
        if not len(rows):
            sys.exit(f"{spec} has no images of the ID classes {classes[:3]} ...; mend its names")
        found = f"{len(np.unique(y[rows]))} of {len(classes)} ID classes"
        images = read_images(Subset(dataset, rows), train, args)
        shifted[f"{spec} (n = {len(rows)}, {found})"] = images, y[rows]
    return shifted


def load_sets(args):
    """Images (N, H, W, 3) uint8 by name: train, id, each OOD set, what the papers generated; and
    load_shifted.
    """
    writer = "train_scan_diffusion.py"
    data = read_description(args.dir)
    images = {"train": load_array(args.dir / "train.npy", (None, None, None, 3), np.uint8, writer)}
    if max(args.k, args.knn_k) >= len(images["train"]):
        sys.exit(f"--k or --knn-k is not below {len(images['train'])} images; lower it")
    shape = (None, *images["train"].shape[1:])
    images["id"] = load_array(args.dir / "test.npy", shape, np.uint8, writer)
    args.image_size = shape[1]
    for spec in args.ood_data:
        dataset, _, names = read_dataset(spec, "test", args)
        images[spec] = read_images(dataset, images["train"], args)
        same = spec.partition(":")[0] == data.get("data", "").partition(":")[0]
        if same and (not names or set(names) & set(data["classes"] or names)):
            sys.exit(
                f"{spec} overlaps with the ID data {data['data']}; name another set or classes"
            )
    for name in ("sd_outliers_test", "sd_reconstructions_test", *GENERATED):
        path = args.dir / f"{name}.npy"
        if path.exists():
            images[name] = load_array(path, shape, np.uint8, "the script that samples it")
    return images, load_shifted(images["train"], args)


def load_detector(path, args):
    """Network of a classifier_*.pt, in evaluation mode, its options and its training labels."""
    held = load_weights(path, "cpu", "run train_classifier.py again")
    if held["digest"] != read_description(args.dir).get("digest"):
        sys.exit(f"{path} is of other ID data; run train_classifier.py again")
    config = argparse.Namespace(**held["config"])
    net = Detector(config.method, config.arch, config.classes, config.phi_hidden, config.vit)
    net.load_state_dict(held["model"])
    return net.eval().to(args.device), config, held["labels"].numpy()


def features_of(net, images, config, args):
    """f(x) (N, D) of images (N, H, W, 3) uint8."""
    features = []
    for start in tqdm(range(0, len(images), args.batch_size), "features", delay=1, leave=False):
        rows = torch.from_numpy(images[start : start + args.batch_size])
        features.append(net.f(plain_view(rows.to(args.device), config)))
    return torch.cat(features)


@torch.no_grad()
def score_detectors(args):
    """{(method, score): {set: (N,) float32}}, {method: facts}, notes and images by set, of all
    classifier_*.pt.

    The sets are ID, the OOD sets, and what was generated from ID test images if there is any.
    """
    images, shifted = load_sets(args)
    scored = {}
    facts = {}
    notes = []
    for method in MAIN_SCORE:
        path = args.dir / f"classifier_{method}.pt"
        if not path.exists():
            continue
        net, config, labels = load_detector(path, args)
        features = {
            name: features_of(net, part, config, args)
            for name, part in images.items()
            if name != "outliers" or method == "frozen"  # many: for the Fréchet distance alone
        }
        for score, values in method_scores(net, features, config, labels, args).items():
            scored[method, score] = values
            for name, part in values.items():
                file = re.sub(r"[^\w.,+-]+", "-", f"{method}.{score}.{name}")
                save(args.dir / "scores" / f"{file}.npy", part)
        facts[method] = {"id_accuracy": None, "seed": config.seed, "given": config.given}
        if method == "frozen":
            notes += frechet_report(features, config.frozen_arch)
            continue
        g_in = net.heads["g_in"]
        facts[method]["id_accuracy"] = id_accuracy(g_in(features["id"]), config, args)
        for name, (part, y) in shifted.items():
            hits = g_in(features_of(net, part, config, args)).argmax(1).cpu().numpy() == y
            notes.append(f"{method}: accuracy {hits.mean():.1%} on {name}")
        if method == "ce-pseudo" and "sd_outliers" in images:
            notes += flip_report(g_in(features["sd_outliers"]), args)
    if not scored:
        sys.exit(f"{args.dir} holds no classifier_*.pt; run train_classifier.py")
    save(args.dir / "tsne.png", plot_tsne(features, args))
    return scored, facts, notes, images


def method_scores(net, features, config, labels, args):
    """{score: {set: (N,) float32}} of a detector, from its features by set."""
    tested = [name for name in features if name not in ("train", *GENERATED)]
    f = torch.cat([features[name] for name in tested])
    D_in = features["train"]
    if config.method == "sd":
        if "sd_outliers" not in features:
            sys.exit(f"{args.dir} has no sd_outliers.npy for sd; run sample_sd_outliers.py")
        scores = sd_scores(f, D_in, features["sd_outliers"], args.k, args.alpha)
        scores["bin"] = net.heads["g_bin"](f).diff()[:, 0]  # log-odds of class 1, an outlier
    else:
        scores = {"distance": knn(f, D_in, args.k)[0].square().sum(1)}  # as sd's
        scores["knn"] = knn(F.normalize(f), F.normalize(D_in), args.knn_k)[0][:, -1]
        if config.method != "frozen":
            g_in = net.heads["g_in"]
            logits = g_in(f)
            scores |= logit_scores(logits)
        if config.method == "ce":
            scores["gen"] = gen_score(logits)
            scores["react"] = react_score(f, D_in, g_in)
            scores["vim"] = vim_score(f, D_in, g_in)
            scores["fdbd"] = fdbd_score(f, D_in, g_in)
        if config.method == "dream" and config.loss == "logistic":
            scores["phi"] = phi_score(logits, net.phi)
    scores = {score: values.cpu().numpy() for score, values in scores.items()}
    labels = labels[: len(D_in)]  # --reconstructions have some more
    scores |= mahalanobis_scores(f.cpu().double().numpy(), D_in.cpu().double().numpy(), labels)
    ends = np.cumsum([len(features[name]) for name in tested])[:-1]
    split = {}
    for score, values in scores.items():
        parts = np.split(values.astype(np.float32), ends)
        split[score] = dict(zip(tested, parts, strict=True))
    return split


def id_accuracy(logits, config, args):
    """Accuracy on ID test images; of clusters after the matching that is best (Hungarian)."""
    path = args.dir / "test.labels.npy"
    if not path.exists():
        return None
    y = load_array(path, (len(logits),), np.int64, "train_scan_diffusion.py")
    table = confusion_matrix(y, logits.argmax(1).cpu())
    if not config.given.startswith("labels"):
        table = table[:, scipy.optimize.linear_sum_assignment(table, maximize=True)[1]]
    return table.trace() / table.sum()


def read_outlier_labels(args):
    """y and c_r, (N,) each, of sd_outliers.csv."""
    path = args.dir / "sd_outliers.csv"
    try:
        return np.loadtxt(path, np.int64, delimiter=",", skiprows=1, usecols=(2, 3)).T
    except (OSError, ValueError) as error:
        sys.exit(f"{path} does not load ({error}); run sample_sd_outliers.py again")


def flip_report(logits, args):
    """What ce-pseudo takes SD outliers for: y, c_r, another class, or none surely."""
    y, c_r = read_outlier_labels(args)
    confidence, label = logits.softmax(1).cpu().max(1)
    doubt = confidence.numpy() < 0.5
    label = label.numpy()
    seen = np.select([doubt, label == y, label == c_r], ["unsure", "y", "c_r"], "other")
    shares = [f"{kind} {(seen == kind).mean():.1%}" for kind in ("y", "c_r", "other", "unsure")]
    return [f"ce-pseudo takes SD outliers for {', '.join(shares)}"]


def frechet_report(features, network):
    """Fréchet distance of generated to ID training images, and between halves of the latter, which
    is larger than that of two sets of their whole number.
    """
    train = features["train"]
    note = f"Fréchet distance in features of {network}, to the training images:"
    for name in GENERATED:
        if name in features:
            note += f" {name} {frechet_distance(features[name], train):.3f},"
    return [f"{note} between halves {frechet_distance(train[::2], train[1::2]):.3f}"]


def scores_table(scored):
    """CSV text: image, set, every score, and 1 where it is above the threshold of 95 % of ID."""
    columns = [f"{method} {score},{method} {score} flagged" for method, score in scored]
    text = ",".join(["image", "set", *columns]) + "\n"
    for name in next(iter(scored.values())):
        columns = []
        for sets in scored.values():
            threshold = auroc_fpr95(sets["id"], sets["id"])[2]
            columns += [sets[name], sets[name] > threshold]
        for i, row in enumerate(np.stack(columns, 1)):
            text += f'{i},"{name}",' + ",".join(f"{value:.7g}" for value in row) + "\n"
    return text


def aggregate(args):
    """Mean ± std over runs of the same data and options, and paired differences to --baseline."""
    groups = {}
    first = {}
    for folder in args.aggregate:
        options = read_description(folder)
        for path in folder.glob("classifier_*.pt"):
            config = load_weights(path, "cpu", "train it again")["config"]
            config |= {"seed": 0, "inputs": 0}
            options |= {f"{path.stem} {name}": value for name, value in config.items()}
        first = first or options
        other = [key for key in first | options if options.get(key) != first.get(key)]
        path = folder / "results.json"
        if other or not path.exists():
            sys.exit(f"{path} is missing or differs from the first in: {', '.join(other)}")
        for row in json.loads(path.read_text()):
            groups.setdefault((row["ood"], row["method"], row["score"]), []).append(row)
    records = []
    head = f"ID against | method | score | AUROC | - {args.baseline} | FPR95 | - {args.baseline}"
    text = f"| {head} |\n{'|---' * 7}|\n"
    for (ood, method, score), rows in groups.items():
        base = groups.get((ood, *args.baseline.split(".")), [])
        if not len(rows) == len(base) == len(args.aggregate) > 1:
            sys.exit(f"{method}.{score} or {args.baseline} is not in each of two runs or more")
        record = {"method": method, "score": score, "ood": ood}
        text += f"| {ood} | {method} | {score} |"
        for figure in ("auroc", "fpr95"):
            values = [row[figure] for row in rows]
            difference, width = paired_difference(values, [row[figure] for row in base])
            mean = np.mean(values)
            std = np.std(values, ddof=1)
            text += f" {mean:.1%} ± {std:.1%} | {difference:+.1%} ± {width:.1%} |"
            record |= {figure: mean, f"{figure}_std": std}
            record |= {f"{figure}_difference": difference, f"{figure}_width": width}
        records.append(record)
        text += "\n"
    save(args.dir / "aggregate.json", json.dumps(records, indent=1) + "\n")
    save(args.dir / "aggregate.md", text)
    print(text)


def results_table(records):
    """Markdown, in percent, a table per OOD set."""
    head = (
        "| method | given | score | AUROC | FPR95 | FPR95-OOD | AUPR-in | AUPR-out | ID accuracy |"
    )
    text = (
        "# Results in percent\n\n95 % intervals. FPR95: OOD taken for ID; FPR95-OOD: ID for OOD.\n"
    )
    for ood in dict.fromkeys(record["ood"] for record in records):
        rows = [record for record in records if record["ood"] == ood]
        counts = f"(n = {rows[0]['n_id']}) against {ood} (n = {rows[0]['n_ood']})"
        text += f"\n## {rows[0]['id']} {counts}\n\n{head}\n{'|---' * 9}|\n"
        for r in rows:
            cells = [r["method"], r["given"], r["score"]]
            for figure in ("auroc", "fpr95"):
                low, high = r[f"{figure}_ci"]
                cells.append(f"{r[figure]:.1%} [{low:.1%}, {high:.1%}]")
            for figure in ("fpr95_ood", "aupr_in", "aupr_out", "id_accuracy"):
                cells.append("-" if r[figure] is None else f"{r[figure]:.1%}")
            text += f"| {' | '.join(cells)} |\n"
    return text + "\n"


def plot_roc(shown):
    """ROC curves, a panel per OOD set; shown: {(method, score): {set: (N,)}}, the first set ID."""
    names = list(next(iter(shown.values())))[1:]
    figure = Figure((5 * len(names), 4), dpi=150, layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for key, sets in shown.items():
            scores = np.concatenate([sets["id"], sets[name]])
            is_ood = np.arange(len(scores)) >= len(sets["id"])
            RocCurveDisplay.from_predictions(is_ood, scores, ax=axis, name=", ".join(key))
        axis.set(title=name, xlabel="ID taken for OOD", ylabel="OOD found")
    return figure


def plot_scores(shown):
    """Histograms of scores, a panel per detector."""
    figure = Figure((5 * len(shown), 4), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, (key, sets) in zip(axes, shown.items(), strict=True):
        low, high = np.percentile(np.concatenate(list(sets.values())), [0.5, 99.5])
        for name, values in sets.items():
            values = values.clip(low, high)  # tails go into the outer bins
            kind = "stepfilled" if name == "id" else "step"
            axis.hist(values, 40, range=(low, high), density=True, histtype=kind, label=name)
        axis.set(title=", ".join(key), xlabel="score (higher: more OOD)", ylabel="density")
        axis.legend()
    return figure


def plot_misses(shown, images):
    """Of every set but the ID images the ten that a detector takes for ID most surely."""
    rows = [(key, name) for key, sets in shown.items() for name in list(sets)[1:]]
    figure = Figure((10, 1.3 * len(rows)))
    for line, (key, name) in zip(figure.subplots(len(rows), 10, squeeze=False), rows, strict=True):
        line[0].set_title(f"{', '.join(key)}: {name}", loc="left")
        for axis, i in zip(line, shown[key][name].argsort(), strict=False):
            axis.imshow(images[name][i])
        for axis in line:
            axis.axis("off")
    return figure


def plot_tsne(features, args):
    """t-SNE of up to 300 features of each set; SD outliers are crosses, coloured by y."""
    thinned = {}
    for name, f in features.items():
        if name != "train":
            thinned[name] = f[:: len(f) // 300 + 1].cpu().numpy()
    points = np.concatenate(list(thinned.values()))
    places = TSNE(init="random", random_state=args.seed).fit_transform(points)
    figure = Figure((6, 5), dpi=150, layout="constrained")
    axis = figure.subplots()
    for name, f in thinned.items():
        style = {}
        if name == "sd_outliers":
            y, _ = read_outlier_labels(args)
            style = {"c": y[:: len(y) // 300 + 1], "cmap": "turbo", "marker": "x"}
        axis.scatter(*places[: len(f)].T, s=9, label=name, **style)
        places = places[len(f) :]
    axis.legend()
    return figure


if __name__ == "__main__":
    main()

# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6.0",
#     "torchvision>=0.21.0",
#     "transformers>=4.50.0",
#     "numpy>=1.26.4",
#     "scikit-learn>=1.5.2",
#     "scipy>=1.11.4",
#     "pillow>=10.4.0",
#     "matplotlib>=3.8.4",
#     "tqdm>=4.66.5",
# ]
# ///
