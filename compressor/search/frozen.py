"""A graph as bytes and back, exactly: the same nodes, names and memory, so that passes go on as if nothing had been.

One safetensors file holds the memories of tensors and, as JSON, everything else. A memory that the captured graph has
already is not written. Nothing in such a file is executed: operators are looked up by name.
"""

from __future__ import annotations

import importlib
import json
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx
from torch.fx import Node

from ..errors import CompressorError
from ..ir import Ancestor, Graph

_FUNCTIONS = ("operator", "_operator", "math", "torch")  # modules whose functions may stand in a graph


class NotFrozen(CompressorError):
    """The graph holds something that has no word here, or the file is not what was written."""


def freeze(graph: Graph, base: Graph, path: Path, facts: Any = None) -> None:
    """Writes what `thaw` needs beside `base`, the captured graph that this one came from; nothing on NotFrozen.

    facts: plain data to keep with it.
    """
    if (graph.inputs, graph.outputs) != (base.inputs, base.outputs):
        raise NotFrozen("its inputs or outputs are others")
    memories = _Memories(base)
    record = {
        "nodes": [_node(node) for node in graph.nodes],
        "tensors": {name: memories.place(tensor) for name, tensor in graph.tensors.items()},
        "parameters": sorted(graph.parameters),
        "lineage": {
            name: {str(axis): memories.place(kept) for axis, kept in axes.items()}
            for name, axes in graph.lineage.items()
        },
        "ancestors": {
            name: None
            if one is None
            else [one.name, None if one.scale is None else memories.place(one.scale)]
            for name, one in graph.ancestors.items()
        },
        "notices": graph.notices,
        "fingerprint": graph.fingerprint(),
        "facts": facts,
    }
    save_file(memories.own, path, metadata={"graph": json.dumps(record)})


def thaw(path: Path, base: Graph) -> tuple[Graph, Any]:
    """The graph that was frozen, and the facts beside it. NotFrozen where the file is damaged or of another model."""
    try:
        with safe_open(path, "pt") as file:
            record = json.loads(file.metadata()["graph"])
            memories = _Memories(base, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        tensors = {name: memories.tensor(place) for name, place in record["tensors"].items()}
        graph = Graph(fx.Graph(), tensors, base.inputs, base.outputs, base.example, base.parameters)
        graph.parameters = frozenset(record["parameters"])
        graph.origin, graph.keep, graph.notices = base.origin, base.keep, list(record["notices"])
        graph.lineage = {
            name: {int(axis): memories.tensor(place) for axis, place in axes.items()}
            for name, axes in record["lineage"].items()
        }
        graph.ancestors = {
            name: None
            if one is None
            else Ancestor(one[0], None if one[1] is None else memories.tensor(one[1]))
            for name, one in record["ancestors"].items()
        }
        _restore(graph, record["nodes"], {node.name: node for node in base.placeholders})
        graph.reinfer()
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise NotFrozen(f"{path.name}: {str(error).strip().splitlines()[0]}") from error
    if graph.fingerprint() != record["fingerprint"]:
        raise NotFrozen(f"{path.name}: it does not read back as it was")
    return graph, record["facts"]


# -------------------------------------------------------------------- tensors


class _Memories:
    """Tensors by what they share: views of one memory stay views of one memory, with strides and offset."""

    def __init__(self, base: Graph, own: Mapping[str, Tensor] = {}) -> None:
        self.base = base
        self.names = {t.untyped_storage().data_ptr(): name for name, t in sorted(base.tensors.items())}
        self.own = dict(own)

    def place(self, tensor: Tensor) -> dict[str, Any]:
        storage = tensor.untyped_storage()
        name = self.names.get(storage.data_ptr()) if storage.nbytes() else None
        if name is None:
            name = f"/{len(self.own)}"
            self.own[name] = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]
            if storage.nbytes():
                self.names[storage.data_ptr()] = name
        return {
            "memory": name,
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()),
            "offset": tensor.storage_offset(),
        }

    def tensor(self, place: Mapping[str, Any]) -> Tensor:
        name = place["memory"]
        memory = self.own[name] if name in self.own else self.base.tensors[name]
        view = torch.empty(0, dtype=_torch(place["dtype"], torch.dtype))
        return view.set_(memory.untyped_storage(), place["offset"], place["shape"], place["stride"])  # type: ignore[call-overload]


# -------------------------------------------------------------------- nodes


def _node(node: Node) -> dict[str, Any]:
    stack = [[key, path, str(kind)] for key, (path, kind) in (node.meta.get("nn_module_stack") or {}).items()]
    return {
        "op": node.op,
        "name": node.name,
        "target": _target_name(node.target) if node.op == "call_function" else str(node.target),
        "args": _plain(tuple(node.args)),
        "kwargs": _plain(dict(node.kwargs)),
        "stack": stack,
        "trace": node.meta.get("stack_trace", ""),
    }


def _restore(graph: Graph, records: list[dict[str, Any]], inputs: Mapping[str, Node]) -> None:
    nodes: dict[str, Node] = {}
    for record in records:
        op, name = record["op"], record["name"]
        target = _target(record["target"]) if op == "call_function" else record["target"]
        args, kwargs = _rich(record["args"], nodes), _rich(record["kwargs"], nodes)
        node = nodes[name] = graph.graph.create_node(op, target, args, kwargs, name=name)
        if node.name != name:
            raise ValueError(f"the name {name} is taken")
        if op == "placeholder":
            node.meta = dict(inputs[name].meta)
        else:
            if record["stack"]:
                node.meta["nn_module_stack"] = {key: (path, kind) for key, path, kind in record["stack"]}
            if record["trace"]:
                node.meta["stack_trace"] = record["trace"]


def _target_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module, name = getattr(target, "__module__", ""), getattr(target, "__name__", "")
    if module in _FUNCTIONS and getattr(importlib.import_module(module), name, None) is target:
        return f"{module}:{name}"
    raise NotFrozen(f"{target} has no name here")


def _target(name: str) -> Callable[..., Any]:
    module, function, rest = name.partition(":")
    if function:
        if module not in _FUNCTIONS:
            raise ValueError(f"{name} is no function of a graph")
        found: Callable[..., Any] = getattr(importlib.import_module(module), rest)
        return found
    space, packet, overload = name.split(".")
    found = getattr(getattr(getattr(torch.ops, space), packet), overload)
    return found


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [_plain(one) for one in value]}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, Mapping):
        return {"dict": [[_plain(key), _plain(one)] for key, one in value.items()]}
    if isinstance(value, slice):
        return {"slice": [_plain(one) for one in (value.start, value.stop, value.step)]}
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    raise NotFrozen(f"a {type(value).__name__} has no word here")


def _rich(value: Any, nodes: Mapping[str, Node]) -> Any:
    if isinstance(value, list):
        return [_rich(one, nodes) for one in value]
    if not isinstance(value, Mapping):
        return value
    ((word, held),) = value.items()
    if word == "node":
        return nodes[held]
    if word == "tuple":
        return tuple(_rich(one, nodes) for one in held)
    if word == "dict":
        return {_rich(key, nodes): _rich(one, nodes) for key, one in held}
    if word == "slice":
        return slice(*(_rich(one, nodes) for one in held))
    if word == "torch":
        return _torch(held, (torch.dtype, torch.layout, torch.memory_format))
    if word == "device":
        return torch.device(held)
    raise ValueError(f"{word} is no word here")


def _torch(name: str, kinds: Any) -> Any:
    found = operator.attrgetter(name)(torch)
    if not isinstance(found, kinds):
        raise ValueError(f"torch.{name} is no value of a graph")
    return found
