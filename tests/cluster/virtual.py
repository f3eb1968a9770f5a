"""A cluster on one machine: nodes are namespaces, joined by rate-limited links through a switch. Needs root.

Each node is a process that does nothing but hold a network, a host name and mounts of its own: an interface eth0, an
/etc/hosts that knows all nodes, a /sys that shows this network alone, and an empty /dev/shm, so that two nodes never
share memory by accident. Whatever enters a node sees that. When the holders end, all of it is gone.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.jobs import REPOSITORY, Finished, communicate, find_mpirun, is_open_mpi

ROOMS = ("--net", "--uts", "--ipc", "--mount")
"""What a node has of its own, as unshare and nsenter name it."""
TOOLS = ("ip", "tc", "nsenter", "unshare", "setpriv")
BURST_BYTES = 70_000
"""A link's bucket: the least that lets 64 kB, which the kernel handles as one packet, through in one piece."""


def why_not() -> str | None:
    """Return why there can be no cluster here, or None."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"needs {', '.join(missing)} (Debian: iproute2, util-linux)" if missing else None


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


class Cluster:
    """Nodes node0, node1, ... with addresses 10.77.0.1, 10.77.0.2, ... on links of one rate."""

    def __init__(self, nodes: int = 3, rate_mbit: int = 100) -> None:
        """Set it up.

        Args:
            nodes: how many.
            rate_mbit: of each node's link, in each direction, in 10^6 bits a second.
        """
        self.names = [f"node{n}" for n in range(nodes)]
        self._folder = Path(tempfile.mkdtemp(prefix="cluster-"))
        self._holders: dict[str, subprocess.Popen[bytes]] = {}
        try:
            self._set_up()
            self.limit(rate_mbit)
        except BaseException:
            self.close()
            raise

    def _set_up(self) -> None:
        hosts = self._folder / "hosts"
        hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{self._address(n)} {n}\n" for n in self.names))
        for name in ("switch", *self.names):
            self._holders[name] = self._hold()
        self._in_switch("ip", "link", "add", "bridge", "type", "bridge")
        self._in_switch("ip", "link", "set", "bridge", "up")
        for name in self.names:
            pid, switch = str(self._holders[name].pid), str(self._holders["switch"].pid)
            _call("ip", "link", "add", "eth0", "netns", pid, "type", "veth", "peer", "name", name, "netns", switch)
            self._in_switch("ip", "link", "set", name, "master", "bridge", "up")
            self.enter(name, "ip", "address", "add", f"{self._address(name)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                self.enter(name, "ip", "link", "set", device, "up")
            self.enter(name, "hostname", name)
            self.enter(name, "mount", "--bind", str(hosts), "/etc/hosts")
            self.enter(name, "mount", "-t", "tmpfs", "tmpfs", "/dev/shm")
            boot = self._folder / f"boot-{name}"  # by which libraries tell whether they share a kernel's memory
            boot.write_text(f"{uuid.uuid4()}\n")
            self.enter(name, "mount", "--bind", str(boot), "/proc/sys/kernel/random/boot_id")
            # a /sys of this network's devices; control groups stay as they are, which slurmd looks at
            groups = self._folder / f"cgroup-{name}"
            groups.mkdir()
            self.enter(name, "mount", "--rbind", "/sys/fs/cgroup", str(groups))
            self.enter(name, "mount", "-t", "sysfs", "sysfs", "/sys")
            self.enter(name, "mount", "--rbind", str(groups), "/sys/fs/cgroup")
        agent = self.agent
        pids = " ".join(f"{name}) pid={self._holders[name].pid};;" for name in self.names)
        agent.write_text(
            # what a launcher calls instead of ssh: AGENT [options] host command
            '#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do shift; done\nhost=$1\nshift\n'
            f'case "$host" in {pids} *) echo "no node $host" >&2; exit 1;; esac\n'
            'exec nsenter -t "$pid" ' + " ".join(ROOMS) + ' sh -c "$*"\n'
        )
        agent.chmod(0o755)

    @staticmethod
    def _hold() -> subprocess.Popen[bytes]:
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", *ROOMS, "sleep", "infinity"]
        holder = subprocess.Popen(command)
        deadline = time.monotonic() + 10
        while Path(f"/proc/{holder.pid}/comm").read_text().strip() != "sleep":
            assert time.monotonic() < deadline and holder.poll() is None, "unshare did not start"
            time.sleep(0.005)
        return holder

    def _address(self, name: str) -> str:
        return f"10.77.0.{self.names.index(name) + 1}"

    @property
    def agent(self) -> Path:
        """A script that enters a node, called as ssh is."""
        return self._folder / "agent"

    def inside(self, name: str) -> list[str]:
        """Return what goes before a command to run it in a node."""
        return ["nsenter", "-t", str(self._holders[name].pid), *ROOMS, f"--wd={REPOSITORY}"]

    def enter(self, name: str, *command: str) -> str:
        """Run a command in a node and return what it prints."""
        return _call(*self.inside(name), *command)

    def _in_switch(self, *command: str) -> None:
        _call("nsenter", "-t", str(self._holders["switch"].pid), "--net", *command)

    def limit(self, rate_mbit: int) -> None:
        """Set the rate of every link, in each direction, in 10^6 bits a second."""
        bucket = ["root", "tbf", "rate", f"{rate_mbit}mbit", "burst", str(BURST_BYTES), "latency", "1s"]
        for name in self.names:
            self.enter(name, "tc", "qdisc", "replace", "dev", "eth0", *bucket)
            self._in_switch("tc", "qdisc", "replace", "dev", name, *bucket)

    def mpirun(
        self,
        ranks: Sequence[int],
        *arguments: str,
        deadline_s: float = 120,
        environment: Mapping[str, str] | None = None,
        launcher_flags: Sequence[str] = (),
    ) -> Finished:
        """Run `python ARGUMENTS` from node0 with so many ranks on each node; kill it all at the deadline and fail."""
        mpirun = find_mpirun()
        assert mpirun is not None, "no mpirun: pip install '.[mpich]'"
        hosts = ",".join(f"{name}:{n}" for name, n in zip(self.names, ranks, strict=False) if n)
        if is_open_mpi(mpirun):
            options = ["--allow-run-as-root", "--host", hosts, "--prtemca", "plm_ssh_agent", str(self.agent)]
            options += [
                "--prtemca",
                "plm_ssh_no_tree_spawn",
                "1",
                "--map-by",
                "slot:OVERSUBSCRIBE",
                "--bind-to",
                "none",
            ]
            options += ["--mca", "pml", "ob1", "--mca", "btl", "tcp,sm,self", "--mca", "btl_tcp_if_include", "eth0"]
            passed = ["OMP_NUM_THREADS", "PYTHONPATH", *(environment or {})]
            options += [part for name in passed for part in ("-x", name)]
        else:
            options = ["-launcher", "ssh", "-launcher-exec", str(self.agent), "-hosts", hosts]
        options += [*launcher_flags, "-n", str(sum(ranks))]
        command = [*self.inside("node0"), mpirun, *options, sys.executable, *arguments]
        wire = {"UCX_TLS": "tcp,self,sysv,posix", "UCX_NET_DEVICES": "eth0"}
        own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **wire, **(environment or {})}
        return communicate(command, {**os.environ, **own}, deadline_s)

    def close(self) -> None:
        """Take it down: what still runs in a node, and the nodes."""
        for holder in self._holders.values():
            for process in processes_beside(holder.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            holder.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def processes_beside(pid: int) -> list[int]:
    """Return the processes that are in the network of this one, itself included."""
    network = Path(f"/proc/{pid}/ns/net").readlink()
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and (folder / "ns" / "net").readlink() == network:
                found.append(int(folder.name))
    return found
