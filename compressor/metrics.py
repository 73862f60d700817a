"""What the rows of a report measure besides errors: the user's metric, and of detectors what is found again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from . import heads, postprocess
from .data import Data
from .evaluation import Evaluator, evaluator
from .ir import Graph
from .load import Loaded
from .matching import FoundAgain
from .nms import Detections
from .opening import Options, reading
from .postprocess import Plan
from .precision import AveragePrecision, are_boxes


def of_rows(
    graph: Graph, loaded: Loaded, held_out: Data, plan: Plan | None, opt: Options, sizes: Mapping[str, int]
) -> tuple[Evaluator | None, list[str]]:
    """The metric of `graph` as it came and of what becomes of it, and notices. None where none was asked for.

    plan: of `--postprocess`; what is run then returns detections, which are matched with the original's on the data of
    `--eval`, or on the held-out samples, beside the metric of a function, or the precision against boxes in the data.
    """
    own, asked = None, plan
    if isinstance(opt.evaluate, str) and postprocess.is_words(opt.evaluate):
        asked = plan or heads.asked(graph, opt.evaluate, loaded.model)
    elif opt.evaluate is not None:
        text = reading(graph, loaded, opt, sizes, opt.label_field)
        own = evaluator(opt.evaluate, graph, preprocess=opt.preprocess, text=text, labelled=plan is None)
    if asked is None:
        return own, []
    data = held_out
    if own is not None and own.data is not None:
        data, own = own.data, None
    copy = graph.copy()  # passes edit the graph itself

    def read(outputs: Sequence[Tensor]) -> Detections:
        return asked.of(graph.outputs, outputs)

    def last(outputs: Sequence[Tensor]) -> Detections:
        boxes, scores, labels, count = outputs[-4:]
        return boxes, scores, labels, count

    found = FoundAgain(lambda *inputs: read(copy.run(*inputs)), data, read if plan is None else last)
    notices = []
    if found.nothing:
        notices.append(
            f"the original detects nothing over conf={asked.options.conf:g} on {data.description}: what became of its "
            "detections is not measured; lower conf, or give pictures by --calib or --eval"
        )
    drawn = plan is not None and are_boxes(next(iter(data)).labels)
    precision = AveragePrecision(data, last) if drawn else own.of if own else lambda run: {}
    return Evaluator("recall", function=lambda run: {**precision(run), **found(run)}), notices
