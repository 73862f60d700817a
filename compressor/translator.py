"""Graph -> ONNX, as torch.onnx has it. The only file that calls it.

At every export torch parses the source of all that it can translate to, reads the signatures of all of it, and traces
the whole model twice, the second time for the sake of the few operators that it has no words for: most of the time that
a file takes. Here the first two are done once, and nothing is traced but these operators. Where that fails, or this
torch is another inside, it does as it does.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import cache
from types import SimpleNamespace
from typing import Any

import onnx_ir
import torch
from torch import fx
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Node

from . import contrib, nms, stable, words
from .assembly import assembled
from .errors import CompressorError, UnsupportedError
from .export import quiet, reexport
from .ir import Graph
from .names import unsupported

_ONE_AT_A_TIME = threading.RLock()  # what is replaced in torch.onnx is so for all threads


def translate(graph: Graph, opset: int, optimize: bool) -> onnx_ir.Model:
    """The model as torch.onnx has it; `optimize` by its own optimiser, where that does not fail.

    UnsupportedError where an operator has no translation, with its module and line.
    """
    with _ONE_AT_A_TIME:
        for how in dict.fromkeys([(_quick, optimize), (_plain, optimize), (_plain, False)]):
            try:
                return _exported(graph, opset, *how)
            except (CompressorError, KeyboardInterrupt):
                raise
            except Exception as error:
                failed = error
    raise _explain(graph, failed, opset) from failed


def _exported(graph: Graph, opset: int, how: Callable[..., Any], optimize: bool) -> onnx_ir.Model:
    module, own = graph.module, _own_words()
    exact = _exact() if optimize else nullcontext()
    with quiet(), torch.no_grad(), how(module, own, opset) as program_of, exact:
        program = torch.onnx.export(
            program_of(graph, module),
            dynamo=True,
            opset_version=opset,
            optimize=optimize,
            verbose=False,
            custom_translation_table=own,
        )
    if program is None:
        raise UnsupportedError("the ONNX exporter returned nothing")
    return program.model


def _own_words() -> dict[Any, Callable[..., Any]]:
    """The operators with translations of our own."""
    tables = contrib, nms, stable, words
    return {operator: word for table in tables for operator, word in table.translations().items()}


def _explain(graph: Graph, error: Exception, opset: int) -> UnsupportedError:
    """Which operator has no translation, and where it stands; the exporter's own first line where that is not it."""
    failing = _failing_node(error)
    if failing is None:
        return UnsupportedError(f"the model does not translate to ONNX: {_first_line(error)}")
    trace = failing.meta.get("stack_trace")
    line = [
        n for n in graph.nodes if n.op == "call_function" and trace and n.meta.get("stack_trace") == trace
    ]
    with suppress(ImportError, AttributeError):
        known = _Words(opset, _own_words()).of
        line.sort(key=lambda n: (n.target is not failing.target, known(n.target)))  # it may have several
    culprit = line[0] if line else failing
    return unsupported(
        culprit, "no translation to ONNX; replace it in the model, or register one with onnxscript"
    )


def _failing_node(error: BaseException | None) -> Node | None:
    """The node that the translator was at: only its stack frames know."""
    while error is not None:
        trace = error.__traceback__
        while trace is not None:
            node = trace.tb_frame.f_locals.get("node")
            if isinstance(node, Node) and trace.tb_frame.f_globals.get("__name__", "").startswith(
                "torch.onnx"
            ):
                return node
            trace = trace.tb_next
        error = error.__cause__
    return None


