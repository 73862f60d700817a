"""From files as people have them to a model: the same weights to the bit, nothing run, missing or left over."""

import argparse
import copy
import hashlib
import os
import shutil
import sys
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compressor.errors import FileError, UsageError
from compressor.load import load, peek

SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=5, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, classes)
        self.register_buffer("offset", torch.zeros(1))
        self.register_buffer("scratch", torch.zeros(9), persistent=False)

    def forward(self, x):
        return self.head(self.bn(self.conv(x)).relu().mean((2, 3)))

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.out = nn.Linear(3, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.embed(x))

def broken():
    raise ValueError("no such width")

def number():
    return 3

ready = Net()
"""


@pytest.fixture(autouse=True)
def clean_imports(monkeypatch):
    """Each test has its own sys.path and forgets the modules that it made."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if "mynet" in name:
            del sys.modules[name]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "code" / "mynet.py"
    path.parent.mkdir()
    path.write_text(SOURCE)
    return path


@pytest.fixture
def net(source):
    """A trained network whose class pickles as mynet.Net; the module is forgotten again by each reading test."""
    sys.path.insert(0, str(source.parent))
    import mynet

    torch.manual_seed(0)
    model = mynet.Net()
    for value in model.state_dict().values():
        value.copy_(torch.rand(value.shape) + 1)
    model.bn.num_batches_tracked.fill_(7)
    return model


def prefixed(state, prefix):
    return OrderedDict((prefix + key, value) for key, value in state.items())


def optimizer(model):
    adam = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    adam.step()
    return adam.state_dict()


def lightning(model):
    return {
        "epoch": 3,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": prefixed(model.state_dict(), "model."),
        "callbacks": {"ModelCheckpoint": {"best": torch.tensor(0.5)}},
        "optimizer_states": [optimizer(copy.deepcopy(model))],
        "hyper_parameters": {"lr": 0.1, "class_names": ["a", "b", "c", "d", "e"]},
    }


def noise(model):
    other = copy.deepcopy(model)
    for value in other.state_dict().values():
        value.copy_(torch.full_like(value, 2))
    return other


def timm_like(model, **more):
    args = argparse.Namespace(model="net", lr=0.1)
    return {"epoch": 1, "arch": "net", "state_dict": model.state_dict(), "optimizer": optimizer(copy.deepcopy(model)),
            "version": 2, "args": args, "metric": 70.0} | more  # fmt: skip


CHECKPOINTS = {
    "bare": lambda model: model.state_dict(),
    "state_dict": lambda model: {
        "state_dict": model.state_dict(),
        "epoch": 3,
        "optimizer": optimizer(copy.deepcopy(model)),
    },
    "model_state_dict": lambda model: {"model_state_dict": model.state_dict(), "loss": torch.tensor(1.0)},
    "lightning": lightning,
    "ddp": lambda model: {"model": prefixed(model.state_dict(), "module."), "epoch": 1},
    "compiled": lambda model: prefixed(model.state_dict(), "_orig_mod."),
    "all prefixes": lambda model: {"state_dict": prefixed(model.state_dict(), "model.module._orig_mod.")},
    "part compiled": lambda model: {
        k.replace("conv.", "conv._orig_mod."): v for k, v in model.state_dict().items()
    },
    "own prefix": lambda model: {"state_dict": prefixed(model.state_dict(), "backbone.")},
    "timm": timm_like,
    "timm ema": lambda model: timm_like(noise(model), state_dict_ema=model.state_dict()),
    "ultralytics": lambda model: {
        "epoch": -1,
        "model": noise(model),
        "ema": copy.deepcopy(model),
        "updates": 9,
        "train_args": {},
    },
    "no ema": lambda model: {"model": model, "ema": None},
    "numpy": lambda model: {k: v.numpy() for k, v in model.state_dict().items()},
    "whole module": lambda model: model,
    "whole ddp module": lambda model: nn.DataParallel(model),
    "parameters": lambda model: OrderedDict(
        [*model.named_parameters(), *((k, v) for k, v in model.named_buffers() if k != "scratch")]
    ),
}


