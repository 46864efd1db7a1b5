"""Measurements that the README quotes; nothing here is asserted.

python tests/benchmark.py seeds      # the six scripts for seeds 0, 1, 2, then the table of means and deviations
python tests/benchmark.py table      # that table again from the results in --dir
python tests/benchmark.py figures    # the README's pictures from the run of seed 0 in --dir
python tests/benchmark.py format     # SD detectors that see the outliers raw: do grey levels give copies away?
python tests/benchmark.py steps      # DPM-Solver++ on Gaussian data against the exact flow, by spacing of the steps
python tests/benchmark.py sd         # Stable Diffusion with random weights against diffusers' own pipeline, images/s
python tests/benchmark.py memory     # peak memory of sample_outliers.py for 2,000 and for 20,000 outliers of 64 px
python tests/benchmark.py knn        # d_K in chunked matmul form against torch.cdist, time and peak memory
"""

import argparse
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score

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
    """The pipeline once per seed, each in a folder of its own, with the log and the seconds of every step beside it."""
    for seed in seeds:
        target = folder / f"seed{seed}"
        target.mkdir(parents=True, exist_ok=True)
        with open(target / "log.txt", "w") as log:
            for script, *more in STEPS:
                start = time.time()
                command = [sys.executable, str(ROOT / script), "--dir", str(target), "--seed", str(seed), *more]
                subprocess.run(command, check=True, stdout=log, stderr=subprocess.DEVNULL)
                line = f"seconds {' '.join([script, *more])}: {time.time() - start:.0f}"
                print(f"seed {seed}", line, flush=True)
                print(line, file=log, flush=True)


def print_table(folder):
    """Mean and sample standard deviation over the seeds, in percent, as Markdown."""
    paths = sorted(folder.glob("seed*/results.json"))
    records, values = [record for path in paths for record in json.loads(path.read_text())], {}
    for record in records:
        values.setdefault((record["ood"], record["method"], record["score"]), []).append(record)
    for log in sorted(folder.glob("seed*/log.txt")):
        accuracies = re.findall(r"^(k-means on raw|1 SimCLR|3 SCAN|4 self).*ACC ([\d.]+)", log.read_text(), re.M)
        seconds = sum(int(n) for n in re.findall(r"^seconds .*: (\d+)$", log.read_text(), re.M))
        print(log.parent.name, "ACC", accuracies, f"{seconds} s in all")
    print(f"\n{len(paths)} seeds, mean ± std, percent\n")
    print("| OOD | method | score | AUROC | FPR95 | FPR95 (OpenOOD) | AUPR-in | AUPR-out | ID accuracy |")
    print("|---|---|---|---|---|---|---|---|---|")
    for (ood, method, score), rows in values.items():
        cells = []
        for field in ("auroc", "fpr95", "fpr95_ood", "aupr_in", "aupr_out", "id_accuracy"):
            figures = 100 * np.array([row[field] for row in rows])
            cells.append(f"{figures.mean():.1f} ± {figures.std(ddof=1) if len(figures) > 1 else 0:.1f}")
        print(f"| {ood} | {method} | {score} |", " | ".join(cells), "|")


def figures(run, target):
    """Copy the pictures of one run; overview.png shows, per class, an ID image and an outlier of either paper."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("diffusion_samples", "outliers", "sd_outliers", "roc", "scores", "tsne"):
        shutil.copy(run / f"{name}.png", target)
    images, outliers, sd = (np.load(run / f"{name}.npy") for name in ("train", "outliers", "sd_outliers"))
    lines = (run / "outliers.csv").read_text().splitlines()[1:]
    made = [tuple(map(int, line.split(",")[:3])) for line in lines]  # index, class, source
    chosen = [next(row for row in made if row[1] == c) for c in sorted({row[1] for row in made})]
    figure = Figure((1.1 * len(chosen), 3.3), layout="constrained")
    rows = ("ID image", [images[s] for _, _, s in chosen]), ("DREAM-OOD", [outliers[i] for i, _, _ in chosen])
    for line, (title, row) in zip(
        figure.subplots(3, len(chosen)), (*rows, ("SD outlier", [sd[s] for _, _, s in chosen])), strict=True
    ):
        line[0].set_ylabel(title)
        for axis, image in zip(line, row, strict=True):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
    figure.savefig(target / "overview.png", dpi=80)


def raw_format(folder):
    """AUROC of sd's binary head, test images against copies of right label, when nothing is put in the ID format."""
    import train_classifier as script

    args = argparse.Namespace(**{option: row[1] for option, row in script.RECIPES.items()})
    figures = []
    for run in sorted(folder.glob("seed*")):
        images, labels, test, copies = (
            np.load(run / f"{name}.npy") for name in ("train", "pseudo_labels", "test", "sd_reconstructions_test")
        )
        outliers, outlier_labels = script.load_sd_images(run / "sd_outliers.npy", images, labels)
        x, other, test, copies = (
            torch.from_numpy(np.array(a)).permute(0, 3, 1, 2) for a in (images, outliers, test, copies)
        )
        torch.manual_seed(int(run.name.removeprefix("seed")))
        net = script.train("sd", x, torch.from_numpy(labels), other, torch.from_numpy(outlier_labels), 6, args)
        with torch.no_grad():
            bins = [net(a.float() / 127.5 - 1)[1]["g_bin"].diff()[:, 0].numpy() for a in (test, copies)]
        figures.append(100 * roc_auc_score([0] * len(test) + [1] * len(copies), np.concatenate(bins)))
        print(f"{run.name}: {figures[-1]:.1f}", flush=True)
    print(f"mean {np.mean(figures):.1f} ± {np.std(figures, ddof=1):.1f}")


