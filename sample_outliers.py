"""Paper A, steps 2 and 3: low-likelihood embeddings, decoded into outlier images (DREAM-OOD).

Per class, on the unit sphere: the ID embeddings farthest from their K-th neighbour form the boundary; Gaussian noise
around each boundary point gives candidates; those farthest from the ID data (largest d_K) are kept, given the norm of
the class's anchor, and put in the anchor's place as the condition of the generator: of the class word's token before
the text transformer of Stable Diffusion (--diffusion: hub id or folder), or of the class embedding of the model of
train_scan_diffusion.py. --inliers (DREAM-ID) draws closer and keeps the candidates nearest to the ID data instead.

The released code scores candidates in one order and picks them in another, so that its choice does not depend on the
score, and it shares one draw of noise among all boundary points. Here noise is independent and the pick is right;
--selection official repeats the released behaviour. Killed at any time, the same command goes on and ends with the
same bytes; under torchrun the processes share the work, and the images are those of one process.

reads    anchors.npy (C, d), id_embeddings.npy (N, d), id_labels.npy (N,), class_words.txt (Stable Diffusion alone) from
         train_text_encoder.py; train.npy for image size and contact sheet; diffusion/ or the checkpoint
writes   outlier_embeddings.npy (M, d) float32, outlier_labels.npy (M,) int64, outliers.npy (M, H, W, 3) uint8,
         outliers.csv (index, class, source ID index, d_K, cosine to the source, seed), outliers.json (all settings),
         outliers.png (each row: the source, then outliers made from it); with --inliers the same files named inlier(s)

python sample_outliers.py                               # digits 0-5: 900 outliers, seconds on two cores
python sample_outliers.py --dir runs/cifar100 --diffusion CompVis/stable-diffusion-v1-4   # 100,000, as the paper
torchrun --nproc_per_node 8 sample_outliers.py --dir runs/cifar100 --diffusion FOLDER --scheduler dpmpp --steps 20
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import nn
from torchvision.utils import save_image
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

RECIPES = {  # option: help, values
    # cifar100, imagenet100: as released but for resizing, balance and per_embedding. cifar10, not in paper A: sampled
    # as cifar100, decoded by our own model; for Stable Diffusion give --guidance 7.5 --scheduler pndm --steps 50.
    "recipe": ("column of the table RECIPES", "digits", "cifar10", "cifar100", "imagenet100", "cifar10-30min"),
    "seed": ("seed of every random number, 0 for the first run", 0, 0, 0, 0, 0),
    "K": ("d_K is the distance to the K-th neighbour of the class, itself counted", 40, 300, 300, 300, 300),
    "boundary": ("size of the boundary set, per class", 30, 50, 50, 200, 50),
    "draw": ("boundary points drawn per round", 30, 50, 50, 50, 50),
    "candidates": ("noisy candidates per boundary point and round", 1500, 1500, 1500, 1500, 1500),
    "keep": ("candidates kept per boundary point and round", 2, 2, 2, 2, 2),
    "sigma": ("std of the noise if d were 768; times sqrt(768 / d): same cosine", 0.07, 0.07, 0.07, 0.03, 0.07),
    "inlier_sigma": ("the same with --inliers", 0.01, 0.01, 0.01, 0.01, 0.01),
    "per_class": ("images per class", 150, 1000, 1000, 1000, 1000),
    "per_embedding": ("images per embedding, each from its own noise; the released code makes 3 to 4", 1, 1, 1, 1, 1),
    "balance": ("images of every class: equal|random ; the released code draws classes", *["equal"] * 5),
    "guidance": ("classifier-free guidance scale s = 1 + w; 1 is none", 2.0, 2.0, 7.5, 7.5, 2.0),
    "scheduler": ("solver: pndm|dpmpp|unipc|ddim ; pndm is PLMS", "dpmpp", "dpmpp", "pndm", "pndm", "dpmpp"),
    "steps": ("steps of the solver; 20 do for dpmpp", 20, 20, 50, 50, 20),
    "resolution": ("Stable Diffusion: px of the images made, 0 for those it was trained on", 0, 0, 0, 0, 0),
    "save_size": ("px of the images saved, 0 for those of train.npy, which classifiers want", 0, 0, 0, 0, 0),
    "resize": ("filter: area|bilinear|nearest|lanczos ; bilinear has no antialias", *["area"] * 3, "bilinear", "area"),
    "dtype": ("Stable Diffusion: auto|fp32|fp16|bf16 ; auto is fp16 on a GPU, else fp32", *["auto"] * 5),
    "batch_size": ("images decoded at a time, per process", 256, 256, 32, 32, 1000),
}
SOLVERS = {"pndm": "PNDM", "dpmpp": "DPMSolverMultistep", "unipc": "UniPCMultistep", "ddim": "DDIM"}


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


def load_diffusion(folder):
    """UNet (eval mode), noise schedule, and t_max: the model was trained on t < t_max."""
    if not (folder / "unet" / "config.json").exists():
        fail(f"{folder} holds no diffusion model; run train_scan_diffusion.py, or give --diffusion")
    try:
        unet = diffusers.UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False).eval()
        if not unet.config.num_class_embeds:
            raise ValueError("it knows no classes")
        scheduler = diffusers.DDPMScheduler.from_pretrained(folder / "scheduler")
        notes = folder / "training.json"
        t_max = json.loads(notes.read_text())["t_max"] if notes.exists() else scheduler.config.num_train_timesteps
    except Exception as error:  # diffusers, safetensors and json know many
        fail(f"{folder} does not load ({str(error).splitlines()[0]}); run train_scan_diffusion.py again")
    return unet, scheduler, t_max


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


def load_latent_diffusion(checkpoint, dtype, resolution, device):
    """Parts of a Stable Diffusion checkpoint, without the safety checker: unet in --dtype; vae in float32, decoding in
    bfloat16 if the UNet is half (float16 can overflow); config of the schedule; side of its images, px: `resolution`,
    or what it was trained at; scale: px per latent pixel."""
    half = {"fp16": torch.float16, "bf16": torch.bfloat16, "auto": torch.float16 if "cuda" in device else torch.float32}
    layout = torch.channels_last if "cuda" in device else torch.contiguous_format
    diffusers.logging.set_verbosity_error()  # it warns of every change of precision
    try:
        unet = diffusers.UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet", low_cpu_mem_usage=False)
        vae = diffusers.AutoencoderKL.from_pretrained(checkpoint, subfolder="vae", low_cpu_mem_usage=False)
        config = diffusers.PNDMScheduler.load_config(checkpoint, subfolder="scheduler")
        if unet.config.addition_embed_type:
            raise ValueError("its UNet wants more than a prompt, as that of SDXL does")
    except Exception as error:
        fail(f"no Stable Diffusion in {checkpoint} ({str(error).splitlines()[0]}); give --diffusion a hub id or folder")
    unet = unet.eval().to(device, half.get(dtype, torch.float32), memory_format=layout)
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    side, grain = resolution or unet.config.sample_size * scale, scale * 2 ** (len(unet.config.block_out_channels) - 1)
    if side % grain:
        fail(f"--resolution is {side}; it must be a multiple of {grain}", 2)
    vae = vae.eval().to(device, memory_format=layout)
    return SimpleNamespace(unet=unet, vae=vae, config=config, side=side, scale=scale)


def read_class_words(path):
    """Lines "word" or "word: phrase" -> [(word whose token is the anchor, phrase of the prompt)], class by class."""
    lines = path.read_text().strip().splitlines() if path.exists() else []
    parts = [[part.strip() for part in line.split(":")] for line in lines]
    if not parts or any(not all(line) or len(line) > 2 for line in parts):
        fail(f"{path} must hold a line per class, 'word' or 'word: phrase'; mend it, or run train_text_encoder.py")
    return [(line[0], line[-1]) for line in parts]


def tokenize(tokenizer, text_model, prompts):
    """Token numbers (B, 77), cut off or padded to the length that the text model takes."""
    length = text_model.config.max_position_embeddings
    ids = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    return ids.to(text_model.device)


@torch.no_grad()
def encode(text_model, ids, slots=None, embeddings=None):
    """Conditioning (B, 77, d') of prompts ids (B, 77), with embeddings (B, d) as input where slots (B, 77) is True."""

    def inject(module, inputs, output):
        return output if slots is None else torch.where(slots[:, :, None], embeddings[:, None].to(output), output)

    with text_model.get_input_embeddings().register_forward_hook(inject):
        return text_model(ids).last_hidden_state


def guided_noise(unet, x_t, t, c, null, w):
    """Paper B: eps_t = (1 + w) eps_theta(x_t, c) - w eps_theta(x_t). In diffusers' terms the guidance scale is 1 + w.

    x_t (B, C, H, W): pixels or latents; c: conditions, one per image (class numbers, class embeddings, or encoded
    prompts); null: the condition that stands for none, of c's shape. The sum is taken in float32.
    """
    if w == 0:
        return unet(x_t.to(unet.dtype), t, c).sample.float()
    eps_c, eps = unet(torch.cat([x_t, x_t]).to(unet.dtype), t, torch.cat([c, null])).sample.float().chunk(2)
    return (1 + w) * eps_c - w * eps


@torch.no_grad()
def decode_latents(sd, latents):
    """Latents (B, 4, h, w) -> images (B, 3, H, W) in [-1, 1]; four at a time, since this takes the most memory."""
    native = latents.device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)  # of Ampere on
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=native and sd.unet.dtype != torch.float32):
        parts = [sd.vae.decode(z / sd.vae.config.scaling_factor).sample for z in latents.split(4)]
    return torch.cat(parts).float().clamp(-1, 1)


