"""Scores, metrics, tables and pictures for the classifiers in the shared directory, or for anybody's scores.

Paper A: energy, phi (section 3.3); beside them msp, maxlogit and knn (Sun et al., 2022). Paper B, x_d near x in D_in,
x_v in D_in and D_out, 1 : 1: Score(x) = sum_{i<=k} |f(x) - f(x_d^i)|^2 + alpha sum_{i<=k} 1[I(x_v^i) = 1].
Every score is an OOD score: higher is more OOD; "score > threshold is OOD" reproduces fpr95.

reads    classifier_*.pt, train.npy, test.npy (N, H, W, 3) uint8, the OOD sets; where there: test.labels.npy (N,) int64,
         sd_outliers.npy and .csv, outliers.npy, sd_reconstructions_test.npy; with --scores files (N,) of real numbers
writes   results.json (fractions; null for what does not exist and for an infinite threshold; seed: of the training),
         results.md, scores/<method>.<score>.<set>.npy (N,) float32 in data-set order, roc.png, scores.png, tsne.png

python evaluate.py                                               # digits 0-5 against 6-9 and photographs: seconds
python evaluate.py --dir runs/cifar10 --ood-data cifar100 svhn
python evaluate.py --dir runs/mine --scores id.npy ood.npy       # any detector; no model, no data set
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
from matplotlib.figure import Figure
from PIL import Image
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_digits, load_sample_images
from sklearn.manifold import TSNE
from sklearn.metrics import average_precision_score, confusion_matrix
from torch import nn
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

RECIPES = {  # option: help, value per recipe
    "recipe": ("column of the table RECIPES", "digits", "cifar10", "cifar100"),
    "batch_size": ("images per forward pass", 512, 512, 512),
    "k": ("sd: neighbours that are summed, k of paper B", 2, 2, 2),
    "knn_k": ("knn: the score is the distance to this neighbour", 10, 50, 50),
}
MAIN_SCORE = {"ce": "msp", "dream": "energy", "dream-id": "msp", "sd": "distance+voting", "scores": "given"}  # in plots


def fail(message, status=1):
    """End the script with one line on standard error; status 2 is for the command line."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(status)


def parse_recipe(parser):
    """Add an option per row of RECIPES, parse, and fill in args.data, args.device and what the recipe gives."""
    parser.error = lambda message: fail(f"{message}; see --help", 2)
    for option, (text, *values) in RECIPES.items():
        kind = {"choices": values} if option == "recipe" else {"type": type(values[0])}
        text += " (default: the data set's)" if option == "recipe" else f" (default: {' | '.join(map(str, values))})"
        parser.add_argument("--" + option.replace("_", "-"), help=text, **kind)
    args, columns = parser.parse_args(), RECIPES["recipe"][1:]
    by_hand = str(args.dir) if (args.dir / "train.npy").exists() else "digits:0-5"
    args.data = getattr(args, "data", None) or read_description(args.dir).get("name", by_hand)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu")
    name = args.recipe or Path(args.data.split(":")[0]).stem
    if name not in columns:
        fail(f"no recipe is named after the data set '{name}'; add --recipe {{{','.join(columns)}}}", 2)
    for option, (_, *values) in RECIPES.items():
        given = getattr(args, option)
        setattr(args, option, value := values[columns.index(name)] if given is None else given)
        if not isinstance(value, str) and not (0 < value < math.inf or value == 0 and 0 in values):
            fail(f"--{option.replace('_', '-')} is {value}; it must be {'at least' if 0 in values else 'above'} 0", 2)
    print("recipe", "  ".join(f"{option}={getattr(args, option)}" for option in RECIPES))
    return args


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/digits"), help="shared directory (default: %(default)s)")
    sets = "OOD: NAME[:CLASSES], a torchvision set, a folder or a .npy file (default: digits:6-9 patches)"
    parser.add_argument("--ood-data", nargs="+", metavar="SET", default=["digits:6-9", "patches"], help=sets)
    parser.add_argument("--data-root", default="data", help="where torchvision keeps data sets (default: %(default)s)")
    parser.add_argument("--scores", nargs="+", type=Path, metavar="NPY", help="judge these instead: ID, then OOD sets")
    parser.add_argument("--alpha", type=float, help="sd: weight of a vote (default: median ID distance score / k)")
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples per interval (default: %(default)s)")
    parser.add_argument("--device", help="torch device (default: cuda, mps or cpu)")
    parser.add_argument("--seed", type=int, default=0, help="seed of bootstrap and t-SNE (default: %(default)s)")
    parser.set_defaults(data="digits" if "--scores" in sys.argv else None)  # score files need no recipe
    args = parse_recipe(parser)
    args.names = [path.name for path in args.scores[1:]] if args.scores else args.ood_data
    if not args.names or len({"id", *args.names}) <= len(args.names):
        fail("--ood-data, or --scores after the ID file, needs one or more names, all different and none of them id", 2)
    if args.bootstrap < 1 or args.seed < 0 or not 0 <= (args.alpha or 0) < math.inf:
        fail("--bootstrap must be at least 1, --seed and --alpha at least 0", 2)
    return args


