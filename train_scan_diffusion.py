"""Paper B, steps 1 and 2: pseudo-labels by SCAN, then a class-conditional diffusion model.

SCAN (Van Gansbeke et al., ECCV 2020) finds C clusters; a UNet then predicts the noise of x_t given c_d = (pseudo-label,
t), the label at times dropped for classifier-free guidance. --labels dataset skips SCAN: the upper bound of paper B.

reads    the ID data set (--data), or the arrays that are in --dir already
writes   data.json, {train,test}.npy (N, H, W, 3) uint8, {train,test}.labels.npy (N,) int64 if known; scan.pt,
         {,test_}pseudo_labels.npy (N,) int64, pseudo_confidence.npy (N,) float32; diffusion/, diffusion_{samples,log}

python train_scan_diffusion.py                                          # digits 0-5: ACC 0.99, 3 minutes on two cores
python train_scan_diffusion.py --data data/cifar10 --dir runs/cifar10   # published recipe, one GPU; --labels dataset
"""

import argparse
import copy
import hashlib
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
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
from torch.optim import lr_scheduler
from torchvision.transforms import v2
from torchvision.utils import save_image
from tqdm import tqdm

RECIPES = {  # option: help, value per recipe. cifar10: SCAN as published; the diffusion model's figures are ours
    "recipe": ("column of the table RECIPES", "digits", "cifar10"),
    "seed": ("seed of every random number, 0 for the first run", 0, 0),
    "image_size": ("stored height and width of images, px", 8, 32),
    "arch": ("clustering network, small|resnet18|resnet34", "small", "resnet18"),
    "augment": ("views, affine|colour : turn, shift and intensity, or the sets of SimCLR and SCAN", "affine", "colour"),
    "pretext_epochs": ("SimCLR: epochs", 100, 500),
    "pretext_batch": ("SimCLR: images per step", 256, 512),
    "pretext_lr": ("SimCLR: learning rate of SGD, cosine to a thousandth", 0.2, 0.4),
    "tau": ("SimCLR: temperature of NT-Xent", 0.1, 0.1),
    "K": ("SCAN: nearest neighbours per image", 5, 20),
    "starts": ("SCAN loss: starts, of which the one of lowest loss is kept", 3, 1),
    "scan_epochs": ("SCAN loss: epochs", 40, 50),
    "scan_batch": ("SCAN loss: images per step; its entropy wants at least 10 C", 128, 128),
    "lambda_e": ("SCAN loss: weight of the entropy, 0 for none", 5.0, 5.0),
    "scan_lr": ("SCAN loss: learning rate of Adam", 1e-3, 1e-4),
    "selflabel_epochs": ("self-labelling: epochs, 0 for none", 20, 200),
    "selflabel_batch": ("self-labelling: images per step", 256, 1000),
    "selflabel_lr": ("self-labelling: learning rate of Adam", 1e-4, 1e-4),
    "confidence": ("self-labelling: least softmax confidence of a trusted image", 0.99, 0.99),
    "channels": ("UNet: channels per resolution", "32,64", "128,256,256,256"),
    "layers": ("UNet: residual blocks per resolution; attention at 16 px and in the middle", 1, 2),
    "dropout": ("UNet: dropout, 0 for none", 0.0, 0.1),
    "flip": ("diffusion: 1 if a mirrored image keeps its class, 0 for not", 0, 1),
    "steps": ("diffusion: training steps", 1500, 200_000),
    "batch_size": ("diffusion: images per step", 64, 128),
    "lr": ("diffusion: learning rate of AdamW", 2e-3, 2e-4),
    "ema": ("diffusion: decay of the weight average", 0.995, 0.9999),
    "p_drop": ("diffusion: share of images trained without label, 0 for none", 0.1, 0.1),
    "t_max": ("diffusion: train on t < t_max <= 1000; below 1000 only sample_sd_outliers.py can use it", 1000, 1000),
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


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/digits"), help="shared directory (default: %(default)s)")
    parser.add_argument(
        "--data", help="digits[:0-5], a folder of images or arrays, or a .npy file (default: digits:0-5)"
    )
    parser.add_argument(
        "--labels",
        choices=("scan", "dataset"),
        default="scan",
        help="by SCAN, or the data set's own (default: %(default)s)",
    )
    parser.add_argument("--clusters", type=int, help="C (default: the data set's number of classes)")
    parser.add_argument("--device", help="torch device (default: cuda, mps or cpu)")
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
    """A file, PIL image or (H, W, 3) uint8 array -> (size, size, 3) uint8: short side to size, centre square."""
    try:
        image = Image.open(source) if isinstance(source, Path) else v2.functional.to_pil_image(source)
        return np.array(v2.functional.center_crop(v2.functional.resize(image.convert("RGB"), size), size))
    except (OSError, ValueError, SyntaxError) as error:
        fail(f"{source} cannot be read as a picture ({error}); mend it or remove it")


def read_images(spec, split, size):
    """Part train, test or ood (test, or all of a set that is not divided): images (N, size, size, 3), labels, names."""
    name, _, subset = spec.partition(":")
    path, part, labels, names = Path(name), "train" if split == "train" else "test", None, None
    divided = (file := path / f"{part}.npy").exists() or (path / part).is_dir()
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
        names = sorted(folder.name for folder in path.glob("[!.]*") if folder.is_dir()) or None
        pictures = sorted(path.glob("[!.]*/[!.]*" if names else "[!.]*"))
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
    if not divided and split != "ood":  # every fifth image of a class is for testing
        rank = np.array([(known[:i] == known[i]).sum() for i in range(len(known))])  # within the class
        keep = keep[(rank[keep] % 5 == 4) == (split == "test")]
    if not len(keep):
        fail(f"{spec} has no {split} pictures; looked for them in {path}")
    as_is = isinstance(pictures, np.ndarray) and pictures.shape[1:3] == (size, size)
    images = pictures[keep] if as_is else np.stack([read_picture(pictures[i], size) for i in tqdm(keep, desc=spec)])
    return images, None if labels is None else known[keep], names


def prepare_data(args):
    """Put the ID data into args.dir once. Returns data.json and, by split, images on the device and labels or None."""
    data, again = read_description(args.dir), "this script in an empty --dir"
    held = data.get("name", str(args.dir) if (args.dir / "train.npy").exists() else args.data)
    if held != args.data:
        fail(f"{args.dir} already holds {held}; choose another --dir for {args.data}", 2)
    if not data:
        if args.data == str(args.dir):  # arrays brought by hand keep their size
            args.image_size = load_array(args.dir / "train.npy", (None, None, None, 3), np.uint8, again).shape[1]
        parts = [read_images(args.data, split, args.image_size) for split in ("train", "test")]
        (train, y, names), (test, y_test, test_names) = parts
        count = 0 if y is None or y_test is None else int(max(y.max(), y_test.max())) + 1
        if names != test_names or (y is None) != (y_test is None) or names and count > len(names):
            fail(f"{args.data}: train and test need the same classes, a name for each, and labels both or neither")
        names = (names or [*map(str, range(count))]) if count else None
        data = {"name": args.data, "classes": names, "image_size": args.image_size}
        data |= {"channels": 1 if (train == train[..., :1]).all() else 3, "train": len(train), "test": len(test)}
        data["digest"] = hashlib.sha256(train.tobytes() + test.tobytes()).hexdigest()[:16]
        for name, array in {"train": train, "test": test, "train.labels": y, "test.labels": y_test}.items():
            if array is not None and args.data != str(args.dir):
                save(args.dir / f"{name}.npy", array)
        save(args.dir / "data.json", json.dumps(data, indent=1) + "\n")
    images, labels = {}, {"train": None, "test": None}
    for split in labels:
        shape = (data[split], data["image_size"], data["image_size"], 3)
        array = load_array(args.dir / f"{split}.npy", shape, np.uint8, again)
        images[split] = torch.from_numpy(np.array(array)).permute(0, 3, 1, 2).contiguous().to(args.device)
        if data["classes"]:
            labels[split] = np.array(load_array(args.dir / f"{split}.labels.npy", shape[:1], np.int64, again))
    return data, images, labels


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


def view(images, augment="none", strong=False):
    """(B, 3, H, W) uint8 -> float in [-1, 1]: plain, SimCLR's view or SCAN's strong one; colour: drawn per 8 images."""
    x, side = images.float() / 255, images.shape[-1]
    if augment == "affine":
        zoom, angle, lean, dx, dy, light = (torch.rand(6, len(x), device=x.device) * 2 - 1).unbind()
        zoom, angle, lean, dx, dy = 1.2**zoom, 0.3 * angle, 0.2 * lean, 0.2 * dx, 0.2 * dy
        theta = (zoom * angle.cos(), lean - zoom * angle.sin(), dx, zoom * angle.sin(), zoom * angle.cos(), dy)
        grid = F.affine_grid(torch.stack(theta, 1).view(-1, 2, 3), x.shape, align_corners=False)
        x = F.grid_sample(x, grid, align_corners=False) * (1 + 0.4 * light).view(-1, 1, 1, 1)
        x = (x + 0.05 * torch.randn_like(x)).clamp(0, 1)
    elif augment == "colour":
        crop = v2.RandomResizedCrop(side, (0.9 if strong else 0.2, 1.0)), v2.RandomHorizontalFlip()
        jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2)
        erase = v2.RandAugment(4, magnitude=10), v2.RandomErasing(1.0, (0.25, 0.25), (1.0, 1.0), value=0.5)
        x = torch.cat([v2.Compose([*crop, *(erase if strong else jitter)])(part) for part in x.split(8)])
    return x * 2 - 1


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


