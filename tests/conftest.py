"""Shared by all tests: scripts as modules and as subprocesses, tiny runs of the pipeline."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers: nothing is downloaded
os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch: threads that spin slow a busy machine tenfold

ROOT = Path(__file__).resolve().parents[1]
WORDS = "a high quality image of the zero one two three four photo digit"
SMALL = "--K 6 --boundary 6 --draw 6 --candidates 16 --per-class 12 --steps 4"
SMALL = SMALL.split()
FEW_EPOCHS = ["--epochs", 2, "--dream-epochs", 2, "--sd-epochs", 2]
PIECES = ["por", "cup", "ine</w>"]  # porcupine: three tokens, as in CLIP's own vocabulary


@pytest.fixture(scope="session")
def load():
    """load(name): a script of the repository as a module; sys.modules and sys.path stay as they
    are.
    """

    @cache
    def load(name):
        spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def run():
    """run(script, *args, cwd=None): a script of the repository as a subprocess, with its output
    captured as text.
    """

    def run(script, *args, cwd=None, timeout=300):
        command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, args)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)

    return run


@pytest.fixture
def main(load, monkeypatch):
    """main(script, *args): the main() of a script within this process."""

    def main(script, *args):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, args)])
        load(script).main()

    return main


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, run):
    """Shared directory left by the six scripts on digits 0-2, each at its smallest sensible
    size. Copy it to change it.

    K = 6, 12 outliers per class, 16 candidates per boundary point, sigma and S as in the recipe.
    """
    folder = tmp_path_factory.mktemp("tiny") / "run"

    def step(script, *args):
        done = run(script, "--dir", folder, *args)
        assert done.returncode == 0, (
            f"{script} {args} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        )

    def lane(*steps):
        for arguments in steps:
            step(*arguments)

    scan = "--pretext-epochs 6 --pretext-batch 128 --scan-epochs 8 --selflabel-epochs 1"
    unet = "--channels", "32,32", "--steps", 60, "--batch-size", 32
    step("train_scan_diffusion", "--data", "digits:0-2", *scan.split(), *unet)
    paper_a = [
        ("train_text_encoder", "--epochs", 2),
        ("sample_outliers", *SMALL),
        ("sample_outliers", "--inliers", *SMALL),
    ]
    test = "sample_sd_outliers", "--steps", 4, "--split", "test"
    paper_b = [("sample_sd_outliers", "--steps", 4), test, (*test, "--reconstruct")]
    with ThreadPoolExecutor(2) as pool:
        for lane_done in [pool.submit(lane, *steps) for steps in (paper_a, paper_b)]:
            lane_done.result()
    step("train_classifier", *FEW_EPOCHS)
    step("evaluate", "--ood-data", "digits:6-7", "patches", "--bootstrap", 20)
    return folder


def build_stable_diffusion(folder, full_size=False):
    """A Stable Diffusion of the real classes with random weights, 16 px, in diffusers' layout;
    returns the folder.

    Each of WORDS is one token, porcupine is three; every other word falls apart into letters.
    """
    import torch
    from diffusers import (
        AutoencoderKL,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + ["-"]
    tokens, merges = [*letters, *(f"{letter}</w>" for letter in letters)], []
    for piece in [f"{word}</w>" for word in WORDS.split()] + PIECES:
        end = "</w>" if piece.endswith("</w>") else ""
        rest = list(piece.removesuffix("</w>"))
        rest[-1] += end
        while len(rest) > 1:  # from the left: z e, ze r, zer o</w>
            if (merge := f"{rest[0]} {rest[1]}") not in merges:
                merges.append(merge)
                tokens.append(rest[0] + rest[1])
            rest = [rest[0] + rest[1], *rest[2:]]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "words").mkdir(parents=True)
    (folder / "words" / "vocab.json").write_text(
        json.dumps({token: i for i, token in enumerate(tokens)})
    )
    (folder / "words" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words", model_max_length=77)
    shutil.rmtree(folder / "words")
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
    ends["pad_token_id"] = len(tokens) - 1
    sizes = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    shape = dict(zip(sizes, (32, 64, 2, 4), strict=True))
    unet = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "sample_size": 8}
    unet["layers_per_block"] = 1
    unet |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "block_out_channels": (16, 32)}
    unet |= {"cross_attention_dim": 32, "attention_head_dim": 8, "norm_num_groups": 8}
    vae = {"sample_size": 16, "block_out_channels": (16, 16), "norm_num_groups": 8}
    if full_size:  # the configuration of Stable Diffusion 1.4
        shape = dict(zip(sizes, (768, 3072, 12, 12), strict=True))
        unet = {"cross_attention_dim": 768, "sample_size": 64}
        vae = {"block_out_channels": (128, 256, 512, 512), "sample_size": 512}
        vae["layers_per_block"] = 2
    text_model = CLIPTextModel(
        CLIPTextConfig(vocab_size=len(tokens), **ends, **shape, max_position_embeddings=77)
    )
    table = text_model.get_input_embeddings().weight
    table.data *= 0.39 / table.data.norm(
        dim=1, keepdim=True
    )  # the norm of the rows of CLIP ViT-L/14
    levels = len(vae["block_out_channels"])
    vae |= {"down_block_types": ("DownEncoderBlock2D",) * levels}
    vae |= {"up_block_types": ("UpDecoderBlock2D",) * levels}
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    schedule |= {"steps_offset": 1, "skip_prk_steps": True, "set_alpha_to_one": False}
    StableDiffusionPipeline(
        AutoencoderKL(**vae),
        text_model,
        tokenizer,
        UNet2DConditionModel(**unet),
        PNDMScheduler(**schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    """Folder of build_stable_diffusion."""
    return build_stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def sd_run(tmp_path_factory, run, tiny_sd):
    """Shared directory left by paper A's scripts and paper B's sampler on digits 0-2 with the
    tiny Stable Diffusion.

    Classes: zero, one, and porcupine, a word of three tokens. K = 6, 12 outliers per class.
    """
    folder = tmp_path_factory.mktemp("sd-run") / "run"
    (folder.parent / "words.txt").write_text("zero\none\nporcupine: high-quality porcupine\n")
    words = "--class-words", folder.parent / "words.txt"
    sd = "--diffusion", tiny_sd
    for script, *args in (
        ("train_scan_diffusion", "--data", "digits:0-2", "--until", "data"),
        ("train_text_encoder", *sd, "--epochs", 4, *words),
        ("sample_outliers", *sd, "--scheduler", "pndm", "--guidance", 7.5, *SMALL),
        ("sample_sd_outliers", *sd, "--S", 100, "--steps", 4),
        ("train_classifier", "--method", "ce", "dream", "sd", *FEW_EPOCHS),
        ("evaluate", "--ood-data", "digits:6-7", "--bootstrap", 20),
    ):
        done = run(script, "--dir", folder, *args)
        assert done.returncode == 0, (
            f"{script} {args} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        )
        (folder.parent / f"{script}.log").write_text(done.stdout)
    return folder
