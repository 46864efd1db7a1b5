"""What compares the papers: baselines, filter, alternatives, shifted sets, tables over runs."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import scipy
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def features():
    """f of ID and OOD, D_in with labels of 4 classes, and a head that was trained on them."""
    torch.manual_seed(0)
    labels = torch.arange(800) % 4
    centres = 2 * normal(4, 16)
    D_in = (centres[labels] + normal(800, 16, seed=1)).relu()
    inside = (centres[labels[:300]] + normal(300, 16, seed=2)).relu()
    outside = (0.6 * centres[labels[:200]].flip(1) + normal(200, 16, seed=3)).relu()
    g_in = torch.nn.Linear(16, 4)
    optimizer = torch.optim.Adam(g_in.parameters(), 0.02)
    for _ in range(30):
        loss = F.cross_entropy(g_in(D_in), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.cat([inside, outside]), D_in, labels, g_in.requires_grad_(False)


def test_baselines_equal_pytorch_ood(load, features):
    """Same features, same AUROC to 1e-4, and the OOD set is neither blind nor perfect."""
    ood = pytest.importorskip("pytorch_ood.detector", reason="pytorch-ood is not installed")
    code = load("evaluate")
    f, D_in, labels, g_in = features
    z = g_in(f)
    ours = code.logit_scores(z) | {
        "gen": code.gen_score(z),
        "react": code.react_score(f, D_in, g_in),
    }
    ours |= {"vim": code.vim_score(f, D_in, g_in), "fdbd": code.fdbd_score(f, D_in, g_in)}
    ours["knn"] = code.knn(F.normalize(f), F.normalize(D_in), 10)[0][:, -1]
    ours |= code.mahalanobis_scores(f.double().numpy(), D_in.double().numpy(), labels.numpy())
    vim = ood.ViM(None, 8, g_in.weight, g_in.bias).fit_features(D_in, labels)
    react = ood.ReAct(None, g_in).fit_feature_maps(D_in, labels)
    theirs = {
        "msp": ood.MaxSoftmax.score(z),
        "maxlogit": ood.MaxLogit.score(z),
        "energy": ood.EnergyBased.score(z),
        "gen": ood.GEN.score(z),
        "react": react.predict_feature_maps(f),
        "vim": vim.predict_features(f),
        "fdbd": ood.fDBD(None, g_in).fit_features(D_in).predict_features(f),
        "knn": ood.KNN(None, k=10).fit_features(D_in, labels).predict_features(f),
        "mahalanobis": ood.Mahalanobis(None).fit_features(D_in, labels).predict_features(f),
        "relative-mahalanobis": ood.RMD(None).fit_features(D_in, labels).predict_features(f),
    }
    assert ours.keys() == theirs.keys()
    is_ood = np.arange(500) >= 300
    for name, scores in theirs.items():
        expected = roc_auc_score(is_ood, scores)
        assert 0.6 < expected < 0.9999, name
        assert roc_auc_score(is_ood, ours[name]) == pytest.approx(expected, abs=1e-4), name


def test_frechet_distance(load):
    distance = load("evaluate").frechet_distance
    a = normal(500, 6).double()
    b = (1.5 * normal(400, 6, seed=1) @ normal(6, 6, seed=2) + 1).double()
    S_a = np.cov(a.T)
    S_b = np.cov(b.T)
    root = scipy.linalg.sqrtm(S_a @ S_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(S_a + S_b - 2 * root)
    assert distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert distance(a, a) == pytest.approx(0, abs=1e-6)
    assert distance(a, a + 3) == pytest.approx(9 * 6)


AUROC = np.random.default_rng(0).uniform(0.8, 1, (3, 2, 2))  # run, method, set


@pytest.fixture
def runs(tmp_path):
    for run, figures in enumerate(AUROC):
        folder = tmp_path / f"run{run}"
        folder.mkdir()
        (folder / "data.json").write_text(json.dumps({"data": "d", "recipe": "digits"}))
        records = []
        for method, by_set in zip(["ce", "sd"], figures, strict=True):
            for ood, auroc in zip(["near", "far"], by_set, strict=True):
                record = {"method": method, "score": "distance+voting", "ood": ood}
                records.append(record | {"auroc": auroc, "fpr95": 1 - auroc})
        (folder / "results.json").write_text(json.dumps(records))
    return tmp_path


def test_aggregate_equals_numpy_and_the_paired_t_test(runs, main, capsys):
    folders = [runs / f"run{run}" for run in range(3)]
    main("evaluate", "--dir", runs, "--aggregate", *folders, "--baseline", "ce.distance+voting")
    found = json.loads((runs / "aggregate.json").read_text())
    assert (runs / "aggregate.md").read_text() in capsys.readouterr().out
    assert [(r["method"], r["ood"]) for r in found] == [
        ("ce", "near"),
        ("ce", "far"),
        ("sd", "near"),
        ("sd", "far"),
    ]
    for record, values in zip(found, AUROC.reshape(3, 4).T, strict=True):
        assert record["auroc"] == pytest.approx(values.mean())
        assert record["auroc_std"] == record["fpr95_std"] == pytest.approx(values.std(ddof=1))
        assert record["fpr95"] == pytest.approx(1 - values.mean())
    for record, ood in zip(found[2:], (0, 1), strict=True):
        test = scipy.stats.ttest_rel(AUROC[:, 1, ood], AUROC[:, 0, ood]).confidence_interval()
        difference, width = record["auroc_difference"], record["auroc_width"]
        assert (difference - width, difference + width) == pytest.approx(tuple(test))
    assert (found[0]["auroc_difference"], found[0]["auroc_width"]) == (0, 0)


def test_aggregate_refuses_other_data_and_runs_without_results(runs, main):
    folders = [runs / f"run{run}" for run in range(3)]
    for baseline, used in (("ce.msp", folders), ("ce.distance+voting", folders[:1])):
        with pytest.raises(SystemExit, match=f"{baseline.replace('+', '.')} is not in each"):
            main("evaluate", "--dir", runs, "--aggregate", *used, "--baseline", baseline)
    (folders[1] / "data.json").write_text(json.dumps({"data": "other", "recipe": "digits"}))
    with pytest.raises(SystemExit, match=r"run1/results\.json .* differs .*: data$"):
        main("evaluate", "--dir", runs, "--aggregate", *folders)
    (folders[0] / "results.json").unlink()
    with pytest.raises(SystemExit, match=r"run0/results\.json is missing"):
        main("evaluate", "--dir", runs, "--aggregate", *folders)
    assert not (runs / "aggregate.json").exists()


def test_aggregate_names_the_option_that_differs(runs, main):
    for run, beta in enumerate((1, 1, 2)):
        config = {"seed": run, "inputs": [run], "beta": beta}
        torch.save({"config": config}, runs / f"run{run}" / "classifier_dream.pt")
    folders = [runs / f"run{run}" for run in range(3)]
    main("evaluate", "--dir", runs, "--baseline", "ce.distance+voting", "--aggregate", *folders[:2])
    with pytest.raises(SystemExit, match=r"run2/results\.json .*: classifier_dream beta$"):
        main("evaluate", "--dir", runs, "--aggregate", *folders)


def test_table_of_scores_flags_what_is_above_the_threshold(load):
    code = load("evaluate")
    rng = np.random.default_rng(0)
    sets = {"id": rng.normal(size=100), "digits:6,7": rng.normal(2, 1, 30)}
    scored = {("ce", "msp"): sets, ("sd", "bin"): {name: -2 * x for name, x in sets.items()}}
    rows = list(csv.DictReader(code.scores_table(scored).splitlines()))
    assert [row["set"] for row in rows] == ["id"] * 100 + ["digits:6,7"] * 30
    assert [int(row["image"]) for row in rows] == [*range(100), *range(30)]
    for (method, score), values in scored.items():
        column = np.array([float(row[f"{method} {score}"]) for row in rows])
        np.testing.assert_allclose(column, np.concatenate(list(values.values())), rtol=1e-6)
        flags = np.array([row[f"{method} {score} flagged"] == "1" for row in rows])
        assert flags[:100].sum() == 5
        assert (column[flags].min() > column[~flags].max()) == 1
    shown = {key: {name: x[:15] for name, x in values.items()} for key, values in scored.items()}
    pictures = np.arange(15, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    figure = code.plot_misses(shown, {"digits:6,7": pictures})
    for line, values in zip(np.reshape(figure.axes, (2, 10)), shown.values(), strict=True):
        seen = [int(axis.images[0].get_array()[0, 0, 0]) for axis in line]
        assert seen == values["digits:6,7"].argsort()[:10].tolist()  # most surely ID first


def test_shifted_sets_are_matched_by_class_name(load, tiny_run, tmp_path):
    """ID digits 0-2; of the set's classes nine, two, cat and zero the second and last are known."""
    code = load("evaluate")
    images = np.load(tiny_run / "test.npy")[:8]
    np.save(tmp_path / "test.npy", images)
    np.save(tmp_path / "test.labels.npy", np.arange(8) % 4)
    (tmp_path / "classes.txt").write_text("9\n2\ncat\n0")
    args = SimpleNamespace(dir=tiny_run, shift_data=[str(tmp_path)], image_size=8, data_root="")
    ((name, (found, y)),) = code.load_shifted(images, args).items()
    assert name == f"{tmp_path} (n = 4, 2 of 3 ID classes)"
    assert y.tolist() == [2, 0, 2, 0]
    np.testing.assert_array_equal(found, images[[1, 3, 5, 7]])
    (tmp_path / "classes.txt").write_text("nine\ntwo\ncat\nzero")
    with pytest.raises(SystemExit, match="no images of the ID classes"):
        code.load_shifted(images, args)


