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
STAGES = {  # and the learning rates they end with
    SCAN: {"simclr": 2e-4, "scan-1": 1e-3, "scan-2": 1e-3, "selflabel": 1e-4, "diffusion": 0},
    ENCODER: {"encoder": 1e-6},
    CLASSIFIER: {f"classifier_{method}": 0 for method in ("ce", "dream", "dream-id", "sd")},
}
FORK = multiprocessing.get_context("fork")


def copy_inputs(tiny_run, folder):
    ignore = shutil.ignore_patterns("*.pt", "*.png", "scores", "*_test.*")
    return shutil.copytree(tiny_run, folder, ignore=ignore)


def weights(folder):
    """Content of the .pt and .safetensors files of a folder, options left out."""
    held = {path.name: load_file(path) for path in folder.rglob("*.safetensors")}
    for path in folder.glob("*.pt"):
        held[path.name] = torch.load(path, weights_only=True)
        held[path.name].pop("config")
    return held


def fork(world, job, *args):
    """job(*args) in one or two processes, with what torchrun puts into their environment."""
    print(f"\n== {world} {args}", flush=True)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(os.getpid() + 9999)}
    processes = []
    for rank in range(world):
        os.environ.update(address, WORLD_SIZE=str(world), RANK=str(rank))
        processes.append(FORK.Process(target=job, args=args))
        processes[-1].start()
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
    """python test_training.py FOLDER: imports the scripts once and forks, for the tests below."""
    for name in JOBS:
        importlib.import_module(name)
    fork(1, gradients, folder)
    fork(2, gradients, folder)
    fork(1, call, folder / "one", CLASSIFIER, JOBS[CLASSIFIER])
    for name in JOBS:
        fork(2, call, folder / "two", name, JOBS[name])
    long = [*QUICK, "--steps", "40"]
    fork(1, call, folder / "plain", SCAN, long)
    sys.modules[SCAN].CHECKPOINT_SECONDS = 0
    process = FORK.Process(target=call, args=(folder / "killed", SCAN, long))
    process.start()
    while not (folder / "killed" / ".checkpoint.diffusion.pt").exists():
        time.sleep(0.001)
    process.kill()
    process.join()
    fork(1, call, folder / "killed", SCAN, long)


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
    alone, *shared = (torch.load(forked[0] / f"gradients-{n}")[loss] for n in ("1-0", "2-0", "2-1"))
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


@pytest.mark.parametrize("stage", STAGES[CLASSIFIER])
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
    expected = weights(forked[0] / "plain")
    torch.testing.assert_close(weights(forked[0] / "killed"), expected, rtol=0, atol=0)


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
    torch.testing.assert_close(weights(stopped), weights(plain), rtol=0, atol=0)
    assert not list(stopped.glob(".*"))


def test_other_inputs_need_a_restart(tmp_path, main, stop, capsys):
    stop(SCAN, tmp_path, "diffusion", *QUICK)
    np.save(tmp_path / "train.npy", np.load(tmp_path / "train.npy")[::-1])
    with pytest.raises(SystemExit, match=r"diffusion\.pt has inputs .*; give that, or --restart$"):
        main(SCAN, "--dir", tmp_path, *QUICK)
    main(SCAN, "--dir", tmp_path, *QUICK, "--restart")
    assert "going on" not in capsys.readouterr().out


def test_a_step_depends_on_seed_stage_step_and_rank(load, monkeypatch, tmp_path):
    monkeypatch.setattr(load(ENCODER), "plain_options", vars)
    monkeypatch.setattr(load(ENCODER), "save", print)
    seeds = set()
    for seed, stage, rank in itertools.product((0, 1), "ab", (0, 1)):
        args = argparse.Namespace(seed=seed, dir=tmp_path, restart=False, rank=rank, world=2)
        for step, _ in load(ENCODER).training_steps(stage, 20, 6, 7, {}, args):
            seeds.add((torch.initial_seed(), seed, stage, step, rank))
    assert len({seed for seed, *_ in seeds}) == len(seeds) == 2 * 2 * 2 * 7


if __name__ == "__main__":
    program(Path(sys.argv[1]))
