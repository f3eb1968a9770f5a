#!/bin/bash
# One run as a PBS Pro job: eleven ranks, rank 0 aggregates.
#
#     qsub -v FLAGS="--config launch/recipes/sst2-soft.toml --task.data DATA --output.dir runs/sst2" launch/pbs.sh
#
# FLAGS is quoted as in a shell. qsub takes a comma for the end of a variable: settings that are lists go into a recipe.
# With --output.dir given, the run saves two minutes before the time limit and the job is submitted again.
#PBS -N fedprompt
#PBS -l select=1:ncpus=11:mpiprocs=11:ompthreads=1
#PBS -l walltime=01:00:00
#PBS -j oe
# Several nodes: select=3:ncpus=4:mpiprocs=4:ompthreads=1. With GPUs, one rank more than GPUs:
# select=1:ncpus=5:ngpus=4:mpiprocs=5:ompthreads=1. PBS sets OMP_NUM_THREADS to ompthreads.

set -euo pipefail
cd "$PBS_O_WORKDIR"

# Your site's modules, or the environment that has the package:
#     module load openmpi
#     source .venv/bin/activate

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
ranks=$(wc -l <"$PBS_NODEFILE") # a line for each rank
# PBS has set this for the first node, and mpirun would hand it to the ranks of all nodes
[ "$(sort -u "$PBS_NODEFILE" | wc -l)" -eq 1 ] || unset CUDA_VISIBLE_DEVICES

flags=()
[ -z "${FLAGS:-}" ] || mapfile -t flags < <(xargs printf '%s\n' <<<"$FLAGS") # xargs knows quotes
directory=
previous=
for flag in "${flags[@]}"; do
    case "$flag" in --output.dir=*) directory=${flag#*=} ;; esac
    [ "$previous" != --output.dir ] || directory=$flag
    previous=$flag
done
[ -z "$directory" ] || flags+=(--output.resume=true)
checkpoints() { ls "$directory/checkpoint" 2>/dev/null || true; }
before=$(checkpoints)

# PBS gives no notice before the limit: mpirun gets one here, and passes it on to the ranks
limit=$(qstat -f "$PBS_JOBID" | awk -F '= |:' '/Resource_List.walltime/ { print 3600 * $2 + 60 * $3 + $4 }')
limit=${limit:-3600}
status=0
timeout --preserve-status --foreground --signal=USR1 $((limit > 240 ? limit - 120 : limit / 2)) \
    mpirun --hostfile "$PBS_NODEFILE" -n "$ranks" python -m fedprompt_mpi run "${flags[@]}" || status=$?
# stopped on request, a round further than before: else it would do the same again, for ever
if [ "$status" -eq 75 ] && [ -n "$directory" ] && [ "$(checkpoints)" != "$before" ]; then
    qsub -v "FLAGS=$FLAGS" "$PBS_O_WORKDIR/launch/pbs.sh"
fi
exit "$status"