def save(path, content):
    """Write a .npy, .pt or text file under a temporary name, then rename: what has its final name is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".partial.{path.name}")
    writers = {".npy": np.save, ".pt": lambda file, content: torch.save(content, file)}
    writers.get(path.suffix, Path.write_text)(temporary, content)
    os.replace(temporary, path)


def load_array(path, shape, dtype, writer):
    """Map an .npy file and check it: None in `shape` is any length, labels (int) are >= 0, floats are finite."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        fits = array.dtype == dtype and array.ndim == len(shape) and array.size > 0
    except (OSError, ValueError, EOFError, AttributeError):
        fail(f"{path} is {'not a complete .npy array' if path.exists() else 'missing'}; run {writer}")
    if not fits or any(n not in (None, m) for n, m in zip(shape, array.shape, strict=True)):
        wanted = f"{np.dtype(dtype)} {shape}".replace("None", "any")
        fail(f"{path} holds {array.dtype} {array.shape}, expected {wanted}; run {writer} again")
    if array.dtype.kind == "f" and not np.isfinite(array).all() or array.dtype.kind == "i" and array.min() < 0:
        fail(f"{path} holds NaN, infinite or negative values; run {writer} again")
    return array


def read_description(folder):
    """data.json of the shared directory; {} where there is none (arrays brought by hand)."""
    try:
        return json.loads((folder / "data.json").read_text()) if (folder / "data.json").exists() else {}
    except ValueError:
        fail(f"{folder / 'data.json'} is damaged; delete it and run the first script again")


def read_picture(source, size):
    """A file, PIL image or (H, W, 3) uint8 array -> (size, size, 3) uint8: short side to size, centre square."""
    try:
        image = Image.open(source) if isinstance(source, Path) else TF.to_pil_image(source)
        return np.array(TF.center_crop(TF.resize(image.convert("RGB"), size), size))
    except (OSError, ValueError, SyntaxError) as error:
        fail(f"{source} cannot be read as a picture ({error}); mend it or remove it")


