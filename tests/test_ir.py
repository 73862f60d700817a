"""The graph's verbs, invariants and views."""

import pytest
import torch
from torch import nn

from compressor.capture import capture
from compressor.errors import ContractError
from compressor.ir import Input
from compressor.names import site, source_line
from compressor.verify import compare_values

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.block(x).mean((2, 3)))


@pytest.fixture
def graph():
    torch.manual_seed(0)
    return capture(Net(), (torch.randn(2, 3, 8, 8),))


def find(graph, target):
    return next(n for n in graph.nodes if n.target is target)


def test_text_names_values_shapes_operators(graph):
    assert graph.text().splitlines()[-6:] == [
        "%x: f32[batch, 3, 8, 8] = input",
        "%conv2d: f32[batch, 4, 8, 8] = aten.conv2d.default("
        "%x, %block_0_weight, %block_0_bias, [1, 1], [1, 1])",
        "%relu: f32[batch, 4, 8, 8] = aten.relu.default(%conv2d)",
        "%mean: f32[batch, 4] = aten.mean.dim(%relu, [2, 3])",
        "%linear: f32[batch, 5] = aten.linear.default(%mean, %head_weight, %head_bias)",
        "return %linear",
    ]


def test_provenance_speaks_of_modules_and_lines(graph):
    conv = find(graph, aten.conv2d.default)
    assert site(conv) == "block.0"
    assert source_line(conv).startswith("test_ir.py:")


def test_run_equals_the_model_and_values_stream():
    torch.manual_seed(0)
    model = Net().eval()
    graph = capture(model, (torch.randn(2, 3, 8, 8),))
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(graph.run(x)[0], model(x))
    names = [node.name for node, _ in graph.values(x)]
    assert names == [n.name for n in graph.nodes]


def test_values_are_freed_after_their_last_reader(graph):
    import gc
    import weakref

    alive = {}
    for node, value in graph.values(torch.randn(2, 3, 8, 8)):
        if node.name == "conv2d":
            alive["conv2d"] = weakref.ref(value)
        del value
        if node.name == "mean":
            gc.collect()
            assert alive["conv2d"]() is None


def test_tensors_of_the_user_are_never_written():
    model = Net().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    graph = capture(model, (torch.randn(2, 3, 8, 8),))
    weight = next(n for n in graph.nodes if n.target == "head.weight")
    graph.set_tensor(weight, torch.zeros(5, 4))
    assert float(graph.run(torch.randn(2, 3, 8, 8))[0].std(0).max()) == 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_copy_shares_tensors_and_keeps_names(graph):
    twin = graph.copy()
    assert twin.text() == graph.text()
    assert all(twin.tensors[k] is graph.tensors[k] for k in graph.tensors)
    twin.erase_me = True
    relu = find(twin, aten.relu.default)
    new = twin.insert(aten.tanh.default, (relu.args[0],), before=relu)
    twin.replace_uses(relu, new)
    twin.clean()
    assert "tanh" in twin.text() and "tanh" not in graph.text()


def test_insert_infers_shape_and_inherits_provenance(graph):
    relu = find(graph, aten.relu.default)
    new = graph.insert(aten.flatten.using_ints, (relu.args[0], 1), before=relu)
    assert tuple(new.meta["val"].shape)[1:] == (256,)
    assert site(new) == site(relu)


def test_fingerprint_sees_text_and_bytes(graph):
    first = graph.fingerprint()
    assert graph.copy().fingerprint() == first
    weight = next(n for n in graph.nodes if n.target == "head.weight")
    changed = graph.tensor(weight).clone()
    changed[0, 0] += 1
    graph.set_tensor(weight, changed)
    assert graph.fingerprint() != first


def test_reinfer_follows_new_tensors_and_keeps_the_batch_symbolic(graph):
    weight = next(n for n in graph.nodes if n.target == "head.weight")
    bias = next(n for n in graph.nodes if n.target == "head.bias")
    graph.set_tensor(weight, torch.zeros(7, 4))
    graph.set_tensor(bias, torch.zeros(7))
    graph.reinfer()
    batch, width = graph.results[0].meta["val"].shape
    assert width == 7 and not isinstance(batch, int)


