"""A folder of the user's own images: what is read, what is skipped and why, and the same pixels as in serving."""

import os
import pickle
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.bundle.input_rules import Preprocessing
from service.commands.offline_scoring import find_files
from service.formats.images import ImageLimits, decode_image
from training.config import DataConfig
from training.data import load_dataset
from training.errors import BadImages, DataError, DataFormatError, DataNotFound, SplitError

RANDOM = np.random.RandomState(0)


def picture(height: int = 12, width: int = 10, mode: str = "RGB") -> Image.Image:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "LA": (2,)}[mode]
    return Image.fromarray(RANDOM.randint(0, 256, size=(height, width, *channels), dtype=np.uint8))


def write(path: Path, image: Image.Image, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def fill(root: Path, count: int = 20, **options) -> None:
    for number in range(count):
        write(root / f"{number:03}.png", picture(**options))


def load(root: Path, **options):
    return load_dataset(DataConfig(source=str(root), **options))


def names(dataset) -> list[str]:
    return [name for name, _ in dataset.skipped]


def all_pixels(dataset) -> np.ndarray:
    return dataset.pixels(range(len(dataset)))


@pytest.mark.parametrize(("mode", "shape"), [("L", (1, 12, 10)), ("RGB", (3, 12, 10))])
def test_images_of_one_size_keep_it(tmp_path, mode, shape):
    fill(tmp_path / "My Widgets!", mode=mode)
    dataset = load(tmp_path / "My Widgets!")
    assert (dataset.name, dataset.preprocessing.shape) == ("my-widgets", shape)
    assert all_pixels(dataset).shape == (20, *shape)
    first = np.asarray(Image.open(tmp_path / "My Widgets!" / "000.png")).reshape(12, 10, -1)
    np.testing.assert_array_equal(dataset.pixels([0])[0], np.moveaxis(first, 2, 0))


def test_images_of_several_sizes_become_64_by_64(tmp_path):
    fill(tmp_path)
    write(tmp_path / "other.png", picture(30, 20))
    assert load(tmp_path).preprocessing.shape == (3, 64, 64)


def test_images_of_one_large_size_become_64_by_64(tmp_path):
    fill(tmp_path, count=10, height=129, width=40)
    assert load(tmp_path).preprocessing.shape == (3, 64, 64)


def test_an_asked_size_and_mode_are_taken(tmp_path):
    fill(tmp_path)
    assert load(tmp_path, size=8, mode="L").preprocessing.shape == (1, 8, 8)
    assert load(tmp_path, size=(8, 6), fit="contain", background=9).preprocessing == Preprocessing(
        mode="RGB", height=8, width=6, fit="contain", background=9
    )


def test_sizes_are_those_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    for number in range(12):
        write(tmp_path / f"{number}.jpg", picture(12, 10), exif=exif)
    assert load(tmp_path).preprocessing.shape == (3, 10, 12)


def test_grey_pictures_in_colour_files_are_grey(tmp_path):
    for number in range(20):
        write(tmp_path / f"{number}.png", picture(mode="L").convert("RGB"))
    assert load(tmp_path).preprocessing.mode == "L"
    write(tmp_path / "colourful.png", picture())
    assert load(tmp_path).preprocessing.mode == "RGB"


def test_every_format_nested_or_flat(tmp_path):
    for number in range(12):
        folder = tmp_path / ("a/deep/er" if number % 2 else "b")
        write(folder / f"{number}.{('png', 'jpg', 'webp', 'JPEG')[number % 4]}", picture())
    write(tmp_path / "b" / "no suffix at all", picture(), format="PNG")
    write(tmp_path / "b" / "wrong suffix.txt", picture(), format="WEBP")
    dataset = load(tmp_path)
    assert (len(dataset), dataset.skipped) == (14, [])
    assert dataset.label_names == ["a", "b"]
    assert dataset.labels.tolist() == [0] * 6 + [1] * 8


@pytest.mark.parametrize("beside", [False, True])
def test_subfolders_are_labels_unless_images_lie_beside_them(tmp_path, beside):
    fill(tmp_path / "cats", 10)
    fill(tmp_path / "dogs" / "small", 10)
    (tmp_path / "README.txt").write_text("no image, so it does not matter")
    if beside:
        write(tmp_path / "stray.png", picture())
    dataset = load(tmp_path)
    if beside:
        assert (dataset.labels, dataset.label_names) == (None, None)
    else:
        assert (dataset.labels.tolist(), dataset.label_names) == ([0] * 10 + [1] * 10, ["cats", "dogs"])


def test_one_subfolder_is_no_label(tmp_path):
    fill(tmp_path / "only")
    assert load(tmp_path).labels is None


def write_oddities(root: Path) -> dict[str, str]:
    """Files that are no usable images, and a word that the reason must hold."""
    good = BytesIO()
    picture().save(good, format="PNG")
    jpeg = BytesIO()
    picture(60, 60).save(jpeg, format="JPEG")
    header_bomb = bytearray(good.getvalue())
    header_bomb[16:24] = (2**31 - 1).to_bytes(4, "big") * 2
    contents = {
        "bomb.png": bytes(header_bomb),
        "empty.png": b"",
        "notes.txt": b"not an image at all",
        "program.png": b"\x7fELF" + bytes(200),
        "short.png": good.getvalue()[:-40],
        "stub.jpg": jpeg.getvalue()[:300],
        "zeros.webp": bytes(1000),
        "page.html": b"<html><body>Hello</body></html>",
    }
    for name, content in contents.items():
        (root / name).write_bytes(content)
    return {name: "empty file" if name == "empty.png" else "" for name in contents}


@pytest.mark.parametrize("memory_limit_mb", [0, 2048], ids=["streamed", "in memory"])
def test_odd_files_are_skipped_by_name(tmp_path, memory_limit_mb):
    fill(tmp_path / "good")
    clean = load(tmp_path / "good", memory_limit_mb=memory_limit_mb)
    reasons = write_oddities(tmp_path / "good")
    dataset = load(tmp_path / "good", memory_limit_mb=memory_limit_mb)
    assert names(dataset) == sorted(reasons)
    assert all(reasons[name] in reason and reason for name, reason in dataset.skipped)
    assert dataset.describe()["skipped"] == len(reasons)
    assert dataset.fingerprint == clean.fingerprint
    np.testing.assert_array_equal(all_pixels(dataset), all_pixels(clean))


def test_odd_files_are_refused_by_name(tmp_path):
    fill(tmp_path)
    reasons = write_oddities(tmp_path)
    with pytest.raises(BadImages) as caught:
        load(tmp_path, on_bad="refuse")
    assert f"{len(reasons)} images cannot be used" in str(caught.value)
    assert all(f"  {name}: " in str(caught.value) for name in reasons)


def test_special_files_are_not_waited_for(tmp_path):
    fill(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere.png")
    assert load(tmp_path).skipped == [("broken.png", "not a regular file"), ("pipe.png", "not a regular file")]


def test_hidden_files_and_loops_are_ignored_and_links_followed(tmp_path):
    root = tmp_path / "root"
    fill(root / "a", 10)
    fill(root / ".thumbnails", 3)
    write(root / "a" / ".hidden.png", picture())
    fill(tmp_path / "elsewhere", 10)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "loop").symlink_to(root)
    (root / "linked_again").symlink_to(tmp_path / "elsewhere")
    write(tmp_path / "single.png", picture())
    (root / "a" / "single.png").symlink_to(tmp_path / "single.png")
    dataset = load(root)
    assert (len(dataset), dataset.skipped) == (21, [])


def test_what_is_trained_on_is_what_is_scored(tmp_path):
    """Of links, hidden copies and names without a suffix, in folders that may lie in hidden ones."""
    root = tmp_path / ".cache" / "good"
    fill(root, 10)
    write(root / "no suffix", picture(), format="PNG")
    write(root / ".ipynb_checkpoints" / "000-checkpoint.png", picture())
    fill(tmp_path / "elsewhere", 10)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "notes.txt").write_text("not a picture")
    trained = load(root)
    scored = find_files([root], trained.preprocessing)
    assert len(trained) == len(scored) == 21
    assert names(trained) == ["notes.txt"]


