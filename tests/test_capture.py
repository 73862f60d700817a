"""nn.Module -> Graph: names, dynamic axes, in-place operators, tied tensors, and models that do not export."""

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from compressor.capture import capture
from compressor.errors import UnsupportedError, UsageError
from compressor.export import reexport
from compressor.inplace import rename_in_place
from compressor.ir import Input
from compressor.ops import KINDS, arguments, kind, macs

pytree = torch.utils._pytree


def module(function):
    class Model(nn.Module):
        def forward(self, x):
            return function(x)

    return Model()


def same(model, graph, *x):
    with torch.no_grad():
        expected = pytree.tree_leaves(model.eval()(*[t.clone() for t in x]))
    for a, b in zip(expected, graph.run(*x), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)


def test_batch_is_dynamic_even_when_the_example_holds_one():
    model = nn.Linear(4, 3)
    graph = capture(model, (torch.randn(1, 4),))
    assert graph.inputs == (Input("input", torch.float32, ("batch", 4)),)
    same(model, graph, torch.randn(7, 4))


def test_an_axis_that_cannot_be_dynamic_falls_back_with_a_notice():
    graph = capture(module(lambda x: x.view(2, -1)), (torch.randn(2, 4),))
    assert graph.inputs[0].shape == (2, 4)
    assert "batch axis is fixed to 2" in graph.notices[0]


def test_the_batch_stays_dynamic_where_another_axis_cannot():
    specs = [Input("x", torch.float32, ("batch", "sequence", 4))]
    graph = capture(module(lambda x: x.view(-1, 64)), inputs=specs)
    assert graph.inputs[0].shape == ("batch", 16, 4)
    assert any("the sequence axis is fixed to 16" in n for n in graph.notices)
    assert graph.run(torch.randn(5, 16, 4))[0].shape == (5, 64)


def test_described_axes_override_the_example():
    graph = capture(module(lambda x: x * 2), inputs=[Input("x", torch.float32, ("batch", 3, "width"))])
    assert graph.inputs[0].shape == ("batch", 3, "width")
    assert graph.run(torch.randn(5, 3, 9))[0].shape == (5, 3, 9)
    with pytest.raises(UsageError, match="no example input"):
        capture(nn.Linear(2, 2))


def test_in_place_on_a_whole_value_is_renamed():
    def f(x):
        h = x * 2
        h.add_(1)
        return h * x

    model = module(f)
    graph = capture(model, (torch.randn(2, 4),))
    assert "add_.Tensor" not in graph.text() and "aten.add.Tensor" in graph.text()
    same(model, graph, torch.randn(3, 4))


def test_in_place_on_a_view_is_functionalised_not_renamed():
    def f(x):
        h = x * 2
        h[:, :2].relu_()
        return h + 1

    model = module(f)
    graph = capture(model, (torch.randn(2, 4),))
    x = torch.randn(3, 4)
    same(model, graph, x)
    renamed = x * 2 + 1  # what a plain renaming of relu_ would compute
    assert float((graph.run(x)[0] - renamed).abs().max()) > 0.1


def test_functionalised_batch_norm_keeps_its_name():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x):
            h = self.bn(x)
            h[:, :2].relu_()
            return h

    model = Model()
    graph = capture(model, (torch.randn(2, 4, 3, 3),))
    assert [kind(n) for n in graph.nodes].count("batch_norm") == 1
    same(model, graph, torch.randn(3, 4, 3, 3))


def test_the_input_is_not_written_into():
    graph = capture(module(lambda x: x.add_(1)), (torch.zeros(2, 4),))
    x = torch.zeros(3, 4)
    graph.run(x)
    assert float(x.abs().max()) == 0


def test_state_that_the_model_writes_is_refused():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            self.count.add_(1)
            return x * self.count

    with pytest.raises(UnsupportedError, match="own state"):
        capture(Counter(), (torch.randn(2, 4),))


def test_control_flow_on_values_names_the_line():
    def f(x):
        return x if x.sum() > 0 else -x

    with pytest.raises(UnsupportedError, match=r"does not export \(test_capture.py:\d+ in f\)"):
        capture(module(f), (torch.randn(2, 4),))


def test_torchscript_has_its_own_message():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(UnsupportedError, match="TorchScript"):
        capture(scripted, (torch.randn(2, 2),))


