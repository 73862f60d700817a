"""A process that reads hostile files under watch: bounded memory and time, and what it runs or writes is noted.

`Sandbox` starts it and hands it jobs; `python sandbox.py` is the process itself. What Python does shows in audit
events; what native code does, in the folders that lie round the file, which must not change.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MEMORY = 3 << 29  # bytes of address space that a job may take beside what the libraries have
SECONDS = 20  # of processor time, for one job
HANGS = 300  # seconds by the clock, after which it hangs
MODULE = "canary_module"  # importing it makes the canary
WRITES = {
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate",
    "shutil.rmtree", "shutil.move",
}  # fmt: skip
STARTS = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "socket.connect"}
EXIT_CODES = {0, 2, 3, 4, 5, 6, 7, 8}


@dataclass(frozen=True)
class Answer:
    """code: exit code of the command line, negative for a signal. said: its standard error. bad: broken rules."""

    code: int
    said: str
    seconds: float
    peak_mb: float
    bad: list[str] = field(default_factory=list)


class Sandbox:
    """root/files holds the files of a job, root/out takes what is written; everything else must stay as it is."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("files", "out", "tmp", "home", "cwd"):
            (root / name).mkdir(parents=True, exist_ok=True)
        self.canary = root / "canary"
        fires = f"import os\nos.makedirs({str(self.canary)!r}, exist_ok=True)\n"
        code = f"{fires}class Evil: pass\ndef evil(*a): return None\n"
        (root / "cwd" / f"{MODULE}.py").write_text(code)
        (root / "secret.bin").write_bytes(b"\x00\x00\x80\x3f" * 64)
        self._child: subprocess.Popen[str] | None = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                pipe.close()
            self._child = None

    def run(self, *words: str) -> Answer:
        """`compress WORDS...` under watch. A word `data:PATH` reads calibration data by the library instead."""
        before = self._tree()
        if self._child is None:
            self._start()
        assert self._child is not None and self._child.stdin is not None and self._child.stdout is not None
        started = time.perf_counter()
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(json.dumps(words) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        if line:
            answer = Answer(**json.loads(line))
        else:  # it died
            code = self._child.wait()
            self.close()
            answer = Answer(code, "", time.perf_counter() - started, 0.0, [f"the process ended with {code}"])
        bad = list(answer.bad)
        if self.canary.exists():
            bad.append("code of the file was run")
            shutil.rmtree(self.canary)
        bad += [f"{name} is new or changed" for name in sorted(self._tree() ^ before)]
        for name in ("out", "tmp"):
            shutil.rmtree(self.root / name)
            (self.root / name).mkdir()
        return Answer(answer.code, answer.said, answer.seconds, answer.peak_mb, bad)

    def _start(self) -> None:
        environment = os.environ | {
            "HOME": str(self.root / "home"),
            "TMPDIR": str(self.root / "tmp"),
            "PYTHONPATH": os.pathsep.join(
                [*filter(None, [os.environ.get("PYTHONPATH")]), str(HERE.parent.parent)]
            ),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(
                self.root / "tmp"
            ),  # a parent that has loaded torch would name its own
        }
        self._child = subprocess.Popen(
            [sys.executable, str(HERE / "sandbox.py"), str(self.root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=self.root / "cwd",
            env=environment,
        )

    def _tree(self) -> set[tuple[str, int, int]]:
        """Everything that must not change: name, size and time of what lies outside of out and tmp."""
        found = set()
        for folder, names, files in os.walk(self.root):
            if Path(folder) == self.root:
                names[:] = [n for n in names if n not in ("out", "tmp")]
            for name in (*names, *files):
                state = os.lstat(os.path.join(folder, name))
                size = 0 if os.path.isdir(os.path.join(folder, name)) else state.st_size
                found.add((os.path.join(folder, name), size, 0 if size == 0 else state.st_mtime_ns))
        return found


# -------------------------------------------------------------------- the process itself


class _Late(BaseException):
    pass


class _Watch:
    """Audit events that no reader of a file has a reason for."""

    def __init__(self, root: Path) -> None:
        self.allowed = (str(root / "out"), str(root / "tmp"), "/dev/", "/proc/")
        self.found: list[str] = []
        self.on = False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in STARTS or (event == "subprocess.Popen" and "compressor.apart" not in str(args[1])):
            self.found.append(f"{event} {str(args)[:200]}")
        elif event == "open" and isinstance(args[0], (str, bytes)):
            flags = args[2] if isinstance(args[2], int) else 0
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or any(c in str(args[1] or "") for c in "wax+"):
                self._write(event, os.fsdecode(args[0]))
        elif event in WRITES and isinstance(args[0], (str, bytes, os.PathLike)) and args[-1] in (-1, None):
            self._write(event, os.fsdecode(args[0]))

    def _write(self, event: str, path: str) -> None:
        if not os.path.abspath(path).startswith(self.allowed):
            self.found.append(f"{event} {path[:200]}")


def _job(words: list[str]) -> tuple[int, str]:
    from compressor.cli import main

    said, shown = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown):
        if words[0].startswith("data:"):
            code = _read_data(words[0].removeprefix("data:"))
        else:
            code = main(words)
    errors, text = said.getvalue(), shown.getvalue()
    strange = sorted({c for c in errors + text if unicodedata.category(c) == "Cc" and c != "\n"})
    if strange:
        errors += f"\nCONTROL CHARACTERS {strange}"
    return code, errors


def _read_data(path: str) -> int:
    import torch

    from compressor import data, records, texts
    from compressor.errors import CompressorError, printable
    from compressor.ir import Input

    try:
        inputs = [Input("x", torch.float32, ("batch", 3, 8, 8))]
        how = {}
        if Path(path).suffix in records.FILES:
            inputs = [
                Input(name, torch.int64, ("batch", "sequence")) for name in ("input_ids", "attention_mask")
            ]
            beside = Path(path).parent
            folder = beside if (beside / "tokenizer.json").exists() else beside.parent / "models" / "bert"
            how["text"] = texts.Reading(folder, text="text", longest=32)
        elif Path(path).is_dir():
            how["preprocess"] = "imagenet"
        for _ in data.open_data(path, inputs, limit=64, **how):
            pass
    except CompressorError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return error.exit_code
    return 0


def _serve(root: Path) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    import onnx  # noqa: F401
    import torch

    from compressor import api, console, runtime  # noqa: F401

    runtime.providers()
    torch.set_num_threads(1)
    watch = _Watch(root)
    for sign in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(sign, _late)
    for line in sys.stdin:
        words = json.loads(line)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, resource.RLIM_INFINITY))
        code, said, watch.found, watch.on = 0, "", [], True
        start = time.process_time()
        bad: list[str] = []
        signal.alarm(HANGS)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            code, said = _job(words)
        except _Late:
            code, bad = -14, [f"over {SECONDS} s"]
        except BaseException as error:
            code, bad = -1, [f"{type(error).__name__} came through: {str(error)[:200]}"]
        finally:
            signal.alarm(0)
            signal.setitimer(signal.ITIMER_PROF, 0)
        watch.on = False
        seconds = time.process_time() - start
        bad += _rules(code, said) + watch.found
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        answers.write(
            json.dumps({"code": code, "said": said[-600:], "seconds": seconds, "peak_mb": peak, "bad": bad})
            + "\n"
        )
        answers.flush()


def _late(*_: object) -> None:
    raise _Late


def _rules(code: int, said: str) -> list[str]:
    """What is wrong with how a command ended: an error is one line (and names indented below it), and has its code."""
    bad = []
    if code not in EXIT_CODES and code >= 0:
        bad.append(f"exit code {code}")
    lines = [line for line in said.splitlines() if line]
    first = [line for line in lines if line.startswith("error: ")]
    if code > 0 and len(first) != 1:
        bad.append(f"{len(first)} lines of error")
    if "Traceback" in said:
        bad.append("a traceback")
    if "CONTROL CHARACTERS" in said:
        bad.append("control characters reach the terminal")
    return bad


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
