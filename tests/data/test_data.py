"""Datasets and loaders: what is found where, in which order, and what is said of bad folders and images."""

from __future__ import annotations

import os
import pickle
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from qlib.checkpoint.fit import load_state, model_state
from qlib.checkpoint.read import read_checkpoint
from qlib.data.datasets import ImageDataset, _check_pixels, open_dataset
from qlib.data.loader import make_loader
from qlib.data.subset import choose_subset, split_train
from qlib.errors import DataError
from qlib.models import create_model, find_model

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")


def shade(image: Image.Image) -> torch.Tensor:
    return pil_to_tensor(image)[:, 0, 0].float()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train/ and val/ of classes a (3 images), b (2) and c (none); the shade of an image is its number."""
    for split in ("train", "val"):
        for label, count in (("a", 3), ("b", 2), ("c", 0)):
            (tmp_path / split / label).mkdir(parents=True)
            for index in range(count):
                gray = 10 * "abc".index(label) + index
                Image.new("L", (4, 4), gray).save(tmp_path / split / label / f"{index}.png")
    return tmp_path


def opened(folder: Path, name: str = "imagefolder", num_classes: int | None = None) -> ImageDataset:
    return open_dataset(name, folder, "val", shade, num_classes=num_classes)


@pytest.mark.parametrize("name", ["imagenet", "imagefolder", "cifar10", "MNIST", "fashion_mnist", "digits"])
def test_an_image_folder_under_any_name(folder: Path, name: str) -> None:
    dataset = opened(folder, name, 3)
    assert dataset.classes == ["a", "b", "c"]
    assert [(image.tolist(), label) for image, label in (dataset[i] for i in range(len(dataset)))] == [
        ([0.0] * 3, 0),
        ([1.0] * 3, 0),
        ([2.0] * 3, 0),
        ([10.0] * 3, 1),
        ([11.0] * 3, 1),
    ]
    assert dataset.path(3) == str(folder / "val" / "b" / "0.png")


MISTAKES = [
    ("unknown name", "cifar11", lambda root: None, "unknown dataset 'cifar11'; allowed: .*; did you mean cifar10"),
    (
        "no folder",
        "cifar10",
        lambda root: Path.rename(root, root.with_name("x")),
        "there is no dataset folder '.*'; give",
    ),
    (
        "no val",
        "imagenet",
        lambda root: Path.rename(root / "val", root / "test"),
        "has no val/; it needs train/ and val/",
    ),
    ("other classes", "imagenet", lambda root: (root / "val" / "d").mkdir(), r"differ in 1 class folders \(d\); make"),
]


@pytest.mark.parametrize(("name", "change", "match"), [row[1:] for row in MISTAKES], ids=[row[0] for row in MISTAKES])
def test_wrong_folders(tmp_path: Path, name: str, change: object, match: str) -> None:
    for path in ("train/a", "val/a"):
        (tmp_path / "data" / path).mkdir(parents=True)
    change(tmp_path / "data")  # type: ignore[operator]
    with pytest.raises(DataError, match=match):
        opened(tmp_path / "data", name)


def test_number_of_classes(folder: Path) -> None:
    with pytest.raises(DataError) as error:
        opened(folder, "imagenet", 1000)
    assert str(error.value) == (
        f"{str(folder)!r} (imagenet) has 3 classes and the model 1000; "
        "give the data that the model was made for, a model with as many classes, or --dataset imagefolder to make "
        "the model with those of the folder"
    )


@pytest.mark.parametrize(
    ("paths", "match"),
    [
        (["train", "val"], "val' is empty; it needs a folder of images for each class"),
        (["train/a", "val/a"], "the 1 class folders in '.*val' hold no images; put some there"),
    ],
    ids=["no classes", "no images"],
)
def test_empty_folders(tmp_path: Path, paths: list[str], match: str) -> None:
    for path in paths:
        (tmp_path / path).mkdir(parents=True)
    with pytest.raises(DataError, match=match):
        opened(tmp_path)


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), 1).save(path)


def test_nested_folders_are_in_the_order_of_torchvision(folder: Path) -> None:
    nested = ["a/z.png", "a/B/1.png", "a/b/2.PNG", "a/b/c/3.bmp", "a/b.png", "a/b-c/1.png", "a/b c/1.png", "a/b/c.png"]
    for name in [*nested, "b/y/1.png", "b/10.png", "b/9.ppm"]:
        picture(folder / "val" / name)
    (folder / "val" / "a" / "notes.txt").touch()
    (folder / "val" / "a" / "d.png").mkdir()
    picture(folder / "val" / "a" / "d.png" / "1.png")
    picture(folder / "elsewhere" / "1.png")
    (folder / "val" / "b" / "link").symlink_to(folder / "elsewhere")
    expected = torchvision.datasets.ImageFolder(str(folder / "val"), allow_empty=True).samples
    dataset = opened(folder)
    assert [(dataset.path(index), dataset.labels[index]) for index in range(len(dataset))] == expected
    assert len(dataset) == 5 + 13


def test_postscript_under_another_name_is_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would give it to Ghostscript, whatever its name says."""
    mark, programs = folder / "ran", folder / "bin"
    programs.mkdir()
    for name in ("gs", "gswin64c"):
        (programs / name).write_text(f"#!/bin/sh\ntouch {mark}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # it is looked for once
    path = folder / "val" / "a" / "0.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    with Image.open(path) as image:
        assert image.format == "EPS"
    dataset = opened(folder)
    assert dataset.path(0) == str(path)
    with pytest.raises(DataError, match=r"cannot read image '.*/0.jpg', number 1 of 6 \(cannot identify image file"):
        dataset[0]
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["jpeg", "png", "ppm", "bmp", "tiff", "webp", "gif"])
def test_formats(folder: Path, kind: str) -> None:
    """The content tells what an image is, not the name."""
    Image.new("RGB", (4, 4), (8, 8, 8)).save(folder / "val" / "a" / "0.png", kind)
    dataset = opened(folder)
    if kind == "gif":
        with pytest.raises(DataError, match=r"cannot read image '.*/0.png', number 1 of 5 \(cannot identify"):
            dataset[0]
    else:
        assert dataset[0][0].tolist() == [8.0] * 3


