"""sentence-transformers folders: poolings, dense layers and normalisation as their definitions have them."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.errors import FileError, UnsupportedError
from compressor.load import load

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install transformers peft"
)
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {
    "vocab_size": 40,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
IDS = torch.arange(3, 18).reshape(3, 5)
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])  # full, padded right, padded left
NAMES = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "", "Dropout": "4_Dropout"}


def written(root, *modules, pooling=None, prefix="sentence_transformers.models."):
    """A pipeline's folder round a small BERT: modules are class names, or (class name, settings, tensors)."""
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
    model.save_pretrained(root)
    listed = []
    for index, module in enumerate(("Transformer", "Pooling", *modules)):
        name, settings, tensors = module if isinstance(module, tuple) else (module, None, None)
        path = NAMES.get(name, f"{index}_{name}")
        if name == "Pooling":
            settings = pooling or {"pooling_mode_mean_tokens": True, "word_embedding_dimension": 8}
        if settings is not None:
            (root / path).mkdir()
            (root / path / "config.json").write_text(json.dumps(settings))
        if tensors is not None:
            save_file(tensors, root / path / "model.safetensors")
        listed.append({"idx": index, "name": str(index), "path": path, "type": prefix + name})
    (root / "modules.json").write_text(json.dumps(listed))
    return model


def embedding(loaded, mask=MASK):
    with torch.no_grad():
        output = loaded.model(input_ids=IDS, attention_mask=mask)
    assert list(output) == ["sentence_embedding"]
    return output["sentence_embedding"]


def tokens(model, mask=MASK):
    """The vectors of each sentence's own tokens, padding dropped."""
    with torch.no_grad():
        hidden = model(input_ids=IDS, attention_mask=mask).last_hidden_state
    return [
        (row[keep.bool()], torch.arange(1, len(row) + 1)[keep.bool()])
        for row, keep in zip(hidden, mask, strict=True)
    ]


POOLINGS = {
    "cls": lambda x, p: x[0],
    "max": lambda x, p: x.max(0).values,
    "mean": lambda x, p: x.mean(0),
    "mean_sqrt_len_tokens": lambda x, p: x.sum(0) / math.sqrt(len(x)),
    "weightedmean": lambda x, p: (x * p[:, None]).sum(0) / p.sum(),
    "lasttoken": lambda x, p: x[-1],
}
FLAGS = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


@pytest.mark.parametrize("mode", POOLINGS)
@pytest.mark.parametrize("style", ["flags", "name"])
def test_pooling(tmp_path, mode, style):
    flags = {f"pooling_mode_{flag}": flag.startswith(mode.removesuffix("_tokens")) for flag in FLAGS}
    if mode == "mean":
        flags["pooling_mode_mean_sqrt_len_tokens"] = False
    model = written(tmp_path, pooling=flags if style == "flags" else {"pooling_mode": mode})
    found = embedding(load(tmp_path))
    results = {name: torch.stack([pool(x, p) for x, p in tokens(model)]) for name, pool in POOLINGS.items()}
    assert torch.allclose(found, results.pop(mode), atol=1e-6)
    assert not any(torch.allclose(found, other, atol=1e-3) for other in results.values())


def test_poolings_are_joined_in_order(tmp_path):
    flags = {f"pooling_mode_{flag}": flag in ("mean_tokens", "cls_token") for flag in FLAGS}
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    model = written(tmp_path / "old", pooling=flags)
    written(tmp_path / "new", pooling={"pooling_mode": ["mean", "cls"]})
    first, mean = (torch.stack([POOLINGS[name](x, p) for x, p in tokens(model)]) for name in ("cls", "mean"))
    assert torch.allclose(embedding(load(tmp_path / "old")), torch.cat([first, mean], 1), atol=1e-6)
    assert torch.allclose(embedding(load(tmp_path / "new")), torch.cat([mean, first], 1), atol=1e-6)


def test_padding_changes_nothing(tmp_path):
    """For every pooling: one sentence alone, and the same among longer ones. A row of padding stays finite."""
    for mode in POOLINGS:
        folder = tmp_path / mode
        folder.mkdir()
        written(folder, pooling={"pooling_mode": mode})
        model = load(folder).model
        with torch.no_grad():
            alone = model(IDS[1:2, :3], MASK[1:2, :3])["sentence_embedding"]
            among = model(IDS, MASK)["sentence_embedding"][1:2]
            unmasked = model(IDS, torch.ones_like(MASK))["sentence_embedding"][1:2]
            empty = model(IDS, torch.zeros_like(MASK))["sentence_embedding"]
        assert torch.allclose(alone, among, atol=1e-6) and not torch.allclose(alone, unmasked, atol=1e-4)
        assert torch.isfinite(empty).all()