def _first_line(error: BaseException) -> str:
    """What it all began with, in a line: the exporter adds advice in colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


@contextmanager
def _exact() -> Iterator[None]:
    """The optimiser takes 1e-8 for 0, and 1.00001 for 1: it would drop what keeps a division finite.

    AttributeError where it compares numbers in another place (onnxscript 0.7.2): it is not used then.
    """
    from onnxscript.rewriter import _matcher

    _ = _matcher.math.isclose
    with _replaced(_matcher, "math", SimpleNamespace(isclose=lambda a, b, **_: a == b)):
        yield


# -------------------------------------------------------------------- as quick as may be


Programmer = Callable[[Graph, fx.GraphModule], ExportedProgram]
State = tuple[int, int]  # how many translations and operators there are


@contextmanager
def _plain(*_: Any) -> Iterator[Programmer]:
    yield reexport


@contextmanager
def _quick(module: fx.GraphModule, own: Collection[Any], opset: int) -> Iterator[Programmer]:
    """While the block runs, `module` has its operators without words written out, and an export traces these alone.

    own: operators with translations of their own.
    """
    try:
        from torch.onnx._internal.exporter import _fx_passes as rewrites
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        decompose = rewrites.decompose_with_registry
        speech = _Words(opset, own)
    except (ImportError, AttributeError):
        yield reexport
        return

    def decomposed(program: ExportedProgram, registry: Any) -> ExportedProgram:
        graphs = [part.graph for part in program.graph_module.modules()]
        called = {node.target for one in graphs for node in one.nodes if node.op == "call_function"}
        return program if all(map(speech.of, called)) else decompose(program, registry)

    def registry(opset_version: int) -> ONNXRegistry:
        """One to add to."""
        fresh = ONNXRegistry()
        fresh._opset_version = opset_version
        fresh.functions = {
            name: list(found) for name, found in _library(speech.opset, speech.state).functions.items()
        }
        return fresh

    with ExitStack() as stack:
        stack.enter_context(_replaced(ONNXRegistry, "from_torchlib", staticmethod(registry)))
        stack.enter_context(_replaced(rewrites, "decompose_with_registry", decomposed))
        for node in module.graph.nodes:
            if node.op == "call_function" and not speech.of(node.target):
                written_out = _written_out(node.target, speech.parts)
                stack.enter_context(_replaced(node, "target", written_out))
        module.recompile()
        yield assembled
    module.recompile()


class _Words:
    """Which operators are translated as they are, and what becomes of others (`parts`).

    own: operators with translations of their own. ImportError, AttributeError where this torch is another inside.
    """

    def __init__(self, opset: int, own: Collection[Any]) -> None:
        import onnxscript.function_libs.torch_lib.ops  # noqa: F401  registers what is counted below
        from onnxscript.function_libs.torch_lib.registration import default_registry as known
        from torch.onnx._internal.exporter import _constants

        self.opset = max(opset, _constants.TORCHLIB_OPSET)  # an older one is made of that
        # users register more translations, libraries more operators: a word for one that is not there is left out
        count = sum(len(one.overloads) + len(one.complex) for one in known.values())
        self.state: State = count, len(torch._C._dispatch_get_all_op_names())
        library, self.parts = _vocabulary(self.opset, self.state)
        self.known = {*library, *own}

    def of(self, operator: Any) -> bool:
        if not isinstance(operator, OpOverload):
            return inspect.isbuiltin(operator)
        return operator in self.known and not operator._schema.is_mutable


@cache
def _library(opset: int, _: State) -> Any:
    """Torch's registry of translations, nobody's own among them."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    return ONNXRegistry.from_torchlib(opset)


@cache
def _vocabulary(opset: int, state: State) -> tuple[Collection[Any], Mapping[Any, Callable[..., Any]]]:
    """The operators that the exporter's library translates, and what it makes of some of the others.

    Without those that a second trace always takes apart, views most of them: nobody has ever used these translations.
    """
    from torch._export.utils import _is_preservable_cia_op
    from torch.onnx._internal.exporter import _decomp

    registry = _library(opset, state)
    words: set[Any] = set(_decomp.get_onnx_implemented_overloads(registry))
    words -= {op for op in words if _composite(op) and not _is_preservable_cia_op(op)}
    parts = _decomp.create_onnx_friendly_decomposition_table(words)
    return words, {**parts, torch.ops.aten.batch_norm.default: _batch_norm}


def _batch_norm(x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *rest: Any) -> Any:
    """What torch makes of it in two steps."""
    aten = torch.ops.aten
    if training:
        return aten.batch_norm.default(x, weight, bias, mean, var, training, *rest)
    return aten._native_batch_norm_legit_no_training.default(x, weight, bias, mean, var, *rest[:2])[0]


def _composite(operator: Any) -> bool:
    if not isinstance(operator, OpOverload) or not torch._C._dispatch_has_kernel(operator.name()):
        return False
    return operator._can_decompose()


def _written_out(operator: Any, parts: Mapping[Any, Callable[..., Any]]) -> Callable[..., Any]:
    """A function that does the same, of which a trace sees what is in it; the operator itself where nothing is."""
    made = parts.get(operator)
    if made is None:
        if not _composite(operator):
            return operator
        made = operator.decompose

    def called(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return made(*args, **kwargs)

    called.__name__ = called.__qualname__ = str(operator).replace(".", "_")
    return called


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = inspect.getattr_static(owner, name) if isinstance(owner, type) else getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
