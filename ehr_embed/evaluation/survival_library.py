"""Refuse survival analysis without its library, which is an extra: it is under the GPL 3, and this package under Apache 2.0."""

from __future__ import annotations

from importlib.util import find_spec

from ehr_embed.core.errors import UserError

LIBRARY = "sksurv"


def check_survival_library() -> None:
    """Refuse to go on if scikit-survival is not installed.

    Raises:
        UserError: says how to install it.
    """
    if find_spec(LIBRARY) is None:
        raise UserError(
            "times to named outcomes are evaluated with scikit-survival, which is missing: it is an extra, since it is under the "
            "GPL 3. Type: pip install 'ehr_embed[survival]', or task.outcomes=auto, which does not need it"
        )
