"""Paper B, step 3: semantic-discrepant outliers. Half-noise an ID image, denoise it under a class it does not have.

For an image x with pseudo-label y~: draw c_r from the other classes, noise x to
x_S = sqrt(abar_S) x + sqrt(1 - abar_S) eps, denoise from S to 0 with
eps_t = (1 + w) eps_theta(x_t, c_r) - w eps_theta(x_t). The outlier keeps the look of x and the label y~, but not its
meaning. One outlier per image.

With Stable Diffusion (--diffusion: hub id or folder) x is the latent of the image, y~ the data set's label, and the
condition the prompt of the wrong class: an extension, the paper's model is class-conditional and in pixel space.
Killed at any time, the same command goes on and ends with the same bytes; torchrun shares the work.

reads    train.npy (N, H, W, 3) uint8, pseudo_labels.npy (N,) int64, diffusion/; with Stable Diffusion train.labels.npy
         and the class names, from class_words.txt or data.json; with --split test: test.npy, test_pseudo_labels.npy
writes   sd_outliers.npy (N, H, W, 3) uint8, sd_outliers.csv (index, source, y, c_r, seed), sd_outliers.json (all
         settings), sd_outliers.png (the source above, its outlier below, with y~ -> c_r); the names end in _test with
         --split test; sd_reconstructions with --reconstruct, which denoises under c_r := y~

python sample_sd_outliers.py                                # digits 0-5: 869 outliers, seconds on two cores
python sample_sd_outliers.py --split test                   # an OOD test set made of test images
python sample_sd_outliers.py --split test --reconstruct     # does a detector see meaning, or that it was generated?
python sample_sd_outliers.py --dir runs/cifar100 --diffusion CompVis/stable-diffusion-v1-4
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import sys
import zlib
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import diffusers
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

RECIPES = {  # option: help, value per recipe. cifar10: S and w as published; the others: the same
    # cifar10-30min: 50,000 images x 10 steps x 2 conditions x 3 GFLOP at 50 TFLOP/s, our estimate: a minute
    "recipe": ("column of the table RECIPES", "digits", "cifar10", "cifar100", "imagenet100", "cifar10-30min"),
    "seed": ("seed of every random number, 0 for the first run", 0, 0, 0, 0, 0),
    "S": ("start step of the T = 1000 steps; what counts is the std of the noise, printed", 150, 100, 100, 100, 100),
    "w": ("guidance weight, 0 for none; diffusers' scale is 1 + w", 2.0, 2.0, 2.0, 2.0, 2.0),
    "steps": ("dpmpp: steps from S to 0, at most", 20, 20, 20, 20, 10),
    "resolution": ("Stable Diffusion: px at which it works, 0 for those it was trained on", 0, 0, 0, 0, 0),
    "resize": ("filter back to the size of train.npy: area|bilinear|nearest|lanczos", *["area"] * 5),
    "dtype": ("Stable Diffusion: auto|fp32|fp16|bf16 ; auto is fp16 on a GPU, else fp32", *["auto"] * 5),
    "batch_size": ("images denoised at a time, per process", 256, 256, 32, 32, 1000),
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


def wrong_class(y, classes, seed, index):
    """c_r ~ Uniform({0 .. C-1} without y) for image number `index`."""
    return int((y + np.random.default_rng((seed, index)).integers(1, classes)) % classes)


@torch.no_grad()
def half_noise_and_denoise(unet, config, x, c, null, seeds, args):
    """x_S = sqrt(abar_S) x + sqrt(1 - abar_S) eps, then denoised from S to 0 under conditions c (B, ...).

    x (B, C, H, W): pixels in [-1, 1] or latents; null: the condition that stands for none; config: of the schedule.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    eps, pixels = randn_tensor(x.shape, generators, x.device), bool(unet.config.num_class_embeds)
    abar_S = diffusers.DDPMScheduler.from_config(config).alphas_cumprod[args.S].to(x)
    x_t = abar_S.sqrt() * x + (1 - abar_S).sqrt() * eps
    if args.sampler == "dpmpp":  # 2M, in pixel space x_0 clipped to [-1, 1], on a list of steps that starts at S
        clip = {"thresholding": True, "sample_max_value": 1.0} if pixels else {}
        solver = diffusers.DPMSolverMultistepScheduler.from_config(config, **clip)
        timesteps = quadratic_steps(args.S, args.steps)
        solver.set_timesteps(timesteps=timesteps)
    else:  # ancestral sampling, every step
        solver, timesteps = diffusers.DDPMScheduler.from_config(config, clip_sample=pixels), range(args.S, -1, -1)
    for t in timesteps:
        eps_t = guided_noise(unet, x_t, t, c, null, args.w)
        x_t = solver.step(eps_t, t, x_t, generator=generators).prev_sample
    return x_t