def test_tied_tensors_become_one():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.head = nn.Linear(8, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    graph = capture(Tied(), inputs=[Input("ids", torch.int64, ("batch", "sequence"))])
    assert len(graph.tensors) == 1


@dataclasses.dataclass
class Detection:
    boxes: torch.Tensor
    scores: torch.Tensor


def test_names_of_inputs_and_outputs_are_paths():
    class Model(nn.Module):
        def forward(self, batch, mask=None):
            return {"logits": batch["ids"] * 2.0, "pair": (mask, batch["ids"])}

    graph = capture(Model(), ({"ids": torch.randn(2, 4)},), {"mask": torch.ones(2, dtype=torch.bool)})
    assert [i.name for i in graph.inputs] == ["batch.ids", "mask"]
    assert graph.outputs == ("logits", "pair.0", "pair.1")
    assert graph.inputs[1].dtype == torch.bool


def test_a_dataclass_output_is_named_by_its_fields():
    torch.export.register_dataclass(Detection)
    graph = capture(module(lambda x: Detection(x, x.sum(1))), (torch.randn(2, 4),))
    assert graph.outputs == ("boxes", "scores")


@dataclass
class Inner:
    value: torch.Tensor


@dataclass
class Outer:
    inner: Inner
    classes: torch.Tensor | None = None


def test_a_dataclass_need_not_be_registered():
    graph = capture(module(lambda x: Outer(Inner(x.value * 2), x.value.sum(1))), (Inner(torch.randn(2, 4)),))
    assert len(graph.outputs) == 2 and "classes" in graph.outputs
    assert [i.name for i in graph.inputs] == ["x.value"]


def test_what_no_runtime_could_run_is_no_broken_contract():
    linear = nn.Linear(4, 4)
    with pytest.raises(UnsupportedError, match="operators that do not run.*vmap"):
        capture(module(lambda x: torch.vmap(lambda row: linear(row))(x)), (torch.randn(2, 4),))
    with pytest.raises(UnsupportedError, match="only state that it writes into"):
        capture(Counting(), (torch.randn(2, 4),))


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(2, 4))

    def forward(self, x):
        self.seen = self.seen * 0.9 + x
        return self.seen


def test_a_hugging_face_output_is_named_by_its_fields():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50
    )
    ids = torch.randint(0, 50, (1, 6))
    graph = capture(
        transformers.BertModel(config), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    )
    assert graph.outputs == ("last_hidden_state", "pooler_output")
    assert [i.name for i in graph.inputs] == ["input_ids", "attention_mask"]


def test_an_unknown_operator_is_left_as_it_is():
    graph = capture(
        module(lambda x: torch.special.i0(x) + torch.linalg.det(x)[:, None, None]), (torch.randn(2, 3, 3),)
    )
    assert any(kind(n) == "opaque" for n in graph.nodes)
    assert any("no pass knows" in n for n in graph.notices)


def test_reexport_keeps_numbers_axes_and_module_paths():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    program = reexport(capture(model, (torch.randn(2, 4),)))
    again = capture(program)
    assert again.inputs[0].shape[0] == "batch"
    assert "# 0" in again.text(provenance=True)
    same(model, again, torch.randn(5, 4))


def test_data_of_a_parameter_is_traced():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return nn.functional.linear(x, self.weight.data * 2)

    model = Layer()
    same(model, capture(model, (torch.randn(2, 4),)), torch.randn(3, 4))


def test_every_row_of_the_operator_table_exists():
    for name in KINDS:
        if name.startswith("aten."):
            _, packet, overload = name.split(".")
            assert hasattr(getattr(torch.ops.aten, packet), overload), name


def test_arguments_and_macs():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, groups=1, bias=False), nn.Flatten(), nn.Linear(72, 5))
    graph = capture(model, (torch.randn(4, 3, 7, 7),))
    conv = next(n for n in graph.nodes if kind(n) == "conv")
    assert arguments(conv)["stride"] == [2, 2] and arguments(conv)["groups"] == 1
    assert macs(graph) == 8 * 9 * 27 + 72 * 5


