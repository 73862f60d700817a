"""Decoders with their cache: names, sizes at the edges, tokens as the library generates them, texts as data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import noise

import compressor
from compressor import runtime
from compressor.errors import UnsupportedError
from compressor.ir import terms

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install transformers"
)
from test_texts import sentence, write_tokenizer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = 32
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"vocab_size": 64, "max_position_embeddings": 128, "pad_token_id": 0}
CONFIGS = {
    "shared heads": lambda: transformers.LlamaConfig(num_key_value_heads=2, **SMALL),
    "a window": lambda: transformers.MistralConfig(num_key_value_heads=2, sliding_window=8, **SMALL),
    "learned positions": lambda: transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=64, n_positions=128, bos_token_id=1, eos_token_id=1
    ),
    "no positions": lambda: transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=64),
}


def folder_of(path: Path, name: str) -> tuple[Any, Path]:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    model.save_pretrained(path)
    return model, path


class Generator:
    """Greedy tokens, step by step, as a program does it that knows no more than the names."""

    def __init__(self, path: Path) -> None:
        self.session = runtime.session(path, threads=1)
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = [o.name for o in self.session.get_outputs()]

    def step(self, ids: np.ndarray, cache: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        (rows, new), past = ids.shape, next(iter(cache.values())).shape[2]
        feeds = {"input_ids": ids, "attention_mask": np.ones((rows, past + new), np.int64), **cache}
        if "position_ids" in self.inputs:
            feeds["position_ids"] = np.tile(np.arange(past, past + new), (rows, 1))
        return dict(zip(self.outputs, runtime.run(self.session, feeds), strict=True))

    def empty(self, rows: int) -> dict[str, np.ndarray]:
        cached = [i for name, i in self.inputs.items() if name.startswith("past_key_values")]
        return {i.name: np.zeros((rows, i.shape[1], 0, i.shape[3]), np.float32) for i in cached}

    def tokens(self, ids: np.ndarray) -> np.ndarray:
        cache, made = self.empty(len(ids)), []
        for _ in range(TOKENS):
            found = self.step(ids, cache)
            ids = found["logits"][:, -1].argmax(-1)[:, None]
            cache = {n.replace("present", "past_key_values"): v for n, v in found.items() if n != "logits"}
            made.append(ids)
        return np.concatenate(made, 1)


MORE = ("shared heads", "a window")


@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=[pytest.mark.nightly] if one in MORE else []) for one in CONFIGS],
)
def test_tokens_are_those_that_the_library_generates(tmp_path, name):
    model, folder = folder_of(tmp_path / "model", name)
    result = compressor.compress(
        folder, task="text-generation", passes="fold", output=tmp_path / "out", measure=False
    )
    generator = Generator(result.onnx)
    expected_inputs = ["input_ids", "attention_mask", *(["position_ids"] if name != "no positions" else [])]
    expected_inputs += [f"past_key_values.{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert list(generator.inputs) == expected_inputs
    assert generator.outputs == [
        "logits",
        *(n.replace("past_key_values", "present") for n in expected_inputs[-4:]),
    ]
    assert generator.inputs["attention_mask"].shape == ["batch", "past_sequence + sequence"]
    assert not any(name.startswith("model.model.") for name in result.graph.tensors)  # names of the original
    ids = torch.randint(3, 64, (2, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS,
            min_new_tokens=TOKENS, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    found = generator.tokens(ids.numpy())
    assert np.array_equal(found, expected[:, 5:].numpy()) and len(np.unique(found)) > 1
    one = generator.step(ids[:1, :1].numpy(), generator.empty(1))  # one sample, one token, no cache
    assert one["logits"].shape == (1, 1, 64) and one["present.1.value"].shape[2] == 1


def test_texts_calibrate_a_decoder_and_its_cache_stays_right(tmp_path):
    model, folder = folder_of(tmp_path / "model", "shared heads")
    write_tokenizer(folder, model_max_length=32)
    (tmp_path / "texts.txt").write_text("\n".join(map(sentence, range(60))))
    result = compressor.compress(
        folder, task="text-generation", passes="int8(rounding=nearest)", calibration=tmp_path / "texts.txt",
        output=tmp_path / "out", measure=False,
    )  # fmt: skip
    assert result.report["rows"][-1]["facts"]["integer"]["linear"] == 15
    assert result.report["data"]["facts"]["padding"] == "0.0% of positions"
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    generator = Generator(result.onnx)
    ids = torch.randint(3, 20, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    whole = torch.from_numpy(generator.step(ids.numpy(), generator.empty(1))["logits"])
    assert noise(expected, whole) > 20
    first = generator.step(ids[:, :7].numpy(), generator.empty(1))
    cache = {n.replace("present", "past_key_values"): v for n, v in first.items() if n != "logits"}
    second = torch.from_numpy(generator.step(ids[:, 7:].numpy(), cache)["logits"])
    assert noise(whole[:, 7:], second) > 20 and noise(expected[:, 7:], second) > 20


def test_weights_of_few_bits_with_a_cache(tmp_path):
    _, folder = folder_of(tmp_path / "model", "learned positions")
    result = compressor.compress(
        folder, task="text-generation", passes="int4", output=tmp_path / "out", measure=False
    )
    # the other products read 64 columns, which are too few
    assert result.report["emitted"]["operators"]["MatMulNBits"] == 2
    assert Generator(result.onnx).tokens(np.array([[5, 6, 7]])).shape == (1, TOKENS)


@pytest.mark.nightly
def test_an_adapter_is_merged_and_the_program_goes_on_from_there(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    model, folder = folder_of(tmp_path / "model", "shared heads")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    result = compressor.compress(
        folder, adapter=tmp_path / "adapter", task="text-generation", passes="merge,fold", emit="pt2",
        output=tmp_path / "out", measure=False,
    )  # fmt: skip
    assert "model.layers.0.self_attn.q_proj.weight" in result.graph.tensors
    assert not any("lora" in name for name in result.graph.tensors)
    again = compressor.compress(
        tmp_path / "out" / "model.pt2", passes="fold", output=tmp_path / "again", measure=False
    )
    ids = torch.randint(3, 64, (2, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = adapted.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS,
            min_new_tokens=TOKENS, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    for one in (result, again):
        generator = Generator(one.onnx)
        assert generator.inputs["attention_mask"].shape == ["batch", "past_sequence + sequence"]
        assert "position_ids" in generator.inputs
        assert np.array_equal(generator.tokens(ids.numpy()), expected[:, 5:].numpy())


def test_a_cache_that_is_not_keys_and_values_is_refused(tmp_path):
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=8)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedError, match="does not cache a pair of keys and values"):
        compressor.compress(tmp_path / "model", task="text-generation", output=tmp_path / "out")


def test_axes_that_are_sums():
    assert terms("batch") == ["batch"] and terms("past_sequence + sequence") == ["past_sequence", "sequence"]