def resize(x, side, how):
    """(B, C, H, W) in [-1, 1] -> (B, C, side, side) by area|bilinear|nearest|lanczos."""
    if x.shape[-1] == side:
        return x
    if how == "lanczos":
        images = [Image.fromarray(image).resize((side, side), Image.LANCZOS) for image in to_uint8(x)]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
    return F.interpolate(x, (side, side), mode=how)


def join_processes(args):
    """Rank and number of the processes of torchrun, (0, 1) without it; each gets a GPU of its own."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))  # only to wait for each other
    if world > 1 and args.device.startswith("cuda"):
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    return rank, world


def settings_of(args, **more):
    """What the images depend on, as plain types: every option but those of place and speed, and `more`."""
    aside = ("dir", "data", "recipe", "device", "batch_size", "compile", "restart", "class_words")
    where = Path(args.diffusion).resolve() if Path(args.diffusion).exists() else args.diffusion
    return {name: value for name, value in vars(args).items() if name not in aside} | {"diffusion": str(where)} | more


def make_room(path, shape):
    """Map of a new .npy of uint8 images to be filled, if the disk has room: a full one under a map is a bus error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(path.parent).free < math.prod(shape):
        fail(f"the images take {math.prod(shape) / 2**30:.1f} GiB, more than is free in {path.parent}; make room")
    return np.lib.format.open_memmap(path, "w+", np.uint8, shape)


