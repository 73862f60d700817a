"""Sessions, runs, and what is read from ONNX Runtime's optimised graph."""

from __future__ import annotations

import ast
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compressor import apart, runtime
from compressor.errors import OutputError, TargetError


def quantised(path: Path, between: str | None = None) -> Path:
    """x -> q/dq -> conv -> relu -> [between] -> q/dq -> conv -> q/dq -> y, u8 activations and s8 weights."""
    random = np.random.default_rng(0)
    constants, nodes = [], []

    def constant(name, value):
        constants.append(numpy_helper.from_array(value, name))

    def quantise(x, name, zero="z"):
        nodes.append(helper.make_node("QuantizeLinear", [x, "s", zero], [f"{name}_q"], name=f"{name}_q"))
        nodes.append(
            helper.make_node("DequantizeLinear", [f"{name}_q", "s", zero], [name], name=f"{name}_dq")
        )
        return name

    def conv(x, name, channels):
        constant(f"{name}_w", random.integers(-127, 127, (8, channels, 3, 3)).astype(np.int8))
        constant(f"{name}_b", np.zeros(8, np.int32))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_w", "ws", "wz"], [f"{name}_wd"], axis=0))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_b", "bs", "bz"], [f"{name}_bd"], axis=0))
        arguments = [x, f"{name}_wd", f"{name}_bd"]
        nodes.append(helper.make_node("Conv", arguments, [name], name=name, pads=[1, 1, 1, 1]))
        return name

    constant("s", np.float32(0.05))
    constant("z", np.uint8(128))
    constant("z0", np.uint8(0))
    constant("ws", np.full(8, 0.01, np.float32))
    constant("wz", np.zeros(8, np.int8))
    constant("bs", np.full(8, 0.0005, np.float32))
    constant("bz", np.zeros(8, np.int32))
    value = conv(quantise("x", "xi"), "conv1", 3)
    nodes.append(helper.make_node("Relu", [value], ["relu"], name="relu"))
    value = "relu"
    if between:
        nodes.append(helper.make_node(between, [value], ["middle"], name="middle"))
        value = "middle"
    quantise(conv(quantise(value, "a", "z0"), "conv2", 8), "y")
    return save(path, nodes, {"x": ["batch", 3, 8, 8]}, {"y": ["batch", 8, 8, 8]}, constants)


def linear(path: Path, op: str = "MatMul") -> Path:
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32) * 2, "w")
    nodes = [helper.make_node(op, ["x", "w"], ["m"]), helper.make_node("Add", ["m", "other"], ["y"])]
    return save(path, nodes, {"x": ["n", 4], "other": ["n", 4]}, {"y": ["n", 4]}, [weight])


