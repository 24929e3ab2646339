import io
import os
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

WRITER = '''
"""A source for tests: `n` images of digits of noise, and one sample that misbehaves."""
import io, os, signal, sys, time
import numpy as np
from PIL import Image
from fastkd.data.source import WriterOptions
from fastkd.errors import InputError

class Options(WriterOptions):
    n: int = 60
    classes: int = 4
    fault: str = ""
    sides: tuple[int, int] = (8, 24)
    as_file: str = ""        # "" : array; else the format of the image file it yields
    sleep_s: float = 0.0

class Data:
    def __init__(self, options, seed, n):
        self.options, self.seed, self.n = options, seed, n
    def __len__(self):
        return self.n
    def describe(self, index):
        return f"noise-{index}.png"
    def pixels(self, index):
        rng = np.random.default_rng([self.seed, index])
        low, high = self.options.sides
        height, width = rng.integers(low, high + 1, 2)
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    def __getitem__(self, index):
        time.sleep(self.options.sleep_s)
        image, label = self.pixels(index), index % self.options.classes
        if self.options.as_file:
            stream = io.BytesIO()
            Image.fromarray(image).save(stream, self.options.as_file)
            image = stream.getvalue()
        if self.seed == 0 and index == 37:
            match self.options.fault:
                case "raise": raise ZeroDivisionError("boom")
                case "sigkill": os.kill(os.getpid(), signal.SIGKILL)
                case "sigsegv": os.kill(os.getpid(), signal.SIGSEGV)
                case "sys_exit": sys.exit(3)
                case "os_exit": os._exit(0)
                case "corrupt": image = b"no image at all"
                case "truncated": image = image[: len(image) // 2]
                case "label": label = 99
                case "float_label": label = 1.0
                case "bool_label": label = True
                case "none_label": label = None
                case "float_image": image = image.astype(np.float32)
                case "shape": image = image[..., :2]
                case "type": image = "no image"
                case "tuple": return image
        return image, label

def read(options):
    names = [f"class {k}" for k in range(options.classes)]
    train, val = Data(options, 0, options.n), Data(options, 1, 20)
    match options.fault:
        case "read_input": raise InputError("the source is gone; fetch it")
        case "read_raise": raise KeyError("boom")
        case "read_exit": sys.exit(7)
        case "read_kill": os.kill(os.getpid(), signal.SIGKILL)
        case "unknown_split": return {"train": train, "val": val, "test": val}, names
        case "no_val": return {"train": train}, names
        case "empty_val": return {"train": train, "val": []}, names
        case "no_len": return {"train": iter([]), "val": val}, names
        case "one_class": return {"train": train, "val": val}, ["only"]
        case "same_names": return {"train": train, "val": val}, ["a", "a", "b", "c"]
        case "unused_class": return {"train": train, "val": val}, [*names, "ghost"]
        case "not_a_source": return train
    return {"train": train, "val": val}, names
'''


@pytest.fixture(scope="session")
def noise(tmp_path_factory) -> str:
    """The path of a writer file whose source can be made to misbehave."""
    file = tmp_path_factory.mktemp("writers") / "noise.py"
    file.write_text(WRITER)
    return str(file)


class Traces:
    """What a write leaves behind: processes that carry a mark in their environment, names in /dev/shm."""

    def __init__(self, mark: str) -> None:
        self.mark = f"FASTKD_TEST_MARK={mark}".encode()
        self.shm = self.names()

    @staticmethod
    def names() -> set[str]:
        prefixes = ("psm_", "sem.", "pym-")
        return {n for n in os.listdir("/dev/shm") if n.startswith(prefixes)} if Path("/dev/shm").is_dir() else set()

    def processes(self) -> list[str]:
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                marked = self.mark in (entry / "environ").read_bytes().split(b"\0")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if marked and state != "Z":
                found.append(entry.name)
        return found

    def gone(self, within_s: float = 10.0) -> bool:
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            if not self.processes() and not self.names() - self.shm:
                return True
            time.sleep(0.05)
        return False


@pytest.fixture
def traces(monkeypatch) -> Traces:
    mark = uuid.uuid4().hex
    monkeypatch.setenv("FASTKD_TEST_MARK", mark)
    return Traces(mark)


@pytest.fixture
def jpeg():
    """Make the bytes of a JPEG file of noise."""

    def make(height=20, width=30, mode="RGB", seed=0, **save) -> bytes:
        shape = (height, width) if mode == "L" else (height, width, len(mode))
        pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels, mode).save(stream, "JPEG", **save) if mode == "CMYK" else Image.fromarray(pixels).save(
            stream, "JPEG", **save
        )
        return stream.getvalue()

    return make
