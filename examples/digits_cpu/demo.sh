#!/usr/bin/env bash
# Data, cold-start model, VPPO training, report. Settings pass through:  demo.sh trainer.total_steps=5
# The last line is one JSON object that says what came of it.
set -euo pipefail
cd "$(dirname "$0")/../.."
command -v vppo >/dev/null || PATH="$PWD/.venv/bin:$PATH"
here=examples/digits_cpu

set -- "trainer.experiment_name=demo-$(date +%Y%m%d-%H%M%S)" "$@"  # a run of its own each time, none resumed

echo "demo: data"
python tools/digits/make_data.py --out build/digits/data
echo "demo: cold-start model"
python tools/digits/make_model.py --data build/digits/data --out build/digits/model

run=$(python - "$here/config.yaml" "$@" <<'PY'
import sys

from megatron_vppo.config.load import load_config
from megatron_vppo.setup.run_folder import RunFolder

print(RunFolder.of(load_config(sys.argv[1], sys.argv[2:]).trainer).root)
PY
)
echo "demo: training, into $run"
started=$SECONDS
vppo train --config "$here/config.yaml" "$@"
vppo summary "$run" --seconds-rl $((SECONDS - started))
