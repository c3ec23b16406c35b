"""One report with every section, drawn once."""

import pytest

import result_factory as factory
from hici.report.gather import gather
from hici.report.write import write_report


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    """(directory, text of index.html)."""
    root = tmp_path_factory.mktemp("everything")
    page = write_report(gather(factory.write_everything(root)), root / "report")
    return page.parent, page.read_text(encoding="utf-8")
