"""Paper A, steps 2 and 3: low-likelihood embeddings, decoded into outlier images (DREAM-OOD).

Per class, on the unit sphere: the ID embeddings farthest from their K-th neighbour form the
boundary; Gaussian noise around each boundary point gives candidates; those farthest from the ID
data (largest d_K) are kept, given the norm of the class's anchor, and put in the anchor's place
as condition of the generator: the class word's token of Stable Diffusion (--diffusion: hub id or
folder), or the class embedding of the model of train_scan_diffusion.py. --inliers (DREAM-ID)
draws closer and keeps the candidates nearest to the ID data instead.

The released code scores candidates in one order and picks them in another, so that its choice does
not depend on the score, and shares one draw of noise among all boundary points. Here the pick is
right and noise independent; --selection official repeats the released behaviour. --selection
boundary (ours, after BOOD's description) walks from ID embeddings across the nearest decision
boundary; --source noise, interpolate and anchor are paper A's alternatives without ID embeddings.

Killed at any time, the same command goes on and ends with the same bytes; under torchrun the
processes share the work.

reads    anchors.npy (C, d), id_embeddings.npy (N, d), id_labels.npy (N,), train.npy (N, H, W, 3);
         diffusion/, or Stable Diffusion and class_words.txt
writes   outliers.npy (M, H, W, 3) uint8, outlier_embeddings.npy (M, d) float32, outlier_labels.npy
         (M,) int64, outliers.csv (index, class, source, d_K, cosine, seed), outliers.json
         (options), outliers.png (a row per class: sources, and right of each an outlier of it),
         outlier_embeddings.png (ID dots, outlier crosses); with --inliers all names say inlier(s)

python sample_outliers.py                       # digits 0-5: 2,700 outliers, half a minute
python sample_outliers.py --dir runs/cifar100 --diffusion CompVis/stable-diffusion-v1-4  # 100,000
torchrun --nproc_per_node 8 sample_outliers.py --dir runs/cifar100 --diffusion FOLDER
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
from torch import nn
from tqdm import tqdm

# option: (value, or one for each of COLUMNS), help[, choices]. cifar100, imagenet100: as released
# but for resizing and balance. cifar10, not in paper A: sampled as cifar100, decoded by our own
# model.
# fmt: off
RECIPES = {
    "seed": (0, "seed of every random number"),
    "diffusion": ("", "Stable Diffusion, hub id or folder; '' for diffusion/ of --dir"),
    "prompt": ("A high-quality image of the {class}", "Stable Diffusion: prompt"),
    "source": ("latent", "embeddings: sampled in low-likelihood regions, or from the anchors by",
        "latent", "noise", "interpolate", "anchor"),
    "selection": ("knn", "candidates kept: by d_K, as released, any; or boundary crossings",
        "knn", "official", "random", "boundary"),
    "K": ((40, 300, 300, 300), "d_K is the distance to the K-th neighbour, itself counted"),
    "boundary": ((30, 50, 50, 200), "size of the boundary set, per class"),
    "draw": ((30, 50, 50, 50), "boundary points drawn per round"),
    "candidates": (1500, "noisy candidates per boundary point and round"),
    "keep": (2, "candidates kept per boundary point and round"),
    "sigma": ((0.07, 0.07, 0.07, 0.03), "std of the noise if d were 768: times sqrt(768 / d)"),
    "inlier_sigma": (0.01, "the same with --inliers"),
    "ascent": (0.02, "selection boundary: length of a step on the unit sphere"),
    "beyond": (5, "selection boundary: steps after the prediction has flipped"),
    "t": (0.1, "selection boundary: temperature of the cosine logits"),
    "per_class": ((450, 1000, 1000, 1000), "images per class"),
    "guidance": ((2.0, 2.0, 7.5, 7.5), "classifier-free guidance scale s = 1 + w; 1 is none"),
    "scheduler": (("dpmpp", "dpmpp", "pndm", "pndm"), "solver", "pndm", "dpmpp", "ddim"),
    "steps": ((20, 20, 50, 50), "steps of the solver; 20 do for dpmpp"),
    "resize": (("area", "area", "area", "bilinear"), "filter down", "area", "bilinear", "nearest"),
    "batch_size": ((256, 256, 32, 32), "images decoded at a time, at most 256"),
}
# fmt: on


def pick(d_K, keep, selection, nearest=False):
    """Which candidates to keep: d_K (points, candidates) -> indices of candidates (points, keep).

    knn: those of largest d_K (smallest if nearest) of each point. random: any. official: the
    released code reads distances stored point by point as if they were stored candidate by
    candidate.
    """
    points, candidates = d_K.shape
    if selection == "random":
        return torch.rand_like(d_K).topk(keep, dim=1).indices
    if selection == "official":
        misread = d_K.reshape(candidates, points)
        return misread.topk(keep, dim=0, largest=not nearest).indices.T
    return d_K.topk(keep, dim=1, largest=not nearest).indices


def sample_embeddings(z, count, sigma, args):
    """`count` unit embeddings around the boundary of one class; z (n, d): its ID embeddings, unit.

    Returns v (count, d), source (count,): row of z, d_K (count,), and percentile (count,) in [0,
    1] of d_K among the candidates of the same boundary point.
    """
    # The boundary set: the ID embeddings farthest from their K-th neighbour, itself the first
    d_K = knn(z, z, args.K)[0][:, -1]
    boundary = d_K.topk(args.boundary).indices
    draw = args.draw
    keep = args.keep
    if args.inliers:
        boundary = torch.arange(len(z), device=z.device)
        draw = min(100, len(z))
        keep = 1
    rounds = []
    for _ in range(math.ceil(count / (draw * keep))):
        source = boundary[torch.randperm(len(boundary), device=z.device)[:draw]]
        # Candidates v = normalise(z_b + sigma eps), eps independent for each boundary point
        points = 1 if args.selection == "official" else draw
        eps = torch.randn(points, args.candidates, z.shape[1], device=z.device)
        v = F.normalize(z[source][:, None] + sigma * eps, dim=2)  # (draw, candidates, d)
        d_K = knn(v.flatten(0, 1), z, args.K)[0][:, -1].view(draw, args.candidates)
        # Keep the candidates of lowest likelihood: those whose K-th neighbour is farthest
        index = pick(d_K, keep, args.selection, nearest=args.inliers)  # (draw, keep)
        kept = d_K.gather(1, index)
        percentile = (d_K[:, None] <= kept[:, :, None]).float().mean(2)
        v = v.gather(1, index[:, :, None].expand(-1, -1, z.shape[1]))
        picked = (v, source[:, None].expand_as(index), kept, percentile)
        rounds.append([part.flatten(0, 1) for part in picked])
    return [torch.cat(parts)[:count] for parts in zip(*rounds, strict=True)]


def cross_boundary(z, c, anchors, args):
    """Gradient ascent on the loss of the cosine classifier, a little beyond its decision boundary.

    Ours, after the description of BOOD (ICML 2025), whose constants are not public. z (n, d): unit
    embeddings of class c; anchors (C, d): unit. Returns v (per_class, d), the --boundary of them
    that need the fewest steps until the prediction flips, in turn, after --beyond steps more; and
    source (per_class,): their rows in z.
    """
    since_flip = torch.zeros(len(z), device=z.device)  # steps; large: flipped early
    v = z
    for _ in range(int(4 / args.ascent) + args.beyond):  # more than halfway round
        p = (v @ anchors.T / args.t).softmax(1)
        since_flip = since_flip + ((since_flip > 0) | (p.argmax(1) != c))
        gradient = p @ anchors - anchors[c]  # of -t log p_c
        moved = F.normalize(v + args.ascent * F.normalize(gradient))
        v = torch.where((since_flip <= args.beyond)[:, None], moved, v)
    first = (-since_flip).argsort(stable=True)[: args.boundary]
    source = first[torch.arange(args.per_class) % len(first)]
    return v[source], source


def from_anchors(c, anchors, sigma, args):
    """Paper A's alternatives to latent sampling: unit embeddings (per_class, d) around an anchor.

    noise: normalise(gamma_c + sigma eps). interpolate: halfway to another class's anchor. anchor:
    gamma_c as it is. anchors (C, d): unit.
    """
    v = anchors[c].expand(args.per_class, -1)
    if args.source == "noise":
        v = v + sigma * torch.randn_like(v)
    if args.source == "interpolate":
        other = torch.randint(1, len(anchors), (len(v),), device=v.device)
        v = v + anchors[(c + other) % len(anchors)]
    return F.normalize(v)


def class_embeddings(c, z, anchors, sigma, args):
    """What sample_embeddings returns, by --source and --selection; no percentile where no choice.

    Without ID embeddings as sources, these are the nearest ones.
    """
    if args.source != "latent":
        v = from_anchors(c, anchors, sigma, args)
        source = (v @ z.T).argmax(1)
    elif args.selection == "boundary":
        v, source = cross_boundary(z, c, anchors, args)
    else:
        return sample_embeddings(z, args.per_class, sigma, args)
    d_K = knn(v, z, args.K)[0][:, -1]
    return v, source, d_K, torch.full_like(d_K, torch.nan)


def guided_noise(unet, x_t, t, c, null, w):
    """Paper B: eps_t = (1 + w) eps_theta(x_t, c) - w eps_theta(x_t); diffusers' scale is 1 + w.

    x_t (B, C, H, W): pixels or latents; c, null (B, ...): conditions, and the one that stands for
    none.
    """
    eps_c, eps = unet(torch.cat([x_t, x_t]), t, torch.cat([c, null])).sample.float().chunk(2)
    return (1 + w) * eps_c - w * eps


def class_decoder(Gamma, args):
    """decode(v, classes, seeds) -> images in [-1, 1]: v (B, d) in place of the class embedding."""
    unet, schedule = load_diffusion(args.dir / "diffusion", args.device)
    table = unet.class_embedding.weight.detach()
    if not torch.equal(table[:-1].cpu(), torch.from_numpy(Gamma)):
        sys.exit("anchors.npy is not of the model in diffusion/; run train_text_encoder.py again")
    unet.class_embedding = nn.Identity()  # conditions are embeddings now, not class numbers
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)

    @torch.no_grad()
    def decode(v, classes, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        solver = make_solver(schedule, args)
        x = randn_tensor((len(v), *shape), generators, v.device)
        for t in solver.timesteps:
            with autocast(args):
                eps_t = guided_noise(unet, x, t, v, table[-1:].expand_as(v), args.guidance - 1)
            x = solver.step(eps_t, t, x).prev_sample
        return x

    return decode


def text_decoder(Gamma, args):
    """The same by Stable Diffusion: v (B, d) in place of the class word's token embedding."""
    pipe = load_stable_diffusion(args.diffusion, args.device)
    pipe.scheduler = SOLVERS[args.scheduler].from_config(pipe.scheduler.config)
    ids, slots = class_slots(pipe, torch.from_numpy(Gamma), args)
    pipe.unet.register_forward_hook(in_float32)

    @torch.no_grad()
    def decode(v, classes, seeds):
        def inject(module, inputs, embeddings):  # (B, 77, d)
            return torch.where(slots[classes][:, :, None], v[:, None], embeddings)

        hook = pipe.text_encoder.get_input_embeddings().register_forward_hook(inject)
        c = pipe.text_encoder(ids[classes]).last_hidden_state
        hook.remove()
        null = pipe.text_encoder(tokenize(pipe, [""])).last_hidden_state
        with autocast(args):
            x = pipe(
                prompt_embeds=c,
                negative_prompt_embeds=null.expand_as(c),
                guidance_scale=args.guidance,
                num_inference_steps=args.steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="pt",
            ).images
        return x.float() * 2 - 1

    return decode


