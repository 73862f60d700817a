"""An exported program as a flat Graph: plain placeholders, a flat tuple of named tensors, one node a tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx import Node

from .errors import UnsupportedError
from .ir import Graph, Input, Origin
from .names import unsupported
from .ops import kind
from .pytrees import distinct, key_name, leaves, plain


def flatten(program: ExportedProgram, specs: Sequence[Input], example: Sequence[Tensor]) -> Graph:
    """The program's module as a Graph: plain placeholders, a flat tuple of named tensors, one node a tensor."""
    module = program.module(check_guards=False)
    state = module.state_dict(keep_vars=True)
    graph = module.graph
    graph.set_codegen(fx.graph.CodeGen())
    _inline_blocks(module)
    _drop_constant_inputs(graph)
    outputs = distinct(_name_outputs(graph, program), [spec.name for spec in specs])
    tensors, parameters = _unify_tensors(module)
    for node in list(graph.nodes):
        if kind(node) == "assertion":
            if node.users:
                raise unsupported(node, "an assertion whose value is read")
            graph.erase_node(node)
    flat = Graph(graph, tensors, specs, outputs, example, parameters)
    read = {str(n.target): flat.tensor(n) for n in graph.nodes if n.op == "get_attr" and n.users}
    flat.origin = _origin(state, read, _form(program, len(outputs)))
    return flat


def refuse_complex(graph: Graph) -> None:
    values = [
        *zip([f"input {i.name}" for i in graph.inputs], graph.placeholders, strict=True),
        *zip([f"output {name}" for name in graph.outputs], graph.results, strict=True),
    ]
    for what, node in values:
        if node.meta["val"].dtype.is_complex:
            raise UnsupportedError(
                f"{what} is complex, which ONNX has no type for: pass real and imaginary part, as in "
                "torch.view_as_real"
            )


_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def _inline_blocks(module: fx.GraphModule) -> None:
    """What stands in a block of `no_grad`, or of autocast that is off or for other devices, stands in the graph."""
    graph = module.graph
    while (block := next(filter(_changes_nothing, graph.nodes), None)) is not None:
        body, *given = block.args[1:] if block.target is _GRAD else block.args[4:]
        inner = module.get_submodule(str(body.target))
        assert isinstance(inner, fx.GraphModule)
        known = dict(zip((n for n in inner.graph.nodes if n.op == "placeholder"), given, strict=True))
        made: Any = ()
        with graph.inserting_before(block):
            for node in inner.graph.nodes:
                if node.op == "output":
                    made = fx.node.map_arg(node.args[0], known.__getitem__)
                elif node.op != "placeholder":
                    known[node] = graph.node_copy(node, known.__getitem__)
                if node.op == "get_attr":
                    known[node].target = f"{body.target}.{node.target}"
        for part in list(block.users):
            part.replace_all_uses_with(made[part.args[1]])
            graph.erase_node(part)
        graph.erase_node(block)
        if not body.users:
            graph.erase_node(body)


def _changes_nothing(node: Node) -> bool:
    if node.target is _AUTOCAST:
        device, _, enabled, *_ = node.args
        return device != "cpu" or not enabled
    return node.target is _GRAD


def _drop_constant_inputs(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op == "placeholder" and not isinstance(node.meta.get("val"), Tensor):
            node.replace_all_uses_with(node.meta.get("val"))  # type: ignore[arg-type]
            graph.erase_node(node)


def _name_outputs(graph: fx.Graph, program: ExportedProgram) -> list[str]:
    """Keeps the tensors of the output, names them by their place in the model's pytree: `logits`, `boxes.0`."""
    out = next(n for n in graph.nodes if n.op == "output")
    flat = list(pytree.tree_leaves(out.args[0], is_leaf=lambda x: isinstance(x, Node)))
    spec = program.call_spec.out_spec
    names = [f"output_{i}" for i in range(len(flat))]
    if spec is not None and spec.num_leaves == len(flat):
        tree = pytree.tree_unflatten(list(range(len(flat))), spec)
        if not isinstance(tree, int):
            names = [".".join(key_name(k) for k in path) for path, _ in leaves(plain(tree))]
            names = [n if not n[:1].isdigit() else f"output_{n}" for n in names]
        else:
            names = ["output"]
    # sizes (`x.shape[0]`) are known to the caller, and left out like the constants beside them
    kept = [
        (n, v)
        for n, v in zip(names, flat, strict=True)
        if isinstance(v, Node) and isinstance(v.meta.get("val"), Tensor)
    ]
    for name, value in kept:
        if value.meta["val"].layout is not torch.strided:
            raise UnsupportedError(
                f"output {name} is {value.meta['val'].layout}: an ONNX model gives dense tensors"
            )
    if not kept:
        raise UnsupportedError("the model returns no tensor, or only state that it writes into")
    out.args = (tuple(v for _, v in kept),)
    return [n for n, _ in kept]


def _unify_tensors(module: fx.GraphModule) -> tuple[dict[str, Tensor], frozenset[str]]:
    """One `get_attr` node a tensor, at the top of the graph; tied names become the first of them."""
    tensors: dict[str, Tensor] = {}
    parameters: set[str] = set()
    first: dict[Any, Node] = {}
    for node in list(module.graph.nodes):
        if node.op != "get_attr":
            continue
        value: Any = module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if not isinstance(value, Tensor):
            raise unsupported(node, "a submodule inside the graph (control flow) is not supported")
        if type(value).__name__ == "FakeTensor":
            raise unsupported(
                node, "the exporter stored a tensor without data here; the layer hides it in .data"
            )
        if value.layout is not torch.strided and not node.users:
            module.graph.erase_node(node)
            continue
        if value.layout is not torch.strided:
            raise unsupported(
                node, f"reads a {value.layout} tensor: ONNX has dense ones, which .to_dense() makes"
            )
        key = _memory(value)
        if key in first:
            node.replace_all_uses_with(first[key])
            module.graph.erase_node(node)
            continue
        first[key] = node
        tensors[str(node.target)] = value.detach().resolve_conj().resolve_neg()
        if isinstance(value, nn.Parameter):
            parameters.add(str(node.target))
    return tensors, frozenset(parameters)


def _memory(value: Tensor) -> tuple[Any, ...]:
    """Equal for two tensors that are the same numbers in the same place."""
    if not value.numel() or value.layout is not torch.strided:
        return (id(value),)
    place = (value.untyped_storage().data_ptr(), value.storage_offset())
    return (*place, tuple(value.shape), value.stride(), value.dtype, value.is_conj(), value.is_neg())


# -------------------------------------------------------------------- the way back

_COUNTER = "num_batches_tracked"


def _origin(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], returns: str) -> Origin:
    """state: the model's state dict; tensors: those that its graph reads."""
    read = {_memory(value): name for name, value in tensors.items()}
    tied = {
        name: read[_memory(value)]
        for name, value in state.items()
        if name not in tensors and _memory(value) in read
    }
    counters = {
        name: value.detach()
        for name, value in state.items()
        if name.rpartition(".")[2] == _COUNTER and name not in tensors and name not in tied
    }
    return Origin(
        names=tuple(state),
        tied=tied,
        constants=frozenset(tensors) - frozenset(state),
        counters=counters,
        returns=returns,
    )


def _form(program: ExportedProgram, count: int) -> str:
    """How the model's answer is built: `dict` by names of fields, one `tensor`, or a `tuple`."""
    spec = program.call_spec.out_spec
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec) if spec is not None else ()
    if isinstance(plain(tree), Mapping):
        return "dict"
    return "tensor" if count == 1 else "tuple"
