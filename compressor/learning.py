"""The loop that trains a student: AdamW, warm-up and cosine, the best state seen, and a file to go on from.

    rate(f) = min(f / 0.05, (1 + cos(pi f)) / 2),    f = max(step / steps, (time / time allowed - 0.02) / 0.98)

Everything random is drawn anew from (seed, epoch) and (seed, step), so that a run which goes on from a checkpoint
repeats the one that was never interrupted, number by number, as long as the clock does not lead the schedule.
"""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .distillation import Lesson
from .errors import FileError, OutputError, UsageError

WARM_UP = 0.05  # share of the schedule
SLACK = (
    0.02  # share of the time allowed that steps may lag behind, as the first ones do, before the clock leads
)
# Largest step, with and without batch statistics. Those make weights of any size do the same, so that large steps are
# safe: ResNet-20 with 2.6x fewer MACs, 5 epochs: held-out error 0.214, 0.174, 0.153 at 0.01, 0.02, 0.05. MiniLM with
# 1.18x fewer, 19 steps, from 0.322: 0.239, 0.180, 0.198, and no gain, at 0.0002, 0.001, 0.005, 0.02. But weights that
# `prune` has just repaired are lost at 0.05: ResNet-56 with 2.6x fewer went from 0.096 to 0.228 in the first epoch.
RATES = {True: 0.02, False: 0.002}
CLIP = 1.0  # longest gradient
MOST_LOOKS = 100  # held-out evaluations in a run
LEAST_LOOKS = 5  # of them without a better one before a run is stopped
SAVE_SECONDS = 60.0  # between two checkpoints

Progress = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]
State = dict[str, Tensor]


@dataclass
class Course:
    """Where a run stands. step: the next one. seconds: spent so far. best: lowest held-out error, with the state that
    gave it (None: what the student came with). low: the lowest since learning began, seen at `low_at` of the
    schedule, `stale` evaluations ago: first steps may make worse what they start from. errors: of every evaluation.
    """

    before: float
    best: float
    low: float = math.inf
    low_at: float = 0.0
    stale: int = 0
    state: State | None = None
    step: int = 0
    seconds: float = 0.0
    errors: list[float] = field(default_factory=list)
    stopped: str = ""
    clock_led: bool = False

    def look(self, error: float, at: float, state: Callable[[], State]) -> None:
        self.errors.append(error)
        self.stale += 1
        if at and error < self.low:
            self.low, self.low_at, self.stale = error, at, 0
        if error < self.best:
            self.best, self.state = error, state()


