"""Hydra's grammar as Optuna's distributions, and back to overrides that mean the same."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from ehr_embed.core.errors import UserError
from ehr_embed.search.space import Space, choice_text, parse_space, point_key
from tests.helpers.refusals import refused


def space_of(*arguments: str, **params: Any) -> Space:
    return parse_space(arguments, params)[0]


def one(argument: str) -> optuna.distributions.BaseDistribution:
    (parameter,) = space_of(argument).parameters
    return parameter.distribution


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("a=interval(1,10)", FloatDistribution(1, 10)),
        ("a=tag(log,interval(1e-5,1e-3))", FloatDistribution(1e-5, 1e-3, log=True)),
        ("a=int(interval(1,10))", IntDistribution(1, 10)),
        ("a=tag(log,int(interval(1,1024)))", IntDistribution(1, 1024, log=True)),
        # Hydra's range leaves its stop out.
        ("a=range(1,5)", IntDistribution(1, 4)),
        ("a=range(0,10,3)", IntDistribution(0, 9, step=3)),
        ("a=range(10,0,-2)", IntDistribution(2, 10, step=2)),
        ("a=range(0,1,0.25)", FloatDistribution(0, 0.75, step=0.25)),
        ("a=x,y", CategoricalDistribution(("x", "y"))),
        ("a=choice(1,2)", CategoricalDistribution(("1", "2"))),
        ("a=null,'null',true,'true',1,'1',[1,2],{b:1}", None),
    ],
)
def test_the_grammar(argument, expected):
    found = one(argument)
    if expected is not None:
        assert found == expected
    else:
        texts = ("null", "'null'", "true", "'true'", "1", "'1'", "[1,2]", "{b:1}")
        assert isinstance(found, CategoricalDistribution)
        assert found.choices == texts


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("a=range(5,1)", r"a=range\(5,1\): .* 5 to 1\b"),
        ("a=interval(2,1)", r"Type: interval\(1\.0,2\.0\)"),
        ("a=tag(log,interval(0,1))", "above 0, got 0"),
        ("a=tag(log,range(2,9,2))", r"step 1"),
        ("a=1,1", "a=1,1: .*Name each choice once"),
        ("a=tag(lgo,interval(1,2))", r"unknown tag.*'lgo': did you mean 'log'"),
        ("a=tag(log,choice(1,2))", r"log .* interval\(\) and range\(\)"),
        ("a=5", r"nothing to search.*Type"),
        ('a=tag("b=1",choice(1,2))', r"condition of a\b.*'b'"),
    ],
)
def test_bad_spaces_are_refused(argument, message):
    with pytest.raises(UserError, match=message):
        space_of(argument)


def test_a_condition_names_a_value_that_is_searched():
    with refused("'z'", "Valid: x, y"):
        space_of("b=x,y", 'a=tag("b=z",choice(1,2))')
    with pytest.raises(UserError, match=r"conditions of b, a\b"):
        space_of('b=tag("a=1",choice(1,2))', 'a=tag("b=1",choice(1,2))')


TEXTS = st.text(max_size=12).filter(lambda text: all(c.isprintable() for c in text) and text == text.strip("\\"))


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXTS, st.lists(st.integers())))
def test_choices_come_back_exact(value):
    """Whatever stands in a YAML list reaches the job as the same value of the same type."""
    text = choice_text(value)
    override = OverridesParser.create().parse_override(f"key={text}")
    assert not override.is_sweep_override()
    back = override.value()
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize(
    "text", ["null", "", " x", "a,b", "it's", "${seed}", "[1", "1e3", "a=b", "ü", 'say "x"', "True"]
)
def test_awkward_strings_come_back_exact(text):
    (parameter,) = space_of(key=[text, None, 7]).parameters
    assert isinstance(parameter.distribution, CategoricalDistribution)
    line = space_of(key=[text, None, 7]).overrides({"key": parameter.distribution.choices[0]})[0]
    assert OverridesParser.create().parse_override(line).value() == text


def test_the_command_line_wins_over_params_and_fixes_what_it_fixes():
    space, fixed = parse_space(["a=1", "b=range(0,3)", "c=5"], {"a": "1,2", "b": "7,8", "d": "x,y", "e": 3})
    assert {p.name: p.distribution for p in space.parameters} == {
        "b": IntDistribution(0, 2),
        "d": CategoricalDistribution(("x", "y")),
    }
    assert sorted(fixed) == ["a=1", "c=5", "e=3"]


def test_conditions_hold_in_points_draws_and_overrides():
    space = space_of('depth=tag("kind=tree",range(1,3))', "kind=tree,line", "+extra=0,1")
    points = space.points()
    assert points is not None
    assert len(points) == len({point_key(point) for point in points}) == 2 * 2 + 2
    assert all(("depth" in point) == (point["kind"] == "tree") for point in points)
    assert space.overrides(points[0])[0] == "kind=tree"
    assert "+extra=0" in space.overrides(points[0])
    study = optuna.create_study()
    for _ in range(12):
        point = space.suggest(study.ask())
        assert point in points
    left = space.fresh_point({point_key(point) for point in points[1:]})
    assert left == points[0]
    assert space.fresh_point({point_key(point) for point in points}) is None


def test_a_yaml_condition_may_have_null_among_its_choices():
    space = space_of(kind="tree,line", depth={"choices": [None, 3], "when": "kind=tree"})
    assert [space.overrides(point) for point in space.points() or []] == [
        ["kind=tree", "depth=null"],
        ["kind=tree", "depth=3"],
        ["kind=line"],
    ]
    with pytest.raises(UserError, match=r"hydra\.sweeper\.params\.depth: .*choices and when; got choice"):
        space_of(depth={"choice": [1]})


def test_an_interval_has_no_last_point():
    space = space_of("a=interval(0,1)", "b=1,2")
    assert space.points() is None
    assert space.fresh_point(set()) is not None
