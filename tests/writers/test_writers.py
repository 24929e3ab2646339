"""What each shipped writer reads, in this process; the writing is tested in tests/data_write."""

import gzip
import io
import shutil
import sys
import types
import zipfile
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from fastkd.data.beton_writer import write_here
from fastkd.data.writer_api import load_writer
from fastkd.errors import InputError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def read(name, **options):
    writer = load_writer(name)
    return writer.read(writer.options(options))


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# Fashion-MNIST


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()


@pytest.fixture
def fashion(tmp_path):
    """A tiny Fashion-MNIST: folder, and its arrays by prefix."""
    arrays = {}
    for prefix, n in (("train", 30), ("t10k", 20)):
        arrays[prefix] = noise(n, 6, 5), (np.arange(n) % 10).astype(np.uint8)
        for values, kind in zip(arrays[prefix], ("images-idx3", "labels-idx1"), strict=True):
            (tmp_path / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx(values)))
    return tmp_path, arrays


def test_fashion_mnist(fashion):
    root, arrays = fashion
    splits, classes = read("fashion_mnist", root=str(root))
    assert classes[0] == "T-shirt/top"
    assert len(classes) == 10
    for split, prefix in (("train", "train"), ("val", "t10k")):
        assert len(splits[split]) == len(arrays[prefix][0])
        for i in range(len(splits[split])):
            image, label = splits[split][i]
            assert (image == arrays[prefix][0][i]).all()
            assert label == arrays[prefix][1][i]


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs the package dataset-fashion-mnist")
def test_fashion_mnist_as_debian_ships_it():
    splits, _ = read("fashion_mnist")
    assert {k: len(v) for k, v in splits.items()} == {"train": 60000, "val": 10000}
    image, label = splits["train"][0]
    assert (image.shape, image.dtype, label) == ((28, 28), np.uint8, 9)
    assert np.bincount(splits["train"].labels).tolist() == [6000] * 10


LABELS = "train-labels-idx1-ubyte.gz"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "train-labels-idx1-ubyte.gz: missing; root= must hold.*apt-get install dataset-fashion-mnist"),
        (b"plain", "damaged gzip"),
        (gzip.compress(bytes(100))[:-9], "damaged gzip"),
        (gzip.compress(b""), "begins with"),
        (gzip.compress(idx(noise(3, 3))), "begins with 00 00 08 02; an idx file of 1-d bytes with 00 00 08 01"),
        (gzip.compress(idx(noise(30))[:-1]), r"damaged: 29 values, where its header \[30\] says 30"),
        (gzip.compress(idx(noise(29))), "30 train images, but 29 labels"),
    ],
    # gzip stamps the time: without names, workers of one run would collect tests of different names
    ids=["missing", "not gzip", "cut gzip", "empty", "images for labels", "cut values", "fewer labels"],
)
def test_fashion_mnist_missing_or_damaged(fashion, content, text):
    root, _ = fashion
    (root / LABELS).unlink()
    if content is not None:
        (root / LABELS).write_bytes(content)
    with pytest.raises(InputError, match=text):
        read("fashion_mnist", root=str(root))


# Through torchvision


def torchvision_with(monkeypatch, **datasets):
    """Put a stand-in for torchvision.datasets in place."""
    module = types.SimpleNamespace(**datasets)
    monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(datasets=module))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)


def test_fashion_mnist_download(fashion, monkeypatch, tmp_path):
    root, arrays = fashion

    def download(folder, train, download):
        raw = Path(folder) / "FashionMNIST" / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        for file in root.glob("*.gz"):
            (raw / file.name).write_bytes(file.read_bytes())

    torchvision_with(monkeypatch, FashionMNIST=download)
    writer = load_writer("fashion_mnist")
    monkeypatch.setitem(writer.read.__globals__, "DEBIAN", tmp_path / "nowhere")
    splits, _ = writer.read(writer.options({"download_root": str(tmp_path / "cache")}))
    assert (splits["train"].images == arrays["train"][0]).all()


def test_fashion_mnist_cannot_be_downloaded(monkeypatch, tmp_path):
    def download(folder, train, download):
        raise RuntimeError("no network")

    torchvision_with(monkeypatch, FashionMNIST=download)
    writer = load_writer("fashion_mnist")
    monkeypatch.setitem(writer.read.__globals__, "DEBIAN", tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"cannot be downloaded to .*no network.*apt-get install.*root=FOLDER"):
        writer.read(writer.options({"download_root": str(tmp_path / "cache")}))


