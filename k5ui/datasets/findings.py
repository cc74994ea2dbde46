"""What the newest check of a dataset found, which findings a person ignores, and the runs that look."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backend.errors import UserError
from backend.files import write_atomic
from k5ui.datasets.keys import source_key

CHECK_KIND = "check_dataset"
REPORT_FILE = "findings.json"
REVISION_FILE = "dataset_revision.txt"
_MAX_REPORT_BYTES = 64 << 20
_MAX_IGNORED = 100_000
_FIELDS = ("id", "kind", "severity", "dataset", "identities", "message", "values", "fixes")


class Ignored:
    """The ids of findings that a person ignores, one file for each dataset."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._guard = threading.Lock()

    def ids(self, dataset: str) -> set[str]:
        """The ignored ids; empty if there are none or the file is damaged."""
        values = _read_json(self.folder / f"{dataset}.json")
        ids = values.get("ids") if values else None
        return {item for item in ids if isinstance(item, str)} if isinstance(ids, list) else set()

    def change(self, dataset: str, ids: Sequence[str], on: bool) -> None:
        """Ignore findings, or (False) do so no longer.

        Raises:
            UserError: there are too many, or the file cannot be written.
        """
        with self._guard:
            after = self.ids(dataset) | set(ids) if on else self.ids(dataset) - set(ids)
            if len(after) > _MAX_IGNORED:
                raise UserError("There are too many ignored findings. Exclude the sources instead.")
            values = {"version": 1, "ids": sorted(after)}
            write_atomic(self.folder / f"{dataset}.json", json.dumps(values) + "\n")


class Reports:
    """Reads the reports of finished checks; each file once as long as it does not change."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._known: dict[Path, tuple[tuple[int, int], dict[str, Any]]] = {}

    def read(self, folder: Path) -> dict[str, Any] | None:
        """The report in a run folder: sources, checked, findings with `keys`; None if there is none that is whole."""
        path = folder / REPORT_FILE
        try:
            status = os.stat(path)
        except OSError:
            return None
        stamp = (status.st_mtime_ns, status.st_size)
        with self._guard:
            known = self._known.get(path)
        if known is None or known[0] != stamp:
            values = _read_json(path)
            if values is None:
                return None
            known = (stamp, _report(values))
            with self._guard:
                self._known = dict(list(self._known.items())[-20:]) | {path: known}
        return known[1]


def _report(values: Mapping[str, Any]) -> dict[str, Any]:
    tables = [table for table in _list(values.get("datasets")) if isinstance(table, dict)]
    found = [_finding(item) for item in _list(values.get("findings")) if isinstance(item, dict)]
    return {
        "sources": sum(_whole(table.get("sources")) for table in tables),
        "checked": sum(_whole(table.get("checked")) for table in tables),
        "findings": [item for item in found if item is not None],
    }


def _finding(item: Mapping[str, Any]) -> dict[str, Any] | None:
    """A finding of a report with the keys of its sources; None if it is not one."""
    identities = [name for name in _list(item.get("identities")) if isinstance(name, str)]
    texts = all(isinstance(item.get(name), str) for name in ("id", "kind", "severity", "message"))
    if not texts or type(item.get("dataset")) is not int:
        return None
    values = item.get("values")
    values = values if isinstance(values, dict) else {}
    datasets = _list(values.get("datasets"))
    places = datasets if len(datasets) == len(identities) else [item["dataset"]] * len(identities)
    keys = [source_key(_whole(place), name) for place, name in zip(places, identities, strict=True)]
    shown = {name: item.get(name) for name in _FIELDS} | {"identities": identities, "values": values, "keys": keys}
    return shown | {"fixes": [fix for fix in _list(item.get("fixes")) if isinstance(fix, str)]}


def by_key(findings: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Short forms (id, kind, severity) of the findings that are not ignored, by the key of each source."""
    found: dict[str, list[dict[str, Any]]] = {}
    for finding in findings:
        if not finding.get("ignored"):
            short = {name: finding[name] for name in ("id", "kind", "severity")}
            for key in dict.fromkeys(finding["keys"]):
                found.setdefault(key, []).append(short)
    return found


def counts(findings: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many findings of each kind are not ignored."""
    return dict(Counter(finding["kind"] for finding in findings if not finding.get("ignored")))


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as handle:
            content = handle.read(_MAX_REPORT_BYTES + 1)
        values = json.loads(content, parse_constant=lambda word: None) if len(content) <= _MAX_REPORT_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _whole(value: Any) -> int:
    return value if type(value) is int else 0
