"""Import the original pipeline's tokenised corpus, pickled lists of token ids, once as MEDS.

Layout: `<data_dir>/{train,tuning,held_out}/*.pkl`, each a list of {'subject_id', 'tokens': [int], 'timestamps': [seconds since
1970, 0 = static]}; vocab.csv (token, str); labels.csv (subject_id, is_case and, where known, site, cancerdate).
Every token becomes an event whose code is its string. The formats are those written by
https://github.com/Ashvin-Gupta/CancEHR-Tokenisation and read by https://github.com/Ashvin-Gupta/CancEHR-Training.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import digest, file_sha256
from ehr_embed.core.fingerprints import fingerprint, known_fingerprints
from ehr_embed.core.lost_data import say_or_refuse
from ehr_embed.core.plain_pickle import load_pickle
from ehr_embed.core.progress import ProgressBar
from ehr_embed.core.settings import Count, Told, checked
from ehr_embed.sources.case_labels import CaseLabels, read_case_labels
from ehr_embed.sources.imported import find_shards, import_folder, import_once
from ehr_embed.sources.meds import MedsSource
from ehr_embed.sources.meds_writer import MedsWriter
from ehr_embed.sources.protocol import SPLITS
from ehr_embed.sources.token_texts import LOOKUPS, read_lookup, read_rules, read_token_strings, token_text

log = logging.getLogger(__name__)
KEYS = ("subject_id", "tokens", "timestamps")
END_TOKEN = "<end>"
CODES: dict[str, Any] = {"code": pl.String, "description": pl.String}


@checked("data")
def tokenized_source(
    *,
    data_dir: str | None,
    vocab_filepath: str | None,
    labels_filepath: str | None,
    lookup_files: Mapping[str, str | None],
    prefixes: Mapping[str, Any],
    prefix_file: str | None = None,
    cutoff_months: Annotated[Count, Told("1 or more months", remedy="null keeps all events.")] | None = None,
    root: str | None = None,
    cache_dir: str = "cache",
    overwrite: bool = False,
    splits: str | None = None,
    split_column: str = "split",
) -> MedsSource:
    """Import the corpus unless that is done, and open the import as a MEDS dataset.

    Args:
        data_dir: folder with train/, tuning/ and held_out/.
        vocab_filepath: CSV with columns token,str.
        labels_filepath: CSV with columns subject_id,is_case and, where known, site,cancerdate.
        lookup_files: for each of medical, lab, region, time a CSV with columns code,term, or None.
        prefixes: rules that turn token strings into texts, see `token_texts`.
        prefix_file: YAML with further rules, which take precedence.
        cutoff_months: months before `cancerdate` from which on events are left out; None = all events are kept.
        root: folder for the MEDS dataset; None = a folder of the cache.
        cache_dir: folder of the cache.
        overwrite: whether to import again.
        splits, split_column: as for `MedsSource`.

    Raises:
        UserError: a file is missing, damaged or not in this layout, or the import was made from other files.
    """
    shards = find_shards(data_dir, ".pkl", "python train.py data=tokenized data.data_dir=DIR data.vocab_filepath=FILE")
    strings = read_token_strings(vocab_filepath)
    rules = read_rules(prefixes, prefix_file)
    lookups = {name: read_lookup(name, lookup_files.get(name)) for name in LOOKUPS}
    cases = read_case_labels(labels_filepath)
    folder = import_folder(root=root, cache_dir=cache_dir, data_dir=data_dir, settings=cutoff_months)
    base = Path(str(data_dir))
    files = {"vocab_filepath": vocab_filepath, "labels_filepath": labels_filepath}
    files |= {f"{name}_lookup_filepath": path for name, path in lookup_files.items()}
    with known_fingerprints(Path(cache_dir)):
        corpus_files = {str(path.relative_to(base)): fingerprint(path) for paths in shards.values() for path in paths}
    made_from: dict[str, Any] = {
        **corpus_files,
        **{name: file_sha256(path)[:16] for name, path in files.items() if path},
        "cutoff_months": cutoff_months,
        "prefixes": digest({name: rule.__dict__ for name, rule in rules.items()}),
    }

    def write(target: Path) -> None:
        writer = MedsWriter(target, base.name)
        texts = {string: token_text(string, rules, lookups) for string in strings.values() if string}
        writer.add_codes(
            pl.DataFrame({"code": list(texts), "description": list(texts.values())}, schema_overrides=CODES)
        )
        corpus = Corpus(strings, cases, cutoff_months)
        for split, path in ProgressBar([(s, p) for s in SPLITS for p in shards[s]], desc="import", unit="shard"):
            writer.add_shard(split, corpus.events(path))
        corpus.tell_left_out(cutoff_months)
        for name, labels in cases.label_sets(corpus.last_times(), cutoff_months).items():
            writer.add_labels(name, labels)
        writer.finish()

    import_once(folder, made_from, write, overwrite=overwrite)
    return MedsSource(
        root=str(folder), name=Path(str(data_dir)).resolve().name, splits=splits, split_column=split_column
    )


class Corpus:
    """Read shards as events, and collect each subject's last time."""

    def __init__(self, strings: dict[int, str], cases: CaseLabels, cutoff_months: int | None) -> None:
        self.strings = pl.DataFrame({"token": list(strings), "code": list(strings.values())})
        self.cutoffs = cases.cutoffs(cutoff_months)
        self.seen: dict[int, Path] = {}
        self.last: list[pl.DataFrame] = []
        self.n_events = self.n_cut = self.n_empty = 0

    def last_times(self) -> pl.DataFrame:
        """Return subject_id and last_time, the time of the last kept event; null if only static events were kept."""
        return pl.concat(self.last)

    def tell_left_out(self, cutoff_months: int | None) -> None:
        """Warn if the cut-off left out events, or if records have no events.

        Raises:
            UserError: nearly all events, or nearly all records, are left out.
        """
        say_or_refuse(
            self.n_cut,
            self.n_events,
            f"events lie {cutoff_months} months before their subject's cancerdate or later, and are left out",
            remedy="Check data.cutoff_months and the column cancerdate of labels.csv.",
        )
        say_or_refuse(
            self.n_empty,
            len(self.seen),
            "records have no tokens, or none that the cut-off left; their subjects are left out",
            remedy="Check the tokenised corpus, data.cutoff_months and the column cancerdate of labels.csv.",
        )

    def events(self, path: Path) -> pl.DataFrame:
        """Return subject_id, time, code, numeric_value of a shard's events that the cut-off keeps.

        The events of a subject are in order of time, static ones first.

        Raises:
            UserError: a record is not in this layout, a token has no string, or a subject has a record already.
        """
        records = load_pickle(path)
        if not isinstance(records, list):
            raise UserError(
                f"{path}: expected a list of records with {', '.join(KEYS)}, found {type(records).__name__}."
            )
        parts = [self._record(path, number, record) for number, record in enumerate(records)]
        subject, tokens, times = (np.concatenate([part[i] for part in parts] or [np.empty(0)]) for i in range(3))
        frame = pl.DataFrame(
            {
                "subject_id": subject.astype(np.int64),
                "token": tokens.astype(np.int64),
                "seconds": times.astype(np.float64),
            }
        )
        frame = frame.join(self.strings, on="token", how="left", maintain_order="left")
        if len(strange := frame.filter(pl.col("code").is_null() | (pl.col("code") == ""))):
            raise UserError(
                f"{path}: subject {strange['subject_id'][0]} has token {strange['token'][0]}, which has no string in "
                f"vocab.csv ({strange['token'].n_unique()} such tokens). Its events would have no text: point "
                "data.vocab_filepath at the vocab.csv of this corpus."
            )
        seconds = pl.col("seconds")
        frame = frame.with_columns(
            time=pl.when(seconds != 0).then((seconds * 1e6).round().cast(pl.Int64)).cast(pl.Datetime("us"))
        )
        kept = self._cut(path, frame)
        self.n_events, self.n_cut = self.n_events + len(frame), self.n_cut + len(frame) - len(kept)
        self.n_empty += len(records) - kept["subject_id"].n_unique()
        return kept

    def _record(self, path: Path, number: int, record: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if not isinstance(record, dict) or not set(KEYS) <= set(record):
            found = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
            raise UserError(f"{path}, record {number}: expected a dict with {', '.join(KEYS)}, found {found}.")
        try:
            subject = int(record["subject_id"])
            tokens = np.asarray(record["tokens"])
            times = np.array([0.0 if time is None else time for time in record["timestamps"]], np.float64)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{path}, record {number}: subject_id, tokens or timestamps are not numbers ({error})."
            ) from error
        if len(tokens) and tokens.dtype.kind not in "iu":
            raise UserError(f"{path}, subject {subject}: expected integer tokens, found {tokens.dtype}.")
        if len(tokens) != len(times) or not np.isfinite(times).all():
            raise UserError(
                f"{path}, subject {subject}: {len(tokens)} tokens and {len(times)} timestamps, "
                f"{int((~np.isfinite(times)).sum())} of them NaN or infinite; expected one finite time per token."
            )
        if subject in self.seen:
            raise UserError(
                f"subject {subject} is in both {self.seen[subject]} and {path}. A model would be tested on subjects that "
                "it was trained on; keep each subject in one record."
            )
        self.seen[subject] = path
        return np.full(len(tokens), subject), tokens, times

    def _cut(self, path: Path, frame: pl.DataFrame) -> pl.DataFrame:
        frame = frame.join(self.cutoffs, on="subject_id", how="left", maintain_order="left")
        is_end, time = pl.col("code") == END_TOKEN, pl.col("time")
        kept = frame.filter(time.is_null() | pl.col("cutoff").is_null() | (time < pl.col("cutoff")) | is_end)
        last = kept.group_by("subject_id", maintain_order=True).agg(last_time=time.filter(~is_end).max())
        self.last.append(last)
        # The end mark is kept as in the original pipeline, since otherwise only uncut records would have one. It moves
        # to the last kept event, since its old time would reveal how much was cut.
        kept = kept.join(last, on="subject_id", how="left", maintain_order="left")
        kept = kept.with_columns(time=pl.when(is_end).then("last_time").otherwise("time")).with_row_index("row")
        first = pl.col("row").min().over("subject_id")
        ordered = kept.with_columns(first=first).sort("first", "time", "row", nulls_last=False)
        moved = int((ordered["row"] != kept["row"]).sum())
        if moved:
            log.warning("%s: %d events were not in order of time; they are now, static ones first", path, moved)
        return ordered.select("subject_id", "time", "code", numeric_value=pl.lit(None, dtype=pl.Float32))
