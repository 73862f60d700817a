"""Where trials run: processes of this machine, or tasks of a Ray cluster. Both answer in the order of the questions."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import io
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tarfile
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from ..errors import CompressorError, TargetError, UsageError
from . import trial
from .trial import FAILED, Outcome, Task

TRIES = 2  # of a trial whose worker died
_DIED = (
    f"its worker died {TRIES} times: out of memory, most likely, or started by a script that calls without "
    "`if __name__ == '__main__':`"
)
ANSWER_SECONDS = 10.0
FILES = ("model_spec", "adapter", "evaluate", "preprocess")  # options that name files
SLOT = "latency_slot"  # the resource of a Ray node that times one model at a time
Asked = tuple[
    Task, int, str
]  # a trial: what it shares with others, its number (no two alike in one call), its spec


class Engine:
    """Runs trials side by side, and single calls that nothing else runs beside. workers: as many trials at a time."""

    workers: int

    def run(self, asked: Sequence[Asked], done: Callable[[Outcome], None]) -> list[Outcome]:
        """Outcomes in the order asked. done: called once for each, in the order in which they come."""
        raise NotImplementedError

    def alone(self, function: Callable[..., Any], task: Task, *args: Any) -> Any:
        """`function(task, *args)` in a worker."""
        raise NotImplementedError

    def close(self) -> None:
        """Stops what is running."""


def _lost(number: int, spec: str) -> Outcome:
    return Outcome(number, spec, FAILED, _DIED)


class Local(Engine):
    """Processes of this machine. threads: of each, whatever their number: sums depend on it in their last bits."""

    def __init__(self, workers: int, threads: int = 1) -> None:
        self.workers, self.threads = workers, threads
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        self._busy = False

    @property
    def pool(self) -> concurrent.futures.ProcessPoolExecutor:
        if self._pool is None:
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self.workers, _workers(), initializer=_prepare, initargs=(self.threads, dict(os.environ))
            )
        return self._pool

    def run(self, asked: Sequence[Asked], done: Callable[[Outcome], None]) -> list[Outcome]:
        found: dict[int, Outcome] = {}
        tries = dict.fromkeys((number for _, number, _ in asked), 0)
        while left := [one for one in asked if one[1] not in found]:
            suspects = [one for one in left if tries[one[1]]]  # one by one, so that the guilty one is known
            for batch in [[one] for one in suspects] or [left]:
                for outcome in self._together(batch, tries):
                    found[outcome.number] = outcome
                    done(outcome)
        return [found[number] for _, number, _ in asked]

    def _together(self, asked: Sequence[Asked], tries: dict[int, int]) -> Iterator[Outcome]:
        """Outcomes as they come, until a worker dies. No more is in flight than there are workers: one of those did
        it."""
        waiting = list(asked)
        flying: dict[concurrent.futures.Future[Outcome], Asked] = {}
        broken, self._busy = False, True
        while (waiting and not broken) or flying:
            with contextlib.suppress(BrokenProcessPool):  # a worker died while it had nothing to do
                while waiting and not broken and len(flying) < self.workers:
                    future = self.pool.submit(trial.run, *waiting[0])
                    flying[future] = waiting.pop(0)
            if not flying:
                break
            ready, _ = concurrent.futures.wait(flying, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in ready:
                _, number, spec = flying.pop(future)
                try:
                    yield future.result()
                except BrokenProcessPool:
                    broken = True
                    tries[number] += 1
                    if tries[number] >= TRIES:
                        yield _lost(number, spec)
        self._busy = False
        if broken or waiting:
            self.close()

    def alone(self, function: Callable[..., Any], task: Task, *args: Any) -> Any:
        for _ in range(TRIES):
            try:
                return self.pool.submit(function, task, *args).result()
            except BrokenProcessPool:
                self.close()
        raise TargetError(_DIED)

    def close(self) -> None:
        if self._pool is None:
            return
        if self._busy:  # interrupted: nobody waits for what is in flight
            for process in list((self._pool._processes or {}).values()):
                with contextlib.suppress(OSError, AttributeError):
                    process.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = None


def _workers() -> multiprocessing.context.BaseContext:
    """How workers begin: as copies of a process that has loaded everything and run nothing, where forks are safe."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([trial.__name__])
    return context


