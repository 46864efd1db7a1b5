"""Random views of images: exact shifts, boxes and turns read from ramps, colours of torchvision."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as tv

PICTURES = (torch.arange(40 * 32 * 32 * 3) ** 2 % 257 % 256).byte().view(40, 32, 32, 3)
PICTURES[20:] = PICTURES[20:, ..., :1]  # half of them grey
PLAIN = PICTURES.permute(0, 3, 1, 2) / 127.5 - 1


@pytest.fixture
def scan(load):
    torch.manual_seed(0)
    return load("train_scan_diffusion")


def options(crop=0, area=1.0, shift=0, degrees=0, flip=0, operations=3):
    return SimpleNamespace(**locals())


def slopes(scan, args):
    """The place (column, row) that 2,000 views show in the middle; its change right, down; px."""
    level = torch.arange(0, 256, 8, dtype=torch.uint8).expand(32, 32)
    ramps = torch.stack([level, level.T, level], 2).expand(2000, -1, -1, -1)
    at = ((scan.random_view(ramps, args) + 1) * 127.5 / 8 + 0.5)[:, :2]
    right = (at[..., 16, 20] - at[..., 16, 12]) / 8
    down = (at[..., 20, 16] - at[..., 12, 16]) / 8
    return at[..., 15:17, 15:17].mean((2, 3)), right, down


@pytest.mark.parametrize(("shift", "flip"), [(0, 0), (1, 1), (4, 0)])
def test_whole_images_are_mirrored_and_moved_by_all_shifts_alike(scan, shift, flip):
    images = PICTURES[:1, :8, :8].expand(2000, -1, -1, -1)
    views = scan.random_view(images, options(shift=shift, flip=flip))
    crops = F.unfold(F.pad(PLAIN[:1, :, :8, :8], (shift,) * 4, value=-1), 8).mT.reshape(-1, 3, 8, 8)
    known = torch.cat([crops, crops.flip(3)]).flatten(1)
    error, place = torch.cdist(views.flatten(1), known, p=torch.inf).min(1)
    assert error.max() < 1e-5 and place.unique().numel() == len(crops) * (1 + flip)
    assert 900 * flip <= (place >= len(crops)).sum() <= 1100 * flip
    side = 2 * shift + 1
    for moved in (place % side, place // side % side):  # uniform, as of RandomCrop
        assert (moved.bincount() - 2000 / side).abs().max() < 5 * (2000 / side) ** 0.5


@pytest.mark.parametrize(("area", "shift"), [(0.2, 0), (0.7, 1)])
def test_boxes_have_the_area_and_ratio_of_random_resized_crop(scan, area, shift):
    centre, right, down = slopes(scan, options(area=area, shift=shift, flip=1))
    box = torch.stack([right[:, 0].abs(), down[:, 1]], 1)  # width, height
    assert (centre - 16 * box).amin(0).tolist() == pytest.approx([-shift] * 2, abs=0.05)
    assert (centre + 16 * box).amax(0).tolist() == pytest.approx([32 + shift] * 2, abs=0.05)
    found = [*box.prod(1).aminmax(), *(box[:, 0] / box[:, 1]).aminmax(), box.prod(1).mean()]
    assert found == pytest.approx([area, 1, 3 / 4, 4 / 3, (1 + area) / 2], abs=0.015)


def test_a_box_equals_resized_crop(scan, monkeypatch):
    u = torch.tensor([[(24 * 18 / 32**2 - 0.2) / 0.8, -1, 0, 0, 6 / 14, -4 / 8, 0, 0]]).T
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: (u + 1) / 2)
    view = scan.random_view(PICTURES[:1], options(area=0.2))
    expected = tv.resized_crop(PLAIN[:1], 2, 10, 24, 18, [32, 32])  # but for its edges
    torch.testing.assert_close(view[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2])


def test_boxes_are_turned_as_they_are_by_bounded_angles(scan):
    _, right, down = slopes(scan, options(area=0.5, degrees=20))
    angle = torch.atan2(right[:, 1], right[:, 0])
    torch.testing.assert_close(angle, torch.atan2(-down[:, 0], down[:, 1]), atol=1e-4, rtol=0)
    assert angle.rad2deg().max() == pytest.approx(20, abs=0.1) == -angle.rad2deg().min()


@pytest.mark.parametrize(("view", "group"), [("random", 1), ("simclr", 1), ("strong", 8)])
def test_views_are_in_range_of_the_side_asked_for_and_differ(scan, view, group):
    images = PICTURES[:1].expand(80, -1, -1, -1)
    views = getattr(scan, f"{view}_view")(images, options(24, 0.3, 1, 10, 1))
    assert views.shape == (80, 3, 24, 24)
    assert -1.001 < views.min() < -0.5 < 0.5 < views.max() < 1.001
    groups = views.view(80 // group, group, -1)
    assert (groups == groups[:, :1]).all() and torch.pdist(groups[:, 0]).min() > 0.1
    torch.testing.assert_close(scan.plain_view(PICTURES, options(24)), PLAIN[:, :, 4:28, 4:28])


def test_simclrs_colours_equal_torchvision_but_for_the_hue(scan, monkeypatch):
    u = torch.rand(8, 40)
    monkeypatch.setattr(torch, "rand", lambda n, *shape, **_: u[:n].view(n, *shape))
    axis = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5  # of grey
    views = scan.simclr_view(PICTURES, options())
    for view, x, draws in zip(views, PLAIN / 2 + 0.5, u.T.tolist(), strict=True):
        if draws[4] < 0.8:
            x = tv.adjust_brightness(x, 0.6 + 0.8 * draws[0])
            x = tv.adjust_contrast(x, 0.6 + 0.8 * draws[1])
            x = tv.adjust_saturation(x, 0.6 + 0.8 * draws[2])
            turn = (0.4 * draws[3] - 0.2) * torch.pi * axis
            x = torch.einsum("ij,jhw->ihw", torch.matrix_exp(turn), x)
        x = tv.rgb_to_grayscale(x, 3) if draws[5] < 0.2 else x
        torch.testing.assert_close(view, 2 * x.clamp(0, 1) - 1, atol=1e-4, rtol=0)
    assert torch.equal(scan.strong_view(PICTURES, options(operations=0)), views)


def test_strong_view_hides_a_grey_square_per_eight_images(scan, monkeypatch):
    monkeypatch.setattr(scan.v2, "RandAugment", {3: scan.v2.Identity()}.__getitem__)
    white = torch.full((80, 32, 32, 3), 255, dtype=torch.uint8)
    views = scan.strong_view(white, options()).view(10, 8, 3, 32, 32)
    hidden = views[:, 0, 0] == 0
    assert (views == torch.where(hidden, 0, 1)[:, None, None]).all()
    side = hidden.any(1).sum(1)
    assert (side == hidden.any(2).sum(1)).all() and (side**2 == hidden.sum((1, 2))).all()
    assert 10 < side.max() <= 16 and hidden.flatten(1).unique(dim=0).shape[0] > 5
