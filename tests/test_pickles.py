"""Checkpoints read as data: every tensor to the bit, in every layout, and nothing in the file runs.

Every bomb is shown to be live: plain `pickle.loads` of the same bytes does what the attacker wanted.
"""

import io
import os
import pathlib
import pickle
import struct
import time
import tracemalloc
import zipfile
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from torch import nn

from compressor import pickles
from compressor.checkpoint import contents, module_weights
from compressor.errors import FileError
from compressor.unpickle import Record

FLOAT8 = torch.float8_e4m3fn


def tensors():
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "plain": base,
        "transposed": base.t(),
        "strided": base[1::2, ::3],
        "expanded": torch.tensor([1.5]).expand(5),
        "scalar": torch.tensor(3.25),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(3).half(),
        "bfloat16": torch.randn(3).bfloat16(),
        "float8": torch.randn(4).to(FLOAT8),
        "bool": torch.tensor([True, False]),
        "long": torch.tensor([1 << 40, -1]),
        "complex": torch.randn(2, dtype=torch.complex64),
        "parameter": nn.Parameter(torch.randn(2, 2)),
        "buffer": nn.Buffer(torch.randn(2)),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }


def same(found, expected):
    assert (
        found.dtype == expected.dtype
        and found.shape == expected.shape
        and found.stride() == expected.stride()
    )
    view = torch.uint8 if expected.dtype == FLOAT8 else expected.dtype
    assert torch.equal(found.view(view), expected.detach().view(view))


def write(path, value, layout, protocol=2):
    if layout == "pickle":
        path.write_bytes(pickle.dumps(value, protocol))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=layout == "zip", pickle_protocol=protocol)
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("layout", ["zip", "legacy", "pickle"])
def test_every_tensor_to_the_bit(tmp_path, layout, protocol):
    value = {
        "weights": tensors(),
        "epoch": 3,
        "names": {0: "cat", 1: "dog"},
        "more": [1.5, None, True, "é", b"\0\xff", (1,)],
    }
    if layout != "zip":
        del value["weights"]["float8"]  # has no storage class, so that the old layouts cannot hold it
    found = pickles.read(write(tmp_path / "file.pt", value, layout, protocol))
    for name, expected in value["weights"].items():
        same(found["weights"][name], expected)
    assert {key: found[key] for key in ("epoch", "names", "more")} == {
        key: value[key] for key in ("epoch", "names", "more")
    }


@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_shared_storages_stay_shared(tmp_path, layout):
    base = torch.randn(10)
    found = pickles.read(write(tmp_path / "file.pt", {"a": base, "b": base[5:], "c": base.clone()}, layout))
    found["a"][7] = 42.0
    assert found["b"][2] == 42.0 and found["c"][7] != 42.0
    assert pickles.read(tmp_path / "file.pt")["a"][7] != 42.0  # the file itself is not written to


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_numpy_arrays_and_scalars(tmp_path, protocol):
    arrays = {
        "c": np.arange(6.0).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big_endian": np.arange(4, dtype=">i4"),
        "byte": np.arange(3, dtype="u1"),
        "bool": np.array([True, False]),
        "empty": np.zeros((0, 2), np.float32),
    }
    value = {
        "arrays": arrays,
        "scalar": np.float32(1.5),
        "text": np.array(["a", "b"]),
        "objects": np.array([None, 1]),
    }
    found = pickles.read(write(tmp_path / "file.pt", value, "pickle", protocol))
    for name, expected in arrays.items():
        assert np.array_equal(pickles.to_tensor(found["arrays"][name]).numpy(), expected), name
    assert found["scalar"] == 1.5
    assert pickles.to_tensor(found["text"]) is None and pickles.to_tensor(found["objects"]) is None


