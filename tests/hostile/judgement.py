"""What a compiled network must compute, told by plain PyTorch and plain ONNX Runtime: no check of the project is asked.

Exact passes: the file gives what the module gives, on sizes of the batch and on values that no run has seen. Pruning:
the module in eager mode, the removed channels zeroed in its weights. Lossy passes: signal over noise on fresh samples,
and the file against the graph that it was made from. What rounding does to a network by itself, told by the module in
float64, is not held against anybody.
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from networks import Network, Plan, in_double, outputs, samples
from torch import Tensor, nn

from compressor import opening, registry
from compressor.capture import capture
from compressor.delivery import deliver
from compressor.errors import CompressorError, ContractError
from compressor.ir import Graph
from compressor.load import Loaded
from compressor.opening import Options
from compressor.pipeline import Context, Pipeline, Row, parse
from compressor.target import Target

SAMPLES = 160  # for calibration, one in five of them held out by the run
EXACT = 1e-4  # of an output's largest value
AMPLIFIED = 50.0  # so many times what float32 rounds anyway
UNSEEN_DB = 9.0  # how much worse fresh samples may be than the few that the run held out
CLEAN_DB = 60.0  # what a run that lost nothing may have on fresh samples
FRESH = 64
INTEGER_DB = 20.0  # of a file of integers against the graph that it was made from
HALF_DB = 25.0

# What a spec promises: "exact", "masked" (pruned, no weight solved anew) or "bounded".
SPECS: dict[str, str] = {
    "merge": "exact",
    "fold": "exact",
    "merge,fold": "exact",
    "merge(absorb_norms=true),fold": "exact",
    "prune(macs=0.6,reach=best,repair=false,align=1,criterion=l2)": "masked",
    "prune(params=0.5,reach=best,repair=false,align=2,criterion=l1,minimum=2)": "masked",
    "prune(macs=0.5,reach=best,repair=false,align=1,criterion=random,attention=width)": "masked",
    "prune(macs=0.6,reach=best,repair=false,align=1,criterion=random,norms=true,minimum=1)": "masked",
    "prune(macs=0.7,reach=best,repair=false,align=1,criterion=l2,scope=local),fold": "masked",
    "merge,prune(macs=0.7,reach=best,align=1)": "bounded",
    "prune(macs=0.8,reach=best,steps=2,align=2),fold": "bounded",
    "shorten(macs=0.7,reach=best)": "bounded",
    "shorten(macs=0.5,reach=best,repair=false),fold": "bounded",
    "squeeze(macs=0.7,reach=best,measure=false,align=1)": "bounded",
    "squeeze(energy=0.9,measure=false,align=1,repair=false),fold": "bounded",
    "fold,int8(measure=false)": "bounded",
    "int8(measure=false,rounding=nearest,equalise=false,calibration=minmax)": "bounded",
    "int8(scheme=dynamic)": "bounded",
    "int8(scheme=weight)": "bounded",
    "merge,prune(macs=0.8,reach=best,align=4),int8(measure=false)": "bounded",
    "merge,fold,fp16": "half",
    "int4": "bounded",
    "int4,fp16": "bounded",
    "merge,prune(macs=0.8,reach=best,align=2),squeeze(params=0.8,reach=best,measure=false,align=1),fold": "bounded",
}
TARGETS = ("cpu", "cpu", "cpu", "cpu-avx2", "mobile", "gpu", "web", "openvino", "qnn", "qnn-a16")


_IN_ORDER = (
    ("merge",),
    ("shorten(macs=0.8,reach=best)",),
    ("prune(macs=0.8,reach=best,align=2)", "prune(params=0.8,reach=best,align=1,criterion=l2)"),
    ("squeeze(macs=0.8,reach=best,measure=false,align=1)", "squeeze(energy=0.95,measure=false,align=1)"),
    ("fold",),
    ("int8(measure=false)", "int8(scheme=dynamic)", "fp16", "int4", "int4,fp16"),
)


def drawn_spec(rng: random.Random) -> str:
    """One of SPECS, or passes at random in their order."""
    if rng.random() < 0.7:
        return rng.choice(list(SPECS))
    chosen = [rng.choice(same) for same in _IN_ORDER if rng.random() < 0.5]
    return ",".join(chosen or ["fold"])


class Wrong(AssertionError):
    """A number that is not what was promised, and nobody said so."""


@dataclass(frozen=True)
class Verdict:
    """kind: `kept` (rewritten, as promised), `declined` (nothing was rewritten), `refused` (an error for the user that
    names no bug), `caught` (a contract was broken, and the run said so). error: of the file, relative, or noise in dB.
    """

    kind: str
    words: str = ""
    error: float = 0.0
    judged: str = ""


def examine(plan: Plan, spec: str, target: str = "cpu", *, emitted: bool = True) -> Verdict:
    """Runs the passes over the network of a plan; Wrong where a promise is broken in silence."""
    network = Network(plan)
    seen = samples(plan, SAMPLES, plan.seed + 2)
    if not all(bool(torch.isfinite(t).all()) for t in outputs(network, seen)):
        return Verdict("refused", "the network itself overflows")
    where = registry.target(target)
    try:
        graph = capture(network, tuple(t[:3] for t in seen))
        same(network, graph, plan)
        rows, ran, left = compiled(graph, spec, where, seen)
        if not emitted:
            session = None
        else:
            with tempfile.TemporaryDirectory() as folder:
                fixed = {"batch": where.fixed_batch} if where.fixed_batch else {}
                made = deliver(ran, where, Path(folder), {}, fixed)
                session = opened(made.path)
    except ContractError as error:
        return Verdict("caught", str(error))
    except CompressorError as error:
        return Verdict("refused", f"{type(error).__name__}: {error}")
    changed = any(row.rewrites for row in rows)
    promise = SPECS.get(spec, "bounded")
    error = judge(network, plan, ran, session, promise, rows, where, left)
    return Verdict("kept" if changed else "declined", error=error, judged=promise)


def opened(path: Path) -> onnxruntime.InferenceSession:
    """As usage.md says: with sums of 8-bit products that do not saturate, unless nodes share such a weight."""
    model, providers = path.read_bytes(), ["CPUExecutionProvider"]
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return onnxruntime.InferenceSession(model, options, providers=providers)
    except Exception:
        return onnxruntime.InferenceSession(model, providers=providers)


def same(network: Network, graph: Graph, plan: Plan) -> None:
    """Capture alone, on batches and values that it has not seen."""
    for count, seed, scale in ((1, 11, 1.0), (5, 12, 2.5)):
        x = samples(plan, count, plan.seed + seed, scale)
        for i, (a, b) in enumerate(zip(outputs(network, x), graph.run(*x), strict=True)):
            close(f"capture, output {i}", a, b, allowed(network, x)[i])


Left = dict[str, dict[int, Tensor]]  # parameter -> axis -> the slices that pruning left


def compiled(
    graph: Graph, spec: str, target: Target, seen: Sequence[Tensor]
) -> tuple[list[Row], Graph, Left]:
    """A run as `compress` makes it, without its stopwatch and its files."""
    graph = graph.copy()
    table = registry.passes()
    left: Left = {}

    def note(row: Row, graph: Graph) -> None:
        if row.name == "prune":
            reads = [node for node in graph.nodes if node.op == "get_attr" and node.name in graph.lineage]
            left.update({str(node.target): dict(graph.lineage[node.name]) for node in reads})

    pipeline = Pipeline(parse(spec, table), table, after=note)
    names = [one.name for one in graph.inputs]
    loaded = Loaded(nn.Identity(), Path("network"), "")
    options = Options.of({"measure": False})
    _, _, statistics, held_out = opening.streams(
        graph, dict(zip(names, seen, strict=True)), options, loaded, True, {}
    )
    return pipeline.run(graph, Context(target, held_out, statistics)), graph, left


# -------------------------------------------------------------------- the promises


def judge(
    network: Network,
    plan: Plan,
    graph: Graph,
    session: onnxruntime.InferenceSession | None,
    promise: str,
    rows: Sequence[Row],
    target: Target,
    left: Left,
) -> float:
    """The worst number found; Wrong where it is worse than promised."""
    integers = any(row.name in ("int8", "int4") and row.rewrites for row in rows)
    half = any(row.name == "fp16" and row.rewrites for row in rows)
    worst, stated = 0.0, min(rows[-1].total_db, CLEAN_DB) - UNSEEN_DB
    for count, seed, scale in ((1, 21, 1.0), (5, 22, 2.5), (FRESH, 23, 1.0)):
        x = samples(plan, count, plan.seed + seed, scale)
        ours = in_parts(lambda *part: graph.run(*part), x, target.fixed_batch)
        file = ours if session is None else in_parts(partial(run, session), x, target.fixed_batch)
        for i, (a, b) in enumerate(zip(ours, file, strict=True)):
            if integers or half:
                noisy(f"file against graph, output {i}", a, b, INTEGER_DB if integers else HALF_DB)
            else:
                close(f"file against graph, output {i}", a, b, allowed(network, x)[i])
        if promise in ("exact", "masked"):
            with masked(network, left):
                wanted, limits = outputs(network, x), allowed(network, x)
            for i, (a, b) in enumerate(zip(wanted, file, strict=True)):
                worst = max(worst, close(f"file against module, output {i}", a, b, limits[i]))
        elif count == FRESH:
            for i, (a, b) in enumerate(zip(outputs(network, x), file, strict=True)):
                usual(f"file against module, output {i}", a, b, HALF_DB if promise == "half" else stated)
    return worst


def in_parts(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], size: int | None
) -> list[Tensor]:
    """Outputs for all samples, computed so many at a time."""
    if size is None:
        return list(function(*inputs))
    parts = [function(*part) for part in zip(*(t.split(size) for t in inputs), strict=True)]
    return [torch.cat(same) for same in zip(*parts, strict=True)]


def run(session: onnxruntime.InferenceSession, *inputs: Tensor) -> list[Tensor]:
    kinds = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(int64)": np.int64}
    feeds = {
        spec.name: value.numpy().astype(kinds[spec.type])
        for spec, value in zip(session.get_inputs(), inputs, strict=True)
    }
    return [torch.from_numpy(np.array(t)) for t in session.run(None, feeds)]


def allowed(network: nn.Module, inputs: Sequence[Tensor]) -> list[float]:
    """Relative error of each output that float32 arithmetic excuses."""
    twin = in_double(network)
    wide = outputs(twin, [t.double() if t.is_floating_point() else t for t in inputs])
    plain = outputs(network, inputs)
    return [max(EXACT, AMPLIFIED * distance(a, b)) for a, b in zip(wide, plain, strict=True)]


def distance(wanted: Tensor, seen: Tensor) -> float:
    wanted, seen = wanted.double(), seen.double()
    if not torch.equal(torch.isfinite(wanted), torch.isfinite(seen)):
        return math.inf
    wanted, seen = (torch.nan_to_num(t, 0.0, 0.0, 0.0) for t in (wanted, seen))
    scale = float(wanted.abs().max())
    return float((wanted - seen).abs().max()) / (scale or 1.0)


def close(what: str, wanted: Tensor, seen: Tensor, limit: float) -> float:
    if wanted.shape != seen.shape:
        raise Wrong(f"{what}: shape {list(seen.shape)}, not {list(wanted.shape)}")
    error = distance(wanted, seen)
    if not error <= limit:
        raise Wrong(f"{what}: {error:.1e} of its scale, {limit:.1e} is what rounding excuses")
    return error


def noisy(what: str, wanted: Tensor, seen: Tensor, floor: float) -> None:
    if wanted.shape != seen.shape:
        raise Wrong(f"{what}: shape {list(seen.shape)}, not {list(wanted.shape)}")
    wanted, seen = wanted.double(), seen.double()
    noise, signal = float((wanted - seen).square().sum()), float(wanted.square().sum())
    found = 10 * math.log10((signal or 1e-30) / (noise or 1e-30)) if math.isfinite(noise) else -math.inf
    if found < floor and not noise <= 1e-12:  # NaN is noise
        raise Wrong(f"{what}: {found:.1f} dB, at least {floor:g} dB was promised")


def usual(what: str, wanted: Tensor, seen: Tensor, floor: float) -> None:
    """Noise of the middle one of all samples: values that calibration has not seen are cut, which ruins a few."""
    if wanted.shape != seen.shape:
        raise Wrong(f"{what}: shape {list(seen.shape)}, not {list(wanted.shape)}")
    noise, signal = (t.double().flatten(1).square().sum(1) for t in (wanted - seen, wanted))
    middle = int((noise / signal.clamp(min=1e-30)).nan_to_num(math.inf).argsort()[len(noise) // 2])
    noisy(f"{what}, sample {middle}", wanted[middle], seen[middle], floor)


# -------------------------------------------------------------------- masks in eager mode


@contextmanager
def masked(network: Network, left: Left) -> Iterator[None]:
    """The network with every channel masked that its weights have lost, where layers read it and where they make it.

    A weight whose columns are zero ignores what they would read. Norms over channels, which may go with
    `prune(norms=true)`, take what is left of them.
    """
    with ExitStack() as stack:
        for name, parameter in network.named_parameters():
            whole = parameter.data
            for axis, kept in left.get(name, {}).items():
                parameter.data = _only(parameter.data, axis, kept)
            stack.callback(setattr, parameter, "data", whole)
        for name, layer in network.named_modules():
            kept = left.get(f"{name}.weight", {})
            if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) and kept:
                stack.callback(layer.register_forward_hook(_over(kept[max(kept)].tolist())).remove)
        yield


def _only(value: Tensor, axis: int, keep: Tensor) -> Tensor:
    mask = torch.zeros(value.shape[axis], dtype=value.dtype)
    mask[keep] = 1
    return value * mask.view([-1 if i == axis % value.dim() else 1 for i in range(value.dim())])


def _over(keep: Sequence[int]):
    """A norm over the channels that are left."""

    def hook(layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        x = args[0][..., list(keep)]
        weight = layer.weight[list(keep)]
        if isinstance(layer, nn.RMSNorm):
            part = nn.functional.rms_norm(x, (len(keep),), weight, layer.eps)
        else:
            bias = layer.bias[list(keep)] if layer.bias is not None else None
            part = nn.functional.layer_norm(x, (len(keep),), weight, bias, layer.eps)
        whole = torch.zeros_like(y)
        whole[..., list(keep)] = part
        return whole

    return hook