def open_job(folder, stem, settings, begin, restart):
    """Make sure that .partial.<stem>.npy is there to be filled, unless <stem>.npy is complete for these settings.

    settings (plain types) say all that the images depend on. begin() makes a fresh .partial.<stem>.npy and what goes
    with it. An unfinished job of other settings is not dropped without `restart`.
    """
    complete, partial = folder / f"{stem}.json", folder / f".partial.{stem}.json"
    try:
        held, begun = (dict(json.loads(path.read_text())) if path.exists() else None for path in (complete, partial))
    except (ValueError, TypeError):
        held = begun = None
        if not restart:
            fail(f"{complete} or {partial.name} beside it is damaged; give --restart to make {stem} anew")
    if begun is None and held == settings and (folder / f"{stem}.npy").exists() and not restart:
        print(f"{folder / stem}.npy is complete for these settings; --restart makes it again")
    elif begun is None or restart:
        for old in sorted(folder.glob(f".partial.{stem}.*")):  # .json before .npy
            old.unlink()
        begin()
        save(partial, json.dumps(settings, indent=1) + "\n")
    elif begun != settings:
        other = next((name for name in settings if begun.get(name) != settings[name]), "version")
        was = f"{other} {begun.get(other)}, not {settings.get(other)}"
        fail(f"{folder} holds unfinished {stem} with {was}; give that again, or --restart to drop them")


