"""The command line: which command runs, and how the process ends.

Exit status: 0 done; 2 the user's settings or data are wrong (one message, from rank 0); 3 a rank failed;
75 stopped by SIGUSR1, SIGTERM, SIGHUP or SIGINT, to be resumed.
"""

import contextlib
import errno
import importlib
import importlib.metadata
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from fedprompt_mpi.comm.channel import RankLost
from fedprompt_mpi.commands.settings import PrintedText
from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.files import CONTINUE, NO_MEMORY, CannotWriteError, ChangedFileError
from fedprompt_mpi.liveness.liveness import Liveness
from fedprompt_mpi.liveness.output import keep_output_safe, one_line
from fedprompt_mpi.liveness.stop import STOPPED, Stopped
from fedprompt_mpi.plm.late_imports import own_the_process
from fedprompt_mpi.plugins.load import place_of
from fedprompt_mpi.start.launcher import SRUN, read_launch

USAGE = """\
usage: mpirun -n N python -m fedprompt_mpi [run] [--config FILE.toml] [--section.setting VALUE ...]
       mpirun -n N python -m fedprompt_mpi bench [--model NAME] [--sizes '[BYTES, ...]'] [--dir DIR]
       mpirun -n N python -m fedprompt_mpi doctor
                   python -m fedprompt_mpi sweep RECIPE.toml... [--launch 'mpirun -n N'] [--seeds '[0, 1, 2]']
                                                 [--data DIR] [--runs DIR] [--jobs N] [--section.setting=VALUE ...]
                   python -m fedprompt_mpi report [--watch] RUN... [--dir DIR] [--warmup ROUNDS]
                   python -m fedprompt_mpi predict RUN [--text TEXT ...] [--text_b TEXT ...] [--file FILE] [--out FILE]
                   python -m fedprompt_mpi export RUN DIR
       mpirun -n N python -m fedprompt_mpi audit RUN [--attack tokens,labels,membership,canary] [--rounds N]
                   python -m fedprompt_mpi forecast SOURCE... --clients K --nodes N --network NETWORK
                   python -m fedprompt_mpi sync RUN... --to mlflow
                   python -m fedprompt_mpi check MODEL [--method METHOD]
                   python -m fedprompt_mpi check --plugin FILE.py [--launch 'mpirun -n 4']
                   python -m fedprompt_mpi cost MODEL [--num_virtual_tokens V] [--prefix_hidden_size M] [--lora_rank R]

run     federated prompt tuning; rank 0 aggregates, the other ranks hold the clients
        (without mpirun, or with -n 1, one process does everything)
bench   raw MPI collectives and this program's, side by side over message sizes, and the cost of each method here
doctor  where the ranks are, on which cores and GPUs, over which MPI, and warnings
sweep   a set of recipes, or a grid (--client.lr='[0.1, 0.3]'), each a run; finished runs are skipped,
        interrupted ones are resumed
report  the page of a run, or of several side by side with the paper's tables; the phases of a round
predict the classes of texts, by the prompt of a run
export  the prompt of a run as a PEFT adapter
audit   a finished run again, and what attacks make of its uploads, its broadcasts and its prompt
forecast  what a round would take with other clients, nodes and networks, from measured runs and bench
sync    runs into MLflow, W&B or TensorBoard, as output.track does during a run
check   whether a model can be used, and with which methods, in seconds; whether a plug-in keeps the contract
cost    parameters and bytes of every method per client and round, from a model's config alone

COMMAND --help lists the flags of a command; run --help lists every setting with its unit and default.
--config FILE.toml is read first, flags override it; lists are written as JSON: --poison.clients '[0, 3]'.
--print_config prints the resolved settings and stops. --version prints the version.
"""
PARALLEL, SERIAL = (
    ("run", "bench", "doctor", "audit"),
    ("report", "predict", "export", "forecast", "sync", "check", "cost", "help"),
)
"""Commands that all ranks run, and commands that rank 0 runs alone if they are started under mpirun."""
COMMANDS = (*PARALLEL, "sweep", *SERIAL)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and end the process with its exit status."""
    own_the_process()
    keep_output_safe()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries, about numbers that are named where they matter
    launch = read_launch()
    liveness = Liveness(rank=launch.rank, size=launch.size, ends_job=True, under_srun=launch.launcher == SRUN)
    try:
        dispatch(list(sys.argv[1:] if arguments is None else arguments), liveness)
    except PrintedText:
        pass
    except SettingsError as error:
        if liveness.rank == 0:  # every rank has the same error
            print(one_line(f"fedprompt_mpi: error: {error}"), file=sys.stderr, flush=True)
        liveness.end_together(2)
    except Stopped as stop:
        if liveness.rank == 0:
            print(f"{stop}; --output.resume true continues", flush=True)
        liveness.end_together(STOPPED)
    except RankLost as lost:
        liveness.fail(f"cannot continue: {lost}", CONTINUE)
    except ChangedFileError as error:
        liveness.fail(f"cannot continue: {error}", f"Put it back; {CONTINUE}")
    except CannotWriteError as error:
        liveness.fail(f"cannot write {error}", error.remedy)
    except KeyboardInterrupt:
        liveness.end_job(130)
    except BaseException as error:  # a panic of a library in Rust is no Exception
        limit, place = exhausted(error), place_of(error)
        where = f" in plugin {place} ({type(error).__name__}: {error})" if place else ""
        liveness.fail(f"failed: {limit}" if limit else f"failed{where}", CONTINUE if limit else traceback.format_exc())
    liveness.end()


def exhausted(error: BaseException) -> str:
    """Return which limit of the system an error comes from, and what to do; empty if from none."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or number == errno.ENOMEM or any(words in str(error) for words in NO_MEMORY):
        return "there is no memory left for it (the node's, the batch system's or that of ulimit -v): ask for more"
    if number in (errno.EMFILE, errno.ENFILE):
        return "it may open no more files: raise the limit (ulimit -n)"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"{getattr(error, 'filename', None) or tempfile.gettempdir()} is full: make room, or set TMPDIR"
    if number == errno.EAGAIN or "can't start new thread" in str(error):
        return "it may start no more processes and threads: raise the limit (ulimit -u)"
    return exhausted(error.__cause__) if error.__cause__ is not None else ""


