"""Which parts of an output different operators wrote: slices along the axes that a concat built.

One scale over boxes and scores hides a dead detector, so checks look at each part at its own scale.
"""

from __future__ import annotations

from torch.fx import Node

from .ops import arguments, is_tensor, kind

Region = dict[int, tuple[int, int]]  # axis -> (start, stop)


def regions(node: Node) -> list[Region]:
    """Boxes {axis: (start, stop)} of a value that different operands of a concat wrote; empty without a concat."""
    which = kind(node)
    if which in ("activation", "identity", "cast", "quantize", "dequantize", "neg"):
        return regions(node.args[0]) if is_tensor(node.args[0]) else []  # type: ignore[arg-type]
    if which in ("permute", "transpose"):
        return [_move(r, node) for r in regions(node.args[0])]  # type: ignore[arg-type]
    if which != "cat":
        return []
    bound = arguments(node)
    operands = list(bound["tensors"])
    axis = bound.get("dim", 0) % node.meta["val"].dim()
    found: list[Region] = []
    start = 0
    for operand in operands:
        size = operand.meta["val"].shape[axis]
        if not isinstance(size, int):
            return []
        for inner in regions(operand) or [{}]:
            low, high = inner.get(axis, (0, size))
            found.append({**inner, axis: (start + low, start + high)})
        start += size
    return found


def _move(region: Region, node: Node) -> Region:
    rank = node.meta["val"].dim()
    if kind(node) == "permute":
        order = [d % rank for d in arguments(node)["dims"]]
    else:
        bound = arguments(node)
        a, b = (bound.get(k, d) % rank for k, d in (("dim0", -2), ("dim1", -1)))
        order = list(range(rank))
        order[a], order[b] = order[b], order[a]
    return {order.index(axis): span for axis, span in region.items()}


def float_feeders(node: Node) -> list[Node]:
    seen: set[Node] = set()
    found: list[Node] = []
    stack = [node]
    while stack:
        current = stack.pop()
        for source in current.all_input_nodes:
            if source in seen or not is_tensor(source) or source.op != "call_function":
                continue
            seen.add(source)
            if source.meta["val"].dtype.is_floating_point:
                found.append(source)
            else:
                stack.append(source)
    return found


def index(region: Region, rank: int) -> tuple[slice, ...]:
    return tuple(slice(*region[a]) if a in region else slice(None) for a in range(rank))


def text(region: Region) -> str:
    if not region:
        return ""
    spans = [f"{region[a][0]}:{region[a][1]}" if a in region else ":" for a in range(max(region) + 1)]
    return f"[{', '.join(spans)}]"
