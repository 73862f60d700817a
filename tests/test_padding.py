"""Padding: where batch and sequence lie in every value, and that what stands in padded positions counts nowhere."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from nets import Net
from torch import Tensor, nn

from compressor.capture import capture
from compressor.data import open_data
from compressor.ir import Graph, Input
from compressor.ops import kind
from compressor.padding import Padding, is_mask
from compressor.pipeline import Context
from compressor.quantize import calibrate
from compressor.quantize import percentile as cut
from compressor.splits import layers_of, observe
from passes.fp16 import Fp16, _Survey
from targets.cpu import CPU
from targets.gpu import GPU

BATCH, LENGTH, WIDTH = 4, 8, 8  # alike, so that no size tells what an axis is
MASK = torch.ones(BATCH, LENGTH, dtype=torch.int64)
MASK[0, 5:], MASK[2, 2:] = 0, 0
IDS = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 20
GARBAGE = torch.where(MASK == 1, IDS, 39 - IDS)
REAL = int(MASK.sum())
FREE = [Input("input_ids", torch.int64, ("batch", "sequence")),
        Input("attention_mask", torch.int64, ("batch", "sequence"))]  # fmt: skip


class Text(nn.Module):
    """Embedded tokens, and a function of the network, of [batch, sequence, features], and of the mask."""

    def __init__(self, function: Callable, **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.table = nn.Embedding(40, WIDTH)
        self.net = Net(function, linear=nn.Linear(WIDTH, WIDTH), **parts)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.net(self.table(input_ids), attention_mask)


def captured(model: nn.Module, dynamic: bool = True, mask: str = "attention_mask") -> Graph:
    specs = FREE if dynamic else [Input(s.name, s.dtype, (BATCH, LENGTH)) for s in FREE]
    graph = capture(model.eval(), inputs=specs)
    assert [isinstance(s.shape[1], str) for s in graph.inputs] == [dynamic] * 2
    graph.inputs = (graph.inputs[0], Input(mask, torch.int64, graph.inputs[1].shape))
    return graph


def attention(net: Net, x: Tensor, mask: Tensor) -> Tensor:
    """By hand, over heads in the batch axis: [batch * heads, sequence, 4]."""
    batch, length, _ = x.shape
    q, k, v = (
        layer(x).view(batch, length, 2, 4).transpose(1, 2).reshape(batch * 2, length, 4)
        for layer in (net.linear, net.key, net.value)
    )
    scores = torch.bmm(q, k.transpose(1, 2)).view(batch, 2, length, length)
    scores = scores.masked_fill(mask[:, None, None] == 0, float("-inf"))
    mixed = torch.bmm(scores.softmax(-1).view(batch * 2, length, length), v)
    return mixed.view(batch, 2, length, 4).transpose(1, 2).reshape(batch, length, WIDTH)


def experts(net: Net, x: Tensor, mask: Tensor) -> Tensor:
    flat = x.reshape(-1, WIDTH)
    weights = net.linear(flat).softmax(-1).unsqueeze(-1)
    return (weights * torch.stack([flat] * WIDTH, 1)).sum(1).view(x.shape)


def pooled(net: Net, x: Tensor, mask: Tensor) -> Tensor:
    wide = mask.unsqueeze(-1).to(x.dtype)
    return net.linear((x * wide).sum(1) / wide.sum(1))


def built_in(net: Net, x: Tensor, mask: Tensor) -> Tensor:
    """Sequence first inside: [sequence, batch, features], and heads of [batch * heads, sequence, 4]."""
    return net.attention(x, x, x, key_padding_mask=mask == 0, need_weights=True)[0]


KEYS = {"key": nn.Linear(WIDTH, WIDTH), "value": nn.Linear(WIDTH, WIDTH)}
NETS: dict[str, tuple[Callable, dict]] = {
    "linear": (lambda n, x, m: n.linear(x).relu(), {}),
    "joined": (lambda n, x, m: n.linear(x.reshape(-1, WIDTH)).view(x.shape), {}),
    "sequence first": (lambda n, x, m: n.linear(x.transpose(0, 1).reshape(-1, WIDTH)), {}),
    "attention": (attention, KEYS),
    "built in": (built_in, {"attention": nn.MultiheadAttention(WIDTH, 2, batch_first=True)}),
    "einsum": (lambda n, x, m: torch.einsum("bsf,btf->bst", n.linear(x), x), {}),
    "positions": (lambda n, x, m: n.linear(x + n.places[:, : x.shape[1]]), {"places": torch.randn(1, 30, WIDTH)}),
    "split": (lambda n, x, m: torch.cat([p.tanh() for p in n.linear(x).chunk(2, -1)], -1), {}),
    "convolution": (lambda n, x, m: n.conv(n.linear(x).transpose(1, 2)), {"conv": nn.Conv1d(WIDTH, WIDTH, 1)}),
    "repeated": (lambda n, x, m: n.linear(x).repeat_interleave(2, 1).mul(2), {}),
    "indexed": (lambda n, x, m: n.linear(x)[:, :, n.picked].relu(), {"picked": torch.tensor([0, 2])}),
    "experts": (experts, {}),
    "pooled": (pooled, {}),
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", NETS)
def test_garbage_in_padded_positions_moves_no_kept_value_by_a_bit(name: str, dynamic: bool) -> None:
    function, parts = NETS[name]
    graph = captured(Text(function, **parts), dynamic)
    real = Padding(graph).of((IDS, MASK))
    changed = 0
    for (node, clean), (_, dirty) in zip(graph.values(IDS, MASK), graph.values(GARBAGE, MASK), strict=True):
        if isinstance(clean, Tensor):
            assert torch.equal(real.values(node, clean), real.values(node, dirty)), (node, clean.shape)
            changed += not torch.equal(clean, dirty)
    assert changed  # so that it would have shown


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_real_positions_are_all_kept(dynamic: bool) -> None:
    graph = captured(Text(attention, **KEYS), dynamic)
    real = Padding(graph).of((IDS, MASK))
    lengths = MASK.sum(1)
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for node, value in graph.values(IDS, MASK):
        if node.op == "call_function" and isinstance(value, Tensor):
            shapes.setdefault(kind(node), []).append(tuple(real.values(node, value).shape))
            if kind(node) == "linear":
                assert torch.equal(real.values(node, value), value[MASK == 1])
    assert shapes["linear"] == [(REAL, WIDTH)] * 3
    assert shapes["matmul"] == [(2 * int(lengths.square().sum()),), (2 * REAL, 4)]  # pairs of real positions


def test_rows_have_the_channels_last() -> None:
    graph = captured(Text(NETS["convolution"][0], **NETS["convolution"][1]))
    real = Padding(graph).of((IDS, MASK))
    seen = {kind(n): (n, v) for n, v in graph.values(IDS, MASK)}
    node, value = seen["conv"]
    assert torch.equal(real.rows(node, value, -2), value.transpose(1, 2)[MASK == 1])
    assert torch.equal(
        real.rows(node, value, -1), value
    )  # the sequence itself are the channels: nothing can go
    everything = Padding(graph).of((IDS, torch.ones_like(MASK)))
    assert torch.equal(everything.rows(node, value, 1), value.transpose(1, 2))
    assert everything.values(node, value) is value


NOT_FOLLOWED: dict[str, Callable] = {
    "shifted": lambda n, x, m: n.linear(x)[:, 1:] * 2,
    "flipped": lambda n, x, m: n.linear(x).flip(1) * 2,
    "rolled": lambda n, x, m: n.linear(x).roll(1, 1) * 2,
    "sorted": lambda n, x, m: n.linear(x).sort(1)[0] * 2,
    "moved by padding": lambda n, x, m: nn.functional.pad(n.linear(x), (0, 0, 1, -1)) * 2,
    "of pairs of samples": lambda n, x, m: torch.einsum("bsf,csf->bcs", x, x) * 2,
    "joined to itself": lambda n, x, m: torch.cat([x, n.linear(x)], 1) * 2,
    "summed": lambda n, x, m: n.linear(x).sum(1) * 2,
}


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_what_is_not_at_its_position_any_more_is_kept_whole(name: str, dynamic: bool) -> None:
    graph = captured(Text(NOT_FOLLOWED[name]), dynamic)
    real = Padding(graph).of((IDS, MASK))
    node, value = next((n, v) for n, v in reversed(list(graph.values(IDS, MASK))) if kind(n) == "mul")
    assert real.values(node, value) is value


def test_what_is_a_mask() -> None:
    def named(name: str, *shape: int | str) -> bool:
        return is_mask(Input(name, torch.int64, shape or ("batch", "sequence")))

    assert all(map(named, ("attention_mask", "batch.attention_mask", "mask", "src_key_padding_mask")))
    assert not any(
        map(named, ("input_ids", "token_type_ids", "global_attention_mask", "special_tokens_mask"))
    )
    assert not named("attention_mask", "batch", 1, "sequence", "sequence")


def test_masks_that_say_nothing_and_masks_of_padding() -> None:
    graph = captured(Text(NETS["linear"][0]))
    node, value = next((n, v) for n, v in graph.values(IDS, MASK) if kind(n) == "linear")

    def kept(mask: Tensor, graph: Graph = graph) -> int:
        return Padding(graph).of((IDS, mask)).values(node, value).numel() // WIDTH

    assert kept(MASK) == kept(MASK.bool()) == kept(MASK.float()) == REAL
    assert kept(torch.zeros_like(MASK)) == kept(MASK * 2) == kept((1 - MASK) * -1e9) == IDS.numel()
    inverted = captured(Text(NETS["linear"][0]), mask="key_padding_mask")
    assert Padding(inverted).of((IDS, MASK)).values(node, value) is value  # another graph's node: not known
    node = next(n for n in inverted.nodes if kind(n) == "linear")
    assert kept(1 - MASK, inverted) == REAL and kept(MASK, inverted) == IDS.numel() - REAL


def test_two_sequences_have_a_mask_each() -> None:
    def cross(a: Tensor, a_mask: Tensor, b: Tensor, b_mask: Tensor) -> Tensor:
        return a @ b.transpose(1, 2) + a_mask[..., None] + b_mask[:, None]

    class Cross(nn.Module):
        def forward(self, a: Tensor, attention_mask: Tensor, b: Tensor, decoder_mask: Tensor) -> Tensor:
            return cross(a, attention_mask, b, decoder_mask)

    specs = [Input("a", torch.float32, ("batch", "sequence", 3)), FREE[1],
             Input("b", torch.float32, ("batch", "target", 3)),
             Input("decoder_mask", torch.int64, ("batch", "target"))]  # fmt: skip
    graph = capture(Cross(), inputs=specs)
    other = torch.ones(BATCH, 5, dtype=torch.int64)
    other[1, 3:] = 0
    values = (torch.randn(BATCH, LENGTH, 3), MASK, torch.randn(BATCH, 5, 3), other)
    real = Padding(graph).of(values)
    node, value = next((n, v) for n, v in graph.values(*values) if kind(n) == "matmul")
    both = (MASK[:, :, None] * other[:, None]) == 1
    assert torch.equal(real.values(node, value), value[both]) and not bool(both.all())


# ---------------------------------------------------------------- statistics


def ranges(graph: Graph, ids: Tensor, percentile: float) -> dict[str, tuple[float, float]]:
    """Through a file of the user's, as everything else."""
    data = open_data({"input_ids": ids.numpy(), graph.inputs[1].name: MASK.numpy()}, graph.inputs)
    nodes = [n for n in graph.nodes if kind(n) in ("linear", "matmul", "embedding", "add")]
    return {n.name: r for n, r in calibrate(graph, nodes, data, cut(percentile)).items()}


