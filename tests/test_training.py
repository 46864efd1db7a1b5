"""Training: killed and resumed, or divided among processes, it is the run of one process that nobody disturbed."""

import argparse
import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import train_classifier
import train_scan_diffusion
import train_text_encoder

ROOT = Path(__file__).resolve().parents[1]
TRAINERS = (train_scan_diffusion, train_text_encoder, train_classifier)
# 20 steps per stage; small rates, since at larger ones these nets double a rounding error in every step, and half of
# the steps of self-labelling would have no confident image at 0.99.
ARGUMENTS = {
    "train_scan_diffusion": "--data digits:0-2 --pretext-epochs 4 --pretext-batch 80 --pretext-lr 1e-4 --scan-epochs 4 "
    "--scan-batch 80 --scan-lr 3e-6 --starts 2 --selflabel-epochs 4 --selflabel-batch 80 --selflabel-lr 3e-6 "
    "--confidence 0.4 --channels 16,16 --steps 20 --batch-size 16",
    "train_text_encoder": "--epochs 4 --batch-size 80 --lr 1e-3",
    "train_classifier": "--epochs 4 --batch-size 80 --lr 1e-3 --method ce dream dream-id sd --init ce",
}
STAGES = {
    "train_scan_diffusion": ["simclr", "scan-1", "scan-2", "selflabel", "diffusion"],
    "train_text_encoder": ["encoder"],
    "train_classifier": ["classifier_ce", "classifier_dream", "classifier_dream-id", "classifier_sd"],
}
# Imports the scripts once and forks for every run of a main(): per script one that nobody disturbs, one that is killed
# at random moments and started again, and two processes with what torchrun puts into their environment.
DRIVER = """
import json, os, random, shutil, signal, sys, time
root, folder, port, arguments = sys.argv[1:]
sys.path[:0] = [root, root + "/tests"]
import train_scan_diffusion, train_text_encoder, train_classifier
from test_training import make_outliers

def start(script, target, more=(), **environment):
    if pid := os.fork():
        return pid
    os.environ.update(environment)
    sys.argv = [script + ".py", "--dir", target, *arguments[script].split(), *more]
    sys.stdout = open(f"{target}.txt", "a")
    code = 1
    try:
        globals()[script].main()
        code = 0
    finally:
        sys.stdout.flush()
        os._exit(code)

def ends(*children):
    for child in children:
        if code := os.waitpid(child, 0)[1]:
            sys.exit(f"ended with {code}")

arguments, before, moments = json.loads(arguments), None, random.Random(0)
for script in arguments:
    plain, kill, two = (f"{folder}/{script}/{name}" for name in ("plain", "kill", "two"))
    for target in (plain, kill, two):
        shutil.copytree(before, target) if before else os.makedirs(target)
    begin = time.time()
    ends(start(script, plain))
    seconds, kills = time.time() - begin, 0
    while True:
        child = start(script, kill, ("--checkpoint-every", "0"))
        end, done = time.time() + (moments.uniform(0.1, 0.6) * seconds if kills < 4 else 300), (0, 0)
        while time.time() < end and not done[0]:
            time.sleep(0.005)
            done = os.waitpid(child, os.WNOHANG)
        if done[0]:
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
    open(f"{kill}.txt", "a").write(f"killed {kills} times\\n")
    if done[1]:
        sys.exit("the killed run did not end well")
    group = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    ends(*(start(script, two, RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in range(2)))
    before = shutil.copytree(plain, f"{folder}/{script}/next")
    if script == "train_text_encoder":
        make_outliers(before)
"""


def make_outliers(folder):
    """Stand-ins for the samplers' files: images of shuffled pixels."""
    folder = Path(folder)
    images, labels = np.load(folder / "train.npy"), np.load(folder / "pseudo_labels.npy")
    noise = np.random.default_rng(0).permuted(images.reshape(len(images), -1), axis=1).reshape(images.shape)
    for name in ("outliers", "inliers", "sd_outliers"):
        np.save(folder / f"{name}.npy", noise)
    np.save(folder / "inlier_labels.npy", labels)
    rows = "".join(f"{i},{i},{y},{(y + 1) % 3},0\n" for i, y in enumerate(labels))
    (folder / "sd_outliers.csv").write_text("index,source,y,c_r,seed\n" + rows)


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """folder/script/{plain,kill,two}, what each run left behind, and beside it its standard output as .txt."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-c", DRIVER, str(ROOT), str(folder), free_port(), json.dumps(ARGUMENTS)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def tensors(value, name=""):
    """Every tensor of a nested checkpoint, by name."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    parts = value.items() if isinstance(value, dict) else ()
    return {key: tensor for k, part in parts for key, tensor in tensors(part, f"{name}/{k}").items()}


