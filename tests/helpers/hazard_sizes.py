"""Sizes of a small hazard head."""

from __future__ import annotations

from ehr_embed.models.hazards import HazardSizes


def sizes(**changed) -> HazardSizes:
    facts = {
        "edges": [0.0, 2.0, 5.0],
        "width": 4,
        "names": ["a", "b"],
        "tokens": [[2], [3, 4]],
        "log_rates": [[-3.0] * 3, [-4.0] * 3],
        "token_log_rates": [-9.0, -9.0, -3.0, -4.5, -4.5, -5.0],
        "bin_log_ratios": [0.0, 0.0, 0.0],
        "competing": [],
        "competes": [False, False],
    }
    return HazardSizes(**(facts | changed))
