"""Paper A and B with a Stable Diffusion checkpoint: a tiny one of the real classes, loaded through the same path."""

import argparse
import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PNDMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import sample_outliers
import sample_sd_outliers
import train_text_encoder

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--K", 6, "--boundary", 6, "--draw", 6, "--candidates", 16, "--per-class", 12, "--steps", 4]
PROMPT = "A high-quality image of the {class}"
SCRIPTS = (train_text_encoder, sample_outliers, sample_sd_outliers)


def options(folder, **given):
    plain = {"diffusion": str(folder), "device": "cpu", "compile": False, "dtype": "auto", "prompt": PROMPT}
    return argparse.Namespace(**(plain | {"resolution": 0, "scheduler": "pndm", "steps": 5, "guidance": 7.5} | given))


@pytest.fixture
def words(tmp_path):
    """words(*lines): a folder with that class_words.txt."""

    def words(*lines):
        (tmp_path / "class_words.txt").write_text("\n".join(lines) + "\n")
        return tmp_path

    return words


@pytest.fixture(scope="module")
def text(tiny_sd):
    return sample_outliers.load_text_model(str(tiny_sd))


# Anchors


def test_anchors_are_rows_of_the_token_table(text, capsys):
    tokenizer, text_model = text
    table = text_model.get_input_embeddings().weight.detach()
    row = {token: table[i] for token, i in tokenizer.get_vocab().items()}
    words = [("zero", "zero"), ("porcupine", "porcupine"), ("one", "two one")]
    first = train_text_encoder.token_anchors(tokenizer, text_model, words, "first")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert torch.equal(first, torch.stack([row["zero</w>"], row["por"], row["one</w>"]]))
    ids = {token: i for token, i in tokenizer.get_vocab().items()}
    assert lines[2] == ["1", "porcupine", "por", "cup", "ine</w>", str(ids["por"]), "(first)"]
    assert lines[1] == ["0", "zero", "zero</w>", str(ids["zero</w>"])] and lines[3][:3] == ["2", "two", "one"]
    mean = train_text_encoder.token_anchors(tokenizer, text_model, words, "mean")
    assert torch.equal(mean[[0, 2]], first[[0, 2]])
    assert torch.allclose(mean[1], (row["por"] + row["cup"] + row["ine</w>"]) / 3)
    assert (mean[1] - first[1]).norm() > 0.1
    assert "mean of" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train_text_encoder.token_anchors(tokenizer, text_model, words, "error")
    captured = capsys.readouterr()
    assert "por cup ine</w>" in captured.out  # the table comes first
    assert re.fullmatch(r"[^\n]*porcupine \(por cup ine</w>\); give others in --class-words\n", captured.err)
    train_text_encoder.token_anchors(tokenizer, text_model, words[:1], "error")


def test_a_word_outside_the_vocabulary_stops(text, capsys):
    with pytest.raises(SystemExit):
        train_text_encoder.token_anchors(*text, [("zero", "zero"), ("日本", "日本")], "first")
    assert "'日本', the word of class 1" in capsys.readouterr().err


