"""The targets, one file each."""

from compressor.target import Target

from .cpu import CPU, CPU_AVX2
from .gpu import GPU
from .mobile import MOBILE
from .openvino import OPENVINO
from .qnn import QNN, QNN_A16
from .web import WEB

TARGETS: dict[str, Target] = {t.name: t for t in (CPU, MOBILE, QNN, QNN_A16, GPU, WEB, OPENVINO, CPU_AVX2)}
