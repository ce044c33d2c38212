"""What property tests draw from."""

from __future__ import annotations

from hypothesis import strategies as st

from convlora.factors.base import WeightSpec


@st.composite
def specs(draw: st.DrawFn) -> WeightSpec:
    groups = draw(st.integers(1, 3))
    first, second = groups * draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel = (
        draw(st.lists(st.integers(1, 3), max_size=3))
        if groups == 1
        else draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    )
    transposed = bool(kernel) and draw(st.booleans())
    return WeightSpec((first, second, *kernel), groups, transposed)
