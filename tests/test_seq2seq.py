"""Encoder-decoders as two files: the encoder's keys and values, and the decoder step that reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import noise

import compressor
from compressor import decoding, runtime
from compressor.errors import DataError, UnsupportedError, UsageError
from compressor.ir import Input

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install transformers"
)
from test_texts import sentence, write_tokenizer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS, WORDS = 32, 64
WIDE = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
WIDE |= {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": WORDS, "pad_token_id": 0}
WIDE |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
CONFIGS = {
    "whisper": lambda: transformers.WhisperConfig(
        num_mel_bins=8, max_source_positions=20, max_target_positions=64, suppress_tokens=None,
        begin_suppress_tokens=None, **WIDE,
    ),
    "bart": lambda: transformers.BartConfig(max_position_embeddings=64, forced_eos_token_id=None, **WIDE),
    "t5": lambda: transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=WORDS, decoder_start_token_id=0
    ),
}  # fmt: skip


def folder_of(path: Path, name: str) -> tuple[Any, Path]:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    auto = "AutoModelForSpeechSeq2Seq" if name == "whisper" else "AutoModelForSeq2SeqLM"
    model = getattr(transformers, auto).from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)  # tokens that differ
    model.save_pretrained(path)
    return model, path


def part(folder: Path, which: str, out: Path, **options: Any) -> compressor.Result:
    return compressor.compress(folder, task=f"seq2seq-{which}", output=out, measure=False, **options)


def outputs(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = runtime.session(path, threads=1)
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, runtime.run(session, feeds), strict=True))


class Decoder:
    """Runs a decoder step by step, as a program does it that knows no more than the names."""

    def __init__(self, path: Path, encoded: dict[str, np.ndarray], mask: np.ndarray | None) -> None:
        self.session = runtime.session(path, threads=1)
        self.names = [o.name for o in self.session.get_outputs()]
        self.cross = {name.replace("present", "past_key_values"): value for name, value in encoded.items()}
        self.mask = {} if mask is None else {"encoder_attention_mask": mask}
        rows, heads, _, width = next(iter(self.cross.values())).shape
        none = np.zeros((rows, heads, 0, width), np.float32)
        self.cache = {name.replace(".encoder.", ".decoder."): none for name in self.cross}

    def step(self, ids: np.ndarray) -> np.ndarray:
        feeds = {"input_ids": ids, **self.mask, **self.cross, **self.cache}
        found = dict(zip(self.names, runtime.run(self.session, feeds), strict=True))
        logits = found.pop("logits")
        self.cache = {name.replace("present", "past_key_values"): value for name, value in found.items()}
        return logits

    def tokens(self, start: int) -> np.ndarray:
        ids, made = np.full((len(next(iter(self.cross.values()))), 1), start), []
        for _ in range(TOKENS):
            ids = self.step(ids)[:, -1].argmax(-1)[:, None]
            made.append(ids)
        return np.concatenate(made, 1)


@pytest.mark.parametrize("name", ["whisper", pytest.param("t5", marks=pytest.mark.nightly)])
def test_tokens_are_those_that_the_library_generates(tmp_path, name):
    model, folder = folder_of(tmp_path / "model", name)
    encoder = part(folder, "encoder", tmp_path / "encoder", passes="fold")
    decoder = part(folder, "decoder", tmp_path / "decoder", passes="fold")
    draw = torch.Generator().manual_seed(1)
    if name == "whisper":
        inputs, mask = {"input_features": torch.randn(3, 8, 40, generator=draw)}, None
    else:
        mask = np.ones((3, 9), np.int64)
        mask[1, 6:] = 0  # a shorter text
        inputs = {
            "input_ids": torch.randint(3, WORDS, (3, 9), generator=draw),
            "attention_mask": torch.from_numpy(mask),
        }
    encoded = outputs(encoder.onnx, {key: value.numpy() for key, value in inputs.items()})
    assert sorted(encoded) == [f"present.{i}.encoder.{one}" for i in range(2) for one in ("key", "value")]
    assert not any("decoder.layers" in n and "encoder_attn" not in n for n in encoder.graph.tensors)
    with torch.no_grad():
        expected = model.generate(
            **inputs, do_sample=False, num_beams=1, max_new_tokens=TOKENS, min_new_tokens=TOKENS, eos_token_id=None,
        )  # fmt: skip
        ids = torch.randint(3, WORDS, (3, 12), generator=draw)
        logits = model(**inputs, decoder_input_ids=ids).logits
    found = Decoder(decoder.onnx, encoded, mask).tokens(model.config.decoder_start_token_id)
    assert np.array_equal(found, expected[:, -TOKENS:].numpy()) and len(np.unique(found)) > 1
    twice = Decoder(decoder.onnx, encoded, mask)
    seen = torch.from_numpy(
        np.concatenate([twice.step(ids[:, :7].numpy()), twice.step(ids[:, 7:].numpy())], 1)
    )
    assert noise(logits, seen) > 90
    other = Decoder(decoder.onnx, {name: value[::-1].copy() for name, value in encoded.items()}, mask)
    assert noise(logits, torch.from_numpy(other.step(ids.numpy()))) < 60  # another one's encoder shows


@pytest.mark.nightly
def test_both_parts_in_few_bits(tmp_path):
    _, folder = folder_of(tmp_path / "model", "bart")
    write_tokenizer(folder, model_max_length=32)
    (tmp_path / "texts.txt").write_text("\n".join(map(sentence, range(60))))
    passes = "int8(rounding=nearest)"
    encoder = part(folder, "encoder", tmp_path / "encoder", passes=passes, calibration=tmp_path / "texts.txt")
    assert encoder.report["rows"][-1]["facts"]["integer"]["linear"] == 16  # 2 x 6, and 2 x 2 for the decoder
    with pytest.raises(DataError, match="no tokenizer makes the input encoder_attention_mask"):
        part(folder, "decoder", tmp_path / "decoder", passes=passes, calibration=tmp_path / "texts.txt")
    decoder = part(folder, "decoder", tmp_path / "decoder", passes="int8(scheme=dynamic)")
    assert any("Integer" in name for name in decoder.report["emitted"]["operators"])
    words = ["input_ids", "encoder_attention_mask"]
    words += [
        f"past_key_values.{i}.{p}.{k}"
        for i in range(2)
        for p in ("decoder", "encoder")
        for k in ("key", "value")
    ]
    assert [one["name"] for one in decoder.report["inputs"]] == words


def test_the_encoder_s_part_of_a_cache_is_never_empty():
    spec = Input("past_key_values.0.encoder.key", torch.float32, ("batch", 4, 20, 8))
    with pytest.raises(DataError, match="calibrate a decoder with batches of its own inputs"):
        decoding.empty(spec, 2)


def test_what_is_no_encoder_decoder_is_refused(tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=WORDS
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llama")
    with pytest.raises(UsageError, match="--task seq2seq-decoder: a llama model can do causal-lm"):
        part(tmp_path / "llama", "decoder", tmp_path / "out")
    _, folder = folder_of(tmp_path / "t5", "t5")
    with pytest.raises((UsageError, UnsupportedError)):
        compressor.compress(folder, task="text-generation", output=tmp_path / "out")
