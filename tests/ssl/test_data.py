"""Where images come from: every source, what is refused and how it is named, and the order of training."""

import io
import itertools
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from matrix_llm.base.errors import ImageDataError
from matrix_llm.ssl.augment import Augment, AugmentConfig, TwoViewCollator
from matrix_llm.ssl.data import EpochSampler, TrainImages, load_images
from matrix_llm.ssl.images.dataset import GIVE_UP
from matrix_llm.ssl.images.decode import MAX_PIXELS

CONFIG = AugmentConfig(image_size=8)


def picture(shade=0, size=(12, 10), mode="RGB"):
    noise = np.random.default_rng(shade).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def make_folder(root, files):
    for i, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(root / file)
    return root


def encoded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------------------------
# folders


def test_class_folders_become_labels(tmp_path):
    make_folder(tmp_path, ["owl/b.png", "owl/a.JPG", "cat/deep/c.jpeg", "cat/d.webp"])
    images = load_images(str(tmp_path))
    assert images.ids == ["cat/d.webp", "cat/deep/c.jpeg", "owl/a.JPG", "owl/b.png"]
    assert images.class_names == ["cat", "owl"]
    assert images.labels.tolist() == [0, 0, 1, 1]
    assert images.labels.dtype == torch.int64
    assert np.array_equal(np.asarray(images.read(3)), np.asarray(picture(0)))


def test_a_flat_folder_has_no_labels(tmp_path):
    images = load_images(str(make_folder(tmp_path, ["b.png", "a.png"])))
    assert images.ids == ["a.png", "b.png"]
    assert images.labels is None
    assert images.class_names is None


def test_hidden_and_other_files_are_ignored(tmp_path):
    make_folder(tmp_path, ["cat/a.png", "owl/b.png"])
    for name in (
        "README.md",
        "cat/labels.txt",
        "cat/._a.png",
        ".DS_Store",
        ".cache/x.png",
        "__MACOSX/cat/a.png",
        "owl/Thumbs.db",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"no image")
    images = load_images(str(tmp_path))
    assert images.ids == ["cat/a.png", "owl/b.png"]
    assert images.class_names == ["cat", "owl"]


def test_a_split_folder_is_entered_and_a_missing_class_shifts_no_label(tmp_path):
    make_folder(tmp_path, ["train/ant/a.png", "train/bee/a.png", "train/cat/a.png", "val/ant/a.png", "val/cat/a.png"])
    train, val = load_images(str(tmp_path)), load_images(str(tmp_path), split="val")
    assert train.class_names == val.class_names == ["ant", "bee", "cat"]
    assert train.labels.tolist() == [0, 1, 2]
    assert val.labels.tolist() == [0, 2]
    with pytest.raises(ImageDataError, match="has the splits train, val, but no 'test'"):
        load_images(str(tmp_path), split="test")


def test_links_are_followed_but_not_in_circles(tmp_path):
    data = make_folder(tmp_path / "data", ["cat/a.png"])
    elsewhere = make_folder(tmp_path / "elsewhere", ["b.png"])
    (data / "owl").symlink_to(elsewhere)
    (data / "cat" / "up").symlink_to(data)
    assert [i for i in load_images(str(data)).ids if i.count("/") == 1] == ["cat/a.png", "owl/b.png"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no image"),
        (["cat/a.png", "b.png"], "both inside and outside class folders"),
    ],
)
def test_a_folder_that_leaves_its_classes_open_is_refused(tmp_path, files, message):
    with pytest.raises(ImageDataError, match=message):
        load_images(str(make_folder(tmp_path, files)))


def test_a_missing_folder_is_named(tmp_path):
    for source in (str(tmp_path / "nowhere"), "./nowhere", "~/no/where"):
        with pytest.raises(ImageDataError, match=r"no.?where does not exist"):
            load_images(source)
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(ImageDataError, match=r"only an \.npz is read"):
        load_images(str(tmp_path / "notes.txt"))


# ----------------------------------------------------------------------------------------------------- images that
# are refused


def one_file(tmp_path, content, name="a.png"):
    (tmp_path / name).write_bytes(content)
    return load_images(str(tmp_path))


def png_with_header(width, height):
    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


