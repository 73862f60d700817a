"""A metric of your own: it sees the model as a function, and every row of the report gets its numbers.

On the command line: `compress net.pt2 --passes fold,int8 --calib images.npz --eval own_metric:measured`, with this file
in the working directory. The first number is what `max_drop` holds to; higher is better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import compressor


class Regressor(nn.Module):
    """Four numbers to one, here the sum of their squares after some training."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def samples(number: int, seed: int) -> Tensor:
    return 2 * torch.rand(number, 4, generator=torch.Generator().manual_seed(seed)) - 1


def truth(x: Tensor) -> Tensor:
    return x.square().sum(1, keepdim=True)


def measured(run: Callable[..., Sequence[Tensor]]) -> dict[str, float]:
    """Share of the variance that the model explains, and the worst error, on samples that nothing else sees."""
    x = samples(512, seed=1)
    (found,) = run(x)
    error = found - truth(x)
    return {"r2": 1 - float(error.var() / truth(x).var()), "minus_worst_error": -float(error.abs().max())}


def main() -> None:
    torch.manual_seed(0)
    model, data = Regressor(), samples(1024, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        (model(data) - truth(data)).square().mean().backward()
        optimizer.step()
    result = compressor.compress(
        model.eval(), (data[:2],), passes="fold,int8", calibration=data, evaluate=measured, output="metric-int8",
        measure=False,
    )  # fmt: skip
    for row in [*result.report["rows"], {"pass": "file", "metric": result.report["emitted"]["metric"]}]:
        print(f"{row['pass']:<6}", ", ".join(f"{name} {value:.4f}" for name, value in row["metric"].items()))
    print(f"wrote {result.onnx}")


if __name__ == "__main__":
    main()