def steps():
    """Relative error of 20 steps of DPM-Solver++ 2M from S to 0; mean 0.2, eps known, flow known in closed form."""
    import sample_sd_outliers

    scheduler = DDPMScheduler(1000, 1e-4, 0.02, "linear")
    abar, mean = scheduler.alphas_cumprod.double(), 0.2
    for std in (0.15, 0.5):
        for S in (100, 200, 999):
            torch.manual_seed(0)
            x, eps, a = mean + std * torch.randn(4096).double(), torch.randn(4096).double(), abar[S]
            x_S = a.sqrt() * x + (1 - a).sqrt() * eps
            exact = mean + std * (x_S - a.sqrt() * mean) / (a * std**2 + 1 - a).sqrt()
            errors = []
            even = np.linspace(S, 0, 20, endpoint=False).round().astype(int).tolist()
            for grid in (even, sample_sd_outliers.quadratic_steps(S, 20)):
                solver, x_t = DPMSolverMultistepScheduler.from_config(scheduler.config), x_S.clone()
                solver.set_timesteps(timesteps=grid)
                for t in solver.timesteps:
                    a = abar[int(t)]
                    noise = (x_t - a.sqrt() * mean) * (1 - a).sqrt() / (a * std**2 + 1 - a)
                    x_t = solver.step(noise, t, x_t).prev_sample
                errors.append(100 * ((x_t - exact).norm() / exact.norm()).item())
            print(f"std {std}, S = {S}: evenly spaced {errors[0]:.2f} %, quadratic {errors[1]:.2f} %")


def knn():
    """DREAM-OOD's own shape: 75,000 candidates, 1,000 ID embeddings, d = 768, K = 300."""
    import sample_outliers

    torch.manual_seed(0)
    bank = torch.nn.functional.normalize(torch.randn(1000, 768), dim=1)
    queries = torch.nn.functional.normalize(torch.randn(75_000, 768), dim=1)
    ways = {
        "kth_distance": lambda: sample_outliers.kth_distance(queries, bank, 300),
        "torch.cdist, chunked, topk": lambda: torch.cat(
            [torch.cdist(q, bank).topk(300, largest=False).values[:, -1] for q in queries.split(1024)]
        ),
    }
    seconds = {name: [] for name in ways}
    for _ in range(4):  # in turn, the first round warms up
        for name, way in ways.items():
            start = time.time()
            way()
            seconds[name].append(time.time() - start)
    for name, times in seconds.items():
        ratio = np.median(times[1:]) / np.median(seconds["torch.cdist, chunked, topk"][1:])
        print(f"{name}: {np.median(times[1:]):.2f} s, {ratio:.2f} of torch.cdist")
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


