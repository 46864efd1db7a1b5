"""Paper B, steps 1 and 2: pseudo-labels by SCAN, then a class-conditional diffusion model.

SCAN (Van Gansbeke et al., ECCV 2020) finds C clusters; a UNet then predicts the noise of x_t under
c_d = (pseudo-label, t), the label dropped at times for classifier-free guidance. This is the first
script of every run and the only one that reads an ID data set; --until stops it early, and
--labels dataset puts the data set's own labels in place of SCAN's, the upper bound of paper B.

reads    the ID data set (--data), or train.npy and test.npy that are in --dir already
writes   data.json, {train,test}.npy (N, H, W, 3) uint8, {train,test}.labels.npy (N,) int64 if
         known; pseudo_labels.npy, test_pseudo_labels.npy (N,) int64, pseudo_confidence.npy (N,)
         float32, scan.pt; diffusion/ in diffusers' layout

python train_scan_diffusion.py                      # digits 0-5: ACC above 0.99, two minutes
python train_scan_diffusion.py --recipe cifar10 --dir runs/cifar10      # SCAN as published; one GPU
python train_scan_diffusion.py --recipe cifar100 --dir runs/cifar100 --until data
"""

import argparse
import copy
import json
import math
import os
import shutil
import sys
import time
import zlib
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from PIL import Image
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits, load_sample_images
from sklearn.metrics import adjusted_rand_score, confusion_matrix, normalized_mutual_info_score
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from torchvision import datasets
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import rgb_to_grayscale
from tqdm import tqdm

# option: (value, or one for each of COLUMNS), help[, choices]. cifar10: SCAN as published; the
# poster gives no figures of its diffusion model, those here are ours. cifar100, imagenet100: not
# in paper B.
# fmt: off
RECIPES = {
    "seed": (0, "seed of every random number"),
    "labels": ("scan", "pseudo-labels: by SCAN, or the data set's own", "scan", "dataset"),
    "clusters": (0, "SCAN: clusters C, 0 for the data set's number of classes"),
    "data": (("digits:0-5", "cifar10", "cifar100", "data/imagenet100"), "ID data, NAME[:CLASSES]"),
    "image_size": ((8, 32, 32, 256), "stored height and width of images, px"),
    "arch": (("small", "resnet18", "resnet18", "resnet34-imagenet"), "clustering network",
        "small", "resnet18", "resnet34", "resnet18-imagenet", "resnet34-imagenet"),
    "crop": ((0, 0, 0, 224), "views: px, 0 for whole images"),
    "area": ((0.6, 0.2, 0.2, 0.2), "views: least share of the image that is seen"),
    "shift": ((0, 0, 0, 0), "views: largest shift, px"),
    "degrees": ((20, 0, 0, 0), "views: largest turn, degrees"),
    "flip": ((0, 1, 1, 1), "views: 1 if a mirrored image keeps its class"),
    "operations": ((0, 4, 4, 4), "views: operations of the strong view, 0 to take SimCLR's view"),
    "pretext_epochs": ((100, 500, 500, 500), "SimCLR: epochs"),
    "pretext_batch": ((256, 512, 512, 512), "SimCLR: images per step"),
    "pretext_lr": ((0.2, 0.4, 0.4, 0.4), "SimCLR: learning rate of SGD, cosine to a thousandth"),
    "tau": (0.1, "SimCLR: temperature of NT-Xent"),
    "K": ((5, 20, 20, 20), "SCAN: nearest neighbours per image"),
    "starts": ((3, 1, 1, 1), "SCAN loss: starts, of which the one of lowest loss is kept"),
    "scan_epochs": ((40, 50, 50, 50), "SCAN loss: epochs"),
    "scan_batch": ((128, 128, 1000, 1000), "SCAN loss: images per step; the entropy wants 10 C"),
    "scan_lr": ((1e-3, 1e-4, 1e-4, 1e-4), "SCAN loss: learning rate of Adam"),
    "lambda_e": (5.0, "SCAN loss: weight of the entropy"),
    "selflabel_epochs": ((20, 200, 200, 200), "self-labelling: epochs"),
    "selflabel_batch": ((256, 1000, 1000, 1000), "self-labelling: images per step"),
    "selflabel_lr": (1e-4, "self-labelling: learning rate of Adam"),
    "confidence": (0.99, "self-labelling: least softmax confidence of a trusted image"),
    "channels": (("32,64", "128,256,256,256", "128,256,256,256", "128,128,256,256,512"),
        "UNet: widths"),
    "layers": ((1, 2, 2, 2), "UNet: residual blocks per resolution"),
    "attention": (16, "UNet: px at which it attends, beside the middle"),
    "dropout": ((0.0, 0.1, 0.1, 0.1), "UNet: dropout"),
    "steps": ((1500, 200_000, 200_000, 200_000), "diffusion: training steps"),
    "batch_size": ((64, 128, 128, 32), "diffusion: images per step"),
    "lr": ((2e-3, 2e-4, 2e-4, 2e-4), "diffusion: learning rate of AdamW, warm-up and cosine"),
    "ema": ((0.995, 0.9999, 0.9999, 0.9999), "diffusion: decay of the weight average"),
    "p_drop": (0.1, "diffusion: share of images trained without label"),
}
# fmt: on


