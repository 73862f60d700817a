"""What phones' accelerators take of a model: held against ONNX Runtime's own lists, its own count, and by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from nets import Net, conv, noise
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional as F

import compressor
from compressor import conditions, delivery
from compressor.accelerators import COREML_MLPROGRAM, COREML_NEURALNETWORK, NNAPI, PROVIDERS, named
from compressor.data import parse_input
from compressor.ops import kind, macs
from compressor.partitions import partitioned, pieces_of
from compressor.units import Unit, units_of

INT8 = "int8(rounding=nearest,measure=false)"
SCALE = np.float32(0.1)


def model(nodes, inputs, outputs, constants=(), types=None) -> onnx.ModelProto:
    """One graph; sizes of inputs and outputs by name, constants as arrays by name."""
    infos = [
        [helper.make_tensor_value_info(n, (types or {}).get(n, TensorProto.FLOAT), s) for n, s in v.items()]
        for v in (inputs, outputs)
    ]
    held = [numpy_helper.from_array(np.asarray(a), n) for n, a in dict(constants).items()]
    graph = helper.make_graph(nodes, "test", *infos, held)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def one(op: str, sizes: list, result: list, constants=(), dtype=TensorProto.FLOAT, **attributes) -> Unit:
    """A unit of one operator: x, its constants by name in order, y."""
    node = helper.make_node(op, ["x", *dict(constants)], ["y"], **attributes)
    (unit,) = units_of(model([node], {"x": sizes}, {"y": result}, constants, {"x": dtype, "y": dtype}))
    return unit


def between(
    op: str, dtype: str, weight: str, scales: np.ndarray, zero: int = 0, clips: bool = False
) -> list[Unit]:
    """Units of a weighted operator between Q/DQ pairs: x [1, 4, 8, 8] for Conv, else [2, 4]. clips: with a ReLU."""
    sizes, shape = ([1, 4, 8, 8], (6, 4, 1, 1)) if op == "Conv" else ([2, 4], (4, 6))
    made = [1, 6, 8, 8] if op == "Conv" else [2, 6]
    constants = {
        "s": SCALE,
        "z": np.zeros((), dtype),
        "w": np.ones(shape, weight),
        "ws": scales,
        "wz": np.full(scales.shape, zero, weight),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0 if op == "Conv" else 1),
        helper.make_node(op, ["xd", "wd"], ["m"]),
        *([helper.make_node("Relu", ["m"], ["r"])] if clips else []),
        helper.make_node("QuantizeLinear", ["r" if clips else "m", "s", "z"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "s", "z"], ["y"]),
    ]
    return units_of(model(nodes, {"x": sizes}, {"y": made}, constants))


ONE, EACH = np.float32(0.1), np.full(6, 0.1, np.float32)

# ---------------------------------------------------------------- the tables


@pytest.mark.parametrize(
    ("provider", "file"),
    [
        (NNAPI, "nnapi_supported_ops.md"),
        (COREML_NEURALNETWORK, "coreml_supported_neuralnetwork_ops.md"),
        (COREML_MLPROGRAM, "coreml_supported_mlprogram_ops.md"),
    ],
)
def test_the_tables_are_onnx_runtimes_own_lists(provider, file):
    text = (Path(onnxruntime.__file__).parent / "tools" / "mobile_helpers" / file).read_text()
    listed = set(re.findall(r"^\|(?:ai\.onnx:)?((?:com\.microsoft:)?\w+)\|", text, re.MULTILINE)) - {
        "Operator"
    }
    listed = {name.replace(":", "::").replace("Argmax", "ArgMax") for name in listed}
    assert set(provider.rows) | provider.unjudged == listed
    assert not set(provider.rows) & provider.unjudged


def test_providers_by_name():
    assert [p.name for p in named("coreml, nnapi")] == ["coreml-neuralnetwork", "coreml-mlprogram", "nnapi"]
    assert [p.name for p in named("all")] == list(PROVIDERS)
    with pytest.raises(compressor.UsageError, match="no accelerator 'npu'; there are nnapi"):
        named("qnn,npu")


# ---------------------------------------------------------------- conditions


@pytest.mark.parametrize(
    ("provider", "unit", "reason"),
    [
        ("nnapi", one("Relu", ["batch", 4], ["batch", 4]), "a size of its input is not fixed"),
        ("nnapi", one("Relu", [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]), "5 axes; at most 4 are taken"),
        ("nnapi", one("Relu", [1, 4], [1, 4], dtype=TensorProto.FLOAT16), "its input is float16"),
        ("nnapi", one("Clip", [1, 4], [1, 4], {"low": np.float32(0), "high": np.float32(6)}), ""),
        ("nnapi", one("Clip", [1, 4], [1, 4], {"low": np.float32(0), "high": np.float32(5)}), "it clips to other"),
        ("nnapi", one("MatMul", [1, 3, 4], [1, 3, 2], {"w": np.ones((4, 2), np.float32)}), "its input has 3 axes"),
        ("nnapi", one("MatMul", [3, 4], [3, 2], {"w": np.ones((4, 2), np.float32)}), ""),
        ("nnapi", one("Softmax", [1, 2, 4], [1, 2, 4]), "its input has 3 axes; 2 or 4 are taken"),
        ("nnapi", one("LayerNormalization", [1, 4], [1, 4], {"w": np.ones(4, np.float32)}), "not in its list"),
        ("coreml-mlprogram", one("LayerNormalization", [1, 4], [1, 4], {"w": np.ones(4, np.float32)}), ""),
        ("coreml-neuralnetwork", one("Relu", [1, 20000], [1, 20000]), "an axis of 20000; at most 16384"),
        ("coreml-mlprogram", one("Relu", [1, 4], [1, 4], dtype=TensorProto.FLOAT16), ""),
        ("coreml-neuralnetwork", one("Relu", [1, 4], [1, 4], dtype=TensorProto.FLOAT16), "its input is float16"),
        ("xnnpack", one("Softmax", ["n", 4], ["n", 4], axis=0), "along axis 0, not the last"),
        ("xnnpack", one("Softmax", ["n", 4], ["n", 4], axis=1), ""),
        ("xnnpack", one("Gemm", [2, 4], [2, 3], {"w": np.ones((4, 3), np.float32)}), "its bias is missing"),
        ("xnnpack", one("MaxPool", ["n", 4, 8, 8], ["n", 4, 4, 4], kernel_shape=[2, 2], strides=[2, 2]), ""),
        (
            "xnnpack",
            one("MaxPool", ["n", 4, 8, 8], ["n", 4, 4, 4], kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
            "ceil_mode=1",
        ),
        ("xnnpack", one("Conv", ["n", 4, "h", 8], ["n", 6, "h", 8], {"w": np.ones((6, 4, 1, 1), np.float32)}), "chan"),
        ("qnn", one("Conv", [1, 4, 8, 8], [1, 6, 8, 8], {"w": np.ones((6, 4, 1, 1), np.float32)}), "not taken in"),
    ],
)  # fmt: skip
def test_floats(provider, unit, reason):
    said = PROVIDERS[provider].refuses(unit)
    assert said.startswith(reason) and bool(said) == bool(reason)


def resized(made, source=(1, 4, 8, 8), scales=(1, 1, 2, 2), **how) -> Unit:
    constants = {"roi": np.zeros(0, np.float32), "scales": np.float32(scales)}
    return one("Resize", list(source), list(made), constants, **how)


@pytest.mark.parametrize(
    ("check", "unit", "reason"),
    [
        ("resize", resized((1, 4, 16, 16)), "it resizes by nearest, half_pixel, round_prefer_floor"),
        ("resize", resized((1, 4, 16, 16), mode="linear"), ""),
        ("resize", resized((1, 4, 16, 16), mode="linear", antialias=1), "antialias=1"),
        ("resize", resized((1, 4, 16, 16), scales=(2, 2), mode="linear", axes=[2, 3]), "it names axes"),
        ("resize", resized((1, 4, 16), (1, 4, 8), (1, 1, 2), mode="linear"), "its input has 3 axes"),
        ("resize", resized((1, 8, 16, 16), scales=(1, 2, 2, 2), mode="linear"), "it resizes other axes"),
        ("whole_factors", resized((1, 4, 16, 16)), ""),
        ("whole_factors", resized((1, 4, 4, 4), scales=(1, 1, 0.5, 0.5)), ""),
        ("whole_factors", resized((1, 4, 12, 12), scales=(1, 1, 1.5, 1.5)), "height or width change"),
        ("whole_factors", resized((1, 4, "h", 16), (1, 4, "g", 8)), "height or width are not fixed"),
        ("grows", resized((1, 4, 16, 16)), ""),
        ("grows", resized((1, 4, 4, 4), scales=(1, 1, 0.5, 0.5)), "it makes pictures smaller"),
    ],
)
def test_pictures_of_other_sizes(check, unit, reason):
    found = getattr(conditions, check)
    said = (found(("linear", "half_pixel")) if check == "resize" else found)(unit)
    assert said.startswith(reason) and bool(said) == bool(reason)


F32, W = np.float32, np.ones((4, 3), np.float32)


def dilated(groups: int, width: int) -> Unit:
    kernel = {"w": np.ones((4, width, 3, 3), F32)}
    return one(
        "Conv", [1, 4, 8, 8], [1, 4, 4, 4], kernel, group=groups, dilations=[2, 2], kernel_shape=[3, 3]
    )


def product(*operands: np.ndarray, **how) -> Unit:
    return one("Gemm", [2, 4], [2, 3], dict(zip("wb", operands, strict=False)), **how)


def stacked(left: list, right: list) -> Unit:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return units_of(model([node], {"x": left, "w": right}, {"y": [*left[:-1], right[-1]]}))[0]


def splits(*sizes: int) -> Unit:
    node = helper.make_node("Split", ["x", "sizes"], [f"y{i}" for i in range(len(sizes))], axis=1)
    made = {f"y{i}": [1, size] for i, size in enumerate(sizes)}
    return units_of(model([node], {"x": [1, sum(sizes)]}, made, {"sizes": np.int64(sizes)}))[0]


def pooled(results: int) -> Unit:
    node = helper.make_node("MaxPool", ["x"], ["y", "at"][:results], kernel_shape=[2, 2])
    made = {name: [1, 4, 7, 7] for name in ("y", "at")[:results]}
    return units_of(model([node], {"x": [1, 4, 8, 8]}, made, types={"at": TensorProto.INT64}))[0]


@pytest.mark.parametrize(
    ("check", "unit", "reason"),
    [
        (conditions.grouped_dilation, dilated(2, 2), "dilated, in groups of several channels"),
        (conditions.grouped_dilation, dilated(4, 1), ""),
        (conditions.grouped_dilation, dilated(1, 4), ""),
        (conditions.not_pointwise, dilated(1, 4), ""),
        (conditions.not_pointwise, one("Conv", [1, 4, 8, 8], [1, 6, 8, 8], kernel_shape=[1, 1]), "a kernel of 1x1"),
        (conditions.spatial(2), dilated(1, 4), ""),
        (conditions.spatial(3), dilated(1, 4), "a kernel of 2 axes"),
        (conditions.vector_bias, product(W), ""),
        (conditions.vector_bias, product(W, np.ones(3, F32)), ""),
        (conditions.vector_bias, product(W, np.ones((1, 3), F32)), ""),
        (conditions.vector_bias, product(W.T, np.ones(3, F32), transB=1), ""),
        (conditions.vector_bias, product(W, np.ones((2, 3), F32)), "its bias is no vector"),
        (conditions.vector_bias, product(W, np.ones(1, F32)), "its bias is no vector"),
        (conditions.plain_product, product(W), ""),
        (conditions.plain_product, product(W.T, transB=1), ""),
        (conditions.plain_product, product(W, alpha=0.5), "alpha=0.5"),
        (conditions.plain_product, one("Gemm", [4, 2], [2, 3], {"w": W}, transA=1), "transA=1"),
        (conditions.matrices, product(W), ""),
        (conditions.matrices, stacked([2, 4], [4, 3]), "its second input is no constant"),
        (conditions.batched, stacked([2, 8, 4], [2, 4, 3]), ""),
        (conditions.batched, stacked([2, 8, 4], [1, 4, 3]), "its operands are no stacks"),
        (conditions.batched, stacked([8, 4], [4, 3]), "its operands are no stacks"),
        (conditions.even_split, splits(3, 3), ""),
        (conditions.even_split, splits(2, 4), "its parts are not equally large"),
        (conditions.one_result, pooled(1), ""),
        (conditions.one_result, pooled(2), "it gives indices too"),
        (conditions.numbers(1, np.all, "some are 0"), product(W), ""),
        (conditions.numbers(1, np.all, "some are 0"), product(0 * W), "some are 0"),
        (conditions.numbers(1, np.all, "it is computed"), stacked([2, 4], [4, 3]), "it is computed"),
        (conditions.numbers(1, np.all, "some are 0"), one("Relu", [4], [4]), ""),
        (conditions.any_of(conditions.spatial(3), conditions.not_pointwise), dilated(1, 4), ""),
        (conditions.any_of(conditions.absent(1), conditions.rank(4)), product(W), "its input has 2 axes"),
    ],
)  # fmt: skip
def test_what_operators_are_like(check, unit, reason):
    said = check(unit)
    assert said.startswith(reason) and bool(said) == bool(reason)


@pytest.mark.parametrize(
    ("provider", "units", "op", "reason"),
    [
        ("nnapi", between("Conv", "uint8", "int8", EACH), "Conv", ""),
        (
            "nnapi",
            between("Conv", "uint8", "int8", EACH, zero=1),
            "Conv",
            "its weight has zero points other than 0",
        ),
        ("nnapi", between("Conv", "int8", "int8", EACH), "Conv", "its input is s8"),
        ("nnapi", between("MatMul", "uint8", "int8", ONE), "MatMul", ""),
        (
            "nnapi",
            between("MatMul", "uint8", "int8", EACH),
            "MatMul",
            "its second input has a scale a channel",
        ),
        ("xnnpack", between("Conv", "uint8", "int8", EACH), "Conv", "u8 activations with s8 weights"),
        ("xnnpack", between("Conv", "int8", "int8", EACH), "Conv", ""),
        ("xnnpack", between("Conv", "uint8", "uint8", ONE), "Conv", ""),
        ("coreml-mlprogram", between("Conv", "uint8", "int8", EACH), "Conv", "not taken in integers"),
        ("qnn", between("Conv", "uint8", "int8", EACH), "Conv", ""),
        ("qnn", between("MatMul", "uint8", "int8", EACH), "MatMul", ""),
        (
            "qnn",
            between("MatMul", "uint8", "int8", EACH[:4]),
            "MatMul",
            "its weight has scales along another axis",
        ),
        ("qnn", between("Conv", "uint8", "int8", EACH), "QuantizeLinear", "at an end of the model"),
    ],
)
def test_integers(provider, units, op, reason):
    unit = next(u for u in units if u.op == op)
    said = PROVIDERS[provider].refuses(unit)
    assert said.startswith(reason) and bool(said) == bool(reason)


def test_a_unit_is_an_operator_with_its_quantisers():
    """Input and weight dequantised, the ReLU that the quantiser makes redundant, the quantiser: five nodes more."""
    first, main, last = between("Conv", "uint8", "int8", EACH, clips=True)
    assert [u.op for u in (first, main, last)] == ["QuantizeLinear", "Conv", "DequantizeLinear"]
    assert main.quantised and main.nodes == 5 and main.sources == [first] and last.sources == [main]
    assert main.macs == 6 * 8 * 8 * 4
    signed = between("Conv", "int8", "int8", EACH, clips=True)  # these quantisers keep what is negative
    assert [u.op for u in signed].count("Relu") == 1
    floats = next(u for u in signed if u.op == "Conv")
    assert not floats.quantised and NNAPI.refuses(floats) == "its weight is dequantised beside floats"


def test_bodies_of_branches_fall_back():
    body = helper.make_graph([helper.make_node("Relu", ["x"], ["b"])], "body", [], [
        helper.make_tensor_value_info("b", TensorProto.FLOAT, [1, 4])
    ])  # fmt: skip
    node = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
    units = units_of(model([node], {"c": [], "x": [1, 4]}, {"y": [1, 4]}, types={"c": TensorProto.BOOL}))
    assert [u.op for u in units] == ["If", "Relu", "Relu"]
    assert NNAPI.refuses(units[1]) == "inside the body of If or Loop"


# ---------------------------------------------------------------- pieces


def random_graph(seed: int) -> onnx.ModelProto:
    """Relu and Add, which a provider takes, and Neg, which it does not."""
    choose = np.random.default_rng(seed)
    values, nodes = ["x"], []
    for i in range(int(choose.integers(3, 25))):
        op = choose.choice(["Relu", "Add", "Neg"])
        read = [str(v) for v in choose.choice(values[-4:], 2 if op == "Add" else 1)]
        nodes.append(helper.make_node(op, read, [f"v{i}"], name=f"n{i}"))
        values.append(f"v{i}")
    return model(nodes, {"x": [1, 4]}, {values[-1]: [1, 4]})


def test_pieces_are_those_that_onnx_runtime_counts():
    from onnxruntime.tools.mobile_helpers import usability_checker

    class Takes:
        def is_op_supported(self, node):
            return node.op_type != "Neg"

    counts = set()
    for seed in range(60):
        graph = onnx.shape_inference.infer_shapes(random_graph(seed))
        theirs = usability_checker.check_partitioning(graph.graph, Takes(), False)
        units = units_of(graph)
        pieces = pieces_of(units, [u.op != "Neg" for u in units])
        assert sorted(map(len, pieces)) == sorted(map(len, theirs.supported_groups)), seed
        counts.add(len(pieces))
    assert counts >= {1, 2, 3}


def test_a_lonely_reshape_is_no_partition():
    nodes = [
        helper.make_node("Reshape", ["x", "s"], ["a"]),
        helper.make_node("Not", ["c"], ["y"]),
    ]
    types = {"c": TensorProto.BOOL, "y": TensorProto.BOOL}
    made = model(nodes, {"x": [1, 4], "c": [1]}, {"a": [4], "y": [1]}, {"s": np.array([4])}, types)
    row = partitioned(units_of(made), NNAPI)
    assert (row["partitions"], row["taken"], row["operators"]) == (0, 0, 2) and row["share"] is None
    assert {r["reason"] for r in row["fallback"]} == {
        "not worth a partition of its own",
        "not in its list of operators",
    }


def test_xnnpack_folds_activations_into_convolutions(tmp_path):
    weights = {"w": np.ones((6, 4, 1, 1), np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Relu", ["b"], ["y"]),
    ]
    units = units_of(model(nodes, {"x": [1, 4, 8, 8]}, {"y": [1, 6, 8, 8]}, weights))
    row = partitioned(units, PROVIDERS["xnnpack"])
    assert row["taken"] == 2 and row["fallback"][0]["reason"].startswith(
        "taken only behind AveragePool or Conv"
    )


# ---------------------------------------------------------------- whole models


def network() -> nn.Module:
    torch.manual_seed(0)
    return Net(
        lambda net, x: net.head(F.relu(net.b(F.relu(net.a(x))) + net.c(x)).mean((2, 3))),
        a=conv(3, 8), b=conv(8, 8), c=conv(3, 8, 1), head=nn.Linear(8, 5),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A network in floats and in integers, for target mobile."""
    base = tmp_path_factory.mktemp("phones")
    x, data = torch.randn(2, 3, 16, 16), [torch.randn(32, 3, 16, 16)]
    made = {}
    for name, passes in (("floats", "fold"), ("integers", INT8)):
        compressor.compress(
            network(), x, passes=passes, calibration=data, target="mobile", output=base / name, measure=False
        )
        made[name] = base / name
    return made


