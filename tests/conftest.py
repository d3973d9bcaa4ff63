import os
import signal

# Before torch is imported. One thread and no screen: the same numbers on every machine, and no waiting
# for a busy core.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('MPLBACKEND', 'agg')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

# A shell lets what it starts in the background ignore Ctrl-C, and so would every process that a test starts to interrupt it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption('--nb-flags', default='',
                     help='test flags of settings.ini to run too, e.g. "slow cuda"')


def pytest_collection_modifyitems(items):
    "Notebooks, which run meanwhile, are asked for last"
    items.sort(key=lambda item: item.path.name == 'test_notebooks.py')


def pytest_collection_finish(session):
    asked = [item.callspec.params['notebook'] for item in session.items if item.path.name == 'test_notebooks.py']
    if not asked or session.config.option.collectonly: return
    from notebooks import Runs
    session.config.notebooks = Runs(asked, session.config.getoption('--nb-flags').split())


def pytest_sessionfinish(session):
    if runs := getattr(session.config, 'notebooks', None): runs.stop()
