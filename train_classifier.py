"""The detectors of both papers, DREAM-OOD, DREAM-ID and SD outliers, and their baselines.

ce        CE on ID images: the baseline of paper A.
ce-pseudo CE on ID images and pseudo-labels, trained like sd: the baseline of paper B.
dream     Paper A: CE(g_in(f(x)), y) + beta CE(phi(E(x)), 1[x is ID]), E the negative free energy;
          ID images and imagined outliers share each batch, from the first step. --filter (ours)
          drops outliers that ce takes for ID; --loss oe is Outlier Exposure's.
dream-id  Paper A: CE on ID images and imagined inliers.
sd        Paper B: CE(g_bin, I) + (1 - I) CE(g_in, y) + I lam CE(g_out, y), I = 1 for an outlier,
          y its pseudo-label.
frozen    A network as it is: SimCLR's of scan.pt, or a vision transformer (vit:ID, hub id or
          folder).

reads    train.npy (N, H, W, 3) uint8; train.labels.npy, or without it pseudo_labels.npy (ce, dream,
         frozen), which ce-pseudo always reads; outliers.npy, outlier_labels.npy (dream),
         classifier_ce.pt (dream with --filter or --init ce); inliers.npy, inlier_labels.npy,
         id_labels.npy (dream-id); sd_outliers.npy and .csv (sd), sd_reconstructions.npy (sd with
         --reconstructions); scan.pt (frozen)
writes   classifier_{ce,ce-pseudo,dream,dream-id,sd,frozen}.pt: weights of f, heads and phi, and
         what rebuilds them; filter.png (a row per class: six kept outliers, six dropped ones)

python train_classifier.py                                  # every method whose inputs are in --dir
python train_classifier.py --dir runs/cifar10 --method sd   # ViT-B/16
python train_classifier.py --dir runs/cifar10 --method frozen --frozen-arch vit:facebook/dinov2-base
"""

import argparse
import json
import math
import os
import sys
import time
import zlib
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from diffusers.optimization import get_scheduler
from matplotlib.figure import Figure
from torch import nn
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import v2
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModel

ARCHS = ("small", "resnet18", "resnet34", "resnet18-imagenet", "resnet34-imagenet")
# option: (value, or one for each of COLUMNS), help[, choices]. cifar100, imagenet100: paper A as
# released; the ce that imagenet100 starts from is trained like dream-id. cifar10: as cifar100;
# sd: paper B's lineage.
# fmt: off
VIT = "vit:google/vit-base-patch16-224-in21k"
RECIPES = {
    "seed": (0, "seed of every random number"),
    "arch": (("small", "resnet34", "resnet34", "resnet34"), "network: small, resnet*, vit:ID"),
    "epochs": ((40, 200, 200, 100), "passes over the ID images"),
    "batch_size": ((64, 256, 256, 160), "ID images per step; as many outliers come with them"),
    "lr": (0.1, "learning rate of SGD"),
    "weight_decay": (5e-4, "weight decay"),
    "momentum": (0.9, "Nesterov momentum"),
    "optimizer": ("sgd", "optimizer; adamw takes no momentum", "sgd", "adamw"),
    "schedule": ("cosine", "course of the learning rate", "cosine", "constant"),
    "loss": ("logistic", "dream: loss of the outliers; oe wants --beta 0.5", "logistic", "oe"),
    "beta": ((1.0, 2.5, 2.5, 1.0), "dream: weight of the energy regularisation"),
    "outliers": (0, "dream: outliers drawn at random, before --filter, 0 for all"),
    "filter": (("knn", "none", "none", "none"), "dream: drop those that ce takes for ID, by",
        "none", "knn", "energy"),
    "filter_k": ((10, 50, 50, 50), "dream: neighbour that --filter knn asks"),
    "phi_hidden": ((0, 0, 0, 512), "dream: width of phi's hidden layer, 0 for a linear phi"),
    "init": (("random", "random", "random", "ce"), "dream: start from", "random", "ce"),
    "dream_epochs": ((40, 200, 200, 20), "dream: epochs"),
    "dream_batch_size": ((64, 256, 256, 80), "dream: ID images per step"),
    "dream_lr": ((0.1, 0.1, 0.1, 1e-3), "dream: learning rate"),
    "inlier_batch": ((64, 256, 256, 256), "dream-id: inliers per step"),
    "lam": (0.5, "sd: weight of g_out's loss"),
    "sd_arch": (("small", VIT, VIT, VIT), "sd: network"),
    "freeze_blocks": (6, "sd: first blocks of a transformer that are kept as they are"),
    "sd_epochs": ((40, 30, 30, 30), "sd: epochs"),
    "sd_batch_size": ((64, 8, 8, 8), "sd: ID images per step"),
    "sd_lr": ((0.1, 4e-4, 4e-4, 4e-4), "sd: learning rate"),
    "sd_weight_decay": ((5e-4, 5e-5, 5e-5, 5e-5), "sd: weight decay"),
    "sd_momentum": ((0.9, 0.0, 0.0, 0.0), "sd: Nesterov momentum"),
    "sd_optimizer": ("sgd", "sd: optimizer; as ours, faster: adamw, 2e-5, 128, 3 epochs, cosine",
        "sgd", "adamw"),
    "sd_schedule": (("cosine", "constant", "constant", "constant"), "sd: its course"),
    "frozen_arch": ("pretext", "frozen: pretext or backbone of scan.pt, or vit:ID"),
    "crop": ((0, 0, 0, 224), "views: px, 0 for whole images"),
    "area": ((1.0, 1.0, 1.0, 0.08), "views: least share of the image that is seen"),
    "shift": ((1, 4, 4, 0), "views: largest shift, px"),
    "degrees": ((10, 0, 0, 0), "views: largest turn, degrees"),
    "flip": ((0, 1, 1, 1), "views: 1 if a mirrored image keeps its class"),
}
# fmt: on


