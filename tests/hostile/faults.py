"""Runs that something goes wrong with from outside: killed, interrupted, without room, two at once.

`Host` is a process that has everything imported and forks for each run, so that the moments of a run are those of its
work. Each fault answers what was broken, in words; nothing if all is as it must be.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WRITTEN = {"model.onnx", "report.json", "signature.json", "usage.md"}
RESERVED = {"con", "prn", "aux", "nul", *(f"com{i}" for i in range(10)), *(f"lpt{i}" for i in range(10))}


@dataclass(frozen=True)
class Ended:
    """code: exit code, negative for a signal. said: what it printed. seconds: from its fork on."""

    code: int
    said: str
    seconds: float


class Host:
    """Forks a run of the command line when asked."""

    def __init__(self) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), *sys.path]),
            "OMP_NUM_THREADS": "1",
        }
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        self._child = subprocess.Popen(
            [sys.executable, str(HERE / "faults.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            pipe.close()

    def start(
        self,
        *words: str,
        cwd: Path,
        log: Path,
        temp: Path | None = None,
        most: int | None = None,
        environment: dict[str, str] | None = None,
    ) -> Running:
        """A run of `compress WORDS...` in `cwd`. temp: the folder for temporary files. most: bytes of a file."""
        job = {
            "words": words,
            "cwd": str(cwd),
            "log": str(log),
            "temp": str(temp) if temp else None,
            "most": most,
        }
        job["environment"] = environment or {}
        pid = int(self._ask(job))
        return Running(self, pid, log, time.perf_counter())

    def run(self, *words: str, **options: Any) -> Ended:
        return self.start(*words, **options).wait()

    def _ask(self, job: dict[str, Any]) -> str:
        self._child.stdin.write(json.dumps(job) + "\n")
        self._child.stdin.flush()
        return self._child.stdout.readline()


@dataclass(frozen=True)
class Running:
    host: Host
    pid: int
    log: Path
    started: float

    def send(self, sign: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, sign)

    def wait(self) -> Ended:
        code = int(self.host._ask({"wait": self.pid}))
        said = self.log.read_text(errors="replace") if self.log.exists() else ""
        return Ended(code, said, time.perf_counter() - self.started)


# -------------------------------------------------------------------- what must hold


def contents(folder: Path) -> dict[str, str]:
    """Name -> checksum of everything in a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def whole(folder: Path) -> list[str]:
    """What is missing for an output to be complete and of one run."""
    bad = [f"{name} is missing" for name in sorted(WRITTEN) if not (folder / name).is_file()]
    if not bad:
        emitted = json.loads((folder / "report.json").read_text())["emitted"]
        if hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest() != emitted["sha256"]:
            bad.append("model.onnx is not the one of report.json")
        sizes = {
            name: (folder / name).stat().st_size for name in emitted["files"] if (folder / name).is_file()
        }
        bad += [f"{name} is of another run" for name, size in sizes.items() if size != emitted["files"][name]]
    return bad


def untouched(output: Path, before: dict[str, str]) -> list[str]:
    """The output is the old one to the byte, or a whole new one."""
    if not output.exists():
        return ["the output is gone"] if before else []
    return [] if contents(output) == before else whole(output)


def litter(place: Path, known: set[str]) -> list[str]:
    return [f"{path.name} lies beside the output" for path in place.iterdir() if path.name not in known]


def swept(output: Path, known: set[str]) -> list[str]:
    """What the beginning of a next run leaves of the folders of killed ones."""
    from compressor import publishing

    class Stop(Exception):
        pass

    with contextlib.suppress(Stop), publishing.staging(output):
        raise Stop
    return litter(output.parent, known)


# -------------------------------------------------------------------- the faults


