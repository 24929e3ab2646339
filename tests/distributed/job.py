"""What a torchrun job of the tests does: some stages, one after another, since starting one takes longer than they do.

    torchrun … job.py '[{"stage": "train", "recipe": "student.yaml", "overrides": ["seed=1"]}, …]'

Each may have `stop_after` (steps after which training is asked to stop), `pause_s` (before each step), and `apart`:
overrides of each process of its own.
"""

import json
import time

from fastkd import cli, distributed, pipeline, process_group, recipe
from fastkd.engine import epoch
from fastkd.stages import training


class StopsAfter(distributed.AsyncAny):
    """A flag that one process sets at a given step."""

    def __init__(self, group: distributed.ProcessGroup, steps: int) -> None:
        self.left, process_group.EXCHANGE_EVERY_S = steps, 0.0  # at each step
        super().__init__(group, self._is_over)

    def _is_over(self) -> bool:
        self.left -= 1
        return self.left <= 0 and self._group.rank == self._group.size - 1


def main(jobs: str) -> None:
    real_step, real_flag = epoch.train_step, distributed.AsyncAny
    for one in json.loads(jobs):
        apart = one.get("apart", [[]] * distributed.current().size)[distributed.current().rank]
        pause_s, stop_after = one.get("pause_s", 0.0), one.get("stop_after")

        def step(*given, pause_s=pause_s):
            time.sleep(pause_s)
            return real_step(*given)

        epoch.train_step = step
        training.AsyncAny = real_flag if stop_after is None else lambda group, flag, n=stop_after: StopsAfter(group, n)
        try:
            getattr(pipeline, one["stage"])(recipe.load(one["recipe"], [*one["overrides"], *apart]))
        except KeyboardInterrupt:
            if stop_after is None:
                raise


if __name__ == "__main__":
    cli.run(main, together=True)
