import errno
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import xxhash
from harness import seconds
from PIL import Image

from fastkd import console
from fastkd.data import beton_writer, encode, ffcv_format, split_writer
from fastkd.data.writer_api import load_writer
from fastkd.errors import FastkdError, InputError

pytestmark = pytest.mark.timeout(60)


def write(noise, directory, **options):
    """Write in this process and workers forked from it."""
    return beton_writer.write_here((noise, options, str(directory)), lambda report: None)


def write_watched(noise, directory, progress=None, **options):
    writer = load_writer(noise)
    return beton_writer.write_betons(writer, writer.options(options), directory, progress)


def source(noise, **options):
    writer = load_writer(noise)
    return writer.read(writer.options(options))[0]


def stored_images(file: Path) -> dict[int, tuple[np.ndarray, int, bytes]]:
    """Read a file with FFCV's Reader: sample_id → (pixels, label, bytes)."""
    from ffcv.reader import Reader

    reader = Reader(str(file))
    raw = file.read_bytes()
    sizes = dict(zip(reader.alloc_table["ptr"].tolist(), reader.alloc_table["size"].tolist(), strict=True))
    images = {}
    for image, label, sample_id in reader.metadata:
        ptr, height, width = (int(image[k]) for k in ("data_ptr", "height", "width"))
        data = raw[ptr : ptr + sizes[ptr]]
        assert ptr // reader.page_size == (ptr + len(data) - 1) // reader.page_size, "crosses a page's border"
        values = np.frombuffer(data, np.uint8)
        decode = image["mode"] == encode.JPG
        pixels = encode.decode_jpeg(values, height, width) if decode else values.reshape(height, width, 3)
        images[int(sample_id)] = pixels, int(label), data
    return images


def test_the_format_is_ffcvs():
    from ffcv import types
    from ffcv.fields import IntField, RGBImageField

    assert types.CURRENT_VERSION == ffcv_format.VERSION
    assert types.HeaderType == ffcv_format.HEADER
    assert types.FieldDescType == ffcv_format.FIELD
    assert types.ALLOC_TABLE_TYPE == ffcv_format.ALLOCATION
    assert types.get_metadata_type([RGBImageField(), IntField(), IntField()]) == ffcv_format.METADATA
    assert [types.TYPE_ID_HANDLER[type_id] for _, type_id in ffcv_format.FIELDS] == [RGBImageField, IntField, IntField]
    from ffcv.fields.rgb_image import IMAGE_MODES

    assert (IMAGE_MODES["jpg"], IMAGE_MODES["raw"]) == (encode.JPG, encode.RAW)


@pytest.mark.parametrize("workers", [1, 2, 7])
@pytest.mark.parametrize("mode", ["raw", "jpg", "smart"])
def test_every_sample_id_has_its_own_image_and_label(noise, tmp_path, mode, workers):
    written = write(noise, tmp_path, mode=mode, workers=workers, smart_threshold_bytes=700)
    assert written.classes == [f"class {k}" for k in range(4)]
    for split, data in source(noise).items():
        images = stored_images(tmp_path / f"{split}.beton")
        assert sorted(images) == list(range(len(data)))
        for index, (pixels, label, stored) in images.items():
            expected = data.pixels(index)
            assert label == index % 4
            assert pixels.shape == expected.shape
            if mode == "raw" or (mode == "smart" and expected.nbytes <= 700):
                assert stored == expected.tobytes()
            else:
                assert stored[:2] == b"\xff\xd8"
                assert (
                    np.abs(pixels.astype(int) - expected).mean() < 60
                )  # noise, its colours subsampled; another image: 85


def test_jpeg_files_are_kept(noise, tmp_path):
    write(noise, tmp_path, mode="jpg", as_file="JPEG", workers=2)
    data = source(noise, as_file="JPEG")["train"]
    images = stored_images(tmp_path / "train.beton")
    assert all(images[i][2] == data[i][0] for i in range(len(data)))


