"""The papers' formulas against closed forms, brute force and second libraries."""

import argparse
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from PIL import Image
from sklearn.neighbors import NearestNeighbors

import sample_outliers
import sample_sd_outliers
import train_classifier
import train_scan_diffusion
import train_text_encoder

SAMPLERS = (sample_outliers, sample_sd_outliers)


def unit(rows, d, seed=0):
    return F.normalize(torch.randn(rows, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def tiny_unet(classes=3):
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [16]}
    return UNet2DModel(8, 1, 1, layers_per_block=1, norm_num_groups=8, num_class_embeds=classes + 1, **blocks).eval()


# SCAN


def test_nt_xent_equals_a_loop_over_pairs():
    z1, z2, tau = unit(5, 7).double(), unit(5, 7, 1).double(), 0.1
    z, losses = torch.cat([z1, z2]), []
    for i in range(10):
        j = (i + 5) % 10
        others = [math.exp(float(z[i] @ z[k]) / tau) for k in range(10) if k != i]
        losses.append(-math.log(math.exp(float(z[i] @ z[j]) / tau) / sum(others)))
    assert train_scan_diffusion.nt_xent(z1, z2, tau).item() == pytest.approx(np.mean(losses), rel=1e-9)


def test_neighbours_equal_scikit_learn_and_leave_the_image_out():
    z = unit(300, 16)
    near = train_scan_diffusion.nearest_neighbours(z, 5).numpy()
    expected = NearestNeighbors(n_neighbors=6, algorithm="brute").fit(z.numpy()).kneighbors(z.numpy())[1][:, 1:]
    assert (np.arange(300)[:, None] != near).all()
    assert (np.sort(near, 1) == np.sort(expected, 1)).all()


def test_scan_loss_by_hand():
    logits, partner = torch.randn(6, 3).double(), torch.randn(6, 3).double()
    p, q = (np.exp(a.numpy()) / np.exp(a.numpy()).sum(1, keepdims=True) for a in (logits, partner))
    mean = p.mean(0)
    expected = -np.log((p * q).sum(1)).mean() - 5 * -(mean * np.log(mean)).sum()
    assert train_scan_diffusion.scan_loss(logits, partner, 5.0).item() == pytest.approx(expected, rel=1e-6)


def test_scan_loss_prefers_agreement_spread_over_clusters():
    loss = train_scan_diffusion.scan_loss
    spread, collapsed = 9 * torch.eye(3), 9 * torch.eye(3)[[0, 0, 0]]
    assert loss(spread, spread, 5.0) < loss(collapsed, collapsed, 5.0)
    assert loss(spread, spread, 5.0) < loss(spread, spread.roll(1, 0), 5.0)


def test_selflabel_loss_masks_weights_and_refuses():
    sure = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0], [0.2, 0.0]])  # the last one is not confident
    strong = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    ce = F.cross_entropy(strong[:3], torch.tensor([0, 0, 1]), reduction="none")
    expected = (ce[0] / 2 + ce[1] / 2 + ce[2]) / 2  # each cluster counts the same
    assert train_scan_diffusion.selflabel_loss(sure, strong, 0.99).item() == pytest.approx(expected.item(), rel=1e-5)
    assert train_scan_diffusion.selflabel_loss(sure[[3, 3]], strong[:2], 0.99) is None
    assert train_scan_diffusion.selflabel_loss(sure[:2], strong[:2], 0.99) is None  # cluster 1 would die out


@pytest.mark.parametrize(("kind", "size"), [("affine", 8), ("colour", 32)])
@pytest.mark.parametrize("strong", [False, True])
def test_views_are_random_in_range_and_keep_the_shape(kind, size, strong):
    images = torch.randint(0, 256, (16, 3, size, size), dtype=torch.uint8)
    torch.manual_seed(0)
    first, second = (train_scan_diffusion.view(images, kind, strong) for _ in range(2))
    assert first.shape == images.shape and first.min() >= -1.001 and first.max() <= 1.001
    assert (first - second).abs().amax((1, 2, 3)).min() > 0.01  # every image got a new draw
    assert torch.equal(train_scan_diffusion.view(images), images.float() / 255 * 2 - 1)


# The encoder and the training view


def options(**given):
    return argparse.Namespace(**({"degrees": 0.0, "zoom": 1.0, "shift": 0, "flip": 0} | given))


