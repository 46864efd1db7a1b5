"""The detectors of both papers and their baseline: plain cross-entropy, DREAM-OOD, DREAM-ID, SD outliers.

ce        CE on ID images: the baseline.
dream     Paper A: CE(g_in(f(x)), y) + beta CE(phi(E(x)), 1[x is ID]), E the negative free energy; ID images and
          imagined outliers share each batch, from the first step.
dream-id  Paper A: CE on ID images and imagined inliers.
sd        Paper B: CE(g_bin, I) + (1 - I) CE(g_in, y) + I lam CE(g_out, y), I = 1 for an outlier, y its pseudo-label.
frozen    A network as it is, without training: SimCLR's of scan.pt, or any vision model that transformers loads
          (vit:ID, a hub id or a folder: ViT, DINOv2, CLIP ...).

reads    train.npy with train.labels.npy (ce, dream; sd if Stable Diffusion made its outliers), pseudo_labels.npy (sd;
         ce and dream without labels) or id_labels.npy (dream-id); outliers.npy (dream), inliers.npy with
         inlier_labels.npy (dream-id), sd_outliers.npy with sd_outliers.csv (sd), sd_reconstructions.npy (sd with
         --reconstructions), scan.pt (frozen)
writes   classifier_{ce,dream,dream-id,sd,frozen}.pt: weights of f, heads and phi, and all that rebuilds them

python train_classifier.py                                   # every method whose inputs are in --dir
python train_classifier.py --dir runs/cifar10 --method sd    # ViT-B/16; with --recipe cifar10-30min a ResNet-18
python train_classifier.py --dir runs/cifar10 --method sd --optimizer adamw --sd-lr 3e-5 --sd-batch 128 --warmup 0.1
python train_classifier.py --dir runs/cifar10 --method frozen --frozen-arch vit:facebook/dinov2-base
"""

import argparse
import functools
import itertools
import json
import logging
import math
import os
import re
import sys
import time
import zlib
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModel

