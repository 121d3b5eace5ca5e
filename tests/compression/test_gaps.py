"""Gap codes: places and fillers come back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_cli.compression.gaps import fillers, from_gaps, to_gaps
from prune_cli.errors import CheckpointError


# ------------------------------------------------------------------------------------------------ gaps
@given(st.lists(st.booleans(), max_size=200), st.integers(1, 5))
@settings(max_examples=80, deadline=None)
def test_gaps_return_places_and_fillers_are_counted(flags, bits):
    places = np.flatnonzero(flags)
    codes, filler = to_gaps(places, len(flags), bits)
    assert np.array_equal(from_gaps(codes, len(flags), bits)[~filler], places)
    assert (codes < 1 << bits).all() and (codes[filler] == (1 << bits) - 1).all()
    assert int(filler.sum()) == fillers(torch.tensor(flags, dtype=torch.bool), bits)


def test_gap_codes_that_do_not_cover_the_vector_are_refused():
    for codes, length in ([5, 5], 11), ([0], 20), ([], 9):
        with pytest.raises(CheckpointError, match="gap codes reach"):
            from_gaps(np.array(codes, dtype=np.int64), length, 3)
