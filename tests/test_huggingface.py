"""Hugging Face folders and PEFT adapters, made here with random weights: every weight accounted for, from disk only."""

import json
import shutil
import sys

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


@pytest.mark.parametrize("kernel", ["someone/kernel", "flash_attention_2", {"": "someone/kernel"}])
def test_no_kernel_is_fetched(folder, bert, kernel):
    """transformers runs kernels of the hub where a config names them."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": kernel}))
    loaded = load(folder).model
    assert same(loaded, bert) and loaded.config._attn_implementation == "sdpa"
    with pytest.raises(Exception, match="(?i)kernel|flash"):
        transformers.BertForSequenceClassification.from_pretrained(folder)


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


# ---- the same as the library, without its copies ----

TEXT = {"input_ids": IDS, "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
IMAGE = {
    "image_size": 32,
    "patch_size": 8,
    **{key: value for key, value in SMALL.items() if key != "vocab_size"},
}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)}
GROUPED = {"num_key_value_heads": 1}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SMALL | GROUPED, TEXT),
    "tied llama": ("LlamaForCausalLM", "LlamaConfig", SMALL | {"tie_word_embeddings": True}, TEXT),
    "bert": ("BertForMaskedLM", "BertConfig", SMALL, TEXT),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2}, TEXT),
    "t5": ("T5EncoderModel", "T5Config", T5, TEXT),
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGE, PIXELS),
    "clip": ("CLIPModel", "CLIPConfig", {"text_config": SMALL, "vision_config": IMAGE}, TEXT | PIXELS),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", SMALL | GROUPED | {"num_local_experts": 2}, TEXT),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loads_what_the_library_loads(tmp_path, name):
    """Tied weights, buffers that no file holds, renamed and fused weights: all of it, to the bit."""
    model, config, sizes, inputs = ARCHITECTURES[name]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**sizes)).eval()
    made.save_pretrained(tmp_path / "model", max_shard_size="4KB")
    theirs = getattr(transformers, model).from_pretrained(tmp_path / "model").eval()
    loaded = load(tmp_path / "model")
    ours = loaded.model
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1 and loaded.notes == ()
    assert [spec.name for spec in loaded.inputs] == list(inputs)
    buffers, expected = dict(ours.named_buffers()), dict(theirs.named_buffers())
    assert buffers.keys() == expected.keys() and all(torch.equal(buffers[k], expected[k]) for k in expected)
    assert same(ours, theirs) and len(list(ours.parameters())) == len(list(theirs.parameters()))
    with torch.no_grad():
        outputs = [[v for v in m(**inputs).values() if isinstance(v, torch.Tensor)] for m in (ours, theirs)]
        list(ours.parameters())[-1].mul_(-1).add_(1)
        other = [v for v in ours(**inputs).values() if isinstance(v, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(outputs[0], other, strict=True))
    assert same(
        theirs, getattr(transformers, model).from_pretrained(tmp_path / "model")
    )  # the file is as it was


ANONYMOUS = """
import sys, torch, transformers
from compressor.load import load

def megabytes():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("Anonymous:"))

loaded = []  # kept, so that none takes the memory of another
for adapter in ((), sys.argv[2:]):
    load(sys.argv[1], adapter=adapter)
    before = megabytes()
    loaded.append(load(sys.argv[1], adapter=adapter).model)
    print(megabytes() - before, sum(p.numel() for p in loaded[-1].parameters()) * 4 / 2**20)
before = megabytes()
copies = [p.detach().clone() for p in loaded[0].parameters()]
print(megabytes() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_weights_stay_in_their_files(tmp_path, python):
    """Under a tenth of the model in memory of its own, checks and checksum included, with an adapter too."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    sizes = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 1536}
    config = transformers.LlamaConfig(**sizes, vocab_size=8000)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "big", max_shard_size="20MB")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "up_proj"])).save_pretrained(
        tmp_path / "lora"
    )
    (tmp_path / "memory.py").write_text(ANONYMOUS)
    done = python("memory.py", str(tmp_path / "big"), str(tmp_path / "lora"))
    grown, size, adapted, larger, copied = map(float, done.stdout.split())
    assert size > 80 and grown < 0.1 * size < 0.5 * size < copied, done.stderr
    assert larger > size and adapted < 0.1 * larger


# ---- tasks and heads ----


def test_task_of_a_folder(folder, bert, tmp_path):
    features = load(folder, task="feature-extraction")
    assert type(features.model).__name__ == "BertModel"
    assert features.notes == ("2 weights of another head are not used (classifier.bias, classifier.weight)",)
    with torch.no_grad():
        assert torch.equal(features.model(**TEXT).last_hidden_state, bert.bert(**TEXT).last_hidden_state)
    with pytest.raises(
        FileError, match=r"fit BertForQuestionAnswering: weights 2 missing \(qa_outputs\.bias.*--task"
    ):
        load(folder, task="question-answering")
    with pytest.raises(FileError, match=r"weights \d missing \(cls\.predictions"):
        load(folder, task="masked-lm")
    with pytest.raises(UsageError, match=r"a bert model can do .*causal-lm.*text-classification"):
        load(folder, task="image-classification")
    with pytest.raises(UsageError, match="there is no such task; there are"):
        load(folder, task="poetry")
    torch.save(bert.state_dict(), tmp_path / "bert.pt")
    with pytest.raises(UsageError, match="is for the model of a folder"):
        load(tmp_path / "bert.pt", model=f"hf:{folder}", task="text-classification")


def test_features_of_a_model_without_a_pooler(tmp_path):
    """Its second output would be random: there is none. An encoder and decoder give the encoder's features."""
    transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)).save_pretrained(tmp_path / "mlm")
    loaded = load(tmp_path / "mlm", task="feature-extraction")
    assert list(loaded.model(**TEXT)) == ["last_hidden_state"] and "not used (cls." in loaded.notes[0]
    transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)).save_pretrained(tmp_path / "t5")
    loaded = load(tmp_path / "t5", task="feature-extraction")
    assert type(loaded.model).__name__ == "T5EncoderModel" and len(loaded.inputs) == 2


