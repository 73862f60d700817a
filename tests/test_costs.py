"""What operators cost: exact figures by hand, what the command shows of them, and how long that takes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.capture import capture
from compressor.channels import analyse
from compressor.costs import Cost, cost_of, layers
from compressor.ir import Graph, Input
from compressor.measure import parameters
from compressor.ops import is_constant, kind, macs

Run = Callable[..., tuple[int, str, str]]


class Calling(nn.Module):
    """A function of the inputs as a model; tensors that it takes besides are its parameters."""

    def __init__(self, function: Callable[..., Tensor], *tensors: Tensor) -> None:
        super().__init__()
        self.function = function
        self.tensors = nn.ParameterList(tensors)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs, *self.tensors)


def costs(model: nn.Module, *inputs: Tensor) -> dict[str, Cost]:
    """Kind -> cost of every operator of a model, the last one where there are several of a kind."""
    graph = capture(model.eval(), inputs)
    return {kind(n): cost_of(n) for n in graph.nodes if n.op == "call_function"}


IMAGE = torch.randn(2, 8, 6, 6)  # 288 numbers, 1152 bytes a sample
TOKENS = torch.randint(0, 100, (2, 5))  # 40 bytes a sample


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        # out 16 x 6 x 6 of 8 x 3 x 3 products each; weight 16 x 8 x 9 and a bias of 16
        (nn.Conv2d(8, 16, 3, padding=1), Cost(576 * 72, 4 * (288 + 1152 + 16), 4 * 576)),
        (nn.Conv2d(8, 16, 3, padding=1, groups=4), Cost(576 * 18, 4 * (288 + 288 + 16), 4 * 576)),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), Cost(288 * 9, 4 * (288 + 72), 4 * 288)),
        (nn.Conv2d(8, 16, 3, stride=2, bias=False), Cost(64 * 72, 4 * (288 + 1152), 4 * 64)),
        # every input number is multiplied with 16 x 2 x 2 weights
        (nn.ConvTranspose2d(8, 16, 2, 2, bias=False), Cost(288 * 64, 4 * (288 + 512), 4 * 16 * 144)),
        (nn.ConvTranspose2d(8, 16, 2, 2, groups=2), Cost(288 * 32, 4 * (288 + 256 + 16), 4 * 16 * 144)),
        (nn.Linear(6, 5), Cost(240 * 6, 4 * (288 + 30 + 5), 4 * 240)),
        (nn.BatchNorm2d(8), Cost(0, 4 * (288 + 4 * 8), 4 * 288)),
        (nn.ReLU(), Cost(0, 1152, 1152)),
        (nn.MaxPool2d(2), Cost(0, 1152, 288)),
        (nn.Flatten(), Cost(0, 0, 0)),
        (nn.Dropout(), Cost(0, 0, 0)),
    ],
    ids=lambda value: str(value) if isinstance(value, nn.Module) else "",
)
def test_layers_by_hand(layer: nn.Module, expected: Cost) -> None:
    graph = capture(nn.Sequential(layer, nn.ReLU()).eval(), (IMAGE,))
    operator = next(n for n in graph.nodes if n.op == "call_function")
    assert cost_of(operator) == expected
    assert cost_of(operator) != Cost(expected.macs + 1, expected.read, expected.written)


@pytest.mark.parametrize(
    ("layer", "inputs", "expected"),
    [
        # 7 steps of 4 gates, each of 10 x (6 + 10) weights
        (nn.LSTM(6, 10, batch_first=True), [torch.randn(2, 7, 6)], 7 * 640),
        (nn.LSTM(6, 10, proj_size=4), [torch.randn(7, 1, 6)], 7 * (40 * (6 + 4) + 4 * 10)),
        (nn.GRU(6, 10, batch_first=True), [torch.randn(2, 7, 6)], 7 * 480),
        # the second layer reads both directions of the first
        (
            nn.LSTM(6, 10, 2, bidirectional=True, batch_first=True),
            [torch.randn(2, 7, 6)],
            7 * 2 * (640 + 1200),
        ),
        (nn.RNNCell(6, 10), [torch.randn(2, 6)], 160),
        (nn.Bilinear(4, 5, 6), [torch.randn(2, 4), torch.randn(2, 5)], 120),
    ],
    ids=lambda value: str(value) if isinstance(value, nn.Module) else "",
)
def test_operators_that_no_pass_knows_count_all_the_same(layer, inputs, expected):
    assert macs(capture(layer.eval(), tuple(inputs))) == expected


def test_products_of_several_are_made_one_after_the_other():
    """bij, jk, kl: 3 x 4 x 5 and 3 x 5 x 6, not 3 x 4 x 5 x 6."""
    function = partial(torch.einsum, "bij,jk,kl->bil")
    graph = capture(Calling(function, torch.randn(4, 5), torch.randn(5, 6)), (torch.randn(2, 3, 4),))
    assert macs(graph) == 60 + 90
    sums = sum(term.base for term in analyse(graph).macs_terms)
    assert sums == 150


@pytest.mark.parametrize(
    ("function", "tensors", "which", "expected"),
    [
        # 8 heads of 6 x 6: 6 products a number
        (lambda x: x @ x.mT, [], "matmul", Cost(288 * 6, 2 * 1152, 1152)),
        (torch.matmul, [torch.randn(6, 3)], "matmul", Cost(144 * 6, 4 * (288 + 18), 4 * 144)),
        # scores and sums, 8 x 6 x 6 x 6 each; q, k and v are one tensor, which is read once, and three
        (lambda x: F.scaled_dot_product_attention(x, x, x), [], "attention", Cost(2 * 1728, 1152, 1152)),
        (
            lambda x: F.scaled_dot_product_attention(x, x + 1, x * 2),
            [],
            "attention",
            Cost(3456, 3456, 1152),
        ),
        (torch.add, [torch.randn(8, 1, 1)], "add", Cost(0, 1152 + 32, 1152)),
        (lambda x: x + x, [], "add", Cost(0, 1152, 1152)),
        (lambda x: x[:, :1] + x, [], "add", Cost(0, 144 + 1152, 1152)),
        (lambda x: x[:, 2:4], [], "slice", Cost(0, 288, 288)),
        (lambda x: x[:, 0:8].relu(), [], "slice", Cost(0, 0, 0)),
        (lambda x: x.view(-1, 4, 72), [], "view", Cost(0, 0, 0)),
        (lambda x: x.unsqueeze(1), [], "unsqueeze", Cost(0, 0, 0)),
        (lambda x: x.permute(0, 2, 3, 1), [], "permute", Cost(0, 1152, 1152)),
        (lambda x: x.float().half(), [], "cast", Cost(0, 1152, 576)),
        (lambda x: torch.cat([x, x[:, :2]], 1), [], "cat", Cost(0, 1152 + 288, 1440)),
        (lambda x: x.split([3, 5], 1)[0].relu(), [], "split", Cost(0, 1152, 1152)),
        (lambda x: x.split([3, 5], 1)[0].relu(), [], "getitem", Cost(0, 0, 0)),
        (lambda x: x[:, :, :1].expand(-1, -1, 6, -1), [], "expand", Cost(0, 192, 1152)),
        (lambda x: x[:, :, :1].expand_as(x), [], "expand", Cost(0, 192, 1152)),
        (lambda x: x + torch.zeros_like(x), [], "create_like", Cost(0, 0, 1152)),
        (lambda x: x.tril(), [], "create_like", Cost(0, 1152, 1152)),
        (lambda x: x[:, :, :, torch.tensor([0, 2])], [], "index", Cost(0, 4 * 96 + 16, 4 * 96)),
    ],
)
def test_operators_by_hand(
    function: Callable[..., Tensor], tensors: list[Tensor], which: str, expected: Cost
) -> None:
    assert costs(Calling(function, *tensors), IMAGE)[which] == expected


def test_an_embedding_reads_the_rows_that_it_looks_up() -> None:
    large, small = nn.Embedding(1000, 16), nn.Embedding(100, 16)
    assert costs(large, TOKENS)["embedding"] == Cost(0, 40 + 5 * 64, 5 * 64)
    many = torch.randint(0, 100, (2, 500))
    assert costs(small, many)["embedding"] == Cost(0, 500 * 8 + 100 * 64, 500 * 64), "at most the whole table"


def test_half_precision_moves_half_the_bytes_at_twice_the_intensity() -> None:
    model = nn.Linear(6, 5)
    full, half = (costs(model.to(t), IMAGE.to(t))["linear"] for t in (torch.float32, torch.float16))
    assert (half.macs, 2 * half.bytes, half.intensity) == (full.macs, full.bytes, 2 * full.intensity)
    assert full.bytes == full.read + full.written == 4 * 563
    assert full.intensity == pytest.approx(2 * 1440 / 2252)
    assert Cost(0, 8, 8).intensity == Cost(0, 0, 0).intensity == 0


def test_dynamic_axes_count_as_in_the_example_and_the_batch_once() -> None:
    """Sequence 16, as `inputs` stands in for an example; also where the two are one axis."""
    specs = [Input("x", torch.float32, ("batch", "sequence", 4))]
    graph = capture(nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 3)), inputs=specs)
    linear = next(n for n in graph.nodes if kind(n) == "linear")
    length = int(graph.example[0].shape[1])
    assert graph.inputs[0].shape == ("batch", "sequence", 4) and length > 1
    assert cost_of(linear) == Cost(length * 12, 4 * (length * 4 + 15), 4 * length * 3)


class Shared(nn.Module):
    """A table that is looked up and, as the head, multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(100, 16), nn.Linear(16, 100, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).relu()).flatten(1)


