"""How the processes of a job find one another in the key-value store of torchrun.

With ``--max-restarts`` the store outlives the processes: it holds what those of earlier starts left, and the number of
restarts that torchrun gives (TORCHELASTIC_RESTART_COUNT) differs between machines. So process 0 draws the number of the
start from the store, and hands it to each of the others by the name that this one drew for itself: a number of an
earlier start can reach nobody.
"""

import json
import time
import uuid
from collections.abc import Mapping
from typing import Any

from fastkd.errors import FastkdError
from fastkd.peer_watch import AGAIN

_LOOK_EVERY_S = 0.05


def meet(
    store: Any, rank: int, size: int, about: Mapping[str, Any], *, within_s: float
) -> tuple[int, list[dict[str, Any]]]:
    """Return the number of this start, the same in all processes, and what each tells about itself, by rank.

    Parameters
    ----------
    store
        Shared by all processes, of earlier starts too.
    about
        As JSON takes it.

    Raises
    ------
    FastkdError
        Not all processes came in time; process 0 names those that are missing.
    """
    give_up = time.monotonic() + within_s
    if rank == 0:
        return _lead(store, size, about, give_up, within_s)
    name = uuid.uuid4().hex
    store.set(f"here/{rank}", name)
    late = f"process 0 did not come within {within_s:g} s of the start; {AGAIN}"
    number = int(_wait(store, f"number/{name}", give_up, late))
    store.set(f"joined/{number}/{rank}", json.dumps(about))
    told = json.loads(_wait(store, f"all/{number}", give_up + 5 * _LOOK_EVERY_S, late))
    if isinstance(told, str):
        raise FastkdError(told)
    return number, told


def _lead(
    store: Any, size: int, about: Mapping[str, Any], give_up: float, within_s: float
) -> tuple[int, list[dict[str, Any]]]:
    number = store.add("starts", 1)
    given: dict[int, bytes] = {}
    joined: dict[int, dict[str, Any]] = {0: dict(about)}
    while len(joined) < size:
        for rank in (rank for rank in range(size) if rank not in joined):
            if store.check([f"here/{rank}"]) and given.get(rank) != (name := store.get(f"here/{rank}")):
                given[rank] = name
                store.set(f"number/{name.decode()}", str(number))
            if store.check([f"joined/{number}/{rank}"]):
                joined[rank] = json.loads(store.get(f"joined/{number}/{rank}"))
        if len(joined) < size and time.monotonic() > give_up:
            missing = ", ".join(str(rank) for rank in range(size) if rank not in joined)
            late = f"process {missing} of {size} did not come within {within_s:g} s of the start; {AGAIN}"
            store.set(f"all/{number}", json.dumps(late))
            raise FastkdError(late)
        time.sleep(_LOOK_EVERY_S)
    everybody = [joined[rank] for rank in range(size)]
    store.set(f"all/{number}", json.dumps(everybody))
    return number, everybody


def _wait(store: Any, key: str, give_up: float, late: str) -> bytes:
    while not store.check([key]):
        if time.monotonic() > give_up:
            raise FastkdError(late)
        time.sleep(_LOOK_EVERY_S)
    return bytes(store.get(key))