def covariances(graph: Graph, ids: Tensor) -> list[Tensor]:
    data = open_data([(ids, MASK)], graph.inputs)
    layers, _ = layers_of(graph, ())
    seen = observe(graph, layers, {}, Context(CPU, data, data))
    return [t for c in seen.values() for t in (c.mean, c.scatter, torch.tensor(c.count))]


def peaks(graph: Graph, ids: Tensor) -> dict[str, float]:
    survey = _Survey(graph, ())
    survey.watch((ids, MASK), trial=False)
    return {node.name: peak for node, peak in survey.peak.items() if node.op == "call_function"}


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_no_statistic_sees_padding(dynamic: bool) -> None:
    model = Text(attention, **KEYS)
    model.table.weight.data[20:] *= 10  # what the garbage looks up
    graph = captured(model, dynamic)
    unknown = captured(model, dynamic, mask="flags")  # the same numbers, under a name that tells nothing
    for statistic in (lambda g, i: ranges(g, i, 100), lambda g, i: ranges(g, i, 99.9), peaks):
        assert statistic(graph, IDS) == statistic(graph, GARBAGE)
        assert statistic(unknown, IDS) != statistic(unknown, GARBAGE)
    same = [
        torch.equal(a, b) for a, b in zip(covariances(graph, IDS), covariances(graph, GARBAGE), strict=True)
    ]
    assert all(same)
    wrong = zip(covariances(unknown, IDS), covariances(unknown, GARBAGE), strict=True)
    assert not all(torch.equal(a, b) for a, b in wrong)