@torch.no_grad()
def predict(backbone, head, images):
    """Eval-mode outputs (N, D) for plain images (N, 3, H, W) uint8."""
    backbone.eval()
    return torch.cat([head(backbone(view(part))) for part in images.split(1024)])


def report(stage, assigned, labels, clusters):
    """Print cluster sizes and, where labels are known, ACC (Hungarian), NMI and ARI."""
    quality = ""
    if labels is not None:
        table = confusion_matrix(labels, assigned)
        accuracy = table[linear_sum_assignment(table, maximize=True)].sum() / len(labels)
        nmi, ari = normalized_mutual_info_score(labels, assigned), adjusted_rand_score(labels, assigned)
        quality = f"ACC {accuracy:.3f}  NMI {nmi:.3f}  ARI {ari:.3f}  "
    print(f"{stage:22s} {quality}cluster sizes", *np.bincount(assigned, minlength=clusters))


def descend(loss, optimizer, schedule=None, clip=math.inf):
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
    optimizer.step()
    if schedule:
        schedule.step()


def train_scan(images, labels, clusters, args):
    """The four stages on images (N, 3, H, W) uint8 on their device: backbone, cluster head. Labels: to report only."""

    def batches(epochs, batch, stage):
        for _ in tqdm(range(epochs), desc=stage):
            yield from torch.randperm(len(images), device=images.device).split(batch)[: max(1, len(images) // batch)]

    kmeans = KMeans(clusters, n_init=10, random_state=args.seed % 2**32)
    report("k-means on raw pixels", kmeans.fit_predict(images.flatten(1).cpu().numpy() / 255.0), labels, clusters)
    # 1. Pretext task: two random views of an image attract each other and repel those of all others.
    backbone, width = build_backbone(args.arch)
    project = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 128)).to(images.device)
    backbone = backbone.to(images.device)
    parameters = [*backbone.parameters(), *project.parameters()]
    optimizer = torch.optim.SGD(parameters, args.pretext_lr, momentum=0.9, weight_decay=1e-4)
    steps = args.pretext_epochs * max(1, len(images) // args.pretext_batch)
    schedule = lr_scheduler.CosineAnnealingLR(optimizer, steps, args.pretext_lr / 1000)
    for index in batches(args.pretext_epochs, args.pretext_batch, "1 SimCLR"):
        z1, z2 = (F.normalize(project(backbone(view(images[index], args.augment)))) for _ in range(2))
        descend(nt_xent(z1, z2, args.tau), optimizer, schedule)
    z = F.normalize(predict(backbone, project, images))
    report("1 SimCLR + k-means", kmeans.fit_predict(z.cpu().numpy()), labels, clusters)
    # 2. The K nearest neighbours in the pretext space are mostly of the image's own class.
    neighbours = nearest_neighbours(z, args.K)  # (N, K)
    if labels is not None:
        print(f"2 neighbours           purity {(labels[neighbours.cpu().numpy()] == labels[:, None]).mean():.3f}")
    # 3. An image and a random neighbour agree on a cluster, the mean prediction stays spread out; the best start stays.
    trials = []
    for start in range(args.starts):
        trial = copy.deepcopy(backbone).train(), nn.Linear(width, clusters).to(images.device)
        optimizer = torch.optim.Adam([*trial[0].parameters(), *trial[1].parameters()], args.scan_lr, weight_decay=1e-4)
        for index in batches(args.scan_epochs, args.scan_batch, f"3 SCAN loss, start {start + 1}"):
            partner = neighbours[index, torch.randint(args.K, index.shape, device=index.device)]
            both = trial[1](trial[0](view(images[torch.cat([index, partner])], args.augment, strong=True)))
            descend(scan_loss(*both.chunk(2), args.lambda_e), optimizer)
        logits = predict(*trial, images)
        loss = scan_loss(logits.repeat_interleave(args.K, 0), logits[neighbours.flatten()], args.lambda_e).item()
        trials.append((loss, start, trial))
    backbone, head = min(trials)[2]
    report("3 SCAN loss", predict(backbone, head, images).argmax(1).cpu().numpy(), labels, clusters)
    # 4. The strong view learns the label that the network is sure of on the plain image.
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, args.selflabel_lr, weight_decay=1e-4)
    for index in batches(args.selflabel_epochs, args.selflabel_batch, "4 self-labelling"):
        logits = predict(backbone, head, images[index])
        backbone.train()
        loss = selflabel_loss(logits, head(backbone(view(images[index], args.augment, strong=True))), args.confidence)
        if loss is not None:
            descend(loss, optimizer)
    report("4 self-labelling", predict(backbone, head, images).argmax(1).cpu().numpy(), labels, clusters)
    return backbone, head