DAMAGED = {
    "corrupt.png": lambda: encoded(picture(), format="PNG")[:60] + b"\0" * 80,
    "truncated.jpg": lambda: encoded(picture(size=(90, 80)), format="JPEG")[:-900],
    "text.jpg": lambda: b"<html>404</html>",
    "empty.png": lambda: b"",
    "postscript.png": lambda: encoded(picture(), format="EPS"),  # would start Ghostscript
    "bomb.png": lambda: png_with_header(60_000, 60_000),  # refused by Pillow
    "large.png": lambda: png_with_header(10_000, MAX_PIXELS // 10_000 + 1),  # a warning of Pillow's
    "float.tiff": lambda: encoded(Image.fromarray(np.ones((4, 4), np.float32)), format="TIFF"),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_damaged_image_is_named_and_replaced_by_the_next(tmp_path, name):
    make_folder(tmp_path, ["z.png"])
    images = one_file(tmp_path, DAMAGED[name](), name)
    assert images.ids == [name, "z.png"]
    with pytest.raises(ImageDataError, match=f"{name} of .* cannot be read"):
        images.read(0)
    epoch, index, image, skipped = TrainImages(images)[3, 0]
    assert (epoch, index) == (3, 1)
    assert np.array_equal(np.asarray(image), np.asarray(images.read(1)))
    assert name in skipped
    assert TrainImages(images)[3, 1][3] is None


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_before_its_pixels_are_made(tmp_path):
    import tracemalloc

    images = one_file(tmp_path, DAMAGED["large.png"]())
    tracemalloc.start()
    with pytest.raises(ImageDataError, match=r"pixels, more than 89,478,485"):
        images.read(0)
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()
    with pytest.raises(ImageDataError, match="too large"):
        one_file(tmp_path, DAMAGED["bomb.png"]()).read(0)


def test_only_image_formats_are_tried_whatever_the_file_is_called(tmp_path):
    with pytest.raises(ImageDataError, match="cannot identify image file"):  # not: Ghostscript is missing
        one_file(tmp_path, DAMAGED["postscript.png"]()).read(0)


def test_a_replaced_image_keeps_its_own_label(tmp_path):
    make_folder(tmp_path, ["cat/a.png", "owl/b.png"])
    (tmp_path / "cat/a.png").write_bytes(b"damaged")
    images = load_images(str(tmp_path))
    batch = TwoViewCollator(CONFIG, 0, images.labels)([TrainImages(images)[0, 0]])
    assert batch["labels"].tolist() == [1]
    assert len(batch["skipped"]) == 1
    assert "cat/a.png" in batch["skipped"][0]


def test_many_unreadable_images_in_a_row_stop_the_run(tmp_path):
    for i in range(GIVE_UP + 4):
        (tmp_path / f"{i:02}.png").write_bytes(b"damaged")
    make_folder(tmp_path, ["zz.png"])
    train = TrainImages(load_images(str(tmp_path)))
    assert train[0, 5][1] == GIVE_UP + 4  # the good one is 16th from here
    with pytest.raises(ImageDataError, match=r"16 images in a row cannot be read. The first: 04.png"):
        train[0, 4]


# ---------------------------------------------------------------------------------------------------- images that are
# converted


def read_back(tmp_path, image, suffix="png", **options):
    image.save(tmp_path / f"a.{suffix}", **options)
    return np.asarray(load_images(str(tmp_path)).read(0))


def test_transparent_parts_are_white(tmp_path):
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[..., 0], pixels[..., 3] = 255, [[0, 255], [128, 255]]  # red, hidden at the upper left
    result = read_back(tmp_path, Image.fromarray(pixels))
    assert result.tolist() == [[[255, 255, 255], [255, 0, 0]], [[255, 127, 127], [255, 0, 0]]]
    assert read_back(tmp_path, Image.fromarray(pixels).convert("LA"))[0, 0].tolist() == [255, 255, 255]


def test_palettes_become_colours(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert read_back(tmp_path, image).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert read_back(tmp_path, image, transparency=0).tolist() == [[[255, 255, 255], [200, 100, 50]]]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bits_are_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 128, 257, 256 * 128], [65535, 65000, 600, 200]], np.uint16)
    result = read_back(tmp_path, Image.fromarray(values), suffix)
    assert result.tolist() == np.rint(values / 257).astype(int).tolist()


def test_cmyk_one_bit_and_grey_are_converted(tmp_path):
    colours = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    assert np.allclose(read_back(tmp_path, colours, "jpg", quality=100)[8, 8], (255, 0, 0), atol=3)
    (tmp_path / "a.jpg").unlink()
    black_and_white = Image.fromarray(np.array([[True, False]]))
    assert read_back(tmp_path, black_and_white).tolist() == [[255, 0]]
    assert read_back(tmp_path, picture(mode="L")).ndim == 2


def test_a_camera_held_sideways_makes_an_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_back(tmp_path, picture(size=(12, 6)), "jpg", exif=exif).shape == (12, 6, 3)


# ---------------------------------------------------------------------------------------------------------------
# other sources


