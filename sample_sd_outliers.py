"""Paper B, step 3: semantic-discrepant outliers. Half-noise an image, denoise it as a wrong class.

For an image x with pseudo-label y~: draw c_r from the other classes, noise x to
x_S = sqrt(abar_S) x + sqrt(1 - abar_S) eps, and denoise from S to 0 with
eps_t = (1 + w) eps_theta(x_t, c_r) - w eps_theta(x_t). The outlier keeps the look of x and the
label y~, but not its meaning. One outlier per image.

With Stable Diffusion (--diffusion: hub id or folder) x is the latent of the image, y~ the data
set's label, and the condition the prompt of the wrong class: an extension, the paper's model is
class-conditional and in pixel space. Killed at any time, the same command goes on and ends with the
same bytes; under torchrun the processes share the work.

reads    train.npy (N, H, W, 3) uint8, pseudo_labels.npy (N,) int64, diffusion/; with Stable
         Diffusion train.labels.npy and class_words.txt; --split test: test.npy, its labels
writes   sd_outliers.npy (N, H, W, 3) uint8, sd_outliers.csv (index, source, y, c_r, seed),
         sd_outliers.json (options), sd_outliers.png (sources, and right of each its outlier);
         sd_reconstructions with --reconstruct (c_r := y~); names end in _test with --split test

python sample_sd_outliers.py                            # digits 0-5: 869 outliers in seconds
python sample_sd_outliers.py --split test               # an OOD test set made of test images
python sample_sd_outliers.py --split test --reconstruct # does a detector see meaning, or artefacts?
"""

import argparse
import json
import math
import os
import shutil
import sys
import zlib
from datetime import timedelta
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from matplotlib.figure import Figure
from tqdm import tqdm

# option: (value, or one for each of COLUMNS), help[, choices]. cifar10: S and w as published.
# fmt: off
RECIPES = {
    "seed": (0, "seed of every random number"),
    "diffusion": ("", "Stable Diffusion, hub id or folder; '' for diffusion/ of --dir"),
    "prompt": ("A high-quality image of the {class}", "Stable Diffusion: prompt"),
    "S": ((150, 100, 100, 100), "start step of T = 1000; what counts is the noise, printed"),
    "w": (2.0, "guidance weight; diffusers' scale is 1 + w"),
    "sampler": ("dpmpp", "DPM-Solver++ 2M, or ancestral in every step", "dpmpp", "ddpm"),
    "steps": (20, "dpmpp: steps from S to 0, at most"),
    "resize": ("area", "Stable Diffusion: filter down", "area", "bilinear", "nearest"),
    "batch_size": ((256, 256, 32, 32), "images denoised at a time, at most 256"),
}
# fmt: on


def wrong_class(y, classes, seed, i):
    """c_r ~ Uniform({0 .. C-1} without y) for image number i with label y."""
    step = np.random.default_rng((seed, i)).integers(1, classes)
    return int((y + step) % classes)


def guided_noise(unet, x_t, t, c, null, w):
    """Paper B: eps_t = (1 + w) eps_theta(x_t, c) - w eps_theta(x_t); diffusers' scale is 1 + w.

    x_t (B, C, H, W): pixels or latents; c, null (B, ...): conditions, and the one that stands for
    none.
    """
    eps_c, eps = unet(torch.cat([x_t, x_t]), t, torch.cat([c, null])).sample.float().chunk(2)
    return (1 + w) * eps_c - w * eps


