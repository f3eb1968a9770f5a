"""Where a defence ends: accuracy and attack success rate (ASR) of every aggregator under every attack, as a table.

    python launch/edge.py OUT --config launch/recipes/edge-sst2.toml --task.data DIR --model.name DIR ...

Each cell is one run of the program in OUT/<aggregator>/<attack>; cells that are done are not run again. All flags
behind OUT go to every run. With --jobs 2 before OUT, two cells run at a time (set OMP_NUM_THREADS to fit).
"""

import argparse
import concurrent.futures
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from fedprompt_mpi.federation.aggregate import AGGREGATORS

CLIENTS = 10
ATTACKS = {  # column -> (malicious clients, flags)
    "none": (0, []),
    "1 of 10": (1, ["--poison.clients=[0]"]),
    "3 of 10": (3, ["--poison.clients=[0,1,2]"]),
    "5 of 10": (5, ["--poison.clients=[0,1,2,3,4]"]),
    "1, boost 5": (1, ["--poison.clients=[0]", "--poison.boost=5"]),
    "1, boost 10": (1, ["--poison.clients=[0]", "--poison.boost=10"]),
    "all, 10 % each": (1, ["--poison.clients=all", "--poison.rate=0.1"]),
}
RULES = {  # row -> flags
    **{name: [f"--federation.aggregator={name}"] for name in AGGREGATORS},
    "fedavg, noise 0.02": ["--federation.noise_std=0.02"],
}


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description="accuracy / ASR of every aggregator under every attack")
    parser.add_argument("--jobs", type=int, default=1, help="cells that run at a time")
    parser.add_argument("out", type=Path, help="folder for the runs")
    arguments, flags = parser.parse_known_args()
    cells = [(rule, attack) for attack in ATTACKS for rule in RULES]
    clean = [cell for cell in cells if cell[1] == "none"]
    for some in (clean[:1], clean, cells):  # norm_clip needs fedavg's, each rule's attacked cells its clean one
        run_cells(arguments.out, some, flags, arguments.jobs)
    print(table(arguments.out))


def directory(out: Path, rule: str, attack: str) -> Path:
    """Return the run directory of a cell."""
    return out / re.sub(r"[^\w.]+", "-", rule) / re.sub(r"[^\w.]+", "-", attack)


def run_cells(out: Path, cells: list[tuple[str, str]], flags: list[str], jobs: int) -> None:
    """Run so many cells at a time; the first that fails ends it."""
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(run_cell, out, rule, attack, flags) for rule, attack in cells]
        try:
            for cell in concurrent.futures.as_completed(running):
                cell.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def run_cell(out: Path, rule: str, attack: str, flags: list[str]) -> None:
    """Run one cell, unless it is done."""
    place = directory(out, rule, attack)
    if (place / "summary.json").exists():
        return
    settings = [*flags, *RULES[rule], *ATTACKS[attack][1], f"--output.dir={place}"]
    if rule in AGGREGATORS:  # f as many as there are, or as many as the rule can assume
        settings.append(f"--federation.assumed_malicious={min(max(ATTACKS[attack][0], 1), most_assumed(rule))}")
    if (place / "checkpoint").exists():
        settings.append("--output.resume=true")
    elif place.exists():
        shutil.rmtree(place)  # it was stopped before there was anything to go on from
    if rule == "norm_clip":  # at what honest updates measure
        norms = json.loads((directory(out, "fedavg", "none") / "rounds.jsonl").read_text().splitlines()[1])
        settings.append(f"--federation.clip_norm={statistics.median(norms['update_norms'])}")
    if attack != "none":
        settings.append(f"--poison.clean_run={directory(out, rule, 'none')}")
    print(f"{rule}: {attack}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "fedprompt_mpi", *settings], check=True, stdout=subprocess.DEVNULL)


def most_assumed(rule: str) -> int:
    """Return the largest f that a rule can assume of so many clients."""
    return AGGREGATORS[rule].most_malicious(CLIENTS) or 0


def table(out: Path) -> str:
    """Return the cells as Markdown: accuracy / ASR in %, starred where the malicious are more than a rule can bear."""
    lines = ["| aggregator | " + " | ".join(ATTACKS) + " |", "| --- |" + " --- |" * len(ATTACKS)]
    for rule in RULES:
        cells = []
        for attack in ATTACKS:
            summary = json.loads((directory(out, rule, attack) / "summary.json").read_text())
            star = "*" if rule in AGGREGATORS and ATTACKS[attack][0] > most_assumed(rule) else ""
            cells.append(f"{100 * summary['accuracy']:.1f} / {100 * summary['attack_success_rate']:.1f}{star}")
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
