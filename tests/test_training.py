"""Training: stopped and started again, or shared by two processes, it is what it would have been."""

import argparse
import math
import os
import re
import shutil
import signal
import socket
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
SCAN = (
    "--data digits:0-1 --pretext-epochs 3 --pretext-batch 96 --starts 2 --scan-epochs 3 "
    "--scan-batch 96 --selflabel-epochs 3 --selflabel-batch 96 --confidence 0.5 "
    "--channels 32,32 --steps 6 --batch-size 8"
).split()
STAGES = ["simclr", "scan-1", "scan-2", "selflabel", "diffusion"]
LABELLED = [*SCAN, "--labels", "dataset"]
CLASSIFIER = (
    "--epochs 8 --batch-size 72 --lr 0.02 --dream-epochs 4 --dream-batch-size 72 --sd-epochs 4 "
    "--sd-batch-size 72 --inlier-batch 36 --method ce dream dream-id sd --init ce"
).split()


def tensors(folder):
    """Every tensor of every .pt and .safetensors file of a folder, by file and name."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {(path.name, name): value for name, value in load_file(path).items()}
    for path in sorted(folder.glob("*.pt")):
        for part, content in torch.load(path, weights_only=True).items():
            held = content if isinstance(content, dict) else {"": content}
            found |= {(path.name, part, name): value for name, value in held.items()}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def assert_same(folder, other):
    expected = tensors(other)
    found = tensors(folder)
    assert list(found) == list(expected)
    assert len(expected) > 10
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# Two processes and SIGKILL. `python test_training.py JOB FOLDER` imports the scripts once and forks.


def forked(job, *args, **environment):
    """job(*args) in a process of its own; its number."""
    child = os.fork()
    if child:
        return child
    os.environ.update(environment)
    sys.stdout = open(os.environ.get("LOG", os.devnull), "w")  # noqa: SIM115
    try:
        job(*args)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def wait(*children):
    for child in children:
        _, status = os.waitpid(child, 0)
        assert status == 0, status


def two(job, *args, log):
    """job on two processes, with what torchrun puts into their environment."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    wait(*[forked(job, *args, RANK=str(rank), LOG=f"{log}{rank}", **group) for rank in range(2)])


def script(name, folder, options):
    sys.argv = [name, "--dir", str(folder), *options]
    sys.modules[name].main()


def watched(name, folder, options):
    """script(), after which `folder`-rank.txt lists the files written; .ranks/ holds networks."""
    module = sys.modules[name]
    save = module.save
    rank = os.environ["RANK"]
    written = open(f"{folder}-{rank}.txt", "w")  # noqa: SIM115

    def listed(path, content):
        written.write(f"{path.name}\n")
        save(path, content)

    def kept(stage, count, size, steps, state, args):
        yield from steps_of(stage, count, size, steps, state, args)
        net = state["net"] if "net" in state else state["unet"]
        weights = {key: value.detach() for key, value in net.named_parameters()}
        torch.save(weights, f"{folder}-{rank}-{stage}.pt")

    steps_of = module.training_steps
    module.save = listed
    module.training_steps = kept
    script(name, folder, options)
    written.close()


def gradients(folder):
    """Of the losses that need every process's rows, for nets on rows dealt out to processes."""
    module = sys.modules["train_scan_diffusion"]
    args = argparse.Namespace(device="cpu")
    args.rank = int(os.environ.get("RANK", 0))
    args.world = int(os.environ.get("WORLD_SIZE", 1))
    if args.world > 1:
        torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    x = torch.randn(2, 12, 5).double()[:, args.rank :: args.world]
    labels = torch.arange(12)[args.rank :: args.world] % 3
    found = {}
    for name in ("nt_xent", "scan_loss", "selflabel_loss"):
        torch.manual_seed(1)
        net = torch.nn.Linear(5, 3).double()
        forward = module.distribute(net, args)
        a, b = forward(x.flatten(0, 1)).chunk(2)
        if name == "nt_xent":
            parts = [module.gather(F.normalize(z), args) for z in (a, b)]
            loss = module.nt_xent(*parts, 0.1)
        elif name == "scan_loss":
            loss = module.scan_loss(module.gather(a, args), module.gather(b, args), 5.0)
        else:
            known = module.gather(labels, args)
            loss = module.selflabel_loss(module.gather(a, args)[known > 0], known[known > 0])
        (loss * args.world).backward()
        found[name] = {"loss": loss.detach(), "weight": net.weight.grad, "bias": net.bias.grad}
    torch.save(found, folder / f"gradients-{args.world}-{args.rank}.pt")


def job_gradients(folder):
    wait(forked(gradients, folder))
    two(gradients, folder, log=folder / "log-")


def job_scan(folder):
    two(watched, "train_scan_diffusion", folder / "two", SCAN, log=folder / "log-")


def job_classifier(folder):
    wait(forked(script, "train_classifier", folder / "one", CLASSIFIER, LOG=f"{folder}/log"))
    two(watched, "train_classifier", folder / "two", CLASSIFIER, log=folder / "log-")


def job_kill(folder):
    """Killed as soon as the fifth step of a stage of SCAN is in its checkpoint, and started again."""
    module = sys.modules["train_scan_diffusion"]
    wait(forked(script, "train_scan_diffusion", folder / "plain", LABELLED))
    module.CHECKPOINT_SECONDS = 0
    slow = [*LABELLED, "--steps", "6"]
    child = forked(script, "train_scan_diffusion", folder / "killed", slow)
    while not (folder / "killed" / ".checkpoint.diffusion.pt").exists():
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    log = folder / "log"
    wait(forked(script, "train_scan_diffusion", folder / "killed", LABELLED, LOG=str(log)))
