"""Affine regions: where features lie, what belongs to a region, and reading one operator off it by probing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F

from compressor import kernels
from compressor.affine import FEATURES, KERNELS, Reach, Region, reach, region
from compressor.capture import capture
from compressor.constants import DataFree, fold_constants, is_random
from compressor.errors import ContractError
from compressor.ir import Graph, Input
from compressor.kernels import Window
from compressor.layout import Atom, Layout, is_exit, reshaped, start
from compressor.probe import Evaluation, Operator, probe

BATCH, LENGTH, WIDTH = 3, 5, 8


class Function(nn.Module):
    """A model of one expression with parameters w [8, 8], v [8] and t [5, 1]."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.body = body
        generator = torch.Generator().manual_seed(0)
        for name, shape in {"w": (WIDTH, WIDTH), "v": (WIDTH,), "t": (LENGTH, 1)}.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))

    def forward(self, *inputs: Tensor) -> Any:
        return self.body(self, *inputs)


def graph_of(body: Callable[..., Any], *example: Tensor, **options: Any) -> Graph:
    example = example or (torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0)),)
    graph = capture(Function(body).eval(), example, **options)
    fold_constants(graph, 1 << 20)
    return graph


def order_of(graph: Graph) -> Mapping[Node, int]:
    return {node: i for i, node in enumerate(graph.graph.nodes)}


def reached(graph: Graph, form: Any = FEATURES) -> Reach:
    """Everything affine in the graph's first input."""
    found = reach(form, graph.placeholders[0], DataFree(graph), order_of(graph))
    assert found is not None
    return found


def whole(graph: Graph, form: Any = FEATURES) -> Region:
    """The region from the graph's first input to its first output."""
    return region(reached(graph, form), [graph.results[0]], DataFree(graph), order_of(graph))


def blocked(graph: Graph) -> str:
    (reason,) = reached(graph).blocked.values()
    return reason


# ------------------------------------------------------------------------- layouts


S = sympy.Symbol("s", positive=True, integer=True)
T0, T1 = (Atom(S, 0),), (Atom(LENGTH, 1),)


def features(size: int) -> tuple[Atom, ...]:
    return (Atom(size),)


@pytest.mark.parametrize(
    "before, sizes, after",
    [
        ((T0, T1, features(8)), [S, 5, 2, 4], (T0, T1, features(2), features(4))),
        ((T0, T1, features(2), features(4)), [S, 5, 8], (T0, T1, features(8))),
        ((T0, T1, features(8)), [5 * S, 8], (T0 + T1, features(8))),
        ((T0 + T1, features(8)), [S, 5, 8], (T0, T1, features(8))),
        ((T0, T1, features(8)), [S, 1, 5, 8], (T0, (), T1, features(8))),
        (
            (T0, T1, features(8)),
            [S, 40],
            (T0, T1 + features(8)),
        ),  # a mixed axis, as long as it is taken apart again
        ((T0, T1 + features(8)), [S, 5, 8], (T0, T1, features(8))),
        ((T0, features(8), T1), [S, 2, 20], (T0, features(2), features(4) + T1)),
    ],
)
def test_reshapes_deal_out_tokens_and_features(before: Layout, sizes: list[Any], after: Layout) -> None:
    assert reshaped(before, sizes) == after


@pytest.mark.parametrize("sizes", [[S, 8, 5], [S, 4, 10], [5 * S, 4, 4], [S, 5, 3], [S, 20, 2, 1, 1, 2]])
def test_reshapes_that_split_tokens_have_no_layout(sizes: list[Any]) -> None:
    assert reshaped((T0, T1, features(8)), sizes) in (None, (T0, T1 + features(4), features(2)))
    if sizes[-1] != 2:
        assert reshaped((T0, T1, features(8)), sizes) is None


def test_exits_have_the_tokens_of_the_entry_in_order() -> None:
    entry = graph_of(lambda m, x: x * 2).placeholders[0]
    first = start(entry)
    assert first is not None and [a[0].token for a in first[:-1]] == [0, 1]
    assert is_exit((*first[:-1], features(3)), entry, entry)
    assert not is_exit((first[1], first[0], features(8)), entry, entry)
    assert not is_exit((*first[:-1], features(2), features(4)), entry, entry)
    assert not is_exit((first[0], features(8), first[1]), entry, entry)


# ------------------------------------------------------------------------- what is affine


