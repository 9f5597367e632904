"""Mask passwords and keys in texts that are shown, logged, written or sent, and cut paths that could reveal a person or site."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import unquote

SECRET_KEY = re.compile(
    r"(?:^|[_.\-])(?:token|secret|(?:ssl)?passw(?:or)?d|passphrase|pwd|pass|api_?key|credentials?|passfile|sslkey)$",
    re.IGNORECASE,
)
"""Names of keys whose values are secrets, or files with secrets: it matches `tracker.api_key` and `sslpassword`, but not
`trainer.batch_tokens`."""
MASK = "***"
_USER_INFO = (re.compile(r"(://[^:/@\s]*):\S*@"), re.compile(r"(://[^:/@\s]*):[^@]*@"))
"""Match the password in a URL. A password may hold an @, or a space that nobody encoded: it ends at the last @ of the
word or, if the word has none, at the first @ after it."""
FOLDERS = re.compile(r"(?<![\w:/.])(?:~|\.{1,2})?/(?:[^\s,\]\[/'\"]+/)*")
"""Matches the folders of absolute paths, and of those from the present or the home folder."""
_KEY = re.compile(r"([\w.%\-]+)=")
_VALUE = re.compile(r"'[^']*'?|\"[^\"]*\"?|[^\s&'\"]*")


def is_secret(key: str) -> bool:
    """Return whether the value of a key is a secret that must not be shown.

    >>> is_secret("tracker.api_key"), is_secret("sslpassword"), is_secret("trainer.batch_tokens")
    (True, True, False)
    """
    return SECRET_KEY.search(unquote(key)) is not None


def masked(text: str) -> str:
    """Return a text without the passwords of its URLs and without the values of secret keys in `KEY=VALUE`.

    >>> masked("postgresql://ann:secret@db:5432/optuna")
    'postgresql://ann:***@db:5432/optuna'
    >>> masked("postgresql://db/optuna?user=ann&password=secret&sslmode=require")
    'postgresql://db/optuna?user=ann&password=***&sslmode=require'
    >>> masked("train.py -m +model.hf_token=hf_1 seed=0,1")
    'train.py -m +model.hf_token=*** seed=0,1'
    """
    for pattern in _USER_INFO:
        text = pattern.sub(rf"\1:{MASK}@", text)
    parts, end = [], 0
    for key in _KEY.finditer(text):
        value = _VALUE.match(text, key.end())
        if key.start() >= end and is_secret(key[1]) and value is not None and value[0]:
            parts += [text[end : key.end()], MASK]
            end = value.end()
    return "".join([*parts, text[end:]])


def without_private(value: Any) -> Any:
    """Return a copy in which paths are cut to their last part and secrets are masked.

    Folder names can reveal a user, site or patient. A text counts as a path if it is absolute, begins with `./`, `../` or `~`,
    or contains a slash and exists; the name of a model with a slash stays. Secrets are the values of keys such as `token` and
    `api_key`, and the user name and password of a URL.

    >>> without_private({"root": "/home/ann/mimic", "files": ["~/a.csv", "../ward_7/b.csv"], "model": "org/name"})
    {'root': 'mimic', 'files': ['a.csv', 'b.csv'], 'model': 'org/name'}
    >>> without_private({"hf_token": "hf_1", "batch_tokens": 4096, "storage": "postgresql://ann:pw@db/x"})
    {'hf_token': '***', 'batch_tokens': 4096, 'storage': 'postgresql://***@db/x'}
    >>> without_private("sqlite:////home/ann/study.db")
    'sqlite:study.db'
    """
    if isinstance(value, Mapping):
        return {
            key: MASK if item is not None and is_secret(str(key)) else without_private(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_private(item) for item in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        return value
    if value.startswith(("sqlite:", "file:")):
        return masked(f"{value.split(':')[0]}:{PurePosixPath(value).name}")
    if "://" in value:
        return masked(re.sub(r"(://)[^/@]*@", rf"\1{MASK}@", masked(value)))
    if value.startswith(("/", "~", "./", "../")) or PureWindowsPath(value).is_absolute() or _is_there(value):
        return PureWindowsPath(value).name if "\\" in value else PurePosixPath(value).name
    return masked(value)


def without_folders(override: str) -> str:
    """Return an override without its secrets, and without the folders of every path in its value, within lists too.

    >>> without_folders("data.lookups=[/data/ann/a.csv,~/b.csv]"), without_folders("model=gbm"), without_folders("+x.api_key=k")
    ('data.lookups=[a.csv,b.csv]', 'model=gbm', '+x.api_key=***')
    """
    key, equals, value = override.partition("=")
    if not equals:
        return override
    kept = str(without_private({key.lstrip("+"): value})[key.lstrip("+")])
    return f"{key}={FOLDERS.sub('', kept)}"


def _is_there(value: str) -> bool:
    try:
        return "/" in value and Path(value).exists()
    except (OSError, ValueError):  # a text that is too long or contains a null byte is no path
        return False
