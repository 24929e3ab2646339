"""A job that does nothing but meet, as quickly as can be: it says "step" at each collective.

    torchrun … steps.py collective|store [STEPS]

``collective``: all-reduces, as a training does; ``store``: all wait for one another in the store. After the last step
it says "publishes", if it may.
"""

import time
from typing import Annotated

import torch
import torch.distributed as dist
import typer

from fastkd import cli, distributed, peer_watch


def main(kind: str, steps: Annotated[int, typer.Argument()] = 10_000) -> None:
    mine = distributed.current()
    peer_watch.GRACE_S = 1.0
    for number in range(steps):
        if kind == "collective":
            dist.all_reduce(torch.ones(1))
        else:
            mine.barrier()
        if number % 10 == 0:
            print(f"process {mine.rank} at step {number}", flush=True)
        time.sleep(0.1)
    mine.raise_failure()
    print(f"process {mine.rank} publishes", flush=True)


if __name__ == "__main__":
    cli.run(main, together=True)
