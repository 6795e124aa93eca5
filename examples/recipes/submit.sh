#!/usr/bin/env bash
# Sends a recipe to SLURM, on nodes of 8 GPUs. Options of `vppo slurm` and settings pass through:
#     submit.sh qwen2_5_vl_32b/vppo --partition gpu --array-seeds 1-3 trainer.save_limit=3
# The batch script that it writes stays here, to keep and to edit.
set -euo pipefail
cd "$(dirname "$0")/../.."
command -v vppo >/dev/null || PATH="$PWD/.venv/bin:$PATH"
recipe=$1
shift
nodes=1
[[ $recipe == qwen2_5_vl_32b/* ]] && nodes=4
vppo slurm --config "examples/recipes/$recipe.yaml" --nodes "$nodes" --gpus-per-node 8 --time 24:00:00 --submit "$@"
