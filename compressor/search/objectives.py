"""What a search minimises, and what it must keep to: names of values, and constraints in the user's words.

Values of a trial: `latency_ms` (batch 1, one thread), `speedup` (times the original), `size_mb` (10^6 bytes), `macs`
and `params` (shares of the original's), `drop` (points of the metric that are lost: hundredths) and `metric` where
there is one, and of the outputs, on held-out samples, the least of all: `sqnr` in dB, `cosine`, `agreement` (of top-1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import UsageError, nearest

OBJECTIVES = {"latency": "latency_ms", "size": "size_mb", "macs": "macs", "params": "params"}
LOWER = ("latency_ms", "size_mb", "macs", "params", "drop")  # is better; of all others, higher
HIGHER = ("speedup", "metric", "sqnr", "cosine", "agreement")
QUALITIES = ("drop", "metric", "sqnr", "cosine", "agreement")
ROUNDING = 1e-9  # 100 (0.93 - 0.92) is one point of top-1, and a little more than 1
GIVEN_UP = 3.0  # times the allowed loss: what passes to come will not mend


@dataclass(frozen=True)
class Constraint:
    """`drop<=1.0`: the name of a value, the direction, and the limit."""

    name: str
    most: bool
    limit: float

    def __str__(self) -> str:
        return f"{self.name}{'<=' if self.most else '>='}{self.limit:g}"

    def missed(self, values: Mapping[str, float]) -> float:
        """By how much, 0 where it holds; relative to the limit, so that constraints can be weighed against each other.

        Infinite where the value is not known.
        """
        value = values.get(self.name, math.nan)
        if math.isnan(value):
            return math.inf
        over = value - self.limit if self.most else self.limit - value
        missed = over / max(abs(self.limit), 1e-3)
        return missed if missed > ROUNDING else 0.0


def constraint(text: str) -> Constraint:
    """`drop<=1.0` -> Constraint; UsageError with the nearest name."""
    found = re.fullmatch(r"\s*(\w+)\s*(<=|>=)\s*([-+.\deE]+)\s*", text)
    try:
        limit = float(found[3]) if found else math.nan
    except ValueError:
        limit = math.nan
    if found is None or not math.isfinite(limit):
        raise UsageError(f"--constraint '{text}' is not NAME<=NUMBER or NAME>=NUMBER, for example drop<=1.0")
    name, most = found[1], found[2] == "<="
    if name not in (*LOWER, *HIGHER):
        hint = nearest(name, (*LOWER, *HIGHER)) or f"; there are {', '.join((*LOWER, *HIGHER))}"
        raise UsageError(f"--constraint '{text}': unknown value '{name}'{hint}")
    if most != (name in LOWER):
        sign = "<=" if name in LOWER else ">="
        raise UsageError(f"--constraint '{text}': of {name} {'less' if name in LOWER else 'more'} is better; write "
                         f"{name}{sign}{limit:g}")  # fmt: skip
    return Constraint(name, most, limit)


def objective(text: str) -> str:
    """Name of the value to minimise; UsageError with the nearest name."""
    if text in OBJECTIVES:
        return OBJECTIVES[text]
    known = ", ".join(OBJECTIVES)
    raise UsageError(f"--objective {text}: no such objective{nearest(text, OBJECTIVES)}; there are {known}")


def distance(constraints: Sequence[Constraint], values: Mapping[str, float]) -> float:
    """Sum of what is missed; 0 for a feasible trial."""
    return sum(one.missed(values) for one in constraints)


def hopeless(constraints: Sequence[Constraint], values: Mapping[str, float]) -> str:
    """Why the passes to come cannot mend what is lost, in words; empty where they may.

    Passes lose, or mend a little (distillation); a loss of `GIVEN_UP` times what is allowed stays one.
    """
    for one in constraints:
        value = values.get(one.name, math.nan)
        if not one.missed(values):
            continue
        if one.name == "drop" and value > GIVEN_UP * max(one.limit, 0.5):
            return f"{one.name} is {value:.3g}, {one} was asked for"
        if one.name == "sqnr" and value < one.limit / GIVEN_UP:
            return f"{one.name} is {value:.3g}, {one} was asked for"
        if one.name in ("cosine", "agreement") and 1 - value > GIVEN_UP * max(1 - one.limit, 0.01):
            return f"{one.name} is {value:.4g}, {one} was asked for"
    return ""
