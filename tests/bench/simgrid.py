"""The forecast's collectives against SimGrid's SMPI, on the same platform: python tests/bench/simgrid.py [NODES ...]

Needs Debian's libsimgrid-dev (smpicc, smpirun). Both know a latency and a rate only: software takes no time in either.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fedprompt_mpi.forecast.costs import FEW_NODES, LONG_BYTES, SHORT_BYTES, Vector, evenly
from fedprompt_mpi.forecast.links import Constant, Links
from fedprompt_mpi.forecast.network import Network

NETWORK = Network(name="10 GbE", latency_us=20, up_mbit=10_000, down_mbit=10_000, source="the preset 10gbe")
NODES = {2: (30_720, 6_144_000, 90_978_024), 3: (30_720, 6_144_000, 90_978_024), 5: (30_720, 6_144_000, 90_978_024),
         8: (30_720, 6_144_000, 90_978_024), 1024: (8_192, 30_720, 1_048_576), 10_000: (8_192,)}  # fmt: skip
"""Nodes -> bytes of a vector."""
PLAIN = {
    "smpi/bw-factor": "0:1", "smpi/lat-factor": "0:1", "network/TCP-gamma": "1e15", "network/weight-S": "0",
    "smpi/simulate-computation": "no", "contexts/stack-size": "256", "smpi/privatization": "no",
    "smpi/async-small-thresh": "0", "smpi/send-is-detached-thresh": "0",
}  # fmt: skip
"""Messages take latency + bytes / rate, and links are shared fairly: nothing is calibrated to some other network."""


def platform(nodes: int) -> str:
    """Return a cluster of so many nodes; a way has the links of both, hence half the latency each."""
    rate = 1 / NETWORK.busiest_s_per_byte
    return f"""\
<?xml version="1.0"?>
<!DOCTYPE platform SYSTEM "https://simgrid.org/simgrid.dtd">
<platform version="4.1">
  <cluster id="c" prefix="n" suffix="" radical="0-{nodes - 1}" speed="1Gf" bw="{rate}Bps" lat="{NETWORK.latency_s / 2}s"
           sharing_policy="SPLITDUPLEX"/>
</platform>
"""


def simulate(folder: Path, nodes: int, size: int) -> dict[str, float]:
    """Return collective -> simulated seconds."""
    (folder / "platform.xml").write_text(platform(nodes))
    (folder / "hosts").write_text("".join(f"n{node}\n" for node in range(nodes)))
    way = "scatter_LR_allgather" if nodes >= FEW_NODES and size >= SHORT_BYTES else "binomial_tree"
    if way != "binomial_tree" and size < LONG_BYTES and nodes & (nodes - 1) == 0:
        way = "scatter_rdb_allgather"
    flags = [f"--cfg={name}:{value}" for name, value in {**PLAIN, "smpi/bcast": way}.items()]
    places = ["-platform", str(folder / "platform.xml"), "-hostfile", str(folder / "hosts")]
    program = [str(folder / "collectives"), str(size), "broadcast", "gather", "reduce"]
    command = ["smpirun", "-np", str(nodes), *places, *flags, "--log=root.thres:error", *program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return {
        line.split()[0]: float(line.split()[3])
        for line in done.stdout.splitlines()
        if line.split()[-2:-1] == [str(size)]
    }


def forecast(collective: str, nodes: int, size: int) -> float:
    """Return the seconds that the forecast says, of software that takes no time."""
    none = Constant(0.0, 0.0, measured=True)
    links = Links(
        network=NETWORK, alpha=Constant(NETWORK.latency_s, 0.0, True), stretch=Constant(1.0, 0.0, True),
        local={"": (none, none)}, gap=none, library="MPICH", most_nodes=nodes, rate_ratio=1,
    )  # fmt: skip
    return links.seconds(collective, evenly(nodes, 1, nodes - 1), Vector(size // 4, size)).seconds


def main() -> None:
    """Compare, and print a table."""
    assert shutil.which("smpirun") and shutil.which("smpicc"), "no SMPI: apt-get install libsimgrid-dev"
    folder = Path(tempfile.mkdtemp(prefix="simgrid-"))
    source = Path(__file__).with_name("collectives.c")
    subprocess.run(["smpicc", "-O2", "-o", str(folder / "collectives"), str(source)], check=True)
    print(f"{'nodes':>6}{'bytes':>12}  {'collective':<10}{'forecast, s':>14}{'SMPI, s':>14}{'difference':>12}")
    for nodes in map(int, sys.argv[1:]) if len(sys.argv) > 1 else NODES:
        for size in NODES[nodes]:
            for name, seconds in simulate(folder, nodes, size).items():
                ours = forecast(name, nodes, size)
                cells = f"{ours:>14.6f}{seconds:>14.6f}{ours / seconds - 1:>+12.1%}"
                print(f"{nodes:>6}{size:>12,}  {name:<10}{cells}", flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