def save(path: Path, nodes, inputs, outputs, constants) -> Path:
    infos = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in values.items()]
        for values in (inputs, outputs)
    ]
    graph = helper.make_graph(nodes, "test", *infos, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


X = np.arange(8, dtype=np.float32).reshape(2, 4)


def test_run_by_name_by_order_and_from_bytes(tmp_path):
    path = linear(tmp_path / "m.onnx")
    expected = X * 2 + 1
    for model in (path, str(path), path.read_bytes()):
        for inputs in ({"other": X * 0 + 1, "x": X}, [X, X * 0 + 1]):
            (result,) = runtime.run(runtime.session(model, threads=1), inputs)
            np.testing.assert_array_equal(result, expected)
    (swapped,) = runtime.run(runtime.session(path), [X * 0 + 1, X])
    assert not np.array_equal(swapped, expected)


def test_unoptimised_session_gives_the_same_numbers(tmp_path):
    path = linear(tmp_path / "m.onnx")
    plain = runtime.run(runtime.session(path, optimize=False), [X, X])
    np.testing.assert_allclose(plain, runtime.run(runtime.session(path), [X, X]), rtol=1e-6)


@pytest.mark.parametrize(
    "inputs, message",
    [
        ([X], "takes x, other; it was given 1 arrays"),
        ({"x": X, "z": X}, "takes x, other; it was given x, z"),
        ([X, X.astype(np.float64)], "Unexpected input data type"),
        ([X[:, :3], X], "invalid dimensions for input: x .* Expected: 4"),
    ],
)
def test_inputs_that_do_not_fit_are_named(tmp_path, inputs, message):
    session = runtime.session(linear(tmp_path / "m.onnx"))
    with pytest.raises(TargetError, match=message) as caught:
        runtime.run(session, inputs)
    assert "\n" not in str(caught.value)


def test_a_refused_file_is_named_with_the_first_line(tmp_path):
    text = tmp_path / "text.onnx"
    text.write_text("no model")
    unknown = linear(tmp_path / "unknown.onnx", op="Frobnicate")
    for path, reason in (
        (text, "INVALID_PROTOBUF"),
        (unknown, "Frobnicate"),
        (tmp_path / "none", "no such file"),
    ):
        with pytest.raises(TargetError, match=reason) as caught:
            runtime.session(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_provider_that_is_not_installed_is_no_silent_fallback(tmp_path):
    assert "CPUExecutionProvider" in runtime.providers()
    path = linear(tmp_path / "m.onnx")
    with pytest.raises(TargetError, match="NoSuchProvider is not in the installed ONNX Runtime, which has"):
        runtime.session(path, providers=("NoSuchProvider", "CPUExecutionProvider"))


def test_failures_print_nothing_of_their_own(tmp_path):
    path = linear(tmp_path / "m.onnx", op="Frobnicate")
    code = (
        "from compressor import runtime, errors\n"
        f"try: runtime.session({str(path)!r})\nexcept errors.TargetError: pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


def test_importing_runtime_does_not_import_onnxruntime():
    code = "import sys, compressor.runtime; assert not {'onnxruntime', 'onnx', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- the optimised graph


def test_operators_of_the_optimised_graph(tmp_path):
    path = quantised(tmp_path / "q.onnx")
    operators = runtime.optimized_operators(path)
    assert operators["QLinearConv"] == 2 and "Conv" not in operators and "Relu" not in operators
    assert "Conv" in {
        node.op_type for node in onnx.load(path).graph.node
    }  # it is the runtime's graph, not the file's
    order = [op for op, _ in runtime.optimized_nodes(path)]
    assert order.index("QuantizeLinear") < order.index("QLinearConv") < order.index("DequantizeLinear")
    assert sum(operators.values()) == len(order)


def test_all_integer_between_quantise_and_dequantise(tmp_path):
    assert runtime.float_operators_inside(quantised(tmp_path / "q.onnx")) == []


def test_a_float_operator_inside_is_named(tmp_path):
    inside = runtime.float_operators_inside(quantised(tmp_path / "q.onnx", between="Sin"))
    assert "Sin middle" in inside and any(name.startswith("FusedConv") for name in inside)
    assert not any("QLinearConv" in name for name in inside)


def test_floats_before_and_behind_do_not_count(tmp_path):
    constants = [numpy_helper.from_array(np.float32(0.1), "s"), numpy_helper.from_array(np.uint8(128), "z")]
    nodes = [
        helper.make_node("Exp", ["x"], ["e"]),
        helper.make_node("QuantizeLinear", ["e", "s", "z"], ["q"]),
        helper.make_node("Transpose", ["q"], ["t"], perm=[1, 0]),
        helper.make_node("DequantizeLinear", ["t", "s", "z"], ["d"]),
        helper.make_node("Sin", ["d"], ["y"]),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"x": ["n", 4]}, {"y": [4, "n"]}, constants)
    assert runtime.float_operators_inside(path) == []


def test_large_weights_of_the_optimised_graph_lie_beside_it(tmp_path):
    weight = numpy_helper.from_array(np.eye(64, dtype=np.float32), "w")
    path = save(
        tmp_path / "m.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"x": ["n", 64]},
        {"y": ["n", 64]},
        [weight],
    )
    runtime.session(path, optimized_path=tmp_path / "o.onnx")
    assert (tmp_path / "o.onnx.data").stat().st_size >= 64 * 64 * 4
    assert runtime.optimized_operators(path) == {"MatMul": 1}


# ---------------------------------------------------------------- mobile


def test_ort_format_gives_the_same_numbers(tmp_path):
    path = quantised(tmp_path / "q.onnx")
    out = tmp_path / "q.ort"
    runtime.to_ort_format(path, out)
    assert out.read_bytes()[4:8] == b"ORTM" and not list(tmp_path.glob("*.part"))
    x = np.random.default_rng(1).standard_normal((2, 3, 8, 8), dtype=np.float32)
    ours, theirs = (runtime.run(runtime.session(p), [x])[0] for p in (out, path))
    np.testing.assert_array_equal(ours, theirs)
    assert theirs.std() > 0.1  # not equal because both are nothing


def test_ort_format_leaves_the_old_file_whole_when_it_fails(tmp_path):
    out = tmp_path / "m.ort"
    out.write_bytes(b"old")
    broken = tmp_path / "broken.onnx"
    broken.write_text("no model")
    with pytest.raises(TargetError, match=r"broken\.onnx"):
        runtime.to_ort_format(broken, out)
    assert out.read_bytes() == b"old" and sorted(os.listdir(tmp_path)) == ["broken.onnx", "m.ort"]
    with pytest.raises(OutputError, match="cannot be written"):
        runtime.to_ort_format(linear(tmp_path / "m.onnx"), tmp_path / "nowhere" / "m.ort")


def test_what_execution_providers_are_offered_is_not_fused(tmp_path):
    path = quantised(tmp_path / "q.onnx")
    kinds = [node.op_type for node in runtime.offered(path).graph.node]
    assert "QuantizeLinear" in kinds and not any(kind.startswith("QLinear") for kind in kinds)
    assert any(name.startswith("QLinear") for name in runtime.optimized_operators(path))
    broken = tmp_path / "broken.onnx"
    broken.write_text("no model")
    with pytest.raises(TargetError, match=r"broken\.onnx"):
        runtime.offered(broken)


def test_operators_of_a_reduced_build(tmp_path):
    """ONNX Runtime's own build reads the list; what its tool does when imported stays out of this process."""
    path, out = quantised(tmp_path / "q.onnx"), tmp_path / "q.ort"
    runtime.to_ort_format(path, out)
    before = (list(sys.path), list(logging.getLogger().handlers))
    text = apart.call(runtime.required_operators, out)
    assert (list(sys.path), list(logging.getLogger().handlers)) == before
    assert str(tmp_path) not in text and text == apart.call(runtime.required_operators, out)
    config = tmp_path / "required_operators.config"
    config.write_text(text)
    code = "from onnxruntime.tools.reduced_build_config_parser import parse_config\n"
    code += f"print(sorted(o for v in parse_config({str(config)!r}, True)[0].values() for s in v.values() for o in s))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(ast.literal_eval(done.stdout)) == set(runtime.optimized_operators(path))
    assert 'QLinearConv{"inputs": {"0": ["uint8_t"]}}' in text
    with pytest.raises(TargetError, match="its operators cannot be listed"):
        apart.call(runtime.required_operators, path)