def class_sampler(args):
    """sample(x, c_r, seeds) for images in [-1, 1] by the class-conditional model; classes, side, schedule, digest."""
    unet, scheduler, t_max = load_diffusion(Path(args.diffusion))
    if args.S >= t_max:
        fail(f"--S is {args.S}; it must be below {t_max}, for which the model in {args.diffusion} was trained", 2)
    null, unet = unet.config.num_class_embeds - 1, unet.to(args.device)
    run = torch.compile(unet) if args.compile else unet

    def sample(x, c_r, seeds):
        x, c = x[:, : unet.config.in_channels], torch.tensor(c_r, device=args.device)
        return half_noise_and_denoise(run, scheduler.config, x, c, torch.full_like(c, null), seeds, args)

    model = zlib.crc32(b"".join(p.detach().cpu().numpy().tobytes() for p in unet.parameters()))
    return sample, null, unet.config.sample_size, scheduler.config, model


def text_sampler(args, classes):
    """The same with Stable Diffusion: latents of the images, and prompts of the classes as conditions."""
    words = args.class_words or args.dir / "class_words.txt"
    if args.class_words or words.exists() or not classes:
        phrases = [phrase for _, phrase in read_class_words(words)]
    else:
        phrases = [name.replace("_", " ") for name in classes]
    tokenizer, text_model = load_text_model(args.diffusion)
    sd = load_latent_diffusion(args.diffusion, args.dtype, args.resolution, args.device)
    if args.S >= sd.config["num_train_timesteps"]:
        fail(f"--S is {args.S}; it must be below {sd.config['num_train_timesteps']}", 2)
    text_model, side = text_model.to(args.device, sd.unet.dtype), sd.side
    prompts = [args.prompt.replace("{class}", phrase) for phrase in phrases]
    ids = tokenize(tokenizer, text_model, [*prompts, ""])
    if len({tuple(row) for row in ids.tolist()}) <= len(phrases):
        fail(f"two classes have the same prompt, or one is empty: {', '.join(prompts[:3])} ...; mend --class-words", 2)
    conditions = torch.cat([encode(text_model, part) for part in ids.split(32)])  # (C + 1, 77, d'), the last is empty
    run = torch.compile(sd.unet) if args.compile else sd.unet

    def sample(x, c_r, seeds):
        x = F.interpolate(x, (side, side), mode="bicubic").clamp(-1, 1) if x.shape[-1] != side else x
        z = torch.cat([sd.vae.encode(part).latent_dist.mean for part in x.split(4)]) * sd.vae.config.scaling_factor
        c, null = conditions[c_r], conditions[-1:].expand(len(x), -1, -1)
        return decode_latents(sd, half_noise_and_denoise(run, sd.config, z, c, null, seeds, args))

    return torch.no_grad()(sample), len(phrases), None, sd.config, prompts


