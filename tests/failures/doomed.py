"""The program, in which given ranks meet their end: doomed.py FATES FLAGS...

FATES is rank:phase:round:how with commas between; how is kill, stop (SIGSTOP), sleep, raise or term (SIGTERM).
"""

import os
import signal
import sys
import time

from fedprompt_mpi.__main__ import main
from fedprompt_mpi.liveness.liveness import Liveness
from fedprompt_mpi.start.launcher import read_launch

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
FATES = {tuple(fate.split(":")[:3]): fate.split(":")[3] for fate in sys.argv[1].split(",")}
enter = Liveness.enter


def enter_doomed(self: Liveness, phase: str, round_: int, *given: float) -> None:
    """Enter a phase, and do not come out of it if it is the one."""
    enter(self, phase, round_, *given)
    how = FATES.pop((str(read_launch().rank), phase, str(round_)), None)
    if how in SIGNALS:
        os.kill(os.getpid(), SIGNALS[how])
    elif how == "raise":
        raise ArithmeticError(f"boom at {time.monotonic()}")
    elif how == "sleep":
        time.sleep(1000)


Liveness.enter = enter_doomed  # type: ignore[method-assign]
sys.argv = ["fedprompt_mpi", *sys.argv[2:]]
main()