DENSE = {"linear.weight": torch.linspace(-1, 1, 48).reshape(6, 8), "linear.bias": torch.linspace(-1, 1, 6)}
NORM = {"norm.weight": torch.linspace(0.5, 2, 6), "norm.bias": torch.linspace(-1, 1, 6)}


@pytest.mark.parametrize("prefix", ["sentence_transformers.models.", "sentence_transformers.base.modules.x."])
def test_the_whole_pipeline(tmp_path, prefix):
    settings = {"in_features": 8, "out_features": 6, "bias": True}
    tanh = settings | {"activation_function": "torch.nn.modules.activation.Tanh"}
    model = written(
        tmp_path,
        ("Dense", tanh, DENSE),
        "Dropout",
        ("LayerNorm", {"dimension": 6}, NORM),
        "Normalize",
        prefix=prefix,
    )
    loaded = load(tmp_path)
    x = torch.stack([POOLINGS["mean"](x, p) for x, p in tokens(model)])
    x = torch.tanh(x @ DENSE["linear.weight"].T + DENSE["linear.bias"])
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    x = x * NORM["norm.weight"] + NORM["norm.bias"]
    found = embedding(loaded)
    assert torch.allclose(found, x / x.norm(dim=1, keepdim=True), atol=1e-6) and not torch.allclose(
        found, x, atol=1e-2
    )
    assert [spec.name for spec in loaded.inputs] == ["input_ids", "attention_mask"]
    assert torch.allclose(found.norm(dim=1), torch.ones(3))
    before = loaded.sha256
    save_file(DENSE | {"linear.bias": torch.zeros(6)}, tmp_path / "2_Dense" / "model.safetensors")
    assert load(tmp_path).sha256 != before


