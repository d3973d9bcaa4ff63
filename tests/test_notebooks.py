"""Every notebook is a test: the same cells that nbdev_test runs, under the same flags, each in a process of its own."""
import pytest
from notebooks import CFG, NOTEBOOKS


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: str(p.relative_to(CFG.nbs_path)))
def test_notebook(notebook, request):
    passed, errors = request.config.notebooks.result(notebook)
    if not passed: pytest.fail(errors, pytrace=False)
