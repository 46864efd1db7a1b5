"""Training: stopped and started again, or shared by two processes, it ends as it should."""

import argparse
import importlib
import itertools
import math
import os
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
import torch.nn.functional as F
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
UNET = "--data digits:0-1 --channels 32,32 --batch-size 8 --steps".split()
SCAN = (
    "--pretext-epochs 3 --pretext-batch 96 --starts 2 --scan-epochs 3 --scan-batch 96 "
    "--selflabel-epochs 3 --selflabel-batch 96 --confidence 0.5"
).split()
DETECTORS = (
    "--method ce dream dream-id sd --init ce --batch-size 72 --epochs 6 --inlier-batch 36 "
    "--dream-batch-size 72 --dream-epochs 3 --sd-batch-size 72 --sd-epochs 3 --lr 0.02"
).split()
JOBS = {
    "train_scan_diffusion": [*UNET, 5, *SCAN],
    "train_text_encoder": ["--epochs", 2],
    "train_classifier": DETECTORS,
}
STAGES = {
    "train_scan_diffusion": ["simclr", "scan-1", "scan-2", "selflabel", "diffusion"],
    "train_text_encoder": ["encoder"],
    "train_classifier": [f"classifier_{name}" for name in ("ce", "dream", "dream-id", "sd")],
}


def weights(folder):
    """Every tensor of the .pt and .safetensors files of a folder, by file and name."""
    found = {}
    for path in [*folder.glob("*.pt"), *folder.rglob("*.safetensors")]:
        content = load_file(path) if path.suffix != ".pt" else torch.load(path, weights_only=True)
        parts = [part for part in content.values() if isinstance(part, dict)]
        for number, part in enumerate([content, *parts]):
            found |= {(path.name, number, name): value for name, value in part.items()}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def assert_same_weights(folder, other):
    expected = weights(other)
    found = weights(folder)
    assert set(found) == set(expected)
    assert len(expected) > 20
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# The program below, `python test_training.py FOLDER`, imports the scripts once and forks.


def fork(job, *args, log=os.devnull, **environment):
    """job(*args) in a process of its own; returns its number."""
    child = os.fork()
    if child:
        return child
    os.environ.update(environment)
    sys.stdout = open(log, "w", buffering=1)  # noqa: SIM115
    try:
        job(*args)
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def fork_two(job, *args, log):
    """The same on two processes, with what torchrun puts into their environment."""
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(os.getpid() + 9999)}
    return [fork(job, *args, log=f"{log}.{r}", RANK=str(r), **group) for r in range(2)]


def wait(*children):
    for child in children:
        status = os.waitpid(child, 0)[1]
        if status:
            sys.exit(f"a process ended with {status}")


def call(name, folder, options, watch=False):
    """main() of a script; watched, each process keeps its nets, and names the files it writes."""
    module = sys.modules[name]
    rank = os.environ.get("RANK")
    save = module.save
    steps_of = module.training_steps

    def named(path, content):
        print(f"rank {rank} wrote {path.name}", file=sys.stderr)
        save(path, content)

    def kept(stage, count, size, steps, state, args):
        yield from steps_of(stage, count, size, steps, state, args)
        net = state.get("net", state.get("unet"))
        torch.save(dict(net.named_parameters()), f"{folder}-{stage}.{rank}")

    if watch:
        module.save = named
        module.training_steps = kept
    sys.argv = [name, "--dir", str(folder), *map(str, options)]
    module.main()


def gradients(folder):
    """Of the losses that need the rows of every process: weights and biases of a linear net."""
    module = sys.modules["train_scan_diffusion"]
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    args = argparse.Namespace(device="cpu", rank=rank, world=world)
    if world > 1:
        torch.distributed.init_process_group("gloo")
    x = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0))[:, rank::world]
    labels = module.gather(torch.arange(12)[rank::world] % 3, args)
    losses = {
        "nt_xent": lambda a, b: module.nt_xent(F.normalize(a), F.normalize(b), 0.1),
        "scan_loss": lambda a, b: module.scan_loss(a, b, 5.0),
        "selflabel_loss": lambda a, b: module.selflabel_loss(a[labels > 0], labels[labels > 0]),
    }
    found = {}
    for name, loss in losses.items():
        torch.manual_seed(rank)  # DistributedDataParallel begins with the first one's weights
        net = torch.nn.Linear(5, 3)
        a, b = module.distribute(net, args)(x.flatten(0, 1)).chunk(2)
        (loss(module.gather(a, args), module.gather(b, args)) * world).backward()
        found[name] = [net.weight.grad, net.bias.grad]
    torch.save(found, folder / f"gradients-{world}.{rank}")