def read_images(spec, split, size):
    """A split of a data set (see --help): images (N, size, size, 3) uint8, labels (N,) int64 or None, names or None.

    split: train, test (every fifth image of a class where a set is not split), ood (as test, or all if not split).
    """
    name, _, subset = spec.partition(":")
    path, part, labels, names = Path(name), "train" if split == "train" else "test", None, None
    file = path / f"{part}.npy"
    divided = file.exists() or (path / part).is_dir()
    if name == "digits":
        (pictures, labels), names = load_digits(return_X_y=True), list("0123456789")
        pictures = np.rint(pictures * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1).repeat(3, axis=3)
    elif name == "patches":  # 520 squares of 32 px
        corners = [(y, x) for y in range(0, 416, 32) for x in range(0, 640, 32)]
        pictures = [photo[y : y + 32, x : x + 32] for photo in load_sample_images().images for y, x in corners]
    elif file.exists() or path.suffix == ".npy":
        file = file if divided else path
        pictures = load_array(file, (None, None, None, 3), np.uint8, "the program that wrote it")
        if (beside := file.with_suffix(".labels.npy")).exists():
            labels = load_array(beside, pictures.shape[:1], np.int64, "the program that wrote it")
        names = (path / "classes.txt").read_text().splitlines() if (path / "classes.txt").exists() else None
    elif path.is_dir():
        path = path / part if divided else path
        names = sorted(folder.name for folder in path.iterdir() if folder.is_dir()) or None
        pictures = [file for file in sorted(path.glob("*/*" if names else "*")) if file.name[0] != "."]
        labels = names and [names.index(file.parent.name) for file in pictures]
    else:
        fail(f"there is no data set {name}: give digits, patches, a folder of images or arrays, or a .npy file", 2)
    known, keep = np.zeros(len(pictures), np.int64) if labels is None else np.asarray(labels), np.arange(len(pictures))
    if subset:
        ends = [n.split("-") for n in subset.split(",")] if re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", subset) else []
        chosen = sorted({c for end in ends for c in range(int(end[0]), min(int(end[-1]), len(known)) + 1)})
        if labels is None or not chosen or not set(chosen) <= set(known.tolist()):
            fail(f"{spec}: give classes as 0-5 or 0,3,7; {name} has {len(np.unique(known))}", 2)
        keep, names = keep[np.isin(known, chosen)], names and [names[c] for c in chosen]
        known = np.searchsorted(chosen, known)
    if not divided and split != "ood":
        rank = np.array([(known[:i] == known[i]).sum() for i in range(len(known))])  # within the class
        keep = keep[(rank[keep] % 5 == 4) == (split == "test")]
    if not len(keep):
        fail(f"{spec} has no {split} pictures; looked for them in {path}")
    as_is = isinstance(pictures, np.ndarray) and pictures.shape[1:3] == (size, size)
    images = pictures[keep] if as_is else np.stack([read_picture(pictures[i], size) for i in tqdm(keep, desc=spec)])
    return images, None if labels is None else known[keep], names


def build_backbone(arch):
    """(B, 3, H, W) in [-1, 1] -> features (B, D); returns also D. small: for digits; resnet*: CIFAR stem."""
    if arch == "small":
        layers, width = [], 3
        for out, stride in ((32, 1), (64, 1), (128, 2), (128, 2)):
            layers += [nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            width = out
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten()), 4 * width
    net = getattr(torchvision.models, arch)()
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    width, net.fc = net.fc.in_features, nn.Identity()
    return net, width


class Detector(nn.Module):
    """A backbone f with the linear heads of one method, on images (B, 3, H, W) in [-1, 1].

    g_in (C) for ce, dream, dream-id; g_bin (2), g_in (C), g_out (C) for sd; phi (1 -> 2) on the energy for dream.
    """

    def __init__(self, method, arch, classes, phi_hidden):
        super().__init__()
        self.f, width = build_backbone(arch)
        sizes = {"g_bin": 2, "g_in": classes, "g_out": classes} if method == "sd" else {"g_in": classes}
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


def knn(queries, bank, k, chunk=1024):
    """Distances and indices (N, k), nearest first, of the rows of bank (M, D) around queries (N, D), float32."""
    if not 0 < k <= len(bank):
        fail(f"k = {k} nearest neighbours asked for among {len(bank)}; choose another k")
    centre, found = bank.mean(0), []
    half = (bank - centre).square().sum(1) / 2
    for q in tqdm(queries.split(chunk), desc="neighbours", delay=1, leave=False):  # a few candidates more, then exact
        rough = torch.addmm(half, q - centre, (bank - centre).T, alpha=-1)
        near = rough.topk(min(k + 8, len(bank)), largest=False).indices
        exact, order = torch.stack([(q - bank[column]).norm(dim=1) for column in near.T], dim=1).sort(dim=1)
        found.append((exact[:, :k], near.gather(1, order[:, :k])))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def features_and_logits(net, images, args):
    """f(x) (N, D) and the logits of every head, by name, for images (N, H, W, 3) uint8; all on args.device."""
    parts = []
    for start in tqdm(range(0, len(images), args.batch_size), desc="images", delay=1, leave=False):
        x = torch.from_numpy(np.array(images[start : start + args.batch_size])).to(args.device)
        parts.append(net(x.permute(0, 3, 1, 2).float() / 127.5 - 1))
    return torch.cat([f for f, _ in parts]), {name: torch.cat([h[name] for _, h in parts]) for name in parts[0][1]}


