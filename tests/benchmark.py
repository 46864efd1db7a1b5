"""Measurements that the README quotes; nothing here is asserted.

python tests/benchmark.py splits     # the six scripts for five splits of the digits, three seeds
python tests/benchmark.py ablations  # then one change at a time, in folders that link to those
python tests/benchmark.py figures    # the README's pictures from the run of seed 0 in --dir
python tests/benchmark.py knn        # torch.cdist against faiss-cpu (if installed) and scikit-learn
python tests/benchmark.py steps      # DPM-Solver++ on Gaussian data against its exact flow

splits and ablations use two processes of one thread, go on where they were stopped, and print
their tables when all is there.
"""

import argparse
import contextlib
import importlib
import json
import math
import multiprocessing
import os
import re
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from matplotlib.figure import Figure
from sklearn.neighbors import NearestNeighbors
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402

SPLITS = ("0,1,2,4,5,9", "0,3,5,7,8,9", "0,1,5,6,7,8", "3,4,5,7,8,9", "0,1,2,3,7,8")  # known
STEPS = (
    "train_scan_diffusion --data digits:{known}",
    "train_text_encoder",
    "sample_sd_outliers",
    "sample_sd_outliers --split test --reconstruct",
    "sample_sd_outliers --split test",
    "sample_outliers",
    "train_classifier",
    "evaluate --ood-data digits:{unknown} patches",
)
EVALUATE = STEPS[-1]
PUBLISHED = "sample_outliers --per-class 150"  # one outlier per image, and none is dropped
DREAM = "train_classifier --method dream --filter none"
SD = "train_classifier --method sd frozen"
SHIFTS = {
    "rotated by 30 degrees": lambda x: v2.functional.rotate(x, 30),
    "blurred": lambda x: v2.functional.gaussian_blur(x, 3, 1.0),
    "noisy": lambda x: (x + 51 * torch.randn(x.shape)).clamp(0, 255).byte(),
    "contrast 0.4": lambda x: v2.functional.adjust_contrast(x, 0.4),
}
SHIFTED = f"{EVALUATE} --shift-data {{shifted}}"
INPUTS = ("data.json", "scan.pt", "*.npy", "*outliers.*s*", "diffusion")
INPUTS += ("classifier_ce.pt", "classifier_frozen.pt")
# name: (folder it starts from, commands); {kept}: as many outliers as the filter knn kept
VARIANTS = {"published": (".", (PUBLISHED, DREAM, EVALUATE))}
REFERENCES = {"published": ".", "labels": "."}  # what a variant is compared with
for number in (450, 900, 2700):
    for judge in ("none", "knn", "energy"):
        name = f"{number} {judge}"
        steps = (f"{DREAM} --outliers {number} --filter {judge}", EVALUATE)
        VARIANTS[name] = (".", steps)
        REFERENCES[name] = f"variants/{number} none"
    VARIANTS[f"{number} random"] = (".", (f"{DREAM} --outliers {{kept}}", EVALUATE))
    REFERENCES[f"{number} knn"] = f"variants/{number} random"
    REFERENCES[f"{number} none"] = "variants/900 none"
for name, flags in {
    "oe": "--loss oe --beta 0.5",
    "beta 0.1": "--beta 0.1",
    "beta 2.5": "--beta 2.5",
}.items():
    VARIANTS[name] = ("variants/published", (f"{DREAM} {flags}", EVALUATE))
for option, values in {
    "selection": ("official", "random", "boundary"),
    "source": ("noise", "interpolate", "anchor"),
    "sigma": (0.03, 0.15),
    "K": (10, 100),
}.items():
    for value in values:
        steps = (f"{PUBLISHED} --{option} {value}", DREAM, EVALUATE)
        VARIANTS[f"{option} {value}"] = (".", steps)
for S in (50, 100, 150, 200):
    for w in (2, 3, 4):
        VARIANTS[f"S {S} w {w}"] = (".", (f"sample_sd_outliers --S {S} --w {w}", SD, EVALUATE))
VARIANTS |= {
    "labels": (
        "variants",  # nothing to link to
        (
            "train_scan_diffusion --data digits:{known} --labels dataset",
            "train_text_encoder",
            "sample_outliers",
            "sample_sd_outliers",
            "train_classifier",
            EVALUATE,
        ),
    ),
    "dream-id": (
        ".",
        (f"{PUBLISHED} --inliers", "train_classifier --method dream-id ce-pseudo", SHIFTED),
    ),
    "equal-budget": (
        ".",
        ("train_classifier --method ce-pseudo --sd-batch-size 128 --sd-epochs 80", SHIFTED),
    ),
}
DEFAULTS = {"dream": "variants/published", "sd": "."}
KEYS = (("dream", "energy"), ("sd", "distance"), ("sd", "voting"), ("sd", "distance+voting"))
GENERATED = {"dream": r"\boutliers", "sd": "sd_outliers"}