class Scene:
    """A folder with a model and an earlier output; a run takes `duration` seconds."""

    def __init__(self, host: Host, model: Path, folder: Path) -> None:
        self.host, self.model, self.folder = host, model, folder
        self.place = folder / "place"
        self.output = self.place / "out"
        shutil.rmtree(folder, ignore_errors=True)
        self.place.mkdir(parents=True)
        self.count = 0
        first = self.run("fold")
        second = self.run("merge")
        if first.code or second.code or whole(self.output):
            raise RuntimeError(f"an undisturbed run fails: {first.said}{second.said}{whole(self.output)}")
        (self.output / "notes.txt").write_text("mine")
        self.duration = second.seconds
        self.before = contents(self.output)

    def words(self, passes: str, output: Path | None = None) -> list[str]:
        return [str(self.model), "--passes", passes, "--no-measure", "-q", "-o", str(output or self.output)]

    def start(self, passes: str, output: Path | None = None, **options: Any) -> Running:
        self.count += 1
        log = self.folder / f"log{self.count}"
        return self.host.start(*self.words(passes, output), cwd=self.folder, log=log, **options)

    def run(self, passes: str, output: Path | None = None, **options: Any) -> Ended:
        return self.start(passes, output, **options).wait()

    def seen(self) -> list[str]:
        """After a fault: what is broken of the output; and the state that the next fault begins with."""
        bad = untouched(self.output, self.before)
        if not (self.output / "notes.txt").is_file():
            bad.append("a file of the user's is gone")
        self.before = contents(self.output)
        return bad

    def killed(self, share: float) -> list[str]:
        """kill -9 after this share of a run's time."""
        running = self.start("merge,fold" if self.count % 2 else "fold")
        time.sleep(share * self.duration)
        running.send(signal.SIGKILL)
        running.wait()
        return self.seen() + swept(self.output, {"out"})

    def interrupted(self, share: float) -> list[str]:
        """Ctrl-C after this share of a run's time."""
        running = self.start("merge,fold" if self.count % 2 else "fold")
        time.sleep(share * self.duration)
        running.send(signal.SIGINT)
        ended = running.wait()
        bad = [] if ended.code in (0, 130) else [f"exit code {ended.code}: {ended.said[-200:]}"]
        if "Traceback" in ended.said:
            bad.append(f"a traceback: {ended.said[-400:]}")
        return bad + self.seen() + litter(self.place, {"out"})

    def two_at_once(self, other: float) -> list[str]:
        """Two runs, the second begun after this share of the first one's time."""
        one = self.start("fold")
        time.sleep(other * self.duration)
        two = self.start("merge,fold")
        codes = [one.wait().code, two.wait().code]
        bad = [f"exit code {code}" for code in codes if code]
        return bad + whole(self.output) + self.seen() + litter(self.place, {"out"})

    def no_longer_files(self, most: int) -> list[str]:
        """No file may be longer than so many bytes: a quota."""
        return (
            self._refused(self.run("fold", most=most), {0, 4, 5}) + self.seen() + litter(self.place, {"out"})
        )

    def full(self, spare: int) -> list[str]:
        """The output lies on a disk that has so many kilobytes left beside an earlier output."""
        held = sum(4 + 4 * -(-path.stat().st_size // 4096) for path in self.output.rglob("*"))
        with disk(self.folder / "disk", self.output, 8 + held + spare) as place:
            before = contents(place / "out")
            bad = self._refused(self.run("fold", place / "out"), {0, 5})
            return bad + untouched(place / "out", before) + litter(place, {"out"})

    def no_temp(self, kilobytes: int) -> list[str]:
        """The disk for temporary files has this size."""
        with disk(self.folder / "temp", None, kilobytes) as place:
            bad = self._refused(self.run("fold", temp=place), {0, 4, 5})
            return bad + self.seen() + litter(self.place, {"out"}) + litter(place, set())

    def read_only(self) -> list[str]:
        """The disk of the output takes nothing."""
        with disk(self.folder / "disk", self.output, 4096, read_only=True) as place:
            before = contents(place / "out")
            bad = self._refused(self.run("fold", place / "out"), {5})
            bad += self._refused(self.run("fold", place / "new"), {5})
            return bad + untouched(place / "out", before) + litter(place, {"out"})

    def named(self, name: str, language: str = "C") -> list[str]:
        """A model and an output with this name, under this locale."""
        folder = self.folder / "named"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        model = folder / f"{name}.pt2"
        shutil.copy(self.model, model)
        log = self.folder / "log_named"
        words = [f"./{model.name}", "--passes", "fold", "--no-measure", "-q"]
        environment = {"LANG": language, "LC_ALL": language, "PYTHONIOENCODING": ""}
        ended = self.host.run(*words, cwd=folder, log=log, environment=environment)
        bad = self._refused(ended, {0})
        output = folder / f"{name}-compressed"
        bad += whole(output) if not ended.code else []
        bad += [f"{p.name} is no name on Windows" for p in output.rglob("*") if not windows_safe(p.name)]
        return bad + litter(folder, {model.name, output.name})

    def _refused(self, ended: Ended, codes: set[int]) -> list[str]:
        """An error is one line, and has its code."""
        bad = [] if ended.code in codes else [f"exit code {ended.code}: {ended.said[-300:]}"]
        lines = [line for line in ended.said.splitlines() if line.startswith("error: ")]
        if ended.code > 0 and (len(lines) != 1 or "Traceback" in ended.said):
            bad.append(f"not one line: {ended.said[-300:]}")
        return bad


@contextlib.contextmanager
def disk(folder: Path, output: Path | None, kilobytes: int, *, read_only: bool = False) -> Iterator[Path]:
    """A small file system of its own, with a copy of an output on it."""
    folder.mkdir(exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", folder], check=True, capture_output=True
    )
    try:
        if output is not None:
            shutil.copytree(output, folder / "out")
        if read_only:
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True, capture_output=True)
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True, capture_output=True)


