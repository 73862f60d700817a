#!/usr/bin/env bash
# How long a new user waits for the first report: a fresh clone, a fresh environment, the README's first command, timed
# step by step. bash benchmarks/first_report.sh [REPOSITORY]; works in a temporary folder, writes nothing here.
set -euo pipefail
from=$(cd "${1:-$(dirname "$0")/..}" && pwd)
cd "$(mktemp -d)"
unset PYTHONPATH
TIMEFORMAT='%R s wall, %U s user'
step() { echo "== $1"; shift; time "$@" >>log 2>&1; }
uptime
step clone git clone -q "$from" fresh
step install make -C fresh .venv/.demo
step train env -C fresh .venv/bin/python examples/digits.py
step compress env -C fresh .venv/bin/compress digits.pt2 --passes merge,prune,int8 --calib digits.npz --eval digits-test.npz
uptime
git -C fresh log -1 --format='commit %h'
du -sh fresh/.venv
tail -9 log
