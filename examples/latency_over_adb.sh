#!/bin/sh
# Milliseconds of one run of an ONNX model on an Android phone, for --latency-cmd:
#
#   compress model.pt2 --target mobile --passes 'prune(latency=0.6)' \
#       --latency-cmd 'sh examples/latency_over_adb.sh {onnx}'
#
# Needs adb, and onnxruntime_perf_test (ONNX Runtime's own, built for Android) with its libraries in /data/local/tmp.
# A board behind ssh needs no script: 'scp -q {onnx} pi:model.onnx && ssh pi python3 bench.py model.onnx', where
# bench.py runs the model and prints the median of its times in milliseconds.
set -eu
there=/data/local/tmp
adb push "$1" "$there/model.onnx" >/dev/null
adb shell "cd $there && LD_LIBRARY_PATH=. ./onnxruntime_perf_test -e cpu -x 1 -m times -r 50 -I model.onnx" |
    awk '/Average inference time cost/ { ms = $(NF - 1) } END { print ms }'
