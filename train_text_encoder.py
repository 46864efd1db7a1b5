"""Paper A, step 1: an image encoder aligned with the generator's token embeddings (DREAM-OOD, eq. 2).

The anchors Gamma are what the generator is conditioned on: with Stable Diffusion (--diffusion: hub id or folder) the
rows of the text model's input token-embedding table for the words of the classes; with the diffusion model in --dir,
which learns a table of class embeddings, the rows of that. The encoder h is trained so that the cosine of z = h(x)
with the anchor of its class is large; the anchors stay frozen. Sampling around z then yields embeddings that the
generator can decode.

reads    the ID data set (--data), or train.npy, test.npy and labels that are in --dir already; tokenizer/ and
         text_encoder/ of Stable Diffusion; without it diffusion/, pseudo_labels.npy, test_pseudo_labels.npy
writes   anchors.npy (C, d) float32, id_embeddings.npy (N, d) float32 of all training images without augmentation,
         id_labels.npy (N,) int64, text_encoder.pt; with Stable Diffusion class_words.txt, a line per class

python train_text_encoder.py                            # digits 0-5: accuracy about 0.99, seconds on two cores
python train_text_encoder.py --data data/cifar100 --dir runs/cifar100 --diffusion CompVis/stable-diffusion-v1-4
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
from transformers import CLIPTextModel, CLIPTokenizer

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

# Words of the released class lists where they differ from the data set's names: "class: word", or "class: word: phrase"
# if the prompt says more than the word whose token is the anchor. All classes of ImageNet-100. One change: the released
# prompts say chimpanzee, in which the anchored token chimp does not occur, so that no outlier of that class is one.
CLASS_WORDS = """
apple: apples; aquarium_fish: fish: aquarium fish; bottle: bottles; bowl: bowls; can: cans; chimpanzee: chimp;
cup: cups; keyboard: keyboard: computer keyboard; lawn_mower: mower: lawn-mower; maple_tree: maple; mushroom: mushrooms;
oak_tree: oak; orange: oranges; orchid: orchids; palm_tree: palm; pear: pears; pickup_truck: truck: pickup truck;
pine_tree: pine; plate: plates; poppy: poppies; rose: roses; sunflower: sunflowers;
sweet_pepper: peppers: sweet peppers; tulip: tulips; willow_tree: willow;
n01498041: stingray: stingray in the water; n01514859: hen; n01582220: magpie; n01608432: kite: kite bird;
n01616318: vulture; n01687978: agama; n01776313: tick: tick bite; n01806567: quail: quail bird; n01833805: hummingbird;
n01882714: koala; n01910747: jellyfish; n01944390: snail; n01985128: crawfish; n02007558: flamingo; n02071294: orca;
n02085620: chihuahua; n02114855: coyote; n02123045: tabby; n02128385: leopard; n02129165: lion; n02129604: tiger;
n02165456: ladybug; n02190166: fly; n02219486: ant; n02226429: grasshopper; n02279972: monarch; n02317335: starfish;
n02326432: hare; n02342885: hamster; n02363005: beaver; n02391049: zebra; n02395406: pig; n02403003: ox: ox animal;
n02422699: impala: impala animal; n02442845: mink; n02444819: otter; n02480855: gorilla; n02510455: panda;
n02640242: sturgeon; n02672831: accordion; n02687172: carrier; n02701002: ambulance; n02730930: apron;
n02769748: backpack; n02782093: balloon; n02787622: banjo; n02793495: barn; n02799071: baseball; n02802426: basketball;
n02814860: beacon; n02840245: binder; n02906734: broom; n02948072: candle; n02980441: castle; n02999410: chain;
n03014705: chest: chest box; n03028079: church; n03032252: cinema; n03125729: cradle; n03160309: dam; n03179701: desk;
n03220513: dome; n03249569: drum; n03291819: envelope; n03384352: forklift; n03388043: fountain; n03450230: gown;
n03481172: hammer; n03594734: jean; n03594945: jeep; n03627232: knot; n03642806: laptop; n03649909: mower;
n03661043: library; n03676483: lipstick; n03724870: mask; n03733281: maze; n03759954: microphone; n03761084: microwave;
n03773504: missile; n03804744: nail: wire nail; n03916031: perfume; n03938244: pillow; n04004767: printer;
n04026417: purse; n04090263: rifle; n04133789: sandal; n04153751: screw; n04296562: stage; n04330267: stove;
n04371774: swing; n04404412: television; n04465501: tractor; n04485082: tripod; n04507155: umbrella; n04536866: violin;
n04579432: whistle; n04606251: wreck; n07714990: broccoli; n07745940: strawberry
"""


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


def is_stable_diffusion(checkpoint):
    """Whether --diffusion names a text-to-image checkpoint (folder or hub id), not a class-conditional model."""
    hub_id = not Path(checkpoint).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint)
    return (Path(checkpoint) / "text_encoder").is_dir() or bool(hub_id)


def load_text_model(checkpoint):
    """Tokenizer and text model (CLIP) of a Stable Diffusion checkpoint, float32 on the CPU."""
    try:
        tokenizer = CLIPTokenizer.from_pretrained(checkpoint, subfolder="tokenizer")
        part = {"subfolder": "text_encoder", "output_loading_info": True}
        text_model, found = CLIPTextModel.from_pretrained(checkpoint, **part)
        if found["missing_keys"]:  # transformers would go on with random weights
            raise ValueError(f"text_encoder lacks {sorted(found['missing_keys'])[0]}: saved by another transformers?")
    except Exception as error:  # the hub, transformers and safetensors know many
        fail(f"no Stable Diffusion in {checkpoint} ({str(error).splitlines()[0]}); give --diffusion a hub id or folder")
    return tokenizer, text_model.eval()


def read_class_words(path):
    """Lines "word" or "word: phrase" -> [(word whose token is the anchor, phrase of the prompt)], class by class."""
    lines = path.read_text().strip().splitlines() if path.exists() else []
    parts = [[part.strip() for part in line.split(":")] for line in lines]
    if not parts or any(not all(line) or len(line) > 2 for line in parts):
        fail(f"{path} must hold a line per class, 'word' or 'word: phrase'; mend it, or run train_text_encoder.py")
    return [(line[0], line[-1]) for line in parts]


def default_words(names):
    """The released words of CLASS_WORDS where a class of that name has one, else the name: [(word, phrase)]."""
    known = dict(item.strip().split(": ", 1) for item in CLASS_WORDS.split(";"))
    parts = [known.get(name, name.replace("_", " ")).split(": ") for name in names]
    return [(part[0], part[-1]) for part in parts]


def token_anchors(tokenizer, text_model, words, multi_token):
    """Gamma (C, d): rows of the input token-embedding table for [(word, phrase)]; prints which.

    Of a word of several tokens multi_token takes the first row (as the released code does), the mean, or stops.
    """
    table, Gamma = text_model.get_input_embeddings().weight.detach(), []
    several, unknown = [], tokenizer.unk_token_id
    print(f"{'class':>5}  {'prompt says':24}{'tokens of the anchored word':32}row of the table")
    for c, (word, phrase) in enumerate(words):
        ids = tokenizer(word, add_special_tokens=False).input_ids
        if not ids or unknown in ids:
            fail(
                f"'{word}', the word of class {c}, is not in the tokenizer's vocabulary; give another in --class-words"
            )
        tokens = tokenizer.convert_ids_to_tokens(ids)
        several += [f"{word} ({' '.join(tokens)})"] * (len(ids) > 1)
        row = f"mean of {ids}" if multi_token == "mean" and len(ids) > 1 else ids[0]
        print(f"{c:5}  {phrase:24}{' '.join(tokens):32}{row}" + " (first)" * (row == ids[0] and len(ids) > 1))
        Gamma.append(table[ids].mean(0) if multi_token == "mean" else table[ids[0]])
    if several and multi_token == "error":
        fail(f"{len(several)} words have several tokens: {', '.join(several[:5])}; give others in --class-words", 2)
    return torch.stack(Gamma)


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
    parser.add_argument("--diffusion", help="Stable Diffusion, hub id or folder (default: diffusion/ of --dir)")
    text = "Stable Diffusion: anchor of a class word of several tokens (default: %(default)s, as released)"
    parser.add_argument("--multi-token", choices=("first", "mean", "error"), default="first", help=text)
    text = "Stable Diffusion: a line per class, 'word' or 'word: phrase of the prompt' (default: the released words)"
    parser.add_argument("--class-words", type=Path, help=text)
    parser.add_argument("--device", help="torch device (default: cuda, mps or cpu)")
    args = parse_recipe(parser)
    args.diffusion = args.diffusion or str(args.dir / "diffusion")
    if args.zoom < 1:
        fail(f"--zoom is {args.zoom}; it must be at least 1", 2)
    return args


def load_labels(args, data, classes):
    """Pseudo-labels by split, which are the classes that the model in --diffusion knows."""
    labels = {}
    for split, name in {"train": "pseudo_labels", "test": "test_pseudo_labels"}.items():
        labels[split] = load_array(args.dir / f"{name}.npy", (data[split],), np.int64, "train_scan_diffusion.py")
        if labels[split].max() >= classes:
            fail(f"{name}.npy has more than the {classes} classes of {args.diffusion}; run train_scan_diffusion.py")
    return labels


def main():
    args = parse_args()
    torch.manual_seed(args.seed)
    if is_stable_diffusion(args.diffusion):
        text = load_text_model(args.diffusion)
        data, images, labels = prepare_data(args)
        if not data["classes"]:
            fail(
                f"{args.data} has no class labels, which Stable Diffusion is prompted with; use train_scan_diffusion.py"
            )
        words = read_class_words(args.class_words) if args.class_words else default_words(data["classes"])
        if len(words) != len(data["classes"]):
            fail(f"{args.class_words} has {len(words)} lines, {args.data} {len(data['classes'])} classes; mend it", 2)
        Gamma = token_anchors(*text, words, args.multi_token).to(args.device)
        save(args.dir / "class_words.txt", "".join(f"{word}: {phrase}\n" for word, phrase in words))
    else:
        Gamma = load_anchors(Path(args.diffusion)).to(args.device)
        data, images, _ = prepare_data(args)
        labels = load_labels(args, data, len(Gamma))

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
    more = f" --diffusion {args.diffusion}" if is_stable_diffusion(args.diffusion) else ""
    print(f"next: python sample_outliers.py --dir {args.dir}{more}")


if __name__ == "__main__":
    main()
