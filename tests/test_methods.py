"""The papers' formulas against closed forms, brute force and second libraries."""

from collections import ChainMap
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from scipy.spatial.distance import cdist
from scipy.special import log_softmax, logsumexp
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

SCRIPTS = ["train_scan_diffusion", "train_text_encoder", "sample_outliers", "sample_sd_outliers"]
ABAR = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0).float()
SCHEDULE = DDPMScheduler(1000, 1e-4, 0.02, "linear")


@pytest.fixture(scope="module")
def code(load):
    parts = [vars(load(script)) for script in [*SCRIPTS, "train_classifier", "evaluate"]]
    return SimpleNamespace(**dict(ChainMap(*parts)))  # what is of one name has the same text


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def unit(rows, d, seed=0):
    return F.normalize(normal(rows, d, seed=seed), dim=1).float()


def test_nt_xent_and_cosine_logits(code):
    z = unit(10, 7).double()
    similarity = (z @ z.T / 0.1).numpy()
    np.testing.assert_allclose(code.cosine_logits(3 * z, 2 * z, 0.1), similarity, atol=1e-9)
    np.fill_diagonal(similarity, -np.inf)
    expected = -log_softmax(similarity, 1)[range(10), [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]].mean()
    assert code.nt_xent(*z.chunk(2), 0.1).item() == pytest.approx(expected, rel=1e-9)


def test_scan_and_selflabel_loss(code):
    logits = normal(6, 3)
    partner = normal(6, 3, seed=1)
    p, p_k = np.exp(log_softmax(torch.stack([logits, partner]).numpy(), 2))
    expected = -np.log((p * p_k).sum(1)).mean() + 5 * (p.mean(0) * np.log(p.mean(0))).sum()
    assert code.scan_loss(logits, partner, 5.0).item() == pytest.approx(expected, rel=1e-9)
    impossible = torch.tensor([[400.0, 0, 0], [400, 0, 0]], requires_grad=True)
    code.scan_loss(impossible, impossible.roll(1, 1), 5.0).backward()
    assert impossible.grad.isfinite().all()
    log_p = np.log(p[:4])  # every cluster counts the same; cluster 1 has no confident image
    expected = -(np.mean(log_p[[0, 1, 3], 0]) + log_p[2, 2]) / 2
    loss = code.selflabel_loss(logits[:4].float(), torch.tensor([0, 0, 2, 0])).item()
    assert loss == pytest.approx(expected, rel=1e-5)


def test_report_gives_acc_nmi_and_ari(code, capsys):
    y = np.repeat([0, 1, 2], [30, 20, 10])
    assigned = np.array([2, 0, 1])[y]  # the same clusters under other numbers
    assigned[:12] = 1  # but for some
    code.report("stage", assigned, y, 3)
    acc = max((np.array(order)[assigned] == y).mean() for order in permutations(range(3)))
    nmi = normalized_mutual_info_score(y, assigned)
    expected = f"ACC {acc:.3f}  NMI {nmi:.3f}  ARI {adjusted_rand_score(y, assigned):.3f}"
    assert acc == 0.8 and f"{expected}  cluster sizes 20 22 18" in capsys.readouterr().out


def test_clusters_take_the_numbers_of_the_classes(code):
    torch.manual_seed(0)
    head = torch.nn.Linear(5, 4)
    x = torch.randn(400, 5)
    before = head(x)
    number = torch.tensor([2, 0, 3, 1])
    labels = number[before.argmax(1)]
    labels[:20] = 0  # some labels disagree
    code.name_clusters(head, before.argmax(1), labels.numpy())
    assert torch.equal(head(x)[:, number], before)


@pytest.mark.parametrize(("k", "offset"), [(1, 0.0), (7, 1000.0), (405, 1000.0)])
def test_knn_equals_brute_force(code, k, offset):
    bank = torch.cat([unit(400, 24), unit(5, 24)]) + offset  # five rows twice
    queries = torch.cat([unit(1000, 24, 1) + offset, bank[:50], unit(1050, 24, 2) + offset])
    distance, index = code.knn(queries, bank, k)
    exact = cdist(queries.double(), bank.double())
    np.testing.assert_allclose(distance**2, np.sort(exact, 1)[:, :k] ** 2, atol=1e-5)
    own = np.take_along_axis(exact, index.numpy(), 1)
    np.testing.assert_allclose(distance**2, own**2, atol=1e-5)
    assert (np.diff(np.sort(index.numpy(), 1)) > 0).all()  # no row twice


def tiny_unet():
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    size = {"block_out_channels": [16], "layers_per_block": 1, "norm_num_groups": 8}
    return UNet2DModel(8, 1, 1, num_class_embeds=4, **blocks, **size).eval()


