import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import xxhash
from harness import seconds

from fastkd.data import beton, encode
from fastkd.data.source import load_writer
from fastkd.errors import FastkdError, InputError

pytestmark = pytest.mark.timeout(60)


def write(noise, directory, **options):
    """Write in this process and workers forked from it."""
    return beton.write_here((noise, options, str(directory)), lambda report: None)


def write_watched(noise, directory, progress=None, **options):
    writer = load_writer(noise)
    return beton.write_betons(writer, writer.options(options), directory, progress)


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

    assert types.CURRENT_VERSION == beton.VERSION
    assert types.HeaderType == beton.HEADER
    assert types.FieldDescType == beton.FIELD
    assert types.ALLOC_TABLE_TYPE == beton.ALLOCATION
    assert types.get_metadata_type([RGBImageField(), IntField(), IntField()]) == beton.METADATA
    assert [types.TYPE_ID_HANDLER[type_id] for _, type_id in beton.FIELDS] == [RGBImageField, IntField, IntField]
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
    monkeypatch.setattr(beton, "PAGE_BYTES", 1 << 10)  # images have 8×8×3 = 192 to 24×24×3 = 1728 bytes
    write(noise, tmp_path, workers=3)
    data = source(noise)["train"]
    images = stored_images(tmp_path / "train.beton")  # looks for images across a page's border
    assert all(images[i][2] == data.pixels(i).tobytes() for i in range(60))
    header = np.fromfile(tmp_path / "train.beton", beton.HEADER, 1)
    assert header["page_size"] == 2048


def test_image_larger_than_8_mib(noise, tmp_path):
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader

    write(noise, tmp_path, n=4, sides=(1700, 1700), workers=1)
    assert np.fromfile(tmp_path / "train.beton", beton.HEADER, 1)["page_size"] == 16 << 20
    data = source(noise, sides=(1700, 1700))["train"]
    pipelines = {"image": [SimpleRGBImageDecoder()], "label": None, "sample_id": None}
    loader = Loader(str(tmp_path / "train.beton"), 1, 1, os_cache=False, indices=np.arange(4), pipelines=pipelines)
    for index, (image,) in enumerate(loader):
        assert (image[0] == data.pixels(index)).all()


def test_sample_too_large_for_ffcv(noise, tmp_path, monkeypatch):
    monkeypatch.setattr(beton, "MAX_PAGE_BYTES", 500)
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
        "from fastkd.data.source import WriterOptions as Options\n"
        "def read(options): return {'train': [(b'x', 0)] * 5, 'val': [(b'x', 0)]}, ['a', 'b']\n"
    )
    with pytest.raises(InputError, match="train: all 5 images are corrupt; the first, sample 0: corrupt image"):
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
from fastkd.data.beton import write_betons
from fastkd.data.source import load_writer

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

    monkeypatch.setattr(beton, "_write_at", forgetful)
    with pytest.raises(FastkdError, match="reads back otherwise than it was written"):
        write(noise, tmp_path)
