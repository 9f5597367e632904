"""Fixtures that the tests of run folders share."""

from tests.helpers.stopped_runs import dataset  # noqa: F401 (a fixture)