class Child(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.scale = nn.Parameter(torch.rand(3).half())
        self.register_buffer("kept", torch.arange(3))
        self.register_buffer("scratch", torch.arange(4), persistent=False)
        self.register_parameter("absent", None)


def test_whole_modules_give_their_state_dict(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(Child(), nn.ModuleDict({"a b": Child()}), nn.Linear(3, 3))
    module.append(module[0])
    expected = module.state_dict()
    for layout in ("zip", "legacy", "pickle"):
        record = pickles.read(write(tmp_path / "file.pt", module, layout))
        found = module_weights(record)
        assert isinstance(record, Record) and sorted(found) == sorted(expected) and "0.scratch" not in found
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert found["0.linear.weight"].data_ptr() == found["3.linear.weight"].data_ptr()
        assert contents(record, "x").kind == "a whole module, torch.nn.modules.container.Sequential"


def test_containers_and_strangers(tmp_path):
    value = {
        "ordered": OrderedDict(x=1),
        "default": defaultdict(list, x=[1]),
        "set": {1, 2},
        "frozen": frozenset([3]),
    }
    value |= {
        "path": pathlib.PurePosixPath("p"),
        "size": torch.Size([1, 2]),
        "array": bytearray(b"x"),
        "range": range(3),
    }
    for protocol in (2, 5):
        found = pickles.read(write(tmp_path / "file.pkl", value, "pickle", protocol))
        assert found["ordered"] == {"x": 1} and found["default"] == {"x": [1]}
        assert (
            found["set"] == {1, 2}
            and found["frozen"] == {3}
            and found["size"] == (1, 2)
            and found["array"] == b"x"
        )
        assert found["path"].path.endswith("PurePosixPath") and found["range"].args == (0, 3, 1)


# ---- bombs ----


class Reduce:
    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def by_hand(mark):
    """The same call, spelt with other instructions than Python's own pickler uses."""
    path, mkdir, function = f"V{mark}\n".encode(), b"cposix\nmkdir\n", b"cbuiltins\n"
    lazy = (
        function + b"map\n(" + mkdir + b"(" + path + b"lt\x81"
    )  # map(mkdir, [path]): runs when it is listed
    return {
        "global": mkdir + b"(" + path + b"tR.",
        "inst": b"(" + path + b"iposix\nmkdir\n.",
        "obj": b"(cposix\nmkdir\n" + path + b"o.",
        "stack_global": b"\x80\x04\x8c\x05posix\x8c\x05mkdir\x93(" + path + b"tR.",
        "newobj": b"\x80\x02" + function + b"list\n(" + lazy + b"tR.",
        "memo": mkdir + b"p7\n0g7\n(" + path + b"tR.",
        "getattr": function + b"getattr\n(" + mkdir + b"V__call__\ntR(" + path + b"tR.",
        "hidden": b"](" + mkdir + b"(" + path + b"tRe0N.",
    }


def bombs(mark):
    code = f"__import__('os').mkdir({str(mark)!r})"
    yield "os.mkdir", pickle.dumps({"state_dict": {"w": torch.ones(2)}, "x": Reduce(os.mkdir, str(mark))})
    yield "exec", pickle.dumps(Reduce(exec, code))
    yield "eval", pickle.dumps([Reduce(eval, code)], 2)
    yield "nested", pickle.dumps(Reduce(pickle.loads, pickle.dumps(Reduce(os.mkdir, str(mark)))))
    yield from by_hand(mark).items()


NAMES = [name for name, _ in bombs("x")]


def as_zip(raw):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", raw)
        archive.writestr("archive/version", b"3\n")
    return buffer.getvalue()


def as_legacy(raw):
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    return b"".join(pickle.dumps(item, 2) for item in head) + raw + pickle.dumps([], 2)


@pytest.mark.parametrize("wrap", [bytes, as_zip, as_legacy], ids=["pickle", "zip", "legacy"])
@pytest.mark.parametrize("name", NAMES)
def test_bomb_is_live_and_does_not_fire(tmp_path, name, wrap):
    mark = tmp_path / "mark"
    raw = dict(bombs(mark))[name]
    path = tmp_path / "bomb.pt"
    path.write_bytes(wrap(raw))
    pickles.read(path)
    assert not mark.exists()
    pickle.loads(raw)
    assert mark.is_dir()


def test_bomb_in_torch_save(tmp_path):
    mark = tmp_path / "mark"
    path = tmp_path / "bomb.pt"
    torch.save({"w": torch.arange(3.0), "x": Reduce(os.mkdir, str(mark))}, path)
    found = pickles.read(path)
    assert (
        torch.equal(found["w"], torch.arange(3.0))
        and found["x"].path == "posix.mkdir"
        and found["x"].args == (str(mark),)
    )
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.is_dir()


def test_named_classes_are_not_imported(tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    (tmp_path / "importing_fires.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass A: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    raw = b"cimporting_fires\nA\n)\x81."
    path = tmp_path / "file.pkl"
    path.write_bytes(b"\x80\x02" + raw)
    assert pickles.read(path).path == "importing_fires.A" and not mark.exists()
    pickle.loads(b"\x80\x02" + raw)
    assert mark.is_dir()


def copies(count):
    """One list of `count` items, copied `count` times."""
    items = b"](" + b"K\x01" * count + b"eq\0"
    return b"\x80\x02" + items + b"(" + b"cbuiltins\nlist\nh\0\x85R" * count + b"l."


GREEDY = {
    "memo index": b"\x80\x02Nr\xff\xff\xff\xff.",
    "bytes length": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 45) + b"x.",
    "bytearray length": b"\x80\x05\x96" + struct.pack("<Q", 1 << 45) + b"x.",
    "text length": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 45) + b"x.",
    "long length": b"\x80\x02\x8b" + struct.pack("<i", (1 << 31) - 1) + b"x.",
    "list copies": copies(20_000),
    "key depth": b"\x80\x02})" + b"\x85" * 50_000 + b"K\x01s.",
    "unhashable key": b"\x80\x02}]K\x01s.",
    "stack underflow": b"\x80\x02R.",
    "no mark": b"\x80\x02t.",
    "unknown memo": b"\x80\x02h\x05.",
    "unknown instruction": b"\x80\x02\xff.",
    "extension": b"\x80\x02\x82\x01.",
    "never stops": b"\x80\x02NNN",
    "import of numbers": b"\x80\x04K\x01K\x02\x93.",
    "outside": b"\x80\x02X\x01\0\0\0aQ.",
}


@pytest.mark.parametrize("name", [name for name in GREEDY if name != "memo index"])
@pytest.mark.parametrize("wrap", [bytes, as_zip], ids=["pickle", "zip"])
def test_greedy_or_broken_pickle(tmp_path, name, wrap):
    path = tmp_path / "bomb.pt"
    path.write_bytes(wrap(GREEDY[name]))
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(FileError) as info:
        pickles.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(info.value) and str(info.value).startswith("bomb.pt is ")
    assert peak < 1 << 26 and time.perf_counter() - start < 5


def test_big_memo_index_costs_nothing(tmp_path):
    path = tmp_path / "bomb.pt"
    path.write_bytes(GREEDY["memo index"])
    tracemalloc.start()
    assert pickles.read(path) is None
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_deep_and_shared_structures(tmp_path):
    """A list in a list in a list ..., and lists that hold the one before them twice: 2 to the 60 leaves."""
    deep = tmp_path / "deep.pt"
    deep.write_bytes(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    with pytest.raises(FileError, match="no weights"):
        contents(pickles.read(deep), "deep.pt")
    laughs: dict = {}
    for _ in range(60):
        laughs = {"a": laughs, "b": laughs}
    path = write(tmp_path / "laughs.pt", laughs, "pickle")
    with pytest.raises(FileError, match="no weights"):
        contents(pickles.read(path), "laughs.pt")


def test_module_that_contains_itself(tmp_path):
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(1))
    module._modules["again"] = module
    with pytest.raises(FileError, match="contains itself"):
        contents(pickles.read(write(tmp_path / "file.pt", module, "pickle")), "file.pt")


# ---- damage ----


def edited(path, change):
    """The zip checkpoint with another data.pkl."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, change(name, content))
    path.write_bytes(buffer.getvalue())
    return path


@pytest.mark.parametrize(
    "old, new, message",
    [
        (b"K\x00K\x02K\x03\x86", b"K\x09K\x02K\x03\x86", "reaches beyond its storage"),
        (b"K\x00K\x02K\x03\x86", b"K\x00K\x02J\xff\xff\xff\x7f\x86", "reaches beyond its storage"),
        (b"K\x00K\x02K\x03\x86", b"K\x00K\x02J\xff\xff\xff\xff\x86", "impossible shape"),
        (b"K\x00K\x02K\x03\x86", b"K\x00K\x02X\x01\0\0\0a\x86", "impossible shape"),
        (b"K\x06t", b"K\x07t", "shorter than it says"),
    ],
)
def test_tensor_that_lies(tmp_path, old, new, message):
    path = write(tmp_path / "file.pt", {"w": torch.arange(6.0).reshape(2, 3)}, "zip")
    edited(path, lambda name, content: content.replace(old, new))
    with pytest.raises(FileError, match=message):
        pickles.read(path)


@pytest.mark.parametrize("layout", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("share", [0.02, 0.4, 0.8, 0.98])
def test_truncated(tmp_path, layout, share):
    path = write(tmp_path / "file.pt", tensors() if layout == "zip" else {"w": torch.randn(50, 50)}, layout)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(FileError, match=r"file\.pt is damaged"):
        pickles.read(path)


def test_flipped_weight(tmp_path):
    weight = torch.randn(8, 8)
    path = write(tmp_path / "file.pt", {"w": weight}, "zip")
    data = bytearray(path.read_bytes())
    data[data.index(weight.numpy().tobytes()) + 2] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(FileError, match="checksum"):
        pickles.read(path)
    assert not torch.equal(torch.load(path)["w"], weight)  # torch itself says nothing


def test_other_byte_order(tmp_path):
    path = write(tmp_path / "file.pt", {"w": torch.ones(2)}, "zip")
    edited(path, lambda name, content: b"big" if name.endswith("byteorder") else content)
    with pytest.raises(FileError, match="other byte order"):
        pickles.read(path)


@pytest.mark.filterwarnings("ignore")
def test_torchscript(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "script.pt")
    with pytest.raises(FileError, match=r"TorchScript.*torch\.export\.save"):
        pickles.read(tmp_path / "script.pt")
