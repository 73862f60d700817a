"""Hugging Face folders and PEFT adapters, made here with random weights: every weight accounted for, from disk only."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compressor.errors import FileError, UsageError
from compressor.ir import Input
from compressor.load import load

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install transformers peft"
)
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, id2label={0: "bad", 1: "good", 2: "so so"})
    model = transformers.BertForSequenceClassification(config).eval()
    for parameter in model.parameters():
        parameter.data.uniform_(-1, 1)
    return model


@pytest.fixture
def folder(bert, tmp_path):
    bert.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def same(found, expected):
    found, expected = found.state_dict(), expected.state_dict()
    return found.keys() == expected.keys() and all(
        torch.equal(found[key], value) for key, value in expected.items()
    )


def rewrite(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file({key: value.clone() for key, value in weights.items()}, path, metadata={"format": "pt"})


def test_folder(folder, bert, capfd):
    loaded = load(folder)
    assert (
        same(loaded.model, bert) and not loaded.model.training and loaded.labels == ("bad", "good", "so so")
    )
    assert not loaded.model.config.use_cache and len(loaded.sha256) == 64
    assert capfd.readouterr() == ("", "")
    before = loaded.sha256
    rewrite(folder, lambda weights: weights["classifier.bias"].add_(1))
    assert load(folder).sha256 != before and not same(load(folder).model, bert)


def test_folder_with_a_pickle(folder, bert, tmp_path):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert same(load(folder).model, bert)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileError, match="holds no weights"):
        load(folder)


def test_a_head_that_nobody_trained(folder):
    rewrite(folder, lambda weights: weights.update({"extra.weight": weights.pop("classifier.weight")}))
    with pytest.raises(FileError, match=r"1 missing \(classifier\.weight\); 1 unexpected \(extra\.weight\)"):
        load(folder)
    with pytest.raises(FileError, match=r"weights 1 unexpected"):
        load(folder, allow_missing=["classifier.*"])
    assert len(load(folder, allow_missing=["classifier.*", "extra.*"]).notes) == 2


def test_half_precision_is_widened(bert, tmp_path):
    half = transformers.BertForSequenceClassification(bert.config).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    loaded = load(tmp_path / "half")
    assert torch.equal(loaded.model.classifier.weight, half.classifier.weight.float())
    assert loaded.notes == ("bfloat16 weights were read as float32",)


def test_architecture_of_a_folder_for_other_weights(folder, bert, tmp_path):
    torch.save(
        {"state_dict": {f"model.{key}": value for key, value in bert.state_dict().items()}},
        tmp_path / "tuned.ckpt",
    )
    loaded = load(tmp_path / "tuned.ckpt", model=f"hf:{folder}")
    assert same(loaded.model, bert) and loaded.labels == ("bad", "good", "so so")
    with pytest.raises(UsageError, match="leave --model out"):
        load(folder, model=f"hf:{folder}")


def test_code_in_the_folder_is_not_run(folder, tmp_path):
    mark = tmp_path / "mark"
    (folder / "modeling.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "modeling.C", "AutoModel": "modeling.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"hf:.*could not read its config\.json"):
        load(folder)
    assert not mark.exists()


def test_broken_configs(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    with pytest.raises(FileError, match="quantised already"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(FileError, match=r"config\.json cannot be read"):
        load(folder)


@pytest.mark.slow
def test_exported_bert_loads_in_a_fresh_process(bert, tmp_path, python):
    """Its output type is registered by a module of transformers that the loading process has not imported."""
    with torch.no_grad():
        program = torch.export.export(
            bert, (), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, strict=False
        )
    torch.export.save(program, tmp_path / "bert.pt2")
    (tmp_path / "fresh.py").write_text(
        "import sys, torch\n"
        "from compressor.load import load\n"
        "assert 'transformers' not in sys.modules\n"
        "try:\n    torch.export.load('bert.pt2')\n"
        "except Exception:\n    print(type(load('bert.pt2').model).__name__)\n"
    )
    done = python("fresh.py")
    assert done.stdout == "ExportedProgram\n", done.stderr


# ---- adapters ----


@pytest.fixture
def adapted(bert, folder, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    torch.manual_seed(1)
    base = transformers.BertForSequenceClassification.from_pretrained(folder)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "lora")
    return model


def test_adapter(adapted, bert, folder, tmp_path, capfd):
    loaded = load(folder, adapter=str(tmp_path / "lora"))
    with torch.no_grad():
        found, expected, base = (model(input_ids=IDS).logits for model in (loaded.model, adapted, bert))
    assert torch.equal(found, expected) and not torch.allclose(found, base, atol=1e-5)
    assert not loaded.model.training and loaded.notes == ("adapter lora (LORA): 4 tensors",)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w, key: w.pop(key), r"1 missing \(.*lora_A"),
        (
            lambda w, key: w.update({"base_model.model.bert.other.lora_A.weight": w[key].clone()}),
            r"1 not used \(.*other",
        ),
        (lambda w, key: w.update({key.replace("layer.0", "layer.7"): w.pop(key)}), r"1 missing .*1 not used"),
    ],
)
def test_adapter_that_fits_in_part(adapted, folder, tmp_path, change, message):
    """peft warns of the first, and says nothing of the others."""
    path = tmp_path / "lora" / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights, next(key for key in weights if "lora_A" in key))
    save_file(weights, path)
    with pytest.raises(FileError, match=message):
        load(folder, adapter=str(tmp_path / "lora"))


def test_adapter_that_is_none(adapted, folder, tmp_path):
    with pytest.raises(FileError, match=r"there is no adapter_config\.json"):
        load(folder, adapter=str(folder))
    settings = tmp_path / "lora" / "adapter_config.json"
    table = json.loads(settings.read_text())
    settings.write_text(json.dumps(table | {"megatron_config": {"a": 1}, "megatron_core": "antigravity"}))
    with pytest.raises(FileError, match="names a module to import"):
        load(folder, adapter=str(tmp_path / "lora"))
    settings.write_text(json.dumps(table))
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileError, match=r"no adapter_model\.safetensors"):
        load(folder, adapter=str(tmp_path / "lora"))
    shutil.rmtree(folder)
    with pytest.raises(FileError, match="is an adapter: give its base model's folder"):
        load(tmp_path / "lora")


def test_adapter_on_a_plain_module(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    (tmp_path / "mynet_plain.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))\n"
    )
    base = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    torch.save(base.state_dict(), tmp_path / "net.pt")
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    ).eval()
    model.save_pretrained(tmp_path / "lora")
    loaded = load(
        tmp_path / "net.pt", model=f"{tmp_path / 'mynet_plain.py'}:make", adapter=str(tmp_path / "lora")
    )
    x = torch.randn(3, 4)
    assert torch.equal(loaded.model(x), model(x)) and not torch.allclose(
        loaded.model(x), base[2](base[1](x @ base[0].weight.T))
    )


def test_a_folder_says_what_its_model_takes(tmp_path):
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "text")
    shape = ("batch", "sequence")
    assert load(tmp_path / "text").inputs == (
        Input("input_ids", torch.int64, shape),
        Input("attention_mask", torch.int64, shape),
    )
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vision = transformers.ViTConfig(**sizes, image_size=32, patch_size=8)
    transformers.ViTForImageClassification(vision).save_pretrained(tmp_path / "image")
    (image,) = load(tmp_path / "image").inputs
    assert image == Input("pixel_values", torch.float32, ("batch", 3, 32, 32))