AFFINE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "linear": lambda m, x: F.linear(x, m.w, m.v),
    "matmul": lambda m, x: x @ m.w,
    "matmul from the left": lambda m, x: (m.w @ x.transpose(1, 2)).transpose(1, 2),
    "addmm": lambda m, x: torch.addmm(m.v, x.view(-1, WIDTH), m.w).view(x.shape),
    "bmm by blocks": lambda m, x: torch.matmul(x.view(*x.shape[:2], 2, 1, 4), m.w[:, :4].view(2, 4, 4)).view(
        x.shape
    ),
    "einsum": lambda m, x: torch.einsum("btd,de->bte", x, m.w),
    "einsum with an ellipsis": lambda m, x: torch.einsum(
        "...rk,rkc->...rc", x.view(*x.shape[:2], 2, 4), m.w[:, :4].view(2, 4, 4)
    ).reshape(x.shape),
    "add, sub, neg": lambda m, x: -(x - m.v) + 2 * x - 1,
    "rsub": lambda m, x: 1 - x,
    "mul, div": lambda m, x: x * m.v / 3 / (m.v.abs() + 1),
    "cat of slices": lambda m, x: torch.cat([x[..., 4:], -x[..., :4]], -1),
    "stack and flatten": lambda m, x: torch.stack([x[..., 0::2], x[..., 1::2]], -1).flatten(-2),
    "split, chunk, unbind": lambda m, x: torch.cat(
        [*x.split(2, -1)[1:], x.chunk(4, -1)[0] + x.view(*x.shape[:2], 4, 2).unbind(2)[0]], -1
    ),
    "select": lambda m, x: x - x.view(*x.shape[:2], 2, 4)[..., 1, :].repeat(1, 1, 2),
    "sum and mean over features": lambda m, x: x + x.sum(-1, keepdim=True) - x.mean(-1, keepdim=True),
    "expand": lambda m, x: x.view(*x.shape[:2], 1, 8).expand(-1, -1, 2, -1).sum(2),
    "average pooling": lambda m, x: F.avg_pool1d(x, 2, padding=1),
    "average pooling of blocks": lambda m, x: F.avg_pool2d(x.view(*x.shape[:2], 2, 4), 2).flatten(-2),
    "repeat_interleave": lambda m, x: x[..., :4].repeat_interleave(2, -1),
    "index": lambda m, x: x[..., torch.tensor([3, 1, 1, 0])],
    "index_select, flip, roll": lambda m, x: x.index_select(-1, torch.tensor([7, 6])).flip(-1).roll(1, -1),
    "pad": lambda m, x: F.pad(x, (1, 2), value=0.5),
    "zeros": lambda m, x: torch.cat([x, torch.zeros_like(x[..., :2]), x.new_zeros(*x.shape[:2], 1)], -1),
    "casts": lambda m, x: F.linear(x.double(), m.w.double()).float(),
    "fft": lambda m, x: torch.fft.ifft(torch.fft.fft(x) * torch.fft.fft(m.v)).real,
    "tokens moved and moved back": lambda m, x: (
        F.linear(x.transpose(0, 1).reshape(-1, WIDTH), m.w).view(LENGTH, -1, WIDTH).transpose(0, 1)
    ),
    "batch norm": lambda m, x: F.batch_norm(x.reshape(-1, WIDTH), m.v * 0, m.v.abs() + 1, m.v).view(x.shape),
    "a constant that is the same for every token": lambda m, x: x + m.v.expand(LENGTH, WIDTH),
}


@pytest.mark.parametrize("body", AFFINE.values(), ids=AFFINE)
def test_probing_reads_one_linear_off(body: Callable[[Any, Tensor], Tensor]) -> None:
    graph = graph_of(body)
    found = reached(graph)
    assert found.blocked == {} and graph.results[0] in set(found.exits())
    operator = probe(graph, whole(graph))
    assert isinstance(operator, Operator)
    x = torch.randn(7, LENGTH, WIDTH)  # another batch than the one that was probed
    (expected,) = graph.run(x)
    scale = float(expected.abs().max())
    assert float((F.linear(x, operator.weight, operator.bias) - expected).abs().max()) < 1e-6 * scale
    wrong = operator.weight.clone()
    wrong[0, 0] += 0.01
    assert float((F.linear(x, wrong, operator.bias) - expected).abs().max()) > 1e-4 * scale


