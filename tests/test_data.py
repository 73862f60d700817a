"""Data streams: formats, checks, batches, split, generated data, metrics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compressor import batches as batching
from compressor import data as module
from compressor.capture import capture
from compressor.data import Batch, Data, open_data, parse_input, split, synthetic
from compressor.errors import DataError, UsageError
from compressor.evaluation import Evaluator, evaluator, metric
from compressor.images import Custom, Preprocess, opened, preprocessing
from compressor.ir import Input
from compressor.load import Loaded
from compressor.opening import Options, streams

X = Input("x", torch.float32, ("batch", 3))
IMAGE = Input("x", torch.float32, ("batch", 3, 8, 8))
TEXT = (
    Input("batch.input_ids", torch.int64, ("batch", "sequence")),
    Input("batch.attention_mask", torch.int64, ("batch", "sequence")),
)


def rows(count: int, width: int = 3) -> np.ndarray:
    return np.arange(count * width, dtype=np.float32).reshape(count, width)


def joined(data: Data) -> torch.Tensor:
    return torch.cat([batch.inputs[0] for batch in data])


def check_rows(data: Data, count: int) -> None:
    """The data are rows 0..count, twice over, and not merely something of that shape."""
    for _ in range(2):
        assert torch.equal(joined(data), torch.from_numpy(rows(count)))
    assert data.samples == count and len(data) == len(list(data))


# ---------------------------------------------------------------- formats


def files(folder) -> dict[str, object]:
    """The same 10 rows in every form that is read."""
    x, y = rows(10), np.arange(10)
    np.savez(folder / "a.npz", x=x, y=y)
    np.savez_compressed(folder / "b.npz", anything=x, labels=y)
    np.savez(folder / "f.npz", x=np.asfortranarray(x), y=y)
    np.save(folder / "c.npy", x)
    t, labels = torch.from_numpy(x), torch.from_numpy(y)
    torch.save(t, folder / "t.pt")
    torch.save({"x": t, "y": labels}, folder / "dict.pt")
    torch.save((t, labels), folder / "pair.pt")
    torch.save([t[:4], t[4:]], folder / "batches.pt")
    torch.save([(t[:4], labels[:4]), (t[4:], labels[4:])], folder / "pairs.pt")
    torch.save({"x": t, "y": labels}, folder / "old.pt", _use_new_zipfile_serialization=False)
    save_file({"x": t, "label": labels}, folder / "s.safetensors")
    (folder / "many").mkdir()
    for i, part in enumerate(np.split(x, [3, 5])):
        np.savez(folder / "many" / f"{i}.npz", x=part)
    paths = {path.name: path for path in sorted(folder.iterdir())}
    return {**paths, "str": str(folder / "a.npz"), "list": [folder / "many" / f"{i}.npz" for i in range(3)]}


@pytest.mark.parametrize(
    "name, labelled",
    [
        ("a.npz", True), ("b.npz", True), ("f.npz", True), ("c.npy", False), ("t.pt", False),
        ("dict.pt", True), ("pair.pt", True), ("batches.pt", False), ("pairs.pt", True), ("old.pt", True),
        ("s.safetensors", True), ("many", False), ("str", True), ("list", False),
    ],
)  # fmt: skip
def test_every_file_form_gives_the_same_rows(tmp_path, name, labelled):
    data = open_data(files(tmp_path)[name], [X], batch_size=4)
    check_rows(data, 10)
    assert data.sizes == (4, 4, 2)
    labels = [batch.labels for batch in data]
    if labelled:
        assert torch.cat(labels).tolist() == list(range(10))
    else:
        assert labels == [None] * 3
    assert "10 samples" in data.description


def python_sources() -> dict[str, object]:
    x, y = rows(10), np.arange(10)
    t, labels = torch.from_numpy(x), torch.from_numpy(y)
    dataset = torch.utils.data.TensorDataset(t, labels)
    return {
        "tensor": t,
        "array": x,
        "dict": {"x": x, "y": y},
        "pair": (t, labels),
        "list of batches": [t[:7], t[7:]],
        "list of pairs": [(x[:7], y[:7]), [x[7:], y[7:]]],
        "list of dicts": [{"x": t[:7], "labels": labels[:7]}, {"x": x[7:], "label": y[7:]}],
        "generator": (part for part in t.split(3)),
        "dataset": dataset,
        "loader": torch.utils.data.DataLoader(dataset, batch_size=3),
        "iterable dataset": _Stream(t),
    }


class _Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.parametrize("name", list(python_sources()))
def test_every_python_object_gives_the_same_rows(name):
    data = open_data(python_sources()[name], [X], batch_size=4)
    check_rows(data, 10)
    labels = [batch.labels for batch in data]
    if labels[0] is not None:
        assert torch.cat(labels).tolist() == list(range(10))
    else:
        assert name in ("tensor", "array", "list of batches", "generator", "iterable dataset")


def test_inputs_are_matched_by_name_last_part_or_order():
    ids, mask = np.arange(12).reshape(4, 3), np.ones((4, 3), np.int64)
    full = {"batch.attention_mask": mask, "batch.input_ids": ids}
    short = {"input_ids": ids, "attention_mask": mask, "token_type_ids": mask * 0, "labels": np.arange(4)}
    for source in (full, short, (ids, mask), [(ids[:1], mask[:1]), (ids[1:], mask[1:])], [short]):
        batch = next(iter(open_data(source, TEXT)))
        assert torch.equal(batch.inputs[0], torch.from_numpy(ids))
        assert torch.equal(batch.inputs[1], torch.from_numpy(mask))
    assert open_data(short, TEXT).facts["unused"] == ["token_type_ids"]
    swapped = next(iter(open_data((mask, ids), TEXT)))
    assert not torch.equal(swapped.inputs[0], torch.from_numpy(ids))


def test_a_list_of_two_alike_is_batches_a_tuple_input_and_target():
    t = torch.from_numpy(rows(4))
    assert open_data([t, t], [X]).samples == 8
    pair = open_data((t, t + 1), [X])
    assert pair.samples == 4 and torch.equal(next(iter(pair)).labels, t + 1)
    two = (X, Input("z", torch.float32, ("batch", 3)))
    assert next(iter(open_data([t, t + 1, t + 2], two))).labels is not None


def test_an_input_without_the_batch_axis_is_handed_over_whole():
    inputs = (X, Input("table", torch.float32, (2, 2)), Input("scale", torch.float32, ()))
    table = np.eye(2, dtype=np.float32)
    data = open_data({"x": rows(5), "table": table, "scale": np.float32(3)}, inputs, batch_size=2)
    assert data.sizes == (2, 2, 1)
    for batch in data:
        assert torch.equal(batch.inputs[1], torch.eye(2)) and batch.inputs[2] == 3
    other = [(rows(3), table, 1.0), (rows(3), table, 2.0)]
    assert open_data(other, inputs, batch_size=4).sizes == (3, 3)  # never joined: the scale differs


@pytest.mark.parametrize("again", [list, iter])
def test_samples_are_those_of_the_batch_axis_and_not_the_rows_of_a_table(again):
    inputs = (Input("table", torch.float32, (7, 2)), X)
    table = np.ones((7, 2), dtype=np.float32)
    data = open_data(again([(table, rows(4)), (table, rows(2))]), inputs, batch_size=4)
    for one in (
        data,
        data.rebatched(3),
        data.limited(5),
        synthetic(inputs, (torch.ones(7, 2), torch.ones(1, 3))),
    ):
        assert [batch.samples for batch in one] == list(one.sizes)
        assert all(batch.inputs[0].shape == (7, 2) for batch in one)


def test_nodes_and_edges_of_a_graph_are_no_samples(tmp_path):
    shapes = {"x": (20, 6), "edges": (2, "e"), "weights": ("e", 2)}
    specs = [Input(name, torch.float32, shape) for name, shape in shapes.items()]
    arrays = {"x": np.ones((20, 6)), "edges": np.ones((2, 60)), "weights": np.ones((60, 2))}
    arrays = {name: array.astype("float32") for name, array in arrays.items()}
    np.savez(tmp_path / "graph.npz", **arrays)
    for source in (tmp_path / "graph.npz", [tuple(arrays.values())]):
        (batch,) = open_data(source, specs)
        assert [list(t.shape) for t in batch.inputs] == [[20, 6], [2, 60], [60, 2]]


@pytest.mark.parametrize(
    "shapes, batched",
    [
        ([("n", 6), ("n", "n")], (False, False)),  # an adjacency
        ([("b", "s"), ("s",)], (True, False)),  # token ids and their places
        ([("s", "b", 8), ("b", "s")], (False, False)),
        ([(4, 3), ("e", 2), (5, "e")], (False, False, False)),
        ([(4, 3), (2, 3)], (True, False)),
    ],
)
def test_what_is_an_inner_axis_too_counts_no_samples(shapes, batched):
    specs = [Input(f"in{i}", torch.float32, shape) for i, shape in enumerate(shapes)]
    assert batching.Reader(specs).batched == batched


def test_sequences_of_different_length_are_not_joined():
    parts = [
        torch.zeros(2, 5, dtype=torch.int64),
        torch.zeros(2, 5, dtype=torch.int64),
        torch.zeros(2, 7).long(),
    ]
    data = open_data([(p, p) for p in parts], TEXT, batch_size=3)
    assert [tuple(b.inputs[0].shape) for b in data] == [(3, 5), (1, 5), (2, 7)]


# ---------------------------------------------------------------- streaming


def test_one_shot_sources_are_read_once_and_no_further_than_the_limit():
    read = []

    def stream():
        for i in range(1000):
            read.append(i)
            yield torch.from_numpy(rows(4))

    data = open_data(stream(), [X], limit=10, batch_size=3)
    assert data.sizes == (3, 3, 3, 1) and len(read) == 3
    assert torch.equal(joined(data), joined(data)) and len(read) == 3
    assert "first 10 samples" in data.description


def test_a_shuffling_loader_repeats_itself_so_that_the_split_holds():
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(rows(40)))
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True)
    statistics, held_out = split(open_data(loader, [X], batch_size=4))
    seen = {tuple(row) for row in joined(statistics).tolist()}
    kept = {tuple(row) for row in joined(held_out).tolist()}
    assert len(seen) == 32 and len(kept) == 8 and not seen & kept
    fresh = {tuple(row) for batch in list(loader)[:2] for row in batch[0].tolist()}
    assert fresh & seen  # read twice, the loader itself would have leaked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float16])
def test_spool_keeps_every_bit(dtype):
    values = torch.arange(-6, 6).reshape(4, 3).to(dtype)
    data = open_data(iter([values]), [Input("x", dtype, ("batch", 3))])
    assert torch.equal(joined(data), values) and joined(data).dtype == dtype


def test_a_full_temporary_folder_is_a_clear_error(monkeypatch):
    class Full:
        def seek(self, *_):
            return 0

        def write(self, _):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    monkeypatch.setattr(batching.tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(DataError, match="No space left on device.*TMPDIR.*--calib-limit"):
        open_data(iter([rows(4)]), [X])


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_memory_is_bounded_by_the_batch(tmp_path):
    code = """
