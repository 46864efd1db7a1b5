"""SimCLR's and SCAN's batched random views against torchvision and Pillow, image by image on the same draws."""

import math

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from train_scan_diffusion import DRAWS, OPERATIONS, simclr_view, strong_view, turn_hue, view

NUMBER = {name: i for i, name in enumerate([*OPERATIONS, "identity", "rotate", "shear x", "shear y", "x", "y"])}
SIDE = 32


def pictures(count=24, side=SIDE):
    """Levels n / 255 (count, 3, side, side): blobs and noise, a grey image, a black one and a white one."""
    torch.manual_seed(0)
    x = torch.nn.functional.interpolate(torch.rand(count, 3, 4, 4), side, mode="bicubic")
    x = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
    x[0], x[1], x[2] = x[0, :1], 0, 1
    return (x * 255).round() / 255


def pixel_share(a, b, tolerance=1e-3):
    """Share of pixels that differ by more than the tolerance."""
    return ((a - b).abs().amax(-3) > tolerance).float().mean().item()


def calm(count):
    """Draws of strong_view that change nothing but the cutout, which hides the first eight rows and columns."""
    u = torch.full((count, DRAWS), 0.5)
    u[:, 0], u[:, 3:5] = 0.9, 0.0
    u[:, 5:9] = (NUMBER["identity"] + 0.5) / 14
    return u


def draw(u, slot, name, m):
    u[:, 5 + slot], u[:, 9 + slot] = (NUMBER[name] + 0.5) / 14, m


def seen(x):
    return x[..., 8:, 8:]


ONE_BY_ONE = {
    "autocontrast": lambda x, m: tv.autocontrast(x),
    "equalize": lambda x, m: tv.equalize(x),
    "solarize": lambda x, m: tv.solarize(x, m),
    "posterize": lambda x, m: tv.posterize(x, int(4 + 4 * m)),
    "color": lambda x, m: tv.adjust_saturation(x, 0.05 + 0.9 * m),
    "contrast": lambda x, m: tv.adjust_contrast(x, 0.05 + 0.9 * m),
    "brightness": lambda x, m: tv.adjust_brightness(x, 0.05 + 0.9 * m),
    "sharpness": lambda x, m: tv.adjust_sharpness(x, 0.05 + 0.9 * m),
    "identity": lambda x, m: x,
    "rotate": lambda x, m: tv.rotate(x, 30 * (2 * m - 1)),
    "shear x": lambda x, m: tv.affine(x, 0, [0, 0], 1, [math.degrees(math.atan(0.1 * (2 * m - 1))), 0]),
    "shear y": lambda x, m: tv.affine(x, 0, [0, 0], 1, [0, math.degrees(math.atan(0.1 * (2 * m - 1)))]),
    "x": lambda x, m: tv.affine(x, 0, [-0.1 * (2 * m - 1) * SIDE, 0], 1, [0, 0]),
    "y": lambda x, m: tv.affine(x, 0, [0, -0.1 * (2 * m - 1) * SIDE], 1, [0, 0]),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_equals_torchvision_on_every_image_alone(name):
    x, m = pictures(), torch.rand(24, generator=torch.Generator().manual_seed(1))
    expected = torch.stack([ONE_BY_ONE[name](image, float(k)) for image, k in zip(x, m, strict=True)])
    assert torch.allclose(OPERATIONS[name](x, m.view(-1, 1, 1, 1)), expected, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["autocontrast", "equalize", "solarize", "color", "contrast", "brightness", "sharpness"]
)
def test_operation_equals_pillow_within_two_levels(name):
    x, m = pictures(), torch.rand(24, generator=torch.Generator().manual_seed(1))
    at = 255 if name == "solarize" else 1  # the threshold is a level there
    made = [ONE_BY_ONE[name](tv.to_pil_image(image), at * float(k)) for image, k in zip(x, m, strict=True)]
    expected = torch.stack([tv.to_dtype(tv.to_image(image), scale=True) for image in made])
    assert torch.allclose(OPERATIONS[name](x, m.view(-1, 1, 1, 1)), expected, atol=2.01 / 255)


def test_hue_equals_torchvision():
    x, turn = pictures(), torch.rand(24, generator=torch.Generator().manual_seed(1)) - 0.5
    x[3, :, 0, :3] = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1.0]])  # two highest channels
    expected = torch.stack([tv.adjust_hue(image, float(k)) for image, k in zip(x, turn, strict=True)])
    assert torch.allclose(turn_hue(x, turn.view(-1, 1, 1, 1)), expected, atol=1e-5)
    assert torch.allclose(turn_hue(x, torch.zeros(24, 1, 1, 1)), x, atol=1e-5)


