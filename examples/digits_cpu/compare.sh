#!/usr/bin/env bash
# VPPO, VPPO as its authors run it, DAPO and GRPO on the same task, several seeds each; then a picture and a table.
# Runs that have finished are not run again, one that was interrupted goes on. Settings pass through:
#   SEEDS="1 2 3" compare.sh trainer.total_steps=20
set -euo pipefail
cd "$(dirname "$0")/../.."
command -v vppo >/dev/null || PATH="$PWD/.venv/bin:$PATH"
here=examples/digits_cpu
runs=runs/digits_compare
read -ra seeds <<<"${SEEDS:-1 2 3}"

python tools/digits/make_data.py --out build/digits/data
python tools/digits/make_model.py --data build/digits/data --out build/digits/model
for seed in "${seeds[@]}"; do
  for name in config reference dapo grpo; do
    run="$runs/$name-seed$seed"
    if [[ -e "$run/finished" ]]; then
      [[ "$(<"$run/finished")" == "$*" ]] && continue
      echo "compare: $run was made with other settings ($(<"$run/finished")); remove $runs to compare anew" >&2
      exit 1
    fi
    echo "compare: $run"
    vppo train --config "$here/$name.yaml" trainer.val_freq=2 "$@" trainer.runs_dir=runs trainer.project_name=digits_compare \
      "trainer.experiment_name=$name-seed$seed" "trainer.seed=$seed" trainer.save_hf=false
    echo "$*" >"$run/finished"
  done
done
python "$here/compare_plot.py" "$runs"