@pytest.mark.parametrize("mode", ["raw", "jpg"])
def test_content_hash_does_not_depend_on_workers(noise, tmp_path, mode):
    results = []
    for workers in (1, 2, 5):
        (tmp_path / str(workers)).mkdir()
        results.append(write(noise, tmp_path / str(workers), mode=mode, workers=workers).splits)
    assert results[0] == results[1] == results[2]


def test_content_hash_is_what_it_says(noise, tmp_path):
    split = write(noise, tmp_path).splits["val"]
    digest = xxhash.xxh3_128()
    for index, (pixels, label, stored) in sorted(stored_images(tmp_path / "val.beton").items()):
        one = xxhash.xxh3_128(bytes([encode.RAW]) + np.array(pixels.shape[:2], "<u2").tobytes() + stored)
        digest.update(np.array([index, label], "<i8").tobytes() + one.digest())
    assert split.content_hash == digest.hexdigest()


@pytest.mark.parametrize("change", [{"n": 61}, {"classes": 3}, {"max_resolution": 9}])
def test_content_hash_depends_on_content(noise, tmp_path, change):
    hashes = []
    for number, options in enumerate(({}, change)):
        (tmp_path / str(number)).mkdir()
        hashes.append(write(noise, tmp_path / str(number), **options).splits["train"].content_hash)
    assert hashes[0] != hashes[1]


def test_statistics(noise, tmp_path):
    split = write(noise, tmp_path, workers=2).splits["train"]
    data = source(noise)["train"]
    pixels = np.concatenate([data.pixels(i).reshape(-1, 3) for i in range(60)]) / 255
    np.testing.assert_allclose(split.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(split.std, pixels.std(0), rtol=1e-12)
    assert split.count == 60
    assert split.class_counts == [15] * 4
    assert split.max_height == max(data.pixels(i).shape[0] for i in range(60))
    assert split.max_width == max(data.pixels(i).shape[1] for i in range(60))
    assert split.fixed_size is None


def test_fixed_size(noise, tmp_path):
    assert write(noise, tmp_path, sides=(9, 9)).splits["train"].fixed_size == (9, 9)


@pytest.mark.parametrize("mode", ["raw", "jpg"])
def test_ffcv_loads_it(noise, tmp_path, mode):
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    write(noise, tmp_path, mode=mode, sides=(16, 16), workers=2)
    expected = stored_images(tmp_path / "train.beton")
    loader = Loader(
        str(tmp_path / "train.beton"),
        batch_size=16,
        num_workers=1,
        os_cache=mode == "raw",
        order=OrderOption.RANDOM,
        seed=1,
        drop_last=False,
        indices=np.arange(60),
        pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()], "sample_id": [IntDecoder()]},
    )
    seen = []
    for images, labels, ids in loader:
        for image, label, sample_id in zip(images, labels[:, 0], ids[:, 0], strict=True):
            seen.append(int(sample_id))
            assert (image == expected[int(sample_id)][0]).all()
            assert label == expected[int(sample_id)][1]
    assert sorted(seen) == list(range(60))


def test_images_larger_than_a_page(noise, tmp_path, monkeypatch):
    monkeypatch.setattr(ffcv_format, "PAGE_BYTES", 1 << 10)  # images have 8×8×3 = 192 to 24×24×3 = 1728 bytes
    write(noise, tmp_path, workers=3)
    data = source(noise)["train"]
    images = stored_images(tmp_path / "train.beton")  # looks for images across a page's border
    assert all(images[i][2] == data.pixels(i).tobytes() for i in range(60))
    header = np.fromfile(tmp_path / "train.beton", ffcv_format.HEADER, 1)
    assert header["page_size"] == 2048


def test_image_larger_than_8_mib(noise, tmp_path):
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader

    write(noise, tmp_path, n=4, sides=(1700, 1700), workers=1)
    assert np.fromfile(tmp_path / "train.beton", ffcv_format.HEADER, 1)["page_size"] == 16 << 20
    data = source(noise, sides=(1700, 1700))["train"]
    pipelines = {"image": [SimpleRGBImageDecoder()], "label": None, "sample_id": None}
    loader = Loader(str(tmp_path / "train.beton"), 1, 1, os_cache=False, indices=np.arange(4), pipelines=pipelines)
    for index, (image,) in enumerate(loader):
        assert (image[0] == data.pixels(index)).all()