def run(step, folder, known, seed):
    """One script, in this process, unless done.txt of the folder says that it is done."""
    unknown = ",".join(sorted(set("0123456789") - set(known)))
    step = step.replace("{known}", known).replace("{unknown}", unknown)
    if "{shifted}" in step:
        step = step.replace("{shifted}", " ".join(map(str, shifted_sets(folder, known))))
    done = folder / "done.txt"
    if done.exists() and step in done.read_text().splitlines():
        return
    script, *flags = step.split()
    sys.argv = [script, "--dir", str(folder), "--seed", str(seed), *flags]
    start = time.time()
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(folder / "log.txt", "a"))
        bars = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(log))
        stack.enter_context(contextlib.redirect_stderr(bars))
        try:
            importlib.import_module(script).main()
        except SystemExit as error:
            raise RuntimeError(f"{folder}: {step}: {error}") from None
        print(f"seconds {step}: {time.time() - start:.0f}")
    with open(done, "a") as file:
        print(step, file=file)


def shifted_sets(folder, known):
    """Folders of arrays: the test images rotated, blurred, noisy and of low contrast."""
    torch.manual_seed(0)
    images = torch.from_numpy(np.load(folder / "test.npy")).permute(0, 3, 1, 2)
    folders = []
    for name, shift in SHIFTS.items():
        target = folder / "shifted" / name.split()[0]
        target.mkdir(parents=True, exist_ok=True)
        np.save(target / "test.npy", shift(images).permute(0, 2, 3, 1).numpy())
        shutil.copy(folder / "test.labels.npy", target)
        (target / "classes.txt").write_text(known.replace(",", "\n"))
        folders.append(target)
    return folders


def run_split(folder, known, seed):
    """The whole pipeline, in <folder>/<known>/seed<seed>."""
    base = folder / known / f"seed{seed}"
    base.mkdir(parents=True, exist_ok=True)
    for step in STEPS:
        run(step, base, known, seed)


def run_variants(folder, known, seed, names):
    """Variants of a finished run in its variants/<name>, with links to what they start from."""
    base = folder / known / f"seed{seed}"
    for name in names:
        start, steps = VARIANTS[name]
        target = base / "variants" / name
        target.mkdir(parents=True, exist_ok=True)
        for pattern in INPUTS:
            for path in (base / start).glob(pattern):
                if not (target / path.name).exists():
                    (target / path.name).symlink_to(path.resolve())
        for step in steps:
            if "{kept}" in step:
                log = target.with_name(name.replace("random", "knn")) / "log.txt"
                kept = re.findall(r"^--filter keeps (\d+)", log.read_text(), re.M)
                step = step.replace("{kept}", str(sum(map(int, kept))))
            run(step, target, known, seed)


def in_two_processes(work, jobs):
    """work(*job) for all jobs, in two processes of one thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context) as pool:
        for job, future in [(job, pool.submit(work, *job)) for job in jobs]:
            future.result()
            print(*job, "done", flush=True)


def results_of(folder):
    """{(method, score): {set: (AUROC, FPR95, ID accuracy)}} in percent, unknown digits as near."""
    found = {}
    for r in json.loads((folder / "results.json").read_text()):
        name = "near" if r["ood"].startswith("digits") else r["ood"]
        figures = r["auroc"], r["fpr95"], r["id_accuracy"] or math.nan
        found.setdefault((r["method"], r["score"]), {})[name] = 100 * np.array(figures)
    return found


def figures_of(folder, jobs, variant, key, name):
    """(runs, 3): AUROC, FPR95 and ID accuracy of a method's score against a set, by run."""
    places = [folder / known / f"seed{seed}" / variant for _, known, seed in jobs]
    return np.array([results_of(place)[key][name] for place in places])


def difference(values, baseline, jobs):
    """Mean and 95 % interval of values - baseline: over splits (means of their seeds), if there are
    three or more, else over runs, which say nothing of other splits.
    """
    knowns = [known for _, known, _ in jobs]
    if len(set(knowns)) > 2:
        groups = [np.array(knowns) == known for known in set(knowns)]
        values = [values[group].mean() for group in groups]
        baseline = [baseline[group].mean() for group in groups]
    if len(values) < 2:
        return "-"
    mean, width = evaluate.paired_difference(values, baseline)
    return f"{mean:+.1f} ± {width:.1f}"


def mean_and_deviation(rows):
    """AUROC / FPR95 of rows (runs, 2 or more), each with its deviation."""
    parts = zip(rows.mean(0), rows.std(0, ddof=1), strict=True)
    return " / ".join([f"{mean:.1f} ± {std:.1f}" for mean, std in parts][:2])


