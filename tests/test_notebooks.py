"""Every notebook is a test: the same cells that nbdev_test runs, under the same flags."""
import sys
from pathlib import Path

import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import _keep_file
from nbdev.test import test_nb as run_notebook

ROOT = Path(__file__).parent.parent
CFG = get_config(path=ROOT)
NOTEBOOKS = sorted(f for f in nbglob(CFG.nbs_path, as_path=True) if _keep_file(f, '.notest'))


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: str(p.relative_to(CFG.nbs_path)))
def test_notebook(notebook, request, monkeypatch, capsys):
    monkeypatch.chdir(CFG.nbs_path)
    monkeypatch.setenv('IN_TEST', '1')  # put back afterwards: nbdev_export does nothing under it
    monkeypatch.setattr(sys, 'path', sys.path[:])
    passed, _ = run_notebook(notebook.resolve(), skip_flags=CFG.tst_flags.split(), basepath=str(ROOT),
                             force_flags=request.config.getoption('--nb-flags').split())
    if not passed:
        pytest.fail(capsys.readouterr().err or f'{notebook} failed', pytrace=False)