@pytest.mark.parametrize("script", [train_text_encoder, train_classifier])
def test_augment_is_the_identity_without_options_and_a_padded_crop_with_shift(script):
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    plain = images.float() / 255 * 2 - 1
    assert torch.allclose(script.augment(images, options()), plain, atol=1e-5)
    torch.manual_seed(0)
    moved, padded, seen = script.augment(images, options(shift=2)), F.pad(plain, (2,) * 4, value=-1), set()
    for i in range(64):
        crops = {(y, x): padded[i, :, y : y + 8, x : x + 8] for y in range(5) for x in range(5)}
        match = [place for place, crop in crops.items() if torch.allclose(crop, moved[i], atol=1e-4)]
        assert match  # every view is one of the 25 whole-pixel crops
        seen.update(match)
    assert len(seen) > 15


def test_augment_mirrors_half_of_the_images():
    images = torch.randint(0, 256, (400, 3, 8, 8), dtype=torch.uint8)
    plain, view = images.float() / 255 * 2 - 1, train_classifier.augment(images, options(flip=1))
    mirrored = [torch.allclose(a.flip(2), b, atol=1e-4) for a, b in zip(plain, view, strict=True)]
    same = [torch.allclose(a, b, atol=1e-4) for a, b in zip(plain, view, strict=True)]
    assert sum(mirrored) + sum(same) == 400 and 140 < sum(mirrored) < 260


def test_cosine_logits_equal_torch():
    z, Gamma = torch.randn(5, 9), torch.randn(3, 9)
    expected = F.cosine_similarity(z[:, None], Gamma[None], dim=2) / 0.1
    assert torch.allclose(train_text_encoder.cosine_logits(z, Gamma, 0.1), expected, atol=1e-4)


# DREAM-OOD: embeddings


@pytest.mark.parametrize("K", [1, 2, 40, 300])
def test_kth_distance_equals_brute_force(K):
    bank = unit(400, 64)
    queries = torch.cat([bank[:50], unit(60, 64, 1)])  # the first 50 are their own nearest neighbour
    exact = torch.cdist(queries.double(), bank.double(), compute_mode="donot_use_mm_for_euclid_dist")
    exact = exact.sort(1).values[:, K - 1]
    assert (sample_outliers.kth_distance(queries, bank, K, chunk=37) - exact).abs().max() < 1e-4


def selection(kind, **given):
    recipe = {option: row[1] for option, row in sample_outliers.RECIPES.items()}
    recipe |= {"selection": kind, "inliers": False, "candidates": 400, "boundary": 30, "draw": 30, "K": 40} | given
    return argparse.Namespace(**recipe)


def clustered(n=150, d=32):
    torch.manual_seed(1)
    return F.normalize(unit(1, d) + 0.1 * torch.randn(n, d), dim=1)


def test_selection_knn_keeps_the_farthest_and_official_does_not():
    z = clustered()
    result = {}
    for kind in ("knn", "official", "random"):
        torch.manual_seed(0)
        result[kind] = sample_outliers.sample_embeddings(z, 240, 0.2, selection(kind))
    v, source, d_K, percentile = result["knn"]
    assert v.shape == (240, 32) and torch.allclose(v.norm(dim=1), torch.ones(240), atol=1e-5)
    exact = torch.cdist(v.double(), z.double()).sort(1).values[:, 39]
    assert (d_K - exact).abs().max() < 1e-4
    assert percentile.mean() >= 0.99
    assert 0.4 < result["official"][3].mean() < 0.6
    assert 0.4 < result["random"][3].mean() < 0.6
    assert d_K.mean() > result["official"][2].mean()
    own = sample_outliers.kth_distance(z, z, 40)
    assert set(source.tolist()) == set(own.topk(30).indices.tolist())  # exactly the boundary set


def test_noise_is_independent_per_boundary_point_and_shared_in_the_released_way():
    z = clustered()
    directions = {}
    for kind in ("random", "official"):
        torch.manual_seed(0)
        v, source, _, _ = sample_outliers.sample_embeddings(z, 60, 1e-4, selection(kind, candidates=3, keep=2))
        eps = (v - z[source]) / 1e-4  # nearly the noise, without its radial part
        eps = F.normalize(eps - (eps * z[source]).sum(1, keepdim=True) * z[source], dim=1)
        cosine = (eps @ eps.T).fill_diagonal_(0)
        directions[kind] = (cosine > 0.8).any(1).float().mean()
    assert directions["random"] < 0.2 and directions["official"] > 0.9


