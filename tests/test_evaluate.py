"""evaluate.py: metrics against scikit-learn and brute force, neighbours and scores against NumPy, bad input."""

import contextlib
import io
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402

FIELDS = {"method", "score", "id", "ood", "n_id", "n_ood", "auroc", "auroc_ci", "fpr95", "fpr95_ci", "fpr95_ood"}
FIELDS |= {"aupr_in", "aupr_out", "threshold", "id_accuracy", "seed"}


def script(*options):
    command = [sys.executable, str(ROOT / "evaluate.py"), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def score_cases():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=217), rng.normal(1, size=131)
    yield "random", a, b
    yield "separated", a, b + 100
    yield "reversed", a + 100, b
    yield "tied", np.round(a), np.round(b)
    yield "constant", np.zeros(40), np.zeros(60)
    yield "two values", (a > 0).astype(int), (b > 0).astype(int)
    yield "infinite", np.where(a > 1, np.inf, np.where(a < -1, -np.inf, a)), np.where(b > 1.5, np.inf, b)
    yield "all ID infinite", np.full(20, np.inf), b
    yield "float16", a.astype(np.float16), b.astype(np.float16)
    yield "float32 and int64", a.astype(np.float32), (3 * b).astype(np.int64)
    yield "uint8", (a * 20 + 100).astype(np.uint8), (b * 20 + 100).astype(np.uint8)
    yield "single", np.array([0.5]), np.array([0.5, 0.7])
    yield "twenty", np.arange(20.0), np.arange(20.0) + 18.5  # 95 % of 20 is 19, exactly


CASES = [pytest.param(*case[1:], id=case[0]) for case in score_cases()]


def brute_force(kept, other):
    """Least share of `other` at or below a threshold that has at least 95 % of `kept` at or below it; the threshold."""
    for t in sorted(set(kept.tolist()) | set(other.tolist())):
        if 100 * sum(s <= t for s in kept.tolist()) >= 95 * len(kept):
            return sum(s <= t for s in other.tolist()) / len(other), t


def as_ranks(a, b):
    both = np.concatenate([a, b]).astype(np.float64)
    order = {value: rank for rank, value in enumerate(sorted(set(both.tolist())))}
    return np.repeat([0, 1], [len(a), len(b)]), np.array([order[value] for value in both.tolist()])


@pytest.mark.parametrize("a, b", CASES)
def test_metrics_agree_with_sklearn_and_brute_force(a, b):
    found, (is_ood, rank) = evaluate.metrics(a, b, 20, 0), as_ranks(a, b)
    assert found["auroc"] == pytest.approx(roc_auc_score(is_ood, rank), abs=1e-12)
    assert found["aupr_out"] == pytest.approx(average_precision_score(is_ood, rank), abs=1e-12)
    assert found["aupr_in"] == pytest.approx(average_precision_score(1 - is_ood, -rank), abs=1e-12)
    fpr95, threshold = brute_force(a, b)
    assert found["fpr95"] == fpr95
    assert found["fpr95_ood"] == brute_force(-rank[is_ood == 1], -rank[is_ood == 0])[0]
    assert found["threshold"] == (threshold if np.isfinite(threshold) else None)
    assert (found["n_id"], found["n_ood"]) == (len(a), len(b))
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("a, b", CASES)
def test_threshold_reproduces_fpr95(a, b):
    found = evaluate.metrics(a, b, 2, 0)
    if found["threshold"] is not None:
        assert 1 - (b > found["threshold"]).mean() == pytest.approx(found["fpr95"], abs=1e-12)
        assert (a > found["threshold"]).mean() <= 0.05 + 1e-12