def test_digits_are_split_in_equal_shares_without_overlap():
    train, test = load_images("digits"), load_images("digits", split="test")
    assert (len(train), len(test)) == (1297, 500)
    assert not set(train.ids) & set(test.ids)
    assert test.labels.bincount().min() >= 48
    assert train.class_names == [str(i) for i in range(10)]
    pixels = np.stack([np.asarray(train.read(i)) for i in range(50)])
    assert pixels.shape == (50, 8, 8)
    assert pixels.max() == 255
    assert train.read(0).mode == "L"
    with pytest.raises(ImageDataError, match="not 'validation'"):
        load_images("digits", split="validation")


def test_synthetic_images_are_the_same_every_time():
    images, again = load_images("synthetic", max_rows=50), load_images("synthetic", max_rows=50)
    for i in range(0, 50, 7):
        assert np.array_equal(np.asarray(images.read(i)), np.asarray(again.read(i)))
    assert len(images.class_names) == 10
    assert set(load_images("synthetic").labels.tolist()) == set(range(10))
    test = load_images("synthetic", split="test")
    assert not np.array_equal(np.asarray(test.read(0)), np.asarray(load_images("synthetic").read(0)))


def test_max_rows_is_a_fixed_sample_of_all_classes(tmp_path):
    images = load_images("digits", max_rows=100)
    assert images.ids == load_images("digits", max_rows=100).ids
    assert len(set(images.labels.tolist())) == 10
    everything = load_images("digits")
    at = everything.ids.index(images.ids[40])
    assert np.array_equal(np.asarray(images.read(40)), np.asarray(everything.read(at)))
    assert images.labels[40] == everything.labels[at]
    with pytest.raises(ImageDataError, match="max_rows=0"):
        load_images("digits", max_rows=0)


def test_a_subset_of_a_subset_keeps_ids_labels_and_pixels_together():
    images = load_images("digits")
    part = images.subset([5, 900, 7]).subset(torch.tensor([2, 1]))
    assert part.ids == [images.ids[7], images.ids[900]]
    assert torch.equal(part.labels, images.labels[[7, 900]])
    assert np.array_equal(np.asarray(part.read(1)), np.asarray(images.read(900)))


PIXELS = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "keys",
    [("images", "labels"), ("x", "y"), ("data", "labels"), ("x_train", "y_train"), ("train_images", "train_labels")],
)
def test_npz_is_read_under_any_usual_name(tmp_path, keys):
    np.savez(tmp_path / "a.npz", other=np.zeros(3), **dict(zip(keys, (PIXELS, np.arange(5)[:, None]), strict=True)))
    images = load_images(str(tmp_path / "a.npz"))
    assert images.labels.tolist() == list(range(5))
    assert images.ids[4] == "row 4"
    assert np.array_equal(np.asarray(images.read(4)), PIXELS[4])


def test_npz_without_labels_and_of_grey_images(tmp_path):
    np.savez(tmp_path / "a.npz", images=PIXELS[..., :1])
    images = load_images(str(tmp_path / "a.npz"))
    assert images.labels is None
    assert images.read(0).mode == "L"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": PIXELS.astype(np.float32)}, "float32, but images are"),
        ({"images": PIXELS[0, 0]}, "but images are"),
        ({"images": PIXELS, "labels": np.arange(4)}, "5 images, but labels has 4"),
        ({"images": PIXELS, "labels": np.zeros(5)}, "float64, but each image needs"),
        ({"pictures": PIXELS}, "has pictures, but neither"),
        ({"x_test": PIXELS}, "neither x_train"),
        ({"images": np.array([{"a": 1}], dtype=object)}, "not a readable .npz of plain arrays"),
    ],
)
def test_npz_that_holds_something_else_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ImageDataError, match=message):
        load_images(str(tmp_path / "a.npz"))
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(ImageDataError, match="not a readable"):
        load_images(str(tmp_path / "a.npz"))


