"""Processes of their own that need not import the large libraries again: forked from one that has."""
import gc
import multiprocessing
import os
from functools import cache
from multiprocessing import forkserver
from unittest import mock

LIBRARIES = ['nbdev.test', 'torch', 'matplotlib.pyplot', 'diffusers.pipelines.flux.pipeline_flux_controlnet',
             'diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3',
             'diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl']
QUIET = {'TRANSFORMERS_VERBOSITY': 'error'}  # no word about torchvision


@cache
def ready():
    "Where processes come from; by now the libraries are being imported"
    if 'forkserver' not in multiprocessing.get_all_start_methods(): return multiprocessing.get_context('spawn')
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(LIBRARIES)
    with mock.patch.dict(os.environ, QUIET): forkserver.ensure_running()
    return context


def begin(function, *args):
    for name in QUIET: os.environ.pop(name, None)
    gc.freeze()  # the collector need not look through the libraries
    function(*args)


class Apart:
    "A function that runs in a process of its own, and gives its answer to the connection that it gets as its last argument"
    def __init__(self, function, *args):
        self.ours, theirs = ready().Pipe(duplex=False)
        self.process = ready().Process(target=begin, args=(function, *args, theirs))
        self.process.start()
        theirs.close()

    def answer(self):
        "Waits for it"
        try: return self.ours.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f'its process ended with exit code {self.process.exitcode}') from None
        finally: self.process.join()