def test_pick(code):
    """knn: each point's own extremes; official: those of the (candidates, points) misreading."""
    d_K = torch.rand(30, 1500, generator=generator(0))
    misread = np.array([d_K.flatten()[p::30].numpy() for p in range(30)])
    for kind, read in {"knn": d_K.numpy(), "official": misread}.items():
        assert (code.pick(d_K, 7, kind).numpy() == np.argsort(-read)[:, :7]).all()
        assert (code.pick(d_K, 1, kind, True).numpy() == np.argsort(read)[:, :1]).all()


def selection(kind, **given):
    options = {"selection": kind, "inliers": False, "K": 40, "boundary": 30, "draw": 20}
    return SimpleNamespace(**options | {"candidates": 400, "keep": 2} | given)


def clustered(n=150, d=32):
    return F.normalize(unit(1, d) + 0.1 * normal(n, d, seed=1).float(), dim=1)


@pytest.mark.parametrize("kind", ["knn", "official", "random", "inliers"])
def test_sampled_embeddings(code, kind):
    z = clustered()
    args = selection("knn", inliers=True) if kind == "inliers" else selection(kind)
    torch.manual_seed(0)
    v, source, d_K, percentile = code.sample_embeddings(z, 230, 0.2, args)
    assert v.shape == (230, 32) and len(source) == len(d_K) == len(percentile) == 230
    assert (v.norm(dim=1) - 1).abs().max() < 1e-5
    np.testing.assert_allclose(d_K, np.sort(cdist(v, z), 1)[:, 39], atol=1e-4)
    if kind == "inliers":  # the nearest of 400, around any ID point
        assert percentile.mean().item() == pytest.approx(1 / 400, abs=1e-6)
        assert source[:100].unique().numel() == 100
        return
    boundary = np.sort(cdist(z, z), 1)[:, 39].argsort()[-30:]  # itself the first of 40
    assert set(source.tolist()) == set(boundary.tolist())
    assert source[:40].unique().numel() == 20  # a round repeats none
    if kind == "knn":  # the two farthest of 400
        assert percentile.mean().item() == pytest.approx((1 + 399 / 400) / 2, abs=1e-5)
    else:
        assert 0.4 < percentile.mean() < 0.6


@pytest.mark.parametrize("kind", ["random", "knn", "official"])
def test_only_the_released_way_shares_noise_among_boundary_points(code, kind):
    z = clustered()
    torch.manual_seed(0)
    v, source, _, _ = code.sample_embeddings(z, 40, 1e-4, selection(kind, candidates=3))
    eps = (v - z[source]) / 1e-4  # nearly the noise, without its radial part
    eps = F.normalize(eps - (eps * z[source]).sum(1, keepdim=True) * z[source], dim=1)
    alike = ((eps @ eps.T).fill_diagonal_(0) > 0.8).any(1).float().mean()
    assert alike > 0.9 if kind == "official" else alike < 0.1


@pytest.mark.parametrize(("inliers", "sigma"), [(False, 0.07), (True, 0.03)])
@pytest.mark.parametrize("d", [96, 768])
def test_sigma_is_scaled_so_that_the_cosine_is_that_of_768_dimensions(code, d, inliers, sigma):
    z = torch.cat([clustered(60, d), -clustered(60, d)]).numpy()
    args = selection("random", K=5, candidates=20, per_class=200, inliers=inliers, boundary=20)
    vars(args).update(
        sigma=sigma, inlier_sigma=sigma, seed=0, device="cpu", rank=0, source="latent"
    )
    _, lines = code.sample_all(unit(2, d).numpy(), 5 * z, np.repeat([0, 1], 60), args)
    cosine = np.array([line.split(",")[3] for line in lines], float)
    assert cosine.mean() == pytest.approx(1 / np.sqrt(1 + 768 * sigma**2), abs=0.02)


def gaussian(std, w=0.0):
    """An eps-model; guided by w, it is the exact one of pixels from N(0.2, std^2). 3 is null."""

    def model(x, t, c):
        a = ABAR[int(t)]
        eps = (x - a.sqrt() * 0.2) * (1 - a).sqrt() / (a * std**2 + 1 - a)
        return SimpleNamespace(sample=eps + torch.where(c == 3, 1 + w, w).view(-1, 1, 1, 1) * x)

    return model


