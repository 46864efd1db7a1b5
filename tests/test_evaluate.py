"""evaluate.py: metrics against scikit-learn and brute force, scores against NumPy, bad input."""

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

FIELDS = {
    *("method", "score", "id", "ood", "n_id", "n_ood", "auroc", "auroc_ci", "fpr95", "fpr95_ci"),
    *("fpr95_ood", "aupr_in", "aupr_out", "threshold", "id_accuracy", "seed"),
}


@pytest.fixture
def evaluate(load):
    return load("evaluate")


def normal(count, mean=0.0, seed=0):
    return np.random.default_rng(seed).normal(mean, 1, count)


CASES = {
    "random": (normal(217), normal(131, 1, 1)),
    "separated": (normal(217), normal(131, 100, 1)),
    "reversed": (normal(217, 100), normal(131, 0, 1)),
    "tied": (np.round(normal(217)), np.round(normal(131, 1, 1))),
    "constant": (np.zeros(40), np.zeros(60)),
    "two values": (np.sign(normal(217)), np.sign(normal(131, 1, 1))),
    "float32": (normal(217).astype(np.float32), normal(131, 1, 1).astype(np.float32)),
    "one ID image": (np.array([0.5]), np.array([0.5, 0.7])),
    "95 % of 20 is 19": (np.arange(20.0), np.arange(20.0) + 18.5),
    "95 % of 40 is 38": (np.arange(40.0), np.arange(40.0) + 36.5),
}


def brute_force(kept, other):
    """Share of `other` at or below t, the least score with 95 % of `kept` at or below it; t."""
    for t in sorted(kept.tolist()):
        if 100 * (kept <= t).sum() >= 95 * len(kept):
            return (other <= t).mean(), t
    raise AssertionError


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
    assert (found["n_id"], found["n_ood"]) == (len(a), len(b))
    assert (a > found["threshold"]).mean() <= 0.05
    assert 1 - (b > found["threshold"]).mean() == pytest.approx(found["fpr95"], abs=1e-12)
    json.dumps(found, allow_nan=False)


def test_fpr95_is_the_first_point_of_the_complete_roc_curve(evaluate):
    a = np.round(normal(300), 1)
    b = np.round(normal(200, 1, 1), 1)
    is_id = np.repeat([1, 0], [300, 200])
    found = evaluate.metrics(a, b, 5, 0)
    fpr, tpr, _ = roc_curve(is_id, -np.concatenate([a, b]), drop_intermediate=False)
    assert found["fpr95"] == fpr[tpr >= 0.95][0]
    fpr, tpr, _ = roc_curve(1 - is_id, np.concatenate([a, b]), drop_intermediate=False)
    assert found["fpr95_ood"] == fpr[tpr >= 0.95][0]


def test_intervals_hold_the_estimate_shrink_and_repeat(evaluate):
    widths = []
    for n in (100, 1600):
        a = normal(n, 0, 5)
        b = normal(n, 1, 6)
        found = evaluate.metrics(a, b, 300, 3)
        for name in ("auroc", "fpr95"):
            low, high = found[f"{name}_ci"]
            assert 0 <= low < found[name] < high <= 1
        widths.append(np.diff([found["auroc_ci"], found["fpr95_ci"]]).ravel())
    assert widths[0] / widths[1] == pytest.approx([4, 4], rel=0.35)  # the root of 16
    assert found == evaluate.metrics(a, b, 300, 3)
    assert found["auroc_ci"] != evaluate.metrics(a, b, 300, 4)["auroc_ci"]
    # the standard error of an AUROC (Hanley and McNeil, 1982): 3.92 of them are the interval
    A = found["auroc"]
    spread = A / (2 - A) + 2 * A * A / (1 + A) - 2 * A * A
    error = np.sqrt((A * (1 - A) + (n - 1) * spread) / n**2)
    assert widths[1][0] == pytest.approx(3.92 * error, rel=0.2)


@pytest.fixture
def files(tmp_path):
    """save(name=array, ...): .npy files, as a list of paths."""

    def save(**arrays):
        for name, array in arrays.items():
            np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
        return [tmp_path / f"{name}.npy" for name in arrays]

    return save


