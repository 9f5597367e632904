"""Search space: turn Hydra's override grammar into Optuna distributions with conditions, and points back into overrides."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    IntervalSweep,
    Override,
    Quote,
    QuotedString,
    RangeSweep,
    Transformer,
)
from hydra.errors import HydraException
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)

from ehr_embed.core.errors import UserError, unknown_name

Point = dict[str, Any]
"""Parameter name -> value as Optuna stores the value: a number, or the text of a choice in Hydra's grammar."""
MAX_ENUMERATED = 10_000
"""Largest number of points that are listed to find untried ones; from a larger space, points are drawn at random."""


@dataclass(frozen=True)
class Parameter:
    """One searched configuration key.

    Args:
        key: the key as an override names it: `model.n_layers`, `+model.n_layers` or a group such as `embedder`.
        distribution: values of the key. Choices are texts in Hydra's grammar, which keeps null, 'null' and [1,2] distinct.
        conditions: (name, value) pairs; the key is searched only at points where all of them hold.
    """

    key: str
    distribution: BaseDistribution
    conditions: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """Return the key without the leading + of an added key."""
        return self.key.lstrip("+")

    def text(self, value: Any) -> str:
        """Return a value of this parameter as the right side of an override.

        >>> Parameter("lr", FloatDistribution(0.0, 1.0, step=0.1)).text(0.30000000000000004)
        '0.3'
        """
        has_step = isinstance(self.distribution, FloatDistribution) and self.distribution.step is not None
        return f"{value:.12g}" if has_step else str(value)

    def values(self) -> list[Any] | None:
        """Return all values of the parameter; None if they form a continuous interval."""
        distribution = self.distribution
        if isinstance(distribution, CategoricalDistribution):
            return list(distribution.choices)
        if isinstance(distribution, IntDistribution):
            return list(range(distribution.low, distribution.high + 1, distribution.step))
        assert isinstance(distribution, FloatDistribution)
        if distribution.step is None:
            return [distribution.low] if distribution.single() else None
        n_steps = round((distribution.high - distribution.low) / distribution.step)
        return [float(f"{distribution.low + i * distribution.step:.12g}") for i in range(n_steps + 1)]


class Space:
    """The searched parameters, ordered such that each parameter follows those that its conditions name.

    Args:
        parameters: the searched parameters in any order.

    Raises:
        UserError: a condition names a key that is not searched or a value that the key cannot take, or conditions form a
            circle.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self.parameters = _ordered(parameters)

    def suggest(self, trial: optuna.Trial) -> Point:
        """Draw a point from the trial's sampler; a key whose conditions do not hold gets no value."""
        point: Point = {}
        for parameter in self._active(point):
            point[parameter.name] = _suggest(trial, parameter)
        return point

    def overrides(self, point: Point) -> list[str]:
        """Return the overrides that set the parameters to `point`."""
        return [f"{p.key}={p.text(point[p.name])}" for p in self.parameters if p.name in point]

    def point_with(self, parameter: Parameter, value: Any) -> Point:
        """Return a point at which `parameter` has `value`, its conditions hold, and all others have their first value."""
        by_name = {p.name: p for p in self.parameters}
        wanted: Point = {parameter.name: value}
        for needed in reversed(self.parameters):  # a parameter follows those that its conditions name
            if needed.name in wanted:
                wanted |= {
                    name: next(v for v in by_name[name].values() or [] if str(v) == text)
                    for name, text in needed.conditions
                }
        point: Point = {}
        for other in self._active(point):
            first = other.values() or [getattr(other.distribution, "low", None)]
            point[other.name] = wanted.get(other.name, first[0])
        return point

    def points(self) -> list[Point] | None:
        """Return every point in order; None if there are infinitely many or more than `MAX_ENUMERATED`."""
        if any(parameter.values() is None for parameter in self.parameters):
            return None
        found = list(itertools.islice(self._points({}, 0), MAX_ENUMERATED + 1))
        return found if len(found) <= MAX_ENUMERATED else None

    def fresh_point(self, tried: set[str]) -> Point | None:
        """Return a random point whose `point_key` is not in `tried`; None if every point was tried."""
        points = self.points()
        if points is not None:
            left = [point for point in points if point_key(point) not in tried]
            return random.choice(left) if left else None
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # which would tell of a study that nobody sees
        draws = optuna.create_study(sampler=optuna.samplers.RandomSampler())
        while True:
            point = self.suggest(draws.ask())
            if point_key(point) not in tried:
                return point

    def describe(self) -> dict[str, Any]:
        """Return the space as plain values, by which a command is compared with a stored study."""
        return {
            p.name: {
                "distribution": json.loads(distribution_to_json(p.distribution)),
                "conditions": [list(pair) for pair in p.conditions],
            }
            for p in self.parameters
        }

    def _active(self, point: Point) -> Iterator[Parameter]:
        """Yield the parameters whose conditions hold; the caller adds each value to `point` before it asks for the next."""
        for parameter in self.parameters:
            if self._holds(parameter, point):
                yield parameter

    def _holds(self, parameter: Parameter, point: Point) -> bool:
        return all(name in point and str(point[name]) == value for name, value in parameter.conditions)

    def _points(self, point: Point, index: int) -> Iterator[Point]:
        if index == len(self.parameters):
            yield point
            return
        parameter = self.parameters[index]
        if not self._holds(parameter, point):
            yield from self._points(point, index + 1)
            return
        for value in parameter.values() or []:
            yield from self._points({**point, parameter.name: value}, index + 1)


