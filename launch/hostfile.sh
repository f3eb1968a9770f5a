#!/bin/bash
# One run over machines that ssh reaches without a password, with plain mpirun.
#
#     bash launch/hostfile.sh HOSTFILE RANKS --config launch/recipes/sst2-soft.toml --task.data DATA
#
# HOSTFILE has a line for each machine, in your MPI's own words: "node1:4" for MPICH, "node1 slots=4" for Open MPI.
# The package and its environment must lie at the same path on all of them. MPICH hands the whole environment to the
# ranks; Open MPI gets the variables named below.

set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: bash launch/hostfile.sh HOSTFILE RANKS [flags of the run]" >&2
    exit 2
fi
hostfile=$1 ranks=$2
shift 2

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if mpirun --version | grep -q 'Open MPI'; then
    passed=()
    for name in $(compgen -e | grep -E '^(OMP|HF|TRANSFORMERS|FEDPROMPT|UCX|FI)_|^(PATH|PYTHONPATH|LD_LIBRARY_PATH|TMPDIR)$'); do
        passed+=(-x "$name")
    done
    exec mpirun --hostfile "$hostfile" -n "$ranks" "${passed[@]}" python -m fedprompt_mpi run "$@"
fi
exec mpirun -f "$hostfile" -n "$ranks" python -m fedprompt_mpi run "$@"
