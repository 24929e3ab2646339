"""The project's own errors: the only exceptions that a user is meant to see.

Each says what is wrong, where, what was expected, and how to mend it. Commands print the message, without a
traceback, and exit with the class's ``exit_code``. This module is a leaf: any other may import it.
"""

import errno
import importlib.util

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""The numbers of the OSErrors that a full disk raises."""


class FastkdError(Exception):
    """Something failed that is not the user's input (exit code 1)."""

    exit_code = 1


class InputError(FastkdError):
    """The user's input is wrong: a recipe, an argument, a data set, a checkpoint (exit code 2)."""

    exit_code = 2


class ArtifactError(InputError):
    """An artifact on disk is missing, damaged, of another kind or made from something else (exit code 2)."""


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM); it unwinds as it does on Ctrl-C."""


class HungUp(Terminated):
    """The terminal was closed (SIGHUP); the process unwinds as it does on Ctrl-C."""


class LoaderError(FastkdError):
    """A loader thread failed; raised in the thread that consumes its batches (exit code 1)."""


_MODULES = {"scikit-learn": "sklearn"}
"""Packages whose module has another name."""


def require(purpose: str, *packages: str) -> None:
    """Refuse what needs packages that are not installed: optional dependencies of fastkd.

    Raises
    ------
    InputError
        One of them is missing; it says how to install them.
    """
    missing = [name for name in packages if not _is_installed(_MODULES.get(name, name))]
    if missing:
        raise InputError(f"{purpose} needs {', '.join(missing)}, not installed: pip install {' '.join(missing)}")


def _is_installed(module: str) -> bool:
    """Return whether a module is found. A folder of that name in the working directory, such as wandb's, is none."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None