def forks(folder):
    """What the tests of processes look at: gradients, runs on one and two, a run that is killed."""
    for name in JOBS:
        sys.modules[name] = importlib.import_module(name)
    scan, _, classifier = JOBS
    wait(fork(gradients, folder), *fork_two(gradients, folder, log=folder / "log"))
    alone = fork(call, classifier, folder / "one", DETECTORS, log=folder / "log.one")
    wait(alone, *fork_two(call, classifier, folder / "two", DETECTORS, True, log=folder / "log"))
    wait(*fork_two(call, scan, folder / "scan", JOBS[scan], True, log=folder / "scan.log"))
    long = [*UNET, 60, "--labels", "dataset"]
    wait(fork(call, scan, folder / "plain", long))
    sys.modules[scan].CHECKPOINT_SECONDS = 0
    child = fork(call, scan, folder / "killed", long)
    while not (folder / "killed" / ".checkpoint.diffusion.pt").exists():
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    wait(fork(call, scan, folder / "killed", long, log=folder / "log.killed"))


@pytest.fixture(scope="module")
def forked(tiny_run, tmp_path_factory):
    """Folder of forks(), and what the processes wrote to standard error."""
    folder = tmp_path_factory.mktemp("forks")
    for name in ("one", "two"):
        shutil.copytree(tiny_run, folder / name, ignore=shutil.ignore_patterns("*.pt"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, done.stderr


@pytest.mark.parametrize("loss", ["nt_xent", "scan_loss", "selflabel_loss"])
def test_gather_gives_two_processes_the_gradient_of_one(forked, loss):
    alone = torch.load(forked[0] / "gradients-1.0")[loss]
    assert all(gradient.abs().max() > 1e-3 for gradient in alone[:1])
    for rank in range(2):
        shared = torch.load(forked[0] / f"gradients-2.{rank}")[loss]
        torch.testing.assert_close(shared, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("script", ["train_scan_diffusion", "train_classifier"])
def test_two_processes_end_in_the_same_weights_and_write_once(forked, script):
    folder, said = forked
    stem = "scan" if "scan" in script else "two"
    for stage in STAGES[script]:
        first, second = (torch.load(folder / f"{stem}-{stage}.{rank}") for rank in range(2))
        assert all(torch.equal(value, second[name]) for name, value in first.items()), stage
    for path in (folder / stem).glob("*.pt"):
        assert re.findall(rf"rank (.) wrote {path.name}", said) == ["0"]
    assert "rank 1" not in said
    assert not [path for path in (folder / stem).rglob(".*")]
    assert len(weights(folder / stem)) > 20


def losses(log, stage):
    return [float(loss) for loss in re.findall(rf"{stage} step .*, loss (.*)", log.read_text())]


@pytest.mark.parametrize("stage", STAGES["train_classifier"])
def test_the_loss_of_two_processes_falls_like_that_of_one(forked, stage):
    alone = losses(forked[0] / "log.one", stage)
    shared = losses(forked[0] / "log.0", stage)
    assert len(shared) == len(alone) >= 15
    for curve in (alone, shared):
        assert np.mean(curve[-4:]) < 0.9 * np.mean(curve[:4])
    assert np.mean(shared[-4:]) == pytest.approx(np.mean(alone[-4:]), rel=0.3)


def test_killed_and_started_again_it_ends_in_the_same_weights(forked):
    folder, _ = forked
    done = re.search(r"going on from step (\d+)", (folder / "log.killed").read_text())
    assert 1 <= int(done[1]) < 60
    for path in (folder / "killed").glob(".partial.*"):  # of the file that was being written
        path.unlink()
    assert_same_weights(folder / "killed", folder / "plain")


if __name__ == "__main__":
    forks(Path(sys.argv[1]))
