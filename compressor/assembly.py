"""Graph -> ExportedProgram without a trace: what torch.export would find is in the graph already."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._ops import OpOverload
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx.experimental.proxy_tensor import make_fx

from .errors import UnsupportedError
from .export import quiet, reexport
from .ir import Graph

aten = torch.ops.aten


def assembled(graph: Graph, module: fx.GraphModule) -> ExportedProgram:
    """As `reexport`, but nothing is traced that is known already: only functions that stand for operators in `module`.

    A graph whose axes were fixed is traced: nobody knows yet what follows from that. So is one with a function that
    writes into what it reads.
    """
    known = [[isinstance(size, torch.SymInt) for size in one.meta["val"].shape] for one in graph.placeholders]
    if known != [[isinstance(size, str) for size in spec.shape] for spec in graph.inputs]:
        return reexport(graph, module)
    try:
        with torch.no_grad(), quiet():
            return _Assembly(graph, module).program()
    except UnsupportedError:
        return reexport(graph, module)


class _Assembly:
    """made: the graph of the program; held, given: its first nodes, tensors by name and inputs; sizes, read: where
    sizes of inputs stand, and the nodes that read them.
    """

    def __init__(self, graph: Graph, module: fx.GraphModule) -> None:
        self.graph, self.made = graph, fx.Graph()
        nodes = list(module.graph.nodes)
        names = dict.fromkeys(str(node.target) for node in nodes if node.op == "get_attr")
        self.held = {name: self.made.placeholder(f"held_{i}") for i, name in enumerate(names)}
        env: dict[fx.Node, Any] = {
            node: self.made.node_copy(node) for node in nodes if node.op == "placeholder"
        }
        self.given = list(env.values())
        self.read: dict[str, fx.Node] = {}
        self.sizes = {
            str(size): (one, axis)
            for one in reversed(self.given)
            for axis, size in enumerate(one.meta["val"].shape)
            if isinstance(size, torch.SymInt)
        }
        for node in nodes:
            if node.op == "get_attr":
                env[node] = self.held[str(node.target)]
                env[node].meta.setdefault("val", node.meta["val"])
            elif node.op == "output":
                self.results = tuple(fx.node.map_arg(node.args[0], env.__getitem__))
            elif node.target is operator.getitem and not isinstance(env[node.args[0]], fx.Node):
                env[node] = env[node.args[0]][node.args[1]]
            elif node.op == "call_function":
                plain = isinstance(node.target, OpOverload) or inspect.isbuiltin(node.target)
                env[node] = self._copied(node, env) if plain else self._traced(node, env)

    def _copied(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> fx.Node:
        """An operator; of sizes those of inputs, which many ask for, and in place of views, whose strides are others in
        every trace, reshapes.
        """
        size = str(node.meta["val"]) if node.target is aten.sym_size.int else ""
        if size in self.sizes and size not in self.read:
            self.read[size] = self.made.call_function(aten.sym_size.int, self.sizes[size])
            self.read[size].meta = {"val": node.meta["val"]}
        if size in self.read:
            return self.read[size]
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            source: fx.Node = env[cast(fx.Node, node.args[0])]
            if node.target is aten.as_strided_.default and node.meta["val"].shape == source.meta["val"].shape:
                return source
            raise UnsupportedError(f"{node.target} writes into what it reads")
        one = self.made.node_copy(node, env.__getitem__)
        if one.target in (aten.view.default, aten._unsafe_view.default):
            one.target = aten.reshape.default
        return one

    def _traced(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        """What a function does."""
        sources, function = node.all_input_nodes, cast(Callable[..., Any], node.target)

        def called(*values: Any) -> Any:
            now = dict(zip(sources, values, strict=True))
            return function(*fx.node.map_arg(node.args, now.get), **fx.node.map_arg(node.kwargs, now.get))

        with self.graph.fake_mode:
            part = make_fx(called, pre_dispatch=True)(*(one.meta["val"] for one in sources))
        inside: dict[fx.Node, Any] = {}
        entries = iter(sources)
        for one in part.graph.nodes:
            if one.op == "placeholder":
                inside[one] = env[next(entries)]
            elif one.op == "output":
                return fx.node.map_arg(one.args[0], inside.__getitem__)
            elif one.op != "call_function":
                raise UnsupportedError(f"{node.name} is traced to a {one.op}")
            else:
                inside[one] = self._copied(one, inside)
                for key in ("nn_module_stack", "stack_trace"):
                    if key in node.meta:
                        inside[one].meta.setdefault(key, node.meta[key])
        raise UnsupportedError(f"{node.name} gives nothing")

    def program(self) -> ExportedProgram:
        self.made.output(self.results)
        signature = ExportGraphSignature(
            [
                InputSpec(InputKind.BUFFER, TensorArgument(one.name), name, True)
                for name, one in self.held.items()
            ]
            + [InputSpec(InputKind.USER_INPUT, TensorArgument(one.name), None) for one in self.given],
            [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(one.name), None) for one in self.results],
        )
        takes, gives = (pytree.tree_flatten(v)[1] for v in ((tuple(self.given), {}), self.results))
        tensors = {name: self.graph.tensors[name] for name in self.held}
        calls = [ModuleCallEntry("", ModuleCallSignature([], [], takes, gives))]
        return ExportedProgram(torch.nn.Module(), self.made, signature, tensors, {}, calls)
