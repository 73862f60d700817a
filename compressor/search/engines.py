"""Where trials run: processes of this machine, or tasks of a Ray cluster. Both answer in the order of the questions."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import io
import logging
import multiprocessing
import os
import signal
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from . import trial
from .trial import FAILED, Outcome, Task

TRIES = 2  # of a trial whose worker died
SLOT = "latency_slot"  # the resource of a Ray node that times one model at a time
Asked = tuple[int, str]  # number and spec of a trial


class Engine:
    """Runs trials of one study. run: side by side, outcomes in the order asked. alone: a call that nothing else of the
    study runs beside."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def run(self, asked: Sequence[Asked], done: Callable[[Outcome], None]) -> list[Outcome]:
        """done: called once for each outcome, in the order in which they come."""
        raise NotImplementedError

    def alone(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(task, *args)` in a worker."""
        raise NotImplementedError

    def close(self) -> None:
        """Stops what is running."""


def _lost(asked: Asked) -> Outcome:
    number, spec = asked
    return Outcome(number, spec, FAILED, f"its worker died {TRIES} times: out of memory, most likely")


class Local(Engine):
    """Processes of this machine, which share its cores evenly."""

    def __init__(self, task: Task, workers: int) -> None:
        super().__init__(task)
        self.workers = workers
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        self._busy = False

    @property
    def pool(self) -> concurrent.futures.ProcessPoolExecutor:
        if self._pool is None:
            threads = max(1, (os.cpu_count() or 1) // self.workers)
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self.workers,
                multiprocessing.get_context("spawn"),
                initializer=_prepare,
                initargs=(threads, os.getpid()),
            )
        return self._pool

    def run(self, asked: Sequence[Asked], done: Callable[[Outcome], None]) -> list[Outcome]:
        found: dict[int, Outcome] = {}
        tries = dict.fromkeys((number for number, _ in asked), 0)
        while left := [one for one in asked if one[0] not in found]:
            suspects = [one for one in left if tries[one[0]]]  # one by one, so that the guilty one is known
            for batch in [[one] for one in suspects] or [left]:
                for outcome in self._together(batch, tries):
                    found[outcome.number] = outcome
                    done(outcome)
        return [found[number] for number, _ in asked]

    def _together(self, asked: Sequence[Asked], tries: dict[int, int]) -> Iterator[Outcome]:
        futures = {self.pool.submit(trial.run, self.task, *one): one for one in asked}
        broken, self._busy = False, True
        for future in concurrent.futures.as_completed(futures):
            one = futures[future]
            try:
                yield future.result()
            except BrokenProcessPool:
                broken = True
                tries[one[0]] += 1
                if tries[one[0]] >= TRIES:
                    yield _lost(one)
        self._busy = False
        if broken:
            self.close()

    def alone(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return self.pool.submit(function, self.task, *args).result()
        except BrokenProcessPool:
            self.close()
            return self.pool.submit(function, self.task, *args).result()

    def close(self) -> None:
        if self._pool is None:
            return
        if self._busy:  # interrupted: nobody waits for what is in flight
            for process in list((self._pool._processes or {}).values()):
                with contextlib.suppress(OSError, AttributeError):
                    process.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = None


def _prepare(threads: int, driver: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver says when to stop
    threading.Thread(target=_follow, args=(driver,), daemon=True).start()
    torch.set_num_threads(threads)


def _follow(driver: int) -> None:
    """A worker whose driver was killed would wait for questions for ever."""
    while os.getppid() == driver:
        time.sleep(1)
    os._exit(1)


class Ray(Engine):
    """Tasks of a Ray cluster. Model, data and what comes back travel through its object store.

    address: of the cluster, `auto` for the one that this machine is part of. cpus: of one trial. Nodes with the
    resource `latency_slot` time models, one at a time; without any, the node that a task happens to be on.
    """

    def __init__(self, task: Task, address: str, cpus: float) -> None:
        super().__init__(task)
        try:
            import ray
        except ImportError as error:
            raise UsageError("--engine ray needs Ray: pip install 'compressor[ray]'") from error
        self.ray = ray
        try:
            ray.init(
                address=address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True
            )
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            first = str(error).strip().splitlines()[0]
            raise UsageError(f"--ray-address {address}: no Ray cluster answers there: {first}") from error
        slots = ray.cluster_resources().get(SLOT, 0)
        self._parcel = ray.put(_packed(_named(task)))
        options: dict[str, Any] = {"num_cpus": cpus, "max_retries": TRIES, "retry_exceptions": False}
        self._run = ray.remote(**options)(_run_there)
        self._alone = ray.remote(**options, resources={SLOT: 1} if slots else {})(_alone_there)

    def run(self, asked: Sequence[Asked], done: Callable[[Outcome], None]) -> list[Outcome]:
        refs = {self._run.remote(self.task, self._parcel, *one): one for one in asked}
        found: dict[int, Outcome] = {}
        left = list(refs)
        while left:
            (ready, *_), left = self.ray.wait(left, num_returns=1)
            number, _ = refs[ready]
            try:
                outcome, made = self.ray.get(ready)
                _unpack(made, self.task.trial(number).parent)
            except (self.ray.exceptions.WorkerCrashedError, self.ray.exceptions.RayActorError,
                    self.ray.exceptions.OutOfMemoryError, self.ray.exceptions.NodeDiedError):  # fmt: skip
                outcome = _lost(refs[ready])
            found[number] = outcome
            done(outcome)
        return [found[number] for number, _ in asked]

    def alone(self, function: Callable[..., Any], *args: Any) -> Any:
        folders = [self.task.original, *(self.task.trial(one) for one in args if isinstance(one, int))]
        files = self.ray.put(_packed({f"{i}": one for i, one in enumerate(folders) if one.exists()}))
        answer, made = self.ray.get(self._alone.remote(self.task, self._parcel, files, function, args))
        _unpack(made, Path(self.task.folder))
        return answer

    def close(self) -> None:
        self.ray.shutdown()


# -------------------------------------------------------------------- what travels


def _named(task: Task) -> dict[str, Path]:
    """The files and folders that a task names, by the place where they are named."""
    places: dict[str, Any] = {"model": task.model, "calibration": task.calibration, **task.options}
    found: dict[str, Path] = {}
    for name, value in places.items():
        if isinstance(value, (str, Path)) and name not in ("folder", "store") and Path(value).exists():
            found[name] = Path(value)
    return found


def _packed(paths: Mapping[str, Path]) -> bytes:
    """A tar of files and folders, each below its name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, path in paths.items():
            tar.add(path, arcname=f"{name}/{path.name}")
    return buffer.getvalue()


def _unpack(data: bytes, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        tar.extractall(folder, filter="data")


def _there(task: Task, parcel: bytes) -> Task:
    """The task with the paths of this node; what travels is unpacked once."""
    root = Path(tempfile.gettempdir()) / f"compressor-{os.getuid()}-{task.digest[:32]}"
    if not root.exists():
        fresh = Path(tempfile.mkdtemp(dir=root.parent))
        _unpack(parcel, fresh)
        with contextlib.suppress(OSError):  # another worker of this node was faster
            os.replace(fresh, root)
    here = {
        one.name: str(next(one.iterdir()))
        for one in root.iterdir()
        if one.name in {"model", "calibration", *task.options}
    }
    options = {key: here.get(key, value) for key, value in task.options.items()}
    return dataclasses.replace(
        task,
        model=here.get("model", task.model),
        calibration=here.get("calibration", task.calibration),
        options=options,
        folder=str(root / f"work-{os.getpid()}"),
        store=str(root / "store"),
    )


def _run_there(task: Task, parcel: bytes, number: int, spec: str) -> tuple[Outcome, bytes]:
    here = _there(task, parcel)
    outcome = trial.run(here, number, spec)
    folder = here.trial(number)
    return outcome, _packed_trial(folder)


def _packed_trial(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        if folder.exists():
            tar.add(folder, arcname=folder.name)
    return buffer.getvalue()


def _alone_there(task: Task, parcel: bytes, files: bytes, function: Callable[..., Any], args: Any) -> Any:
    here = _there(task, parcel)
    with tempfile.TemporaryDirectory() as folder:
        _unpack(files, Path(folder))
        for one in Path(folder).iterdir():
            for made in one.iterdir():
                home = here.original if made.name == here.original.name else here.trial(0).parent / made.name
                if not home.exists():
                    home.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(made, home)
    answer = function(here, *args)
    made = here.original
    return answer, _packed_trial(made) if function is trial.original else _packed({})
