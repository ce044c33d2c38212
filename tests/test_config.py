"""`AdapterConfig`: JSON both ways, values checked."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from convlora import AdapterConfig, ConvLoRAError

text = st.text(min_size=1, max_size=8)
configs = st.builds(
    AdapterConfig,
    targets=st.lists(text, min_size=1, max_size=3),
    rank=st.integers(0, 64),
    alpha=st.none() | st.floats(0.1, 64),
    name=st.text("abcxyz_0", min_size=8, max_size=9).map("n{}".format),
    exclude=st.lists(text, max_size=2),
    ranks=st.none() | st.dictionaries(text, st.integers(0, 9), max_size=3),
    alphas=st.none() | st.dictionaries(text, st.floats(0, 9), max_size=3),
    rank_scaling=st.sampled_from(["linear", "sqrt"]),
    bias=st.booleans(),
    rank_dropout=st.floats(0, 0.9),
)


@given(configs)
def test_json_round_trip(config: AdapterConfig) -> None:
    assert AdapterConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("text", ["", "3", "[]", "{}", '{"targets": ["*"], "rank": -1}', "[" * 100000])
def test_malformed_json_is_one_clear_error(text: str) -> None:
    with pytest.raises(ConvLoRAError, match="AdapterConfig"):
        AdapterConfig.from_json(text)


def test_fields_of_a_newer_version_are_refused() -> None:
    with pytest.raises(ConvLoRAError, match=r"unknown fields \['dora'\]"):
        AdapterConfig.from_json(json.dumps({"targets": ["*"], "dora": True}))


def test_classes_have_no_json_form() -> None:
    with pytest.raises(ConvLoRAError, match="no JSON form"):
        AdapterConfig(targets=nn.Conv2d).to_json()


def test_replace_checks_again() -> None:
    with pytest.raises(ConvLoRAError, match="rank"):
        AdapterConfig(targets="*").replace(rank=-1)


def test_numbers_of_numpy_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    config = AdapterConfig(targets="*", rank=numpy.int64(2), alpha=numpy.float32(0.5), ranks={"a": numpy.int32(3)})
    assert AdapterConfig.from_json(config.to_json()) == config
    assert type(config.rank) is int