@torch.no_grad()
def half_noise_and_denoise(unet, schedule, x, c, null, seeds, args):
    """x_S = sqrt(abar_S) x + sqrt(1 - abar_S) eps, then denoised from S to 0 under c (B, ...).

    x (B, C, H, W): pixels in [-1, 1] or latents; null: the condition that stands for none.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    eps = randn_tensor(x.shape, generators, x.device)
    abar_S = schedule.alphas_cumprod[args.S].item()
    x_t = math.sqrt(abar_S) * x + math.sqrt(1 - abar_S) * eps
    solver = partial_solver(schedule, args)
    for t in solver.timesteps:
        with autocast(args):
            eps_t = guided_noise(unet, x_t, t, c, null, args.w)
        x_t = solver.step(eps_t, t, x_t, generator=generators).prev_sample
    return x_t


def class_sampler(args):
    """sample(x, c_r, seeds) on images in [-1, 1] by our own generator; its schedule; C."""
    unet, schedule = load_diffusion(args.dir / "diffusion", args.device)
    null = unet.config.num_class_embeds - 1

    def sample(x, c_r, seeds):
        c = torch.tensor(c_r, device=args.device)
        x = x[:, : unet.config.in_channels]
        return half_noise_and_denoise(unet, schedule, x, c, torch.full_like(c, null), seeds, args)

    return sample, schedule, null


def text_sampler(args):
    """The same by Stable Diffusion: latents for images, prompts of the classes for c_r."""
    pipe = load_stable_diffusion(args.diffusion, args.device)
    schedule = diffusers.DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    words = read_class_words(args.dir / "class_words.txt")
    prompts = [args.prompt.replace("{class}", phrase) for _, phrase in words]
    scale = pipe.vae.config.scaling_factor
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor

    @torch.no_grad()
    def sample(x, c_r, seeds):
        size = x.shape[2:]
        x = F.interpolate(x, (side, side), mode="bicubic").clamp(-1, 1)
        c = pipe.text_encoder(tokenize(pipe, [prompts[c] for c in c_r])).last_hidden_state
        null = pipe.text_encoder(tokenize(pipe, [""])).last_hidden_state.expand_as(c)
        with autocast(args):
            z = pipe.vae.encode(x).latent_dist.mode().float() * scale
        z = half_noise_and_denoise(pipe.unet, schedule, z, c, null, seeds, args)
        with autocast(args):
            x = pipe.vae.decode(z / scale).sample.float()
        return F.interpolate(x, size, mode=args.resize)

    return sample, schedule, len(prompts)


def parse_args():
    parser = recipe_parser()
    text = "images to start from; test makes an OOD test set"
    parser.add_argument("--split", choices=("train", "test"), default="train", help=text)
    text = "denoise under c_r := y: copies that keep their label"
    parser.add_argument("--reconstruct", action="store_true", help=text)
    parser.add_argument("--restart", action="store_true", help="make these images anew")
    parser.add_argument("--fp32", action="store_true", help="no bfloat16 on GPUs that have it")
    args = parser.parse_args()
    if not args.steps <= args.S < 1000:
        parser.error("--S is at least --steps and below 1000")
    return args


def main():
    args = parse_args()
    start(args)
    if args.diffusion:
        sample, schedule, classes = text_sampler(args)
        words = (args.dir / "class_words.txt").read_bytes()
        args.inputs = [zlib.crc32(words)]
    else:
        sample, schedule, classes = class_sampler(args)
        weights = args.dir / "diffusion" / "unet" / "diffusion_pytorch_model.safetensors"
        args.inputs = fingerprint(np.memmap(weights, np.uint8, "r"))
    abar_S = schedule.alphas_cumprod[args.S].item()
    print(f"S = {args.S}: abar_S = {abar_S:.4f}, std of the noise {math.sqrt(1 - abar_S):.3f}")
    images, y = load_sources(classes, args)
    seeds = [seed_of(args.seed, i) for i in range(len(y))]
    c_r = y.tolist()
    if not args.reconstruct:
        c_r = [wrong_class(label, classes, args.seed, i) for i, label in enumerate(c_r)]
    name = "sd_reconstructions" if args.reconstruct else "sd_outliers"
    if args.split == "test":
        name += "_test"
    args.inputs += fingerprint(images, y)

    def make(rows):
        x = to_float(torch.from_numpy(images[rows]).to(args.device))
        x = sample(x, [c_r[i] for i in rows], [seeds[i] for i in rows])
        return match_levels(images, to_uint8(x))

    run_job(name, images.shape, make, args)
    if args.rank == 0:
        table = "".join(f"{i},{i},{y[i]},{c_r[i]},{seeds[i]}\n" for i in range(len(y)))
        save(args.dir / f"{name}.csv", f"index,source,y,c_r,seed\n{table}")
        outliers = np.load(args.dir / f"{name}.npy", mmap_mode="r")
        captions = [f"{a}→{b}" for a, b in zip(y, c_r, strict=True)]
        sheet = pair_sheet(outliers, images, np.arange(len(y)), y, captions)
        save(args.dir / f"{name}.png", sheet)
    print(f"wrote {name}.npy, .csv, .json and the contact sheet {name}.png to {args.dir}")
    print(f"next: python train_classifier.py --dir {args.dir}")


# ---- plumbing: not the paper's method; same name, same text in every script ----

COLUMNS = ("digits", "cifar10", "cifar100", "imagenet100")  # of RECIPES
BLOCK = 256  # images in a file of an unfinished job


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


def autocast(args):
    """bfloat16 on GPUs that have it (Ampere and later), float32 elsewhere or with --fp32."""
    native = args.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(args.device, torch.bfloat16, enabled=native and not args.fp32)


def to_float(images):
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x):
    """(B, 1 or 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8 NumPy; grey is repeated."""
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    return x.expand(*x.shape[:3], 3).cpu().numpy()


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


def load_diffusion(folder, device):
    """UNet of train_scan_diffusion.py, in evaluation mode, and its noise schedule."""
    try:
        unet = diffusers.UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False)
        schedule = diffusers.DDPMScheduler.from_pretrained(folder / "scheduler")
    except Exception as error:  # diffusers and safetensors raise of every kind
        sys.exit(f"no diffusion model in {folder} ({error!r:.200}); run train_scan_diffusion.py")
    return unet.eval().to(device), schedule


def load_stable_diffusion(checkpoint, device):
    """StableDiffusionPipeline of a hub id or folder, without the safety checker."""
    try:
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            checkpoint, safety_checker=None, requires_safety_checker=False
        )
    except Exception as error:  # the hub, diffusers and transformers raise of every kind
        sys.exit(f"no Stable Diffusion in {checkpoint} ({error!r:.200}); give another --diffusion")
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.enable_slicing()  # one image at a time takes memory enough
    return pipe.to(device, torch.float32)


def tokenize(pipe, prompts):
    """Token numbers (B, 77) on the device of the pipeline."""
    tokens = pipe.tokenizer(
        prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    return tokens.input_ids.to(pipe.device)


def quadratic_steps(start, count):
    """At most `count` timesteps from start to 0, denser near 0, where the last of the noise goes.

    20 of DPM-Solver++ follow the exact flow of narrow data (std 0.15) to 3 percent, evenly spaced
    to 22.
    """
    steps = start * torch.linspace(1, 0, count) ** 2
    return steps.round().int().unique().flip(0).tolist()


def partial_solver(schedule, args):
    """The solver of --sampler, set to the steps from S to 0; x_0 of pixels stays in [-1, 1]."""
    pixels = not args.diffusion
    if args.sampler == "ddpm":
        solver = diffusers.DDPMScheduler.from_config(schedule.config, clip_sample=pixels)
        solver.set_timesteps(timesteps=list(range(args.S, -1, -1)))
        return solver
    clip = {"thresholding": pixels, "sample_max_value": 1.0}
    solver = diffusers.DPMSolverMultistepScheduler.from_config(schedule.config, **clip)
    solver.set_timesteps(timesteps=quadratic_steps(args.S, args.steps))
    return solver


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


def load_sources(classes, args):
    """Images (N, H, W, 3) of --split and their labels y (N,), which the generator knows."""
    writer = "train_scan_diffusion.py"
    names = {"train": "pseudo_labels", "test": "test_pseudo_labels"}
    if args.diffusion:
        names = {"train": "train.labels", "test": "test.labels"}
    images = load_array(args.dir / f"{args.split}.npy", (None, None, None, 3), np.uint8, writer)
    y = load_array(args.dir / f"{names[args.split]}.npy", (len(images),), np.int64, writer)
    if y.max() >= classes or classes < 2:
        sys.exit(f"labels up to {y.max()} for a generator of {classes} classes; run {writer} again")
    return images, y


def run_job(name, shape, make, args):
    """<name>.npy of all make(rows), by blocks in a folder of these options, dealt out to the
    processes.
    """
    options = json.dumps(plain_options(args) | {"batch_size": None}, indent=1)
    job = args.dir / f".job.{name}.{seed_of(options)}"
    complete = args.dir / f"{name}.json"
    finished = args.dir / f"{name}.npy"
    same = finished.exists() and complete.exists() and complete.read_text() == options
    if same and not args.restart:
        print(f"{finished} is complete for these options; --restart makes it again")
        return
    if args.restart and args.rank == 0:
        shutil.rmtree(job, ignore_errors=True)
    barrier()
    job.mkdir(exist_ok=True)
    blocks = torch.arange(shape[0]).split(BLOCK)
    paths = [job / f"{rows[0]}.npy" for rows in blocks]
    for i in tqdm(range(args.rank, len(blocks), args.world), name, disable=args.rank > 0):
        if not paths[i].exists():
            save(
                paths[i],
                np.concatenate([make(rows.tolist()) for rows in blocks[i].split(args.batch_size)]),
            )
    barrier()
    if args.rank == 0:
        write_images(job / "images", shape, map(np.load, paths))
        complete.unlink(missing_ok=True)
        os.replace(job / "images", finished)
        save(complete, options)
        for path in args.dir.glob(f".job.{name}.*"):
            shutil.rmtree(path)


def write_images(path, shape, blocks):
    """Stream blocks (B, H, W, 3) of uint8 into an .npy file of that shape."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": shape}
        )
        for block in blocks:
            file.write(block.tobytes())


def pair_sheet(images, sources, rows, labels, captions):
    """Figure with a line for each of at most ten classes: six times a source, then its image.

    images (M, H, W, 3) uint8, with labels (M,) and captions; rows (M,): their places in sources.
    """
    classes = np.unique(labels)[:10]
    figure = Figure((12, 1.2 * len(classes)), layout="constrained")
    axes = figure.subplots(len(classes), 12, squeeze=False)
    for line, c in zip(axes, classes, strict=True):
        shown = np.flatnonzero(labels == c)[:12:2]
        for left, right, i in zip(line[::2], line[1::2], shown, strict=False):
            left.imshow(sources[rows[i]])
            right.imshow(images[i])
            right.set_title(captions[i])
    for axis in axes.flat:
        axis.axis("off")
    return figure


if __name__ == "__main__":
    main()

# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6.0",
#     "diffusers>=0.33.1",
#     "transformers>=4.50.0",
#     "numpy>=1.26.4",
#     "matplotlib>=3.8.4",
#     "tqdm>=4.66.5",
# ]
# ///
