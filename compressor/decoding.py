"""A causal language model as one step of generation: tokens and what is cached in, logits and the grown cache out.

Names are those that programs which generate text with ONNX Runtime look for: `input_ids`, `attention_mask` over the
cached tokens and the new ones, `position_ids` where the model takes them, `past_key_values.0.key` and `.value` [batch,
heads, cached tokens, width], `logits`, `present.0.key` and so on. The first step has a cache of no tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import DataError, UnsupportedError
from .ir import Input

BATCH, SEQUENCE, PAST = "batch", "sequence", "past_sequence"
TOTAL = f"{PAST} + {SEQUENCE}"
CACHE = "past_key_values"
ENCODED = "encoder_sequence"
_EXAMPLE = {BATCH: 2, SEQUENCE: 2, PAST: 6, TOTAL: 8, ENCODED: 5}


def stepping(model: nn.Module) -> tuple[tuple[Input, ...], dict[str, Any]]:
    """Makes `model` compute one step, in place, so that its parameters keep their names; its inputs and an example.

    UnsupportedError where what it caches is not one pair of keys and values a layer.
    """
    pairs = _cached(model)
    inputs = [
        Input("input_ids", torch.int64, (BATCH, SEQUENCE)),
        Input("attention_mask", torch.int64, (BATCH, TOTAL)),
    ]
    if "position_ids" in inspect.signature(_own_forward(model)).parameters:
        inputs.append(Input("position_ids", torch.int64, (BATCH, SEQUENCE)))
    example: dict[str, Any] = {spec.name: example_of(spec) for spec in inputs}
    example[CACHE] = []
    for i, pair in enumerate(pairs):
        shapes = {name: (BATCH, t.shape[1], PAST, t.shape[3]) for name, t in pair.items()}
        specs = {name: Input(f"{CACHE}.{i}.{name}", pair[name].dtype, s) for name, s in shapes.items()}
        inputs += specs.values()
        example[CACHE].append({name: example_of(spec) for name, spec in specs.items()})
    model.forward = _step(model.forward)
    return tuple(inputs), example


def _own_forward(model: Any) -> Callable[..., Any]:
    """The forward that names its arguments: PEFT's takes anything and hands it on."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).forward  # type: ignore[no-any-return]


def _cached(model: nn.Module) -> list[dict[str, Tensor]]:
    """What a model caches of two tokens, layer by layer: key and value [1, heads, 2, width]."""
    with torch.no_grad():
        made = model(input_ids=torch.ones(1, 2, dtype=torch.long), use_cache=True)
    layers = getattr(getattr(made, "past_key_values", None), "layers", ())
    pairs = [{"key": getattr(one, "keys", None), "value": getattr(one, "values", None)} for one in layers]
    if not pairs or not all(isinstance(t, Tensor) and t.dim() == 4 for pair in pairs for t in pair.values()):
        raise UnsupportedError(
            f"--task text-generation: {type(model).__name__} does not cache a pair of keys and values a layer; --task "
            "causal-lm compiles it without its cache"
        )
    return pairs  # type: ignore[return-value]


def _step(whole: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """The forward of one step, by the model's own."""

    def step(
        input_ids: Tensor,
        attention_mask: Tensor,
        past_key_values: list[dict[str, Tensor]],
        position_ids: Tensor | None = None,
    ) -> dict[str, Any]:
        from transformers import DynamicCache

        (batch, new), past = input_ids.shape, past_key_values[0]["key"].shape[2]
        same(attention_mask, (batch, past + new))
        places = {} if position_ids is None else {"position_ids": position_ids}
        for one in places.values():
            same(one, (batch, new))
        held = DynamicCache()
        for i, layer in enumerate(past_key_values):
            for one in layer.values():
                same(one, (batch, None, past, None))
            held.update(layer["key"], layer["value"], i)
        made = whole(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=held, use_cache=True, **places
        )
        grown = [{"key": layer.keys, "value": layer.values} for layer in made.past_key_values.layers]
        return {"logits": made.logits, "present": grown}

    return step


def same(tensor: Tensor, shape: tuple[Any, ...]) -> None:
    """Tells the exporter what the sizes of a tensor are."""
    for size, wanted in zip(tensor.shape, shape, strict=True):
        if wanted is not None:
            torch._check(size == wanted)


def example_of(spec: Input) -> Tensor:
    shape = [_EXAMPLE[size] if isinstance(size, str) else size for size in spec.shape]
    if spec.dtype.is_floating_point:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(spec.dtype)
    if spec.name == "position_ids":
        return (_EXAMPLE[PAST] + torch.arange(shape[1])).expand(shape).clone()
    return torch.ones(shape, dtype=spec.dtype)


def is_cached(spec: Input) -> bool:
    """Whether an input holds cached keys or values."""
    return spec.name.startswith(f"{CACHE}.")


def empty(spec: Input, rows: int) -> Tensor:
    """The cache of a first step, for so many samples; DataError for what an encoder must have said before."""
    if ".encoder." in spec.name:
        raise DataError(
            f"{spec.name} is what the encoder makes of a text: calibrate a decoder with batches of its own inputs"
        )
    rest = [size if isinstance(size, int) else 0 for size in spec.shape[1:]]
    return torch.zeros([rows, *rest], dtype=spec.dtype)
