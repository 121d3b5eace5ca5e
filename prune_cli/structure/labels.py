"""Labels: which channel variable each element of a tensor belongs to, and what has been learned about the variables.

A label is an int64 tensor of the same shape as the tensor that it describes. Axes along which it does not
vary have stride 0, so a label costs as much memory as the axes along which it varies. Values: a variable's number (>
0), `FIXED` = 0 for a position that must stay, `ANY` = -1 for a constant that fits anything (padding, `new_zeros`). A
weight carries one label per axis, an activation usually one.

What belongs here: the data types and the equations between variables. What an operator does to labels is in
`operators/`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.utils._pytree import tree_map

FIXED, ANY = 0, -1
OUTPUTS, DECIDES = "outputs", "decides"  # what fixes channels beside operators


class Kind(Enum):
    """Where a tensor comes from."""

    DATA = "data"  # inputs and constants, or anything computed: an axis without a label is fixed
    WEIGHT = "weight"  # parameters and buffers, and what is computed from them alone
    UNIFORM = "uniform"  # a factory's constant: every axis may follow its neighbours


@dataclass(frozen=True, slots=True)
class Labelling:
    """What is known of one tensor.

    Attributes:
        labels: one label tensor per independent family of variables, each of the tensor's shape.
        kind: where the tensor comes from.
        zero: whether the elements of a removed variable are exactly 0 when the network is masked.
    """

    labels: tuple[Tensor, ...] = ()
    kind: Kind = Kind.DATA
    zero: bool = False


NOTHING = Labelling()


def labelling_of(tensor: Tensor) -> Labelling:
    """The labelling written on a tensor; inputs and constants have none and are data."""
    return getattr(tensor, "_prune_labelling", NOTHING)


def varied(label: Tensor) -> tuple[int, ...]:
    """The axes along which a label varies."""
    strides = label.stride()
    return tuple([axis for axis, size in enumerate(label.shape) if size > 1 and strides[axis]])


def slim(label: Tensor) -> Tensor:
    """The label with every axis along which it does not vary cut to size 1 (a view)."""
    size = [n if stride else 1 for n, stride in zip(label.shape, label.stride(), strict=True)]
    return label.as_strided(size, label.stride())


def flat(label: Tensor) -> np.ndarray:
    """The labels along the axes that vary, flattened."""
    return slim(label).reshape(-1).numpy()


def compact(label: Tensor, limit: int = 1 << 22) -> Tensor:
    """Finds axes along which a materialised label is constant and turns them into stride 0."""
    if label.numel() == 0 or label.numel() > limit:
        return label
    shape, label = label.shape, slim(label)
    for axis in varied(label):
        head = label.narrow(axis, 0, 1)
        if bool((label == head).all()):
            label = head
    return label.expand(shape)


def distinct(labels: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The labels without those of a whole tensor (all of one variable) that are fixed, or there already: sums and products
    of such tensors would hold ever more of them."""
    if len(labels) < 2:
        return labels
    found: dict[int, Tensor] = {}
    for number, label in enumerate(labels):
        whole = not varied(label) and label.numel()
        variable = int(label[(0,) * label.dim()]) if whole else -1 - number
        if not whole or variable > FIXED:
            found.setdefault(variable, label)
    return tuple(found.values())


