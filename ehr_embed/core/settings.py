"""Check settings by the annotations of the parameters that take them: the type, range and choices of a setting stand there once.

    def __init__(self, *, n_layers: Annotated[int, Field(ge=1, le=1024)] = 6, pooling: Annotated[str, OneOf("mean", "max")]): ...

The check of a configuration reads these annotations before any work; `@checked("model")` applies them to callers in Python too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Field, StringConstraints, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUndefinedAnnotation
from pydantic.fields import FieldInfo
from pydantic_core import core_schema

from ehr_embed.core.errors import UserError, unknown_name

Function = TypeVar("Function", bound=Callable[..., Any])
PLAIN = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    NoneType: "null",
    Any: "a value",
}
"""Types in the words of a user."""
WRONG_TYPE = ("_type", "sequence_str", "is_instance_of", "_attributes")
"""Parts of pydantic's names of the errors of a value of another type; the others are of a value out of range."""


@dataclass(frozen=True)
class Told:
    """An annotation: the words with which a setting is refused.

    Attributes:
        expected: the valid values in words; empty = the words for the type and range.
        example: a value to type.
        remedy: a further sentence.
    """

    expected: str = ""
    example: str = ""
    remedy: str = ""


class OneOf:
    """An annotation: the setting is one of these names.

    >>> check_setting("model.pooling", "maen", Annotated[str, OneOf("mean", "max")])
    Traceback (most recent call last):
    ehr_embed.core.errors.UserError: unknown model.pooling 'maen': did you mean 'mean'? Valid: max, mean.
    """

    def __init__(self, *names: str) -> None:
        self.names = names

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        """Return the schema by which pydantic checks the name."""
        return core_schema.literal_schema(list(self.names))


Text = Annotated[str, StringConstraints(min_length=1)]
Folder = Annotated[Text, Told("a folder", example="DIR")]
Files = Annotated[Sequence[Text], Told("a list of CSV files", example="[FILE.csv]")]
Switch = Annotated[bool, Told("true or false", example="true")]
Count = Annotated[int, Field(ge=1)]
Width = Annotated[int, Field(ge=1, le=65_536)]
Positive = Annotated[float, Field(gt=0), Told("a number above 0", example="0.01")]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1), Told("a share in [0, 1]")]
ShareBelow1 = Annotated[float, Field(ge=0, lt=1), Told("a share in [0, 1)")]
ShareAbove0 = Annotated[float, Field(gt=0, le=1), Told("a share in (0, 1]")]
DrawSeed = Annotated[int, Field(ge=0)]
"""The seed of a generator of numpy, which takes a number of any size."""
Seed = Annotated[int, Field(ge=0, lt=2**32), Told("a whole number from 0 to 4294967295", example="0")]


def check_setting(key: str, value: Any, rule: Any) -> None:
    """Refuse a value that an annotation does not allow.

    Args:
        key: full name of the setting, such as trainer.epochs.
        value: the value, of its own type: the text "3" is no number.
        rule: the annotation.

    Raises:
        UserError: names the key, what was expected and what arrived.

    >>> check_setting("model.n_layers", 0, Annotated[int, Field(ge=1, le=1024)])
    Traceback (most recent call last):
    ehr_embed.core.errors.UserError: model.n_layers=0: expected 1 to 1024.
    >>> check_setting("seed", "x", Seed)
    Traceback (most recent call last):
    ehr_embed.core.errors.UserError: seed=x: expected a whole number from 0 to 4294967295, got the text 'x'. Type: seed=0
    >>> check_setting("model.windows", [1, "x"], Sequence[float] | None)
    Traceback (most recent call last):
    ehr_embed.core.errors.UserError: model.windows=[1, 'x']: expected a list (each a number), or null, got a list.
    """
    try:
        _validate(_adapter(key, rule), value)
    except ValidationError as error:
        raise _refusal(key, value, rule, error) from error


def check_settings(
    target: Any,
    values: Mapping[str, Any],
    where: str = "",
    *,
    full_names: Mapping[str, str] | None = None,
    only_rules: bool = False,
) -> None:
    """Refuse the first value that the annotation of its parameter does not allow.

    Args:
        target: a class, whose constructor or whose fields are annotated, or a function.
        values: by name; names that `target` does not annotate are passed over.
        where: what stands before a name in messages, such as model.
        full_names: names for messages, of those that are known by another one.
        only_rules: True = skip parameters whose annotation is a bare type.

    Raises:
        UserError: as `check_setting`.
    """
    rules = rules_of(target)
    for name, value in values.items():
        if name in rules and (not only_rules or has_rule(rules[name])):
            own = f"{where}.{name}" if where else name
            check_setting((full_names or {}).get(name, own), value, rules[name])