@pytest.mark.parametrize("k", [10, 100])
def test_cifar(monkeypatch, tmp_path, k):
    class Cifar:
        classes = tuple(f"class {i}" for i in range(k))

        def __init__(self, root, train, download):
            assert Path(root) == tmp_path
            assert download
            self.data = noise(2 * k if train else k, 32, 32, 3, seed=train)
            self.targets = [i % k for i in range(len(self.data))]

    torchvision_with(monkeypatch, **{f"CIFAR{k}": Cifar})
    splits, classes = read(f"cifar{k}", root=str(tmp_path))
    assert len(classes) == k
    assert {name: len(split) for name, split in splits.items()} == {"train": 2 * k, "val": k}
    image, label = splits["train"][k + 3]
    assert (image == noise(2 * k, 32, 32, 3, seed=1)[k + 3]).all()
    assert label == 3


@pytest.mark.parametrize("k", [10, 100])
def test_cifar_cannot_be_downloaded(monkeypatch, tmp_path, k):
    def download(root, train, download):
        raise OSError("no network")

    torchvision_with(monkeypatch, **{f"CIFAR{k}": download})
    with pytest.raises(
        InputError, match=f"CIFAR-{k} is not in {tmp_path} and cannot be downloaded .no network.*root=FOLDER"
    ):
        read(f"cifar{k}", root=str(tmp_path))


# Digits


def test_digits():
    splits, classes = read("digits")
    assert classes == list("0123456789")
    assert len(splits["train"]) + len(splits["val"]) == 1797
    assert np.bincount(splits["val"].labels).min() >= 34
    image, _ = splits["train"][0]
    assert (image.shape, image.dtype, splits["train"].images.max()) == ((32, 32), np.uint8, 255)
    assert (image.reshape(8, 4, 8, 4) == image[::4, ::4].reshape(8, 1, 8, 1)).all()


def test_digits_options():
    small, again, other = (read("digits", px=8, seed=seed, val_ratio=0.5)[0]["val"] for seed in (1, 1, 2))
    assert small[0][0].shape == (8, 8)
    assert (small.images == again.images).all()
    assert small.images.shape[0] == other.images.shape[0]
    assert (small.images != other.images).any()


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(InputError, match=r"digits needs scikit-learn, not installed: pip install scikit-learn$"):
        read("digits")


# Image folder


@pytest.fixture
def folder(tmp_path):
    """Two classes, with files in deeper folders, odd extensions and files that are no images."""
    files = {
        "train/dog/b.jpg": "JPEG",
        "train/dog/deep/er/a.JPEG": "JPEG",
        "train/cat/c.png": "PNG",
        "train/cat/d.webp": "WEBP",
        "val/cat/x.jpg": "JPEG",
        "val/dog/y.bmp": "BMP",
    }
    for number, (name, kind) in enumerate(files.items()):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(12 + number, 10, 3, seed=number)).save(file, kind)
    (tmp_path / "train/dog/notes.txt").write_text("no image")
    (tmp_path / "train/dog/._b.jpg").write_text("macOS leaves these")
    (tmp_path / "train/.cache").mkdir()
    return tmp_path


def test_image_folder(folder):
    splits, classes = read("image_folder", root=str(folder))
    assert classes == ["cat", "dog"]
    train = splits["train"]
    names = [str(Path(train.describe(i)).relative_to(folder)) for i in range(len(train))]
    assert names == ["train/cat/c.png", "train/cat/d.webp", "train/dog/b.jpg", "train/dog/deep/er/a.JPEG"]
    assert [train[i][1] for i in range(4)] == [0, 0, 1, 1]
    assert train[2][0] == (folder / "train/dog/b.jpg").read_bytes()
    assert Image.open(io.BytesIO(train[0][0])).size == (10, 14)


def test_image_folder_is_written(folder, tmp_path):
    written = write_here(("image_folder", {"root": str(folder)}, str(tmp_path)), lambda report: None)
    assert written.splits["train"].class_counts == [2, 2]
    assert (folder / "train/dog/b.jpg").read_bytes() in (tmp_path / "train.beton").read_bytes()


