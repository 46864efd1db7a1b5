"""Training: stopped and started again, or shared by two processes, it ends as it should."""

import argparse
import importlib
import itertools
import multiprocessing
import os
import re
import shutil
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
PRETEXT = "--pretext-epochs 5 --pretext-batch 200 --starts 2 --scan-epochs 5 --scan-batch 200"
SELFLABEL = "--selflabel-epochs 3 --selflabel-batch 200 --confidence 0.4"
UNET = "--channels 32,32 --batch-size 8 --steps 6"
QUICK = f"--data digits:0-1 --labels dataset {UNET}".split()
CE = "--init ce --epochs 6 --batch-size 72 --lr 0.02 --inlier-batch 36"
REST = "--dream-epochs 5 --dream-batch-size 72 --dream-lr 0.02 --sd-epochs 5 --sd-batch-size 72"
SCAN, ENCODER, CLASSIFIER = "train_scan_diffusion", "train_text_encoder", "train_classifier"
JOBS = {
    SCAN: f"{PRETEXT} {SELFLABEL} {UNET}".split(),
    ENCODER: ["--epochs", "2"],
    CLASSIFIER: f"--method ce dream dream-id sd {CE} {REST}".split(),
}
METHODS = ("classifier_ce", "classifier_dream", "classifier_dream-id", "classifier_sd")
STAGES = {  # and the learning rates they end with
    SCAN: {"simclr": 2e-4, "scan-1": 1e-3, "scan-2": 1e-3, "selflabel": 1e-4, "diffusion": 0},
    ENCODER: {"encoder": 1e-6},
    CLASSIFIER: dict.fromkeys(METHODS, 0),
}


def copy_inputs(tiny_run, folder):
    ignore = shutil.ignore_patterns("*.pt", "*.png", "scores", "*_test.*")
    return shutil.copytree(tiny_run, folder, ignore=ignore)


def assert_same_weights(*folders):
    files = [{path.name: load_file(path) for path in f.rglob("*.safetensors")} for f in folders]
    for folder, held in zip(folders, files, strict=True):
        for path in folder.glob("*.pt"):
            held[path.name] = torch.load(path, weights_only=True)
            held[path.name].pop("config")
    assert files[0]
    torch.testing.assert_close(*files, rtol=0, atol=0)


# The program of this file imports the scripts once and forks; the tests look at what it leaves.


def fork(world, job, *args):
    """job(*args) in one or two processes, with what torchrun puts into their environment."""
    print(f"\n== {world} {args}", flush=True)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(os.getpid() + 9999)}
    processes = []
    for rank in range(world):
        os.environ.update(address, WORLD_SIZE=str(world), RANK=str(rank))
        process = multiprocessing.get_context("fork").Process(target=job, args=args)
        process.start()
        processes.append(process)
    return processes


def finish(processes):
    for process in processes:
        process.join()
        assert process.exitcode == 0


def call(folder, name, options):
    """main() of a script, which says how each stage ends; the second process cannot save."""
    module = sys.modules[name]
    steps_of = module.training_steps

    def told(stage, count, size, steps, state, args):
        yield from steps_of(stage, count, size, steps, state, args)
        net = next(iter(state.values()))
        total = sum(value.double().abs().sum() for value in net.parameters())
        rate = state["optimizer"].param_groups[0]["lr"]
        print(f"{stage} of {args.rank} in {folder.name} ends at {total} {rate} .", file=sys.stderr)

    module.training_steps = told
    if os.environ["RANK"] == "1":
        module.save = None
    sys.argv = [name, "--dir", str(folder), *options]
    module.main()


def gradients(folder):
    """Of the losses that need the rows of every process: weight and bias of a linear net."""
    rank, world = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    args = argparse.Namespace(device="cpu", rank=rank, world=world)
    torch.distributed.init_process_group("gloo")
    module = sys.modules[SCAN]
    x = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0))[:, rank::world]
    labels = module.gather(torch.arange(12)[rank::world] % 3, args)
    found = {}
    for name in ("nt_xent", "scan_loss", "selflabel_loss"):
        torch.manual_seed(rank)  # DistributedDataParallel begins with the first one's weights
        net = torch.nn.Linear(5, 3)
        forward = module.distribute(net, args)
        a, b = (module.gather(z, args) for z in F.normalize(forward(x), dim=2))
        last = {"nt_xent": [b, 0.5], "scan_loss": [b, 5.0], "selflabel_loss": [labels]}[name]
        (getattr(module, name)(a, *last) * world).backward()
        found[name] = [net.weight.grad, net.bias.grad]
    torch.save(found, folder / f"gradients-{world}-{rank}")


def program(folder):
    for name in JOBS:
        importlib.import_module(name)
    finish(fork(1, gradients, folder))
    finish(fork(2, gradients, folder))
    finish(fork(1, call, folder / "one", CLASSIFIER, JOBS[CLASSIFIER]))
    for name in JOBS:
        finish(fork(2, call, folder / "two", name, JOBS[name]))
    long = [*QUICK, "--steps", "40"]
    finish(fork(1, call, folder / "plain", SCAN, long))
    sys.modules[SCAN].CHECKPOINT_SECONDS = 0
    killed = folder / "killed"
    (process,) = fork(1, call, killed, SCAN, long)
    while not (killed / ".checkpoint.diffusion.pt").exists():
        time.sleep(0.001)
    process.kill()
    process.join()
    finish(fork(1, call, killed, SCAN, long))