def test_released_words():
    items = [item.split(":")[0].strip() for item in train_text_encoder.CLASS_WORDS.split(";")]
    wnids = [name for name in items if re.fullmatch(r"n\d{8}", name)]
    assert len(wnids) == 100 and wnids == sorted(set(wnids)) and len(items) == len(set(items))
    names = ["aquarium_fish", "bear", "chimpanzee", "lawn_mower", "n01498041", "n03804744", "n07745940", "night_owl"]
    expected = [("fish", "aquarium fish"), ("bear", "bear"), ("chimp", "chimp"), ("mower", "lawn-mower")]
    expected += [("stingray", "stingray in the water"), ("nail", "wire nail"), ("strawberry", "strawberry")]
    assert train_text_encoder.default_words(names) == [*expected, ("night owl", "night owl")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_class_words_files(script, words, capsys):
    path = words("cat", "fish: aquarium fish ") / "class_words.txt"
    assert script.read_class_words(path) == [("cat", "cat"), ("fish", "aquarium fish")]
    for wrong in ("cat\n\ndog\n", "a: b: c\n", ": fish\n", ""):
        path.write_text(wrong)
        with pytest.raises(SystemExit):
            script.read_class_words(path)
        assert "class_words.txt must hold a line per class" in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_a_stable_diffusion(script, tiny_sd, tiny_run):
    assert script.is_stable_diffusion(str(tiny_sd)) and script.is_stable_diffusion("CompVis/stable-diffusion-v1-4")
    assert not script.is_stable_diffusion(str(tiny_run / "diffusion"))
    assert not script.is_stable_diffusion("runs/digits/diffusion") and not script.is_stable_diffusion("diffusion")


# Injection


def test_injecting_the_tokens_own_row_changes_nothing(text):
    tokenizer, text_model = text
    table, ids = text_model.get_input_embeddings().weight.detach(), tokenizer.get_vocab()
    prompts = ["A high-quality image of the zero", "the two of a photo", "porcupine"]
    tokens = torch.tensor([ids["zero</w>"], ids["two</w>"], ids["por"]])
    numbers = sample_outliers.tokenize(tokenizer, text_model, prompts)
    assert numbers.shape == (3, 77) and (numbers == tokens[:, None]).any(1).all()
    plain = sample_outliers.encode(text_model, numbers)
    with torch.no_grad():
        assert torch.equal(plain, text_model(numbers).last_hidden_state)
    assert torch.equal(plain, sample_outliers.encode(text_model, numbers, numbers == tokens[:, None], table[tokens]))
    assert torch.equal(plain, sample_outliers.encode(text_model, numbers))  # the hook is gone


def test_injecting_is_editing_the_table_in_every_place(text):
    tokenizer, text_model = text
    weight, one = text_model.get_input_embeddings().weight, tokenizer.get_vocab()["one</w>"]
    numbers = sample_outliers.tokenize(tokenizer, text_model, ["one photo of the one", "zero of one"])
    embeddings = torch.randn(2, 32) * 0.07
    made = sample_outliers.encode(text_model, numbers, numbers == one, embeddings)
    assert (numbers == one).sum(1).tolist() == [2, 1]
    for i in range(2):
        before = weight[one].detach().clone()
        with torch.no_grad():
            weight[one] = embeddings[i]
            edited = text_model(numbers[[i]]).last_hidden_state
            weight[one] = before
        assert torch.allclose(made[i], edited[0], atol=1e-6)
    assert (made - sample_outliers.encode(text_model, numbers)).abs().max() > 0.01


def test_slots_of_first_and_of_mean(text):
    tokenizer, text_model = text
    pieces = [tokenizer.get_vocab()[token] for token in ("por", "cup", "ine</w>")]
    for policy, count in (("first", 1), ("mean", 3)):
        Gamma = train_text_encoder.token_anchors(tokenizer, text_model, [("porcupine", "porcupine")], policy)
        arguments = tokenizer, text_model, [("porcupine", "porcupine")], Gamma.numpy(), PROMPT
        ids, slots = sample_outliers.class_slots(*arguments)
        assert ids[slots].tolist() == pieces[:count]


@pytest.mark.parametrize("name", ["pndm", "dpmpp", "unipc", "ddim"])
def test_the_original_row_gives_the_image_of_the_stock_pipeline(tiny_sd, text, words, name):
    tokenizer, text_model = text
    folder, args = words("zero", "one: two one"), options(tiny_sd, scheduler=name)
    Gamma = text_model.get_input_embeddings().weight.detach()[
        [tokenizer.get_vocab()[token] for token in ("zero</w>", "one</w>")]
    ]
    args.dir = folder
    decode, side = sample_outliers.text_decoder(args, Gamma.numpy())
    images = decode(Gamma, torch.tensor([0, 1]), [11, 12])
    assert side == 16 and images.shape == (2, 3, 16, 16)
    kinds = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = StableDiffusionPipeline(**{part: from_folder(tiny_sd, part) for part in PARTS}, **kinds)
    kind = getattr(sample_outliers.diffusers, sample_outliers.SOLVERS[name] + "Scheduler")
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **({"clip_sample": False} if name == "ddim" else {}))
    pipe.set_progress_bar_config(disable=True)
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (11, 12)])
    prompts = ["A high-quality image of the zero", "A high-quality image of the two one"]
    stock = pipe(prompts, num_inference_steps=5, guidance_scale=7.5, latents=noise, output_type="pt").images
    assert (images - (stock * 2 - 1)).abs().max() < 1e-3
    assert (images[0] - images[1]).abs().max() > 0.01


