"""Paper A, step 1: an image encoder aligned with the generator's token embeddings (DREAM-OOD, eq. 2).

The anchors Gamma are what the generator is conditioned on: here the rows of the class-embedding table of the diffusion
model in --dir, a stand-in for Stable Diffusion's token table. The encoder h is trained so that the cosine of z = h(x)
with the anchor of its class is large; the anchors stay frozen. Sampling around z then yields embeddings that the
generator can decode.

reads    --dir: diffusion/, pseudo_labels.npy, test_pseudo_labels.npy (the classes that the generator knows) and
         train.npy, test.npy, or the ID data set (--data) where these are missing
writes   anchors.npy (C, d) float32, id_embeddings.npy (N, d) float32 of all training images without augmentation,
         id_labels.npy (N,) int64, text_encoder.pt

python train_text_encoder.py                            # digits 0-5: accuracy about 0.99, seconds on two cores
python train_text_encoder.py --dir runs/cifar10 --recipe cifar10
"""

import argparse
import hashlib
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
from diffusers import UNet2DModel
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torch import nn
from torchvision.transforms import v2
from tqdm import tqdm

RECIPES = {  # option: help, value per recipe. cifar100: as released; cifar10: the same
    "recipe": ("column of the table RECIPES", "digits", "cifar10", "cifar100"),
    "seed": ("seed of every random number, 0 for the first run", 0, 0, 0),
    "image_size": ("stored height and width of images, px", 8, 32, 32),
    "arch": ("encoder, small|resnet18|resnet34", "small", "resnet34", "resnet34"),
    "t": ("temperature of the cosine logits", 0.1, 0.1, 0.1),
    "epochs": ("passes over the training images", 40, 200, 200),
    "batch_size": ("images per step", 64, 256, 256),
    "lr": ("learning rate of SGD, cosine per step to 1e-6", 0.1, 0.1, 0.1),
    "weight_decay": ("weight decay, 0 for none", 5e-4, 5e-4, 5e-4),
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


def load_anchors(folder):
    """Gamma (C, d) float32: the class-embedding table of a diffusion model, without the null class (its last row)."""
    if not (folder / "unet" / "config.json").exists():
        fail(f"{folder} holds no diffusion model; run train_scan_diffusion.py, or give --diffusion")
    try:
        unet = UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False)
    except Exception as error:  # diffusers and safetensors know many
        fail(f"{folder} does not load ({str(error).splitlines()[0]}); run train_scan_diffusion.py again")
    if not unet.config.num_class_embeds:
        fail(f"the diffusion model in {folder} knows no classes; train it with train_scan_diffusion.py")
    return unet.class_embedding.weight[:-1].detach().clone()


def cosine_logits(z, Gamma, t):
    """Eq. 2: s_c = cos(z, Gamma_c) / t. z (B, d), Gamma (C, d) -> (B, C)."""
    return F.normalize(z) @ F.normalize(Gamma).T / t


def train_encoder(images, labels, Gamma, args):
    """Minimise CE(cos(h(x), Gamma) / t, y) over h. images (N, 3, H, W) uint8, labels (N,) on their device."""
    backbone, width = build_backbone(args.arch)
    h = nn.Sequential(backbone, nn.Linear(width, Gamma.shape[1])).to(images.device)
    optimizer = torch.optim.SGD(h.parameters(), args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay)
    batch = min(args.batch_size, len(images))
    steps = args.epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 1e-6)
    for _ in (progress := tqdm(range(args.epochs), desc="text-conditioned encoder")):
        for index in torch.randperm(len(images), device=images.device).split(batch)[: len(images) // batch]:
            loss = F.cross_entropy(cosine_logits(h(augment(images[index], args)), Gamma, args.t), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    return h.eval()


@torch.no_grad()
def embed(h, images):
    """z = h(x) for images (N, 3, H, W) uint8 as they are: (N, d) float32, not normalised."""
    return torch.cat([h(part.float() / 127.5 - 1) for part in images.split(1024)])


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/digits"), help="shared directory (default: %(default)s)")
    parser.add_argument(
        "--data", help="digits[:0-5], a folder of images or arrays, or a .npy file (default: digits:0-5)"
    )
    parser.add_argument("--diffusion", type=Path, help="folder of the generator (default: diffusion/ of --dir)")
    parser.add_argument("--device", help="torch device (default: cuda, mps or cpu)")
    args = parse_recipe(parser)
    args.diffusion = args.diffusion or args.dir / "diffusion"
    if args.zoom < 1:
        fail(f"--zoom is {args.zoom}; it must be at least 1", 2)
    return args


def main():
    args = parse_args()
    torch.manual_seed(args.seed)
    Gamma = load_anchors(args.diffusion).to(args.device)
    data, images, _ = prepare_data(args)
    names, labels = {"train": "pseudo_labels", "test": "test_pseudo_labels"}, {}
    for split, name in names.items():
        labels[split] = load_array(args.dir / f"{name}.npy", (data[split],), np.int64, "train_scan_diffusion.py")
        if labels[split].max() >= len(Gamma):
            fail(f"{name}.npy has more than the {len(Gamma)} classes of {args.diffusion}; run train_scan_diffusion.py")

    y = {split: torch.from_numpy(np.array(labels[split])).to(args.device) for split in labels}
    h = train_encoder(images["train"], y["train"], Gamma, args)
    z = {split: embed(h, images[split]) for split in images}
    for split in z:
        accuracy = (cosine_logits(z[split], Gamma, args.t).argmax(1) == y[split]).float().mean().item()
        print(f"accuracy by nearest anchor, {split}: {accuracy:.3f} (n = {len(z[split])})")
    if not z["train"].isfinite().all():
        fail("training diverged: embeddings are not finite; lower --lr")
    config = {option: value for option, value in vars(args).items() if not isinstance(value, Path)}
    config |= {"d": Gamma.shape[1], "classes": data["classes"]}
    save(args.dir / "text_encoder.pt", {"encoder": h.state_dict(), "config": config, "digest": data["digest"]})
    save(args.dir / "anchors.npy", Gamma.cpu().numpy())
    save(args.dir / "id_embeddings.npy", z["train"].cpu().numpy())
    save(args.dir / "id_labels.npy", np.array(labels["train"]))
    print(f"wrote anchors {tuple(Gamma.shape)} and id_embeddings {tuple(z['train'].shape)} to {args.dir}")
    print(f"next: python sample_outliers.py --dir {args.dir}")


if __name__ == "__main__":
    main()
