#!/usr/bin/env bash
# Trains a recipe on the GPUs of this machine. Settings pass through:  local.sh qwen2_5_vl_3b/dapo trainer.seed=2
set -euo pipefail
cd "$(dirname "$0")/../.."
command -v vppo >/dev/null || PATH="$PWD/.venv/bin:$PATH"
recipe=$1
shift
vppo train --config "examples/recipes/$recipe.yaml" "$@"
