"""Runs notebooks beside the other tests: on all cores but one while those run, then on all of them."""
import contextlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Semaphore

from apart import Apart, ready
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import _keep_file
from nbdev.test import test_nb as run_notebook

ROOT = Path(__file__).parent.parent
CFG = get_config(path=ROOT)
NOTEBOOKS = sorted(f for f in nbglob(CFG.nbs_path, as_path=True) if _keep_file(f, '.notest'))


def run(notebook: Path, flags: list[str], answer):
    os.chdir(CFG.nbs_path)
    os.environ['IN_TEST'] = '1'  # nbdev_export does nothing under it
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        passed, _ = run_notebook(notebook.resolve(), skip_flags=CFG.tst_flags.split(), basepath=str(ROOT),
                                 force_flags=flags)
    answer.send((passed, errors.getvalue()))


class Runs:
    "What becomes of each notebook; starts at once"
    def __init__(self, notebooks: list[Path], flags: list[str]):
        ready()  # here and not in a thread: it changes the environment for a moment
        self.flags, self.running, self.stopped = flags, set(), False
        cores = os.cpu_count()
        self.free = Semaphore(max(cores - 1, 1))  # one is for the other tests
        self.more = cores > 1
        self.pool = ThreadPoolExecutor(cores)
        self.answers = {notebook: self.pool.submit(self.apart, notebook) for notebook in notebooks}

    def apart(self, notebook: Path) -> tuple[bool, str]:
        "What a notebook leaves behind (an operator that it registers, `__main__`, a compiler's cache) must not reach the next"
        with self.free:
            if self.stopped: return False, f'{notebook} did not run'
            one = Apart(run, notebook, self.flags)
            self.running.add(one)
            if self.stopped: one.process.terminate()  # meanwhile
            try: return one.answer()
            except RuntimeError as e: return False, f'{notebook} failed: {e}'
            finally: self.running.discard(one)

    def result(self, notebook: Path) -> tuple[bool, str]:
        "Waits for it, so no other test is running"
        if self.more: self.free.release()
        self.more = False
        return self.answers[notebook].result()

    def stop(self):
        "Also in the middle: nobody waits for the rest"
        self.stopped = True
        self.pool.shutdown(wait=False, cancel_futures=True)
        for one in list(self.running): one.process.terminate()
