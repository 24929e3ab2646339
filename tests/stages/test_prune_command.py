"""The command ``fastkd.prune --logits``: what it imports, and the memory that it needs."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from fastkd.artifacts import release_pages

IMPORTED = """
import runpy, sys
sys.argv = ["prune", *sys.argv[1:]]
try:
    runpy.run_module("fastkd.prune", run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
print(*sorted(name for name in ("torch", "torchvision", "ffcv", "matplotlib", "cv2", "timm") if name in sys.modules))
"""


def test_pruning_logits_imports_neither_torch_nor_ffcv(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "z.npy", rng.normal(size=(60, 3)).astype(np.float16))
    np.save(tmp_path / "y.npy", np.arange(60) % 3)
    options = ["--logits", "z.npy", "--labels", "y.npy", "--out", "out", "--quiet", "--method", "stratified"]
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, *options], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "", done.stdout
    assert len(np.load(tmp_path / "out" / "indices.npy")) == 30


def test_released_pages_of_a_map_are_not_resident_and_can_be_read_again(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(8 << 20))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert mapped.sum() == (8 << 20) * ((8 << 20) - 1) // 2
    before = _resident_files()
    release_pages(mapped[10:])
    assert before - _resident_files() > 32 << 20
    assert mapped[12345] == 12345
    release_pages(np.arange(3))  # no map


def test_a_writable_map_is_not_released(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(5000))
    private = np.load(tmp_path / "a.npy", mmap_mode="c")
    private[3] = 1.0
    release_pages(private)
    assert private[3] == 1.0


def _resident_files() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssFile:"):
            return int(line.split()[1]) * 1024
    raise AssertionError
