"""Models too large to be copied: weights in a file of their own, written piece by piece and run apart from torch."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import os
import signal
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from nets import contents
from torch import nn

import compressor
from compressor import apart, api, delivery, measure, runtime
from compressor.capture import capture
from compressor.data import Batch
from compressor.emit import Emitted, emit
from compressor.errors import ContractError, TargetError
from compressor.ir import Input
from compressor.spill import LEAST_BYTES, spilling, trim
from compressor.target import Target

TARGET = Target("cpu", "", ("CPUExecutionProvider",))
IDS = torch.arange(10).reshape(2, 5)
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")


class Adapted(nn.Module):
    """A linear, and a low-rank pair beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(32, 32)
        self.down, self.up = nn.Linear(32, 4, bias=False), nn.Linear(4, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


class Words(nn.Module):
    """Words in, a score for each word out, one table for both."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(600, 32), Adapted()
        self.head = nn.Linear(32, 600, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.table(ids)).relu())


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model counts as large, every tensor is worth a file."""
    monkeypatch.setattr("compressor.emit.EXTERNAL_DATA_BYTES", 1000)
    monkeypatch.setattr("compressor.spill.LEAST_BYTES", 1000)


# ------------------------------------------------------------------------- the file


def places(path: Path) -> dict[str, tuple[str, int]]:
    """Name of each tensor with data of its own -> (file, offset)."""
    proto = onnx.load(path, load_external_data=False)
    kept = {t.name: {e.key: e.value for e in t.external_data} for t in proto.graph.initializer}
    return {name: (place["location"], int(place["offset"])) for name, place in kept.items() if place}


def test_each_weight_lies_once_on_a_page_under_its_own_name(large, tmp_path):
    model = Words()
    emitted = emit(capture(model, (IDS,)), tmp_path / "model.onnx")
    found = places(emitted.path)
    assert found.keys() >= {"table.weight", "body.base.weight", "body.down.weight", "body.up.weight"}
    assert {name for name, _ in found.values()} == {"model.onnx.data"}
    assert all(offset % 4096 == 0 for _, offset in found.values())
    data = (tmp_path / "model.onnx.data").read_bytes()
    stored = np.frombuffer(data, np.float32, 32 * 32, found["body.base.weight"][1]).reshape(32, 32)
    np.testing.assert_array_equal(stored.T, model.body.base.weight.detach(), "as MatMul reads it")
    assert not np.array_equal(stored, model.body.base.weight.detach())
    shapes = [tuple(t.dims) for t in onnx.load(emitted.path, load_external_data=False).graph.initializer]
    assert shapes.count((600, 32)) == 1 and (32, 600) not in shapes, "the tied head has no copy"
    assert emitted.bytes == len(data) + emitted.path.stat().st_size


def test_half_precision_and_four_bits_are_written_as_they_are(large, tmp_path):
    bf16 = torch.randn(70, 50).bfloat16()
    weight = onnx_weights(tmp_path, torch.nn.Parameter(bf16, requires_grad=False))
    assert torch.equal(torch.frombuffer(bytearray(weight), dtype=torch.bfloat16).reshape(70, 50), bf16)


def onnx_weights(folder: Path, tensor: torch.Tensor) -> bytes:
    """The bytes of the only weight of a model that adds it to its input."""

    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = tensor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.weight

    graph = capture(Add(), (torch.zeros(2, *tensor.shape, dtype=tensor.dtype),))
    emit(graph, folder / "model.onnx")
    return (folder / "model.onnx.data").read_bytes()


def test_pieces_of_a_transposed_weight_come_in_order(large, tmp_path, monkeypatch):
    monkeypatch.setattr("compressor.emit._PIECE_BYTES", 100)  # several pieces a weight, one row at least
    graph = capture(Words(), (IDS,))
    emitted = delivery.deliver(graph, TARGET, tmp_path, {}, {})
    delivery.check_emitted(graph, emitted, [Batch((IDS,))])
    torch.manual_seed(1)
    with pytest.raises(ContractError, match="emitted model's output"):
        delivery.check_emitted(capture(Words(), (IDS,)), emitted, [Batch((IDS,))])


# ------------------------------------------------------------------------- one run


def test_a_large_model_from_end_to_end(large, tmp_path):
    results = []
    for name in ("a", "b"):
        torch.manual_seed(0)
        results.append(compressor.compress(Words(), (IDS,), passes="merge", output=tmp_path / name))
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "model.onnx", "model.onnx.data", "report.html", "report.json", "signature.json", "test_data_set_0", "usage.md",
    ]  # fmt: skip
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    emitted = results[0].report["emitted"]
    data = (tmp_path / "a" / "model.onnx.data").read_bytes()
    assert emitted["data_sha256"] == hashlib.sha256(data).hexdigest()
    assert emitted["bytes"] == len(data) + emitted["files"]["model.onnx"] < emitted["float_bytes"]
    assert emitted["latency"]["ratio"] > 0 and "one model in memory at a time" in emitted["latency"]["note"]
    assert emitted["operators"]["Gather"] == 1 and "FusedMatMul" in emitted["operators"]
    assert results[0].report["rows"][1]["status"] == "proved"
    assert places(tmp_path / "a" / "model.onnx").keys() == {"table.weight", "body.weight"}, (
        "one linear is left"
    )
    memory = results[0].report["memory"]
    if memory["start_anonymous_mb"] is not None:
        assert memory["peak_resident_mb"] > memory["peak_anonymous_mb"] >= memory["start_anonymous_mb"] > 1