def test_inliers_are_the_nearest_candidates_of_any_id_point():
    z = clustered()
    args = selection("knn", inliers=True)
    v, source, d_K, percentile = sample_outliers.sample_embeddings(z, 150, 0.02, args)
    assert percentile.mean() < 0.01
    assert len(set(source.tolist())) > 90  # not one point, not the boundary alone
    assert (v * z[source]).sum(1).mean() > 0.98


def test_expected_cosine_is_kept_when_d_changes():
    for d in (128, 768):
        sigma = 0.07 * math.sqrt(768 / d)
        torch.manual_seed(0)
        z = clustered(n=60, d=d)
        args = selection("random", K=5, boundary=20, draw=20, candidates=20)
        v, source, _, _ = sample_outliers.sample_embeddings(z, 300, sigma, args)
        assert (v * z[source]).sum(1).mean().item() == pytest.approx(0.46, abs=0.02)


def test_decoding_a_class_embedding_is_decoding_the_class_whatever_the_batch(tmp_path):
    unet, scheduler, labels = tiny_unet(), DDPMScheduler(1000, 1e-4, 0.02, "linear"), torch.tensor([0, 2, 1])
    unet.save_pretrained(tmp_path / "unet")
    scheduler.save_pretrained(tmp_path / "scheduler")
    args = argparse.Namespace(
        diffusion=str(tmp_path), device="cpu", compile=False, scheduler="dpmpp", steps=5, guidance=2.5
    )
    table = unet.class_embedding.weight.detach()
    decode, side = sample_outliers.class_decoder(args, table[:-1].numpy())
    seeds = [sample_outliers.image_seed(3, i) for i in (7, 8, 9)]
    images = decode(table[labels], labels, seeds)
    assert side == 8
    solver = DPMSolverMultistepScheduler.from_config(scheduler.config, thresholding=True, sample_max_value=1.0)
    solver.set_timesteps(timesteps=[999, 562, 250, 62, 0])
    x = torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    with torch.no_grad():
        for t in solver.timesteps:
            eps, free = unet(x, t, labels).sample, unet(x, t, torch.full((3,), 3)).sample
            x = solver.step(free + 2.5 * (eps - free), t, x).prev_sample
    assert torch.allclose(images, x, atol=1e-4)
    alone = [decode(table[labels[[i]]], labels[[i]], [seeds[i]]) for i in (0, 1)]
    assert torch.allclose(torch.cat(alone), images[:2], atol=1e-4)