def test_intervals_hold_the_estimate_and_repeat():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=200), rng.normal(1, size=300)
    found = evaluate.metrics(a, b, 400, 3)
    for name in ("auroc", "fpr95"):
        low, high = found[f"{name}_ci"]
        assert 0 <= low < found[name] < high <= 1
    assert found == evaluate.metrics(a, b, 400, 3)
    assert found["auroc_ci"] != evaluate.metrics(a, b, 400, 4)["auroc_ci"]
    # the standard error of an AUROC (Hanley and McNeil, 1982): the interval is about 3.92 of them wide
    A = found["auroc"]
    Q1, Q2 = A / (2 - A), 2 * A * A / (1 + A)
    error = np.sqrt((A * (1 - A) + 199 * (Q1 - A * A) + 299 * (Q2 - A * A)) / (200 * 300))
    assert np.diff(found["auroc_ci"])[0] == pytest.approx(3.92 * error, rel=0.2)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_knn_equals_brute_force(offset):
    torch.manual_seed(0)
    bank = torch.nn.functional.normalize(torch.randn(400, 24))
    bank = torch.cat([bank, bank[:5]]) + offset  # some twice
    queries = torch.cat([bank[:50], torch.nn.functional.normalize(torch.randn(30, 24)) + offset])
    distance, index = evaluate.knn(queries, bank, 7, chunk=16, block=64)
    exact = torch.cdist(queries.double(), bank.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert distance.dtype == torch.float32 and distance.shape == index.shape == (80, 7)
    assert (distance - exact.sort(dim=1).values[:, :7]).abs().max() < 1e-4
    assert (exact.gather(1, index) - distance).abs().max() < 1e-4
    assert distance[:50, 0].max() == 0  # each to itself
    assert all(len(set(row)) == 7 for row in index.tolist())
    assert torch.equal(evaluate.knn(bank[:3], bank, len(bank))[1].sort(dim=1).values[0], torch.arange(len(bank)))


def test_knn_refuses_more_neighbours_than_there_are(capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.knn(torch.zeros(2, 3), torch.zeros(4, 3), 5)
    assert end.value.code == 1 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("inside, outside", [(30, 30), (30, 12), (12, 30)])
def test_sd_score_equals_a_loop(inside, outside):
    rng = np.random.default_rng(2)
    D_in, D_out, f = rng.normal(size=(inside, 3)), rng.normal(1, size=(outside, 3)), rng.normal(0.5, size=(20, 3))
    n, k = min(inside, outside), 2
    distance, voting = evaluate.sd_score_terms(*(torch.tensor(x, dtype=torch.float32) for x in (f, D_in, D_out)), k)
    both = [(x, 0) for x in D_in[np.arange(n) * inside // n]] + [(x, 1) for x in D_out[np.arange(n) * outside // n]]
    for i, x in enumerate(f):
        assert distance[i].item() == pytest.approx(sum(sorted(((x - y) ** 2).sum() for y in D_in)[:k]), rel=1e-4)
        nearest = sorted(both, key=lambda pair: ((x - pair[0]) ** 2).sum())[:k]
        assert voting[i].item() == sum(vote for _, vote in nearest)


def write_directory(folder, methods=("ce", "dream", "sd"), seed=0):
    """A shared directory with random 8x8 images and untrained detectors, as the other scripts would leave it."""
    rng, data = np.random.default_rng(seed), {"name": "digits:0-5", "classes": list("abc"), "image_size": 8}
    data |= {"channels": 3, "train": 40, "test": 30, "digest": "0123456789abcdef"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.json").write_text(json.dumps(data))
    for name, count in {"train": 40, "test": 30, "sd_outliers": 40, "sd_reconstructions_test": 25}.items():
        np.save(folder / f"{name}.npy", rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8))
    for split, count in (("train", 40), ("test", 30)):
        np.save(folder / f"{split}.labels.npy", np.arange(count) % 3)
    np.save(folder / "pseudo_labels.npy", (np.arange(40) + 1) % 3)
    rows = [f"{i},{i},{(i + 1) % 3},{(i + 2) % 3},0" for i in range(40)]
    (folder / "sd_outliers.csv").write_text("\n".join(["index,source,y,c_r,seed", *rows]) + "\n")
    for method in methods:
        torch.manual_seed(seed)
        net, whose = evaluate.Detector(method, "small", 3, 0), "pseudo" if method == "sd" else "dataset"
        config = {"method": method, "arch": "small", "classes": 3, "phi_hidden": 0, "image_size": 8, "seed": 7}
        content = {"model": net.state_dict(), "config": config | {"whose_labels": whose}, "digest": data["digest"]}
        torch.save(content, folder / f"classifier_{method}.pt")
    np.save(folder / "far.npy", np.full((11, 8, 8, 3), 200, np.uint8))
    return folder


def network(folder, method):
    content = torch.load(folder / f"classifier_{method}.pt", weights_only=True)
    net = evaluate.Detector(method, "small", 3, 0).eval()
    net.load_state_dict(content["model"])
    return net


def outputs(net, images):
    """Features and logits, float64 NumPy, of images through the network at once."""
    with torch.no_grad():
        f, logits = net(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1)
    return f.double().numpy(), {name: z.double().numpy() for name, z in logits.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = write_directory(tmp_path_factory.mktemp("run") / "a")
    options = ["--bootstrap", 50, "--ood-data", "digits:8,9", folder / "far.npy", "--batch-size", 16, "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", ["evaluate.py", "--dir", str(folder), *map(str, options)])
        evaluate.main()
    return folder, printed.getvalue()


def test_run_leaves_every_file(finished):
    folder, printed = finished
    records = json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)
    scores = {"sd": {"distance", "voting", "distance+voting", "bin", "mahalanobis", "relative-mahalanobis"}}
    scores["ce"] = {"msp", "maxlogit", "energy", "knn", "mahalanobis", "relative-mahalanobis"}
    scores["dream"] = scores["ce"] | {"phi"}
    sets = {"digits:8,9": 354, str(folder / "far.npy"): 11, "sd_reconstructions_test": 25}
    assert {(r["method"], r["score"], r["ood"]) for r in records} == {
        (method, score, ood) for method in scores for score in scores[method] for ood in sets
    }
    for r in records:
        assert set(r) == FIELDS and r["id"] == "digits:0-5" and r["n_id"] == 30 and r["n_ood"] == sets[r["ood"]]
        assert r["seed"] == 7 and all(0 <= r[m] <= 1 for m in ("auroc", "fpr95", "fpr95_ood", "aupr_in", "aupr_out"))
        stem = f"{r['method']}.{r['score']}"
        here = np.load(folder / "scores" / f"{stem}.id.npy")
        name = {"digits:8,9": "digits-8,9"}.get(r["ood"], r["ood"])
        there = [p for p in (folder / "scores").glob(f"{stem}.*.npy") if p.name.endswith(f"{Path(name).name}.npy")]
        there = np.load(there[0])
        assert here.dtype == there.dtype == np.float32 and len(here) == 30 and len(there) == r["n_ood"]
        assert roc_auc_score(np.repeat([0, 1], [30, len(there)]), np.append(here, there)) == pytest.approx(r["auroc"])
        assert (there <= r["threshold"]).mean() == pytest.approx(r["fpr95"])
    for name in ("roc.png", "scores.png", "tsne.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"
    assert not list(folder.rglob(".partial*"))
    text = (folder / "results.md").read_text()
    assert text in printed and "n = 354" in text and "ce takes SD outliers for" in text


def test_scores_are_what_they_are_called(finished):
    folder, _ = finished
    test, load = np.load(folder / "test.npy"), lambda name: np.load(folder / "scores" / f"{name}.id.npy")
    _, logits = outputs(network(folder, "ce"), test)
    p = np.exp(logits["g_in"]) / np.exp(logits["g_in"]).sum(1, keepdims=True)
    np.testing.assert_allclose(np.exp(load("ce.msp")), 1 - p.max(1), rtol=1e-4)
    np.testing.assert_allclose(load("ce.maxlogit"), -logits["g_in"].max(1), rtol=1e-4)
    np.testing.assert_allclose(load("ce.energy"), -np.log(np.exp(logits["g_in"]).sum(1)), rtol=1e-4)
    net = network(folder, "dream")
    energy = np.log(np.exp(outputs(net, test)[1]["g_in"]).sum(1))
    weight, bias = net.phi.weight.detach().numpy()[:, 0], net.phi.bias.detach().numpy()
    np.testing.assert_allclose(load("dream.phi"), energy * (weight[0] - weight[1]) + bias[0] - bias[1], atol=1e-4)
    unit = [
        f / np.linalg.norm(f, axis=1, keepdims=True)
        for f in (outputs(net, x)[0] for x in (test, np.load(folder / "train.npy")))
    ]
    brute = np.sort(np.linalg.norm(unit[0][:, None] - unit[1][None], axis=2), axis=1)[:, 9]
    np.testing.assert_allclose(load("dream.knn"), brute, atol=1e-4)
    _, logits = outputs(network(folder, "sd"), test)
    np.testing.assert_allclose(load("sd.bin"), logits["g_bin"][:, 1] - logits["g_bin"][:, 0], atol=1e-4)


def test_alpha_comes_from_training_images_left_out_of_their_own_neighbours(finished):
    folder, _ = finished
    f, _ = outputs(network(folder, "sd"), np.load(folder / "train.npy"))
    per_neighbour = []
    for i in range(len(f)):
        others = sorted(((f[i] - f[j]) ** 2).sum() for j in range(len(f)) if j != i)
        per_neighbour.append(sum(others[:2]) / 2)
    alpha = sorted(per_neighbour)[(len(f) - 1) // 2]
    load = lambda name: np.load(folder / "scores" / f"sd.{name}.digits-8,9.npy").astype(np.float64)  # noqa: E731
    np.testing.assert_allclose(load("distance+voting"), load("distance") + alpha * load("voting"), rtol=1e-4)
    assert load("voting").max() > 0


def test_id_accuracy_is_plain_or_after_hungarian_matching(finished):
    folder, _ = finished
    records, labels = json.loads((folder / "results.json").read_text()), np.load(folder / "test.labels.npy")
    found = {r["method"]: r["id_accuracy"] for r in records}
    guess = {
        method: outputs(network(folder, method), np.load(folder / "test.npy"))[1]["g_in"].argmax(1) for method in found
    }
    assert found["ce"] == pytest.approx((guess["ce"] == labels).mean())
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    assert found["sd"] == pytest.approx(max((np.array(order)[guess["sd"]] == labels).mean() for order in orders))


def test_classes_of_outliers():
    """Pseudo-label c is label (c + 1) % 3; four outliers are seen as y, as c_r, as another class, and not surely."""
    arrays = {"y": np.array([0, 0, 0, 0]), "c_r": np.array([1, 1, 1, 1]), "pseudo_labels": np.array([0, 0, 0, 1, 2])}
    arrays["train.labels"] = np.array([1, 1, 2, 2, 0])
    logits = torch.tensor([[0.0, 9, 0], [0, 0, 9], [9, 0, 0], [0.2, 0.1, 0]])
    same = "y 25.0%, c_r 25.0%, other 25.0%, unsure 25.0%"
    assert evaluate.labels_of_outliers(logits, arrays, "dataset") == same
    assert evaluate.labels_of_outliers(logits.roll(-1, 1), arrays, "pseudo") == same


def test_bad_directories_change_nothing(tmp_path, monkeypatch, capsys):
    def refuse(folder, word, status=1, options=("--ood-data", "patches")):
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} if folder.exists() else {}
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--dir", str(folder), *map(str, options)])
        with pytest.raises(SystemExit) as end:
            evaluate.main()
        message = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluate.py:")]
        assert end.value.code == status and len(message) == 1 and word in message[0], message
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    refuse(tmp_path / "nothing", "run train_classifier.py")
    folder = write_directory(tmp_path / "a", ["ce", "sd"])
    refuse(folder, "nowhere", 2, ("--ood-data", "patches", "nowhere"))
    refuse(folder, "different names", 2, ("--ood-data", "patches", "patches"))
    for option, value in (
        ("--k", 0),
        ("--knn-k", -1),
        ("--alpha", "nan"),
        ("--alpha", -1),
        ("--bootstrap", 0),
        ("--seed", -1),
    ):
        refuse(folder, "", 2, (option, value))
    refuse(folder, "--knn-k 41", 2, ("--knn-k", 41, "--ood-data", "patches"))

    path = folder / "classifier_ce.pt"
    good, content = path.read_bytes(), torch.load(path, weights_only=True)
    stale = [content | {"digest": "other"}, {"model": content["model"]}, content | {"model": {}}, [1, 2]]
    stale += [
        content | {"config": content["config"] | change} for change in ({"image_size": 9}, {"method": "dream-id"})
    ]
    for damage in stale:
        torch.save(damage, path)
        refuse(folder, "run train_classifier.py again")
    for damage in (good[: len(good) // 2], b"", b"text"):
        path.write_bytes(damage)
        refuse(folder, "run train_classifier.py again")
    path.write_bytes(good)
    for name, damage in {
        "sd_outliers.csv": b"index\n1\n",
        "test.npy": good,
        "train.npy": b"",
        "sd_outliers.npy": b"x",
    }.items():
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(damage)
        refuse(folder, name)
        (folder / name).unlink()
        refuse(folder, name)
        (folder / name).write_bytes(kept)


def test_scores_option_agrees_with_sklearn(tmp_path):
    rng = np.random.default_rng(5)
    a, b, c = rng.normal(size=300), rng.normal(1, size=200), np.array([np.inf, 1, 1, -np.inf])
    for name, scores in {"id": a, "ood": b.astype(np.float32), "odd": c}.items():
        np.save(tmp_path / f"{name}.npy", scores)
    run = script("--dir", tmp_path / "out", "--scores", *(tmp_path / f"{n}.npy" for n in ("id", "ood", "odd")))
    assert run.returncode == 0, run.stderr
    records = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=pytest.fail)
    assert [(r["method"], r["score"], r["id"], r["ood"]) for r in records] == [
        ("scores", "given", "id.npy", "ood.npy"),
        ("scores", "given", "id.npy", "odd.npy"),
    ]
    is_ood, scores = np.repeat([0, 1], [300, 200]), np.append(a, b.astype(np.float32))
    assert set(records[0]) == FIELDS and records[0]["id_accuracy"] is None
    assert records[0]["auroc"] == pytest.approx(roc_auc_score(is_ood, scores), abs=1e-12)
    assert records[0]["aupr_out"] == pytest.approx(average_precision_score(is_ood, scores), abs=1e-12)
    assert records[0]["aupr_in"] == pytest.approx(average_precision_score(1 - is_ood, -scores), abs=1e-12)
    assert (records[0]["fpr95"], records[0]["threshold"]) == brute_force(a, b.astype(np.float32))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "results.json", "results.md", "roc.png", "scores.png",
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint16, np.float16, ">f4", np.longdouble])
def test_scores_of_any_real_type(tmp_path, monkeypatch, dtype):
    for name, scores in {"id": [0, 0, 1], "ood": [1, 1, 1, 0]}.items():
        np.save(tmp_path / f"{name}.npy", np.array(scores, dtype))
    files = [str(tmp_path / "id.npy"), str(tmp_path / "ood.npy")]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--dir", str(tmp_path), "--bootstrap", "9", "--scores", *files])
    evaluate.main()
    (record,) = json.loads((tmp_path / "results.json").read_text())
    assert record["auroc"] == pytest.approx((6 + 0.5 * 5) / 12) and record["threshold"] == 1
    assert not isinstance(record["threshold"], bool)


@pytest.mark.parametrize(
    "scores", [np.full(9, np.inf), np.array([1e308, -1e308]), np.zeros(3), np.array([np.inf, -np.inf])]
)
def test_odd_scores_can_be_drawn(tmp_path, scores):
    evaluate.draw(tmp_path, {("scores", "given"): {"id": scores, "ood.npy": scores[:1]}}, {}, 0)
    assert (tmp_path / "scores.png").exists() and (tmp_path / "roc.png").exists()


def test_bad_score_files_are_refused_in_one_line(tmp_path, monkeypatch, capsys):
    good = np.arange(5.0)
    arrays = {"nan": np.array([1, np.nan]), "empty": np.array([]), "square": np.zeros((3, 3)), "scalar": np.array(3.0)}
    arrays |= {"complex": good + 1j, "text": np.array(["a", "b"]), "dates": good.astype("M8[s]"), "good": good}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    np.save(tmp_path / "pickled.npy", np.array([{}, None]), allow_pickle=True)
    np.savez(tmp_path / "archive.npz", good)
    (tmp_path / "words.npy").write_text("0.1\n0.2\n")
    (tmp_path / "zip.npy").write_bytes(b"PK\x03\x04 not really")
    (tmp_path / "short.npy").write_bytes((tmp_path / "good.npy").read_bytes()[:-8])
    bad = sorted(path for path in tmp_path.iterdir() if path.name != "good.npy") + [tmp_path / "missing.npy", tmp_path]
    for path in bad:
        for files in ([path, tmp_path / "good.npy"], [tmp_path / "good.npy", path]):
            command = ["evaluate.py", "--dir", str(tmp_path / "out"), "--scores", *map(str, files)]
            monkeypatch.setattr(sys, "argv", command)
            with pytest.raises(SystemExit) as end:
                evaluate.main()
            error = capsys.readouterr().err
            assert end.value.code == 1 and error.count("\n") == 1 and str(path) in error, error
    run = script("--dir", tmp_path / "out", "--scores", tmp_path / "good.npy")
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    assert not (tmp_path / "out").exists()


def test_grey_data_see_grey_outliers_only(tmp_path, monkeypatch):
    """An OOD set in colour and the same in grey get the same scores when the ID images are grey."""
    folder = write_directory(tmp_path / "a", ["ce"])
    for name in ("train", "test"):
        images = np.load(folder / f"{name}.npy")
        np.save(folder / f"{name}.npy", images[..., :1].repeat(3, axis=3))
    colour = np.load(folder / "sd_outliers.npy")
    grey = np.rint(colour @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)[..., None].repeat(3, axis=3)
    np.save(tmp_path / "colour.npy", colour)
    np.save(tmp_path / "grey.npy", grey)
    ood = [str(tmp_path / "colour.npy"), str(tmp_path / "grey.npy")]
    seen = types.SimpleNamespace(dir=folder, data="digits", k=2, knn_k=5, ood_data=ood, data_root="data")
    _, sets, _ = evaluate.read_directory(seen)
    assert (
        np.array_equal(*(sets[name] for name in seen.ood_data)) and (np.ptp(sets[seen.ood_data[0]], axis=3) == 0).all()
    )
