"""What Hydra must know before an entry point composes: the sweeper, and where sweeps/ lies from any working directory."""

from __future__ import annotations

from pathlib import Path

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin

from ehr_embed.search.sweeper import StudySweeper

SWEEPS = Path(__file__).resolve().parents[2] / "sweeps"
GROUP = "sweeps"


def register() -> None:
    """Make `hydra/sweeper=study` and `sweeps=NAME` known to Hydra; once more does no harm."""
    plugins = Plugins.instance()
    plugins.register(StudySweeper)
    plugins.register(SweepsSource)
    plugins.register(SweepsSearchPath)
    # Hydra accepts sweepers from packages of its own namespace alone. This project is an application, not a package
    # that plants modules into another's namespace, so it widens the check of this process by its one sweeper.
    plugins.is_in_toplevel_plugins_module = is_plugin_module  # type: ignore[method-assign,assignment]


def is_plugin_module(name: str) -> bool:
    """Whether Hydra may load the plugin `name`: its own, installed ones, and the study's sweeper.

    >>> is_plugin_module("ehr_embed.search.sweeper.StudySweeper"), is_plugin_module("os.system")
    (True, False)
    """
    own = f"{StudySweeper.__module__}.{StudySweeper.__name__}"
    return name == own or Plugins.is_in_toplevel_plugins_module(name)


class SweepsSearchPath(SearchPathPlugin):
    """Adds the repository's sweeps/ to every application's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("ehr_embed", f"{SweepsSource.scheme()}://{SWEEPS}")


class SweepsSource(FileConfigSource):
    """The folder sweeps/ as the config group `sweeps`, and nothing beside it.

    A search path of Hydra's names the folder above its groups; that would be the repository, and make a group of each of
    its folders.
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
    """The part after `sweeps/`; None for any other path."""
    head, _, name = config_path.partition("/")
    return name if head == GROUP and name else None
