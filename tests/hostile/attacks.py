"""Files that somebody made on purpose: to run code, to read or write where they should not, to take all memory.

Each attack writes its files to a folder and answers the words of a command that reads them. `mark` is what its code
would make; `secret` a file outside of the folder.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import honest
import numpy as np
import torch
from mutations import zipped
from sandbox import MODULE

PLAIN = honest.PLAIN


@dataclass(frozen=True)
class Place:
    """Where an attack is made: its folder, honest models, what its code would make, what it must not read."""

    files: Path
    models: Path
    mark: Path
    secret: Path


Attack = Callable[[Place], tuple[str, ...]]
ATTACKS: dict[str, Attack] = {}


def attack(function: Attack) -> Attack:
    ATTACKS[function.__name__] = function
    return function


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.mark),)


class Nested:
    """Unpickling it calls torch.load on a pickle of its own, without restrictions."""

    def __init__(self, mark: Path) -> None:
        self.inner = honest.torch_bytes(Bomb(mark))

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.inner,)


def _model_folder(place: Place, **files: bytes) -> None:
    for path in (place.models / "bert").iterdir():
        (place.files / path.name).write_bytes(path.read_bytes())
    for name, content in files.items():
        (place.files / name).write_bytes(content)


def _settings(place: Place, name: str, **changes: object) -> None:
    path = place.files / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -------------------------------------------------------------------- code in data


def _objects(place: Place) -> np.ndarray:
    array = np.empty(2, object)
    array[:] = [Bomb(place.mark), Nested(place.mark)]
    return array


@attack
def npy_of_objects(place: Place) -> tuple[str, ...]:
    np.save(place.files / "data.npy", _objects(place), allow_pickle=True)
    return (f"data:{place.files / 'data.npy'}",)


@attack
def npz_of_objects(place: Place) -> tuple[str, ...]:
    np.savez(place.files / "data.npz", x=_objects(place))
    return (f"data:{place.files / 'data.npz'}",)


@attack
def npz_with_a_pickle_for_a_member(place: Place) -> tuple[str, ...]:
    (place.files / "data.npz").write_bytes(
        zipped([("x.npy", pickle.dumps(Bomb(place.mark))), ("y.pkl", pickle.dumps(Bomb(place.mark)))])
    )
    return (f"data:{place.files / 'data.npz'}",)


@attack
def tensors_with_a_bomb_between(place: Place) -> tuple[str, ...]:
    torch.save({"x": honest.rows(), "more": [Nested(place.mark), Bomb(place.mark)]}, place.files / "data.pt")
    return (f"data:{place.files / 'data.pt'}",)


@attack
def tensors_in_a_legacy_file_with_a_bomb(place: Place) -> tuple[str, ...]:
    torch.save(
        {"x": honest.rows(), "more": Bomb(place.mark)},
        place.files / "data.pth",
        _use_new_zipfile_serialization=False,
    )
    return (f"data:{place.files / 'data.pth'}",)


@attack
def checkpoint_that_loads_another(place: Place) -> tuple[str, ...]:
    torch.save(
        {"state_dict": honest.network().state_dict(), "hyper": Nested(place.mark)}, place.files / "net.pt"
    )
    return (
        str(place.files / "net.pt"),
        "--model",
        f"{place.models / 'factory.py'}:make",
        "--input",
        "x:f32[?,3,8,8]",
        *PLAIN,
    )


@attack
def parquet_with_a_pickled_type(place: Place) -> tuple[str, ...]:
    import pyarrow
    from pyarrow import parquet

    meta = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Bomb(place.mark)),
    }
    field = pyarrow.field("text", pyarrow.string(), metadata=meta)
    parquet.write_table(
        pyarrow.table({"text": ["one", "two"]}, schema=pyarrow.schema([field])), place.files / "texts.parquet"
    )
    return (f"data:{place.files / 'texts.parquet'}",)


# -------------------------------------------------------------------- code in model folders


@attack
def folder_with_a_pickle_for_weights(place: Place) -> tuple[str, ...]:
    _model_folder(place)
    (place.files / "model.safetensors").unlink()
    torch.save(
        {"x": Bomb(place.mark), "classifier.weight": torch.ones(2, 16)}, place.files / "pytorch_model.bin"
    )
    return (str(place.files), *PLAIN)


@attack
def folder_with_pickles_that_nobody_asked_for(place: Place) -> tuple[str, ...]:
    _model_folder(place)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "adapter_model.bin"):
        torch.save(Bomb(place.mark), place.files / name)
    return ("inspect", str(place.files))


@attack
def folder_with_code_of_its_own(place: Place) -> tuple[str, ...]:
    code = f"import os\nos.mkdir({str(place.mark)!r})\nclass Evil: pass\n".encode()
    _model_folder(
        place, **{"modeling_evil.py": code, "configuration_evil.py": code, "tokenization_evil.py": code}
    )
    classes = {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModelForSequenceClassification": "modeling_evil.Evil",
    }
    _settings(place, "config.json", auto_map=classes, model_type="evil")
    return (str(place.files), *PLAIN)


@attack
def tokenizer_with_code_of_its_own(place: Place) -> tuple[str, ...]:
    code = f"import os\nos.mkdir({str(place.mark)!r})\nclass Evil: pass\n".encode()
    _model_folder(place, **{"tokenization_evil.py": code, "texts.txt": b"one\ntwo\n" * 4})
    _settings(
        place,
        "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]},
        tokenizer_class="Evil",
    )
    return (f"data:{place.files / 'texts.txt'}",)


@attack
def pipeline_that_names_a_module(place: Place) -> tuple[str, ...]:
    _model_folder(place)
    stages = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Evil", "type": f"{MODULE}.Evil"},
    ]
    (place.files / "modules.json").write_text(json.dumps(stages))
    (place.files / "1_Evil").mkdir()
    (place.files / "1_Evil" / "config.json").write_text("{}")
    return (str(place.files), *PLAIN)


@attack
def adapter_that_names_a_module(place: Place) -> tuple[str, ...]:
    settings = {
        "auto_mapping": {"base_model_class": "Evil", "parent_library": MODULE},
        "target_modules": ["query"],
    }
    honest.written(honest.Kind(honest.lora(settings), ()), place.files)
    return (str(place.models / "bert"), "--adapter", str(place.files), *PLAIN)


@attack
def adapter_as_a_pickle(place: Place) -> tuple[str, ...]:
    (place.files / "adapter_config.json").write_bytes(honest.lora()["adapter_config.json"])
    torch.save({"x": Bomb(place.mark)}, place.files / "adapter_model.bin")
    return (str(place.models / "bert"), "--adapter", str(place.files), *PLAIN)


@attack
def attention_that_is_fetched(place: Place) -> tuple[str, ...]:
    _model_folder(place)
    _settings(
        place,
        "config.json",
        _attn_implementation="kernels-community/evil",
        attn_implementation="kernels-community/evil",
    )
    return (str(place.files), *PLAIN)


# -------------------------------------------------------------------- paths that lead outside


@attack
def index_that_leads_outside(place: Place) -> tuple[str, ...]:
    _model_folder(place)
    (place.files / "model.safetensors").unlink()
    table = {
        "weight_map": {"classifier.weight": f"../{place.secret.name}", "classifier.bias": str(place.secret)}
    }
    (place.files / "model.safetensors.index.json").write_text(json.dumps(table))
    return (str(place.files), *PLAIN)


@attack
def archive_whose_members_lead_outside(place: Place) -> tuple[str, ...]:
    whole = honest.torch_bytes(honest.network().state_dict())
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    outside = [("archive/../../escaped", b"x"), ("/" + str(place.mark).lstrip("/"), b"x")]
    (place.files / "net.pt").write_bytes(zipped([*members, *outside]))
    return ("inspect", str(place.files / "net.pt"))


@attack
def program_whose_members_lead_outside(place: Place) -> tuple[str, ...]:
    whole = (place.models / "net.pt2").read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    root = members[0][0].split("/")[0]
    (place.files / "net.pt2").write_bytes(zipped([*members, (f"{root}/extra/../../../escaped", b"x")]))
    return ("inspect", str(place.files / "net.pt2"))


def _external(place: Place, **changes: str) -> tuple[str, ...]:
    import onnx

    made = honest.onnx_bytes(external=True)
    model = onnx.ModelProto.FromString(made["model.onnx"])
    (place.files / "model.onnx.data").write_bytes(made["model.onnx.data"])
    stored = model.graph.initializer[0].external_data
    entries = {entry.key: entry.value for entry in stored} | changes
    del stored[:]
    for key, value in entries.items():
        stored.add(key=key, value=value)
    (place.files / "model.onnx").write_bytes(model.SerializeToString())
    return ("verify", str(place.models / "relu.pt2"), str(place.files / "model.onnx"))


@attack
def weights_above_the_folder(place: Place) -> tuple[str, ...]:
    return _external(place, location=f"../{place.secret.name}")


@attack
def weights_at_an_absolute_path(place: Place) -> tuple[str, ...]:
    return _external(place, location=str(place.secret))


@attack
def weights_behind_a_link(place: Place) -> tuple[str, ...]:
    (place.files / "weights.bin").symlink_to(place.secret)
    return _external(place, location="weights.bin")


@attack
def weights_of_a_device(place: Place) -> tuple[str, ...]:
    return _external(place, location="/dev/zero", length=str(1 << 40))


@attack
def weights_before_their_file(place: Place) -> tuple[str, ...]:
    return _external(place, offset="-4096")


@attack
def weights_longer_than_their_file(place: Place) -> tuple[str, ...]:
    return _external(place, length=str(1 << 40))


@attack
def report_of_a_file_elsewhere(place: Place) -> tuple[str, ...]:
    from sample_report import sample_report

    report = sample_report() | {"emitted": {"file": f"../../{place.secret.name}"}}
    (place.files / "report.json").write_text(json.dumps(report))
    return ("inspect", str(place.files / "report.json"), "--partitions", "all")


@attack
def report_of_other_types(place: Place) -> tuple[str, ...]:
    from sample_report import sample_report

    report = sample_report()
    report["rows"][1] |= {"checks": [{"sqnr_db": "?"}], "rewrites": 1.5, "params": "many"}
    (place.files / "report.json").write_text(json.dumps(report))
    return ("inspect", str(place.files / "report.json"))


@attack
def report_with_a_table_of_words(place: Place) -> tuple[str, ...]:
    from sample_report import sample_report

    report = sample_report() | {"latency_table": {"x": ["fast"]}}
    (place.files / "report.json").write_text(json.dumps(report))
    return (str(place.models / "net.pt2"), "--latency-table", str(place.files / "report.json"), *PLAIN)


@attack
def report_nested_without_end(place: Place) -> tuple[str, ...]:
    (place.files / "report.json").write_text("[" * 100_000)
    return ("inspect", str(place.files / "report.json"))


@attack
def pictures_of_enormous_sides(place: Place) -> tuple[str, ...]:
    sides = {"height": 1 << 40, "width": 1 << 40}
    (place.files / "preprocessor_config.json").write_text(json.dumps(honest.PICTURES | {"size": sides}))
    how = str(place.files / "preprocessor_config.json")
    return (
        str(place.models / "net.pt2"),
        "--preprocess",
        how,
        "--calib",
        str(place.models / "pictures"),
        *PLAIN,
    )


@attack
def npy_header_that_never_closes(place: Place) -> tuple[str, ...]:
    text = (b"(" * 100).ljust(117) + b"\n"
    (place.files / "data.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)
    return (f"data:{place.files / 'data.npy'}",)


# -------------------------------------------------------------------- more than there is


def _npz(place: Place, header: bytes, size: int) -> tuple[str, ...]:
    """A .npz that decompresses to `size` zeros behind a header."""
    text = b"\x93NUMPY\x01\x00" + struct.pack("<H", 119) + header.ljust(118) + b"\n"
    block, pack = bytes(1 << 20), zlib.compressobj(9, wbits=-15)
    packed = pack.compress(text) + pack.flush(zlib.Z_FULL_FLUSH)
    packed += (pack.compress(block) + pack.flush(zlib.Z_FULL_FLUSH)) * (size >> 20) + pack.flush()
    checksum = zlib.crc32(text)
    for _ in range(size >> 20):
        checksum = zlib.crc32(block, checksum)
    whole, name = (size >> 20 << 20) + len(text), b"x.npy"
    common = struct.pack("<5H3L2H", 20, 0, 8, 0, 0, checksum, len(packed), whole, len(name), 0)
    local = b"PK\x03\x04" + common + name + packed
    central = b"PK\x01\x02" + struct.pack("<H", 20) + common + struct.pack("<3H2L", 0, 0, 0, 0, 0) + name
    end = b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 1, 1, len(central), len(local), 0)
    (place.files / "data.npz").write_bytes(local + central + end)
    return (f"data:{place.files / 'data.npz'}",)


SIZE = 2_040_109_465  # more than a job may take: 1.9 GB


@attack
def npz_that_unpacks_without_end(place: Place) -> tuple[str, ...]:
    rows = SIZE // (3 * 8 * 8 * 4)
    return _npz(place, b"{'descr': '<f4', 'fortran_order': False, 'shape': (%d, 3, 8, 8), }" % rows, SIZE)


@attack
def npz_in_columns_that_unpacks_without_end(place: Place) -> tuple[str, ...]:
    rows = SIZE // (3 * 8 * 8 * 4)
    return _npz(place, b"{'descr': '<f4', 'fortran_order': True, 'shape': (%d, 3, 8, 8), }" % rows, SIZE)


@attack
def npz_of_one_enormous_row(place: Place) -> tuple[str, ...]:
    return _npz(
        place, b"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 3, %d, 8), }" % (SIZE // 96), SIZE
    )


@attack
def compressed_checkpoint(place: Place) -> tuple[str, ...]:
    members = [("archive/data.pkl", b"\0" * (64 << 20)), ("archive/version", b"3\n")]
    (place.files / "net.pt").write_bytes(zipped(members, zipfile.ZIP_DEFLATED))
    return ("inspect", str(place.files / "net.pt"))


@attack
def picture_of_many_pixels(place: Place) -> tuple[str, ...]:
    """60,000 by 60,000 pixels in a few megabytes: 11 GB once it is decoded."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))

    side = 60_000
    pixels = zlib.compress(bytes(1 << 22), 9)
    head = struct.pack(">2L5B", side, side, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    for number in range(8):
        (place.files / f"{number}.png").write_bytes(png)
    return (f"data:{place.files}",)


def _safetensors(place: Place, header: bytes, data: bytes = bytes(64)) -> tuple[str, ...]:
    (place.files / "net.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    return (
        str(place.files / "net.safetensors"), "--model", f"{place.models / 'factory.py'}:make",
        "--input", "x:f32[?,3,8,8]", *PLAIN,
    )  # fmt: skip


@attack
def safetensors_of_a_shape_without_end(place: Place) -> tuple[str, ...]:
    size = 1 << 40
    return _safetensors(
        place,
        json.dumps({"0.weight": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}).encode(),
    )


@attack
def safetensors_whose_sizes_overflow(place: Place) -> tuple[str, ...]:
    entry = {"dtype": "F32", "shape": [1 << 32, 1 << 32, 4], "data_offsets": [0, 64]}
    return _safetensors(place, json.dumps({"0.weight": entry}).encode())


@attack
def safetensors_that_overlap(place: Place) -> tuple[str, ...]:
    entry = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
    return _safetensors(place, json.dumps({f"{i}.weight": entry for i in range(1000)}).encode())


@attack
def safetensors_with_one_name_twice(place: Place) -> tuple[str, ...]:
    entry = json.dumps({"dtype": "F32", "shape": [16], "data_offsets": [0, 64]})
    return _safetensors(place, f'{{"0.weight": {entry}, "0.weight": {entry}}}'.encode())


@attack
def safetensors_nested_without_end(place: Place) -> tuple[str, ...]:
    return _safetensors(place, b'{"a":' * 100_000 + b"1" + b"}" * 100_000)


@attack
def safetensors_with_a_header_without_end(place: Place) -> tuple[str, ...]:
    (place.files / "net.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b'{"a": 1}' + bytes(64))
    return ("inspect", str(place.files / "net.safetensors"))


@attack
def folder_of_countless_layers(place: Place) -> tuple[str, ...]:
    _model_folder(place)
    _settings(place, "config.json", num_hidden_layers=1 << 31)
    return (str(place.files), *PLAIN)


@attack
def folder_of_enormous_tables(place: Place) -> tuple[str, ...]:
    _model_folder(place)
    _settings(place, "config.json", vocab_size=1 << 40, hidden_size=1 << 20)
    return (str(place.files), *PLAIN)


@attack
def adapter_of_an_enormous_rank(place: Place) -> tuple[str, ...]:
    honest.written(honest.Kind(honest.lora({"r": 1 << 30}), ()), place.files)
    return (str(place.models / "bert"), "--adapter", str(place.files), *PLAIN)


def _onnx(
    place: Place, command: str, *nodes: object, inputs: list, outputs: list, tensors: list = ()
) -> tuple[str, ...]:  # type: ignore[assignment]
    from onnx import helper

    graph = helper.make_graph(list(nodes), "net", inputs, outputs, list(tensors))
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])
    (place.files / "model.onnx").write_bytes(model.SerializeToString())
    return (command, str(place.files / "model.onnx"), *(("--seconds", "0.02") if command == "bench" else ()))


