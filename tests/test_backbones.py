"""Backbones: stems, transformers' vision models from folders, frozen features, Mahalanobis scores, the optimisers."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from sklearn.covariance import EmpiricalCovariance
from transformers import CLIPConfig, CLIPVisionConfig, ConvNextConfig, Dinov2Config, ViTConfig, ViTImageProcessor

import evaluate
import train_classifier
import train_scan_diffusion
import train_text_encoder

SCRIPTS = (train_scan_diffusion, train_text_encoder, train_classifier, evaluate)
TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
WIDE = TINY | {"intermediate_size": 64}
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
CONFIGS = {
    "vit": ViTConfig(**WIDE),
    "dinov2": Dinov2Config(**TINY, mlp_ratio=2),
    "clip-vision": CLIPVisionConfig(**WIDE),
    "clip": CLIPConfig(text_config=TEXT, vision_config=WIDE, projection_dim=16),
    "convnext": ConvNextConfig(hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], image_size=32),
}


def saved(folder, name, processor=None):
    """A random model of the class `name` as save_pretrained leaves it; weights far from their initial size."""
    torch.manual_seed(3)
    model = transformers.AutoModel.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if processor:
        processor.save_pretrained(folder)
    return model


@pytest.fixture
def vit(tmp_path):
    saved(tmp_path / "vit", "vit")
    return f"vit:{tmp_path / 'vit'}"


LOOP = {"amp": "none", "crop": 0, "compile": False, "restart": False, "checkpoint_every": 60.0}


def options(**given):
    """Options of train_classifier for digits, with what parse_args adds."""
    recipe = {option: row[1] for option, row in train_classifier.RECIPES.items()}
    return train_classifier.argparse.Namespace(
        **recipe | {"labels": None, "device": "cpu", "plan": None} | LOOP | given
    )


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("arch", "width"), [("resnet18", 512), ("resnet50", 2048), ("resnet34-imagenet", 512)])
def test_stems(script, arch, width):
    net, given = script.build_backbone(arch)
    small = arch == "resnet34-imagenet"
    assert given == width and arch in script.ARCHS.split("|") if hasattr(script, "ARCHS") else given == width
    assert net.conv1.kernel_size == ((7, 7) if small else (3, 3)) and net.conv1.stride == ((2, 2) if small else (1, 1))
    with torch.no_grad():
        x = torch.zeros(2, 3, 32, 32)
        assert net.eval()(x).shape == (2, width)
        assert net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x))))).shape[-1] == (8 if small else 32)


@pytest.mark.parametrize("name", CONFIGS)
def test_feature_is_the_normed_cls_token_of_the_resized_normalised_image(tmp_path, name):
    side = 32 if name == "convnext" else 16
    statistics = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    processor = ViTImageProcessor(size={"height": side, "width": side}, **statistics)
    model = saved(tmp_path, name, processor)
    plan = train_classifier.transformer_plan(f"vit:{tmp_path}")
    f = train_classifier.Transformer(plan)
    train_classifier.load_pretrained(f, f"vit:{tmp_path}")
    torch.manual_seed(0)
    pixels = torch.rand(2, 3, 8, 8)  # in [0, 1]
    big = F.interpolate(pixels, (side, side), mode="bilinear")
    mean, std = (torch.tensor(a).view(1, 3, 1, 1) for a in statistics.values())
    part = model.vision_model if name == "clip" else model
    with torch.no_grad():
        outputs = part(pixel_values=(big - mean) / std)
        if name == "convnext":
            expected = outputs.pooler_output  # no CLS token
        elif "clip" in name:  # transformers gives the last hidden state before the norm
            norm = getattr(part, "vision_model", part).post_layernorm
            expected = norm(outputs.last_hidden_state[:, 0])
        else:
            expected = outputs.last_hidden_state[:, 0]
        found = f.eval()(pixels * 2 - 1)
    assert found.shape == (2, 32) == (2, plan["width"]) and torch.allclose(found, expected, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 0.01


def test_without_a_preprocessor_the_size_is_the_models_and_pixels_are_in_minus_1_to_1(vit, capsys):
    plan = train_classifier.transformer_plan(vit)
    assert (plan["side"], plan["mean"], plan["std"]) == (16, [0.5] * 3, [0.5] * 3)
    assert "preprocessor_config.json" in capsys.readouterr().out
    assert not hasattr(train_classifier.Transformer(plan).model.pooler, "dense")  # nobody trained ours


def test_crop_size_is_the_side(tmp_path):
    saved(tmp_path, "dinov2")
    said = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 20}, "do_center_crop": True}
    said |= {"crop_size": {"height": 12, "width": 12}, "image_mean": [0.1] * 3, "image_std": [0.9] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    plan = train_classifier.transformer_plan(f"vit:{tmp_path}")
    assert (plan["side"], plan["mean"], plan["std"]) == (12, [0.1] * 3, [0.9] * 3)
    assert train_classifier.Transformer(plan)(torch.zeros(1, 3, 8, 8)).shape == (1, 32)  # DINOv2 adapts its positions


@pytest.mark.parametrize("name", ["vit", "dinov2", "clip-vision"])
@pytest.mark.parametrize("blocks", [0, 2, 3])
def test_frozen_blocks_stay_and_the_rest_learns(tmp_path, name, blocks):
    saved(tmp_path, name)
    args = options(
        dir=tmp_path, arch=f"vit:{tmp_path}", freeze_blocks=blocks, epochs=1, batch_size=8, lr=0.1, weight_decay=0.1
    )
    args.plan = train_classifier.transformer_plan(args.arch)
    torch.manual_seed(train_classifier.seeded(0, "classifier_ce"))
    start = {name: p.detach().clone() for name, p in train_classifier.new_detector("ce", 2, args).named_parameters()}
    torch.manual_seed(0)
    images, labels = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8), torch.arange(16) % 2
    net = train_classifier.train("ce", images, labels, None, None, 2, args)
    for name, parameter in net.named_parameters():
        number = [int(part) for part in name.split(".") if part.isdigit()]
        early = "heads" not in name and "post_layernorm" not in name and "model.layernorm" not in name
        early = early and (number[0] < blocks if number else True)
        assert torch.equal(parameter, start[name]) == (early and blocks > 0) or "mask_token" in name, name
        assert (parameter.grad is not None) == parameter.requires_grad, name  # else DDP would wait for it


def test_too_many_blocks_and_wrong_folders_are_one_line(tmp_path, vit, capsys):
    def line(function, *args):
        with pytest.raises(SystemExit):
            function(*args)
        lines = [text for text in capsys.readouterr().err.splitlines() if text.strip() and "%|" not in text]
        (text,) = lines
        return text

    args = options(arch=vit, freeze_blocks=4, plan=train_classifier.transformer_plan(vit))
    assert "--freeze-blocks is 4" in line(train_classifier.new_detector, "ce", 2, args)
    (tmp_path / "empty").mkdir()
    for wrong in (tmp_path / "nothing" / "here", tmp_path / "empty"):
        assert str(wrong) in line(train_classifier.transformer_plan, f"vit:{wrong}")
    text = tmp_path / "text"
    transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)).save_pretrained(text)
    assert "no vision model" in line(train_classifier.transformer_plan, f"vit:{text}")

    f, weights = train_classifier.Transformer(args.plan), tmp_path / "vit" / "model.safetensors"
    whole = load_file(weights)
    key = next(key for key in whole if "layernorm_before.weight" in key)
    save_file({k: v for k, v in whole.items() if k != key}, weights, {"format": "pt"})
    assert "1 weights are missing" in line(train_classifier.load_pretrained, f, vit)
    weights.write_bytes(b"not safetensors")
    assert "does not load" in line(train_classifier.load_pretrained, f, vit)
    weights.unlink()
    assert "does not load" in line(train_classifier.load_pretrained, f, vit)


@pytest.fixture
def folder(tmp_path):
    """A shared directory with two kinds of images, dark or bright at the left, SD outliers and a clustering network."""
    folder, rng = tmp_path / "run", np.random.default_rng(0)
    folder.mkdir()
    y = np.arange(48) % 2
    for name, labels in {"train": y, "test": y[:24], "sd_outliers": 1 - y}.items():
        images = rng.integers(0, 120, (len(labels), 8, 8, 3), dtype=np.uint8)
        images[labels == 1, :, :4] += 120
        np.save(folder / f"{name}.npy", images)
        if "sd" not in name:
            np.save(folder / f"{name}.labels.npy", labels)
    np.save(folder / "pseudo_labels.npy", y)
    np.save(folder / "outliers.npy", rng.integers(0, 256, (30, 8, 8, 3), dtype=np.uint8))
    np.save(folder / "far.npy", rng.integers(0, 120, (40, 8, 8, 3), dtype=np.uint8))
    rows = [f"{i},{i},{y[i]},{1 - y[i]},0" for i in range(48)]
    (folder / "sd_outliers.csv").write_text("\n".join(["index,source,y,c_r,seed", *rows]) + "\n")
    torch.manual_seed(1)
    nets = {name: train_scan_diffusion.build_backbone("small")[0].state_dict() for name in ("backbone", "pretext")}
    torch.save(nets | {"head": {}, "config": {"arch": "small"}, "digest": None}, folder / "scan.pt")
    return folder


def test_a_transformer_is_trained_saved_and_judged_without_its_folder(folder, vit, main, capsys):
    options = ["--recipe", "digits", "--epochs", 12, "--sd-batch", 16, "--optimizer", "adamw", "--sd-lr", 1e-2]
    options += ["--warmup", 0.1, "--shift", 0, "--degrees", 0, "--zoom", 1.0, "--freeze-blocks", 1]
    main("train_classifier", "--dir", folder, "--method", "sd", "--sd-arch", vit, *options)
    main("train_classifier", "--dir", folder, "--method", "frozen", "--frozen-arch", vit, "--recipe", "digits")
    shutil.rmtree(vit.removeprefix("vit:"))
    main("evaluate", "--dir", folder, "--ood-data", folder / "far.npy", "--bootstrap", 5, "--recipe", "digits")
    records = {(r["method"], r["score"]): r for r in json.loads((folder / "results.json").read_text())}
    assert records["sd", "distance+voting"]["id_accuracy"] > 0.9
    assert {score for method, score in records if method == "frozen"} == {"knn", "mahalanobis", "relative-mahalanobis"}
    assert records["frozen", "knn"]["id_accuracy"] is None
    content = torch.load(folder / "classifier_sd.pt", weights_only=True)
    assert content["config"]["arch"] == vit and content["config"]["plan"]["config"]["hidden_size"] == 32


@pytest.mark.parametrize(("arch", "part"), [("pretext", "pretext"), ("scan", "backbone")])
def test_frozen_features_are_those_of_the_clustering_network(folder, main, arch, part):
    main("train_classifier", "--dir", folder, "--method", "frozen", "--frozen-arch", arch, "--recipe", "digits")
    main("evaluate", "--dir", folder, "--ood-data", folder / "far.npy", "--bootstrap", 5, "--recipe", "digits")
    net, _ = train_scan_diffusion.build_backbone("small")
    net.load_state_dict(torch.load(folder / "scan.pt", weights_only=True)[part])
    with torch.no_grad():
        train, far = (
            net.eval()(torch.from_numpy(np.load(folder / f"{name}.npy")).permute(0, 3, 1, 2) / 127.5 - 1).double()
            for name in ("train", "far")
        )
    load = lambda score: np.load(next((folder / "scores").glob(f"frozen.{score}.*far.npy.npy")))  # noqa: E731
    brute = torch.cdist(F.normalize(far), F.normalize(train)).sort(1).values[:, 9]
    np.testing.assert_allclose(load("knn"), brute.numpy(), atol=1e-4)
    y = np.load(folder / "train.labels.npy")
    found = evaluate.mahalanobis(far, evaluate.fit_gaussians(train, y)[0])
    np.testing.assert_allclose(load("mahalanobis"), found.numpy(), rtol=2e-2)


@pytest.mark.parametrize("damage", ["missing", "other data", "no pretext", "text"])
def test_a_clustering_network_that_does_not_fit_is_one_line(folder, main, capsys, damage):
    path = folder / "scan.pt"
    content = torch.load(path, weights_only=True)
    if damage == "missing":
        path.unlink()
    elif damage == "text":
        path.write_text("no network")
    else:
        del content["pretext"]
        torch.save(content if damage == "no pretext" else content | {"digest": "other"}, path)
    with pytest.raises(SystemExit):
        main("train_classifier", "--dir", folder, "--method", "frozen", "ce", "--recipe", "digits")
    (line,) = capsys.readouterr().err.splitlines()
    assert "scan.pt" in line and "run train_scan_diffusion.py" in line and not [*folder.glob("classifier*")]


def test_dream_starts_from_the_classifier(folder, main, capsys):
    quick = ["--dir", folder, "--recipe", "digits", "--epochs", 2]
    main("train_classifier", *quick, "--method", "dream", "ce", "--init", "ce", "--dream-lr", 1e-9, "--dream-epochs", 1)
    ce, dream = (torch.load(folder / f"classifier_{name}.pt", weights_only=True)["model"] for name in ("ce", "dream"))
    assert torch.allclose(dream["heads.g_in.weight"], ce["heads.g_in.weight"], atol=1e-6)
    assert set(dream) - set(ce) == {"phi.weight", "phi.bias"}
    before = (folder / "classifier_dream.pt").read_bytes()
    for change in (["--labels", "pseudo"], ["--arch", "resnet18"]):
        with pytest.raises(SystemExit):
            main("train_classifier", *quick, "--method", "dream", "--init", "ce", *change)
        line = [text for text in capsys.readouterr().err.splitlines() if text.startswith("train_classifier.py:")]
        assert len(line) == 1 and "classifier_ce.pt" in line[0]
    assert before == (folder / "classifier_dream.pt").read_bytes()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_learning_rate_rises_then_falls_as_a_cosine(monkeypatch, tmp_path, optimizer):
    seen, kind = [], {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    step = kind.step
    monkeypatch.setattr(kind, "step", lambda self, *a, **k: (seen.append(self.param_groups[0]["lr"]), step(self))[1])
    images, labels = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8), torch.arange(40) % 2
    args = options(
        dir=tmp_path, epochs=10, batch_size=4, lr=0.01, warmup=0.2, optimizer=optimizer
    )  # 100 steps, 20 of them rising
    train_classifier.train("ce", images, labels, None, None, 2, args)
    rise = 0.01 * (1 / 21 + np.arange(20) / 20 * (20 / 21))
    fall = 1e-6 + (0.01 - 1e-6) * (1 + np.cos(np.pi * np.arange(80) / 80)) / 2
    np.testing.assert_allclose(seen, np.concatenate([rise, fall]), rtol=1e-6)


def test_inliers_come_in_batches_of_their_own(monkeypatch, tmp_path):
    sizes, augment = [], train_classifier.augment
    monkeypatch.setattr(train_classifier, "augment", lambda x, args: (sizes.append(len(x)), augment(x, args))[1])
    images, labels = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8), torch.arange(40) % 2
    args = options(dir=tmp_path, epochs=1, batch_size=8, inlier_batch=20)
    train_classifier.train("dream-id", images, labels, images, labels, 2, args)
    assert sizes == [28] * 5


def test_mahalanobis_equals_scikit_learn():
    rng = np.random.default_rng(0)
    mixing, y = rng.normal(size=(6, 6)), np.repeat([0, 2, 3], 40)
    train = rng.normal(size=(120, 6)) @ mixing + 3 * rng.normal(size=(4, 6))[y]
    far = 4 * rng.normal(size=(30, 6))
    near, background = (
        evaluate.mahalanobis(torch.tensor(far), fit).numpy() for fit in evaluate.fit_gaussians(torch.tensor(train), y)
    )
    means = {c: train[y == c].mean(0) for c in (0, 2, 3)}
    within = EmpiricalCovariance(assume_centered=True).fit(train - np.stack([means[c] for c in y]))
    np.testing.assert_allclose(near, np.min([within.mahalanobis(far - means[c]) for c in means], axis=0), rtol=1e-6)
    np.testing.assert_allclose(background, EmpiricalCovariance().fit(train).mahalanobis(far), rtol=1e-6)


def test_mahalanobis_leaves_out_directions_that_have_no_variance():
    rng = np.random.default_rng(1)
    train, far, y = rng.normal(size=(60, 4)), rng.normal(size=(9, 4)), np.arange(60) % 2
    plain, wider = (
        [evaluate.mahalanobis(wide(far), fit) for fit in evaluate.fit_gaussians(wide(train), y)]
        for wide in (torch.tensor, lambda x: torch.tensor(np.hstack([x, x[:, :2], np.full((len(x), 1), 7.0)])))
    )
    for a, b in zip(plain, wider, strict=True):  # columns twice, and a constant one
        assert torch.allclose(a, b, rtol=1e-6)
