"""Shared by all tests: scripts as modules, scripts as subprocesses, and one tiny run of the whole pipeline."""

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin slow a busy machine tenfold

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def load():
    """load(name): a script of the repository as a module; sys.modules and sys.path stay as they are."""

    @cache
    def load(name):
        spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def run():
    """run(script, *args, cwd=None): a script of the repository as a subprocess, with its output captured as text."""

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
    """Shared directory left by the six scripts on digits 0-2, each at its smallest sensible size. Copy it to change it.

    K = 6, 12 outliers per class, 16 candidates per boundary point, sigma and S as in the recipe.
    """
    folder = tmp_path_factory.mktemp("tiny") / "run"

    def step(script, *args):
        done = run(script, "--dir", folder, *args)
        assert done.returncode == 0, f"{script} {args} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"

    def lane(*steps):
        for arguments in steps:
            step(*arguments)

    scan = "--pretext-epochs", 6, "--pretext-batch", 128, "--scan-epochs", 8, "--selflabel-epochs", 1
    unet = "--channels", "16,16", "--steps", 60, "--batch-size", 32
    step("train_scan_diffusion", "--data", "digits:0-2", *scan, *unet)
    small = "--K", 6, "--boundary", 6, "--draw", 6, "--candidates", 16, "--per-class", 12, "--steps", 4
    paper_a = [
        ("train_text_encoder", "--epochs", 2),
        ("sample_outliers", *small),
        ("sample_outliers", "--inliers", *small),
    ]
    test = "sample_sd_outliers", "--steps", 4, "--split", "test"
    paper_b = [("sample_sd_outliers", "--steps", 4), test, (*test, "--reconstruct")]
    with ThreadPoolExecutor(2) as pool:
        for lane_done in [pool.submit(lane, *steps) for steps in (paper_a, paper_b)]:
            lane_done.result()
    step("train_classifier", "--epochs", 2)
    step("evaluate", "--ood-data", "digits:6-7", "patches", "--bootstrap", 20)
    return folder
