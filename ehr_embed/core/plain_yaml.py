"""Read YAML as configurations are written: 1e-3 is a number, a date is text, and a key that occurs twice is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

_EXPONENT = re.compile(r"^[-+]?(?:\d+(?:_\d+)*(?:\.[\d_]*)?|\.\d+)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """Load YAML as OmegaConf and Hydra do; in PyYAML's YAML 1.1, `1e-3` is a text and 2020-01-31 a date."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if repeated := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {repeated[0]} stands twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789."))


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file as plain values.

    Raises:
        yaml.YAMLError: the file is no YAML, or a key occurs twice.
        OSError: the file cannot be read.
    """
    with path.open(encoding="utf-8") as file:
        loader = _Loader(file)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