def nt_xent(z1, z2, tau):
    """NT-Xent (SimCLR, eq. 1). z1, z2: (B, D) unit projections of two views of the same images."""
    z = torch.cat([z1, z2])
    similarity = (z @ z.T / tau).fill_diagonal_(-torch.inf)
    partner = torch.arange(len(z), device=z.device).roll(len(z1))
    return F.cross_entropy(similarity, partner)


def scan_loss(logits, neighbour_logits, lambda_e):
    """SCAN, eq. 2: -mean log <p(x), p(x_k)> - lambda_e H(mean p). Both (B, C)."""
    p = logits.softmax(1)
    p_k = neighbour_logits.softmax(1)
    p_mean = p.mean(0).clamp(min=1e-8)
    consistency = -(p * p_k).sum(1).clamp(min=1e-8).log().mean()
    entropy = -(p_mean * p_mean.log()).sum()
    return consistency - lambda_e * entropy


def selflabel_loss(strong_logits, labels):
    """SCAN, self-labelling: CE (B, C) with confident labels (B,), weighted by 1 / class count."""
    count = labels.bincount(minlength=strong_logits.shape[1])
    weight = 1 / count.clamp(min=1)  # a class without confident images in this batch has none
    return F.cross_entropy(strong_logits, labels, weight=weight)