PARTS = {"tokenizer": "CLIPTokenizer", "text_encoder": "CLIPTextModel"}
PARTS |= {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "PNDMScheduler"}


def from_folder(folder, part):
    import diffusers
    import transformers

    kind = getattr(transformers, PARTS[part], None) or getattr(diffusers, PARTS[part])
    return kind.from_pretrained(folder, subfolder=part)


def test_embeddings_in_one_batch_do_not_touch_each_other(tiny_sd, text, words):
    tokenizer, text_model = text
    Gamma = train_text_encoder.token_anchors(tokenizer, text_model, [("zero", "zero"), ("one", "one")], "first")
    args = options(tiny_sd, dir=words("zero", "one"), scheduler="dpmpp")
    decode, _ = sample_outliers.text_decoder(args, Gamma.numpy())
    v, classes, seeds = Gamma + 0.05 * torch.randn(2, 32), torch.tensor([0, 1]), [3, 4]
    both = decode(v, classes, seeds)
    alone = torch.cat([decode(v[[i]], classes[[i]], seeds[i : i + 1]) for i in range(2)])
    assert (both - alone).abs().max() < 1e-5
    swapped = decode(v.flip(0), classes, seeds)
    assert (both - swapped).abs().max() > 1e-3


def test_half_precision_is_close(tiny_sd, text, words):
    tokenizer, text_model = text
    Gamma = train_text_encoder.token_anchors(tokenizer, text_model, [("zero", "zero")], "first")
    images = {}
    for dtype in ("fp32", "bf16"):
        args = options(tiny_sd, dir=words("zero"), dtype=dtype, steps=3, scheduler="ddim")
        decode, _ = sample_outliers.text_decoder(args, Gamma.numpy())
        images[dtype] = decode(Gamma, torch.tensor([0]), [5])
    assert images["bf16"].dtype == torch.float32  # the VAE is
    assert 0 < (images["bf16"] - images["fp32"]).abs().mean() < 0.05


# The whole pipeline


def test_files_of_the_run_with_stable_diffusion(sd_run, tiny_sd, text):
    table, tokenizer = text[1].get_input_embeddings().weight.detach().numpy(), text[0]
    Gamma = np.load(sd_run / "anchors.npy")
    assert (Gamma == table[[tokenizer.get_vocab()[token] for token in ("zero</w>", "one</w>", "por")]]).all()
    assert (sd_run / "class_words.txt").read_text().splitlines()[2] == "porcupine: high-quality porcupine"
    assert (np.load(sd_run / "id_labels.npy") == np.load(sd_run / "train.labels.npy")).all()
    assert not (sd_run / "pseudo_labels.npy").exists() and not (sd_run / "diffusion").exists()
    outliers, embeddings = np.load(sd_run / "outliers.npy"), np.load(sd_run / "outlier_embeddings.npy")
    assert outliers.shape == (36, 8, 8, 3) and outliers.dtype == np.uint8 and embeddings.shape == (36, 32)
    assert len(np.unique(outliers.reshape(36, -1), axis=0)) == 36 and outliers.std() > 5
    assert np.load(sd_run / "outlier_labels.npy").tolist() == [0] * 12 + [1] * 12 + [2] * 12
    settings = json.loads((sd_run / "outliers.json").read_text())
    expected = {"diffusion": str(tiny_sd), "prompt": PROMPT, "scheduler": "pndm", "steps": 4, "guidance": 7.5}
    assert settings.items() >= (expected | {"resolution": 16, "save_size": 8, "resize": "area", "seed": 0}).items()
    log = (sd_run.parent / "train_text_encoder.log").read_text()
    assert re.search(r"^ +2  high-quality porcupine +por cup ine</w> +\d+ \(first\)$", log, re.M)
    results = json.loads((sd_run / "results.json").read_text())
    scores = {("dream", "energy"), ("dream", "phi"), ("ce", "msp"), ("sd", "distance+voting")}
    assert {(r["method"], r["score"]) for r in results} >= scores
    for method in ("ce", "dream", "sd"):  # the outliers know the data set's labels: nothing is matched
        config = torch.load(sd_run / f"classifier_{method}.pt", weights_only=True)["config"]
        assert config["whose_labels"] == "dataset"
    assert all(0 <= r["auroc"] <= 1 for r in results)
    assert not [path for path in sd_run.iterdir() if "partial" in path.name]