@pytest.mark.parametrize("labels", [1, 2, 5])
def test_label_count_is_the_classifiers(folder, bert, labels):
    """Whatever config.json says."""
    weights = {"classifier.weight": torch.rand(labels, 16), "classifier.bias": torch.rand(labels)}
    rewrite(folder, lambda stored: stored.update(weights))
    loaded = load(folder)
    assert torch.equal(loaded.model.classifier.weight, weights["classifier.weight"])
    assert loaded.labels == () and loaded.model(**TEXT).logits.shape == (2, labels)
    rewrite(folder, lambda stored: stored.pop("classifier.bias"))
    with pytest.raises(FileError, match=r"1 missing \(classifier\.bias\)"):
        load(folder)


def test_damaged_parts(folder):
    index = folder / "model.safetensors.index.json"
    for name in ("../model.safetensors", "/etc/passwd", "model-2.safetensors", ".hidden"):
        index.write_text(json.dumps({"weight_map": {"classifier.bias": name}}))
        with pytest.raises(FileError, match="which is not there"):
            load(folder)
    index.unlink()
    shutil.copy(folder / "model.safetensors", folder / "extra.safetensors")
    assert load(folder).notes == ()  # model.safetensors it is
    (folder / "model.safetensors").rename(folder / "first.safetensors")
    with pytest.raises(FileError, match="in more than one of its files"):
        load(folder)


def test_tokenizer_folder(folder, adapted, tmp_path):
    lora = tmp_path / "lora"
    assert load(folder).tokenizer is None
    (folder / "tokenizer_config.json").write_text("{}")
    assert load(folder).tokenizer == folder
    (lora / "tokenizer.json").write_text("{}")
    assert load(folder, adapter=lora).tokenizer == lora
    settings = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(folder)}))
    assert load(lora).tokenizer == lora
    (lora / "tokenizer.json").rename(folder / "tokenizer.json")
    assert load(lora).tokenizer == folder


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


def encoder(tmp_path):
    """A bare encoder's folder, as people fine-tune it: no head at all, two labels in its settings."""
    torch.manual_seed(2)
    transformers.BertModel(transformers.BertConfig(**SMALL)).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


HEADS = {
    "SEQ_CLS": ("BertForSequenceClassification", "classifier"),
    "TOKEN_CLS": ("BertForTokenClassification", "classifier"),
    "QUESTION_ANS": ("BertForQuestionAnswering", "qa_outputs"),
}


@pytest.mark.parametrize("task", HEADS)
def test_a_head_that_came_with_the_adapter(tmp_path, task):
    """Task and label count are the adapter's: the base has neither."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    folder, (kind, head) = encoder(tmp_path), HEADS[task]
    labels = 2 if task == "QUESTION_ANS" else 4
    base = getattr(transformers, kind).from_pretrained(folder, num_labels=labels)
    config = peft.LoraConfig(task_type=task, r=2, target_modules=["query"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "lora")
    for path, options in ((folder, {"adapter": tmp_path / "lora"}), (tmp_path / "lora", {})):
        loaded = load(path, **options)
        with torch.no_grad():
            found, expected = loaded.model(**TEXT), model(**TEXT)
        keys = [key for key, value in found.items() if isinstance(value, torch.Tensor)]
        assert all(torch.equal(found[key], expected[key]) for key in keys) and found[keys[0]].abs().max() > 0
        assert type(loaded.model).__name__ == kind and loaded.labels == ()
    path = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if head not in key}, path)
    with pytest.raises(FileError, match=rf"2 missing \({head}\.bias, {head}\.weight\)"):
        load(folder, adapter=tmp_path / "lora")


def test_a_class_that_only_peft_noted(tmp_path):
    """Image adapters have no task; what peft noted of the model that it wrapped is a name in transformers."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    transformers.ViTModel(transformers.ViTConfig(**IMAGE)).save_pretrained(tmp_path / "vit")
    base = transformers.ViTForImageClassification.from_pretrained(tmp_path / "vit", num_labels=7)
    config = peft.LoraConfig(
        r=2, target_modules=["query", "q_proj"], modules_to_save=["classifier"], init_lora_weights=False
    )
    model = peft.get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "lora")
    loaded = load(tmp_path / "vit", adapter=tmp_path / "lora")
    with torch.no_grad():
        found, expected = loaded.model(**PIXELS).logits, model(**PIXELS).logits
    assert torch.equal(found, expected) and found.shape == (2, 7)
    table = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    table["auto_mapping"] = {"base_model_class": "system", "parent_library": "os"}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(table))
    with pytest.raises(FileError, match=r"not used \(.*classifier.*--task"):
        load(tmp_path / "vit", adapter=tmp_path / "lora")
    assert load(tmp_path / "vit", adapter=tmp_path / "lora", task="image-classification")


def test_adapters_for_different_tasks(adapted, folder, tmp_path):
    shutil.copytree(tmp_path / "lora", tmp_path / "other")
    table = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(table | {"task_type": "TOKEN_CLS"}))
    with pytest.raises(UsageError, match="trained for text-classification and token-classification"):
        load(folder, adapter=[tmp_path / "lora", tmp_path / "other"])


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
    with pytest.raises(FileError, match=r"there is no adapter_model\.safetensors"):
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
