"""Measurements that the README quotes; nothing here is asserted.

python tests/benchmark.py seeds      # the six scripts for seeds 0, 1, 2: table, seconds, memory
python tests/benchmark.py table      # that table again from the results in --dir
python tests/benchmark.py figures    # the README's pictures from the run of seed 0 in --dir
python tests/benchmark.py knn        # torch.cdist against faiss-cpu (if installed) and scikit-learn
python tests/benchmark.py steps      # DPM-Solver++ on Gaussian data against its exact flow
"""

import argparse
import json
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from matplotlib.figure import Figure
from sklearn.neighbors import NearestNeighbors

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
STEPS = (
    ("train_scan_diffusion.py",),
    ("train_text_encoder.py",),
    ("sample_outliers.py",),
    ("sample_sd_outliers.py",),
    ("sample_sd_outliers.py", "--split", "test", "--reconstruct"),
    ("train_classifier.py",),
    ("evaluate.py",),
)


def run_seeds(folder, seeds):
    """The pipeline once per seed, in a folder of its own, with its log and seconds."""
    for seed in seeds:
        target = folder / f"seed{seed}"
        target.mkdir(parents=True, exist_ok=True)
        with open(target / "log.txt", "w") as log:
            for script, *flags in STEPS:
                start = time.time()
                command = [
                    sys.executable,
                    ROOT / script,
                    "--dir",
                    target,
                    "--seed",
                    str(seed),
                    *flags,
                ]
                subprocess.run(command, check=True, stdout=log, stderr=subprocess.DEVNULL)
                line = f"seconds {' '.join([script, *flags])}: {time.time() - start:.0f}"
                print(f"seed {seed} {line}", flush=True)
                print(line, file=log, flush=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"largest memory of a script: {peak:.0f} MB")


def mean_and_deviation(rows, field):
    """Mean and sample standard deviation in percent; - where a figure does not exist."""
    figures = 100 * np.array([row[field] for row in rows], dtype=float)  # None becomes nan
    if np.isnan(figures).any():
        return "-"
    deviation = figures.std(ddof=1) if len(figures) > 1 else 0
    return f"{figures.mean():.1f} ± {deviation:.1f}"


def print_table(folder):
    """Means and deviations over the seeds, in percent, as Markdown, and what the logs say."""
    for log in sorted(folder.glob("seed*/log.txt")):
        text = log.read_text()
        accuracies = re.findall(r"^(1 SimCLR|3 SCAN|4 self).*ACC ([\d.]+)", text, re.M)
        percentile = re.findall(r"mean percentile of d_K ([\d.]+)", text)
        seconds = [int(number) for number in re.findall(r"^seconds .*: (\d+)$", text, re.M)]
        flips = re.findall(r"ce takes.*", text)
        print(log.parent.name, accuracies, "percentile", percentile, f"{sum(seconds)} s", *flips)
    values = {}
    paths = sorted(folder.glob("seed*/results.json"))
    for path in paths:
        for record in json.loads(path.read_text()):
            key = record["method"], record["score"]
            values.setdefault(key, {}).setdefault(record["ood"], []).append(record)
    sets = list(next(iter(values.values())))
    print(f"\n{len(paths)} seeds, mean ± std, percent; AUROC / FPR95 against each set\n")
    print("| method | score |", " | ".join(sets), "| ID accuracy |")
    print("|---" * (len(sets) + 3) + "|")
    for (method, score), by_set in values.items():
        cells = []
        for rows in by_set.values():
            cells.append(
                f"{mean_and_deviation(rows, 'auroc')} / {mean_and_deviation(rows, 'fpr95')}"
            )
        cells.append(mean_and_deviation(by_set[sets[0]], "id_accuracy"))
        print(f"| {method} | {score} |", " | ".join(cells), "|")


