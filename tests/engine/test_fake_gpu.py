"""torch's own CUDA code on a GPU that computes nothing: what the host launches, captures and waits for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fake_gpu
import pytest
from harness import seconds

from fastkd.engine.prefetch import BUFFERS

pytestmark = pytest.mark.skipif(bool(fake_gpu.missing()), reason=fake_gpu.missing())
RECIPES = Path(__file__).parents[2] / "recipes"
STEPS = Path(fake_gpu.__file__).with_name("fake_gpu_steps.py")
COMPILED = [
    path.stem for path in sorted(RECIPES.glob("*.yaml")) if "teacher" not in path.stem and path.stem != "digits"
]
PER_BATCH = ["images", "labels", "sample_ids", "stored rows"]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory) -> Path:
    return fake_gpu.build(tmp_path_factory.mktemp("fake_gpu"))


def run(libraries, arguments, log=None, **options) -> str:
    """Run Python with arguments where there are fake GPUs; return what it prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | fake_gpu.environment(libraries, log=log, **options)
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds(280),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def counts_in(log) -> list[dict[str, int]]:
    """Return the counts of the processes that used a GPU, by rank."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return sorted((line for line in lines if line["launches"]), key=lambda line: line["rank"])


def steps(libraries, *arguments, **options) -> dict:
    """Return what `fake_gpu_steps` prints of a recipe's steps, and print it for ``pytest -s``."""
    found = json.loads(run(libraries, [STEPS, *arguments], **options).splitlines()[-1])
    print(f"\n{arguments[0].stem} {' '.join(arguments[1:])}: {found}")
    return found


def test_a_step_is_a_graph_the_copies_of_its_batch_and_its_learning_rate(libraries):
    """The host's part of a step: no waiting, and a small part of the time of launching each kernel."""
    graph = steps(libraries, RECIPES / "cifar100_resnet32x4_resnet8x4.yaml", "train.compile=false")
    eager = steps(
        libraries, RECIPES / "cifar100_resnet32x4_resnet8x4.yaml", "train.compile=false", "train.cuda_graph=false"
    )
    assert (graph["launches"], graph["graph_launches"], graph["copies"]) == ([1], [1], [len(PER_BATCH)])
    assert graph["synchronisations"] == eager["synchronisations"] == [0]
    assert (eager["graph_launches"], eager["copies"]) == ([0], [len(PER_BATCH)])
    assert min(eager["launches"]) > 100
    assert graph["host_us"] < eager["host_us"] / 3


def test_a_recipe_is_trained_on_one_gpu_as_graphs(libraries, tiny_recipe, tmp_path):
    """Six epochs of six batches. Scoring, the loader's copies, resident images and the evaluation are part of it."""
    log = tmp_path / "counts"
    said = run(libraries, ["-m", "fastkd.train", tiny_recipe.path, "train.device=cuda", "train.precision=auto"], log)
    (found,) = counts_in(log)
    assert "on cuda:0 in bf16" in said
    assert found["errors"] == 0, said
    assert 1 < found["captures"] <= BUFFERS
    assert found["graph_launches"] > 10


def test_two_processes_capture_their_all_reduce(libraries, tiny_recipe, tmp_path):
    """That of DistributedDataParallel over NCCL, after eager steps. Each process has a context on its own GPU only."""
    log = tmp_path / "counts"
    said = run(
        libraries,
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fastkd.train", tiny_recipe.path,
         "train.device=cuda", "train.precision=auto", "train.batch_size=24", "train.cuda_graph=true"],
        log, gpus=2,
    )  # fmt: skip
    found = counts_in(log)
    assert [one["rank"] for one in found] == [0, 1]
    for one in found:
        assert (one["errors"], one["contexts"]) == (0, 1), said
        assert one["captured_collectives"] == one["captures"] > 0, said
        assert one["graph_launches"] > 10
    assert "Grad strides do not match" not in said


@pytest.mark.soak
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", COMPILED)
def test_the_step_of_a_recipe_is_compiled_for_the_card(libraries, monkeypatch, tmp_path, name, capability):
    """By inductor, Triton and ptxas; one graph launches all of it."""
    environment = fake_gpu.environment
    own_cache = {"TRITON_CACHE_DIR": str(tmp_path)}
    monkeypatch.setattr(fake_gpu, "environment", lambda *given, **more: environment(*given, **more) | own_cache)
    found = steps(libraries, RECIPES / f"{name}.yaml", "train.precision=bf16", capability=capability)
    (target,) = found["kernels"]
    assert target.startswith(f"sm_{capability}")
    assert found["kernels"][target] > 50
    assert found["graph"]
    assert (found["launches"], found["graph_launches"], found["synchronisations"]) == ([1], [1], [0])