class Projecting(nn.Module):
    """Writes its weight back into bounds at every forward; `drift` moves it further each time."""

    def __init__(self, drift: float = 0.0) -> None:
        super().__init__()
        self.weight, self.drift = nn.Parameter(torch.linspace(-2, 2, 12).view(3, 4)), drift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.weight.copy_(self.weight.clamp(-1, 1) + self.drift)
        return x @ self.weight.T


def test_a_projection_that_every_forward_repeats_is_no_state() -> None:
    x, model = torch.randn(2, 4), Projecting()
    graph = capture(model, (x,))
    expected = x @ torch.linspace(-2, 2, 12).view(3, 4).clamp(-1, 1).T
    assert torch.allclose(graph.run(x)[0], expected)
    assert not torch.allclose(graph.run(x)[0], x @ torch.linspace(-2, 2, 12).view(3, 4).T)
    with pytest.raises(UnsupportedError, match="writes into the model's own state"):
        capture(Projecting(drift=0.1), (x,))


def _written_view(x: torch.Tensor) -> torch.Tensor:
    y = torch.tanh(x).view(-1, 4)
    y += 1
    return y.view(x.shape) * 2


def _written_twice(x: torch.Tensor) -> torch.Tensor:
    y = torch.tanh(x)
    z = y.add_(1)
    z.mul_(3)
    return y + z


def _base_read_later(x: torch.Tensor) -> torch.Tensor:
    y = torch.tanh(x)
    y.view(-1, 4).mul_(3)
    return y


def _view_read_later(x: torch.Tensor) -> torch.Tensor:
    y = torch.tanh(x)
    seen = y.view(-1, 4)
    y += 1
    return seen.view(x.shape) * 2


def _view_read_before(x: torch.Tensor) -> torch.Tensor:
    y = torch.tanh(x)
    seen = y.view(-1, 4) * 5
    y += 1
    return y + seen.view(x.shape)


@pytest.mark.parametrize(
    "body, renamed",
    [(_written_view, True), (_written_twice, True), (_view_read_before, True), (_base_read_later, False),
     (_view_read_later, False)],
)  # fmt: skip
def test_writing_into_views(body: Callable[[torch.Tensor], torch.Tensor], renamed: bool) -> None:
    """Renamed where nothing reads the memory under another name later; the exporter's replay of views elsewhere."""

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return body(x)

    x = torch.randn(3, 2, 4)
    graph = capture(Model(), (x,))
    assert not any("_." in str(n.target) for n in graph.nodes if n.op == "call_function")
    assert torch.equal(graph.run(x)[0], body(x))
    program = torch.export.export(Model(), (x,), strict=False)
    assert rename_in_place(program.module().graph) == renamed


def test_a_norm_over_its_own_batch_writes_no_statistics():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return nn.functional.batch_norm(x, self.norm.running_mean, self.norm.running_var, training=True)

    model, x = Norm().eval(), torch.randn(8, 4)
    graph = capture(model, (x,))
    before, mine = graph.fingerprint(), model.norm.running_mean.clone()
    assert not mine.equal(torch.zeros(4))  # the model itself writes them, in each call
    torch.testing.assert_close(graph.run(x)[0], model.norm.train()(x))
    assert graph.fingerprint() == before and not graph.tensors


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        with torch.autocast("cuda", enabled=False):
            y = self.a(x).float()
            with torch.autocast("cpu", enabled=False):
                y = y * torch.tensor([1.0, 2.0, 3.0, 4.0])
        with torch.enable_grad():
            y, z = self.b(y).relu(), y.sum(-1)
        return y, z


def test_blocks_that_change_nothing_are_what_is_in_them():
    model, x = Blocks().eval(), torch.randn(3, 4)
    graph = capture(model, (x,))
    assert {n.target for n in graph.nodes if n.op == "get_attr"} >= {
        "a.weight",
        "a.bias",
        "b.weight",
        "b.bias",
    }
    assert all(n.op != "get_attr" or isinstance(graph.tensor(n), torch.Tensor) for n in graph.nodes)
    for seen, expected in zip(graph.run(x), model(x), strict=True):
        torch.testing.assert_close(seen, expected)


def test_autocast_that_is_on_is_refused():
    class Casts(Blocks):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.b(self.a(x))

    with pytest.raises(UnsupportedError, match="control flow"):
        capture(Casts().eval(), (torch.randn(3, 4),))
