"""Paper B, step 3: semantic-discrepant outliers. Half-noise an ID image, denoise it under a class it does not have.

For an image x with pseudo-label y~: draw c_r from the other classes, noise x to
x_S = sqrt(abar_S) x + sqrt(1 - abar_S) eps, denoise from S to 0 with
eps_t = (1 + w) eps_theta(x_t, c_r) - w eps_theta(x_t). The outlier keeps the look of x and the label y~, but not its
meaning. One outlier per image.

reads    train.npy (N, H, W, 3) uint8, pseudo_labels.npy (N,) int64, diffusion/; with --split test: test.npy,
         test_pseudo_labels.npy
writes   sd_outliers.npy (N, H, W, 3) uint8, sd_outliers.csv (index, source, y, c_r, seed), sd_outliers.png (the source
         above, its outlier below, with y~ -> c_r); the names end in _test with --split test; sd_reconstructions with
         --reconstruct, which denoises under c_r := y~

python sample_sd_outliers.py                                # digits 0-5: 870 outliers, seconds on two cores
python sample_sd_outliers.py --split test                   # an OOD test set made of test images
python sample_sd_outliers.py --split test --reconstruct     # does a detector see meaning, or that it was generated?
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from tqdm import tqdm

RECIPES = {  # option: help, value per recipe. cifar10: S and w as published
    "recipe": ("column of the table RECIPES", "digits", "cifar10"),
    "seed": ("seed of every random number, 0 for the first run", 0, 0),
    "S": ("start step of the linear T = 1000 schedule", 150, 100),
    "w": ("guidance weight, 0 for none; diffusers' scale is 1 + w", 2.0, 2.0),
    "steps": ("dpmpp: steps from S to 0", 20, 20),
    "batch_size": ("images denoised at a time", 256, 256),
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


def load_diffusion(folder):
    """UNet (eval mode), noise schedule, and t_max: the model was trained on t < t_max."""
    if not (folder / "unet" / "config.json").exists():
        fail(f"{folder} holds no diffusion model; run train_scan_diffusion.py, or give --diffusion")
    try:
        unet = UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False).eval()
        if not unet.config.num_class_embeds:
            raise ValueError("it knows no classes")
        scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
        notes = folder / "training.json"
        t_max = json.loads(notes.read_text())["t_max"] if notes.exists() else scheduler.config.num_train_timesteps
    except Exception as error:  # diffusers, safetensors and json know many
        fail(f"{folder} does not load ({str(error).splitlines()[0]}); run train_scan_diffusion.py again")
    return unet, scheduler, t_max


def guided_noise(unet, x_t, t, c, null, w):
    """Paper B: eps_t = (1 + w) eps_theta(x_t, c) - w eps_theta(x_t). In diffusers' terms the guidance scale is 1 + w.

    x_t (B, C, H, W); c: conditions, one per image; null: the condition that stands for none, of c's shape.
    """
    if w == 0:
        return unet(x_t, t, c).sample
    eps_c, eps = unet(torch.cat([x_t, x_t]), t, torch.cat([c, null])).sample.chunk(2)
    return (1 + w) * eps_c - w * eps


def quadratic_steps(start, steps):
    """At most `steps` timesteps from start to 0, denser near 0.

    With 20 of them DPM-Solver++ 2M follows the exact flow of Gaussian data (std 0.15) from S = 100 to 0.2 percent, from
    T to 3 percent; evenly spaced, which is coarse where the last of the noise goes, to 0.8 and 22 percent.
    """
    return np.unique(np.rint(start * np.linspace(1, 0, steps) ** 2).astype(int))[::-1].tolist()


def image_seed(seed, index):
    """Seed of one image's noise: the same whatever the batch, order or process."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1)[0])


def to_uint8(x):
    """(B, 1 or 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8 NumPy; grey is repeated."""
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    return x.expand(*x.shape[:3], 3).cpu().numpy()


def wrong_class(y, classes, seed, index):
    """c_r ~ Uniform({0 .. C-1} without y) for image number `index`."""
    return int((y + np.random.default_rng((seed, index)).integers(1, classes)) % classes)