def test_image_folder_names_the_corrupt_file(folder, tmp_path):
    file = folder / "train/dog/b.jpg"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(InputError, match=f"train sample 2 .{file}.: corrupt image"):
        write_here(("image_folder", {"root": str(folder)}, str(tmp_path)), lambda report: None)


def test_image_folder_with_an_empty_class(folder, tmp_path):
    (folder / "train/emu").mkdir()
    with pytest.raises(InputError, match="no sample in train of 'emu'"):
        write_here(("image_folder", {"root": str(folder)}, str(tmp_path)), lambda report: None)


def test_image_folder_wrong(folder, tmp_path):
    with pytest.raises(InputError, match="root: missing"):
        read("image_folder")
    with pytest.raises(InputError, match=r"nowhere/train: no such folder; expected ROOT/train/CLASS/x.jpg"):
        read("image_folder", root=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"test: no such folder"):
        read("image_folder", root=str(folder), val_dir="test")
    with pytest.raises(InputError, match="cat: holds no folder, so no class"):
        read("image_folder", root=str(folder), train_dir="train/cat")
    (folder / "val/emu").mkdir()
    with pytest.raises(InputError, match=r"val: the classes \['emu'\] are not in .*train"):
        read("image_folder", root=str(folder))


# Arrays


@pytest.mark.parametrize("shape", [(30, 6, 5), (30, 6, 5, 1), (30, 6, 5, 3)])
def test_arrays(tmp_path, shape):
    arrays = {"images": noise(*shape), "labels": np.arange(30) % 3}
    np.savez(tmp_path / "a.npz", **arrays)
    splits, classes = read("arrays", file=str(tmp_path / "a.npz"))
    assert classes == ["0", "1", "2"]
    assert {k: len(v) for k, v in splits.items()} == {"train": 27, "val": 3}
    assert sorted(splits["val"].labels.tolist()) == [0, 1, 2]
    written = write_here(("arrays", {"file": str(tmp_path / "a.npz")}, str(tmp_path)), lambda report: None)
    assert written.splits["train"].fixed_size == (6, 5)


def test_arrays_with_val_and_classes(tmp_path):
    arrays = {"images": noise(8, 6, 5), "labels": np.arange(8) % 2, "classes": np.array(["cat", "dog"])}
    np.savez(tmp_path / "a.npz", **arrays, val_images=noise(3, 6, 5, seed=1), val_labels=np.array([0, 1, 1], np.uint8))
    splits, classes = read("arrays", file=str(tmp_path / "a.npz"))
    assert classes == ["cat", "dog"]
    assert (splits["train"].images == arrays["images"]).all()
    assert splits["val"].labels.tolist() == [0, 1, 1]