def test_multiplications_are_those_of_the_graph(folders):
    counted = compressor.compress(
        network(), torch.randn(2, 3, 16, 16), passes="fold", stop_after="fold", measure=False
    )
    for folder in folders.values():
        for row in delivery.on_accelerators(folder / "model.onnx", "all"):
            assert row["macs"] == macs(counted.graph) and row["uncounted"] == []


def test_the_report_says_what_accelerators_take(folders, run):
    rows = {
        r["provider"]: r
        for r in json.loads((folders["floats"] / "report.json").read_text())["emitted"]["partitions"]
    }
    assert set(rows) == set(PROVIDERS)
    assert (rows["nnapi"]["partitions"], rows["nnapi"]["share"]) == (1, 1.0) and rows["qnn"]["taken"] == 0
    code, out, _ = run("inspect", folders["floats"])
    assert code == 0 and re.search(r"nnapi: 1 partition with (\d+) of \1 operators, 100.0% of the MACs", out)
    assert "qnn: takes nothing of the model" in out


def test_inspect_lists_what_falls_back(folders, run):
    code, out, _ = run("inspect", folders["integers"] / "model.onnx", "--partitions", "xnnpack,nnapi")
    assert code == 0 and "u8 activations with s8 weights" in out and re.search(r"\ba, .*\b[bc]\b", out)
    code, out, _ = run("inspect", folders["integers"], "--partitions", "qnn", "--json")
    (row,) = json.loads(out)["partitions"]
    conv_rows = [r for r in row["fallback"] if r["operator"] == "Conv"]
    assert code == 0 and conv_rows == [] and row["macs_taken"] >= 16 * 16 * 8 * (27 + 72 + 3)
    lost = next(r for r in row["fallback"] if r["operator"] == "Gemm")
    assert lost["modules"] == ["head"] and lost["macs"] == 40


