"""evaluate.py: metrics against scikit-learn and brute force, tables, pictures, what is refused."""

import argparse
import itertools
import json

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve


@pytest.fixture
def evaluate(load):
    return load("evaluate")


def normal(count, mean=0.0, seed=0):
    return np.random.default_rng(seed).normal(mean, 1, count)


A, B = normal(217), normal(131, 1, 1)
CASES = {
    "random": (A, B),
    "separated": (A, B + 100),
    "reversed": (A + 100, B),
    "tied": (np.round(A), np.round(B)),
    "constant": (np.zeros(40), np.zeros(60)),
    "two values": (np.sign(A), np.sign(B)),
    "float32": (A.astype(np.float32), B.astype(np.float32)),
    "one ID image": (np.array([0.5]), np.array([0.5, 0.7])),
    "95 % of 20 is 19": (np.arange(20.0), np.arange(20.0) + 18.5),
    "95 % of 40 is 38": (np.arange(40.0), np.arange(40.0) + 36.5),
}


def brute_force(kept, other):
    """Share of `other` up to the least score that 95 % of `kept` do not exceed; that score."""
    t = min(s for s in kept.tolist() if 100 * (kept <= s).sum() >= 95 * len(kept))
    return (other <= t).mean(), t


@pytest.mark.parametrize(("a", "b"), CASES.values(), ids=CASES)
def test_metrics_equal_scikit_learn_and_brute_force(evaluate, a, b):
    found = evaluate.metrics(a, b, 5, 0)
    both = np.concatenate([a, b])
    is_ood = np.arange(len(both)) >= len(a)
    assert found["auroc"] == pytest.approx(roc_auc_score(is_ood, both), abs=1e-12)
    assert found["aupr_out"] == pytest.approx(average_precision_score(is_ood, both), abs=1e-12)
    assert found["aupr_in"] == pytest.approx(average_precision_score(~is_ood, -both), abs=1e-12)
    assert (found["fpr95"], found["threshold"]) == brute_force(a, b)
    assert found["fpr95_ood"] == brute_force(-b, -a)[0]
    for convention, positive, sign in (("fpr95", ~is_ood, -1), ("fpr95_ood", is_ood, 1)):
        fpr, tpr, _ = roc_curve(positive, sign * both, drop_intermediate=False)
        assert found[convention] == fpr[np.argmax(100 * tpr > 95 - 1e-9)]
    assert (found["n_id"], found["n_ood"]) == (len(a), len(b))
    assert (a > found["threshold"]).mean() <= 0.05
    assert 1 - (b > found["threshold"]).mean() == pytest.approx(found["fpr95"], abs=1e-12)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("n", [100, 1600])
def test_intervals_hold_the_estimate_repeat_and_have_the_known_width(evaluate, n):
    a = normal(n, 0, 5)
    b = normal(n, 1, 6)
    found = evaluate.metrics(a, b, 300, 3)
    for name in ("auroc", "fpr95"):
        low, high = found[f"{name}_ci"]
        assert 0 <= low < found[name] < high <= 1
    assert found == evaluate.metrics(a, b, 300, 3)
    assert found["auroc_ci"] != evaluate.metrics(a, b, 300, 4)["auroc_ci"]
    auroc = found["auroc"]  # its standard error by Hanley and McNeil, 1982
    spread = auroc / (2 - auroc) + 2 * auroc**2 / (1 + auroc) - 2 * auroc**2
    error = np.sqrt((auroc * (1 - auroc) + (n - 1) * spread) / n**2)
    assert np.ptp(found["auroc_ci"]) == pytest.approx(3.92 * error, rel=0.2)


