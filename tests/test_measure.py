"""Size, latency, memory and machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from compressor import measure, runtime
from compressor.errors import TargetError, UsageError
from compressor.ir import Graph


def model(path, size: int, depth: int = 1, name: str = "x"):
    weight = numpy_helper.from_array(np.eye(size, dtype=np.float32), "w")
    values = [name, *(f"v{i}" for i in range(depth - 1)), "y"]
    nodes = [helper.make_node("MatMul", [a, "w"], [b]) for a, b in pairwise(values)]
    infos = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", size])] for n in (name, "y")]
    graph = helper.make_graph(nodes, "test", *infos, [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def graph_of(**tensors: torch.Tensor) -> Graph:
    """A graph that adds up its tensors; `unused_*` are bound and fetched, and read by nothing."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    for name in tensors:
        node = graph.create_node("get_attr", name)
        if not name.startswith("unused"):
            x = graph.call_function(torch.add, (x, node))
    graph.output((x,))
    return Graph(graph, tensors, (), ("y",), ())


# ---------------------------------------------------------------- size


def test_a_shared_tensor_counts_once_and_a_dead_one_not_at_all():
    weight = torch.zeros(4, 4)
    graph = graph_of(a=weight, tied=weight, view=weight.T, equal=torch.zeros(4, 4), unused=torch.zeros(99))
    assert measure.parameters(graph) == 32
    assert measure.bytes_of(graph) == 128


def test_bytes_follow_the_dtype():
    graph = graph_of(a=torch.zeros(10, dtype=torch.int8), b=torch.zeros(10, dtype=torch.float64))
    assert (measure.parameters(graph), measure.bytes_of(graph)) == (20, 90)


# ---------------------------------------------------------------- latency


def test_bench_finds_the_slower_model_and_its_ratio(tmp_path):
    small, large = model(tmp_path / "s.onnx", 128), model(tmp_path / "l.onnx", 128, depth=12, name="input")
    x = np.zeros((64, 128), np.float32)
    slow, fast = measure.bench([large, small], feeds=[x], rounds=9, seconds=0.3)
    assert slow.median_ms > 2 * fast.median_ms > 0
    assert len(slow.rounds) == 9 and slow.runs >= 9
    assert slow.p95_ms >= slow.median_ms and slow.iqr_ms >= 0
    gain = measure.ratio(slow, fast)
    assert 2 < gain.low <= gain.median <= gain.high
    assert measure.ratio(fast, slow).median < 0.5  # turned round, it would not pass
    assert re.fullmatch(r"\d+\.\d\dx \(\d+\.\d\d-\d+\.\d\d\)", str(gain))


def test_models_are_measured_in_turns(tmp_path, monkeypatch):
    paths = [model(tmp_path / f"{name}.onnx", 4) for name in "ab"]
    order = []
    monkeypatch.setattr(runtime, "session", lambda path, **_: fake_session(path.stem, order))
    monkeypatch.setattr(runtime, "run", lambda session, feed: [])
    measure.bench(paths, feeds={"x": np.zeros((1, 4), np.float32)}, rounds=4, seconds=0)
    warm_up = 2 * (2 + 3)
    assert "".join(order[warm_up:]) == "abbaabba"


def test_no_more_rounds_than_it_takes_to_know(monkeypatch):
    """Rounds that agree are enough after the fifth; those that do not go on to the last."""
    sessions = {}

    def timed(session, feed, repeats):
        session.calls += 1
        return [session.ms * (1 + session.noise * (session.calls % 3))]

    monkeypatch.setattr(runtime, "session", lambda path, **_: sessions[path])
    monkeypatch.setattr(runtime, "run", lambda session, feed: [])
    monkeypatch.setattr(measure, "_timed", timed)
    for noise, rounds in ((0.001, 5), (0.2, 15)):
        for name, ms in (("a", 2.0), ("b", 1.0)):
            sessions[name] = SimpleNamespace(calls=0, ms=ms, noise=noise * (name == "b"), get_inputs=list)
        for names in (["a", "b"], ["b"]):
            found = measure.bench(names, feeds={}, within=0.01)
            assert len(found[0].rounds) == rounds
        whole = measure.bench(["a", "b"], feeds={})  # unless it is asked for, all are made
        assert len(whole[0].rounds) == 15


def fake_session(name: str, order: list[str]):
    inputs = [SimpleNamespace(name="x", type="tensor(float)")]
    return SimpleNamespace(run=lambda *_: order.append(name), get_inputs=lambda: inputs)


