"""The graph that every pass edits: ATen operators from torch.export, flat tensors in and out, and a journal.

A `Graph` owns its `torch.fx.Graph`, and *borrows* its tensors: `tensors` maps the name of every parameter, buffer
and constant to a tensor that is never written into. `set_tensor` binds a new one, so a copy of a graph costs no
copy of a weight. Passes edit through the verbs only; analyses are functions elsewhere that return throw-away views.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import networkx
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node

from .errors import ContractError
from .names import DTYPE_NAMES, describe, operator_name, site, source_line
from .pieces import kernel


@dataclass(frozen=True)
class Input:
    """One tensor input: path name (`batch.input_ids`), dtype, shape; a `str` in the shape names a dynamic axis.

    An axis `a + b` is as long as the axes a and b together.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}:{DTYPE_NAMES.get(self.dtype, self.dtype)}[{','.join(map(str, self.shape))}]"


def batch_axis(inputs: Iterable[Input]) -> int | str | None:
    """What counts samples: the first dynamic axis 0 that is no other axis of an input, as edges of a graph are; the
    size of the first axis 0 where none is dynamic. None where nothing counts them."""
    shapes = [spec.shape for spec in inputs if spec.shape]
    named = [shape[0] for shape in shapes if isinstance(shape[0], str)]
    inner = {axis for shape in shapes for axis in shape[1:]}
    if named:
        return next((axis for axis in named if axis not in inner), None)
    return shapes[0][0] if shapes else None


def terms(axis: str) -> list[str]:
    """The axes that a dynamic axis is the sum of: itself as a rule."""
    return axis.split(" + ")


@dataclass
class Journal:
    """What the verbs did since the graph was copied: which values still stand for which, and which are new.

    `equal[old] = new`: the value `new` of this graph claims to be the value `old` of the graph it was copied from.
    `kept[name][axis]`: indices of the original axis that are left. `born`: names that the original never had.
    `scaled[name]`: what a value was multiplied with, of its rank and 1 wide where it is constant.
    """

    equal: dict[str, str] = field(default_factory=dict)
    kept: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    scaled: dict[str, Tensor] = field(default_factory=dict)
    born: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Ancestor:
    """The value of the captured graph that a value stands for, and what it was multiplied with since (None: 1)."""

    name: str
    scale: Tensor | None = None

    def times(self, factor: Tensor) -> Ancestor:
        return replace(self, scale=factor if self.scale is None else self.scale * factor)


@dataclass(frozen=True)
class Origin:
    """The model's state dict as it came and the form of its answer, for the way back to PyTorch (trainable.py).

    names: keys of the state dict, in order. tied: a key -> the key whose tensor it shares, which the graph reads.
    constants: tensors of the graph that stand in no state dict. counters: batches that each batch norm has seen, by
    key, which only training reads. returns: `tensor`, `tuple` or `dict`. lost_dropouts: dropouts that capture could
    not keep.
    """

    names: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    constants: frozenset[str] = frozenset()
    counters: Mapping[str, Tensor] = field(default_factory=dict)
    returns: str = "tuple"
    lost_dropouts: int = 0