def _suggest(trial: optuna.Trial, parameter: Parameter) -> Any:
    name, distribution = parameter.name, parameter.distribution
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(
            name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
        )
    assert isinstance(distribution, FloatDistribution)
    return trial.suggest_float(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


def point_key(point: Mapping[str, Any]) -> str:
    """Return a text that identifies a point whatever the order of its keys.

    >>> point_key({"b": 1, "a": "x"}) == point_key({"a": "x", "b": 1})
    True
    """
    return json.dumps(dict(point), sort_keys=True)


def parse_space(
    arguments: Sequence[str], params: Mapping[str, Any], config_loader: ConfigLoader | None = None
) -> tuple[Space, list[str]]:
    """Split overrides into searched parameters and fixed overrides.

    Args:
        arguments: overrides of the command line; they take precedence over `params`.
        params: key -> text in Hydra's grammar, list of choices, or {choices: list, when: KEY=VALUE}.
        config_loader: Hydra's loader, which lists the options of a group for `glob()`.

    Returns:
        The space, and the fixed overrides in order.

    Raises:
        UserError: a range is empty, choices are repeated, a tag or condition is unknown, or there is nothing to search.

    >>> space, fixed = parse_space(["lr=tag(log,interval(1e-5,1e-3))", "n=int(interval(1,4))", "seed=3"], {"m": "a,b"})
    >>> [(p.name, type(p.distribution).__name__) for p in space.parameters], fixed
    ([('m', 'CategoricalDistribution'), ('lr', 'FloatDistribution'), ('n', 'IntDistribution')], ['seed=3'])
    """
    parser = OverridesParser.create(config_loader=config_loader)
    found: dict[str, Parameter | str] = {}
    for key, value in params.items():
        if isinstance(value, str | int | float | bool) or value is None:
            line = f"{key}={'null' if value is None else value}"
            found[key.lstrip("+~")] = _parsed(parser.parse_overrides([line])[0])
        else:
            found[key.lstrip("+~")] = _from_yaml(key, value)
    for line in arguments:
        (override,) = parser.parse_overrides([line])
        found[override.get_key_element().lstrip("+~")] = _parsed(override)
    parameters = [item for item in found.values() if isinstance(item, Parameter)]
    if not parameters:
        raise UserError(
            "nothing to search: no override has more than one value. "
            "Type, for one: 'trainer.learning_rate=tag(log,interval(1e-4,1e-2))' model.n_layers=1,2"
        )
    return Space(parameters), [item for item in found.values() if isinstance(item, str)]


def _parsed(override: Override) -> Parameter | str:
    """Return the parameter that an override searches, or the override's text if it has a single value."""
    line = str(override.input_line)
    if not override.is_sweep_override():
        return line
    if override.is_delete():
        raise UserError(f"{line}: a deletion has one value only.")
    key, sweep = override.get_key_element(), override.value()
    is_log, conditions = _tags(line, getattr(sweep, "tags", set()))
    if isinstance(sweep, IntervalSweep):
        return Parameter(key, _interval(line, sweep, is_log), conditions)
    if isinstance(sweep, RangeSweep):
        return Parameter(key, _range(line, sweep, is_log), conditions)
    if is_log:
        raise UserError(f"{line}: log is for interval() and range(); choices have no order.")
    return Parameter(key, _choices(line, [choice_text(value) for value in override.sweep_iterator()]), conditions)


def _from_yaml(key: str, value: Any) -> Parameter:
    """Return the parameter that a YAML file declares as a list of choices, or as {choices, when}."""
    choices: Any = value
    conditions: tuple[tuple[str, str], ...] = ()
    if isinstance(value, Mapping):
        if set(value) - {"choices", "when"} or "choices" not in value:
            raise UserError(
                f"hydra.sweeper.params.{key}: expected a text in Hydra's grammar, a list of choices, or keys choices and when; "
                f"got {', '.join(map(str, value)) or 'nothing'}."
            )
        choices = value["choices"]
        conditions = _conditions(key, [value["when"]] if "when" in value else [])
    # A YAML string is a literal text, even where Hydra's grammar would parse it as another type.
    return Parameter(key, _choices(key, [choice_text(choice) for choice in choices]), conditions)


def choice_text(value: Any) -> str:
    """Return a choice as a text that Hydra's grammar parses back into the same value.

    >>> [choice_text(v) for v in (None, "null", QuotedString("a,b", Quote.single), True, 0.001, [1, 2], "x", "1")]
    ['null', "'null'", "'a,b'", 'true', '0.001', '[1,2]', 'x', "'1'"]
    """
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return str(Transformer.str(value))
    try:
        plain = OverridesParser.create().parse_override(f"key={value}")
        is_same = not plain.is_sweep_override() and plain.value() == value
    except HydraException:
        is_same = False
    return value if is_same else QuotedString(value, Quote.single).with_quotes()


def _choices(line: str, texts: list[str]) -> CategoricalDistribution:
    if not texts:
        raise UserError(f"{line}: no choices, so no trial could be made. Name at least one value.")
    if repeated := sorted({text for text in texts if texts.count(text) > 1}):
        raise UserError(f"{line}: {', '.join(repeated)} stands there twice. Name each choice once.")
    return CategoricalDistribution(texts)


def _interval(line: str, sweep: IntervalSweep, is_log: bool) -> BaseDistribution:
    low, high = sweep.start, sweep.end
    assert low is not None
    assert high is not None
    if low > high:
        raise UserError(f"{line}: the interval from {low} to {high} is empty. Type: interval({high},{low})")
    if is_log and low <= 0:
        raise UserError(f"{line}: a logarithmic scale needs a lower end above 0, got {low}.")
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=is_log)
    return FloatDistribution(float(low), float(high), log=is_log)