def _prepare(threads: int, environment: dict[str, str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver says when to stop
    threading.Thread(target=_follow, daemon=True).start()
    os.environ.clear()  # the process that is forked has the environment that it began with
    os.environ.update(environment)
    torch.set_num_threads(threads)


def _follow() -> None:
    """A worker whose driver was killed would wait for questions for ever."""
    driver = multiprocessing.parent_process()
    if driver is not None:
        driver.join()
        os._exit(1)


class Ray(Engine):
    """Tasks of a Ray cluster. Models, data and what comes back travel through its object store.

    address: of the cluster, `auto` for the one that this machine is part of. cpus: of one trial. Nodes with the
    resource `latency_slot` time models, one at a time; without any, the node that a task happens to be on.
    """

    def __init__(self, address: str, cpus: float) -> None:
        try:
            import ray
        except ImportError as error:
            raise UsageError("--engine ray needs Ray: pip install 'compressor[ray]'") from error
        self.ray = ray
        _require_answer(address)
        try:
            ray.init(
                address=address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True
            )
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            first = str(error).strip().splitlines()[0]
            raise UsageError(f"--ray-address {address}: no Ray cluster answers there: {first}") from error
        options: dict[str, Any] = {"num_cpus": cpus, "max_retries": TRIES, "retry_exceptions": False}
        slots: dict[str, float] = {SLOT: 1} if ray.cluster_resources().get(SLOT) else {}
        self._run = ray.remote(**options)(_run_there)
        self._alone = ray.remote(**options, resources=slots)(_alone_there)
        self.workers = max(1, int(ray.cluster_resources().get("CPU", 1) / cpus))
        self._parcels: dict[str, Any] = {}
        self._place = f"compressor-{uuid.uuid4().hex}"  # a folder of every node, which no other search knows

    def run(self, asked: Sequence[Asked], done: Callable[[Outcome], None]) -> list[Outcome]:
        refs = {self._run.remote(self._place, one[0], self._parcel(one[0]), *one[1:]): one for one in asked}
        found: dict[int, Outcome] = {}
        left = list(refs)
        while left:
            (ready, *_), left = self.ray.wait(left, num_returns=1)
            task, number, spec = refs[ready]
            try:
                outcome, made = self.ray.get(ready)
                _unpack(made, task.trial(number).parent)
            except self.ray.exceptions.RayTaskError:
                raise
            except self.ray.exceptions.RayError:  # a node or a worker that is no longer there
                outcome = _lost(number, spec)
            found[number] = outcome
            done(outcome)
        return [found[number] for _, number, _ in asked]

    def alone(self, function: Callable[..., Any], task: Task, *args: Any) -> Any:
        models = {"original": task.original} | {
            f"trials/{one}": task.trial(one) for one in args if isinstance(one, int)
        }
        there = self.ray.put(_packed({name: path for name, path in models.items() if path.exists()}))
        try:
            answer, made = self.ray.get(
                self._alone.remote(self._place, task, self._parcel(task), there, function, args)
            )
        except self.ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, CompressorError) else error) from None
        except self.ray.exceptions.RayError as error:  # a node or a worker that is no longer there
            raise TargetError(_DIED) from error
        _unpack(made, Path(task.folder))
        return answer

    def close(self) -> None:
        self._clear()
        self.ray.shutdown()

    def _clear(self) -> None:
        """Takes away what was unpacked on the nodes that still answer."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        clear = self.ray.remote(num_cpus=0, max_retries=0)(_clear_there)
        with contextlib.suppress(self.ray.exceptions.RayError):
            nodes = [one["NodeID"] for one in self.ray.nodes() if one["Alive"]]
            places = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
            cleared = [clear.options(scheduling_strategy=place).remote(self._place) for place in places]
            self.ray.wait(cleared, num_returns=len(cleared), timeout=ANSWER_SECONDS)

    def _parcel(self, task: Task) -> Any:
        if task.digest not in self._parcels:
            self._parcels[task.digest] = self.ray.put(_packed(_named(task)))
        return self._parcels[task.digest]


def _require_answer(address: str) -> None:
    """UsageError where nothing listens there, which Ray itself would wait for for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # `auto`, `local`
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        why = error.strerror or error
        raise UsageError(f"--ray-address {address}: no Ray cluster answers there: {why}") from error


