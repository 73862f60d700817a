"""A graph as a PyTorch module again: the names of the original, weights that train, batch norm and dropout that do.

A graph is captured in evaluation mode, and there the mode is an argument: the sixth of `aten.batch_norm`, the third of
`aten.dropout`. Here such an argument is read from the submodule that the operator stood in, when it runs.

What evaluation left out is not in the graph, so it does not come back: dropout inside attention, stochastic depth,
auxiliary heads, parameters that no output depends on.
"""

from __future__ import annotations

import copy
import json
import keyword
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from . import receipt as receipts
from .errors import OutputError, UnsupportedError, UsageError
from .export import reexport, save_program
from .ir import Graph
from .names import module_path
from .ops import arguments, kind, set_argument
from .pytrees import distinct

_MODES = ("training", "train", "use_input_stats")  # arguments that are False in evaluation
_KEPT = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn")
_WEIGHTS = ("weight", "bias")


def trainable(graph: Graph, *, receipt: Mapping[str, Any] | None = None) -> Trainable:
    """A module that computes what `graph` computes, and trains. It is in evaluation mode until `.train()`.

    Its state dict has the keys of the original model's, for all that the graph still reads; its tensors are copies,
    tied ones stay tied. Arguments are the graph's inputs in their order, or by name (`batch_input_ids` for
    `batch.input_ids`). It answers with a tensor, with a tuple where there are several, or with a dict of path names
    where the original answered with one.

    `.train()` and `.eval()` switch batch norm (statistics move in training only), dropout and recurrent dropout, of
    the whole or of a submodule (`module.layer1.bn1.eval()`). Submodules hold tensors and modes and are not called:
    hooks on them do not run. `compress` takes the module, trained or not, and goes on from `receipt`; so it does from
    the file that `module.save("trained.pt2")` writes.

    What evaluation left out does not come back: dropout inside attention, stochastic depth, auxiliary heads. Dropout
    between two layers that `merge` made one, and all of it after `fold`, is gone too.

    UsageError for a graph that computes on integers.
    """
    if any(kind(node) in ("quantize", "dequantize") for node in graph.nodes):
        raise UsageError(
            "a quantised graph does not train: leave int8 out (--passes prune), train what trainable() gives, "
            "and compress that with int8"
        )
    if graph.origin.lost_dropouts:
        warnings.warn(
            f"{graph.origin.lost_dropouts} dropouts of the model are gone: its in-place operators had to be taken "
            "apart, and dropout went with them",
            stacklevel=2,
        )
    return Trainable(graph, _copied(graph.tensors), receipt)


