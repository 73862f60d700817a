"""The search itself: rounds of trials asked of optuna, run by an engine, and told in order; its state lies on disk.

A round has a fixed size and its own seed, so that any number of workers finds the same, and so does a search that was
killed and resumed. What is timed is timed between rounds, when nothing else runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import Trial, TrialState

from ..errors import CompressorError, OutputError, UsageError
from ..progress import Watch
from ..publishing import replace
from ..report import write_report, write_text
from . import picture
from . import trial as trials
from .engines import Engine
from .objectives import QUALITIES, Constraint, distance
from .space import Space
from .trial import DONE, Outcome, Task

ROUND = 4  # trials that are asked together, whatever the number of workers
STUCK = 8  # specs in a row that were tried before: the rest of the round is drawn at random
SAME = 50  # specs in a row that were tried before: the space is exhausted
LESSONS = ROUND // 2  # of a round: they take minutes
TAUGHT_BACK = (
    5.0  # times what is allowed: who lost more learns in vain (ResNet-56: 13 points were 10 afterwards)
)
CHEAPER = 0.9  # times the MACs of the best model: what a lesson that takes minutes must promise
TIMED = 0.03  # by which two times of one file may differ: what is nearer is equally fast
SAMPLERS = ("tpe", "nsga2", "random")
STATE, SUMMARY = "search.log", "tune.json"
_OUTCOME, _BEGUN, _GUESS, _TAUGHT = "outcome", "begun with", "guess", "once more with lessons"
_KEPT = "outcome.json"


@dataclass
class Study:
    """One search. objectives: names of values to minimise. guesses: answers to try first, see `Space.given`.

    table: sha256 of a file -> what was timed, taken instead of measured. timed_on: where, if not on this host.
    watch: is told of rounds, and of every trial as it ends.
    """

    task: Task
    space: Space
    objectives: tuple[str, ...]
    constraints: tuple[Constraint, ...]
    engine: Engine
    trials: int
    timeout: float | None = None
    sampler: str = "tpe"
    seed: int = 0
    guesses: Sequence[Mapping[str, str]] = ()
    table: dict[str, dict[str, float]] = field(default_factory=dict)
    timed_on: str = ""
    watch: Watch = field(default_factory=Watch)
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    stopped: str = ""

    @property
    def folder(self) -> Path:
        return Path(self.task.folder)

    # ---------------------------------------------------------------- running

    def run(self) -> None:
        """Searches until trials, time or the space are used up; whatever ends it, the best so far is on disk."""
        try:
            self._search()
        except OSError as error:
            raise OutputError(
                f"cannot write to {self.folder}: {error.strerror or error}; free space"
            ) from error

    def _search(self) -> None:
        start = time.monotonic()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.first = self._original()
        study = self._opened()
        try:
            longest = {False: 0.0, True: 0.0}  # seconds of a round without lessons, and with one
            while len(self.outcomes) < self.trials:
                begun = time.monotonic()
                room = self.timeout - (begun - start) if self.timeout is not None else math.inf
                if room < longest[False]:
                    self.stopped = f"the time is up ({self.timeout:g} s)"
                    break
                left = ROUND - len(self.outcomes) % ROUND  # of a round that was killed
                count = min(left, self.trials - len(self.outcomes))
                asked = self._asked(study, count, lessons=room >= longest[True])
                if not asked:
                    self.stopped = self._exhausted()
                    break
                self._round(study, asked)
                learned = any(_TAUGHT in one.user_attrs for one, _ in asked)
                longest[learned] = max(longest[learned], time.monotonic() - begun)
        finally:
            self.publish()

    def _original(self) -> dict[str, float]:
        """Values of the model as it came; made once."""
        known, found = self.folder / SUMMARY, dict[str, float]()
        if known.exists():
            try:
                before = json.loads(known.read_text())
                self.table |= {one: _numbers(values) for one, values in before["latency_table"].items()}
                found = _numbers(before["original"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UsageError(f"{known} is damaged: name another --output") from error
        if not found or not (self.task.original / "model.onnx").exists():
            with self.watch("the original"):
                found = self.engine.alone(trials.original, self.task) | found
        return found

    def _opened(self) -> optuna.Study:
        begun = (self.folder / STATE).exists()
        if begun:
            _mend(self.folder / STATE)
        try:
            study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(self.folder / STATE))),
                study_name="tune",
                # of another number of objectives it would not load, which `_require_same` says more clearly
                directions=["minimize"] * len(self.objectives) if not begun else None,
                load_if_exists=True,
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{self.folder / STATE} is damaged: name another --output") from error
        self._require_same(study)
        for one in study.get_trials(deepcopy=False):
            if _OUTCOME in one.user_attrs:
                outcome = Outcome(**one.user_attrs[_OUTCOME])
                self.outcomes[outcome.number] = outcome
        for outcome in self.done:  # the summary was not written where the first round was killed
            known = {name: outcome.values[name] for name in ("latency_ms", "speedup")}
            self.first.setdefault("latency_ms", known["latency_ms"] * known["speedup"])
            self.table.setdefault(outcome.sha256, known)
        return study

    def _require_same(self, study: optuna.Study) -> None:
        """UsageError where a search goes on with something else than it began with: its trials would not compare."""
        mine = {
            "--passes": self.space.text,
            "--objective": ",".join(self.objectives),
            "--constraint": ",".join(map(str, self.constraints)),  # models beside them are gone
            "model, data or options": self.task.digest,
            "--target": self.task.target,
        }
        theirs = study.user_attrs.get(_BEGUN)
        if theirs is None:
            study.set_user_attr(_BEGUN, mine)
        elif other := [name for name in mine if mine[name] != theirs.get(name)]:
            raise UsageError(
                f"{self.folder} holds a search with another {' and another '.join(other)}: resume it as it began, or "
                "name another --output"
            )

    def _params(self, guess: Mapping[str, str]) -> dict[str, Any]:
        """What `_choice` makes the words of a guess again."""
        found: dict[str, Any] = {}
        for name, words in self.space.decisions().items():
            word = guess.get(name, words[0])
            found[name] = words.index(word) if _numeric(words) else word
        return found

    def _asked(self, study: optuna.Study, count: int, lessons: bool) -> list[tuple[Trial, str]]:
        """The trials of the next round, those first that were in flight when an earlier search ended."""
        running = [
            t
            for t in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            if "spec" in t.user_attrs
        ]
        for stale in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if "spec" not in stale.user_attrs:
                study.tell(stale.number, state=TrialState.FAIL)
        asked = [(Trial(study, t._trial_id), str(t.user_attrs["spec"])) for t in running]
        known = {outcome.spec for outcome in self.outcomes.values()} | {spec for _, spec in asked}
        study.sampler = self._sampler(len(self.outcomes))
        for answers, number in self._lessons(study) if lessons else ():
            study.enqueue_trial(answers, user_attrs={_TAUGHT: number})
        same = 0
        while len(asked) < count and same < SAME:
            if not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):  # lessons go first
                self._guess(study)
            one = study.ask()
            spec = self.space.possible(self._drawn(one))
            if not spec or spec in known or self._is_doomed(spec):
                same += 1
                if same == STUCK:
                    study.sampler = RandomSampler(seed=self._seed(len(self.outcomes)))
                study.tell(one, state=TrialState.FAIL)
                continue
            same = 0
            one.set_user_attr("spec", spec)
            known.add(spec)
            asked.append((one, spec))
        return asked

    def _guess(self, study: optuna.Study) -> None:
        """The next trial is the next guess, if one is left."""
        made = sum(_GUESS in one.user_attrs for one in study.get_trials(deepcopy=False))
        for guess in ({}, *self.guesses)[made : made + 1]:
            study.enqueue_trial(self._params(guess), user_attrs={_GUESS: made})

    def _drawn(self, one: Trial) -> str:
        """The spec that optuna's answers make. Passes that learn are in it where `_lessons` wants them."""
        spared = () if _TAUGHT in one.user_attrs else self.space.lessons
        return self.space.spec(lambda name, words: words[0] if name in spared else _choice(one, name, words))

    def _lessons(self, study: optuna.Study) -> list[tuple[dict[str, Any], int]]:
        """Answers that give trials which lost too much the passes that learn, and their numbers; minutes well spent.

        Of those that would be cheaper than the best so far and miss nothing else, `LESSONS` that lost the least and
        had none yet.
        """
        learned = [one for one in self.constraints if one.name in QUALITIES]
        other = [one for one in self.constraints if one.name not in QUALITIES]
        before = {one.number: one for one in study.get_trials(deepcopy=False)}
        had = {one.user_attrs.get(_TAUGHT) for one in before.values()}
        most = CHEAPER * min((one.values["macs"] for one in self.feasible), default=math.inf)
        lost = [
            (missed, one.number)
            for one in self.outcomes.values()
            if 0 < (missed := distance(learned, one.values)) <= TAUGHT_BACK
            and not distance([c for c in other if c.name in one.values], one.values)
            and one.values["macs"] <= most
        ]
        found = [(before[n].params | dict.fromkeys(self.space.lessons, "with"), n) for _, n in sorted(lost)]
        return [(a, n) for a, n in found if n not in had and a != before[n].params][:LESSONS]

    def _is_doomed(self, spec: str) -> bool:
        """Whether a spec begins like one that lost too much, and no pass behind that wins it back."""
        lost = (f"{outcome.doomed}," for outcome in self.outcomes.values() if outcome.doomed)
        return any(spec.startswith(one) and not self.space.learns(spec.removeprefix(one)) for one in lost)

    def _exhausted(self) -> str:
        known = {one.spec for one in self.outcomes.values()}
        spared = bool(self.space.lessons)
        with contextlib.suppress(UsageError):  # too many to list
            left = [one for one in self.space.product() if not (spared and self.space.learns(one))]
            if all(one in known or self._is_doomed(one) for one in left):
                return "every spec of the space was tried, or begins like one that lost too much"
        return f"{SAME} draws in a row had been tried before: there are few others"

    def _seed(self, told: int) -> int:
        return self.seed * 100_003 + told

    def _sampler(self, told: int) -> BaseSampler:
        """A fresh one for every round: what it draws depends on seed and history alone."""
        seed = self._seed(told)
        if self.sampler == "random":
            return RandomSampler(seed=seed)
        if self.sampler == "nsga2":
            return NSGAIISampler(seed=seed, population_size=4 * ROUND)
        return TPESampler(
            seed=seed, n_startup_trials=2 * ROUND, multivariate=True, group=True,
        )  # fmt: skip

    def _round(self, study: optuna.Study, asked: Sequence[tuple[Trial, str]]) -> None:
        known = {one.number: self._kept(one.number, spec) for one, spec in asked}
        fresh = [(self.task, one.number, spec) for one, spec in asked if known[one.number] is None]
        begun = len(self.outcomes)
        with self.watch(f"trials {begun + 1} to {begun + len(asked)}", len(asked)) as advance:
            advance(len(asked) - len(fresh))

            def made_one(outcome: Outcome) -> None:
                self._keep(outcome)
                advance(1)

            made = known | {outcome.number: outcome for outcome in self.engine.run(fresh, made_one)}
        for one, _ in asked:
            outcome = made[one.number]
            assert outcome is not None
            if outcome.state == DONE:
                try:
                    outcome = self._timed(outcome)
                except CompressorError as error:
                    why = str(error).splitlines()[0]
                    outcome = dataclasses.replace(outcome, state=trials.FAILED, why=why)
            values = [outcome.values.get(name, math.nan) for name in self.objectives]
            missed = distance(self.constraints, outcome.values)
            if outcome.state == DONE and not all(map(math.isfinite, [missed, *values])):
                outcome = dataclasses.replace(outcome, state=trials.FAILED, why="its metric is not a number")
            one.set_constraint("missed", min(missed, 1e9))
            one.set_user_attr(_OUTCOME, dataclasses.asdict(outcome))
            self.outcomes[outcome.number] = outcome
            if outcome.state == DONE:
                study.tell(one, values)
            else:
                study.tell(one, state=TrialState.FAIL)
            self.watch.say("trial", **dataclasses.asdict(outcome))
        self.publish()

    def _keep(self, outcome: Outcome) -> None:
        """So that a search which is killed before the round ends need not make it again."""
        folder = self.task.trial(outcome.number)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / _KEPT, json.dumps(dataclasses.asdict(outcome)))

    def _kept(self, number: int, spec: str) -> Outcome | None:
        try:
            found = Outcome(**json.loads((self.task.trial(number) / _KEPT).read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return found if found.spec == spec else None

    def _timed(self, outcome: Outcome) -> Outcome:
        """With its latency: relative to the original in the same minute, times what that took at first."""
        known = self.table.get(outcome.sha256)
        if known is None:
            with self.watch(f"timing trial {outcome.number}"):
                known = self.engine.alone(trials.timed, self.task, outcome.number)
            self.first.setdefault("latency_ms", known["latency_ms"] * known["speedup"])
            known["latency_ms"] = self.first["latency_ms"] / known["speedup"]
            self.table[outcome.sha256] = known
        self.first.setdefault("latency_ms", known["latency_ms"] * known["speedup"])
        return dataclasses.replace(outcome, values=outcome.values | known)

    # ---------------------------------------------------------------- results

    @property
    def done(self) -> list[Outcome]:
        return [one for _, one in sorted(self.outcomes.items()) if one.state == DONE]

    @property
    def feasible(self) -> list[Outcome]:
        return [one for one in self.done if not distance(self.constraints, one.values)]

    @property
    def best(self) -> Outcome | None:
        """The feasible trial with the least of the first objective, of equally fast ones the one that lost least; else
        the one that is nearest to feasible.
        """
        key = self.objectives[0]
        if self.feasible:
            most = min(one.values[key] for one in self.feasible) * (1 + (TIMED if key == "latency_ms" else 0))
            equal = [one for one in self.feasible if one.values[key] <= most]
            return min(equal, key=lambda one: (_lost(one), one.values[key], one.number))
        return min(
            self.done, key=lambda one: (distance(self.constraints, one.values), one.number), default=None
        )

    @property
    def front(self) -> list[Outcome]:
        """Feasible trials that no other beats in every objective, and in what their outputs lose."""
        candidates = [(one, self._costs(one)) for one in self.feasible]
        return [one for one, mine in candidates if not any(_beats(other, mine) for _, other in candidates)]

    def _costs(self, one: Outcome) -> tuple[float, ...]:
        return (*(one.values[name] for name in self.objectives), _lost(one))

    def publish(self) -> None:
        """Writes `best/`, `pareto/` and the summary; models of other trials go."""
        best, front = self.best, self.front
        if best is not None:
            _linked({"": self.task.trial(best.number)}, self.folder / "best")
            _linked(
                {f"{one.number:04d}": self.task.trial(one.number) for one in front}, self.folder / "pareto"
            )
        summary = self.summary()
        write_report(self.folder / SUMMARY, summary)
        picture.write(self.folder, summary)
        wanted = {one.number for one in front} | ({best.number} if best is not None else set())
        for number in self.outcomes.keys() - wanted:
            shutil.rmtree(self.task.trial(number), ignore_errors=True)

    def failure(self) -> str:
        """Why there is no model within the constraints, in words."""
        wanted = " and ".join(map(str, self.constraints))
        best = self.best
        if best is None:
            none = f"no trial was made{f': {self.stopped}' if self.stopped else ''}"
            states = "; ".join(dict.fromkeys(one.why for one in self.outcomes.values())) or none
            return f"no trial gave a model: {states[:400]}"
        missed = ", ".join(
            f"{one.name} {best.values.get(one.name, math.nan):.4g}"
            for one in self.constraints
            if one.missed(best.values)
        )
        return (
            f"none of {len(self.outcomes)} trials keeps to {wanted}; the nearest is in {self.folder / 'best'}, with "
            f"{missed}: allow more, give more --trials, or another space with --passes"
        )

    def summary(self) -> dict[str, Any]:
        best = self.best
        return {
            "model": Path(self.task.model).name,
            "target": self.task.target,
            "space": self.space.text,
            "objectives": list(self.objectives),
            "constraints": [str(one) for one in self.constraints],
            "sampler": self.sampler,
            "seed": self.seed,
            "original": self.first,
            "timed_on": self.timed_on,
            "stopped": self.stopped,
            "feasible": len(self.feasible),
            "best": best.number if best is not None else None,
            "missed": {
                str(one): one.missed(best.values)
                for one in self.constraints
                if best is not None and one.missed(best.values)
            },
            "front": [one.number for one in self.front],
            "trials": [dataclasses.asdict(one) for _, one in sorted(self.outcomes.items())],
            "latency_table": self.table,
        }


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Of a report, which says `nan` and `inf` in words."""
    return {name: float(value) for name, value in values.items()}


def _mend(log: Path) -> None:
    """Takes away a last line that was being written when the machine went down."""
    whole = log.read_bytes()
    if not whole.endswith(b"\n"):
        with log.open("r+b") as file:
            file.truncate(whole.rfind(b"\n") + 1)


def _choice(one: Trial, name: str, words: Sequence[str]) -> str:
    """Numbers are suggested by their place, so that the sampler knows that 0.5 lies between 0.4 and 0.6."""
    if _numeric(words):
        return words[one.suggest_int(name, 0, len(words) - 1)]
    found: str = one.suggest_categorical(name, list(words))
    return found


def _numeric(words: Sequence[str]) -> bool:
    try:
        return len(words) > 2 and sorted(words, key=float) == list(words)
    except ValueError:
        return False


def _lost(one: Outcome) -> float:
    """What its outputs have lost, by the metric or else in decibels; more is worse."""
    quality = one.values.get("drop", -one.values.get("sqnr", 0.0))
    return math.inf if math.isnan(quality) else quality


def _beats(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def _linked(sources: Mapping[str, Path], home: Path) -> None:
    """Replaces a folder by one that holds the files of these folders, as hard links where the disk can."""
    fresh = home.with_name(f".{home.name}-new")
    shutil.rmtree(fresh, ignore_errors=True)
    for name, source in sources.items():
        shutil.copytree(
            source,
            fresh / name,
            copy_function=_link,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns(_KEPT),
        )
    fresh.mkdir(exist_ok=True)
    replace(home, fresh)


def _link(source: str, home: str) -> None:
    with contextlib.suppress(OSError):
        os.link(source, home)
        return
    shutil.copy2(source, home)
