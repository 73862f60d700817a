"""Distillation without labels: the model as it came teaches what is left of it, on the calibration data.

Outputs and shared values inside are matched, each relative to its variance (`compressor/distillation.py`); the best
state on held-out samples is kept (`compressor/learning.py`).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from compressor.distillation import Lesson, Recipe
from compressor.errors import DataError, UsageError
from compressor.ir import Graph
from compressor.learning import Checkpoint, Course, Trainer
from compressor.ops import is_tensor, kind
from compressor.pipeline import BOUNDED, Context, Contract, Decline, Outcome, Pass, Rewrite, Size
from compressor.samples import Samples
from compressor.student import write

LEAST = 8  # samples to learn from

NO_DATA = (
    "distill learns from data, and none was given; pass --calib FILE with unlabelled samples, the more the better "
    "(--calib-limit 10000 reads more than the first 1,024)"
)


@dataclass(frozen=True)
class Distill(Pass):
    """The original model teaches the pruned or squeezed one on the calibration data; labels are not needed.

    epochs: passes over the data. minutes: the schedule is over by then, whatever is left of it; `minutes=none` for
    no limit, and for equal results on machines of different speed. lr: largest step, as a share of the size of each
    tensor's numbers; 0.02 with batch norms and 0.002 without, if not given. batch: samples a step. features: weight
    of values inside (residual streams) beside the outputs, 0 for outputs alone. patience: share of the schedule that
    may pass without a better held-out error. augment: images (float inputs of 1, 3 or 4 channels) are mirrored,
    shifted and mixed; other inputs never are. checkpoint: a file that a run which was stopped goes on from.

    One calibration sample in eight judges and teaches nothing. Where nothing gets better on them, the model stays as
    it is. It does best with all the data there is: raise `--calib-limit`.
    """

    name: ClassVar[str] = "distill"
    contract: ClassVar[Contract] = BOUNDED
    after: ClassVar[tuple[str, ...]] = ("merge", "shorten", "prune", "squeeze")
    learns: ClassVar[bool] = True

    epochs: int = 60
    minutes: float | None = 20.0
    lr: float | None = None
    batch: int = 64
    features: float = 1.0
    patience: float = 0.3
    augment: bool = True
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"distill({name}={getattr(self, name)}): at least 1")
        for name in ("lr", "minutes", "patience"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UsageError(f"distill({name}={value}): a number above 0")
        if not (self.features >= 0 and math.isfinite(self.features)):
            raise UsageError(f"distill(features={self.features}): a number from 0 up")

    def plan(self, size: Size, graph: Graph, data: bool) -> tuple[Size, str]:
        if not data:
            raise UsageError(NO_DATA)
        return size, "the size stays; it learns from the original"

    def run(self, graph: Graph, ctx: Context) -> Outcome:
        start = time.perf_counter()
        data = ctx.lessons if ctx.lessons is not None else ctx.calibration
        if data is None:
            raise UsageError(NO_DATA)
        obstacle = _obstacle(graph, ctx.original)
        if obstacle or ctx.original is None or ctx.limit == 0:
            return Outcome(declines=[Decline("graph", obstacle or "the limit allows no rewrite")])
        samples = Samples(data, graph.inputs)
        if len(samples.places()) < LEAST:
            raise DataError(
                f"distill: {data.description}: too few to learn from; give it at least {LEAST} samples "
                "beside those that are held out"
            )
        lesson = Lesson(ctx.original, graph, samples, self._recipe(ctx.seed))
        if obstacle := lesson.obstacle():
            return Outcome(declines=[Decline("graph", obstacle)])
        checkpoint = Checkpoint(Path(self.checkpoint), lesson) if self.checkpoint is not None else None
        trainer = Trainer(lesson, checkpoint, start)
        course = trainer.run(ctx.progress)
        return _outcome(graph, ctx.original, trainer, course)

    def _recipe(self, seed: int) -> Recipe:
        return Recipe(
            epochs=self.epochs,
            minutes=self.minutes,
            lr=self.lr,
            batch=self.batch,
            features=self.features,
            patience=self.patience,
            augment=self.augment,
            seed=seed,
        )


def _outcome(graph: Graph, original: Graph, trainer: Trainer, course: Course) -> Outcome:
    lesson = trainer.lesson
    facts = {
        "samples": len(lesson.learning),
        "judging": sum(map(len, lesson.held_out)),
        "values": len(lesson.watched) - lesson.outputs,
        "batch_statistics": lesson.batch_statistics,
        "steps": course.step,
        "epochs": round(course.step / trainer.per_epoch, 2),
        "stopped": course.stopped,
        "clock_led": course.clock_led,
        "error_before": course.before,
        "error_after": course.best,
    }
    if course.state is None:
        reason = (
            f"learning made nothing better on held-out samples ({course.stopped}); the model stays as it is"
        )
        return Outcome(declines=[Decline("graph", reason)], facts=facts)
    changed = write(graph, course.state)
    gain = f"{_decibels(course.before)} -> {_decibels(course.best)} on {facts['judging']} samples"
    rewrites = [Rewrite("graph", f"{len(changed)} tensors learned from the original: {gain}")]
    return Outcome(rewrites=rewrites, facts=facts, reference=original)


def _obstacle(graph: Graph, original: Graph | None) -> str:
    if original is None:
        return "there is no original to learn from"
    for node in graph.nodes:
        if kind(node) in ("quantize", "dequantize"):
            return "the model is quantised; distill stands before int8"
        if is_tensor(node) and node.meta["val"].dtype in (torch.float16, torch.bfloat16):
            return (
                f"{node.name} is computed in half precision, which loses small gradients; distill before fp16"
            )
    return ""


def _decibels(error: float) -> str:
    return f"{-10 * math.log10(max(error, 1e-30)):.1f} dB"
