"""Calls that are wrong in one argument: each is refused in a sentence, or computes what the argument says."""
import re
from types import SimpleNamespace

import pytest
import torch
from bad_calls import calls, gpu, wrong
from emulate import COMPILER

from segquant_nb import hopper_gemm, int4
from segquant_nb.codes import Codes

pytestmark = pytest.mark.skipif(COMPILER is None, reason='the emulation of kernels needs a C++ compiler')
CALLS = calls()
MORE = ('scale', 'low', 'up', 'inputs', 'segment', 'device', 'number format')  # what else arguments are called, in words


def plain(value):
    "The same in memory of its own"
    if isinstance(value, torch.Tensor) and not value.is_meta: return value.contiguous().clone()
    return Codes(*map(plain, value)) if isinstance(value, Codes) else value


def tensors(found):
    if isinstance(found, torch.Tensor): return [found]
    return [t for t in found if isinstance(t, torch.Tensor)] if isinstance(found, tuple) else []


@pytest.mark.parametrize('name', CALLS)
def test_a_wrong_argument_is_refused_in_a_sentence(name, monkeypatch):
    function, given, *capability = CALLS[name]
    for module in (hopper_gemm, int4): monkeypatch.setattr(module, '_driver', lambda: SimpleNamespace(cuTensorMapEncodeTiled=lambda *_: 0))
    with gpu(*capability) as machine:
        function(**given)
        for argument, value in given.items():
            for what, other in wrong(value):
                where, before = f'{name}, {argument}: {what}', len(machine.launches)
                try: found = function(**{**given, argument: other})
                except (ValueError, TypeError, RuntimeError) as e:
                    said = str(e)
                    assert '\n' not in said and said.endswith('.') and len(said) < 300, f'{where}: {said}'
                    assert re.search(rf'\b({"|".join((*given, *MORE))})', said), f'{where}, or what it does not fit to, is not named: {said}'
                    assert len(machine.launches) == before or name == 'SegLinear on a GPU', f'{where}: launched first'
                else:
                    for a, b in zip(tensors(found), tensors(function(**{**given, argument: plain(other)}))):
                        assert a.shape == b.shape and (a.is_meta or capability == [(9, 0)] or torch.equal(a.view(torch.uint8), b.view(torch.uint8))), f'{where} gives another result'
