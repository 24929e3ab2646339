"""FFCV imports, and loads, whether or not there is a distutils."""

import subprocess
import sys

from harness import seconds

WITHOUT_DISTUTILS = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("distutils", "setuptools", "_distutils_hack"):
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

for name in [name for name in sys.modules if name.partition(".")[0] in ("distutils", "setuptools", "_distutils_hack")]:
    del sys.modules[name]
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path if "istutils" not in type(finder).__name__]
"""


def test_ffcv_loads_without_distutils(tiny):
    code = f"""
{WITHOUT_DISTUTILS}
import importlib.util
import numpy as np
from fastkd import artifacts
from fastkd.data.loader import Loader

loader = Loader(artifacts.load({str(tiny.path)!r}, "DATASET"), "train", 16)
print(sum(batch.valid for batch in loader.batches(np.arange(40), last="pad")))
assert importlib.util.find_spec("distutils") is None, "FFCV's import leaves a distutils that is none"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds(120))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "40\n"