def stable_diffusion():
    """Images/s of sample_outliers' decoder and of StableDiffusionPipeline, in turn; the tiny model where is no GPU."""
    from conftest import build_stable_diffusion
    from diffusers import StableDiffusionPipeline

    import sample_outliers

    gpu, prompt = torch.cuda.is_available(), "A high-quality image of the zero"
    device = "cuda" if gpu else "cpu"
    print(f"{torch.cuda.get_device_name() if gpu else 'CPU, tiny model'}, torch {torch.__version__}")
    print("| dtype | solver, steps | batch | ours, images/s | stock pipeline | ratio | to stock pndm 50, batch 1 |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        folder = build_stable_diffusion(Path(folder) / "sd", full_size=gpu)
        (folder / "class_words.txt").write_text("zero\n")
        tokenizer, text_model = sample_outliers.load_text_model(str(folder))
        row = text_model.get_input_embeddings().weight.detach()[tokenizer("zero").input_ids[1:2]]
        for dtype in ("fp16", "bf16") if gpu else ("fp32",):
            half = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
            pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to(device, half)
            pipe.set_progress_bar_config(disable=True)
            pndm, first = pipe.scheduler, None
            for solver, steps in (("pndm", 50), ("dpmpp", 20)):
                kind = getattr(sample_outliers.diffusers, sample_outliers.SOLVERS[solver] + "Scheduler")
                pipe.scheduler = kind.from_config(pndm.config)
                given = {"diffusion": str(folder), "dir": folder, "device": device, "compile": False, "dtype": dtype}
                given |= {"resolution": 0, "guidance": 7.5, "scheduler": solver, "steps": steps, "prompt": prompt}
                decode, _ = sample_outliers.text_decoder(argparse.Namespace(**given), row.numpy())
                for batch in (1, 8, 32):
                    v, classes = row.expand(batch, -1).to(device), torch.zeros(batch, dtype=torch.long, device=device)

                    def ours(v=v, classes=classes, decode=decode):
                        return decode(v, classes, list(range(len(v)))).cpu()

                    def stock(batch=batch, steps=steps, pipe=pipe):
                        seeds = [torch.Generator().manual_seed(i) for i in range(batch)]
                        options = {"num_inference_steps": steps, "guidance_scale": 7.5, "output_type": "pt"}
                        return pipe([prompt] * batch, generator=seeds, **options).images.cpu()

                    rates = [batch / np.median(seconds) for seconds in in_turn([ours, stock], 2 if gpu else 4)]
                    first = first or rates[1]
                    cells = f"{rates[0]:.2f} | {rates[1]:.2f} | {rates[0] / rates[1]:.2f} | {rates[0] / first:.1f}"
                    print(f"| {dtype} | {solver} {steps} | {batch} | {cells} |", flush=True)


def in_turn(ways, rounds):
    """Seconds of every way, called in turn, of CPU time where is no GPU; the first round warms up."""
    seconds, clock = [[] for _ in ways], time.perf_counter if torch.cuda.is_available() else time.process_time
    for _ in range(rounds + 1):
        for times, way in zip(seconds, ways, strict=True):
            start = clock()
            way()
            times.append(clock() - start)
    return [times[1:] for times in seconds]


MEMORY = """
import resource, sys
import torch
import sample_outliers

decode = lambda v, classes, seeds: torch.rand(len(v), 3, 64, 64) * 2 - 1
sample_outliers.class_decoder = lambda args, Gamma: (decode, 64)
sample_outliers.main()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def memory():
    """10 classes of 500 ID embeddings, d = 768; everything but the decoder is the real script."""
    rng, peaks = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name, shape in (("anchors", (10, 768)), ("id_embeddings", (5000, 768))):
            np.save(folder / f"{name}.npy", rng.standard_normal(shape, dtype=np.float32))
        np.save(folder / "id_labels.npy", np.arange(5000) % 10)
        for count in (2_000, 20_000):
            options = f"--recipe cifar100 --save-size 64 --candidates 20 --restart --per-class {count // 10}".split()
            command = [sys.executable, "-c", MEMORY, "--dir", str(folder), *options]
            done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
            peaks.append(float(done.stdout.split()[-1]))
            size = (folder / "outliers.npy").stat().st_size / 2**20
            print(f"{count} outliers, {size:.0f} MB on disk: peak memory of the process {peaks[-1]:.0f} MB", flush=True)
    print(f"difference {peaks[1] - peaks[0]:.0f} MB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("seeds", "table", "figures", "format", "steps", "knn", "sd", "memory"))
    parser.add_argument(
        "--dir", type=Path, default=Path("runs/seeds"), help="folder of the runs (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    args = parser.parse_args()
    alone = {
        "knn": knn,
        "steps": steps,
        "format": lambda: raw_format(args.dir),
        "sd": stable_diffusion,
        "memory": memory,
    }
    if args.what in alone:
        alone[args.what]()
        return
    if args.what == "figures":
        figures(args.dir / "seed0", ROOT / ".github" / "figures")
        return
    if args.what == "seeds":
        run_seeds(args.dir, args.seeds)
    print_table(args.dir)


if __name__ == "__main__":
    main()
