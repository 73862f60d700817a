"""Why the other regions stay: what a reader of the report may have expected to merge, and the operator against it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch.fx import Node

from .affine import FEATURES, KERNELS, Reach, Region
from .constants import is_random
from .names import operator_name, site
from .ops import CONTRACTIONS, OPAQUE, arguments, is_tensor, kind, shape
from .savings import Plan, outgrows, tied

_JOINS = frozenset({"add", "sub", "cat", "slice_scatter"})
_NARROWING = frozenset({"linear", "addmm", "matmul", "einsum", "conv"})
_LINEAR_IN_IMAGES = frozenset({"conv", "batch_norm", "add", "sub", "mul", "identity", "cast"})
_MOVING = frozenset(
    {"reduce", "pad", "roll", "flip", "view", "flatten", "transpose", "permute", "slice", "select", "index", "avg_pool",
     "linear", "addmm", "einsum"}
)  # fmt: skip  # operators that mix positions, where they block
_REARRANGING = frozenset(
    {OPAQUE, "view", "flatten", "unflatten", "permute", "transpose", "squeeze", "unsqueeze", "identity", "cast",
     "matmul", "einsum"}
)  # fmt: skip
_FAR = 32  # operators between what blocks a branch and where the branch joins again


def misses(plan: Plan) -> Iterator[tuple[Node, str]]:
    """(operator, reason) for regions that stay, and for branches that something on them keeps from merging."""
    yield from _prompts(plan)
    seen: set[Node] = set()
    for found in plan.reaches:
        for join, reason in _blocked_joins(found, plan.order):
            if join not in seen:
                seen.add(join)
                yield join, reason
        if found.form is KERNELS:
            unknown = {n: reason for n, reason in found.blocked.items() if _leads_to_conv(n, plan.order)}
            yield from ((n, reason) for n, reason in unknown.items() if n not in seen)
            seen |= unknown.keys()
    covered = {n for one in plan.chosen for n in one.nodes}
    for form, end in sorted(plan.entries, key=lambda key: plan.order[key[1]], reverse=True):
        if end in covered or end.name in plan.refused:
            continue
        regions = [plan.region(found, [end]) for found in reversed(plan.entries[form, end])]
        expected = [one for one in regions if _is_expected(one, plan)]
        if expected:  # the nearest entry among those with the most contractions
            where = max(expected, key=lambda one: _contractions(one.nodes))
            covered |= set(where.nodes)
            yield end, _why_not(where)


def at(node: Node) -> str:
    """An operator and its place, as in `aten.tanh at layers.0.act`."""
    return f"{operator_name(node).removesuffix('.default')} at {site(node)}"


# -------------------------------------------------------------------- what stays


def _is_expected(where: Region, plan: Plan) -> bool:
    """True where a reader of the report may have expected a merge."""
    macs, operators, *_ = plan.saving(where)
    if macs == 0 and operators > 0 and tied(where):
        return True
    if _contractions(where.nodes) < 2:
        return False
    pair = where.form is FEATURES and _contractions(where.dead) > 1
    return pair or kind(where.exit) in _JOINS


def _why_not(where: Region) -> str:
    for node in where.nodes:
        outside = [u for u in node.users if u not in where.nodes]
        if node is not where.exit and outside:
            reader = "the output" if outside[0].op == "output" else f"{site(outside[0])}"
            return f"{at(node)} inside it is also read by {reader}, so that merging would save nothing"
    if outgrows(where):
        return "one table of this width would be larger than those that it is made of: they stay"
    cost, now = where.macs, where.dead_macs
    if cost == now and (shared := tied(where)):
        return f"merging would untie {shared[0].target}, which is read elsewhere, and save no multiply-accumulate"
    count = _contractions(where.nodes)
    return (
        f"one {where.form.name} would cost {cost:,} multiply-accumulates a sample, "
        f"these {count} cost {now:,}: they stay"
    )


def _contractions(nodes: Iterable[Node]) -> int:
    return sum(kind(n) in CONTRACTIONS for n in nodes)


# -------------------------------------------------------------------- prompts


def _prompts(plan: Plan) -> Iterator[tuple[Node, str]]:
    """Learned positions beside those of the input: prompts, prefixes, P-tuning."""
    for node in plan.graph.nodes:
        if kind(node) != "cat":
            continue
        bound = arguments(node)
        rank = node.meta["val"].dim()
        if bound["dim"] % rank == rank - 1 or (rank > 3 and bound["dim"] % rank == 1):
            continue  # features or channels
        learned = [n for n in bound["tensors"] if _is_learned(n, plan)]
        count = sum(int(shape(n)[bound["dim"]]) for n in learned)
        if count > 1 and len(learned) < len(bound["tensors"]):
            yield (
                node,
                f"{count} learned positions beside those of the input: no operator on one position is that",
            )


def _is_learned(node: Node, plan: Plan) -> bool:
    if node not in plan.free or not is_tensor(node) or not node.meta["val"].dtype.is_floating_point:
        return False
    return any(plan.free.varies(node, axis) for axis in range(node.meta["val"].dim()))


# -------------------------------------------------------------------- branches


def _blocked_joins(found: Reach, order: dict[Node, int]) -> Iterator[tuple[Node, str]]:
    """(join, reason) for branches that leave the region through an operator that is not affine, and come back."""
    for blocker, reason in found.blocked.items():
        if found.form is KERNELS and kind(blocker) != "conv":
            continue  # every residual block has an activation; only convolutions that just miss are worth a word
        after = {blocker}
        waiting = {u for u in blocker.users if u.op == "call_function"}
        while waiting and len(after) < _FAR:
            node = min(waiting, key=order.__getitem__)
            waiting.remove(node)
            others = [n for n in node.all_input_nodes if n in found.known]
            if kind(node) in _JOINS and others:
                if _looks_like_a_branch(found, blocker, after, others):
                    yield node, reason
                break
            after.add(node)
            waiting |= {u for u in node.users if u.op == "call_function"}


def _leads_to_conv(node: Node, order: dict[Node, int]) -> bool:
    """True for an operator that no analysis knows, with products and rearrangement between it and a convolution."""
    waiting, seen = {node}, set[Node]()
    while waiting and kind(node) == OPAQUE and len(seen) < _FAR:
        one = min(waiting, key=order.__getitem__)
        waiting.remove(one)
        seen.add(one)
        if kind(one) == "conv":
            return True
        if kind(one) in _REARRANGING:
            waiting |= {u for u in one.users if u.op == "call_function"}
    return False


def _looks_like_a_branch(found: Reach, blocker: Node, after: set[Node], others: list[Node]) -> bool:
    """True for a convolution beside another, and for what goes through fewer features than it came from."""
    if found.form is KERNELS:
        return all(kind(n) in _LINEAR_IN_IMAGES for n in after)
    axis = found.form.axis
    width = found.entry.meta["val"].shape[axis]
    sources = (n for one in after for n in one.all_input_nodes)
    before = _below(sources, found) - _below(others, found)
    moved = is_random(blocker) or kind(blocker) in _MOVING
    return any(_narrows(n, axis, width) for n in (*before, *(after if moved else ())))


def _below(nodes: Iterable[Node], found: Reach) -> set[Node]:
    """The values of a region that these nodes are computed from, themselves included, the entry not."""
    seen: set[Node] = set()
    stack = [n for n in nodes if n in found.known]
    while stack:
        node = stack.pop()
        if node is not found.entry and node not in seen:
            seen.add(node)
            stack.extend(n for n in node.all_input_nodes if n in found.known)
    return seen


def _narrows(node: Node, axis: int, width: int) -> bool:
    """True for a contraction with a constant that has fewer outputs than the region's entry has features."""
    if kind(node) not in _NARROWING or not any(n.op == "get_attr" for n in node.all_input_nodes):
        return False
    size = shape(node)[axis] if is_tensor(node) else width
    return isinstance(size, int) and size < width