def _range(line: str, sweep: RangeSweep, is_log: bool) -> BaseDistribution:
    """Return Hydra's range, which excludes its stop, as an Optuna distribution, which includes its upper end."""
    values = sorted(sweep.range())
    if not values:
        raise UserError(f"{line}: the range from {sweep.start} to {sweep.stop} (left out) is empty.")
    low, high, step = values[0], values[-1], abs(sweep.step)
    if is_log and (not isinstance(low, int) or step != 1 or low <= 0):
        raise UserError(
            f"{line}: a logarithmic range needs whole numbers above 0 and step 1. For others type: tag(log,interval(LOW,HIGH))"
        )
    if all(isinstance(value, int) for value in values):
        return IntDistribution(low, high, log=is_log, step=int(step))
    return FloatDistribution(float(low), float(high), step=float(step))


def _tags(line: str, tags: set[str]) -> tuple[bool, tuple[tuple[str, str], ...]]:
    """Return whether `log` is among the tags, and the conditions that the KEY=VALUE tags state."""
    for tag in sorted(tags):
        if tag != "log" and "=" not in tag:
            raise unknown_name(f"tag in {line}:", tag, ["log", "KEY=VALUE (a condition)"])
    return "log" in tags, _conditions(line, sorted(tags - {"log"}))


def _conditions(line: str, texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    pairs = []
    for text in texts:
        name, separator, value = str(text).partition("=")
        if not separator:
            raise UserError(f"{line}: the condition {text!r} is not of the form KEY=VALUE.")
        pairs.append((name.lstrip("+"), value))
    return tuple(pairs)


def _ordered(parameters: Sequence[Parameter]) -> list[Parameter]:
    known = {parameter.name: parameter for parameter in parameters}
    for parameter in parameters:
        for name, value in parameter.conditions:
            if name not in known:
                raise unknown_name(
                    f"key in the condition of {parameter.name}:", name, known, "A condition names a searched key."
                )
            texts = [str(item) for item in known[name].values() or []]
            if value not in texts:
                raise unknown_name(f"value of {name} in the condition of {parameter.name}:", value, texts)
    ordered: list[Parameter] = []
    left = list(parameters)
    while left:
        placed = {parameter.name for parameter in ordered}
        ready = [p for p in left if all(name in placed for name, _ in p.conditions)]
        if not ready:
            raise UserError(f"the conditions of {', '.join(p.name for p in left)} depend on each other.")
        ordered += ready
        left = [p for p in left if p not in ready]
    return ordered
