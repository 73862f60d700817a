"""The grammar of searches: a spec in which options have several values, and passes may be left out or take turns.

    merge,prune?(macs=0.4..0.9,criterion={l1,taylor}),fold,{int8(calibration={auto,mse}),fp16,none}

`?` behind a pass: with it or without. `{a,b}`: one of these values, or of these passes (`none`: no pass). `a..b`:
numbers from a to b in steps of 0.05, or `a..b/0.1`. `tune` searches such a space, `sweep` walks all of it.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import UsageError
from ..pipeline import arrange, parse
from ..spec import split

STEP = 0.05
MOST = 10_000  # values of one range, and specs of one sweep
Choose = Callable[[str, Sequence[str]], str]  # the name of a decision, and what it is between


@dataclass(frozen=True)
class Decision:
    """One of several words, by name: `prune`, `prune.macs`, `int8|fp16`. The first is the first guess."""

    name: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class _Pass:
    name: str
    options: tuple[tuple[str, Decision], ...]
    present: Decision | None = None

    def spelled(self, choose: Choose) -> str:
        if self.present is not None and choose(self.present.name, self.present.words) == "without":
            return ""
        parts = [
            f"{key}={one.words[0] if len(one.words) == 1 else choose(one.name, one.words)}"
            for key, one in self.options
        ]
        return self.name + (f"({','.join(parts)})" if parts else "")

    def spellings(self) -> list[str]:
        """Every way to write it."""
        made = [""] if self.present is not None else []
        for words in itertools.islice(itertools.product(*(one.words for _, one in self.options)), MOST + 1):
            answers = {one.name: word for (_, one), word in zip(self.options, words, strict=True)}
            made.append(self.spelled(lambda name, words, answers=answers: answers.get(name, "with")))  # type: ignore[misc]
        return made


@dataclass(frozen=True)
class _OneOf:
    which: Decision
    passes: tuple[_Pass | None, ...]

    def spelled(self, choose: Choose) -> str:
        word = choose(self.which.name, self.which.words)
        chosen = self.passes[self.which.words.index(word)]
        return chosen.spelled(choose) if chosen is not None else ""

    def spellings(self) -> list[str]:
        return [text for one in self.passes for text in (one.spellings() if one is not None else [""])]


class Space:
    """All specs that a text of this grammar stands for. UsageError for what no pass takes, with the nearest name."""

    def __init__(self, text: str, registry: Mapping[str, type[Any]]) -> None:
        self.text = text
        seen: Counter[str] = Counter()
        self._slots = [_slot(part, seen) for part in split(text)]
        self._registry = registry
        if not any(map(any, self.each_word())):
            raise UsageError(f"'{text}' names no pass")
        for words in itertools.islice(self.each_word(), MOST):
            named = [spec for spec in words if spec]
            for spec in named:
                parse(spec, registry)
            if named and not any(map(self.possible, named)):
                self.canonical(named[0])  # says why these passes do not go together

    def spec(self, choose: Choose) -> str:
        """The spec that the answers of `choose` make. It is asked only what matters for them."""
        return ",".join(filter(None, (slot.spelled(choose) for slot in self._slots)))

    def first(self) -> str:
        """The first guess: what may be left out is, of everything else the first."""
        return self.spec(lambda name, words: words[0])

    def given(self, answers: Mapping[str, str]) -> str:
        """The first guess but for some answers."""
        return self.spec(lambda name, words: answers.get(name, words[0]))

    def each_word(self) -> Iterator[tuple[str, ...]]:
        """For the first guess, and for every word: specs in which it occurs, between the last and the first others."""
        yield (self.first(),)
        for name, words in self.decisions().items():
            owner = name.partition(".")[0]  # the pass must be there for its options to be
            for word in words:

                def choose(
                    n: str, w: Sequence[str], end: int, name: str = name, word: str = word, owner: str = owner
                ) -> str:
                    return word if n == name else owner if owner in w else "with" if n == owner else w[end]

                yield tuple(self.spec(partial(choose, end=end)) for end in (-1, 0))

    def decisions(self) -> dict[str, tuple[str, ...]]:
        """Every decision by name, also those that matter for some others only."""
        found: dict[str, tuple[str, ...]] = {}
        for slot in self._slots:
            for one in (slot,) if isinstance(slot, _Pass) else (slot.which, *slot.passes):
                if isinstance(one, Decision):
                    found[one.name] = one.words
                elif one is not None:
                    kinds = [decision for _, decision in one.options if len(decision.words) > 1]
                    found |= {d.name: d.words for d in (*([one.present] if one.present else []), *kinds)}
        return found

    def product(self) -> list[str]:
        """Every spec, in the order of the text, each once. UsageError where there are too many to walk."""
        spelled = [slot.spellings() for slot in self._slots]
        if math.prod(map(len, spelled)) > MOST:
            raise UsageError(f"'{self.text}' stands for more than {MOST:,} specs")
        specs = (",".join(filter(None, words)) for words in itertools.product(*spelled))
        return list(dict.fromkeys(filter(None, map(self.possible, specs))))

    def possible(self, spec: str) -> str:
        """The canonical spec; nothing where it names no pass, or passes that do not go together."""
        try:
            return self.canonical(spec) if spec else ""
        except UsageError:
            return ""

    def learns(self, spec: str) -> bool:
        """Whether a pass of the spec may win back what others have lost."""
        return any(one.learns for one in parse(spec, self._registry))

    @property
    def lessons(self) -> list[str]:
        """Decisions on passes that may be left out, and that learn."""
        optional = [one for one in self._slots if isinstance(one, _Pass) and one.present is not None]
        return [one.present.name for one in optional if one.present and self._registry[one.name].learns]

    def canonical(self, spec: str) -> str:
        """The spec as reports spell it: passes that are added stand in it, options that are the defaults do not."""
        return ",".join(map(str, arrange(parse(spec, self._registry), self._registry)[0]))


def _slot(text: str, seen: Counter[str]) -> _Pass | _OneOf:
    """seen: how often each pass stood in the slots before, which are other decisions."""
    if not text.startswith("{"):
        return _pass(text, seen)
    if not text.endswith("}"):
        raise UsageError(f"'{text}' has no closing brace")
    words = split(text[1:-1])
    passes = tuple(None if word == "none" else _pass(word, seen) for word in words)
    names = [one.name if one is not None else "none" for one in passes]
    if len(set(names)) < len(names) or not names:
        raise UsageError(f"'{text}': each pass once; give its options several values instead")
    which = "|".join(names)
    return _OneOf(Decision(_numbered(which, seen), tuple(names)), passes)


def _numbered(name: str, seen: Counter[str]) -> str:
    seen[name] += 1
    return name if seen[name] == 1 else f"{name}#{seen[name]}"


def _pass(text: str, seen: Counter[str]) -> _Pass:
    head, _, rest = text.partition("(")
    if rest and not rest.rstrip().endswith(")"):
        raise UsageError(f"'{text}' has no closing parenthesis")
    optional = head.strip().endswith("?")
    name = head.strip().rstrip("?").strip()
    label = _numbered(name, seen)
    options: list[tuple[str, Decision]] = []
    for part in split(rest.rstrip()[:-1] if rest else ""):
        key, _, raw = (word.strip() for word in part.partition("="))
        if key in dict(options):
            raise UsageError(f"'{text}' says {key} twice; give it several values: {key}={{A,B}}")
        options.append((key, Decision(f"{label}.{key}", _words(name, key, raw))))
    present = Decision(label, ("without", "with")) if optional else None
    return _Pass(name, tuple(options), present)


def _words(name: str, key: str, raw: str) -> tuple[str, ...]:
    if raw.startswith("{"):
        words = tuple(split(raw[1:].rstrip("}")))
    elif ".." in raw:
        words = _range(name, key, raw)
    else:
        return (raw,)
    if not raw.startswith("{") or raw.endswith("}"):
        if words and len(set(words)) == len(words):
            return words
        raise UsageError(f"{name}({key}={raw}): name each value once")
    raise UsageError(f"{name}({key}={raw}) has no closing brace")


def _range(name: str, key: str, raw: str) -> tuple[str, ...]:
    ends, _, step_text = raw.partition("/")
    try:
        low, high = map(float, ends.split(".."))
        step = float(step_text) if step_text else STEP
        count = int((high - low) / step + 1e-9) + 1
    except (ValueError, ZeroDivisionError, OverflowError):
        low, high, step, count = 0.0, 0.0, 0.0, 0
    if not (low < high and step > 0 and 1 < count <= MOST):
        raise UsageError(f"{name}({key}={raw}): a range is LOW..HIGH or LOW..HIGH/STEP, as in 0.4..0.9/0.1")
    return tuple(f"{low + i * step:.10g}" for i in range(count))