def test_ranges_of_padded_texts_are_those_of_the_texts_alone() -> None:
    model = Text(NETS["linear"][0])
    model.table.weight.data[20:] *= 10
    graph = captured(model)
    node = next(n for n in graph.nodes if kind(n) == "linear")
    alone = [(IDS[i : i + 1, :n], MASK[i : i + 1, :n]) for i, n in enumerate(MASK.sum(1).tolist())]
    padded = calibrate(graph, [node], open_data([(GARBAGE, MASK)], graph.inputs))[node]
    assert padded == pytest.approx(calibrate(graph, [node], open_data(alone, graph.inputs))[node], rel=1e-6)
    assert padded != pytest.approx(
        calibrate(graph, [node], open_data([(GARBAGE, torch.ones_like(MASK))], graph.inputs))[node], rel=1e-6
    )


def test_half_precision_looks_away_from_padding_until_it_overflows() -> None:
    """An infinity in a padded position would reach the real ones, as 0 * inf; a large number there does no harm."""

    def single(scale: float) -> int:
        graph = captured(Text(lambda n, x, m: n.linear(x.tanh() * (1 + (1 - m[..., None]) * scale))))
        data = open_data([(IDS, MASK)] * 2, graph.inputs)
        return Fp16().run(graph, Context(GPU, data, data)).facts["single"]

    assert single(3e4) == single(0.5) < single(3e5)