def test_rows_are_plain_data_the_costliest_first() -> None:
    graph = capture(Shared(), (TOKENS,))
    rows = layers(graph)
    assert [row["site"] for row in rows[:2]] == ["head", "table"]
    head = {"operator": "aten.linear.default", "shape": [1, 5, 100], "weight": [100, 16], "params": 1600}
    cost = {"macs": 8000, "share": 1.0, "read": 4 * (80 + 1600), "written": 2000, "bytes": 8720}
    assert rows[0].items() >= (head | cost).items()
    assert rows[0]["intensity"] == pytest.approx(16000 / 8720)
    assert sum(row["params"] for row in rows) == 2 * parameters(graph) == 3200, (
        "a shared weight at each reader"
    )
    assert sum(row["macs"] for row in rows) == macs(graph)
    assert {row["node"] for row in rows} <= {n.name for n in graph.nodes}
    assert json.loads(json.dumps(rows)) == rows


def test_sizes_have_no_row_and_nothing_to_share_is_no_error() -> None:
    graph = capture(Calling(lambda x: x.view(x.shape[0] * 2, -1).relu()), (IMAGE,))
    assert any(kind(n) == "size" for n in graph.nodes)
    rows = layers(graph)
    assert [row["operator"].split(".")[1] for row in rows] == ["relu", "view"]
    assert [(row["share"], row["weight"], row["params"]) for row in rows] == [(0.0, None, 0)] * 2


