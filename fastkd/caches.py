"""Where numba, torch and matplotlib keep what they compile and fetch, where their usual places cannot be written to.

Without a writable place numba refuses to import a cached function, and torch and matplotlib fail or start anew each
time. A container that runs under a random uid, without a home, from a read-only image, has no such place. `provide`,
which ``import fastkd`` calls, then sets the library's own environment variable to a private temporary folder.

Needs the standard library alone, from Python 3.8 on: `fastkd.doctor` loads this file where nothing is installed.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from typing import NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))
_USER_VARIABLES = ("LOGNAME", "USER", "LNAME", "USERNAME")
"""What `getpass.getuser` looks at before it asks for the entry of the uid."""


class Place(NamedTuple):
    """Where a library keeps its files.

    Attributes
    ----------
    what
        The library.
    variable
        The environment variable that moves it.
    usual
        Folders that it takes, the first that can be written to; empty where it can find none.
    read_only_will_do
        It also works with a folder that is there already and cannot be written to.
    """

    what: str
    variable: str
    usual: list[str]
    read_only_will_do: bool = False

    @property
    def usable(self) -> bool:
        """Tell whether the library finds a place by itself."""
        return any(writable(one) or (self.read_only_will_do and os.path.isdir(one)) for one in self.usual)


numba_can_cache = True
"""Whether numba has a place at all; where not, its functions are compiled in each process (`fastkd.kernels.jit`)."""
moved: list[Place] = []
"""What has no place of its own."""
moved_to: str | None = None
"""Where that was moved; None where there is no temporary folder either."""


def writable(folder: str) -> bool:
    """Tell whether files can be made in a folder, or the folder itself where it is not there yet."""
    while not os.path.lexists(folder):
        parent = os.path.dirname(folder)
        if parent == folder:
            return False
        folder = parent
    effective = os.access in os.supports_effective_ids  # those that opening a file goes by
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK, effective_ids=effective)


def _absolute(path: str) -> str:
    try:
        return os.path.abspath(path)
    except OSError:  # the working directory is gone
        return path


def home() -> str | None:
    """Return the home directory; None where there is neither HOME nor an entry for the uid."""
    found = os.path.expanduser("~")
    return found if os.path.isabs(found) else None


def user() -> str | None:
    """Return what `getpass.getuser` returns; None where it finds no name."""
    named = [os.environ[name] for name in _USER_VARIABLES if os.environ.get(name)]
    if named:
        return named[0]
    try:
        import pwd

        return pwd.getpwuid(os.getuid()).pw_name
    except (ImportError, KeyError):
        return None


def temporary() -> str | None:
    """Return the folder for temporary files, as `tempfile` chooses it; None where there is none."""
    named = [os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP")]
    found = (_absolute(one) for one in (*named, "/tmp", "/var/tmp", "/usr/tmp", ".") if one)
    return next((one for one in found if os.path.isdir(one) and writable(one)), None)


def places() -> list[Place]:
    """Return where each library keeps its files, as this process's environment says."""
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
    if own("NUMBA_CACHE_DIR"):  # it goes on to the others where it cannot write to that one
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
    """Return where torch.compile keeps its files: named after the user, among all temporary files."""
    folder, name = temporary(), user()
    if folder is None or name is None:
        return []
    return [os.path.join(folder, "torchinductor_" + "".join("_" if c in '\\/:*?"<>|' else c for c in name))]


def private() -> str | None:
    """Return a temporary folder that is this user's alone, made if need be; None where there is none."""
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
    return folder if own and writable(folder) else None  # what lies in there is loaded as code


def provide() -> None:
    """Give each library that has no place of its own one in the private folder."""
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
    """Return a line about what was moved, and how to choose another place; empty where nothing was."""
    if not moved:
        return ""
    what, variables = ", ".join(one.what for one in moved), ", ".join(one.variable for one in moved)
    if moved_to is None:
        return (
            f"caches: neither the usual folders of {what} nor a temporary one can be written to; what these compile "
            f"is compiled again each time. To choose others, set {variables}"
        )
    return (
        f"caches: the usual folders of {what} cannot be written to; {moved_to} is used. "
        f"To choose others, set {variables}"
    )
