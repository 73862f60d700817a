"""report.json: whole or absent, the same bytes for the same run, and tables that say what the file says."""

from __future__ import annotations

import copy
import io
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from sample_report import sample_report

from compressor import report
from compressor.errors import FileError, OutputError, UsageError


def render(made: dict[str, Any], **options: Any) -> str:
    console = Console(file=io.StringIO(), width=140)
    report.render(made, console, **options)
    return console.file.getvalue()


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    made = sample_report()
    path = report.write_report(tmp_path / "report.json", made)
    assert report.read_report(path) == made
    assert [f.name for f in tmp_path.iterdir()] == ["report.json"], "the temporary file must be gone"
    changed = copy.deepcopy(made)
    changed["rows"][1]["params"] += 1
    assert report.read_report(path) != changed


def test_the_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    made = sample_report()
    shuffled = dict(reversed(made.items()))
    assert list(made) != list(shuffled)
    first = report.write_report(tmp_path / "a.json", made).read_bytes()
    assert report.write_report(tmp_path / "b.json", shuffled).read_bytes() == first
    assert report.write_report(tmp_path / "c.json", made | {"seed": 1}).read_bytes() != first


def test_numbers_that_json_has_no_word_for_stay_readable(tmp_path: Path) -> None:
    made = {
        "sqnr_db": math.inf,
        "share": math.nan,
        "count": np.int64(3),
        "ratio": np.float32("inf"),
        "path": Path("a"),
        "names": {"b", "a"},
        "pair": (1, 2),
    }
    text = report.write_report(tmp_path / "report.json", made).read_text()

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is not JSON")

    seen = json.loads(text, parse_constant=refuse)
    assert seen == {
        "sqnr_db": "inf",
        "share": "nan",
        "count": 3,
        "ratio": "inf",
        "path": "a",
        "names": ["a", "b"],
        "pair": [1, 2],
    }
    with pytest.raises(AssertionError):
        json.loads(json.dumps({"sqnr_db": math.inf}), parse_constant=refuse)
    with pytest.raises(TypeError, match="plain data, not object"):
        report.dumps({"x": object()})


def test_a_failed_write_leaves_the_old_report_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = report.write_report(tmp_path / "report.json", sample_report())
    before = path.read_bytes()

    def full(*names: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(report.os, "replace", full)
        with pytest.raises(
            OutputError, match=r"report\.json: cannot write the report: No space left"
        ) as caught:
            report.write_report(path, sample_report() | {"seed": 9})
    assert caught.value.exit_code == 5
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    report.write_report(path, sample_report() | {"seed": 9})
    assert path.read_bytes() != before


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="nowhere"):
        report.write_report(tmp_path / "nowhere" / "report.json", sample_report())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "not JSON"),
        ("[1, 2]", "no 'schema'"),
        ('{"inputs": []}', "no 'schema'"),
        ('{"schema": 2, "rows": []}', "of schema 2, and this version reads schema 1"),
        ('{"schema": 1}', "'rows'"),
        ('{"schema": 1, "rows": [3]}', "'rows'"),
        ('{"schema": 1, "rows": [{"config": "merge"}]}', "'rows'"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        report.read_report(path)
    path.write_text('{"schema": 1, "rows": [{"pass": "input"}]}')
    assert report.read_report(path)["rows"] == [{"pass": "input"}]


def test_a_missing_report_is_a_file_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot read the report"):
        report.read_report(tmp_path / "report.json")


def test_the_table_has_a_row_a_pass_with_the_number_that_judged_it() -> None:
    lines = render(sample_report()).splitlines()
    (merge,) = [line for line in lines if line.startswith(("merge ", " merge ")) and "exact" in line]
    assert "exact, proved" in merge and "2.0e-07 of 1e-05" in merge and "99.00 % (+0.00)" in merge
    (int8,) = [line for line in lines if "bounded" in line]
    assert "bounded, warned" in int8 and "98.50 % (-0.50)" in int8 and "920 kB" in int8
    assert "19.2 dB" in int8 and "41.5" not in int8, "the worst slice counts, not the first"


def test_declines_are_counted_by_reason() -> None:
    (line,) = [line for line in render(sample_report()).splitlines() if "its output is read twice" in line]
    assert "merge" in line and " 5 " in line and "layer2" in line and "and 2 more" in line
    assert "layer3" not in line
    alone = sample_report()
    alone["rows"][1]["declines"] = []
    assert "left alone" not in render(alone)


def test_the_emitted_file_is_compared_with_the_float_one() -> None:
    text = render(sample_report())
    assert "700 kB, 5.29x smaller than fp32 ONNX (3.7 MB)" in text
    assert "0.2 ms, 2.10x faster than fp32 ONNX (0.42 ms), 1 thread" in text
    assert "verified  on CPUExecutionProvider, 51 samples: error 2.0e-07, SQNR 38.0 dB" in text
    assert "99.00 % -> 98.50 % (-0.50)" in text
    assert text.splitlines()[-1].strip() == "memory    537 MB at most, 315 MB of it not mapped from files"
    slower = sample_report()
    slower["emitted"]["latency"]["ratio"] = 0.5
    slower["emitted"]["bytes"] = 7_400_000
    slower["memory"] = {"peak_anonymous_mb": None}  # where the system does not tell
    text = render(slower)
    assert "memory" not in text
    assert "2.00x slower" in text and "2.00x larger" in text and "faster" not in text


def test_a_run_that_stopped_early_says_so() -> None:
    stopped = sample_report()
    del stopped["emitted"]
    assert "nothing was emitted" in render(stopped)
    assert "nothing was emitted" not in render(sample_report())


def test_markup_in_a_report_is_text() -> None:
    assert "19.2 dB [check the metric]" in render(sample_report())


def test_details_say_what_ran() -> None:
    short, long = render(sample_report()), render(sample_report(), details=True)
    for words in ("compress digits.pt2 --passes merge,int8", "sha256 0123456789ab", "digits.npz, 205 samples",
                  "2 x linear + linear into linear", "torch 2.13.0", "merge,fold,int8"):  # fmt: skip
        assert words in long and words not in short


def test_a_report_with_nothing_optional_renders() -> None:
    assert "input" in render({"schema": 1, "rows": [{"pass": "input"}]}, details=True)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (58_123, "58.1 kB"),
        (2_500_000, "2.5 MB"),
        (3.2e12, "3.2 TB"),
    ],
)
def test_sizes(number: float, words: str) -> None:
    assert report.size(number) == words
    assert report.size(number * 3 + 1) != words


def test_counts_and_metrics() -> None:
    assert report.count(917_266) == "917 k" and report.count(None) == ""
    assert report.metric("top1", 0.975, 0.98) == "97.50 % (-0.50)"
    assert report.metric("cosine", 0.99812, 0.9991) == "0.9981 (-0.00098)"


def test_bytes_that_are_no_text_are_spelled_out(tmp_path, run):
    path = tmp_path / os.fsdecode(b"net\xff.json")
    told = sample_report()
    told["model"]["path"] = os.fsdecode(b"net\xff.pt2")
    report.write_report(path, told)
    assert report.read_report(path)["model"]["path"] == r"net\udcff.pt2"
    code, shown, _ = run("inspect", path)
    assert code == 0 and shown.encode()
    assert run("inspect", path, "--json")[1].encode()
