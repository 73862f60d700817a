"""A causal language model as one step of generation: tokens and what is cached in, logits and the grown cache out.

Names are those that programs which generate text with ONNX Runtime look for: `input_ids`, `attention_mask` over the
cached tokens and the new ones, `position_ids` where the model takes them, `past_key_values.0.key` and `.value` [batch,
heads, cached tokens, width], `logits`, `present.0.key` and so on. The first step has a cache of no tokens.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnsupportedError
from .ir import Input

BATCH, SEQUENCE, PAST = "batch", "sequence", "past_sequence"
TOTAL = f"{PAST} + {SEQUENCE}"
CACHE = "past_key_values"
_EXAMPLE = {BATCH: 2, SEQUENCE: 2, PAST: 6, TOTAL: 8}


def stepping(model: nn.Module) -> tuple[tuple[Input, ...], dict[str, Any]]:
    """Makes `model` compute one step, in place, so that its parameters keep their names; its inputs and an example.

    UnsupportedError where what it caches is not one pair of keys and values a layer.
    """
    kind = type(model).__name__
    with torch.no_grad():
        made = model(input_ids=torch.ones(1, 2, dtype=torch.long), use_cache=True)
    pairs = [
        (getattr(layer, "keys", None), getattr(layer, "values", None))
        for layer in getattr(getattr(made, "past_key_values", None), "layers", ())
    ]
    if not pairs or not all(isinstance(t, Tensor) and t.dim() == 4 for pair in pairs for t in pair):
        raise UnsupportedError(
            f"--task text-generation: {kind} does not cache a pair of keys and values a layer; --task causal-lm "
            "compiles it without its cache"
        )
    whole = model.forward
    takes_positions = "position_ids" in inspect.signature(whole).parameters

    def step(
        input_ids: Tensor,
        attention_mask: Tensor,
        past_key_values: list[dict[str, Tensor]],
        position_ids: Tensor | None = None,
    ) -> dict[str, Any]:
        from transformers import DynamicCache

        (batch, new), past = input_ids.shape, past_key_values[0]["key"].shape[2]
        _same(attention_mask, (batch, past + new))
        if position_ids is not None:
            _same(position_ids, (batch, new))
        held = DynamicCache()
        for i, layer in enumerate(past_key_values):
            for one in (layer["key"], layer["value"]):
                _same(one, (batch, None, past, None))
            held.update(layer["key"], layer["value"], i)
        positions = {"position_ids": position_ids} if position_ids is not None else {}
        made = whole(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=held,
            use_cache=True,
            **positions,
        )
        grown = [{"key": layer.keys, "value": layer.values} for layer in made.past_key_values.layers]
        return {"logits": made.logits, "present": grown}

    model.forward = step
    ids = [
        Input("input_ids", torch.int64, (BATCH, SEQUENCE)),
        Input("attention_mask", torch.int64, (BATCH, TOTAL)),
    ]
    if takes_positions:
        ids.append(Input("position_ids", torch.int64, (BATCH, SEQUENCE)))
    cached = [
        [Input(f"{CACHE}.{i}.{name}", t.dtype, (BATCH, t.shape[1], PAST, t.shape[3]))
         for name, t in zip(("key", "value"), pair, strict=True)]
        for i, pair in enumerate(pairs)
    ]  # fmt: skip
    example: dict[str, Any] = {spec.name: _example(spec) for spec in ids}
    if takes_positions:
        example["position_ids"] += _EXAMPLE[PAST] + torch.arange(_EXAMPLE[SEQUENCE])
    example[CACHE] = [
        {name: _example(spec) for name, spec in zip(("key", "value"), pair, strict=True)} for pair in cached
    ]
    return (*ids, *(spec for pair in cached for spec in pair)), example


def _same(tensor: Tensor, shape: tuple[Any, ...]) -> None:
    """Tells the exporter what the sizes of a tensor are."""
    for size, wanted in zip(tensor.shape, shape, strict=True):
        if wanted is not None:
            torch._check(size == wanted)


def _example(spec: Input) -> Tensor:
    shape = [_EXAMPLE[size] if isinstance(size, str) else size for size in spec.shape]
    if spec.dtype.is_floating_point:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(spec.dtype)
    return (
        torch.zeros(shape, dtype=spec.dtype)
        if "position" in spec.name
        else torch.ones(shape, dtype=spec.dtype)
    )


def is_cached(spec: Input) -> bool:
    """Whether an input holds cached keys or values."""
    return spec.name.startswith(f"{CACHE}.")


def empty(spec: Input, rows: int) -> Tensor:
    """The cache of a first step, for so many samples."""
    rest = [size if isinstance(size, int) else 0 for size in spec.shape[1:]]
    return torch.zeros([rows, *rest], dtype=spec.dtype)
