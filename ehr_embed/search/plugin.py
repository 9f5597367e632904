"""Register the study sweeper and the folder sweeps/ with Hydra, before an entry point composes its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.plugins.sweeper import Sweeper

from ehr_embed.core.programs import shipped
from ehr_embed.search.application import Application, register_application

SWEEPER = "ehr_embed.search.sweeper.StudySweeper"
SWEEPS = shipped("sweeps")
GROUP = "sweeps"


def register(application: Application) -> None:
    """Make `hydra/sweeper=study` and `sweeps=NAME` known to Hydra; a repeated call changes nothing.

    Args:
        application: the application whose runs are searched.
    """
    register_application(application)
    plugins = Plugins.instance()
    plugins.class_name_to_class[SWEEPER] = _LazySweeper
    plugins.register(SweepsSource)
    plugins.register(SweepsSearchPath)
    # Hydra accepts sweepers only from its own namespace package `hydra_plugins`. This project does not install modules into
    # that namespace, so it extends Hydra's check in this process by its one sweeper.
    plugins.is_in_toplevel_plugins_module = is_plugin_module  # type: ignore[method-assign,assignment]


def is_plugin_module(name: str) -> bool:
    """Return whether Hydra may load the plugin `name`: a plugin of Hydra, an installed plugin, or the study sweeper.

    >>> is_plugin_module("ehr_embed.search.sweeper.StudySweeper"), is_plugin_module("os.system")
    (True, False)
    """
    return name == SWEEPER or Plugins.is_in_toplevel_plugins_module(name)


class _LazySweeper(Sweeper):
    """The study sweeper, imported when a search starts: Optuna takes half a second that other starts do not need."""

    def __new__(cls, **options: Any) -> Sweeper:  # type: ignore[misc]
        from ehr_embed.search.sweeper import StudySweeper

        return StudySweeper(**options)


class SweepsSearchPath(SearchPathPlugin):
    """Hydra plugin that adds the folder sweeps/ to the search path of every application."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folder to the search path."""
        search_path.append("ehr_embed", f"{SweepsSource.scheme()}://{SWEEPS}")


class SweepsSource(FileConfigSource):
    """Hydra config source that offers the folder sweeps/ as the config group `sweeps`.

    An ordinary search path names the parent folder of its groups. Here that would be the repository, and Hydra would treat
    each of its folders as a config group.
    """

    @staticmethod
    def scheme() -> str:
        return "ehr-embed-sweeps"

    def load_config(self, config_path: str) -> ConfigResult:
        return super().load_config(_within(config_path) or "")

    def available(self) -> bool:
        return Path(self.path).is_dir()

    def is_group(self, config_path: str) -> bool:
        return config_path in ("", GROUP)

    def is_config(self, config_path: str) -> bool:
        name = _within(config_path)
        return name is not None and super().is_config(name)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path == "":
            return [] if results_filter == ObjectType.CONFIG else [GROUP]
        if config_path != GROUP or results_filter == ObjectType.GROUP:
            return []
        return sorted(path.stem for path in Path(self.path).glob("*.yaml"))


def _within(config_path: str) -> str | None:
    """Return the part of a path after `sweeps/`; None for any other path."""
    head, _, name = config_path.partition("/")
    return name if head == GROUP and name else None