@torch.no_grad()
def half_noise_and_denoise(unet, scheduler, x, c_r, seeds, args):
    """x_S = sqrt(abar_S) x + sqrt(1 - abar_S) eps, then denoised from S to 0 under c_r. x (B, C, H, W) in [-1, 1]."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    eps = randn_tensor(x.shape, generators, x.device)
    abar_S = scheduler.alphas_cumprod[args.S].to(x)
    x_t = abar_S.sqrt() * x + (1 - abar_S).sqrt() * eps
    if args.sampler == "dpmpp":  # 2M, x_0 clipped to [-1, 1], on a list of steps that starts at S
        solver = DPMSolverMultistepScheduler.from_config(scheduler.config, thresholding=True, sample_max_value=1.0)
        timesteps = quadratic_steps(args.S, args.steps)
        solver.set_timesteps(timesteps=timesteps)
    else:  # ancestral sampling, every step
        solver, timesteps = DDPMScheduler.from_config(scheduler.config, clip_sample=True), range(args.S, -1, -1)
    null = torch.full_like(c_r, unet.config.num_class_embeds - 1)
    for t in timesteps:
        eps_t = guided_noise(unet, x_t, t, c_r, null, args.w)
        x_t = solver.step(eps_t, t, x_t, generator=generators).prev_sample
    return x_t


def captioned_sheet(path, images, outliers, y, c_r, columns=12):
    """Up to three double rows: a source above, its outlier below, with y -> c_r between them."""
    shown = np.linspace(0, len(images) - 1, min(3 * columns, len(images))).astype(int)
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(2 * rows, columns, figsize=(columns, 2.4 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for place, i in enumerate(shown):
        row, column = 2 * (place // columns), place % columns
        axes[row, column].imshow(images[i])
        axes[row + 1, column].imshow(outliers[i])
        axes[row + 1, column].set_title(f"{y[i]} → {c_r[i]}", fontsize=9)
    temporary = path.with_name(f".partial.{path.name}")
    figure.savefig(temporary, dpi=80, bbox_inches="tight")
    plt.close(figure)
    os.replace(temporary, path)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/digits"), help="shared directory (default: %(default)s)")
    parser.add_argument("--diffusion", type=Path, help="folder of the diffusion model (default: diffusion/ of --dir)")
    text = "images to start from: train, or test for an OOD test set (default: %(default)s)"
    parser.add_argument("--split", choices=("train", "test"), default="train", help=text)
    parser.add_argument(
        "--reconstruct", action="store_true", help="denoise under c_r := y: copies that keep their label"
    )
    text = "dpmpp: DPM-Solver++ 2M in --steps steps; ddpm: ancestral, S + 1 steps (default: %(default)s)"
    parser.add_argument("--sampler", choices=("dpmpp", "ddpm"), default="dpmpp", help=text)
    parser.add_argument("--device", help="torch device (default: cuda, mps or cpu)")
    args = parse_recipe(parser)
    args.diffusion = args.diffusion or args.dir / "diffusion"
    return args


def main():
    args = parse_args()
    unet, scheduler, t_max = load_diffusion(args.diffusion)
    if args.S >= t_max or args.sampler == "dpmpp" and args.steps > args.S:
        fail(f"--S is {args.S}; it must be below {t_max}, for which the model was trained, and at least --steps", 2)
    classes, side = unet.config.num_class_embeds - 1, unet.config.sample_size
    name, label_name = ("train", "pseudo_labels") if args.split == "train" else ("test", "test_pseudo_labels")
    images = load_array(args.dir / f"{name}.npy", (None, side, side, 3), np.uint8, "train_scan_diffusion.py")
    y = load_array(args.dir / f"{label_name}.npy", images.shape[:1], np.int64, "train_scan_diffusion.py")
    if y.max() >= classes or classes < 2:
        fail(f"{label_name}.npy goes up to {y.max()}, but {args.diffusion} knows {classes} classes; it takes 2 or more")
    abar_S = scheduler.alphas_cumprod[args.S].item()
    print(f"S = {args.S}: abar_S = {abar_S:.4f}, std of the noise {math.sqrt(1 - abar_S):.3f}")

    unet, seeds = unet.to(args.device), [image_seed(args.seed, i) for i in range(len(images))]
    c_r = [int(label) if args.reconstruct else wrong_class(label, classes, args.seed, i) for i, label in enumerate(y)]
    stem = ("sd_reconstructions" if args.reconstruct else "sd_outliers") + "_test" * (args.split == "test")
    partial = args.dir / f".partial.{stem}.npy"
    made = np.lib.format.open_memmap(partial, "w+", np.uint8, images.shape)
    for i in tqdm(np.split(np.arange(len(images)), range(args.batch_size, len(images), args.batch_size)), desc=stem):
        x = torch.from_numpy(images[i]).to(args.device).permute(0, 3, 1, 2)[:, : unet.config.in_channels]
        condition = torch.tensor([c_r[j] for j in i], device=args.device)
        x = half_noise_and_denoise(unet, scheduler, x / 127.5 - 1, condition, [seeds[j] for j in i], args)
        made[i] = to_uint8(x)
    made.flush()
    os.replace(partial, args.dir / f"{stem}.npy")
    rows = [f"{i},{i},{y[i]},{c_r[i]},{seeds[i]}" for i in range(len(images))]
    save(args.dir / f"{stem}.csv", "\n".join(["index,source,y,c_r,seed", *rows]) + "\n")
    captioned_sheet(args.dir / f"{stem}.png", images, made, y, c_r)
    print(f"wrote {len(images)} images to {args.dir / (stem + '.npy')}, a contact sheet to {stem}.png")
    print(f"next: python train_classifier.py --dir {args.dir}")


if __name__ == "__main__":
    main()