def raw(text: bytes, values: list[int]) -> bytes:
    return text + np.array(values, ">u2").tobytes()


GRAY = np.array([[0, 257], [32896, 65535]])
DEPTHS = {
    "png of 16 bits": (Image.fromarray(GRAY.astype(np.uint16)), "png", [[0, 1], [128, 255]]),
    "tiff of 16 bits": (Image.fromarray(GRAY.astype(np.uint16)), "tiff", [[0, 1], [128, 255]]),
    "tiff of 32 bits": (Image.fromarray(GRAY.astype(np.int32)), "tiff", [[0, 1], [128, 255]]),
    "pgm of 16 bits": (raw(b"P5 2 2 65535\n", [0, 257, 32896, 65535]), "ppm", [[0, 1], [128, 255]]),
    "pgm of 10 bits": (raw(b"P5 2 2 1023\n", [0, 4, 512, 1023]), "ppm", [[0, 1], [128, 255]]),
    "one pixel": (Image.new("L", (1, 1), 7), "png", [[7]]),
    "one bit": (Image.new("1", (2, 1), 1), "png", [[255, 255]]),
    "floats": (Image.fromarray(GRAY.astype(np.float32)), "tiff", r"its pixels are float32 of no known range: store 8"),
    "large": (Image.fromarray((GRAY * 9).astype(np.int32)), "tiff", r"its pixels are int32 of no known range: store"),
    "negative": (Image.fromarray((-GRAY).astype(np.int32)), "tiff", r"its pixels are int32 of no known range: store"),
    "a strip": (Image.new("L", (100_000, 1)), "png", r"it has 100000 x 1 pixels, one side over 1,000 times the other"),
}


@pytest.mark.parametrize(("image", "kind", "expected"), DEPTHS.values(), ids=DEPTHS)
def test_depths(folder: Path, image: Image.Image | bytes, kind: str, expected: list[list[int]] | str) -> None:
    """Gray of 16 bits is scaled, where Pillow would clip it to white."""
    path = folder / "val" / "a" / "0.png"
    path.write_bytes(image) if isinstance(image, bytes) else image.save(path, kind)
    dataset = open_dataset("imagefolder", folder, "val", np.asarray, num_classes=None)
    if isinstance(expected, list):
        assert dataset[0][0].tolist() == [[[value] * 3 for value in row] for row in expected]
    else:
        with pytest.raises(DataError, match=rf"number 1 of 5 \({expected}"):
            dataset[0]


