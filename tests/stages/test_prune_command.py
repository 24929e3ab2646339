"""The command ``fastkd.prune --logits``: what it imports, and the memory that it needs."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastkd import artifacts
from fastkd.artifacts import file_digest, release_pages
from fastkd.recipe import Prune
from fastkd.stages import row_scores
from fastkd.stages.pruning import prune_arrays

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


def test_coverage_has_its_own_quota(tmp_path, monkeypatch):
    z_NK = np.random.default_rng(0).normal(size=(90, 3)).astype(np.float16)
    monkeypatch.chdir(tmp_path)
    np.save("z.npy", z_NK)
    np.save("y.npy", np.arange(90) % 3)
    expected, _ = prune_arrays(Path("z.npy"), Path("y.npy"), Path("expected"), Prune(keep_ratio=0.5))
    assert expected.manifest.inputs["quota"] == "global"
    command = [sys.executable, "-m", "fastkd.prune", "--logits", "z.npy", "--labels", "y.npy", "--out", "named"]
    subprocess.run([*command, "--method", "coverage"], capture_output=True, check=True)
    np.testing.assert_array_equal(np.load("named/indices.npy"), expected.array("indices.npy"))


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


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_chunks_do_not_change_what_is_selected_and_stored(tmp_path, monkeypatch, dtype, order):
    z_NK = np.random.default_rng(0).normal(size=(200, 5)).astype(dtype)
    logits, labels = tmp_path / "z.npy", tmp_path / "y.npy"
    np.save(logits, np.asarray(z_NK, order=order))
    np.save(labels, np.arange(200) % 5)
    with logits.open("ab") as stream:
        stream.write(b"beyond the array")  # belongs to the file, and to its checksum
    whole, _ = prune_arrays(logits, labels, tmp_path / "whole", Prune(keep_ratio=0.5))
    monkeypatch.setattr(row_scores, "CHUNK_BYTES", 13 * z_NK[:1].nbytes)
    chunked, _ = prune_arrays(logits, labels, tmp_path / "chunked", Prune(keep_ratio=0.5))
    assert chunked.manifest.inputs["logits"] == file_digest(logits)
    assert chunked.key == whole.key
    assert chunked.manifest.files == whole.manifest.files
    artifacts.verify(chunked)
    assert chunked.cost_s > 0
    again, built = prune_arrays(logits, labels, tmp_path / "chunked", Prune(keep_ratio=0.5))
    assert (again.key, built) == (whole.key, False)


def _resident_files() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssFile:"):
            return int(line.split()[1]) * 1024
    raise AssertionError