ARCHS = "small|resnet18|resnet34|resnet50|resnet18-imagenet|resnet34-imagenet|resnet50-imagenet"  # else CIFAR stem
VIT = "vit:google/vit-base-patch16-224-in21k"  # of paper B
RECIPES = {  # option: help, value per recipe. dream_*, sd_*: in place of the row without the prefix where not 0
    # cifar100, imagenet100: paper A as released; the CE start of ImageNet-100 is trained like DREAM-ID. cifar10 is
    # not in paper A: as for CIFAR-100. sd: paper B's lineage; it names no epochs: 3, as in the faster recipe (AdamW).
    # cifar10-30min: sd on ResNet-18, 2 x 50,000 images x 3.3 GFLOP at 50 TFLOP/s, our estimate: 30 x 6.7 s; ce: half.
    # imagenet100: ResNet-34 keeps 0.36 GiB per image of 224 px in float32; bf16 takes less. dream-id steps on 416.
    "recipe": ("column of the table RECIPES", "digits", "cifar10", "cifar100", "imagenet100", "cifar10-30min"),
    "seed": ("seed of every random number, 0 for the first run", 0, 0, 0, 0, 0),
    "arch": (f"network: {ARCHS.replace('|', ', ')}, vit:ID", "small", "resnet34", "resnet34", "resnet34", "resnet18"),
    "epochs": ("passes over the ID images", 40, 200, 200, 100, 30),
    "batch_size": ("ID images per step; as many outliers come with them", 64, 256, 256, 160, 256),
    "optimizer": ("SGD with Nesterov momentum 0.9, or AdamW: sgd|adamw", "sgd", "sgd", "sgd", "sgd", "sgd"),
    "lr": ("learning rate, cosine per step to 1e-6", 0.1, 0.1, 0.1, 0.1, 0.1),
    "warmup": ("share of the steps in which the learning rate rises, 0 for none", 0.0, 0.0, 0.0, 0.0, 0.0),
    "weight_decay": ("weight decay, 0 for none", 5e-4, 5e-4, 5e-4, 5e-4, 5e-4),
    "beta": ("dream: weight of the energy regularisation, 0 for none", 1.0, 2.5, 2.5, 1.0, 2.5),
    "phi_hidden": ("dream: width of phi's hidden layer, 0 for a linear phi", 0, 0, 0, 512, 0),
    "init": ("dream: where f and g_in start, random|ce : at random, classifier_ce.pt", *["random"] * 3, "ce", "random"),
    "dream_epochs": ("dream: epochs, 0 for --epochs", 0, 0, 0, 20, 0),
    "dream_batch": ("dream: ID images per step, 0 for --batch-size", 0, 0, 0, 80, 0),
    "dream_lr": ("dream: learning rate, 0 for --lr", 0.0, 0.0, 0.0, 1e-3, 0.0),
    "inlier_batch": ("dream-id: inliers per step, 0 for as many as ID images", 0, 0, 0, 256, 0),
    "lam": ("sd: weight of g_out's loss, 0 for none", 0.5, 0.5, 0.5, 0.5, 0.5),
    "sd_arch": ("sd: network, same for --arch", "same", VIT, VIT, VIT, "same"),
    "freeze_blocks": ("vit: blocks kept as they are, with the embeddings, 0 for none", 0, 6, 6, 6, 0),
    "sd_epochs": ("sd: epochs, 0 for --epochs", 0, 3, 3, 3, 0),
    "sd_batch": ("sd: ID images per step, 0 for --batch-size", 0, 16, 16, 16, 0),
    "sd_lr": ("sd: learning rate, 0 for --lr", 0.0, 4e-4, 4e-4, 4e-4, 0.0),
    "sd_weight_decay": ("sd: weight decay, 0 for --weight-decay", 0.0, 5e-5, 5e-5, 5e-5, 0.0),
    "frozen_arch": ("frozen: pretext or scan of scan.pt, or vit:ID", *["pretext"] * 5),
    "crop": ("px of the views of images over 64 px, 0 for all of them", 0, 0, 0, 224, 0),
    "amp": ("precision of the network, auto|bf16|none ; auto: bf16 on CUDA of Ampere or later", *["auto"] * 5),
    "shift": ("augmentation up to 64 px: largest shift, px, 0 for none", 1, 4, 4, 0, 4),
    "degrees": ("augmentation up to 64 px: largest turn, degrees, 0 for none", 10, 0, 0, 0, 0),
    "zoom": ("augmentation up to 64 px: largest scale factor", 1.1, 1.0, 1.0, 1.0, 1.0),
    "flip": ("augmentation: 1 to mirror at random, 0 for not", 0, 1, 1, 1, 1),
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


def transformer_plan(arch):
    """What rebuilds the model of arch vit:ID, ID a hub id or a folder, without its weights; see Transformer."""
    name = arch.removeprefix("vit:")
    for logger in ("transformers", "huggingface_hub"):  # what goes wrong is said in one line below
        logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        config = AutoConfig.from_pretrained(name)
        config = getattr(config, "vision_config", config)  # CLIP: without its text half
        plan = {"config": json.loads(config.to_json_string(use_diff=False))}
        plan["config"] |= {"mask_ratio": 0.0} if hasattr(config, "mask_ratio") else {}  # ViT-MAE hides patches
        width = getattr(config, "hidden_sizes", None) or [config.hidden_size]
        side = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    except Exception as error:  # transformers, its hub and its models know many
        reason = str(error).splitlines()[0]
        fail(
            f"{arch} gives no vision model of transformers ({reason}); give vit:FOLDER, or another --arch or --sd-arch"
        )
    plan |= {"side": side, "width": width[-1], "mean": [0.5] * 3, "std": [0.5] * 3}
    try:
        processor = AutoImageProcessor.from_pretrained(name)
        size = dict(getattr(processor, "crop_size", None) or processor.size)
        plan |= {"mean": [*processor.image_mean], "std": [*processor.image_std]}
        plan["side"] = size.get("height") or size.get("shortest_edge") or side
    except OSError:
        print(f"{arch} has no preprocessor_config.json: its images are taken to be {side} px in [-1, 1]")
    return plan


def load_pretrained(f, arch):
    """Put the weights of vit:ID into the Transformer f; every one of them must be there."""
    try:
        name, config = arch.removeprefix("vit:"), f.model.config
        model, info = AutoModel.from_pretrained(name, config=config, output_loading_info=True, **f.options)
        if info["missing_keys"]:
            raise ValueError(f"{len(info['missing_keys'])} weights are missing, {min(info['missing_keys'])} is one")
    except Exception as error:  # transformers, its hub and safetensors know many
        fail(f"{arch} does not load ({str(error).splitlines()[0]}); give another folder or hub id")
    f.model = model.float()
    for name, parameter in f.model.named_parameters():
        if name.endswith("mask_token"):  # of DINOv2's own training, not used here: DDP would wait for its gradient
            parameter.requires_grad_(False)


def freeze(f, blocks):
    """Keep all that comes before the end of block number `blocks` of the Transformer f as it is; 0: nothing."""
    depth = f.model.config.num_hidden_layers if blocks else 0
    lists = [m for m in f.model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if blocks and (blocks > depth or not lists):
        fail(f"--freeze-blocks is {blocks}, but the model has {depth} blocks; lower it", 2)
    last = [*lists[0][blocks - 1].parameters()][-1] if blocks else None
    for parameter in f.model.parameters() if blocks else ():  # in the order of the forward pass
        parameter.requires_grad_(False)
        if parameter is last:
            break


def settings(method, args):
    """args as they are for one method: its own rows of RECIPES in place of the general ones, where not 0."""
    own = {"sd": {"epochs": args.sd_epochs, "batch_size": args.sd_batch, "lr": args.sd_lr}}
    own["sd"] |= {"weight_decay": args.sd_weight_decay, "arch": "" if args.sd_arch == "same" else args.sd_arch}
    own["dream"] = {"epochs": args.dream_epochs, "batch_size": args.dream_batch, "lr": args.dream_lr}
    own["frozen"] = {"arch": args.frozen_arch}
    own = {row: value for row, value in own.get(method, {}).items() if value}
    own = argparse.Namespace(**vars(args) | own | {"given": args})  # given: what resume compares
    own.plan = transformer_plan(own.arch) if own.arch.startswith("vit:") else None
    return own


def new_detector(method, classes, args):
    """A Detector at its start: at random, f pretrained where it is a Transformer, or all of classifier_ce.pt."""
    net = Detector(method, args.arch, classes, args.phi_hidden, args.plan)
    if args.plan:
        load_pretrained(net.f, args.arch)
        freeze(net.f, args.freeze_blocks)
    if method == "dream" and args.init == "ce":
        try:
            ce = torch.load(args.dir / "classifier_ce.pt", map_location="cpu", weights_only=True)
            lacking, _ = net.load_state_dict(ce["model"], strict=False)
            same_data = ce["digest"] == read_description(args.dir).get("digest")
            if not same_data or ce["config"]["labels"] != args.labels or {name[:3] for name in lacking} != {"phi"}:
                raise ValueError
        except Exception:  # torch, pickle and zipfile know many
            fail(
                "classifier_ce.pt is missing or of another --arch, --labels or data; --init ce needs --method ce first"
            )
    return net


def frozen_detector(args):
    """The network of --frozen-arch without heads, and its arch: SimCLR's or SCAN's of scan.pt, or vit:ID."""
    if args.plan:
        net = Detector("frozen", args.arch, 0, 0, args.plan)
        load_pretrained(net.f, args.arch)
        return net, args.arch
    try:
        content = torch.load(args.dir / "scan.pt", map_location="cpu", weights_only=True)
        net = Detector("frozen", content["config"]["arch"], 0, 0)
        net.f.load_state_dict(content["pretext" if args.frozen_arch == "pretext" else "backbone"])
        if content["digest"] != read_description(args.dir).get("digest"):
            raise ValueError
    except Exception:  # torch, pickle and zipfile know many
        fail("scan.pt is missing, damaged or of other data; run train_scan_diffusion.py, or give --frozen-arch vit:ID")
    return net, content["config"]["arch"]


def on_device(images, device):
    """Images (N, H, W, 3) uint8 up to 64 px as a tensor (N, 3, H, W) on the device; larger ones stay a memory map."""
    if images.shape[1] > 64:
        return images
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).contiguous().to(device)


def train(method, images, labels, other, other_labels, classes, args):
    """One detector. images as in fetch, labels (N,); other: outliers or inliers of the method, or None."""
    stage = f"classifier_{method}"
    torch.manual_seed(seeded(args.seed, stage))
    net = new_detector(method, classes, args)
    forward, (_, world) = parallel(net, args), ranks()
    size = min(args.batch_size, len(images)) // world * world
    sizes = {"id": size, "other": args.inlier_batch if method == "dream-id" and args.inlier_batch else size}

    def batches(steps):
        """(global batch, images), twice where there are others, which are cycled: ID data set the pace."""
        sources = {"id": images} if other is None else {"id": images, "other": other}
        for name, source in sources.items():
            key, count = (args.seed, name), (len(source), sizes[name])
            plan = lambda step, key=key, count=count: batch_of(*count, step, *key)  # noqa: E731
            sources[name] = fetch(source, plan, steps, args, args.crop, key)
        return zip(*sources.values(), strict=True)

    def detection(own, more=None):
        index, x = own
        y = labels[index]
        if more is not None:
            x, y = torch.cat([x, more[1]]), torch.cat([y, other_labels[more[0]]])
        x = augment(x, args) if isinstance(images, torch.Tensor) else x.float() / 127.5 - 1  # the rest is done there
        logits = {name: gather(head) for name, head in forward(x)[1].items()}
        is_id = torch.arange(len(x) * world, device=x.device) < len(index)  # real images come first
        if method == "dream":
            return dream_loss(logits["g_in"], labels[index], is_id, net.phi, args.beta)
        if method == "sd":
            return sd_loss(logits, y, (~is_id).long(), args.lam)
        return F.cross_entropy(logits["g_in"], y)

    trained, steps = [p for p in net.parameters() if p.requires_grad], args.epochs * len(images) // size
    how = {"lr": args.lr, "weight_decay": args.weight_decay, "fused": True}
    how |= {"momentum": 0.9, "nesterov": True} if args.optimizer == "sgd" else {}
    optimizer = (torch.optim.SGD if args.optimizer == "sgd" else torch.optim.AdamW)(trained, **how)
    warmup = {"end": 1e-6 / args.lr, "warmup": int(args.warmup * steps)}
    fit(stage, net, detection, batches, steps, optimizer, args, **warmup)
    return net.eval()


INPUTS = {"ce": [], "dream": ["outliers.npy"], "dream-id": ["inliers.npy", "inlier_labels.npy", "id_labels.npy"]}
INPUTS |= {"sd": ["sd_outliers.npy", "sd_outliers.csv"], "frozen": ["scan.pt"]}


def print_next(args, *commands):
    """Print what can be run now, with --dir and the recipe where the data set's name does not pick it."""
    recipe = f" --recipe {args.recipe}" * (Path(args.data.split(":")[0]).stem != args.recipe)
    print("next:", ", or ".join(f"python {command} --dir {args.dir}{recipe}" for command in commands))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/digits"), help="shared directory (default: %(default)s)")
    parser.add_argument("--method", nargs="+", choices=INPUTS, help="(default: every one whose inputs are in --dir)")
    parser.add_argument(
        "--labels",
        choices=("dataset", "pseudo"),
        help="of ID images for ce, dream and frozen's Mahalanobis (default: dataset where there are any)",
    )
    parser.add_argument(
        "--reconstructions",
        action="store_true",
        help="sd: add sd_reconstructions.npy, generated copies with the right label, to the ID images",
    )
    parser.add_argument("--restart", action="store_true", help="begin anew, not where a run was stopped")
    parser.add_argument("--checkpoint-every", type=float, default=60.0, help="seconds, 0: every step (default: 60)")
    parser.add_argument("--compile", action="store_true", help="compile the networks with torch.compile")
    parser.add_argument("--device", help="torch device (default: cuda, mps or cpu)")
    if int(os.environ.get("RANK", 0)):
        sys.stdout = open(os.devnull, "w")  # of several processes the first one speaks
    args = parse_recipe(parser)
    if args.zoom < 1:
        fail(f"--zoom is {args.zoom}; it must be at least 1", 2)
    for option, words in {"arch": ARCHS, "sd_arch": f"same|{ARCHS}", "frozen_arch": "pretext|scan"}.items():
        if (given := getattr(args, option)) not in words.split("|") and not re.match("vit:.", given):
            fail(f"--{option.replace('_', '-')} is {given}; it must be {words} or vit:ID", 2)
    if args.warmup >= 1:
        fail(f"--warmup is {args.warmup}; it must be below 1", 2)
    if args.method is None:
        args.method = [name for name in INPUTS if all((args.dir / file).exists() for file in INPUTS[name])]
    args.method = [name for name in INPUTS if name in args.method]  # ce first: dream may start from it
    start = args.dir / "classifier_ce.pt"
    if args.init == "ce" and "dream" in args.method and "ce" not in args.method and not start.exists():
        fail(f"--init ce needs {start}; train --method ce first, or give --init random")
    return args


def labels_file(method, args):
    """The file with the labels of the ID images for a method, and the script that writes it."""
    dataset, pseudo = args.dir / "train.labels.npy", args.dir / "pseudo_labels.npy"
    of_data = args.labels == "dataset" or args.labels is None and dataset.exists()
    if method == "dream-id":
        return args.dir / "id_labels.npy", "train_text_encoder.py"
    if method == "sd":  # those that its outliers were made with: the data set's if Stable Diffusion made them
        try:
            source, y = np.loadtxt(args.dir / "sd_outliers.csv", np.int64, delimiter=",", skiprows=1, usecols=(1, 2)).T
            fits = [path for path in (pseudo, dataset) if path.exists() and (np.load(path)[source] == y).all()]
        except (OSError, ValueError, IndexError, EOFError):  # what is missing or damaged is said where it is read
            fits = []
        of_data = fits == [dataset]
    return (dataset, "the first script in an empty --dir") if of_data else (pseudo, "train_scan_diffusion.py")


def load_training_data(method, args):
    """ID images (N, H, W, 3) and labels (N,), the same of outliers or inliers (or None, None), and whose labels."""
    images = load_array(args.dir / "train.npy", (None, None, None, 3), np.uint8, "train_scan_diffusion.py")
    (path, writer), dataset, shape = labels_file(method, args), args.dir / "train.labels.npy", (None, *images.shape[1:])
    labels, other, other_labels = load_array(path, images.shape[:1], np.int64, writer), None, None
    true = dataset.exists() and np.array_equal(labels, load_array(dataset, (None,), np.int64, writer))
    if method == "dream":
        other = load_array(args.dir / "outliers.npy", shape, np.uint8, "sample_outliers.py")
        other_labels = np.zeros(len(other), np.int64)  # not used by the loss
    elif method == "dream-id":
        other = load_array(args.dir / "inliers.npy", shape, np.uint8, "sample_outliers.py --inliers")
        path = args.dir / "inlier_labels.npy"
        other_labels = load_array(path, other.shape[:1], np.int64, "sample_outliers.py --inliers")
    elif method == "sd":
        other, other_labels = load_sd_images(args.dir / "sd_outliers.npy", images, labels)
        if args.reconstructions and 2 * images.nbytes > 2**33:
            fail(f"--reconstructions takes {2 * images.nbytes / 2**30:.0f} GiB of memory; it is for smaller images", 2)
        if args.reconstructions:
            copies, copy_labels = load_sd_images(args.dir / "sd_reconstructions.npy", images, labels)
            labels = np.concatenate([labels, copy_labels])
            images = np.concatenate([images, in_format_of(images, copies)])
    other = None if other is None else in_format_of(images, other)
    return images, labels, other, other_labels, "dataset" if true else "pseudo"


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


def save_frozen(args, data):
    """classifier_frozen.pt: the network of --frozen-arch, for the scores that need features alone."""
    images = load_array(args.dir / "train.npy", (None, None, None, 3), np.uint8, "train_scan_diffusion.py")
    net, arch = frozen_detector(args)
    by_data_set = labels_file("frozen", args)[0].name == "train.labels.npy"
    config = {option: value for option, value in vars(args).items() if option not in ("dir", "given")}
    config |= {"method": "frozen", "arch": arch, "classes": 0, "phi_hidden": 0, "image_size": images.shape[1]}
    config |= {"whose_labels": "dataset" if by_data_set else "pseudo"}
    content = {"model": net.state_dict(), "config": config, "digest": data.get("digest")}
    save(args.dir / "classifier_frozen.pt", content)
    print(f"frozen: {args.arch}, nothing to train; wrote classifier_frozen.pt to {args.dir}")


def main():
    args = parse_args()
    start(args)
    data = read_description(args.dir)
    own = {method: settings(method, args) for method in args.method}  # check all before training any
    jobs = {method: load_training_data(method, args) for method in args.method if method != "frozen"}
    arrays = [array for job in jobs.values() for array in job[:-1] if array is not None]
    samples = [np.ascontiguousarray(array[:: len(array) // 1000 + 1]).tobytes() for array in arrays]
    args.inputs = f"{zlib.crc32(b''.join(samples)):08x}"  # tells other data when a run goes on
    if "frozen" in args.method and ranks()[0] == 0:
        save_frozen(own["frozen"], data)
    for method, (images, labels, other, other_labels, whose) in jobs.items():
        x, more = (None if one is None else on_device(one, args.device) for one in (images, other))
        y = torch.from_numpy(np.array(labels)).to(args.device)
        more_y = None if other is None else torch.from_numpy(np.array(other_labels)).to(args.device)
        classes = int(max(y.max(), -1 if method != "sd" else more_y.max())) + 1
        net = train(method, x, y, more, more_y, classes, own[method])
        config = {option: value for option, value in vars(own[method]).items() if option not in ("dir", "given")}
        config |= {"method": method, "classes": classes, "whose_labels": whose, "image_size": images.shape[1]}
        if ranks()[0] == 0:
            hits = predict(lambda x, net=net: net(x)[1]["g_in"], x, args, batch=512).argmax(1) == y
            content = {"model": net.state_dict(), "config": config, "digest": data.get("digest")}
            save(args.dir / f"classifier_{method}.pt", content)
            print(f"{method}: training accuracy {hits.float().mean():.3f}; wrote classifier_{method}.pt to {args.dir}")
        if dist.is_initialized():
            dist.barrier()  # dream may start from the ce that the first process has just written
    for path in args.dir.glob(CHECKPOINT.format("*")) if ranks()[0] == 0 else ():
        path.unlink()
    print_next(args, "evaluate.py" + " --ood-data SET ..." * (not args.data.startswith("digits")))


if __name__ == "__main__":
    main()
