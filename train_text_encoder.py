"""Paper A, step 1: an image encoder aligned with the generator's token embeddings (eq. 2).

The anchors Gamma are what the generator is conditioned on: with Stable Diffusion (--diffusion: hub
id or folder) the rows of the text model's input token-embedding table for the words of the classes;
with the diffusion model of train_scan_diffusion.py its table of class embeddings. The encoder h is
trained so that the cosine of z = h(x) with the anchor of its class is large; the anchors stay
frozen. Sampling around z then yields embeddings that the generator can decode.

reads    train.npy, test.npy (N, H, W, 3) uint8; diffusion/, pseudo_labels.npy,
         test_pseudo_labels.npy (N,) int64, or with Stable Diffusion train.labels.npy,
         test.labels.npy
writes   anchors.npy (C, d) float32; id_embeddings.npy (N, d) float32 and id_labels.npy (N,) int64
         of the training images as they are; text_encoder.pt; with Stable Diffusion class_words.txt

python train_text_encoder.py                 # digits 0-5: accuracy above 0.98, ten seconds
python train_text_encoder.py --dir runs/cifar100 --diffusion CompVis/stable-diffusion-v1-4
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
from diffusers import UNet2DModel
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import v2
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

# option: (value, or one for each of COLUMNS), help[, choices]. cifar100, imagenet100: as released
# (a CIFAR stem at 224 px too; resnet34-imagenet is 15 times cheaper). cifar10: as cifar100, not
# in paper A.
# fmt: off
RECIPES = {
    "seed": (0, "seed of every random number"),
    "diffusion": ("", "Stable Diffusion, hub id or folder; '' for diffusion/ of --dir"),
    "class_words": ("", "Stable Diffusion: file with a line per class, 'word' or 'word: phrase'"),
    "multi_token": ("first", "anchor of a word of several tokens", "first", "mean", "error"),
    "arch": (("small", "resnet34", "resnet34", "resnet34"), "encoder",
        "small", "resnet18", "resnet34", "resnet18-imagenet", "resnet34-imagenet"),
    "t": (0.1, "temperature of the cosine logits"),
    "epochs": ((40, 200, 200, 100), "passes over the training images"),
    "batch_size": ((64, 256, 256, 160), "images per step"),
    "lr": (0.1, "learning rate of SGD, cosine per step to 1e-6"),
    "weight_decay": (5e-4, "weight decay"),
    "crop": ((0, 0, 0, 224), "views: px, 0 for whole images"),
    "area": ((1.0, 1.0, 1.0, 0.08), "views: least share of the image that is seen"),
    "shift": ((1, 4, 4, 0), "views: largest shift, px"),
    "degrees": ((10, 0, 0, 0), "views: largest turn, degrees"),
    "flip": ((0, 1, 1, 1), "views: 1 if a mirrored image keeps its class"),
}
# fmt: on


def token_anchors(tokenizer, text_model, words, multi_token):
    """Gamma (C, d): rows of the input token-embedding table for [(word, phrase)]; prints which.

    Of a word of several tokens multi_token takes the first row (as the released code does), the
    mean of the rows, or stops.
    """
    table = text_model.get_input_embeddings().weight.detach().float()
    Gamma = []
    print("class  word and phrase of the prompt, tokens of the word, rows of the table")
    for c, (word, phrase) in enumerate(words):
        ids = tokenizer(word, add_special_tokens=False).input_ids
        tokens = tokenizer.convert_ids_to_tokens(ids)
        if not ids or tokenizer.unk_token_id in ids:
            sys.exit(
                f"'{word}', class {c}, is not in the vocabulary; give another in --class-words"
            )
        if len(ids) > 1 and multi_token == "error":
            sys.exit(f"'{word}' has several tokens, {tokens}; give another in --class-words")
        if multi_token == "first":
            ids = ids[:1]
        print(f"{c:5}  {word}: {phrase}  {' '.join(tokens)}  {ids}")
        Gamma.append(table[ids].mean(0))
    return torch.stack(Gamma)


def class_anchors(folder):
    """Gamma (C, d): the class embeddings of a diffusion model, but for its last, the null."""
    try:
        unet = UNet2DModel.from_pretrained(folder, subfolder="unet", low_cpu_mem_usage=False)
        return unet.class_embedding.weight[:-1].detach().clone()
    except Exception as error:  # diffusers and safetensors raise of every kind
        sys.exit(f"no diffusion model in {folder} ({error!r:.200}); run train_scan_diffusion.py")


def cosine_logits(z, Gamma, t):
    """Eq. 2: s_c = cos(z, Gamma_c) / t. z (B, d), Gamma (C, d) -> (B, C)."""
    return F.normalize(z) @ F.normalize(Gamma).T / t


def train_encoder(images, labels, Gamma, args):
    """Eq. 2: minimise CE(cos(h(x), Gamma) / t, y) over h. images (N, H, W, 3), labels (N,)."""
    torch.manual_seed(seed_of(args.seed, "encoder"))
    backbone = build_backbone(args.arch)
    h = nn.Sequential(backbone, nn.Linear(backbone.width, Gamma.shape[1]))
    forward = distribute(h, args)
    size = args.batch_size
    steps = args.epochs * max(1, len(images) // size)
    optimizer = torch.optim.SGD(
        h.parameters(), args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay
    )
    schedule = CosineAnnealingLR(optimizer, steps, 1e-6)
    state = {"encoder": h, "optimizer": optimizer, "schedule": schedule}
    for _, index in training_steps("encoder", len(images), size, steps, state, args):
        x = random_view(images[index].to(args.device), args)
        with autocast(args):
            z = forward(x)
        loss = F.cross_entropy(cosine_logits(z.float(), Gamma, args.t), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        state["loss"] = loss.detach()
    return h


def parse_args():
    parser = recipe_parser()
    parser.add_argument("--restart", action="store_true", help="drop unfinished work")
    parser.add_argument("--fp32", action="store_true", help="no bfloat16 on GPUs that have it")
    return parser.parse_args()


def main():
    args = parse_args()
    start(args)
    if args.diffusion:
        Gamma = stable_diffusion_anchors(args)
        names = {"train": "train.labels", "test": "test.labels"}
    else:
        Gamma = class_anchors(args.dir / "diffusion")
        names = {"train": "pseudo_labels", "test": "test_pseudo_labels"}
    images = {}
    labels = {}
    for split, name in names.items():
        writer = "train_scan_diffusion.py"
        path = args.dir / f"{split}.npy"
        images[split] = torch.from_numpy(load_array(path, (None, None, None, 3), np.uint8, writer))
        labels[split] = load_labels(args.dir / f"{name}.npy", images[split], len(Gamma), args)
    args.inputs = fingerprint(images["train"], labels["train"].cpu(), Gamma)
    Gamma = Gamma.to(args.device)
    h = train_encoder(images["train"], labels["train"], Gamma, args)
    for split in ("test", "train"):
        z = predict(h, images[split], args)
        hits = cosine_logits(z, Gamma, args.t).argmax(1) == labels[split]
        print(f"accuracy by nearest anchor, {split}: {hits.float().mean():.3f} (n = {len(z)})")
    if args.rank == 0:
        content = {"encoder": h.state_dict(), "config": plain_options(args)}
        save(args.dir / "text_encoder.pt", content)
        save(args.dir / "anchors.npy", Gamma.cpu().numpy())
        save(args.dir / "id_embeddings.npy", z.cpu().numpy())
        save(args.dir / "id_labels.npy", labels["train"].cpu().numpy())
    drop_checkpoints(["encoder"], args)
    print(f"wrote anchors {tuple(Gamma.shape)}, id_embeddings {tuple(z.shape)} to {args.dir}")
    print(f"next: python sample_outliers.py --dir {args.dir}, with the same --diffusion if any")


# ---- plumbing: not the paper's method; same name, same text in every script ----

COLUMNS = ("digits", "cifar10", "cifar100", "imagenet100")  # of RECIPES
CHECKPOINT_SECONDS = 60
# Words of the released class lists where they differ from the data set's names: "class: word", or
# "class: word: phrase" if the prompt says more than the word whose token is the anchor. All
# classes of ImageNet-100. One change: the released prompts say chimpanzee, in which the anchored
# token chimp does not occur, so that no outlier of that class is one.
CLASS_WORDS = """
apple: apples; aquarium_fish: fish: aquarium fish; bottle: bottles; bowl: bowls; can: cans;
chimpanzee: chimp; cup: cups; keyboard: keyboard: computer keyboard; lawn_mower: mower: lawn-mower;
maple_tree: maple; mushroom: mushrooms; oak_tree: oak; orange: oranges; orchid: orchids;
palm_tree: palm; pear: pears; pickup_truck: truck: pickup truck; pine_tree: pine; plate: plates;
poppy: poppies; rose: roses; sunflower: sunflowers; sweet_pepper: peppers: sweet peppers;
tulip: tulips; willow_tree: willow; n01498041: stingray: stingray in the water; n01514859: hen;
n01582220: magpie; n01608432: kite: kite bird; n01616318: vulture; n01687978: agama;
n01776313: tick: tick bite; n01806567: quail: quail bird; n01833805: hummingbird; n01882714: koala;
n01910747: jellyfish; n01944390: snail; n01985128: crawfish; n02007558: flamingo; n02071294: orca;
n02085620: chihuahua; n02114855: coyote; n02123045: tabby; n02128385: leopard; n02129165: lion;
n02129604: tiger; n02165456: ladybug; n02190166: fly; n02219486: ant; n02226429: grasshopper;
n02279972: monarch; n02317335: starfish; n02326432: hare; n02342885: hamster; n02363005: beaver;
n02391049: zebra; n02395406: pig; n02403003: ox: ox animal; n02422699: impala: impala animal;
n02442845: mink; n02444819: otter; n02480855: gorilla; n02510455: panda; n02640242: sturgeon;
n02672831: accordion; n02687172: carrier; n02701002: ambulance; n02730930: apron;
n02769748: backpack; n02782093: balloon; n02787622: banjo; n02793495: barn; n02799071: baseball;
n02802426: basketball; n02814860: beacon; n02840245: binder; n02906734: broom; n02948072: candle;
n02980441: castle; n02999410: chain; n03014705: chest: chest box; n03028079: church;
n03032252: cinema; n03125729: cradle; n03160309: dam; n03179701: desk; n03220513: dome;
n03249569: drum; n03291819: envelope; n03384352: forklift; n03388043: fountain; n03450230: gown;
n03481172: hammer; n03594734: jean; n03594945: jeep; n03627232: knot; n03642806: laptop;
n03649909: mower; n03661043: library; n03676483: lipstick; n03724870: mask; n03733281: maze;
n03759954: microphone; n03761084: microwave; n03773504: missile; n03804744: nail: wire nail;
n03916031: perfume; n03938244: pillow; n04004767: printer; n04026417: purse; n04090263: rifle;
n04133789: sandal; n04153751: screw; n04296562: stage; n04330267: stove; n04371774: swing;
n04404412: television; n04465501: tractor; n04485082: tripod; n04507155: umbrella;
n04536866: violin; n04579432: whistle; n04606251: wreck; n07714990: broccoli; n07745940: strawberry
"""


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


def load_labels(path, images, classes, args):
    """Labels (N,) of images (N, ...), below `classes`, on the device."""
    labels = load_array(path, (len(images),), np.int64, "train_scan_diffusion.py")
    if labels.max() >= classes:
        sys.exit(f"{path} has labels above the {classes} classes of the anchors; mend it")
    return torch.from_numpy(labels).to(args.device)


def stable_diffusion_anchors(args):
    """Gamma of Stable Diffusion for the class words, which go to class_words.txt."""
    names = read_description(args.dir).get("classes") or []
    words = default_words(names)
    if args.class_words:
        words = read_class_words(Path(args.class_words))
    if not words or len(words) < len(names):
        sys.exit(
            f"{len(words)} class words for {len(names)} classes; give --class-words a line for each"
        )
    Gamma = token_anchors(*load_text_model(args.diffusion), words, args.multi_token)
    if args.rank == 0:
        save(args.dir / "class_words.txt", "".join(f"{word}: {phrase}\n" for word, phrase in words))
    return Gamma


def load_text_model(checkpoint):
    """Tokenizer and text model (CLIP) of a Stable Diffusion checkpoint."""
    try:
        tokenizer = CLIPTokenizer.from_pretrained(checkpoint, subfolder="tokenizer")
        text_model, info = CLIPTextModel.from_pretrained(
            checkpoint, subfolder="text_encoder", output_loading_info=True
        )
    except Exception as error:  # the hub, transformers and safetensors raise of every kind
        sys.exit(f"no Stable Diffusion in {checkpoint} ({error!r:.200}); give --diffusion another")
    if info["missing_keys"]:  # transformers would go on with random weights
        sys.exit(
            f"{checkpoint} lacks weights of text_encoder; was it saved by another transformers?"
        )
    return tokenizer, text_model


def read_class_words(path):
    """Lines "word" or "word: phrase" -> [(word whose token is the anchor, phrase of the
    prompt)].
    """
    if not path.exists():
        sys.exit(f"{path} is missing; run train_text_encoder.py with --diffusion")
    words = []
    for line in path.read_text().splitlines():
        word, _, phrase = line.partition(": ")
        words.append((word, phrase or word))
    return words


def default_words(names):
    """Released words where a class has that name, else the name: [(word, phrase of the prompt)]."""
    known = dict(item.strip().split(": ", 1) for item in CLASS_WORDS.split(";"))
    words = []
    for name in names:
        word, _, phrase = known.get(name, name.replace("_", " ")).partition(": ")
        words.append((word, phrase or word))
    return words


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
#     "tqdm>=4.66.5",
# ]
# ///