def can_mount(folder: Path) -> bool:
    try:
        with disk(folder, None, 64):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def windows_safe(name: str) -> bool:
    stem = name.split(".")[0].lower()
    return (
        stem not in RESERVED
        and not name.endswith((".", " "))
        and not any(c in '<>:"/\\|?*' or ord(c) < 32 for c in name)
    )


def drawn(scene: Scene, rng: random.Random, mounts: bool) -> tuple[str, Callable[[], list[str]]]:
    """A fault at random: its name, and what makes it."""
    share, size = rng.random() * 1.05, int(2 ** rng.uniform(4, 11))
    faults: list[tuple[str, Callable[[], list[str]]]] = [
        *[("killed", lambda: scene.killed(share))] * 4,
        *[("interrupted", lambda: scene.interrupted(share))] * 3,
        ("two at once", lambda: scene.two_at_once(share)),
        ("files cut short", lambda: scene.no_longer_files(int(2 ** rng.uniform(10, 15)))),
    ]
    if mounts:
        faults += [("full disk", lambda: scene.full(size))] * 2 + [
            ("no room for temporary files", lambda: scene.no_temp(size))
        ]
    return rng.choice(faults)


# -------------------------------------------------------------------- the process itself


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    import torch
    import torch.onnx

    from compressor import api, console, runtime  # noqa: F401
    from compressor.cli import main

    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            _, status = os.waitpid(job["wait"], 0)
            answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
            answers.flush()
            continue
        pid = os.fork()
        if not pid:
            _child(job, main)
        answers.write(f"{pid}\n")
        answers.flush()


def _child(job: dict[str, Any], main: Callable[[list[str]], int]) -> None:
    code = 70
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(job["cwd"])
        os.environ.update(job["environment"])
        if job["temp"]:
            import tempfile

            os.environ["TMPDIR"] = tempfile.tempdir = job["temp"]
        if job["most"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["most"], resource.RLIM_INFINITY))
        code = main(job["words"])
        sys.stdout.flush()
        sys.stderr.flush()
    except KeyboardInterrupt:  # between the fork and `main`, or behind it
        code = 130
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve()
