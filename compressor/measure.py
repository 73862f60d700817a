"""What a model costs: parameters, bytes, latency, memory; and the machine that it was measured on."""

from __future__ import annotations

import math
import os
import platform
import re
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import apart, runtime
from .errors import UsageError

if TYPE_CHECKING:
    import onnxruntime as ort
    from torch.fx import Node

    from .ir import Graph

    Feeds = Mapping[str, np.ndarray] | Sequence[np.ndarray]

_SAME_KB = 256  # what another thread of the parent may allocate between two readings
ALONE_VISITS, ALONE_ROUNDS = 4, 4  # of each model, and at each visit
FEWEST = 5  # rounds after which one may know enough
_PACKAGES = ("torch", "onnx", "onnxruntime", "onnxscript")
# Best first: the instruction set that decides how fast (and how exact) 8-bit kernels are.
_ISA = (
    ("avx512_vnni", ("avx512_vnni",)),
    ("avx_vnni", ("avx_vnni",)),
    ("avx512", ("avx512f", "avx512bw")),
    ("avx2", ("avx2",)),
    ("avx", ("avx",)),
    ("arm_i8mm", ("i8mm",)),
    ("arm_dot", ("asimddp",)),
    ("arm_neon", ("asimd",)),
)


# -------------------------------------------------------------------- size


def parameters(graph: Graph) -> int:
    """Numbers in all tensors that the graph reads, buffers included; a shared tensor counts once."""
    return sum(tensor.numel() for tensor in map(graph.tensor, live(graph)))


def bytes_of(graph: Graph) -> int:
    """Bytes of all tensors that the graph reads, each in its own dtype; a shared tensor counts once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in map(graph.tensor, live(graph)))


def live(graph: Graph) -> list[Node]:
    """The `get_attr` nodes that an operator or an output reads, one per memory: tied weights are one."""
    unique: dict[object, Node] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.users:
            tensor = graph.tensor(node)
            where = (tensor.device, tensor.data_ptr(), tensor.numel(), tensor.dtype)
            unique[where if tensor.numel() else str(node.target)] = node
    return list(unique.values())


# -------------------------------------------------------------------- latency


@dataclass(frozen=True)
class Latency:
    """Wall time of one run in milliseconds: median, 95th percentile and interquartile range over all runs.

    rounds: the median of each round. Round i of every model in one `bench` was measured at the same moment.
    """

    median_ms: float
    p95_ms: float
    iqr_ms: float
    runs: int
    rounds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Ratio:
    """How many times faster: median over the rounds, with the quartiles of the rounds as its spread."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f}-{self.high:.2f})"


def bench(
    models: Sequence[str | os.PathLike[str]],
    *,
    feeds: Feeds,
    threads: int = 1,
    rounds: int = 15,
    seconds: float = 2.0,
    within: float = 0.0,
    providers: Sequence[str] = (),
    advance: Callable[[int], None] = lambda n: None,
) -> list[Latency]:
    """Latency of each model, in turns (A B, B A, A B ...), so that a drift of the machine hits all alike.

    feeds: by input name, or in order (then the models may name their inputs differently). threads: inside an
    operator, 0 for all cores. rounds: turns of each model, at least 3. seconds: time for all of them
    together, after a warm-up; every round runs each model at least once. within: no more rounds are made when the
    ratios to the first model are known to this share (standard error), after 5. providers: one for each model, the
    CPU's if empty. advance: is told of each run that was timed.
    """
    if rounds < 3 or not models:
        raise UsageError("a latency comparison needs at least one model and 3 rounds")
    sessions = [runtime.session(path, threads=threads, **_on(providers, i)) for i, path in enumerate(models)]
    share = seconds / (rounds * len(models))
    stopwatches = [Stopwatch(session, feeds, share) for session in sessions]
    times: list[list[list[float]]] = [[] for _ in models]
    for turn in range(rounds):
        order = range(len(models)) if turn % 2 == 0 else reversed(range(len(models)))
        for i in order:
            times[i].append(stopwatches[i].round())
            advance(len(times[i][-1]))
        if turn + 1 >= FEWEST and _error(times) <= within:
            break
    return [_latency(one) for one in times]


def _error(times: Sequence[Sequence[Sequence[float]]]) -> float:
    """Standard error of the ratios between models, the largest of them, relative; of one model, that of its median.

    Of a median it is 1.25 standard deviations over the root of their number, and these 0.74 interquartile ranges.
    """
    first, *others = ([statistics.median(one) for one in rounds] for rounds in times)
    errors = []
    for each in [[b / a for a, b in zip(first, other, strict=True)] for other in others] or [first]:
        low, median, high = statistics.quantiles(each, n=4)
        errors.append(0.93 * (high - low) / median / math.sqrt(len(each)))
    return max(errors)


