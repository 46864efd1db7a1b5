"""Papers A and B with a tiny Stable Diffusion of the real classes; the jobs of both samplers."""

import argparse
import importlib
import json
import os
import re
import shutil
import signal
import socket
import sys
from multiprocessing import forkserver, get_context
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL
from safetensors.torch import load_file, save_file
from test_data import one_line

A = "sample_outliers"
B = "sample_sd_outliers"
ENCODER = "train_text_encoder"
PROMPT = "A high-quality image of the {class}"


@pytest.fixture(scope="module")
def pipe(load, tiny_sd):
    return load(A).load_stable_diffusion(str(tiny_sd), "cpu")


@pytest.fixture(scope="module")
def tokens(pipe):
    """{token: (its number, its row of the token-embedding table)}"""
    table = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    return {token: (i, table[i]) for token, i in pipe.tokenizer.get_vocab().items()}


@pytest.fixture
def options(tiny_sd, tmp_path):
    """options(*lines): those of sample_outliers in a folder whose class_words.txt has the lines."""

    def options(*lines, **given):
        (tmp_path / "class_words.txt").write_text("".join(f"{line}\n" for line in lines))
        plain = {"dir": tmp_path, "diffusion": str(tiny_sd), "device": "cpu", "prompt": PROMPT}
        solver = {"scheduler": "pndm", "steps": 5, "guidance": 7.5, "fp32": True}
        return argparse.Namespace(**(plain | solver | given))

    return options


