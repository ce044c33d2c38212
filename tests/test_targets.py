"""Patterns -> layers."""

from __future__ import annotations

import itertools
from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import net
from torch import nn

import convlora
from convlora import targets
from convlora.support import patterns
from convlora.support.patterns import NameIndex, nearest_names, pattern_matches, values_by_layer


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3)
        self.conv10 = nn.Conv2d(4, 4, 3)
        self.norm = nn.BatchNorm2d(4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3)
        self.body = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 4)


def chosen(targets: object, **options: object) -> list[str]:
    model = convlora.inject(Net(), targets, rank=1, **options)  # type: ignore[arg-type]
    return list(convlora.adapter(model).layers)


CASES = {
    "name from any dot on": ("conv1", ["conv1", "body.0.conv1", "body.1.conv1"]),
    "full name": ("body.1.conv1", ["body.1.conv1"]),
    "glob crosses dots": ("body.*", ["body.0.conv1", "body.0.conv10", "body.1.conv1", "body.1.conv10"]),
    "glob from any dot on": ("1.conv?", ["body.1.conv1"]),
    "character set": ("body.[0].conv1*", ["body.0.conv1", "body.0.conv10"]),
    "regular expression matches in full": (r"re:body\.\d\.conv1", ["body.0.conv1", "body.1.conv1"]),
    "class": (nn.Linear, ["head"]),
    "callable": (lambda name, module: name.endswith("10"), ["body.0.conv10", "body.1.conv10"]),
    "a list means any of them": (["head", "re:conv1"], ["conv1", "head"]),
}


@pytest.mark.parametrize("case", CASES)
def test_targets_select(case: str) -> None:
    targets, expected = CASES[case]
    assert chosen(targets) == expected


ALL = ["conv1", "body.0.conv1", "body.0.conv10", "body.1.conv1", "body.1.conv10", "head"]
EXCLUDES = {
    "glob": ("body.*", ["conv1", "head"]),
    "list": (["body.0.*", "1.conv*"], ["conv1", "head"]),
    "class": (nn.Linear, ALL[:-1]),
    "callable": (lambda name, module: "body" in name, ["conv1", "head"]),
    "regular expression": ("re:conv1|head", ALL[1:-1]),
}


@pytest.mark.parametrize("case", EXCLUDES)
def test_exclude_takes_the_same_forms(case: str) -> None:
    exclude, expected = EXCLUDES[case]
    assert chosen("*") == ALL
    assert chosen("*", exclude=exclude) == expected


def test_wildcards_pass_over_other_layers_and_literals_do_not() -> None:
    assert "body.0.norm" not in chosen("body.0.*")
    with pytest.raises(convlora.ConvLoRAError, match=r"names 'body\.0\.norm': BatchNorm2d is no convolution"):
        chosen("norm")
    with pytest.raises(convlora.ConvLoRAError, match=r"for the layers inside: 'body\.\*'"):
        chosen("body")


def test_a_full_name_may_also_be_the_tail_of_what_cannot_be_adapted() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3)))
    assert list(convlora.adapter(convlora.inject(model, "0", rank=1)).layers) == ["0"]


def test_every_single_target_must_select_something() -> None:
    with pytest.raises(convlora.ConvLoRAError, match=r"'bdy\.0\.conv10' selects no layer; 6 .*: 'body\.0\.conv10'"):
        chosen(["head", "bdy.0.conv10"])


def test_a_model_that_is_itself_a_layer() -> None:
    layer = convlora.inject(nn.Conv2d(8, 8, 3), "*", rank=1)
    assert list(convlora.adapter(layer).layers) == [""]


def test_nothing_can_be_adapted() -> None:
    with pytest.raises(convlora.ConvLoRAError, match="selects no layer; 0 can be adapted"):
        convlora.inject(nn.Sequential(nn.ReLU()), "*")


names = st.lists(st.text("ab1_", min_size=1, max_size=3), min_size=1, max_size=4).map(".".join)


@given(names, st.integers(0, 3))
def test_every_dotted_tail_of_a_name_matches(name: str, cut: int) -> None:
    parts = name.split(".")
    assert pattern_matches(".".join(parts[min(cut, len(parts) - 1) :]), name)


@given(names, st.text("ab1_*?.", max_size=6))
def test_matching_is_fnmatch_on_the_name_or_below_a_dot(name: str, pattern: str) -> None:
    assert pattern_matches(pattern, name) == (fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}"))


def test_nearest_compares_like_with_like() -> None:
    known = ["body.0.attn.qkv", "body.0.mlp.fc1", "head"]
    assert nearest_names("fc2", known).startswith("nearest: 'body.0.mlp.fc1'")
    assert nearest_names("x", []) == "there is none"


def test_classes_and_callables_become_names_in_the_config() -> None:
    model = convlora.inject(net(), [nn.Linear, lambda name, module: name == "0"], rank=1)
    assert convlora.adapters(model)["default"].targets == ("0", "6")


NAMES = ["", "a", "a.b", "b.a", "a.b.a", "a.b_c", "x.a*b", "x.re:a", "a.[b]", "a-b.c d", "ab", "B.a"]
PATTERNS = [*NAMES, "a*", "*.a", "?", "[ab]", "re:a", "re:a.b", r"re:a\.b", r"re:a\.b_c", "re:.*", r"re:\w",
            r"re:x\.a\*b", ".a", "a.", "b", "c d", r"re:a\-b\.c\ d", "re:", r"re:a|ab", "A"]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_index_selects_what_patterns_match(pattern: str) -> None:
    assert NameIndex(NAMES).matching(pattern, "test") == [name for name in NAMES if pattern_matches(pattern, name)]


def test_thousands_of_exact_targets_are_not_compared_with_thousands_of_names(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(1000)))
    exact = [rf"re:{i}\.0" if i % 2 else f"{i}.0" for i in range(1000)]
    compared = itertools.count()
    monkeypatch.setattr(patterns, "pattern_matches", lambda *given: (next(compared), pattern_matches(*given))[1])
    layers, idle = targets.select_layers(model, exact, exact[:10], "test")
    assert (len(layers), idle) == (990, [])
    saved = targets.select_modules(model, [rf"re:{i}\.1" for i in range(1000)], "test", "modules_to_save")
    assert len(saved) == 1000
    ranks = values_by_layer({f"{i}.0": i for i in range(10, 1000)}, 0, layers, "test", "ranks")
    assert list(ranks.values()) == list(range(10, 1000))
    assert next(compared) == 0