def relative_error(made, x_t, t, std):
    """Of x_0 against the probability flow of that Gaussian from x_t."""
    a = ABAR[t]
    exact = 0.2 + std * (x_t - a.sqrt() * 0.2) / (a * std**2 + 1 - a).sqrt()
    inside = exact.abs() < 0.95  # clipping must not matter
    return ((made - exact)[inside].norm() / exact[inside].norm()).item()


def half_noise(code, x, c, seeds, model, **given):
    options = {"S": 100, "steps": 20, "w": 2.0, "sampler": "dpmpp", "diffusion": ""}
    args = SimpleNamespace(**options | {"device": "cpu", "fp32": False} | given)
    c = torch.tensor(c).expand(len(x))
    return code.half_noise_and_denoise(model, SCHEDULE, x, c, torch.full_like(c, 3), seeds, args)


@pytest.mark.parametrize(("S", "std"), [(50, 0.15), (200, 0.15), (200, 0.5)])
@pytest.mark.parametrize("w", [0.0, 2.0])
def test_dpm_solver_from_x_S_follows_the_exact_flow_of_a_gaussian(code, S, std, w):
    x = 0.2 + std * torch.randn(64, 1, 4, 4, generator=generator(100))
    made = half_noise(code, x, 0, range(64), gaussian(std, w), S=S, w=w)
    eps = torch.stack([torch.randn(1, 4, 4, generator=generator(seed)) for seed in range(64)])
    x_S = ABAR[S].sqrt() * x + (1 - ABAR[S]).sqrt() * eps
    assert relative_error(made, x_S, S, std) < 0.01
    assert relative_error(x_S, x_S, S, std) > 0.03  # there is something to undo


def test_ddpm_brings_half_noised_gaussian_data_back_as_they_were_distributed(code):
    x = 0.2 + 0.2 * torch.randn(100, 1, 8, 8, generator=generator(100))
    made = half_noise(code, x, 0, range(100), gaussian(0.2, 2.0), S=150, sampler="ddpm")
    assert made.mean().item() == pytest.approx(0.2, abs=0.01)
    assert made.std().item() == pytest.approx(0.2, rel=0.03)
    kept = 0.2**2 * ABAR[150] / (0.2**2 * ABAR[150] + 1 - ABAR[150])  # share of x in x_S
    correlation = torch.corrcoef(torch.stack([made.flatten(), x.flatten()]))[0, 1]
    assert correlation.item() == pytest.approx(kept.item(), abs=0.03)


def test_an_sd_outlier_of_ddpm_does_not_depend_on_its_batch(code):
    x = torch.rand(3, 1, 8, 8, generator=generator(0)) * 2 - 1
    given = {"model": tiny_unet(), "S": 20, "sampler": "ddpm"}
    together = half_noise(code, x, [1, 0, 2], [7, 8, 9], **given)
    alone = half_noise(code, x[1:2], [0], [8], **given)
    torch.testing.assert_close(alone, together[1:2], atol=1e-5, rtol=0)


def test_wrong_class_is_uniform_over_the_others_and_repeats(code):
    drawn = [code.wrong_class(2, 4, 0, i) for i in range(900)]
    counts = np.bincount(drawn, minlength=4)
    assert counts[2] == 0 and (np.delete(counts, 2) > 250).all() and len(counts) == 4
    assert drawn == [code.wrong_class(2, 4, 0, i) for i in range(900)]


@pytest.mark.parametrize("sampler", ["dpmpp", "ddpm"])
@pytest.mark.parametrize(("diffusion", "bound"), [("", 1), ("folder", 3)])
def test_partial_solver_goes_from_S_to_0_and_clips_pixels(code, sampler, diffusion, bound):
    args = SimpleNamespace(S=100, steps=3, sampler=sampler, diffusion=diffusion)
    solver = code.partial_solver(SCHEDULE, args)
    steps = [100, 25, 0] if sampler == "dpmpp" else list(range(100, -1, -1))
    assert solver.timesteps.tolist() == steps
    x = torch.full((1, 1, 2, 2), 3.0)
    last = [solver.step(0 * x, t, x).prev_sample for t in solver.timesteps][-1]
    assert last.max().item() == pytest.approx(bound, rel=0.01)
    assert code.quadratic_steps(6, 20) == [6, 5, 4, 3, 2, 1, 0]  # none twice


@pytest.mark.parametrize(("name", "error"), [("pndm", 0.05), ("dpmpp", 0.05), ("ddim", 0.07)])
def test_solvers_from_noise_follow_the_exact_flow_of_a_gaussian(code, name, error):
    solver = code.make_solver(SCHEDULE, SimpleNamespace(scheduler=name, steps=50))
    x = start = torch.randn(64, 4, 4, 4, generator=generator(0))
    for t in solver.timesteps:
        x = solver.step(gaussian(0.3)(x, t, torch.zeros(64)).sample, t, x).prev_sample
    assert relative_error(x, start, 999, 0.3) < error