def test_anchors_are_rows_of_the_token_table(load, pipe, tokens, capsys):
    words = [("zero", "zero"), ("porcupine", "porcupine"), ("one", "two one")]
    models = pipe.tokenizer, pipe.text_encoder
    anchors = [load(ENCODER).token_anchors(*models, words, how) for how in ("first", "mean")]
    chosen = [tokens[token] for token in ("zero</w>", "por", "one</w>", "cup", "ine</w>")]
    numbers, rows = zip(*chosen, strict=True)
    assert torch.equal(anchors[0], torch.stack(rows[:3]))
    mean = (rows[1] + rows[3] + rows[4]) / 3
    assert torch.allclose(anchors[1], torch.stack([rows[0], mean, rows[2]]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == f"1 porcupine: porcupine por cup ine</w> [{numbers[1]}]".split()
    assert lines[6].endswith(f"[{numbers[1]}, {numbers[3]}, {numbers[4]}]")
    for word, how in (("porcupine", "error"), ("日本", "first")):
        one_line(f"'{word}'", load(ENCODER).token_anchors, *models, [("zero", ""), (word, "")], how)


def test_released_and_given_words(load, options):
    script = load(ENCODER)
    items = [item.split(":")[0].strip() for item in script.CLASS_WORDS.split(";")]
    wnids = [name for name in items if re.fullmatch(r"n\d{8}", name)]
    assert len(wnids) == 100 and wnids == sorted(set(wnids)) and len(items) == len(set(items))
    names = ["aquarium_fish", "chimpanzee", "n03804744", "night_owl"]
    words = [("fish", "aquarium fish"), ("chimp", "chimp"), ("nail", "wire nail")]
    assert script.default_words(names) == [*words, ("night owl", "night owl")]
    path = options("cat", "fish: aquarium fish").dir / "class_words.txt"
    assert script.read_class_words(path) == [("cat", "cat"), ("fish", "aquarium fish")]
    one_line("x.txt is missing", script.read_class_words, path.with_name("x.txt"))


def test_a_text_model_without_its_weights(load, tiny_sd, tmp_path):
    path = shutil.copytree(tiny_sd, tmp_path / "sd") / "text_encoder" / "model.safetensors"
    renamed = {name.replace("layers.0", "x"): x for name, x in load_file(path).items()}
    save_file(renamed, path, metadata={"format": "pt"})
    one_line("lacks weights of text_encoder", load(ENCODER).load_text_model, tmp_path / "sd")


@pytest.mark.parametrize(("policy", "count"), [("first", 1), ("mean", 3)])
def test_slots(load, pipe, tokens, options, policy, count):
    """Every place of the anchored token in the prompt; of a mean, of each of its tokens."""
    args = options("porcupine", "one: one with one", prompt="{class} or two")
    words = [("porcupine", ""), ("one", "")]
    Gamma = load(ENCODER).token_anchors(pipe.tokenizer, pipe.text_encoder, words, policy)
    ids, slots = load(A).class_slots(pipe, Gamma, args)
    pieces = [tokens[token][0] for token in ("por", "cup", "ine</w>")]
    assert ids[0][slots[0]].tolist() == pieces[:count]
    assert ids[1][slots[1]].tolist() == [tokens["one</w>"][0]] * 2
    for other in (Gamma + 0.01, Gamma[:, :8], Gamma[:1]):  # of another --diffusion, other words
        one_line("train_text_encoder.py", load(A).class_slots, pipe, other, args)


def stock_image(tiny_sd, name, phrase, seed, token, v):
    """What diffusers' own pipeline makes in 5 steps where v is the token's row of the table."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    pipe.scheduler = SOLVERS[name].from_config(pipe.scheduler.config)
    pipe.text_encoder.get_input_embeddings().weight.data[token] = v
    given = {"num_inference_steps": 5, "guidance_scale": 7.5, "output_type": "pt"}
    generator = torch.Generator().manual_seed(seed)
    return pipe(PROMPT.replace("{class}", phrase), **given, generator=generator).images * 2 - 1


SOLVERS = {"pndm": diffusers.PNDMScheduler, "ddim": diffusers.DDIMScheduler}
SOLVERS["dpmpp"] = diffusers.DPMSolverMultistepScheduler


@pytest.mark.parametrize("name", SOLVERS)
def test_injecting_is_editing_the_table(load, tiny_sd, tokens, options, name):
    anchored = [tokens["zero</w>"], tokens["one</w>"]]
    Gamma = torch.stack([vector for _, vector in anchored])
    args = options("zero", "one: one or one", scheduler=name)
    decode = load(A).text_decoder(Gamma.numpy(), args)
    classes = torch.tensor([0, 1, 1])
    seeds = [3, 4, 5]
    v = Gamma[classes]  # two of the tokens' own rows, and another embedding
    v[2] += 0.1 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    images = decode(v, classes, seeds)
    for i, phrase in enumerate(["zero", "one or one", "one or one"]):
        stock = stock_image(tiny_sd, name, phrase, seeds[i], anchored[classes[i]][0], v[i])
        assert (images[i] - stock).abs().max() < 1e-4
    v[1] = v[2]
    change = (decode(v, classes, seeds) - images).abs().amax((1, 2, 3))
    assert change[[0, 2]].max() < 1e-5 and change[1] > 1e-3  # of its own image alone


def stored(x):
    """Images (1, 3, 16, 16) in [-1, 1] -> (8, 8): area-resized, grey, the nearest of 17 levels."""
    x = x.view(3, 8, 2, 8, 2).mean((2, 4)).clamp(-1, 1)
    grey = ((x + 1) * 127.5).round().mean(0).numpy().round()
    levels = np.round(np.arange(17) * 255 / 16)
    return levels[np.abs(grey[..., None] - levels).argmin(2)]


def test_files_of_the_run(sd_run, tokens):
    Gamma = np.load(sd_run / "anchors.npy")
    assert np.array_equal(Gamma, [tokens[token][1] for token in ("zero</w>", "one</w>", "por")])
    words = (sd_run / "class_words.txt").read_text().splitlines()
    assert words == ["zero: zero", "one: one", "porcupine: high-quality porcupine"]
    labels = np.load(sd_run / "train.labels.npy")
    assert np.array_equal(np.load(sd_run / "id_labels.npy"), labels)
    assert not (sd_run / "pseudo_labels.npy").exists() and not list(sd_run.glob(".*"))
    outliers = np.load(sd_run / "outliers.npy")
    assert outliers.shape == (36, 8, 8, 3) and len(np.unique(outliers, axis=0)) == 36
    norms = np.linalg.norm(np.load(sd_run / "outlier_embeddings.npy"), axis=1)
    assert np.allclose(norms, np.linalg.norm(Gamma, axis=1).repeat(12), rtol=1e-5)
    table = np.genfromtxt(sd_run / "outliers.csv", delimiter=",", names=True)
    classes = np.load(sd_run / "outlier_labels.npy")
    assert classes.tolist() == [i // 12 for i in range(36)] == table["class"].tolist()
    assert np.array_equal(classes, labels[table["source"].astype(int)])
    records = json.loads((sd_run / "results.json").read_text())
    assert {r["method"] for r in records} == {"ce", "dream", "sd"}


def test_an_outlier_can_be_made_again_from_its_embedding_and_seed(load, sd_run, options):
    args = options(dir=sd_run, steps=4)
    decode = load(A).text_decoder(np.load(sd_run / "anchors.npy"), args)
    table = np.genfromtxt(sd_run / "outliers.csv", delimiter=",", names=True)
    for i in (0, 17, 35):
        v = torch.from_numpy(np.load(sd_run / "outlier_embeddings.npy")[[i]])
        image = decode(v, torch.tensor([i // 12]), [int(table["seed"][i])])
        assert (stored(image) == np.load(sd_run / "outliers.npy")[i, :, :, 0]).mean() > 0.98


def test_paper_b_with_prompts_by_hand(sd_run, pipe):
    """Encode, noise to S, denoise under the wrong class's prompt, decode."""
    images = np.load(sd_run / "train.npy")
    made = np.load(sd_run / "sd_outliers.npy")
    table = np.genfromtxt(sd_run / "sd_outliers.csv", delimiter=",", names=True)
    assert made.shape == images.shape and (table["y"] != table["c_r"]).all()
    assert np.array_equal(table["y"], np.load(sd_run / "train.labels.npy"))
    phrases = ["zero", "one", "high-quality porcupine"]
    scale = pipe.vae.config.scaling_factor
    abar = pipe.scheduler.alphas_cumprod[100]
    for i in (0, 200):
        prompts = [PROMPT.replace("{class}", phrases[int(table["c_r"][i])]), ""]
        ids = pipe.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt")
        x = torch.from_numpy(images[[i]]).permute(0, 3, 1, 2) / 127.5 - 1
        x = torch.nn.functional.interpolate(x, (16, 16), mode="bicubic").clamp(-1, 1)
        generator = torch.Generator().manual_seed(int(table["seed"][i]))
        solver = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        solver.set_timesteps(timesteps=[100, 44, 11, 0])
        with torch.no_grad():
            c, null = pipe.text_encoder(ids.input_ids).last_hidden_state.split(1)
            z = pipe.vae.encode(x).latent_dist.mode() * scale
            x_t = abar.sqrt() * z + (1 - abar).sqrt() * torch.randn(z.shape, generator=generator)
            for t in solver.timesteps:
                eps_c, free = (pipe.unet(x_t, t, condition).sample for condition in (c, null))
                x_t = solver.step(3 * eps_c - 2 * free, t, x_t).prev_sample
            out = pipe.vae.decode(x_t / scale).sample
        assert (stored(out) == made[i, :, :, 0]).mean() > 0.98


@pytest.fixture
def inputs(sd_run, tmp_path):
    """Copy of what the samplers read."""
    made = shutil.ignore_patterns("*outlier*", "*.pt", "scores", "*.png")
    return shutil.copytree(sd_run, tmp_path / "run", ignore=made)


def test_an_absent_token_stops_before_anything_is_made(inputs, tiny_sd, main):
    before = sorted(inputs.rglob("*"))
    arguments = "--dir", inputs, "--diffusion", tiny_sd, *SMALL
    one_line("not in its prompt", main, A, *arguments, "--prompt", "two {class}s")
    assert sorted(inputs.rglob("*")) == before


def test_other_words_make_other_sd_outliers(inputs, tiny_sd, main, capsys):
    arguments = "--dir", inputs, "--diffusion", tiny_sd, "--steps", 2, "--S", 50, "--split", "test"
    complete = []
    for word in ("zero", "zero", "two"):
        (inputs / "class_words.txt").write_text(f"{word}\none\nfour\n")
        main(B, *arguments)
        complete.append("is complete" in capsys.readouterr().out)
    assert complete == [False, True, False]


def test_a_job_goes_on_beside_one_of_other_options_and_is_made_again(
    load, tmp_path, monkeypatch, capsys
):
    script = load(B)
    monkeypatch.setattr(script, "BLOCK", 2)
    monkeypatch.setattr("sys.argv", [B, "--dir", str(tmp_path), "--recipe", "digits"])
    args = script.parse_args()
    vars(args).update(rank=0, world=1, inputs=[1])
    made = []

    def work(stop=None, **changed):
        def make(rows):
            if stop in rows:
                raise KeyboardInterrupt
            made.extend(rows)
            return np.broadcast_to(np.uint8(rows)[:, None, None, None], (len(rows), 2, 2, 3))

        made.clear()
        script.run_job("x", (5, 2, 2, 3), make, argparse.Namespace(**(vars(args) | changed)))
        assert np.array_equal(np.load(tmp_path / "x.npy")[:, 0, 0, 0], range(5))
        return made

    with pytest.raises(KeyboardInterrupt):
        work(stop=3)  # in the second of three blocks
    assert work(batch_size=1) == [2, 3, 4]
    (tmp_path / ".partial.x.csv").touch()  # of a process killed while it saved
    with pytest.raises(KeyboardInterrupt):
        work(stop=3, inputs=[2])
    assert work(inputs=[3]) == work(inputs=[2]) == work() == [0, 1, 2, 3, 4]
    assert work() == [] and "is complete" in capsys.readouterr().out
    assert work(restart=True) == work(S=151) == [0, 1, 2, 3, 4]
    names = [".partial.x.csv", "x.json", "x.npy"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def job(script, folder, *words, block=16, kill="", **environment):
    """main() of a sampler with blocks of so many images; SIGKILL at a file to be named `kill`."""
    module = importlib.import_module(script)
    module.BLOCK = block
    torch.set_num_threads(1)
    rename = os.replace

    def replace(source, target):
        if Path(target).name == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.replace = replace
    os.environ.update(environment)
    sys.argv = [script, "--dir", str(folder), *map(str, words)]
    module.main()


@pytest.fixture(scope="module")
def begin(tiny_run, tmp_path_factory):
    """begin(script, name, *words, ...): job() as a process of its own, and its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        forkserver.set_forkserver_preload([A, B, "diffusers.models.unets.unet_2d"])  # once
        forkserver.ensure_running()
    root = tmp_path_factory.mktemp("jobs")
    made = shutil.ignore_patterns("*outlier*", "*inlier*", "sd_*", "*.pt", "scores", "*.png")
    options = {A: [*SMALL, "--per-class", 60], B: ["--steps", 4]}

    def begin(script, name, *words, **given):
        if not (folder := root / f"{script}-{name}").exists():
            shutil.copytree(tiny_run, folder, ignore=made)
        arguments = script, folder, *options[script], *words
        process = get_context("forkserver").Process(target=job, args=arguments, kwargs=given)
        process.start()
        return process, folder

    return begin


@pytest.fixture(scope="module")
def undisturbed(begin):
    """{script: every file of its folder after one process with batches of 256}."""
    jobs = {script: begin(script, "one", block=256) for script in (A, B)}
    return {script: files_of(*jobs[script]) for script in jobs}


def files_of(process, folder):
    process.join()
    assert process.exitcode == 0
    return {path.relative_to(folder): path.read_bytes() for path in folder.glob("**/*.*")}


@pytest.mark.parametrize("script", [A, B])
def test_any_batch_size_gives_the_same_bytes(begin, undisturbed, script):
    assert files_of(*begin(script, "seven", "--batch-size", 7)) == undisturbed[script]


def test_two_processes_give_the_same_bytes(begin, undisturbed):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    jobs = [begin(A, "two", RANK=str(i), LOCAL_RANK=str(i), **place) for i in range(2)]
    assert files_of(*jobs[1]) and files_of(*jobs[0]) == undisturbed[A]


def test_killed_three_times_it_ends_with_the_same_bytes(begin, undisturbed):
    for kill in ("32.npy", "160.npy", "sd_outliers.json"):
        process, folder = begin(B, "killed", kill=kill)
        process.join()
        assert process.exitcode == -signal.SIGKILL and not (folder / "sd_outliers.json").exists()
        assert [*folder.glob(".job.sd_outliers.*/16.npy")]
    assert files_of(*begin(B, "killed")) == undisturbed[B]
