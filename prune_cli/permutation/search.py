"""Which order of columns loses least magnitude to N:M pruning (Pool and Yu, NeurIPS 2021, section 4).

N:M keeps the n largest of every m consecutive columns in each row, so the order decides which weights compete. `search`
swaps columns greedily, then repartitions small windows of groups exhaustively, starting from what the swaps found.

The n largest of a union of two sets A and B come from the i largest of A and the n - i largest of B for the best i:
sum = max over i of (prefix sum i of A + prefix sum n - i of B). So prefix sums of the subsets of each group serve all
repartitions, and rows and candidates are axes of one tensor.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

log = logging.getLogger(__name__)

CHUNK = 1 << 19
"""Elements of intermediate tensors: they stay in a core's cache."""

BLOCK = 128
"""Rows of a block of distances."""

BUDGET = 2e11
"""Elements that one table of windows may touch; a larger one is not searched. Some minutes on a CPU core."""

LEAST = 1e-6
"""Gains below this part of a group's mean magnitude are rounding."""


@dataclass(frozen=True)
class Search:
    """A found order of columns.

    Attributes:
        order: (columns,) which column comes where.
        identity: magnitude that N:M keeps in the given order.
        swaps: after greedy swaps.
        kept: in the found order; never less than `swaps`.
        bound: if every row could keep its largest n / m of all columns.
    """

    order: Tensor
    identity: float
    swaps: float
    kept: float
    bound: float

    @property
    def efficacy(self) -> float:
        """Percent of the way from the given order to the bound."""
        return 100 * (self.kept - self.identity) / (self.bound - self.identity) if self.bound > self.identity else 0.0


def kept(matrix: Tensor, m: int, n: int) -> float:
    """Magnitude that N:M keeps: the n largest of every m consecutive columns, a shorter last group its n largest.

    Args:
        matrix: (rows, columns).
    """
    work = matrix.abs().double()
    missing = -work.shape[1] % m
    if missing:
        work = torch.cat([work, work.new_zeros(len(work), missing)], dim=1)
    return float(sum(top.sum() for top in _largest(work.view(len(work), -1, m).unbind(2), n)))


def _largest(parts: Sequence[Tensor], n: int) -> list[Tensor]:
    """The n largest of corresponding elements, the largest first: far faster than topk over a short axis."""
    tops: list[Tensor] = []
    for part in parts:
        rest = part
        for rank, top in enumerate(tops):
            tops[rank], rest = torch.maximum(top, rest), torch.minimum(top, rest)
        if len(tops) < n:
            tops.append(rest)
    return tops


def _prefix_sums(parts: Sequence[Tensor], n: int) -> tuple[Tensor, ...]:
    """Sums of the 1, 2, ..., n largest of corresponding elements."""
    return tuple(itertools.accumulate(_largest(parts, n)))


def row_bound(matrix: Tensor, m: int, n: int) -> float:
    """What no order can exceed: every row keeps its largest n / m of all columns."""
    return float(matrix.abs().double().topk(math.ceil(matrix.shape[1] * n / m), dim=1).values.sum())