# ------------------------------------------------------------------------ the command


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """net.pt2 in the working directory."""
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5),
    ).eval()  # fmt: skip
    batch = {0: torch.export.Dim.DYNAMIC}
    torch.export.save(
        torch.export.export(model, (torch.randn(2, 3, 8, 8),), dynamic_shapes=(batch,)), "net.pt2"
    )
    return "net.pt2"


def test_the_command_shows_what_costs_most(run: Run, net: str) -> None:
    code, out, err = run("inspect", net, "--layers")
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    header = next(line for line in lines if line.startswith("layer "))
    assert header == "layer operator output weight params MACs share bytes FLOPs/byte"
    first = lines.index("0 conv2d 1x32x8x8 32x3x3x3 896 55.3 k 99.7% 12.5 kB 8.8")
    assert lines[first + 1] == "5 linear 1x5 5x32 165 160 0.3% 808 B 0.4"
    assert lines[first + 2] == "1 batch_norm 1x32x8x8 32 128 16.9 kB"
    assert lines[first + 3] == "2 relu 1x32x8x8 16.4 kB"
    assert "1 other 0 B" in lines, "the flatten"
    assert "total 1.19 k 55.5 k 100.0% 55 kB 2.0" in lines
    assert lines[-1] == "compress inspect net.pt2 --groups"
    assert run("inspect", net, "--layers", "--quiet") == (0, "", "")


def test_the_command_gives_all_rows_as_json(run: Run, net: str) -> None:
    code, out, _ = run("inspect", net, "--layers", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["layers"][0]["weight"] == [32, 3, 3, 3] and len(facts["layers"]) == 6
    assert "groups" not in facts and "layers" not in json.loads(run("inspect", net, "--json")[1])
    both = json.loads(run("inspect", net, "--layers", "--groups", "--json")[1])
    assert both["layers"] == facts["layers"] and both["groups"]
    out = run("inspect", net, "--layers", "--groups")[1]
    assert "FLOPs/byte" in out and "channels" in out


def test_layers_are_those_of_a_pytorch_model(run: Run, net: str) -> None:
    assert run(net, "--passes", "fold", "--no-measure", "--output", "out")[0] == 0
    for path in ("out", "out/report.json", "out/model.onnx"):
        code, out, err = run("inspect", path, "--layers")
        assert (code, out) == (2, "") and "--layers is for a PyTorch model" in err and err.count("\n") == 1
    torch.save({"w": torch.zeros(2, 2)}, "weights.pt")
    code, _, err = run("inspect", "weights.pt", "--layers")
    assert code == 2 and "weights.pt: --layers needs the architecture too: --model file.py:FACTORY" in err


# -------------------------------------------------------------------------- the speed


def long(repeats: int) -> Graph:
    """Three operators a repeat, over a dynamic batch and a dynamic sequence that are one axis."""
    specs = [Input(name, torch.float32, ("batch", "sequence", 4)) for name in "xyz"]
    model = Calling(lambda x, y, z, w: (x + y + z).flatten(0, 1) @ w, torch.randn(4, 4))
    graph = capture(model, inputs=specs)
    weight = next(n for n in graph.nodes if is_constant(n))
    last = value = graph.results[0]
    aten = torch.ops.aten
    for _ in range(repeats):
        read = value
        for target, others in (
            (aten.matmul.default, (weight,)),
            (aten.relu.default, ()),
            (aten.add.Tensor, (read,)),
        ):
            with graph.graph.inserting_before(graph.output):
                value = graph.graph.call_function(target, (value, *others))
            value.meta["val"] = last.meta["val"]
    graph.set_args(graph.output, ((value,),))
    return graph


def test_three_thousand_operators_take_less_than_a_second() -> None:
    """The best of several runs: other work on the machine is not what is measured."""
    graph = long(1000)

    def taken() -> float:
        start = time.perf_counter()
        assert len(layers(graph)) > 3000
        return time.perf_counter() - start

    assert min(taken() for _ in range(3)) < 1