def test_outlier_exposure_by_hand(load):
    z = normal(5, 3)
    is_id = torch.tensor([True, True, True, False, False])
    log_p = z.log_softmax(1)
    expected = -log_p[[0, 1, 2], [0, 2, 1]].mean() - 0.5 * log_p[3:].mean()
    loss = load("train_classifier").oe_loss(z, torch.tensor([0, 2, 1, 0, 0]), is_id, 0.5)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.fixture(scope="module")
def filtered(tiny_run):
    data = torch.from_numpy(np.load(tiny_run / "train.npy"))
    noise = torch.randint(0, 256, data.shape, generator=torch.Generator().manual_seed(0)).byte()
    return data, torch.cat([data, noise])


def options(folder, **values):
    own = {
        "seed": 0,
        "rank": 0,
        "world": 1,
        "filter": "none",
        "filter_k": 10,
        "outliers": 0,
        "crop": 0,
    }
    return SimpleNamespace(dir=folder, device="cpu", fp32=True, **(own | values))


@pytest.mark.parametrize("judge", ["knn", "energy"])
def test_filter_drops_what_ce_takes_for_id(load, tiny_run, filtered, judge):
    """Training images as outliers: 95 % are dropped by the energy, more by k-NN, being in D_in."""
    code = load("train_classifier")
    images, outliers = filtered
    dropped = code.looks_id(images, outliers, options(tiny_run, filter=judge))
    share = dropped[: len(images)].float().mean()
    assert share == pytest.approx(0.95, abs=0.01) if judge == "energy" else share >= 0.95
    noise = dropped[len(images) :].float().mean()
    assert noise < 0.1 if judge == "knn" else noise < 1  # energies of noise can be large