# -------------------------------------------------------------------- what travels


def _named(task: Task) -> dict[str, Path]:
    """The files and folders that a task names, by the place where they are named."""
    places = {"model": task.model, "calibration": task.calibration} | {n: task.options.get(n) for n in FILES}
    words = {f"{name}-{i}": one for name, value in places.items() for i, one in enumerate(_several(value))}
    return {key: path for key, one in words.items() if (path := file_of(one)) is not None}


def _several(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


def file_of(word: Any) -> Path | None:
    """What lies on this disk of `FILE`, `FOLDER:0.5` or `file.py:function`."""
    names = (str(word), str(word).rpartition(":")[0]) if isinstance(word, (str, Path)) else ()
    return next((Path(name) for name in names if name and Path(name).exists()), None)


def _moved(name: str, value: Any, here: Mapping[str, Path]) -> Any:
    """The words of an option with the paths of this node."""
    made = [
        f"{here[key]}{str(one).rpartition(here[key].name)[2]}" if (key := f"{name}-{i}") in here else one
        for i, one in enumerate(_several(value))
    ]
    return made if isinstance(value, (list, tuple)) else made[0]


def _packed(paths: Mapping[str, Path]) -> bytes:
    """A tar of files and folders, each in a folder of its name there."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, path in paths.items():
            tar.add(path, arcname=f"{name}/{path.name}")
    return buffer.getvalue()


def _unpack(data: bytes, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        tar.extractall(folder, filter="data")


def _there(place: str, task: Task, parcel: bytes) -> Task:
    """The task with the paths of this node; what travels is unpacked once."""
    root = Path(tempfile.gettempdir()) / place / task.digest
    if not root.exists():
        root.parent.mkdir(mode=0o700, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=root.parent))
        _unpack(parcel, fresh)
        with contextlib.suppress(OSError):  # another worker of this node was faster
            os.replace(fresh, root)
        shutil.rmtree(fresh, ignore_errors=True)
    here = {one.name: next(one.iterdir()) for one in root.iterdir() if one.name != "store"}
    return dataclasses.replace(
        task,
        model=_moved("model", task.model, here),
        calibration=_moved("calibration", task.calibration, here),
        options={
            name: _moved(name, value, here) if name in FILES else value
            for name, value in task.options.items()
        },
        folder=tempfile.mkdtemp(dir=root.parent),
        store=str(root / "store"),
    )


def _run_there(place: str, task: Task, parcel: bytes, number: int, spec: str) -> tuple[Outcome, bytes]:
    here = _there(place, task, parcel)
    try:
        outcome = trial.run(here, number, spec)
        folder = here.trial(number)
        return outcome, _packed({"": folder} if folder.exists() else {})
    finally:
        shutil.rmtree(here.folder, ignore_errors=True)


def _alone_there(
    place: str, task: Task, parcel: bytes, models: bytes, function: Callable[..., Any], args: Any
) -> Any:
    here = _there(place, task, parcel)
    try:
        with tempfile.TemporaryDirectory() as folder:
            _unpack(models, Path(folder))
            for one in Path(folder).glob("original/original"):
                shutil.copytree(one, here.original)
            for one in Path(folder).glob("trials/*/*"):
                shutil.copytree(one, here.trial(0).parent / one.name)
        known = here.original.exists()
        answer = function(here, *args)
        return answer, _packed({} if known else {"": here.original})
    finally:
        shutil.rmtree(here.folder, ignore_errors=True)


def _clear_there(place: str) -> None:
    shutil.rmtree(Path(tempfile.gettempdir()) / place, ignore_errors=True)
