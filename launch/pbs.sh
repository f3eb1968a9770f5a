#!/bin/bash
# One run as a PBS Pro job: eleven ranks, rank 0 aggregates.
#
#     qsub -v FLAGS="--config launch/recipes/sst2-soft.toml --task.data DATA --output.dir runs/sst2" launch/pbs.sh
#
# FLAGS is quoted as in a shell. qsub takes a comma for the end of a variable: settings that are lists go into a recipe.
#PBS -N fedprompt
#PBS -l select=1:ncpus=11:mpiprocs=11
#PBS -l walltime=01:00:00
#PBS -j oe
# Several nodes: select=3:ncpus=4:mpiprocs=4. With GPUs: select=1:ncpus=5:ngpus=4:mpiprocs=5 (one rank more than GPUs).

set -euo pipefail
cd "$PBS_O_WORKDIR"

# Your site's modules, or the environment that has the package:
#     module load openmpi
#     source .venv/bin/activate

export OMP_NUM_THREADS=${NCPUS_PER_RANK:-1}
flags=()
[ -z "${FLAGS:-}" ] || mapfile -t flags < <(xargs printf '%s\n' <<<"$FLAGS") # xargs knows quotes
ranks=$(wc -l <"$PBS_NODEFILE") # a line for each rank
exec mpirun --hostfile "$PBS_NODEFILE" -n "$ranks" python -m fedprompt_mpi run "${flags[@]}"