def test_an_outlier_can_be_made_again_from_its_embedding_and_seed(sd_run, tiny_sd):
    with open(sd_run / "outliers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    args = options(tiny_sd, dir=sd_run, steps=4)
    decode, _ = sample_outliers.text_decoder(args, np.load(sd_run / "anchors.npy"))
    for i in (0, 17, 35):
        v = torch.from_numpy(np.load(sd_run / "outlier_embeddings.npy")[[i]])
        image = decode(v, torch.tensor([int(rows[i]["class"])]), [int(rows[i]["seed"])])
        again = sample_outliers.to_uint8(image.view(1, 3, 8, 2, 8, 2).mean((3, 5)))
        assert np.abs(again.astype(int) - np.load(sd_run / "outliers.npy")[i]).max() <= 1


def test_paper_b_with_prompts(sd_run, tiny_sd):
    """A source of the run by hand: encode, noise to S, denoise under the wrong class's prompt, decode, reduce."""
    images, labels = np.load(sd_run / "train.npy"), np.load(sd_run / "train.labels.npy")
    made = np.load(sd_run / "sd_outliers.npy")
    with open(sd_run / "sd_outliers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert made.shape == images.shape and [int(row["y"]) for row in rows] == labels.tolist()
    assert all(row["y"] != row["c_r"] for row in rows)
    parts = {part: from_folder(tiny_sd, part) for part in PARTS}
    phrases, abar = ["zero", "one", "high-quality porcupine"], parts["scheduler"].alphas_cumprod[100]
    for i in (0, 200):
        prompts = [PROMPT.replace("{class}", phrases[int(rows[i]["c_r"])]), ""]
        ids = parts["tokenizer"](prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
        x = torch.from_numpy(images[[i]]).permute(0, 3, 1, 2) / 127.5 - 1
        x = torch.nn.functional.interpolate(x, (16, 16), mode="bicubic").clamp(-1, 1)
        eps = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(int(rows[i]["seed"])))
        solver = DPMSolverMultistepScheduler.from_config(parts["scheduler"].config)
        solver.set_timesteps(timesteps=[100, 44, 11, 0])
        with torch.no_grad():
            c, null = parts["text_encoder"](ids).last_hidden_state.split(1)
            z = parts["vae"].encode(x).latent_dist.mode() * parts["vae"].config.scaling_factor
            x_t = abar.sqrt() * z + (1 - abar).sqrt() * eps
            for t in solver.timesteps:
                eps_c, free = (parts["unet"](x_t, t, condition).sample for condition in (c, null))
                x_t = solver.step(3 * eps_c - 2 * free, t, x_t).prev_sample
            out = parts["vae"].decode(x_t / parts["vae"].config.scaling_factor).sample.clamp(-1, 1)
        out = sample_outliers.to_uint8(out.view(1, 3, 8, 2, 8, 2).mean((3, 5)))
        assert np.abs(out.astype(int) - made[i]).max() <= 1


# Interruptions, processes, settings


def sampler(folder, diffusion, *args, launcher=()):
    command = [sys.executable, *launcher, str(ROOT / "sample_outliers.py"), "--dir", str(folder)]
    command += ["--diffusion", str(diffusion), *map(str, SMALL), "--per-class", "60", "--batch-size", "4", *args]
    return command


ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
OUTPUTS = ["outliers.npy", "outliers.csv", "outlier_embeddings.npy", "outlier_labels.npy"]


@pytest.fixture
def inputs(sd_run, tmp_path):
    """Copy of what sample_outliers.py reads."""
    return shutil.copytree(sd_run, tmp_path / "run", ignore=shutil.ignore_patterns("*outlier*", "*.pt", "scores"))


@pytest.fixture(scope="module")
def undisturbed(sd_run, tiny_sd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    shutil.copytree(sd_run, folder, ignore=shutil.ignore_patterns("*outlier*", "*.pt", "scores"))
    subprocess.run(sampler(folder, tiny_sd), env=ONE_THREAD, check=True, capture_output=True, timeout=300)
    return folder


def test_killed_three_times_it_ends_with_the_same_bytes(inputs, tiny_sd, undisturbed):
    seen = [0]
    record = inputs / ".partial.outliers.done0"
    for _ in range(3):
        target = seen[-1] + random.randint(4, 40)  # rows of 180
        process = subprocess.Popen(sampler(inputs, tiny_sd), env=ONE_THREAD, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not record.exists() or record.stat().st_size // 8 < target):
            time.sleep(random.uniform(0.001, 0.02))
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen.append(record.stat().st_size // 8)
        assert seen[-2] < seen[-1] < 180 and not (inputs / "outliers.npy").exists()
    with open(record, "ab") as file:
        file.write(b"\x07\x00\x00")  # a row number that was cut off
    done = subprocess.run(sampler(inputs, tiny_sd), env=ONE_THREAD, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "selection" not in done.stdout, done.stderr  # embeddings are not drawn again
    for name in OUTPUTS:
        assert (inputs / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert not [path for path in inputs.iterdir() if "partial" in path.name]


def test_two_processes_make_the_images_of_one(inputs, tiny_sd, undisturbed):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = sampler(inputs, tiny_sd, launcher=launcher)
    done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    for name in OUTPUTS:
        assert (inputs / name).read_bytes() == (undisturbed / name).read_bytes(), name


def test_jobs_open_resume_and_refuse(tmp_path, capsys):
    began, made = [], []
    settings = {"seed": 0, "sigma": 0.03}

    def begin():
        began.append(1)
        np.lib.format.open_memmap(tmp_path / ".partial.x.npy", "w+", np.uint8, (5, 2, 2, 3)).flush()

    def make(rows):
        made.extend(rows.tolist())
        if len(made) == 4:
            raise KeyboardInterrupt
        return np.broadcast_to(rows[:, None, None, None], (len(rows), 2, 2, 3)).astype(np.uint8)

    def work(settings, restart=False):
        sample_outliers.open_job(tmp_path, "x", settings, begin, restart)
        if (tmp_path / ".partial.x.json").exists():
            sample_outliers.fill_job(tmp_path, "x", 2, make, 0, 1)
            sample_outliers.close_job(tmp_path, "x", ["x.npy"], lambda: None)

    with pytest.raises(KeyboardInterrupt):
        work(settings)
    assert made == [0, 1, 2, 3] and began == [1]  # the second block was not finished
    with pytest.raises(SystemExit):
        work(settings | {"sigma": 0.07})
    assert "unfinished x with sigma 0.03, not 0.07" in capsys.readouterr().err
    work(settings)
    assert made == [0, 1, 2, 3, 2, 3, 4] and began == [1]
    assert (np.load(tmp_path / "x.npy")[:, 0, 0, 0] == np.arange(5)).all()
    assert json.loads((tmp_path / "x.json").read_text()) == settings
    work(settings)
    assert len(made) == 7 and "complete for these settings" in capsys.readouterr().out
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(SystemExit):
        work(settings)
    (line,) = capsys.readouterr().err.splitlines()
    assert "x.json beside it is damaged; give --restart" in line
    work(settings, restart=True)
    assert len(made) == 12 and began == [1, 1]
    work(settings | {"seed": 1})  # finished work of other settings is replaced
    assert len(made) == 17 and json.loads((tmp_path / "x.json").read_text())["seed"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.npy"]


def test_an_interruption_between_the_last_steps_is_mended(inputs, tiny_sd, main, monkeypatch):
    arguments = ["--dir", inputs, "--diffusion", tiny_sd, *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(Image, "fromarray", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))  # while drawing
        with pytest.raises(KeyboardInterrupt):
            main("sample_outliers", *arguments)
    assert (inputs / "outliers.npy").exists() and not (inputs / "outliers.json").exists()
    before = (inputs / "outliers.npy").stat().st_mtime_ns
    main("sample_outliers", *arguments)
    assert (inputs / "outliers.npy").stat().st_mtime_ns == before
    assert (inputs / "outliers.json").exists() and (inputs / "outliers.png").exists()


def test_images_per_embedding_and_released_balance(inputs, tiny_sd, main):
    main("sample_outliers", "--dir", inputs, "--diffusion", tiny_sd, *SMALL, "--per-embedding", 4, "--per-class", 10)
    v, images = np.load(inputs / "outlier_embeddings.npy"), np.load(inputs / "outliers.npy")
    assert len(v) == 30 and len(np.unique(v, axis=0)) == 9  # 4 + 4 + 2 of each class
    assert (v[:4] == v[0]).all() and (v[8:10] == v[8]).all() and len(np.unique(images, axis=0)) == 30
    main("sample_outliers", "--dir", inputs, "--diffusion", tiny_sd, *SMALL, "--balance", "random", "--seed", 5)
    counts = np.bincount(np.load(inputs / "outlier_labels.npy"), minlength=3)
    assert counts.sum() == 36 and len(set(counts)) > 1 and len(np.load(inputs / "outliers.npy")) == 36


def test_saved_size_and_resize_are_recorded(inputs, tiny_sd, main):
    for how, side in (("lanczos", 12), ("nearest", 16)):
        more = "--save-size", side, "--resize", how, "--resolution", 16, "--guidance", 1, "--scheduler", "ddim"
        main("sample_outliers", "--dir", inputs, "--diffusion", tiny_sd, *SMALL, *more)
        assert np.load(inputs / "outliers.npy").shape == (36, side, side, 3)
        settings = json.loads((inputs / "outliers.json").read_text())
        assert (settings["save_size"], settings["resize"], settings["resolution"]) == (side, how, 16)


def test_other_words_and_other_models_make_other_sd_outliers(inputs, tiny_sd, tiny_run, tmp_path, main, capsys):
    arguments = "--dir", inputs, "--diffusion", tiny_sd, "--steps", 2, "--S", 50
    main("sample_sd_outliers", *arguments)
    first = np.load(inputs / "sd_outliers.npy")
    (tmp_path / "words.txt").write_text("two\nthree\nfour\n")
    main("sample_sd_outliers", *arguments, "--class-words", tmp_path / "words.txt")
    assert "complete" not in capsys.readouterr().out
    assert (np.load(inputs / "sd_outliers.npy") != first).any()
    copy = shutil.copytree(tiny_run, tmp_path / "own", ignore=shutil.ignore_patterns("*outlier*", "*.pt", "scores"))
    for expected in (False, True, False):
        main("sample_sd_outliers", "--dir", copy, "--steps", 2)
        assert ("complete for these settings" in capsys.readouterr().out) == expected
        if expected:  # trained anew: every weight moves a little
            path = copy / "diffusion" / "unet" / "diffusion_pytorch_model.safetensors"
            weights = {name: tensor + 1e-3 for name, tensor in load_file(path).items()}
            save_file(weights, path, metadata={"format": "pt"})


# Bad input


@pytest.fixture
def stops(inputs, main, capfd):
    """stops(script, *args): it ends with one line, returned, and changes nothing in the shared directory."""

    def stops(script, *args):
        before = {path.name: path.read_bytes() for path in inputs.iterdir() if path.is_file()}
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main(script, "--dir", inputs, *args)
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith(script)]
        assert len(lines) == 1 and end.value.code in (1, 2)
        assert {path.name: path.read_bytes() for path in inputs.iterdir() if path.is_file()} == before
        return lines[0]

    return stops


def test_an_anchored_token_that_is_not_in_the_prompt_stops_before_sampling(stops, tiny_sd):
    for prompt in ("A photo", "two {class}s"):
        line = stops("sample_outliers", "--diffusion", tiny_sd, *SMALL, "--prompt", prompt)
        assert "the anchored token of 'zero' does not occur in" in line


def test_anchors_of_another_checkpoint_stop(stops, inputs, tiny_sd):
    np.save(inputs / "anchors.npy", np.load(inputs / "anchors.npy") + np.float32(0.01))
    assert "anchor of 'zero' is not of" in stops("sample_outliers", "--diffusion", tiny_sd, *SMALL)
    (inputs / "class_words.txt").write_text("zero\none\n")
    assert "does not fit" in stops("sample_outliers", "--diffusion", tiny_sd, *SMALL)
    (inputs / "class_words.txt").unlink()
    assert "class_words.txt must hold" in stops("sample_outliers", "--diffusion", tiny_sd, *SMALL)


def test_wrong_options_with_stable_diffusion(stops, tiny_sd, tmp_path):
    assert "multiple of 4" in stops("sample_outliers", "--diffusion", tiny_sd, *SMALL, "--resolution", 18)
    assert "same prompt" in stops("sample_sd_outliers", "--diffusion", tiny_sd, "--prompt", "a photo")
    assert "must be below 1000" in stops("sample_sd_outliers", "--diffusion", tiny_sd, "--S", 1000)
    (tmp_path / "two.txt").write_text("zero\none\n")
    arguments = "--diffusion", tiny_sd, "--class-words", tmp_path / "two.txt"
    assert "has 2 lines, digits:0-2 3 classes" in stops("train_text_encoder", *arguments)
    assert "knows 2 classes" in stops("sample_sd_outliers", *arguments)


@pytest.mark.parametrize("script", ["train_text_encoder", "sample_outliers", "sample_sd_outliers"])
def test_a_checkpoint_that_does_not_load(stops, tiny_sd, tmp_path, script):
    small = SMALL if script == "sample_outliers" else []
    assert "no Stable Diffusion in nobody/nothing" in stops(script, "--diffusion", "nobody/nothing", *small)
    copy = shutil.copytree(tiny_sd, tmp_path / "sd")
    weights = load_file(copy / "text_encoder" / "model.safetensors")
    renamed = {name.replace("layers.0", "blocks.0"): tensor for name, tensor in weights.items()}
    save_file(renamed, copy / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    assert "text_encoder lacks" in stops(script, "--diffusion", copy, *small)
    shutil.rmtree(copy / "tokenizer")
    assert f"no Stable Diffusion in {copy}" in stops(script, "--diffusion", copy, *small)


def test_a_unet_that_wants_more_than_a_prompt(stops, tiny_sd, tmp_path):
    copy = shutil.copytree(tiny_sd, tmp_path / "sd")
    config = json.loads((copy / "unet" / "config.json").read_text())
    config |= {"addition_embed_type": "text", "addition_embed_type_num_heads": 4}
    (copy / "unet" / "config.json").write_text(json.dumps(config))
    assert "SDXL" in stops("sample_outliers", "--diffusion", copy, *SMALL)


def test_unlabelled_data_cannot_be_prompted(tiny_sd, tmp_path, main, capfd):
    for name in ("train", "test"):
        np.save(tmp_path / f"{name}.npy", np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(SystemExit):
        main("train_text_encoder", "--dir", tmp_path, "--recipe", "digits", "--diffusion", tiny_sd)
    assert "has no class labels" in capfd.readouterr().err


def test_scheduler_of_the_checkpoint_is_what_the_papers_used(tiny_sd):
    config = PNDMScheduler.load_config(tiny_sd, subfolder="scheduler")
    solver = sample_outliers.make_solver(config, "pndm", 50, False, "cpu")
    assert isinstance(solver, PNDMScheduler) and len(solver.timesteps) == 51  # PLMS repeats its second step
    assert solver.timesteps[0] == 981 and solver.timesteps[-1] == 1