def test_the_other_commands_take_a_large_model(large, tmp_path):
    torch.manual_seed(0)
    model = Words()
    path = compressor.compress(model, (IDS,), passes="merge", output=tmp_path / "out", measure=False).onnx
    assert api.verify(model, path, example_inputs=(IDS,))["ok"]
    with torch.no_grad():
        model.body.base.weight.neg_()
    assert not api.verify(model, path, example_inputs=(IDS,))["ok"]
    assert api.inspect(path)["bytes"] > path.stat().st_size + 600 * 32 * 4
    assert all(row["runs"] >= 16 and row["median_ms"] > 0 for row in api.bench([path, path], seconds=0.1))


def test_a_failure_leaves_the_old_files_whole(large, tmp_path, monkeypatch):
    output = tmp_path / "out"
    compressor.compress(Words(), (IDS,), passes="merge", output=output, measure=False)
    before = contents(output)
    monkeypatch.setattr("compressor.verify.EMITTED", -1.0)
    monkeypatch.setattr("compressor.jitter.EVERYWHERE", -1.0)
    with pytest.raises(ContractError, match="emitted model"):
        compressor.compress(Words(), (IDS,), passes="merge", output=output, measure=False)
    assert contents(output) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "no scratch beside it"


def test_what_the_phone_format_cannot_hold_is_refused(tmp_path):
    emitted = Emitted(tmp_path / "model.onnx", (), (), 2_100_000_000)
    with pytest.raises(TargetError, match=r"cannot hold 2,100,000,000 bytes.*int8.*--target cpu"):
        delivery._write_ort(emitted, tmp_path / "model.ort")
    mobile = Target("mobile", "", ("CPUExecutionProvider",), formats=("onnx", "ort"))
    delivery.deliver(capture(Words(), (IDS,)), mobile, tmp_path, {}, {})
    assert (tmp_path / "model.ort").stat().st_size > 600 * 32 * 4


# ------------------------------------------------------------------------- apart


def test_a_session_apart_gives_the_numbers_of_one_here(tmp_path):
    path = emit(capture(Words(), (IDS,)), tmp_path / "model.onnx").path
    here = runtime.session(path)
    (expected,) = runtime.run(here, [IDS.numpy()])
    for weights in ("folded", "packed", "mapped"):
        with apart.Session(path, weights=weights) as there:
            assert [tuple(slot) for slot in there.get_inputs()] == [("ids", "tensor(int64)", ["batch", 5])]
            assert there.get_outputs()[0].name == here.get_outputs()[0].name
            (seen,) = runtime.run(there, [IDS.numpy()])
            np.testing.assert_allclose(seen, expected, rtol=1e-5, atol=1e-6)
            assert not np.allclose(seen, runtime.run(there, [IDS.numpy() + 1])[0], rtol=1e-5, atol=1e-6)