def written(path, value, layout="zip"):
    if layout == "safetensors":
        save_file(value, path)
    else:
        torch.save(value, path, _use_new_zipfile_serialization=layout == "zip")
    return path


@pytest.mark.parametrize("layout", ["zip", "legacy"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_to_the_bit(tmp_path, source, net, kind, layout):
    path = written(tmp_path / "net.pth.tar", CHECKPOINTS[kind](net), layout)
    expected = net.state_dict()
    del sys.modules["mynet"]
    loaded = load(path, model=f"{source}:Net")
    found = loaded.model.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not any(torch.equal(found[key], value) for key, value in noise(net).state_dict().items())
    assert not loaded.model.training and loaded.example is None and loaded.path == path
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert ("averaged" in " ".join(loaded.notes)) == (kind in ("timm ema", "ultralytics"))
    assert loaded.labels == (("a", "b", "c", "d", "e") if kind == "lightning" else ())


def test_safetensors(tmp_path, source, net):
    path = written(tmp_path / "net.safetensors", net.state_dict(), "safetensors")
    loaded = load(path, model=f"{source}:Net")
    assert torch.equal(loaded.model.conv.weight, net.conv.weight)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(FileError, match=r"net\.safetensors is damaged"):
        load(path, model=f"{source}:Net")


def test_whole_module_runs_no_line_of_its_pickle(tmp_path, net):
    """The class comes from where the user says, not from where the pickle says."""
    path = written(tmp_path / "net.pt", net)
    del sys.modules["mynet"]
    shutil.rmtree(tmp_path / "code")
    other = tmp_path / "other.py"
    other.write_text(SOURCE)
    loaded = load(path, model=f"{other}:Net")
    assert type(loaded.model).__module__ == "other" and "mynet" not in sys.modules
    assert torch.equal(loaded.model.head.weight, net.head.weight)


class Reduce:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_bomb_fires_by_consent_only(tmp_path, source, net):
    mark = tmp_path / "mark"
    path = written(tmp_path / "net.ckpt", {"model": net, "extra": Reduce(mark)})
    loaded = load(path, model=f"{source}:Net")
    assert torch.equal(loaded.model.head.weight, net.head.weight) and not mark.exists()
    with pytest.raises(FileError, match="--model mynet:Net.*--trust-pickle"):
        load(path)
    assert not mark.exists()
    loaded = load(path, trust_pickle=True)
    assert mark.is_dir() and type(loaded.model).__name__ == "Net" and loaded.notes


def test_trusted_modules_are_unwrapped_and_widened(tmp_path, net):
    path = written(
        tmp_path / "net.pt", {"ema": nn.DataParallel(copy.deepcopy(net).half()), "model": noise(net)}
    )
    loaded = load(path, trust_pickle=True)
    assert type(loaded.model).__name__ == "Net" and loaded.model.head.weight.dtype == torch.float32
    assert torch.equal(loaded.model.head.weight, net.head.weight.half().float())
    assert "float16 weights were widened to float32" in loaded.notes and not loaded.model.training


def test_half_precision_file_into_float_model(tmp_path, source, net):
    path = written(tmp_path / "net.pt", copy.deepcopy(net).bfloat16().state_dict())
    loaded = load(path, model=f"{source}:Net")
    assert torch.equal(loaded.model.head.weight, net.head.weight.bfloat16().float())
    assert any("bfloat16 weights were read as float32" in note for note in loaded.notes)


# ---- strictness ----


def without(state, *keys):
    return OrderedDict((key, value) for key, value in state.items() if key not in keys)


def test_missing_key_is_named_and_can_be_consented(tmp_path, source, net):
    path = written(tmp_path / "net.pt", without(net.state_dict(), "head.bias", "offset"))
    with pytest.raises(
        FileError, match=r"model Net: tensors 2 missing \(offset, head\.bias\)\..*--allow-missing"
    ):
        load(path, model=f"{source}:Net")
    with pytest.raises(FileError, match=r"1 missing \(offset\)"):
        load(path, model=f"{source}:Net", allow_missing=["head.*"])
    loaded = load(path, model=f"{source}:Net", allow_missing=["head.*", "off*"])
    assert torch.equal(loaded.model.head.weight, net.head.weight)
    assert any(
        "2 tensors left as the model's code made them, by consent: offset, head.bias" in n
        for n in loaded.notes
    )


def test_unused_key_is_named_as_the_file_names_it(tmp_path, source, net):
    state = prefixed(net.state_dict(), "model.") | {
        "loss.weight": torch.ones(2),
        "model.old.w": torch.ones(1),
    }
    path = written(tmp_path / "net.pt", {"state_dict": state})
    with pytest.raises(
        FileError, match=r"2 not used \((loss\.weight, model\.old\.w|model\.old\.w, loss\.weight)\)"
    ):
        load(path, model=f"{source}:Net")
    assert load(path, model=f"{source}:Net", allow_missing=["loss.*", "old.*"]).notes


def test_two_keys_that_become_one_name(tmp_path, source, net):
    state = prefixed(net.state_dict(), "model.") | {"head.bias": torch.zeros(5)}
    path = written(tmp_path / "net.pt", state)
    with pytest.raises(FileError, match=r"1 not used \(head\.bias\)"):
        load(path, model=f"{source}:Net")


def test_prefix_that_the_model_needs_stays(tmp_path, source, net):
    (source.parent / "mynet_wrapped.py").write_text(
        "from mynet import Net\nfrom torch import nn\nclass W(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.model = Net()\n"
    )
    path = written(tmp_path / "net.pt", prefixed(net.state_dict(), "module.model."))
    loaded = load(path, model=f"{source.parent / 'mynet_wrapped.py'}:W")
    assert torch.equal(loaded.model.model.head.weight, net.head.weight)


def test_other_shape_names_the_classes(tmp_path, source, net):
    path = written(tmp_path / "net.pt", net.state_dict())
    with pytest.raises(
        FileError, match=r"head\.weight: \[5, 4\] in the file, \[9, 4\] in the model.*num_classes=5"
    ):
        load(path, model=f"{source}:Net(classes=9)")
    with pytest.raises(FileError, match="different"):
        load(path, model=f"{source}:Net(width=8)")
    loaded = load(path, model=f"{source}:Net(classes=9)", allow_missing=["head.*"])
    assert loaded.model.head.weight.shape == (9, 4) and torch.equal(loaded.model.conv.weight, net.conv.weight)


def test_other_type_is_not_cast_in_silence(tmp_path, source, net):
    state = net.state_dict()
    state["bn.num_batches_tracked"] = torch.tensor(1.5)
    with pytest.raises(FileError, match="float32 in the file, int64 in the model"):
        load(written(tmp_path / "net.pt", state), model=f"{source}:Net")


def test_step_counter_may_be_missing(tmp_path, source, net):
    path = written(tmp_path / "net.pt", without(net.state_dict(), "bn.num_batches_tracked"))
    assert load(path, model=f"{source}:Net").notes == ()


def test_second_choice_is_taken_where_the_first_does_not_fit(tmp_path, source, net):
    value = {"model_ema": {"conv.weight": net.conv.weight}, "state_dict": net.state_dict()}
    loaded = load(written(tmp_path / "net.pt", value), model=f"{source}:Net")
    assert torch.equal(loaded.model.head.weight, net.head.weight)
    assert loaded.notes == ("weights from 'state_dict'; those under 'model_ema' do not fit the model",)


def test_tied_weights(tmp_path, source, net):
    import mynet

    tied = mynet.Tied()
    for state in (tied.state_dict(), {"embed.weight": tied.embed.weight}, {"out.weight": tied.out.weight}):
        loaded = load(written(tmp_path / "tied.pt", state), model=f"{source}:Tied").model
        assert torch.equal(loaded.out.weight, tied.out.weight) and loaded.out.weight is loaded.embed.weight
    state = {"embed.weight": tied.embed.weight, "out.weight": tied.out.weight + 1}
    with pytest.raises(FileError, match="'embed.weight' and 'out.weight' are one tensor"):
        load(written(tmp_path / "tied.pt", state), model=f"{source}:Tied")
    head = {"out.weight": tied.embed.weight, "again.weight": tied.embed.weight}
    load(
        written(tmp_path / "tied.pt", head), model=f"{source}:Tied"
    )  # one tensor under two names in the file
    with pytest.raises(FileError, match=r"not used \(again\.weight\)"):
        head["again.weight"] = tied.embed.weight.clone()
        load(written(tmp_path / "tied.pt", head), model=f"{source}:Tied")


@pytest.mark.parametrize("key", ["conv.weight", "bn.running_var"])
@pytest.mark.parametrize("value, what", [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_weights_that_are_no_numbers(tmp_path, source, net, key, value, what):
    state = net.state_dict()
    state[key].view(-1)[1] = value
    with pytest.raises(FileError, match=f"net.pt has {what} values in '{key}'"):
        load(written(tmp_path / "net.pt", state), model=f"{source}:Net")


def test_masks_may_hold_minus_infinity(tmp_path, source, net):
    net.offset.fill_(float("-inf"))
    assert load(written(tmp_path / "net.pt", net.state_dict()), model=f"{source}:Net").model.offset == float(
        "-inf"
    )
    with torch.no_grad():
        net.head.bias[0] = float("-inf")
    with pytest.raises(FileError, match="infinite values in 'head.bias'"):
        load(written(tmp_path / "net.pt", net.state_dict()), model=f"{source}:Net")


def test_model_made_on_the_meta_device(tmp_path, source, net):
    (source.parent / "mynet_meta.py").write_text(
        "import torch\nfrom mynet import Net\ndef make():\n    with torch.device('meta'):\n        return Net()\n"
    )
    path = written(tmp_path / "net.pt", net.state_dict())
    with pytest.raises(FileError, match=r"1 tensors of the model without values: scratch"):
        load(path, model=f"{source.parent / 'mynet_meta.py'}:make")


# ---- --model ----


def test_factories(tmp_path, source, net, monkeypatch):
    path = written(tmp_path / "net.pt", net.state_dict())
    for spec in (
        f"{source}:Net",
        f"{source}:Net()",
        f"{source}:Net(5)",
        f"{source}:Net(classes=5, width=4)",
        f"{source}:ready",
    ):
        assert torch.equal(load(path, model=spec).model.head.weight, net.head.weight), spec
    monkeypatch.chdir(source.parent)
    sys.path.remove(str(source.parent))
    first = sys.path[0]
    assert load(path, model="mynet:Net").model
    assert sys.path[0] == first and sys.path[-1] == str(source.parent)


def test_working_directory_shadows_nothing(tmp_path, source, net, monkeypatch):
    """A folder of the user's named like a library does not get in its way."""
    for name in ("colorsys", "passes"):
        (tmp_path / f"{name}.py").write_text("raise SystemError('the wrong one')")
    (tmp_path / "mynet_user.py").write_text("import colorsys\nfrom mynet import Net\n")
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("colorsys", None)
    path = written(tmp_path / "net.pt", net.state_dict())
    assert load(path, model="mynet_user:Net").model
    assert load(path, model="mynet_user.py:Net").model


@pytest.mark.parametrize(
    "spec, message",
    [
        ("{source}:Nett", "mynet has no Nett; did you mean Net?"),
        ("{source}:broken", r"could not call: ValueError: no such width \(mynet.py:\d+\)"),
        ("{source}:number", "returned a int, not a torch.nn.Module"),
        ("{source}:torch", "torch is a module, not a function or class"),
        ("{source}:Net(colour=3)", "could not call: TypeError: .*colour"),
        ("{source}:Net(__import__('os').getcwd())", "not plain values"),
        ("{source}:Net(**{{}})", "not plain values"),
        ("{folder}/mynett.py:Net", "there is no file .*mynett.py; did you mean .*mynet.py?"),
        ("{folder}/mynet_syntax.py:Net", "could not run mynet_syntax.py: SyntaxError"),
        ("{folder}/mynet_exit.py:Net", "could not run mynet_exit.py: SystemExit"),
        ("{folder}/mynet_needs.py:Net", "there is no module no_such_library"),
        ("no_such_package.models:Net", "there is no module no_such_package"),
        ("Net", "not understood; it takes package.module:factory"),
        ("hf:{folder}", "there is no config.json"),
    ],
)
def test_what_is_wrong_with_model(tmp_path, source, net, spec, message):
    (source.parent / "mynet_syntax.py").write_text("def (")
    (source.parent / "mynet_exit.py").write_text("import sys; sys.exit('usage: train.py')")
    (source.parent / "mynet_needs.py").write_text("import no_such_library")
    path = written(tmp_path / "net.pt", net.state_dict())
    spec = spec.format(source=source, folder=source.parent)
    with pytest.raises(UsageError, match=message) as info:
        load(path, model=spec)
    assert not isinstance(info.value, FileError) and "\n" not in str(info.value)


def test_torchvision_and_timm(tmp_path):
    vision = pytest.importorskip("torchvision.models")
    state = vision.squeezenet1_1(num_classes=3).state_dict()
    path = written(tmp_path / "net.pt", {"arch": "squeezenet1_1", "state_dict": state})
    loaded = load(path, model="torchvision:squeezenet1_1(num_classes=3)")
    assert all(torch.equal(loaded.model.state_dict()[key], value) for key, value in state.items())
    with pytest.raises(FileError, match="--model torchvision:squeezenet1_1"):
        load(path)
    with pytest.raises(UsageError, match="there is no model squeezenet; did you mean squeezenet1_"):
        load(path, model="torchvision:squeezenet")
    timm = pytest.importorskip("timm")
    state = timm.create_model("resnet10t", num_classes=3).state_dict()
    loaded = load(written(tmp_path / "t.pt", state), model="timm:resnet10t(num_classes=3)")
    assert all(torch.equal(loaded.model.state_dict()[key], value) for key, value in state.items())
    with pytest.raises(UsageError, match="did you mean .*resnet10t"):
        load(path, model="timm:resnet10")


def test_torchvision_without_its_compiled_part_is_explained(tmp_path, source, net):
    """What such an installation raises, word for word, from inside the user's own import."""
    (source.parent / "mynet_vision.py").write_text(
        "try:\n    raise RuntimeError('operator torchvision::nms does not exist')\n"
        "except RuntimeError as error:\n    raise ModuleNotFoundError('Could not import X') from error\n"
    )
    path = written(tmp_path / "net.pt", net.state_dict())
    with pytest.raises(UsageError, match="the installed torchvision is not the one for this torch"):
        load(path, model=f"{source.parent / 'mynet_vision.py'}:Net")


# ---- no --model, and what is no model ----


@pytest.mark.parametrize(
    "kind, says, command",
    [
        ("whole module", r"a whole module, mynet\.Net: 9 tensors, 151 values", "--model mynet:Net"),
        ("ultralytics", r"a checkpoint of the module mynet\.Net", "--model mynet:Net"),
        (
            "lightning",
            r"a Lightning checkpoint: 9 tensors, 151 values; 5 labels \(a, b, c, \.\.\. 2 more\)",
            "--model path/to/your",
        ),
        ("timm", "a checkpoint: 9 tensors", "--model timm:net"),
        ("bare", "a state dict: 9 tensors", "--model path/to/your"),
    ],
)
def test_without_model_it_says_what_to_type(tmp_path, net, kind, says, command):
    path = written(tmp_path / "my net.pt", CHECKPOINTS[kind](net))
    with pytest.raises(
        FileError, match=rf"my net\.pt holds {says}.*compressor '.*my net\.pt' {command}.* --input 'x:f32"
    ):
        load(path)
    assert peek(path).summary()


def test_class_of_a_script(tmp_path, net):
    type(net).__module__ = "__main__"
    sys.modules["__main__"].Net = type(net)
    try:
        path = written(tmp_path / "net.pt", net)
    finally:
        del sys.modules["__main__"].Net
    with pytest.raises(FileError, match=r"--model path/to/your/script\.py:Net"):
        load(path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "notes.pt",
            b"hello world\n",
            "notes.pt is no model: it is a text file that begins with 'hello world'",
        ),
        (
            "notes.pt2",
            b"hello world\n",
            "notes.pt2 is no model: it is a text file that begins with 'hello world'",
        ),
        ("notes.safetensors", b"hello world\n", "is no model: it is a text file"),
        ("page.pth", b"<!DOCTYPE html><html>", "it is a web page"),
        ("big.bin", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("net.tar", b"\0" * 257 + b"ustar\0", "it is a tar archive"),
        ("net.gguf", b"GGUF\3\0\0\0", "GGUF"),
        ("net.pt", b"", "net.pt is no model: it is empty"),
        ("net.pt", b"\xfe\xed\xfa\xce" * 9, "the bytes of no format"),
        ("net.pt", b"PK\x03\x04" + b"\0" * 100, "net.pt is damaged"),
        ("net.onnx", b"\x08\x09", r"net.onnx is ONNX already.*compress inspect .*give the PyTorch model"),
        ("net.ckpt", b"\x80\x02}q\x00.", "net.ckpt holds no weights"),
        ("net.pt", b"\x80\x02", "net.pt is damaged"),
    ],
)
def test_what_is_no_model(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    for trust in (False, True):
        with pytest.raises(FileError, match=None if trust else message) as info:
            load(path, model="mynet:Net", trust_pickle=trust)
        assert "\n" not in str(info.value) and info.value.exit_code == 3


def test_missing_file_and_folders(tmp_path, net):
    written(tmp_path / "resnet20.pt", net)
    with pytest.raises(FileError, match=r"There is no file .*resnet2O\.pt\. Did you mean .*resnet20\.pt\?"):
        load(tmp_path / "resnet2O.pt")
    with pytest.raises(FileError, match=r"There is no file .*nothing\.onnx2\.$"):
        load(tmp_path / "none" / "nothing.onnx2")
    with pytest.raises(FileError, match=r"a folder without config\.json"):
        load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileError, match=r"there is no adapter_model\.safetensors in it"):
        load(tmp_path)


def test_single_tensor_and_nameless_tensors(tmp_path):
    for value in (torch.ones(3), [torch.ones(3)], {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}):
        with pytest.raises(FileError, match="holds no weights"):
            load(written(tmp_path / "x.pt", value), model="mynet:Net")


def test_options_that_do_not_go_together(tmp_path):
    with torch.no_grad():
        torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(3, 2),)), tmp_path / "net.pt2")
    for options in ({"model": "mynet:Net"}, {"adapter": "folder"}):
        with pytest.raises(UsageError, match=f"leave --{next(iter(options))} out"):
            load(tmp_path / "net.pt2", **options)
    renamed = tmp_path / "renamed.pt"
    shutil.copy(tmp_path / "net.pt2", renamed)
    assert load(renamed).example is not None  # told by its content, not by its name


@pytest.mark.filterwarnings("ignore")
def test_torchscript_even_by_consent(tmp_path):
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), path)
    for trust in (False, True):
        with pytest.raises(FileError, match=r"TorchScript.*torch\.export"):
            load(path, trust_pickle=trust)