def test_a_batch_without_padding_is_measured_as_before() -> None:
    graph = captured(Text(attention, **KEYS))
    data = {"input_ids": IDS.numpy(), "attention_mask": np.ones_like(MASK.numpy())}
    nodes = [n for n in graph.nodes if kind(n) in ("linear", "matmul")]
    seen = calibrate(graph, nodes, open_data(data, graph.inputs), cut(99.9))
    unknown = captured(Text(attention, **KEYS), mask="flags")
    unknown.tensors = graph.tensors
    names = [n for n in unknown.nodes if kind(n) in ("linear", "matmul")]
    plain = calibrate(unknown, names, open_data((IDS, torch.ones_like(MASK)), unknown.inputs), cut(99.9))
    assert list(map(seen.get, nodes)) == list(map(plain.get, names))


# ---------------------------------------------------------------- models of a library


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Bert", "Llama", "OPT", "DebertaV2"])
def test_models_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    sizes = {"vocab_size": 40, "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"OPT": {"ffn_dim": 16, "word_embed_proj_dim": WIDTH}, "Llama": {"num_key_value_heads": 1}}
    config = getattr(transformers, f"{name}Config")(
        **sizes, **more.get(name, {}), **({} if name == "OPT" else {"intermediate_size": 16}), use_cache=False
    )
    if name == "Bert":
        config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}Model")(config).eval()
    for parameter in model.parameters():
        parameter.data.uniform_(-1, 1)
    for dynamic in (True, False):
        graph = captured(model, dynamic)
        real = Padding(graph).of((IDS, MASK))
        changed = leaking = 0
        for (node, clean), (_, dirty) in zip(
            graph.values(IDS, MASK), graph.values(GARBAGE, MASK), strict=True
        ):
            if isinstance(clean, Tensor):
                changed += not torch.equal(clean, dirty)
                leaking += not torch.equal(real.values(node, clean), real.values(node, dirty))
        assert not leaking and changed