def test_journal_pairs_values_and_a_wrong_one_shows(graph):
    before = graph.copy()
    relu = find(graph, aten.relu.default)
    same = graph.insert(aten.clamp_min.default, (relu.args[0], 0), before=relu)
    graph.replace_uses(relu, same)
    graph.clean()
    x = torch.randn(2, 3, 8, 8)
    checks = {c.node: c.error for c in compare_values(before, graph, (x,))}
    assert checks[same.name] == 0
    wrong = graph.insert(aten.clamp_min.default, (same.args[0], 0.5), before=same.next)
    graph.replace_uses(same, wrong)
    graph.clean()
    checks = {c.node: c.error for c in compare_values(before, graph, (x,))}
    assert checks[wrong.name] > 1e-2


def test_clean_drops_dead_nodes_and_their_tensors(graph):
    conv = find(graph, aten.conv2d.default)
    weight = graph.add_tensor("extra", torch.randn(4, 3, 3, 3))
    graph.insert(aten.conv2d.default, (conv.args[0], weight), before=conv)
    assert "extra" in graph.tensors
    assert graph.clean() == 2
    assert "extra" not in graph.tensors


@pytest.mark.parametrize("damage", ["tensor", "shape", "in-place", "output"])
def test_check_finds_damage(graph, damage):
    graph.check()
    if damage == "tensor":
        del graph.tensors["head.weight"]
    elif damage == "shape":
        graph.tensors["head.weight"] = torch.zeros(9, 9)
    elif damage == "in-place":
        find(graph, aten.relu.default).target = aten.relu_.default
    else:
        graph.outputs = ("a", "b")
    with pytest.raises(ContractError):
        graph.check()


def test_dataflow_is_a_networkx_view(graph):
    view = graph.dataflow()
    assert view.has_edge("conv2d", "relu")
    assert view.nodes["conv2d"]["site"] == "block.0"


def test_input_prints_as_the_command_line_writes_it():
    assert str(Input("x", torch.float32, ("batch", 3, 8))) == "x:f32[batch,3,8]"


def test_a_new_page_of_the_journal_keeps_what_is_left_of_the_captured_values(graph):
    graph.journal.kept = {"relu": {1: torch.tensor([0, 2, 3])}}
    graph.journal.changed.add("relu")
    graph.turn_page()
    assert not graph.journal.kept and not graph.journal.changed
    twin = graph.copy()
    graph.journal.kept = {"relu": {1: torch.tensor([1, 2]), 2: torch.tensor([0])}}
    graph.turn_page()
    assert {a: t.tolist() for a, t in graph.lineage["relu"].items()} == {1: [2, 3], 2: [0]}
    assert twin.lineage["relu"][1].tolist() == [0, 2, 3]


def test_what_values_stand_for_outlives_the_journal(graph):
    relu = find(graph, aten.relu.default)
    reader = next(iter(relu.users))
    twice = graph.insert(aten.mul.Tensor, (relu, 2.0), before=reader)
    graph.replace_uses(relu, twice)
    graph.turn_page()
    assert graph.ancestors[twice.name].name == relu.name and relu.name not in graph.ancestors
    factor = torch.full((1, 4, 1, 1), 3.0)
    for _ in range(2):
        graph.disclaim(twice, factor)
        graph.turn_page()
    assert torch.equal(graph.ancestors[twice.name].scale, 9 * torch.ones(1, 4, 1, 1))
    graph.journal.kept = {twice.name: {1: torch.tensor([0, 2])}}
    graph.turn_page()
    again = graph.insert(aten.relu.default, (twice,), before=reader)
    graph.replace_uses(twice, again)
    copy = graph.copy()
    graph.turn_page()
    assert graph.ancestors[again.name] == graph.ancestors[twice.name] and again.name not in copy.ancestors
    assert graph.lineage[again.name][1].tolist() == [0, 2]
    graph.disclaim(again)
    graph.turn_page()
    assert graph.ancestors[again.name] is None
