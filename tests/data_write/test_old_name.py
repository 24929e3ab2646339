"""Writers that import the module by its former name."""

import subprocess
import sys


def test_a_writer_that_imports_the_former_name_works_and_is_told(tmp_path):
    writer = tmp_path / "old.py"
    writer.write_text(
        '''"""Two classes of noise."""

import numpy as np
from fastkd.data.source import ArrayDataset, WriterOptions


class Options(WriterOptions):
    n: int = 8


def read(options):
    def split(seed):
        images = np.random.default_rng(seed).integers(0, 256, (options.n, 8, 8, 3), dtype=np.uint8)
        return ArrayDataset(images, np.arange(options.n) % 2)

    return {"train": split(0), "val": split(1)}, ["a", "b"]
'''
    )
    command = [sys.executable, "-m", "fastkd.write", str(writer), str(tmp_path / "data"), "workers=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "fastkd.data.source is now fastkd.data.writer_api" in " ".join(done.stderr.split())
