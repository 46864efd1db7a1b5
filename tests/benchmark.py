"""Measurements that the README quotes; nothing here is asserted.

python tests/benchmark.py seeds      # the six scripts for seeds 0, 1, 2, then the table of means and deviations
python tests/benchmark.py study      # four classes of CIFAR-10 at 16 px on a CPU: --data FOLDER --dir runs/study
python tests/benchmark.py table      # that table again from the results in --dir
python tests/benchmark.py figures    # the README's pictures from the run of seed 0 in --dir
python tests/benchmark.py format     # SD detectors that see the outliers raw: do grey levels give copies away?
python tests/benchmark.py steps      # DPM-Solver++ on Gaussian data against the exact flow, by spacing of the steps
python tests/benchmark.py sd         # Stable Diffusion with random weights against diffusers' own pipeline, images/s
python tests/benchmark.py memory     # peak memory of sample_outliers.py for 2,000 and for 20,000 outliers of 64 px
python tests/benchmark.py augment    # random views of a batch at once against torchvision image by image
python tests/benchmark.py knn        # neighbours in chunked torch against faiss-cpu (if installed) and scikit-learn
"""

import argparse
import json
import random
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
from PIL import Image
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from torchvision.transforms import v2

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


def run_seeds(folder, seeds, steps=STEPS):
    """The pipeline once per seed, each in a folder of its own, with the log and the seconds of every step beside it."""
    for seed in seeds:
        target = folder / f"seed{seed}"
        target.mkdir(parents=True, exist_ok=True)
        with open(target / "log.txt", "w") as log:
            for script, *more in steps:
                start = time.time()
                command = [sys.executable, str(ROOT / script), "--dir", str(target), "--seed", str(seed), *more]
                subprocess.run(command, check=True, stdout=log, stderr=subprocess.DEVNULL)
                line = f"seconds {' '.join([script, *more])}: {time.time() - start:.0f}"
                print(f"seed {seed}", line, flush=True)
                print(line, file=log, flush=True)


def study(folder, data, seeds):
    """Both papers on a CPU: airplanes, cars, frogs and horses of CIFAR-10 at 16 px, 750 training images of each.

    OOD: the other six classes (near), CIFAR-100, Textures-10 and SVHN-1k. data: folder of the arrays cifar10/,
    cifar100/, textures10.npy, svhn1k.npy. Network and epochs were chosen for half an hour, nothing on OOD data.
    """
    small, classes = folder / "data" / "cifar10", [0, 1, 6, 7]
    small.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 750), ("test", 250)):
        images, labels = (np.load(data / "cifar10" / f"{part}{end}.npy") for end in ("", ".labels"))
        rows = np.sort(np.concatenate([np.flatnonzero(labels == c)[:count] for c in classes]))
        np.save(small / f"{part}.npy", images[rows])
        np.save(small / f"{part}.labels.npy", np.searchsorted(classes, labels[rows]))
        others = images[np.flatnonzero(~np.isin(labels, classes))[:1000]]
    names = (data / "cifar10" / "classes.txt").read_text().splitlines()
    (small / "classes.txt").write_text("\n".join(names[c] for c in classes) + "\n")
    np.save(folder / "data" / "near.npy", others)
    np.save(folder / "data" / "cifar100.npy", np.load(data / "cifar100" / "test.npy")[::10])
    sets = [str(folder / "data" / f"{name}.npy") for name in ("near", "cifar100")]
    sets += [str(data / f"{name}.npy") for name in ("textures10", "svhn1k")]
    scan = (
        "--pretext-epochs 30 --pretext-batch 256 --pretext-lr 0.2 --scan-epochs 15 --scan-lr 1e-3 --selflabel-epochs 8"
    )
    scan += " --selflabel-batch 256 --arch small --image-size 16"
    unet = "--channels 32,64 --layers 1 --attention 8 --dropout 0 --steps 800 --batch-size 64 --lr 1e-3 --ema 0.99"
    net = "--arch small --epochs 15 --batch-size 128 --lr 0.05"
    own = "--sd-arch same --freeze-blocks 0 --sd-epochs 15 --sd-batch 128 --sd-lr 0.05 --sd-weight-decay 5e-4"
    steps = (
        ("train_scan_diffusion.py", "--data", str(small), *scan.split(), *unet.split()),
        ("train_text_encoder.py", *net.split()),
        ("sample_outliers.py", *"--K 100 --per-class 150 --steps 10".split()),
        ("sample_sd_outliers.py", "--steps", "10"),
        ("sample_sd_outliers.py", *"--steps 10 --split test --reconstruct".split()),
        ("train_classifier.py", *net.split(), *own.split()),
        ("evaluate.py", "--ood-data", *sets),
    )
    run_seeds(folder, seeds, steps)


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
            figures = 100 * np.array([row[field] for row in rows], dtype=float)  # None, not known: nan
            spread = figures.std(ddof=1) if len(figures) > 1 else 0
            cells.append("-" if np.isnan(figures).any() else f"{figures.mean():.1f} ± {spread:.1f}")
        print(f"| {ood} | {method} | {score} |", " | ".join(cells), "|")
    sets = list(dict.fromkeys(ood for ood, _, _ in values))
    print("\nAUROC / FPR95 against each set, and ID accuracy\n")
    print("| method | score |", " | ".join(Path(ood).stem for ood in sets), "| ID accuracy |")
    print("|---" * (len(sets) + 3) + "|")

    def mean(rows, field):
        x = 100 * np.array([row[field] for row in rows], dtype=float)
        return "-" if np.isnan(x).any() else f"{x.mean():.1f} ± {x.std(ddof=1) if len(x) > 1 else 0:.1f}"

    for method, score in dict.fromkeys(key[1:] for key in values):
        rows = [values[ood, method, score] for ood in sets]
        cells = [f"{mean(row, 'auroc')} / {mean(row, 'fpr95')}" for row in rows] + [mean(rows[0], "id_accuracy")]
        print(f"| {method} | {score} |", " | ".join(cells), "|")