def figures(run, target):
    """Pictures of one run; overview.png: per class an ID image and an outlier of each paper."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("outliers", "sd_outliers", "scores", "tsne"):
        shutil.copy(run / f"{name}.png", target)
    images = np.load(run / "train.npy")
    outliers = np.load(run / "outliers.npy")
    sd_outliers = np.load(run / "sd_outliers.npy")
    table = np.loadtxt(run / "outliers.csv", int, delimiter=",", skiprows=1, usecols=(0, 1, 2))
    _, first = np.unique(table[:, 1], return_index=True)
    index, _, source = table[first].T
    rows = {
        "ID image": images[source],
        "DREAM-OOD": outliers[index],
        "SD outlier": sd_outliers[source],
    }
    figure = Figure((1.1 * len(first), 3.3), layout="constrained")
    axes = figure.subplots(3, len(first))
    for line, (title, row) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(title)
        for axis, image in zip(line, row, strict=True):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
    figure.savefig(target / "overview.png", dpi=80)


def steps():
    """Relative error of 20 steps of DPM-Solver++ from S to 0 on Gaussian data."""
    import sample_sd_outliers

    scheduler = DDPMScheduler(1000, 1e-4, 0.02, "linear")
    abar = scheduler.alphas_cumprod.double()
    mean = 0.2
    for std in (0.15, 0.5):
        for S in (100, 200, 999):
            torch.manual_seed(0)
            x = mean + std * torch.randn(4096).double()
            eps = torch.randn(4096).double()
            x_S = abar[S].sqrt() * x + (1 - abar[S]).sqrt() * eps
            spread = (abar[S] * std**2 + 1 - abar[S]).sqrt()
            exact = mean + std * (x_S - abar[S].sqrt() * mean) / spread
            even = np.linspace(S, 0, 20, endpoint=False).round().astype(int).tolist()
            errors = []
            for grid in (even, sample_sd_outliers.quadratic_steps(S, 20)):
                solver = DPMSolverMultistepScheduler.from_config(scheduler.config)
                solver.set_timesteps(timesteps=grid)
                x_t = x_S.clone()
                for t in solver.timesteps:
                    a = abar[int(t)]
                    noise = (x_t - a.sqrt() * mean) * (1 - a).sqrt() / (a * std**2 + 1 - a)
                    x_t = solver.step(noise, t, x_t).prev_sample
                errors.append(100 * ((x_t - exact).norm() / exact.norm()).item())
            print(f"std {std}, S = {S}: even {errors[0]:.2f} %, quadratic {errors[1]:.2f} %")


def race(ways, rounds):
    """Seconds of every way, in turn: all meet the same load; ratios to the first, by medians."""
    seconds = {name: [] for name in ways}
    for _ in range(rounds + 1):  # the first round warms up
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    first = np.array(next(iter(seconds.values()))[1:])
    for name, times in seconds.items():
        times = np.array(times[1:])
        ratio = np.median(times / first)
        print(f"  {name}: median {np.median(times):.2f} s, {ratio:.2f} of the first", flush=True)


def knn():
    """The scripts' knn at 10,000 x 50,000 x 512, k = 50, and at DREAM-OOD's shape, K = 300."""
    from evaluate import knn as search

    try:
        import faiss
    except ImportError:
        faiss = None
        print("faiss-cpu is not installed: compared with scikit-learn alone")
    threads = torch.get_num_threads()

    def flat(queries, bank, k):
        faiss.omp_set_num_threads(threads)
        index = faiss.IndexFlatL2(bank.shape[1])
        index.add(bank.numpy())
        return index.search(queries.numpy(), k)

    def brute(queries, bank, k):
        index = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(bank.numpy())
        return index.kneighbors(queries.numpy())

    for n, m, d, k in ((10_000, 50_000, 512, 50), (75_000, 1000, 768, 300)):
        torch.manual_seed(0)
        queries = F.normalize(torch.randn(n, d), dim=1)
        bank = F.normalize(torch.randn(m, d), dim=1)
        print(f"{n:,} queries, {m:,} points, {d} dimensions, k = {k}, {threads} threads")
        ways = {"torch.cdist": search, "scikit-learn": brute}
        if faiss:
            ways = {"faiss-cpu": flat} | ways
        data = queries, bank, k
        race({name: lambda way=way, data=data: way(*data) for name, way in ways.items()}, 3)
        exact = brute(queries[:500].double(), bank.double(), k)[0][:, -1]
        error = np.abs(search(queries[:500], bank, k)[0][:, -1].numpy() - exact).max()
        print(f"  largest error of a k-th distance {error:.0e}")


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("what", choices=("seeds", "table", "figures", "knn", "steps"))
    text = "folder of the runs (default: %(default)s)"
    parser.add_argument("--dir", type=Path, default=Path("runs/seeds"), help=text)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    args = parser.parse_args()
    if args.what == "seeds":
        run_seeds(args.dir, args.seeds)
    if args.what in ("seeds", "table"):
        print_table(args.dir)
    if args.what == "figures":
        figures(args.dir / "seed0", ROOT / ".github" / "figures")
    if args.what == "knn":
        knn()
    if args.what == "steps":
        steps()


if __name__ == "__main__":
    main()