def parse_args():
    parser = recipe_parser()
    parser.add_argument("--inliers", action="store_true", help="DREAM-ID: inliers, to inliers.npy")
    parser.add_argument("--restart", action="store_true", help="make these images anew")
    parser.add_argument("--fp32", action="store_true", help="no bfloat16 on GPUs that have it")
    args = parser.parse_args()
    if args.keep > args.candidates or args.draw > args.boundary or args.guidance < 1:
        parser.error("--keep <= --candidates, --draw <= --boundary, --guidance >= 1")
    if args.inliers and (args.source != "latent" or args.selection in ("official", "boundary")):
        parser.error("--inliers goes with --source latent and --selection knn or random alone")
    return args


def main():
    args = parse_args()
    start(args)
    name = "inlier" if args.inliers else "outlier"
    Gamma, z, labels, train = load_inputs(args)
    decode = text_decoder(Gamma, args) if args.diffusion else class_decoder(Gamma, args)
    v, lines = sample_all(Gamma, z, labels, args)
    args.inputs = fingerprint(Gamma, z, labels)
    classes = torch.arange(len(Gamma)).repeat_interleave(args.per_class)
    side = train.shape[1]

    def make(rows):
        seeds = [seed_of(args.seed, i) for i in rows]
        x = decode(v[rows].to(args.device), classes[rows].to(args.device), seeds)
        x = F.interpolate(x, (side, side), mode=args.resize)
        return match_levels(train, to_uint8(x))

    run_job(f"{name}s", (len(v), side, side, 3), make, args)
    if args.rank == 0:
        save(args.dir / f"{name}_embeddings.npy", v.numpy())
        save(args.dir / f"{name}_labels.npy", classes.numpy())
        table = "".join(f"{i},{line}\n" for i, line in enumerate(lines))
        save(args.dir / f"{name}s.csv", f"index,class,source,d_K,cosine,seed\n{table}")
        images = np.load(args.dir / f"{name}s.npy", mmap_mode="r")
        sources = np.array([int(line.split(",")[1]) for line in lines])
        classes = classes.numpy()
        sheet = pair_sheet(images, train, sources, classes, classes)
        save(args.dir / f"{name}s.png", sheet)
        save(args.dir / f"{name}_embeddings.png", plot_embeddings(z, labels, v, classes))
    print(f"wrote {name}s.npy, .csv, .json, .png to {args.dir}; next: train_classifier.py")