def test_decoding_a_class_embedding_is_decoding_the_class(code, tmp_path):
    unet = tiny_unet()
    unet.save_pretrained(tmp_path / "diffusion" / "unet")
    SCHEDULE.save_pretrained(tmp_path / "diffusion" / "scheduler")
    Gamma = code.class_anchors(tmp_path / "diffusion")
    assert torch.equal(Gamma, unet.class_embedding.weight[:3])  # without the null class
    options = {"dir": tmp_path, "device": "cpu", "fp32": False, "scheduler": "ddim"}
    args = SimpleNamespace(**options, steps=5, guidance=2.5)
    y = torch.tensor([0, 2, 1])
    images = code.class_decoder(Gamma.numpy(), args)(Gamma[y], y, [7, 8, 9])
    x = torch.stack([torch.randn(1, 8, 8, generator=generator(seed)) for seed in (7, 8, 9)])
    solver = code.make_solver(SCHEDULE, args)
    for t in solver.timesteps:
        with torch.no_grad():
            free = unet(x, t, torch.full((3,), 3)).sample
            eps = free + 2.5 * (unet(x, t, y).sample - free)
        x = solver.step(eps, t, x).prev_sample
    torch.testing.assert_close(images, x, atol=1e-4, rtol=0)


def test_images_take_the_levels_of_the_id_data(code):
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (250, 8, 8, 3), dtype=np.uint8)
    assert (code.match_levels(colour, colour[:50]) == colour[:50]).all()
    assert (code.to_uint8(code.to_float(torch.from_numpy(colour))) == colour).all()
    x = torch.tensor([[[[-2.0, 0, 1]]]])
    assert code.to_uint8(x).tolist() == [[[[0] * 3, [128] * 3, [255] * 3]]]
    digits = np.rint(np.arange(17) * (255 / 16)).astype(np.uint8)
    images = rng.choice(digits, (500, 8, 8, 1)).repeat(3, axis=3)
    made = code.match_levels(torch.from_numpy(images), colour)
    mean = np.rint(colour.mean(3, keepdims=True))
    assert made.dtype == np.uint8 and set(np.unique(made)) <= set(digits)
    assert (np.abs(made - mean) == np.abs(mean - digits).min(-1, keepdims=True)).all()


def test_dream_and_sd_loss_by_hand(code):
    logits = normal(5, 3)
    log_p = log_softmax(logits.numpy(), 1)
    E = logsumexp(logits.numpy(), 1)
    np.testing.assert_allclose(code.energy(2 * logits, T=2.0), 2 * E)
    phi = torch.nn.Linear(1, 2).double()
    out = log_softmax(E[:, None] * phi.weight.detach().numpy().T + phi.bias.detach().numpy(), 1)
    expected = -log_p[[0, 1, 2], [0, 2, 1]].mean() - 2.5 * out[range(5), [1, 1, 1, 0, 0]].mean()
    is_id = torch.tensor([True, True, True, False, False])
    loss = code.dream_loss(logits, torch.tensor([0, 2, 1, 0, 0]), is_id, phi, 2.5).item()
    assert loss == pytest.approx(expected, rel=1e-9)
    logits = {"g_bin": normal(4, 2), "g_in": normal(4, 3, seed=1), "g_out": normal(4, 3, seed=2)}
    log_p = {name: log_softmax(z.numpy(), 1) for name, z in logits.items()}
    total = log_p["g_bin"][range(4), [0, 0, 1, 1]].sum() + log_p["g_in"][[0, 1], [0, 2]].sum()
    total += 0.3 * log_p["g_out"][[2, 3], [1, 1]].sum()
    loss = code.sd_loss(logits, torch.tensor([0, 2, 1, 1]), torch.tensor([0, 0, 1, 1]), 0.3).item()
    assert loss == pytest.approx(-total / 4, rel=1e-6)


