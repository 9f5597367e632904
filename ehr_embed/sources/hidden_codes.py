"""Hide a share of the codes from train, to measure how well a model does on codes that it was not trained on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import polars as pl
from pydantic import Field

from ehr_embed.core.settings import Seed, Told, check_setting
from ehr_embed.sources.protocol import SHARED, Source

HiddenShare = Annotated[float, Field(ge=0, lt=1), Told("a share in [0, 1)", example="0", remedy="0 hides no code.")]


class HiddenCodes:
    """Source that leaves train's events of some codes out of another source; tuning and held_out keep all events.

    Whether a code is hidden depends on its name and the seed alone, not on its events. MEDS_BIRTH and MEDS_DEATH are never hidden:
    without a birth, train would lose its subjects' ages, and not a code alone.

    Args:
        inner: the other source.
        share: share of the codes to hide; every code is drawn independently.
        seed: seed of the draw.

    Raises:
        UserError: the share is not in [0, 1).
    """

    def __init__(self, inner: Source, *, share: HiddenShare, seed: Seed = 0) -> None:
        check_setting("data.hidden_codes", share, HiddenShare)
        check_setting("data.hidden_seed", seed, Seed)
        self.inner, self.share, self.seed = inner, share, seed
        # Earlier versions hid MEDS_BIRTH too; their stores have the name with -hidden-.
        self.name = f"{inner.name}-hiding-{share:g}-{seed}"
        self.labels_dir, self.shards, self.writes = inner.labels_dir, inner.shards, inner.writes

    def read(self, shard: Path) -> pl.DataFrame:
        events = self.inner.read(shard)
        codes = events["code"].unique()
        hidden = [code for code in codes if is_hidden(code, self.share, self.seed)]
        return events.filter((pl.col("split") != "train") | ~pl.col("code").is_in(hidden))

    def code_metadata(self) -> pl.DataFrame:
        return self.inner.code_metadata()

    def fingerprint(self) -> dict[str, Any]:
        return self.inner.fingerprint() | {"hidden_codes": [self.share, self.seed]}


def is_hidden(code: str, share: float, seed: int) -> bool:
    """Return whether a code is among the share of codes that the seed draws; MEDS's own never are.

    >>> codes = [f"LAB//{i}" for i in range(1000)]
    >>> 150 < sum(is_hidden(code, 0.2, 0) for code in codes) < 250
    True
    """
    if code.partition("//")[0] in SHARED:
        return False
    drawn = hashlib.blake2b(f"{seed} {code}".encode(), digest_size=8).digest()
    return int.from_bytes(drawn, "big") < share * 2**64