class Graph:
    """A flat ATen graph with symbolic shapes in `node.meta["val"]` (FakeTensor, or SymInt for a size).

    inputs: the tensors it takes, in order; outputs: path names of the tensors it returns, in order.
    example: one flat tuple of inputs that it was captured with (batch >= 2 where the batch is dynamic).
    tensors: name -> parameter, buffer or constant; `parameters` are the names that a trainer would have updated.
    lineage: like `journal.kept`, over all passes since the graph was captured. ancestors: over the same passes, what a
    value stands for that is not still itself; None for one that the captured graph never had.
    origin: what the model's state dict and its answer looked like.
    keep: puts a new tensor where it is to lie, in memory or in a mapped file, and answers it from there.
    """

    def __init__(
        self,
        graph: fx.Graph,
        tensors: Mapping[str, Tensor],
        inputs: Sequence[Input],
        outputs: Sequence[str],
        example: Sequence[Tensor],
        parameters: frozenset[str] = frozenset(),
    ) -> None:
        self.graph = graph
        self.tensors = dict(tensors)
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.example = tuple(example)
        self.parameters = parameters
        self.origin = Origin()
        self.notices: list[str] = []
        self.journal = Journal()
        self.lineage: dict[str, dict[int, Tensor]] = {}
        self.ancestors: dict[str, Ancestor | None] = {}
        self.keep: Callable[[Tensor], Tensor] = _in_memory

    # ---------------------------------------------------------------- reading

    @property
    def nodes(self) -> list[Node]:
        """All nodes in topological order, as a list that survives edits."""
        return list(self.graph.nodes)

    @property
    def placeholders(self) -> list[Node]:
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    @property
    def output(self) -> Node:
        return next(n for n in reversed(self.graph.nodes) if n.op == "output")

    @property
    def results(self) -> tuple[Node, ...]:
        """The nodes whose values the graph returns, in the order of `outputs`."""
        return tuple(self.output.args[0])  # type: ignore[arg-type]

    @property
    def fake_mode(self) -> FakeTensorMode:
        return self.placeholders[0].meta["val"].fake_mode

    @property
    def module(self) -> fx.GraphModule:
        """A torch module with this graph and these tensors (shared), callable on flat inputs."""
        root = {
            name: torch.nn.Parameter(t, requires_grad=False)
            if name in self.parameters and _differentiable(t)
            else t
            for name, t in self.tensors.items()
        }
        return fx.GraphModule(root, self.graph, "compressed")

    def tensor(self, node: Node) -> Tensor:
        """The tensor that a `get_attr` node reads."""
        return self.tensors[str(node.target)]

    def node(self, name: str) -> Node:
        return next(n for n in self.graph.nodes if n.name == name)

    # ---------------------------------------------------------------- running

    @torch.no_grad()
    def values(self, *inputs: Tensor) -> Iterator[tuple[Node, Any]]:
        """Runs the graph and yields (node, value) in topological order; a value is freed after its last reader.

        Floats are cast to the precision that the graph takes. An operator that draws numbers draws the same in every
        run, so that two graphs can be compared.
        """
        env: dict[Node, Any] = {}
        last = last_uses(self.graph)
        feed = iter([as_declared(t, spec) for t, spec in zip(inputs, self.inputs, strict=True)])
        for node in self.graph.nodes:
            with _same_draw(node):
                value = env[node] = next(feed) if node.op == "placeholder" else self.execute(node, env)
            for dead in last.get(node, ()):
                env.pop(dead, None)
            yield node, value

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs for flat inputs, without gradients."""
        result: tuple[Tensor, ...] = ()
        for node, value in self.values(*inputs):
            if node.op == "output":
                result = value
        return result

    def execute(self, node: Node, env: Mapping[Node, Any]) -> Any:
        """The value of one node, given the values of the nodes it reads."""
        if node.op == "get_attr":
            return self.tensor(node)
        args: Any = fx.node.map_arg(node.args, lambda n: env[n])
        if node.op == "output":
            return tuple(args[0])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: env[n])
        if getattr(node.target, "overloadpacket", None) in _ACCUMULATING and _all_half((args, kwargs)):
            args, kwargs = pytree.tree_map(_widened, (args, kwargs))
            return node.target(*args, **kwargs).half()  # type: ignore[operator]
        return kernel(node.target, args, kwargs)(*args, **kwargs)  # type: ignore[arg-type]

    # ---------------------------------------------------------------- verbs

    def insert(
        self, target: Callable[..., Any], args: tuple, kwargs: dict | None = None, *, before: Node
    ) -> Node:
        """A new operator in front of `before`, with its provenance; its shape is inferred at once."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs or {})
        origin = next((a for a in node.all_input_nodes if "nn_module_stack" in a.meta), before)
        for key in ("nn_module_stack", "stack_trace"):
            for source in (before, origin):
                if key in source.meta:
                    node.meta.setdefault(key, source.meta[key])
        self.journal.born.add(node.name)
        self._infer(node)
        return node

    def add_tensor(self, name: str, value: Tensor, *, before: Node | None = None) -> Node:
        """A new constant with a free name like `name`, and the `get_attr` node that reads it (at the graph's top)."""
        free, count = name, 0
        # a module holds it in the end, and has attributes of its own (`to`, `half`)
        while self._is_taken(free) or hasattr(nn.Module, free.rpartition(".")[2]):
            count += 1
            free = f"{name}_{count}"
        self._bind(free, value)
        anchor = before if before is not None else next(iter(self.graph.nodes))
        with self.graph.inserting_before(anchor):
            node = self.graph.create_node("get_attr", free)
        self.journal.born.add(node.name)
        self._infer(node)
        return node

    def _is_taken(self, name: str) -> bool:
        return name in self.tensors or any(t.startswith(name + ".") for t in self.tensors)

    def set_tensor(self, node: Node, value: Tensor) -> None:
        """Binds another tensor to the name that a `get_attr` node reads. Every reader of that name sees it."""
        self._bind(str(node.target), value)
        self.journal.changed.add(node.name)
        self.journal.equal = {old: new for old, new in self.journal.equal.items() if new != node.name}
        self._infer(node)

    def _bind(self, name: str, value: Tensor) -> None:
        """A view of a tensor that is there already stays a view; a new tensor goes where `keep` puts it."""
        memory = value.untyped_storage().data_ptr()
        known = any(t.untyped_storage().data_ptr() == memory for t in self.tensors.values())
        self.tensors[name] = value.detach() if known else self.keep(value.detach())

    def set_args(
        self, node: Node, args: tuple, kwargs: dict | None = None, *, target: Callable[..., Any] | None = None
    ) -> None:
        """Rewrites an operator's arguments in place: a literal size, a stride, another weight.

        target: another operator that says the same in other words (`split_with_sizes` for `chunk`).
        """
        node.args = args
        if kwargs is not None:
            node.kwargs = kwargs
        if target is not None:
            node.target = target

    def disclaim(self, node: Node, scale: Tensor | None = None) -> None:
        """The value of a node is another than it was, though its operator is not: no claim in the journal holds.

        scale: it is what it was times this, of the value's rank.
        """
        self.journal.born.add(node.name)
        if scale is not None:
            self.journal.scaled[node.name] = scale
        self.journal.equal = {old: new for old, new in self.journal.equal.items() if new != node.name}

    def replace_uses(self, old: Node, new: Node) -> None:
        """Every reader of `old` reads `new` instead: a claim that both carry the same value, kept in the journal."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        for earlier, current in self.journal.equal.items():
            if current == old.name:
                self.journal.equal[earlier] = new.name
        if old.name not in self.journal.born:
            self.journal.equal[old.name] = new.name

    def supplant(self, old: Node, new: Node) -> None:
        """Every reader of `old` reads `new` instead, which is another value: no claim in the journal holds."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.journal.equal = {was: now for was, now in self.journal.equal.items() if now != old.name}

    def erase(self, node: Node) -> None:
        """Removes a node that nothing reads."""
        self.graph.erase_node(node)

    def clean(self) -> int:
        """Removes everything that no output depends on, tensors included; returns how many nodes went."""
        count = 0
        for node in reversed(self.nodes):
            if not node.users and node.op not in ("placeholder", "output"):
                self.graph.erase_node(node)
                count += 1
        live = {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}
        self.tensors = {name: t for name, t in self.tensors.items() if name in live}
        return count

    def reinfer(self) -> None:
        """Shapes and dtypes of every value anew, on fake tensors with the input's symbolic sizes.

        ContractError names the first operator whose operands do not fit each other.
        """
        for node in self.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            try:
                self._infer(node)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                line = source_line(node)
                first = str(error).strip().split("\n")[0]
                raise ContractError(
                    f"{operator_name(node)} at {site(node)}{f' ({line})' if line else ''}: "
                    f"its operands no longer fit: {first}"
                ) from error

    def _infer(self, node: Node) -> None:
        mode = self.fake_mode
        if node.op == "get_attr":
            node.meta["val"] = mode.from_tensor(self.tensor(node), static_shapes=True)
            return
        env = {n: n.meta["val"] for n in node.all_input_nodes}
        # With the Python dispatcher decompositions keep symbols; those in C++ (of pad) fix the batch to a number.
        with mode, enable_python_dispatcher(), torch.no_grad():
            node.meta["val"] = self.execute(node, env)

    def turn_page(self) -> None:
        """A new journal; what it says of the captured graph's values goes into `lineage` and `ancestors`."""
        values, slices = dict(self.ancestors), dict(self.lineage)
        self.ancestors |= dict.fromkeys(self.journal.born)
        for name, factor in self.journal.scaled.items():
            known = values.get(name, Ancestor(name))
            self.ancestors[name] = known.times(factor) if known is not None else None
        for old, new in self.journal.equal.items():
            self.ancestors[new] = values.get(old, Ancestor(old))
            self.lineage[new] = slices.get(old, {})
        for name, axes in self.journal.kept.items():
            earlier = self.lineage.get(name, {})
            sliced = {axis: earlier[axis][left] if axis in earlier else left for axis, left in axes.items()}
            self.lineage[name] = {**earlier, **sliced}
        self.journal = Journal()

    def copy(self) -> Graph:
        """Another graph over the same tensors, with node names kept and an empty journal."""
        graph = fx.Graph()
        mapping: dict[Node, Node] = {}
        for node in self.graph.nodes:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
            mapping[node].meta = dict(node.meta)
        twin = Graph(graph, self.tensors, self.inputs, self.outputs, self.example, self.parameters)
        twin.origin, twin.notices, twin.keep = self.origin, list(self.notices), self.keep
        twin.lineage, twin.ancestors = dict(self.lineage), dict(self.ancestors)
        return twin

    def become(self, other: Graph) -> None:
        """Takes over nodes, tensors and journal of another graph with the same inputs and outputs."""
        self.graph, self.tensors, self.parameters = other.graph, other.tensors, other.parameters
        self.journal, self.lineage, self.notices = other.journal, other.lineage, other.notices
        self.ancestors = other.ancestors

    # ---------------------------------------------------------------- invariants and views

    def check(self) -> None:
        """Raises ContractError when an invariant of the IR does not hold."""
        self.graph.owning_module = None  # a module made earlier: its tensors are not these
        self.graph.lint()
        for node in self.graph.nodes:
            if node.op in ("call_module", "call_method"):
                raise ContractError(f"{node.name} is a {node.op}, the graph holds operators only")
            if node.op == "get_attr" and str(node.target) not in self.tensors:
                raise ContractError(f"{node.name} reads {node.target}, which does not exist")
            if node.op == "call_function" and _mutates(node):
                raise ContractError(f"{node.name} ({node.target}) writes into its input")
            if node.op not in ("output",) and "val" not in node.meta:
                raise ContractError(f"{node.name} has no shape")
            if node.op == "get_attr" and tuple(node.meta["val"].shape) != tuple(self.tensor(node).shape):
                raise ContractError(f"{node.name}: recorded shape differs from its tensor's")
        if len(self.placeholders) != len(self.inputs) or len(self.results) != len(self.outputs):
            raise ContractError("inputs or outputs were lost")

    def text(self, *, provenance: bool = False) -> str:
        """One line a node: name, dtype and shape, operator, arguments. Stable across processes and folders."""
        symbols = self.axis_names()
        lines = []
        for node in self.graph.nodes:
            if node.op == "output":
                lines.append(f"return {', '.join('%' + r.name for r in self.results)}")
                continue
            head = f"%{node.name}: {describe(node.meta.get('val'), symbols)}"
            if node.op == "placeholder":
                body = "input"
            elif node.op == "get_attr":
                body = str(node.target)
            else:
                parts = [_literal(a) for a in node.args] + [
                    f"{k}={_literal(v)}" for k, v in node.kwargs.items()
                ]
                body = f"{operator_name(node)}({', '.join(parts)})"
            lines.append(f"{head} = {body}" + (f"  # {site(node)}" if provenance else ""))
        return "\n".join(lines)

    def fingerprint(self) -> str:
        """SHA-256 over text and the bytes of every tensor that is read: equal fingerprints compute equal numbers."""
        digest = hashlib.sha256(self.text().encode())
        for node in self.graph.nodes:
            if node.op == "get_attr":
                flat = self.tensor(node).detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                digest.update(flat.numpy().data)
        return digest.hexdigest()

    def axis_names(self) -> dict[str, str]:
        """Symbol of the exporter (`s77`) -> name of the dynamic axis (`batch`)."""
        names: dict[str, str] = {}
        for spec, node in zip(self.inputs, self.placeholders, strict=True):
            for axis, size in zip(spec.shape, node.meta["val"].shape, strict=True):
                if isinstance(axis, str):
                    names.setdefault(str(size), axis)
        return names

    def dataflow(self) -> networkx.DiGraph:
        """networkx view: a vertex per node name (attributes: op, target, site), an edge per read."""
        view = networkx.DiGraph()
        for node in self.graph.nodes:
            view.add_node(node.name, op=node.op, target=operator_name(node), site=site(node))
            view.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
        return view