NOT_AFFINE: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "gelu": (lambda m, x: F.gelu(x), "aten.gelu at gelu is not affine"),
    "x * x": (lambda m, x: x * x, "aten.mul.Tensor at mul multiplies two activations"),
    "x @ x": (lambda m, x: x @ x.transpose(1, 2), "aten.matmul at matmul multiplies two activations"),
    "v / x": (lambda m, x: m.v / x, "aten.div.Tensor at div divides by an activation"),
    "a sum over tokens": (
        lambda m, x: x.sum(1),
        "aten.sum.dim_IntList at sum_1 works along axis 1, which holds more than the features of one position",
    ),
    "a cat of tokens": (
        lambda m, x: torch.cat([x, x], 1),
        "aten.cat at cat works along axis 1, which holds more than the features of one position",
    ),
    "shifted tokens": (
        lambda m, x: x.roll(1, 1),
        "aten.roll at roll works along axis 1, which holds more than the features of one position",
    ),
    "tokens padded and cropped": (
        lambda m, x: F.pad(x, (0, 0, 1, -1)),
        "aten.pad at pad works along axis 1, which holds more than the features of one position",
    ),
    "tokens averaged": (
        lambda m, x: F.avg_pool1d(x.transpose(1, 2), 3),
        "aten.avg_pool1d at avg_pool1d works along axis 2, which holds more than the features of one position",
    ),
    "some tokens": (
        lambda m, x: x.narrow(1, 1, 3),
        "aten.narrow at narrow works along axis 1, which holds more than the features of one position",
    ),
    "tokens into features": (
        lambda m, x: x.view(x.shape[0], WIDTH, LENGTH),
        "aten.view at view reshapes positions and features into one another",
    ),
    "other tokens added": (
        lambda m, x: x.view(x.shape[0], LENGTH, 2, 4)[:, :, :, 0].unsqueeze(1) + x.unsqueeze(2)[..., :2],
        "aten.add.Tensor at add combines different positions",
    ),
    "a table of positions": (
        lambda m, x: x * m.t,
        "aten.mul.Tensor at mul brings in a constant that differs from position to position",
    ),
    "a dynamic size": (lambda m, x: x * x.shape[0], "aten.mul.Tensor at mul computes with a dynamic size"),
    "integers": (lambda m, x: x.to(torch.int64), "aten.to.dtype at to gives integers"),
}


@pytest.mark.parametrize("body, reason", NOT_AFFINE.values(), ids=NOT_AFFINE)
def test_what_is_not_affine_says_so(body: Callable[[Any, Tensor], Tensor], reason: str) -> None:
    assert blocked(graph_of(body)) == reason


def test_another_activation_ends_a_region_without_a_word() -> None:
    graph = graph_of(
        lambda m, x, y: F.linear(x, m.w) + y, *(torch.randn(BATCH, LENGTH, WIDTH) for _ in range(2))
    )
    found = reached(graph)
    assert found.blocked == {} and graph.results[0] not in found.known


def test_quantised_weights_end_a_region() -> None:
    import torch.ao.quantization.fx._decomposed

    graph = graph_of(lambda m, x: F.linear(x, m.w))
    linear = graph.results[0]
    packed = graph.add_tensor("packed", torch.zeros(WIDTH, WIDTH, dtype=torch.int8))
    target = torch.ops.quantized_decomposed.dequantize_per_tensor.default
    opened = graph.insert(target, (packed, 0.1, 0, -128, 127, torch.int8), before=linear)
    graph.set_args(linear, (linear.args[0], opened))
    assert linear not in reached(graph).known


def test_sizes_that_depend_on_data_end_a_region() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return F.linear(x, m.w)[..., torch.nonzero(m.v > 0).flatten()] + 1

    graph = capture(Function(body).eval(), (torch.randn(BATCH, LENGTH, WIDTH),))
    assert blocked(graph) == "aten.index.Tensor at index has a size that depends on data"
    fold_constants(graph, 1 << 20)  # the indices are constants, so folding knows their number
    assert reached(graph).blocked == {} and isinstance(graph.results[0].meta["val"].shape[-1], int)


def test_two_dynamic_axes() -> None:
    spec = Input("inputs.0", torch.float32, ("batch", "sequence", WIDTH))
    graph = capture(
        Function(lambda m, x: torch.addmm(m.v, x.reshape(-1, WIDTH), m.w).view(x.shape)).eval(),
        (torch.randn(2, LENGTH, WIDTH),),
        inputs=(spec,),
    )
    assert isinstance(probe(graph, whole(graph)), Operator)