def energy(logits, T=1.0):
    """E(x) = T logsumexp(f(x) / T): the negative free energy, large for ID. (B, C) -> (B,)."""
    return T * torch.logsumexp(logits / T, dim=1)


def dream_loss(logits, labels, is_id, phi, beta):
    """Paper A: CE + beta CE(phi(E), is_id). logits (B, C); is_id (B,): True for ID; labels (B,)."""
    classification = F.cross_entropy(logits[is_id], labels[is_id])
    regularisation = F.cross_entropy(phi(energy(logits)[:, None]), is_id.long())  # 1: ID, 0: OOD
    return classification + beta * regularisation


def oe_loss(logits, labels, is_id, beta):
    """Outlier Exposure (Hendrycks et al., ICLR 2019): CE, and on outliers CE with uniform p."""
    z = logits[~is_id]
    uniform = (torch.logsumexp(z, dim=1) - z.mean(dim=1)).mean()
    return F.cross_entropy(logits[is_id], labels[is_id]) + beta * uniform


def looks_id(images, outliers, args):
    """True (M,) for outliers that ce takes for ID, at the threshold that takes 95 % of `images`.

    Ours. knn: d_K of paper A once more, now of the decoded image, in ce's unit features; a
    training image is not its own neighbour. energy: paper A's score. No OOD image is seen.
    """
    held = load_ce(args)
    config = argparse.Namespace(**held["config"])
    net = Detector("ce", config.arch, config.classes, 0, config.vit).to(args.device)
    net.load_state_dict(held["model"])
    f = predict(net.f, images, args)
    f_outliers = predict(net.f, outliers, args)
    if args.filter == "energy":
        id_scores = -energy(net.heads["g_in"](f))
        scores = -energy(net.heads["g_in"](f_outliers))
    else:
        D_in = F.normalize(f)
        id_scores = knn(D_in, D_in, args.filter_k + 1)[0][:, -1]
        scores = knn(F.normalize(f_outliers), D_in, args.filter_k)[0][:, -1]
    dropped = scores <= id_scores.quantile(0.95)
    if args.world > 1:  # all processes go on with what the first one found
        torch.distributed.broadcast(dropped, 0)
    return dropped.cpu()


def choose_others(method, images, others, labels, args):
    """Rows of the others (M, ...) to train with, or None; of dream's by --outliers and --filter."""
    rows = None if others is None else torch.arange(len(others))
    if method != "dream":
        return rows
    if args.outliers:
        torch.manual_seed(seed_of(args.seed, "outliers"))
        rows = torch.randperm(len(others))[: args.outliers]
    if args.filter != "none":
        labels = labels.cpu()
        dropped = looks_id(images, others, args)
        for c in labels.unique():
            mine = rows[labels[rows] == c]
            print(f"--filter keeps {(~dropped[mine]).sum()} / {len(mine)} outliers of class {c}")
        rows = rows[~dropped[rows]]
        if args.rank == 0:
            save(args.dir / "filter.png", filter_sheet(others, labels, dropped))
    if args.outliers > len(others) or not len(rows):
        sys.exit(f"{len(rows)} of {len(others)} outliers are left; sample more")
    return rows


