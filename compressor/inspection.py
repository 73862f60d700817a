"""inspect(): what a model, an ONNX file or a checkpoint holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from . import delivery, differences, handover, measure, registry, runtime, sessions
from .adapters import found_in
from .budgets import costs_of
from .channels import analyse, carrier_of
from .costs import layers as layers_of
from .errors import CompressorError, UsageError
from .external import beside
from .ir import Graph
from .ledger import Ledger
from .load import adapters_of, peek, sniff
from .opening import Options, capture_model, load_model, take_pixels
from .ops import kind, macs
from .receipt import Continued
from .target import Target
from .widths import MINIMUM, families, least_shares


def inspect(
    path: str | Path | None,
    *,
    groups: bool = False,
    layers: bool = False,
    partitions: str | None = None,
    diff: tuple[str | Path, str | Path] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Facts about an ONNX file or a model: adapters, inputs, outputs, operators, parameters, MACs, bytes.

    groups: also which channels `prune` could take and which not, and why (`ledger`), for the widths of target cpu.
    layers: also what each operator costs (`costs.layers`). partitions: also what phones' accelerators take of an ONNX
    file, and why not the rest (`delivery.on_accelerators`): `nnapi`, `coreml`, `xnnpack`, `qnn`, several, or `all`.
    diff: instead, what differs between two ONNX files, or two reports (`differences.between`); path is then None.

    Of a checkpoint without its architecture: what tensors it holds. Of adapters that cannot be loaded: what they are,
    and the problem.
    """
    if diff is not None:
        return differences.between(Path(diff[0]), Path(diff[1]))
    if path is None:
        raise UsageError("inspect shows a model, an ONNX file or a report: name one")
    path = Path(path)
    if path.suffix in (".onnx", ".ort"):
        _require_no_model_flags(path, groups, layers, partitions)
        taken = {"partitions": delivery.on_accelerators(path, partitions)} if partitions is not None else {}
        return _inspect_onnx(path) | taken
    if partitions is not None:
        raise UsageError(f"{path}: --partitions is for an ONNX file; compress the model first")
    return _inspect_model(path, groups, layers, Options.of(options))


def _require_no_model_flags(path: Path, groups: bool, layers: bool, partitions: str | None) -> None:
    """UsageError for what an ONNX file cannot show."""
    if groups:
        raise UsageError(
            f"{path}: --groups is for a PyTorch model, or the report.json of a run that pruned it"
        )
    if layers:
        raise UsageError(f"{path}: --layers is for a PyTorch model")
    if partitions is not None and path.suffix == ".ort":
        raise UsageError(
            f"{path}: its operators are fused for processors; --partitions is for the model.onnx beside it"
        )


def _inspect_model(path: Path, groups: bool, layers: bool, opt: Options) -> dict[str, Any]:
    """See `inspect`; of a model in a file or a folder."""
    if opt.model_spec is None and path.is_file() and sniff(path) in ("pickle", "safetensors"):
        if groups or layers:
            flag = "--groups" if groups else "--layers"
            raise UsageError(f"{path}: {flag} needs the architecture too: --model file.py:FACTORY")
        return _inspect_weights(path, adapters_of(path, opt.adapter))
    facts: dict[str, Any] = {"path": str(path), "adapters": adapters_of(path, opt.adapter)}
    try:
        loaded = load_model(path, opt)
        graph = capture_model(loaded, None, opt)
        take_pixels(graph, opt)
    except CompressorError as error:
        if groups or layers or not facts["adapters"]:
            raise
        return facts | {"problem": str(error)}
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            name = str(node.target)
            counts[name] = counts.get(name, 0) + 1
    earlier: dict[str, Any] = {}
    if loaded.continued is not None:
        earlier = {"continued_from": loaded.continued.facts(), "passes": _passes_so_far(loaded.continued)}
    return facts | {
        "adapters": facts["adapters"] or found_in(graph.tensors),
        "inputs": handover.ends(graph, {})["inputs"],
        "outputs": list(graph.outputs),
        "params": measure.parameters(graph),
        "macs": macs(graph),
        "bytes": measure.bytes_of(graph),
        "operators": dict(sorted(counts.items(), key=lambda kv: (-kv[1], kv[0]))),
        "unknown": sorted({str(n.target) for n in graph.nodes if kind(n) == "opaque"}),
        "notices": [*loaded.notes, *graph.notices],
        **earlier,
        **(_groups(graph, registry.target(None)) if groups else {}),
        **({"layers": layers_of(graph)} if layers else {}),
    }


def _passes_so_far(continued: Continued) -> list[dict[str, Any]]:
    """One row for every pass in the receipt that a model came with."""
    shown = ("pass", "config", "contract", "status", "params", "macs", "bytes")
    return [
        {"run": number, **{key: row.get(key, "") for key in shown}}
        for number, run in enumerate(continued.runs, 1)
        for row in run["rows"]
    ]


def _groups(graph: Graph, target: Target) -> dict[str, Any]:
    """The ledger of a graph that nothing was taken from, and the shares of it that pruning must leave."""
    algebra = analyse(graph, carrier_of(graph, heads=True))
    costs = costs_of(graph, algebra)
    unknown = np.zeros(1 + max((int(classes.max()) for classes in algebra.axes.values()), default=-1))
    found = families(algebra, costs, unknown, target.channel_multiple, MINIMUM)
    entries = Ledger(graph, algebra, costs, found).entries()
    return {"least": least_shares(found, costs), "groups": [entry.to_dict(names=True) for entry in entries]}


def _inspect_weights(path: Path, adapters: list[dict[str, Any]]) -> dict[str, Any]:
    found = peek(path)
    tensors = found.places[0].tensors if found.places else {}
    return {
        "path": str(path),
        "adapters": adapters,
        "kind": found.summary() if found.places else found.kind,
        "architecture": found.architecture,
        "labels": list(found.labels),
        "tensors": {
            name: f"{handover.dtype_name(t.dtype)}{list(t.shape)}" for name, t in sorted(tensors.items())
        },
    }


def _inspect_onnx(path: Path) -> dict[str, Any]:
    known = path.suffix == ".onnx" and not sessions.is_large(path)
    facts = {
        "path": str(path),
        "bytes": sum(f.stat().st_size for f in (path, *(beside(path) if path.suffix == ".onnx" else ()))),
        **runtime.facts(path),
        "operators": runtime.optimized_operators(path) if known else {},
    }
    integer = any(name.startswith(("QLinear", "QGemm", "MatMulInteger")) for name in facts["operators"])
    made_for = registry.targets().get(facts["metadata"].get("target", ""))
    narrow = made_for is not None and made_for.quant.reduce_range
    warning = measure.saturation() if integer and not narrow else ""
    return facts | ({"warning": warning} if warning else {})