def test_filter_and_number_of_outliers(load, tiny_run, filtered, tmp_path, capsys):
    code = load("train_classifier")
    images, outliers = filtered
    args = options(tmp_path, filter="knn")
    for name in ("classifier_ce.pt", "data.json"):
        (tmp_path / name).symlink_to(tiny_run / name)
    labels = torch.arange(len(outliers)) % 3
    dropped = code.looks_id(images, outliers, args)
    rows = code.choose_others("dream", images, outliers, labels, args)
    assert rows.tolist() == torch.where(~dropped)[0].tolist()
    told = capsys.readouterr().out
    for c in range(3):
        line = f"keeps {(labels[rows] == c).sum()} / {(labels == c).sum()} outliers of class {c}"
        assert line in told
    assert (tmp_path / "filter.png").stat().st_size > 1000
    drawn = code.choose_others("dream", images, outliers, labels, options(tmp_path, outliers=50))
    more = code.choose_others("dream", images, outliers, labels, options(tmp_path, outliers=90))
    assert len(set(drawn.tolist())) == 50 and drawn.tolist() == more[:50].tolist()
    both = code.choose_others(
        "dream", images, outliers, labels, options(tmp_path, outliers=50, filter="knn")
    )
    assert set(both.tolist()) == set(drawn.tolist()) & set(rows.tolist())
    assert len(code.choose_others("sd", images, outliers, labels, args)) == len(outliers)
    for values in ({"outliers": 10**6}, {"filter": "knn"}):
        with pytest.raises(SystemExit, match="outliers are left; sample more"):
            part = outliers[: 1 if "filter" in values else None]
            code.choose_others(
                "dream", images, part, labels[: len(part)], options(tmp_path, **values)
            )


