"""Errors for users. Each message says what is wrong, where, what was expected, and how to fix it.

Commands print the message without a traceback, and exit with the ``exit_code`` of the class. This module imports no
other module of fastkd.
"""

import errno
import importlib.util

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Values of ``OSError.errno`` for a full disk."""


class FastkdError(Exception):
    """Something failed that is not the user's input (exit code 1)."""

    exit_code = 1


class InputError(FastkdError):
    """The user's input is wrong: a recipe, an argument, a data set, a checkpoint (exit code 2)."""

    exit_code = 2


class ArtifactError(InputError):
    """An artifact on disk is missing, damaged, of another kind or made from something else (exit code 2)."""


class Terminated(KeyboardInterrupt):
    """The process received SIGTERM. It is handled like Ctrl-C."""


class HungUp(Terminated):
    """The terminal was closed (SIGHUP). It is handled like Ctrl-C."""


class LoaderError(FastkdError):
    """A loader thread failed; raised in the thread that consumes its batches (exit code 1)."""


_MODULES = {"scikit-learn": "sklearn"}
"""Names of modules that differ from those of their packages."""


def require(purpose: str, *packages: str) -> None:
    """Check that optional dependencies are installed.

    Raises
    ------
    InputError
        A package is missing; the message says how to install it.
    """
    missing = [name for name in packages if not _is_installed(_MODULES.get(name, name))]
    if missing:
        raise InputError(f"{purpose} needs {', '.join(missing)}, not installed: pip install {' '.join(missing)}")


def _is_installed(module: str) -> bool:
    """Return whether a module is found. A folder of that name in the working directory, such as wandb's, is none."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None