def test_errors_over_there_come_back_as_they_are(tmp_path):
    with pytest.raises(TargetError, match="no such file"):
        apart.Session(tmp_path / "none.onnx")
    path = emit(capture(Words(), (IDS,)), tmp_path / "model.onnx").path
    with apart.Session(path) as there:
        with pytest.raises(TargetError, match="takes ids; it was given words"):
            runtime.run(there, {"words": IDS.numpy()})
        with pytest.raises(TargetError, match="could not run the model: .*data type"):
            runtime.run(there, {"ids": IDS.numpy().astype(np.float32)})
        assert runtime.run(there, [IDS.numpy()])[0].shape == (2, 5, 600), "and it goes on"
    with pytest.raises(RuntimeError, match="invalid literal"):
        apart.call(int, "many")


def test_a_process_that_dies_says_why():
    assert apart.call(os.path.basename, "a/b") == "b"
    with pytest.raises(TargetError, match="was killed: there is not enough memory"):
        apart.call(signal.raise_signal, signal.SIGKILL)
    with pytest.raises(TargetError, match="ended with code 3"):
        apart.call(eval, "__import__('os')._exit(3)")


def test_nothing_of_torch_is_loaded_over_there():
    with apart.Process() as process:
        process.call(runtime.providers)
        loaded = process.call(eval, "set(__import__('sys').modules)")
        before = process._child.pid
    assert "onnxruntime" in loaded and not loaded & {"torch", "onnx", "transformers"}
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)


# ------------------------------------------------------------------------- memory


