"""Two machines in one: network and UTS namespaces with a cable between them, and a shared folder that each caches.

Each host has a name, an address, and a view of the shared folder through bindfs, which remembers for some seconds what
was there, what was not, and sizes, as NFS does. What runs on a host is started with `Host.start`.

The namespaces live as long as a process that reads a pipe of this one: they end with it, however it ends.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

NEEDED = ("ip", "unshare", "nsenter", "bindfs")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
ROOT = Path(__file__).parents[2]
_ports = itertools.count(29500)

# Ends when its standard input does.
HOLDER = """
set -e
hostname "$1"
mount --bind "$2" /etc/hosts
ip link set lo up
bindfs -f -o "entry_timeout=$5,attr_timeout=$5,negative_timeout=$5" "$3" "$4" &
while ! mountpoint -q "$4"; do kill -0 $!; sleep 0.05; done
echo ready
cat >/dev/null
kill $!
"""


def why_not() -> str | None:
    """Return why there can be no hosts here; None: there can."""
    if os.geteuid() != 0:
        return "namespaces need root"
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        return f"not installed: {', '.join(missing)}"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "there is no /dev/fuse"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "ip", "link", "add", "type", "veth"], capture_output=True, text=True
    )
    return f"namespaces are not allowed: {tried.stderr.strip()}" if tried.returncode else None


class Running:
    """A process on a host, whose output can be waited for."""

    def __init__(self, process: subprocess.Popen, ended: Callable[[], None] = lambda: None) -> None:
        self.process = process
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def said(self) -> str:
        return "".join(self.lines)

    @property
    def errors(self) -> list[str]:
        """The lines in which fastkd tells an error."""
        return [line.strip() for line in self.lines if line.startswith("error: ")]

    def wait_for(self, text: str, within_s: float) -> None:
        """Wait until it has said something."""
        wait_until(lambda: text in self.said, within_s, lambda: f"it did not say {text!r}: {self.said}", self.process)

    def end(self, within_s: float) -> int:
        """Return its exit code."""
        try:
            code = self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end within {within_s:g} s: {self.said}") from None
        self._reader.join(5)  # its children may have the pipe open
        return code

    def workers(self) -> dict[int, int]:
        """Return the processes that torchrun has started here, by rank."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ranks = {}
        for pid in map(int, children):
            with contextlib.suppress(OSError):
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                for entry in environment:
                    if entry.startswith(b"RANK="):
                        ranks[int(entry[5:])] = pid
        return ranks

    def kill(self) -> None:
        for pid in (*self.workers().values(), self.process.pid) if self.process.poll() is None else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)


def wait_until(
    true: Callable[[], bool],
    within_s: float,
    otherwise: Callable[[], str] = lambda: "it did not happen",
    alive: subprocess.Popen | None = None,
) -> None:
    """Wait until something is so, while a process runs."""
    give_up = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < give_up, otherwise()
        assert alive is None or alive.poll() is None or true(), f"it has ended; {otherwise()}"
        time.sleep(0.05)


class Host:
    """A machine of its own, for all that its processes see of it.

    Parameters
    ----------
    name, address
    hosts
        The file that names all hosts.
    disk, shared
        The shared folder as it is, and where this host sees it.
    caching_s
        How long this host remembers what it has seen of it.
    """

    def __init__(self, name: str, address: str, hosts: Path, disk: Path, shared: Path, caching_s: float) -> None:
        self.name, self.address = name, address
        self._running: list[Running] = []
        self.holder = subprocess.Popen(
            [
                *("unshare", "--net", "--uts", "--mount", "--propagation", "private", "sh", "-c", HOLDER, "holder"),
                *(name, str(hosts), str(disk), str(shared), f"{caching_s:g}"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.holder.stdout is not None
        assert self.holder.stdout.readline() == "ready\n", f"{name} did not come up"

    def run(self, *arguments: str) -> None:
        """Run a command in its network."""
        subprocess.run(["nsenter", f"--net=/proc/{self.holder.pid}/ns/net", *arguments], check=True)

    def start(self, *arguments: str | Path, env: Mapping[str, str] = {}) -> Running:
        """Start a command on it."""
        process = subprocess.Popen(
            ["nsenter", "-t", str(self.holder.pid), "--net", "--uts", "--mount", "--wdns=.", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", **env},
        )
        self._running.append(Running(process))
        return self._running[-1]

    def close(self) -> None:
        for one in self._running:
            one.kill()
        assert self.holder.stdin is not None
        self.holder.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.holder.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.holder.pid, signal.SIGKILL)  # bindfs, too


class Hosts:
    """Two hosts with a cable between them: number 0 of a job runs on the first.

    Attributes
    ----------
    disk : Path
        The shared folder as it is.
    shared : Path
        Where both hosts see it.
    """

    def __init__(self, folder: Path, caching_s: float = 8.0) -> None:
        self.disk, self.shared = folder / "disk", folder / "shared"
        for made in (self.disk, self.shared):
            made.mkdir()
        names = folder / "hosts"
        places = {"nodea": "10.77.0.1", "nodeb": "10.77.0.2"}
        names.write_text("127.0.0.1 localhost\n" + "".join(f"{at} {name}\n" for name, at in places.items()))
        self.all: list[Host] = []
        try:
            for name, address in places.items():
                self.all.append(Host(name, address, names, self.disk, self.shared, caching_s))
            ends = [f"fk{uuid.uuid4().hex[:10]}" for _ in range(2)]
            subprocess.run(["ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1]], check=True)
            for host, end in zip(self.all, ends, strict=True):
                subprocess.run(["ip", "link", "set", end, "netns", str(host.holder.pid)], check=True)
                host.run("ip", "link", "set", end, "name", "cable")
                host.run("ip", "addr", "add", f"{host.address}/24", "dev", "cable")
                host.run("ip", "link", "set", "cable", "up")
        except BaseException:
            self.close()
            raise

    def cut(self) -> None:
        """Cut the cable: nothing that is sent arrives, and nobody is told."""
        self.all[1].run("ip", "link", "set", "cable", "down")

    def mend(self) -> None:
        """Mend the cable."""
        self.all[1].run("ip", "link", "set", "cable", "up")

    def torchrun(
        self,
        *arguments: str | Path,
        each: Sequence[Sequence[str | Path]] = ((), ()),
        options: Sequence[str] = (),
        env: Mapping[str, str] = {},
    ) -> list[Running]:
        """Start a job of one process on each host.

        Parameters
        ----------
        *arguments
            What torchrun runs, and what that gets; `each` adds arguments of the host's own.
        options
            Of torchrun.
        """
        meeting = ("--rdzv-id", uuid.uuid4().hex, "--rdzv-backend", "c10d")
        endpoint = f"{self.all[0].name}:{next(_ports)}"
        return [
            host.start(
                *TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", *meeting, "--rdzv-endpoint", endpoint, *options,
                *arguments, *own, env=env,
            )
            for host, own in zip(self.all, each, strict=True)
        ]  # fmt: skip

    def close(self) -> None:
        """Remove everything; to be called whatever happens."""
        for host in self.all:
            host.close()


def events_in(folder: Path) -> list[dict]:
    """Return what the only student in a folder of runs has written to its metrics so far."""
    files = list(folder.glob("student-*/metrics.jsonl"))
    return [json.loads(line) for line in files[0].read_text().splitlines()] if files else []