def test_gray_of_16_bits_is_rounded_as_by_numbers_of_64_bits(folder: Path) -> None:
    values = np.arange(65536).reshape(256, 256)
    Image.fromarray(values.astype(np.uint16)).save(folder / "val" / "a" / "0.png")
    dataset = open_dataset("imagefolder", folder, "val", np.asarray, num_classes=None)
    assert np.array_equal(np.asarray(dataset[0][0])[..., 0], np.rint(values / 257))


def test_a_mistake_of_ours_is_no_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlib.data.pixels._THINNEST", "a thousand")
    with pytest.raises(TypeError, match="not supported between instances of 'int' and 'str'"):
        next(iter(make_loader(opened(folder), batch_size=2, skip_corrupt=True)))


def test_a_small_file_is_no_giant_image(folder: Path) -> None:
    path = folder / "val" / "a" / "0.png"
    path.write_bytes(b"P5 9000 9000 255\n" + bytes(500_000))
    with pytest.raises(
        DataError, match=r"\(it has 9,000 x 9,000 pixels in 500,017 bytes, which fills the memory: make"
    ):
        opened(folder)[0]


@pytest.mark.parametrize(("size", "content"), [((4096, 4096), 1000), ((8000, 6000), 4_000_000), ((1, 1), 0)])
def test_large_images_of_large_files_are_read(size: tuple[int, int], content: int) -> None:
    _check_pixels(Image.new("1", size), content)


@pytest.mark.parametrize("kind", ["jpeg", "png", "ppm", "bmp", "tiff", "webp", "avif"])
def test_damage(folder: Path, kind: str) -> None:
    """Bytes cut off or changed anywhere: an image, or an error that names it."""
    path = folder / "val" / "a" / "0.png"
    noise = np.random.RandomState(0)
    Image.fromarray(noise.randint(0, 255, (16, 16, 3), np.uint8)).save(path, kind)
    whole, dataset = path.read_bytes(), opened(folder)
    said: list[str] = []
    for trial in range(60):
        damaged = bytearray(whole[: noise.randint(len(whole))] if trial % 2 else whole)
        for place in noise.randint(0, len(whole), 5 if not trial % 2 else 0):
            damaged[place] = noise.randint(256)
        path.write_bytes(damaged)
        try:
            dataset[0]
        except DataError as error:
            said.append(str(error))
    expected = r"cannot read image '.*/0.png', number 1 of 5 \(.*\); replace or delete it.*"
    assert [text for text in said if not re.fullmatch(expected, text)] == []
    assert len(said) >= 20


def test_what_has_an_image_s_name_but_is_no_file(folder: Path) -> None:
    os.mkfifo(folder / "val" / "a" / "x.png")
    with pytest.raises(DataError) as error:
        opened(folder)
    path = str(folder / "val" / "a" / "x.png")
    assert str(error.value) == f"{path!r} has an image's name but is no file; remove it"


LINKS = {
    "to itself": ("val/a/loop", "."),
    "to its class": ("val/a/x/loop", ".."),
    "to all classes": ("val/a/loop", ".."),
    "to the dataset": ("val/a/x/loop", "../../.."),
    "to what holds the dataset": ("val/a/loop", "../../.."),
    "to a folder beside": ("val/a/y", "x"),
    "to nothing": ("val/a/y", "z"),
}


@pytest.mark.parametrize(("link", "target"), LINKS.values(), ids=LINKS)
def test_links_do_not_multiply_images(folder: Path, link: str, target: str) -> None:
    picture(folder / "val" / "a" / "x" / "1.png")
    (folder / link).symlink_to(target)
    assert opened(folder).labels == [0] * 4 + [1] * 2


def test_a_link_to_itself_is_told(folder: Path) -> None:
    (folder / "val" / "a" / "x").symlink_to("x")
    with pytest.raises(
        DataError, match=r"cannot read '.*/val/a/x' \(.*symbolic links.*\); remove it, or make it readable"
    ):
        opened(folder)


def test_two_links_in_each_of_40_folders(folder: Path) -> None:
    """There are 2**40 ways to the last one."""
    path = folder / "val" / "a"
    for _ in range(40):
        (path / "next").mkdir()
        (path / "link").symlink_to("next")
        path = path / "next"
    picture(path / "1.png")
    assert len(opened(folder)) == 6


