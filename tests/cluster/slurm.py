"""Slurm on the virtual cluster: a controller on node0, and on each node a daemon and a munge of its own.

One munge for all nodes would take a message that goes to several of them for a replayed one.
"""

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.cluster.virtual import Cluster

TOOLS = ("slurmctld", "slurmd", "sbatch", "munged")
CPUS = 4
GPUS = 2
"""Of each node; neither needs to be there."""


def why_not() -> str | None:
    """Return why Slurm cannot run here, or None."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"needs {', '.join(missing)} (Debian: slurmctld slurmd slurm-client munge)" if missing else None


class Slurm:
    """A running Slurm."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        """Start it; files go to `folder`."""
        self.cluster, self.folder = cluster, folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        try:
            self._configure()
            self._start()
        except BaseException:
            self.close()
            raise

    def _configure(self) -> None:
        folder, nodes = self.folder, ",".join(self.cluster.names)
        for name in (
            "state",
            "munge",
            *(f"{kind}-{node}" for kind in ("spool", "munge") for node in self.cluster.names),
        ):
            (folder / name).mkdir(mode=0o755)
        for gpu in range(GPUS):
            os.mknod(folder / f"gpu{gpu}", stat.S_IFCHR | 0o600, os.makedev(1, 3))  # /dev/null by another name
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
        (folder / "slurm.conf").write_text(
            f"""\
ClusterName=virtual
SlurmctldHost=node0
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MpiDefault=pmi2
GresTypes=gpu
KillWait=5
NodeName={nodes} CPUs={CPUS} RealMemory=8000 Gres=gpu:{GPUS} State=UNKNOWN
PartitionName=all Nodes={nodes} Default=YES MaxTime=INFINITE State=UP
"""
        )

    def _start(self) -> None:
        munge = ["munged", "--foreground", "--force", f"--key-file={self.folder}/munge.key"]
        munge += [f"--{file}={self.folder}/munge/{file}" for file in ("socket", "seed-file", "pid-file")]
        for node in self.cluster.names:
            own = self.folder / f"munge-{node}"
            self.cluster.enter(node, "mount", "--bind", str(own), str(self.folder / "munge"))
            self._daemon(node, *munge)
            self.wait_for((own / "socket").exists, f"munged on {node}")
        self._daemon("node0", "slurmctld", "-D")
        for node in self.cluster.names:
            self._daemon(node, "slurmd", "-D", "-N", node)
        nodes = len(self.cluster.names)
        self.wait_for(lambda: self.call("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * nodes, "slurmd")

    def _daemon(self, node: str, *command: str) -> None:
        log = (self.folder / f"{command[0]}-{node}.log").open("wb")
        daemon = subprocess.Popen(
            [*self.cluster.inside(node), *command],
            env=self.environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
        log.close()
        self._daemons.append(daemon)

    def wait_for(self, is_there: Callable[[], bool], what: str, deadline_s: float = 30) -> None:
        """Wait until something holds; fail with the daemons' logs at the deadline."""
        deadline = time.monotonic() + deadline_s
        while not is_there():
            logs = "\n".join(path.read_text()[-2000:] for path in self.folder.glob("*.log"))
            assert time.monotonic() < deadline, f"no sign of {what}\n{logs}"
            time.sleep(0.2)

    @property
    def environment(self) -> dict[str, str]:
        """What daemons and commands are started with."""
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def call(self, *command: str, **variables: str) -> str:
        """Run one of Slurm's commands on node0 and return what it prints."""
        done = subprocess.run(
            [*self.cluster.inside("node0"), *command],
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.stdout + done.stderr

    def submit(self, *arguments: str, variables: Mapping[str, str], deadline_s: float = 240) -> dict[str, str]:
        """Submit a script, wait for its end, and return what Slurm says of it, or of an array's tasks: job -> state.

        Args:
            arguments: of sbatch.
            variables: of the environment that the job inherits.
            deadline_s: seconds.
        """
        printed = self.call("sbatch", "--parsable", *arguments, **variables).strip()
        assert printed.isdigit(), printed
        return self.wait_for_end(printed, deadline_s)

    def _fields(self, job: str) -> list[dict[str, str]]:
        lines = self.call("scontrol", "show", "job", "--oneliner", job).splitlines()
        return [dict(part.split("=", 1) for part in line.split() if "=" in part) for line in lines if line.strip()]

    def field(self, job: str, name: str) -> str:
        """Return what scontrol shows of a job."""
        return self._fields(job)[0][name]

    def release(self, job: str) -> None:
        """Let a requeued job start soon: Slurm would make it wait for two minutes, and revokes what is too quick."""
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now+5seconds")

    def wait_for_end(self, job: str, deadline_s: float) -> dict[str, str]:
        """Wait for a job's end; return job -> state, of an array for each task. Cancel it at the deadline and fail."""
        unfinished = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
        states: dict[str, str] = {}

        def has_ended() -> bool:
            states.update({fields["JobId"]: fields["JobState"] for fields in self._fields(job)})
            return all(state not in unfinished for state in states.values())

        try:
            self.wait_for(has_ended, f"the end of job {job}", deadline_s)
        except AssertionError as error:
            printed = Path(self.field(job, "StdOut"))
            error.add_note(printed.read_text() if printed.exists() else f"job {job} has printed nothing")
            self.call("scancel", job)
            raise
        return states

    def close(self) -> None:
        """Stop the daemons."""
        for daemon in reversed(self._daemons):
            with contextlib.suppress(ProcessLookupError):
                daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