GOOD = {"images": noise(8, 6, 5), "labels": np.arange(8) % 2}


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"labels": GOOD["labels"]}, r"holds \['labels'\], but no images"),
        ({"x": GOOD["labels"]}, "but no images, labels"),
        (GOOD | {"val_images": GOOD["images"]}, "but no val_labels"),
        (GOOD | {"images": np.zeros((8, 6, 5))}, r"images is float64 \[8, 6, 5\]; expected uint8"),
        (GOOD | {"images": noise(8, 6, 5, 4)}, r"images is uint8 \[8, 6, 5, 4\]"),
        (GOOD | {"labels": np.arange(7)}, r"labels is int64 \[7\]; expected integers \[8\]"),
        (GOOD | {"labels": np.zeros(8)}, "labels is float64"),
        ({"images": noise(0, 6, 5), "labels": np.arange(0)}, "images is empty"),
        (
            GOOD | {"labels": np.array([{}] * 8, object)},
            "labels is an array of Python objects.*pickles can run any code",
        ),
        (GOOD | {"classes": np.array(["a", "b"], object)}, r"classes is an array of Python objects.*dtype=str"),
        (GOOD | {"classes": np.array([b"caf\xe9", b"dog"])}, r"classes holds b'caf\\xe9', which is not UTF-8"),
        (GOOD | {"classes": np.array([["a", "b"]])}, r"classes is <U1 \[1, 2\]; expected names"),
        (GOOD | {"classes": np.array([0.5, 1.5])}, r"classes is float64 \[2\]; expected names"),
        (GOOD | {"classes": np.array(["a"])}, r"labels holds 1, but there are 1 classes, so labels are 0…0"),
        (GOOD | {"labels": np.arange(8) % 2 - 1}, r"labels holds -1; labels are 0, 1, …"),
        (
            GOOD | {"labels": np.array([0] * 7 + [2**63], np.uint64)},
            r"labels holds 9223372036854775808, so there would",
        ),
        (
            GOOD | {"labels": np.array([0] * 7 + [10**12])},
            r"there would be 1,000,000,000,001 classes, but only 8 images",
        ),
        (GOOD | {"labels": np.eye(2)[[0, 1] * 4]}, r"labels is float64 \[8, 2\].*one-hot: labels.argmax\(axis=1\)"),
        (GOOD | {"labels": np.zeros(8)}, r"whole numbers: labels.astype\(np.int64\)"),
        (GOOD | {"labels": np.zeros(8, bool)}, r"labels is bool.*labels.astype\(np.int64\)"),
        (GOOD | {"labels": np.array(["a"] * 8)}, r"classes, labels = np.unique\(labels, return_inverse=True\)"),
        (GOOD | {"images": np.full((8, 6, 5), 0.5)}, r"Values are 0…1: \(images \* 255\).round\(\).astype\(np.uint8\)"),
        (GOOD | {"images": np.full((8, 6, 5), 99)}, r"Values are 0…255: images.round\(\).astype\(np.uint8\)"),
        (GOOD | {"images": np.full((8, 6, 5), -2.0)}, r"Values are -2…-2: scale them"),
        (GOOD | {"images": np.zeros((8, 6, 5), bool)}, r"images.astype\(np.uint8\) \* 255"),
        (GOOD | {"images": noise(8, 3, 6, 5)}, r"Channels come last: images.transpose\(0, 2, 3, 1\)"),
        (GOOD | {"images": noise(8, 1, 6, 5) / 255}, r"Channels come last: images.transpose\(0, 2, 3, 1\)"),
        (GOOD | {"images": noise(8, 6, 5, 4)}, r"Drop the alpha channel.*images\[..., :3\]"),
        (GOOD | {"images": noise(8, 0, 5)}, r"images is empty: \[8, 0, 5\]"),
        (GOOD | {"val_images": noise(0, 6, 5), "val_labels": np.arange(0)}, "val_images is empty"),
        (GOOD | {"val_images": noise(3, 6, 5), "val_labels": np.arange(3)}, "val_labels holds 2.*that train lacks?"),
        ({"images": noise(3, 6, 5), "labels": np.arange(3)}, "every class has one image only, so none is left for val"),
    ],
)
def test_arrays_wrong(tmp_path, arrays, text):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=text):
        read("arrays", file=str(tmp_path / "a.npz"))


@pytest.mark.parametrize("dtype", ["S9", "U9"])
def test_arrays_class_names_may_be_bytes(tmp_path, dtype):
    names = np.array(["cat", "dög"]) if dtype == "U9" else np.array([b"cat", "dög".encode()])
    np.savez(tmp_path / "a.npz", **GOOD, classes=names)
    assert read("arrays", file=str(tmp_path / "a.npz"))[1] == ["cat", "dög"]


@pytest.mark.parametrize(
    "labels",
    [GOOD["labels"][:, None], GOOD["labels"].astype(">i2"), GOOD["labels"].astype(np.uint64)],
    ids=["column", "big-endian", "uint64"],
)
def test_arrays_labels_of_any_integer_type(tmp_path, labels):
    images = np.asfortranarray(noise(8, 6, 5, 3))
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    written = write_here(("arrays", {"file": str(tmp_path / "a.npz")}, str(tmp_path)), lambda report: None)
    assert written.splits["train"].class_counts == [3, 3]
    train = read("arrays", file=str(tmp_path / "a.npz"))[0]["train"]
    assert sorted(train.labels.tolist()) == [0, 0, 0, 1, 1, 1]