def train_diffusion(images, labels, classes, args):
    """Paper B: min E ||eps_theta(x_t, c_d) - eps||^2, t ~ U[0, t_max). images (N, C, H, W) in [-1, 1], labels (N,)."""
    side, channels, widths = images.shape[-1], images.shape[1], [int(n) for n in args.channels.split(",")]
    down = ["AttnDownBlock2D" if side >> level == 16 else "DownBlock2D" for level in range(len(widths))]
    blocks = {"down_block_types": down, "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)]}
    blocks |= {"norm_num_groups": math.gcd(32, *widths), "dropout": args.dropout, "layers_per_block": args.layers}
    blocks |= {"block_out_channels": widths, "num_class_embeds": classes + 1}  # the last class is the null condition
    unet = UNet2DModel(side, channels, channels, **blocks)
    unet, scheduler = unet.to(images.device), DDPMScheduler(1000, 1e-4, 0.02, "linear")
    ema, optimizer = EMAModel(unet.parameters(), args.ema), torch.optim.AdamW(unet.parameters(), args.lr)
    schedule = lr_scheduler.OneCycleLR(optimizer, args.lr, max(11, args.steps), pct_start=0.1, cycle_momentum=False)
    with open(args.dir / "diffusion_log.jsonl", "w") as log:
        mean = 1.0  # of the loss: about the last 50 steps
        for step in tqdm(range(1, args.steps + 1), desc="diffusion"):
            index = torch.randint(len(images), (args.batch_size,), device=images.device)
            x, t, eps = images[index], torch.randint_like(index, args.t_max), torch.randn_like(images[index])
            c_d = torch.where(torch.rand(len(x), device=x.device) < args.p_drop, classes, labels[index])
            loss = F.mse_loss(unet(scheduler.add_noise(x, eps, t), t, c_d).sample, eps)
            descend(loss, optimizer, schedule, clip=1.0)
            ema.step(unet.parameters())
            mean += 0.02 * (loss.item() - mean)
            if step % 100 == 0 or step == args.steps:
                print(json.dumps({"step": step, "loss": round(mean, 5)}), file=log, flush=True)
    ema.copy_to(unet.eval().requires_grad_(False).parameters())
    # A sheet of samples per class, from images of the class noised to t_max: at 1000 nothing of them is left.
    solver = DPMSolverMultistepScheduler.from_config(scheduler.config, thresholding=True, sample_max_value=1.0)
    solver.set_timesteps(timesteps=sorted({round((args.t_max - 1) * (i / 19) ** 2) for i in range(20)}, reverse=True))
    c_d = torch.arange(classes, device=images.device).repeat_interleave(12)
    own = images[((labels == c_d[:, None]) + 1e-9).multinomial(1).flatten()]
    x = scheduler.add_noise(own, torch.randn_like(own), torch.full_like(c_d, args.t_max - 1))
    for t in solver.timesteps:
        x = solver.step(unet(x, t, c_d).sample, t, x).prev_sample
    save_image(F.interpolate(x / 2 + 0.5, None, max(1, 64 // side)), args.dir / "diffusion_samples.png", nrow=12)
    return unet, scheduler


def main():
    args = parse_args()
    torch.manual_seed(args.seed)
    data, images, labels = prepare_data(args)
    classes = args.clusters or len(data["classes"] or [])
    if not classes or args.labels == "dataset" and classes != len(data["classes"] or []):
        fail(f"{args.data} has no such labels: give --clusters, and not --labels dataset", 2)
    if args.K >= data["train"] or data["image_size"] % 2 ** args.channels.count(","):
        fail(f"--K {args.K} must be below {data['train']}, --channels fewer for {data['image_size']} px", 2)
    confidence = np.ones(data["train"], np.float32)
    if args.labels == "scan":
        backbone, head = train_scan(images["train"], labels["train"], classes, args)
        p = {split: predict(backbone, head, images[split]).softmax(1).max(1) for split in images}
        if len(p["train"].indices.unique()) < classes:
            fail(f"a cluster of {classes} is empty; try another --seed or fewer --clusters")
        labels, confidence = {split: p[split].indices.cpu().numpy() for split in p}, p["train"].values.cpu().numpy()
        config = {option: value for option, value in vars(args).items() if option != "dir"} | {"classes": classes}
        save(args.dir / "scan.pt", {"backbone": backbone.state_dict(), "head": head.state_dict(), "config": config})
    shutil.rmtree(args.dir / "diffusion", ignore_errors=True)  # it knows the classes of the labels that go now
    arrays = {"pseudo_labels": labels["train"], "pseudo_confidence": confidence, "test_pseudo_labels": labels["test"]}
    for name, array in arrays.items():
        save(args.dir / f"{name}.npy", array)
    x = images["train"][:, : data["channels"]].float() / 127.5 - 1  # grey data: one channel
    y = torch.from_numpy(labels["train"]).to(args.device)
    x, y = (torch.cat([x, x.flip(3)]), y.repeat(2)) if args.flip else (x, y)
    unet, scheduler = train_diffusion(x, y, classes, args)
    for name, part in {"unet": unet, "scheduler": scheduler}.items():
        part.save_pretrained((partial := args.dir / ".partial.diffusion") / name)
    save(partial / "training.json", json.dumps({"t_max": args.t_max}) + "\n")
    os.replace(partial, args.dir / "diffusion")
    print(f"wrote pseudo-labels and diffusion/ to {args.dir}\nnext: train_text_encoder.py or sample_sd_outliers.py")


if __name__ == "__main__":
    main()
