"""Latency by the user's own command: what is read from it, and one clear line for every way in which it fails."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from compressor.device import checked, milliseconds
from compressor.errors import TargetError, UsageError

ROOT = Path(__file__).resolve().parent.parent
FILE = Path("/tmp/a folder/model's.onnx")


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("12.5", 12.5),
        ("warm-up 3 runs\\nmedian of 50: 7 ms", 7),
        ("1.5e1", 15),
        (".25ms", 0.25),
        ("onnxruntime 1.20\\nlatency=3.5", 3.5),
    ],
)
def test_the_last_number_counts(printed, expected):
    assert milliseconds(f"printf '{printed}\\n' # {{onnx}}", FILE) == expected


def test_the_path_is_one_word_of_the_command(tmp_path):
    script = tmp_path / "time.sh"
    script.write_text(
        '#!/bin/sh\necho "$#" "$1" >&2\ntest "$1" = "/tmp/a folder/model\'s.onnx" && echo 4.0\n'
    )
    assert milliseconds(f"sh {script} {{onnx}}", FILE) == 4
    with pytest.raises(TargetError, match=r"exit code 1: 1 /tmp/other"):
        milliseconds(f"sh {script} {{onnx}}", Path("/tmp/other"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("echo no device >&2; exit 3 # {onnx}", r"--latency-cmd 'echo .*': exit code 3: no device"),
        ("exit 9 # {onnx}", "exit code 9$"),
        ("no_such_program_here {onnx}", "exit code 127: .*not found"),
        ("echo done # {onnx}", "must be milliseconds; it printed 'done'"),
        ("true {onnx}", "must be milliseconds; it printed nothing"),
        ("echo -3 # {onnx}", "must be milliseconds; it printed '-3'"),
        ("echo 0 # {onnx}", "must be milliseconds; it printed '0'"),
    ],
)
def test_a_command_that_gives_no_latency(command, message):
    with pytest.raises(TargetError, match=message) as caught:
        milliseconds(command, FILE)
    assert "\n" not in str(caught.value)


def test_a_command_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    mark = tmp_path / "pid"
    start = time.perf_counter()
    with pytest.raises(TargetError, match=r"no answer within 0\.5 s"):
        milliseconds(f"sleep 60 & echo $! > {mark}; wait # {{onnx}}", FILE, timeout=0.5)
    assert time.perf_counter() - start < 20
    child = int(mark.read_text())
    for _ in range(50):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            return
        time.sleep(0.1)
    pytest.fail("its child still runs")


def test_a_command_says_where_the_file_goes():
    assert checked(None) is None and checked("time {onnx}") == "time {onnx}"
    with pytest.raises(UsageError, match=r"--latency-cmd 'bench model.onnx': write \{onnx\} where"):
        checked("bench model.onnx")


def test_the_example_for_android_reads_what_the_runtime_prints(tmp_path):
    """With a stand-in for adb: the file is pushed, and the average of onnxruntime_perf_test comes out."""
    adb = tmp_path / "adb"
    adb.write_text(
        '#!/bin/sh\necho "$@" >> "$(dirname "$0")/asked"\n[ "$1" = push ] && { echo pushed 1 file; exit; }\n'
        "echo 'Average inference time cost total: 13.340000 ms'\necho 'Avg CPU usage: 98 %'\n"
    )
    adb.chmod(0o755)
    done = subprocess.run(
        ["sh", ROOT / "examples" / "latency_over_adb.sh", "m.onnx"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "13.340000\n"
    assert "push m.onnx /data/local/tmp/model.onnx" in (tmp_path / "asked").read_text()
