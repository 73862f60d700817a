"""Adapters and branches of convolutions become one convolution, exact at every border, or stay and say why.

All rows of a table are modules of one network, see `merging.Merged`; images of one, two and three axes side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from merging import Merged, captured, merge, operators
from nets import Net, conv
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.ir import Input

CHANNELS, RANK, SIZE = 8, 4, 8  # as many pixels along an axis as channels
CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)
NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


class ConvMethod(nn.Module):
    """A convolution of 8 channels and an adapter that adds `change(x)` to its output.

    `shapes` names the adapter's parameters, an axis a letter: c channels, d channels of one group, r the rank, q the
    ranks of one group, k the kernel's own axes, 1 as many axes of size 1.
    """

    shapes: ClassVar[dict[str, str]] = {}

    def __init__(self, dims: int = 2, kernel: Any = 3, **geometry: Any) -> None:
        super().__init__()
        self.dims, groups = dims, geometry.get("groups", 1)
        self.base = CONV[dims - 1](CHANNELS, CHANNELS, kernel, **geometry)
        axes = {"c": [CHANNELS], "r": [RANK], "d": [CHANNELS // groups], "q": [RANK // min(groups, RANK)]}
        axes |= {"k": list(self.base.kernel_size), "1": [1] * dims}
        for name, letters in self.shapes.items():
            size = [n for letter in letters for n in axes[letter]]
            self.register_parameter(name, nn.Parameter(torch.ones(size)))

    def like(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The base's convolution with another weight."""
        return self.base._conv_forward(x, weight, bias)

    def point(self, x: Tensor, weight: Tensor) -> Tensor:
        """A 1x1 convolution in the base's groups."""
        return CONVOLVE[self.dims - 1](x, weight, groups=self.base.groups)

    def along(self, vector: Tensor) -> Tensor:
        """A vector of channels, as broadcasting wants it."""
        return vector.view(-1, *[1] * self.dims)

    def forward(self, *images: Tensor) -> Tensor:
        return self.adapted(images[self.dims - 1])

    def adapted(self, x: Tensor) -> Tensor:
        return self.base(x) + self.change(x)

    def change(self, x: Tensor) -> Tensor:
        raise NotImplementedError


# ------------------------------------------------------------------------- methods


class LoRA(ConvMethod):
    """A thin convolution like the base, then 1x1. Hu et al. 2021 (arXiv:2106.09685)."""

    shapes: ClassVar = {"a": "rdk", "b": "cq1"}

    def change(self, x: Tensor) -> Tensor:
        return self.point(self.like(x, self.a), self.b) * 0.5


class Pointwise(ConvMethod):
    """1x1 to few channels first, then a convolution like the base, without a bias before its padding."""

    shapes: ClassVar = {"a": "rd1", "b": "cqk"}

    def change(self, x: Tensor) -> Tensor:
        return self.like(self.point(x, self.a), self.b)


class Tucker(ConvMethod):
    """1x1, a small kernel, 1x1. LoCon; Yeh et al. 2023 (arXiv:2309.14859)."""

    shapes: ClassVar = {"a": "rd1", "core": "rqk", "b": "cq1"}

    def change(self, x: Tensor) -> Tensor:
        return self.point(self.like(self.point(x, self.a), self.core), self.b)


class DoRA(ConvMethod):
    """A norm an output channel. Liu et al. 2024 (arXiv:2402.09353)."""

    shapes: ClassVar = {"a": "rdk", "b": "cq1", "magnitude": "c"}

    def change(self, x: Tensor) -> Tensor:
        groups = self.base.groups
        b, a = (t.flatten(1).unflatten(0, (groups, -1)) for t in (self.b, self.a))
        weight = self.base.weight + torch.einsum("gor,gri->goi", b, a).reshape(self.base.weight.shape)
        gain = self.along(self.magnitude / weight.flatten(1).norm(dim=1))
        lora = self.point(self.like(x, self.a), self.b)
        return (gain - 1) * self.like(x, self.base.weight) + gain * lora


class LoHa(ConvMethod):
    """A product of two low-rank kernels, elementwise. Hyeon-Woo et al. 2021 (arXiv:2108.06098)."""

    shapes: ClassVar = {"a": "rdk", "b": "cr", "c": "rdk", "d": "cr"}

    def change(self, x: Tensor) -> Tensor:
        first, second = (torch.einsum("or,r...->o...", b, a) for a, b in ((self.a, self.b), (self.c, self.d)))
        return self.like(x, first * second)


