"""The targets, one file each."""

from compressor.target import Target

from .cpu import CPU, CPU_AVX2
from .gpu import GPU
from .mobile import MOBILE

TARGETS: dict[str, Target] = {t.name: t for t in (CPU, MOBILE, GPU, CPU_AVX2)}
