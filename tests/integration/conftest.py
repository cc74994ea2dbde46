"""What tests of training share: one small dataset whose caches are made once."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def training_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a small dataset of real clips and stills, cached; read only."""
    from tests.integration.training_runs import cache, make_sources

    config = make_sources(tmp_path_factory.mktemp("training_data"))
    cache(config)
    return config
