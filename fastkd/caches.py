"""Provides cache folders for numba, torch and matplotlib if their default folders are not writable.

Without a writable cache, numba refuses to import a cached function, and torch and matplotlib fail or compile again each
time. This happens, for example, in a container with a random uid, no home directory and a read-only image. `provide`,
which ``import fastkd`` calls, then sets the environment variable of each library to a private temporary folder.

Uses only the standard library, from Python 3.8 on: `fastkd.doctor` loads this file before anything is installed.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from typing import NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))
_USER_VARIABLES = ("LOGNAME", "USER", "LNAME", "USERNAME")
"""Variables that `getpass.getuser` reads before the user entry of the uid."""


class Place(NamedTuple):
    """The cache folder of a library.

    Attributes
    ----------
    what
        The library.
    variable
        The environment variable that sets it.
    usual
        Default folders, of which the library uses the first writable one; empty if it has none.
    read_only_suffices
        Whether an existing folder that is not writable is good enough.
    """

    what: str
    variable: str
    usual: list[str]
    read_only_suffices: bool = False

    @property
    def usable(self) -> bool:
        """Whether the library finds a usable folder by itself."""
        return any(writable(one) or (self.read_only_suffices and os.path.isdir(one)) for one in self.usual)


numba_can_cache = True
"""Whether numba has a cache folder. If not, its functions are compiled in each process (`fastkd.kernels.jit`)."""
moved: list[Place] = []
"""The libraries without a usable default folder."""
moved_to: str | None = None
"""The folder that replaces the defaults. None: there is no temporary folder either."""


def writable(folder: str) -> bool:
    """Return whether a folder is writable, or can be created."""
    while not os.path.lexists(folder):
        parent = os.path.dirname(folder)
        if parent == folder:
            return False
        folder = parent
    effective = os.access in os.supports_effective_ids  # opening a file checks the effective ids
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK, effective_ids=effective)


def _absolute(path: str) -> str:
    try:
        return os.path.abspath(path)
    except OSError:  # the working directory is gone
        return path


def home() -> str | None:
    """Return the home directory. None: there is neither HOME nor a user entry for the uid."""
    found = os.path.expanduser("~")
    return found if os.path.isabs(found) else None


def user() -> str | None:
    """Return the result of `getpass.getuser`. None: it finds no name."""
    named = [os.environ[name] for name in _USER_VARIABLES if os.environ.get(name)]
    if named:
        return named[0]
    try:
        import pwd

        return pwd.getpwuid(os.getuid()).pw_name
    except (ImportError, KeyError):
        return None


def temporary() -> str | None:
    """Return the folder for temporary files, as `tempfile` chooses it. None: there is none."""
    named = [os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP")]
    found = (_absolute(one) for one in (*named, "/tmp", "/var/tmp", "/usr/tmp", ".") if one)
    return next((one for one in found if os.path.isdir(one) and writable(one)), None)


def places() -> list[Place]:
    """Return the cache folder of each library, given the environment of this process."""
    own = os.environ.get
    at_home = home()
    caches = own("XDG_CACHE_HOME") or (at_home and os.path.join(at_home, ".cache"))
    configs = own("XDG_CONFIG_HOME") or (at_home and os.path.join(at_home, ".config"))

    def given(variable: str, *usual: str) -> list[str]:
        chosen = own(variable)
        return [_absolute(chosen)] if chosen else list(usual)

    def inside(base: str | None, *parts: str) -> list[str]:
        return [os.path.join(base, *parts)] if base else []

    numba = [os.path.join(HERE, "kernels", "__pycache__"), *inside(caches, "numba")]
    if own("NUMBA_CACHE_DIR"):  # numba tries the others if it is not writable
        numba = [_absolute(own("NUMBA_CACHE_DIR", "")), *numba]
    matplotlib = [*inside(configs, "matplotlib"), *inside(caches, "matplotlib")]
    if not all(writable(one) for one in matplotlib):  # it needs both
        matplotlib = []
    return [
        Place("numba", "NUMBA_CACHE_DIR", numba),
        Place("matplotlib", "MPLCONFIGDIR", given("MPLCONFIGDIR", *matplotlib)),
        Place("torch.compile", "TORCHINDUCTOR_CACHE_DIR", given("TORCHINDUCTOR_CACHE_DIR", *_inductor())),
        Place("triton", "TRITON_CACHE_DIR", given("TRITON_CACHE_DIR", *inside(at_home, ".triton", "cache")), True),
        Place("torch.hub", "TORCH_HOME", given("TORCH_HOME", *inside(caches, "torch")), True),
        Place("Hugging Face", "HF_HOME", given("HF_HOME", *inside(caches, "huggingface")), True),
    ]


def _inductor() -> list[str]:
    """Return the default folder of torch.compile: named after the user, in the temporary folder."""
    folder, name = temporary(), user()
    if folder is None or name is None:
        return []
    return [os.path.join(folder, "torchinductor_" + "".join("_" if c in '\\/:*?"<>|' else c for c in name))]


def private() -> str | None:
    """Return a private temporary folder of this user; it is created if needed. None: not possible."""
    base = temporary()
    if base is None:
        return None
    folder = os.path.join(base, f"fastkd-cache-{os.getuid()}")
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        found = os.lstat(folder)
    except OSError:
        return None
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return folder if own and writable(folder) else None  # its files are loaded as code


def provide() -> None:
    """Set the cache folders of libraries without a usable default to the private folder."""
    global numba_can_cache, moved_to
    moved.extend(one for one in places() if not one.usable)
    if not moved:
        return
    moved_to = private()
    if moved_to is None:
        numba_can_cache = all(one.what != "numba" for one in moved)
        return
    for one in moved:
        os.environ[one.variable] = os.path.join(moved_to, one.variable.lower())
    numba = sys.modules.get("numba")
    if numba is not None:  # it has read the environment already
        numba.config.CACHE_DIR = os.environ.get("NUMBA_CACHE_DIR", numba.config.CACHE_DIR)


def note() -> str:
    """Return a message about replaced cache folders, and how to choose others; empty if there are none."""
    if not moved:
        return ""
    what, variables = ", ".join(one.what for one in moved), ", ".join(one.variable for one in moved)
    if moved_to is None:
        return (
            f"caches: neither the default folders of {what} nor a temporary folder is writable, so nothing is cached. "
            f"To choose others, set {variables}"
        )
    return (
        f"caches: the default folders of {what} are not writable; {moved_to} is used. To choose others, set {variables}"
    )
