"""How the processes of a job find one another in the key-value store of torchrun.

With ``--max-restarts`` the store outlives the processes and still holds the keys of earlier starts, and
TORCHELASTIC_RESTART_COUNT differs between machines. So process 0 draws a start number from a counter in the store. Each
other process publishes a random name, and process 0 sends the start number to that name: a process cannot receive the
number of an earlier start.
"""

import json
import time
import uuid
from collections.abc import Mapping
from typing import Any

from fastkd.errors import FastkdError
from fastkd.peer_watch import RESUME_HINT

_POLL_S = 0.05


def meet(
    store: Any, rank: int, size: int, about: Mapping[str, Any], *, within_s: float
) -> tuple[int, list[dict[str, Any]]]:
    """Return the start number, equal on all processes, and the descriptions of all processes by rank.

    Parameters
    ----------
    store
        The key-value store; it may hold the keys of earlier starts.
    about
        Description of this process, serialisable as JSON.

    Raises
    ------
    FastkdError
        A process is missing; process 0 names which.
    """
    deadline = time.monotonic() + within_s
    if rank == 0:
        return _meet_as_main(store, size, about, deadline, within_s)
    name = uuid.uuid4().hex
    store.set(f"here/{rank}", name)
    late = f"process 0 did not join within {within_s:g} s; {RESUME_HINT}"
    number = int(_wait(store, f"number/{name}", deadline, late))
    store.set(f"joined/{number}/{rank}", json.dumps(about))
    members = json.loads(_wait(store, f"all/{number}", deadline + 5 * _POLL_S, late))
    if isinstance(members, str):  # the error of process 0
        raise FastkdError(members)
    return number, members


def _meet_as_main(
    store: Any, size: int, about: Mapping[str, Any], deadline: float, within_s: float
) -> tuple[int, list[dict[str, Any]]]:
    number = store.add("starts", 1)
    sent_to: dict[int, bytes] = {}
    joined: dict[int, dict[str, Any]] = {0: dict(about)}
    while len(joined) < size:
        for rank in (rank for rank in range(size) if rank not in joined):
            if store.check([f"here/{rank}"]) and sent_to.get(rank) != (name := store.get(f"here/{rank}")):
                sent_to[rank] = name
                store.set(f"number/{name.decode()}", str(number))
            if store.check([f"joined/{number}/{rank}"]):
                joined[rank] = json.loads(store.get(f"joined/{number}/{rank}"))
        if len(joined) < size and time.monotonic() > deadline:
            missing = ", ".join(str(rank) for rank in range(size) if rank not in joined)
            late = f"process {missing} of {size} did not join within {within_s:g} s; {RESUME_HINT}"
            store.set(f"all/{number}", json.dumps(late))
            raise FastkdError(late)
        time.sleep(_POLL_S)
    members = [joined[rank] for rank in range(size)]
    store.set(f"all/{number}", json.dumps(members))
    return number, members


def _wait(store: Any, key: str, deadline: float, late: str) -> bytes:
    while not store.check([key]):
        if time.monotonic() > deadline:
            raise FastkdError(late)
        time.sleep(_POLL_S)
    return bytes(store.get(key))