def test_latency_sums_up_all_runs():
    one = measure._latency([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert (one.median_ms, one.rounds, one.runs) == (3.5, (2.0, 5.0), 6)
    assert one.iqr_ms == pytest.approx(2.5) and one.p95_ms == pytest.approx(5.75)


def test_ratio_pairs_the_rounds():
    base = measure.Latency(0, 0, 0, 3, (2.0, 20.0, 4.0))
    other = measure.Latency(0, 0, 0, 3, (1.0, 10.0, 2.0))
    assert measure.ratio(base, other) == measure.Ratio(2.0, 2.0, 2.0)  # a slow round slows both
    with pytest.raises(UsageError, match="one bench"):
        measure.ratio(base, measure.Latency(0, 0, 0, 2, (1.0, 2.0)))


def test_bench_says_what_does_not_fit(tmp_path):
    path = model(tmp_path / "m.onnx", 4)
    with pytest.raises(TargetError, match="takes x; it was given z"):
        measure.bench([path], feeds={"z": np.zeros((1, 4), np.float32)})
    with pytest.raises(UsageError, match="3 rounds"):
        measure.bench([path], feeds={"x": np.zeros((1, 4), np.float32)}, rounds=1)


def test_random_feeds_fit_any_session(tmp_path):
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "sequence"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "sequence", 3])
    table = numpy_helper.from_array(np.zeros((2, 3), np.float32), "table")
    graph = helper.make_graph([helper.make_node("Gather", ["table", "ids"], ["y"])], "g", [ids], [y], [table])
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    session = runtime.session(path)
    feeds = measure.random_feeds(session, batch=3, free=5)
    assert feeds["ids"].shape == (3, 5) and feeds["ids"].dtype == np.int64
    assert runtime.run(session, feeds)[0].shape == (3, 5, 3)
    floats = measure.random_feeds(runtime.session(model(tmp_path / "f.onnx", 4)), batch=2, seed=1)["x"]
    again = measure.random_feeds(runtime.session(tmp_path / "f.onnx"), batch=2, seed=1)["x"]
    np.testing.assert_array_equal(floats, again)
    assert floats.std() > 0.1


# ---------------------------------------------------------------- memory


def test_peak_memory_sees_what_was_freed():
    code = (
        "from compressor import measure; before = measure.peak_memory_mb()\n"
        "block = bytearray(b'x') * (64 << 20); del block\n"
        "print(measure.peak_memory_mb() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 60 < float(done.stdout) < 140


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs /proc/self/smaps_rollup")
@pytest.mark.parametrize("read", [measure.resident_memory_mb, measure.anonymous_memory_mb])
def test_memory_counts_children(read):
    code = "import sys; block = bytearray(b'x') * (64 << 20); print(flush=True); sys.stdin.readline()"
    before = read()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        child.stdout.readline()
        during = read()
        assert read(child.pid) > 64
        child.stdin.write(b"\n")
    assert 60 < during - before < 120
    assert read() - before < 30  # the child is gone


# ---------------------------------------------------------------- the machine


@pytest.mark.parametrize(
    "flags, isa",
    [
        ("sse4_2 avx avx2 avx512f avx512bw avx512_vnni", "avx512_vnni"),
        ("avx avx2 avx_vnni", "avx_vnni"),
        ("avx avx2 avx512f avx512bw", "avx512"),
        ("avx avx2", "avx2"),
        ("fp asimd asimddp", "arm_dot"),
    ],
)
def test_isa_is_the_best_that_the_cpu_names(monkeypatch, flags, isa):
    label = "Features" if "asimd" in flags else "flags"
    monkeypatch.setattr(measure.Path, "is_file", lambda self: True)
    monkeypatch.setattr(
        measure.Path, "read_text", lambda self: f"model name : Some CPU\n{label}\t\t: {flags}\n"
    )
    found = measure.machine()
    assert found == {"cpu": "Some CPU", "cores": found["cores"], "isa": isa}


def test_machine_and_versions_of_this_one(monkeypatch):
    assert 1 <= measure.machine()["cores"] <= os.cpu_count()
    monkeypatch.setattr(measure.Path, "is_file", lambda self: False)
    assert measure.machine()["isa"]  # no /proc: the platform's name
    found = measure.versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(found) == {"python", "torch", "onnx", "onnxruntime", "onnxscript"}
    monkeypatch.setattr(measure, "_PACKAGES", ("no-such-package",))
    assert measure.versions()["no-such-package"] == "missing"


@pytest.mark.parametrize(
    ("isa", "warns"), [("avx2", True), ("avx512", True), ("avx512_vnni", False), ("arm_dot", False)]
)
def test_a_machine_whose_sums_saturate_is_named(monkeypatch, isa, warns):
    monkeypatch.setattr(measure, "machine", lambda: {"cpu": "any", "cores": 1, "isa": isa})
    assert ("cpu-avx2" in measure.saturation()) == warns
