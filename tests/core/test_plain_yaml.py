"""YAML that Hydra wrote reads the same without OmegaConf."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from yaml import YAMLError

from ehr_embed.core.plain_yaml import read_yaml

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**9), 10**9),
    st.floats(allow_nan=False),
    st.text(max_size=8).filter(lambda text: "$" not in text),
    st.sampled_from(
        ["1e-3", "010", "2020-01-31", "1:30", "null", "yes", "~", "1_000", ".5", "1.", "a: b", "- x", ".inf"]
    ),
)
NAMES = st.text("abcdefgh_", min_size=1, max_size=5)
TREES = st.dictionaries(
    NAMES, st.recursive(SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(NAMES, x, max_size=3))
)


@settings(max_examples=150, deadline=None)
@given(tree=TREES)
def test_what_omegaconf_writes_is_read_back(tmp_path_factory, tree):
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    path.write_text(OmegaConf.to_yaml(tree), encoding="utf-8")
    assert read_yaml(path) == OmegaConf.to_container(OmegaConf.load(path))


@pytest.mark.parametrize(
    "text", ["1e-3", "2020-01-31", "1.5", ".5", "-3.", "+1.5E3", "1_000", "012", "0x1F", "yes", "~", ".nan", ".inf", "-.inf",
             "1e3", "e3", ".", "+", ".e3", "1.5.2", "'1e-3'", "12e", "1:30", "1:30.5", "1_0.5"]
)  # fmt: skip
def test_a_value_typed_by_hand_is_what_it_is_for_hydra(tmp_path, text):
    path = tmp_path / "typed.yaml"
    path.write_text(f"key: {text}\n")
    own, theirs = read_yaml(path)["key"], OmegaConf.load(path)["key"]
    assert (type(own), repr(own)) == (type(theirs), repr(theirs))


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("a: 1\nb:\n  c: 2\n  c: 3\n")
    with pytest.raises(YAMLError, match=r"key c .*twice"):
        read_yaml(path)
