"""Texts embedded a second: distinct ones in batches of similar length against one `encode` call a text.

    python -m benchmarks.embedding
    python -m benchmarks.embedding --bfloat16 1
    python -m benchmarks.embedding --texts 20000 --distinct 2000 --device cuda

Texts are those of events, most of which repeat. `ratio` is over all of them; `ratio_distinct` is over the distinct ones, so
without what leaving out the repeated ones gains. The calls, one a text, are timed on the first `--calls`, in float32 always; ours
are in float32, the default, or with `--bfloat16 1` as with embedder.dtype=bfloat16.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.common import alternate, parser, ratio, report, seconds
from ehr_embed.embedders.sentence_transformer import SentenceTransformerEmbedder
from ehr_embed.embedding.vector_cache import embed_texts

ORGANS = (
    "liver",
    "kidney",
    "left ventricle",
    "lung",
    "thyroid gland",
    "spinal cord",
    "skin of the lower leg",
    "pancreas",
)
FINDINGS = ("Measurement of {} function", "Malignant neoplasm of {}, unspecified", "Injury of {}", "Ultrasound of {}")


def event_texts(n: int, n_distinct: int) -> list[str]:
    """Texts of events, 20 to 80 characters, by Zipf's law; each of the distinct ones at least once where n allows."""
    distinct = [
        f"{finding.format(organ)}, {number} mmol/L" + " in serum or plasma by spectrophotometry" * (number % 2)
        for number, finding, organ in itertools.islice(
            ((i, f, o) for i in itertools.count() for f in FINDINGS for o in ORGANS), n_distinct
        )
    ]
    draws = np.random.default_rng(0).zipf(1.3, max(0, n - n_distinct)) % n_distinct
    return [*distinct, *(distinct[i] for i in draws)][:n]


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    options = parser(__doc__, texts=10_000, distinct=1000, calls=100, repeats=3, bfloat16=0).parse_args(arguments)
    texts = event_texts(options.texts, options.distinct)
    ours, single = (
        SentenceTransformerEmbedder(model="bundled", device=options.device, dtype=dtype)
        for dtype in ("bfloat16" if options.bfloat16 else "float32", "float32")
    )
    vectors: dict[str, npt.NDArray[np.float32]] = {}

    def batched() -> float:
        with tempfile.TemporaryDirectory() as cache:
            took = seconds(lambda: vectors.update(ours=embed_texts(ours, texts, cache_dir=Path(cache))), options.device)
        return len(texts) / took

    def one_by_one() -> float:
        first = texts[: options.calls]
        took = seconds(lambda: vectors.update(single=np.stack([single.embed([x])[0] for x in first])), options.device)
        return len(first) / took

    ours.embed(texts[:8])  # loads the weights
    single.embed(texts[:1])
    rates = alternate({"ours": batched, "one_call_a_text": one_by_one}, options.repeats)
    both = (vectors["ours"][: options.calls], vectors["single"])
    similarity = np.prod([x / np.linalg.norm(x, axis=1, keepdims=True) for x in both], axis=0).sum(1)
    gain, n_distinct = ratio(rates["ours"], rates["one_call_a_text"]), len(set(texts))
    report(
        "embedding",
        {f"texts_per_s_{name}": statistics.median(values) for name, values in rates.items()}
        | {"ratio": gain, "ratio_distinct": gain * n_distinct / len(texts), "smallest_cosine": float(similarity.min())}
        | {
            "n_texts": len(texts),
            "n_distinct": n_distinct,
            "n_calls": len(similarity),
            "repeats": options.repeats,
            "bfloat16": options.bfloat16,
        },
        dataset="synthetic event texts, all-MiniLM-L6-v2",
        device=options.device,
    )


if __name__ == "__main__":
    main()
