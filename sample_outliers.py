"""Paper A, steps 2 and 3: low-likelihood embeddings, decoded into outlier images (DREAM-OOD).

Per class, on the unit sphere: the ID embeddings farthest from their K-th neighbour form the boundary; Gaussian noise
around each boundary point gives candidates; those farthest from the ID data (largest d_K) are kept, given the norm of
the class's anchor, and put in the anchor's place as the condition of the generator. --inliers (DREAM-ID) draws closer
and keeps the candidates nearest to the ID data instead.

The released code scores candidates in one order and picks them in another, so that its choice does not depend on the
score, and it shares one draw of noise among all boundary points. Here noise is independent and the pick is right;
--selection official repeats the released behaviour, so that the difference can be measured.

reads    anchors.npy (C, d), id_embeddings.npy (N, d), id_labels.npy (N,) from train_text_encoder.py; train.npy for the
         contact sheet; diffusion/
writes   outlier_embeddings.npy (M, d) float32, outlier_labels.npy (M,) int64, outliers.npy (M, H, W, 3) uint8,
         outliers.csv (index, class, source ID index, d_K, cosine to the source, seed), outliers.png (each row: the
         source, then outliers made from it); with --inliers the same files named inlier(s)

python sample_outliers.py                               # digits 0-5: 900 outliers, seconds on two cores
python sample_outliers.py --selection official          # the released selection
python sample_outliers.py --inliers                     # DREAM-ID
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
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from torchvision.utils import save_image
from tqdm import tqdm

RECIPES = {  # option: help, value per recipe. cifar100, imagenet100: as released, apart from steps (PLMS, 50)
    "recipe": ("column of the table RECIPES", "digits", "cifar10", "cifar100", "imagenet100"),
    "seed": ("seed of every random number, 0 for the first run", 0, 0, 0, 0),
    "K": ("d_K is the distance to the K-th neighbour of the class, itself counted", 40, 300, 300, 300),
    "boundary": ("size of the boundary set, per class", 30, 200, 50, 200),
    "draw": ("boundary points drawn per round", 30, 50, 50, 50),
    "candidates": ("noisy candidates per boundary point and round", 1500, 1500, 1500, 1500),
    "keep": ("candidates kept per boundary point and round", 2, 2, 2, 2),
    "sigma": ("std of the noise if d were 768; times sqrt(768 / d), which keeps the cosine", 0.07, 0.03, 0.07, 0.03),
    "inlier_sigma": ("the same with --inliers", 0.01, 0.01, 0.01, 0.01),
    "per_class": ("outliers per class", 150, 1000, 1000, 1000),
    "guidance": ("classifier-free guidance scale s = 1 + w; 1 is none", 2.0, 2.0, 7.5, 7.5),
    "steps": ("steps of DPM-Solver++ 2M", 20, 20, 20, 20),
    "batch_size": ("images decoded at a time", 256, 256, 256, 256),
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


def kth_distance(queries, bank, K, chunk=1024):
    """Distance of each query (N, d) to its K-th nearest row of bank (M, d), (N,): d_K of the paper.

    |b|^2 / 2 - q.b ranks the neighbours in one matrix product; the K-th distance itself is then computed exactly.
    """
    center = bank.mean(0)
    bank, d_K = bank - center, []
    half_square = bank.square().sum(1) / 2
    for q in queries.split(chunk):
        q = q - center
        kth = torch.addmm(half_square, q, bank.T, alpha=-1).kthvalue(K).indices
        d_K.append((q - bank[kth]).norm(dim=1))
    return torch.cat(d_K)


def pick(d_K, keep, selection, nearest=False):
    """Which candidates to keep: d_K (points, candidates) -> indices of candidates (points, keep).

    knn: those of largest d_K (smallest with nearest) of each point. random: any. official: the released code reads the
    distances, stored point by point, as if they were stored candidate by candidate.
    """
    points, candidates = d_K.shape
    if selection == "random":
        return torch.rand_like(d_K).topk(keep, dim=1).indices
    if selection == "official":
        return d_K.reshape(candidates, points).topk(keep, dim=0, largest=not nearest).indices.T
    return d_K.topk(keep, dim=1, largest=not nearest).indices


def sample_embeddings(z, count, sigma, args):
    """`count` unit embeddings around the boundary of one class, whose ID embeddings are z (n, d) on the unit sphere.

    Returns v (count, d), source (count,) index into z, d_K (count,), percentile (count,) of d_K among the candidates
    of the same boundary point, in [0, 1].
    """
    d_K = kth_distance(z, z, args.K)  # itself is the first neighbour
    if args.inliers:
        boundary, draw, keep = torch.arange(len(z), device=z.device), min(100, len(z)), 1
    else:
        boundary, draw, keep = d_K.topk(args.boundary).indices, args.draw, args.keep
    found = []
    while sum(len(part[0]) for part in found) < count:
        source = boundary[torch.randperm(len(boundary), device=z.device)[:draw]]
        # Candidates v = normalise(z_b + sigma eps): independent eps for each boundary point
        shared = args.selection == "official"
        eps = torch.randn(1 if shared else draw, args.candidates, z.shape[1], device=z.device)
        v = F.normalize(z[source][:, None] + sigma * eps, dim=2)  # (draw, candidates, d)
        d_K = kth_distance(v.flatten(0, 1), z, args.K).view(draw, args.candidates)
        # Keep the candidates of lowest likelihood: those whose K-th neighbour is farthest
        index = pick(d_K, keep, args.selection, nearest=args.inliers)  # (draw, keep)
        kept = d_K.gather(1, index)
        percentile = (d_K[:, None] <= kept[:, :, None]).float().mean(2)
        v = v.gather(1, index[:, :, None].expand(-1, -1, z.shape[1]))
        found.append([part.flatten(0, 1) for part in (v, source[:, None].expand_as(index), kept, percentile)])
    return [torch.cat(parts)[:count] for parts in zip(*found, strict=True)]


@torch.no_grad()
def decode(unet, scheduler, embeddings, numbers, args):
    """Images (B, C, H, W) in [-1, 1] for embeddings (B, d), which stand where the class embedding stood."""
    table = unet.class_embedding
    null = table.weight[-1].expand_as(embeddings)
    solver = DPMSolverMultistepScheduler.from_config(scheduler.config, thresholding=True, sample_max_value=1.0)
    solver.set_timesteps(timesteps=quadratic_steps(scheduler.config.num_train_timesteps - 1, args.steps))
    generators = [torch.Generator().manual_seed(image_seed(args.seed, i)) for i in numbers]
    side = unet.config.sample_size
    shape = (len(embeddings), unet.config.in_channels, side, side)
    x = randn_tensor(shape, generators, embeddings.device)
    unet.class_embedding = nn.Identity()  # conditions are embeddings now, not class numbers
    try:
        for t in solver.timesteps:
            eps_t = guided_noise(unet, x, t, embeddings, null, args.guidance - 1)
            x = solver.step(eps_t, t, x).prev_sample
    finally:
        unet.class_embedding = table
    return x


def contact_sheet(path, rows):
    """Save rows of (H, W, 3) uint8 images as one picture, small images enlarged."""
    sheet = torch.from_numpy(np.stack([image for row in rows for image in row])).permute(0, 3, 1, 2).float() / 255
    sheet = F.interpolate(sheet, scale_factor=max(1, 64 // sheet.shape[-1]))
    temporary = path.with_name(f".partial.{path.name}")
    save_image(sheet, temporary, nrow=len(rows[0]), pad_value=1.0)
    os.replace(temporary, path)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/digits"), help="shared directory (default: %(default)s)")
    parser.add_argument("--diffusion", type=Path, help="folder of the generator (default: diffusion/ of --dir)")
    text = "how candidates are kept: by d_K, as the released code does it, or at random (default: %(default)s)"
    parser.add_argument("--selection", choices=("knn", "official", "random"), default="knn", help=text)
    parser.add_argument("--inliers", action="store_true", help="DREAM-ID: sample inliers, to inliers.npy")
    parser.add_argument("--device", help="torch device (default: cuda, mps or cpu)")
    args = parse_recipe(parser)
    args.diffusion = args.diffusion or args.dir / "diffusion"
    if args.keep > args.candidates or args.draw > args.boundary or args.guidance < 1:
        fail("--keep is at most --candidates, --draw at most --boundary, --guidance at least 1", 2)
    return args


def load_inputs(args):
    """Gamma (C, d), z (N, d) on the unit sphere, labels (N,), ID images; checked against each other and the options."""
    writer = "train_text_encoder.py"
    Gamma = load_array(args.dir / "anchors.npy", (None, None), np.float32, writer)
    z = load_array(args.dir / "id_embeddings.npy", (None, Gamma.shape[1]), np.float32, writer)
    labels = load_array(args.dir / "id_labels.npy", z.shape[:1], np.int64, writer)
    images = load_array(args.dir / "train.npy", (len(z), None, None, 3), np.uint8, "train_scan_diffusion.py")
    counts = np.bincount(labels, minlength=len(Gamma))
    if len(counts) > len(Gamma):
        fail(f"{args.dir / 'id_labels.npy'} has labels past the {len(Gamma)} anchors; run {writer} again")
    if counts.min() < max(args.K, 1 if args.inliers else args.boundary):
        need = f"--K {args.K} and --boundary {args.boundary}"
        fail(f"class {counts.argmin()} has {counts.min()} images in id_labels.npy, too few for {need}; lower these", 2)
    if (np.linalg.norm(z, axis=1) == 0).any():
        fail(f"{args.dir / 'id_embeddings.npy'} holds an embedding of length 0; run {writer} again")
    return Gamma, z, labels, images


def main():
    args = parse_args()
    torch.manual_seed(args.seed)
    Gamma, z, labels, images = load_inputs(args)
    unet, scheduler, t_max = load_diffusion(args.diffusion)
    if t_max < scheduler.config.num_train_timesteps:
        fail(f"{args.diffusion} was trained on t < {t_max} alone; run train_scan_diffusion.py with --t-max 1000")
    if not np.array_equal(unet.class_embedding.weight[:-1].detach().numpy(), Gamma):
        fail(f"anchors.npy is not of the model in {args.diffusion}; run train_text_encoder.py again")
    side = unet.config.sample_size
    if images.shape[1:3] != (side, side):
        fail(f"train.npy holds images of {images.shape[1]} px, {args.diffusion} makes {side} px; retrain one of them")
    unet = unet.to(args.device)
    z = F.normalize(torch.from_numpy(np.array(z)).to(args.device), dim=1)
    Gamma = torch.from_numpy(np.array(Gamma)).to(args.device)
    sigma = (args.inlier_sigma if args.inliers else args.sigma) * math.sqrt(768 / z.shape[1])
    cosine = 1 / math.sqrt(1 + z.shape[1] * sigma**2)
    print(f"d = {z.shape[1]}, sigma = {sigma:.4f}: expected cosine of a candidate to its boundary point {cosine:.2f}")

    parts = []
    for c in tqdm(range(len(Gamma)), desc="embeddings"):
        own = torch.from_numpy((labels == c).nonzero()[0]).to(args.device)
        v, source, d_K, percentile = sample_embeddings(z[own], args.per_class, sigma, args)
        cosine = (v * z[own][source]).sum(1)
        parts.append((v * Gamma[c].norm(), torch.full_like(source, c), own[source], d_K, cosine, percentile))
    v, classes, source, d_K, cosine, percentile = (torch.cat(part) for part in zip(*parts, strict=True))
    print(f"selection {args.selection}: mean percentile of d_K among the point's candidates {percentile.mean():.3f}")

    name, M = "inlier" if args.inliers else "outlier", len(v)
    partial = args.dir / f".partial.{name}s.npy"
    made = np.lib.format.open_memmap(partial, "w+", np.uint8, (M, side, side, 3))
    for i in tqdm(torch.arange(M).split(args.batch_size), desc="decoding", unit="batch"):
        made[i.numpy()] = to_uint8(decode(unet, scheduler, v[i], i.tolist(), args))
    made.flush()
    os.replace(partial, args.dir / f"{name}s.npy")
    save(args.dir / f"{name}_embeddings.npy", v.cpu().numpy())
    save(args.dir / f"{name}_labels.npy", classes.cpu().numpy())
    columns = zip(*(column.tolist() for column in (classes, source, d_K, cosine)), strict=True)
    rows = [f"{i},{c},{s},{d:.5f},{cos:.5f},{image_seed(args.seed, i)}" for i, (c, s, d, cos) in enumerate(columns)]
    save(args.dir / f"{name}s.csv", "\n".join(["index,class,source,d_K,cosine,seed", *rows]) + "\n")

    sheet, source, classes = [], source.cpu().numpy(), classes.cpu().numpy()
    for c in range(min(len(Gamma), 10)):  # two sources of each class
        for s in list(dict.fromkeys(source[classes == c]))[:2]:
            sheet.append([images[s], *made[np.flatnonzero((source == s) & (classes == c))[:10]]])
    blank, width = np.full((side, side, 3), 255, np.uint8), max(map(len, sheet))
    sheet = [row + [blank] * (width - len(row)) for row in sheet]
    contact_sheet(args.dir / f"{name}s.png", sheet)
    print(
        f"wrote {M} {name}s to {args.dir / (name + 's.npy')}, a contact sheet to {name}s.png (first column: the source)"
    )
    print(f"next: python sample_sd_outliers.py --dir {args.dir}, or python train_classifier.py --dir {args.dir}")


if __name__ == "__main__":
    main()