@pytest.mark.parametrize("name", ["rotate", "shear x", "shear y", "x", "y", *OPERATIONS])
def test_strong_view_draws_the_operation(name):
    x, u = pictures(), calm(24)
    draw(u, 2, name, m := torch.rand(24, generator=torch.Generator().manual_seed(1)))
    expected = torch.stack([ONE_BY_ONE[name](image, float(k)) for image, k in zip(x, m, strict=True)])
    assert pixel_share(seen(strong_view(x, u)), seen(expected)) < 0.002  # nearest pixel: ties may go either way
    assert pixel_share(seen(x), seen(expected)) > 0.05


def test_geometric_operations_follow_each_other_in_the_order_drawn():
    """On a ramp a value is a place: turning by 30 degrees, then shifting, is not shifting, then turning."""
    ramp = torch.arange(1.0, SIDE + 1) / SIDE  # 0 is the fill
    x = torch.stack([ramp.expand(SIDE, SIDE), ramp[:, None].expand(SIDE, SIDE), ramp.expand(SIDE, SIDE)])[None]
    bilinear = {"interpolation": v2.InterpolationMode.BILINEAR}
    for angle, shift in ((1.0, 0.0), (0.0, 1.0)):
        u = calm(1)
        draw(u, 1, "rotate", angle)
        draw(u, 3, "x", shift)
        moved = [-0.1 * (2 * shift - 1) * SIDE, 0], 1, [0, 0]
        right = tv.affine(tv.rotate(x, 30 * (2 * angle - 1), **bilinear), 0, *moved, **bilinear)
        wrong = tv.rotate(tv.affine(x, 0, *moved, **bilinear), 30 * (2 * angle - 1), **bilinear)
        middle = slice(10, 22)
        made = strong_view(x, u)[..., middle, middle]
        error = [(made - other[..., middle, middle]).abs().max() * SIDE for other in (right, wrong)]  # px
        assert error[0] <= 0.75 < 1.2 < error[1]


def test_flip_and_crop_of_the_padded_image():
    x, u = pictures(), calm(24)
    g = torch.Generator().manual_seed(1)
    u[:, 0], (top, left) = torch.rand(24, generator=g), torch.randint(9, (2, 24), generator=g)
    u[:, 1], u[:, 2] = (left + 0.5) / 9, (top + 0.5) / 9
    turned = [tv.horizontal_flip(image) if f < 0.5 else image for image, f in zip(x, u[:, 0], strict=True)]
    signed = [8 - int(j) if f < 0.5 else int(j) for j, f in zip(left, u[:, 0], strict=True)]
    cut = [tv.crop(tv.pad(a, [4]), int(i), j, SIDE, SIDE) for a, i, j in zip(turned, top, signed, strict=True)]
    assert torch.allclose(seen(strong_view(x, u)), seen(torch.stack(cut)), atol=1e-6)


def test_colour_operations_follow_each_other_in_the_order_drawn():
    x, g = pictures(200), torch.Generator().manual_seed(1)
    u, names = calm(200), list(OPERATIONS)
    drawn, m = torch.randint(len(names), (200, 4), generator=g), torch.rand(200, 4, generator=g)
    u[:, 5:9], u[:, 9:] = (drawn + 0.5) / 14, m
    expected = []
    for image, kinds, sizes in zip(x, drawn.tolist(), m.tolist(), strict=True):
        for kind, size in zip(kinds, sizes, strict=True):
            image = ONE_BY_ONE[names[kind]](image, size)
        expected.append(image)
    assert pixel_share(seen(strong_view(x, u)), seen(torch.stack(expected))) < 0.002  # thresholds meet rounding


def test_cutout_is_a_grey_square_of_half_the_side_around_every_pixel():
    u = calm(SIDE**2)
    at = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))
    u[:, 3:5] = (at + 0.5) / SIDE
    made = strong_view(torch.ones(SIDE**2, 3, SIDE, SIDE), u)
    for (row, column), image in zip(at.tolist(), made, strict=True):
        expected = torch.ones(3, SIDE, SIDE)
        expected[:, max(0, row - 8) : row + 8, max(0, column - 8) : column + 8] = 0.5
        assert torch.equal(image, expected)


def crop_draws(boxes):
    """Draws of simclr_view for crops top, left, height, width in pixels, without any colour operation."""
    u = torch.full((len(boxes), DRAWS), 0.9)
    for row, (top, left, h, w) in zip(u, boxes, strict=True):
        area = h * w / SIDE**2
        most = min(math.log(4 / 3), -math.log(area)) or 1
        row[0], row[1] = (area - 0.2) / 0.8, (math.log(w / h) / most + 1) / 2
        row[2], row[3] = left / max(1, SIDE - w), top / max(1, SIDE - h)
    return u


def test_random_resized_crop_equals_torchvision():
    boxes = [(0, 0, 32, 32), (0, 0, 16, 16), (3, 7, 24, 18), (16, 8, 16, 20), (5, 0, 26, 32), (0, 9, 28, 21)]
    x, u = pictures(len(boxes)), crop_draws(boxes)
    expected = torch.stack([tv.resized_crop(a, *box, [SIDE, SIDE]) for a, box in zip(x, boxes, strict=True)])
    made = simclr_view(x, u)
    inner = slice(2, -2)  # at the edges of the crop the pixels beside it count here, their mirror there
    assert torch.allclose(made[0], x[0], atol=1e-5)
    assert torch.allclose(made[..., inner, inner], expected[..., inner, inner], atol=1e-4)
    u[:, 4] = 0.1
    assert torch.allclose(simclr_view(x, u), made.flip(3), atol=1e-5)


