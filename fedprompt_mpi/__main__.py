"""python -m fedprompt_mpi: in a process that the node has forked for this rank, or in this one."""

import sys
import time

from fedprompt_mpi.start.front import hand_over, say_start, starts_together
from fedprompt_mpi.start.launcher import Origin


def main() -> None:
    """Run the command line, and end the process with its exit status."""
    Origin.since = time.perf_counter()
    say_start(sys.argv[1:])
    if starts_together(sys.argv[1:]):
        hand_over()  # it returns if this process is to do it
    from fedprompt_mpi.cli import main

    main()


if __name__ == "__main__":
    main()