import sys, pathlib, numpy as np, torch
from safetensors.torch import save_file
from compressor.data import open_data
from compressor.ir import Input
from compressor.measure import anonymous_memory_mb

folder, width = pathlib.Path(sys.argv[1]), 1 << 19
big = np.ones((32, width), np.float32)  # 64 MB
np.savez(folder / "x.npz", x=big)
np.save(folder / "x.npy", big)
torch.save(torch.from_numpy(big), folder / "x.pt")
save_file({"x": torch.from_numpy(big)}, folder / "x.safetensors")
del big
for source in (*sorted(folder.iterdir()), (torch.ones(1, width) for _ in range(32))):
    before, most = anonymous_memory_mb(), 0
    data = open_data(source, [Input("x", torch.float32, ("batch", width))], batch_size=2)
    for batch in data:
        assert batch.inputs[0].mean() == 1
        most = max(most, anonymous_memory_mb() - before)
    assert data.samples == 32
    print(most)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown = [float(line) for line in done.stdout.split()]
    assert len(grown) == 5 and max(grown) < 30


def test_batches_are_freed_as_the_stream_goes_on():
    data = open_data(rows(12), [X], batch_size=2)
    alive: list[weakref.ref] = []
    for batch in data:
        alive.append(weakref.ref(batch))
        assert sum(one() is not None for one in alive) <= 2


