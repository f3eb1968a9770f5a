#!/bin/bash
# Several recipes as one Slurm job array: a run directory for each, named after its recipe.
#
#     sbatch --array=0-2 launch/slurm-array.sh RECIPE1.toml RECIPE2.toml RECIPE3.toml
#
# RUNS names the folder of the run directories (runs); RUN_FLAGS holds flags for all of them, quoted as in a shell:
#
#     RUN_FLAGS="--task.data DATA --poison.clients '[0, 3]'" sbatch ...
#
# A task whose run is done ends at once, so the same line can be submitted again after a failure.
#SBATCH --job-name=fedprompt-array
#SBATCH --ntasks=11
#SBATCH --cpus-per-task=1
#SBATCH --time=01:00:00
#SBATCH --signal=B:USR1@120      # two minutes before the limit: the run saves and the task queues again
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log

set -euo pipefail

recipes=("$@")
if [ "$SLURM_ARRAY_TASK_ID" -ge "${#recipes[@]}" ]; then
    echo "task $SLURM_ARRAY_TASK_ID has no recipe: ${#recipes[@]} were given, use --array=0-$((${#recipes[@]} - 1))" >&2
    exit 2
fi
recipe=${recipes[SLURM_ARRAY_TASK_ID]}
directory=${RUNS:-runs}/$(basename "$recipe" .toml)
if [ -e "$directory/summary.json" ]; then
    echo "$directory is done"
    exit 0
fi

flags=()
[ -z "${RUN_FLAGS:-}" ] || mapfile -t flags < <(xargs printf '%s\n' <<<"$RUN_FLAGS") # xargs knows quotes
# Slurm runs a copy of this script from elsewhere, hence the path
exec bash "$SLURM_SUBMIT_DIR/launch/slurm.sh" --config "$recipe" --output.dir="$directory" "${flags[@]}"