def print_splits(folder, jobs):
    """Mean ± std over runs; differences to ce and ce-pseudo in the same runs, 95 % intervals."""
    print(f"\n{len(jobs)} runs, percent; AUROC / FPR95 against each set\n")
    print("| method | score | unknown digits | minus | patches | SD outliers | ID accuracy |")
    print("|---" * 7 + "|")
    for method, score in results_of(folder / jobs[0][1] / f"seed{jobs[0][2]}"):
        by_set = {}
        for name in ("near", "patches", "sd_outliers_test"):
            by_set[name] = figures_of(folder, jobs, ".", (method, score), name)
        same = {"bin": "energy", "phi": "energy"}.get(score, score)
        same = "distance" if "voting" in score else same
        minus = []
        for other in ["ce", "ce-pseudo"][: 0 if method == "ce" else 2]:
            base = figures_of(folder, jobs, ".", (other, same), "near")[:, 0]
            minus.append(f"{other} {same} {difference(by_set['near'][:, 0], base, jobs)}")
        near, far, outliers = map(mean_and_deviation, by_set.values())
        accuracy = mean_and_deviation(by_set["near"][:, 2:])
        print(
            "|", " | ".join([method, score, near, ", ".join(minus), far, outliers, accuracy]), "|"
        )


def print_ablations(folder, jobs, names):
    """Variants against their reference: in all runs, on the splits to choose on and to confirm."""
    print("\nAUROC / FPR95, AUROC minus the reference's, Fréchet distance of the outliers\n")
    print("| variant | reference | near | all | first 3 | last 2 | patches | all | Fréchet |")
    print("|---" * 9 + "|")
    all_of_them = list(range(len(jobs)))
    first = [i for i in all_of_them if jobs[i][1] in SPLITS[:3]]
    last = [i for i in all_of_them if jobs[i][1] in SPLITS[3:]]
    for name in [".", *names]:
        steps = VARIANTS[name][1] if name in VARIANTS else (f"{DREAM} sd",)
        variant = f"variants/{name}" if name in VARIANTS else "."
        for key in KEYS:
            if not any(key[0] in step.split() or step == "train_classifier" for step in steps):
                continue
            reference = REFERENCES.get(name, DEFAULTS[key[0]])
            cells = [f"{' '.join(key)}: {name}", reference]
            for ood, parts in (("near", [all_of_them, first, last]), ("patches", [all_of_them])):
                rows = figures_of(folder, jobs, variant, key, ood)
                base = figures_of(folder, jobs, reference, key, ood)
                cells.append(mean_and_deviation(rows))
                for part in parts:
                    some = [jobs[i] for i in part]
                    cells.append(difference(rows[part, 0], base[part, 0], some))
            distances = notes_of(folder, jobs, variant, rf"{GENERATED[key[0]]} ([\d.]+),")
            cells.append(f"{np.mean(distances):.1f}" if distances else "-")
            print("|", " | ".join(cells), "|")


def print_shifted(folder, jobs, names):
    """Accuracy of DREAM-ID and of plain training on shifted test images."""
    for name in [name for name in names if name in ("dream-id", "equal-budget")]:
        for method in ("ce", "ce-pseudo", "dream-id"):
            for shift in SHIFTS:
                pattern = rf"- {method}: accuracy ([\d.]+)% on \S*shifted/{shift.split()[0]} "
                shares = notes_of(folder, jobs, f"variants/{name}", pattern)
                if shares:
                    figures = f"{np.mean(shares):.1f} ± {np.std(shares, ddof=1):.1f}"
                    print(f"{name}: accuracy of {method}, {shift}: {figures}")


def notes_of(folder, jobs, variant, pattern):
    """Numbers that a pattern finds in the notes of results.md."""
    numbers = []
    for _, known, seed in jobs:
        text = (folder / known / f"seed{seed}" / variant / "results.md").read_text()
        numbers += [float(number) for number in re.findall(pattern, text)]
    return numbers


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
        ways = {"torch.cdist": evaluate.knn, "scikit-learn": brute}
        if faiss:
            ways = {"faiss-cpu": flat} | ways
        data = queries, bank, k
        race({name: lambda way=way, data=data: way(*data) for name, way in ways.items()}, 3)
        exact = brute(queries[:500].double(), bank.double(), k)[0][:, -1]
        error = np.abs(evaluate.knn(queries[:500], bank, k)[0][:, -1].numpy() - exact).max()
        print(f"  largest error of a k-th distance {error:.0e}")


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("what", choices=("splits", "ablations", "figures", "knn", "steps"))
    text = "folder of the runs (default: %(default)s)"
    parser.add_argument("--dir", type=Path, default=Path("runs/splits"), help=text)
    text = "digits that are known (default: the five splits)"
    parser.add_argument("--known", nargs="+", default=SPLITS, help=text)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    text = "changes that ablations tries (default: all)"
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help=text
    )
    args = parser.parse_args()
    jobs = [(args.dir, known, seed) for seed in args.seeds for known in args.known]
    if args.what in ("splits", "ablations"):
        in_two_processes(run_split, jobs)
    if args.what == "splits":
        print_splits(args.dir, jobs)
    if args.what == "ablations":
        in_two_processes(run_variants, [(*job, ["published", *args.variants]) for job in jobs])
        print_ablations(args.dir, jobs, args.variants)
        print_shifted(args.dir, jobs, args.variants)
    if args.what == "figures":
        figures(args.dir, ROOT / ".github" / "figures")
    if args.what == "knn":
        knn()
    if args.what == "steps":
        steps()


if __name__ == "__main__":
    main()