@pytest.mark.parametrize("hidden", [0, 8])
def test_scores_of_logits(code, hidden):
    logits = 3 * normal(50, 4)
    E = logsumexp(logits.numpy(), 1)
    scores = code.logit_scores(logits)
    confidence = np.exp(log_softmax(logits.numpy(), 1)).max(1)
    np.testing.assert_allclose(scores["msp"].exp(), 1 - confidence, rtol=1e-9)
    np.testing.assert_allclose(scores["maxlogit"], -logits.numpy().max(1))
    np.testing.assert_allclose(scores["energy"], -E)
    sure = code.logit_scores(torch.tensor([[90.0, 0, 0], [95, 0, 0], [900, 0, 0]]))["msp"]
    assert sure.isfinite().all() and sure[0] > sure[1] > sure[2]  # softmax is 1 for all three
    for seed in range(20):
        torch.manual_seed(seed)
        net = code.Detector("dream", "small", 4, hidden, None)
        code.load_start(net, "dream", SimpleNamespace(vit=None, init="random", loss="logistic"))
        phi = net.phi.double().requires_grad_(False)
        p = phi(torch.from_numpy(E)[:, None]).softmax(1).numpy()
        score = code.phi_score(logits, phi).numpy()  # the log odds of OOD
        np.testing.assert_allclose(score, np.log(p[:, 0] / p[:, 1]), atol=1e-9)
        assert hidden or (np.argsort(score) == np.argsort(-E)).all()  # linear: w_1 > w_0 at first


@pytest.mark.parametrize(("inside", "outside"), [(31, 31), (30, 12), (12, 30)])
@pytest.mark.parametrize(("k", "alpha"), [(2, None), (5, 0.7)])
def test_sd_scores_equal_brute_force(code, inside, outside, k, alpha):
    D_in = normal(inside, 3)
    D_out = 1 + normal(outside, 3, seed=1)
    f = 0.5 + normal(20, 3, seed=2)
    scores = code.sd_scores(f, D_in, D_out, k, alpha)
    if alpha is None:  # an image is not its own neighbour
        own = np.sort(cdist(D_in, D_in, "sqeuclidean"), 1)[:, 1 : k + 1]
        alpha = sorted(own.mean(1))[(inside - 1) // 2]
    distance = np.sort(cdist(f, D_in, "sqeuclidean"), 1)[:, :k].sum(1)
    n = min(inside, outside)  # 1 : 1
    bank = [D_in[i * inside // n] for i in range(n)] + [D_out[i * outside // n] for i in range(n)]
    votes = (np.argsort(cdist(f, torch.stack(bank)), 1)[:, :k] >= n).sum(1)
    np.testing.assert_allclose(scores["distance"], distance, rtol=1e-9)
    assert (scores["voting"].numpy() == votes).all() and votes.any()
    np.testing.assert_allclose(scores["distance+voting"], distance + alpha * votes, rtol=1e-6)


@pytest.mark.parametrize("repeated", [False, True])
def test_mahalanobis_scores_equal_their_definition(code, repeated):
    """Columns twice, a sum of columns and a constant one say nothing new: the scores stay."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 2, 3], 40)
    train = rng.normal(size=(120, 6)) @ rng.normal(size=(6, 6)) + rng.normal(size=(4, 6))[labels]
    far = 4 * rng.normal(size=(30, 6))
    means = np.stack([train[labels == c].mean(0) for c in (0, 2, 3)])
    centred = train - means.repeat(40, 0)
    P = np.linalg.inv(centred.T @ centred / 120)
    near = cdist(far, means, "mahalanobis", VI=P).min(1) ** 2
    P_0 = np.linalg.inv(np.cov(train.T, bias=True))
    background = [(x - train.mean(0)) @ P_0 @ (x - train.mean(0)) for x in far]
    if repeated:
        far, train = (np.c_[x, x[:, :2], x.sum(1), np.full(len(x), 7.0)] for x in (far, train))
    scores = code.mahalanobis_scores(far, train, labels)
    np.testing.assert_allclose(scores["mahalanobis"], near, rtol=1e-6)
    np.testing.assert_allclose(scores["relative-mahalanobis"], near - background, atol=1e-5)


@pytest.mark.parametrize(("count", "size"), [(64, 12), (5, 12)])
def test_batches_pass_over_all_rows_in_a_new_order_each_time(code, count, size):
    batches = max(1, count // size)
    parts = [code.batch_rows(count, size, step, 0, "x") for step in range(3 * batches)]
    passes = torch.cat(parts).view(3, -1).tolist()
    assert len(passes[0]) == min(count, batches * size)  # the rest is dropped
    assert all(len(set(rows) & set(range(count))) == len(rows) for rows in passes)
    assert passes[0] != passes[1] != passes[2] != passes[0]
    other = [code.batch_rows(count, size, 0, *key).tolist() for key in ((1, "x"), (0, "y"))]
    assert passes[0][:size] not in [*other, sorted(passes[0])[:size]]
    seeds = {
        code.seed_of(seed, *key, i) for seed in (0, 1) for key in ((), "x") for i in range(2000)
    }
    assert len(seeds) == 8000 and all(0 <= seed < 2**32 for seed in seeds)
