"""How an accelerator would cut a model up: what it takes, in how many pieces, and what falls back to the processor.

ONNX Runtime gives a provider the nodes that it takes in as few connected pieces as can run one after another. Between
two pieces tensors travel to the processor and back: few pieces and a large share of the multiplications are good signs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx

from .accelerators import Provider
from .units import Unit, units_of


def judged(model: onnx.ModelProto, providers: Sequence[Provider]) -> list[dict[str, Any]]:
    """One row a provider, as plain data: see `partitioned`."""
    units = units_of(model)
    return [partitioned(units, provider) for provider in providers]


def partitioned(units: Sequence[Unit], provider: Provider) -> dict[str, Any]:
    """What a provider takes of a model.

    partitions: how many pieces. operators, taken: operators with the quantisers round them counted once, of the model
    and on the accelerator. macs, macs_taken: multiplications. share: of them on the accelerator, 0 to 1, None where
    nothing multiplies. fallback: one row for all operators of a kind that fall back for one reason (operator, reason,
    count, macs, modules), the most multiplications first. uncounted: operators that multiply, and whose MACs nobody
    counted.
    """
    reasons = _reasons(units, provider)
    pieces = pieces_of(units, [not r for r in reasons])
    for piece in pieces:
        if len(piece) == 1 and units[piece[0]].op in provider.alone:
            reasons[piece[0]] = "not worth a partition of its own"
    pieces = [piece for piece in pieces if not reasons[piece[0]]]
    taken = [unit for unit, reason in zip(units, reasons, strict=True) if not reason]
    macs, macs_taken = (sum(u.macs for u in some) for some in (units, taken))
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for unit, reason in zip(units, reasons, strict=True):
        if reason:
            row = rows.setdefault(
                (unit.op, reason),
                {"operator": unit.op, "reason": reason, "count": 0, "macs": 0, "modules": []},
            )
            row["count"] += 1
            row["macs"] += unit.macs
            if unit.module not in row["modules"]:
                row["modules"].append(unit.module)
    return {
        "provider": provider.name,
        "title": provider.title,
        "partitions": len(pieces),
        "operators": len(units),
        "taken": len(taken),
        "macs": macs,
        "macs_taken": macs_taken,
        "share": macs_taken / macs if macs else None,
        "fallback": sorted(rows.values(), key=lambda row: (-row["macs"], -row["count"], row["operator"])),
        "uncounted": sorted({unit.op for unit in units if unit.uncounted}),
        "note": provider.note,
    }


def _reasons(units: Sequence[Unit], provider: Provider) -> list[str]:
    """Why each unit falls back; empty where it is taken."""
    found: dict[int, str] = {}
    for unit in units:
        into = provider.folded.get(unit.op)
        if into is None:
            found[id(unit)] = provider.refuses(unit)
            continue
        source = unit.sources[0] if unit.sources else None
        merged = (
            source is not None
            and source.op in into
            and not (source.quantised or unit.quantised or source.readers > 1 or found[id(source)])
        )
        found[id(unit)] = "" if merged else f"taken only behind {' or '.join(sorted(into))}, in floats"
    return [found[id(unit)] for unit in units]


def pieces_of(units: Sequence[Unit], taken: Sequence[bool]) -> list[list[int]]:
    """Positions of the units of each piece, as few pieces as a greedy walk finds.

    A unit belongs to the earliest piece that can hold it: that of what it reads, or the next one, where something that
    falls back lies between.
    """
    place = {id(unit): i for i, unit in enumerate(units)}
    piece: list[int] = []
    for unit, good in zip(units, taken, strict=True):
        sources = [place[id(source)] for source in unit.sources]
        if good:
            piece.append(max((piece[s] + (not taken[s]) for s in sources), default=0))
        else:
            piece.append(max((piece[s] for s in sources), default=-1))
    made: dict[int, list[int]] = {}
    for i, good in enumerate(taken):
        if good:
            made.setdefault(piece[i], []).append(i)
    return [made[number] for number in sorted(made)]
