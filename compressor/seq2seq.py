"""An encoder-decoder as two files: the encoder with the keys and values that the decoder reads, and one decoder step.

`--task seq2seq-encoder` takes what the model takes (`input_features`, or `input_ids` and `attention_mask`) and returns
`present.N.encoder.key` and `.value` [batch, heads, encoded, width] of every decoder layer's cross attention, which do
not change from token to token. `--task seq2seq-decoder` takes them as `past_key_values.N.encoder.key`, tokens as
`input_ids`, its own cache as `past_key_values.N.decoder.key`, and `encoder_attention_mask` where the encoder has a
mask; it returns `logits` and `present.N.decoder.key`. The first step has a cache of no tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .decoding import BATCH, CACHE, ENCODED, PAST, SEQUENCE, example_of, same
from .errors import UnsupportedError
from .ir import Input

ENCODER = "seq2seq-encoder"


def parted(model: Any, task: str) -> tuple[tuple[Input, ...], dict[str, Any]]:
    """Makes `model` compute one of its two files, in place; its inputs and an example.

    UnsupportedError where it is no encoder-decoder, or caches something else than keys and values.
    """
    ends = _inputs(model)
    example = {spec.name: example_of(spec) for spec in ends}
    cache = _cached(model, example)
    text = "input_ids" in example
    if task == ENCODER:
        model.forward = _encoder(model.forward, model.config.decoder_start_token_id, text)
        return ends, example
    inputs = [Input("input_ids", torch.int64, (BATCH, SEQUENCE))]
    if text:
        inputs.append(Input("encoder_attention_mask", torch.int64, (BATCH, ENCODED)))
    made: dict[str, Any] = {spec.name: example_of(spec) for spec in inputs}
    made[CACHE] = []
    for i, layer in enumerate(cache):
        made[CACHE].append({})
        for part, pair in layer.items():
            length = PAST if part == "decoder" else ENCODED if text else pair["key"].shape[2]
            specs = {
                name: Input(f"{CACHE}.{i}.{part}.{name}", t.dtype, (BATCH, t.shape[1], length, t.shape[3]))
                for name, t in pair.items()
            }
            inputs += specs.values()
            made[CACHE][i][part] = {name: example_of(spec) for name, spec in specs.items()}
    model.forward = _decoder(model.forward, model.config.hidden_size)
    return tuple(inputs), made


def _inputs(model: Any) -> tuple[Input, ...]:
    """What the encoder takes: texts, or the spectrogram of so many frames that it was trained on."""
    config = model.config
    if not getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{type(model).__name__} is no encoder-decoder: --task text-generation compiles it with its cache"
        )
    if model.main_input_name == "input_ids":
        return tuple(Input(name, torch.int64, (BATCH, ENCODED)) for name in ("input_ids", "attention_mask"))
    frames = getattr(config, "max_source_positions", None)
    if model.main_input_name != "input_features" or frames is None or not hasattr(config, "num_mel_bins"):
        raise UnsupportedError(
            f"{type(model).__name__} takes {model.main_input_name}; encoders of texts and of whisper's spectrograms "
            "are known"
        )
    return (Input("input_features", torch.float32, (BATCH, config.num_mel_bins, 2 * frames)),)


@torch.no_grad()
def _cached(model: nn.Module, example: dict[str, Any]) -> list[dict[str, dict[str, Tensor]]]:
    """Keys and values that a model caches of its example, layer by layer, of decoder and encoder."""
    made = model(**example, decoder_input_ids=torch.ones(2, 1, dtype=torch.long), use_cache=True)
    cache = getattr(made, "past_key_values", None)
    both = [
        getattr(getattr(cache, name, None), "layers", ())
        for name in ("self_attention_cache", "cross_attention_cache")
    ]
    layers = [
        {
            part: {"key": one.keys, "value": one.values}
            for part, one in zip(("decoder", "encoder"), pair, strict=True)
        }
        for pair in zip(*both, strict=True)
    ]
    if not layers:
        raise UnsupportedError(f"{type(model).__name__} does not cache keys and values of both attentions")
    return layers


def _encoder(whole: Callable[..., Any], start: int, text: bool) -> Callable[..., dict[str, Any]]:
    """The forward of the encoder: a decoder step on `start`, of which only its cross attention's cache is read."""

    def encoded(**inputs: Tensor) -> dict[str, Any]:
        (rows, *_) = next(iter(inputs.values())).shape
        made = whole(**inputs, decoder_input_ids=torch.full((rows, 1), start), use_cache=True)
        layers = made.past_key_values.cross_attention_cache.layers
        return {"present": [{"encoder": {"key": one.keys, "value": one.values}} for one in layers]}

    def of_text(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        same(attention_mask, tuple(input_ids.shape))
        return encoded(input_ids=input_ids, attention_mask=attention_mask)

    def of_sound(input_features: Tensor) -> dict[str, Any]:
        return encoded(input_features=input_features)

    return of_text if text else of_sound


def _decoder(whole: Callable[..., Any], width: int) -> Callable[..., dict[str, Any]]:
    """The forward of one decoder step."""

    def step(
        input_ids: Tensor, past_key_values: list[dict[str, Any]], encoder_attention_mask: Tensor | None = None
    ) -> dict[str, Any]:
        from transformers import DynamicCache, EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        (batch, new), first = input_ids.shape, past_key_values[0]
        past, encoded = first["decoder"]["key"].shape[2], first["encoder"]["key"].shape[2]
        held = {"decoder": DynamicCache(), "encoder": DynamicCache()}
        for i, layer in enumerate(past_key_values):
            for part, length in (("decoder", past), ("encoder", encoded)):
                for one in layer[part].values():
                    same(one, (batch, None, length, None))
                held[part].update(layer[part]["key"], layer[part]["value"], i)
        masks = {"decoder_attention_mask": input_ids.new_ones(batch, past + new)}
        if encoder_attention_mask is not None:
            same(encoder_attention_mask, (batch, encoded))
            masks["attention_mask"] = encoder_attention_mask
        # its keys and values are cached: of what the encoder gave, nobody reads more than the size
        read = BaseModelOutput(last_hidden_state=first["encoder"]["key"].new_zeros(batch, encoded, width))
        made = whole(
            decoder_input_ids=input_ids, encoder_outputs=read, use_cache=True, **masks,
            past_key_values=EncoderDecoderCache(held["decoder"], held["encoder"]),
        )  # fmt: skip
        layers = made.past_key_values.self_attention_cache.layers
        grown = [{"decoder": {"key": one.keys, "value": one.values}} for one in layers]
        return {"logits": made.logits, "present": grown}

    return step