@pytest.fixture
def deep(folder: Path) -> Iterator[None]:
    """1,500 folders in each other: more than the longest path that the system takes."""
    name, top = "x" * 20, folder / "val" / "a"
    handles = [os.open(top, os.O_RDONLY)]
    for _ in range(1500):
        os.mkdir(name, dir_fd=handles[-1])
        handles.append(os.open(name, os.O_RDONLY, dir_fd=handles[-1]))
        if len(handles) > 2:
            os.close(handles.pop(0))
    yield
    above = handles[0]
    os.close(handles[1])
    for _ in range(1500):
        os.rmdir(name, dir_fd=above)
        above, below = os.open("..", os.O_RDONLY, dir_fd=above), above
        os.close(below)
    os.close(above)


def test_folders_that_are_too_deep(folder: Path, deep: None) -> None:
    with pytest.raises(DataError, match=r"'.*/val/a/.*x' and what follows lies more than 50 folders deep; move it up"):
        opened(folder)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion-mnist"])
def test_torchvision_files_that_are_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as error:
        opened(tmp_path, name)
    assert str(error.value) == (
        f"{str(tmp_path)!r} does not hold {name}; put torchvision's files of it there, "
        "or train/ and val/ with a folder of images for each class"
    )
    with pytest.raises(DataError, match=f"dataset {name} needs its folder; give it as DATASET_DIR"):
        open_dataset(name, None, "val", shade, num_classes=None)


