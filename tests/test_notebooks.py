"""Every notebook is a test: the same cells that nbdev_test runs, under the same flags, each in a process of its own."""
import contextlib
import io
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import _keep_file
from nbdev.test import test_nb as run_notebook

ROOT = Path(__file__).parent.parent
CFG = get_config(path=ROOT)
NOTEBOOKS = sorted(f for f in nbglob(CFG.nbs_path, as_path=True) if _keep_file(f, '.notest'))


def start_method():
    "Processes that start with the large libraries already imported: one import for all notebooks"
    if 'forkserver' not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context('spawn')
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['nbdev.test', 'torch', 'matplotlib.pyplot'])
    return context


def run(notebook: Path, flags: list[str], answer):
    os.chdir(CFG.nbs_path)
    os.environ['IN_TEST'] = '1'  # nbdev_export does nothing under it
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        passed, _ = run_notebook(notebook.resolve(), skip_flags=CFG.tst_flags.split(), basepath=str(ROOT),
                                 force_flags=flags)
    answer.send((passed, errors.getvalue()))


def run_apart(context, notebook: Path, flags: list[str]) -> tuple[bool, str]:
    "What a notebook leaves behind (an operator that it registers, `__main__`, a compiler's cache) must not reach the next"
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(notebook, flags, theirs))
    process.start()
    theirs.close()
    try: passed, errors = ours.recv()
    except EOFError: passed, errors = False, ''
    process.join()
    return passed, errors or f'{notebook} failed: its process ended with exit code {process.exitcode}'


@pytest.fixture(scope='session')
def results(request):
    "Notebook → what becomes of it; as many at a time as there are cores"
    asked = [item.callspec.params['notebook'] for item in request.session.items
             if getattr(item, 'originalname', '') == 'test_notebook']
    flags, context = request.config.getoption('--nb-flags').split(), start_method()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {notebook: pool.submit(run_apart, context, notebook, flags) for notebook in asked}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: str(p.relative_to(CFG.nbs_path)))
def test_notebook(notebook, results):
    passed, errors = results[notebook].result()
    if not passed: pytest.fail(errors, pytrace=False)
