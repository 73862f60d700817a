"""The command line: what it passes on, what it prints, and one clear line with its own exit code for every error."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import click
import pytest
from conftest import hears_ctrl_c
from sample_report import sample_report

import compressor
from compressor import cli, commands, options, report
from compressor.errors import (
    CompressorError,
    ContractError,
    DataError,
    FileError,
    OutputError,
    TargetError,
    UnsupportedError,
    UsageError,
)

Run = Callable[..., tuple[int, str, str]]
Raises = Callable[[BaseException], None]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file that is there; the api behind it is replaced by the tests that come so far."""
    monkeypatch.chdir(tmp_path)
    Path("model.pt2").write_bytes(b"not read here")
    return "model.pt2"


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stands in for compressor.api, so that these tests need no torch."""
    made = ModuleType("compressor.api")
    monkeypatch.setitem(sys.modules, "compressor.api", made)
    monkeypatch.setattr(compressor, "api", made, raising=False)
    return made


@pytest.fixture
def calls(api: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple, dict]]:
    """Replaces the api's four verbs; what they were called with, in order."""
    seen: list[tuple[str, tuple, dict]] = []
    check = {"output": "out", "slice": "", "error": 1e-6, "tolerance": 1e-4, "sqnr_db": 90.0, "cosine": 1.0}
    answers = {
        "compress": SimpleNamespace(
            output=Path("model-compressed"), onnx=Path("model-compressed/model.onnx"), report=sample_report()
        ),
        "verify": {"ok": True, "checks": [check], "provider": "CPUExecutionProvider", "samples": 8},
        "inspect": {"path": "model.pt2", "params": 1234567, "operators": {"aten.conv2d": 3}, "notices": []},
        "bench": [
            {"path": "a.onnx", "median_ms": 0.42, "p95_ms": 0.5, "iqr_ms": 0.01, "runs": 100},
            {"path": "b.onnx", "median_ms": 0.2, "p95_ms": 0.3, "iqr_ms": 0.02, "runs": 100},
        ],
    }

    def verb(name: str) -> Callable[..., Any]:
        return lambda *args, **options: seen.append((name, args, options)) or answers[name]

    for name in answers:
        monkeypatch.setattr(api, name, verb(name), raising=False)
    return seen


def last(text: str) -> str:
    return text.rstrip().splitlines()[-1]


# --------------------------------------------------------------------- what is passed on


def test_only_what_was_typed_reaches_the_api(run: Run, model: str, calls: list) -> None:
    code, _, _ = run(model)
    assert code == 0
    ((name, args, options),) = calls
    assert (name, args) == ("compress", (model,))
    assert set(options) == {"command", "console"}, "for the rest the api's own defaults hold"
    assert options["command"] == "compress model.pt2"


def test_every_option_has_the_apis_name(run: Run, model: str, calls: list) -> None:
    words = (
        "--passes merge,prune(macs=0.5) --target mobile --calib c.npz --calib-limit 64 --eval e.npz --model m:f "
        "--adapter lora --adapter b:0.5 --combine cat --task causal-lm "
        "--input x:f32[?,3] --input y:i64[?] --preprocess imagenet --image-input uint8,nhwc --trust-pickle "
        "--allow-missing head.* --static --output out --seed 3 --tolerance 1e-3 --print-after merge "
        "--stop-after fold --limit fold=2 --limit merge=0 --time --no-measure --latency-table r.json "
        "--latency-cmd time_{onnx}"
    )
    code, _, err = run(model, *words.split())
    assert (code, err) == (0, "")
    ((_, _, options),) = calls
    command = options.pop("command")
    assert command.startswith("compress model.pt2 --passes 'merge,prune(macs=0.5)' --target mobile")
    assert options.pop("console") is not None
    assert options == {
        **{"passes": "merge,prune(macs=0.5)", "target": "mobile", "calibration": "c.npz", "calib_limit": 64},
        **{"evaluate": "e.npz", "model_spec": "m:f", "inputs": ("x:f32[?,3]", "y:i64[?]")},
        **{"adapter": ("lora", "b:0.5"), "combine": "cat", "task": "causal-lm"},
        **{"preprocess": "imagenet", "image_input": "uint8,nhwc", "trust_pickle": True},
        **{"allow_missing": ("head.*",), "dynamic": False},
        **{"output": "out", "seed": 3, "tolerance": 1e-3, "print_after": ("merge",), "stop_after": "fold"},
        **{"limit": {"fold": 2, "merge": 0}, "time": True, "measure": False},
        "latency_table": "r.json",
        "latency_cmd": "time_{onnx}",
    }


