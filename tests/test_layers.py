"""What a report says of each layer: cost, precision, width, and how far its output is from the original's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from nets import Net, conv
from torch import Tensor, nn

from compressor.capture import capture
from compressor.data import Data, open_data
from compressor.ir import Ancestor, Graph
from compressor.layers import layers
from compressor.ops import macs
from compressor.pipeline import Context, Pipeline, Row, parse
from compressor.registry import passes, target


def net() -> nn.Module:
    """Convolutions with batch norms that a residual sum joins, and a linear: what every pass has work in."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.relu(m.bn1(m.conv1(x)))
        x = torch.relu(m.bn3(m.conv3(torch.relu(m.bn2(m.conv2(x))))) + x)
        return m.head(x.mean((2, 3)))

    norms = {f"bn{i}": nn.BatchNorm2d(width) for i, width in ((1, 16), (2, 32), (3, 16))}
    made = Net(
        forward, conv1=conv(3, 16), conv2=conv(16, 32), conv3=conv(32, 16), head=nn.Linear(16, 10), **norms
    )
    made.train()(torch.randn(64, 3, 8, 8))
    return made.eval()


def stream(graph: Graph, inputs: Tensor) -> Data:
    return open_data([(inputs,)], graph.inputs)


def compiled(
    spec: str, model: nn.Module | None = None, inputs: Tensor | None = None
) -> tuple[Graph, Graph, Any]:
    """Original, graph, and what is said of its layers."""
    inputs = torch.randn(256, 3, 8, 8) if inputs is None else inputs
    graph = capture(model or net(), (inputs[:2],))
    original = graph.copy()
    cpu = target("cpu")
    ctx = Context(cpu, stream(graph, inputs[:32]), stream(graph, inputs))
    rows = Pipeline(parse(spec, passes()), passes()).run(graph, ctx)
    return original, graph, layers(graph, original, rows, stream(graph, inputs[:8]))


def by_site(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["site"]: row for row in rows if row["operator"] in ("conv2d", "linear")}


def test_what_exact_passes_leave_is_what_it_was() -> None:
    _, graph, rows = compiled("merge,fold")
    assert [row["site"] for row in rows] == ["conv1", "conv2", "conv3", "head"], "in the order of the network"
    assert all(row["sqnr_db"] > 100 for row in rows), rows
    assert sum(row["macs"] for row in rows) == macs(graph)
    assert rows[3] == {
        "site": "head", "operator": "linear", "macs": 160, "params": 170, "bytes": 680, "precision": "f32",
        "width": [10, 10], "rank": None, "sqnr_db": rows[3]["sqnr_db"],
    }  # fmt: skip
    assert rows[0]["params"] == 16 * 3 * 9 + 16, "with the bias that the batch norm left"


def test_pruned_layers_say_their_width_and_are_compared_on_what_is_left() -> None:
    original, _, rows = compiled("prune(macs=0.6,align=1,repair=false),fold")
    found = by_site(rows)
    assert found["conv2"]["width"][0] == 32 > found["conv2"]["width"][1]
    assert found["head"]["width"] == [10, 10]
    assert sum(row["macs"] for row in rows) < macs(original)
    # conv2 reads what nobody pruned, or what was: without its neighbour's channels it is another sum, and finite
    assert all(math.isfinite(row["sqnr_db"]) for row in rows)
    narrow = by_site(compiled("prune(macs=0.6,align=1,repair=false,ignore=conv1+conv3)")[2])
    assert narrow["conv2"]["width"][1] < 32 and narrow["conv2"]["sqnr_db"] > 100, (
        "what is left is what it was"
    )
    assert narrow["conv3"]["sqnr_db"] < 40, "and what reads it is not"


def test_integers_say_so_and_what_they_lose() -> None:
    _, graph, rows = compiled("fold,int8(measure=false)")
    found = by_site(rows)
    assert {row["precision"] for row in found.values()} == {"u8 x i8"}
    assert found["conv2"]["bytes"] < 2 * found["conv2"]["params"], "bytes, and scales beside them"
    assert all(20 < row["sqnr_db"] < 70 for row in found.values())
    scaled = [known for known in graph.ancestors.values() if known is not None and known.scale is not None]
    assert scaled, "channels were scaled for rounding, and outputs are compared all the same"


def test_a_scale_that_is_forgotten_would_show() -> None:
    original, graph, rows = compiled("fold,int8(measure=false)")
    scaled = {n: a for n, a in graph.ancestors.items() if a is not None and a.scale is not None}
    graph.ancestors |= {name: Ancestor(known.name) for name, known in scaled.items()}
    inputs = torch.randn(8, 3, 8, 8)
    wrong = by_site(layers(graph, original, [], stream(graph, inputs)))
    assert any(wrong[site]["sqnr_db"] < row["sqnr_db"] - 10 for site, row in by_site(rows).items())


def test_a_value_that_nothing_stands_for_is_not_compared() -> None:
    original, graph, _ = compiled("fold")
    name = next(node.name for node in graph.nodes if "conv2d" in node.name)
    graph.ancestors[name] = None
    rows = layers(graph, original, [], stream(graph, torch.randn(8, 3, 8, 8)))
    assert rows[0]["sqnr_db"] is None and rows[0]["width"] == [None, 16]
    assert rows[1]["sqnr_db"] > 100
    assert all(row["sqnr_db"] is None for row in layers(graph, original, []))


def test_split_layers_say_their_rank() -> None:
    _, _, rows = compiled("squeeze(macs=0.6,align=1,measure=false)")
    split = [row for row in rows if row["rank"] is not None]
    assert split and all(row["operator"] == "conv2d" for row in split)
    parts = [row for row in split if row["site"] == split[0]["site"]]
    assert len(parts) > 1 and parts[0]["sqnr_db"] is None, "the first part makes what the original never had"
    assert parts[-1]["sqnr_db"] is not None and parts[-1]["width"][0] == parts[-1]["width"][1]


def test_weights_of_few_bits_and_tables() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(m.norm(m.table(x)).mean(1))

    model = Net(forward, table=nn.Embedding(50, 256), norm=nn.LayerNorm(256), out=nn.Linear(256, 32)).eval()
    words = torch.randint(0, 50, (16, 7))
    _, _, rows = compiled("int4", model, words)
    assert [(row["operator"], row["precision"]) for row in rows] == [
        ("embedding", "f32"), ("layer_norm", "f32"), ("matmul_blocks", "f32 x i4")
    ]  # fmt: skip
    assert rows[0]["sqnr_db"] == math.inf and rows[2]["width"] == [32, 32] and 5 < rows[2]["sqnr_db"] < 40
    assert rows[2]["bytes"] < 256 * 32
    half = compiled("fp16", model, words)[2]
    assert {row["precision"] for row in half} >= {"f16"}


@pytest.mark.parametrize("said", [3, [3], [{"site": "head"}], [{"site": "elsewhere", "rank": 4}]])
def test_facts_of_other_passes_are_no_ranks(said: Any) -> None:
    original, graph, _ = compiled("fold")

    row = Row("other", "other", "exact", "proved", 0, 0, 0, facts={"layers": said})
    assert {one["rank"] for one in layers(graph, original, [row])} == {None}
