"""Training: stopped and started again, or shared by two processes, it ends as it should."""

import argparse
import importlib
import itertools
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
    torch.testing.assert_close(*files, rtol=0, atol=0)


def fork(log, job, *args, **environment):
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


def torchrun(world, log, *job):
    """job on one or two processes, with what torchrun puts into their environment."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(os.getpid() + 9999)}
    group["WORLD_SIZE"] = str(world)
    for child in [fork(f"{log}-{rank}", *job, RANK=str(rank), **group) for rank in range(world)]:
        if os.waitpid(child, 0)[1]:
            sys.exit("a process failed")


def call(name, folder, options):
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


def forks(folder):
    """The program of this file: imports the scripts once, then makes what the tests look at."""
    for name in JOBS:
        importlib.import_module(name)
    log = folder / "log"
    torchrun(1, log, gradients, folder)
    torchrun(2, log, gradients, folder)
    torchrun(1, folder / "one", call, CLASSIFIER, folder / "1", JOBS[CLASSIFIER])
    for name in JOBS:
        torchrun(2, folder / name, call, name, folder / "2", JOBS[name])
    job = [call, SCAN, folder / "plain", [*QUICK, "--steps", "40"]]
    torchrun(1, log, *job)
    sys.modules[SCAN].CHECKPOINT_SECONDS = 0
    job[2] = folder / "killed"
    child = fork(log, *job, RANK="0")
    while not (folder / "killed" / ".checkpoint.diffusion.pt").exists():
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    torchrun(1, folder / "killed", *job)


@pytest.fixture(scope="module")
def forked(tiny_run, tmp_path_factory):
    """Folder of forks(), and what the processes wrote to standard error."""
    folder = tmp_path_factory.mktemp("forks")
    copy_inputs(tiny_run, folder / "1")
    copy_inputs(tiny_run, folder / "2")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, done.stderr


@pytest.mark.parametrize("loss", ["nt_xent", "scan_loss", "selflabel_loss"])
def test_gather_gives_two_processes_the_gradient_of_one(forked, loss):
    names = ("gradients-1-0", "gradients-2-0", "gradients-2-1")
    alone, *shared = (torch.load(forked[0] / name)[loss] for name in names)
    assert alone[0].abs().max() > 0.01
    for found in shared:
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("script", JOBS)
def test_two_processes_end_in_the_same_weights(forked, script):
    folder, said = forked
    for stage, rate in STAGES[script].items():
        ends = [re.findall(f"{stage} of {r} in 2 ends at (.*) (.*) \\.", said) for r in "01"]
        assert ends[0] == ends[1], stage
        assert float(ends[0][0][1]) == pytest.approx(rate, abs=1e-12), stage
    assert not list((folder / "2").rglob(".*"))


@pytest.mark.parametrize("stage", METHODS)
def test_the_loss_of_two_processes_falls_like_that_of_one(forked, stage):
    logs = [(forked[0] / f"{name}-0").read_text() for name in ("one", CLASSIFIER)]
    for log in logs:
        losses = [float(loss) for loss in re.findall(f"{stage} step .*, loss (.*)", log)]
        assert len(losses) >= 20
        assert np.mean(losses[-4:]) < 0.75 * np.mean(losses[:4])


def test_killed_and_started_again_it_ends_in_the_same_weights(forked):
    done = re.search(r"going on from step (\d+)", (forked[0] / "killed-0").read_text())
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
    assert not list(stopped.glob(".*"))


def refused(main, script, folder, *options):
    """The one line that ends main()."""
    with pytest.raises(SystemExit) as end:
        main(script, "--dir", folder, *options)
    assert "\n" not in end.value.code
    return end.value.code


def test_other_options_and_damage_need_a_restart(tmp_path, main, stop, capsys):
    stop(SCAN, tmp_path, "diffusion", *QUICK)
    line = refused(main, SCAN, tmp_path, *QUICK, "--lr", 0.5)
    assert ".checkpoint.diffusion.pt has lr 0.002, not 0.5; give that, or --restart" in line
    images = np.load(tmp_path / "train.npy")
    np.save(tmp_path / "train.npy", images[::-1])
    assert "has inputs" in refused(main, SCAN, tmp_path, *QUICK)
    (tmp_path / ".checkpoint.diffusion.pt").write_bytes(b"PK\x03\x04 half a file")
    line = refused(main, SCAN, tmp_path, *QUICK)
    assert "diffusion.pt is missing or damaged; give --restart" in line
    main(SCAN, "--dir", tmp_path, *QUICK, "--restart")
    assert "going on" not in capsys.readouterr().out
    assert (tmp_path / "diffusion").exists()


def test_a_loss_that_is_not_finite_ends_the_stage(tiny_run, tmp_path, main):
    folder = copy_inputs(tiny_run, tmp_path / "run")
    line = refused(main, ENCODER, folder, "--lr", 1e30)
    assert re.match("encoder: the loss is (nan|inf) at step [1-9]", line)
    assert not (folder / "text_encoder.pt").exists()


def test_only_other_options_of_scan_do_scan_again(forked, tmp_path, main, capsys):
    folder = shutil.copytree(forked[0] / "2", tmp_path / "run")
    for options in (["--lr", 1e-3, "--p-drop", 0.2], ["--lambda-e", 4, "--until", "labels"]):
        main(SCAN, "--dir", folder, *JOBS[SCAN], *options)
        assert ("simclr step" in capsys.readouterr().out) == ("--lambda-e" in options)


def test_a_step_depends_on_seed_stage_step_and_rank(load, monkeypatch, tmp_path):
    module = load(ENCODER)
    monkeypatch.setattr(module, "plain_options", vars)
    seeds = set()
    for seed, stage in itertools.product((0, 1), "ab"):
        shares = []
        for world, rank in ((1, 0), (2, 0), (2, 1)):
            args = argparse.Namespace(seed=seed, world=world, rank=rank, dir=tmp_path)
            args.restart = False
            rows = []
            for step, index in module.training_steps(stage, 20, 6, 7, {}, args):
                seeds.add((torch.initial_seed(), seed, stage, step, rank))
                rows.append(index.tolist())
            module.drop_checkpoints([stage], args)
            shares.append(rows)
        pairs = zip(*shares[1:], strict=True)
        assert shares[0] == [list(sum(zip(*pair, strict=True), ())) for pair in pairs]
        assert len({row for rows in shares[0][:3] for row in rows}) == 18  # a pass
        assert shares[0][:3] != shares[0][3:6]
    assert len(seeds) == len({seed for seed, *_ in seeds}) == 2 * 2 * 7 * 2


if __name__ == "__main__":
    forks(Path(sys.argv[1]))
