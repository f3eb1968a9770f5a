#!/bin/bash
# One run as a Flux job: rank 0 aggregates, the other tasks are workers.
#
#     flux batch launch/flux.sh --config launch/recipes/sst2-soft.toml --task.data DATA --output.dir runs/sst2
#
# With output.dir given, submitting the same line again continues where the last job stopped.
#flux: --nslots=11
#flux: --cores-per-slot=1
#flux: --time-limit=1h
#flux: --signal=SIGUSR1@2m

set -euo pipefail

# Your site's modules, or the environment that has the package:
#     module load mpich
#     source .venv/bin/activate

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
case " $* " in *" --output.dir"*) set -- "$@" --output.resume=true ;; esac
# Flux speaks MPICH's protocol by itself; Open MPI needs its PMIx plug-in
start=(flux run --ntasks="${RANKS:-11}" --cores-per-task=1)
if python -m mpi4py --mpi-lib-version | grep -q 'Open MPI'; then start+=(--setopt=pmi=pmix); fi
"${start[@]}" python -m fedprompt_mpi run "$@" &
job=$!
trap 'kill -USR1 "$job"' USR1 # two minutes before the limit: flux run passes it on, and the run saves and stops
status=0
wait "$job" || status=$?
while [ "$status" -gt 128 ] && kill -0 "$job" 2>/dev/null; do # the signal ended the waiting, not the job
    status=0
    wait "$job" || status=$?
done
exit "$status"