def bench_alone(
    models: Sequence[str | os.PathLike[str]],
    *,
    feeds: Feeds,
    threads: int = 1,
    seconds: float = 2.0,
    weights: Sequence[str] = (),
    providers: Sequence[str] = (),
    advance: Callable[[int], None] = lambda n: None,
) -> list[Latency]:
    """Like `bench`, for models too large to lie in memory side by side: a process for each, one at a time.

    A B, B A, A B, B A: memory lies differently at every visit, which alone moves a latency by some percent. weights:
    what ONNX Runtime may do with those of each model, see `runtime.session`; everything if empty.
    """
    times: list[list[list[float]]] = [[] for _ in models]
    share = seconds / (ALONE_VISITS * ALONE_ROUNDS * len(models))
    order = [
        i for _ in range(ALONE_VISITS // 2) for i in (*range(len(models)), *reversed(range(len(models))))
    ]
    for i in order:
        options = _on(providers, i) | ({"weights": weights[i]} if weights else {})
        with apart.Session(models[i], threads=threads, **options) as session:
            times[i] += session.call(_rounds, feeds, share)
        advance(sum(map(len, times[i][-ALONE_ROUNDS:])))
    return [_latency(one) for one in times]


def _on(providers: Sequence[str], i: int) -> dict[str, Any]:
    return {"providers": [providers[i]]} if providers else {}


def _rounds(session: ort.InferenceSession, feeds: Feeds, share: float) -> list[list[float]]:
    stopwatch = Stopwatch(session, feeds, share)
    return [stopwatch.round() for _ in range(ALONE_ROUNDS)]


class Stopwatch:
    """Times one session, warm: every round runs it about `seconds` long, at least once."""

    def __init__(self, session: ort.InferenceSession, feeds: Feeds, seconds: float) -> None:
        self.session, self.feed = session, _ordered(session, feeds)
        _timed(session, self.feed, 2)  # allocates arenas, unpacks what is left
        once = min(_timed(session, self.feed, 3))
        self.repeats = max(1, int(1e3 * seconds / max(once, 1e-3)))

    def round(self) -> list[float]:
        """Milliseconds of each run."""
        return _timed(self.session, self.feed, self.repeats)


def ratio(base: Latency, other: Latency) -> Ratio:
    """How many times faster `other` is than `base`, both of one `bench`: 2.0 takes half the time."""
    if len(base.rounds) != len(other.rounds) or len(base.rounds) < 2:
        raise UsageError("a ratio needs two latencies that were measured in one bench")
    each = [b / o for b, o in zip(base.rounds, other.rounds, strict=True)]
    low, median, high = statistics.quantiles(each, n=4)
    return Ratio(median, low, high)


def random_feeds(
    session: ort.InferenceSession, *, batch: int = 1, free: int = 64, seed: int = 0
) -> dict[str, np.ndarray]:
    """Inputs that fit a session: normal floats, ones for integers and booleans (any table has row 1).

    batch: size of a dynamic axis 0; free: size of every other dynamic axis, and of each that one is the sum of.
    """
    generator = np.random.default_rng(seed)
    feeds: dict[str, np.ndarray] = {}
    for spec in session.get_inputs():
        shape = [
            size if isinstance(size, int) else batch if axis == 0 else free * (1 + str(size).count(" + "))
            for axis, size in enumerate(spec.shape)
        ]
        kind = _NUMPY.get(spec.type)
        if kind is None:
            raise UsageError(f"input {spec.name} is a {spec.type}; give it by hand")
        if math.prod(shape) > _FED:
            raise UsageError(f"input {spec.name} is {shape}, more than fits: give a smaller --batch")
        floating = np.issubdtype(kind, np.floating)
        feeds[spec.name] = generator.standard_normal(shape).astype(kind) if floating else np.ones(shape, kind)
    return feeds


_FED = 1 << 27  # numbers of one generated input
_NUMPY: dict[str, type] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(int16)": np.int16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


def _ordered(session: ort.InferenceSession, feeds: Feeds) -> dict[str, np.ndarray]:
    """Feeds by the session's names, floats in the precision that it takes."""
    types = {spec.name: _NUMPY.get(spec.type) for spec in session.get_inputs()}
    feed = dict(feeds) if isinstance(feeds, Mapping) else dict(zip(types, feeds, strict=False))
    for name, array in feed.items():
        wanted = types.get(name)
        if array.dtype.kind == "f" and wanted is not None and np.issubdtype(wanted, np.floating):
            feed[name] = array.astype(wanted, copy=False)
    runtime.run(session, feed)  # says clearly what does not fit, before the clock runs
    return feed


def _timed(session: ort.InferenceSession, feed: dict[str, np.ndarray], repeats: int) -> list[float]:
    """Milliseconds of each of some runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        session.run(None, feed)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _latency(rounds: Sequence[Sequence[float]]) -> Latency:
    every = [time for one in rounds for time in one]
    low, median, high, p95 = np.percentile(every, [25, 50, 75, 95]).tolist()
    return Latency(median, p95, high - low, len(every), tuple(statistics.median(one) for one in rounds))


# -------------------------------------------------------------------- memory


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, in MB (2**20 bytes)."""
    peak = _kilobytes(Path("/proc/self/status"), "VmHWM")
    if peak is not None:
        return peak / 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 << 20 if platform.system() == "Darwin" else 1 << 10  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def resident_memory_mb(pid: int | None = None) -> float | None:
    """Resident memory of a process and its children in MB now, None where /proc does not tell."""
    return _tree_mb(pid or os.getpid(), "VmRSS")


def anonymous_memory_mb(pid: int | None = None) -> float | None:
    """Anonymous memory (no mapped files) of a process and its children in MB now, None without /proc."""
    return _tree_mb(pid or os.getpid(), "RssAnon")


class MemoryWatch:
    """Largest memory of a process and its children while the block runs, in MB, read every `interval` seconds.

    start: anonymous memory when it began. anonymous, resident: the largest seen; a spike between two readings is
    missed. All are None where /proc does not tell.
    """

    def __init__(self, pid: int | None = None, interval: float = 0.05) -> None:
        self.pid, self.interval = pid or os.getpid(), interval
        self.start: float | None = None
        self.anonymous: float | None = None
        self.resident: float | None = None
        self._lap: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self.start = self.look().anonymous
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def look(self) -> MemoryWatch:
        """One more reading, now."""
        for name, field in (("anonymous", "RssAnon"), ("resident", "VmRSS")):
            now, before = _tree_mb(self.pid, field), getattr(self, name)
            setattr(self, name, now if before is None else max(before, now or 0.0))
            if name == "anonymous":
                self._lap = now if self._lap is None else max(self._lap, now or 0.0)
        return self

    def lap(self) -> float | None:
        """Largest anonymous memory since the last call."""
        self.look()
        most, self._lap = self._lap, None
        return most

    def to_dict(self) -> dict[str, float | None]:
        """For the report."""
        return {
            "start_anonymous_mb": self.start,
            "peak_anonymous_mb": self.anonymous,
            "peak_resident_mb": self.resident,
        }

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            self.look()


def _tree_mb(pid: int, field: str) -> float | None:
    """Sum of a field of /proc/PID/status. `RssAnon` is what smaps adds up as Anonymous, without walking the pages.

    A child that has not begun its own program shows its parent's memory; it is not counted twice.
    """
    own, *children = (_kilobytes(Path(f"/proc/{one}/status"), field) for one in _tree(pid))
    if own is None:
        return None
    begun = [size for size in children if size is not None and abs(size - own) > _SAME_KB]
    return (own + sum(begun)) / 1024


def _tree(pid: int) -> list[int]:
    children: list[int] = []
    with suppress(OSError):  # the process ended while it was looked at
        for task in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError):  # or the thread
                children += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return [pid, *(one for child in children for one in _tree(child))]