class LoKr(ConvMethod):
    """A Kronecker product of a matrix and a smaller kernel. Yeh et al. 2023 (arXiv:2309.14859)."""

    def __init__(self, dims: int = 2, **geometry: Any) -> None:
        super().__init__(dims, **geometry)
        out, ins, *size = self.base.weight.shape
        self.ins = 2 if ins % 2 == 0 else 1
        self.small = nn.Parameter(torch.ones(2, self.ins, *[1] * dims))
        self.large = nn.Parameter(torch.ones(out // 2, ins // self.ins, *size))

    def change(self, x: Tensor) -> Tensor:
        return self.like(x, torch.kron(self.small, self.large))


class IA3(ConvMethod):
    """Vectors on the channels before and behind. Liu et al. 2022 (arXiv:2205.05638)."""

    shapes: ClassVar = {"before": "c", "behind": "c"}

    def adapted(self, x: Tensor) -> Tensor:
        return self.base(x * self.along(self.before)) * self.along(self.behind)


class SSF(ConvMethod):
    """Scale and shift behind. Lian et al. 2022 (arXiv:2210.08823)."""

    shapes: ClassVar = {"scale": "c", "shift": "c"}

    def adapted(self, x: Tensor) -> Tensor:
        return self.base(x) * self.along(self.scale) + self.along(self.shift)


class Several(ConvMethod):
    """Two adapters at once, stacked and weighed."""

    shapes: ClassVar = {"a": "rdk", "b": "cq1", "c": "rdk", "d": "cq1", "weights": "11"}

    def change(self, x: Tensor) -> Tensor:
        each = [self.point(self.like(x, a), b) for a, b in ((self.a, self.b), (self.c, self.d))]
        return 0.3 * each[0] - each[1] / 2


class Nested(ConvMethod):
    """An adapter on the adapter's own thin convolution."""

    shapes: ClassVar = {"a": "rdk", "b": "cq1", "c": "rdk", "d": "rq1"}

    def change(self, x: Tensor) -> Tensor:
        down = self.like(x, self.a) + self.point(self.like(x, self.c), self.d)
        return self.point(down, self.b)


class RepVGG(ConvMethod):
    """k x k, 1x1 and identity, each with its batch norm. Ding et al. 2021 (arXiv:2101.03697)."""

    def __init__(self, dims: int = 2, **geometry: Any) -> None:
        super().__init__(dims, **geometry)
        stride, groups = self.base.stride, self.base.groups
        self.one = CONV[dims - 1](CHANNELS, CHANNELS, 1, stride=stride, groups=groups, bias=False)
        self.norms = nn.ModuleList(NORM[dims - 1](CHANNELS) for _ in range(2 + (set(stride) == {1})))

    def adapted(self, x: Tensor) -> Tensor:
        y = self.norms[0](self.base(x)) + self.norms[1](self.one(x))
        return y + self.norms[2](x) if len(self.norms) == 3 else y


GEOMETRY: dict[str, dict[str, Any]] = {
    "padded": {"padding": 1},
    "1d, strided": {"dims": 1, "stride": 2, "padding": 1},
    "3d": {"dims": 3, "padding": 1},
    "grouped, dilated, strided": {"groups": 4, "dilation": 2, "stride": 2, "padding": 2},
    "3d, grouped": {"dims": 3, "groups": 2, "padding": 1},
}
METHODS = (LoRA, Pointwise, Tucker, DoRA, LoHa, LoKr, IA3, SSF, Several, Nested, RepVGG)


# ------------------------------------------------------------------------- single forms


class Form(LoRA):
    """A convolution, its LoRA, and some parameters more, run by a function of the module and its input."""

    shapes: ClassVar = LoRA.shapes | {
        "v": "c", "w": "cdk", "one": "cd1", "thin": "rd1", "back": "crk", "dense": "rck", "wide": "cr1",
    }  # fmt: skip

    def __init__(self, body: Callable[[Any, Tensor], Tensor], **geometry: Any) -> None:
        super().__init__(**{"padding": 1} | geometry)
        self.body, self.norm = body, NORM[self.dims - 1](CHANNELS)

    def adapted(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def lora(m: Form, x: Tensor) -> Tensor:
    return m.base(x) + m.change(x)


def expanded(m: Form, x: Tensor) -> Tensor:
    """1x1 to twice as many channels, k x k, and back. Guo et al. 2018 (arXiv:1811.10495)."""
    wide = m.like(m.point(x, torch.cat([m.one, m.one * 2])), m.w.repeat(2, 2, 1, 1))
    return m.point(wide, torch.cat([m.one, m.one * 3], dim=1))


def kronecker(m: Form, x: Tensor) -> Tensor:
    """kron(C, K) as a convolution of 4 channels at a time, and C between the groups. Source as for LoKr."""
    groups = F.conv2d(x.reshape(-1, 4, SIZE, SIZE), m.back[:4], padding=1).view(-1, 2, 4, SIZE, SIZE)
    return m.base(x) + torch.einsum("pq,nqchw->npchw", m.one[:2, :2, 0, 0], groups).flatten(1, 2)


FORMS: dict[str, nn.Module] = {
    "depthwise": Form(lambda m, x: (m.base(x) + m.like(x, m.w)) * m.along(m.v), groups=CHANNELS),
    "5x5, grouped, dilated": Form(lora, kernel=5, padding=4, dilation=2, groups=4),
    "1x1": Form(lora, kernel=1, padding=0),
    "valid": Form(lora, padding="valid"),
    "same": Form(lora, padding="same"),
    "even kernel": Form(lora, kernel=4),
    "3x1 by 2x1": Form(lora, kernel=(3, 1), stride=(2, 1), padding=(1, 0)),
    "padding wider than the kernel": Form(lora, kernel=1, padding=2),
    "reflected border": Form(lora, padding_mode="reflect"),
    "image on a torus": Form(lora, padding_mode="circular"),
    "border repeated": Form(lora, padding_mode="replicate"),
    "padded on two sides": Form(
        lambda m, x: m.base(F.pad(x, (0, 1, 0, 1))) + m.change(F.pad(x, (0, 1, 0, 1))), stride=2, padding=0
    ),
    "asymmetric branches": Form(
        lambda m, x: (
            m.base(x) + F.conv2d(x, m.w[..., :1], padding=(1, 0)) + F.conv2d(x, m.w[..., :1, :], padding=(0, 1))
        )
    ),  # ACNet, Ding et al. 2019 (arXiv:1908.03930)
    "2x2 within 3x3": Form(lambda m, x: m.base(x) + F.conv2d(x, m.w[..., :2, :2], stride=2), stride=2),
    "5x5 and 2x2, strided": Form(
        lambda m, x: m.base(x) + F.conv2d(x, m.w[..., :2, :2], stride=2), kernel=5, stride=2, padding=2
    ),
    "kernels that lie apart": Form(lambda m, x: m.base(x) + m.point(x, m.one) + x, dilation=2, padding=2),
    "1x1, padded by its bias, then 3x3": Form(
        lambda m, x: m.base(x) + F.conv2d(F.conv2d(x, m.thin, m.v[:RANK], padding=1), m.back)
    ),  # Ding et al. 2021 (arXiv:2103.13425)
    "a chain that widens": Form(expanded),
    "batch norm of next to no variance": Form(lambda m, x: m.base(x) + m.norm(m.point(x, m.one) * 1e-3)),
    "dropout of channels, inactive": Form(
        lambda m, x: m.base(x) + m.point(F.dropout2d(m.like(x, m.a), 0.5, training=False), m.b)
    ),
    "half of the channels adapted": Form(
        lambda m, x: torch.cat([m.base(x)[:, :4] + m.point(m.like(x, m.a), m.b[:4]), m.base(x)[:, 4:]], dim=1)
    ),
    "numbers": Form(lambda m, x: 1 - 2 * m.base(x) + m.change(x) / 3 - x),
}  # fmt: skip


def images(batch: int) -> tuple[Tensor, ...]:
    """A batch of lines, of images, and of volumes."""
    return tuple(torch.randn(batch, CHANNELS, *[SIZE] * dims) for dims in (1, 2, 3))


@pytest.fixture(scope="module")
def merged() -> Merged:
    methods = {(m, g): m(**GEOMETRY[g]) for m in METHODS for g in GEOMETRY}
    named = {f"{method.__name__}, {name}": module for (method, name), module in methods.items()}
    return Merged(named | FORMS, images(2), images(3))


@pytest.mark.parametrize("geometry", GEOMETRY)
@pytest.mark.parametrize("method", METHODS)
def test_an_adapted_convolution_is_one(method: type[ConvMethod], geometry: str, merged: Merged) -> None:
    name = f"{method.__name__}, {geometry}"
    assert merged.operators(name) == {"conv": 1} and merged.reasons(name) == []
    assert merged.excess[name] <= 1 < 100 < merged.broken[name]


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_one_convolution(name: str, merged: Merged) -> None:
    assert merged.operators(name) in ({"conv": 1}, {"conv": 1, "pad": 1})
    assert merged.reasons(name) == []
    assert merged.excess[name] <= 1 < 100 < merged.broken[name]


def test_borders_are_exact_on_images_of_every_size() -> None:
    """Down to images smaller than the kernel, where every pixel is border."""
    names = ("5x5, grouped, dilated", "same", "asymmetric branches", "1x1, padded by its bias, then 3x3")
    table = {name: FORMS[name] for name in names} | {m.__name__: m(padding=1) for m in METHODS}
    sizes = [(2, 7, 9), (3, 1, 2), (1, 2, 11), (2, 8, 8)]
    inputs = [(x, x, x) for x in (torch.randn(n, CHANNELS, h, w) for n, h, w in sizes)]
    dynamic = tuple(Input(f"x{i}", torch.float32, ("n", CHANNELS, "h", "w")) for i in range(3))
    found = Merged(table, *inputs, inputs=dynamic)
    assert all(found.operators(name) == {"conv": 1} for name in table)
    assert max(found.excess.values()) <= 1 < 100 < min(found.broken.values())


def test_halves_of_a_convolution_that_are_read_apart_are_those_of_one() -> None:
    def body(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = m.base(x).chunk(2, 1)
        return torch.relu(first + m.up(m.down(x))), torch.sigmoid(second)

    net = Net(body, base=conv(6, 8), down=conv(6, 2), up=conv(2, 4, 1))
    after, _ = merge(captured(net, torch.randn(2, 6, SIZE, SIZE)))
    assert operators(after)["conv"] == 1


# ------------------------------------------------------------------------- what stays


# One convolution in truth, in words that merge does not read.
LEFT: dict[str, nn.Module] = {
    "a vector over the whole image": Form(lambda m, x: (lora(m, x) + x) * m.along(m.v).expand(1, CHANNELS, SIZE, SIZE)),
    "a vector like the image": Form(lambda m, x: lora(m, x) + m.along(m.v).expand_as(x)),
    "channels by a linear": Form(
        lambda m, x: m.point(x, m.one) + F.linear(x.permute(0, 2, 3, 1), m.one[..., 0, 0]).permute(0, 3, 1, 2)
    ),
    "Kronecker factors on the activation": Form(kronecker),
    "filled up with zeros": Form(
        lambda m, x: m.base(x) + torch.cat([m.point(m.like(x, m.a), m.b[:4]), torch.zeros_like(x[:, :4])], dim=1)
    ),
    "transposed": Form(
        lambda m, x: F.conv_transpose2d(x, m.w, m.v, padding=1) + m.point(F.conv_transpose2d(x, m.back, padding=1), m.b)
    ),
}  # fmt: skip


def gate(m: Form, x: Tensor) -> Tensor:
    """Squeeze and excitation: a factor a channel that reads the whole image."""
    return m.base(x) + m.change(x) * torch.sigmoid(x.mean((2, 3), keepdim=True))


def two_readers(m: Form, x: Tensor) -> Tensor:
    base = m.base(x)
    return (base + m.change(x)) * torch.sigmoid(base)


def padded(x: Tensor, mode: str, value: float | None = None) -> Tensor:
    return F.pad(x, (1, 1, 1, 1), mode=mode, value=value)


NEAR: dict[str, nn.Module] = {
    "a kernel behind a padded kernel": Form(lambda m, x: m.base(x) + m.like(m.like(x, m.a), m.back)),
    "1x1 with a bias before padding": Form(
        lambda m, x: m.base(x) + m.like(F.conv2d(x, m.thin, m.v[:RANK]), m.back)
    ),
    "batch norm before padding": Form(lambda m, x: m.base(x) + m.like(m.norm(x), m.w)),
    "a shift before padding": Form(lambda m, x: m.base(x) + m.like(x + m.along(m.v), m.w)),
    "padded with a number": Form(lambda m, x: m.base(x) + F.conv2d(padded(x, "constant", 0.5), m.w)),
    "reflected beside zeros": Form(lambda m, x: m.base(x) + F.conv2d(padded(x, "reflect"), m.w)),
    "a torus beside zeros": Form(lambda m, x: m.base(x) + F.conv2d(padded(x, "circular"), m.w)),
    "a thin image, reflected": Form(
        lambda m, x: m.base(x) + F.conv2d(padded(m.point(x, m.thin), "reflect"), m.back)
    ),
    "padded unevenly": Form(
        lambda m, x: m.base(x)[..., :SIZE, :SIZE] + F.conv2d(x, m.w[..., :2, :2], padding="same"),
        kernel=4, padding=2,
    ),
    "a mean without its border": Form(
        lambda m, x: m.base(x) + m.point(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), m.one)
    ),
    "a maximum": Form(lambda m, x: m.base(x) + F.max_pool2d(m.like(x, m.w), 3, 1, 1)),
    "an activation between": Form(lambda m, x: m.base(x) + m.point(F.relu(m.like(x, m.a)), m.b)),
    "group norm between": Form(lambda m, x: m.base(x) + m.point(F.group_norm(m.like(x, m.a), 2), m.b)),
    "statistics of the batch": Form(
        lambda m, x: m.base(x) + F.batch_norm(m.like(x, m.w), None, None, training=True)
    ),
    "a gate": Form(gate),
    "a second reader": Form(two_readers),
    "two images multiplied": Form(lambda m, x: m.base(x) + m.like(x, m.w) * x),
    "kernels that depend on the image": Form(lambda m, x: m.base(x) + m.like(x, m.w * x.mean())),
    "a table of pixels": Form(lambda m, x: m.base(x) + m.point(x * m.one[:, :, 0], m.one)),
    "a vector along the rows": Form(lambda m, x: m.base(x) + m.like(x, m.w) * m.v),
    "the image turned over": Form(lambda m, x: m.base(x) + m.like(x.flip(-1), m.w)),
    "rows for columns": Form(lambda m, x: m.base(x) + m.like(x.transpose(2, 3), m.w)),
    "rows for channels": Form(lambda m, x: m.base(x) + m.like(x.transpose(1, 2), m.w)),
    "the image rolled": Form(lambda m, x: m.base(x) + m.like(x.roll(1, -1), m.w)),
    "another sample": Form(lambda m, x: m.base(x) + m.like(x.flip(0), m.w)),
    "one pixel for all": Form(lambda m, x: m.base(x) + m.point(x[..., :1, :1], m.one)),
    "the mean of the image": Form(lambda m, x: m.base(x) + m.point(x.mean((2, 3), keepdim=True), m.one)),
    "channels shuffled between": Form(
        lambda m, x: m.base(x) + m.like(F.channel_shuffle(m.like(x, m.w), 2), m.w), groups=2
    ),
    "a thin chain": Form(lambda m, x: m.point(m.like(m.point(x, m.thin), m.a[:, :RANK]), m.b)),
    "a dense branch beside groups": Form(
        lambda m, x: m.base(x) + F.conv2d(F.conv2d(x, m.dense, padding=1), m.wide), groups=4
    ),
}  # fmt: skip
SAID = {
    "a kernel behind a padded kernel": "pads with zeros what already has a receptive field",
    "1x1 with a bias before padding": "pads with zeros what already has a bias",
    "batch norm before padding": "pads with zeros what already has a bias",
    "a shift before padding": "pads with zeros what already has a bias",
    "a second reader": "is also read by",
    "a dense branch beside groups": "one convolution would cost",
}


@pytest.fixture(scope="module")
def left() -> Merged:
    return Merged(NEAR | LEFT, images(2), images(3))


@pytest.mark.parametrize("name", NEAR)
def test_a_near_miss_stays(name: str, left: Merged) -> None:
    assert left.contractions(name, left.before) == left.contractions(name, left.after)
    assert any(SAID.get(name, "") in reason for reason in left.reasons(name)) or name not in SAID
    assert left.excess[name] <= 1 < 100 < left.broken[name]


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_read_stays_right(name: str, left: Merged) -> None:
    assert left.operators(name).total() <= left.operators(name, left.before).total()
    assert left.excess[name] <= 1 < 100 < left.broken[name]