@pytest.mark.parametrize(
    ("command", "verb"),
    [
        (commands.compress_model, "compress"),
        (commands.verify, "verify"),
        (commands.inspect, "inspect"),
        (commands.bench, "bench"),
    ],
)
def test_the_api_takes_every_option(command: click.Command, verb: str) -> None:
    """The real api this time: each name is a parameter of the verb or a field of Options."""
    from compressor import api

    taken = {f.name for f in dataclasses.fields(api.Options)} if verb != "bench" else set()
    taken |= set(signature(getattr(api, verb)).parameters)
    names = {p.name for p in command.params if isinstance(p, click.Option)} - {*options.PRINTING, "html"}
    assert names <= taken
    assert not {"calib", "eval"} & taken, "the words of the command line are other names"


def test_options_may_stand_before_the_model(run: Run, model: str, calls: list) -> None:
    assert run("--passes", "merge", model)[0] == 0
    assert calls[0][1] == (model,) and calls[0][2]["passes"] == "merge"


def test_the_other_commands(run: Run, model: str, calls: list) -> None:
    Path("a.onnx").touch()
    Path("b.onnx").touch()
    assert run("verify", model, "a.onnx", "--data", "d.npz", "--tolerance", "0.1", "--model", "m:f")[0] == 0
    assert run("inspect", model, "--trust-pickle")[0] == 0
    assert run("bench", "a.onnx", "b.onnx", "--threads", "2", "--batch", "4", "--seconds", "0.5")[0] == 0
    assert all(words.pop("console") is not None for name, _, words in calls if name != "inspect")
    assert calls == [
        ("verify", (model, "a.onnx"), {"data": "d.npz", "tolerance": 0.1, "model_spec": "m:f"}),
        ("inspect", (model,), {"trust_pickle": True}),
        ("bench", (["a.onnx", "b.onnx"],), {"threads": 2, "batch": 4, "seconds": 0.5}),
    ]


# ----------------------------------------------------------------------- what is printed


def test_the_last_line_is_the_next_command(run: Run, model: str, calls: list) -> None:
    Path("a.onnx").touch()
    assert last(run(model)[1]) == "compress bench model-compressed/model.onnx"
    assert last(run("verify", model, "a.onnx")[1]) == "compress bench a.onnx"
    assert last(run("bench", "a.onnx")[1]) == "compress inspect a.onnx"
    assert last(run("inspect", model)[1]) == "compress model.pt2"
    assert last(run("inspect", "a.onnx")[1]) == "compress bench a.onnx"