def test_scores_of_anybody(tmp_path, main, capsys):
    for name, scores in {"mine": A, "near": B, "far": B + 9}.items():
        np.save(tmp_path / f"{name}.npy", scores)
    files = [tmp_path / f"{name}.npy" for name in ("mine", "far", "near")]
    main("evaluate", "--dir", tmp_path, "--bootstrap", 20, "--scores", *files)
    far, near = json.loads((tmp_path / "results.json").read_text())
    facts = {"method": "scores", "score": "given", "id": "mine.npy", "id_accuracy": None}
    assert (facts | {"ood": "far.npy", "auroc": 1}).items() <= far.items()
    fpr95, threshold = brute_force(A, B)
    expected = {"ood": "near.npy", "fpr95": fpr95, "threshold": threshold}
    assert (facts | expected).items() <= near.items()
    assert (tmp_path / "results.md").read_text() in capsys.readouterr().out
    assert {"roc.png", "scores.png"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint16, np.float16, ">f4", np.longdouble])
def test_scores_of_any_real_type(tmp_path, evaluate, dtype):
    np.save(tmp_path / "a.npy", np.array([0, 0, 1], dtype))
    a = evaluate.load_scores(tmp_path / "a.npy")
    assert (a.tolist(), a.dtype) == ([0, 0, 1], np.float64)


@pytest.mark.parametrize("bad", [[], [[1.0, 2.0]], 3.0, [1, np.inf], [-np.inf, 1], [np.nan], ["a"]])
def test_bad_scores_are_one_line(tmp_path, evaluate, bad):
    np.save(tmp_path / "a.npy", bad)
    with pytest.raises(SystemExit, match=r"^.*a\.npy (must hold|is no) .*$"):
        evaluate.load_scores(tmp_path / "a.npy")


@pytest.fixture
def args(tmp_path):
    """Options of evaluate.py; their folder holds labels, 4 of training and 6 of test images."""
    np.save(tmp_path / "train.labels.npy", np.array([0, 1, 2, 1]))
    np.save(tmp_path / "test.labels.npy", np.array([0, 0, 0, 1, 1, 2]))
    return argparse.Namespace(dir=tmp_path, seed=0, device="cpu", k=2, knn_k=5, data_root="data")


def one_hot(rows):
    return 9.0 * torch.eye(3)[list(rows)]


@pytest.mark.parametrize("guess", [(0, 0, 0, 1, 1, 2), (1, 1, 0, 2, 2, 0), (2, 2, 2, 2, 0, 1)])
def test_id_accuracy_is_plain_or_after_hungarian_matching(evaluate, args, guess):
    y = np.load(args.dir / "test.labels.npy")
    best = max((np.take(order, guess) == y).mean() for order in itertools.permutations(range(3)))
    for given, expected in (("labels", (y == guess).mean()), ("pseudo-labels", best)):
        config = argparse.Namespace(given=given)
        assert evaluate.id_accuracy(one_hot(guess), config, args) == pytest.approx(expected)
    (args.dir / "test.labels.npy").unlink()
    assert evaluate.id_accuracy(one_hot(guess), config, args) is None


def test_flip_report(evaluate, args):
    """Eight outliers, with y = 0 and c_r = 1: four seen as y, two as c_r, one as 2, one as none."""
    rows = "".join(f"{i},{i},0,{1 + i // 7},5\n" for i in range(8))
    (args.dir / "sd_outliers.csv").write_text(f"index,source,y,c_r,seed\n{rows}")
    logits = torch.cat([one_hot([0, 0, 0, 0, 1, 1, 2]), torch.tensor([[0.2, 0.1, 0]])])
    shares = "y 50.0%, c_r 25.0%, other 12.5%, unsure 12.5%"
    assert evaluate.flip_report(logits, args) == [f"ce-pseudo takes SD outliers for {shares}"]


