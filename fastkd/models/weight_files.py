"""Reading weights from files.

No code in a file is executed: pickles are read by torch's restricted unpickler, which accepts tensors and plain values;
other known classes are replaced by inert placeholders.
"""

import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from fastkd import artifacts
from fastkd.errors import InputError

State = Mapping[str, torch.Tensor]
States = Sequence[tuple[str, State]]
"""The state_dicts in a checkpoint with their keys, the preferred one first."""

PICKLES = (".pth", ".pt", ".tar", ".ckpt")
# Keys under which training scripts store weights; moving averages first, as in timm.
EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "ema")
STATE_KEYS = (
    *("state_dict", "model", "model_state_dict", "net", "network", "module", "params", "weights"),
    *("student", "teacher", "student_state_dict", "teacher_state_dict"),
)
MAX_NESTED = 3


def is_run(path: str | Path) -> bool:
    """Return whether there is an artifact at `path`. `artifacts.load` verifies it."""
    return (Path(path) / artifacts.MANIFEST).is_file()


def read_file(path: Path) -> States:
    """Return the state_dicts in a file, on the CPU: bare (its key is empty), or in the checkpoint of a training script.

    Raises
    ------
    InputError
        The file is damaged, contains objects whose loading would execute code, or contains no state_dict.
    """
    if path.suffix == ".safetensors":
        try:
            state = safetensors.torch.load_file(path)
        except Exception as error:  # a damaged header raises various errors
            raise InputError(
                f"{path}: not a whole safetensors file ({reason(error)}). Copy or download it again."
            ) from None
        return _state_dicts(state, path)
    if path.suffix not in PICKLES:
        expected = f".safetensors, {', '.join(PICKLES)} or a RUN directory"
        raise InputError(f"{path}: unknown kind of weights; expected {expected}")
    return _state_dicts(_unpickle(path), path)


def takes_average(path: Path) -> bool:
    """Return whether a moving average of the weights is preferred in a checkpoint."""
    if path.suffix not in PICKLES:
        return False
    where = next((where for where, _ in _states(_unpickle(path))), "")
    return where.split(".")[0] in EMA_KEYS


def unwrapped(state: State) -> State:
    """Remove the prefixes of DataParallel, DDP and ``torch.compile`` from all names."""
    prefixes = ("module.", "_orig_mod.")
    while state and (prefix := next((p for p in prefixes if all(k.startswith(p) for k in state)), None)):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


class _Beside:
    """Placeholder for a harmless object in a checkpoint: it accepts any arguments and discards them."""

    def __new__(cls, *args: Any) -> "_Beside":
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _stand_in(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return type(name, (_Beside,), {"__module__": module})


# Classes of objects that training scripts store with the weights, such as arguments. They are not needed, so that even
# the code of these classes is not executed.
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
    """Refuse zip files with compressed members: torch writes none, and a few MB can expand to terabytes."""
    try:
        with zipfile.ZipFile(path) as packed:
            members = packed.infolist()
    except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile):
        return  # not a zip file, or a damaged one, which torch reports
    if any(member.filename.endswith("/constants.pkl") for member in members):
        return  # a TorchScript program, which torch refuses before it reads more
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
    except Exception as error:  # damaged bytes raise various errors
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        if foreign or "TorchScript" in str(error):
            load = "torch.jit.load(FILE)" if foreign is None else "torch.load(FILE, weights_only=False)"
            raise InputError(
                f"{path}: holds objects other than tensors ({foreign[1] if foreign else 'a TorchScript program'}); "
                "loading those would run code from the file. If you trust it, save its state_dict once, where it was "
                f"made: net = {load}; torch.save(net.state_dict(), 'weights.pth'). For a checkpoint that is a mapping, "
                "take the state_dict, or the net, out of it: torch.save(net['model'], 'weights.pth')."
            ) from None
        raise InputError(
            f"{path}: not a whole torch checkpoint ({reason(error)}). Copy or download it again."
        ) from None


def _state_dicts(checkpoint: Any, path: Path) -> States:
    """Return the weights in a checkpoint, at least one."""
    found = [(where, unwrapped(state)) for where, state in _states(checkpoint)]
    if not found:
        inside = checkpoint if isinstance(checkpoint, dict) else {}
        names = ", ".join(str(key) for key in list(inside)[:5]) or type(checkpoint).__name__
        expected = f"one (entry name → tensor) bare or under {', '.join((*STATE_KEYS, *EMA_KEYS))}"
        raise InputError(f"{path}: holds no state_dict; expected {expected}, found {names}")
    return found


def _states(value: Any, where: str = "", depth: int = 0) -> Iterator[tuple[str, State]]:
    """Yield the state_dicts in a checkpoint with their keys, the preferred one first."""
    if not isinstance(value, dict) or not value or depth > MAX_NESTED:
        return

    def inner(keys: tuple[str, ...]) -> Iterator[tuple[str, State]]:
        for key in keys:
            if isinstance(value.get(key), dict):
                yield from _states(value[key], f"{where}.{key}" if where else key, depth + 1)

    yield from inner(EMA_KEYS)
    yield from inner(STATE_KEYS)
    entries = {key: one for key, one in value.items() if isinstance(key, str) and _is_plain(one)}
    entries.pop("n_averaged", None)  # counter of torch's AveragedModel
    others = [one for key, one in value.items() if key not in entries and key != "n_averaged"]
    # Other values, such as "epoch" or an optimizer, are allowed. A tensor that cannot be read is a missing entry.
    is_state = bool(entries) and not any(isinstance(one, torch.Tensor) for one in others)
    if is_state and (not others or any("." in key and one.dim() for key, one in entries.items())):
        yield where, entries


def _is_plain(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"  # a meta tensor has no values
        and not value.is_quantized
    )


def reason(error: Exception) -> str:
    """Return the first line of an error message; torch adds pages of advice."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