def search(matrix: Tensor, m: int, n: int, *, window: int = 8, escapes: int = 20, seed: int = 0) -> Search:
    """Finds an order of columns for which N:M keeps more magnitude.

    Args:
        matrix: (rows, columns); columns behind the last whole group of m stay where they are.
        m: columns per group.
        n: entries kept per group and row.
        window: columns that are repartitioned exhaustively at a time: 8 or 12 for m = 4; at least two groups. 0 only
            swaps. A window that the network is too large for is made smaller.
        escapes: times that a local optimum is left for a worse order at random; the best order ever seen is returned.
        seed: of those random choices.
    """
    count = matrix.shape[1] // m
    before = kept(matrix, m, n)
    identity = torch.arange(matrix.shape[1], device=matrix.device)
    bound = row_bound(matrix, m, n)
    if count < 2 or n >= m:
        return Search(identity, before, before, before, bound)
    columns = matrix.detach().abs().float().t().contiguous()
    groups = identity[: count * m].view(count, m).clone()
    groups = greedy_swaps(columns, groups, n)
    swapped = groups.clone()
    size = min(window // m, count)
    while size > 2 and _effort(count, m, size, len(matrix)) > BUDGET:
        size -= 1
    if size >= 2 and _effort(count, m, size, len(matrix)) <= BUDGET:
        groups = repartition(columns, groups, n, size, escapes, torch.Generator().manual_seed(seed))
    elif window >= 2 * m:
        log.info("%d columns of %d rows: too many windows, greedy swaps only", matrix.shape[1], len(matrix))
    tail = identity[count * m :]
    results = []
    for found in (swapped, groups):
        order = torch.cat([_canonical(found).flatten(), tail])
        results.append((kept(matrix[:, order], m, n), order))
    swaps, best = max(results[0][0], before), max(results, key=lambda result: result[0])
    if best[0] <= before:  # only rounding was gained
        return Search(identity, before, before, before, bound)
    return Search(best[1], before, swaps, best[0], bound)


def _canonical(groups: Tensor) -> Tensor:
    """Columns in increasing order inside groups, groups by their first column."""
    inside = groups.sort(dim=1).values
    return inside[inside[:, 0].argsort()]


def _magnitude(columns: Tensor, groups: Tensor, n: int) -> Tensor:
    """(groups,) kept magnitude of each, in float64."""
    return _prefix_sums(columns[groups].double().unbind(1), n)[-1].sum(1)


# ---------------------------------------------------------------------------------------------- swaps


def greedy_swaps(columns: Tensor, groups: Tensor, n: int) -> Tensor:
    """Swaps two columns of different groups, the best first, until no swap gains.

    With t the n-th largest of a group without column a, putting b in its place keeps
    (sum of its n - 1 largest) + sum over rows of max(t, b); sums of maxima are L1 distances:
    max(x, y) = (x + y + |x - y|) / 2.

    Args:
        columns: (columns, rows) magnitudes.
        groups: (groups, m) column numbers.
        n: entries kept per group and row, less than m.

    Returns:
        Groups after the swaps.
    """
    groups, m = groups.clone(), groups.shape[1]
    total = columns.sum(1)
    replaced = columns.new_zeros(len(columns), len(columns))  # [a, b]: kept by a's group with b instead of a
    own = _magnitude(columns, groups, n)
    least = LEAST * float(own.mean())
    changed = torch.arange(len(groups), device=groups.device)
    while len(changed):
        for part in changed.split(max(1, CHUNK // (m * m * columns.shape[1]))):
            members = groups[part].flatten()
            rest = groups[part].unsqueeze(1).expand(-1, m, -1)[:, ~torch.eye(m, dtype=torch.bool, device=groups.device)]
            tops = _largest([columns[other] for other in rest.view(-1, m - 1).unbind(1)], n)
            fixed = sum((top.sum(1) for top in tops[:-1]), tops[-1].new_zeros(len(members)))
            replaced[members] = fixed[:, None] + (tops[-1].sum(1)[:, None] + total + _distances(tops[-1], columns)) / 2
        flat = groups.flatten()
        table = replaced[flat][:, flat]
        gain = (table + table.t()).view(len(groups), m, len(groups), m) - (own[:, None] + own).float()[:, None, :, None]
        best, place = gain.permute(0, 2, 1, 3).flatten(2).max(dim=2)
        chosen = _disjoint(best.triu(1), least)
        touched = []
        for first, second in chosen:
            i, j = divmod(int(place[first, second]), m)
            pair = groups[[first, second]].clone()
            pair[0, i], pair[1, j] = groups[second, j], groups[first, i]
            if _accept(columns, groups, own, [first, second], pair, n, least):
                touched += [first, second]
        changed = torch.tensor(touched, device=groups.device, dtype=torch.long)
    return groups


def _distances(first: Tensor, second: Tensor) -> Tensor:
    """L1 distances of all rows, by blocks that stay in the cache."""
    result = first.new_zeros(len(first), len(second))
    for a, b in zip(first.split(BLOCK, 1), second.split(BLOCK, 1), strict=True):
        result += torch.cdist(a.contiguous(), b.contiguous(), p=1)
    return result


def _disjoint(gains: Tensor, least: float) -> list[tuple[int, ...]]:
    """Pairs of groups with the largest gains, each group once."""
    first, second = torch.nonzero(gains > least, as_tuple=True)
    order = torch.sort(gains[first, second], descending=True, stable=True).indices
    return _each_once(torch.stack([first, second], dim=1)[order].tolist())


def _each_once(sets: list[Sequence[int]]) -> list[tuple[int, ...]]:
    used: set[int] = set()
    found = []
    for chosen in sets:
        if used.isdisjoint(chosen):
            used.update(chosen)
            found.append(tuple(chosen))
    return found


def _accept(
    columns: Tensor, groups: Tensor, own: Tensor, chosen: Sequence[int], new: Tensor, n: int, least: float
) -> bool:
    """Takes new groups over where they gain also in float64."""
    index = list(chosen)
    values = _magnitude(columns, new, n)
    if float(values.sum() - own[index].sum()) <= least / 2:
        return False
    groups[index], own[index] = new, values
    return True


# ---------------------------------------------------------------------------------------------- windows


@functools.cache
def partitions(size: int, m: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """All ways to part `size` * m columns into groups of m, without order: 35 of 8 columns, 5775 of 12 for m = 4."""

    def parts(left: tuple[int, ...]) -> list[tuple[tuple[int, ...], ...]]:
        if not left:
            return [()]
        found = []
        for rest in itertools.combinations(left[1:], m - 1):
            group = (left[0], *rest)
            remaining = tuple(column for column in left if column not in group)
            found += [(group, *others) for others in parts(remaining)]
        return found

    return tuple(parts(tuple(range(size * m))))


def _effort(count: int, m: int, size: int, rows: int) -> float:
    """Elements that a table of all windows touches, about."""
    return math.comb(count, size) * math.comb(size * m, m) * rows * 4.0


def repartition(columns: Tensor, groups: Tensor, n: int, size: int, escapes: int, generator: torch.Generator) -> Tensor:
    """Replaces sets of `size` groups by their best partition, the largest gain first, until none gains.

    Then, `escapes` times: the best partition of a random set with two columns swapped, which may lose, and on from
    there. Returns the best groups ever seen, so with or without escapes never less than it was given.
    """
    groups = groups.clone()
    sets = torch.combinations(torch.arange(len(groups)), size).to(groups.device)
    evaluate = _pairs if size == 2 else _windows
    own = _magnitude(columns, groups, n)
    least = LEAST * float(own.mean())
    gains = torch.zeros(len(sets), device=groups.device)
    choices = torch.zeros(len(sets), dtype=torch.long, device=groups.device)
    stale = torch.ones(len(sets), dtype=torch.bool, device=groups.device)
    best, best_value = groups.clone(), float(own.sum())
    while True:
        if stale.any():
            values, choices[stale] = evaluate(columns, groups, sets[stale], n)
            gains[stale] = values - own[sets[stale]].sum(1).float()
        order = torch.sort(gains, descending=True, stable=True).indices
        order = order[gains[order] > least]
        numbers = {tuple(chosen): index for chosen, index in zip(sets[order].tolist(), order.tolist(), strict=True)}
        touched: list[int] = []
        for chosen in _each_once(list(numbers)):
            new = _applied(groups, chosen, int(choices[numbers[chosen]]))
            if _accept(columns, groups, own, chosen, new, n, least):
                touched += chosen
            else:
                gains[numbers[chosen]] = 0.0
        if not touched:
            if float(own.sum()) > best_value:
                best, best_value = groups.clone(), float(own.sum())
            if escapes <= 0:
                return best
            escapes -= 1
            touched = _escape(columns, groups, own, sets, choices, n, generator)
        mark = torch.zeros(len(groups), dtype=torch.bool, device=groups.device)
        mark[torch.tensor(touched, device=groups.device)] = True
        stale = mark[sets].any(1)


def _applied(groups: Tensor, chosen: Sequence[int], choice: int) -> Tensor:
    """The groups of a set after a partition."""
    m = groups.shape[1]
    table = torch.tensor(partitions(len(chosen), m)[choice], device=groups.device)
    return groups[list(chosen)].flatten()[table]


def _escape(
    columns: Tensor, groups: Tensor, own: Tensor, sets: Tensor, choices: Tensor, n: int, generator: torch.Generator
) -> list[int]:
    m = groups.shape[1]
    number = int(torch.randint(len(sets), (), generator=generator))
    chosen = sets[number].tolist()
    new = _applied(groups, chosen, int(choices[number]))
    i, j = (int(torch.randint(m, (), generator=generator)) for _ in range(2))
    new[0, i], new[1, j] = new[1, j].clone(), new[0, i].clone()
    groups[chosen], own[chosen] = new, _magnitude(columns, new, n)
    return chosen


Prefixes = list[tuple[Tensor, ...]]
"""[k - 1][i - 1]: (groups, subsets of k columns, rows) sums of the i largest."""


def _union(left: Sequence[Tensor], right: Sequence[Tensor], n: int) -> Tensor:
    """Sum over rows of the n largest of unions, from broadcastable prefix sums: [i - 1] sums the i largest."""
    best: Tensor | None = None
    for i in range(max(0, n - len(right)), min(n, len(left)) + 1):
        term = left[n - 1] if i == n else right[n - 1] if i == 0 else left[i - 1] + right[n - i - 1]
        best = term if best is None else torch.maximum(best, term)
    assert best is not None, "n is at most the size of the union"
    return best.sum(-1)


@functools.cache
def _halves(m: int) -> tuple[list[list[tuple[int, ...]]], list[list[int]], dict[tuple[int, int, int], int]]:
    """Subsets of a group by size, the number of each one's complement, and partitions of two groups by halves.

    The partition of (k, i, j) puts subset i of k columns of the first group together with subset j of m - k columns of
    the second.
    """
    subsets = [list(itertools.combinations(range(m), k)) for k in range(m + 1)]
    others = [
        [subsets[m - k].index(tuple(c for c in range(m) if c not in chosen)) for chosen in subsets[k]]
        for k in range(m + 1)
    ]
    numbers = {parts[0]: number for number, parts in enumerate(partitions(2, m))}
    table = {}
    for k in range(1, m):
        for i, left in enumerate(subsets[k]):
            for j, right in enumerate(subsets[m - k]):
                first = (*left, *(m + c for c in right))
                if 0 not in first:
                    first = tuple(c for c in range(2 * m) if c not in first)
                table[k, i, j] = numbers[first]
    return subsets, others, table


def _prefixes(columns: Tensor, groups: Tensor, n: int) -> Prefixes:
    subsets, _, _ = _halves(groups.shape[1])
    found: Prefixes = []
    for k in range(1, groups.shape[1]):
        chosen = groups[:, torch.tensor(subsets[k], device=groups.device)]  # groups, subsets, k
        found.append(_prefix_sums([columns[part] for part in chosen.unbind(2)], n))
    return found


def _pairs(columns: Tensor, groups: Tensor, sets: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Best kept magnitude of each pair of groups over all partitions, and the partition's number."""
    m = groups.shape[1]
    subsets, others, table = _halves(m)
    prefixes = _prefixes(columns, groups, n)
    values, numbers = [], []
    numbers_of = [
        torch.tensor([table[k, i, j] for i in range(len(subsets[k])) for j in range(len(subsets[m - k]))])
        for k in range((m + 1) // 2, m)
    ]
    flat_numbers = torch.cat([torch.zeros(1, dtype=torch.long), *numbers_of]).to(groups.device)
    own = _magnitude(columns, groups, n).to(columns.dtype)
    most = max(len(found) for found in subsets) ** 2 * columns.shape[1]
    for part in sets.split(max(1, CHUNK // most)):
        a, b = part.unbind(1)
        unions: list[Tensor] = [own]  # [0] is never read
        for k in range(1, m):
            left = [sums[a].unsqueeze(2) for sums in prefixes[k - 1]]
            right = [sums[b].unsqueeze(1) for sums in prefixes[m - k - 1]]
            unions.append(_union(left, right, n))
        scores = [(own[a] + own[b])[:, None]]
        for k in range((m + 1) // 2, m):
            left_rest = torch.tensor(others[k], device=groups.device)
            right_rest = torch.tensor(others[m - k], device=groups.device)
            scores.append((unions[k] + unions[m - k][:, left_rest][:, :, right_rest]).flatten(1))
        value, place = torch.cat(scores, dim=1).max(dim=1)
        values.append(value)
        numbers.append(flat_numbers[place])
    return torch.cat(values), torch.cat(numbers)


@functools.cache
def _window_tables(size: int, m: int) -> tuple[Tensor, Tensor]:
    """Subsets of m of all columns of a window, and for each partition the numbers of its groups among them."""
    subsets = list(itertools.combinations(range(size * m), m))
    number = {chosen: index for index, chosen in enumerate(subsets)}
    return torch.tensor(subsets), torch.tensor([[number[group] for group in parts] for parts in partitions(size, m)])


def _windows(columns: Tensor, groups: Tensor, sets: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The same for sets of any size: every subset of m columns once, then every partition as a sum of subsets."""
    size, m = sets.shape[1], groups.shape[1]
    subsets, parts = (table.to(groups.device) for table in _window_tables(size, m))
    half = m // 2
    lefts, left_of = torch.unique(subsets[:, :half], dim=0, return_inverse=True)
    rights, right_of = torch.unique(subsets[:, half:], dim=0, return_inverse=True)
    values, numbers = [], []
    for chosen in sets:
        window = columns[groups[chosen].flatten()]
        left, right = (_prefix_sums(window[part].unbind(1), n) for part in (lefts, rights))
        sums = _union([part[left_of] for part in left], [part[right_of] for part in right], n)
        value, number = sums[parts].sum(1).max(dim=0)
        values.append(value)
        numbers.append(number)
    return torch.stack(values), torch.stack(numbers)