def _kilobytes(path: Path, field: str) -> float | None:
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return float(found[1]) if found else None


# -------------------------------------------------------------------- the machine


def saturation() -> str:
    """Why 8-bit sums may be wrong on this machine; empty where they are not.

    x86 without VNNI adds products of bytes two by two in 16 bits. Weights of 7 bits (`cpu-avx2`) leave room.
    """
    isa = machine()["isa"]
    if isa not in ("avx512", "avx2", "avx"):
        return ""
    return (
        f"this machine ({isa}) adds products of bytes in 16 bits, which saturate: 8-bit weights need sessions with "
        f"{runtime.EXACT} set to 1, or weights of 7 bits (--target cpu-avx2)"
    )


def machine() -> dict[str, str | int]:
    """cpu: its name; cores: how many this process may use; isa: best instruction set for 8-bit kernels."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    name = re.search(r"^(?:model name|Hardware|CPU part)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    have = set(flags[1].split()) if flags else set()
    isa = next((isa for isa, needed in _ISA if have.issuperset(needed)), platform.machine() or "unknown")
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return {"cpu": name[1].strip() if name else platform.processor() or "unknown", "cores": cores, "isa": isa}


def versions() -> dict[str, str]:
    """Python and the packages that decide the numbers, without importing them; `missing` if not installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "missing"
    return found