def test_sample_too_large_for_ffcv(noise, tmp_path, monkeypatch):
    monkeypatch.setattr(split_writer, "MAX_PAGE_BYTES", 500)
    with pytest.raises(InputError, match=r"train sample \d+ .*takes \d+ bytes.* at most 500; set max_resolution"):
        write(noise, tmp_path)


# Samples that are wrong


@pytest.mark.parametrize("workers", [1, 2])
def test_skip_leaves_corrupt_images_out(noise, tmp_path, workers):
    split = write(noise, tmp_path, fault="corrupt", on_error="skip", workers=workers).splits["train"]
    assert split.count == 59
    assert split.class_counts == [15, 14, 15, 15]
    reason = "corrupt image: not an image: 15 bytes"
    assert split.skipped == [{"split": "train", "index": 37, "description": "noise-37.png", "reason": reason}]
    data = source(noise)["train"]
    images = stored_images(tmp_path / "train.beton")
    assert sorted(images) == list(range(59))
    for sample_id, (pixels, label, _) in images.items():
        index = sample_id + (sample_id >= 37)
        assert (pixels == data.pixels(index)).all()
        assert label == index % 4


@pytest.mark.parametrize(("fault", "as_file"), [("corrupt", ""), ("truncated", "JPEG"), ("truncated", "PNG")])
def test_corrupt_image_is_named(noise, tmp_path, fault, as_file):
    with pytest.raises(InputError, match=r"train sample 37 \(noise-37.png\): corrupt image: .*on_error=skip"):
        write(noise, tmp_path, fault=fault, as_file=as_file, workers=2)


@pytest.mark.parametrize("on_error", ["fail", "skip"])
@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("label", r"label 99 \(int\): expected an integer in 0…3"),
        ("float_label", r"label 1.0 \(float\): expected"),
        ("bool_label", r"label True \(bool\): expected"),
        ("none_label", r"label None \(NoneType\): expected"),
        ("float_image", r"image of float32 \[\d+, \d+, 3\]: expected uint8"),
        ("shape", r"image of uint8 \[\d+, \d+, 2\]: expected uint8"),
        ("type", "image of type str: expected uint8"),
        ("tuple", r"the data set yields a ndarray: expected \(image, label\)"),
    ],
)
def test_wrong_sample_always_fails(noise, tmp_path, fault, text, on_error):
    with pytest.raises(InputError, match=r"train sample 37 \(noise-37.png\): " + text):
        write(noise, tmp_path, fault=fault, on_error=on_error, workers=2)


def test_all_corrupt(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text(
        "from fastkd.data.writer_api import WriterOptions as Options\n"
        "def read(options): return {'train': [(b'x', 0)] * 5, 'val': [(b'x', 0)]}, ['a', 'b']\n"
    )
    with pytest.raises(
        InputError, match="train: none of the 5 samples can be read; the first, sample 0: corrupt image"
    ):
        write(str(file), tmp_path, on_error="skip")


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("read_input", "^the source is gone; fetch it$"),
        ("unknown_split", "the unknown split 'test'; the splits are 'train' and 'val'"),
        ("no_val", "no split 'val'; both 'train' and 'val' are needed"),
        ("empty_val", "an empty split 'val'"),
        ("no_len", "a 'train' of type list_iterator, without __len__"),
        ("one_class", "expected at least two"),
        ("same_names", "all different"),
        ("unused_class", "no sample in train of 'ghost': every class needs at least one"),
        ("not_a_source", "read.. returned Data; expected"),
    ],
)
def test_wrong_source(noise, tmp_path, fault, text):
    with pytest.raises(InputError, match=text):
        write(noise, tmp_path, fault=fault)


# What may happen to processes: all through the watched child