@pytest.fixture(scope="module")
def forked(tiny_run, tmp_path_factory):
    """Folder of program(), its standard output for each job, and its standard error."""
    folder = tmp_path_factory.mktemp("forked")
    copy_inputs(tiny_run, folder / "one")
    copy_inputs(tiny_run, folder / "two")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, done.stdout.split("\n== ")[1:], done.stderr


@pytest.mark.parametrize("loss", ["nt_xent", "scan_loss", "selflabel_loss"])
def test_gather_gives_two_processes_the_gradient_of_one(forked, loss):
    names = ("gradients-1-0", "gradients-2-0", "gradients-2-1")
    alone, *shared = (torch.load(forked[0] / name)[loss] for name in names)
    assert alone[0].abs().max() > 0.01
    for found in shared:
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("script", JOBS)
def test_two_processes_end_in_the_same_weights(forked, script):
    folder, _, said = forked
    for stage, rate in STAGES[script].items():
        ends = [re.findall(f"{stage} of {r} in two ends at (.*) (.*) \\.", said) for r in "01"]
        assert ends[0] == ends[1], stage
        assert float(ends[0][0][1]) == pytest.approx(rate, abs=1e-12), stage
    assert not list((folder / "two").rglob(".*"))


@pytest.mark.parametrize("stage", METHODS)
def test_the_loss_of_two_processes_falls_like_that_of_one(forked, stage):
    logs = [log for log in forked[1] if CLASSIFIER in log.splitlines()[0]]
    assert len(logs) == 2
    for log in logs:
        losses = [float(loss) for loss in re.findall(f"{stage} step .*, loss (.*)", log)]
        assert len(losses) >= 20
        assert np.mean(losses[-4:]) < 0.75 * np.mean(losses[:4])


def test_killed_and_started_again_it_ends_in_the_same_weights(forked):
    done = re.search(r"going on from step (\d+)", forked[1][-1])
    assert 1 <= int(done[1]) < 40
    assert_same_weights(forked[0] / "killed", forked[0] / "plain")


@pytest.fixture
def stop(load, main, monkeypatch):
    """stop(script, folder, stage, *options): main(), until the fourth step of the stage."""

    def stop(script, folder, stage, *options):
        module = load(script)
        steps_of = module.training_steps

        def stopped(name, *rest):
            for step, rows in steps_of(name, *rest):
                if (name, step) == (stage, 3):
                    raise KeyboardInterrupt
                yield step, rows

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, "training_steps", stopped)
            patch.setattr(module, "CHECKPOINT_SECONDS", 0)
            main(script, "--dir", folder, *options)

    return stop


@pytest.mark.parametrize("script", JOBS)
def test_stopped_in_every_stage_it_ends_in_the_same_weights(tiny_run, tmp_path, main, stop, script):
    plain, stopped = (copy_inputs(tiny_run, tmp_path / name) for name in ("plain", "stopped"))
    main(script, "--dir", plain, *JOBS[script])
    for stage in STAGES[script]:
        stop(script, stopped, stage, *JOBS[script])
    main(script, "--dir", stopped, *JOBS[script])
    assert_same_weights(stopped, plain)


def test_other_options_and_damage_need_a_restart(tmp_path, main, stop, capsys):
    def refused(text, *options):
        with pytest.raises(SystemExit, match=text) as end:
            main(SCAN, "--dir", tmp_path, *QUICK, *options)
        assert "\n" not in end.value.code

    stop(SCAN, tmp_path, "diffusion", *QUICK)
    refused("diffusion.pt has lr 0.002, not 0.5; give that, or --restart", "--lr", 0.5)
    images = np.load(tmp_path / "train.npy")
    np.save(tmp_path / "train.npy", images[::-1])
    refused("diffusion.pt has inputs .* --restart")
    (tmp_path / ".checkpoint.diffusion.pt").write_bytes(b"PK\x03\x04 half a file")
    refused("diffusion.pt is missing or damaged; give --restart")
    main(SCAN, "--dir", tmp_path, *QUICK, "--restart")
    assert "going on" not in capsys.readouterr().out
    assert (tmp_path / "diffusion").exists()


def test_a_loss_that_is_not_finite_ends_the_stage(tiny_run, tmp_path, main):
    folder = copy_inputs(tiny_run, tmp_path / "run")
    with pytest.raises(SystemExit, match="^encoder: the loss is (nan|inf) at step [1-9].*$"):
        main(ENCODER, "--dir", folder, "--lr", 1e30)
    assert not (folder / "text_encoder.pt").exists()


def test_a_step_depends_on_seed_stage_step_and_rank(load, monkeypatch, tmp_path):
    monkeypatch.setattr(load(ENCODER), "plain_options", vars)
    seeds = set()
    for seed, stage, rank in itertools.product((0, 1), "ab", (0, 1)):
        folder = tmp_path / f"{seed}{stage}{rank}"
        folder.mkdir()
        args = argparse.Namespace(seed=seed, dir=folder, restart=False, rank=rank, world=2)
        for step, _ in load(ENCODER).training_steps(stage, 20, 6, 7, {}, args):
            seeds.add((torch.initial_seed(), seed, stage, step, rank))
    assert len({seed for seed, *_ in seeds}) == len(seeds) == 2 * 2 * 2 * 7


if __name__ == "__main__":
    program(Path(sys.argv[1]))