def test_the_last_line_speaks_the_users_own_command(
    run: Run, model: str, calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    for argv0, words in (
        ("/x/bin/compressor", "compressor"),
        ("/x/compressor/__main__.py", "python -m compressor"),
    ):
        monkeypatch.setattr(sys, "argv", [argv0])
        assert commands.program() == words
    monkeypatch.setattr(sys, "argv", ["/x/pytest"])
    assert commands.program() == "compress"


def test_after_stop_after_nothing_is_there_to_bench(
    run: Run, model: str, calls: list, api: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = SimpleNamespace(output=None, onnx=None, report=sample_report() | {"emitted": None})
    monkeypatch.setattr(api, "compress", lambda *args, **options: stopped)
    code, out, _ = run(model, "--stop-after", "merge")
    assert code == 0 and "nothing was emitted" in out and last(out) == "compress inspect model.pt2"


def test_a_pipe_gets_no_colour(run: Run, model: str, calls: list) -> None:
    _, out, err = run(model)
    assert "bounded, warned" in out
    assert "\x1b" not in out + err


def test_json_is_all_there_is(run: Run, model: str, calls: list) -> None:
    Path("a.onnx").touch()
    assert json.loads(run(model, "--json")[1]) == sample_report()
    assert json.loads(run("verify", model, "a.onnx", "--json")[1])["samples"] == 8
    assert json.loads(run("inspect", model, "--json")[1])["params"] == 1234567
    assert len(json.loads(run("bench", "a.onnx", "--json")[1])) == 2


def test_quiet_prints_nothing(run: Run, model: str, calls: list) -> None:
    Path("a.onnx").touch()
    for words in ((model,), ("verify", model, "a.onnx"), ("inspect", model), ("bench", "a.onnx")):
        assert run(*words, "--quiet") == (0, "", "")
    assert run(model)[1] != ""


def test_bench_compares_with_the_first(run: Run, model: str, calls: list) -> None:
    Path("a.onnx").touch()
    out = run("bench", "a.onnx")[1]
    assert "1.00x" in out and "2.10x" in out and "0.420" in out


def test_verify_fails_where_the_models_differ(
    run: Run, model: str, calls: list, api: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("a.onnx").touch()
    code, out, err = run("verify", model, "a.onnx")
    assert (code, err) == (0, "") and "the two models agree (CPUExecutionProvider, 8 samples)" in out
    monkeypatch.setattr(api, "verify", lambda *args, **options: {"ok": False, "checks": []})
    code, out, err = run("verify", model, "a.onnx")
    assert code == 7 and err == "error: a.onnx: its outputs differ from those of model.pt2\n"


def test_inspect_shows_a_report_and_what_ran(run: Run, tmp_path: Path) -> None:
    report.write_report(tmp_path / "report.json", sample_report())
    (tmp_path / "model.onnx").touch()
    for path in (tmp_path, tmp_path / "report.json"):
        code, out, _ = run("inspect", path)
        assert code == 0 and "compress digits.pt2 --passes merge,int8" in out and "5.29x smaller" in out
        assert last(out) == f"compress bench {tmp_path / 'model.onnx'}"
    assert json.loads(run("inspect", tmp_path / "report.json", "--json")[1]) == sample_report()
    (tmp_path / "report.json").write_text("{}")
    code, out, err = run("inspect", tmp_path / "report.json")
    assert (code, out) == (2, "") and "no 'schema'" in err


def test_inspect_shows_facts(run: Run, model: str, calls: list) -> None:
    out = run("inspect", model)[1]
    assert "params" in out and "1.23 M" in out and "aten.conv2d" in out and "none" in out


def test_inspect_shows_groups_where_a_pass_pruned(run: Run, model: str, calls: list, tmp_path: Path) -> None:
    row = {"where": "stem and 2 more", "groups": 16, "width": 16, "left": 12, "least": 8, "tensors": 9}
    row |= {"params": 1500, "macs": 2_000_000, "state": "pruned", "why": "", "remedy": ""}
    frozen = row | {
        "where": "head",
        "left": 16,
        "state": "frozen",
        "why": "it is reduced",
        "remedy": "norms=true [x]",
    }
    sample = sample_report()
    sample["rows"][1]["facts"] = {"least": {"macs": 0.31, "params": 0.25}, "ledger": [row, frozen]}
    report.write_report(tmp_path / "report.json", sample)
    code, out, err = run("inspect", tmp_path / "report.json", "--groups")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert "stem and 2 more 16 -> 12 8 9 1.5 k 2 M pruned" in lines
    assert "head 16 8 9 1.5 k 2 M frozen it is reduced; norms=true [x]" in lines
    assert lines[-1] == "with every layer at its least width 31% of the MACs and 25% of the parameters stay"
    assert run("inspect", model, "--json", "--groups")[0] == 0 and calls[-1][2] == {"groups": True}


def test_passes_and_targets_are_listed_with_their_settings(run: Run) -> None:
    code, out, _ = run("passes")
    assert code == 0 and "merge" in out and "bounded" in out
    assert last(out) == "compress MODEL --passes merge,fold"
    code, out, _ = run("targets")
    assert code == 0 and "cpu" in out and "channel_multiple=16" in out and "opset=20" in out
    assert out.count("this machine") == 1


def test_help_leads_with_the_default_command(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0 and out.startswith("Usage: compress MODEL [OPTIONS]\n       compress COMMAND ...\n")
    for word in ("--passes", "--calib", "--trust-pickle", "verify", "bench", "Exit codes"):
        assert word in out
    assert run() == (code, out, "")
    assert run("bench", "--help")[1].startswith("Usage: compress bench [OPTIONS] ONNX")
    assert run("--version")[1].startswith("compressor, version ")


# -------------------------------------------------------------------------------- errors


def test_a_missing_file_is_a_missing_file(run: Run, model: str) -> None:
    assert run("nothing.pt2") == (3, "", "error: nothing.pt2: no such file\n")
    assert run("modle.pt2") == (3, "", "error: modle.pt2: no such file; did you mean 'model.pt2'?\n")
    assert run("verify", model, "x.onnx") == (3, "", "error: x.onnx: no such file\n")
    assert run("inspect", "x.json")[0] == run("bench", "x.onnx")[0] == 3


def test_almost_a_command_is_no_model(run: Run, model: str, calls: list) -> None:
    for words in (("verfy",), ("verfy", "a", "b", "--threads", "2")):
        assert run(*words) == (3, "", "error: verfy: no such file; did you mean the command 'verify'?\n")
    Path("verfy").touch()
    assert run("verfy")[0] == 0 and calls[0][1] == ("verfy",), "a file of that name is a model"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("model.pt2", "--pases", "merge"), "--passes"),
        (("model.pt2", "--seed", "x"), "--seed"),
        (("model.pt2", "--limit", "fold"), "PASS=N"),
        (("model.pt2", "--limit", "fold=-1"), "PASS=N"),
        (("model.pt2", "--calib-limit", "0"), "--calib-limit"),
        (("model.pt2", "another.pt2"), "another.pt2"),
        (("verify", "model.pt2"), "ONNX"),
        (("bench",), "ONNX"),
        (("--passes", "merge"), "MODEL"),
    ],
)
def test_wrong_usage(run: Run, model: str, calls: list, words: tuple[str, ...], message: str) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "") and message in err
    assert err.startswith("error: ") and err.count("\n") == 1 and "--help`)" in err
    assert calls == []


