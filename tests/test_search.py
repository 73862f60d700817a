"""The parts of a search: the space, constraints, and graphs that are frozen, kept and recalled."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from nets import Net
from torch import nn
from zoo import with_power

from compressor import registry
from compressor.capture import capture
from compressor.data import open_data
from compressor.errors import UsageError
from compressor.ir import Graph
from compressor.pipeline import Context, Memory, Pipeline, Row, parse
from compressor.search.frozen import NotFrozen, freeze, thaw
from compressor.search.objectives import constraint, distance, hopeless, objective
from compressor.search.space import Space
from compressor.search.store import Store
from targets.cpu import CPU

# -------------------------------------------------------------------- space


def space(text: str) -> Space:
    return Space(text, registry.passes())


def test_a_plain_spec_is_a_space_of_one():
    one = space("merge,prune(macs=0.5),int8")
    assert one.first() == "merge,prune(macs=0.5),int8" and one.product() == [
        "merge,prune(macs=0.5),fold,int8"
    ]


def test_every_way_to_write_several():
    several = space(
        "merge,prune?(macs=0.4..0.8/0.2,criterion={l1,l2}),fold,{int8(calibration={auto,mse}),fp16,none}"
    )
    assert several.first() == "merge,fold,int8(calibration=auto)"
    assert several.decisions() == {
        "prune": ("without", "with"),
        "prune.macs": ("0.4", "0.6", "0.8"),
        "prune.criterion": ("l1", "l2"),
        "int8|fp16|none": ("int8", "fp16", "none"),
        "int8.calibration": ("auto", "mse"),
    }
    specs = several.product()
    assert len(specs) == len(set(specs)) == (1 + 3 * 2) * (2 + 1 + 1)
    assert "merge,prune(macs=0.6,criterion=l2),fold" in specs and "merge,fold,fp16" in specs
    assert "merge,fold,int8" in specs and several.canonical("int8(calibration=auto)") == "fold,int8"
    assert several.given({"prune": "with", "prune.macs": "0.8"}) == (
        "merge,prune(macs=0.8,criterion=l1),fold,int8(calibration=auto)"
    )
    asked: list[str] = []
    several.spec(lambda name, words: asked.append(name) or words[-1])
    assert asked == ["prune", "prune.macs", "prune.criterion", "int8|fp16|none"]


def test_a_space_is_walked_whole_or_not_at_all():
    passes = "prune(macs=0.1..0.9/0.002),{squeeze(macs=0.1..0.9/0.1),none},{int8,fp16,none}"
    with pytest.raises(UsageError, match="more than 10,000"):
        space(passes).product()
    # choices that do not matter are no specs of their own, however many there are
    few = "fold,{int8(percentile={99,99.9,99.99,99.999},sqnr={10,20,30},rounding={nearest,adaptive}),none}"
    assert len(space(few).product()) == 4 * 3 * 2 + 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prune(macs={0.5,0.5})", "once"),
        ("prune(macs={0.5)", "brace"),
        ("prune(macs=0.9..0.5)", "LOW..HIGH"),
        ("prune(macs=a..b)", "LOW..HIGH"),
        ("prune(macs={0.5,2})", "at most 1"),
        ("prune(mac={0.5,0.6})", "did you mean 'macs'"),
        ("{int8,int9}", "did you mean 'int8'"),
        ("{int8,int8}", "once"),
        ("fold,{int8(calibration={auto,mes}),none}", "calibration=mes"),
        ("fold,prune?(criterion={l1,l3})", "criterion=l3"),
        ("int8,prune?", "must come after"),
        ("prune?(macs=0.5", "parenthesis"),
    ],
)
def test_what_no_pass_takes_is_refused_before_the_search(text, words):
    with pytest.raises(UsageError, match=words):
        space(text)


# -------------------------------------------------------------------- constraints


def test_constraints_say_by_how_much_they_are_missed():
    drop, size = constraint("drop<=1.0"), constraint(" size_mb <= 4 ")
    assert str(drop) == "drop<=1" and (drop.missed({"drop": 0.5}), drop.missed({"drop": 3.0})) == (0.0, 2.0)
    assert constraint("sqnr>=20").missed({"sqnr": 15.0}) == 0.25
    assert 100 * (0.93 - 0.92) > 1 and drop.missed({"drop": 100 * (0.93 - 0.92)}) == 0.0
    assert distance([drop, size], {"drop": 2.0, "size_mb": 5.0}) == 1.25
    assert distance([drop], {}) == distance([drop], {"drop": math.nan}) == math.inf


@pytest.mark.parametrize(
    ("text", "words"),
    [("drop", "NAME<=NUMBER"), ("drop<=x", "NAME<=NUMBER"), ("dorp<=1", "did you mean 'drop'"),
     ("drop>=1", "drop<=1"), ("sqnr<=20", "sqnr>=20"), ("speed<=nan", "NAME<=NUMBER")],
)  # fmt: skip
def test_constraints_that_mean_nothing(text, words):
    with pytest.raises(UsageError, match=words):
        constraint(text)


def test_objectives_by_name():
    assert [objective(name) for name in ("latency", "size", "macs")] == ["latency_ms", "size_mb", "macs"]
    with pytest.raises(UsageError, match="did you mean 'latency'"):
        objective("latencies")


def test_passes_that_do_not_go_together_are_left_out():
    assert space("merge,{none,fold},{none,prune(macs=0.8)}").product() == [
        "merge", "merge,prune(macs=0.8)", "merge,fold",
    ]  # fmt: skip
    assert space("{int8,none}").product() == ["fold,int8"]  # no pass is no model
    with pytest.raises(UsageError, match="names no pass"):
        space("{none}")


def test_a_pass_may_stand_twice():
    twice = space("prune(macs={0.8,0.9}),prune(macs={0.6,0.7}),fold")
    assert twice.decisions() == {"prune.macs": ("0.8", "0.9"), "prune#2.macs": ("0.6", "0.7")}
    assert len(twice.product()) == 4
    with pytest.raises(UsageError, match="says macs twice"):
        space("prune(macs=0.5,macs=0.6)")


def test_hopeless_is_what_later_passes_do_not_mend():
    limits = [constraint("drop<=1.0"), constraint("sqnr>=30")]
    assert not hopeless(limits, {"drop": 2.9, "sqnr": 12.0})
    assert "drop is 3.1" in hopeless(limits, {"drop": 3.1, "sqnr": 40.0})
    assert "sqnr is 9" in hopeless(limits, {"drop": 0.0, "sqnr": 9.0})
    assert not hopeless([constraint("sqnr>=-3")], {"sqnr": -2.0})  # it holds


# -------------------------------------------------------------------- frozen graphs


def network() -> tuple[Graph, torch.Tensor]:
    torch.manual_seed(0)
    model = Net(
        lambda net, x: net.head(
            net.pool(net.norm(net.b(net.a(x).relu())).chunk(2, 1)[1]).flatten(1).unsqueeze(-1)[..., 0]
        ),
        a=nn.Conv2d(3, 8, 3, padding=1),
        b=nn.Conv2d(8, 16, 3, padding=1, bias=False),
        norm=nn.BatchNorm2d(16),
        pool=nn.AdaptiveAvgPool2d(1),
        head=nn.Linear(8, 4),
    )
    x = torch.randn(8, 3, 8, 8)
    with_power(model, x)
    return capture(model.eval(), x), x


def context(graph: Graph) -> Context:
    samples = open_data([(torch.randn(32, 3, 8, 8),)], graph.inputs)
    return Context(CPU, samples.limited(8), samples)


SPEC = "prune(macs=0.8),squeeze(macs=0.9,measure=false,reach=best),fold,int8(measure=false)"


def test_what_is_frozen_thaws_to_the_same(tmp_path):
    graph, x = network()
    base, ctx, seen = graph.copy(), context(graph), []

    def after(row: Row, now: Graph) -> None:
        freeze(now, base, tmp_path / "graph", {"row": row.to_dict()})
        again, facts = thaw(tmp_path / "graph", base)
        assert again.text(provenance=True) == now.text(provenance=True)
        assert again.fingerprint() == now.fingerprint() and torch.equal(again.run(x)[0], now.run(x)[0])
        assert str(Row.of(facts["row"]).to_dict()) == str(row.to_dict())
        assert {n: {a: k.tolist() for a, k in axes.items()} for n, axes in again.lineage.items()} == {
            n: {a: k.tolist() for a, k in axes.items()} for n, axes in now.lineage.items()
        }
        assert again.ancestors.keys() == now.ancestors.keys() and str(again.ancestors) == str(now.ancestors)
        seen.append(row.name)

    Pipeline(parse(SPEC, registry.passes()), registry.passes(), after=after).run(graph, ctx)
    assert seen == ["input", "prune", "squeeze", "fold", "int8"]


def test_memory_that_is_shared_stays_shared(tmp_path):
    graph, _ = network()
    base = graph.copy()
    one = torch.randn(4, 4)
    for name, tensor in (
        ("one", one),
        ("turned", one.t()),
        ("row", one[1]),
        ("head", base.tensors["head.weight"].t()),
    ):
        graph.tensors[name] = tensor
    freeze(graph, base, tmp_path / "graph")
    tensors = thaw(tmp_path / "graph", base)[0].tensors
    assert all(torch.equal(tensors[name], tensor) for name, tensor in graph.tensors.items())
    assert tensors["turned"].stride() == (1, 4) and tensors["row"].storage_offset() == 4
    where = {name: tensors[name].untyped_storage().data_ptr() for name in ("one", "turned", "row", "head")}
    assert len({where["one"], where["turned"], where["row"]}) == 1
    assert where["head"] == base.tensors["head.weight"].untyped_storage().data_ptr()
    assert (tmp_path / "graph").stat().st_size < 40_000  # the weights of the model are not in it


@pytest.mark.parametrize("harm", ["cut", "flip", "other model", "a function"])
def test_a_damaged_entry_is_no_entry(tmp_path, harm):
    graph, _ = network()
    base, store = graph.copy(), Store(tmp_path)
    graph.tensors["head.weight"] = torch.randn(4, 8)  # a weight that only the entry has
    graph.tensors["head.weight"] = torch.randn(4, 8)  # a weight that only the entry has
    assert store.keep("key", graph, base, None) and store.recall(["key"], base) is not None
    path = tmp_path / "key.safetensors"
    data = path.read_bytes()
    if harm == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif harm == "flip":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif harm == "a function":
        path.write_bytes(data.replace(b"aten.relu.default", b"os:system        "))
    else:
        base = capture(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 8, 8))
    assert store.recall(["missing", "key"], base) is None and not path.exists()


def test_other_inputs_are_not_frozen(tmp_path):
    graph, _ = network()
    other = graph.copy()
    other.outputs = ("another",)
    with pytest.raises(NotFrozen):
        freeze(other, graph, tmp_path / "graph")
    assert not Store(tmp_path).keep("key", other, graph, None) and not list(tmp_path.iterdir())


def test_a_store_is_bounded_and_forgets_the_oldest(tmp_path):
    graph, _ = network()
    base = graph.copy()
    size = 0
    for number in range(5):
        graph.tensors["more"] = torch.randn(1000)
        store = Store(tmp_path, most=3 * size if size else 1 << 30)
        assert store.keep(f"{number}", graph, base, None)
        entry = tmp_path / f"{number}.safetensors"
        size = size or entry.stat().st_size
        os.utime(entry, (number, number))
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["2", "3", "4"]


def test_a_run_behind_kept_passes_is_the_whole_run(tmp_path):
    class Kept(Memory):
        def __init__(self) -> None:
            self.reused = 0

        def recall(self, passes, graph):
            self.base = graph.copy()
            for count in range(len(passes) - 1, 0, -1):
                found = Store(tmp_path).recall([f"{count}"], self.base)
                if found is not None:
                    self.reused = count
                    return found[0], [Row.of(row) for row in found[1]]
            return None

        def keep(self, passes, rows, graph):
            Store(tmp_path).keep(f"{len(passes)}", graph, self.base, [row.to_dict() for row in rows])

    def run(memory: Memory) -> tuple[Graph, list[Row]]:
        torch.manual_seed(0)
        graph, _ = network()
        pipeline = Pipeline(parse(SPEC, registry.passes()), registry.passes())
        return graph, pipeline.run(graph, context(graph), memory)

    (whole, first), again = run(Kept()), Kept()
    behind, second = run(again)
    assert again.reused == 3 and behind.fingerprint() == whole.fingerprint()
    for a, b in zip(first, second, strict=True):
        skip = {"seconds", "peak_mb"}
        mine, theirs = ({k: str(v) for k, v in row.to_dict().items() if k not in skip} for row in (a, b))
        assert mine == theirs


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path):
    graph, _ = network()
    (tmp_path / "file").write_text("")
    assert not Store(Path(tmp_path / "file" / "store")).keep("key", graph, graph.copy(), None)


def test_what_a_task_names_travels_to_another_node(tmp_path, monkeypatch):
    from compressor.search import engines
    from compressor.search.trial import Task

    home = tmp_path / "home"
    for name in ("net.pt", "arch.py", "lora/adapter_config.json", "text/x"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(name)
    monkeypatch.chdir(home)
    options = {"model_spec": "arch.py:build", "adapter": ("lora:0.5", "elsewhere"), "text_field": "text"}
    task = Task(str(home / "net.pt"), "cpu", None, options, str(home / "out"), str(home / "store"), "digest")
    parcel = engines._packed(engines._named(task))
    monkeypatch.setattr(engines.tempfile, "tempdir", str(tmp_path))
    there = engines._there("place", task, parcel)
    assert Path(there.model).read_text() == "net.pt" and there.calibration is None
    code, _, name = there.options["model_spec"].rpartition(":")
    assert Path(code).read_text() == "arch.py" and name == "build"
    first, second = there.options["adapter"]
    assert Path(first.removesuffix(":0.5"), "adapter_config.json").exists() and second == "elsewhere"
    assert there.options["text_field"] == "text"
    assert not any(home in Path(one).parents for one in (there.model, code, first, there.folder))
