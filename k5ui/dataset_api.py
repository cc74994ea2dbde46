"""The read-only routes of the Dataset tab: datasets, their items, pictures of them, findings, folders to choose from.

A picture is named by dataset, source and clip, all of which must have been found by a look at the dataset: no address
can name a file. What does not exist, may not be read or cannot be shown is a 404 with a sentence.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi import Path as PathParameter
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, Response

from backend.config.dataset import DatasetEntry
from backend.data.formats import MediaError
from backend.data.items import Item
from backend.errors import K5Error, UserError
from k5ui.datasets import linting, pages
from k5ui.datasets.folders import browse
from k5ui.datasets.known import KnownDataset
from k5ui.datasets.library import WAIT_SECONDS
from k5ui.datasets.previews import Busy
from k5ui.datasets.snapshot import Row

if TYPE_CHECKING:
    from k5ui.services import Services

Answer = Callable[..., Response]
MAX_PAGE = 200
_POLICY = "default-src 'none'; media-src 'self'; img-src 'self'; style-src 'unsafe-inline'; sandbox"
_TYPES = {".webp": "image/webp", ".mp4": "video/mp4"}
_BUCKET = re.compile(r"(\d{1,5})x(\d{1,5})x(\d{1,6})")
_LARGEST = 2**31
_MAX_CLIP = 1_000_000

DatasetId = Annotated[str, PathParameter(max_length=100)]
Key = Annotated[str, PathParameter(max_length=100)]
Clip = Annotated[int, PathParameter(ge=0, le=_MAX_CLIP)]
Only = Literal["all", "no_caption", "skipped", "excluded", "findings", "image", "video"]
READ = ["GET", "HEAD"]


def dataset_routes(services: Services, answer: Answer) -> APIRouter:
    """`/datasets...` and `/folders`; `answer` makes a response of a value and a status."""
    routes = APIRouter()
    _list_routes(routes, services, answer)
    _picture_routes(routes, services, answer)
    return routes


def _list_routes(routes: APIRouter, services: Services, answer: Answer) -> None:
    library = services.datasets

    @routes.get("/datasets")
    def datasets() -> Response:
        rows = [pages.summary(dataset, library.scans.look(dataset)) for dataset in library.list()]
        return answer({"datasets": rows, "version": sum(row["version"] for row in rows) + len(rows)})

    @routes.get("/datasets/{dataset}")
    def dataset_detail(dataset: DatasetId, revision: Annotated[str, Query(max_length=100)] = "") -> Response:
        try:
            known = library.get(dataset)
        except UserError:
            return _nothing(answer)
        undo, redo = library.journal(known).left()
        page = pages.detail(known, library.scans.look(known, WAIT_SECONDS), revision or None)
        return answer(page | {"undo": undo, "redo": redo})

    @routes.get("/datasets/{dataset}/items")
    def items(
        dataset: DatasetId,
        entry: Annotated[int, Query(ge=-1, le=_LARGEST)] = -1,
        offset: Annotated[int, Query(ge=0, le=_LARGEST)] = 0,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 60,
        text: Annotated[str, Query(max_length=1000)] = "",
        only: Only = "all",
        bucket: Annotated[str, Query(max_length=30)] = "",
    ) -> Response:
        try:
            known = library.get(dataset)
            snapshot = library.snapshot(known)
        except UserError as error:
            return answer({"error": error.message}, 404)
        size = _BUCKET.fullmatch(bucket)
        if bucket and size is None:
            return _nothing(answer)
        wanted = (int(size[1]), int(size[2]), int(size[3])) if size else None
        findings = linting.short_findings(services, known)
        rows = snapshot.select(None if entry < 0 else entry, text, only, findings, wanted)
        return answer(pages.item_page(known, snapshot, rows, offset, limit, findings, library))

    @routes.get("/datasets/{dataset}/lint")
    def lint(dataset: DatasetId) -> Response:
        try:
            return answer(linting.lint_page(services, library.get(dataset)))
        except UserError:
            return _nothing(answer)

    @routes.get("/folders")
    def folders(path: Annotated[str, Query(max_length=4096)] = "") -> Response:
        try:
            return answer(browse(path or None, services.workspace, library.roots))
        except UserError as error:
            return answer({"error": error.message}, 404)


def _picture_routes(routes: APIRouter, services: Services, answer: Answer) -> None:
    previews = services.datasets.previews

    async def picture(make: Callable[[], Future[Path]], lasting: str) -> Response:
        try:
            path = await _result(make)
        except K5Error as error:
            return _failure(error, answer)
        caching = "private, max-age=86400" if lasting else "private, no-cache"
        headers = {"cache-control": caching, "content-security-policy": _POLICY}
        return FileResponse(path, media_type=_TYPES[path.suffix], headers=headers)

    @routes.api_route("/datasets/{dataset}/thumb/{key}", methods=READ)
    async def thumb(dataset: DatasetId, key: Key, v: str = "") -> Response:
        return await picture(lambda: previews.thumb(_row(services, dataset, key)[1]), v)

    @routes.api_route("/datasets/{dataset}/preview/{key}", methods=READ)
    async def preview(dataset: DatasetId, key: Key, v: str = "") -> Response:
        return await picture(lambda: previews.preview(_row(services, dataset, key)[1]), v)

    @routes.api_route("/datasets/{dataset}/strip/{key}/{clip}", methods=READ)
    async def strip(dataset: DatasetId, key: Key, clip: Clip, v: str = "") -> Response:
        return await picture(lambda: previews.strip(*_item(services, dataset, key, clip)[1:]), v)

    @routes.api_route("/datasets/{dataset}/clip/{key}/{clip}", methods=READ)
    async def video(dataset: DatasetId, key: Key, clip: Clip, v: str = "") -> Response:
        return await picture(lambda: previews.clip(*_item(services, dataset, key, clip)[1:]), v)

    @routes.get("/datasets/{dataset}/seen/{key}")
    async def seen(dataset: DatasetId, key: Key, clip: Annotated[int, Query(ge=0, le=_MAX_CLIP)] = 0) -> Response:
        try:
            known, row, entry, item = await run_in_threadpool(_item, services, dataset, key, clip)
            numbers, seconds = await _result(lambda: previews.submit(lambda: previews.frame_numbers(entry, item)))
        except K5Error as error:
            return _failure(error, answer)
        return answer(_seen(known, row, item, clip) | {"source_numbers": numbers, "seconds": seconds})


def _row(services: Services, dataset: str, key: str) -> tuple[KnownDataset, Row]:
    known = services.datasets.get(dataset)
    return known, services.datasets.row(known, key)[1]


def _item(services: Services, dataset: str, key: str, clip: int) -> tuple[KnownDataset, Row, DatasetEntry, Item]:
    """An item of a source.

    Raises:
        UserError: no such dataset, source or clip.
    """
    known = services.datasets.get(dataset)
    snapshot, row = services.datasets.row(known, key)
    if clip >= len(row.items):
        raise UserError(row.reason or "There is no such clip.")
    return known, row, snapshot.entry_of(row), row.items[clip]


def _seen(dataset: KnownDataset, row: Row, item: Item, clip: int) -> dict[str, Any]:
    plan = item.resize_plan
    return {
        "bucket": [item.bucket.width, item.bucket.height],
        "source": [item.media.width, item.media.height],
        "scaled": list(plan.scaled),
        "crop": list(plan.crop),
        "start": item.clip.start if item.clip else 0,
        "frames": item.frames,
        "strip": pages.address(dataset, row, "strip", clip),
        "video": pages.address(dataset, row, "clip", clip) if item.clip else None,
    }


async def _result(make: Callable[[], Future[Any]]) -> Any:
    """What a future gives; no thread of the server waits for it, and nobody else's future is cancelled."""
    return await asyncio.shield(asyncio.wrap_future(await run_in_threadpool(make)))


def _failure(error: K5Error, answer: Answer) -> Response:
    if isinstance(error, MediaError):
        return answer({"error": error.reason}, 404)
    if isinstance(error, UserError) and not isinstance(error, Busy):
        return answer({"error": error.message}, 404)
    return answer({"error": str(error)}, 503)


def _nothing(answer: Answer) -> Response:
    return answer({"error": "There is nothing here."}, 404)