# ---------------------------------------------------------------- what does not fit


def bad(value, *inputs, match: str, **options) -> None:
    with pytest.raises(DataError, match=match) as caught:
        open_data(value, inputs or [X], **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value, match",
    [
        (
            {"z": rows(4), "w": rows(4)},
            "no array for input 'x'; it has z, w. Name the arrays after the inputs",
        ),
        ({"x": rows(4, 5)}, r"input 'x' expects \[batch, 3\], the data are \[4, 5\]"),
        ({"x": rows(4)[0]}, r"expects \[batch, 3\], the data are \[3\]; the batch axis is missing"),
        ({"x": rows(4)[None]}, r"expects \[batch, 3\], the data are \[1, 4, 3\]"),
        ({"x": rows(4), "y": np.arange(5)}, "differ in their number of samples: 'x' 4, 'y' 5"),
        ({"x": rows(0)}, "empty"),
        ([], "empty"),
        (iter([]), "is empty"),
        ({"x": rows(4) * np.nan}, "input 'x' holds NaN or infinite"),
        ({"x": rows(4) + np.inf}, "input 'x' holds NaN or infinite"),
        ({"x": rows(4).astype(np.float64) + 1e300}, "some too large for f32"),
        (
            {"x": rows(4).astype(np.int64)},
            r"expects f32, the data are i64; store floats.*astype\('float32'\)",
        ),
        ({"x": rows(4).astype(np.uint8)}, "expects f32, the data are u8; pass --preprocess"),
        ({"x": rows(4) > 3}, "expects f32, the data are bool"),
        ([(rows(4), np.arange(4), np.arange(4))], "3 arrays for a model with 1 inputs"),
        ([(rows(4), np.arange(3))], "4 samples, but labels of shape"),
        ([["one", "two"]], "no numbers"),
        ({"x": np.array([["a", "b"]])}, "no numbers"),
        (iter([rows(4), rows(4, 2)]), r"the data are \[4, 2\]"),
    ],
)
def test_what_does_not_fit_is_named(value, match):
    bad(value, match=match)


def test_integers_and_floats_are_cast_only_where_nothing_is_lost():
    ids = Input("ids", torch.int32, ("batch", 3))
    assert joined(open_data(rows(4).astype(np.int64), [ids])).dtype == torch.int32
    data = open_data(rows(4).astype(np.float64), [X])
    assert joined(data).dtype == torch.float32 and data.facts["cast"] == {"x": "f64 to f32"}
    assert "cast" not in open_data(rows(4), [X]).facts
    bad(rows(4).astype(np.int64) << 40, ids, match=r"expects i32, which does not hold values 0\.\.")
    bad(rows(4), ids, match="expects i32, the data are f32; store integers")
    mask = Input("m", torch.bool, ("batch", 3))
    assert joined(open_data((rows(4) > 3).astype(np.uint8), [mask])).dtype == torch.bool
    bad(rows(4).astype(np.int64), mask, match="expects bool, which does not hold values 0..11")


def test_channels_last_is_recognised():
    bad(np.zeros((2, 8, 8, 3), np.float32), IMAGE, match=r"channels stand last: transpose\(0, 3, 1, 2\)")


def test_inputs_that_share_a_dynamic_axis_must_agree():
    ids = np.zeros((4, 7), np.int64)
    bad((ids, ids[:, :5]), *TEXT, match="attention_mask' has sequence = 5, but input 'batch.input_ids' has 7")
    bad([(ids, ids[:3])], *TEXT, match="attention_mask' has batch = 3, but input 'batch.input_ids' has 4")