# ---- plumbing: not the paper's method; same name, same text in every script ----

COLUMNS = ("digits", "cifar10", "cifar100", "imagenet100")  # of RECIPES
BLOCK = 256  # images in a file of an unfinished job
SOLVERS = {
    "pndm": diffusers.PNDMScheduler,
    "dpmpp": diffusers.DPMSolverMultistepScheduler,
    "ddim": diffusers.DDIMScheduler,
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


def autocast(args):
    """bfloat16 on GPUs that have it (Ampere and later), float32 elsewhere or with --fp32."""
    native = args.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(args.device, torch.bfloat16, enabled=native and not args.fp32)


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


def quadratic_steps(start, count):
    """At most `count` timesteps from start to 0, denser near 0, where the last of the noise goes.

    20 of DPM-Solver++ follow the exact flow of narrow data (std 0.15) to 3 percent, evenly spaced
    to 22.
    """
    steps = start * torch.linspace(1, 0, count) ** 2
    return steps.round().int().unique().flip(0).tolist()


def make_solver(schedule, args):
    """The solver of --scheduler for pixels, with x_0 in [-1, 1], set to --steps from noise."""
    T = schedule.config.num_train_timesteps
    if args.scheduler == "dpmpp":
        clip = {"thresholding": True, "sample_max_value": 1.0}
        solver = SOLVERS["dpmpp"].from_config(schedule.config, **clip)
        solver.set_timesteps(timesteps=quadratic_steps(T - 1, args.steps))
        return solver
    solver = SOLVERS[args.scheduler].from_config(schedule.config, skip_prk_steps=True)
    solver.set_timesteps(args.steps)
    return solver


def in_float32(module, inputs, outputs):
    """Hook: guidance and solver go on in float32, whatever autocast made of the UNet's output."""
    return (outputs[0].float(),)


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


def class_slots(pipe, Gamma, args):
    """Token numbers (C, 77) of the classes' prompts; (C, 77) True at the anchored token."""
    table = pipe.text_encoder.get_input_embeddings().weight.detach().cpu()
    words = read_class_words(args.dir / "class_words.txt")
    prompts = [args.prompt.replace("{class}", phrase) for _, phrase in words]
    if Gamma.shape != (len(words), table.shape[1]):
        sys.exit("anchors.npy is not of class_words.txt and --diffusion; run train_text_encoder.py")
    ids = tokenize(pipe, prompts).cpu()
    slots = torch.zeros_like(ids, dtype=torch.bool)
    for c, (word, _) in enumerate(words):
        tokens = pipe.tokenizer(word, add_special_tokens=False).input_ids
        if torch.equal(table[tokens[0]], Gamma[c]):  # --multi-token first; of a mean all tokens go
            tokens = tokens[:1]
        if not torch.allclose(table[tokens].mean(0), Gamma[c], atol=1e-6):
            sys.exit(
                f"the anchor of '{word}' is not of --diffusion; run train_text_encoder.py again"
            )
        slots[c] = torch.isin(ids[c], torch.tensor(tokens))
        if not slots[c].any():
            sys.exit(f"the anchored token of '{word}' is not in its prompt; mend class_words.txt")
    return ids.to(args.device), slots.to(args.device)


def tokenize(pipe, prompts):
    """Token numbers (B, 77) on the device of the pipeline."""
    tokens = pipe.tokenizer(
        prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    return tokens.input_ids.to(pipe.device)


def load_inputs(args):
    """Gamma (C, d), z (N, d), labels (N,) and ID images, checked against each other."""
    writer = "train_text_encoder.py"
    Gamma = load_array(args.dir / "anchors.npy", (None, None), np.float32, writer)
    z = load_array(args.dir / "id_embeddings.npy", (None, Gamma.shape[1]), np.float32, writer)
    labels = load_array(args.dir / "id_labels.npy", (len(z),), np.int64, writer)
    shape = (len(z), None, None, 3)
    train = load_array(args.dir / "train.npy", shape, np.uint8, "train_scan_diffusion.py")
    counts = np.bincount(labels, minlength=len(Gamma))
    if len(counts) > len(Gamma) or counts.min() < max(args.K, args.boundary):
        need = f"--K {args.K} and --boundary {args.boundary} of each of {len(Gamma)} classes"
        sys.exit(f"id_labels.npy has too few images, {counts.tolist()}, for {need}; lower these")
    return Gamma, z, labels, train


def sample_all(Gamma, z, labels, args):
    """Embeddings of all classes, (M, d), and for each "class,source,d_K,cosine,seed"; prints a
    summary.
    """
    sigma = (args.inlier_sigma if args.inliers else args.sigma) * math.sqrt(768 / z.shape[1])
    anchors = F.normalize(torch.from_numpy(Gamma).to(args.device))
    embeddings = []
    rows = []
    percentiles = []
    for c in tqdm(range(len(Gamma)), "embeddings", disable=args.rank > 0):
        torch.manual_seed(seed_of(args.seed, "embeddings", c))
        members = np.flatnonzero(labels == c)
        z_c = F.normalize(torch.from_numpy(z[members]).to(args.device), dim=1)
        v, source, d_K, percentile = class_embeddings(c, z_c, anchors, sigma, args)
        cosine = (v * z_c[source]).sum(1)
        percentiles.append(percentile.mean().item())
        for s, d, cos in zip(source.tolist(), d_K.tolist(), cosine.tolist(), strict=True):
            rows.append(f"{c},{members[s]},{d:.5f},{cos:.5f},{seed_of(args.seed, len(rows))}")
        embeddings.append(v.cpu() * np.linalg.norm(Gamma[c]))
    print(f"{args.source}, {args.selection}: mean percentile of d_K {np.mean(percentiles):.4f}")
    return torch.cat(embeddings), rows


def plot_embeddings(z, labels, v, classes):
    """ID embeddings z (dots) and new ones v (crosses), of equal norm, in z's principal plane."""
    points = F.normalize(torch.from_numpy(z))
    plane = torch.pca_lowrank(points)[2][:, :2]
    figure = Figure((6, 5))
    axis = figure.subplots()
    axis.scatter(*(points @ plane).T, s=4, c=labels)
    axis.scatter(*(F.normalize(v) @ plane).T, s=9, c=classes, marker="x")
    return figure


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