def dispatch(arguments: list[str], liveness: Liveness) -> None:
    """Run the command that the arguments name.

    Raises:
        SettingsError: if there is no such command, or its flags or the user's data are wrong.
        PrintedText: if only a text was asked for.
    """
    try:
        Path.cwd()
    except OSError as error:
        raise SettingsError(f"the folder in which it was started is gone ({error.strerror}): go to another") from error
    asks = arguments[0] if arguments else ""
    command = asks if asks and not asks.startswith("-") else "run"
    if sys.flags.optimize > 1:
        raise SettingsError("PYTHONOPTIMIZE is 2, which takes away docstrings that transformers reads: take 1 or none")
    if command not in COMMANDS:
        raise SettingsError(f"there is no command {command!r}: choose one of {', '.join(COMMANDS)}")
    if asks in ("-h", "--help", "--version"):
        command = "help"
    wants_text = bool({"-h", "--help", "--print_config"} & set(arguments))
    if liveness.rank and (command in SERIAL or wants_text):
        return
    if command == "help" and len(arguments) > 1:
        raise SettingsError(f"{asks} takes no arguments, but there is {arguments[1]!r}: COMMAND --help has its flags")
    if asks == "--version":
        print(f"fedprompt_mpi {importlib.metadata.version('fedprompt_mpi')}")
    elif command == "help":
        print(USAGE, end="")
    else:
        rest = arguments[1:] if asks == command else arguments
        main = importlib.import_module(f"fedprompt_mpi.commands.{command}").main
        if command in PARALLEL:
            main(rest, liveness)
        else:
            with told_as_settings():
                main(rest, liveness)


@contextlib.contextmanager
def told_as_settings() -> Iterator[None]:
    """Say of a place that cannot be read or written, in a command of one process, that another is to be named.

    Raises:
        SettingsError: naming it.
    """
    try:
        yield
    except CannotWriteError as error:
        raise SettingsError(f"cannot write {error}: name another place") from error
    except OSError as error:
        if error.filename is None:
            raise
        raise SettingsError(f"{str(error.filename)[:200]!r}: {error.strerror}: name another place") from error