def captioned_sheet(path, images, y, c_r, columns=12):
    """Up to three double rows: a source above, its outlier below (from the .npy beside), with y -> c_r between them."""
    outliers = np.load(path.with_suffix(".npy"), mmap_mode="r")
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
    text = "Stable Diffusion: a line per class, its phrase of the prompt (default: class_words.txt, else data.json)"
    parser.add_argument("--class-words", type=Path, help=text)
    text = "images to start from: train, or test for an OOD test set (default: %(default)s)"
    parser.add_argument("--split", choices=("train", "test"), default="train", help=text)
    text = "denoise under c_r := y: copies that keep their label"
    parser.add_argument("--reconstruct", action="store_true", help=text)
    text = "dpmpp: DPM-Solver++ 2M in --steps steps; ddpm: ancestral, S + 1 steps (default: %(default)s)"
    parser.add_argument("--sampler", choices=("dpmpp", "ddpm"), default="dpmpp", help=text)
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet: slow to start, then faster")
    parser.add_argument("--restart", action="store_true", help="make these images anew, finished or not")
    parser.add_argument("--device", help="torch device (default: cuda, mps or cpu)")
    if int(os.environ.get("RANK", 0)):
        sys.stdout = open(os.devnull, "w")  # of several processes the first one speaks
    args = parse_recipe(parser)
    args.diffusion = args.diffusion or str((args.dir / "diffusion").absolute())
    if args.sampler == "dpmpp" and args.steps > args.S:
        fail(f"--S is {args.S}; it must be at least --steps, {args.steps}", 2)
    return args


def main():
    args = parse_args()
    rank, world = join_processes(args)
    text, split = is_stable_diffusion(args.diffusion), args.split
    if text:
        sample, classes, side, config, model = text_sampler(args, read_description(args.dir).get("classes"))
    else:
        sample, classes, side, config, model = class_sampler(args)
    images = load_array(args.dir / f"{split}.npy", (None, side, side, 3), np.uint8, "the first script of the run")
    label_name = f"{split}.labels" if text else "test_" * (split == "test") + "pseudo_labels"
    writer = "the first script with labelled --data" if text else "train_scan_diffusion.py"
    y = load_array(args.dir / f"{label_name}.npy", images.shape[:1], np.int64, writer)
    if y.max() >= classes or classes < 2:
        fail(f"{label_name}.npy goes up to {y.max()}, but {args.diffusion} knows {classes} classes; it takes 2 or more")
    abar_S = diffusers.DDPMScheduler.from_config(config).alphas_cumprod[args.S].item()
    print(f"S = {args.S}: abar_S = {abar_S:.4f}, std of the noise {math.sqrt(1 - abar_S):.3f}")

    side, seeds = images.shape[1], [image_seed(args.seed, i) for i in range(len(images))]
    c_r = [int(label) if args.reconstruct else wrong_class(label, classes, args.seed, i) for i, label in enumerate(y)]
    stem = ("sd_reconstructions" if args.reconstruct else "sd_outliers") + "_test" * (split == "test")

    def begin():
        rows = [f"{i},{i},{y[i]},{c_r[i]},{seeds[i]}" for i in range(len(images))]
        save(args.dir / f".partial.{stem}.csv", "\n".join(["index,source,y,c_r,seed", *rows]) + "\n")
        make_room(args.dir / f".partial.{stem}.npy", images.shape).flush()

    def make(rows):
        x = torch.from_numpy(images[rows]).to(args.device).permute(0, 3, 1, 2) / 127.5 - 1
        x = sample(x, [c_r[i] for i in rows], [seeds[i] for i in rows])
        return to_uint8(resize(x, side, args.resize))

    if rank == 0:
        inputs = hashlib.sha256(np.ascontiguousarray(y))
        for block in tqdm(np.array_split(images, -(-images.nbytes // 2**28)), "reading", delay=1):  # 256 MB at a time
            inputs.update(np.ascontiguousarray(block))
        settings = settings_of(args, inputs=inputs.hexdigest(), model=model)
        open_job(args.dir, stem, settings, begin, args.restart)
    torch.distributed.barrier() if world > 1 else None
    if not (args.dir / f".partial.{stem}.json").exists():
        return
    fill_job(args.dir, stem, args.batch_size, make, rank, world)
    torch.distributed.barrier() if world > 1 else None
    if rank == 0:
        draw = lambda: captioned_sheet(args.dir / f"{stem}.png", images, y, c_r)  # noqa: E731
        close_job(args.dir, stem, [f"{stem}.csv", f"{stem}.npy"], draw)
        print(f"wrote {len(images)} images to {args.dir / stem}.npy, .csv, .json and a contact sheet {stem}.png")
        print_next(args, "train_classifier.py")


if __name__ == "__main__":
    main()