def train_simclr(images, args):
    """SCAN, step 1: two random views of an image attract each other and repel those of all others.

    Returns the backbone and the unit projections z (N, 128) of the images as they are.
    """
    torch.manual_seed(seed_of(args.seed, "simclr"))
    backbone = build_backbone(args.arch)
    width = backbone.width
    projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 128))
    net = nn.Sequential(backbone, projector)
    forward = distribute(net, args)
    size = args.pretext_batch
    steps = args.pretext_epochs * max(1, len(images) // size)
    optimizer = torch.optim.SGD(net.parameters(), args.pretext_lr, momentum=0.9, weight_decay=1e-4)
    schedule = CosineAnnealingLR(optimizer, steps, args.pretext_lr / 1000)
    state = {"net": net, "optimizer": optimizer, "schedule": schedule}
    for _, index in training_steps("simclr", len(images), size, steps, state, args):
        x = images[index].to(args.device)
        views = torch.cat([simclr_view(x, args), simclr_view(x, args)])
        with autocast(args):
            z = forward(views)
        z1, z2 = F.normalize(z.float()).chunk(2)
        loss = nt_xent(gather(z1, args), gather(z2, args), args.tau)
        optimizer.zero_grad()
        (loss * args.world).backward()
        optimizer.step()
        schedule.step()
        state["loss"] = loss.detach()
    return backbone, F.normalize(predict(net, images, args))


def train_scan(backbone, neighbours, images, classes, attempt, args):
    """SCAN, step 3: an image and one of its neighbours (N, K) agree, clusters stay spread out.

    Returns the clustering network, its logits (N, C) and its SCAN loss on the images as they are.
    """
    torch.manual_seed(seed_of(args.seed, "scan", attempt))
    net = nn.Sequential(copy.deepcopy(backbone), nn.Linear(backbone.width, classes))
    forward = distribute(net, args)
    size = args.scan_batch
    steps = args.scan_epochs * max(1, len(images) // size)
    optimizer = torch.optim.Adam(net.parameters(), args.scan_lr, weight_decay=1e-4)
    state = {"net": net, "optimizer": optimizer}
    for _, index in training_steps(f"scan-{attempt}", len(images), size, steps, state, args):
        one = torch.randint(args.K, (len(index),))
        pairs = torch.cat([index, neighbours[index, one]])
        x = strong_view(images[pairs].to(args.device), args)
        with autocast(args):
            logits, neighbour_logits = forward(x).float().chunk(2)
        loss = scan_loss(gather(logits, args), gather(neighbour_logits, args), args.lambda_e)
        optimizer.zero_grad()
        (loss * args.world).backward()
        optimizer.step()
        state["loss"] = loss.detach()
    logits = predict(net, images, args)
    repeated = logits.repeat_interleave(args.K, 0)
    loss = scan_loss(repeated, logits[neighbours.flatten()], args.lambda_e)
    return net, logits, loss.item()


def train_selflabel(net, images, args):
    """SCAN, step 4: the strong view learns the label that net is sure of on the image as it is."""
    forward = distribute(net, args)
    size = args.selflabel_batch
    steps = args.selflabel_epochs * max(1, len(images) // size)
    optimizer = torch.optim.Adam(net.parameters(), args.selflabel_lr, weight_decay=1e-4)
    state = {"net": net, "optimizer": optimizer}
    taken = []
    for _, index in training_steps("selflabel", len(images), size, steps, state, args):
        x = images[index].to(args.device)
        net.eval()
        with torch.no_grad(), autocast(args):
            logits = net(plain_view(x, args))
        confidence, labels = gather(logits.float(), args).softmax(1).max(1)
        net.train()
        confident = confidence > args.confidence
        taken.append(confident.any().item())
        if not taken[-1]:
            continue
        with autocast(args):
            strong_logits = forward(strong_view(x, args))
        strong_logits = gather(strong_logits.float(), args)
        loss = selflabel_loss(strong_logits[confident], labels[confident])
        optimizer.zero_grad()
        (loss * args.world).backward()
        optimizer.step()
        state["loss"] = loss.detach()
    print(f"self-labelling: {np.mean(taken or 0):.1%} of these {len(taken)} steps were taken")


def find_clusters(images, labels, classes, args):
    """All steps of SCAN: the clustering network and the backbone of SimCLR. labels: to report."""
    pretext, z = train_simclr(images, args)
    kmeans = KMeans(classes, n_init=10, random_state=args.seed).fit(z.cpu().numpy())
    report("1 SimCLR + k-means", kmeans.labels_, labels, classes)
    # SCAN, step 2: the K nearest neighbours are mostly of the image's own class.
    neighbours = knn(z, z, args.K + 1)[1][:, 1:]
    neighbours = neighbours.cpu().sort(1).values  # an order that rounding does not change
    best = math.inf
    for attempt in range(1, args.starts + 1):
        candidate, logits, loss = train_scan(pretext, neighbours, images, classes, attempt, args)
        report(f"3 SCAN loss {loss:.3f}", logits.argmax(1).cpu().numpy(), labels, classes)
        if loss < best:
            best = loss
            net = candidate
    train_selflabel(net, images, args)
    if labels is not None and classes == labels.max() + 1:
        name_clusters(net[1], predict(net, images, args).argmax(1).cpu(), labels)
    return net, pretext


def scan_labels(train, test, known, classes, args):
    """Labels (N,) of training and test images and confidence (N,) by SCAN, kept in scan.pt.

    known: labels of the training images, or None, to report and to number the clusters.
    """
    path = args.dir / "scan.pt"
    options = {
        name: value for name, value in plain_options(args).items() if name not in OF_DIFFUSION
    }
    if path.exists():
        held = load_weights(path, "cpu", "delete it to run SCAN again")
        if held["config"] == options:
            print(f"labels of {path}, which has the same options")
            return held["labels"]
    net, pretext = find_clusters(train, known, classes, args)
    confidence, labels = predict(net, train, args).softmax(1).max(1)
    report("4 self-labelling", labels.cpu().numpy(), known, classes)
    confident = labels[confidence > args.confidence].bincount(minlength=classes)
    print("confident images per cluster; a cluster of none has died:", *confident.tolist())
    if len(labels.unique()) < classes:
        sys.exit(f"one of the {classes} clusters is empty; give another --seed or fewer --clusters")
    test_labels = predict(net, test, args).argmax(1)
    arrays = {"train": labels.cpu(), "test": test_labels.cpu(), "confidence": confidence.cpu()}
    if args.rank == 0:
        networks = {"backbone": net[0], "head": net[1], "pretext": pretext}
        weights = {name: network.state_dict() for name, network in networks.items()}
        save(path, weights | {"labels": arrays, "config": options})
    attempts = [f"scan-{n}" for n in range(1, args.starts + 1)]
    drop_checkpoints(["simclr", *attempts, "selflabel"], args)
    return arrays


def train_diffusion(images, labels, classes, args):
    """Paper B: min E ||eps_theta(x_t, c_d) - eps||^2, t ~ U[0, T), c_d = (label or null, t).

    labels: (N,) on the device. Returns the UNet, whose last class is the null condition, and the
    schedule.
    """
    torch.manual_seed(seed_of(args.seed, "unet"))
    sample = images[:: len(images) // 1000 + 1]
    channels = 1 if (sample == sample[..., :1]).all() else 3  # grey data: one channel
    unet = build_unet(images.shape[1], channels, classes, args)
    forward = distribute(unet, args)
    scheduler = DDPMScheduler(1000, 1e-4, 0.02, "linear")
    optimizer = torch.optim.AdamW(unet.parameters(), args.lr)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 10, args.steps)
    ema = EMAModel(unet.parameters(), args.ema)
    state = {"unet": unet, "optimizer": optimizer, "schedule": schedule, "ema": ema}
    size = args.batch_size
    for _, index in training_steps("diffusion", len(images), size, args.steps, state, args):
        x = to_float(images[index].to(args.device))[:, :channels]
        u = torch.rand(2, len(x), device=x.device)
        x = torch.where((u[0] < 0.5 * args.flip).view(-1, 1, 1, 1), x.flip(3), x)
        y = torch.where(u[1] < args.p_drop, classes, labels[index])
        t = torch.randint(1000, (len(x),), device=x.device)
        eps = torch.randn_like(x)
        x_t = scheduler.add_noise(x, eps, t)
        with autocast(args):
            eps_theta = forward(x_t, t, y).sample
        loss = F.mse_loss(eps_theta.float(), eps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.step(unet.parameters())
        state["loss"] = loss.detach()
    ema.copy_to(unet.parameters())
    return unet.eval(), scheduler


def parse_args():
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--data", default="")
    given = early.parse_known_args()[0].data
    name = Path(given.partition(":")[0]).name
    parser = recipe_parser(name if name in COLUMNS else "digits")
    steps = ("data", "labels", "diffusion")
    parser.add_argument("--until", choices=steps, default="diffusion", help="the last step")
    parser.add_argument("--data-root", default="data", help="folder of torchvision's data sets")
    parser.add_argument("--restart", action="store_true", help="drop unfinished work")
    parser.add_argument("--fp32", action="store_true", help="no bfloat16 on GPUs that have it")
    args = parser.parse_args()
    if not given:
        by_hand = (args.dir / "train.npy").exists()
        args.data = read_description(args.dir).get("data", ARRAYS if by_hand else args.data)
    return args


def main():
    args = parse_args()
    start(args)
    data = prepare_data(args)
    if args.until == "data":
        print(f"wrote {args.data} to {args.dir}; next: train_text_encoder.py --diffusion ID")
        return
    known_classes = len(data["classes"])
    classes = args.clusters or known_classes
    if classes < 2 or (args.labels == "dataset" and classes != known_classes):
        sys.exit(f"{args.data} has {known_classes} classes; give --clusters with --labels scan")
    train, known = load_split("train", data, args)
    test, known_test = load_split("test", data, args)
    args.inputs = fingerprint(train)
    if len(train) <= args.K:
        sys.exit(f"--K {args.K} neighbours of {len(train)} images; lower it")
    if args.labels == "scan":
        arrays = scan_labels(train, test, known, classes, args)
    else:
        arrays = {"train": known, "test": known_test, "confidence": np.ones(len(known), np.float32)}
    write_labels(arrays, args)
    if args.until == "labels":
        print(f"wrote pseudo_labels.npy to {args.dir}; next: train_classifier.py")
        return
    labels = load_array(args.dir / "pseudo_labels.npy", (len(train),), np.int64, "this script")
    args.inputs = fingerprint(train, labels)
    y = torch.from_numpy(labels).to(args.device)
    unet, scheduler = train_diffusion(train, y, classes, args)
    if args.rank == 0:
        save_diffusion(unet, scheduler, args.dir)
    drop_checkpoints(["diffusion"], args)
    print(f"wrote diffusion/ to {args.dir}; next: train_text_encoder.py, sample_sd_outliers.py")


# ---- plumbing: not the paper's method; same name, same text in every script ----

COLUMNS = ("digits", "cifar10", "cifar100", "imagenet100")  # of RECIPES
CHECKPOINT_SECONDS = 60
OF_DIFFUSION = (
    "channels",
    "layers",
    "attention",
    "dropout",
    "steps",
    "batch_size",
    "lr",
    "ema",
    "p_drop",
)
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
PARTED = ("cifar10", "cifar100", "svhn")  # with parts for training and testing
ARRAYS = "arrays"  # the name of data that was put into --dir by hand


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


def plain_options(args):
    """What results depend on: the options of RECIPES, and the checksum of the inputs."""
    return {name: getattr(args, name) for name in [*RECIPES, "inputs"]}


def start(args):
    """Join the processes of torchrun, of which the first one speaks; print the options."""
    args.rank = int(os.environ.get("RANK", 0))
    args.world = int(os.environ.get("WORLD_SIZE", 1))
    if args.world > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group(timeout=timedelta(days=1))
    if args.rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    print("options", vars(args))


def barrier():
    """Wait until every process is here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


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


def fingerprint(*arrays):
    """Checksums of at most 1,000 rows of each array: tell when a run would go on with others."""
    return [zlib.crc32(np.ascontiguousarray(x[:: len(x) // 1000 + 1])) for x in arrays]


def seed_of(*key):
    """Seed for (seed, stage, step, ...) or (seed, image): 32 bits, no generator takes more."""
    return zlib.crc32(repr(key).encode())


def knn(queries, bank, k):
    """Distances and rows (N, k), nearest first, of the bank (M, d) around queries (N, d)."""
    centre = bank.mean(0)  # a large common offset would cost cdist its digits
    bank = bank - centre
    nearest = [torch.cdist(q - centre, bank).topk(k, largest=False) for q in queries.split(1024)]
    distances, rows = zip(*nearest, strict=True)
    return torch.cat(distances), torch.cat(rows)


def training_steps(stage, count, size, steps, state, args):
    """Yield (step, rows): this process's share of a batch of `size` of the `count` training rows.

    state: name -> object with state_dict(), kept in .checkpoint.<stage>.pt; the loop adds its loss.
    Random numbers depend on (seed, stage, step, rank) alone: a run that was killed and started
    again ends in the same weights.
    """
    path = args.dir / f".checkpoint.{stage}.pt"
    first = load_checkpoint(path, state, args)
    saved = time.monotonic()
    bar = tqdm(range(first, steps), stage, steps, initial=first, disable=args.rank > 0)
    for step in bar:
        torch.manual_seed(seed_of(args.seed, stage, step, args.rank))
        rows = batch_rows(count, size, step, args.seed, stage)
        yield step, rows[args.rank : len(rows) // args.world * args.world : args.world]
        done = step + 1
        if done == steps or done % max(1, steps // 20) == 0:
            loss = float(state.get("loss", 0))
            if not math.isfinite(loss):
                sys.exit(f"{stage}: the loss is {loss} at step {done}; lower the learning rate")
            bar.write(f"{stage} step {done} of {steps}, loss {loss:.4f}")
        due = time.monotonic() - saved >= CHECKPOINT_SECONDS
        if args.rank == 0 and (due or done == steps):
            held = {name: part.state_dict() for name, part in state.items() if name != "loss"}
            save(path, {"options": plain_options(args), "step": done, "state": held})
            saved = time.monotonic()


def batch_rows(count, size, step, *key):
    """Rows (size,) of batch number `step`; each pass over `count` rows has its own order."""
    batches = max(1, count // size)
    generator = torch.Generator().manual_seed(seed_of(*key, step // batches))
    order = torch.randperm(count, generator=generator)
    return order[step % batches * size :][:size]


def load_checkpoint(path, state, args):
    """Put what the file holds, if there is one, into state; returns the steps done."""
    if args.restart and args.rank == 0:
        path.unlink(missing_ok=True)
    barrier()
    if not path.exists():
        return 0
    held = load_weights(path, args.device, "give --restart to begin anew")
    for name, value in plain_options(args).items():
        before = held["options"].get(name)
        if before != value:
            sys.exit(f"{path} has {name} {before}, not {value}; give that, or --restart")
    for name, part in state.items():
        part.load_state_dict(held["state"][name])
    print(f"going on from step {held['step']} of {path}")
    return held["step"]


def drop_checkpoints(stages, args):
    """Remove the checkpoints of finished stages."""
    barrier()
    for stage in stages:
        Path(args.dir, f".checkpoint.{stage}.pt").unlink(missing_ok=True)


def distribute(net, args):
    """net on its device, to be trained; under torchrun as DistributedDataParallel."""
    net.to(args.device).train()
    if args.world == 1:
        return net
    if args.device == "cuda":  # on a CPU every process has batch statistics of its own
        nn.SyncBatchNorm.convert_sync_batchnorm(net)
    return nn.parallel.DistributedDataParallel(net)


def gather(x, args):
    """Rows (B / processes, ...) of every process -> (B, ...), with the gradient of this one's own.

    DistributedDataParallel takes the mean over processes: multiply the loss by their number.
    """
    if args.world == 1:
        return x
    rows = [torch.empty_like(x) for _ in range(args.world)]
    torch.distributed.all_gather(rows, x.detach().contiguous())
    rows[args.rank] = x
    return torch.cat(rows)


def autocast(args):
    """bfloat16 on GPUs that have it (Ampere and later), float32 elsewhere or with --fp32."""
    native = args.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(args.device, torch.bfloat16, enabled=native and not args.fp32)


@torch.no_grad()
def predict(net, images, args):
    """Outputs (N, D) of net on images (N, H, W, 3) as they are; puts net into evaluation mode."""
    net.eval()
    outputs = []
    for rows in tqdm(images.split(256), "predictions"):
        with autocast(args):
            outputs.append(net(plain_view(rows.to(args.device), args)).float())
    return torch.cat(outputs)


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


def to_float(images):
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def plain_view(images, args):
    """(B, H, W, 3) uint8 -> (B, 3, side, side) in [-1, 1], cropped at the centre if at all."""
    x = to_float(images)
    return v2.functional.center_crop(x, args.crop) if args.crop else x


def random_view(images, args):
    """Random view (B, 3, side, side) in [-1, 1] of images (B, H, W, 3) uint8, each by its own draw.

    A box of at least --area of the image and ratio 3/4 to 4/3 (RandomResizedCrop), moved by whole
    pixels up to --shift (padded RandomCrop), turned by up to --degrees, mirrored if --flip.
    """
    x = to_float(images) + 1  # 0 is black, which comes in from outside
    u = 2 * torch.rand(8, len(x), device=x.device) - 1
    area = args.area + (1 - args.area) * u[0].abs()
    stretch = torch.exp(u[1] * (-area.log()).clamp(max=math.log(4 / 3)) / 2)
    box = torch.stack([area.sqrt() * stretch, area.sqrt() / stretch])  # width, height
    shift = (u[2:4] * (args.shift + 0.5)).round() * 2 / x.shape[3]
    dx, dy = u[4:6] * (1 - box) + shift
    w, h = box
    if args.flip:
        w = w * u[6].sign()
    angle = u[7] * math.radians(args.degrees)
    theta = [w * angle.cos(), -h * angle.sin(), dx, w * angle.sin(), h * angle.cos(), dy]
    side = args.crop or x.shape[3]
    shape = (len(x), 3, side, side)
    grid = F.affine_grid(torch.stack(theta, 1).view(-1, 2, 3), shape, align_corners=False)
    return F.grid_sample(x, grid, align_corners=False) - 1


def simclr_view(images, args):
    """SimCLR's view: random_view, ColorJitter(0.4, 0.4, 0.4, 0.1) for 80 percent, grey for 20.

    Hues are turned about the grey axis of RGB; torchvision's ColorJitter turns them in HSV.
    """
    x = random_view(images, args) / 2 + 0.5
    u = torch.rand(6, len(x), 1, 1, 1, device=x.device)
    strength = torch.where(u[4] < 0.8, 2 * u[:4] - 1, 0)
    x = (x * (1 + 0.4 * strength[0])).clamp(0, 1)
    mean = rgb_to_grayscale(x).mean((2, 3), keepdim=True)
    x = torch.lerp(mean, x, 1 + 0.4 * strength[1]).clamp(0, 1)
    x = torch.lerp(rgb_to_grayscale(x), x, 1 + 0.4 * strength[2]).clamp(0, 1)
    angle = 2 * math.pi * 0.1 * strength[3]
    turned = (x.roll(1, 1) - x.roll(-1, 1)) / math.sqrt(3)
    x = torch.lerp(x.mean(1, keepdim=True), x, angle.cos()) + turned * angle.sin()
    x = torch.where(u[5] < 0.2, rgb_to_grayscale(x), x).clamp(0, 1)
    return x * 2 - 1


def strong_view(images, args):
    """SCAN's strong view, (B, 3, side, side) in [-1, 1]: --operations of RandAugment, a hidden
    square.

    Eight images share a draw. RandAugment's 14 operations are SCAN's, their ranges are its own.
    """
    if args.operations == 0:
        return simclr_view(images, args)
    change = v2.Compose(
        [
            v2.RandomHorizontalFlip(0.5 * args.flip),
            v2.RandomCrop(args.crop or images.shape[2]),
            v2.RandAugment(args.operations),
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomErasing(1.0, (0.001, 0.25), (1.0, 1.0), value=0.5),
        ]
    )
    views = [change(part) for part in images.permute(0, 3, 1, 2).split(8)]
    return torch.cat(views) * 2 - 1


def prepare_data(args):
    """Put the ID data into --dir, once, by the first process; returns data.json."""
    held = read_description(args.dir)
    train = args.dir / "train.npy"
    kept = held.get("data", ARRAYS if train.exists() else args.data)
    if kept != args.data:
        sys.exit(f"{args.dir} holds {kept}; choose another --dir for {args.data}")
    if args.rank == 0 and not (held and train.exists()):
        store_data(args)
    barrier()
    data = read_description(args.dir)
    args.image_size = data["image_size"]
    return data


def store_data(args):
    """Write the ID data set as arrays, unless they are there, data.json, and last train.npy."""
    data = {"data": args.data, "recipe": args.recipe}
    names = {}
    args.dir.mkdir(parents=True, exist_ok=True)
    for split in ("test", "train"):
        path = args.dir / f"{split}.npy"
        if args.data == ARRAYS:
            _, _, names[split] = read_dataset(str(path.resolve()), split, args)
        else:
            path = args.dir / f".partial.{split}.npy"
            names[split] = store_split(split, path, args)
        images = load_array(path, (None, None, None, 3), np.uint8, "what wrote it")
        data[split] = len(images)
    if names["test"] != names["train"][: len(names["test"])]:
        sys.exit(f"{args.data}: training and test images need the same classes")
    data["classes"] = names["train"]
    data["image_size"] = images.shape[1]
    data["digest"] = fingerprint(images)
    save(args.dir / "data.json", json.dumps(data, indent=1) + "\n")
    if args.data != ARRAYS:
        for split in ("test", "train"):
            os.replace(args.dir / f".partial.{split}.npy", args.dir / f"{split}.npy")


def store_split(split, path, args):
    """Write the images of one split to path, its labels to --dir; returns the class names."""
    name = args.data.partition(":")[0]
    dataset, labels, names = read_dataset(args.data, split, args)
    rows = np.arange(len(dataset))
    divided = Path(name, "train").exists() or Path(name, "train.npy").exists()
    if not divided and name not in PARTED:
        rows = every_fifth(rows, labels, split == "test")
    decode(Subset(dataset, rows), path, args.image_size)
    beside = args.dir / f"{split}.labels.npy"
    beside.unlink(missing_ok=True)
    if labels is not None:
        save(beside, labels[rows])
    return names


def every_fifth(rows, labels, test):
    """Of a set without parts every fifth image of a class is for testing."""
    groups = [rows] if labels is None else [rows[labels == c] for c in np.unique(labels)]
    chosen = []
    for group in groups:
        is_test = np.arange(len(group)) % 5 == 4
        chosen.append(group[is_test == test])
    return np.sort(np.concatenate(chosen))


def load_split(split, data, args):
    """Images (N, H, W, 3) of one split, and labels (N,) or None."""
    writer = "this script in an empty --dir"
    shape = (data[split], data["image_size"], data["image_size"], 3)
    images = torch.from_numpy(load_array(args.dir / f"{split}.npy", shape, np.uint8, writer))
    labels = None
    if data["classes"]:
        labels = load_array(args.dir / f"{split}.labels.npy", shape[:1], np.int64, writer)
    return images, labels


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


def report(stage, assigned, labels, classes):
    """Print sizes of clusters (N,) and, where labels are known, ACC (Hungarian), NMI, ARI."""
    quality = ""
    if labels is not None:
        table = confusion_matrix(labels, assigned)
        accuracy = table[linear_sum_assignment(table, maximize=True)].sum() / len(labels)
        nmi = normalized_mutual_info_score(labels, assigned)
        ari = adjusted_rand_score(labels, assigned)
        quality = f"ACC {accuracy:.3f}  NMI {nmi:.3f}  ARI {ari:.3f}  "
    print(f"{stage:22s} {quality}cluster sizes", *np.bincount(assigned, minlength=classes))


def name_clusters(head, assigned, labels):
    """Order the rows of the head so that a cluster has the number of its best class."""
    table = confusion_matrix(labels, assigned)  # (classes, clusters)
    order = torch.from_numpy(linear_sum_assignment(table, maximize=True)[1])
    head.weight.data = head.weight.data[order]
    head.bias.data = head.bias.data[order]


def write_labels(arrays, args):
    """Write the labels that the later scripts read; a diffusion model of other labels goes."""
    if args.rank == 0:
        path = args.dir / "pseudo_labels.npy"
        labels = np.asarray(arrays["train"])
        if path.exists() and not np.array_equal(
            load_array(path, (None,), np.int64, "this script without it"), labels
        ):
            shutil.rmtree(args.dir / "diffusion", ignore_errors=True)
        save(args.dir / "test_pseudo_labels.npy", np.asarray(arrays["test"]))
        save(args.dir / "pseudo_confidence.npy", np.asarray(arrays["confidence"]))
        save(path, labels)
    barrier()


def build_unet(side, channels, classes, args):
    """UNet eps_theta(x_t, t, c) on pixels; the last of classes + 1 embeddings is the null."""
    widths = [int(width) for width in args.channels.split(",")]
    down = ["DownBlock2D"] * len(widths)
    for level in range(len(widths)):
        if side >> level == args.attention:
            down[level] = "AttnDownBlock2D"
    return UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=args.layers,
        block_out_channels=widths,
        down_block_types=down,
        up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
        dropout=args.dropout,
        num_class_embeds=classes + 1,
    )


def save_diffusion(unet, scheduler, folder):
    """diffusion/ in diffusers' layout, complete when it has its name."""
    partial = folder / ".partial.diffusion"
    unet.save_pretrained(partial / "unet")
    scheduler.save_pretrained(partial / "scheduler")
    shutil.rmtree(folder / "diffusion", ignore_errors=True)
    os.replace(partial, folder / "diffusion")


if __name__ == "__main__":
    main()

# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6.0",
#     "torchvision>=0.21.0",
#     "diffusers>=0.33.1",
#     "numpy>=1.26.4",
#     "scikit-learn>=1.5.2",
#     "scipy>=1.11.4",
#     "pillow>=10.4.0",
#     "tqdm>=4.66.5",
# ]
# ///