def sd_score_terms(f, D_in, D_out, k):
    """The two sums of paper B's score, (N,) each, from features (., D): f of x, D_in of training images, D_out."""
    n = min(len(D_in), len(D_out))
    both = torch.cat([bank[torch.arange(n) * len(bank) // n] for bank in (D_in, D_out)])  # 1 : 1
    return knn(f, D_in, k)[0].square().sum(1), (knn(f, both, k)[1] >= n).sum(1)


def vote_weight(D_in, k):
    """alpha: the median over training images of (distance score / k), none its own neighbour; no OOD data."""
    distance, index = knn(D_in, D_in, k + 1)
    own = index == torch.arange(len(D_in), device=index.device)[:, None]
    own[:, -1] |= ~own.any(1)  # more than k exact copies of it came first
    return distance[~own].view(-1, k).square().mean(1).median().item()


def auroc_fpr95(n_in, n_out):
    """AUROC, fpr95, place of its threshold; from counts (..., V) of ID and OOD at each distinct score, ascending."""
    in_up, out_up = n_in.cumsum(-1), n_out.cumsum(-1)  # how many have at most this score
    N, M = in_up[..., -1], out_up[..., -1]
    auroc = (n_out * (2 * in_up - n_in)).sum(-1) / (2 * N * M)  # half credit for ties; whole numbers until here
    t = (20 * in_up >= 19 * N[..., None]).argmax(-1)  # the first that keeps 95 % of ID
    return auroc, np.take_along_axis(out_up, t[..., None], -1)[..., 0] / M, t


def metrics(in_scores, out_scores, resamples, seed):
    """The figures of one record, exact under ties and with infinities; intervals: 95 % of resamples of ID and OOD."""
    values, place = np.unique(np.concatenate([in_scores, out_scores]), return_inverse=True)
    V, is_ood, drawn, rng = len(values), np.arange(len(place)) >= len(in_scores), [], np.random.default_rng(seed)
    places, step = (place[~is_ood], place[is_ood]), max(1, 2**21 // V)
    n_in, n_out = (np.bincount(p, minlength=V) for p in places)
    for start in range(0, resamples, step):
        offset = V * np.arange(min(step, resamples - start))[:, None]
        draws = (p[rng.integers(len(p), size=(len(offset), len(p)))] + offset for p in places)
        counts = (np.bincount(d.ravel(), minlength=offset.size * V).reshape(-1, V) for d in draws)
        drawn.append(auroc_fpr95(*counts)[:2])
    auroc_ci, fpr95_ci = np.percentile(np.concatenate(drawn, axis=1), [2.5, 97.5], axis=1).T.tolist()
    (auroc, fpr95, t), fpr95_ood = auroc_fpr95(n_in, n_out), auroc_fpr95(n_out[::-1], n_in[::-1])[1]  # roles exchanged
    result = {"n_id": len(in_scores), "n_ood": len(out_scores), "auroc": auroc, "auroc_ci": auroc_ci, "fpr95": fpr95}
    result |= {"fpr95_ci": fpr95_ci, "fpr95_ood": fpr95_ood, "aupr_in": average_precision_score(~is_ood, -place)}
    result |= {"aupr_out": average_precision_score(is_ood, place)}
    return result | {"threshold": values[t].item() if np.isfinite(values[t]) else None}


def id_accuracy(predicted, labels, whose_labels):
    """Share of ID images (N,) labelled right, for pseudo-labels after Hungarian matching."""
    table = confusion_matrix(labels, predicted)
    matched = table[linear_sum_assignment(table, maximize=True)] if whose_labels == "pseudo" else table.diagonal()
    return float(matched.sum() / len(labels))


def labels_of_outliers(logits, y, c_r, pseudo=None, labels=None):
    """How the ce classifier labels SD outliers, from logits (M, C). pseudo, labels (N,): to translate y and c_r."""
    if labels is not None:  # the most frequent label of each pseudo-label
        votes = [labels[pseudo == c] for c in range(max(y.max(), c_r.max()) + 1)]
        y, c_r = np.array([np.bincount(v).argmax() if len(v) else -1 for v in votes])[np.stack([y, c_r])]
    confidence, label = logits.softmax(1).cpu().numpy().max(1), logits.argmax(1).cpu().numpy()
    kinds = np.select([confidence < 0.5, label == y, label == c_r], ["unsure", "y", "c_r"], "other")
    return {kind: float((kinds == kind).mean()) for kind in ("y", "c_r", "other", "unsure")}


def load_scores(path):
    """Scores (N,) of any real type, infinities allowed."""
    try:
        scores = np.load(path, allow_pickle=False)
        fits = scores.ndim == 1 and scores.size and scores.dtype.kind in "fiub" and not np.isnan(scores).any()
    except Exception as error:  # numpy and zipfile know many
        fail(f"{path} is no complete .npy array of numbers ({type(error).__name__}); write it with numpy.save")
    if not fits:
        fail(f"{path} holds {scores.dtype} {scores.shape}, or NaN; give one real number per image")
    return scores.astype(np.float64) if scores.dtype.kind == "b" or scores.dtype.itemsize > 8 else scores


def read_directory(args):
    """What is in --dir and the OOD sets, all checked: [(network, configuration)], {set: images}, arrays by name."""
    data, arrays, nets, first = read_description(args.dir), {}, [], "the first script in an empty --dir"
    paths = [path for method in MAIN_SCORE if (path := args.dir / f"classifier_{method}.pt").exists()]
    if not paths:
        fail(f"{args.dir} holds no classifier_*.pt; run train_classifier.py, or give --scores ID.npy OOD.npy")
    size, writers = data.get("image_size"), {"test": first, "train": first, "outliers": "sample_outliers.py"}
    for name in ("test", "train", "outliers", "sd_outliers", "sd_reconstructions_test"):
        path, writer = args.dir / f"{name}.npy", writers.get(name, "sample_sd_outliers.py")
        if writer == first or path.exists() or name == "sd_outliers" and args.dir / "classifier_sd.pt" in paths:
            arrays[name] = load_array(path, (data.get(name), size, size, 3), np.uint8, writer)
            size = arrays[name].shape[1]
    for name, images in (("test.labels", "test"), ("train.labels", "train"), ("pseudo_labels", "train")):
        if (path := args.dir / f"{name}.npy").exists():
            arrays[name] = load_array(path, arrays[images].shape[:1], np.int64, first)
    if "sd_outliers" in arrays and (path := args.dir / "sd_outliers.csv").exists():
        try:
            table = np.loadtxt(path, np.int64, delimiter=",", skiprows=1, usecols=(2, 3), ndmin=2)
            arrays["y"], arrays["c_r"] = (
                table.T if len(table) == len(arrays["sd_outliers"]) and table.min() >= 0 else ()
            )
        except (OSError, ValueError):
            fail(f"{path} is damaged or not of sd_outliers.npy; run sample_sd_outliers.py again")
    for path in paths:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            config, digest = content["config"], content["digest"]
            net = Detector(*(config[name] for name in ("method", "arch", "classes", "phi_hidden"))).eval()
            net.load_state_dict(content["model"])
            fits = config["image_size"] == size and digest in (None, data.get("digest", digest))
            fits = fits and {"seed", "whose_labels"} <= {*config} and path.stem == f"classifier_{config['method']}"
        except Exception:  # torch, pickle and zipfile know many
            fits = False
        if not fits:
            fail(f"{path} is damaged or of other data; run train_classifier.py again")
        nets.append((net.to(args.device), config))
    sets, grey = {"id": arrays["test"]}, (arrays["test"] == arrays["test"][..., :1]).all()
    for spec in args.ood_data:
        images = read_images(spec, args.data_root, "ood", size)[0]
        luminance = np.rint(images @ [0.299, 0.587, 0.114]).astype(np.uint8)[..., None].repeat(3, axis=3)
        sets[spec] = luminance if grey else images  # colour shall not give OOD images away
    return nets, sets, arrays


@torch.no_grad()
def score_classifiers(args):
    """{(method, score): {set: (N,) float32}}, {method: facts}, notes, t-SNE's {group: (features, colours)}."""
    (nets, sets, arrays), scored, facts, notes, tsne = read_directory(args), {}, {}, [], {}
    for net, config in tqdm(nets, desc="classifiers", leave=False):
        method, own, groups, copies = config["method"], dict(sets), {}, "sd_reconstructions_test"
        D_in, made = (
            features_and_logits(net, arrays["train"], args)[0],
            "outliers" if method == "dream" else "sd_outliers",
        )
        if made in arrays:
            D_out, logits = features_and_logits(net, arrays[made], args)
        names = ("y", "c_r") + ("pseudo_labels", "train.labels") * (config["whose_labels"] == "dataset")
        if method == "ce" and set(names) <= set(arrays):
            shares = labels_of_outliers(logits["g_in"], *(arrays[name] for name in names)).items()
            notes.append("ce labels SD outliers as " + ", ".join(f"{name} {share:.1%}" for name, share in shares))
        if method == "sd":
            alpha = vote_weight(D_in, args.k) if args.alpha is None else args.alpha
            notes.append(f"sd: alpha = {alpha:.4g}")
            if copies in arrays:
                own[copies] = arrays[copies]
                notes.append(
                    f"{copies}, generated ID: AUROC near 50 % is a semantic detector, near 100 % one of artefacts"
                )
        for name, images in own.items():
            f, logits = features_and_logits(net, images, args)
            if method == "sd":
                distance, voting = sd_score_terms(f, D_in, D_out, args.k)
                scores = {"distance": distance, "voting": voting, "distance+voting": distance + alpha * voting}
                scores["bin"] = logits["g_bin"].diff()[:, 0]  # log-odds of class 1: outlier
            else:  # msp is log(1 - max softmax): the same order, and never rounded to 0
                z, E = logits["g_in"], energy(logits["g_in"])
                others = z.scatter(1, z.argmax(1, keepdim=True), -math.inf)
                scores = {"msp": torch.logsumexp(others, 1) - E, "maxlogit": -z.max(1).values, "energy": -E}
                scores["knn"] = knn(F.normalize(f), F.normalize(D_in), args.knn_k)[0][:, -1]
            if method == "dream":
                scores["phi"] = -net.phi(E[:, None]).diff()[:, 0]  # log-odds of class 0: OOD
            for score, values in scores.items():
                scored.setdefault((method, score), {})[name] = values.cpu().numpy().astype(np.float32)
                if values.isnan().any():
                    fail(f"classifier_{method}.pt gives {score} scores that are NaN; run train_classifier.py again")
            if name == "id":
                predicted, labels = logits["g_in"].argmax(1).cpu(), arrays.get("test.labels")
                accuracy = None if labels is None else id_accuracy(predicted, labels, config["whose_labels"])
                facts[method] = {"id_accuracy": accuracy, "seed": config["seed"]}
            if name != copies:
                groups[name] = f[:: 1 + len(f) // 400], "tab:blue" if name == "id" else "tab:red"
        if method in ("sd", "dream") and made in arrays:
            y = arrays["y"] if method == "sd" and "y" in arrays else np.zeros(len(D_out), np.int64)
            colours = np.array([f"C{i}" for i in (1, 2, 4, 5, 6, 7, 8, 9)])[
                y % 8
            ]  # one per pseudo-label, not blue or red
            groups["outliers"] = D_out[:: 1 + len(y) // 400], colours[:: 1 + len(y) // 400]
        tsne = groups if method in ("sd", "dream") or not tsne else tsne  # sd's, else dream's, else the first
    for key, by_set in scored.items():
        for name, values in by_set.items():
            save(args.dir / "scores" / (re.sub(r"[^\w.,+-]+", "-", ".".join([*key, name])) + ".npy"), values)
    return scored, facts, notes, tsne


def draw(folder, scored, tsne, seed):
    """roc.png, a panel per OOD set; scores.png, one per method; tsne.png of at most 400 images per set."""
    shown = {key: sets for key, sets in scored.items() if MAIN_SCORE[key[0]] == key[1]}
    names = dict.fromkeys(name for sets in shown.values() for name in sets if name != "id")
    width = {"roc": len(names), "scores": len(shown)} | ({"tsne": 1} if tsne else {})
    figures = {name: Figure((5 * count, 4), layout="constrained") for name, count in width.items()}
    axes = {name: figure.subplots(1, width[name], squeeze=False)[0] for name, figure in figures.items()}
    for axis, name in zip(axes["roc"], names, strict=True):
        for key, sets in ((key, sets) for key, sets in shown.items() if name in sets):
            values = np.unique(np.concatenate([sets["id"], sets[name]]))[::-1]
            x, y = (1 - np.searchsorted(np.sort(s), values) / len(s) for s in (sets["id"], sets[name]))
            axis.plot([0, *x], [0, *y], label=", ".join(key))
        axis.set(title=name, xlabel="ID taken for OOD", ylabel="OOD found")
    for axis, ((method, score), sets) in zip(axes["scores"], shown.items(), strict=True):
        inner = np.concatenate([s.astype(np.float64) for s in sets.values()])
        low, high = np.percentile([*inner[np.abs(inner) < 1e300]] or [0], [0.5, 99.5])
        for name, s in sets.items():  # tails and infinities go into the outer bins
            look = {"alpha": 0.5} if name == "id" else {"histtype": "step"}
            shares = np.full(len(s), 1 / len(s))
            axis.hist(np.clip(s.astype(np.float64), low, high), 40, (low, high), weights=shares, label=name, **look)
        axis.set(title=method, xlabel=f"{score} (higher: more OOD)", ylabel="share of images")
    if tsne:
        points = np.concatenate([f.cpu().numpy() for f, _ in tsne.values()])
        mapper = TSNE(perplexity=min(30, (len(points) - 1) / 3), init="random", max_iter=500, random_state=seed % 2**32)
        parts = np.split(mapper.fit_transform(points), np.cumsum([len(f) for f, _ in tsne.values()])[:-1])
        for number, (part, (name, (_, colour))) in enumerate(zip(parts, tsne.items(), strict=True)):
            axes["tsne"][0].scatter(*part.T, s=9, c=colour, marker="o^sDvP<>*x"[number % 10], label=name)
    for name, figure in figures.items():
        for axis in axes[name]:
            axis.legend()
        figure.savefig(folder / f".partial.{name}.png", dpi=150)
        os.replace(folder / f".partial.{name}.png", folder / f"{name}.png")


def markdown(records, notes):
    """results.md: in percent, a table per OOD set."""
    text = "# Results\n\n95 % bootstrap intervals. FPR95: OOD taken for ID when 95 % of ID is kept (both papers);\nFPR95-OOD: "
    text += "ID flagged when 95 % of OOD is found (OpenOOD).\n"
    columns = "| method | score | AUROC | FPR95 | FPR95-OOD | AUPR-in | AUPR-out | ID accuracy | seed |\n|---|---|"
    for i, r in enumerate(records):
        if i == 0 or r["ood"] != records[i - 1]["ood"]:
            text += (
                f"\n## {r['id']} (n = {r['n_id']}) against {r['ood']} (n = {r['n_ood']})\n\n{columns}{7 * '---:|'}\n"
            )
        cells = [f"{r[m]:.1%} [{r[m + '_ci'][0]:.1%}, {r[m + '_ci'][1]:.1%}]" for m in ("auroc", "fpr95")]
        cells += [f"{r[m]:.1%}" for m in ("fpr95_ood", "aupr_in", "aupr_out")]
        cells += ["-" if r["id_accuracy"] is None else f"{r['id_accuracy']:.1%}", str(r["seed"])]
        text += f"| {r['method']} | {r['score']} | {' | '.join(cells)} |\n"
    return text + "".join(f"\n- {note}" for note in notes) + "\n"


def main():
    args = parse_args()
    if args.scores:
        files = zip(["id", *args.names], args.scores, strict=True)
        scored, notes, tsne = {("scores", "given"): {name: load_scores(path) for name, path in files}}, [], {}
        args.data, facts = args.scores[0].name, {"scores": {"id_accuracy": None, "seed": args.seed}}
    else:
        scored, facts, notes, tsne = score_classifiers(args)
    jobs = [(name, *key) for key, sets in scored.items() for name in sets if name != "id"]
    jobs, records = sorted(jobs, key=lambda job: [*args.names, job[0]].index(job[0])), []  # grouped by OOD set
    for ood, method, score in tqdm(jobs, desc="bootstrap", leave=False):
        record = {"method": method, "score": score, "id": args.data, "ood": ood} | facts[method]
        sets = scored[method, score]
        records.append(record | metrics(sets["id"], sets[ood], args.bootstrap, args.seed))
    save(args.dir / "results.md", text := markdown(records, notes))
    save(args.dir / "results.json", json.dumps(records, indent=1, allow_nan=False) + "\n")
    draw(args.dir, scored, tsne, args.seed)
    print(text + f"\nwrote results.json, results.md, pictures{'' if args.scores else ', scores/'} to {args.dir}")


if __name__ == "__main__":
    main()