@pytest.mark.parametrize("name", ["pndm", "dpmpp", "unipc", "ddim"])
def test_every_solver_follows_the_exact_flow_of_a_gaussian(name):
    config, std, mean = DDPMScheduler(1000, 1e-4, 0.02, "linear").config, 0.5, 0.2
    abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)

    def model(x, t, c):  # the score, and so eps, is known
        a = abar[int(t)].float()
        return SimpleNamespace(sample=(x - a.sqrt() * mean) * (1 - a).sqrt() / (a * std**2 + 1 - a))

    model.dtype, model.config = torch.float32, SimpleNamespace(in_channels=4)
    solver = sample_outliers.make_solver(config, name, 50, False, "cpu")
    c, seeds = torch.zeros(64, 1), list(range(64))
    x = sample_outliers.denoise(model, solver, c, c, seeds, 4, 1.0)
    noise = torch.stack([torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    a = abar[999].float()
    exact = mean + std * (noise - a.sqrt() * mean) / (a * std**2 + 1 - a).sqrt()
    assert (x - exact).norm() / exact.norm() < (0.07 if name == "ddim" else 0.05)  # DDIM is of first order


@pytest.mark.parametrize("script", SAMPLERS)
def test_resizing(script):
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    area = x.view(2, 3, 4, 2, 4, 2).mean((3, 5))
    assert torch.allclose(script.resize(x, 4, "area"), area, atol=1e-6)
    assert torch.equal(script.resize(x, 4, "nearest"), x[:, :, ::2, ::2])
    corners = [x[:, :, a::4, b::4] for a in (1, 2) for b in (1, 2)]  # no antialias: 4 of the 16 pixels
    assert torch.allclose(script.resize(x, 2, "bilinear"), torch.stack(corners).mean(0), atol=1e-6)
    pixels = ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    expected = [np.asarray(Image.fromarray(image).resize((4, 4), Image.LANCZOS)) for image in pixels]
    assert (script.to_uint8(script.resize(x, 4, "lanczos")) == np.stack(expected)).all()
    assert script.resize(x, 8, "lanczos") is x


# Guidance and paper B's sampler


def stub(x, t, c):
    """An eps-model whose answer tells image, step and condition apart; class 3 is the null class."""
    t = torch.as_tensor(t, dtype=x.dtype)
    return SimpleNamespace(sample=0.1 * x + 0.001 * t + 0.2 * c.view(-1, 1, 1, 1).to(x))


stub.config, stub.dtype = SimpleNamespace(num_class_embeds=4), torch.float32


@pytest.mark.parametrize("script", SAMPLERS)
@pytest.mark.parametrize("w", [0.0, 2.0, 4.0])
def test_guidance_equals_the_posters_formula(script, w):
    x, c = torch.randn(2, 1, 4, 4), torch.tensor([0, 2])
    null = torch.full_like(c, 3)
    expected = (1 + w) * stub(x, 50, c).sample - w * stub(x, 50, null).sample
    assert torch.allclose(script.guided_noise(stub, x, 50, c, null, w), expected, atol=1e-6)


def half_noise(x, c_r, seeds, **given):
    args = argparse.Namespace(**({"S": 100, "steps": 10, "w": 2.0, "sampler": "dpmpp"} | given))
    config, null = DDPMScheduler(1000, 1e-4, 0.02, "linear").config, torch.full_like(c_r, 3)
    return sample_sd_outliers.half_noise_and_denoise(given.pop("model", stub), config, x, c_r, null, seeds, args)


def test_without_guidance_and_with_the_own_class_it_is_plain_conditional_sampling():
    x, y, seeds = torch.rand(2, 1, 4, 4) - 0.5, torch.tensor([1, 2]), [5, 6]
    made = half_noise(x, y, seeds, w=0.0)
    scheduler = DDPMScheduler(1000, 1e-4, 0.02, "linear")
    eps = torch.stack([torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    solver = DPMSolverMultistepScheduler.from_config(scheduler.config, thresholding=True, sample_max_value=1.0)
    solver.set_timesteps(timesteps=[100, 79, 60, 44, 31, 20, 11, 5, 1, 0])
    x_t = scheduler.add_noise(x, eps, torch.tensor([100, 100]))
    for t in solver.timesteps:
        x_t = solver.step(stub(x_t, t, y).sample, t, x_t).prev_sample
    assert torch.allclose(made, x_t, atol=1e-5)


def test_ancestral_sampling_by_hand():
    x, c_r, S, w = torch.rand(1, 1, 4, 4) - 0.5, torch.tensor([2]), 3, 2.0
    made = half_noise(x, c_r, [11], S=S, w=w, sampler="ddpm")
    beta = torch.linspace(1e-4, 0.02, 1000)
    abar, generator = (1 - beta).cumprod(0), torch.Generator().manual_seed(11)
    draw = lambda: torch.randn(1, 1, 4, 4, generator=generator)  # noqa: E731
    x_t = abar[S].sqrt() * x + (1 - abar[S]).sqrt() * draw()
    for t in range(S, -1, -1):
        eps = (1 + w) * stub(x_t, t, c_r).sample - w * stub(x_t, t, torch.tensor([3])).sample
        before = abar[t - 1] if t else torch.tensor(1.0)
        x_0 = ((x_t - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()).clamp(-1, 1)
        mean = (before.sqrt() * beta[t] * x_0 + (1 - beta[t]).sqrt() * (1 - before) * x_t) / (1 - abar[t])
        x_t = mean + (((1 - before) / (1 - abar[t]) * beta[t]).sqrt() * draw() if t else 0)
    assert torch.allclose(made, x_t, atol=1e-4)


@pytest.mark.parametrize("std", [0.15, 0.5])
@pytest.mark.parametrize("S", [50, 100, 200])
def test_dpm_solver_from_S_follows_the_exact_ode_of_a_gaussian(S, std):
    mean = 0.2  # of every pixel, with std; its score, and so eps and the flow back to t = 0, are known
    abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)

    def model(x, t, c):
        a = abar[int(t)].float()
        return SimpleNamespace(sample=(x - a.sqrt() * mean) * (1 - a).sqrt() / (a * std**2 + 1 - a))

    model.config, model.dtype = stub.config, torch.float32
    x, seeds = mean + std * torch.randn(64, 1, 4, 4), list(range(64))
    made = half_noise(x, torch.zeros(64, dtype=torch.long), seeds, S=S, w=0.0, steps=20, model=model)
    eps = torch.stack([torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    a = abar[S].float()
    x_S = a.sqrt() * x + (1 - a).sqrt() * eps
    exact = mean + std * (x_S - a.sqrt() * mean) / (a * std**2 + 1 - a).sqrt()
    inside = exact.abs() < 0.95  # static clipping must not matter here
    assert (made - exact)[inside].norm() / exact[inside].norm() < 0.01
    assert (x_S - exact)[inside].norm() / exact[inside].norm() > 0.03  # there was something to undo


def test_wrong_class_is_uniform_over_the_others():
    drawn = np.array([[sample_sd_outliers.wrong_class(y, 4, 0, 4 * i + y) for y in range(4)] for i in range(600)])
    for y in range(4):
        counts = np.bincount(drawn[:, y], minlength=4)
        assert counts[y] == 0 and (np.delete(counts, y) > 140).all()


@pytest.mark.parametrize("script", SAMPLERS)
def test_seeds_differ_between_images_and_runs(script):
    seeds = {script.image_seed(seed, i) for seed in range(3) for i in range(2000)}
    assert len(seeds) == 6000 and all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize("script", SAMPLERS)
def test_steps_start_at_S_and_end_at_0(script):
    assert script.quadratic_steps(100, 1) == [100]
    assert script.quadratic_steps(100, 3) == [100, 25, 0]
    steps = script.quadratic_steps(50, 20)
    assert steps[0] == 50 and steps[-1] == 0 and steps == sorted(set(steps), reverse=True)


@pytest.mark.parametrize("script", SAMPLERS)
def test_pixels(script):
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0]).view(1, 1, 2, 2)
    assert script.to_uint8(x).tolist() == [[[[0] * 3, [0] * 3], [[128] * 3, [255] * 3]]]


# Detectors


def test_energy_and_dream_loss_by_hand():
    logits, labels = torch.randn(5, 3).double(), torch.tensor([0, 2, 1])
    is_id, phi = torch.tensor([True, True, True, False, False]), torch.nn.Linear(1, 2).double()
    a = logits.numpy()
    E = np.log(np.exp(a).sum(1))
    assert np.allclose(train_classifier.energy(logits).numpy(), E)
    assert np.allclose(train_classifier.energy(logits, T=2.0).numpy(), 2 * np.log(np.exp(a / 2).sum(1)))
    ce = np.mean([E[i] - a[i, c] for i, c in enumerate([0, 2, 1])])
    weight, bias = phi.weight.detach().numpy()[:, 0], phi.bias.detach().numpy()
    out = E[:, None] * weight + bias
    regularisation = np.mean([np.log(np.exp(o).sum()) - o[k] for o, k in zip(out, [1, 1, 1, 0, 0], strict=True)])
    loss = train_classifier.dream_loss(logits, labels, is_id, phi, 2.5).item()
    assert loss == pytest.approx(ce + 2.5 * regularisation, rel=1e-9)


def test_sd_loss_by_hand():
    torch.manual_seed(0)
    logits = {"g_bin": torch.randn(4, 2), "g_in": torch.randn(4, 3), "g_out": torch.randn(4, 3)}
    labels, outlier, lam = [0, 2, 1, 1], [0, 0, 1, 1], 0.5
    ce = lambda row, k: math.log(row.exp().sum()) - row[k].item()  # noqa: E731
    total = 0.0
    for i in range(4):
        total += ce(logits["g_bin"][i], outlier[i])
        total += lam * ce(logits["g_out"][i], labels[i]) if outlier[i] else ce(logits["g_in"][i], labels[i])
    loss = train_classifier.sd_loss(logits, torch.tensor(labels), torch.tensor(outlier), lam).item()
    assert loss == pytest.approx(total / 4, rel=1e-5)


@pytest.mark.parametrize("method", ["ce", "dream", "dream-id", "sd"])
@pytest.mark.parametrize("arch", ["small", "resnet18"])
def test_detectors_have_the_heads_of_their_method(method, arch):
    net = train_classifier.Detector(method, arch, 4, 0).eval()
    features, logits = net(torch.zeros(2, 3, 16, 16))
    assert features.shape == (2, 512)
    expected = {"g_bin": 2, "g_in": 4, "g_out": 4} if method == "sd" else {"g_in": 4}
    assert {name: tuple(head.shape) for name, head in logits.items()} == {name: (2, n) for name, n in expected.items()}
    assert hasattr(net, "phi") == (method == "dream")


def test_outliers_take_the_format_of_the_id_data():
    grey = np.random.default_rng(0).choice([0, 100, 255], (50, 4, 4, 1)).astype(np.uint8).repeat(3, axis=3)
    colour = np.random.default_rng(1).integers(0, 256, (50, 4, 4, 3), dtype=np.uint8)
    made = train_classifier.in_format_of(grey, colour)
    luminance = np.rint(colour @ np.array([0.299, 0.587, 0.114]))
    nearest = np.array([0, 100, 255])[np.abs(luminance[..., None] - [0, 100, 255]).argmin(-1)]
    assert made.dtype == np.uint8 and (made == nearest[..., None]).all()
    photographs = np.random.default_rng(2).integers(0, 256, (500, 8, 8, 3), dtype=np.uint8)
    assert (train_classifier.in_format_of(photographs, colour) == colour).all()


# Data sets


def test_digits_are_divided_by_class():
    (train, y, names), (test, y_test, _) = (
        train_scan_diffusion.read_images("digits:0-5", s, 8) for s in ("train", "test")
    )
    assert len(train) + len(test) == 1083 and names == list("012345") and train.shape[1:] == (8, 8, 3)
    assert set(y) == set(y_test) == set(range(6)) and 0.19 < len(test) / 1083 < 0.21
    everything, labels, names = train_scan_diffusion.read_images("digits:6,8-9", "ood", 8)
    assert names == ["6", "8", "9"] and set(labels) == {0, 1, 2} and len(everything) == 181 + 174 + 180


def test_folders_arrays_and_patches(tmp_path):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for label in ("cat", "dog"):
            (tmp_path / "set" / part / label).mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "set" / part / label / f"{i}.png")
    images, labels, names = train_scan_diffusion.read_images(str(tmp_path / "set"), "train", 16)
    assert images.shape == (6, 16, 16, 3) and labels.tolist() == [0, 0, 0, 1, 1, 1] and names == ["cat", "dog"]
    images, labels, names = train_scan_diffusion.read_images(f"{tmp_path / 'set'}:1", "test", 16)
    assert len(images) == 3 and labels.tolist() == [0, 0, 0] and names == ["dog"]
    images, labels, names = train_scan_diffusion.read_images(str(tmp_path / "set" / "train" / "cat"), "ood", 16)
    assert images.shape == (3, 16, 16, 3) and labels is None and names is None
    arrays = rng.integers(0, 256, (10, 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "x.npy", arrays)
    np.save(tmp_path / "x.labels.npy", np.arange(10) % 2)
    images, labels, _ = train_scan_diffusion.read_images(str(tmp_path / "x.npy"), "ood", 16)
    assert (images == arrays).all() and labels.tolist() == [0, 1] * 5
    images, labels, _ = train_scan_diffusion.read_images(str(tmp_path / "x.npy"), "test", 16)
    assert labels.tolist() == [0, 1] and (images == arrays[8:]).all()  # the fifth of each class
    assert train_scan_diffusion.read_images("patches", "ood", 8)[0].shape == (520, 8, 8, 3)


def prepared(folder, data):
    args = argparse.Namespace(dir=folder, data=data, image_size=8, device="cpu", data_root="data")
    return train_scan_diffusion.prepare_data(args)


def test_new_id_data_replaces_what_is_left_of_old(tmp_path):
    prepared(tmp_path, "digits:0-2")
    (tmp_path / "data.json").unlink()
    (tmp_path / "train.npy").unlink()  # test.npy and the labels of other classes stay behind
    data, images, labels = prepared(tmp_path, "digits:3-5")
    test, y, _ = train_scan_diffusion.read_images("digits:3-5", "test", 8)
    assert (images["test"].permute(0, 2, 3, 1).numpy() == test).all() and (labels["test"] == y).all()
    assert data["classes"] == ["3", "4", "5"]


def test_class_names_without_labels_are_left_out(tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("train", "test"):
        np.save(tmp_path / "set" / f"{name}.npy", np.zeros((4, 8, 8, 3), np.uint8))
    (tmp_path / "set" / "classes.txt").write_text("cat\ndog\n")
    data, _, labels = prepared(tmp_path / "run", str(tmp_path / "set"))
    assert data["classes"] is None and labels == {"train": None, "test": None}