@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        (
            "raise",
            FastkdError,
            r"train sample 37 \(noise-37.png\): reading it raised ZeroDivisionError: boom\n.*noise.py",
        ),
        ("sys_exit", FastkdError, r"train sample 37 .*reading it raised SystemExit: 3"),
        ("os_exit", FastkdError, r"train sample 37 .*the worker at it ended with exit code 0 before it had finished"),
        ("sigkill", FastkdError, r"train sample 37 .*the worker at it was killed by SIGKILL.*memory.*workers=1"),
        ("sigsegv", FastkdError, r"train sample 37 .*the worker at it was killed by SIGSEGV"),
        ("corrupt", InputError, r"train sample 37 \(noise-37.png\): corrupt image"),
        ("read_input", InputError, "^the source is gone; fetch it$"),
        ("read_raise", FastkdError, r"read\(\) failed: KeyError: 'boom'\n.*noise.py"),
        ("read_exit", FastkdError, r"read\(\) failed: SystemExit: 7"),
        ("read_kill", FastkdError, "the writing process was killed by SIGKILL"),
    ],
)
def test_a_failure_is_told_and_leaves_nothing(noise, tmp_path, traces, fault, kind, text):
    start = time.monotonic()
    with pytest.raises(kind, match=f"(?s){text}") as caught:
        write_watched(noise, tmp_path, fault=fault, workers=2)
    assert type(caught.value) is kind
    assert time.monotonic() - start < seconds(20)
    assert list(tmp_path.iterdir()) == []
    assert traces.gone()


def test_watched_writes_the_same_and_reports(noise, tmp_path, traces):
    reports = []
    written = write_watched(noise, tmp_path, lambda *report: reports.append(report), workers=2)
    (tmp_path / "here").mkdir()
    assert written == write(noise, tmp_path / "here")
    assert [r for r in reports if r[1] == r[2]] == [("train", 60, 60), ("val", 20, 20)]
    assert traces.gone()


def test_an_error_in_the_callers_progress_ends_it(noise, tmp_path, traces):
    def broken(*report):
        raise BrokenPipeError("the terminal is gone")

    with pytest.raises(BrokenPipeError, match="the terminal is gone"):
        write_watched(noise, tmp_path, broken, sleep_s=0.05)
    assert list(tmp_path.iterdir()) == []
    assert traces.gone()


