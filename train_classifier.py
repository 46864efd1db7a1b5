"""The detectors of both papers and their baseline: plain cross-entropy, DREAM-OOD, DREAM-ID, SD outliers.

ce        CE on ID images: the baseline.
dream     Paper A: CE(g_in(f(x)), y) + beta CE(phi(E(x)), 1[x is ID]), E the negative free energy; ID images and
          imagined outliers share each batch, from the first step.
dream-id  Paper A: CE on ID images and imagined inliers.
sd        Paper B: CE(g_bin, I) + (1 - I) CE(g_in, y) + I lam CE(g_out, y), I = 1 for an outlier, y its pseudo-label.

reads    train.npy with train.labels.npy (ce, dream), pseudo_labels.npy (sd; ce and dream without labels) or
         id_labels.npy (dream-id); outliers.npy (dream), inliers.npy with inlier_labels.npy (dream-id), sd_outliers.npy
         with sd_outliers.csv (sd), sd_reconstructions.npy (sd with --reconstructions)
writes   classifier_{ce,dream,dream-id,sd}.pt: weights of f, heads and phi, configuration

python train_classifier.py                                   # every method whose inputs are in --dir
python train_classifier.py --dir runs/cifar10 --method sd
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from tqdm import tqdm

RECIPES = {  # option: help, value per recipe. cifar100: paper A as released; cifar10: the same for one GPU
    "recipe": ("column of the table RECIPES", "digits", "cifar10", "cifar100"),
    "seed": ("seed of every random number, 0 for the first run", 0, 0, 0),
    "arch": ("backbone, small|resnet18|resnet34", "small", "resnet34", "resnet34"),
    "epochs": ("passes over the ID images", 40, 200, 200),
    "batch_size": ("ID images per step; as many outliers come with them", 64, 256, 256),
    "lr": ("learning rate of SGD, cosine per step to 1e-6", 0.1, 0.1, 0.1),
    "weight_decay": ("weight decay, 0 for none", 5e-4, 5e-4, 5e-4),
    "beta": ("dream: weight of the energy regularisation, 0 for none", 1.0, 2.5, 2.5),
    "phi_hidden": ("dream: width of phi's hidden layer, 0 for a linear phi (paper A, ImageNet-100: 512)", 0, 0, 0),
    "lam": ("sd: weight of g_out's loss, 0 for none", 0.5, 0.5, 0.5),
    "shift": ("augmentation: largest shift, px, 0 for none", 1, 4, 4),
    "degrees": ("augmentation: largest turn, degrees, 0 for none", 10, 0, 0),
    "zoom": ("augmentation: largest scale factor", 1.1, 1.0, 1.0),
    "flip": ("augmentation: 1 to mirror at random, 0 for not", 0, 1, 1),
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
    if name not in columns or args.device.split(":")[0] not in devices:
        fail(f"no recipe for the data set '{name}' (--recipe {'|'.join(columns)}), or no --device {args.device}", 2)
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


def build_backbone(arch):
    """(B, 3, H, W) in [-1, 1] -> features (B, D); returns also D. small: for digits; resnet*: CIFAR stem."""
    if arch == "small":
        layers = []
        for a, b, stride in ((3, 32, 1), (32, 64, 1), (64, 128, 2), (128, 128, 2)):
            layers += [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten()), 512
    net = getattr(torchvision.models, arch)()
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
    return levels[np.abs(np.arange(256)[:, None] - levels).argmin(1)].astype(np.uint8)[images]


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


def augment(images, args):
    """Training view of images (B, 3, H, W) uint8 -> float in [-1, 1], on the device, each image by its own draw.

    Shift by up to args.shift px (whole pixels when nothing else is on: a padded random crop), turn by up to
    args.degrees, scale by up to args.zoom, mirror if args.flip; black comes in from outside.
    """
    x, side = images.float() / 255, images.shape[-1]
    angle, zoom, dx, dy, mirror = (torch.rand(5, len(x), device=x.device) * 2 - 1).unbind()
    angle, zoom = angle * math.radians(args.degrees), args.zoom**zoom
    mirror = mirror.sign() if args.flip else torch.ones_like(mirror)
    if args.degrees == 0 and args.zoom == 1:
        dx, dy = ((d * (args.shift + 0.5)).round() / args.shift if args.shift else 0 * d for d in (dx, dy))
    dx, dy = dx * args.shift * 2 / side, dy * args.shift * 2 / side
    theta = [mirror * zoom * angle.cos(), -zoom * angle.sin(), dx, mirror * zoom * angle.sin(), zoom * angle.cos(), dy]
    grid = F.affine_grid(torch.stack(theta, 1).view(-1, 2, 3), x.shape, align_corners=False)
    return F.grid_sample(x, grid, align_corners=False) * 2 - 1


def dream_loss(logits, labels, is_id, phi, beta):
    """Paper A: CE + beta CE(phi(E), is_id). logits (B, C); is_id (B,): True for ID; labels: of the ID images alone."""
    classification = F.cross_entropy(logits[is_id], labels)
    regularisation = F.cross_entropy(phi(energy(logits)[:, None]), is_id.long())  # class 1: ID, class 0: OOD
    return classification + beta * regularisation


def sd_loss(logits, labels, indicator, lam):
    """Paper B: mean of CE(g_bin, I) + (1 - I) CE(g_in, y) + I lam CE(g_out, y). indicator I (B,): 1 for an outlier."""
    terms = F.cross_entropy(logits["g_bin"], indicator, reduction="none")
    terms = terms + (1 - indicator) * F.cross_entropy(logits["g_in"], labels, reduction="none")
    return (terms + indicator * lam * F.cross_entropy(logits["g_out"], labels, reduction="none")).mean()


def endless(count, batch, device):
    """Batches of indices from one random order of `count` items after another, without end."""
    while True:
        yield from torch.randperm(count, device=device).split(batch)


def train(method, images, labels, other, other_labels, classes, args):
    """One detector. images (N, 3, H, W) uint8, labels (N,); other: outliers or inliers of the method, or None."""
    net = Detector(method, args.arch, classes, args.phi_hidden).to(images.device).train()
    optimizer = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay)
    batch = min(args.batch_size, len(images))
    steps = len(images) // batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * steps, 1e-6)
    stream = endless(0 if other is None else len(other), batch, images.device)  # cycled: ID data sets the pace
    for _ in (progress := tqdm(range(args.epochs), desc=method)):
        for index in torch.randperm(len(images), device=images.device).split(batch)[:steps]:
            x, y = images[index], labels[index]
            if other is not None:
                more = next(stream)
                x, y = torch.cat([x, other[more]]), torch.cat([y, other_labels[more]])
            is_id = torch.arange(len(x), device=x.device) < len(index)  # real images come first
            _, logits = net(augment(x, args))
            if method == "dream":
                loss = dream_loss(logits["g_in"], labels[index], is_id, net.phi, args.beta)
            elif method == "sd":
                loss = sd_loss(logits, y, (~is_id).long(), args.lam)
            else:
                loss = F.cross_entropy(logits["g_in"], y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    if not loss.isfinite():
        fail(f"training of {method} diverged; lower --lr")
    return net.eval()


INPUTS = {"ce": [], "dream": ["outliers.npy"], "dream-id": ["inliers.npy", "inlier_labels.npy", "id_labels.npy"]}
INPUTS["sd"] = ["sd_outliers.npy", "sd_outliers.csv", "pseudo_labels.npy"]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/digits"), help="shared directory (default: %(default)s)")
    parser.add_argument("--method", nargs="+", choices=INPUTS, help="(default: every one whose inputs are in --dir)")
    parser.add_argument(
        "--labels",
        choices=("dataset", "pseudo"),
        help="of ID images for ce and dream (default: dataset where there are any; sd always takes the pseudo-labels)",
    )
    parser.add_argument(
        "--reconstructions",
        action="store_true",
        help="sd: add sd_reconstructions.npy, generated copies with the right label, to the ID images",
    )
    parser.add_argument("--device", help="torch device (default: cuda, mps or cpu)")
    args = parse_recipe(parser)
    if args.zoom < 1:
        fail(f"--zoom is {args.zoom}; it must be at least 1", 2)
    if args.method is None:
        args.method = [name for name in INPUTS if all((args.dir / file).exists() for file in INPUTS[name])]
    return args


def load_training_data(method, args):
    """ID images (N, H, W, 3) and labels (N,), the same of outliers or inliers (or None, None), and whose labels."""
    images = load_array(args.dir / "train.npy", (None, None, None, 3), np.uint8, "train_scan_diffusion.py")
    dataset = args.dir / "train.labels.npy"
    if method in ("ce", "dream") and args.labels != "pseudo" and (args.labels or dataset.exists()):
        source, writer = dataset, "the first script in an empty --dir"
    else:
        source = args.dir / ("id_labels.npy" if method == "dream-id" else "pseudo_labels.npy")
        writer = "train_text_encoder.py" if method == "dream-id" else "train_scan_diffusion.py"
    labels, other, other_labels = load_array(source, images.shape[:1], np.int64, writer), None, None
    shape = (None, *images.shape[1:])
    if method == "dream":
        other = load_array(args.dir / "outliers.npy", shape, np.uint8, "sample_outliers.py")
        other_labels = np.zeros(len(other), np.int64)  # not used by the loss
    elif method == "dream-id":
        other = load_array(args.dir / "inliers.npy", shape, np.uint8, "sample_outliers.py --inliers")
        path = args.dir / "inlier_labels.npy"
        other_labels = load_array(path, other.shape[:1], np.int64, "sample_outliers.py --inliers")
    elif method == "sd":
        other, other_labels = load_sd_images(args.dir / "sd_outliers.npy", images, labels)
        if args.reconstructions:
            copies, copy_labels = load_sd_images(args.dir / "sd_reconstructions.npy", images, labels)
            images, labels = (
                np.concatenate([images, in_format_of(images, copies)]),
                np.concatenate([labels, copy_labels]),
            )
    other = None if other is None else in_format_of(images, other)
    return images, labels, other, other_labels, "dataset" if source == dataset else "pseudo"


def load_sd_images(path, images, labels):
    """Images made by sample_sd_outliers.py and the pseudo-labels of their sources, from the .csv beside them."""
    script = "sample_sd_outliers.py" + " --reconstruct" * ("reconstructions" in path.name)
    made = load_array(path, (None, *images.shape[1:]), np.uint8, script)
    try:
        table = np.loadtxt(path.with_suffix(".csv"), np.int64, delimiter=",", skiprows=1, ndmin=2)
        sources, own = table[:, 1], table[:, 2]
        current = len(table) == len(made) and (labels[sources] == own).all()
    except (OSError, ValueError, IndexError):
        fail(f"{path.with_suffix('.csv')} is missing or damaged; run {script} again")
    if not current:
        fail(f"{path} was made for other pseudo-labels or another number of images; run {script} again")
    return made, own


def main():
    args = parse_args()
    data = read_description(args.dir)
    jobs = {method: load_training_data(method, args) for method in args.method}  # check all before training any
    for method, (images, labels, other, other_labels, whose) in jobs.items():
        torch.manual_seed(args.seed)
        tensors = [None if array is None else torch.from_numpy(np.array(array)) for array in (images, other)]
        x, more = (None if one is None else one.permute(0, 3, 1, 2).contiguous().to(args.device) for one in tensors)
        y = torch.from_numpy(np.array(labels)).to(args.device)
        more_y = None if other is None else torch.from_numpy(np.array(other_labels)).to(args.device)
        classes = int(max(y.max(), -1 if method != "sd" else more_y.max())) + 1
        net = train(method, x, y, more, more_y, classes, args)
        with torch.no_grad():
            hits = [
                net(a.float() / 127.5 - 1)[1]["g_in"].argmax(1) == b
                for a, b in zip(x.split(512), y.split(512), strict=True)
            ]
        config = {option: value for option, value in vars(args).items() if not isinstance(value, Path)}
        config |= {"method": method, "classes": classes, "whose_labels": whose, "image_size": x.shape[-1]}
        content = {"model": net.state_dict(), "config": config, "digest": data.get("digest")}
        save(args.dir / f"classifier_{method}.pt", content)
        accuracy = torch.cat(hits).float().mean()
        print(f"{method}: training accuracy {accuracy:.3f}; wrote classifier_{method}.pt to {args.dir}")
    print(f"next: python evaluate.py --dir {args.dir}")


if __name__ == "__main__":
    main()
