#!/bin/bash
# One run as a Slurm job: rank 0 aggregates, the other tasks are workers.
#
#     sbatch launch/slurm.sh --config launch/recipes/sst2-soft.toml --task.data DATA --output.dir runs/sst2
#
# What follows the script goes to the program; #SBATCH lines can be overridden before it (sbatch --ntasks=33 ...).
# With output.dir given, submitting the same line again continues where the last job stopped.
#SBATCH --job-name=fedprompt
#SBATCH --ntasks=11
#SBATCH --cpus-per-task=1
#SBATCH --time=01:00:00
#SBATCH --signal=B:USR1@120      # two minutes before the limit: the run saves and the job queues again
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# One GPU a worker, none for rank 0, on two nodes of four GPUs: the first node gets five tasks, the second four.
#     sbatch --nodes=2 --ntasks=9 --gpus-per-node=4 launch/slurm.sh ...
# Every task must see all GPUs of its node (srun's default); the workers take them in turn.

set -euo pipefail

# Your site's modules, or the environment that has the package:
#     module load openmpi
#     source .venv/bin/activate

export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since 22.05 srun does not take it from sbatch

# With a run directory of its own the job begins the run there, or continues with it.
directory=
previous=
for argument in "$@"; do
    case "$argument" in --output.dir=*) directory=${argument#*=} ;; esac
    [ "$previous" != --output.dir ] || directory=$argument
    previous=$argument
done
[ -z "$directory" ] || set -- "$@" --output.resume=true
checkpoints() { ls "$directory/checkpoint" 2>/dev/null || true; }
before=$(checkpoints)

# LAUNCH=srun (default) starts the ranks through Slurm's own PMI, LAUNCH=mpirun through the MPI library's mpirun.
# srun --mpi=list shows what your Slurm offers; MPI_TYPE names another one than pmix for Open MPI, pmi2 for all others.
if [ "${LAUNCH:-srun}" = srun ]; then
    library=$(python -m mpi4py --mpi-lib-version)
    case "$library" in *"Open MPI"* | *"Spectrum MPI"*) pmi=pmix ;; *) pmi=pmi2 ;; esac
    start=(srun --kill-on-bad-exit=1 --mpi="${MPI_TYPE:-$pmi}")
elif mpirun --version | grep -q 'Open MPI'; then
    start=(mpirun -n "$SLURM_NTASKS") # reads the allocation itself
else
    start=(mpirun -launcher slurm -n "$SLURM_NTASKS")
fi
"${start[@]}" python -m fedprompt_mpi run "$@" &
job=$!
signalled=
trap 'signalled=1; kill -USR1 "$job"' USR1 # srun and mpirun pass it on to the ranks
status=0
wait "$job" || status=$?
while [ "$status" -gt 128 ] && kill -0 "$job" 2>/dev/null; do # the signal ended the waiting, not the job
    status=0
    wait "$job" || status=$?
done
# srun may kill slower ranks once the first has ended with 75: then its status is that of a signal
[ -z "$signalled" ] || [ "$status" -le 128 ] || status=75
# stopped on request, a round further than before: else it would do the same again, for ever
if [ "$status" -eq 75 ] && [ -n "$directory" ] && [ "$(checkpoints)" != "$before" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