def damaged(folder, name: str) -> str:
    path = folder / name
    if name == "missing.npz":
        return str(path)
    if name == "empty folder":
        path.mkdir()
    elif name == "objects.npz":
        np.savez(path, x=np.array([{}, {}], object))
    elif name == "objects.pt":
        torch.save({"x": _Stream(1)}, path)
    elif name.startswith("truncated"):
        whole = folder / f"whole{path.suffix}"
        if path.suffix == ".npz":
            np.savez(whole, x=rows(1000))
        elif path.suffix == ".npy":
            np.save(whole, rows(1000))
        elif path.suffix == ".pt":
            torch.save(torch.from_numpy(rows(1000)), whole)
        else:
            save_file({"x": torch.from_numpy(rows(1000))}, whole)
        path.write_bytes(whole.read_bytes()[:5000])
        whole.unlink()
    elif name == "flipped.npz":
        np.savez(path, x=rows(1000))
        content = bytearray(path.read_bytes())
        content[3000] ^= 255
        path.write_bytes(content)
    else:
        path.write_text("these are no tensors" * (name != "empty.pt"))
    return str(path)


@pytest.mark.parametrize(
    "name, match",
    [
        ("missing.npz", "no such file or folder"),
        ("empty folder", "no images and no batch files"),
        ("data.xml", "not a kind of data known here"),
        ("objects.npz", "Python objects"),
        ("objects.pt", "more than tensors, and data are never unpickled"),
        ("text.npz", "damaged"), ("text.npy", "damaged"), ("text.pt", "damaged"), ("empty.pt", "damaged"),
        ("text.safetensors", "damaged"), ("truncated.npz", "damaged"), ("truncated.npy", "damaged"),
        ("truncated.pt", "damaged"), ("truncated.safetensors", "damaged"), ("flipped.npz", "damaged"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, name, match):
    path = damaged(tmp_path, name)
    with pytest.raises(DataError, match=match) as caught:
        open_data(path, [X])
    assert path in str(caught.value) and "\n" not in str(caught.value)


def test_a_pickle_in_a_pt_file_does_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "fired"), "w"))

    torch.save({"x": Bomb()}, tmp_path / "bomb.pt")
    bad(tmp_path / "bomb.pt", match="never unpickled")
    assert not (tmp_path / "fired").exists()


def test_what_is_no_data_at_all():
    with pytest.raises(UsageError, match="cannot be read from a int"):
        open_data(7, [X])
    with pytest.raises(UsageError, match="at least 1"):
        open_data(rows(4), [X], limit=0)


# ---------------------------------------------------------------- batches


def test_a_static_batch_is_filled_and_the_rest_dropped_and_told():
    static = Input("x", torch.float32, (4, 3))
    data = open_data([rows(3), rows(3), rows(4)], [static])
    assert data.sizes == (4, 4) and data.facts["dropped_samples"] == 2
    assert torch.equal(joined(data), torch.from_numpy(np.concatenate([rows(3), rows(3), rows(4)])[:8]))
    bad(rows(3), static, match="has 3 samples, which do not fill the model's batch of 4; give it at least 8")
    assert open_data(rows(8), [static]).facts == {"batch": 4}


def test_limited_and_rebatched_keep_the_order():
    data = open_data({"x": rows(20), "y": np.arange(20)}, [X], batch_size=8)
    part = data.limited(11)
    assert part.sizes == (8, 3) and torch.equal(joined(part), torch.from_numpy(rows(11)))
    assert data.limited(50) is data
    again = data.rebatched(3)
    assert again.sizes == (3, 3, 3, 3, 3, 3, 2)
    check_rows(again, 20)
    assert torch.cat([b.labels for b in again]).tolist() == list(range(20))
    static = open_data(rows(20), [Input("x", torch.float32, (4, 3))])
    assert static.limited(11).sizes == (4, 4) and static.limited(1).sizes == (4,)


