"""The passes, one file each, in default order."""

from compressor.pipeline import Pass

from .distill import Distill
from .fold import Fold
from .fp16 import Fp16
from .int4 import Int4
from .int8 import Int8
from .merge import Merge
from .prune import Prune
from .shorten import Shorten
from .squeeze import Squeeze

PASSES: dict[str, type[Pass]] = {
    p.name: p for p in (Merge, Shorten, Prune, Squeeze, Distill, Fold, Int8, Int4, Fp16)
}
