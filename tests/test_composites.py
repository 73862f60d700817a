"""Composite operators are captured as the operators that they are made of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from compressor.capture import capture
from compressor.ops import kind


class Function(nn.Module):
    def __init__(self, body: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.w = body, nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, self.w)


@pytest.mark.parametrize(
    "body, text",
    [
        (lambda x, w: torch.tensordot(x, w, dims=([1], [0])), "einsum.default(abc,be->ace"),
        (lambda x, w: torch.tensordot(w, x, dims=([-1], [-1])), "einsum.default(ab,cdb->acd"),
        (lambda x, w: torch.tensordot(x, w, dims=0), "einsum.default(abc,de->abcde"),
        (lambda x, w: torch.inner(x, w), "einsum.default(abc,dc->abd"),
        (lambda x, w: torch.outer(x[:, 0, 0], w[0]), "einsum.default(a,b->ab"),
        (lambda x, w: torch.einsum("btd,od", x, w), "einsum.default(btd,od->bot"),
        (lambda x, w: torch.einsum("...d,od", x, w), "einsum.default(...d,od->...o"),
        (lambda x, w: x.movedim(0, -1), "permute.default(%x, [1, 2, 0])"),
        (lambda x, w: x.movedim((0, 1), (2, 0)), "permute.default(%x, [1, 2, 0])"),
        (lambda x, w: torch.cat(x.tensor_split(3, -1)[::-1], -1), "split_with_sizes.default(%x, [2, 2, 2], -1)"),
    ],
)  # fmt: skip
def test_composites_are_spelled_out(body: Callable[[Tensor, Tensor], Tensor], text: str) -> None:
    model = Function(body)
    x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    graph = capture(model.eval(), (x,))
    assert text in graph.text()
    assert "opaque" not in {kind(n) for n in graph.nodes}
    expected = model(x)
    assert graph.run(x)[0].shape == expected.shape and torch.allclose(graph.run(x)[0], expected, atol=1e-5)
    assert not torch.allclose(graph.run(x.flip(-1))[0], expected, atol=1e-2)
