"""What torch.compile makes of the training step for NVIDIA GPUs, compiled without one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from harness import seconds

ROOT = Path(__file__).parent.parent.parent
COMPILER = ROOT / "tests" / "support" / "cuda_compiler.py"
RECIPES = [path for path in sorted((ROOT / "recipes").glob("*.yaml")) if "\nteacher:" in path.read_text()]
"""Those of students."""


def compiled_for(card: str, path: Path) -> dict:
    """Compile in a process of its own: the compiler keeps what it has found out about the device."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, str(COMPILER), str(path), card],
        capture_output=True,
        text=True,
        timeout=seconds(600),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(found: dict, architecture: str) -> None:
    assert all(target.startswith(architecture) for target in found["targets"])
    assert found["targets"]
    assert len(found["forward"]) > 5
    assert len(found["backward"]) > 5
    assert min(found["cubin_bytes"]) > 1000


def test_a_step_becomes_machine_code_of_an_h100():
    found = compiled_for("H100", ROOT / "recipes" / "digits.yaml")
    check(found, "sm_90")
    assert any("batch_norm" in name for name in found["forward"])
    assert any("convolution_backward" in name for name in found["backward"])


@pytest.mark.soak
@pytest.mark.timeout(seconds(700))
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_step_of_every_student_becomes_machine_code(path):
    check(compiled_for("H100", path), "sm_90")


@pytest.mark.soak
@pytest.mark.timeout(seconds(700))
@pytest.mark.parametrize("name", ["quickstart", "rn50_r18"])
def test_a_step_becomes_machine_code_of_an_a100(name):
    check(compiled_for("A100", ROOT / "recipes" / f"{name}.yaml"), "sm_80")