# Computed in float32 and rounded where everything is float16: that is how accelerators sum up, and ten to thirty times
# faster than PyTorch's half-precision kernels for processors.
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention")
_ACCUMULATING = frozenset(getattr(torch.ops.aten, name) for name in (*_CONVOLUTIONS, *_PRODUCTS))


def _in_memory(tensor: Tensor) -> Tensor:
    return tensor


def as_declared(tensor: Tensor, spec: Input) -> Tensor:
    """A float tensor in the precision of an input; everything else as it is."""
    both = tensor.dtype.is_floating_point and spec.dtype.is_floating_point
    return tensor.to(spec.dtype) if both else tensor


def draws(node: Node) -> bool:
    """True for operators that may draw numbers, dropout that is off among them."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


@contextmanager
def _same_draw(node: Node) -> Iterator[None]:
    if not draws(node):
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(node.name.encode()))
        yield


def _all_half(values: Any) -> bool:
    floats = {t.dtype for t in pytree.tree_leaves(values) if isinstance(t, Tensor) and t.is_floating_point()}
    return floats == {torch.float16}


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float16 else value


def _literal(value: Any) -> str:
    if isinstance(value, Node):
        return "%" + value.name
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_literal(v) for v in value) + "]"
    return str(value)


def _differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _mutates(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def last_uses(graph: fx.Graph) -> dict[Node, list[Node]]:
    """node -> values that no later node reads."""
    seen: set[Node] = set()
    last: dict[Node, list[Node]] = {}
    for node in reversed(graph.nodes):
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                last.setdefault(node, []).append(source)
        if node not in seen and node.op != "output":
            last.setdefault(node, []).append(node)
    return last
