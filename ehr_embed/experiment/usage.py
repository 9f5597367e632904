"""`--help` of the commands that take keys and no groups: the head of their YAML file, and the comments of its keys."""

from __future__ import annotations

import re

from ehr_embed.core.programs import as_typed, shipped

SELF_DESCRIBED = ("ask", "explain", "generate", "predict")
"""Commands whose configurations have no groups; Hydra would list those of a training run, of which they take none."""


def usage(config_name: str) -> str:
    """Return the help of a command: the head of its configuration, then its keys with their comments and defaults.

    >>> print(usage("predict").splitlines()[0][:49])
    Predict the class probabilities of a finished run
    >>> "output: ???" in usage("predict"), "hydra" in usage("predict").lower().replace("hydra_full_error", "")
    (True, False)
    """
    text = (shipped("conf") / f"{config_name}.yaml").read_text(encoding="utf-8")
    head, _, rest = text.partition("defaults:\n")
    head = re.sub(r"^# ?", "", head, flags=re.MULTILINE).strip()
    keys = re.sub(r"\A(?:  - .*\n)*", "", rest).partition("\nhydra:\n")[0].strip()
    return as_typed(
        f"{head}\n\nKeys, which are given as KEY=VALUE (??? = must be given; a key inside another is OUTER.INNER=VALUE):\n\n"
        f"{keys}\n\n"
        "HYDRA_FULL_ERROR=1 shows tracebacks."
    )
