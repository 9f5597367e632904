from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from ehr_embed.core.errors import UserError
from ehr_embed.core.settings import (
    Count,
    OneOf,
    Share,
    Told,
    check_setting,
    check_settings,
    checked,
    names_of,
    rules_of,
)


@pytest.mark.parametrize(
    ("rule", "good", "bad", "told"),
    [
        (int, 3, 3.0, "a whole number, got the number 3.0"),
        (int, 3, True, "a whole number, got true"),
        (float, 3, "3", "a number, got the text '3'"),
        (bool, True, 1, "true or false"),
        (str | None, None, 3, "a text, or null"),
        (Count, 1, 0, "1 or more"),
        (Count | None, None, 0, "1 or more, or null"),
        (Share, 1, 1.5, r"a share in \[0, 1\]"),
        (Annotated[float, Field(gt=0, lt=1)], 0.5, 1.0, r"a number in \(0, 1\)"),
        (Sequence[float], [1, 2.5], [1, "x"], "a list"),
        (tuple[str, ...], ["a"], "a", "a list"),
        (list[int], [1], [1.5], "a list"),
        (dict[str, int], {"a": 1}, 3, "a mapping"),
        (Annotated[str, OneOf("mean", "max")], "max", "maen", "did you mean 'mean'"),
        (Annotated[str, OneOf("mean")] | None, None, "x", "Valid: mean, null"),
        (Sequence[Annotated[str, OneOf("gap", "age")]], ["gap"], ["gap", "agee"], "'agee': did you mean 'age'"),
        (Literal["auto"] | Annotated[int, Field(ge=1)], "auto", 0, "auto, or 1 or more"),
        (
            Annotated[Count, Told("a size", example="5", remedy="It matters.")],
            1,
            "x",
            r"a size.*It matters.*Type: a\.b=5",
        ),
    ],
)
def test_a_rule_is_its_annotation(rule: Any, good: Any, bad: Any, told: str):
    check_setting("a.b", good, rule)
    with pytest.raises(UserError, match=rf"a\.b.*{told}"):
        check_setting("a.b", bad, rule)


class Base:
    @checked("model")
    def __init__(self, *, width: Count = 1, size: int = 1) -> None:
        self.width, self.size = width, size


class Derived(Base):
    @checked("model")
    def __init__(self, *, depth: Count = 1, **options: Any) -> None:
        super().__init__(**options)
        self.depth = depth


def test_keywords_that_are_handed_on_have_the_rules_of_the_base_class():
    assert set(rules_of(Derived)) >= {"depth", "width", "size"}
    assert names_of(Derived) == {"depth", "width", "size"}
    with pytest.raises(UserError, match=r"model\.width=0"):
        check_settings(Derived, {"width": 0}, "model")
    with pytest.raises(UserError, match=r"model\.width=0"):
        Derived(width=0)
    assert Derived(width=2, depth=3).width == 2


def test_callers_in_python_are_held_to_rules_and_not_to_types():
    """A size that the data dictate may be a number of numpy."""
    assert Base(size=3.0).size == 3.0  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"model\.size=3\.0: .*whole number"):
        check_settings(Base, {"size": 3.0}, "model")
