"""A graph that learns: differentiable, on copies of its tensors, with batch norms that can be switched to training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node
from torch.nn import functional as F

from .ir import Graph
from .ops import CONTRACTIONS, NORMS, arguments, is_constant, kind

_LAYERS = (*CONTRACTIONS, *NORMS, "batch_norm", "embedding", "prelu")
_STATISTICS = ("running_mean", "running_var")
_SMALLEST = 1e-3  # zeros and tensors of tiny numbers learn as if their numbers were this large


class Norm(nn.Module):
    """One batch norm, whose mode is that of the module: in training, statistics are those of the batch."""

    mean: Tensor
    var: Tensor

    def __init__(self, mean: Tensor, var: Tensor, eps: float) -> None:
        super().__init__()
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("var", var.detach().clone())
        self.momentum, self.eps = 0.1, eps

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, weight, bias, self.training, self.momentum, self.eps)


class Student:
    """A trainable twin of a graph, which gives chosen values of it.

    module(*inputs) -> the values of `nodes`, in order. layout: of weights with four axes. parameters: name -> a
    Parameter of its own; tensors that share memory and shape share one. frozen: names of weights that stay as they
    are, because they share memory in another shape. norms: names of running mean and variance -> their batch norm.
    """

    def __init__(self, graph: Graph, nodes: Sequence[Node], layout: torch.memory_format) -> None:
        self.parameters, self.frozen = _parameters(graph, layout)
        self.norms: dict[tuple[str, str], Norm] = {}
        twin = graph.copy()
        twin.output.args = (tuple(twin.node(node.name) for node in nodes),)
        self._switchable(twin)
        twin.clean()
        root: dict[str, Any] = {name: self.parameters.get(name, t) for name, t in twin.tensors.items()}
        root |= {_module(number): norm for number, norm in enumerate(self.norms.values())}
        self.module = fx.GraphModule(root, twin.graph, "Student")
        self.module.eval()

    def _switchable(self, twin: Graph) -> None:
        """Batch norms with running statistics of their own become modules of the twin."""
        found = [n for n in twin.nodes if kind(n) == "batch_norm" and _has_statistics(n)]
        readers = Counter(str(arguments(n)[a].target) for n in found for a in _STATISTICS)
        for node in found:
            bound = arguments(node)
            mean, var = (str(bound[a].target) for a in _STATISTICS)
            if readers[mean] > 1 or readers[var] > 1:
                continue
            name = _module(len(self.norms))
            self.norms[mean, var] = Norm(twin.tensors[mean], twin.tensors[var], bound["eps"])
            with twin.graph.inserting_before(node):
                call = twin.graph.create_node(
                    "call_module", name, (bound["input"], bound["weight"], bound["bias"])
                )
            call.meta = dict(node.meta)
            node.replace_all_uses_with(call)
            twin.graph.erase_node(node)

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser; the rate of each tensor is the size of its numbers."""
        return [
            {"params": [p], "lr": max(float(p.detach().square().mean().sqrt()), _SMALLEST)}
            for p in dict.fromkeys(self.parameters.values())
        ]

    def state(self) -> dict[str, Tensor]:
        """A copy of everything that learns, by name of the graph's tensor."""
        return {name: tensor.detach().clone() for name, tensor in self._tensors()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self._tensors():
            tensor.copy_(state[name])

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.parameters.items()
        for (mean, var), norm in self.norms.items():
            yield from ((mean, norm.mean), (var, norm.var))


def write(graph: Graph, state: Mapping[str, Tensor]) -> list[str]:
    """Binds what a student learned to the tensors of its graph; answers the names of those that changed.

    Tensors that were one stay one.
    """
    readers = {str(n.target): n for n in graph.nodes if n.op == "get_attr"}
    changed = [n for n in readers if n in state and not torch.equal(state[n], graph.tensors[n])]
    memory = {name: _place(graph.tensors[name]) for name in changed}
    made: dict[object, Tensor] = {}
    for name in changed:
        graph.set_tensor(readers[name], made.get(memory[name], state[name].contiguous()))
        made.setdefault(memory[name], graph.tensors[name])
    return changed


def _parameters(graph: Graph, layout: torch.memory_format) -> tuple[dict[str, nn.Parameter], list[str]]:
    """A Parameter for every float tensor that a trainer would update, and those that must stay."""
    names = _trainable(graph)
    storages: dict[int, set[tuple[object, ...]]] = {}
    for tensor in graph.tensors.values():
        storages.setdefault(tensor.untyped_storage().data_ptr(), set()).add(_place(tensor))
    made: dict[tuple[object, ...], nn.Parameter] = {}
    found: dict[str, nn.Parameter] = {}
    frozen: list[str] = []
    for name in names:
        tensor = graph.tensors[name]
        if len(storages[tensor.untyped_storage().data_ptr()]) > 1:
            frozen.append(name)
            continue
        key = _place(tensor)
        if key not in made:
            images = tensor.dim() == 4
            copy = tensor.detach().clone(memory_format=layout if images else torch.preserve_format)
            made[key] = nn.Parameter(copy)
        found[name] = made[key]
    return found, frozen


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _trainable(graph: Graph) -> list[str]:
    """Names of float tensors that were parameters, and of those that passes made for layers (a folded bias)."""
    names = dict.fromkeys(
        str(n.target) for n in graph.nodes if n.op == "get_attr" and str(n.target) in graph.parameters
    )
    for node in graph.nodes:
        if kind(node) in _LAYERS:
            bound = arguments(node)
            names |= dict.fromkeys(
                str(bound[a].target) for a in ("weight", "bias") if is_constant(bound.get(a))
            )
    return [name for name in names if graph.tensors[name].is_floating_point() and graph.tensors[name].numel()]


def _has_statistics(node: Node) -> bool:
    """A batch norm in evaluation mode, with running statistics."""
    bound = arguments(node)
    return not bound["training"] and all(is_constant(bound[a]) for a in _STATISTICS)


def _module(number: int) -> str:
    return f"student_norm_{number}"