def test_scores_of_anybody(files, main, tmp_path, capsys):
    a = normal(300)
    b = normal(200, 1, 1).astype(np.float32)
    paths = files(mine=a, far=b + 9, near=b)
    main("evaluate", "--dir", tmp_path / "out", "--bootstrap", 20, "--scores", *paths)
    far, near = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(near) == FIELDS
    assert (near["method"], near["score"]) == ("scores", "given")
    assert (near["id"], far["ood"], near["ood"]) == ("mine.npy", "far.npy", "near.npy")
    assert near["id_accuracy"] is None
    is_ood = np.repeat([0, 1], [300, 200])
    assert near["auroc"] == pytest.approx(roc_auc_score(is_ood, np.append(a, b)), abs=1e-12)
    assert (near["fpr95"], near["threshold"]) == brute_force(a, b)
    assert far["auroc"] > near["auroc"]
    text = (tmp_path / "out" / "results.md").read_text()
    assert text in capsys.readouterr().out
    assert "mine.npy (n = 300) against near.npy (n = 200)" in text
    assert f"| scores | given | {near['auroc']:.1%} [" in text
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"results.json", "results.md", "roc.png", "scores.png", "scores"}


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint16, np.float16, ">f4", np.longdouble])
def test_scores_of_any_real_type(files, main, tmp_path, dtype):
    paths = files(a=np.array([0, 0, 1], dtype), b=np.array([1, 1, 1, 0], dtype))
    main("evaluate", "--dir", tmp_path, "--bootstrap", 2, "--scores", *paths)
    (record,) = json.loads((tmp_path / "results.json").read_text())
    assert record["auroc"] == pytest.approx((6 + 0.5 * 5) / 12)
    assert record["threshold"] == 1


BAD = {
    "infinite": np.array([1, np.inf]),
    "nan": np.array([1, np.nan]),
    "empty": np.array([]),
    "square": np.zeros((3, 3)),
    "scalar": np.array(3.0),
    "text": np.array(["a", "b"]),
    "pickled": np.array([{}, None]),
    "short": None,
    "missing": None,
}


@pytest.mark.parametrize("name", BAD)
def test_bad_score_files_are_one_line(files, main, tmp_path, name):
    good, bad = files(good=normal(30), **{name: BAD.get(name)})
    if name == "short":
        bad.write_bytes(good.read_bytes()[:-8])
    if name == "missing":
        bad.unlink()
    for order in ([bad, good], [good, bad]):
        with pytest.raises(SystemExit) as end:
            main("evaluate", "--dir", tmp_path / "out", "--scores", *order)
        assert str(bad) in end.value.code
        assert "\n" not in end.value.code
    assert not list((tmp_path / "out").rglob("*.*"))


def test_too_few_or_twice_the_same_name_of_scores(files, main, tmp_path, capsys):
    (path,) = files(a=normal(30))
    (tmp_path / "other").mkdir()
    np.save(tmp_path / "other" / "a.npy", normal(30, 1, 1))
    for options in ([path], [path, tmp_path / "other" / "a.npy"], [path, path, "--bootstrap", 0]):
        with pytest.raises(SystemExit) as end:
            main("evaluate", "--dir", tmp_path / "out", "--scores", *options)
        said = capsys.readouterr().err + str(end.value.code)
        assert "Error" not in said
        assert not (tmp_path / "out" / "results.json").exists()


@pytest.fixture(scope="module")
def shared(tmp_path_factory, load):
    """Grey random images of three classes, untrained detectors, as the other scripts leave them."""
    folder = tmp_path_factory.mktemp("untrained")
    rng = np.random.default_rng(0)
    data = {"data": "digits:0-2", "recipe": "digits", "image_size": 8, "classes": list("012")}
    (folder / "data.json").write_text(json.dumps(data | {"digest": [7]}))
    for name, count in {"train": 40, "test": 30, "sd_outliers": 40}.items():
        grey = rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
        np.save(folder / f"{name}.npy", grey.repeat(3, axis=3))
    for name, count in {"train": 40, "test": 30}.items():
        np.save(folder / f"{name}.labels.npy", np.arange(count) % 3)
    rows = "".join(f"{i},{i},{i % 3},{(i + 1) % 3},0\n" for i in range(40))
    (folder / "sd_outliers.csv").write_text(f"index,source,y,c_r,seed\n{rows}")
    for method, shift in {"ce": 0, "dream": 0, "sd": 1}.items():
        torch.manual_seed(0)
        net = load("evaluate").Detector(method, "small", 3, 0, None)
        config = {"method": method, "arch": "small", "classes": 3, "phi_hidden": 0, "vit": None}
        held = {"model": net.state_dict(), "labels": (torch.arange(40) + shift) % 3}
        held |= {"config": config | {"crop": 0, "seed": 7}, "digest": [7]}
        torch.save(held, folder / f"classifier_{method}.pt")
    return folder