def write_mnist(root: Path, head: bytes, labels: bytes, images: int = 2) -> None:
    """The files of both splits; those of `images` gray images, each of its own shade."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        pixels = np.arange(images, dtype=np.uint8).repeat(28 * 28).tobytes()
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(head + pixels)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)


HEADER, LABELS = struct.pack(">4i", 0x803, 2, 28, 28), struct.pack(">2i", 0x801, 2)


def test_mnist_files(tmp_path: Path) -> None:
    write_mnist(tmp_path, HEADER, LABELS + bytes([0, 1]))
    dataset = opened(tmp_path, "mnist", 10)
    assert (len(dataset), dataset[1][0].tolist(), dataset[1][1], dataset.path(1)) == (2, [1.0] * 3, 1, "mnist[1]")
    assert len(open_dataset("mnist", tmp_path, "train", shade, num_classes=10)) == 2


DAMAGED = {
    "no number at the beginning": (b"\1\2\3\4" + HEADER[4:], LABELS + bytes(2), ""),
    "empty": (b"", LABELS + bytes(2), ""),
    "cut": (HEADER[:7], LABELS + bytes(2), ""),
    "more images than bytes": (struct.pack(">4i", 0x803, 2**31 - 1, 28, 28), LABELS + bytes(2), ""),
    "a negative number of images": (struct.pack(">4i", 0x803, -2, 28, 28), LABELS + bytes(2), ""),
    "floats": (struct.pack(">4i", 0xD03, 2, 28, 28), LABELS + bytes(2), ""),
    "labels of two axes": (HEADER, struct.pack(">3i", 0x802, 2, 1) + bytes(2), ""),
    "labels out of range": (HEADER, LABELS + bytes([3, 10]), r" \(its labels are 3 to 10, of 10 classes\)"),
    "fewer labels": (HEADER, struct.pack(">2i", 0x801, 1) + bytes(1), r" \(its files have 2 images and 1 labels\)"),
}


@pytest.mark.parametrize(("head", "labels", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_mnist_files(tmp_path: Path, head: bytes, labels: bytes, reason: str) -> None:
    write_mnist(tmp_path, head, labels)
    with pytest.raises(
        DataError, match=rf"does not hold mnist{reason}; put torchvision's files of it there, or train/"
    ):
        opened(tmp_path, "mnist", 10)


def test_cifar_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    batches = tmp_path / torchvision.datasets.CIFAR10.base_folder
    batches.mkdir()
    pixels = np.zeros((2, 3072), np.uint8)
    pixels[1, 1024:2048] = 7  # all red, then all green, then all blue
    (batches / "test_batch").write_bytes(pickle.dumps({"data": pixels, "labels": [4, 2]}))
    names = [f"class{index}" for index in range(10)]
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    dataset = opened(tmp_path, "cifar10", 10)
    assert (dataset[1][0].tolist(), dataset[1][1], dataset.classes) == ([0.0, 7.0, 0.0], 2, names)


def test_digits_are_split_evenly() -> None:
    splits = {split: open_dataset("digits", None, split, shade, num_classes=10) for split in ("train", "val", "test")}
    assert {split: len(dataset) for split, dataset in splits.items()} == {"train": 1297, "val": 500, "test": 500}
    assert np.bincount(splits["val"].labels).tolist() == [50] * 10
    with pytest.raises(DataError, match="leave it out: the digits come with scikit-learn"):
        open_dataset("digits", Path(__file__).parent, "val", shade, num_classes=10)


class TestLoader:
    """Order, batches, and damaged images."""

    @pytest.mark.parametrize("workers", [0, 2])
    def test_order(self, folder: Path, workers: int) -> None:
        loader = make_loader(opened(folder), batch_size=2, workers=workers, indices=[4, 0, 3])
        state = torch.random.get_rng_state()
        passes = [[(images[:, 0].tolist(), labels.tolist()) for images, labels in loader] for _ in range(2)]
        assert passes == [[([11.0, 0.0], [1, 0]), ([10.0], [1])]] * 2
        assert (len(loader), loader.total_images) == (2, 3)
        assert torch.equal(torch.random.get_rng_state(), state)

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("content", [b"", b"hello", None], ids=["empty", "text", "truncated"])
    def test_damaged_images_are_named(self, folder: Path, workers: int, content: bytes | None) -> None:
        path = folder / "val" / "a" / "1.png"
        path.write_bytes(path.read_bytes()[:45] if content is None else content)
        with pytest.raises(DataError) as error:
            list(make_loader(opened(folder), batch_size=2, workers=workers))
        assert str(error.value).startswith(f"cannot read image {str(path)!r}, number 2 of 5 (")
        assert str(error.value).endswith("); replace or delete it, or leave such images out with --skip-corrupt")
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_damaged_images_are_left_out(self, folder: Path, workers: int) -> None:
        damaged = [folder / "val" / name for name in ("a/2.png", "b/0.png", "b/1.png")]
        for path in damaged:
            path.write_bytes(b"")
        loader = make_loader(opened(folder), batch_size=2, workers=workers, skip_corrupt=True)
        for _ in range(2):
            assert [labels.tolist() for _, labels in loader] == [[0, 0]]
            assert loader.skipped == [str(path) for path in damaged]

    def test_all_damaged(self, folder: Path) -> None:
        for path in (folder / "val").glob("*/*.png"):
            path.write_bytes(b"")
        with pytest.raises(DataError, match=r"all 5 images are damaged, the first is '.*0.png'; replace them"):
            list(make_loader(opened(folder), batch_size=2, skip_corrupt=True))


class TestSubsets:
    """The same indices for the same seed."""

    @pytest.mark.parametrize(
        ("n", "fraction", "count"), [(1000, 0.05, 50), (5, 0.01, 1), (7, 1.0, 7), (100, 0.29, 29), (1, 1.0, 1)]
    )
    def test_choose(self, n: int, fraction: float, count: int) -> None:
        chosen = choose_subset(n, fraction, seed=3)
        assert len(set(chosen)) == len(chosen) == count
        assert chosen == sorted(chosen) == choose_subset(n, fraction, seed=3)
        assert set(chosen) <= set(range(n))

    def test_seeds_differ(self) -> None:
        assert choose_subset(1000, 0.05, seed=0) != choose_subset(1000, 0.05, seed=1)

    @pytest.mark.parametrize(("n", "share", "held_out"), [(10, 0.1, 1), (10, 0.0, 0), (9, 0.5, 4)])
    def test_split(self, n: int, share: float, held_out: int) -> None:
        train, validation = split_train(n, share, seed=0)
        assert sorted(train + validation) == list(range(n))
        assert len(validation) == held_out


@needs_shared
def test_empty_class_folders_are_classes() -> None:
    dataset = open_dataset("imagenet", SHARED / "data" / "imagenet-sample", "train", shade, num_classes=1000)
    assert (len(dataset), len(dataset.classes)) == (200, 1000)


@needs_shared
def test_accuracy_of_a_checkpoint_of_distiller() -> None:
    spec = find_model("resnet20_cifar")
    model = create_model(spec)
    load_state(model, model_state(read_checkpoint(SHARED / "checkpoints" / "resnet20_cifar_dense.pth.tar")), "it")
    dataset = open_dataset("cifar10", SHARED / "data" / "cifar10", "val", spec.transform, num_classes=10)
    top1 = top5 = 0
    with torch.inference_mode():
        for images, labels in make_loader(dataset, batch_size=128):
            right = model(images).topk(5).indices == labels[:, None]
            top1, top5 = top1 + int(right[:, 0].sum()), top5 + int(right.sum())
    assert (round(100 * top1 / 1017, 3), round(100 * top5 / 1017, 3)) == (92.134, 99.607)