def test_results_table(evaluate):
    record = {"auroc": 0.9876, "auroc_ci": [0.5, 1], "fpr95": 0.25, "fpr95_ci": [0.1, 0.3]}
    record |= {
        "fpr95_ood": 0.5,
        "aupr_in": 0.75,
        "aupr_out": 1.0,
        "id_accuracy": None,
        "given": "g",
    }
    record |= {"method": "ce", "score": "msp", "id": "d", "ood": "x", "n_id": 3, "n_ood": 4}
    records = [record, record | {"method": "sd", "id_accuracy": 0.9}, record | {"ood": "y"}]
    first, second = evaluate.results_table(records).split("## d (n = 3) against ")[1:]
    shares = "g | msp | 98.8% [50.0%, 100.0%] | 25.0% [10.0%, 30.0%] | 50.0% | 75.0% | 100.0% |"
    assert first.startswith("x (n = 4)")
    assert first.rstrip().endswith(f"|---|\n| ce | {shares} - |\n| sd | {shares} 90.0% |")
    assert second.startswith("y (n = 4)")
    assert second.rstrip().endswith(f"|---|\n| ce | {shares} - |")


def test_ood_sets_must_not_overlap_with_the_id_data(evaluate, args, tiny_run):
    args.dir = tiny_run  # digits:0-2
    args.ood_data = ["digits:3-5", "patches"]
    args.shift_data = []
    sets, _ = evaluate.load_sets(args)
    assert (len(sets["digits:3-5"]), len(sets["patches"])) == (546, 520)
    for args.ood_data in (["digits"], ["patches", "digits:2,7"]):
        with pytest.raises(SystemExit, match=f"^{args.ood_data[-1]} overlaps .* digits:0-2;.*$"):
            evaluate.load_sets(args)


def test_sd_needs_its_outliers(evaluate, args):
    features = {"train": torch.randn(9, 4), "id": torch.randn(5, 4)}
    with pytest.raises(SystemExit, match=r"has no sd_outliers\.npy for sd; run sample_sd_outliers"):
        net = argparse.Namespace(heads={})
        evaluate.method_scores(net, features, argparse.Namespace(method="sd"), np.zeros(9), args)


SHOWN = {("ce", "msp"): {"id": A, "x": B, "y": B + 1}, ("sd", "bin"): {"id": A, "x": B, "y": -B}}


def test_roc_curves_hold_the_area_of_the_table(evaluate):
    figure = evaluate.plot_roc(SHOWN)
    assert [axis.get_title() for axis in figure.axes] == ["x", "y"]
    for axis in figure.axes:
        for line, sets in zip(axis.lines, SHOWN.values(), strict=True):
            expected = evaluate.auroc_fpr95(sets["id"], sets[axis.get_title()])[0]
            assert np.trapezoid(line.get_ydata(), line.get_xdata()) == pytest.approx(expected)


def test_histograms_count_every_image_once(evaluate):
    figure = evaluate.plot_scores(SHOWN)
    assert [axis.get_title() for axis in figure.axes] == ["ce, msp", "sd, bin"]
    for part in [part for axis in figure.axes for part in axis.patches]:
        x, y = part.get_xy().T
        assert np.trapezoid(y, x) == pytest.approx(1)


def test_tsne_shows_every_set_in_its_place(evaluate, args):
    rows = "".join(f"{i},{i},{i % 3},0,5\n" for i in range(40))
    (args.dir / "sd_outliers.csv").write_text(f"index,source,y,c_r,seed\n{rows}")
    names = ["id", "x", "sd_outliers"]
    features = {name: torch.randn(40, 4) + 50 * i for i, name in enumerate(names)}
    (axis,) = evaluate.plot_tsne(features | {"train": torch.zeros(9, 4)}, args).axes
    assert [dots.get_label() for dots in axis.collections] == names
    places = np.array([dots.get_offsets() for dots in axis.collections])  # (3, 40, 2)
    distances = np.linalg.norm(places[:, :, None] - places.mean(1), axis=3)
    assert (distances.argmin(2) == np.arange(3)[:, None]).all()
    assert axis.collections[2].get_array().tolist() == [i % 3 for i in range(40)]
