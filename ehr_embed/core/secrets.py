"""Mask passwords and keys in texts that are shown, logged, written or sent."""

from __future__ import annotations

import re
from urllib.parse import unquote

SECRET_KEY = re.compile(
    r"(?:^|[_.\-])(?:token|secret|(?:ssl)?passw(?:or)?d|passphrase|pwd|pass|api_?key|credentials?|passfile|sslkey)$",
    re.IGNORECASE,
)
"""Matches the names whose values are secrets or files with secrets; `batch_tokens` does not match."""
MASK = "***"
_USER_INFO = (re.compile(r"(://[^:/@\s]*):\S*@"), re.compile(r"(://[^:/@\s]*):[^@]*@"))
"""Match the password in a URL. A password may hold an @, or a space that nobody encoded: it ends at the last @ of the
word or, if the word has none, at the first @ after it."""
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
