"""Networks: stems, heads, and vision transformers of transformers, from folders."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4}
MODELS = ["ViT", "DeiT", "Dinov2"]


@pytest.fixture
def classifier(load):
    return load("train_classifier")


def pretrained(folder, name="ViT"):
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**SIZE, intermediate_size=64, image_size=16)
    model = transformers.AutoModel.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)  # far from the first values
    model.save_pretrained(folder)
    given = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    side = {"height": 16, "width": 16}
    if name == "Dinov2":
        transformers.BitImageProcessor(**given, size=20, crop_size=side).save_pretrained(folder)
    else:
        transformers.ViTImageProcessor(**given, size=side).save_pretrained(folder)
    return model


def loaded(classifier, arch, freeze_blocks=0):
    f = classifier.VisionTransformer(classifier.read_vit(arch)).eval()
    classifier.load_vit(f, arch, freeze_blocks)
    return f


@pytest.mark.parametrize("arch", ["small", "resnet18", "resnet50", "resnet18-imagenet"])
def test_backbones(classifier, arch):
    net = classifier.build_backbone(arch).eval()
    x = torch.zeros(2, 3, 32, 32)
    assert net(x).shape == (2, net.width) == (2, 2048 if arch == "resnet50" else 512)
    if arch != "small":  # a CIFAR stem keeps the resolution
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        assert net.layer1(x).shape[2] == (8 if "imagenet" in arch else 32)


@pytest.mark.parametrize("method", ["ce", "dream", "dream-id", "sd", "frozen"])
def test_detectors_have_the_heads_of_their_method_and_come_back_from_a_file(load, tmp_path, method):
    net = load("train_classifier").Detector(method, "small", 4, 7, None).eval()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    again = load("evaluate").Detector(method, "small", 4, 7, None).eval()
    again.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    x = torch.randn(2, 3, 8, 8)
    features, logits = again(x)
    assert torch.equal(features, net(x)[0]) and features.shape == (2, 512)
    sizes = {"sd": {"g_in": 4, "g_bin": 2, "g_out": 4}, "frozen": {}}.get(method, {"g_in": 4})
    assert {name: head.shape[1] for name, head in logits.items()} == sizes
    for name, head in logits.items():
        torch.testing.assert_close(head, F.linear(features, *net.heads[name].parameters()))
    assert hasattr(net, "phi") == (method == "dream")


@pytest.mark.parametrize("name", MODELS)
def test_feature_is_the_normed_cls_token_of_the_resized_image(classifier, tmp_path, name):
    model = pretrained(tmp_path, name)
    normed = []
    model.layernorm.register_forward_hook(lambda module, x, output: normed.append(output[:, 0]))
    x = torch.rand(2, 3, 8, 8)
    mean, std = torch.tensor([[0.4, 0.5, 0.6], [0.2, 0.3, 0.4]]).view(2, 3, 1, 1)
    model((F.interpolate(x, (16, 16), mode="bilinear") - mean) / std)
    f = loaded(classifier, f"vit:{tmp_path}")
    assert normed[0].shape == (2, f.width) and (normed[0][0] - normed[0][1]).abs().max() > 0.01
    torch.testing.assert_close(f(2 * x - 1), normed[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("blocks", [0, 2])
def test_first_blocks_are_frozen_and_the_rest_learns(classifier, tmp_path, name, blocks):
    pretrained(tmp_path, name)
    f = loaded(classifier, f"vit:{tmp_path}", blocks)
    f(torch.randn(2, 3, 8, 8)).square().sum().backward()
    for key, parameter in f.named_parameters():
        number = [int(part) for part in key.split(".") if part.isdigit()] or [blocks]
        learns = number[0] >= blocks and "pooler" not in key and "mask_token" not in key
        assert parameter.requires_grad == learns, key
        assert (parameter.grad is not None) == learns, key  # else DDP would wait for it


def test_what_does_not_load_is_one_line(classifier, tmp_path):
    with pytest.raises(SystemExit, match=f"vit:{tmp_path} gives no vision model"):
        loaded(classifier, f"vit:{tmp_path}")
    pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["embeddings.cls_token"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(SystemExit, match="lacks 1 weights, embeddings.cls_token is one"):
        loaded(classifier, f"vit:{tmp_path}")
    path.write_bytes(b"not safetensors")
    with pytest.raises(SystemExit, match="does not load"):
        loaded(classifier, f"vit:{tmp_path}")


def test_a_transformer_is_trained_and_judged_without_its_folder(tmp_path, main):
    pretrained(tmp_path / "vit")
    arch = f"vit:{tmp_path / 'vit'}"
    rng = np.random.default_rng(0)
    y = np.arange(48) % 2
    for name, labels in {"train": y, "test": y[:24], "sd_outliers": 1 - y, "far": 0 * y}.items():
        images = rng.integers(0, 120, (len(labels), 8, 8, 3), dtype=np.uint8)
        images[labels == 1, :, :4] += 120  # bright at the left
        np.save(tmp_path / f"{name}.npy", images)
        np.save(tmp_path / f"{name}.labels.npy", labels)
    rows = "".join(f"{i},{i},{y[i]},{1 - y[i]},0\n" for i in range(48))
    (tmp_path / "sd_outliers.csv").write_text(f"index,source,y,c_r,seed\n{rows}")
    options = ["--sd-epochs", 8, "--sd-batch-size", 16, "--shift", 0, "--degrees", 0, "--area", 1.0]
    options += ["--sd-lr", 0.01, "--freeze-blocks", 1, "--sd-arch", arch, "--frozen-arch", arch]
    main("train_classifier", "--dir", tmp_path, "--method", "sd", "frozen", *options)
    shutil.rmtree(tmp_path / "vit")
    main("evaluate", "--dir", tmp_path, "--ood-data", tmp_path / "far.npy", "--bootstrap", 5)
    records = json.loads((tmp_path / "results.json").read_text())
    accuracy = {record["method"]: record["id_accuracy"] for record in records}
    assert accuracy["sd"] > 0.9 and accuracy["frozen"] is None
