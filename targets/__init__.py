"""The targets, one file each."""

from compressor.target import Target

from .cpu import CPU, CPU_AVX2
from .gpu import GPU
from .mobile import MOBILE
from .openvino import OPENVINO
from .web import WEB

TARGETS: dict[str, Target] = {t.name: t for t in (CPU, MOBILE, GPU, WEB, OPENVINO, CPU_AVX2)}
