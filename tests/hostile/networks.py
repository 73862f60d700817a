"""Random networks as plain data: a plan is a list of steps, and any part of a plan is a plan.

A step names a kind of layer and four whole numbers, from which the layer takes its operands and settings. A step that
does not fit the values that are there is left out, so that whatever a search or a shrinker does to a plan, it remains
one: hypothesis draws plans (`test_networks.py`), `benchmarks/hostile.py` draws them by the thousand.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import with_power

EXAMPLE = 3  # samples that a network is built on
LARGEST = 4096  # numbers of one sample of a value
VOCABULARY = 17
MASKED = -1e4


class Step(NamedTuple):
    """kind: a key of STEPS. pick: which of the latest values it reads. a, b, c: its settings."""

    kind: str
    pick: int = 0
    a: int = 0
    b: int = 0
    c: int = 0


@dataclass(frozen=True)
class Plan:
    """inputs: keys of INPUTS. outputs: how many of the latest values the network returns. named: as a dict."""

    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    outputs: int = 1
    named: bool = False
    seed: int = 0


INPUTS: dict[str, Callable[[torch.Generator, int], Tensor]] = {
    "image": lambda g, n: torch.randn(n, 3, 12, 12, generator=g),
    "wide": lambda g, n: torch.randn(n, 8, 8, 6, generator=g),
    "signal": lambda g, n: torch.randn(n, 6, 16, generator=g),
    "tokens": lambda g, n: torch.randn(n, 9, 16, generator=g),
    "vector": lambda g, n: torch.randn(n, 12, generator=g),
    "ids": lambda g, n: torch.randint(0, VOCABULARY, (n, 9), generator=g),
}


class Network(nn.Module):
    """The network of a plan, with power in every weight. `made`: the steps that fitted."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        torch.manual_seed(plan.seed)
        self.named = plan.named
        self.calls: list[tuple[Callable[..., Tensor], tuple[int, ...]]] = []
        self.made: list[Step] = []
        values = list(samples(plan, EXAMPLE, plan.seed))
        self.inputs = len(values)
        for number, step in enumerate(plan.steps):
            builder = Builder(self, f"s{number}_{step.kind}", values, step)
            self.train()  # norms of few positions ask for nothing there
            with torch.no_grad():
                function, operands = STEPS[step.kind](builder) or (None, ())
                if function is None:
                    continue
                value = function(*(values[i].clone() for i in operands))
            if value.shape[0] != EXAMPLE or not 0 < value[0].numel() <= LARGEST:
                continue
            values.append(value)
            self.calls.append((function, operands))
            self.made.append(step)
        floats = [i for i, v in enumerate(values) if v.is_floating_point()]
        last = [i for i in floats if i >= self.inputs][-plan.outputs :]
        self.returned = last or floats[-1:]
        with_power(self, *samples(plan, 16, plan.seed + 1), seed=plan.seed)

    def forward(self, *inputs: Tensor):
        values = list(inputs)
        for function, operands in self.calls:
            values.append(function(*(values[i] for i in operands)))
        returned = [values[i] for i in self.returned]
        if self.named:
            return {f"out_{i}": value for i, value in enumerate(returned)}
        return returned[0] if len(returned) == 1 else tuple(returned)


def samples(plan: Plan, count: int, seed: int, scale: float = 1.0) -> tuple[Tensor, ...]:
    """Inputs of a plan's network: floats are normal, times `scale`."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [INPUTS[kind](generator, count) for kind in plan.inputs]
    return tuple(t * scale if t.is_floating_point() else t for t in drawn)


def outputs(model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        answer = model(*(t.clone() for t in inputs))
    if isinstance(answer, dict):
        return list(answer.values())
    return list(answer) if isinstance(answer, tuple) else [answer]


def in_double(model: nn.Module) -> nn.Module:
    return _rebound(copy.deepcopy(model).double(), model)


def _rebound(twin: nn.Module, model: nn.Module) -> nn.Module:
    """Functions of a network hold its layers; those of a copy are made anew, with the copy's."""
    layers = dict(zip(model.modules(), twin.modules(), strict=True))
    tensors = dict(zip(state(model), state(twin), strict=True))
    twin.calls = [(call.moved(layers, tensors), operands) for call, operands in model.calls]
    return twin