def checked(where: str) -> Callable[[Function], Function]:
    """Return a decorator for a constructor: its arguments are checked by the rules in their annotations before it runs.

    Args:
        where: config group of the class, for messages.

    >>> class Model:
    ...     @checked("model")
    ...     def __init__(self, *, n_layers: Count) -> None: ...
    >>> Model(n_layers=0)
    Traceback (most recent call last):
    ehr_embed.core.errors.UserError: model.n_layers=0: expected 1 or more.
    """

    def decorate(function: Function) -> Function:
        names = list(inspect.signature(function).parameters)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            check_settings(function, dict(zip(names, args, strict=False)) | kwargs, where, only_rules=True)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


@cache
def rules_of(target: Any) -> dict[str, Any]:
    """Return the annotations of the parameters of a class or function, by name. If a constructor hands on further keywords to its
    base class, those of the base class are included. Annotations that cannot be resolved here are left out."""
    rules: dict[str, Any] = {}
    for function in _signatures(target):
        try:
            rules = get_type_hints(function, include_extras=True) | rules
        except (NameError, TypeError):
            continue
    rules.pop("return", None)
    return rules


@cache
def names_of(target: Any) -> frozenset[str] | None:
    """Return the names of the keywords that a class or function takes, None where any name is taken or none is known."""
    names: set[str] = set()
    for function in _signatures(target):
        try:
            parameters = inspect.signature(function).parameters
        except (TypeError, ValueError):
            return None
        names |= {name for name, one in parameters.items() if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)}
        if not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
            return frozenset(names - {"self"})
    return None


def _signatures(target: Any) -> Iterator[Any]:
    """Yield a function itself, or the constructor of a class and, while it hands on further keywords, that of its base class."""
    if not isinstance(target, type):
        yield target
        return
    constructors = [
        vars(base)["__init__"] for base in target.__mro__ if "__init__" in vars(base) and base is not object
    ]
    if not constructors:
        yield target  # the annotations of its fields
    for constructor in constructors:
        yield constructor
        try:
            kinds = {one.kind for one in inspect.signature(constructor).parameters.values()}
        except (TypeError, ValueError):
            return
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            return


def has_rule(hint: Any) -> bool:
    """Return whether an annotation says more than a type.

    >>> has_rule(int | None), has_rule(Count | None), has_rule(list[Literal["a"]])
    (False, True, True)
    """
    return get_origin(hint) in (Annotated, Literal) or any(has_rule(part) for part in get_args(hint))


def on_one_line(value: Any) -> str:
    """Return a value as it is typed, on one line and not too long.

    >>> on_one_line(None), on_one_line("a\\nb"), len(on_one_line("x" * 999))
    ('null', 'a b', 60)
    """
    text = "null" if value is None else " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def words_of_value(value: Any) -> str:
    """Return a value and its type in the words of a user, for the part of a refusal that says what arrived.

    >>> words_of_value("two"), words_of_value(1.5), words_of_value(True), words_of_value(None), words_of_value([1])
    ("the text 'two'", 'the number 1.5', 'true', 'null', 'a list')
    """
    if isinstance(value, str):
        return f"the text '{on_one_line(value)}'"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, int | float):
        return f"the number {value}"
    kinds = {Mapping: "a mapping", list: "a list", tuple: "a list"}
    return next((words for kind, words in kinds.items() if isinstance(value, kind)), f"a {type(value).__name__}")


def _validate(adapter: TypeAdapter | None, value: Any) -> None:
    if adapter is None:
        return
    try:
        adapter.validate_python(value, strict=True)
    except ValidationError:
        if not isinstance(value, list):
            raise
        adapter.validate_python(tuple(value), strict=True)  # YAML has no tuples


_adapters: dict[int, tuple[Any, TypeAdapter | None]] = {}


def _adapter(key: str, rule: Any) -> TypeAdapter | None:
    """Return pydantic's adapter for an annotation, None where pydantic knows no rule for the type."""
    # Adapters are found by the identity of the rule, since not every annotation can be hashed. The rule is kept, so that no other
    # object gets its identity.
    if id(rule) not in _adapters:
        try:
            adapter = TypeAdapter(rule)
        except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation):
            adapter = None
        _adapters[id(rule)] = rule, adapter
    return _adapters[id(rule)][1]