def test_one_static_token_is_probed_row_by_row() -> None:
    graph = capture(
        Function(lambda m, x: F.linear(x * m.v, m.w)).eval(), (torch.randn(1, WIDTH),), dynamic=False
    )
    operator = probe(graph, whole(graph))
    assert isinstance(operator, Operator) and operator.bias is None
    assert torch.allclose(operator.weight, graph.tensors["w"] * graph.tensors["v"])


# ------------------------------------------------------------------------- regions


def test_dead_are_the_operators_that_only_the_exit_needs() -> None:
    graph = graph_of(lambda m, x: (x * 2 + (y := F.linear(x, m.w)) * 3, y))
    names = {n.name for n in whole(graph).nodes}
    assert names == {"mul", "linear", "mul_1", "add"}
    assert {n.name for n in whole(graph).dead} == {"mul", "mul_1", "add"}


def test_probing_a_region_that_changed_is_an_error() -> None:
    graph = graph_of(lambda m, x: F.linear(x, m.w) * 2)
    found, linear = whole(graph), graph.node("linear")
    graph.replace_uses(linear, graph.insert(torch.ops.aten.relu.default, (linear,), before=graph.results[0]))
    with pytest.raises(ContractError, match="was changed while a region around it was probed"):
        Evaluation(graph, found)(torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64))