@pytest.mark.parametrize("projected", [False, True])
def test_residual_dense(tmp_path, projected):
    tensors = {"linear.weight": torch.eye(8)[: 6 if projected else 8].contiguous() * 2}
    if projected:
        tensors["residual.weight"] = torch.linspace(-1, 1, 48).reshape(6, 8)
    settings = {
        "bias": False,
        "use_residual": True,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    model = written(tmp_path, ("Dense", settings, tensors))
    x = torch.stack([POOLINGS["mean"](x, p) for x, p in tokens(model)])
    residual = x @ tensors["residual.weight"].T if projected else x
    assert torch.allclose(embedding(load(tmp_path)), x @ tensors["linear.weight"].T + residual, atol=1e-6)


def test_a_transformer_without_a_pooler_and_in_a_folder_of_its_own(tmp_path):
    model = written(tmp_path)
    weights = {
        key: value.clone()
        for key, value in load_file(tmp_path / "model.safetensors").items()
        if "pooler" not in key
    }
    inner = tmp_path / "0_Transformer"
    inner.mkdir()
    (tmp_path / "config.json").rename(inner / "config.json")
    (tmp_path / "model.safetensors").unlink()
    save_file(weights, inner / "model.safetensors")
    listed = json.loads((tmp_path / "modules.json").read_text())
    listed[0]["path"] = "0_Transformer"
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    loaded = load(tmp_path)
    assert torch.allclose(embedding(loaded), torch.stack([x.mean(0) for x, _ in tokens(model)]), atol=1e-6)
    assert loaded.tokenizer == tmp_path and loaded.notes == ()


def test_a_task_gives_the_transformer_alone(tmp_path):
    model = written(tmp_path, "Normalize")
    loaded = load(tmp_path, task="feature-extraction")
    with torch.no_grad():
        found, expected = (
            m(input_ids=IDS, attention_mask=MASK).last_hidden_state for m in (loaded.model, model)
        )
    assert torch.equal(found, expected)


def test_adapters_of_a_pipeline(tmp_path):
    """Beside it, and in place of its transformer's weights."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    written(tmp_path / "base", "Normalize")
    plain = embedding(load(tmp_path / "base"))
    base = transformers.BertModel.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        task_type="FEATURE_EXTRACTION", r=2, target_modules=["query", "value"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(base, config).eval()
    adapted.save_pretrained(tmp_path / "lora")
    pooled = torch.stack([x.mean(0) for x, _ in tokens(adapted)])
    expected = pooled / pooled.norm(dim=1, keepdim=True)
    loaded = load(tmp_path / "base", adapter=tmp_path / "lora")
    assert torch.allclose(embedding(loaded), expected, atol=1e-6) and not torch.allclose(
        plain, expected, atol=1e-4
    )
    for name in ("modules.json", "1_Pooling"):
        (tmp_path / "base" / name).rename(tmp_path / "lora" / name)
    loaded = load(tmp_path / "lora")
    assert torch.allclose(embedding(loaded), expected, atol=1e-6)
    assert loaded.notes == ("adapter lora (LORA): 4 tensors",)


@pytest.mark.parametrize(
    "modules, message",
    [
        (["WordWeights"], "no WordWeights among the modules that can be compiled"),
        (
            [("Dense", {"activation_function": "mine.Steps"}, DENSE)],
            "'mine.Steps' of its Dense is none of torch's",
        ),
        (
            [("Dense", {"activation_function": "torch.nn.modules.activation.MultiheadAttention"}, DENSE)],
            "could not make",
        ),
        ([("Dense", {"activation_function": "torch.nn.os.system"}, DENSE)], "none of torch's"),
        ([("Dense", {"module_input_name": "token_embeddings"}, DENSE)], "a Dense on .*token_embeddings"),
        ([("Dense", {}, {"other": torch.ones(2)})], r"its linear\.weight is missing"),
        ([("Dense", {}, DENSE | {"more": torch.ones(1)})], "holds 'more', which its module has no use for"),
        ([("LayerNorm", {}, {"norm.weight": torch.ones(3)})], r"norm\.weight or norm\.bias is missing"),
    ],
)
def test_modules_that_are_not_known(tmp_path, modules, message):
    written(tmp_path, *modules)
    with pytest.raises((UnsupportedError, FileError), match=message):
        load(tmp_path)


def test_settings_that_are_not_known(tmp_path):
    written(tmp_path, pooling={"pooling_mode": "attention"})
    with pytest.raises(UnsupportedError, match="no pooling 'attention'; there are cls"):
        load(tmp_path)
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"include_prompt": False}))
    assert load(tmp_path).notes == (
        "prompts are pooled like other text: the pipeline would leave their tokens out",
    )
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"transformer_task": "fill-mask"}))
    with pytest.raises(UnsupportedError, match="gives the last_hidden_state of fill-mask, not token vectors"):
        load(tmp_path)
    (tmp_path / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": 5, "do_lower_case": False})
    )
    for listed, message in (
        ([{"type": "a.Transformer", "path": ""}], "no Pooling makes a sentence"),
        ([{"type": "a.StaticEmbedding", "path": ""}], "its first module is a StaticEmbedding"),
        ([{"type": "a.Transformer", "path": "../.."}], "lies outside of the folder"),
        ([], "not a list of modules"),
        ({}, "not a list of modules"),
        ([3], "not a list of modules"),
    ):
        (tmp_path / "modules.json").write_text(json.dumps(listed))
        with pytest.raises((UnsupportedError, FileError), match=message):
            load(tmp_path)
    (tmp_path / "modules.json").write_text("[" * 100_000)
    with pytest.raises(FileError, match=r"modules\.json cannot be read"):
        load(tmp_path)


@pytest.mark.slow
def test_the_command(tmp_path, run):
    """Any number of sentences of any length, one output, no package of theirs."""
    import onnxruntime

    model = written(
        tmp_path / "st", "Normalize", pooling={"pooling_mode": ["mean", "max", "lasttoken", "weightedmean"]}
    )
    code, _, error = run(tmp_path / "st", "--passes", "fold", "--no-measure", "-o", tmp_path / "out")
    assert code == 0, error
    session = onnxruntime.InferenceSession(
        tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    assert [output.name for output in session.get_outputs()] == ["sentence_embedding"]
    found = session.run(None, {"input_ids": IDS.numpy(), "attention_mask": MASK.numpy()})[0]
    modes = ("mean", "max", "lasttoken", "weightedmean")
    x = torch.stack([torch.cat([POOLINGS[mode](x, p) for mode in modes]) for x, p in tokens(model)])
    assert torch.allclose(torch.tensor(found), x / x.norm(dim=1, keepdim=True), atol=1e-5)
    alone = session.run(None, {"input_ids": IDS[1:2, :3].numpy(), "attention_mask": MASK[1:2, :3].numpy()})[0]
    assert torch.allclose(torch.tensor(alone), torch.tensor(found[1:2]), atol=1e-5)
