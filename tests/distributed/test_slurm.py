"""The batch file of docs/scaling.md, run as it stands there: by stand-ins for srun and scontrol, on two hosts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness import seconds
from hosts import ROOT

from fastkd import artifacts


@pytest.fixture
def slurm(two_hosts, tmp_path):
    """Return the environment of a batch file: its job's variables, and a PATH where its commands stand."""
    commands = tmp_path / "bin"
    commands.mkdir()
    enter = " ".join(("nsenter", "--net", "--uts", "--mount", "--wdns=."))
    starts = "\n".join(f'{enter} -t {host.holder.pid} "$@" & tasks="$tasks $!"' for host in two_hosts.all)
    scripts = {
        "srun": f"{starts}\ncode=0\nfor task in $tasks; do wait $task || code=$?; done\nexit $code",
        "scontrol": '[ "$*" = "show hostnames node[a-b]" ] && printf "%s\\n" nodea nodeb',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }
    for name, script in scripts.items():
        (commands / name).write_text(f"#!/bin/sh\n{script}\n")
        (commands / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[a-b]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "77"}
    return os.environ | job | {"PATH": f"{commands}:{os.environ['PATH']}"}


@pytest.mark.soak
@pytest.mark.timeout(seconds(600))
def test_the_batch_file_of_the_documentation_trains_on_two_machines(two_hosts, slurm, recipe_in, tmp_path):
    page = (ROOT / "docs" / "scaling.md").read_text()
    (batch,) = [text for text in re.findall(r"```bash\n(.*?)```", page, re.S) if "#SBATCH" in text]
    recipe = recipe_in(two_hosts.disk)
    exchanged = {
        "--nproc-per-node 8": "--nproc-per-node 1",  # there are no GPUs
        "OMP_NUM_THREADS=7": "OMP_NUM_THREADS=1",
        "mine.yaml": f"{recipe.path} train.epochs=1 train.batch_size=24",
        "/shared/": f"{two_hosts.shared}/",
    }
    for old, new in exchanged.items():
        assert batch.count(old)
        batch = batch.replace(old, new)
    file = tmp_path / "job.sbatch"
    file.write_text(batch)
    done = subprocess.run(
        ["bash", str(file)], env=slurm, cwd=ROOT, capture_output=True, text=True, timeout=seconds(500), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (path for path in (two_hosts.disk / "runs").glob("student-*") if not path.name.endswith(artifacts.PARTIAL))
    artifacts.verify(artifacts.load(run, "RUN"))
    assert f"RUN: {two_hosts.shared / 'runs' / run.name}" in done.stdout
    assert '"processes": 2' in (Path(run) / "env.json").read_text()