def test_inspect_says_what_partitions_are_for(folders, run, tmp_path):
    torch.save({}, tmp_path / "m.pt")
    for words, message in (
        ((folders["floats"] / "model.ort", "--partitions", "all"), "fused for processors"),
        ((tmp_path / "m.pt", "--partitions", "all"), "is for an ONNX file; compress the model first"),
        ((folders["floats"] / "model.onnx", "--partitions", "npu"), "no accelerator 'npu'"),
    ):
        code, _, err = run("inspect", *words)
        assert code == 2 and message in err and err.count("\n") == 1


def test_weights_in_a_file_of_their_own(tmp_path):
    weight = np.random.default_rng(0).standard_normal((256, 256), dtype=np.float32)
    made = model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": [1, 256]}, {"y": [1, 256]}, {"w": weight}
    )
    onnx.save(made, tmp_path / "inside.onnx")
    onnx.save(
        made,
        tmp_path / "beside.onnx",
        save_as_external_data=True,
        location="beside.onnx.data",
        size_threshold=0,
    )
    for name, share in (("inside", 1.0), ("beside", 0.0)):
        nnapi, qnn = delivery.on_accelerators(tmp_path / f"{name}.onnx", "nnapi,qnn")
        assert nnapi["share"] == share and nnapi["macs"] == qnn["macs"] == 256 * 256
    assert nnapi["fallback"][0]["reason"] == "its weights lie in a file of their own"


