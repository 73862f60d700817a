"""ONNX Runtime in a process of its own, where neither torch nor its weights are: for files with weights of their own.

What such a process allocates is given back to the last byte when it ends. A session in this process would keep much
of it: two sessions on a model of 2 GB leave 1 GB behind after both are gone.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from . import runtime
from .errors import CompressorError, TargetError


class Slot(NamedTuple):
    """An input or output of a model, as ONNX Runtime describes it."""

    name: str
    type: str
    shape: list[int | str | None]


class Process:
    """Runs functions of our own modules, found by name, in a child that loads what they import and no more.

    `hold` keeps what a function answers there; `call` hands it to every later one as its first argument. Errors of
    ours come back as they are, others as RuntimeError; TargetError where the child died. `close` ends the child.
    """

    def __init__(self) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        start = f"import sys; sys.path[:] = {sys.path!r}; from compressor.apart import serve; serve()"
        self._child = subprocess.Popen(
            [sys.executable, "-c", start], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said
        )
        self._requests: Any = self._child.stdin
        self._answers: Any = self._child.stdout

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def hold(self, function: Callable[..., Any], *args: Any, **options: Any) -> None:
        self._ask(function, args, options, True)

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return self._ask(function, args, options, False)

    def close(self) -> None:
        self._child.kill()
        self._child.communicate()
        self._said.close()

    def _ask(self, function: Callable[..., Any], args: Any, options: Mapping[str, Any], hold: bool) -> Any:
        try:
            pickle.dump((function, args, dict(options), hold), self._requests)
            self._requests.flush()
            error, answer = pickle.load(self._answers)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError) as broken:
            raise TargetError(self._died()) from broken
        if error is not None:
            raise error
        return answer

    def _died(self) -> str:
        code = self._child.wait()
        if code == -9:  # SIGKILL, which nobody but the kernel sends it
            return "ONNX Runtime's process was killed: there is not enough memory for this model"
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return f"ONNX Runtime's process ended with code {code}" + (f": {lines[-1]}" if lines else "")


class Session:
    """What `runtime.session(model, **options)` answers, as far as we use it, in a process of its own."""

    def __init__(self, model: str | os.PathLike[str] | bytes, **options: Any) -> None:
        self._process = Process()
        try:
            self._process.hold(
                runtime.session, model if isinstance(model, bytes) else os.fspath(model), **options
            )
            self._inputs, self._outputs = self._process.call(_slots)
        except BaseException:
            self._process.close()
            raise

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.close()

    def get_inputs(self) -> list[Slot]:
        return self._inputs

    def get_outputs(self) -> list[Slot]:
        return self._outputs

    def run(self, outputs: None, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """All outputs; `runtime.run` checks the feeds first, as it does for every session."""
        return self._process.call(_run, dict(feeds))

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """`function(session, *args, **options)` over there."""
        return self._process.call(function, *args, **options)


def call(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """`function(*args, **options)` in a process that ends with it."""
    with Process() as process:
        return process.call(function, *args, **options)


# -------------------------------------------------------------------- over there


def serve() -> None:
    """Answers requests on standard input until it ends, on what was standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and ends this process
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not run into the answers
    held: tuple[Any, ...] = ()
    while True:
        try:
            function, args, options, hold = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        error: Exception | None = None
        answer = None
        try:
            answer = function(*held, *args, **options)
            if hold:
                held, answer = (answer,), None
        except CompressorError as ours:
            error = ours
        except Exception as other:  # whatever it is, the parent raises it
            error = RuntimeError(str(other))
        pickle.dump((error, answer), answers)
        answers.flush()


def _slots(session: Any) -> tuple[list[Slot], list[Slot]]:
    ends = (session.get_inputs(), session.get_outputs())
    inputs, outputs = ([Slot(s.name, s.type, list(s.shape)) for s in one] for one in ends)
    return inputs, outputs


def _run(session: Any, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return list(session.run(None, feeds))
