"""The live view under hostile hands: names of runs in its routes, files of nobody for its event, requests by markup."""

from __future__ import annotations

from typing import Any

import pytest

from tests.security.conftest import RUN_ID
from tests.security.server import Server
from tests.security.test_tampering import Page

HOSTILE = (
    "..",
    "%2e%2e",
    "..%2f..%2fetc%2fpasswd",
    "/etc/passwd",
    "%00",
    "x" * 300,
    "%ff%fe",
    "~root",
    "compare",
    RUN_ID,
)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_in_every_route(local: Server, name: str) -> None:
    """RUN_ID is a run, but no training, so it has no live view either."""
    for path in (name, f"{name}/series", f"{name}/series?first=1&last=2&chain=true"):
        answer = local.fetch(f"/api/live/{path}")
        assert answer.status in (404, 422), path
        assert "root:" not in answer.text
    wanted = (200,) if name == RUN_ID else (404, 422)
    assert local.fetch(f"/api/live/compare?a={name}&b={RUN_ID}").status in wanted


def test_strangers_see_no_training(exposed: Server) -> None:
    for path in ("live", f"live/{RUN_ID}", f"live/{RUN_ID}/series", f"live/compare?a={RUN_ID}&b={RUN_ID}"):
        assert exposed.fetch(f"/api/{path}").status == 401


@pytest.mark.parametrize(
    "sent", [None, {}, {"run": RUN_ID, "saved": "/etc/passwd"}, {"run": "../x", "saved": 7}, {"run": [], "saved": {}}]
)
def test_a_file_that_no_training_has_saved_gets_into_no_form(local: Server, sent: Any) -> None:
    """Hidden values are no file choosers: kohya_ss#3604."""
    answer = Page(local).run("lora", {}, sent)
    assert "/etc/passwd" not in str(answer)
    drafts = local.workspace / "drafts" / "generate.json"
    assert not drafts.exists() or "/etc/passwd" not in drafts.read_text()