def fill_job(folder, stem, batch_size, make, rank, world):
    """Fill .partial.<stem>.npy in blocks of batch_size rows: make(rows) -> images (len(rows), H, W, 3) uint8.

    Process number `rank` of `world` takes every world-th block and appends the rows that it finished, as int64, to its
    record. Blocks are made whole, so that neither interruptions nor the number of processes change which images are
    computed together, on which the last bit of an image can depend.
    """
    path, record = folder / f".partial.{stem}.npy", folder / f".partial.{stem}.done{rank}"
    if not path.exists():
        return  # it has its final name: only the last steps were missing
    array, finished = np.load(path, mmap_mode="r"), set()
    for old in folder.glob(f".partial.{stem}.done*"):
        finished.update(np.fromfile(old, np.int64).tolist())
    blocks = [range(i, min(i + batch_size, len(array))) for i in range(0, len(array), batch_size)][rank::world]
    todo = [block for block in blocks if not finished.issuperset(block)]
    count, left = (sum(map(len, part)) for part in (blocks, todo))
    bar = tqdm(total=count, initial=count - left, desc=stem, unit="image", disable=rank > 0)
    with open(path, "r+b") as file, open(record, "ab") as done:
        done.truncate(done.tell() // 8 * 8)  # the last number may have been cut off
        for block in todo:
            file.seek(array.offset + block[0] * array[0].nbytes)
            file.write(make(np.array(block)).tobytes())
            file.flush()
            os.fsync(file.fileno())  # images reach the disk before the record of them
            np.array(block, np.int64).tofile(done)
            done.flush()
            bar.update(len(block))


def close_job(folder, stem, names, draw):
    """Give the finished files their final names, draw() the pictures of them; the settings come last."""
    (folder / f"{stem}.json").unlink(missing_ok=True)
    for name in reversed(names):  # the images first: while they are partial, so is all that making them needs
        if (partial := folder / f".partial.{name}").exists():
            os.replace(partial, folder / name)
    draw()
    for record in folder.glob(f".partial.{stem}.done*"):
        record.unlink()
    os.replace(folder / f".partial.{stem}.json", folder / f"{stem}.json")


def quadratic_steps(start, steps):
    """At most `steps` timesteps from start to 0, denser near 0, where the last of the noise goes."""
    # 20 of DPM-Solver++ follow the exact flow of Gaussian data (std 0.15) from T to 3 percent, evenly spaced to 22
    return np.unique(np.rint(start * np.linspace(1, 0, steps) ** 2).astype(int))[::-1].tolist()


def image_seed(seed, index):
    """Seed of one image's noise: the same whatever the batch, order or process."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1)[0])


def to_uint8(x):
    """(B, 1 or 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8 NumPy; grey is repeated."""
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    return x.expand(*x.shape[:3], 3).cpu().numpy()


def kth_distance(queries, bank, K, chunk=2048):
    """Distance of each query (N, d) to its K-th nearest row of bank (M, d), (N,): d_K of the paper.

    q.b - |b|^2 / 2 ranks the neighbours in one matrix product; the K-th distance itself is then computed exactly.
    """
    # oneDNN multiplies up to twice as fast as the BLAS behind addmm, and NumPy selects several times as fast on a CPU
    onednn = bank.device.type == "cpu" and torch.backends.mkldnn.is_available()
    place = torch.Tensor.to_mkldnn if onednn else torch.Tensor.contiguous
    center = bank.mean(0)
    bank, d_K = bank - center, []
    rows, half = place(bank), place(-bank.square().sum(1) / 2)
    for q in queries.split(chunk):
        q = q - center
        rough = F.linear(place(q), rows, half).to_dense()  # large: near
        if rough.device.type == "cpu":
            kth = torch.from_numpy(rough.numpy().argpartition(-K)[:, -K])
        else:
            kth = (-rough).kthvalue(K).indices
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


def make_solver(config, name, steps, pixels, device):
    """A diffusers scheduler, set to `steps` steps from pure noise. In pixel space x_0 is clipped to [-1, 1]."""
    clip = {"thresholding": True, "sample_max_value": 1.0} if pixels else {}
    more = {"pndm": {"skip_prk_steps": True}, "ddim": {"clip_sample": pixels}}.get(name, clip)
    solver = getattr(diffusers, SOLVERS[name] + "Scheduler").from_config(config, **more)
    quadratic = {"timesteps": quadratic_steps(config["num_train_timesteps"] - 1, steps)}
    solver.set_timesteps(device=device, **(quadratic if name == "dpmpp" and pixels else {"num_inference_steps": steps}))
    return solver


@torch.no_grad()
def denoise(unet, solver, c, null, seeds, side, guidance):
    """Images or latents (B, C, side, side) under conditions c (B, ...), each from the noise of its own seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x = randn_tensor((len(c), unet.config.in_channels, side, side), generators, c.device, torch.float32)
    x = x * solver.init_noise_sigma
    for t in solver.timesteps:
        eps_t = guided_noise(unet, solver.scale_model_input(x, t), t, c, null, guidance - 1)
        x = solver.step(eps_t, t, x).prev_sample
    return x


def class_decoder(args, Gamma):
    """decode(v, classes, seeds) -> images in [-1, 1], v (B, d) in place of the class embedding; and their side."""
    unet, scheduler, t_max = load_diffusion(Path(args.diffusion))
    table = unet.class_embedding.weight.detach()
    if t_max < scheduler.config.num_train_timesteps:
        fail(f"{args.diffusion} was trained on t < {t_max} alone; run train_scan_diffusion.py with --t-max 1000")
    if not np.array_equal(table[:-1].numpy(), Gamma):
        fail(f"anchors.npy is not of the model in {args.diffusion}; run train_text_encoder.py again")
    unet.class_embedding = nn.Identity()  # conditions are embeddings now, not class numbers
    unet, null, side = unet.to(args.device), table[-1].to(args.device), unet.config.sample_size
    unet = torch.compile(unet) if args.compile else unet

    def decode(v, classes, seeds):
        solver = make_solver(scheduler.config, args.scheduler, args.steps, True, args.device)
        return denoise(unet, solver, v, null.expand_as(v), seeds, side, args.guidance)

    return decode, side


def class_slots(tokenizer, text_model, words, Gamma, template):
    """Token numbers (C, 77) of every class's prompt and where in it the anchored token stands, (C, 77) bool."""
    table, slots = text_model.get_input_embeddings().weight.detach(), []
    prompts = [template.replace("{class}", phrase) for _, phrase in words]
    ids = tokenize(tokenizer, text_model, prompts)
    if len(words) != len(Gamma) or Gamma.shape[1] != table.shape[1]:
        fail("anchors.npy does not fit --diffusion and class_words.txt; run train_text_encoder.py again")
    for (word, _), gamma, prompt, row in zip(words, torch.from_numpy(np.array(Gamma)), prompts, ids, strict=True):
        tokens = tokenizer(word, add_special_tokens=False).input_ids
        if torch.equal(table[tokens[0]], gamma):  # --multi-token first; for the mean all tokens are replaced
            tokens = tokens[:1]
        elif not torch.allclose(table[tokens].mean(0), gamma, atol=1e-6):
            fail(f"the anchor of '{word}' is not of --diffusion; run train_text_encoder.py again")
        slots.append(torch.isin(row, torch.tensor(tokens)))
        if not slots[-1].any():
            fail(f"the anchored token of '{word}' does not occur in '{prompt}': its outliers would be plain images", 2)
    return ids, torch.stack(slots)


def text_decoder(args, Gamma):
    """decode(v, classes, seeds) -> images in [-1, 1], v (B, d) in place of the class word's token; and their side."""
    tokenizer, text_model = load_text_model(args.diffusion)
    words = read_class_words(args.dir / "class_words.txt")
    ids, slots = class_slots(tokenizer, text_model, words, Gamma, args.prompt)
    sd = load_latent_diffusion(args.diffusion, args.dtype, args.resolution, args.device)
    text_model, ids, slots = text_model.to(args.device, sd.unet.dtype), ids.to(args.device), slots.to(args.device)
    null = encode(text_model, tokenize(tokenizer, text_model, [""]))  # (1, 77, d')
    run = torch.compile(sd.unet) if args.compile else sd.unet

    def decode(v, classes, seeds):
        c = encode(text_model, ids[classes], slots[classes], v)
        solver = make_solver(sd.config, args.scheduler, args.steps, False, args.device)
        latents = denoise(run, solver, c, null.expand_as(c), seeds, sd.side // sd.scale, args.guidance)
        return decode_latents(sd, latents)

    return decode, sd.side


def print_next(args, *commands):
    """Print what can be run now, with --dir and the recipe where the data set's name does not pick it."""
    recipe = f" --recipe {args.recipe}" * (Path(args.data.split(":")[0]).stem != args.recipe)
    print("next:", ", or ".join(f"python {command} --dir {args.dir}{recipe}" for command in commands))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/digits"), help="shared directory (default: %(default)s)")
    parser.add_argument("--diffusion", help="Stable Diffusion, hub id or folder (default: diffusion/ of --dir)")
    text = "Stable Diffusion: prompt, where {class} is the class's phrase (default: '%(default)s')"
    parser.add_argument("--prompt", default="A high-quality image of the {class}", help=text)
    text = "how candidates are kept: by d_K, as the released code does it, or at random (default: %(default)s)"
    parser.add_argument("--selection", choices=("knn", "official", "random"), default="knn", help=text)
    parser.add_argument("--inliers", action="store_true", help="DREAM-ID: sample inliers, to inliers.npy")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet: slow to start, then faster")
    parser.add_argument("--restart", action="store_true", help="make these images anew, finished or not")
    parser.add_argument("--device", help="torch device (default: cuda, mps or cpu)")
    if int(os.environ.get("RANK", 0)):
        sys.stdout = open(os.devnull, "w")  # of several processes the first one speaks
    args = parse_recipe(parser)
    args.diffusion = args.diffusion or str((args.dir / "diffusion").absolute())
    if args.keep > args.candidates or args.draw > args.boundary or args.guidance < 1:
        fail("--keep is at most --candidates, --draw at most --boundary, --guidance at least 1", 2)
    return args


def load_inputs(args):
    """Gamma (C, d), z (N, d) with labels (N,), ID images or None; checked against each other and the options."""
    writer = "train_text_encoder.py"
    Gamma = load_array(args.dir / "anchors.npy", (None, None), np.float32, writer)
    z = load_array(args.dir / "id_embeddings.npy", (None, Gamma.shape[1]), np.float32, writer)
    labels = load_array(args.dir / "id_labels.npy", z.shape[:1], np.int64, writer)
    train, shape = args.dir / "train.npy", (len(z), None, None, 3)  # where images have no size, that of train.npy
    images = load_array(train, shape, np.uint8, "the first script") if train.exists() or not args.save_size else None
    counts = np.bincount(labels, minlength=len(Gamma))
    if len(counts) > len(Gamma):
        fail(f"{args.dir / 'id_labels.npy'} has labels past the {len(Gamma)} anchors; run {writer} again")
    if counts.min() < max(args.K, 1 if args.inliers else args.boundary):
        need = f"--K {args.K} and --boundary {args.boundary}"
        fail(f"class {counts.argmin()} has {counts.min()} images in id_labels.npy, too few for {need}; lower these", 2)
    if not np.einsum("nd,nd->n", z, z).all():
        fail(f"{args.dir / 'id_embeddings.npy'} holds an embedding of length 0; run {writer} again")
    return Gamma, z, labels, images


def sample_all(folder, name, Gamma, z, labels, side, args):
    """The embeddings of every class, and what goes with them, to .partial files; room for the images."""
    sigma = (args.inlier_sigma if args.inliers else args.sigma) * math.sqrt(768 / z.shape[1])
    cosine = 1 / math.sqrt(1 + z.shape[1] * sigma**2)
    print(f"d = {z.shape[1]}, sigma = {sigma:.4f}: expected cosine of a candidate to its boundary point {cosine:.2f}")
    torch.manual_seed(args.seed)
    counts = np.full(len(Gamma), args.per_class)  # images per class
    if args.balance == "random":
        drawn = np.random.default_rng(args.seed).integers(len(Gamma), size=counts.sum())
        counts = np.bincount(drawn, minlength=len(Gamma))
    rows, percentiles, M = ["index,class,source,d_K,cosine,seed"], [], int(counts.sum())
    make_room(folder / f".partial.{name}s.npy", (M, side, side, 3)).flush()
    path = folder / f".partial.{name}_embeddings.npy"
    np.lib.format.open_memmap(path, "w+", np.float32, (M, z.shape[1])).flush()
    for c in tqdm(np.flatnonzero(counts), desc="embeddings", unit="class"):
        own, first = torch.from_numpy((labels == c).nonzero()[0]), len(rows) - 1
        unit_z = F.normalize(torch.from_numpy(z[own.numpy()]).to(args.device), dim=1)
        v, source, d_K, percentile = sample_embeddings(unit_z, -(-counts[c] // args.per_embedding), sigma, args)
        cosine, percentiles = (v * unit_z[source]).sum(1), [*percentiles, percentile.mean().item()]
        repeat = torch.arange(len(v)).repeat_interleave(args.per_embedding)[: counts[c]]
        v = (v.cpu() * np.linalg.norm(Gamma[c]).item())[repeat].numpy()
        np.load(path, mmap_mode="r+")[first : first + len(v)] = v  # a map that stays open would count as memory
        columns = (column[repeat].tolist() for column in (own[source.cpu()], d_K.cpu(), cosine.cpu()))
        for i, (s, d, cos) in enumerate(zip(*columns, strict=True), first):
            rows.append(f"{i},{c},{s},{d:.5f},{cos:.5f},{image_seed(args.seed, i)}")
    print(f"selection {args.selection}: mean percentile of d_K among a point's candidates {np.mean(percentiles):.3f}")
    save(folder / f".partial.{name}_labels.npy", np.arange(len(Gamma)).repeat(counts))
    save(folder / f".partial.{name}s.csv", "\n".join(rows) + "\n")


def contact_sheet(folder, name, images):
    """<name>s.png: two sources of each of at most ten classes: the source (where train.npy is), then images of it."""
    made = np.load(folder / f"{name}s.npy", mmap_mode="r")
    table = np.loadtxt(folder / f"{name}s.csv", delimiter=",", skiprows=1, usecols=(1, 2), ndmin=2).astype(int)
    rows, side = [], made.shape[1]
    for c in np.unique(table[:, 0])[:10]:
        for s in list(dict.fromkeys(table[table[:, 0] == c, 1]))[:2]:
            source = [] if images is None else [np.array(Image.fromarray(images[s]).resize((side, side)))]
            rows.append([*source, *made[np.flatnonzero((table == (c, s)).all(1))[:10]]])
    blank, width = np.full((side, side, 3), 255, np.uint8), max(map(len, rows))
    sheet = torch.from_numpy(np.stack([image for row in rows for image in row + [blank] * (width - len(row))]))
    sheet = F.interpolate(sheet.permute(0, 3, 1, 2) / 255, scale_factor=max(1, 64 // side))
    save_image(sheet, folder / f".partial.{name}s.png", nrow=width, pad_value=1.0)
    os.replace(folder / f".partial.{name}s.png", folder / f"{name}s.png")


def main():
    args = parse_args()
    rank, world = join_processes(args)
    Gamma, z, labels, images = load_inputs(args)
    decode, made_side = (text_decoder if is_stable_diffusion(args.diffusion) else class_decoder)(args, Gamma)
    side, name, inputs = args.save_size or images.shape[1], "inlier" if args.inliers else "outlier", hashlib.sha256()
    print(f"images of {made_side} px are made, {side} px saved" + f", resized by {args.resize}" * (side != made_side))
    for array in (Gamma, z, labels):
        inputs.update(np.ascontiguousarray(array))
    if is_stable_diffusion(args.diffusion):
        inputs.update((args.dir / "class_words.txt").read_bytes())
    settings = settings_of(args, save_size=side, resolution=made_side, inputs=inputs.hexdigest())
    if rank == 0:
        begin = lambda: sample_all(args.dir, name, Gamma, z, labels, side, args)  # noqa: E731
        open_job(args.dir, f"{name}s", settings, begin, args.restart)
    torch.distributed.barrier() if world > 1 else None
    if not (args.dir / f".partial.{name}s.json").exists():
        return
    files = [f"{name}_embeddings.npy", f"{name}_labels.npy", f"{name}s.csv", f"{name}s.npy"]

    def make(rows):
        v, classes = (np.load(args.dir / f".partial.{part}", mmap_mode="r")[rows] for part in files[:2])
        seeds = [image_seed(args.seed, i) for i in rows.tolist()]
        x = decode(torch.from_numpy(v).to(args.device), torch.from_numpy(classes).to(args.device), seeds)
        return to_uint8(resize(x, side, args.resize))

    fill_job(args.dir, f"{name}s", args.batch_size, make, rank, world)
    torch.distributed.barrier() if world > 1 else None
    if rank == 0:
        close_job(args.dir, f"{name}s", files, lambda: contact_sheet(args.dir, name, images))
        print(f"wrote {args.dir / name}s.npy, .csv, .json and a contact sheet {name}s.png (first column: the source)")
        more = f" --diffusion {args.diffusion}" * is_stable_diffusion(args.diffusion)
        print_next(args, "sample_sd_outliers.py" + more, "train_classifier.py")


if __name__ == "__main__":
    main()