# ---------------------------------------------------------------- target qnn


def mixed() -> nn.Module:
    """A pool, a residual sum, a depthwise convolution, a gate, a mean and a head."""
    torch.manual_seed(0)

    def forward(net, x):
        x = F.max_pool2d(F.relu(net.a(x)), 2)
        x = F.silu(F.relu6(net.b(x)) + net.c(x))
        return net.head(F.gelu(x).mean((2, 3)))

    parts = {
        "a": conv(3, 8),
        "b": conv(8, 8),
        "c": nn.Conv2d(8, 8, 3, padding=1, groups=8),
        "head": nn.Linear(8, 5),
    }
    return Net(forward, **parts).eval()


@pytest.mark.parametrize(
    ("target", "activation", "opset"), [("qnn", TensorProto.UINT8, 20), ("qnn-a16", TensorProto.UINT16, 21)]
)
def test_the_htp_gets_integers_from_the_first_quantiser_to_the_last(tmp_path, target, activation, opset):
    made = compressor.compress(
        mixed(), torch.randn(2, 3, 16, 16), passes=INT8, calibration=[torch.randn(64, 3, 16, 16)], target=target,
        output=tmp_path / "out", measure=False,
    )  # fmt: skip
    emitted = made.report["emitted"]
    (row,) = emitted["partitions"]
    ends = {("QuantizeLinear", "a"), ("DequantizeLinear", "head")}
    assert {(r["operator"], *r["modules"]) for r in row["fallback"]} == ends
    assert row["partitions"] == 1 and row["share"] == 1.0
    assert "QNNExecutionProvider is not installed here" in emitted["verified"]
    file = onnx.load(made.onnx)
    held = {t.name: t for t in file.graph.initializer}
    zeros = {n.input[2] for n in file.graph.node if n.op_type == "QuantizeLinear"}
    assert {held[zero].data_type for zero in zeros} == {activation}
    assert (
        file.opset_import[0].version == opset
        and file.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    )
    assert made.report["rows"][-1]["total_db"] > (25 if activation == TensorProto.UINT8 else 40)