def test_cifar_binaries_are_read_by_row(tmp_path):
    rng = np.random.default_rng(0)
    ten, hundred = rng.integers(0, 10, (3, 3073), dtype=np.uint8), rng.integers(0, 10, (4, 3074), dtype=np.uint8)
    for folder, files in {
        "ten": {"data_batch_1.bin": ten[:2], "data_batch_2.bin": ten[2:], "test_batch.bin": ten[:1]},
        "hundred": {"train.bin": hundred},
    }.items():
        (tmp_path / folder).mkdir()
        for name, rows in files.items():
            rows.tofile(tmp_path / folder / name)
    (tmp_path / "ten" / "batches.meta.txt").write_text("airplane\nautomobile\n\n")
    images = load_images(str(tmp_path / "ten"))
    assert images.labels.tolist() == ten[:, 0].tolist()
    assert images.class_names == ["airplane", "automobile"]
    pixels = np.asarray(images.read(2))
    assert pixels.shape == (32, 32, 3)
    assert (pixels[3, 4] == ten[2, 1:].reshape(3, 32, 32)[:, 3, 4]).all()
    assert len(load_images(str(tmp_path / "ten"), split="test")) == 1
    fine = load_images(str(tmp_path / "hundred"))
    assert fine.labels.tolist() == hundred[:, 1].tolist()
    with pytest.raises(ImageDataError, match=r"test.bin has 0 bytes"):
        load_images(str(tmp_path / "hundred"), split="test")


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    import datasets

    root = tmp_path_factory.mktemp("parquet")
    rows = [{"bytes": encoded(picture(i), format="PNG"), "path": None} for i in range(3)]
    rows[1]["bytes"] = b"damaged"
    features = datasets.Features(
        {"text": datasets.Value("string"), "img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "owl"])}
    )
    columns = {"text": ["c", "a", "c"], "img": rows, "label": [1, 0, 1]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(root / "train-00000-of-00001.parquet")
    return str(root)


def test_a_parquet_folder_finds_its_image_and_label_columns(parquet):
    images = load_images(parquet)
    assert images.class_names == ["cat", "owl"]
    assert images.labels.tolist() == [1, 0, 1]
    assert np.array_equal(np.asarray(images.read(2)), np.asarray(picture(2)))
    with pytest.raises(ImageDataError, match=r"row 1 of .* cannot be read"):
        images.read(1)
    assert load_images(parquet, image_column="img", label_column="text").class_names == ["a", "c"]


def test_a_column_that_is_not_there_is_named_beside_those_that_are(parquet):
    with pytest.raises(ImageDataError, match="image_column='text', but the columns are text, img, label"):
        load_images(parquet, image_column="text")
    with pytest.raises(ImageDataError, match="no label column 'colour'"):
        load_images(parquet, label_column="colour")


def test_a_hub_id_that_cannot_be_reached_is_named():
    with pytest.raises(ImageDataError, match="'nobody/nothing', split 'train', is neither a local path nor readable"):
        load_images("nobody/nothing")


# ----------------------------------------------------------------------------------------------------------- order
# and workers


def epochs(images, workers, epochs=(0, 1), seed=0, batch=16):
    sampler = EpochSampler(len(images), seed)
    loader = DataLoader(
        TrainImages(images),
        batch_size=batch,
        sampler=sampler,
        num_workers=workers,
        collate_fn=TwoViewCollator(CONFIG, seed, images.labels),
    )
    batches = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        batches += list(loader)
    return batches


def test_one_and_two_workers_give_the_batches_of_none():
    images = load_images("digits", max_rows=40)
    expected = epochs(images, 0)
    for workers in (1, 2):
        for batch, other in zip(expected, epochs(images, workers), strict=True):
            assert batch["skipped"] == other["skipped"]
            assert all(torch.equal(batch[name], other[name]) for name in ("crops", "draws", "labels", "indices"))


def test_views_and_epochs_and_seeds_differ():
    images = load_images("digits", max_rows=32)
    first, second = epochs(images, 0, batch=32)
    other = epochs(images, 0, seed=1, batch=32)[0]
    same = epochs(images, 0, epochs=[1], batch=32)[0]  # a resume that starts at epoch 1
    assert torch.equal(second["crops"], same["crops"])
    by_image = [batch["crops"][:, batch["indices"].argsort()] for batch in (first, second, other)]
    for a, b in itertools.combinations(by_image, 2):
        assert (a == b).flatten(2).all(2).float().mean() < 0.1
    assert (first["crops"][0] == first["crops"][1]).flatten(1).all(1).float().mean() < 0.1


def test_two_ranks_see_the_augmentations_of_one():
    images = load_images("digits", max_rows=24)
    whole = epochs(images, 0, epochs=[4], batch=24)[0]
    sampler = EpochSampler(len(images))
    sampler.set_epoch(4)
    train, collate, augment = TrainImages(images), TwoViewCollator(CONFIG, 0), Augment(CONFIG)
    expected = augment(whole["crops"], whole["draws"])
    for rank in (0, 1):
        part = collate([train[key] for key in list(sampler)[rank::2]])
        for a, b in zip(augment(part["crops"], part["draws"]), expected, strict=True):
            torch.testing.assert_close(a, b[rank::2], atol=1e-6, rtol=0)


def test_the_order_is_a_permutation_that_seed_and_epoch_decide():
    orders = []
    for seed, epoch in itertools.product((0, 1), (0, 1)):
        sampler = EpochSampler(50, seed)
        sampler.set_epoch(epoch)
        assert len(sampler) == 50
        assert list(sampler) == list(sampler)
        assert {e for e, _ in sampler} == {epoch}
        orders.append([index for _, index in sampler])
        assert sorted(orders[-1]) == list(range(50))
    assert len({tuple(order) for order in orders}) == 4
