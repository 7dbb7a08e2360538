"""The two-view augmentation against torchvision's rules, written out here for one image in NumPy and colorsys."""

import colorsys
import itertools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from matrix_llm.ssl.augment import Augment, AugmentConfig, EvalTransform, TwoViewCollator, draw
from matrix_llm.ssl.images.draws import AREA, ATTEMPTS, COLUMNS, DRAWS, RATIO

NOTHING = {
    "flip_prob": 0.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "gray_prob": 0.0,
    "blur_prob": 0.0, "blur_prob2": 0.0, "solarize_prob2": 0.0,
}  # fmt: skip
ALWAYS = {"jitter_prob": 1.0, "solarize_prob": 0.5, "solarize_prob2": 0.5, "blur_prob": 0.7, "blur_prob2": 0.7}
UNIT = {"image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}


# ------------------------------------------------------------------------------------------------- the reference, for
# one image


def grey(x):  # (C, S, S)
    return x[0] if len(x) == 1 else 0.2989 * x[0] + 0.587 * x[1] + 0.114 * x[2]


def blend(x, other, factor):
    return np.clip(factor * x + (1 - factor) * other, 0, 1)


def turn_hue(x, shift):
    out = np.empty_like(x)
    for i, j in np.ndindex(x.shape[1:]):
        h, s, v = colorsys.rgb_to_hsv(*x[:, i, j])
        out[:, i, j] = colorsys.hsv_to_rgb((h + shift) % 1.0, s, v)
    return out


def gaussian_blur(x, sigma):
    size = x.shape[1]
    width = max(3, size // 10 // 2 * 2 + 1)
    offsets = np.linspace(-(width - 1) / 2, (width - 1) / 2, width)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = np.outer(kernel, kernel) / kernel.sum() ** 2
    half = width // 2
    padded = np.pad(x, ((0, 0), (half, half), (half, half)), mode="reflect")
    out = np.zeros_like(x)
    for i, j in itertools.product(range(width), repeat=2):
        out += kernel[i, j] * padded[:, i : i + size, j : j + size]
    return out


def rotated(x, degrees):
    """Pixel (i, j) comes from the place that a counter-clockwise turn carries to it; between four pixels by area,
    black outside.
    """
    size, angle = x.shape[1], math.radians(degrees)
    out, middle = np.zeros_like(x), (x.shape[1] - 1) / 2
    for i, j in np.ndindex(size, size):
        right, up = j - middle, middle - i
        from_j = middle + right * math.cos(angle) + up * math.sin(angle)
        from_i = middle - (-right * math.sin(angle) + up * math.cos(angle))
        for y, z in itertools.product(
            (math.floor(from_i), math.floor(from_i) + 1), (math.floor(from_j), math.floor(from_j) + 1)
        ):
            if 0 <= y < size and 0 <= z < size:
                out[:, i, j] += x[:, y, z] * (1 - abs(from_i - y)) * (1 - abs(from_j - z))
    return out


def reference(crop, u, config, view):  # (C, S, S) uint8, (K,)
    u = {name: float(u[column]) for name, column in COLUMNS.items()}
    x = crop.numpy().astype(np.float64) / 255
    if config.rotate_degrees:
        x = rotated(x, (2 * u["rotate"] - 1) * config.rotate_degrees)
    if u["flip"] < config.flip_prob:
        x = x[:, :, ::-1].copy()
    if u["jitter"] < config.jitter_prob:
        for operation in list(itertools.permutations(range(4)))[math.floor(24 * u["order"])]:
            name = ("brightness", "contrast", "saturation", "hue")[operation]
            strength = getattr(config, name)
            low, high = max(0, 1 - strength), 1 + strength
            factor = low + u[name] * (high - low)
            if name == "brightness":
                x = blend(x, 0, factor)
            elif name == "contrast":
                x = blend(x, grey(x).mean(), factor)
            elif name == "saturation" and len(x) == 3:
                x = blend(x, grey(x), factor)
            elif name == "hue" and len(x) == 3:
                x = turn_hue(x, (2 * u["hue"] - 1) * strength)
    if len(x) == 3 and u["gray"] < config.gray_prob:
        x = np.stack([grey(x)] * 3)
    if u["blur"] < (config.blur_prob, config.blur_prob2)[view]:
        x = gaussian_blur(x, config.blur_sigma_min + u["sigma"] * (config.blur_sigma_max - config.blur_sigma_min))
    if u["solarize"] < (config.solarize_prob, config.solarize_prob2)[view]:
        x = np.where(x < 0.5, x, 1 - x)
    mean, std = (np.array(v)[:, None, None] for v in (config.image_mean, config.image_std))
    return torch.from_numpy((x - mean) / std).float()


def crops(config, batch, seed=0):
    shape = (2, batch, config.channels, config.image_size, config.image_size)
    noise = np.random.default_rng(seed).integers(0, 256, shape)
    noise[:, 0] = 255 * (noise[:, 0] > 127)  # black, white and pure colours
    noise[:, -1] = noise[:, -1, :1]  # no colour: the hue is undefined
    return torch.from_numpy(noise.astype(np.uint8))


def uniforms(batch, seed=0, epoch=0):
    return torch.stack([draw(seed, epoch, range(batch), view) for view in (0, 1)])


OPERATIONS = {
    "nothing": {},
    "flip": {"flip_prob": 0.5},
    "brightness": {"brightness": 0.4, "jitter_prob": 0.8},
    "brightness above one": {"brightness": 1.5},
    "contrast": {"contrast": 0.4},
    "saturation": {"saturation": 0.9},
    "hue": {"hue": 0.5, "jitter_prob": 0.8},
    "jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "jitter_prob": 0.8},
    "grey": {"gray_prob": 0.5},
    "blur": {"blur_prob": 1.0, "blur_prob2": 0.3},
    "solarize": {"solarize_prob": 0.0, "solarize_prob2": 0.6},
    "rotation": {"rotate_degrees": 50.0},
}


@pytest.mark.parametrize("size", [4, 13, 45])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("operation", [*OPERATIONS, "all, as for ImageNet"])
def test_batched_augmentation_equals_one_image_at_a_time(operation, channels, size):
    settings = {"rotate_degrees": 10.0} if operation not in OPERATIONS else {**NOTHING, **OPERATIONS[operation]}
    config = AugmentConfig(image_size=size, channels=channels, **settings)
    batch = 9
    images, draws = crops(config, batch), uniforms(batch, seed=size)
    views = Augment(config)(images, draws)
    for view, row in itertools.product((0, 1), range(batch)):
        expected = reference(images[view, row], draws[view, row], config, view)
        torch.testing.assert_close(
            views[view][row], expected, atol=5e-5, rtol=0, msg=lambda text, at=(view, row): f"view, row {at}: {text}"
        )


def test_every_operation_changes_the_images_it_draws_and_no_others():
    probabilities = {
        "flip": "flip_prob",
        "brightness": "jitter_prob",
        "hue": "jitter_prob",
        "grey": "gray_prob",
        "solarize": "solarize_prob",
    }
    for operation, name in probabilities.items():
        config = AugmentConfig(image_size=11, **{**NOTHING, **OPERATIONS[operation], name: 0.5})
        images, draws = crops(config, 40), uniforms(40)
        column = COLUMNS[{"brightness": "jitter", "hue": "jitter", "grey": "gray"}.get(operation, operation)]
        view, _ = Augment(config)(images, draws)
        plain, _ = Augment(AugmentConfig(image_size=11, **NOTHING))(images, draws)
        changed = (view != plain).flatten(1).any(1)
        drawn = draws[0, :, column] < 0.5
        # hue and grey leave the last row, which has no colour, nearly or exactly alone
        assert torch.equal(changed[:-1], drawn[:-1]), operation
        assert 5 < drawn.sum() < 35


def test_an_image_is_augmented_alike_in_any_batch():
    config = AugmentConfig(image_size=17, **ALWAYS)
    images, draws = crops(config, 12), uniforms(12)
    whole = Augment(config)(images, draws)
    for rows in ([3], [11, 0, 5], list(range(12))[::-1]):
        part = Augment(config)(images[:, rows], draws[:, rows])
        for a, b in zip(part, whole, strict=True):
            torch.testing.assert_close(a, b[rows], atol=1e-6, rtol=0)


def test_crops_are_left_as_they_were_and_views_differ():
    config = AugmentConfig(image_size=9)
    images, draws = crops(config, 6), uniforms(6)
    images[1] = images[0]
    before = images.clone()
    view1, view2 = Augment(config)(images, draws)
    assert torch.equal(images, before)
    assert all(not torch.equal(a, b) for a, b in zip(view1, view2, strict=True))
    assert view1.dtype == view2.dtype == torch.float32


def test_autocast_changes_nothing():
    config = AugmentConfig(image_size=21, rotate_degrees=20.0)
    images, draws = crops(config, 5), uniforms(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = Augment(config)(images, draws)
    for a, b in zip(inside, Augment(config)(images, draws), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("channels", [1, 3])
def test_the_gpu_gives_the_views_of_the_cpu(channels):
    config = AugmentConfig(image_size=45, channels=channels, rotate_degrees=10.0, **ALWAYS)
    images, draws = crops(config, 16), uniforms(16)
    for there in (draws, draws.cuda()):
        for a, b in zip(Augment(config)(images.cuda(), there), Augment(config)(images, draws), strict=True):
            assert a.device.type == "cuda"
            torch.testing.assert_close(a.cpu(), b, atol=2e-3, rtol=0)


# ------------------------------------------------------------------------------------------------------------------
# the uniforms


def test_draws_depend_on_seed_epoch_index_and_view_alone():
    alone = draw(3, 7, [41], 1)
    assert torch.equal(draw(3, 7, [5, 41, 2], 1)[1:2], alone)
    assert torch.equal(draw(3, [9, 7], [5, 41], 1)[1:], alone)  # a batch that reaches into the next epoch
    torch.manual_seed(0)
    np.random.seed(0)
    assert torch.equal(draw(3, 7, torch.tensor([41]), 1), alone)
    others = [
        draw(4, 7, [41], 1),
        draw(3, 8, [41], 1),
        draw(3, 7, [42], 1),
        draw(3, 7, [41], 0),
        draw(7, 3, [41], 1),
        draw(41, 7, [3], 1),
    ]
    for other in others:
        assert not (other == alone).any()


def test_draws_are_pinned():
    """A change here changes what every run sees after a resume."""
    assert alike(draw(0, 0, [0], 0)[0, :3], PINNED[0])
    assert alike(draw(-1, 199, [1_281_166], 1)[0, -3:], PINNED[1])


def alike(values, expected):
    return (values.double() * 2**24).long().tolist() == expected


PINNED = ([2175092, 837519, 11246243], [790035, 12635691, 4845087])


def test_draws_are_uniform_and_uncorrelated():
    u = torch.cat([draw(0, epoch, range(500), view) for epoch in range(20) for view in (0, 1)]).double()  # (20000, K)
    assert 0 <= u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    assert (u.mean(0) - 0.5).abs().max() < 0.01
    counts = torch.stack([torch.histc(column, 20, 0, 1) for column in u.T])
    assert ((counts - 1000).square().sum(1) / 1000).max() < 50  # chi-square, 19 degrees: 50 is p = 1e-4
    correlation = torch.corrcoef(torch.cat([u[:-1].T, u[1:].T]))  # columns, and each with the next image's
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 0.04


# --- crops


def torchvision_box(width, height, u, config):
    """RandomResizedCrop.get_params, with the draws of one row."""
    area, log_ratio = width * height, (math.log(config.crop_ratio_min), math.log(config.crop_ratio_max))
    for attempt in range(ATTEMPTS):
        target = area * (
            config.crop_scale_min + float(u[AREA][attempt]) * (config.crop_scale_max - config.crop_scale_min)
        )
        ratio = math.exp(log_ratio[0] + float(u[RATIO][attempt]) * (log_ratio[1] - log_ratio[0]))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = (
                math.floor(float(u[COLUMNS["left"]]) * (width - w + 1)),
                math.floor(float(u[COLUMNS["top"]]) * (height - h + 1)),
            )
            return left, top, w, h, attempt
    in_ratio = width / height
    if in_ratio < config.crop_ratio_min:
        w = width
        h = round(w / config.crop_ratio_min)
    elif in_ratio > config.crop_ratio_max:
        h = height
        w = round(h * config.crop_ratio_max)
    else:
        w, h = width, height
    return (width - w) // 2, (height - h) // 2, w, h, None


@pytest.mark.parametrize("channels", [1, 3])
def test_crops_are_those_of_random_resized_crop(channels):
    config = AugmentConfig(image_size=10, channels=channels)
    rng = np.random.default_rng(0)
    sizes = [(8, 8), (50, 31), (7, 90), (300, 9), (3, 2), (40, 40)] * 8
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    mode = "L" if channels == 1 else "RGB"
    batch = TwoViewCollator(config, seed=5)([(2, i, image, None) for i, image in enumerate(images)])
    assert batch["crops"].shape == (2, len(images), channels, 10, 10)
    assert "labels" not in batch
    attempts = set()
    for view, (i, image) in itertools.product((0, 1), enumerate(images)):
        left, top, w, h, attempt = torchvision_box(*image.size, draw(5, 2, [i], view)[0], config)
        attempts.add(attempt)
        cut = Image.fromarray(np.asarray(image.convert(mode))[top : top + h, left : left + w])
        expected = np.asarray(cut.resize((10, 10), Image.Resampling.BICUBIC)).reshape(10, 10, channels)
        assert np.array_equal(batch["crops"][view, i].permute(1, 2, 0).numpy(), expected), (view, i)
    assert {None, 0, 1, 2} <= attempts  # the fallback and later attempts were met


def test_an_image_of_one_pixel_is_cropped():
    batch = TwoViewCollator(AugmentConfig(image_size=6), 0)(
        [(0, i, Image.new("RGB", size, "red"), None) for i, size in enumerate([(1, 1), (1, 999)])]
    )
    assert (batch["crops"][:, :, 0] == 255).all()
    assert (batch["crops"][:, :, 1:] == 0).all()


def test_a_batch_holds_labels_indices_and_what_was_skipped():
    images = [Image.new("L", (8, 8), 10 * i) for i in range(3)]
    items = [(0, 4, images[0], None), (0, 0, images[1], "bad.png cannot be read"), (1, 2, images[2], None)]
    batch = TwoViewCollator(AugmentConfig(image_size=8), 1, torch.tensor([9, 8, 7, 6, 5]))(items)
    assert batch["labels"].tolist() == [5, 9, 7]
    assert batch["indices"].tolist() == [4, 0, 2]
    assert batch["skipped"] == ["bad.png cannot be read"]
    assert torch.equal(batch["draws"][1, 2], draw(1, 1, [2], 1)[0])
    assert batch["draws"].shape == (2, 3, DRAWS)
    assert batch["crops"].shape == (2, 3, 3, 8, 8)  # grey images as RGB


# ---------------------------------------------------------------------------------------------------------------
# configuration


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flip_prob": 1.5}, "flip_prob=1.5"),
        ({"crop_scale_min": 0.0}, "crop_scale_min=0"),
        ({"crop_scale_min": 0.9, "crop_scale_max": 0.5}, "crop_scale_max=0.5"),
        ({"crop_scale_max": 1.2}, "crop_scale_max=1.2"),
        ({"crop_ratio_min": 2.0}, "crop_ratio_min=2.0"),
        ({"blur_sigma_min": 3.0}, "blur_sigma_min=3.0"),
        ({"hue": 0.6}, "hue=0.6"),
        ({"contrast": -0.1}, "contrast=-0.1"),
        ({"contrast": float("nan")}, "contrast=nan"),
        ({"contrast": "0.4"}, "contrast='0.4'"),
        ({"channels": 4}, "channels=4"),
        ({"image_size": 2}, "image_size=2"),
        ({"image_mean": (0.5,)}, "image_mean"),
        ({"image_std": (0.2, 0.0, 0.2)}, "image_std"),
    ],
)
def test_a_setting_that_cannot_work_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**settings)


def test_grey_images_take_the_grey_mean_unless_told_otherwise():
    assert AugmentConfig(channels=1).image_mean == pytest.approx((0.449,))
    assert AugmentConfig(channels=1, image_mean=[0.3], image_std=[0.2]).image_mean == (0.3,)


def test_crops_or_draws_of_another_shape_are_refused():
    config = AugmentConfig(image_size=8)
    images, draws = crops(config, 3), uniforms(3)
    for bad in (images[0], images.float(), images[..., :7]):
        with pytest.raises(ValueError, match=r"not \(2, B, 3, 8, 8\) uint8"):
            Augment(config)(bad, draws)
    with pytest.raises(ValueError, match="draws is"):
        Augment(config)(images, draws[:, :2])


# ------------------------------------------------------------------------------------------------------------------
# evaluation


@pytest.mark.parametrize("size", [16, 125, 224, 400])
@pytest.mark.parametrize("source", [(37, 61), (300, 211), (500, 500)])
def test_transformers_reads_the_saved_file_and_prepares_images_alike(tmp_path, size, source):
    from transformers import AutoImageProcessor
    from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

    transform = EvalTransform(image_size=size)
    transform.save(tmp_path)
    assert EvalTransform.load(tmp_path) == transform
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*source, 3), dtype=np.uint8))
    processors = [
        ConvNextImageProcessorPil.from_pretrained(tmp_path),
        AutoImageProcessor.from_pretrained(tmp_path, backend="pil"),
    ]
    for processor in processors:
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(transform(image), expected, atol=1e-5, rtol=0)


def test_the_border_is_cut_off_large_images_only():
    assert [EvalTransform(image_size=size).crop_pct for size in (16, 32, 63, 64, 224)] == [1.0, 1.0, 1.0, 0.875, 0.875]
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    transform = EvalTransform(image_size=8, channels=1, image_mean=(0.0,), image_std=(1.0,))
    assert torch.equal(transform(image), torch.arange(64.0).view(1, 8, 8) / 255)


def test_evaluation_converts_to_the_channels_of_the_model(tmp_path):
    colour, grey_image = Image.new("RGB", (20, 12), (255, 0, 0)), Image.new("L", (20, 12), 100)
    one, three = EvalTransform(image_size=8, channels=1), EvalTransform(image_size=8)
    assert one(colour).shape == one(grey_image).shape == (1, 8, 8)
    assert three(grey_image).shape == (3, 8, 8)
    one.save(tmp_path)
    assert EvalTransform.load(tmp_path) == one


def test_a_folder_without_a_preprocessor_or_with_another_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        EvalTransform.load(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 224}))
    with pytest.raises(ValueError, match="not a file that EvalTransform wrote"):
        EvalTransform.load(tmp_path)
