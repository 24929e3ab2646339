"""Reading weights from the files that people have.

Nothing that a file holds is ever run: a pickle is read by torch's restricted reader, which knows tensors and plain
values, widened only by stand-ins that do nothing.
"""

import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from fastkd import artifacts, console
from fastkd.errors import InputError

State = Mapping[str, torch.Tensor]

PICKLES = (".pth", ".pt", ".tar", ".ckpt")
# Where training scripts keep the weights; the average of them first, as timm does.
EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "ema")
STATE_KEYS = (
    *("state_dict", "model", "model_state_dict", "net", "network", "module", "params", "weights"),
    *("student", "teacher", "student_state_dict", "teacher_state_dict"),
)
MAX_NESTED = 3


def is_run(path: str | Path) -> bool:
    """Tell whether an artifact lies at `path`; whether it is a RUN, and whole, `artifacts.load` says."""
    return (Path(path) / artifacts.MANIFEST).is_file()


def read_file(path: Path) -> State:
    """Return the state_dict, on the CPU, that a file holds, bare or inside a training script's checkpoint.

    Raises
    ------
    InputError
        The file is damaged, holds anything that would have to be run, or holds no state_dict.
    """
    if path.suffix == ".safetensors":
        try:
            state = safetensors.torch.load_file(path)
        except Exception as error:  # of a damaged header, torch's own among them
            raise InputError(
                f"{path}: not a whole safetensors file ({reason(error)}). Copy or download it again."
            ) from None
        return unwrapped(_state_dict(state, path))
    if path.suffix not in PICKLES:
        expected = f".safetensors, {', '.join(PICKLES)} or a RUN directory"
        raise InputError(f"{path}: unknown kind of weights; expected {expected}")
    return unwrapped(_state_dict(_unpickle(path), path))


def takes_average(path: Path) -> bool:
    """Tell whether what `read_file` takes of a checkpoint is a moving average of its weights."""
    if path.suffix not in PICKLES:
        return False
    where = next((where for where, _ in _states(_unpickle(path))), "")
    return where.split(".")[0] in EMA_KEYS


def unwrapped(state: State) -> State:
    """Strip what DataParallel, DDP and ``torch.compile`` put before every name."""
    prefixes = ("module.", "_orig_mod.")
    while state and (prefix := next((p for p in prefixes if all(k.startswith(p) for k in state)), None)):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


class _Beside:
    """Stands in for a harmless object beside the weights: takes whatever it is given and keeps nothing of it."""

    def __new__(cls, *args: Any) -> "_Beside":
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _stand_in(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return type(name, (_Beside,), {"__module__": module})


# What training scripts keep beside the weights: their arguments, their best accuracy. None of it is wanted, so not even
# these classes' own code is run.
BESIDE = [
    _stand_in(path)
    for path in (
        "argparse.Namespace",
        "pathlib.PosixPath",
        "pathlib.WindowsPath",
        "pathlib._local.PosixPath",
        "pathlib._local.WindowsPath",
        "_codecs.encode",
        "numpy.dtype",
        "numpy.ndarray",
        "numpy.core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct",
    )
]


def _refuse_compressed(path: Path) -> None:
    """Refuse a zip file that is larger inside than it is itself: torch writes none, and a few MB can hold terabytes."""
    try:
        with zipfile.ZipFile(path) as packed:
            members = packed.infolist()
    except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile):
        return  # no zip file, or a damaged one, of which torch tells
    inflated, size = sum(member.file_size for member in members), path.stat().st_size
    if inflated > size or any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise InputError(
            f"{path}: a zip file with compressed or overlapping members ({size:,} bytes, {inflated:,} inside); "
            "torch.save writes none. Write it again with torch.save, or give the file as it was downloaded."
        )


def _unpickle(path: Path) -> Any:
    _refuse_compressed(path)
    try:
        with torch.serialization.safe_globals(BESIDE):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes fail the reader in any way there is
        if foreign := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise InputError(
                f"{path}: holds objects other than tensors ({foreign[1]}); loading those would run code from the file. "
                "If you trust it, convert it once, where it was made: safetensors.torch.save_file(STATE_DICT, "
                "'weights.safetensors'), with the state_dict out of torch.load(FILE, weights_only=False)."
            ) from None
        raise InputError(
            f"{path}: not a whole torch checkpoint ({reason(error)}). Copy or download it again."
        ) from None


def _state_dict(checkpoint: Any, path: Path) -> State:
    """Find the weights in what a file holds; warn where others could be meant as well."""
    found = list(_states(checkpoint))
    if not found:
        inside = checkpoint if isinstance(checkpoint, dict) else {}
        names = ", ".join(str(key) for key in list(inside)[:5]) or type(checkpoint).__name__
        expected = f"one (entry name → tensor) bare or under {', '.join((*STATE_KEYS, *EMA_KEYS))}"
        raise InputError(f"{path}: holds no state_dict; expected {expected}, found {names}")
    (where, state), *others = found
    entries = unwrapped(state).keys()
    if rivals := [name for name, other in others if unwrapped(other).keys() == entries]:
        average = ", an exponential moving average of the others" if where.split(".")[0] in EMA_KEYS else ""
        console.warn(
            f"weights: {path} holds weights under {' and under '.join(repr(name) for name in (where, *rivals))}: those "
            f"under {where!r} are used{average}. For others save them alone: torch.save(checkpoint[{rivals[0]!r}], …)"
        )
    return state


def _states(value: Any, where: str = "", depth: int = 0) -> Iterator[tuple[str, State]]:
    """Yield every state_dict in what a file holds with the keys that lead to it, the one to be taken first."""
    if not isinstance(value, dict) or not value or depth > MAX_NESTED:
        return

    def inner(keys: tuple[str, ...]) -> Iterator[tuple[str, State]]:
        for key in keys:
            if isinstance(value.get(key), dict):
                yield from _states(value[key], f"{where}.{key}" if where else key, depth + 1)

    yield from inner(EMA_KEYS)
    yield from inner(STATE_KEYS)
    entries = {key: one for key, one in value.items() if isinstance(key, str) and _is_plain(one)}
    entries.pop("n_averaged", None)  # torch's AveragedModel counts with it
    others = [one for key, one in value.items() if key not in entries and key != "n_averaged"]
    # What stands beside the entries: "epoch", an optimizer. A tensor that cannot be read is an entry that is missing.
    is_state = bool(entries) and not any(isinstance(one, torch.Tensor) for one in others)
    if is_state and (not others or any("." in key and one.dim() for key, one in entries.items())):
        yield where, entries


def _is_plain(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"  # else it is a meta tensor, without values
        and not value.is_quantized
    )


def reason(error: Exception) -> str:
    """Return the first line of what went wrong: torch adds pages of advice."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
