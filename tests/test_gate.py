"""The gate in front of torch.export.load: honest files load, hostile ones run nothing, damaged ones are noticed.

Every attack is shown to be live: the same file, handed to torch without the gate, does what the attacker wanted.
"""

import io
import json
import os
import pickle
import random
import sys
import zipfile

import pytest
import torch
from torch import nn

from compressor.errors import FileError
from compressor.expressions import Refused, check_expression, check_guard, check_operator
from compressor.gate import open_program
from compressor.load import load


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        y = self.bn(self.conv(x)).relu()
        y = y.reshape(y.shape[0], 4, -1)[:, :, : x.shape[2] // 2 * 2]
        return {"logits": self.head(y.mean(-1)) + torch.tensor([1.0])}


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    dynamic = {"x": {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}}
    with torch.no_grad():
        return torch.export.export(
            Net().eval(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=dynamic, strict=False
        )


@pytest.fixture(scope="module")
def honest(program):
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def parts(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archive_of(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


MODEL, SAMPLES = "archive/models/model.json", "archive/data/sample_inputs/model.pt"
WEIGHTS, CONSTANTS = (
    "archive/data/weights/model_weights_config.json",
    "archive/data/constants/model_constants_config.json",
)


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def edit(members, name, change):
    table = json.loads(members[name])
    change(table)
    members[name] = json.dumps(table).encode()


def each(value):
    """Every dict of a JSON tree."""
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from each(item)


def set_all(table, key, value):
    for item in each(table):
        if key in item:
            item[key] = value


# ---- the attacks: each edits the members of an honest file so that it will make the folder `mark` ----


def sample_inputs(members, mark):
    members[SAMPLES] = saved(((Bomb(mark),), {}))


def legacy_sample_inputs(members, mark):
    members[SAMPLES] = pickle.dumps(((Bomb(mark),), {}))


def pickled_weight(members, mark):
    edit(members, WEIGHTS, lambda t: t["config"]["conv.weight"].update(use_pickle=True))
    members["archive/data/weights/weight_0"] = saved(Bomb(mark))


def pickled_constant(members, mark):
    edit(members, CONSTANTS, lambda t: set_all(t, "use_pickle", True))
    members["archive/data/constants/tensor_0"] = saved(Bomb(mark))


def opaque_constant(members, mark):
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    edit(members, CONSTANTS, lambda t: t["config"].update(extra=entry))
    members["archive/data/constants/opaque_obj_0"] = pickle.dumps(Bomb(mark))


def symbolic_expression(members, mark):
    edit(members, MODEL, lambda t: set_all(t, "expr_str", f"__import__('os').mkdir('{mark}')"))


def text_in_expression(members, mark):
    code = f"__import__(\\'os\\').mkdir(\\'{mark}\\')"
    edit(members, MODEL, lambda t: set_all(t, "expr_str", f"Max(Symbol('s7', integer=True), '{code}')"))


def guard(members, mark):
    edit(members, MODEL, lambda t: t.update(guards_code=[f"__import__('os').mkdir('{mark}') is None"]))


def value_name(members, mark):
    """The name of an input becomes an argument in the source that torch generates."""
    name = json.dumps(f"x=__import__('os').mkdir('{mark}')").encode()
    members[MODEL] = (
        members[MODEL].replace(b'"name": "x"', b'"name": ' + name).replace(b'"x": {', name + b": {")
    )


def argument_name(members, mark):
    key = f"x':__import__('os').mkdir('{mark}'),'y"
    leaf = {"type": None, "context": None, "children_spec": []}
    args = {"type": "builtins.tuple", "context": "null", "children_spec": []}
    kwargs = {"type": "builtins.dict", "context": json.dumps([key]), "children_spec": [leaf]}
    spec = {"type": "builtins.tuple", "context": "null", "children_spec": [args, kwargs]}
    edit(members, MODEL, lambda t: set_all(t, "in_spec", json.dumps([1, spec])))
    edit(members, MODEL, lambda t: t.update(guards_code=[]))


def parameter_name(members, mark):
    name = f'x", 0) or getattr(__import__("os"), "mkdir")("{mark}") or getattr(self, "'
    for member in (MODEL, WEIGHTS):
        members[member] = members[member].replace(b'"head.bias"', json.dumps("head." + name).encode())


def operator_on_files(members, mark):
    """A node that maps a file, and makes it if there is none."""
    arguments = {"filename": {"as_string": mark}, "shared": {"as_bool": True}, "size": {"as_int": 4}}
    node = {
        "target": "torch.ops.aten.from_file.default",
        "inputs": [{"name": name, "arg": value, "kind": 1} for name, value in arguments.items()],
        "outputs": [{"as_tensor": {"name": "made"}}],
        "metadata": {},
        "is_hop_single_tensor_return": None,
        "name": "made",
    }

    def change(table):
        graph = table["graph_module"]["graph"]
        graph["nodes"].insert(0, node)
        graph["tensor_values"]["made"] = graph["tensor_values"]["x"]

    edit(members, MODEL, change)


class WithMode(nn.Module):
    def forward(self, x, mode):
        return x.relu() if mode == "relu" else x


def exported(model, *args):
    buffer = io.BytesIO()
    with torch.no_grad():
        torch.export.save(torch.export.export(model, args, strict=False), buffer)
    return buffer.getvalue()


def constant_input(members, mark):
    """A text argument of forward() is compared, between quotes, in the guards that torch generates."""
    members.clear()
    members |= parts(exported(WithMode(), torch.ones(3, 3, 8, 8), "relu"))
    text = json.dumps(f"' or __import__('os').mkdir('{mark}') or '").encode()
    members[MODEL] = members[MODEL].replace(b'{"as_string": "relu"}', b'{"as_string": ' + text + b"}")


def value_called_metadata(members, mark):
    """Metadata is free text; but values may be called so too."""
    sizes = [{"as_expr": {"expr_str": f"__import__('os').mkdir('{mark}')", "hint": None}}]

    def change(table):
        values = table["graph_module"]["graph"]["tensor_values"]
        values["metadata"] = values.pop("relu") | {"sizes": sizes}

    edit(members, MODEL, change)
    members[MODEL] = members[MODEL].replace(b'"name": "relu"', b'"name": "metadata"')


def sample_inputs_in_capitals(members, mark):
    """torch's zip reader finds members whatever their case."""
    del members[SAMPLES]
    members["archive/DATA/sample_inputs/MODEL.PT"] = saved(((Bomb(mark),), {}))


def imported_factory(members, mark):
    _spec(
        members,
        "collections.defaultdict",
        {"default_factory_module": _evil(mark), "default_factory_name": "f", "dict_context": []},
    )


def imported_enum(members, mark):
    _spec(members, "builtins.dict", json.dumps([{"__enum__": True, "fqn": f"{_evil(mark)}:E", "name": "A"}]))


def _spec(members, kind, context):
    leaf = {"type": None, "context": None, "children_spec": []}
    text = json.dumps([1, {"type": kind, "context": context, "children_spec": [leaf]}])
    edit(members, MODEL, lambda t: set_all(t, "out_spec", text))


def _evil(mark):
    folder = os.path.dirname(mark)
    module = f"evil_{len(os.listdir(folder))}_{abs(hash(mark))}"
    with open(os.path.join(folder, f"{module}.py"), "w") as file:
        file.write(f"import os, enum\nos.mkdir({mark!r})\nf = list\nE = enum.Enum('E', 'A')\n")
    return module


ATTACKS = [
    sample_inputs, legacy_sample_inputs, pickled_weight, pickled_constant, opaque_constant, symbolic_expression,
    text_in_expression, guard, value_name, argument_name, parameter_name, operator_on_files, imported_factory,
    imported_enum, constant_input, value_called_metadata, sample_inputs_in_capitals,
]  # fmt: skip


def run_without_gate(data, attack):
    """What a user of plain torch does: load, and call."""
    try:
        module = torch.export.load(io.BytesIO(data)).module()
        module.forward(torch.randn(3, 3, 8, 8), *["relu"] * (attack is constant_input))
    except Exception as error:  # most attacks break the model after they have struck
        return error


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
@pytest.mark.filterwarnings("ignore")
def test_attack_is_live_and_refused(attack, honest, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    mark = tmp_path / "mark"
    members = parts(honest)
    attack(members, str(mark))
    data = archive_of(members)

    with pytest.raises(FileError, match=r"is refused: .*Nothing in it was run.*--trust-pickle") as info:
        open_program(data, "model.pt2")
    assert "\n" not in str(info.value)
    assert not mark.exists()

    error = run_without_gate(data, attack)
    assert mark.exists(), error


def test_honest_program_loads_with_its_example(honest, program, tmp_path):
    path = tmp_path / "net.pt2"
    path.write_bytes(honest)
    loaded = load(path)
    x = torch.randn(5, 3, 16, 8)
    assert torch.equal(loaded.model.module()(x)["logits"], program.module()(x)["logits"])
    assert loaded.example[0][0].shape == (2, 3, 8, 8) and loaded.example[1] == {}
    assert set(loaded.model.state_dict) == set(program.state_dict)


def test_rewritten_honest_archive_still_loads(honest):
    """The attacks above fail for what they changed, not for the way in which this file rewrites archives."""
    open_program(archive_of(parts(honest)), "model.pt2")


def test_honest_text_argument():
    found = open_program(exported(WithMode(), torch.ones(2, 3), "relu"), "model.pt2")
    assert found.module()(-torch.ones(2, 3), "relu").sum() == 0


def test_compiled_library_is_refused(honest):
    members = parts(honest) | {"archive/data/aotinductor/model/model.so": b"\x7fELF"}
    with pytest.raises(FileError, match="compiled library"):
        open_program(archive_of(members), "model.pt2")


def test_consent_runs_the_pickle_but_checksums_hold(honest, tmp_path):
    mark = tmp_path / "mark"
    members = parts(honest)
    sample_inputs(members, str(mark))
    data = bytearray(archive_of(members))
    open_program(bytes(data), "model.pt2", trust=True)
    assert mark.is_dir()
    mark.rmdir()
    data[data.index(members["archive/data/weights/weight_0"])] ^= 1
    with pytest.raises(FileError, match="checksum"):
        open_program(bytes(data), "model.pt2", trust=True)
    assert not mark.exists()


def test_flipped_weight_is_noticed_where_torch_does_not(honest, program):
    data = bytearray(honest)
    data[data.index(parts(honest)["archive/data/weights/weight_0"]) + 3] ^= 0x40
    with pytest.raises(FileError, match="weight_0.*checksum"):
        open_program(bytes(data), "model.pt2")
    silent = torch.export.load(io.BytesIO(bytes(data)))
    assert not torch.equal(silent.state_dict["conv.weight"], program.state_dict["conv.weight"])


def test_flipped_bytes_anywhere(honest, program):
    """Either the flip is in padding, and the model is the same to the bit, or it is an error of one line."""
    generator = random.Random(0)
    spots = generator.sample(range(len(honest)), 60)
    spots += generator.sample(range(len(honest) - 2000, len(honest)), 60)  # the directory
    noticed = 0
    for spot in spots:
        data = bytearray(honest)
        data[spot] ^= 1 << generator.randrange(8)
        try:
            found = open_program(bytes(data), "model.pt2").state_dict
        except FileError as error:
            assert "\n" not in str(error)
            noticed += 1
        else:
            assert all(torch.equal(found[key], value) for key, value in program.state_dict.items())
    assert noticed > 60


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9, 0.999])
def test_truncated(honest, tmp_path, share):
    path = tmp_path / "model.pt2"
    path.write_bytes(honest[: int(len(honest) * share)])
    with pytest.raises(FileError, match="model.pt2 is damaged.*cut short"):
        load(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", [MODEL, MODEL.replace("model.json", "Model.json")])
def test_two_members_of_one_name(honest, name):
    """Readers disagree on which of the two counts, so that the one checked need not be the one used."""
    buffer = io.BytesIO(honest)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(name, b"{}")
    with pytest.raises(FileError, match="two members named"):
        open_program(buffer.getvalue(), "model.pt2")


def test_other_archives(honest):
    members = parts(honest)
    with pytest.raises(FileError, match="several folders"):
        open_program(archive_of(members | {"version": b"8.20"}), "model.pt2")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(FileError, match="compressed"):
        open_program(buffer.getvalue(), "model.pt2")


def test_tensor_larger_than_its_bytes(honest):
    """torch fills a weight of no bytes with zeros: a petabyte of them, if asked."""
    members = parts(honest)
    edit(
        members,
        WEIGHTS,
        lambda t: t["config"]["head.bias"]["tensor_meta"].update(sizes=[{"as_int": 1 << 50}]),
    )
    with pytest.raises(FileError, match="larger than what is stored"):
        open_program(archive_of(members), "model.pt2")


def test_broken_description_is_one_line(honest):
    members = parts(honest)
    edit(members, MODEL, lambda t: t["graph_module"]["graph"]["nodes"].clear())
    with pytest.raises(FileError, match="cannot be loaded by torch") as info:
        open_program(archive_of(members), "model.pt2")
    assert "\n" not in str(info.value) and "warnings" not in str(info.value)


def test_nan_weight(tmp_path, program):
    broken = Net()
    with torch.no_grad():
        broken.head.bias[2] = float("nan")
        exported = torch.export.export(broken.eval(), (torch.randn(2, 3, 8, 8),), strict=False)
    torch.export.save(exported, tmp_path / "nan.pt2")
    with pytest.raises(FileError, match="NaN values in 'head.bias'"):
        load(tmp_path / "nan.pt2")


def test_old_layout(honest, program):
    """torch 2.7 and older: a flat archive of pickles; the same gate, and the same attack."""
    members = parts(honest)
    old = {
        "version": b"8.20",
        "serialized_exported_program.json": members[MODEL],
        "serialized_state_dict.pt": saved(program.state_dict),
        "serialized_constants.pt": saved(program.constants),
        "serialized_example_inputs.pt": members[SAMPLES],
    }
    found = open_program(archive_of(old), "old.pt2").state_dict
    assert torch.equal(found["conv.weight"], program.state_dict["conv.weight"])
    for name in list(old)[2:]:
        with pytest.raises(FileError, match="would run|more than tensors"):
            open_program(archive_of(old | {name: saved(Bomb("/nonexistent/mark"))}), "old.pt2")


# ---- the whitelists ----

HONEST_EXPRESSIONS = [
    "Symbol('s77', positive=True, integer=True)",
    "Add(Symbol('s77', integer=True), Mul(Integer(2), FloorDiv(Symbol('s53', integer=True), Integer(2))))",
    "Mul(Integer(-1), Pow(Symbol('s0', integer=True), Integer(2)))",
    "Max(Integer(1), PythonMod(Symbol('u0', integer=True), Integer(8)))",
    "StrictLessThan(Symbol('u3', integer=True), Integer(9223372036854775807))",
    "ToFloat(Symbol('zuf0'))",
    "IntTrueDiv(Symbol('s1', integer=True), Float('1.5', precision=53))",
    "And(Eq(Symbol('s1', integer=True), Integer(4)), true)",
    "s0 + 2*s1 // 3",
]  # fmt: skip
HOSTILE_EXPRESSIONS = [
    "__import__('os')",
    "Symbol('s0').__class__",
    "Symbol('__import__(1)')",
    "Max('s0')",
    "Integer('1')",
    "(lambda: 1)()",
    "[s0 for s0 in (1,)]",
    "sympify('s0')",
    "Symbol('s0', f())",
    "Symbol('s0', positive=f())",
    "Pow(Integer(10), Integer(1000000000))",
    "Pow(Pow(Pow(Integer(10), Integer(64)), Integer(64)), Integer(64))",
    "Pow(Integer(9), Pow(Integer(9), Integer(9)))",
    "10**10**10",
    "LShift(Integer(1), Integer(100000000000))",
    "1" * 100,
    "(" * 300 + "1" + ")" * 300,
    "1+" * 20_000 + "1",
    "s0; s1",
    "s0!",
    "eval",
    "",
]


@pytest.mark.parametrize("text", HONEST_EXPRESSIONS)
def test_honest_expression(text):
    check_expression(text)


@pytest.mark.parametrize("text", HOSTILE_EXPRESSIONS, ids=lambda text: text[:30])
def test_hostile_expression(text):
    with pytest.raises(Refused):
        check_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "2*(L['x'].size()[2] // 2) <= 8*L['x'].size()[2]",
        "(8*L['x'].size()[2]) != max(1, 2*(L['x'].size()[2] // 2))",
        "L['flat_args'][0].stride()[1] == 1 and not L['a']['b'].storage_offset() > 0",
        "math.isnan(L['x'])",
        "Mod(L['ids'].size()[1], 4) == 0",
    ],
)
def test_honest_guard(text):
    check_guard(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "L['x'].__class__",
        "L['x'].tofile('f')",
        "L['x'].size(out='f')",
        "L['x\\'y'].size()[0] == 1",
        "open('f')",
        "print(1)",
        "(yield)",
        "x",
        "'a' * 1000000000",
        "9**9**9 > 1",
        "L[(y := 1)]",
    ],
)
def test_hostile_guard(text):
    with pytest.raises(Refused):
        check_guard(text)


@pytest.mark.parametrize(
    "target",
    ["torch.ops.aten.conv2d.default", "torch.ops.aten.__and__.Tensor", "_operator.add", "math.floor", "torch.sym_max",
     "torch.ops.higher_order.wrap_with_set_grad_enabled", "torch.ops.aten.sym_size.int"],
)  # fmt: skip
def test_honest_operator(target):
    check_operator(target)


@pytest.mark.parametrize(
    "target",
    ["torch.os.system", "torch.load", "torch.hub.load", "torch.ops.load_library", "torch.ops.aten.from_file.default",
     "torch.ops.aten.__class__.mro", "torch.ops.aten.conv2d.__globals__", "_operator.methodcaller", "_operator.call",
     "math.factorial", "builtins.exec", "#ns:op", "exec", "torch.ops.c10d.send.default", "torch.ops.prim.Print.default",
     "torch.ops.higher_order.call_torchbind", "torch.ops.aten.no_such_operator.default", "torch.sym_max.__call__", ""],
)  # fmt: skip
def test_hostile_operator(target):
    with pytest.raises(Refused):
        check_operator(target)


def test_gate_leaves_no_module_behind(honest, tmp_path, monkeypatch):
    """A pytree spec cannot make us import what it names."""
    monkeypatch.syspath_prepend(tmp_path)
    members = parts(honest)
    imported_factory(members, str(tmp_path / "mark"))
    before = set(sys.modules)
    with pytest.raises(FileError, match="import a module"):
        open_program(archive_of(members), "model.pt2")
    assert not {name for name in set(sys.modules) - before if name.startswith("evil")}
