"""Labels and the equations between them, against plain union-find and plain arrays."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_cli.structure.labels import ANY, FIXED, Constraints, along, compact, distinct, slim, varied, vector


def components(count: int, pairs: list[tuple[int, int]]) -> list[set[int]]:
    """Classes of variables by joining sets, one pair after the other."""
    sets = [{number} for number in range(count)]
    for left, right in pairs:
        one, other = (next(s for s in sets if number in s) for number in (left, right))
        if one is not other:
            sets.remove(other)
            one |= other
    return sets


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 14), st.integers(-1, 14)), max_size=30))
def test_ties_are_an_equivalence_and_zero_names_what_is_fixed(pairs):
    constraints = Constraints(count=15)
    for left, right in pairs:
        constraints.tie(torch.tensor([left]), torch.tensor([right]))
    classes = constraints.solve()
    for members in components(15, [pair for pair in pairs if ANY not in pair]):
        assert len({classes[number] for number in members}) == 1
        assert (0 in members) == (classes[min(members)] == 0)
    assert len(set(classes)) == len(components(15, [pair for pair in pairs if ANY not in pair]))


def test_what_fits_anything_ties_nothing_together():
    constraints = Constraints()
    first, second = constraints.fresh(3), constraints.fresh(3)
    padding = torch.full((3,), ANY)
    constraints.tie(first, padding)
    constraints.tie(padding, second)
    classes = constraints.solve()
    assert len(set(classes)) == 7


def test_a_frozen_position_takes_along_what_it_is_tied_to():
    constraints = Constraints()
    first, second = constraints.fresh(4), constraints.fresh(4)
    constraints.tie(first, second)
    constraints.freeze(second[1:2])
    classes = constraints.solve()
    assert [bool(classes[number]) for number in first.tolist()] == [True, False, True, True]


def test_a_product_keeps_the_same_positions_in_every_part():
    """Channels cut into (heads, size): what goes must go from every head, or heads must go whole."""
    constraints = Constraints()
    variables = constraints.fresh(6)
    constraints.product(variables.view(2, 3))
    classes = constraints.solve()[variables.numpy()].reshape(2, 3)
    assert (classes[0] == classes[1]).all() and len(set(classes[0])) == 3


def test_an_axis_that_is_tied_is_one_variable():
    constraints = Constraints()
    label = constraints.fresh(6).view(2, 3)
    left = constraints.tie_along(label, (1,))
    assert varied(left) == (0,) and left.shape == (2, 3)
    classes = constraints.solve()[label.numpy()]
    assert (classes == classes[:, :1]).all() and classes[0, 0] != classes[1, 0]


def test_a_copy_hears_nothing_of_what_comes_later():
    constraints = Constraints()
    first = constraints.fresh(2)
    copied = constraints.copy()
    constraints.tie(first[:1], first[1:])
    assert not copied.edges and len(constraints.edges) == 1
    assert len(set(copied.solve())) == 3 and len(set(constraints.solve())) == 2


def test_new_variables_are_never_handed_out_twice():
    constraints = Constraints()
    found = [constraints.fresh(3), constraints.fresh_along(1, torch.Size((2, 70000, 2)))[0, :, 0]]
    found += [constraints.fresh_along(0, torch.Size((4, 5)))[:, 0], constraints.fresh(2)]
    numbers = torch.cat(found).tolist()
    assert len(set(numbers)) == len(numbers) == constraints.count - 1 and 0 not in numbers


@given(st.integers(1, 4), st.integers(0, 2))
def test_a_vector_spread_along_an_axis_varies_along_it_alone(size, axis):
    values = torch.arange(5, 5 + size)
    label = along(values, axis, (size, size, size))
    assert varied(label) == ((axis,) if size > 1 else ())
    assert vector(label, axis).tolist() == values.tolist()
    assert slim(label).numel() == size
    written = compact(label.contiguous())
    assert (
        torch.equal(written, label)
        and written.untyped_storage().nbytes() <= label.contiguous().untyped_storage().nbytes()
    )
    assert varied(written) == varied(label)


def test_tied_labels_broadcast_like_tensors():
    constraints = Constraints()
    rows, whole = constraints.fresh(3), constraints.fresh(6).view(2, 3)
    constraints.tie(rows.expand(2, 3), whole)
    classes = constraints.solve()
    assert (classes[whole.numpy()] == classes[rows.numpy()][None]).all() and np.unique(classes).size == 4


def test_what_a_whole_tensor_says_is_not_said_again_and_again():
    """Attention over one head, layer upon layer: labels that do not vary would double in number with every product."""
    variables = [torch.tensor(one).expand(2, 3) for one in (5, 5, 7, FIXED, ANY)]
    label = along(torch.arange(1, 4), 1, (2, 3))
    assert [int(one[0, 0]) for one in distinct((label, *variables, label))] == [1, 5, 7, 1]
