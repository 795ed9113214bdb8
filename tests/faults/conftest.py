"""The run that nothing happened to, which every struck run is compared with."""

from typing import Any

import pytest

from regrowth.data_pipeline.corpus import Corpus
from tests.faults.helpers import configured, numbers
from tests.launch.helpers import only_run, regrowth


@pytest.fixture(scope="session")
def undisturbed(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The numbers of the run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = regrowth("train", configured(folder, corpus))
    assert done.returncode == 0, done.stderr
    found = numbers(only_run(folder))
    assert len(found["losses"]) == 12 and found["weights"] and found["evaluations"]
    return found