def test_a_spread_is_from_all_over_the_stream():
    data = open_data(rows(320), [X], batch_size=10)
    part = data.spread(100)
    taken = [int(batch.inputs[0][0, 0]) // 30 for batch in part]
    assert part.sizes == (10,) * len(taken) and 90 <= part.samples <= 110
    assert all(b - a <= 4 for a, b in zip([0, *taken], [*taken, 32], strict=True))
    assert data.spread(320) is data and data.spread(1).sizes == (10,)


# ---------------------------------------------------------------- split


@pytest.mark.parametrize("count, size", [(64, 4), (100, 10), (40, 32), (8, 32), (9, 2), (33, 8)])
@pytest.mark.parametrize("seed", [0, 3])
def test_split_shares_no_sample_and_loses_none(count, size, seed):
    statistics, held_out = split(open_data(rows(count), [X], batch_size=size), seed=seed)
    a, b = ({tuple(row) for row in joined(part).tolist()} for part in (statistics, held_out))
    assert not a & b and len(a | b) == count
    assert len(a) == statistics.samples and len(b) == held_out.samples
    assert 0.1 * count <= len(b) <= 0.34 * count
    assert "held out" in held_out.description and "in-sample" not in held_out.description


def test_split_is_chosen_by_the_seed():
    data = open_data(rows(50), [X], batch_size=5)
    held = [joined(split(data, seed=seed)[1]) for seed in (0, 0, 1)]
    assert torch.equal(held[0], held[1]) and not torch.equal(held[0], held[2])
    assert torch.equal(held[0], torch.from_numpy(np.concatenate([rows(50)[:5], rows(50)[25:30]])))


@pytest.mark.parametrize(("count", "held", "seen"), [(1000, 200, 512), (4000, 256, 512), (400, 80, 320)])
def test_statistics_are_of_a_share_of_what_may_be_learned_from(count, held, seen):
    graph = capture(nn.Linear(3, 2), torch.ones(4, 3))
    loaded, options = Loaded(nn.Identity(), Path("net"), ""), Options.of({"calib_limit": 4000})
    parts = streams(graph, [(torch.from_numpy(rows(count)),)], options, loaded, True, {})
    kinds = [
        set(joined(one)[:, 0].tolist())
        for one in (parts.source, parts.rest, parts.statistics, parts.held_out)
    ]
    assert len(kinds[0]) == count and abs(count - len(kinds[1]) - held) <= 48
    assert kinds[2] <= kinds[1] and abs(len(kinds[2]) - seen) <= 32
    assert len(kinds[3]) == 64 and not kinds[3] & kinds[1]


def test_too_few_samples_are_in_sample_and_said_so():
    static = Input("x", torch.float32, (16, 3))
    for data in (open_data(rows(7), [X], batch_size=1), open_data(rows(16), [static])):
        statistics, held_out = split(data)
        assert statistics is held_out and "in-sample" in held_out.description
        assert held_out.facts["held_out"] == "in-sample" and "held_out" not in data.facts
        assert torch.equal(joined(held_out), joined(data))


# ---------------------------------------------------------------- generated data


def test_synthetic_floats_have_the_example_s_mean_and_deviation():
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(2, 3, 8, 8, generator=generator) * 5 + 100
    data = synthetic([IMAGE], (example,), samples=50, seed=1)
    x = joined(data)
    assert data.sizes == (8,) * 6 + (2,) and x.shape == (50, 3, 8, 8) and x.dtype == torch.float32
    assert float(x.mean()) == pytest.approx(float(example.mean()), abs=0.5)
    assert float(x.std()) == pytest.approx(float(example.std()), rel=0.05)
    assert not torch.equal(x[:8], x[8:16])
    assert torch.equal(x, joined(data))
    assert not torch.equal(x, joined(synthetic([IMAGE], (example,), samples=50, seed=2)))
    still = joined(synthetic([IMAGE], (torch.zeros(2, 3, 8, 8),), samples=8))
    assert float(still.std()) == pytest.approx(1, abs=0.1)  # a dummy example has no power to show an error


def test_synthetic_integers_stay_inside_what_they_index():
    example = (torch.tensor([[5, 9, 9], [5, 7, 9]]), torch.tensor([[1, 1, 0], [1, 1, 1]]))
    ids, mask = (
        torch.cat(column) for column in zip(*(b.inputs for b in synthetic(TEXT, example)), strict=True)
    )
    assert set(ids.flatten().tolist()) == {5, 7, 9} and ids.dtype == torch.int64
    assert torch.equal(mask[:4], example[1].repeat(2, 1))
    table = synthetic(TEXT, (torch.zeros(2, 3).long(), example[1]), table_sizes={"batch.input_ids": 11})
    ids = joined(table)
    assert int(ids.max()) == 10 and int(ids.min()) == 0


def test_synthetic_masks_and_other_axes_are_kept():
    inputs = (
        Input("keep", torch.bool, ("batch", 4)),
        Input("added", torch.float32, ("batch", 2)),
        Input("mask", torch.float32, ("batch", 2)),
        Input("static", torch.float32, (5,)),
    )
    keep = torch.tensor([[True, False, True, True], [True] * 4])
    added = torch.tensor([[0.0, float("-inf")], [0.0, 0.0]])
    example = (keep, added, torch.ones(2, 2), torch.randn(5))
    for batch in synthetic(inputs, example, samples=8):
        assert torch.equal(batch.inputs[0], keep.repeat(4, 1))
        assert torch.equal(batch.inputs[1], added.repeat(4, 1))
        assert torch.equal(batch.inputs[2], torch.ones(8, 2))
        assert batch.inputs[3].shape == (5,) and not torch.equal(batch.inputs[3], example[3])


def test_synthetic_keeps_a_static_batch():
    data = synthetic([Input("x", torch.float32, (3, 2))], (torch.randn(3, 2),), samples=8)
    assert data.sizes == (3, 3, 3)


# ---------------------------------------------------------------- --input


@pytest.mark.parametrize(
    "text, expected",
    [
        ("x:f32[?,3,224,224]", Input("x", torch.float32, ("batch", 3, 224, 224))),
        ("f32[1,3]", Input("x", torch.float32, (1, 3))),
        ("batch.ids : i64[ batch , seq ]", Input("batch.ids", torch.int64, ("batch", "seq"))),
        ("img:u8[?,3,?,?]", Input("img", torch.uint8, ("batch", 3, "img_2", "img_3"))),
        ("scale:f64[]", Input("scale", torch.float64, ())),
        ("m:bool[2]", Input("m", torch.bool, (2,))),
        ("h:bf16[2]", Input("h", torch.bfloat16, (2,))),
    ],
)
def test_parse_input(text, expected):
    assert parse_input(text) == expected


@pytest.mark.parametrize(
    "text, match",
    [
        ("x", "not a name, dtype and shape"),
        ("x:f32", "not a name, dtype and shape"),
        ("x:f32[3", "not a name, dtype and shape"),
        ("x:float[3]", "no dtype 'float'"),
        ("x:f32[3,-1]", "'-1' is not a size"),
        ("x:f32[3,,2]", "'' is not a size"),
        ("x:f32[0]", "'0' is not a size"),
    ],
)
def test_a_malformed_input_shows_an_example(text, match):
    with pytest.raises(UsageError, match=match) as caught:
        parse_input(text)
    assert "x:f32[?,3,224,224]" in str(caught.value)


# ---------------------------------------------------------------- images


def test_a_folder_of_images_is_never_guessed_about(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    bad(tmp_path, IMAGE, match="images need --preprocess, which is never guessed: imagenet")
    np.save(tmp_path / "b.npy", rows(2))
    bad(tmp_path, IMAGE, match="images and batch files")


def test_without_pillow_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    (tmp_path / "a.png").write_bytes(b"")
    bad(tmp_path, IMAGE, match="pip install pillow", preprocess="imagenet")


def paint(folder, name: str, value: int, size: tuple[int, int] = (16, 12)) -> None:
    pillow = pytest.importorskip("PIL.Image")
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    pillow.new("RGB", size, (value, value, value)).save(path)


def test_image_folders_give_labels_by_sorted_class_and_all_classes(tmp_path):
    for i in range(6):
        paint(tmp_path, f"cat/{i}.png", 0)
        paint(tmp_path, f"ant/{i}.png", 255)
    data = open_data(tmp_path, [IMAGE], preprocess="imagenet", limit=4, batch_size=2)
    labels = torch.cat([b.labels for b in data])
    assert labels.tolist() == [0, 1, 0, 1]  # not four ants, which come first
    white = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    x = joined(data)
    assert x.shape == (4, 3, 8, 8)
    torch.testing.assert_close(x[0].mean((1, 2)), white)
    assert not torch.allclose(x[1].mean((1, 2)), white)
    used = data.facts["preprocess"]
    assert (used["source"], used["crop"], used["resize"]) == ("imagenet", (8, 8), 9)
    assert "4 of 12 images, 2 classes" in data.description


def test_a_class_without_pictures_is_an_error_where_labels_count(tmp_path):
    for name in ("ant", "cat"):
        paint(tmp_path, f"{name}/0.png", 0)
    (tmp_path / "bee").mkdir()
    (tmp_path / ".cache").mkdir()
    assert open_data(tmp_path, [IMAGE], preprocess="imagenet").samples == 2
    with pytest.raises(DataError, match="bee holds no pictures"):
        evaluator(tmp_path, SimpleNamespace(inputs=[IMAGE]), preprocess="imagenet")


def test_flat_image_folders_have_no_labels_and_are_spread(tmp_path):
    for i in range(10):
        paint(tmp_path, f"{i}.png", i)
    means = []
    config = {"size": {"height": 8, "width": 8}, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    data = open_data(tmp_path, [IMAGE], preprocess=str(tmp_path / "preprocessor_config.json"), limit=5)
    means = [round(float(one.mean()) * 255) for one in joined(data)]
    assert means == [0, 2, 4, 6, 8] and next(iter(data)).labels is None


def test_large_picture_sets_are_decoded_anew_not_kept(tmp_path, monkeypatch):
    for i in range(5):
        paint(tmp_path, f"{i}.png", i * 10)
    monkeypatch.setattr(module, "SPOOL_BYTES", 100)
    monkeypatch.setattr(module, "Spool", None)  # would fail if it were used
    data = open_data(tmp_path, [IMAGE], preprocess="imagenet", batch_size=2)
    assert data.sizes == (2, 2, 1) == tuple(len(b.inputs[0]) for b in data)
    static = Input("x", torch.float32, (2, 3, 8, 8))
    assert open_data(tmp_path, [static], preprocess="imagenet").facts["dropped_samples"] == 1


def test_damaged_images_and_mixed_folders_are_named(tmp_path):
    paint(tmp_path, "cat/a.png", 0)
    (tmp_path / "cat" / "b.png").write_text("no image")
    bad(tmp_path, IMAGE, match=r"b\.png: not a readable image", preprocess="imagenet")
    paint(tmp_path, "c.png", 0)
    bad(tmp_path, IMAGE, match="images beside folders of images", preprocess="imagenet")


def test_resize_and_crop_take_the_middle():
    pillow = pytest.importorskip("PIL.Image")
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[10:30, 30:50] = 255  # the middle 20 x 20
    image = pillow.fromarray(pixels)
    one = Preprocess(
        "test", resize=20, crop=(10, 10), mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="nearest"
    )
    assert one.image(image).shape == (3, 10, 10) and float(one.image(image).mean()) == 1.0
    both = Preprocess("test", resize=(20, 20), mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="nearest")
    assert both.image(image).shape == (3, 20, 20)
    assert float(both.image(image).mean()) == pytest.approx(400 / 3200)
    grey = Preprocess("test", resize=20)
    assert grey.image(image).shape == (1, 20, 40)


def test_a_picture_of_16_bits_is_not_white_and_one_of_floats_is_refused(tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    pillow.fromarray(ramp.astype(np.uint16)).save(tmp_path / "a.png")
    seen = Preprocess("test").sized(opened(tmp_path / "a.png"))[0].numpy()
    np.testing.assert_allclose(seen, ramp / 257, atol=0.5)
    pillow.fromarray(ramp.astype(np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif: its pixels are floats, and what is white is unknown"):
        Preprocess("test").sized(opened(tmp_path / "a.tif"))


def test_the_corner_of_a_crop_is_rounded_as_by_those_who_trained():
    """A column of light at 10 of 21: torchvision takes (21 - 8) / 2 = 6.5 for 6, (23 - 8) / 2 = 7.5 for 8."""
    pillow = pytest.importorskip("PIL.Image")
    for width, nearest, before in ((21, 6, 6), (23, 8, 7)):
        image = pillow.fromarray(np.arange(width, dtype=np.uint8)[None].repeat(8, 0))
        for how, first in ((True, nearest), (False, before)):
            one = Preprocess("test", crop=(8, 8), nearest=how)
            assert one.sized(image)[0, 0].tolist() == list(range(first, first + 8))


def test_a_size_that_is_covered_keeps_the_ratio_of_sides():
    pillow = pytest.importorskip("PIL.Image")
    one = Preprocess("test", resize=(20, 30), covers=True)
    for size, made in (((60, 60), (30, 30)), ((80, 20), (80, 20)), ((20, 80), (30, 120))):
        assert one.sized(pillow.new("L", size)).shape == (1, *made[::-1])


def config(folder, **content):
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    return preprocessing(str(path), None)


MEAN = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def test_timm_configs(tmp_path):
    fields = {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.2] * 3, "interpolation": "bicubic"}
    one = config(tmp_path, pretrained_cfg={**fields, "crop_pct": 0.9})
    assert (one.resize, one.crop, one.interpolation, one.mean) == (248, (224, 224), "bicubic", (0.5,) * 3)
    assert config(tmp_path, **fields, crop_pct=1.0, crop_mode="squash").resize == (224, 224)
    wide = config(tmp_path, **{**fields, "input_size": [3, 32, 48]}, crop_pct=0.9)
    assert (wide.resize, wide.crop, wide.covers) == ((35, 53), (32, 48), True)
    with pytest.raises(DataError, match="crop_mode border"):
        config(tmp_path, **fields, crop_mode="border")


def test_hugging_face_configs(tmp_path):
    vit = config(tmp_path, size=224, resample=2, **MEAN)
    assert (vit.resize, vit.crop, vit.interpolation) == ((224, 224), None, "bilinear")
    clip = config(
        tmp_path, size={"shortest_edge": 224}, crop_size=224, do_center_crop=True, resample=3, **MEAN
    )
    assert (clip.resize, clip.crop, clip.interpolation) == (224, (224, 224), "bicubic")
    convnext = config(tmp_path, size={"shortest_edge": 224}, crop_pct=0.875, **MEAN)
    assert (convnext.resize, convnext.crop) == (256, (224, 224))
    large = config(tmp_path, size={"shortest_edge": 384}, crop_pct=1.0, **MEAN)
    assert (large.resize, large.crop) == ((384, 384), None)
    plain = config(tmp_path, do_normalize=False, do_rescale=False, **MEAN)
    assert (plain.scale, plain.mean, plain.std) == (1.0, (0.0,) * 3, (1.0,) * 3)
    for field, match in (("do_pad", "does do_pad"), ("do_thumbnail", "does do_thumbnail")):
        with pytest.raises(DataError, match=match):
            config(tmp_path, **{field: True}, **MEAN)
    with pytest.raises(DataError, match="no image_mean"):
        config(tmp_path, hidden_size=768)


def test_image_processors_that_have_steps_of_their_own(tmp_path):
    """What transformers does with these configs, of which some keys do not tell. Compared with its own processors."""
    fields = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2]}
    top = config(tmp_path, image_processor_type="EfficientNetImageProcessor", size=32, **fields)
    assert top.mean == (0.5, 0.4, 0.3) and top.std == pytest.approx((0.25, 0.0625, 0.04))
    features = config(
        tmp_path, feature_extractor_type="EfficientNetFeatureExtractor", include_top=False, **fields
    )
    assert features.std == (0.5, 0.25, 0.2)
    mobile = config(
        tmp_path, image_processor_type="MobileViTImageProcessorFast", size=32, do_flip_channel_order=True
    )
    assert (mobile.mean, mobile.std, mobile.reverse) == ((0.0,) * 3, (1.0,) * 3, True)
    levit = config(
        tmp_path, image_processor_type="LevitImageProcessor", size={"shortest_edge": 224}, crop_size=224,
        do_center_crop=True, **fields,
    )  # fmt: skip
    assert (levit.resize, levit.crop) == (256, (224, 224))
    for content, match in (
        ({"image_processor_type": "PerceiverImageProcessor"}, "another image processor .perceiver"),
        (
            {"image_processor_type": "DPTImageProcessor", "keep_aspect_ratio": True},
            "keeps the ratio of sides",
        ),
        ({"image_processor_type": "DPTImageProcessor", "ensure_multiple_of": 32}, "keeps the ratio of sides"),
    ):
        with pytest.raises(DataError, match=match):
            config(tmp_path, **content, **fields)


def test_blue_first_and_normalisation_of_pixel_arrays():
    one = Preprocess("test", mean=(0.0, 0.5, 0.0), std=(1.0, 0.5, 1.0), reverse=True)
    pixels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    pixels[:, 0] = 255
    assert one.pixels(pixels)[0, :, 0, 0].tolist() == [0.0, -1.0, 1.0]
    data = open_data(pixels, [IMAGE], preprocess="imagenet")
    assert joined(data).dtype == torch.float32
    assert "crop" not in data.facts["preprocess"]  # nothing was cropped
    bad(pixels.float(), IMAGE, match="takes pixels 0..255 as uint8, these are f32", preprocess="imagenet")
    bad(pixels.permute(0, 2, 3, 1), IMAGE, match="normalises 3 channels", preprocess="imagenet")


def halved(batch):
    return batch.float() / 2


def test_preprocessing_by_a_function(tmp_path, monkeypatch):
    pixels = torch.full((2, 3, 8, 8), 8, dtype=torch.uint8)
    (tmp_path / "my_own_steps.py").write_text("def halve(x):\n    return x.float() / 2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for how, name in ((halved, "halved"), ("my_own_steps:halve", "my_own_steps:halve")):
        data = open_data(pixels, [IMAGE], preprocess=how)
        assert float(joined(data).mean()) == 4.0 and data.facts["preprocess"] == {"source": name}
    assert sys.path[-1] == str(tmp_path)  # behind everything that is installed
    bad(pixels, IMAGE, match="returned a str", preprocess=lambda x: "x")
    for spec, match in (
        ("my_own_steps:none", "none"),
        ("no_module:f", "no_module"),
        ("what", "expected imagenet"),
    ):
        with pytest.raises(UsageError, match=match):
            preprocessing(spec, None)
    assert isinstance(preprocessing("my_own_steps:halve", None), Custom)


# ---------------------------------------------------------------- metrics


class _Model:
    """A graph as far as an evaluator looks: returns what it takes."""

    inputs = (X,)

    def run(self, *inputs):
        return inputs


def test_top1_over_uneven_batches_is_the_share_of_all_samples():
    x = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1, 2, 0, 1, 2, 0]]
    y = np.array([0, 1, 2, 0, 1, 2, 0, 1, 0, 1])  # the last two are wrong
    one = evaluator({"x": x, "y": y.astype(np.uint8)}, _Model())
    assert one.name == "top1" and one.of_graph(_Model()) == {"top1": pytest.approx(0.8)}
    uneven = [(x[:9], y[:9]), (x[9:], y[9:])]
    data = Data(
        lambda: [Batch((torch.from_numpy(a),), torch.from_numpy(b)) for a, b in uneven], (9, 1), "test"
    )
    assert Evaluator("top1", data).of(_Model().run) == {"top1": pytest.approx(0.8)}  # 0.44 by batches
    assert one.of(lambda x: (x.flip(1),)) != {"top1": pytest.approx(0.8)}


def test_cosine_with_vectors_as_labels():
    one = evaluator((rows(4) + 1, rows(4) + 1), _Model())
    assert one.of_graph(_Model())["cosine"] == pytest.approx(1)
    assert one.of(lambda x: (-x,))["cosine"] == pytest.approx(-1)


def test_a_metric_by_a_function(tmp_path, monkeypatch):
    (tmp_path / "my_own_metric.py").write_text(
        "import torch\n"
        "def total(run):\n    return run(torch.ones(2, 3))[0].sum()\n"
        "def several(run):\n    return {'a': 1, 'b': 2.5}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert evaluator("my_own_metric:total", _Model()).of_graph(_Model()) == {"total": 6.0}
    assert evaluator("my_own_metric:several", _Model()).of_graph(_Model()) == {"a": 1.0, "b": 2.5}
    with pytest.raises(UsageError, match="--eval my_own_metric:absent"):
        evaluator("my_own_metric:absent", _Model())


def test_metrics_say_what_they_need():
    with pytest.raises(DataError, match="evaluation needs labels; add an array named y"):
        evaluator(rows(4), _Model())
    outputs, batch = (torch.zeros(4, 3),), Batch((), torch.zeros(5))
    for name, match in (("top1", r"labels \[n\], not \[4, 3\], \[5\]"), ("cosine", "labels like the output")):
        with pytest.raises(DataError, match=match):
            metric(outputs, batch, name)
    for wrong in (-1, 3):
        with pytest.raises(DataError, match=f"the label {wrong}, and the model's classes are 0 to 2"):
            metric(outputs, Batch((), torch.tensor([0, 1, wrong, 2])), "top1")
    assert metric(outputs, Batch((), torch.tensor([0, 1, 2, 2])), "top1") == (0.25, 4)
    with pytest.raises(DataError, match="have none"):
        metric(outputs, Batch(()), "top1")
    classes = torch.tensor([[0, 1, 255], [2, -100, 1]])
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 1, 1], [1, 1, 1]]), 3).float()
    maps = logits.transpose(1, 2)[..., None].expand(-1, -1, -1, 2)
    assert metric((maps,), Batch((), classes[..., None].expand(-1, -1, 2)), "top1") == (0.75, 8)
    assert metric((logits[:, :2],), Batch((), classes[:, :2]), "top1") == (pytest.approx(2 / 3), 3)
    with pytest.raises(DataError, match="axis 1 or the last one"):
        metric((logits,), Batch((), classes), "top1")
    with pytest.raises(DataError, match="the label 9"):
        metric((maps,), Batch((), classes[..., None].expand(-1, -1, 2).clip(max=9)), "top1")
    for labels in (torch.rand(4), torch.arange(4.0)[:, None]):
        with pytest.raises(DataError, match="a label is one number here"):
            evaluator({"x": torch.randn(4, 3), "y": labels}, _Model())
    with pytest.raises(UsageError, match="no metric 'f1'; there are top1 and cosine"):
        metric(outputs, batch, "f1")