def test_a_wrong_rule_is_caught_by_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should a rule ever let through what is not affine, probing refuses it."""
    from compressor import features

    graph = graph_of(lambda m, x: F.gelu(F.linear(x, m.w)))
    monkeypatch.setitem(features.RULES, "activation", features.RULES["neg"])
    verdict = probe(graph, whole(graph))
    assert isinstance(verdict, str) and "differs from the operators" in verdict


def test_half_precision_that_overflows_is_refused() -> None:
    graph = graph_of(
        lambda m, x: F.linear(x, m.w.half() * 100) * 1000 * 1000, torch.randn(BATCH, LENGTH, WIDTH).half()
    )
    verdict = probe(graph, whole(graph))
    assert verdict == "one operator's weights would not be finite in torch.float16"


# ------------------------------------------------------------------------- windows


def window(body: Callable[..., Any]) -> Window:
    graph = graph_of(body, torch.randn(2, 4, 9, 9))
    found = reached(graph, KERNELS)
    assert found.blocked == {}
    return found.known[graph.results[0]]


def kernel(out: int, ins: int, *size: int) -> Tensor:
    return torch.randn(out, ins, *size, generator=torch.Generator().manual_seed(out))


K3, K2, K1, WIDE = kernel(4, 4, 3, 3), kernel(4, 4, 2, 2), kernel(4, 4, 1, 1), kernel(4, 2, 3, 3)


def test_windows_join_and_chain() -> None:
    three = frozenset({-1, 0, 1})
    joined = window(lambda m, x: F.conv2d(x, K3, padding=1) + F.conv2d(x, K1) + x)
    assert joined == Window((1, 1), (three, three), 1)
    chained = window(lambda m, x: F.conv2d(F.conv2d(x, K3, stride=2, padding=1), K1, torch.ones(4)))
    assert chained == Window((2, 2), (three, three), 1, biased=True)
    grown = window(lambda m, x: F.conv2d(F.conv2d(x, K3, stride=2), K3))
    assert grown.taps[0] == frozenset(range(7)) and grown.stride == (2, 2) and grown.size == (7, 7)
    dilated = window(lambda m, x: F.conv2d(x, K3, padding=2, dilation=2))
    assert (dilated.size, dilated.dilation, dilated.padding) == ((3, 3), (2, 2), (2, 2))
    assert window(lambda m, x: F.conv2d(x, WIDE, padding=1, groups=2) + x).blocks == 2


@pytest.mark.parametrize(
    "body, reason",
    [
        (lambda m, x: F.conv2d(F.conv2d(x, K3), K3, padding=1), "already has a receptive field"),
        (lambda m, x: F.conv2d(x + 1, K3, padding=1), "already has a bias"),
        (lambda m, x: F.conv2d(x, K3) * x[:, :, :7, :7], ""),
        (lambda m, x: x * torch.arange(9.0), "a value for every pixel"),
        (lambda m, x: F.conv2d(x, K2, padding="same"), "pads unevenly"),
        (lambda m, x: F.avg_pool2d(x, 3), "is not affine"),
        (
            lambda m, x: F.relu(x) * torch.ones(1, dtype=torch.float64).type_as(x),
            "reads a dtype and no values",
        ),
    ],
)
def test_what_is_not_one_convolution(body: Callable[..., Any], reason: str) -> None:
    graph = graph_of(body, torch.randn(2, 4, 9, 9))
    found = reached(graph, KERNELS)
    assert graph.results[0] not in found.known
    assert any(reason in text for text in found.blocked.values())


def test_a_value_without_elements_is_no_exit() -> None:
    graph = graph_of(lambda m, x: torch.cat([F.relu(x), (x @ m.w)[..., 8:]], -1))
    found = reached(graph, FEATURES)
    empty = [node for node in found.known if 0 in node.meta["val"].shape]
    assert empty and not set(empty) & set(found.exits())


@pytest.mark.parametrize("shape", [(2, 6, 12), (2, 6, 9, 7), (2, 6, 5, 6, 7)])
@pytest.mark.parametrize(
    "geometry", [{}, {"stride": 2, "padding": 2}, {"dilation": 2, "padding": 1}, {"groups": 3}]
)
def test_impulses_read_a_kernel_off(shape: tuple[int, ...], geometry: dict[str, int]) -> None:
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[len(shape)]
    weight = kernel(9, 6 // geometry.get("groups", 1), *[3] * (len(shape) - 2))
    bias = torch.randn(9, generator=torch.Generator().manual_seed(1))
    graph = graph_of(lambda m, x: convolve(x, weight, bias, **geometry) * 2, torch.randn(*shape))
    found = whole(graph, KERNELS)
    operator = probe(graph, found)
    assert isinstance(operator, Operator)
    assert torch.equal(operator.weight, 2 * weight) and operator.bias is not None
    assert torch.equal(operator.bias, 2 * bias)
    # without the short cut through the first convolution's weight: the same kernel from its values alone
    plain, _ = kernels.probe(lambda value, basis: Evaluation(graph, found)(value), found.entry, found.state)
    assert torch.allclose(plain.float(), operator.weight, atol=1e-6)
    assert not torch.allclose(plain.float().flip(-1), operator.weight, atol=1e-2)


# ------------------------------------------------------------------------- constants


def test_data_free_values() -> None:
    def body(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        batch = x.shape[0]
        return (
            x + torch.zeros(batch, LENGTH, WIDTH),
            x * m.v.expand(batch, LENGTH, WIDTH),
            x + torch.arange(batch).view(-1, 1, 1),
            x + torch.full((batch, 1, 1), 2.0),
            x * torch.full((1,), batch),
            torch.zeros_like(x) + x,
        )

    graph = graph_of(body)
    free = DataFree(graph)
    constants = [next(n for n in r.all_input_nodes if n.op != "placeholder") for r in graph.results]
    assert [c in free for c in constants] == [True, True, False, True, False, True]
    assert [free.varies(c, 2) for c in (constants[0], constants[1], constants[5])] == [False, True, False]
    assert not free.varies(constants[1], 0) and not free.varies(constants[1], 1)


def test_random_operators() -> None:
    graph = graph_of(lambda m, x: F.dropout(x, 0.5, training=False))
    named = {n.name: n for n in graph.nodes if n.op == "call_function"}
    drawn = graph.insert(torch.ops.aten.rand.default, ([LENGTH, 1],), before=graph.output)
    assert not is_random(named["dropout"]) and is_random(drawn) and drawn not in DataFree(graph)
    graph.set_args(named["dropout"], (*named["dropout"].args[:2], True))
    assert is_random(named["dropout"])


def test_constants_keep_their_bits_and_their_tensors() -> None:
    graph = capture(
        Function(lambda m, x: F.linear(x, m.w.t().contiguous()) + m.v.detach()).eval(),
        (torch.randn(2, WIDTH),),
    )
    w, v = graph.tensors["w"], graph.tensors["v"]
    folding = fold_constants(graph, 1 << 20)
    assert len(folding.made) == 2 and folding.left == []
    assert graph.tensors["v"] is v  # an identity on a tensor is that tensor
    (turned,) = (t for t in graph.tensors.values() if t.dim() == 2)
    assert torch.equal(turned, w.t())


def test_limit_of_folding() -> None:
    graph = capture(Function(lambda m, x: x @ m.w.exp() + m.v.exp()).eval(), (torch.randn(2, WIDTH),))
    assert len(fold_constants(graph, 1 << 20, limit=1).made) == 1
    assert len(fold_constants(graph, 1 << 20).made) == 1
    assert len(fold_constants(graph, 1 << 20).made) == 0
