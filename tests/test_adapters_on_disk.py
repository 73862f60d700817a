"""PEFT adapters from their folders: which base, which weights, several at once; peft's numbers are the reference."""

import hashlib
import importlib.util
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compressor import folders
from compressor.errors import FileError, UsageError
from compressor.load import adapters_of, load

peft = pytest.importorskip("peft", reason="peft is not installed: pip install transformers peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IDS = torch.arange(3, 15).reshape(2, 6)
TARGETS = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A causal llama with random weights, in a folder."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES, vocab_size=40, num_key_value_heads=1, tie_word_embeddings=False
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.5, 0.5)
    folder = tmp_path_factory.mktemp("base") / "llama"
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("places", [("a", "b"), ("b", "a")])
def test_the_checksum_is_not_of_where_the_folders_lie(tmp_path, places):
    files = [tmp_path / places[0] / "adapter_config.json", tmp_path / places[1] / "config.json"]
    for path, text in zip(files, "xy", strict=True):
        path.parent.mkdir()
        path.write_text(text)
    assert folders.digest(files) == hashlib.sha256(b"adapter_config.json\0xconfig.json\0y").hexdigest()
    files[0].write_text("z")
    assert folders.digest(files) != hashlib.sha256(b"adapter_config.json\0xconfig.json\0y").hexdigest()


def plain(base):
    return transformers.LlamaForCausalLM.from_pretrained(base).eval()


def trained(model, seed):
    """Every tensor that peft would train, away from where it starts."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.2)
    return model.eval()


def saved(base, folder, seed=1, config=None, **options):
    """A trained adapter in a folder, LoRA unless `config` says otherwise; and the model that it was trained on."""
    config = config or peft.LoraConfig(**{"r": 2, "target_modules": TARGETS, **options})
    model = trained(peft.get_peft_model(plain(base), config), seed)
    model.save_pretrained(folder)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def close(found, expected):
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def rewrite(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def effective(base, parts):
    """The base with `weight * scaling * B A` added to its matrices, in float64, by hand: (folder, factor) a part."""
    model = plain(base).double()
    for folder, factor in parts:
        tensors = {
            key: value.double() for key, value in load_file(folder / "adapter_model.safetensors").items()
        }
        for key in tensors:
            if "lora_A" in key:
                delta = tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
                name = key.removeprefix("base_model.model.").split(".lora_A")[0]
                with torch.no_grad():
                    model.get_submodule(name).weight += factor * delta
    return logits(model).float()


# ---- one ----


@pytest.mark.parametrize("weight", [1.0, 0.5, -2.0, 0.0])
def test_a_weight_scales_the_change(base, tmp_path, weight):
    saved(base, tmp_path / "lora", lora_alpha=6)  # scaling 3
    loaded = load(base, adapter=f"{tmp_path / 'lora'}:{weight}")
    right = effective(base, [(tmp_path / "lora", 3 * weight)])
    assert close(logits(loaded.model), right)
    assert not close(right, effective(base, [(tmp_path / "lora", 3 * weight + 0.2)]))
    assert loaded.sha256 != load(base).sha256
    assert (loaded.sha256 == load(base, adapter=tmp_path / "lora").sha256) == (weight == 1)


def test_modules_keep_the_names_of_the_base(base, tmp_path):
    saved(base, tmp_path / "lora")
    names = {name for name, _ in load(base, adapter=tmp_path / "lora").model.named_parameters()}
    assert "model.layers.0.self_attn.q_proj.base_layer.weight" in names and "lm_head.weight" in names


METHODS = {
    "dora": lambda: peft.LoraConfig(r=2, target_modules=TARGETS, use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=[]),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=TARGETS),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=TARGETS),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "layer norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_scales_the_change_of_every_method(base, tmp_path, method):
    """Half of the change, layer by layer: hooks on peft's own model say what that is."""
    model = saved(base, tmp_path / "a", config=METHODS[method]())
    whole = logits(model)
    assert close(logits(load(base, adapter=tmp_path / "a").model), whole)
    for module in model.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):

            def half(layer, args, output):
                return (output + layer.base_layer(*args)) / 2

            module.register_forward_hook(half)
    found = logits(load(base, adapter=f"{tmp_path / 'a'}:0.5").model)
    assert close(found, logits(model)) and not close(found, whole) and not close(found, logits(plain(base)))