def test_shares_that_are_nearly_equal_stay_what_they_are_in_integers(tmp_path):
    """ONNX Runtime's softmax of integers overflows where its scale is much finer than one over the entries of a row."""

    def pooled(net, x):
        hidden = F.relu(net.a(x))
        return net.head((hidden * net.scores(hidden).softmax(2)).sum(2))

    torch.manual_seed(0)
    net = Net(pooled, a=nn.Conv1d(8, 16, 1), scores=nn.Conv1d(16, 16, 1), head=nn.Linear(16, 6)).eval()
    nn.init.normal_(net.scores.weight, std=0.01)
    x = torch.randn(64, 8, 12)
    made = compressor.compress(
        net, x[:2], passes=INT8, calibration=[x], target="qnn", output=tmp_path / "out", measure=False
    )
    session = compressor.runtime.session(made.onnx, exact=True)
    seen = torch.cat(
        [torch.from_numpy(*compressor.runtime.run(session, [one.numpy()])) for one in x.split(1)]
    )
    assert noise(net(x), seen) > 28
    shares = next(n for n in made.graph.nodes if kind(n) == "softmax")
    (pair,) = shares.users
    assert 1 / 255 > float(pair.args[1]) > 1 / (128 * 12)  # finer than of 0 to 1


@pytest.mark.parametrize("target", ["gpu", "openvino"])
@pytest.mark.parametrize("size", ["T", "12"])
def test_convolutions_along_an_axis_of_any_size(tmp_path, target, size):
    torch.manual_seed(0)
    layers = nn.Conv1d(8, 16, 1), nn.ReLU(), nn.Conv1d(16, 16, 1), nn.Tanh(), nn.Conv1d(16, 16, 1)
    net, x = nn.Sequential(*layers).eval(), torch.randn(64, 8, 12)
    made = compressor.compress(
        net, x[:2], passes=INT8, calibration=[x], inputs=[parse_input(f"input:f32[?,8,{size}]")], target=target,
        output=tmp_path / "out", measure=False,
    )  # fmt: skip
    assert made.report["rows"][-1]["total_db"] > 30
    assert sum(kind(n) == "quantize" for n in made.graph.nodes) == 3


def test_other_targets_end_in_floats(folders):
    file = onnx.load(folders["integers"] / "model.onnx")
    maker = next(n for n in file.graph.node if file.graph.output[0].name in n.output)
    assert maker.op_type == "Gemm"