def content(folder):
    """Everything that training leaves in a folder, comparable: bytes of files, and tensors of checkpoints."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".pt":
            found |= tensors(torch.load(path, weights_only=True), name)
        elif path.suffix == ".safetensors":
            found |= tensors(load_file(path), name)
        else:
            found[name] = path.read_bytes()
    return found


def losses(folder, stage):
    lines = [json.loads(line) for line in (folder / f"{stage}_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return np.array([line["loss"] for line in lines], float)  # None is NaN


@pytest.mark.parametrize("script", ARGUMENTS)
def test_a_run_that_is_killed_ends_in_the_same_weights(script, runs):
    folder, log = runs / script / "kill", (runs / script / "kill.txt").read_text()
    assert int(re.search(r"killed (\d)", log)[1]) >= 2 and "going on from step" in log
    for leftover in folder.glob(".partial.*"):  # of a file that was being written
        leftover.unlink()
    found, expected = content(folder), content(runs / script / "plain")
    assert set(found) == set(expected) and not [name for name in found if "checkpoint" in name]
    for name, value in expected.items():
        same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        assert same, name


@pytest.mark.parametrize("script", ARGUMENTS)
def test_two_processes_equal_one(script, runs):
    one, two = runs / script / "plain", runs / script / "two"
    one_said, two_said = ((runs / script / f"{name}.txt").read_text().splitlines() for name in ("plain", "two"))
    assert [line[:10] for line in two_said] == [line[:10] for line in one_said]  # the second process is silent
    for stage in STAGES[script]:
        expected, found = losses(one, stage), losses(two, stage)
        assert len(expected) >= 20 and np.isfinite(expected).all() and np.ptp(expected) > 1e-2, stage
        np.testing.assert_allclose(found[:20], expected[:20], rtol=1e-4, err_msg=stage)
    expected, found = content(one), content(two)
    weights = [name for name, value in expected.items() if isinstance(value, torch.Tensor)]
    assert [name for name, value in found.items() if isinstance(value, torch.Tensor)] == weights  # no module. in front
    for file in {name.split("/")[0] for name in weights}:  # weights without any gradient move by rounding alone in Adam
        a, b = (torch.cat([x[n].flatten().double() for n in weights if n.startswith(file)]) for x in (found, expected))
        assert (a - b).norm() < 1e-2 * b.norm(), file


# Refusals


SMALL = "--data digits:0-1 --labels dataset --channels 16,16 --steps 4 --batch-size 8 --checkpoint-every 0".split()


def stopped(main, load, folder, monkeypatch, *more):
    """A run of train_scan_diffusion that ends like one that was killed, at its third step."""
    module, calls, mse_loss = load("train_scan_diffusion"), [], F.mse_loss

    def loss(*given, **named):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return mse_loss(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(module.F, "mse_loss", loss)
        with pytest.raises(KeyboardInterrupt):
            main("train_scan_diffusion", "--dir", folder, *SMALL, *more)


def test_other_options_are_refused_until_restart(main, load, monkeypatch, tmp_path, capfd):
    stopped(main, load, tmp_path, monkeypatch)
    (checkpoint,) = tmp_path.glob(".checkpoint.*")
    held = torch.load(checkpoint, weights_only=True)
    assert held["step"] == 2 and set(held) == {"config", "step", "curve", "net", "optimizer", "ema"}
    before = content(tmp_path)
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        main("train_scan_diffusion", "--dir", tmp_path, *SMALL, "--lr", 0.5)
    (line,) = capfd.readouterr().err.splitlines()
    assert end.value.code and all(word in line for word in ("--lr 0.002", "now 0.5", "--restart", checkpoint.name))
    assert set(content(tmp_path)) == set(before)
    main("train_scan_diffusion", "--dir", tmp_path, *SMALL)
    out = capfd.readouterr().out
    assert "going on from step 2" in out and not list(tmp_path.glob(".checkpoint.*"))
    stopped(main, load, tmp_path, monkeypatch)
    main("train_scan_diffusion", "--dir", tmp_path, *SMALL, "--lr", 0.001, "--restart")
    assert "going on" not in capfd.readouterr().out and len(losses(tmp_path, "diffusion")) == 4


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a file"])
def test_a_damaged_checkpoint_is_one_clear_line(main, tmp_path, capfd, content):
    (tmp_path / ".checkpoint.train_scan_diffusion.diffusion.pt").write_bytes(content)
    with pytest.raises(SystemExit) as end:
        main("train_scan_diffusion", "--dir", tmp_path, *SMALL)
    last = capfd.readouterr().err.splitlines()[-1]
    assert end.value.code and "diffusion.pt is damaged" in last and "--restart" in last
    main("train_scan_diffusion", "--dir", tmp_path, *SMALL, "--restart")
    assert len(losses(tmp_path, "diffusion")) == 4


def test_other_data_are_refused(main, load, monkeypatch, tmp_path, capfd):
    for folder, digits in (("a", "digits:0-1"), ("b", "digits:2-3")):
        stopped(main, load, tmp_path / folder, monkeypatch, "--data", digits)
    (checkpoint,) = (tmp_path / "a").glob(".checkpoint.*")
    os.replace(checkpoint, tmp_path / "b" / checkpoint.name)
    capfd.readouterr()
    with pytest.raises(SystemExit):
        main("train_scan_diffusion", "--dir", tmp_path / "b", *SMALL, "--data", "digits:2-3")
    (line,) = capfd.readouterr().err.splitlines()
    assert "digits:0-1, now digits:2-3" in line and "--restart" in line


def test_batches_must_divide_among_the_processes(main, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit) as end:
        main("train_scan_diffusion", "--dir", tmp_path / "run", *SMALL)
    (line,) = capfd.readouterr().err.splitlines()
    assert end.value.code == 2 and "256 is not a multiple of the 3 processes" in line
    assert not (tmp_path / "run").exists()


# The loop's parts


@pytest.mark.parametrize("script", TRAINERS)
def test_batches_go_through_all_items_again_and_again(script):
    drawn = np.concatenate([script.batch_of(5, 2, step, 0, "stage") for step in range(10)])
    assert np.bincount(drawn).tolist() == [4] * 5
    assert all(sorted(drawn[i : i + 5]) == list(range(5)) for i in (0, 5, 10, 15))  # one order after another
    assert len({tuple(drawn[i : i + 5]) for i in (0, 5, 10, 15)}) > 1
    many = script.batch_of(3, 8, 1, 0, "stage")  # more than there are
    assert len(many) == 8 and np.bincount(many).min() >= 2
    assert not np.array_equal(script.batch_of(100, 100, 0, 0, "stage"), script.batch_of(100, 100, 0, 1, "stage"))


@pytest.mark.parametrize("script", TRAINERS)
def test_seeds_differ_between_steps(script):
    seeds = {script.seeded(seed, stage, step) for seed in (0, 1) for stage in "ab" for step in range(500)}
    assert len(seeds) == 2000 and all(0 <= seed < 2**32 for seed in seeds)


def fitted(script, folder, loss_of, steps=6, **given):
    """A line fitted to y = 3 x, whose loss is loss_of(step, loss): the net, after `steps` steps."""
    args = argparse.Namespace(dir=folder, seed=0, device="cpu", compile=False, restart=False, checkpoint_every=0.0)
    torch.manual_seed(0)
    net, x = torch.nn.Linear(1, 1), torch.linspace(-1, 1, 8)[:, None]
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, fused=True)
    loss = lambda step: loss_of(step, F.mse_loss(net(x), 3 * x))  # noqa: E731
    script.fit("line", net, loss, lambda steps: ((step,) for step in steps), steps, optimizer, args, **given)
    return net


@pytest.mark.parametrize("script", TRAINERS)
def test_a_step_without_finite_gradient_is_left_out(script, tmp_path):
    for bad in ([0], [2, 3]):
        folder, skipping = tmp_path / f"{bad}", tmp_path / f"{bad}-none"
        net = fitted(script, folder, lambda step, loss, bad=bad: loss * (math.nan if step in bad else 1.0))
        expected = fitted(script, skipping, lambda step, loss, bad=bad: None if step in bad else loss)
        for name, value in net.state_dict().items():
            assert value.isfinite().all() and torch.equal(value, expected.state_dict()[name])
        log = losses(folder, "line")
        assert np.flatnonzero(np.isnan(log)).tolist() == bad


@pytest.mark.parametrize("script", TRAINERS)
def test_divergence_ends_the_run(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        fitted(script, tmp_path, lambda step, loss: loss * math.nan, steps=3)
    assert "line diverged" in capsys.readouterr().err


@pytest.mark.parametrize("script", TRAINERS)
def test_learning_rate_rises_and_falls_on_a_cosine(script, tmp_path):
    net, rates = torch.nn.Linear(1, 1), []
    optimizer = torch.optim.SGD(net.parameters(), 0.5, fused=True)
    args = argparse.Namespace(dir=tmp_path, seed=0, device="cpu", checkpoint_every=1e9)

    def loss(step):
        rates.append(optimizer.param_groups[0]["lr"])
        return net(torch.ones(1, 1)).sum()

    script.fit("rate", net, loss, lambda steps: ((s,) for s in steps), 40, optimizer, args, end=0.01, warmup=4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD(net.parameters(), 0.5), 36, 0.005)
    assert len(rates) == 40 and rates[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    for rate in rates[4:]:
        assert rate == pytest.approx(cosine.get_last_lr()[0], rel=1e-6)
        cosine.optimizer.step()
        cosine.step()


# Images over 64 px


@pytest.fixture
def large(tmp_path):
    """A memory map of 24 images of 72 px, in two classes: dark and light."""
    pixels = np.random.default_rng(0).integers(0, 128, (24, 72, 72, 3), dtype=np.uint8)
    pixels[1::2] += 128
    np.save(tmp_path / "train.npy", pixels)
    np.save(tmp_path / "train.labels.npy", np.arange(24) % 2)
    return np.load(tmp_path / "train.npy", mmap_mode="r")


@pytest.mark.parametrize("script", TRAINERS)
def test_a_memory_map_gives_what_a_tensor_gives(script, large):
    args = argparse.Namespace(seed=0, device="cpu", flip=1, crop=64)
    batches = [np.array([3, 0, 17]), np.array([5, 23, 1])]
    tensor = torch.from_numpy(np.array(large)).permute(0, 3, 1, 2)
    for size in (0, 64):
        edge = (72 - size) // 2 if size else 0
        expected = list(script.fetch(tensor, batches.__getitem__, range(2), args))
        found = list(script.fetch(large, batches.__getitem__, range(2), args, size))
        assert len(found) == len(expected) == 2
        for (index, x), (same, y) in zip(found, expected, strict=True):
            assert torch.equal(index, same) and torch.equal(x, y[:, :, edge : 72 - edge, edge : 72 - edge])


@pytest.mark.parametrize("script", TRAINERS)
def test_random_crops_of_a_memory_map_depend_on_seed_step_and_image_alone(script, large):
    args = argparse.Namespace(seed=0, device="cpu", flip=1, crop=64)
    batches, key = [np.array([3, 0, 17]), np.array([3, 23, 1]), np.array([17, 0, 5])], (0, "crop")
    x = [x for _, x in script.fetch(large, batches.__getitem__, range(3), args, 64, key)]
    assert x[0].shape == (3, 3, 64, 64) and x[0].dtype == torch.uint8
    ((_, later),) = script.fetch(large, lambda step: batches[step][::-1].copy(), range(2, 3), args, 64, key)
    assert torch.equal(later.flip(0), x[2])  # in another order, from another first step: as when a run goes on
    assert not torch.equal(x[0][0], x[1][0])  # image 3 of two steps
    ((_, other),) = script.fetch(large, batches.__getitem__, range(1), args, 64, (1, "crop"))
    assert not torch.equal(other, x[0])


def test_classifier_and_encoder_learn_from_a_memory_map(main, large, tmp_path, capsys):
    np.save(tmp_path / "outliers.npy", large[::-1])
    few = "--recipe", "digits", "--epochs", 12, "--batch-size", 8, "--lr", 0.02, "--crop", 32
    main("train_classifier", "--dir", tmp_path, "--method", "dream", *few)
    assert "dream: training accuracy 1.000" in capsys.readouterr().out
    assert torch.load(tmp_path / "classifier_dream.pt", weights_only=True)["config"]["crop"] == 32
    recipe = {option: row[1] for option, row in train_text_encoder.RECIPES.items()} | {"epochs": 12, "batch_size": 8}
    more = {"dir": tmp_path, "device": "cpu", "compile": False, "checkpoint_every": 60.0, "crop": 32, "lr": 0.02}
    args, y = argparse.Namespace(**recipe | more), torch.arange(24) % 2
    Gamma = torch.eye(2, 8)
    h = train_text_encoder.train_encoder(large, y, Gamma, args)
    z = train_text_encoder.predict(h, large, args)
    assert (train_text_encoder.cosine_logits(z, Gamma, 0.1).argmax(1) == y).all()