def _refusal(key: str, value: Any, rule: Any, error: ValidationError) -> UserError:
    told = next(_found(rule, Told), Told())
    remedy = " ".join(filter(None, [told.remedy, told.example and f"Type: {key}={told.example}"]))
    if not told.expected and (names := _names(rule)):
        given = [one["input"] for one in error.errors() if one["type"] == "literal_error"]
        if given:
            return unknown_name(key, "null" if given[-1] is None else given[-1], names, remedy)
    is_of_type = not any(part in one["type"] for one in error.errors() for part in WRONG_TYPE)
    got = "" if is_of_type else f", got {words_of_value(value)}"
    return UserError(
        f"{key}={on_one_line(value)}: expected {words_of_rule(rule)}{got}.{' ' + remedy if remedy else ''}"
    )


def _found(rule: Any, kind: type) -> Iterator[Any]:
    if get_origin(rule) is Annotated:
        yield from (one for one in reversed(rule.__metadata__) if isinstance(one, kind))
        yield from _found(rule.__origin__, kind)
    elif get_origin(rule) is not Literal:
        for part in get_args(rule):
            yield from _found(part, kind)


def _names(rule: Any) -> list[str]:
    """Return the valid names of a rule that allows names, null or lists of names only; empty for any other rule.

    >>> _names(Literal["a", "b"] | None), _names(Literal["auto"] | int)
    (['a', 'b', 'null'], [])
    """
    if get_origin(rule) is Annotated:
        own = [name for one in rule.__metadata__ if isinstance(one, OneOf) for name in one.names]
        return own or _names(rule.__origin__)
    if get_origin(rule) is Literal:
        return [str(name) for name in get_args(rule)]
    if rule is NoneType:
        return ["null"]
    if get_origin(rule) not in (Union, UnionType, Sequence, list, tuple):
        return []
    parts = [_names(part) for part in get_args(rule) if part is not Ellipsis]
    return [name for part in parts for name in part] if all(parts) and parts != [["null"]] else []


def words_of_rule(rule: Any) -> str:
    """Return the values that an annotation allows, in the words of a user.

    >>> words_of_rule(Annotated[int, Field(ge=1)] | None), words_of_rule(Annotated[float, Field(gt=0, le=1)])
    ('1 or more, or null', 'a number in (0, 1]')
    >>> words_of_rule(dict[str, int])
    'a mapping'
    """
    if (told := next(_found(rule, Told), Told())).expected and get_origin(rule) is Annotated:
        return told.expected
    if get_origin(rule) is Annotated and (names := _names(rule)):
        return " or ".join(names)
    if get_origin(rule) is Annotated:
        limits = [
            limit for one in rule.__metadata__ for limit in (one.metadata if isinstance(one, FieldInfo) else [one])
        ]
        return _range(limits, rule.__origin__) or words_of_rule(rule.__origin__)
    if get_origin(rule) in (Union, UnionType):
        parts = [words_of_rule(part) for part in get_args(rule)]
        return f"{', '.join(parts[:-1])}, or {parts[-1]}"
    if get_origin(rule) is Literal:
        return " or ".join(map(str, get_args(rule)))
    kind = get_origin(rule) or rule
    if isinstance(kind, type) and kind not in (str, bytes) and issubclass(kind, Mapping):
        return "a mapping"
    if isinstance(kind, type) and kind not in (str, bytes) and issubclass(kind, Iterable):
        parts = [words_of_rule(part) for part in get_args(rule) if part is not Ellipsis]
        return f"a list (each {parts[0]})" if parts else "a list"
    return str(PLAIN.get(rule) or getattr(rule, "__name__", rule))


def _range(limits: Iterable[Any], kind: Any) -> str:
    found = {type(limit): limit for limit in limits}
    low = found.get(Ge) or found.get(Gt)
    high = found.get(Le) or found.get(Lt)
    if isinstance(low, Ge) and high is None:
        return f"{low.ge} or more"
    if isinstance(low, Gt) and high is None:
        return f"more than {low.gt}"
    if isinstance(low, Ge) and isinstance(high, Le) and kind is int:
        return f"{low.ge} to {high.le}"
    if low is None or high is None:
        return ""
    start = f"[{low.ge}" if isinstance(low, Ge) else f"({low.gt}"
    return f"a number in {start}, {high.le}]" if isinstance(high, Le) else f"a number in {start}, {high.lt})"