def test_spilled_tensors_are_equal_and_lie_in_files_that_go_with_them(tmp_path):
    spill = spilling(tmp_path)
    big = torch.randn(3, LEAST_BYTES // 4)
    for tensor in (big, big.bfloat16(), (big * 50).to(torch.int8).repeat(4, 1), torch.cat([big] * 4) > 0):
        seen = spill(tensor)
        assert (
            torch.equal(seen, tensor) and seen.dtype == tensor.dtype and seen.data_ptr() != tensor.data_ptr()
        )
    small, turned = torch.randn(10), torch.randn(LEAST_BYTES // 8, 3).T
    assert spill(small) is small and spill(turned) is turned
    assert not list(tmp_path.iterdir()), "the files are nameless"
    with pytest.raises(OSError):
        spilling(tmp_path / "none")(big)
    trim()


@needs_proc
def test_what_is_spilled_takes_no_memory_of_its_own(tmp_path):
    spill = spilling(tmp_path)
    gc.collect()
    trim()
    before = measure.anonymous_memory_mb()
    kept = [spill(torch.ones(1 << 22)) for _ in range(4)]
    assert measure.anonymous_memory_mb() - before < 20 < sum(t.nbytes for t in kept) / 2**20
    copies = [t.clone() for t in kept]
    assert measure.anonymous_memory_mb() - before > 60 and len(copies) == 4


def test_a_graph_spills_what_is_new_and_shares_what_it_has(tmp_path):
    graph = capture(nn.Linear(512, 600), (torch.randn(2, 512),))
    kept = []
    graph.keep = lambda tensor: (kept.append(tuple(tensor.shape)), tensor.clone())[1]
    weight = next(n for n in graph.nodes if n.target == "weight")
    old = graph.tensor(weight)
    graph.add_tensor("turned", old.T)
    assert kept == [], "a view of a tensor that is there already"
    graph.copy().set_tensor(weight, old + 1)
    assert kept == [(600, 512)] and graph.tensor(weight) is old


@needs_proc
def test_the_watch_sees_a_peak_that_is_gone_and_children():
    gc.collect()
    trim()  # what earlier tests left
    with measure.MemoryWatch(interval=0.005) as watch:
        block = torch.ones(64 << 18)
        watch.look()
        del block
    assert 60 < watch.anonymous - watch.start < 100 and watch.resident > watch.anonymous
    assert measure.MemoryWatch(pid=1 << 30).look().to_dict()["peak_anonymous_mb"] is None


@needs_proc
def test_a_process_that_ends_while_it_is_looked_at_is_no_error(monkeypatch):
    def gone(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(measure.os, "listdir", gone)
    assert measure.MemoryWatch().look().anonymous is not None


@needs_proc
def test_a_child_that_has_not_begun_is_not_counted_twice(monkeypatch):
    sizes = {1: 500_000.0, 2: 500_100.0, 3: 20_000.0}
    monkeypatch.setattr(measure, "_tree", lambda pid: [1, 2, 3])
    monkeypatch.setattr(measure, "_kilobytes", lambda path, field: sizes[int(path.parent.name)])
    assert measure.anonymous_memory_mb(1) == 520_000 / 1024
    sizes[2] = 400_000.0  # one that has, and is large
    assert measure.anonymous_memory_mb(1) == 920_000 / 1024


MERGE = """
import sys
from copy import deepcopy
from pathlib import Path
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
import compressor
from compressor import emit, measure
from compressor.spill import trim

class Adapted(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.base = nn.Linear(width, width)
        self.down, self.up = nn.Linear(width, 4, bias=False), nn.Linear(4, width, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))

def mapped(width, depth):
    with torch.device("meta"):
        kinds = (Adapted(width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        model = nn.Sequential(*(deepcopy(kind) for _ in range(depth) for kind in kinds))
    path = folder / f"{width}.safetensors"
    save_file({k: torch.randn(t.shape) * t.shape[-1] ** -0.5 for k, t in model.state_dict().items()}, path)
    with safe_open(path, "pt") as file:
        model.load_state_dict({k: file.get_tensor(k) for k in file.keys()}, assign=True)
    return model.eval()

def merge(model, width):
    trim()
    with measure.MemoryWatch(interval=0.01) as watch:
        options = {"passes": "merge", "output": folder / "out", "measure": False}
        result = compressor.compress(model, (torch.randn(2, width),), **options)
    assert len(result.report["rows"][1]["rewrites"]) == sum(isinstance(m, Adapted) for m in model)
    return watch.anonymous - watch.start

folder = Path(sys.argv[1])
emit.EXTERNAL_DATA_BYTES = 1 << 16
merge(mapped(128, 1), 128)  # whatever is imported on the way, and stays
model = mapped(1024, 24)
print(sum(p.nbytes for p in model.parameters()) / 2**20, merge(model, 1024))
with measure.MemoryWatch(interval=0.01) as watch:
    copy = [p.clone() for p in model.parameters()]
print(watch.anonymous - watch.start)
"""


@needs_proc
def test_merging_makes_no_copy_of_the_weights(python, tmp_path):
    """200 MB of mapped weights: probing takes 100 MB however large the model is, all else next to nothing."""
    (tmp_path / "merge.py").write_text(MERGE)
    done = python("merge.py", str(tmp_path))
    assert not done.returncode, done.stderr
    model, peak, one_copy = map(float, done.stdout.split())
    bound = 0.85 * model
    assert peak < bound
    assert peak + one_copy > bound * 1.3, "one copy more would not pass"


def test_names_of_the_sizes_are_left_alone(large, tmp_path):
    graph = capture(Words(), inputs=[Input("ids", torch.int64, ("batch", "sequence"))])
    proto = onnx.load(emit(graph, tmp_path / "model.onnx").path, load_external_data=False)
    assert [d.dim_param for d in proto.graph.input[0].type.tensor_type.shape.dim] == ["batch", "sequence"]


def test_an_integer_model_is_timed_as_it_ships(large, tmp_path, monkeypatch):
    seen = []

    def bench_alone(paths, *, weights, **_):
        seen.extend(weights)
        return [measure.Latency(1.0, 1.0, 0.0, 2, (1.0, 1.0))] * len(paths)

    monkeypatch.setattr(measure, "bench_alone", bench_alone)
    float_ = emit(capture(Words(), (IDS,)), tmp_path / "model.onnx")
    assert not float_.integer
    files = {"model": dataclasses.replace(float_, integer=True), "float": float_}
    assert delivery.latencies(files, (IDS,))["ratio"] == 1.0
    assert seen == ["folded", "packed"]
