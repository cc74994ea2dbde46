"""The command that looks datasets over before training: reads, measures, reports; changes nothing."""

from __future__ import annotations

import os
import sys
import time
from contextlib import closing
from pathlib import Path

from backend.config.cache import CheckDatasetOptions
from backend.config.cache_checks import check_dataset_options
from backend.config.dataset import DatasetConfig, DatasetEntry, load_dataset_config
from backend.data.buckets import Nabla
from backend.data.lint.captions import caption_findings
from backend.data.lint.facts import FactStore
from backend.data.lint.finding import Finding
from backend.data.lint.media import Checked, broken_finding, duplicate_findings, rate_findings, source_findings
from backend.data.lint.report import Coverage, to_json, to_text
from backend.data.lint.survey import survey
from backend.data.lint.tokens import TokenCounter
from backend.data.scan import Scan, scan_dataset
from backend.data.watchdog import MediaReader
from backend.errors import Problem, Problems, Stopped, UserError
from backend.files import check_writable, write_atomic
from backend.progress import ItemMeter, Reporter

REPORT_FILE = "findings.json"
# Measurements are stored this often, so that a run that is ended does not begin again.
_SAVE_SECONDS = 20.0


def report_findings(options: CheckDatasetOptions, reporter: Reporter, run_dir: Path | None) -> list[str]:
    """Look over the enabled datasets of `options.dataset_config`; returns the files that were written.

    The report goes to stdout as text or JSON, as JSON also to `options.output` and to `findings.json` in `run_dir`.
    Of each source the first look is kept in its dataset's cache folder, see `backend.data.lint.facts`.

    Raises:
        Problems: mistakes in the request.
        Stopped: somebody asked for it; what was measured is kept.
    """
    config, counter = _read_request(options)
    for notice in config.notices:
        reporter.warning(notice)
    if counter is None:
        reporter.warning(
            Problem("text_encoder_qwen", "is not given, so the tokens of captions are not counted against the limit.")
        )
    reporter.phase("scan", "Looking for sources.")
    scans = [(entry, scan_dataset(entry)) for entry in config.enabled]
    findings, checked = _measure(scans, options, reporter)
    nabla = _nabla(options)
    for entry, scan in scans:
        findings += caption_findings(entry, scan, counter, options.trigger_word)
        findings += rate_findings(entry, [one for one in checked if one.entry is entry])
    for one in checked:
        findings += source_findings(one, nabla)
    findings += duplicate_findings(checked)
    coverage = [
        Coverage(entry.index, len(scan.sources), sum(one.entry is entry for one in checked)) for entry, scan in scans
    ]
    return _write(options, run_dir, coverage, findings)


def _read_request(options: CheckDatasetOptions) -> tuple[DatasetConfig, TokenCounter | None]:
    problems = check_dataset_options(options)
    counter = None
    if options.text_encoder_qwen is not None:
        try:
            counter = TokenCounter(options.text_encoder_qwen)
        except UserError as error:
            problems += error.problems
    if options.output is not None:
        try:
            check_writable(Path(options.output), "output")
        except UserError as error:
            problems += error.problems
    if problems or options.dataset_config is None:
        raise Problems(problems)
    return load_dataset_config(options.dataset_config), counter


def _nabla(options: CheckDatasetOptions) -> Nabla:
    return "stretch" if options.nabla_stretch else options.nabla_resize


def _measure(
    scans: list[tuple[DatasetEntry, Scan]], options: CheckDatasetOptions, reporter: Reporter
) -> tuple[list[Finding], list[Checked]]:
    """Findings about sources that cannot be used, and what is known of the others, in the order of the datasets."""
    workers = options.num_workers or max(2, (os.cpu_count() or 2) - 1)
    total = sum(len(scan.sources) for _, scan in scans)
    reporter.phase("scan", f"Looking at {total} sources.")
    meter = reporter.item_meter(total, "sources")
    findings: list[Finding] = []
    checked: list[Checked] = []
    with MediaReader(workers) as reader:
        for entry, scan in scans:
            findings += [broken_finding(entry.index, problem.field or "", problem.message) for problem in scan.problems]
            findings += _measure_dataset(entry, scan, checked, reader, workers, reporter, meter)
    return findings, checked


def _measure_dataset(
    entry: DatasetEntry,
    scan: Scan,
    checked: list[Checked],
    reader: MediaReader,
    workers: int,
    reporter: Reporter,
    meter: ItemMeter,
) -> list[Finding]:
    facts = FactStore(entry)
    outcomes = {}
    saved = time.monotonic()
    try:
        with closing(survey(entry, scan.sources, facts, reader, workers)) as measuring:
            for source, outcome in measuring:
                outcomes[source] = outcome
                meter.done(item=source.identity, dataset=entry.index)
                if reporter.requested() is not None:
                    reader.close()
                    raise Stopped("Stopped. What was measured is kept.")
                if time.monotonic() - saved > _SAVE_SECONDS:
                    facts.save(whole=False)
                    saved = time.monotonic()
    finally:
        _save(facts, entry, reporter, whole=len(outcomes) == len(scan.sources))
    findings = []
    for source in scan.sources:
        outcome = outcomes[source]
        if isinstance(outcome, UserError):
            findings.append(broken_finding(entry.index, source.identity, outcome.message))
        else:
            checked.append(Checked(entry, source, outcome))
    return findings


def _save(facts: FactStore, entry: DatasetEntry, reporter: Reporter, whole: bool) -> None:
    """A folder that may be read but not written is checked all the same; only the next look takes as long again."""
    try:
        facts.save(whole)
    except (UserError, OSError) as error:
        field = f"datasets[{entry.index}].cache_directory"
        reporter.warning(Problem(field, f"cannot keep what was measured ({error}). The next check measures it again."))


def _write(
    options: CheckDatasetOptions, run_dir: Path | None, coverage: list[Coverage], findings: list[Finding]
) -> list[str]:
    document = to_json(coverage, findings)
    outputs = []
    for path in (Path(options.output) if options.output is not None else None, run_dir and run_dir / REPORT_FILE):
        if path is not None:
            write_atomic(path, document)
            outputs.append(path.name if path.parent == run_dir else str(path))
    sys.stdout.write(document if options.report_format == "json" else to_text(coverage, findings))
    sys.stdout.flush()
    return outputs