def test_interrupt(noise, tmp_path, traces):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    threading.Timer(2.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            write_watched(noise, tmp_path, sleep_s=0.5, workers=2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert list(tmp_path.iterdir()) == []
    assert traces.gone()


PARENT = """
import sys
from pathlib import Path
from fastkd.artifacts import Built, build
from fastkd.data.beton_writer import write_betons
from fastkd.data.writer_api import load_writer

def builder(directory):
    writer = load_writer(sys.argv[1])
    options = writer.options({"sleep_s": float(sys.argv[3]), "workers": 2})
    write_betons(writer, options, directory, lambda *report: print(*report, flush=True))
    return Built(inputs={})

build(Path(sys.argv[2]), "DATASET", None, builder)  # no __main__ guard: a script need not have one
"""


def test_a_killed_caller_leaves_no_processes_and_the_next_write_succeeds(noise, tmp_path, traces):
    def parent(sleep_s):
        return [sys.executable, "-c", PARENT, noise, str(tmp_path / "out"), sleep_s]

    with subprocess.Popen(parent("0.3"), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("train")  # workers are at it
        assert len(traces.processes()) >= 4
        process.kill()
    assert traces.gone()
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.fastkd-partial").is_dir()

    subprocess.run(parent("0"), check=True, stdout=subprocess.DEVNULL, timeout=seconds(40))
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"train.beton", "val.beton", "manifest.json"}
    assert not (tmp_path / "out.fastkd-partial").exists()


# A full disk


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk(noise, tiny_disk, traces):
    with pytest.raises(FastkdError, match=r"disk: no space left .*train needs about \d.* MB .*\d MB are free"):
        write_watched(noise, tiny_disk, n=400, sides=(40, 60), workers=2)
    assert list(tiny_disk.iterdir()) == []
    assert traces.gone()


def test_a_limit_on_the_size_of_files_is_a_full_disk(noise, tmp_path, traces):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(FastkdError, match=r"no space left .File too large"):
            write_watched(noise, tmp_path, workers=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    assert traces.gone()


def test_a_disk_that_forgets(noise, tmp_path, monkeypatch):
    def forgetful(descriptor, data, offset):
        data = data.copy()
        data[len(data) // 2 :] = 0
        os.pwrite(descriptor, data, offset)

    monkeypatch.setattr(ffcv_format, "_write_at", forgetful)
    with pytest.raises(FastkdError, match="reads back otherwise than it was written"):
        write(noise, tmp_path)


# Unreadable samples, whatever makes them so


FILES = """
import io, os
from pathlib import Path
import numpy as np
from PIL import Image
from fastkd.data.writer_api import WriterOptions

class Options(WriterOptions):
    root: str
    decoded: bool = False  # the data set opens its images itself
    raises: int = 0

class Data:
    def __init__(self, options, split):
        self.options = options
        self.paths = sorted((Path(options.root) / split).iterdir())
    def __len__(self):
        return len(self.paths)
    def describe(self, index):
        return self.paths[index].name
    def __getitem__(self, index):
        if self.options.raises and index == 1:
            raise OSError(self.options.raises, os.strerror(self.options.raises))
        path = self.paths[index]
        return Image.open(path).convert("RGB") if self.options.decoded else path.read_bytes(), index % 2

def read(options):
    return {split: Data(options, split) for split in ("train", "val")}, ["a", "b"]
"""


def image_file(file: Path, seed: int, mode="RGB", **save) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    file.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(file, **save)
    return file


@pytest.fixture
def files(tmp_path):
    """A writer of files, and a folder of six images of train and four of val."""
    writer, root = tmp_path / "files.py", tmp_path / "root"
    writer.write_text(FILES)
    root.mkdir()
    for split, count in (("train", 6), ("val", 4)):
        for k in range(count):
            image_file(root / split / f"{k}.png", seed=100 * (split == "val") + k)
    (tmp_path / "out").mkdir()
    return str(writer), root, tmp_path / "out"


def make_unreadable(file: Path, how: str) -> None:
    content = file.read_bytes()
    file.unlink()
    match how:
        case "a broken link":
            file.symlink_to("nowhere")
        case "a link to itself":
            file.symlink_to(file)
        case "a folder":
            file.mkdir()
        case "truncated":
            file.write_bytes(content[: len(content) // 2])
        case "empty":
            file.touch()
        case "too many pixels":
            header = b"IHDR" + struct.pack(">IIBBBBB", 14000, 13000, 8, 2, 0, 0, 0)
            file.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
        case "16 bits":
            Image.fromarray(np.arange(120, dtype=np.uint16).reshape(12, 10)).save(file)


UNREADABLE = {
    "a broken link": r"cannot be read \(No such file or directory\)",
    "a link to itself": r"cannot be read \(Too many levels of symbolic links\)",
    "a folder": r"cannot be read \(Is a directory\)",
    "truncated": "corrupt image: ",
    "empty": "corrupt image: ",
    "too many pixels": "too large: 182,000,000 pixels",
    "16 bits": "an image of mode 'I;16' .*only 8 bits can be stored; convert it first",
}


@pytest.mark.parametrize(
    ("how", "decoded"),
    [(how, decoded) for how in UNREADABLE for decoded in (False, True) if not decoded or how != "16 bits"],
)
def test_an_unreadable_sample(files, how, decoded):
    writer, root, out = files
    make_unreadable(root / "train" / "1.png", how)
    with pytest.raises(InputError, match=rf"^train sample 1 \(1.png\): {UNREADABLE[how]}.*; .*on_error=skip"):
        write(writer, out, root=str(root), decoded=decoded, workers=1)
    for file in out.iterdir():
        file.unlink()
    written = write(writer, out, root=str(root), decoded=decoded, workers=1, on_error="skip")
    assert written.splits["train"].count == 5
    (skipped,) = written.splits["train"].skipped
    assert (skipped["index"], skipped["description"]) == (1, "1.png")
    assert re.match(UNREADABLE[how], skipped["reason"])
    assert re.match(
        rf"left out 1 of train and 0 of val, which cannot be read \(on_error=skip\): train 1.png: {UNREADABLE[how]}",
        written.warnings[0],
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_all_unreadable_samples_are_listed_in_one_pass(files, workers):
    writer, root, out = files
    for number, how in enumerate(UNREADABLE):
        image_file(root / "train" / f"bad-{number}.png", seed=number)
        make_unreadable(root / "train" / f"bad-{number}.png", how)
    make_unreadable(root / "val" / "2.png", "truncated")
    with pytest.raises(InputError) as caught:
        write(writer, out, root=str(root), workers=workers)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith("8 of 17 images cannot be read; replace or delete them, or leave such samples out with on_")
    for number, (line, reason) in enumerate(zip(lines, UNREADABLE.values(), strict=False)):
        assert re.match(rf"  train sample {6 + number} \(bad-{number}.png\): {reason}", line)
    assert re.match(r"  val sample 2 \(2.png\): corrupt image", lines[-1])
    assert len(lines) == 8
    at_once = console.warnings_since(0)  # one a split
    assert len(at_once) == 2
    assert {f"  {text.removesuffix('. Trying all other images, too')}" for text in at_once} < set(lines)


def test_a_list_of_unreadable_samples_ends(files, monkeypatch):
    writer, root, out = files
    monkeypatch.setattr(beton_writer, "MAX_UNREADABLE", 2)
    for number in (1, 3, 4, 5):
        make_unreadable(root / "train" / f"{number}.png", "empty")
    with pytest.raises(InputError) as caught:
        write(writer, out, root=str(root), workers=1)
    assert str(caught.value).startswith("4 of 10 images cannot be read")
    assert [line.split(":")[0] for line in str(caught.value).splitlines()[1:]] == [
        "  train sample 1 (1.png)", "  train sample 3 (3.png)", "  and 2 more",
    ]  # fmt: skip


def test_an_unreadable_sample_leaves_no_files(files):
    writer, root, out = files
    make_unreadable(root / "train" / "1.png", "truncated")
    with pytest.raises(InputError, match=r"^train sample 1 \(1.png\)"):
        write_watched(writer, out, root=str(root), workers=1)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_an_error_of_reading_one_file_is_skipped(files, number):
    writer, root, out = files
    written = write(writer, out, root=str(root), raises=number, on_error="skip", workers=2)
    reason = f"cannot be read ({os.strerror(number)})"
    assert [one["reason"] for one in written.splits["train"].skipped] == [reason]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE])
def test_an_error_of_the_machine_is_never_skipped(files, number):
    writer, root, out = files
    with pytest.raises(FastkdError, match=r"train sample 1 .1.png.: reading it raised OSError") as caught:
        write(writer, out, root=str(root), raises=number, on_error="skip", workers=1)
    assert type(caught.value) is FastkdError


def test_names_of_files_are_told_as_one_line_of_valid_unicode(files):
    writer, root, out = files
    for name in (b"7\xff.png", b"8\n.png"):
        (root / "train" / os.fsdecode(name)).write_bytes(b"x")
    written = write(writer, out, root=str(root), on_error="skip")
    assert [one["description"] for one in written.splits["train"].skipped] == ["7\\xff.png", "8\\n.png"]
    assert written.warnings[0].encode().isascii()


# What is noticed, by count


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_noticed_is_counted(files, workers):
    writer, root, out = files
    train, val = root / "train", root / "val"
    turned = Image.Exif()
    turned[0x0112] = 6
    for k in range(7):
        image_file(train / f"turned-{k}.jpg", seed=20 + k, exif=turned)
    image_file(val / "turned.jpg", seed=30, exif=turned)
    image_file(train / "cmyk.jpg", seed=40, mode="CMYK")
    Image.new("RGB", (9, 9), "red").save(train / "red.jpg")
    Image.new("RGBA", (9, 9)).save(val / "nothing.png")
    for k in range(3):  # copies of images of train, one under a class of its own
        (val / f"copy-{k}.png").write_bytes((train / f"{k}.png").read_bytes())
    (val / "copy.jpg").write_bytes((train / "turned-3.jpg").read_bytes())
    written = write(writer, out, root=str(root), mode="jpg", workers=workers)
    counts = {one.kind: one.counts for one in written.found}
    assert counts == {
        "reencoded": {"train": 1},
        "lossy": {"train": 6, "val": 8},
        "transparent": {"val": 1},
        "one_colour": {"train": 1, "val": 1},
        "exif_orientation": {"train": 7, "val": 2},
        "colour_mode": {"train": 1},
        "val_in_train": {"val": 4},
    }
    told = {one.kind: one.warning for one in written.found}
    names = ", ".join(f"turned-{k}.jpg" for k in range(5))
    assert told["exif_orientation"].startswith("9 images (7 of train, 2 of val) have an EXIF orientation other than 1.")
    assert told["exif_orientation"].endswith(f": {names} and 4 more")
    assert told["val_in_train"].startswith("4 images (4 of val) are in train, too")
    assert told["val_in_train"].endswith("copy-0.png, copy-1.png, copy-2.png, copy.jpg")
    assert written.warnings == [one.warning for one in written.found if one.kind != "colour_mode"]
    assert written.notes == [told["colour_mode"]]


def test_what_was_asked_for_is_counted_without_a_warning(files):
    writer, root, out = files
    turned = Image.Exif()
    turned[0x0112] = 6
    image_file(root / "train" / "turned.jpg", seed=20, exif=turned)
    image_file(root / "val" / "clear.png", seed=21, mode="RGBA")
    clear = Image.open(root / "val" / "clear.png")
    clear.putalpha(Image.fromarray(np.arange(120, dtype=np.uint8).reshape(12, 10)))
    clear.save(root / "val" / "clear.png")
    Image.merge("LA", [Image.new("L", (9, 9), 255), Image.radial_gradient("L").resize((9, 9))]).save(
        root / "val" / "white.png"
    )
    written = write(writer, out, root=str(root), background="white", exif="apply", mode="jpg", workers=1)
    counts = {one.kind: one.counts for one in written.found if one.kind != "lossy"}
    assert counts == {
        "one_colour_on_background": {"val": 1},
        "on_background": {"val": 2},
        "exif_applied": {"train": 1},
    }
    applied, composited = sorted(written.notes)
    assert composited == "2 images (2 of val) have transparent pixels and were pasted onto background=white"
    assert applied.startswith("1 image (1 of train) were turned as their EXIF orientation says")
    assert [text.split(":")[0] for text in written.warnings if "one colour" in text] == [
        "1 image (1 of val) are of one colour on background=white, which is the colour of the picture in them. Nothing "
        "can be learned from them as stored; give a background of another colour"
    ]


def test_images_that_were_shrunk_and_large_images_are_counted(files):
    """Without a warning; large is more than 1,024 pixels, as stored."""
    writer, root, out = files
    for k, size in enumerate([(1025, 4), (4, 1024), (4, 2000)]):
        Image.fromarray(noise_pixels(*size, k)).save(root / "train" / f"long-{k}.png")
    written = write(writer, out, root=str(root))
    assert {one.kind: one.counts for one in written.found} == {"large": {"train": 2}}
    assert written.warnings == []
    assert written.notes == [
        "2 images (2 of train) have a side of more than 1,024 pixels, and are decoded or read in that size at each "
        "load. If the networks see smaller images, max_resolution= shrinks them once: long-0.png, long-2.png"
    ]
    for file in out.iterdir():
        file.unlink()
    written = write(writer, out, root=str(root), max_resolution=1024)
    assert {one.kind: one.counts for one in written.found} == {"resized": {"train": 2}}
    assert written.notes == ["2 images (2 of train) were larger than max_resolution=1024 and were shrunk to it"]


def noise_pixels(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_the_progress_names_an_image_that_takes_long(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "out").mkdir()
    for name, value in (("SLOW_AFTER_S", 0.4), ("_POLL_EVERY_S", 0.1), ("_REPORT_EVERY_S", 0.0)):
        monkeypatch.setattr(split_writer, name, value)
    reports = []
    beton_writer.write_here((str(tmp_path / "slow.py"), {"workers": 2}, str(tmp_path / "out")), reports.append)
    told = [report for report in reports if len(report) > 3]
    assert told
    for split, done, total, info in told:
        assert (split, total) == ("train", 6)
        assert done < 6
        assert re.fullmatch(r"\d s at train sample 3 \(slow\.png\)", info)


SLOW = """
import time
import numpy as np
from fastkd.data.writer_api import WriterOptions

class Options(WriterOptions):
    pass

class Data:
    def __init__(self, slow):
        self.slow = slow
    def __len__(self):
        return 6
    def describe(self, index):
        return "slow.png" if index == 3 else "fast.png"
    def __getitem__(self, index):
        time.sleep(1.5 if self.slow and index == 3 else 0.0)
        return np.full((4, 4, 3), index, np.uint8), index % 2

def read(options):
    return {"train": Data(True), "val": Data(False)}, ["a", "b"]
"""


def test_nothing_is_said_of_plain_images(files):
    writer, root, out = files
    written = write(writer, out, root=str(root))
    assert written.found == []
    assert written.warnings == []


SOURCE = """
import numpy as np
from fastkd.data.writer_api import ArrayDataset, WriterOptions as Options
images = np.random.default_rng(0).integers(0, 256, (8, 5, 4, 3), dtype=np.uint8)
{change}
def read(options):
    return {{s: ArrayDataset(images + (s == "val"), np.arange(8) % 2) for s in ("train", "val")}}, {classes}
"""


@pytest.mark.parametrize(
    ("change", "constant", "std"),
    [
        ("images[..., 1] = 7", "green: constant", 1.0),
        ("images[:] = 9", "red, green, blue: constant", 1.0),
        ("images[..., 2] = 200; images[0, 0, 0, 2] = 230", None, None),
        ("images = np.zeros((8, 300, 300, 3), np.uint8); images[..., :2] = np.arange(300)[:, None] % 256; "
         "images[0, 0, 0, 2] = 1", "blue: constant", 1.0),
    ],
)  # fmt: skip
def test_a_constant_channel(tmp_path, change, constant, std):
    file = tmp_path / "constant.py"
    file.write_text(SOURCE.format(change=change, classes=["a", "b"]))
    written = write(str(file), tmp_path, workers=1)
    told = [text for text in written.warnings if "constant or nearly so over all of train" in text]
    if constant is None:
        assert told == []
        assert written.std == written.splits["train"].std
    else:
        assert [text.startswith(constant) for text in told] == [True]
        assert std in written.std
        assert min(written.std) >= beton_writer.MIN_STD


@pytest.mark.parametrize(
    ("classes", "text"),
    [
        (["only"], "expected at least two"),
        (["a", "a"], "'a' and 'a' look the same; expected all different"),
        (["a", " a"], "'a' and ' a' look the same"),
        (["caf\u00e9", "cafe\u0301"], "look the same"),
        (["a", ""], "'' is empty; give each class a name"),
        (["a", " \t"], "is empty"),
        (["a", "b\nc"], r"'\\n' in 'b\\nc' is a control character or line break; rename the class"),
        (["a", "b\x1b[31m"], r"'\\x1b' in .* is a control character"),
        (["a", "b\u2028"], r"'\\u2028' in .* is a control character or line break"),
        (["a", "b\udcff"], r"'\\udcff' in 'b\\udcff' is not valid Unicode"),
        (["a", b"b"], "b'b' is of type bytes; expected each to be a str"),
        (["a", None], "None is of type NoneType"),
    ],
)
def test_class_names_are_checked_before_anything_is_written(tmp_path, classes, text):
    file = tmp_path / "classes.py"
    file.write_text(SOURCE.format(change="", classes=ascii(classes)))
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=f"writer .*: read.. returned the class names .*: .*{text}") as caught:
        write(str(file), tmp_path / "out")
    assert str(caught.value).isprintable()
    assert list((tmp_path / "out").iterdir()) == []


def test_class_names_of_any_language(tmp_path):
    file, names = tmp_path / "classes.py", ["Katze 🐈‍⬛", " חתול"]
    file.write_text(SOURCE.format(change="", classes=names), encoding="utf-8")
    assert write(str(file), tmp_path).classes == names