def test_a_name_that_is_not_utf_8_can_be_written(tmp_path):
    fill(tmp_path / os.fsdecode(b"h\xf6he"), 20)
    fill(tmp_path / "b", 20)
    (tmp_path / "b" / os.fsdecode(b"caf\xe9.png")).write_text("not a picture")
    dataset = load(tmp_path)
    assert dataset.label_names == ["b", r"h\xf6he"]
    assert names(dataset) == [r"b/caf\xe9.png"]
    assert all(name.encode() for name in dataset.names.values())


@pytest.mark.parametrize("tile", [None, 4])
def test_masks_of_0_and_1_in_files_are_refused_as_in_arrays(tmp_path, tile):
    for number in range(20):
        levels = np.random.RandomState(number).randint(0, 2, (12, 10), np.uint8)
        write(tmp_path / f"{number}.png", Image.fromarray(levels))
    with pytest.raises(DataFormatError, match="no 8-bit level is above 1"):
        load(tmp_path, tile=tile)
    write(tmp_path / "one-bit.png", Image.fromarray(levels > 0))  # 0 and 255
    assert len(load(tmp_path)) == 21


@pytest.mark.parametrize("good", [0, 5])
def test_too_few_images_are_counted(tmp_path, good):
    fill(tmp_path, good)
    write_oddities(tmp_path)
    with pytest.raises(
        SplitError, match="5 usable images are too few .*at least 10.*8 others" if good else "all 8 found"
    ):
        load(tmp_path)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(DataNotFound, match="PNG, JPEG or WebP images were expected"):
        load(tmp_path)


def mixed(root: Path) -> None:
    """Images of all modes, formats and shapes."""
    for number in range(16):
        write(root / f"{number:02}.png", picture(5 + number, 20 - number, ("RGB", "L", "RGBA", "LA")[number % 4]))
    exif = Image.Exif()
    exif[0x0112] = 8
    for number in range(6):
        write(root / f"photo{number}.jpg", picture(40, 30), exif=exif)
        write(root / f"web{number}.webp", picture(33, 44, "RGBA"))
        write(root / f"palette{number}.png", picture(20, 25).quantize(16))