class Trainable(fx.GraphModule):
    """What `trainable` answers. receipt: what was done to the model so far, or None; `compress` continues it."""

    def __init__(
        self, graph: Graph, tensors: Mapping[str, Tensor], receipt: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(nn.Module(), fx.Graph(), "Trainable")
        self.receipt = dict(receipt) if receipt is not None else None
        self._frame = graph.copy()
        self._frame.tensors = {}
        self._attach(graph, tensors)
        self.graph = _with_modes(self, graph)
        self.eval()

    def _attach(self, graph: Graph, tensors: Mapping[str, Tensor]) -> None:
        """Tensors under their names, in the order of the original's state dict."""
        origin, trained = graph.origin, _trained(graph)
        counters = {name: value.clone() for name, value in origin.counters.items() if _is_read(graph, name)}
        made: dict[str, Tensor] = {
            name: nn.Parameter(value.detach()) if name in trained else value.detach()
            for name, value in tensors.items()
        } | counters
        made |= {name: made[first] for name, first in origin.tied.items() if first in made}
        for name in dict.fromkeys([*(name for name in origin.names if name in made), *made]):
            owner, _, leaf = name.rpartition(".")
            holder = _container(self, owner)
            if isinstance(made[name], nn.Parameter):
                holder.register_parameter(leaf, made[name])  # type: ignore[arg-type]
            else:
                holder.register_buffer(leaf, made[name], persistent=name not in origin.constants)

    def save(self, path: str | Path) -> None:
        """Writes a .pt2 with the present weights and the receipt, from which `compress path` goes on.

        OutputError where it cannot be written; an earlier file is replaced only by a whole one.
        """
        path = Path(path)
        if path.exists() and not path.is_file():
            raise OutputError(f"{path} is no file that can be replaced: name another one")
        graph = graph_of(self)
        program = reexport(graph, Trainable(graph, graph.tensors))
        extra = {} if self.receipt is None else {receipts.MEMBER: json.dumps(self.receipt)}
        temporary = path.with_name(f".{os.getpid()}.{path.name}")
        try:
            save_program(program, temporary, extra)
            os.replace(temporary, path)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
        finally:
            temporary.unlink(missing_ok=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> Trainable:
        twin = Trainable.__new__(Trainable)
        memo[id(self)] = twin
        shared = {"_frame": self._frame, "_graph": self._graph}
        twin.__dict__ = shared | {
            key: copy.deepcopy(value, memo) for key, value in self.__dict__.items() if key not in shared
        }
        graph = fx.Graph()
        graph.output(graph.graph_copy(self._graph, {}))
        twin.graph = graph
        return twin

    def __reduce__(self) -> Any:
        raise TypeError(
            "this module is not pickled whole: keep its state_dict(), or write it with save('trained.pt2')"
        )


def graph_of(module: Trainable) -> Graph:
    """The graph of a module with the weights that it has now: names, sites and dynamic axes as before training.

    UsageError where a tensor is missing or has another dtype.
    """
    graph = module._frame.copy()
    names = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    graph.tensors = {name: _fetch(module, name).detach().cpu() for name in names}
    moved = False
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        seen, known = graph.tensor(node), node.meta["val"]
        if seen.dtype != known.dtype:
            raise UsageError(
                f"{node.target} is {seen.dtype}, and the module was made with {known.dtype}: convert it back first"
            )
        moved |= seen.shape != known.shape
    if moved:
        graph.reinfer()
    standing = [name for name in graph.origin.counters if _is_read(graph, name)]
    counters = {name: _fetch(module, name).detach().cpu().clone() for name in standing}
    graph.origin = replace(graph.origin, counters=counters)
    graph.check()
    return graph


# -------------------------------------------------------------------- tensors


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies; tensors that share memory share it again, whole or in part."""
    sharing: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr() if tensor.numel() else name
        sharing.setdefault(place, []).append(name)
    made: dict[str, Tensor] = {}
    for names in sharing.values():
        if len(names) == 1:
            made[names[0]] = tensors[names[0]].detach().clone()
            continue
        memory = tensors[names[0]].untyped_storage().clone()
        for name in names:
            one = tensors[name]
            view = torch.empty(0, dtype=one.dtype)
            made[name] = view.set_(memory, one.storage_offset(), one.shape, one.stride())
    return {name: made[name] for name in tensors}


def _trained(graph: Graph) -> set[str]:
    """The model's own parameters, and weights and biases that a pass has made."""
    known = {*graph.origin.names, *graph.origin.constants}
    made = {
        str(value.target)
        for node in graph.nodes
        for name, value in (arguments(node) if node.op == "call_function" else {}).items()
        if name in _WEIGHTS and isinstance(value, Node) and value.op == "get_attr"
    }
    names = graph.parameters | {name for name in made if name not in known}
    there = {name: graph.tensors[name] for name in names if name in graph.tensors}
    return {name for name, value in there.items() if value.is_floating_point() or value.is_complex()}


def _is_read(graph: Graph, counter: str) -> bool:
    """Whether the batch norm of this counter still stands."""
    return counter.removesuffix("num_batches_tracked") + "running_mean" in graph.tensors


def _container(root: nn.Module, path: str) -> nn.Module:
    """The submodule at a path, made where there is none."""
    for part in path.split(".") if path else ():
        child = root._modules.get(part)
        if child is None:
            if hasattr(root, part):
                raise UnsupportedError(
                    f"a part of the model is called '{part}', which means something else in a module that is made "
                    "from a graph: rename it in the model"
                )
            child = nn.Module()
            root.add_module(part, child)
        root = child
    return root


def _fetch(module: nn.Module, name: str) -> Tensor:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part, None)
    if not isinstance(value, Tensor):
        raise UsageError(f"the module has no tensor {name} any more, which its forward reads")
    return value


# -------------------------------------------------------------------- modes


def _with_modes(module: nn.Module, graph: Graph) -> fx.Graph:
    """The operators of `graph` with modes, devices and counters read from the module that runs them."""
    twin = graph.copy()
    names = argument_names([spec.name for spec in graph.inputs])
    for node, name in zip(twin.placeholders, names, strict=True):
        node.target = name
    flags: dict[str, Node] = {}
    device: Node | None = None
    for node in twin.nodes:
        if node.op != "call_function":
            continue
        bound = arguments(node)
        if isinstance(bound.get("device"), torch.device):
            device = device or _device(twin)
            set_argument(twin, node, "device", device)
        mode = next((name for name in _MODES if bound.get(name) is False), None)
        if mode is None:
            continue
        owner = _owner(module, node, bound)
        if owner not in flags:
            target = f"{owner}.training" if owner else "training"
            with twin.graph.inserting_before(node):
                flags[owner] = twin.graph.create_node("get_attr", target)
        set_argument(twin, node, mode, flags[owner])
        if kind(node) == "batch_norm":
            _count(twin, node, bound, flags[owner])
    for node in twin.nodes:
        node.meta = {key: node.meta[key] for key in _KEPT if key in node.meta}
    results = twin.results
    answer: Any = results
    if graph.origin.returns == "dict":
        answer = dict(zip(graph.outputs, results, strict=True))
    elif len(results) == 1:
        answer = results[0]
    twin.output.args = (answer,)
    return twin.graph


def argument_names(names: Sequence[str]) -> list[str]:
    """Python names for path names: `batch.input_ids` -> `batch_input_ids`."""
    plain = [re.sub(r"\W", "_", name) for name in names]
    return distinct(
        [
            f"input_{name}" if name[:1].isdigit() or keyword.iskeyword(name) or name == "self" else name
            for name in plain
        ]
    )


def _owner(module: nn.Module, node: Node, bound: Mapping[str, Any]) -> str:
    """Path of the submodule whose mode an operator has: that of its statistics, else the one that it stood in."""
    statistics = bound.get("running_mean")
    if isinstance(statistics, Node) and statistics.op == "get_attr":
        return str(statistics.target).rpartition(".")[0]
    stack = node.meta.get("nn_module_stack") or {}
    path = next((module_path(str(p)) for p, _ in reversed(list(stack.values())) if p), "")
    parts = path.split(".") if path else []
    holder = module
    for part in parts:  # a path of the exporter's that no submodule can have counts as the model itself
        if not re.fullmatch(r"\w+", part) or part in holder._parameters or part in holder._buffers:
            return ""
        if part not in holder._modules:
            if hasattr(holder, part):
                return ""
            holder.add_module(part, nn.Module())
        holder = holder._modules[part]  # type: ignore[assignment]
    return path


def _count(graph: Graph, node: Node, bound: Mapping[str, Any], flag: Node) -> None:
    """Counts batches where the original did; a momentum of 0 is how a cumulative average (None) was captured."""
    statistics = bound.get("running_mean")
    if not (isinstance(statistics, Node) and statistics.op == "get_attr"):
        return
    name = str(statistics.target).removesuffix("running_mean") + "num_batches_tracked"
    if name not in graph.origin.counters:
        return
    with graph.graph.inserting_before(node):
        counter = graph.graph.create_node("get_attr", name)
        graph.graph.call_function(count_batch, (counter, flag))
        if bound["momentum"] == 0.0:
            factor = graph.graph.call_function(average_factor, (counter, flag))
            set_argument(graph, node, "momentum", factor)


def count_batch(counter: Tensor, training: bool) -> None:
    if training:
        counter.add_(1)


def average_factor(counter: Tensor, training: bool) -> float:
    """Weight of the newest batch in the mean of all so far, as `BatchNorm2d(momentum=None)` has it."""
    return 1.0 / float(counter) if training else 0.0


def _device(graph: Graph) -> Node:
    """Where the inputs lie: what the graph makes anew is made there, not where it was captured."""
    first = graph.placeholders[0]
    with graph.graph.inserting_after(graph.placeholders[-1]):
        return graph.graph.call_function(device_of, (first,))


def device_of(tensor: Tensor) -> torch.device:
    return tensor.device