def figures(run, target):
    """Copy the pictures of one run; overview.png shows, per class, an ID image and an outlier of either paper."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("diffusion_samples", "outliers", "sd_outliers", "scores", "tsne"):
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

    recipe = {option: row[1] for option, row in script.RECIPES.items()}
    args = argparse.Namespace(**recipe | {"device": "cpu", "compile": False, "checkpoint_every": float("inf")})
    figures = []
    for run in sorted(folder.glob("seed*")):
        images, labels, test, copies = (
            np.load(run / f"{name}.npy") for name in ("train", "pseudo_labels", "test", "sd_reconstructions_test")
        )
        outliers, outlier_labels = script.load_sd_images(run / "sd_outliers.npy", images, labels)
        x, other, test, copies = (
            torch.from_numpy(np.array(a)).permute(0, 3, 1, 2) for a in (images, outliers, test, copies)
        )
        args.seed = int(run.name.removeprefix("seed"))
        with tempfile.TemporaryDirectory() as folder:
            args.dir = Path(folder)
            net = script.train(
                "sd",
                x,
                torch.from_numpy(labels),
                other,
                torch.from_numpy(outlier_labels),
                6,
                script.settings("sd", args),
            )
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


def in_turn(ways, rounds, clock=time.perf_counter):
    """Seconds of every way, {name: (rounds,)}, in turn, so that all meet the same load; a first round warms up."""
    seconds = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = clock()
            way()
            seconds[name].append(clock() - start)
    return {name: np.array(times[1:]) for name, times in seconds.items()}


def race(ways, rounds):
    """Time the ways and print their ratios to the first: median over rounds, and of the least times."""
    seconds = in_turn(ways, rounds)
    for name, times in seconds.items():
        first = seconds[next(iter(ways))]
        ratio, least = np.median(times / first), min(times) / min(first)
        print(f"  {name}: median {1000 * np.median(times):.0f} ms, least {1000 * min(times):.0f} ms", end="; ")
        print(f"{ratio:.2f} of the first ({1 / ratio:.1f} times as fast), by least times {least:.2f} ({1 / least:.1f})")


def augment():
    """512 images of 32 px: view(..., "colour") against the same operations on one image after the other."""
    import train_scan_diffusion as script

    tv, uniform = v2.functional, random.uniform

    def affine(**how):
        return lambda x: tv.affine(x, **{"angle": 0, "translate": [0, 0], "scale": 1, "shear": [0, 0]} | how)

    operations = (  # SCAN's fourteen
        tv.autocontrast,
        tv.equalize,
        lambda x: tv.solarize(x, uniform(0, 255)),
        lambda x: tv.posterize(x, int(uniform(4, 8))),
        lambda x: tv.adjust_saturation(x, uniform(0.05, 0.95)),
        lambda x: tv.adjust_contrast(x, uniform(0.05, 0.95)),
        lambda x: tv.adjust_brightness(x, uniform(0.05, 0.95)),
        lambda x: tv.adjust_sharpness(x, uniform(0.05, 0.95)),
        lambda x: x,
        lambda x: tv.rotate(x, uniform(-30, 30)),
        lambda x: affine(shear=[uniform(-5.7, 5.7), 0])(x),
        lambda x: affine(shear=[0, uniform(-5.7, 5.7)])(x),
        lambda x: affine(translate=[uniform(-3.2, 3.2), 0])(x),
        lambda x: affine(translate=[0, uniform(-3.2, 3.2)])(x),
    )

    def cutout(x):
        top, left = random.randrange(32) - 8, random.randrange(32) - 8
        x[:, max(0, top) : top + 16, max(0, left) : left + 16] = 0.5
        return x

    last = v2.ToImage(), v2.ToDtype(torch.float32, scale=True)
    jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8)
    simclr = v2.Compose(
        [v2.RandomResizedCrop(32, (0.2, 1.0)), v2.RandomHorizontalFlip(), jitter, v2.RandomGrayscale(0.2), *last]
    )
    first, last = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(32, 4)]), v2.Compose(last)

    def strong(x):
        x = first(x)
        for operation in random.choices(operations, k=4):
            x = operation(x)
        return cutout(last(x))

    smooth = torch.nn.functional.interpolate(torch.rand(512, 3, 8, 8), 32, mode="bilinear")
    images = (255 * smooth).to(torch.uint8)
    arrays = images.permute(0, 2, 3, 1).contiguous().numpy()
    print(f"{torch.get_num_threads()} threads of torch, 512 images of 32 px to float in [-1, 1]")
    for name, one, many in (("SimCLR's view", simclr, False), ("SCAN's strong view", strong, True)):
        print(name)
        ways = {  # as a worker of a DataLoader does it
            "Pillow, one by one": lambda one=one: torch.stack([one(Image.fromarray(a)) * 2 - 1 for a in arrays]),
            "uint8 tensors, one by one": lambda one=one: torch.stack([one(x) * 2 - 1 for x in images]),
            "view()": lambda many=many: script.view(images, "colour", many),
        }
        race(ways, 15)


def knn():
    """evaluate.knn at 10,000 x 50,000 x 512, k = 50; kth_distance at DREAM-OOD's own shape."""
    import evaluate
    import sample_outliers

    try:
        import faiss
    except ImportError:
        faiss = print("faiss-cpu is not installed: compared with scikit-learn alone")
    unit, threads = torch.nn.functional.normalize, torch.get_num_threads()

    def flat(queries, bank, k):
        faiss.omp_set_num_threads(threads)
        index = faiss.IndexFlatL2(bank.shape[1])
        index.add(bank.numpy())
        return index.search(queries.numpy(), k)

    def brute(queries, bank, k):
        return NearestNeighbors(n_neighbors=k, algorithm="brute").fit(bank.numpy()).kneighbors(queries.numpy())

    for n, m, d, k, search in ((10_000, 50_000, 512, 50, evaluate.knn), (75_000, 1000, 768, 300, None)):
        search = search or sample_outliers.kth_distance
        torch.manual_seed(0)
        queries, bank = unit(torch.randn(n, d), dim=1), unit(torch.randn(m, d), dim=1)
        print(f"{n:,} queries, {m:,} points, {d} dimensions, k = {k}, {threads} threads")
        search(queries[:64], bank[: 2 * k], k)  # what the libraries themselves need
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = search(queries, bank, k)
        extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if search is evaluate.knn:  # the peak of the process; afterwards that of other ways hides it
            print(f"  knn took {extra / 1024:.0f} MiB beyond its input")
        ways = {"faiss": lambda data=(queries, bank, k): flat(*data)} if faiss else {}
        ways[search.__name__] = lambda search=search, data=(queries, bank, k): search(*data)
        race(ways | {"scikit-learn": lambda data=(queries, bank, k): brute(*data)}, 3)
        found = found[0][:, -1] if isinstance(found, tuple) else found
        exact = brute(queries[:500].double(), bank.double(), k)[0][:, -1]
        print(f"  largest error of a k-th distance {np.abs(found[:500].numpy() - exact).max():.0e}")


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

                    ways, clock = {"ours": ours, "stock": stock}, time.perf_counter if gpu else time.process_time
                    rates = [batch / np.median(times) for times in in_turn(ways, 2 if gpu else 4, clock).values()]
                    first = first or rates[1]
                    cells = f"{rates[0]:.2f} | {rates[1]:.2f} | {rates[0] / rates[1]:.2f} | {rates[0] / first:.1f}"
                    print(f"| {dtype} | {solver} {steps} | {batch} | {cells} |", flush=True)


MEMORY = """
import resource

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
    kinds = ("seeds", "study", "table", "figures", "format", "steps", "augment", "knn", "sd", "memory")
    parser.add_argument("what", choices=kinds)
    parser.add_argument(
        "--dir", type=Path, default=Path("runs/seeds"), help="folder of the runs (default: %(default)s)"
    )
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="study: folder of arrays (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    args = parser.parse_args()
    alone = {
        "augment": augment,
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
    if args.what == "study":
        study(args.dir, args.data, args.seeds)
    print_table(args.dir)


if __name__ == "__main__":
    main()