@attack
def onnx_that_takes_an_enormous_input(place: Place) -> tuple[str, ...]:
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1 << 20, 1 << 20]) for name in "xy"]
    return _onnx(place, "bench", helper.make_node("Relu", ["x"], ["y"]), inputs=ends[:1], outputs=ends[1:])


@attack
def onnx_that_makes_an_enormous_constant(place: Place) -> tuple[str, ...]:
    from onnx import TensorProto, helper, numpy_helper

    shape = numpy_helper.from_array(np.array([1 << 20, 1 << 16], np.int64), "shape")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["c"]),
        helper.make_node("Add", ["x", "c"], ["y"]),
    ]
    return _onnx(place, "inspect", *nodes, inputs=ends[:1], outputs=ends[1:], tensors=[shape])


@attack
def onnx_in_a_ring(place: Place) -> tuple[str, ...]:
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    nodes = [
        helper.make_node("Add", ["x", "b"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Relu", ["b"], ["y"]),
    ]
    return _onnx(place, "inspect", *nodes, inputs=ends[:1], outputs=ends[1:])


@attack
def onnx_with_an_operator_of_a_library(place: Place) -> tuple[str, ...]:
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    node = helper.make_node("Evil", ["x"], ["y"], domain="evil.so", library=str(place.files / "evil.so"))
    return _onnx(place, "inspect", node, inputs=ends[:1], outputs=ends[1:])


@attack
def names_that_command_a_terminal(place: Place) -> tuple[str, ...]:
    state = {f"\x1b]0;owned\x07\x1b[2J{i}.weight\r\n[red]\x9b31m": torch.ones(2) for i in range(3)}
    torch.save({"state_dict": state}, place.files / "net.pt")
    return ("inspect", str(place.files / "net.pt"))


@attack
def onnx_names_that_command_a_terminal(place: Place) -> tuple[str, ...]:
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(f"\x1b[2J{name}\x07", TensorProto.FLOAT, [1]) for name in "xy"]
    node = helper.make_node("Relu", [ends[0].name], [ends[1].name], name="\x1b[2J")
    return _onnx(place, "inspect", node, inputs=ends[:1], outputs=ends[1:])


@attack
def report_that_commands_a_terminal(place: Place) -> tuple[str, ...]:
    from sample_report import sample_report

    report = sample_report()
    report["command"] = "\x1b]0;owned\x07\x1b[2J [link=x]y[/link]"
    report["rows"][1]["rewrites"][0]["site"] = "\x1b[2J"
    report["notices"] = ["\x1b[31m\x07"]
    (place.files / "report.json").write_text(json.dumps(report))
    return ("inspect", str(place.files / "report.json"))