def test_crops_have_the_area_and_ratio_of_random_resized_crop():
    """The ramp's slope along x and y gives the box; every box lies inside and obeys torchvision's bounds."""
    ramp = (torch.arange(SIDE) + 0.5) / SIDE
    x = torch.stack([ramp.expand(SIDE, SIDE), ramp[:, None].expand(SIDE, SIDE), torch.zeros(SIDE, SIDE)])
    u = torch.rand(4000, DRAWS, generator=torch.Generator().manual_seed(1))
    u[:, 5], u[:, 10] = 0.9, 0.9
    made = simclr_view(x.expand(4000, -1, -1, -1), u)
    w, h = ((made[:, 0, 16, 20] - made[:, 0, 16, 12]).abs() * 4, (made[:, 1, 20, 16] - made[:, 1, 12, 16]) * 4)
    x0, y0 = made[:, 0, 16, 15:17].mean(1), made[:, 1, 15:17, 16].mean(1)  # centre
    for centre, length in ((x0, w), (y0, h)):
        assert (centre - length / 2 > -1e-4).all() and (centre + length / 2 < 1 + 1e-4).all() and length.max() <= 1.0001
    assert (w * h).min() == pytest.approx(0.2, abs=0.005) and (w * h).max() == pytest.approx(1, abs=0.005)
    assert (w * h).mean() == pytest.approx(0.6, abs=0.015)
    ratio = (w / h)[w * h < 0.75].log() / math.log(4 / 3)
    assert ratio.abs().max() == pytest.approx(1, abs=0.01) and ratio.mean().abs() < 0.04
    assert (x0[w < 0.7] - 0.5).std() > 0.1 and (
        (made[:, 0, 16, 20] < made[:, 0, 16, 12]).float().mean() - 0.5
    ).abs() < 0.03


def test_colour_jitter_and_grayscale_equal_torchvision():
    x, u = pictures(), crop_draws([(0, 0, 32, 32)] * 24)
    u[:, 5:11] = torch.rand(24, 6, generator=torch.Generator().manual_seed(1))
    assert 0 < (u[:, 5] < 0.8).sum() < 24 and 0 < (u[:, 10] < 0.2).sum() < 24
    expected = []
    for image, (jitter, b, c, s, turn, drop) in zip(x, u[:, 5:11].tolist(), strict=True):
        if jitter < 0.8:
            image = tv.adjust_brightness(image, 0.6 + 0.8 * b)
            image = tv.adjust_contrast(image, 0.6 + 0.8 * c)
            image = tv.adjust_saturation(image, 0.6 + 0.8 * s)
            image = tv.adjust_hue(image, 0.2 * turn - 0.1)
        expected.append(tv.rgb_to_grayscale(image, 3) if drop < 0.2 else image)
    assert torch.allclose(simclr_view(x, u), torch.stack(expected), atol=1e-4)


@pytest.mark.parametrize("change", [simclr_view, strong_view])
@pytest.mark.parametrize("side", [8, 32, 48])
def test_a_view_depends_on_its_own_draws_and_image_alone(change, side):
    x, u = pictures(300, side), torch.rand(300, DRAWS, generator=torch.Generator().manual_seed(1))
    before, made = x.clone(), change(x, u)
    assert torch.equal(x, before) and torch.equal(change(x, u), made)
    assert made.shape == x.shape and made.dtype == torch.float32 and made.min() >= 0 and made.max() <= 1
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    assert pixel_share(change(x[order], u[order]), made[order], 1e-5) < 1e-4
    alone = torch.cat([change(a, b) for a, b in zip(x[:40].split(1), u[:40].split(1), strict=True)])
    assert pixel_share(alone, made[:40], 1e-5) < 1e-4
    others = u.clone()
    others[0] = torch.rand(DRAWS, generator=torch.Generator().manual_seed(3))
    assert pixel_share(change(x, others)[1:], made[1:], 1e-5) < 1e-4
    assert not torch.allclose(change(x, others)[:1], made[:1], atol=1e-3)


@pytest.mark.parametrize("strong", [False, True])
def test_every_image_of_a_batch_has_draws_of_its_own(strong):
    """Also across the parts into which view() splits a batch on a CPU."""
    images = (pictures(24)[5:6] * 255).to(torch.uint8).expand(300, -1, -1, -1)
    torch.manual_seed(0)
    made = view(images, "colour", strong)
    torch.manual_seed(0)
    assert torch.equal(view(images, "colour", strong), made)
    assert made.shape == images.shape and made.min() >= -1 and made.max() <= 1
    assert torch.pdist(made.flatten(1)).min() > 0.1