def test_a_learned_prefix(base, tmp_path):
    """It comes in through a cache, which is no output of a graph."""
    model = saved(
        base, tmp_path / "prefix", config=peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    loaded = load(base, adapter=tmp_path / "prefix").model
    with torch.no_grad():
        found = loaded(IDS, torch.ones_like(IDS))
    assert list(found) == ["logits"] and torch.equal(found["logits"], logits(model))
    assert not close(found["logits"], logits(plain(base)))


def test_weights_that_mean_nothing(base, tmp_path):
    saved(
        base, tmp_path / "prompt", config=peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(UsageError, match="PROMPT_TUNING adapter changes no layer"):
        load(base, adapter=f"{tmp_path / 'prompt'}:0.5")
    assert logits(load(base, adapter=tmp_path / "prompt").model).shape[1] == IDS.shape[1] + 2
    saved(base, tmp_path / "bias", config=peft.LoraConfig(target_modules=TARGETS, bias="lora_only"))
    with pytest.raises(UsageError, match="replaces biases"):
        load(base, adapter=f"{tmp_path / 'bias'}:0.5")
    for wrong in ("half", "nan", "inf", ""):
        with pytest.raises(UsageError, match=f"'{wrong}' is no weight"):
            load(base, adapter=f"{tmp_path / 'bias'}:{wrong}")


def test_an_adapter_of_a_plain_module_and_its_factory(tmp_path):
    (tmp_path / "mynet_disk.py").write_text(
        "import torch\nfrom torch import nn\ndef make():\n    torch.manual_seed(5)\n"
        "    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))\n"
    )
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    x = torch.randn(3, 4)
    before = net(x)
    model = trained(peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"])), 3)
    model.save_pretrained(tmp_path / "lora")
    factory = f"{tmp_path / 'mynet_disk.py'}:make"
    for loaded in (
        load(tmp_path / "net.pt", model=factory, adapter=tmp_path / "lora"),
        load(tmp_path / "lora", model=factory),
    ):
        assert torch.equal(loaded.model(x), model(x)) and not close(model(x), before)
    assert "those that" in loaded.notes[0]
    with pytest.raises(UsageError, match="has no trained weights"):
        load(tmp_path / "lora", model="torchvision:resnet18")


# ---- several ----


@pytest.fixture(scope="module")
def two(base, tmp_path_factory):
    """Folders of two LoRA adapters with scalings 3 and 0.5."""
    folder = tmp_path_factory.mktemp("two")
    saved(base, folder / "a", 1, lora_alpha=6)
    saved(base, folder / "b", 2, lora_alpha=1, target_modules=["q_proj", "up_proj"])
    return folder / "a", folder / "b"


def test_several_with_their_weights(base, two):
    a, b = two
    found = logits(load(base, adapter=[f"{a}:0.5", f"{b}:-1"]).model)
    assert close(found, effective(base, [(a, 1.5), (b, -0.5)]))
    assert not close(found, effective(base, [(a, 1.5), (b, 0.5)]))
    assert close(logits(load(base, adapter=(a, b)).model), effective(base, [(a, 3), (b, 0.5)]))
    assert load(base, adapter=two).notes == ("adapter a (LORA): 8 tensors", "adapter b (LORA): 8 tensors")


@pytest.mark.parametrize("method", METHODS)
def test_several_are_what_peft_runs(base, tmp_path, method):
    """Without weights: peft's own sum or composition, in the order given."""
    for name, seed in (("a", 1), ("b", 2)):
        saved(base, tmp_path / name, seed, config=METHODS[method]())
    folders = [tmp_path / "a", tmp_path / "b"]
    if method == "layer norms":  # a norm has one gain: peft runs one of them
        with pytest.raises(UsageError, match="LN tuning does not allow"):
            load(base, adapter=folders)
        return
    model = peft.PeftModel.from_pretrained(plain(base), tmp_path / "a", adapter_name="one")
    model.load_adapter(tmp_path / "b", "two")
    model.base_model.set_adapter(["one", "two"])
    found = logits(load(base, adapter=folders).model)
    assert close(found, logits(model.eval()))
    assert not close(found, logits(load(base, adapter=folders[0]).model))
    if method in ("loha", "vera"):  # whose changes add up
        parts = [load(base, adapter=folder).model for folder in folders]
        weighted = load(base, adapter=[f"{folders[0]}:0.5", folders[1]]).model
        layer = [one.get_submodule("model.layers.0.self_attn.q_proj") for one in (*parts, weighted)]
        x = torch.randn(3, 16)
        first, second, both = (one(x) - plain(base).model.layers[0].self_attn.q_proj(x) for one in layer)
        assert close(both, 0.5 * first + second) and not close(both, first + second)
    else:
        with pytest.raises(UsageError, match="do not add up"):
            load(base, adapter=[f"{folders[0]}:0.5", folders[1]])


def test_several_that_do_not_go_together(base, two, tmp_path):
    a, b = two
    saved(base, tmp_path / "ia3", config=METHODS["ia3"]())
    with pytest.raises(UsageError, match="one type only, and these are IA3 and LORA"):
        load(base, adapter=[a, tmp_path / "ia3"])
    with pytest.raises(UsageError, match="--combine cat is defined for plain LoRA only, and it is IA3"):
        load(base, adapter=[tmp_path / "ia3", tmp_path / "ia3"], combine="cat")
    for name in ("p", "q"):
        saved(
            base, tmp_path / name, config=peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        )
    with pytest.raises(UsageError, match="only one PROMPT_TUNING adapter can be active"):
        load(base, adapter=[tmp_path / "p", tmp_path / "q"])
    shutil.copytree(b, tmp_path / "pissa")
    rewrite(tmp_path / "pissa", init_lora_weights="pissa")
    with pytest.raises(UsageError, match="pissa changes the base weights under the other"):
        load(base, adapter=[a, tmp_path / "pissa"])
    with pytest.raises(UsageError, match="pissa changes the base weights, so"):
        load(base, adapter=f"{tmp_path / 'pissa'}:0.5")
    for name in ("head1", "head2"):
        saved(base, tmp_path / name, modules_to_save=["lm_head"])
    with pytest.raises(UsageError, match=r"both bring lm_head\.weight"):
        load(base, adapter=[tmp_path / "head1", tmp_path / "head2"])


def test_an_adapter_that_peft_would_ignore(base, tmp_path):
    """OSF keeps the last one only."""
    for name, seed in (("a", 1), ("b", 2)):
        saved(base, tmp_path / name, seed, config=peft.OSFConfig(target_modules=["q_proj"]))
    with pytest.raises(UsageError, match="ignores the others"):
        load(base, adapter=[tmp_path / "a", tmp_path / "b"])


# ---- combined ----


def matrices(folder, name):
    tensors = load_file(folder / "adapter_model.safetensors")
    start = f"base_model.model.model.layers.0.self_attn.{name}"
    return tensors[f"{start}.lora_A.weight"], tensors[f"{start}.lora_B.weight"]


def change(base, loaded, name="q_proj"):
    """The change that a loaded model makes to a matrix of the base, [outputs, inputs]."""
    x = torch.eye(16)
    path = f"model.layers.0.self_attn.{name}"
    with torch.no_grad():
        return (loaded.model.get_submodule(path)(x) - plain(base).get_submodule(path)(x)).T


@pytest.mark.parametrize("rslora", [False, True])
def test_combine_cat_is_the_sum(base, tmp_path, rslora):
    """Ranks may differ; rsLoRA's rule of scaling, which peft applies once more, must not come in twice."""
    for name, rank, seed in (("a", 2, 1), ("b", 4, 2)):
        saved(base, tmp_path / name, seed, r=rank, lora_alpha=6, use_rslora=rslora)
    scale = [6 / (math.sqrt(rank) if rslora else rank) for rank in (2, 4)]
    folders = [tmp_path / "a", tmp_path / "b"]
    words = [f"{folders[0]}:0.5", f"{folders[1]}:-1"]
    combined = load(base, adapter=words, combine="cat")
    right = effective(base, [(folders[0], 0.5 * scale[0]), (folders[1], -scale[1])])
    assert close(logits(combined.model), right)
    assert not close(right, effective(base, [(folders[0], 0.5 * scale[0]), (folders[1], scale[1])]))
    (layer,) = {
        tuple(m.scaling) for m in combined.model.modules() if hasattr(m, "scaling") and hasattr(m, "lora_A")
    }
    assert layer == ("combined",)
    assert combined.sha256 != load(base, adapter=words).sha256


def test_combine_linear_is_pefts(base, two):
    """Of the factors, not of the products: (sum sqrt(w s) B) (sum sqrt(w s) A)."""
    a, b = two
    with pytest.raises(UsageError, match=r"--combine ties: say which part of each adapter to keep"):
        load(base, adapter=two, combine="ties")
    found = change(base, load(base, adapter=[f"{a}:2", b], combine="linear"))
    (a1, b1), (a2, b2) = matrices(a, "q_proj"), matrices(b, "q_proj")
    s, t = math.sqrt(6), math.sqrt(0.5)
    assert close(found, (s * b1 + t * b2) @ (s * a1 + t * a2))
    assert not close(found, 6 * b1 @ a1 + 0.5 * b2 @ a2)


def test_combine_ties(base, two):
    """Trim to the density, elect a sign, and take the weighted mean of those that agree (arXiv:2306.01708)."""
    found = change(base, load(base, adapter=two, combine="ties:0.5"))
    factors = []
    for index in (1, 0):
        parts = []
        for folder, scale in zip(two, (3, 0.5), strict=True):
            tensor = matrices(folder, "q_proj")[index]
            keep = tensor.abs() >= tensor.abs().flatten().topk(tensor.numel() // 2).values[-1]
            parts.append(math.sqrt(scale) * tensor * keep)
        stack = torch.stack(parts)
        sign = (stack / torch.tensor([3, 0.5]).sqrt()[:, None, None]).sum(0).sign()
        agree = (stack.sign() == sign) & (stack != 0)
        factors.append((stack * agree).sum(0) / agree.sum(0).clamp(min=1))
    assert close(found, factors[0] @ factors[1])
    assert not close(found, change(base, load(base, adapter=two, combine="ties:0.9")))


def test_combine_dare_is_random_and_repeats(base, two):
    from compressor.blend import combination

    def found(words, seed):
        return change(base, load(base, adapter=two, combine=combination(words, seed)))

    first = found("dare:0.5", 1)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(found("dare_linear:0.5", 1), first) and not close(found("dare:0.5", 2), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert close(found("dare:1", 1), change(base, load(base, adapter=two, combine="linear")))


def test_combine_takes_the_one_trained_head(base, tmp_path):
    """Whichever adapter brings it."""
    saved(base, tmp_path / "a", 1)
    model = saved(base, tmp_path / "b", 2, modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    for order in (["a", "b"], ["b", "a"]):
        for how in ("cat", None):
            loaded = load(base, adapter=[tmp_path / name for name in order], combine=how).model
            x = torch.randn(3, 16)
            assert close(loaded.lm_head(x), x @ head.T) and not close(x @ head.T, plain(base).lm_head(x))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_dora": True}, "it is DoRA"),
        ({"lora_bias": True}, "it has biases"),
        ({"trainable_token_indices": {"embed_tokens": [1, 2]}}, "it trains single tokens"),
    ],
)
def test_combinations_that_are_none(base, two, tmp_path, options, message):
    saved(base, tmp_path / "x", **options)
    with pytest.raises(UsageError, match=message):
        load(base, adapter=[two[0], tmp_path / "x"], combine="cat")
    with pytest.raises(UsageError, match="takes several adapters"):
        load(base, adapter=two[0], combine="cat")
    with pytest.raises(UsageError, match="takes several adapters"):
        load(base, combine="cat")
    for words, reason in (
        ("mean", "no such combination"),
        ("cat:0.5", "takes no number"),
        ("ties:2", "which part"),
    ):
        with pytest.raises(UsageError, match=reason):
            load(base, adapter=two, combine=words)


def test_layers_that_peft_would_leave_out(base, tmp_path):
    """It takes the first adapter's choice of layers for all."""
    saved(base, tmp_path / "a", 1, layers_to_transform=[0])
    saved(base, tmp_path / "b", 2, layers_to_transform=[1])
    with pytest.raises(UsageError, match=r"leaves model\.layers\.1\.self_attn\..* out"):
        load(base, adapter=[tmp_path / "a", tmp_path / "b"], combine="cat")
    assert load(base, adapter=[tmp_path / "a", tmp_path / "b"])


# ---- the base model ----


def test_an_adapter_alone_finds_its_base(base, tmp_path, monkeypatch):
    expected = logits(saved(base, tmp_path / "lora"))
    work, cache = tmp_path / "work", tmp_path / "cache"
    shutil.copytree(base, tmp_path / "lora" / "inner")
    shutil.copytree(base, work / "near")
    commit = "0123456789abcdef"
    repository = cache / "hub" / "models--org--tiny"
    shutil.copytree(base, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.chdir(work)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(cache))
    for name, revision in (
        (str(base), None),
        ("inner", None),
        ("near", None),
        ("org/tiny", None),
        ("org/tiny", commit),
    ):
        rewrite(tmp_path / "lora", base_model_name_or_path=name, revision=revision)
        assert close(logits(load(tmp_path / "lora").model), expected)
    assert not close(expected, logits(plain(base)))
    with pytest.raises(UsageError, match="leave --model out"):
        load(base, model="hf:x", adapter=tmp_path / "lora")


@pytest.mark.parametrize(
    "name", ["org/none", "/home/someone/model", None, "", "../../etc", "a/../../b", "org/tiny"]
)
def test_a_base_that_is_not_here(base, tmp_path, monkeypatch, name):
    """Nothing is fetched, and no name leads out of the cache."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("it went to the network"))
    saved(base, tmp_path / "lora")
    rewrite(tmp_path / "lora", base_model_name_or_path=name, revision="../../..")
    with pytest.raises(FileError, match=r"Give the base model's folder as MODEL, and --adapter .*lora\."):
        load(tmp_path / "lora")
    rewrite(tmp_path / "lora", base_model_name_or_path=str(tmp_path / "lora"))
    with pytest.raises(FileError, match="on top of another adapter"):
        load(tmp_path / "lora")


def test_nothing_is_asked_of_the_network(base, tmp_path, monkeypatch):
    """Not even whether a base model that is known by its name only has another vocabulary."""
    saved(base, tmp_path / "lora", target_modules=["q_proj", "embed_tokens"])
    rewrite(tmp_path / "lora", base_model_name_or_path="org/tiny")
    calls = []
    monkeypatch.setattr("socket.socket.connect", lambda *_: calls.append(1))
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: calls.append(1))
    assert load(base, adapter=tmp_path / "lora") and not calls
    with pytest.raises(Exception):  # noqa: B017
        transformers.AutoConfig.from_pretrained("org/tiny")
    assert calls


def test_a_model_and_an_adapter_in_one_folder(base, tmp_path):
    saved(base, tmp_path / "mixed")
    shutil.copy(base / "config.json", tmp_path / "mixed")
    rewrite(tmp_path / "mixed", base_model_name_or_path=str(base))
    assert load(tmp_path / "mixed").notes  # a copy of the settings alone is no model
    shutil.copy(base / "model.safetensors", tmp_path / "mixed")
    with pytest.raises(FileError, match="holds a model and an adapter"):
        load(tmp_path / "mixed")


# ---- every tensor ----


def test_a_resized_vocabulary_comes_with_the_adapter(base, tmp_path):
    model = plain(base)
    model.resize_token_embeddings(45)
    model = trained(peft.get_peft_model(model, peft.LoraConfig(target_modules=TARGETS)), 4)
    with torch.no_grad():
        model.get_input_embeddings().weight.uniform_(-0.5, 0.5)
    model.save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    loaded = load(base, adapter=tmp_path / "lora").model
    ids = IDS + 29  # the new tokens among them
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert loaded.config.vocab_size == 45
    file = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: value.clone() for key, value in tensors.items() if "lm_head" not in key}, file)
    with pytest.raises(FileError, match=r"45 tokens, the model's 40, and nothing holds the lm_head\.weight"):
        load(base, adapter=tmp_path / "lora")


def test_single_tokens_and_saved_embeddings(base, tmp_path):
    model = saved(base, tmp_path / "tokens", trainable_token_indices={"embed_tokens": [4, 5]})
    assert torch.equal(logits(load(base, adapter=tmp_path / "tokens").model), logits(model))
    embedded = saved(base, tmp_path / "embed", target_modules=["embed_tokens", "q_proj"])
    embedded.save_pretrained(tmp_path / "embed", save_embedding_layers=True)
    assert torch.equal(logits(load(base, adapter=tmp_path / "embed").model), logits(embedded))


@pytest.mark.parametrize("which", [0, 1])
def test_every_key_of_every_adapter_is_accounted_for(base, tmp_path, which):
    for name, seed in (("a", 1), ("b", 2)):
        saved(base, tmp_path / name, seed)
    path = tmp_path / "ab"[which] / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(iter(tensors))
    folders = [tmp_path / "a", tmp_path / "b"]
    for change_, message in (
        (
            lambda t: t.update({"base_model.model.other.weight": t[key].clone()}),
            r"1 not used \(.*other\.weight",
        ),
        (lambda t: t.pop(key), "1 missing"),
    ):
        edited = {name: value.clone() for name, value in tensors.items()}
        change_(edited)
        save_file(edited, path)
        with pytest.raises(
            FileError, match=rf"adapter .*/{'ab'[which]} does not fit LlamaForCausalLM.*{message}"
        ):
            load(base, adapter=folders)
    save_file(tensors, path)
    assert load(base, adapter=folders)


@pytest.mark.parametrize("weight", [1, 0.5])
def test_keys_of_an_older_architecture(tmp_path, weight):
    """One linear an expert then, one tensor for all experts now: peft converts the keys, and all are accounted for."""
    if not importlib.util.find_spec("peft.utils.transformers_weight_conversion"):
        pytest.skip("this peft converts no keys")
    sizes = (
        {"vocab_size": 40, "num_key_value_heads": 1, "num_local_experts": 2}
        | SIZES
        | {"num_hidden_layers": 1}
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).eval()
    model.save_pretrained(tmp_path / "base")
    start, tensors = "base_model.model.model.layers.0.block_sparse_moe.experts", {}
    before = logits(model)
    for expert in range(2):
        for name, (ins, outs) in {"w1": (16, 32), "w3": (16, 32), "w2": (32, 16)}.items():
            tensors[f"{start}.{expert}.{name}.lora_A.weight"] = torch.randn(2, ins) * 0.3
            tensors[f"{start}.{expert}.{name}.lora_B.weight"] = torch.randn(outs, 2) * 0.3
        first, third, second = (
            weight
            * tensors[f"{start}.{expert}.{name}.lora_B.weight"]
            @ tensors[f"{start}.{expert}.{name}.lora_A.weight"]
            for name in ("w1", "w3", "w2")
        )
        with torch.no_grad():
            model.model.layers[0].mlp.experts.gate_up_proj[expert] += torch.cat([first, third])
            model.model.layers[0].mlp.experts.down_proj[expert] += second
    folder = tmp_path / "lora"
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["w1", "w2", "w3"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    found = logits(load(tmp_path / "base", adapter=f"{folder}:{weight}").model)
    assert close(found, logits(model)) and not close(found, before)
    save_file(
        tensors | {f"{start}.0.w9.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors"
    )
    with pytest.raises(FileError, match=r"1 not used \(.*w9"):
        load(tmp_path / "base", adapter=folder)


def test_a_trained_module_that_is_not_in_the_file(base, tmp_path):
    saved(base, tmp_path / "lora", modules_to_save=["lm_head"])
    path = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({key: value.clone() for key, value in load_file(path).items() if "lm_head" not in key}, path)
    with pytest.raises(FileError, match=r"lacks .*lm_head\.weight: what was trained beside it"):
        load(base, adapter=tmp_path / "lora")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"peft_type": "NEWEST"}, "knows no adapter of type 'NEWEST'"),
        ({"peft_type": "XLORA"}, "type XLORA cannot be compiled: it loads further"),
        ({"peft_type": None}, "names no peft_type"),
        ({"use_something_new": True, "peft_version": "9.9"}, r"does not know use_something_new .*\(9\.9\)"),
        ({"target_modules": ["nowhere"]}, "could not attach it: .*nowhere"),
        ({"r": "two"}, "could not"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "names a module to import"),
    ],
)
def test_settings_that_cannot_be_right(base, tmp_path, settings, message):
    saved(base, tmp_path / "lora")
    rewrite(tmp_path / "lora", **settings)
    with pytest.raises(FileError, match=message) as caught:
        load(base, adapter=tmp_path / "lora")
    assert "\n" not in str(caught.value)


def test_folders_that_are_no_adapters(base, tmp_path):
    with pytest.raises(FileError, match=r"there is no such folder\. Did you mean .*llama\?"):
        load(base, adapter=base.parent / "llame")
    with pytest.raises(FileError, match=r"there is no adapter_config\.json"):
        load(base, adapter=base)
    saved(base, tmp_path / "lora")
    (tmp_path / "lora" / "adapter_model.safetensors").rename(tmp_path / "lora" / "adapter_model.bin")
    with pytest.raises(FileError, match="is a pickle"):
        load(base, adapter=tmp_path / "lora")
    (tmp_path / "lora" / "adapter_model.safetensors").write_bytes(b"\x10" * 40)
    with pytest.raises(FileError, match=r"adapter_model\.safetensors is damaged"):
        load(base, adapter=tmp_path / "lora")


# ---- telling what there is ----


def test_the_adapters_of_a_folder(base, tmp_path):
    saved(base, tmp_path / "lora", task_type="CAUSAL_LM", use_dora=True, rank_pattern={"v_proj": 3})
    (row,) = adapters_of(tmp_path / "lora")
    assert row["type"] == "LORA (dora)" and row["rank"] == [2, 3] and row["targets"] == ["q_proj", "v_proj"]
    assert row["tensors"] == 12 and row["params"] == sum(
        value.numel() for value in load_file(tmp_path / "lora" / "adapter_model.safetensors").values()
    )
    assert row["base"] == str(base) and row["task"] == "CAUSAL_LM" and row["weight"] == 1
    first, second = adapters_of(base, [f"{tmp_path / 'lora'}:0.5", tmp_path / "lora"])
    assert (first["weight"], second["weight"]) == (0.5, 1) and adapters_of(base) == []


def test_adapters_among_the_tensors_of_a_file(base, tmp_path):
    model = saved(base, tmp_path / "lora")
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    torch.save(plain(base).state_dict(), tmp_path / "plain.pt")
    (row,) = adapters_of(tmp_path / "whole.pt")
    assert row == {
        "adapter": "default",
        "type": "LORA",
        "rank": [2],
        "targets": ["q_proj", "v_proj"],
        "tensors": 8,
        "params": 224,
    }
    assert adapters_of(tmp_path / "plain.pt") == [] and adapters_of(base) == []
    kohya = {
        "lora_unet_mid_to_q.lora_down.weight": torch.ones(4, 8),
        "lora_unet_mid_to_q.lora_up.weight": torch.ones(8, 4),
    }
    save_file(kohya, tmp_path / "kohya.safetensors")
    (row,) = adapters_of(tmp_path / "kohya.safetensors")
    assert row["rank"] == [4] and row["targets"] == ["lora_unet_mid_to_q"]


def test_inspect_tells_before_it_loads(base, tmp_path, run):
    saved(base, tmp_path / "lora")
    code, out, _ = run("inspect", tmp_path / "lora", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["adapters"][0]["type"] == "LORA" and facts["params"] > 320
    rewrite(tmp_path / "lora", base_model_name_or_path="org/none")
    code, out, _ = run("inspect", tmp_path / "lora")
    assert code == 0 and "q_proj" in out and "problem" in out and "org/none" in out
    code, out, error = run("inspect", base, "--adapter", f"{tmp_path / 'lora'}:x")
    assert code == 2 and error.count("\n") == 1 and "'x' is no weight" in error


@pytest.mark.slow
def test_the_command(base, two, tmp_path, run):
    """Two adapters by weight, merged away: the ONNX file computes what the sum by hand computes."""
    import onnxruntime

    a, b = two
    words = [
        "--adapter",
        f"{a}:0.5",
        "--adapter",
        f"{b}:-1",
        "--passes",
        "merge",
        "--no-measure",
        "-o",
        tmp_path / "out",
    ]
    code, _, error = run(base, *words)
    assert code == 0, error
    session = onnxruntime.InferenceSession(
        tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    (found, *_) = session.run(
        None, {"input_ids": IDS.numpy(), "attention_mask": torch.ones_like(IDS).numpy()}
    )
    assert close(torch.tensor(found), effective(base, [(a, 1.5), (b, -0.5)]))
    assert not close(torch.tensor(found), effective(base, [(a, 1.5), (b, 0.5)]))
    assert not any("lora" in item.name.lower() for item in session.get_inputs())