@pytest.mark.parametrize("options", [{}, {"size": (9, 14), "fit": "contain", "background": 77, "mode": "L"}])
def test_training_sees_the_pixels_that_serving_sees(tmp_path, options):
    mixed(tmp_path)
    dataset = load(tmp_path, **options)
    limits = ImageLimits(max_bytes=10**6, max_pixels=10**6)
    served = [decode_image(path.read_bytes(), dataset.preprocessing, limits) for path in sorted(tmp_path.iterdir())]
    np.testing.assert_array_equal(all_pixels(dataset), np.stack(served))


def test_streamed_and_in_memory_are_the_same(tmp_path):
    mixed(tmp_path)
    held = load(tmp_path)
    streamed = load(tmp_path, memory_limit_mb=0)
    assert (held.streamed, streamed.streamed) == (False, True)
    np.testing.assert_array_equal(all_pixels(held), all_pixels(streamed))
    assert held.fingerprint == streamed.fingerprint
    assert held.describe() == streamed.describe()
    for name, indices in held.splits.items():
        np.testing.assert_array_equal(indices, streamed.splits[name])


def test_copies_stay_in_one_split(tmp_path):
    fill(tmp_path, 60)
    for number in range(0, 60, 3):
        shutil.copy(tmp_path / f"{number:03}.png", tmp_path / f"copy of {number:03}.png")
        Image.open(tmp_path / f"{number:03}.png").save(tmp_path / f"{number:03} resaved.webp", lossless=True)
    dataset = load(tmp_path)
    assert dataset.describe()["duplicates"] == 40
    seen = [{dataset.pixels([index]).tobytes() for index in indices} for indices in dataset.splits.values()]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 60


def test_the_fingerprint_follows_the_pixels_not_the_place(tmp_path):
    fill(tmp_path / "a")
    first = load(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert load(tmp_path / "b").fingerprint == first.fingerprint
    assert load(tmp_path / "b", split_seed=1).fingerprint != first.fingerprint
    assert load(tmp_path / "b", size=8).fingerprint != first.fingerprint
    write(tmp_path / "b" / "000.png", picture())
    assert load(tmp_path / "b").fingerprint != first.fingerprint
    assert str(tmp_path) not in str(first.describe())


@pytest.mark.parametrize("memory_limit_mb", [0, 2048], ids=["streamed", "in memory"])
def test_batches_come_in_order(tmp_path, memory_limit_mb):
    fill(tmp_path, 30)
    dataset = load(tmp_path, memory_limit_mb=memory_limit_mb)
    wanted = [RANDOM.randint(0, 30, size=size) for size in (4, 1, 7, 0, 30, 3, 3, 3, 3, 3, 3)]
    found = list(dataset.batches(wanted, prefetch=3))
    assert len(found) == len(wanted)
    for indices, batch in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(batch, dataset.pixels(indices))
        assert batch.shape == (len(indices), 3, 12, 10)


def test_prefetch_is_bounded(tmp_path):
    fill(tmp_path, 30)
    dataset = load(tmp_path, memory_limit_mb=0)
    drawn = []

    def endless():
        while True:
            drawn.append(len(drawn))
            yield np.array([0, 1])

    batches = dataset.batches(endless(), prefetch=3)
    for taken in range(1, 6):
        next(batches)
        assert len(drawn) <= taken + 3
    batches.close()


@pytest.mark.parametrize("change", ["gone", "changed", "damaged"])
def test_a_file_that_changes_under_a_stream_is_named(tmp_path, change):
    fill(tmp_path, 30)
    dataset = load(tmp_path, memory_limit_mb=0)
    path = tmp_path / "007.png"
    if change == "gone":
        path.unlink()
    elif change == "changed":
        write(path, picture())
    else:
        path.write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"007\.png"):
        dataset.pixels([6, 7])
    batches = dataset.batches([np.array([6]), np.array([7]), np.array([8])])
    assert next(batches).shape == (1, 3, 12, 10)
    with pytest.raises(DataError, match=r"007\.png"):
        list(batches)


def test_a_streamed_data_set_travels_to_other_processes(tmp_path):
    fill(tmp_path)
    dataset = load(tmp_path, memory_limit_mb=0)
    copy = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(all_pixels(copy), all_pixels(dataset))


@pytest.fixture
def hasty_threads():
    """Threads that take turns as often as they can, so that races show."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("hasty_threads")
def test_decoding_in_threads_leaves_the_warning_filters_alone():
    """Suppressing Pillow's warnings in several threads at once could switch off all warnings for good."""
    file = BytesIO()
    picture().save(file, format="PNG")
    rule, limits = Preprocessing(mode="L", height=6, width=5), ImageLimits(max_bytes=10**6, max_pixels=10**6)
    before = list(warnings.filters)
    for _ in range(10):
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda _: decode_image(file.getvalue(), rule, limits), range(150)))
        assert warnings.filters == before