def npz_with_header(file, shape, held):
    """Write images whose header promises a shape, of which the archive holds some bytes."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", header.getvalue() + bytes(held))
        labels = io.BytesIO()
        np.save(labels, np.zeros(8, np.int64))
        archive.writestr("labels.npy", labels.getvalue())


def test_arrays_that_promise_terabytes(tmp_path):
    npz_with_header(tmp_path / "a.npz", (10**6, 10**3, 10**4), 100)
    with pytest.raises(InputError, match=r"header of images says uint8 .*10,000,000,000,000 bytes, but .*holds 100$"):
        read("arrays", file=str(tmp_path / "a.npz"))


def test_arrays_that_unpack_to_more_than_memory(tmp_path, monkeypatch):
    npz_with_header(tmp_path / "a.npz", (8, 1000, 1000), 8_000_000)
    assert (tmp_path / "a.npz").stat().st_size < 20_000
    monkeypatch.setitem(sys.modules, "fastkd.machine", types.SimpleNamespace(memory=lambda: (10**7, 10**7)))
    with pytest.raises(InputError, match=r"takes 0.0 GB, and 0.0 GB of memory are free; write your own writer"):
        read("arrays", file=str(tmp_path / "a.npz"))


def test_arrays_ignores_what_else_an_archive_holds(tmp_path):
    np.savez(tmp_path / "a.npz", **GOOD, notes=np.array([{}], object))
    assert len(read("arrays", file=str(tmp_path / "a.npz"))[0]["train"]) == 6


@pytest.mark.parametrize("change", ["crc", "encrypted", "method"])
def test_arrays_of_a_damaged_archive(tmp_path, change):
    np.savez(tmp_path / "a.npz", **GOOD)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    central, local = content.index(b"PK\1\2"), content.index(b"PK\3\4")
    if change == "crc":
        content[300] ^= 1
    elif change == "encrypted":
        content[central + 8] |= 1
        content[local + 6] |= 1
    else:
        content[central + 10] = content[local + 8] = 99
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"not an .npz of plain arrays"):
        read("arrays", file=str(tmp_path / "a.npz"))


def test_arrays_without_a_file(tmp_path):
    with pytest.raises(InputError, match=r"no such file; file= names an .npz"):
        read("arrays", file=str(tmp_path / "a.npz"))
    for name, content in (("text.npz", b"hello"), ("cut.npz", b"PK\x03\x04hello")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=r"not an .npz of plain arrays"):
            read("arrays", file=str(tmp_path / name))
    np.save(tmp_path / "one.npy", np.arange(3))
    with pytest.raises(InputError, match=r"not an .npz of plain arrays"):
        read("arrays", file=str(tmp_path / "one.npy"))


# Glyphs

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def test_glyphs_are_one_image_of_each_character_and_families_are_in_one_split():
    splits, classes = read("glyphs", root=str(FONTS), characters="Ab3", px=20, fonts_per_family=2)
    assert classes == ["A", "b", "3"]
    assert min(map(len, splits.values())) > 0
    drawn = {split: [data[i] for i in range(len(data))] for split, data in splits.items()}
    for samples in drawn.values():
        assert [label for _, label in samples] == [0, 1, 2] * (len(samples) // 3)
        assert {image.shape for image, _ in samples} == {(20, 20)}
        for image, _ in samples:
            assert image.max() > 128
            assert np.mean(image[[0, -1]]) < np.mean(image)  # there is a margin
    again, _ = read("glyphs", root=str(FONTS), characters="Ab3", px=20, fonts_per_family=2)
    np.testing.assert_array_equal(again["val"][0][0], splits["val"][0][0])
    more, _ = read("glyphs", root=str(FONTS), characters="Ab3", px=20, fonts_per_family=9)
    assert sum(map(len, more.values())) > sum(map(len, splits.values()))


def test_fonts_without_a_character_or_damaged_are_left_out_and_copies_count_once(tmp_path):
    for name in ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf", "cmsy10.ttf"):
        shutil.copy(FONTS / name, tmp_path / name)
    shutil.copy(FONTS / "DejaVuSans.ttf", tmp_path / "copy.otf")
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    counts = [
        sum(map(len, read("glyphs", root=str(tmp_path), characters=text, val_ratio=0.5)[0].values()))
        for text in ("AB", "A\N{CYRILLIC CAPITAL LETTER ZHE}")  # cmsy10 has calligraphic capitals
    ]
    assert counts == [8, 6]
    with pytest.raises(InputError, match="0 families of fonts have all of"):
        read("glyphs", root=str(tmp_path), characters="A\u4e00")
    with pytest.raises(InputError, match="each must occur once"):
        read("glyphs", root=str(tmp_path), characters="AA")