class Trainer:
    """One run. start: when the time allowed began, of `time.perf_counter`. checkpoint: a file to go on from."""

    def __init__(self, lesson: Lesson, checkpoint: Checkpoint | None, start: float) -> None:
        self.lesson, self.checkpoint, self.start = lesson, checkpoint, start
        recipe = lesson.recipe
        self.per_epoch = len(lesson.batches(0))
        self.steps = recipe.epochs * self.per_epoch
        self.every = max(self.per_epoch, self.steps // MOST_LOOKS)
        groups = lesson.student.groups()
        self.scales = [float(group["lr"]) for group in groups]
        self.optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
        self.everything = list(dict.fromkeys(lesson.student.parameters.values()))
        self.allowed = math.inf if recipe.minutes is None else 60 * recipe.minutes
        self.saved = start

    def run(self, progress: Progress) -> Course:
        course = self._begin()
        batches = self.lesson.batches(course.step // self.per_epoch)
        with progress("distill: learning", self.steps) as advance:
            advance(course.step)
            while not course.stopped:
                fraction = self._fraction(course)
                if fraction >= 1 or self._is_stale(course, fraction):
                    course.stopped = "end of the schedule" if fraction >= 1 else "no better held-out error"
                    break
                epoch, at = divmod(course.step, self.per_epoch)
                batches = self.lesson.batches(epoch) if at == 0 else batches
                if not self._learn(batches[at], course.step, fraction):
                    course.stopped = "the loss is not finite any more; a lower lr may help"
                    break
                course.step += 1
                advance(1)
                if course.step % self.every == 0:
                    self._look(course, fraction)
                self._save(course, rarely=True)
        if course.step % self.every and "finite" not in course.stopped:
            self._look(course, 1.0)
        self._save(course)
        return course

    def _begin(self) -> Course:
        """A new run, or the one that the checkpoint holds. The time allowed is what this and the last look leave."""
        start = time.perf_counter()
        before = self.lesson.evaluate()
        course = Course(before, before)
        if self.lesson.batch_statistics:
            course.look(self.lesson.choose_statistics(before), 0.0, self.lesson.student.state)
        found = self.checkpoint.read() if self.checkpoint is not None else None
        if found is not None:
            course = Course(**found["course"])
            self.lesson.student.load(found["student"])
            self.optimiser.load_state_dict(found["optimiser"])
        self.saved = now = time.perf_counter()
        self.allowed -= (now - self.start) + (now - start)
        self.start = now - course.seconds
        self._save(course)
        return course

    def _fraction(self, course: Course) -> float:
        """How much of the schedule is over: the further one of steps and clock."""
        spent = (time.perf_counter() - self.start) / max(self.allowed, 1e-9)
        steps, clock = course.step / self.steps, (spent - SLACK) / (1 - SLACK)
        course.clock_led |= clock > steps
        return max(steps, clock)

    def _is_stale(self, course: Course, fraction: float) -> bool:
        waited = fraction - course.low_at > self.lesson.recipe.patience
        return waited and course.stale >= LEAST_LOOKS

    def _learn(self, places: list[tuple[int, int]], step: int, fraction: float) -> bool:
        """One step; False where the loss is not finite."""
        rate = min(fraction / WARM_UP, (1 + math.cos(math.pi * fraction)) / 2)
        highest = self.lesson.recipe.lr or RATES[self.lesson.batch_statistics]
        for group, scale in zip(self.optimiser.param_groups, self.scales, strict=True):
            group["lr"] = scale * highest * rate
        self.optimiser.zero_grad(set_to_none=True)
        with torch.enable_grad():
            for loss in self.lesson.losses(places, step):
                if not math.isfinite(float(loss.detach())):
                    return False
                loss.backward()
        torch.nn.utils.clip_grad_norm_(self.everything, CLIP)
        self.optimiser.step()
        return True

    def _look(self, course: Course, at: float) -> None:
        self.lesson.estimate()
        course.look(self.lesson.evaluate(), at, self.lesson.student.state)

    def _save(self, course: Course, rarely: bool = False) -> None:
        now = time.perf_counter()
        course.seconds = now - self.start
        if self.checkpoint is None or (rarely and now - self.saved < SAVE_SECONDS):
            return
        self.saved = now
        self.checkpoint.write(
            {
                "course": {name: getattr(course, name) for name in asdict(Course(0, 0))},
                "student": self.lesson.student.state(),
                "optimiser": self.optimiser.state_dict(),
            }
        )


class Checkpoint:
    """A file that holds a run, and what it belongs to: the fingerprints of models, data and options."""

    def __init__(self, path: Path, lesson: Lesson) -> None:
        self.path = path
        options = hashlib.sha256(repr(lesson.recipe).encode()).hexdigest()
        self.marks = {"model": lesson.fingerprint(), "data": lesson.samples.fingerprint(), "options": options}

    def read(self) -> dict[str, Any] | None:
        """What the file holds; None where there is none. UsageError where it belongs to another run."""
        if not self.path.exists():
            return None
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True)
            marks = found["marks"]
            differ = [name for name, mark in self.marks.items() if marks[name] != mark]
        except (
            RuntimeError,
            ValueError,
            KeyError,
            TypeError,
            EOFError,
            OSError,
            pickle.UnpicklingError,
        ) as error:
            raise FileError(
                f"distill(checkpoint={self.path}): the file is damaged, or no checkpoint of distill; delete it, or "
                "name another"
            ) from error
        if differ:
            raise UsageError(
                f"distill(checkpoint={self.path}): the file belongs to a run with another {' and '.join(differ)}; "
                "delete it, or name another"
            )
        return found

    def write(self, content: dict[str, Any]) -> None:
        """Replaces the file at once, never half of it."""
        name = ""
        try:
            handle, name = tempfile.mkstemp(prefix=f".{self.path.name}-", dir=self.path.parent)
            with open(handle, "wb") as file:
                torch.save({"marks": self.marks, **content}, file)
            os.replace(name, self.path)
        except OSError as error:
            Path(name).unlink(missing_ok=True) if name else None
            raise OutputError(
                f"distill(checkpoint={self.path}): cannot be written ({error.strerror}); name a file in a folder "
                "that can"
            ) from error