@pytest.fixture
def raises(api: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """raises(error): the api's compress raises it."""

    def prepare(error: BaseException) -> None:
        def fail(*args: Any, **options: Any) -> None:
            raise error

        monkeypatch.setattr(api, "compress", fail, raising=False)

    return prepare


ERRORS = [
    (CompressorError, 1),
    (UsageError, 2),
    (FileError, 3),
    (DataError, 4),
    (OutputError, 5),
    (UnsupportedError, 6),
    (ContractError, 7),
    (TargetError, 8),
]


@pytest.mark.parametrize(("kind", "code"), ERRORS)
def test_each_error_has_its_exit_code(
    run: Run, model: str, raises: Raises, kind: type[Exception], code: int
) -> None:
    raises(kind("what, where, what to do"))
    assert run(model) == (code, "", "error: what, where, what to do\n")
    assert run(model, "--traceback")[2].startswith("Traceback")


def test_exit_codes_are_distinct() -> None:
    assert len({code for _, code in ERRORS} | {cli.BUG, cli.INTERRUPTED, cli.PIPE_CLOSED}) == len(ERRORS) + 3


def test_long_lists_follow_indented(run: Run, model: str, raises: Raises) -> None:
    raises(FileError("model.pt2: 2 keys are missing:\nfc.weight\n  fc.bias\n"))
    err = run(model)[2]
    assert err == "error: model.pt2: 2 keys are missing:\n  fc.weight\n  fc.bias\n"


def test_a_bug_is_called_one(run: Run, model: str, raises: Raises) -> None:
    raises(KeyError("conv"))
    code, out, err = run(model)
    assert (code, out) == (70, "") and err.startswith("error: KeyError: 'conv' (this is a bug in compressor")
    assert err.count("\n") == 1
    code, _, err = run("--traceback", model)
    assert code == 70 and "Traceback" in err and "in compress_model" in err


def test_out_of_memory_is_no_bug(run: Run, model: str, raises: Raises) -> None:
    raises(MemoryError())
    code, _, err = run(model)
    assert code == 1 and "out of memory" in err and "bug" not in err


def test_an_interrupt_is_one_line(run: Run, model: str, raises: Raises) -> None:
    raises(KeyboardInterrupt())
    assert run(model) == (130, "", "error: interrupted\n")


# ------------------------------------------------------------------ processes of their own


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    made = sample_report()
    made["notices"] = ["x" * 100] * 5000
    report.write_report(tmp_path / "report.json", made)
    command = f"'{sys.executable}' -m compressor inspect report.json | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (cli.PIPE_CLOSED, "") and "command" in done.stdout
    whole = subprocess.run(
        ["bash", "-c", command.replace("head -n 1", "cat")], cwd=tmp_path, capture_output=True, check=False
    )
    assert whole.returncode == 0


def test_ctrl_c_while_python_works(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom types import ModuleType\nfrom compressor import cli\n"
        "api = ModuleType('compressor.api')\n"
        "def compress(*args, **options): print('started', flush=True); time.sleep(60)\n"
        "api.compress = compress\nsys.modules['compressor.api'] = api\n"
        "import compressor; compressor.api = api\n"
        "sys.exit(cli.main(['model.pt2']))\n"
    )
    (tmp_path / "model.pt2").touch()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hears_ctrl_c,
    )
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "error: interrupted\n")


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Path]:
    """A working directory whose names shadow ours, and those of what we need; importing one of them shouts."""
    for name in ("passes", "targets", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('shadowed')")
    for name in ("click", "rich", "pytest", "report", "registry"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')")
    yield tmp_path


@pytest.mark.parametrize(
    "launcher",
    [["-m", "compressor"], [str(Path(sys.executable).parent / "compress")]],
    ids=["module", "script"],
)
def test_a_working_directory_shadows_nothing(
    launcher: list[str], hostile: Path, python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    if launcher[0] != "-m" and not Path(launcher[0]).exists():
        pytest.skip("the package is not installed, so there is no console script")
    for words in (["--help"], ["targets"], ["passes"]):
        done = python(*launcher, *words, cwd=hostile)
        assert (done.returncode, done.stderr) == (0, ""), words
    plain = python("-c", "import passes", cwd=hostile)
    assert plain.returncode == 1 and "shadowed" in plain.stderr, "the trap works"


def test_the_working_directory_stays_importable(
    tmp_path: Path, python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """It moves to the end of the path; a model's own code lies there."""
    code = (
        "import runpy, sys; sys.argv = ['compressor', '--version']; sys.path.insert(0, sys.path.pop(0) or '')\n"
        "try: runpy.run_module('compressor', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "import os; assert sys.path[-1] in ('', os.getcwd()), sys.path\n"
        "assert sys.path[0] not in ('', os.getcwd()), sys.path"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_deleted_working_directory(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"cd '{gone}' && rmdir '{gone}' && '{sys.executable}' -m compressor --version"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