def along(values: Tensor, axis: int, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Spreads a vector of labels along one axis of a shape."""
    view = [1] * len(shape)
    view[axis] = values.shape[0]
    return values.reshape(view).expand(shape)


def vector(label: Tensor, axis: int) -> Tensor:
    """The labels along one axis, at the first position of every other axis."""
    return label.as_strided((label.shape[axis],), (label.stride(axis),), label.storage_offset())


@dataclass(frozen=True, slots=True)
class Work:
    """Multiply-adds of one operator: `static` times the number of kept positions in every factor."""

    layer: str
    static: int
    factors: tuple[Tensor, ...]


@dataclass(slots=True)
class Constraints:
    """Everything that one execution on labels says about the variables."""

    count: int = 1  # variables handed out; 0 is FIXED
    edges: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    frozen: list[np.ndarray] = field(default_factory=list)
    products: list[np.ndarray] = field(default_factory=list)
    norms: list[np.ndarray] = field(default_factory=list)
    producers: list[np.ndarray] = field(default_factory=list)
    consumers: list[np.ndarray] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    origins: list[tuple[int, int, str, str]] = field(default_factory=list)  # see `begin`
    base: int = 0  # the first of the numbers below
    numbers: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def copy(self) -> Constraints:
        """The same so far; what is added to the copy is not added to this one."""
        twin = replace(self)
        for name in (entry.name for entry in fields(self)):
            if isinstance(value := getattr(self, name), list):
                setattr(twin, name, list(value))
        return twin

    def begin(self, operator: str, layer: str) -> None:
        """What is said from now on is said by this operator."""
        self.origins.append((len(self.edges), len(self.frozen), operator, layer))

    def fresh(self, size: int) -> Tensor:
        """New variables for one axis of a parameter."""
        first, self.count = self.count, self.count + size
        return torch.arange(first, first + size)

    def fresh_along(self, axis: int, shape: torch.Size) -> Tensor:
        """The label of new variables along one axis."""
        size = shape[axis]
        if self.count + size > self.base + len(self.numbers):
            self.base, self.numbers = self.count, torch.arange(self.count, self.count + max(size, 1 << 16))
        offset, self.count = self.count - self.base, self.count + size
        return self.numbers.as_strided(shape, [int(a == axis) for a in range(len(shape))], offset)

    def tie(self, left: Tensor, right: Tensor) -> None:
        """The labels are equal, element by element (shapes broadcast)."""
        left, right = torch.broadcast_tensors(slim(left), slim(right))
        if left.data_ptr() == right.data_ptr() and left.stride() == right.stride():
            return
        size = [1 if not (a or b) else n for n, a, b in zip(left.shape, left.stride(), right.stride(), strict=True)]
        a = left.as_strided(size, left.stride()).reshape(-1).numpy()
        b = right.as_strided(size, right.stride()).reshape(-1).numpy()
        self.edges.append((a, b))

    def tie_along(self, label: Tensor, axes: tuple[int, ...]) -> Tensor:
        """All positions along the axes are one variable; returns the label without that variation."""
        axes = tuple(axis for axis in varied(label) if axis in axes)
        if not axes:
            return label
        head = slim(label)
        for axis in axes:
            head = head.narrow(axis, 0, 1)
        self.tie(label, head)
        return head.expand(label.shape)

    def freeze(self, label: Tensor) -> None:
        """The positions stay."""
        self.frozen.append(flat(label))

    def product(self, label: Tensor) -> None:
        """What is kept of these labels must be a product along the axes that vary."""
        self.products.append(slim(label).squeeze().numpy())

    def solve(self) -> np.ndarray:
        """Solves the equations.

        Returns:
            The class of each variable, an int64 array of length `count`; class 0 holds what is fixed.
        """
        lefts = [a for a, _ in self.edges]
        rights = [b for _, b in self.edges]
        for array in self.frozen:
            lefts.append(array)
            rights.append(np.zeros_like(array))
        classes = self.components(zip(lefts, rights, strict=True))
        pending = [array for array in self.products if array.ndim > 1]
        groups = int(classes.max()) + 1
        while pending:
            extra, pending = self._joined(pending, classes)
            if not extra:
                break
            lefts += [left for left, _ in extra]
            rights += [right for _, right in extra]
            classes = self.components(zip(lefts, rights, strict=True))
            before, groups = groups, int(classes.max()) + 1
            if groups == before:  # positions that fit anything are in no class: no equation makes a product of these
                lefts += [array.ravel() for array in pending]
                rights += [np.zeros(array.size, dtype=np.int64) for array in pending]
                return self.components(zip(lefts, rights, strict=True))
        return classes

    @staticmethod
    def _joined(
        pending: Sequence[np.ndarray], classes: np.ndarray
    ) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[np.ndarray]]:
        """The equations that make products of the arrays that are none, and those arrays."""
        extra, left_over = [], []
        for array in pending:
            now = classes[np.maximum(array, 0)]
            spread = [axis for axis in range(now.ndim) if (now != now.take([0], axis)).any()]
            if len(spread) <= 1:
                continue
            head = array
            for axis in spread[:-1]:  # keep the last axis that varies: equal positions in every part
                head = head.take([0], axis)
            left, right = np.broadcast_arrays(array, head)
            extra.append((left.ravel(), right.ravel()))
            left_over.append(array)
        return extra, left_over

    def components(self, edges: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """The class of each variable by these equations alone; class 0 holds what equals FIXED."""
        pairs = list(edges)
        if not pairs:
            return np.arange(self.count)
        left, right = np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs])
        real = (left >= 0) & (right >= 0) & (left != right)
        left, right = left[real], right[real]
        if len(left) > 8 * self.count:
            keys = np.unique(left * np.int64(self.count) + right)
            left, right = keys // self.count, keys % self.count
        order = np.argsort(left, kind="stable")  # runs are sorted already: cheaper than a coordinate matrix
        starts = np.concatenate([[0], np.cumsum(np.bincount(left, minlength=self.count))]).astype(np.int32)
        columns = right[order].astype(np.int32)
        graph = csr_matrix((np.ones(len(left)), columns, starts), shape=(self.count, self.count))
        labels = connected_components(graph, directed=False)[1].astype(np.int64)
        zero = labels[0]
        if zero:  # name the class of FIXED 0
            labels = np.where(labels == zero, 0, np.where(labels == 0, zero, labels))
        return labels


def without_labels(labelling: Labelling) -> Labelling:
    """The same tensor after its variables were frozen."""
    return replace(labelling, labels=(), kind=Kind.DATA, zero=False)


def beside_labels(args: Sequence[Any]) -> tuple[Any, ...]:
    """An operator's other arguments for labels, which are on the CPU wherever the network is."""
    return tuple(tree_map(lambda arg: arg.cpu() if isinstance(arg, Tensor) else arg, tuple(args)))