def sd_loss(logits, labels, indicator, lam):
    """Paper B: CE(g_bin, I) + (1 - I) CE(g_in, y) + I lam CE(g_out, y); I (B,): 1 if outlier."""
    binary = F.cross_entropy(logits["g_bin"], indicator, reduction="none")
    inner = F.cross_entropy(logits["g_in"], labels, reduction="none")
    outer = F.cross_entropy(logits["g_out"], labels, reduction="none")
    return (binary + (1 - indicator) * inner + indicator * lam * outer).mean()


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


def train(method, data, classes, args):
    """One detector, on ID images and labels (N,) and, if any, the chosen of others (M, ...)."""
    images, labels, others, other_labels, chosen = data
    torch.manual_seed(seed_of(args.seed, method))
    net = Detector(method, args.arch, classes, args.phi_hidden, args.vit)
    load_start(net, method, args)
    forward = distribute(net, args)
    size = args.batch_size
    others_size = args.inlier_batch if method == "dream-id" else size
    steps = args.epochs * max(1, len(images) // size)
    optimizer = make_optimizer(net, args)
    schedule = get_scheduler(args.schedule, optimizer, num_warmup_steps=0, num_training_steps=steps)
    state = {"net": net, "optimizer": optimizer, "schedule": schedule}
    stage = f"classifier_{method}"
    for step, index in training_steps(stage, len(images), size, steps, state, args):
        x = images[index]
        y = labels[index]
        if others is not None:
            rows = batch_rows(len(chosen), others_size, step, args.seed, "others")
            rows = chosen[rows[args.rank :: args.world]]
            x = torch.cat([x, others[rows]])
            y = torch.cat([y, other_labels[rows]])
        is_id = torch.arange(len(x), device=args.device) < len(index)
        x = random_view(x.to(args.device), args)
        with autocast(args):
            _, logits = forward(x)
        logits = {name: head.float() for name, head in logits.items()}
        if method == "dream" and args.loss == "oe":
            loss = oe_loss(logits["g_in"], y, is_id, args.beta)
        elif method == "dream":
            loss = dream_loss(logits["g_in"], y, is_id, net.phi, args.beta)
        elif method == "sd":
            loss = sd_loss(logits, y, (~is_id).long(), args.lam)
        else:
            loss = F.cross_entropy(logits["g_in"], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        state["loss"] = loss.detach()
    return net


def parse_args():
    parser = recipe_parser()
    parser.add_argument("--method", nargs="+", choices=INPUTS, help="else all whose inputs exist")
    text = "labels of the ID images for ce, dream and frozen; without it the data set's, if any"
    parser.add_argument("--labels", choices=("dataset", "pseudo"), help=text)
    text = "sd: sd_reconstructions.npy, copies that keep their label, are ID images too"
    parser.add_argument("--reconstructions", action="store_true", help=text)
    parser.add_argument("--restart", action="store_true", help="drop unfinished work")
    parser.add_argument("--fp32", action="store_true", help="no bfloat16 on GPUs that have it")
    args = parser.parse_args()
    methods = args.method or INPUTS
    args.method = []
    for method, files in INPUTS.items():  # ce first: dream may start from it
        complete = all((args.dir / file).exists() for file in files)
        if method in methods and (complete or methods is not INPUTS):
            args.method.append(method)
    if args.labels is None:
        known = (args.dir / "train.labels.npy").exists()
        args.labels = "dataset" if known else "pseudo"
    return args


def main():
    args = parse_args()
    start(args)
    digest = read_description(args.dir).get("digest")
    options = {method: options_of(method, args) for method in args.method}
    # all inputs are checked before any training
    data = {method: load_data(method, args) for method in args.method}
    for method, own in options.items():
        images, labels, others, other_labels = data[method]
        classes = int(labels.max()) + 1
        chosen = choose_others(method, images, others, other_labels, own)
        inputs = [*data[method], chosen]
        own.inputs = fingerprint(*[part.cpu() for part in inputs if part is not None])
        if method == "frozen":
            net = Detector(method, own.arch, 0, 0, own.vit)
            load_start(net, method, own)
        else:
            net = train(method, inputs, classes, own)
        config = plain_options(own) | {
            "method": method,
            "given": what_is_given(method, labels, args),
            "classes": classes,
            "vit": own.vit,
        }
        content = {
            "model": net.state_dict(),
            "labels": labels.cpu(),
            "config": config,
            "digest": digest,
        }
        if args.rank == 0:
            save(args.dir / f"classifier_{method}.pt", content)
        barrier()  # dream may start from the ce that the first process wrote
        print(f"wrote classifier_{method}.pt to {args.dir}")
    drop_checkpoints([f"classifier_{method}" for method in options], args)
    print(f"next: python evaluate.py --dir {args.dir}, with --ood-data SET ... but for digits")


# ---- plumbing: not the paper's method; same name, same text in every script ----

COLUMNS = ("digits", "cifar10", "cifar100", "imagenet100")  # of RECIPES
CHECKPOINT_SECONDS = 60
INPUTS = {  # what a method needs, beside train.npy and labels
    "ce": [],
    "ce-pseudo": ["pseudo_labels.npy"],
    "dream": ["outliers.npy"],
    "dream-id": ["inliers.npy", "inlier_labels.npy", "id_labels.npy"],
    "sd": ["sd_outliers.npy", "sd_outliers.csv"],
    "frozen": ["scan.pt"],
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


def read_vit(arch):
    """What rebuilds the model of arch vit:ID without its weights; see VisionTransformer."""
    name = arch.removeprefix("vit:")
    try:
        config = AutoConfig.from_pretrained(name)
        processor = AutoImageProcessor.from_pretrained(name)
    except Exception as error:  # the hub and transformers raise of every kind
        sys.exit(f"{arch} gives no vision model ({error!r:.200}); give another hub id or folder")
    size = dict(getattr(processor, "crop_size", None) or processor.size)
    return {
        "config": json.loads(config.to_json_string(use_diff=False)),
        "side": size.get("height") or size["shortest_edge"],
        "mean": list(processor.image_mean),
        "std": list(processor.image_std),
    }


def load_vit(f, arch, freeze_blocks):
    """Weights of vit:ID for f; its first blocks and its unused parts will not be trained."""
    try:
        name = arch.removeprefix("vit:")
        model, info = AutoModel.from_pretrained(name, output_loading_info=True)
        f.model.load_state_dict(model.state_dict())
    except Exception as error:  # the hub and transformers raise of every kind
        sys.exit(f"{arch} does not load ({error!r:.200}); give another hub id or folder")
    missing = [key for key in info["missing_keys"] if "pooler" not in key]
    if missing:  # transformers would go on with random weights
        sys.exit(f"{arch} lacks {len(missing)} weights, {missing[0]} is one")
    for key, parameter in f.model.named_parameters():
        if "pooler" in key or "mask_token" in key:
            parameter.requires_grad_(False)
    depth = f.model.config.num_hidden_layers
    for module in f.model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            module[:freeze_blocks].requires_grad_(False)


def load_start(net, method, args):
    """Weights that do not start at random: of vit:ID, of scan.pt or of classifier_ce.pt."""
    if args.vit:
        load_vit(net.f, args.arch, args.freeze_blocks)
    elif method == "frozen":
        held = load_weights(args.dir / "scan.pt", "cpu", "run train_scan_diffusion.py")
        net.f.load_state_dict(held[args.frozen_arch])
    if method == "dream":  # w_1 > w_0: nothing in the loss would turn the slope of a linear phi
        net.phi[0].weight.data = net.phi[0].weight.data.sort(0).values
        net.phi.requires_grad_(args.loss == "logistic")
    if method == "dream" and args.init == "ce":
        held = load_ce(args)
        try:
            net.load_state_dict(
                held["model"] | {f"phi.{k}": v for k, v in net.phi.state_dict().items()}
            )
        except RuntimeError:
            sys.exit(
                "classifier_ce.pt is of another --arch or other classes; run --method ce again"
            )


def load_ce(args):
    """Content of classifier_ce.pt."""
    held = load_weights(args.dir / "classifier_ce.pt", "cpu", "run --method ce first")
    if held["digest"] != read_description(args.dir).get("digest"):
        sys.exit("classifier_ce.pt is of other ID data; run --method ce again")
    return held


def make_optimizer(net, args):
    """SGD on what is trained, with Nesterov momentum if with any; or AdamW."""
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    if args.optimizer == "adamw":
        return torch.optim.AdamW(trained, args.lr, weight_decay=args.weight_decay)
    return torch.optim.SGD(
        trained,
        args.lr,
        momentum=args.momentum,
        nesterov=args.momentum > 0,
        weight_decay=args.weight_decay,
    )


def what_is_given(method, labels, args):
    """What a method is trained with, in words, for the tables."""
    path = args.dir / "train.labels.npy"
    known = path.exists() and np.array_equal(np.load(path), labels.cpu())
    labels = "labels" if known else "pseudo-labels"
    return {
        "dream": f"{labels}, outliers",
        "dream-id": f"{labels}, inliers",
        "sd": f"{labels}, SD outliers",
        "frozen": f"nothing; {labels} for Mahalanobis",
    }.get(method, labels)


def options_of(method, args):
    """Options of one method: dream_*, sd_* and frozen_* stand in for those without the prefix."""
    own = dict(vars(args))
    prefix = "sd_" if method == "ce-pseudo" else f"{method}_"
    for name, value in vars(args).items():
        if name.startswith(prefix):
            own[name.removeprefix(prefix)] = value
    own = argparse.Namespace(**own)
    own.vit = read_vit(own.arch) if own.arch.startswith("vit:") else None
    known = ("pretext", "backbone") if method == "frozen" else ARCHS
    if not own.vit and own.arch not in known:
        sys.exit(f"{method} knows no --arch {own.arch}; give {', '.join(known)} or vit:ID")
    if method == "frozen" and not own.vit:
        held = load_weights(args.dir / "scan.pt", "cpu", "run train_scan_diffusion.py")
        own.arch = held["config"]["arch"]
    return own


def load_data(method, args):
    """ID images and labels (N,); outliers or inliers and their labels (M,), or None and None."""
    writer = "train_scan_diffusion.py"
    images = load_images(args.dir / "train.npy", None, writer)
    known = args.labels == "dataset" and method != "ce-pseudo"
    labels = args.dir / ("train.labels.npy" if known else "pseudo_labels.npy")
    others = None
    other_labels = None
    if method == "dream":
        others = load_images(args.dir / "outliers.npy", images, "sample_outliers.py")
        other_labels = torch.zeros(len(others), dtype=torch.int64, device=args.device)
        if (args.dir / "outlier_labels.npy").exists():  # to count what --filter keeps of a class
            other_labels = read_labels(args.dir / "outlier_labels.npy", others, args)
    if method == "dream-id":
        labels = args.dir / "id_labels.npy"
        others = load_images(args.dir / "inliers.npy", images, "sample_outliers.py --inliers")
        other_labels = read_labels(args.dir / "inlier_labels.npy", others, args)
    if method == "sd":
        others = load_images(args.dir / "sd_outliers.npy", images, "sample_sd_outliers.py")
        labels = args.dir / "sd_outliers.csv"
        other_labels = read_labels(labels, images, args)
        if len(others) != len(images):
            sys.exit(f"sd_outliers.npy has {len(others)} images; run sample_sd_outliers.py again")
        if args.reconstructions:
            writer = "sample_sd_outliers.py --reconstruct"
            copies = load_images(args.dir / "sd_reconstructions.npy", images, writer)
            return torch.cat([images, copies]), other_labels.repeat(2), others, other_labels
    return images, read_labels(labels, images, args), others, other_labels


def filter_sheet(outliers, labels, dropped):
    """Figure with a line for each of at most ten classes: six kept outliers, six dropped ones."""
    classes = labels.unique()[:10]
    figure = Figure((12, 1.2 * len(classes)), layout="constrained")
    axes = figure.subplots(len(classes), 12, squeeze=False)
    for line, c in zip(axes, classes, strict=True):
        for half, part in ((line[:6], ~dropped), (line[6:], dropped)):
            for axis, i in zip(half, torch.where((labels == c) & part)[0], strict=False):
                axis.imshow(outliers[i])
    axes[0, 0].set_title("kept")
    axes[0, 6].set_title("dropped")
    for axis in axes.flat:
        axis.axis("off")
    return figure


def load_images(path, like, writer):
    """Images (N, H, W, 3) uint8 over the memory map of a file, of the size of `like`, if any."""
    side = None if like is None else like.shape[1]
    return torch.from_numpy(load_array(path, (None, side, side, 3), np.uint8, writer))


def read_labels(path, images, args):
    """Labels (N,) of images (N, ...) from .npy, or from the column y of .csv, on the device."""
    if path.suffix == ".npy":
        labels = load_array(path, (len(images),), np.int64, "the script that writes it")
        return torch.from_numpy(labels).to(args.device)
    try:
        labels = np.loadtxt(path, np.int64, delimiter=",", skiprows=1, usecols=2)
    except (OSError, ValueError) as error:
        sys.exit(f"{path} does not load ({error}); run sample_sd_outliers.py again")
    if labels.shape != (len(images),):
        sys.exit(
            f"{path} has {labels.size} rows, not {len(images)}; run sample_sd_outliers.py again"
        )
    return torch.from_numpy(labels).to(args.device)


if __name__ == "__main__":
    main()

# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6.0",
#     "torchvision>=0.21.0",
#     "diffusers>=0.33.1",
#     "transformers>=4.50.0",
#     "numpy>=1.26.4",
#     "matplotlib>=3.8.4",
#     "tqdm>=4.66.5",
# ]
# ///