def state(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


class Call:
    """A function with the layers and tensors that it uses, so that a copy of a network can have a copy of it."""

    def __init__(self, function: Callable[..., Tensor], *uses: nn.Module | Tensor) -> None:
        self.function, self.uses = function, uses

    def __call__(self, *operands: Tensor) -> Tensor:
        return self.function(*self.uses, *operands)

    def moved(self, layers: dict, tensors: dict) -> Call:
        return Call(
            self.function, *(layers[u] if isinstance(u, nn.Module) else tensors[u] for u in self.uses)
        )


Made = tuple[Call, tuple[int, ...]]


class Builder:
    """What a step is made from: the values so far, its numbers, and the network that keeps its layers."""

    def __init__(self, network: Network, name: str, values: Sequence[Tensor], step: Step) -> None:
        self.network, self.name, self.values, self.step = network, name, values, step
        self.count = 0

    def operand(self, *ranks: int, like: Tensor | None = None, skip: int = 0) -> int | None:
        """The latest value of this rank (any if none is given), or one a little earlier; its place.

        like: one of that shape. skip: go back so much further.
        """
        fits = [
            i
            for i, value in enumerate(self.values)
            if value.is_floating_point()
            and (not ranks or value.dim() in ranks)
            and (like is None or value.shape == like.shape)
        ]
        return fits[-1 - (self.step.pick + skip) % min(4, len(fits))] if fits else None

    def layer(self, layer: nn.Module) -> nn.Module:
        self.count += 1
        setattr(self.network, f"{self.name}_{self.count}" if self.count > 1 else self.name, layer)
        return layer

    def parameter(self, *shape: int) -> nn.Parameter:
        made = nn.Parameter(torch.randn(*shape))
        self.count += 1
        setattr(self.network, f"{self.name}_p{self.count}", made)
        return made

    def of(self, options: Sequence, number: int):
        return options[number % len(options)]


STEPS: dict[str, Callable[[Builder], Made | None]] = {}


def step(function: Callable[[Builder], Made | None]) -> Callable[[Builder], Made | None]:
    STEPS[function.__name__] = function
    return function


def _divisor(number: int, *wanted: int) -> int:
    """The first of these that divides the number; 1 otherwise."""
    return next((w for w in wanted if number % w == 0), 1)


WIDTHS = (8, 12, 16, 24, 32, 5)


# -------------------------------------------------------------------- convolutions


@step
def conv2d(b: Builder) -> Made | None:
    return _conv(b, 4, nn.Conv2d)


@step
def conv1d(b: Builder) -> Made | None:
    return _conv(b, 3, nn.Conv1d)


def _conv(b: Builder, rank: int, kind: type[nn.Module]) -> Made | None:
    if (i := b.operand(rank)) is None:
        return None
    s, shape = b.step, b.values[i].shape
    size = b.of((3, 1, 3, 2, 5), s.a)
    dilation = b.of((1, 1, 1, 2), s.b)
    reach = dilation * (size - 1)
    mode = b.of(("zeros", "zeros", "zeros", "reflect", "replicate", "circular"), s.c)
    padding = b.of((reach // 2, 0, reach // 2), s.b // 4)
    if mode != "zeros" and padding >= min(shape[2:]):
        mode = "zeros"
    if min(shape[2:]) + 2 * padding < reach + 1:
        size, padding, dilation = 1, 0, 1
    groups = _divisor(shape[1], b.of((1, 1, 2, 4), s.c // 6))
    width = max(groups, b.of(WIDTHS, s.a // 5) // groups * groups)
    stride = b.of((1, 1, 1, 2), s.b // 12)
    layer = kind(
        shape[1], width, size, stride, padding, dilation, groups, bias=bool(s.a % 2 == 0), padding_mode=mode
    )
    return Call(_apply, b.layer(layer)), (i,)


def _apply(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


@step
def depthwise(b: Builder) -> Made | None:
    if (i := b.operand(4)) is None:
        return None
    channels = b.values[i].shape[1]
    times = b.of((1, 1, 2), b.step.a)
    layer = nn.Conv2d(channels, channels * times, 3, padding=1, groups=channels, bias=b.step.b % 2 == 0)
    return Call(_apply, b.layer(layer)), (i,)


@step
def transposed(b: Builder) -> Made | None:
    if (i := b.operand(4, 3)) is None:
        return None
    s, shape = b.step, b.values[i].shape
    kind = nn.ConvTranspose2d if len(shape) == 4 else nn.ConvTranspose1d
    groups = _divisor(shape[1], b.of((1, 2, 1), s.c))
    stride = b.of((2, 1, 2), s.b)
    width = b.of((8, 12, 4), s.a) // groups * groups
    layer = kind(
        shape[1], width, 3, stride, padding=1, output_padding=(stride - 1) * (s.c % 2), groups=groups
    )
    return Call(_apply, b.layer(layer)), (i,)


# -------------------------------------------------------------------- linears, norms, activations


@step
def linear(b: Builder) -> Made | None:
    if (i := b.operand(2, 3, 3)) is None:
        return None
    width = b.values[i].shape[-1]
    return Call(_apply, b.layer(nn.Linear(width, b.of(WIDTHS, b.step.a), bias=b.step.b % 3 != 0))), (i,)


@step
def mlp(b: Builder) -> Made | None:
    """linear, activation, linear, and the residual."""
    if (i := b.operand(2, 3)) is None:
        return None
    width, hidden = b.values[i].shape[-1], b.of((24, 32, 16), b.step.a)
    one, act, two = nn.Linear(width, hidden), b.of(ACTIVATIONS, b.step.b)(hidden), nn.Linear(hidden, width)
    return Call(lambda one, act, two, x: x + two(act(one(x))), b.layer(one), b.layer(act), b.layer(two)), (i,)


@step
def gated(b: Builder) -> Made | None:
    """A gated MLP whose two projections are one linear."""
    if (i := b.operand(2, 3)) is None:
        return None
    width, hidden = b.values[i].shape[-1], b.of((16, 24), b.step.a)
    up, down = nn.Linear(width, 2 * hidden, bias=b.step.b % 2 == 0), nn.Linear(hidden, width)

    def run(up: nn.Module, down: nn.Module, x: Tensor) -> Tensor:
        gate, value = up(x).chunk(2, dim=-1)
        return down(F.silu(gate) * value)

    return Call(run, b.layer(up), b.layer(down)), (i,)


@step
def batch_norm(b: Builder) -> Made | None:
    if (i := b.operand(4, 2, 3)) is None:
        return None
    shape = b.values[i].shape
    kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    return Call(_apply, b.layer(kind(shape[1], affine=b.step.a % 4 != 3))), (i,)


@step
def layer_norm(b: Builder) -> Made | None:
    if (i := b.operand()) is None or b.values[i].shape[-1] < 2:
        return None
    shape = b.values[i].shape
    sizes = shape[1:] if b.step.a % 5 == 4 else shape[-1:]
    return Call(_apply, b.layer(nn.LayerNorm(sizes, elementwise_affine=b.step.b % 4 != 3))), (i,)


@step
def channel_norm(b: Builder) -> Made | None:
    """Group or instance norm."""
    if (i := b.operand(4, 3)) is None or b.values[i][0, 0].numel() < 2:
        return None
    channels = b.values[i].shape[1]
    kind = nn.InstanceNorm2d if b.values[i].dim() == 4 else nn.InstanceNorm1d
    if b.step.a % 3 == 0:
        return Call(_apply, b.layer(kind(channels, affine=b.step.b % 2 == 0))), (i,)
    return Call(_apply, b.layer(nn.GroupNorm(_divisor(channels, b.of((4, 2, 1), b.step.b)), channels))), (i,)


@step
def rms_norm(b: Builder) -> Made | None:
    if (i := b.operand(2, 3)) is None:
        return None
    width = b.values[i].shape[-1]
    if b.step.a % 2:
        return Call(_apply, b.layer(nn.RMSNorm(width, eps=1e-6))), (i,)
    return Call(
        lambda gain, x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gain, b.parameter(width)
    ), (i,)


ACTIVATIONS: tuple[Callable[[int], nn.Module], ...] = (
    lambda n: nn.ReLU(),
    lambda n: nn.GELU(),
    lambda n: nn.SiLU(),
    lambda n: nn.ReLU6(),
    lambda n: nn.Hardswish(),
    lambda n: nn.Sigmoid(),
    lambda n: nn.Tanh(),
    lambda n: nn.LeakyReLU(0.1),
    lambda n: nn.ELU(),
    lambda n: nn.Hardsigmoid(),
    lambda n: nn.GELU(approximate="tanh"),
    lambda n: nn.Softplus(),
    lambda n: nn.Mish(),
    lambda n: nn.ReLU(inplace=True),
    lambda n: nn.SELU(),
    lambda n: nn.Dropout(),
)


@step
def activation(b: Builder) -> Made | None:
    if (i := b.operand()) is None:
        return None
    return Call(_apply, b.layer(b.of(ACTIVATIONS, b.step.a)(0))), (i,)


@step
def prelu(b: Builder) -> Made | None:
    if (i := b.operand(4, 3)) is None:
        return None
    return Call(_apply, b.layer(nn.PReLU(b.values[i].shape[1] if b.step.a % 2 else 1))), (i,)


@step
def softmax(b: Builder) -> Made | None:
    if (i := b.operand()) is None:
        return None
    dim = b.of((1, -1), b.step.a)
    return Call(lambda x: x.softmax(dim)), (i,)


@step
def pointwise(b: Builder) -> Made | None:
    if (i := b.operand()) is None:
        return None
    functions = (
        lambda x: x * 0.5 + 1,
        lambda x: 1 - x,
        lambda x: x.clamp(-1, 2),
        lambda x: x.abs(),
        lambda x: -x,
        lambda x: x / 3,
        lambda x: torch.where(x > 0, x, 0.3 * x),
        lambda x: x - x.mean(dim=1, keepdim=True),
        lambda x: x / (1 + x.square()),
        lambda x: x.clamp(min=-4, max=4).exp() * 0.1,
        lambda x: torch.maximum(x, 0.2 * x),
        lambda x: x + x,
        lambda x: x * x * 0.3,
        lambda x: F.normalize(x + 0.1, dim=1),
    )
    return Call(b.of(functions, b.step.a)), (i,)


@step
def scale(b: Builder) -> Made | None:
    """Times, or plus, a parameter a channel, a position or a number."""
    if (i := b.operand()) is None:
        return None
    shape = b.values[i].shape
    sizes = b.of(((shape[1], *[1] * (len(shape) - 2)), (shape[-1],), (1,), shape[1:]), b.step.a)
    function = b.of((torch.mul, torch.add, torch.sub), b.step.b)
    return Call(lambda p, x: function(x, p), b.parameter(*sizes)), (i,)


# -------------------------------------------------------------------- several values


@step
def combine(b: Builder) -> Made | None:
    """Sum, product, difference or maximum of two values of one shape."""
    if (i := b.operand()) is None:
        return None
    j = b.operand(like=b.values[i], skip=1 + b.step.b)
    function = b.of((torch.add, torch.mul, torch.sub, torch.maximum, lambda x, y: x.sigmoid() * y), b.step.a)
    return Call(function), (i, i if j is None else j)


@step
def add_in_place(b: Builder) -> Made | None:
    if (i := b.operand()) is None:
        return None
    j = b.operand(like=b.values[i], skip=1 + b.step.b)
    return Call(lambda x, y: (x * 1.0).add_(y)), (i, i if j is None else j)


@step
def residual(b: Builder) -> Made | None:
    """The input brought to the width of another value and added to it."""
    if (i := b.operand(4)) is None:
        return None
    j = b.operand(4, skip=1 + b.step.b)
    if j is None or b.values[j].shape[2:] != b.values[i].shape[2:]:
        return None
    layer = nn.Conv2d(b.values[j].shape[1], b.values[i].shape[1], 1, bias=False)
    return Call(lambda layer, x, y: x + layer(y), b.layer(layer)), (i, j)


@step
def concat(b: Builder) -> Made | None:
    if (i := b.operand(2, 3, 4)) is None:
        return None
    shape = b.values[i].shape
    dim = 1 if len(shape) != 3 or b.step.c % 2 == 0 else 2
    others = [
        j
        for j, v in enumerate(b.values)
        if v.is_floating_point()
        and v.dim() == len(shape)
        and all(v.shape[d] == shape[d] for d in range(1, len(shape)) if d != dim)
    ]
    j = others[-1 - b.step.b % min(3, len(others))]
    return Call(lambda x, y: torch.cat([x, y], dim)), (j, i) if b.step.a % 2 else (i, j)


@step
def excite(b: Builder) -> Made | None:
    """Squeeze and excitation."""
    if (i := b.operand(4)) is None:
        return None
    channels = b.values[i].shape[1]
    down, up = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def run(down: nn.Module, up: nn.Module, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True) if b.step.a % 2 else F.adaptive_avg_pool2d(x, 1)
        return x * b.of((torch.sigmoid, F.hardsigmoid), b.step.b)(up(F.relu(down(pooled))))

    return Call(run, b.layer(down), b.layer(up)), (i,)


@step
def modulate(b: Builder) -> Made | None:
    """A vector scales and shifts the channels of a picture or of tokens."""
    i, j = b.operand(4, 3), b.operand(2)
    if i is None or j is None:
        return None
    shape = b.values[i].shape
    channels = shape[1] if len(shape) == 4 else shape[2]
    film = nn.Linear(b.values[j].shape[1], 2 * channels)

    def run(film: nn.Module, x: Tensor, v: Tensor) -> Tensor:
        gain, shift = film(v).chunk(2, dim=1)
        if x.dim() == 4:
            return x * (1 + gain[:, :, None, None]) + shift.unsqueeze(-1).unsqueeze(-1)
        return x * (1 + gain[:, None]) + shift[:, None]

    return Call(run, b.layer(film)), (i, j)


@step
def product(b: Builder) -> Made | None:
    """A matrix product of two values of tokens."""
    if (i := b.operand(3)) is None:
        return None
    j = b.operand(3, skip=1 + b.step.b)
    x, y = b.values[i], b.values[i if j is None else j]
    if x.shape[2] == y.shape[2]:
        return Call(lambda x, y: x @ y.transpose(1, 2) * x.shape[2] ** -0.5), (i, i if j is None else j)
    if x.shape[2] == y.shape[1]:
        return Call(lambda x, y: torch.bmm(x, y) * 0.3), (i, j)
    return None


# -------------------------------------------------------------------- parts and shapes


@step
def halves(b: Builder) -> Made | None:
    """Channels in parts, put together in other ways."""
    if (i := b.operand(2, 3, 4)) is None:
        return None
    dim = -1 if b.values[i].dim() == 3 and b.step.c % 2 else 1
    size = b.values[i].shape[dim]
    if size < 4:
        return None
    first = size // 2 if b.step.b % 2 == 0 and size % 2 == 0 else max(1, size // 3)
    even = first * 2 == size

    def swapped(x: Tensor) -> Tensor:
        one, two = x.split([first, size - first], dim)
        return torch.cat([two, one], dim)

    def gate(x: Tensor) -> Tensor:
        one, two = x.chunk(2, dim)
        return one * two.sigmoid() if even else torch.cat([one.relu(), two], dim)

    def partly(x: Tensor) -> Tensor:
        one, two = x.tensor_split([first], dim)
        return torch.cat([one, torch.tanh(two)], dim)

    def glu(x: Tensor) -> Tensor:
        return F.glu(x, dim) if size % 2 == 0 else x

    def thrice(x: Tensor) -> Tensor:
        one, two = x.split([first, size - first], dim)
        return torch.cat([x, one, two.relu()], dim)

    return Call(b.of((swapped, gate, partly, glu, thrice), b.step.a)), (i,)


@step
def cut(b: Builder) -> Made | None:
    """A slice of channels or of positions."""
    if (i := b.operand(2, 3, 4)) is None:
        return None
    shape = b.values[i].shape
    dim = 1 + b.step.b % (len(shape) - 1)
    size = shape[dim]
    if size < 4:
        return None
    window = b.of(
        (
            slice(1, None),
            slice(None, -1),
            slice(None, None, 2),
            slice(size // 4, 3 * size // 4),
            slice(-2, None),
        ),
        b.step.a,
    )
    index = (slice(None),) * dim + (window,)
    return Call(lambda x: x[index]), (i,)


@step
def pick_channels(b: Builder) -> Made | None:
    """Channels in another order, some twice, some never."""
    if (i := b.operand(2, 3, 4)) is None:
        return None
    dim = 1 + b.step.b % (b.values[i].dim() - 1)
    size = b.values[i].shape[dim]
    order = torch.tensor([(7 * k + b.step.a) % size for k in range(size)])
    b.network.register_buffer(b.name, order)
    if b.step.c % 2:
        return Call(lambda order, x: x.index_select(dim, order), order), (i,)
    return Call(lambda x: x.flip(dim)), (i,)


@step
def shuffle(b: Builder) -> Made | None:
    """Channel shuffle."""
    if (i := b.operand(4)) is None:
        return None
    channels = b.values[i].shape[1]
    groups = _divisor(channels, b.of((2, 4, 3), b.step.a))

    def run(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)

    return Call(run if b.step.b % 2 else lambda x: F.channel_shuffle(x, groups)), (i,)


@step
def pixels(b: Builder) -> Made | None:
    """Pixel shuffle and its inverse."""
    if (i := b.operand(4)) is None:
        return None
    _, c, h, w = b.values[i].shape
    if b.step.a % 2 == 0 and c % 4 == 0:
        return Call(lambda x: F.pixel_shuffle(x, 2)), (i,)
    if h % 2 == 0 and w % 2 == 0:
        return Call(lambda x: F.pixel_unshuffle(x, 2)), (i,)
    return None


@step
def last(b: Builder) -> Made | None:
    """Channels last: a linear over pixels, with or without a norm in front (ConvNeXt), and back."""
    if (i := b.operand(4)) is None:
        return None
    channels = b.values[i].shape[1]
    width = b.of((channels, 16, 12), b.step.a)
    norm = nn.LayerNorm(channels) if b.step.b % 2 else nn.Identity()
    layer = nn.Linear(channels, width)
    return Call(
        lambda norm, layer, x: layer(norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2),
        b.layer(norm),
        b.layer(layer),
    ), (i,)


@step
def to_tokens(b: Builder) -> Made | None:
    if (i := b.operand(4)) is None:
        return None
    functions = (
        lambda x: x.flatten(2).transpose(1, 2),
        lambda x: x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1]),
        lambda x: x.flatten(2),
        lambda x: x.mean(3).permute(0, 2, 1),
        lambda x: x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3]),
    )
    return Call(b.of(functions, b.step.a)), (i,)


@step
def to_picture(b: Builder) -> Made | None:
    if (i := b.operand(3)) is None:
        return None
    _, positions, width = b.values[i].shape
    height = _divisor(positions, 4, 3, 2)
    if b.step.a % 2:
        return Call(lambda x: x.transpose(1, 2).reshape(x.shape[0], width, height, positions // height)), (i,)
    return Call(lambda x: x.unflatten(1, (height, positions // height)).permute(0, 3, 1, 2)), (i,)


@step
def to_vector(b: Builder) -> Made | None:
    if (i := b.operand(3, 4)) is None:
        return None
    x = b.values[i]
    functions = (
        lambda x: x.flatten(1),
        lambda x: x.mean(-1) if x.dim() == 3 else x.mean((2, 3)),
        lambda x: x.amax(1) if x.dim() == 3 else x.amax((2, 3)),
        lambda x: x[:, 0] if x.dim() == 3 else x[:, :, 0, 0],
        lambda x: x.permute(0, 2, 3, 1).flatten(1) if x.dim() == 4 else x.transpose(1, 2).flatten(1),
        lambda x: x.sum(1) * 0.2 if x.dim() == 3 else F.adaptive_max_pool2d(x, 1).flatten(1),
    )
    function = b.of(functions, b.step.a)
    made = function(x)
    if made.dim() != 2 or made.shape[1] > 600:
        return None
    return Call(function), (i,)


@step
def transpose(b: Builder) -> Made | None:
    if (i := b.operand(3, 4)) is None:
        return None
    dims = (1, 2) if b.values[i].dim() == 3 else b.of(((2, 3), (1, 2), (1, 3)), b.step.a)
    return Call(lambda x: x.transpose(*dims)), (i,)


@step
def pool(b: Builder) -> Made | None:
    if (i := b.operand(4)) is None or min(b.values[i].shape[2:]) < 4:
        return None
    s = b.step
    layers = (
        lambda: nn.MaxPool2d(2),
        lambda: nn.AvgPool2d(2),
        lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=s.b % 2 == 1),
        lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=s.b % 2 == 1, count_include_pad=s.c % 2 == 0),
        lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=s.c % 2 == 0),
        lambda: nn.AdaptiveAvgPool2d(2),
        lambda: nn.MaxPool2d(3, 1, 1),
        lambda: nn.AdaptiveAvgPool2d(1),
        lambda: nn.LPPool2d(2, 2),
    )
    return Call(_apply, b.layer(b.of(layers, s.a)())), (i,)


@step
def upsample(b: Builder) -> Made | None:
    if (i := b.operand(4)) is None or max(b.values[i].shape[2:]) > 8:
        return None
    modes = (
        {"mode": "nearest"},
        {"mode": "bilinear", "align_corners": False},
        {"mode": "bilinear", "align_corners": True},
    )
    return Call(_apply, b.layer(nn.Upsample(scale_factor=2, **b.of(modes, b.step.a)))), (i,)


@step
def pad(b: Builder) -> Made | None:
    if (i := b.operand(4)) is None:
        return None
    functions = (
        lambda x: F.pad(x, (1, 0, 0, 1)),
        lambda x: F.pad(x, (0, 0, 0, 0, 2, 1)),
        lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
        lambda x: F.pad(x, (0, 1, 1, 0), value=0.5),
    )
    return Call(b.of(functions, b.step.a)), (i,)


# -------------------------------------------------------------------- attention, embeddings, shared weights


@step
def attention(b: Builder) -> Made | None:
    """Self-attention of several heads: fused or not, by the operator or by hand, masked or not, grouped queries."""
    if (i := b.operand(3)) is None or b.values[i].shape[1] > 40:
        return None
    s, (_, positions, width) = b.step, b.values[i].shape
    heads, size = b.of((2, 4, 3), s.a), b.of((4, 8), s.a // 3)
    shared = 2 if heads == 4 and s.b % 5 == 4 else 1
    inner, outer = heads * size, heads // shared * size
    biased, by_hand, masked = s.b % 2 == 0, s.c % 2 == 1, b.of(("", "causal", "given"), s.c // 2)
    if s.b % 3 == 0 and shared == 1:
        project: list[nn.Module] = [nn.Linear(width, 3 * inner, bias=biased)]
    else:
        project = [nn.Linear(width, n, bias=biased) for n in (inner, outer, outer)]
    back = nn.Linear(inner, width)
    causal = torch.ones(positions, positions, dtype=torch.bool).tril()
    b.network.register_buffer(f"{b.name}_mask", causal)

    def run(back: nn.Module, mask: Tensor, *rest: nn.Module | Tensor) -> Tensor:
        *project, x = rest
        n = x.shape[0]
        parts = project[0](x).chunk(3, -1) if len(project) == 1 else [p(x) for p in project]
        q, k, v = (p.view(n, positions, -1, size).transpose(1, 2) for p in parts)
        if shared > 1:
            k, v = (t.repeat_interleave(shared, 1) for t in (k, v))
        if by_hand:
            scores = q @ k.transpose(-2, -1) * size**-0.5
            if masked:
                scores = scores.masked_fill(~mask, MASKED)
            y = scores.softmax(-1) @ v
        else:
            options = {"": {}, "causal": {"is_causal": True}, "given": {"attn_mask": mask}}
            y = F.scaled_dot_product_attention(q, k, v, **options[masked])
        return back(y.transpose(1, 2).reshape(n, positions, inner)) + (x if s.a % 2 else 0)

    return Call(run, b.layer(back), causal, *map(b.layer, project)), (i,)


@step
def cross(b: Builder) -> Made | None:
    """nn.MultiheadAttention between two values of tokens."""
    if (i := b.operand(3)) is None:
        return None
    j = b.operand(3, skip=1 + b.step.b)
    x, y = b.values[i], b.values[i if j is None else j]
    heads = _divisor(x.shape[2], b.of((4, 2), b.step.a))
    if max(x.shape[1], y.shape[1]) > 40:
        return None
    layer = nn.MultiheadAttention(x.shape[2], heads, kdim=y.shape[2], vdim=y.shape[2], batch_first=True)
    return Call(lambda layer, x, y: layer(x, y, y, need_weights=False)[0], b.layer(layer)), (
        i,
        i if j is None else j,
    )


@step
def embed(b: Builder) -> Made | None:
    """Tokens of whole numbers, with positions."""
    ids = [i for i, v in enumerate(b.values) if not v.is_floating_point()]
    if not ids:
        return None
    width = b.of((16, 12), b.step.a)
    table = nn.Embedding(VOCABULARY, width)
    places = b.parameter(1, b.values[ids[0]].shape[1], width)
    return Call(lambda table, places, x: table(x) + places, b.layer(table), places), (ids[0],)


@step
def tied_head(b: Builder) -> Made | None:
    """Logits by the table of an embedding."""
    tables = [m for m in b.network.modules() if isinstance(m, nn.Embedding)]
    if not tables or (i := b.operand(3)) is None or b.values[i].shape[2] != tables[0].embedding_dim:
        return None
    return Call(lambda table, x: F.linear(x, table.weight), tables[0]), (i,)


@step
def again(b: Builder) -> Made | None:
    """A layer that stands elsewhere, too."""
    if (i := b.operand()) is None:
        return None
    shape = b.values[i].shape
    fitting = [
        m
        for m in b.network.modules()
        if (isinstance(m, nn.Linear) and len(shape) < 4 and m.in_features == shape[-1])
        or (
            isinstance(m, nn.Conv2d)
            and len(shape) == 4
            and m.in_channels == shape[1]
            and m.kernel_size == (1, 1)
        )
        or (
            isinstance(m, nn.Conv2d) and len(shape) == 4 and m.in_channels == shape[1] and min(shape[2:]) >= 6
        )
        or (isinstance(m, nn.BatchNorm2d) and len(shape) == 4 and m.num_features == shape[1])
    ]
    return (Call(_apply, b.of(fitting, b.step.a)), (i,)) if fitting else None


@step
def adapted(b: Builder) -> Made | None:
    """A linear with a low-rank branch beside it."""
    if (i := b.operand(2, 3)) is None:
        return None
    width, wide = b.values[i].shape[-1], b.of((16, 24), b.step.a)
    base, down, up = nn.Linear(width, wide), nn.Linear(width, 2, bias=False), nn.Linear(2, wide, bias=False)
    return Call(
        lambda base, down, up, x: base(x) + 0.5 * up(F.dropout(down(x), 0.1, False)),
        *map(b.layer, (base, down, up)),
    ), (i,)


@step
def branches(b: Builder) -> Made | None:
    """3x3 and 1x1 convolutions side by side, with batch norms (RepVGG), and the identity where it fits."""
    if (i := b.operand(4)) is None:
        return None
    channels = b.values[i].shape[1]
    width = b.of((channels, 12), b.step.a)
    large = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
    small = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
    return Call(
        lambda large, small, x: large(x) + small(x) + (x if width == channels else 0),
        b.layer(large),
        b.layer(small),
    ), (i,)


# -------------------------------------------------------------------- drawing and shrinking

KINDS = tuple(STEPS)
# What stands in most networks is drawn more often.
COMMON = (
    "conv2d",
    "conv2d",
    "linear",
    "batch_norm",
    "activation",
    "activation",
    "concat",
    "combine",
    "halves",
    "mlp",
)


def drawn(rng: random.Random, most: int = 14) -> Plan:
    """A plan of 3 to `most` steps."""
    inputs = [rng.choice(list(INPUTS))]
    if rng.random() < 0.3:
        inputs.append(rng.choice(list(INPUTS)))
    kinds = rng.sample(KINDS, 8) if rng.random() < 0.5 else list(KINDS)
    steps = [
        Step(
            rng.choice(COMMON if rng.random() < 0.4 else kinds),
            rng.choice((0, 0, 0, 0, 1, 2, 3)),
            rng.randrange(60),
            rng.randrange(60),
            rng.randrange(60),
        )
        for _ in range(rng.randint(3, most))
    ]
    if "ids" in inputs:
        steps.insert(0, Step("embed", 0, rng.randrange(2)))
    outputs = rng.choice((1, 1, 1, 2, 3))
    return Plan(tuple(inputs), tuple(steps), outputs, rng.random() < 0.2, rng.randrange(1 << 30))


def smaller(plan: Plan) -> Iterator[Plan]:
    """Plans with less in them, the largest cuts first."""
    count = len(plan.steps)
    size = count // 2
    while size:
        for start in range(0, count, size):
            yield replace(plan, steps=plan.steps[:start] + plan.steps[start + size :])
        size //= 2
    if plan.outputs > 1:
        yield replace(plan, outputs=plan.outputs - 1)
    if plan.named:
        yield replace(plan, named=False)
    for i in range(len(plan.inputs) if len(plan.inputs) > 1 else 0):
        yield replace(plan, inputs=plan.inputs[:i] + plan.inputs[i + 1 :])
    for i, one in enumerate(plan.steps):
        for field in ("pick", "a", "b", "c"):
            if getattr(one, field):
                simpler = one._replace(**{field: 0})
                yield replace(plan, steps=(*plan.steps[:i], simpler, *plan.steps[i + 1 :]))


def shrunken(plan: Plan, fails: Callable[[Plan], bool], tries: int = 200) -> Plan:
    """A plan as small as greedy cuts make it, of which `fails` still holds."""
    found = True
    while found and tries > 0:
        found = False
        for candidate in smaller(plan):
            tries -= 1
            if tries <= 0:
                break
            if fails(candidate):
                plan, found = candidate, True
                break
    return plan