def test_ce_pseudo_learns_the_pseudo_labels_with_the_recipe_of_sd(tiny_run):
    held = torch.load(tiny_run / "classifier_ce-pseudo.pt", weights_only=True)
    assert held["labels"].tolist() == np.load(tiny_run / "pseudo_labels.npy").tolist()
    same = held["labels"].equal(torch.from_numpy(np.load(tiny_run / "train.labels.npy")))
    assert held["config"]["given"] == ("labels" if same else "pseudo-labels")
    assert held["config"]["epochs"] == held["config"]["sd_epochs"]


def test_boundary_crossings(load):
    """Two anchors at right angles: the loss falls along the arc, the boundary is at 45 degrees."""
    code = load("sample_outliers")
    anchors = torch.eye(2)
    degrees = torch.tensor([0.0, 10, 20, 30, 44])
    z = torch.stack([torch.deg2rad(degrees).cos(), torch.deg2rad(degrees).sin()], 1)
    args = SimpleNamespace(t=0.1, ascent=0.02, beyond=0, boundary=3, per_class=7)
    for args.beyond in (0, 5):
        v, rows = code.cross_boundary(z, 0, anchors, args)
        assert rows.tolist() == [4, 3, 2, 4, 3, 2, 4]  # fewest steps first
        angle = torch.rad2deg(torch.atan2(v[:, 1], v[:, 0]))
        first, last = 45 + args.beyond * 0.6, 45 + (args.beyond + 1) * 1.2
        assert (angle > first).all() and (angle < last).all()
        torch.testing.assert_close(v.norm(dim=1), torch.ones(7))


def test_alternatives_from_the_anchors(load):
    code = load("sample_outliers")
    anchors = F.normalize(normal(3, 500), dim=1)
    for source, cosine in (("noise", 1 / np.sqrt(1 + 500 * 0.04**2)), ("anchor", 1)):
        v = code.from_anchors(1, anchors, 0.04, SimpleNamespace(source=source, per_class=40))
        torch.testing.assert_close(v.norm(dim=1), torch.ones(40))
        assert (v @ anchors[1]).mean().item() == pytest.approx(cosine, abs=0.01)
    v = code.from_anchors(1, anchors, 0.04, SimpleNamespace(source="interpolate", per_class=40))
    near = v @ anchors.T
    torch.testing.assert_close(near[:, 1], near[:, [0, 2]].max(1).values)
    assert 5 < (near[:, 0] > near[:, 2]).sum() < 35  # halfway to either of the others


@pytest.mark.parametrize("flags", ["--source noise", "--source anchor", "--selection boundary"])
def test_alternatives_end_in_the_same_files(tiny_run, tmp_path, main, flags):
    for name in ("anchors", "id_embeddings", "id_labels", "train"):
        (tmp_path / f"{name}.npy").symlink_to(tiny_run / f"{name}.npy")
    (tmp_path / "diffusion").symlink_to(tiny_run / "diffusion")
    small = "--K 6 --boundary 6 --draw 6 --candidates 16 --per-class 8 --steps 2"
    main("sample_outliers", "--dir", tmp_path, *small.split(), *flags.split())
    rows = np.genfromtxt(tmp_path / "outliers.csv", delimiter=",", names=True)
    assert len(rows) == len(np.load(tmp_path / "outliers.npy")) == 24
    z = F.normalize(torch.from_numpy(np.load(tiny_run / "id_embeddings.npy")))
    v = F.normalize(torch.from_numpy(np.load(tmp_path / "outlier_embeddings.npy")))
    source = rows["source"].astype(int)
    np.testing.assert_allclose(rows["cosine"], (v * z[source]).sum(1), atol=1e-4)
    assert (np.load(tiny_run / "id_labels.npy")[source] == rows["class"]).all()


@pytest.mark.parametrize("flags", ["--selection official", "--source noise"])
def test_inliers_go_with_latent_sampling_alone(main, tmp_path, flags, capsys):
    with pytest.raises(SystemExit):
        main("sample_outliers", "--dir", tmp_path, "--inliers", *flags.split())
    assert "--inliers goes with --source latent" in capsys.readouterr().err


def test_optimizers_leave_frozen_weights_out(load):
    net = torch.nn.Linear(3, 2)
    net.bias.requires_grad_(False)
    args = SimpleNamespace(lr=0.1, weight_decay=0.01, momentum=0.0, optimizer="sgd")
    for args.optimizer, kind in (("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)):
        optimizer = load("train_classifier").make_optimizer(net, args)
        (group,) = optimizer.param_groups
        assert type(optimizer) is kind
        assert group["params"] == [net.weight]
        assert (group["lr"], group["weight_decay"]) == (0.1, 0.01)
