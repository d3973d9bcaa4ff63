"""Smoothing that goes into the layer before: the same results, nothing else touched, and said where"""
import copy
import re

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

import segquant_nb.quantization as quantization
from segquant_nb.calibration import Uniform, generate_calibrate_set
from segquant_nb.config import explain
from segquant_nb.graph import as_call
from segquant_nb.observe import collect_stats
from segquant_nb.quantization import fold_model, quantize
from segquant_nb.reporting import report, report_page
from segquant_nb.scenes import caption, sample_scene
from segquant_nb.zoo import load, noise_model
from test_quantize import assert_as_it_was, assert_same, layers_of, snapshot

QUIET = dict(progress=False)
FOLD = {'default': {'weight_quant': {'axis': 1}, 'opt': {'type': 'smooth', 'fold': True}, 'real_quant': False}}
SLOT = {'default': FOLD['default'] | {'opt': {'type': 'smooth'}}}


class Block(nn.Module):
    "A norm with two readers, a gate whose linear half can divide, an activation that cannot, a residual"
    def __init__(self, width=32, bias=True):
        super().__init__()
        self.norm, self.other = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.gate, self.up = (nn.Linear(width, width, bias) for _ in range(4))
        self.down, self.last, self.both = (nn.Linear(width, width, bias) for _ in range(3))

    def forward(self, x):
        y = self.norm(x)
        y = self.q(y) + self.k(y)
        y = self.down(self.up(y)*nn.functional.gelu(self.gate(y)))
        z = self.other(y)
        return z + self.both(z) + self.last(nn.functional.silu(y))


def block(seed=0):
    torch.manual_seed(seed)
    made = Block().eval()
    with torch.no_grad():
        for norm in (made.norm, made.other):
            norm.weight.uniform_(.5, 2)
            norm.bias.uniform_(-.1, .1)
    return made


def samples(n=4, width=32, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(30, width, generator=g)*torch.linspace(.2, 4, width)).to(dtype) for _ in range(n)]


def told(made): return {l.name: l.fold for l in made.layers}


def test_it_is_said_what_folds_and_why_not():
    found = explain(block(), FOLD, example=samples()[0])
    fold = told(found)
    assert fold['q'] == fold['k'] == 'folded into norm' and fold['down'] == 'folded into up'
    assert fold['last'] == 'not folded: silu is not linear'
    assert re.fullmatch('not folded: tried: the output would change', fold['both'])  # the residual reads it, too
    assert fold['up'].startswith('not folded: a sum') and fold['gate'] == fold['up']
    slots = explain(block(), SLOT, example=samples()[0])
    assert not any(told(slots).values()) and not slots.folds
    folded = [l.name for l in found.layers if l.fold.startswith('folded')]
    assert slots.bytes_after - found.bytes_after == 4*32*len(folded)
    assert 'smooth (folded into norm)' in repr(found)


def assert_same_layers(model, folded, folding, stats, plan):
    "Each layer computes, from divided inputs, what it would without folds by the same factors"
    for l in plan.layers:
        if l.name not in folded.quantization.errors: continue
        other, whole = folded.get_submodule(l.name), folding.away.get(l.name, torch.ones(1))
        own = torch.ones(other.in_features) if other.smooth is None else other.smooth
        one, = quantization.solve_layers([(model.get_submodule(l.name), l)], stats[l.name], whole*own)
        one, x = one.layer, torch.randn(20, other.in_features, dtype=torch.float64)*stats[l.name].amax
        rows = (other.weight_scale.double()/one.weight_scale.double()).amax(1)  # it may divide for the next one
        assert (one.weight_codes() != other.weight_codes()).double().mean() < 1e-3, l.name
        right, got = (y if m.bias is None else y - m.bias for m, y in ((one, one(x)), (other, other(x/whole))))
        assert (got/rows - right).norm() < 2e-3*right.norm(), l.name  # codes that lie between two
        if torch.equal(one.weight_codes(), other.weight_codes()) and not other.plan.quantizers[0].dynamic:
            exact, near = one.decoded_weight(torch.float64), other.decoded_weight(torch.float64)/rows[:, None]
            assert (exact - near).norm() < 1e-5*exact.norm(), l.name


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_the_quantized_model_computes_the_same(dtype):
    model, given = block().to(dtype), samples(dtype=dtype)
    before = snapshot(model)
    slot, folded = (quantize(model, given, config, **QUIET) for config in (SLOT, FOLD))
    assert_as_it_was(model, before)
    plan, stats = explain(model, FOLD, example=given[0]), collect_stats(model, given, **QUIET)
    twin, folding = fold_model(model, plan, stats)
    assert_same_layers(model, folded, folding, stats, plan)
    assert folded.q.smooth is folded.k.smooth is folded.down.smooth is None
    assert folded.both.smooth is not None and folded.last.smooth is not None
    x = samples(9, dtype=dtype)[-1]
    assert (twin(x) - model(x)).norm() < (1e-10 if dtype == torch.float64 else 1e-5)*model(x).norm()
    assert (folded(x) - model(x)).norm() < .05*model(x).norm()
    assert folded.norm.weight is not model.norm.weight and not torch.equal(folded.norm.weight, model.norm.weight)
    assert folded.other.weight is model.other.weight  # nothing is copied that does not change
    assert folded.quantization.errors.keys() == slot.quantization.errors.keys()
    for n, e in slot.quantization.errors.items(): assert folded.quantization.errors[n] < 1.2*e + 1e-6, n


@pytest.mark.parametrize('name', ['tiny-flux', 'tiny-sd35', 'tiny-sdxl'])
def test_real_models_in_double_precision(name):
    pipe = load(name)
    more = {} if name == 'tiny-sdxl' else dict(max_sequence_length=24)
    kind = 'unet' if name == 'tiny-sdxl' else 'dit'
    calib = generate_calibrate_set(pipe, Uniform(1), [[caption(sample_scene(0))]], kind, height=64, width=64,
                                   num_inference_steps=2, **QUIET, **more)
    def double(v): return tree_map(lambda t: t.double() if torch.is_tensor(t) and t.is_floating_point() else t, v)
    calib, model = [double(calib[0])], copy.deepcopy(noise_model(pipe)).double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded = quantize(model, calib, FOLD, **QUIET)
    plan, stats = folded.quantization.explanation, collect_stats(model, calib, **QUIET)
    twin, folding = fold_model(model, plan, stats)
    args, kwargs = as_call(calib[0])
    with torch.no_grad(): right, got = model(*args, **kwargs)[0], twin(*args, **kwargs)[0]
    assert (got - right).norm() < 1e-10*right.norm()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    whole = [l.name for l in plan.layers if l.fold.startswith('folded')]
    assert len(whole) == {'tiny-flux': 45, 'tiny-sd35': 57, 'tiny-sdxl': 68}[name]
    assert all(folded.get_submodule(n).smooth is None for n in whole)
    assert_same_layers(model, folded, folding, stats, plan)


@pytest.mark.parametrize('more', [dict(sequential=True), dict(memory=9e5, passes=9, keep=64), dict(inplace=True), dict(tmp_device='cpu')])
@pytest.mark.filterwarnings('ignore:memory is')
def test_in_every_mode(more):
    model = block()
    gptq = {'default': FOLD['default'] | {'calib': {'type': 'gptq'}}}
    usual = quantize(model, samples(), gptq, keep=more.get('keep', 1024), **QUIET)
    x, right = samples(9)[-1], model(samples(9)[-1])
    norm = model.norm.weight
    made = quantize(model, samples(), gptq, **QUIET, **more)
    assert (made(x) - right).norm() < .05*right.norm() and made.q.smooth is None
    if 'sequential' not in more and 'memory' not in more: assert_same(usual, made)
    if 'inplace' in more: assert made is model and model.norm.weight is norm and torch.equal(norm, usual.norm.weight)
    else: assert model.norm.weight is norm and made.norm.weight is not norm


def test_interrupted_and_gone_on_with_folds(tmp_path, monkeypatch):
    model = block()
    before, whole, solve, count = snapshot(model), quantize(model, samples(), FOLD, **QUIET), quantization.solve_layers, []
    def stops(*args):
        if len(count) == 2: raise KeyboardInterrupt
        count.append(args)
        return solve(*args)
    with monkeypatch.context() as m:
        m.setattr(quantization, 'solve_layers', stops)
        with pytest.raises(KeyboardInterrupt, match='Call again with folder='):
            quantize(model, samples(), FOLD, folder=tmp_path, inplace=True, **QUIET)
    assert_as_it_was(model, before)
    assert_same(whole, quantize(model, samples(), FOLD, folder=tmp_path, **QUIET))
    # the factors of a fold are a part of what a layer was made from
    slots = quantize(model, samples(), SLOT, folder=tmp_path, **QUIET)
    assert slots.q.smooth is not None


@pytest.mark.parametrize('fails', [1, 4])
def test_in_place_is_undone_when_it_is_interrupted(fails, monkeypatch):
    model = block()
    before, put, count = snapshot(model), quantization._put, []
    def stops(*args):
        if args[0] is model:
            count.append(args)
            if len(count) == fails: raise KeyboardInterrupt
        return put(*args)
    monkeypatch.setattr(quantization, '_put', stops)
    with pytest.raises(KeyboardInterrupt): quantize(model, samples(), FOLD, inplace=True, **QUIET)
    assert_as_it_was(model, before)


def test_what_cannot_be_folded_stays_in_the_layer():
    def fold(model, config=FOLD): return told(quantize(model, samples(), config, **QUIET).quantization.explanation)
    some = FOLD | {'k': {'enable': False}}
    assert fold(block(), some)['q'] == 'not folded: k reads it and is not smoothed'
    some = FOLD | {'k': {'opt': {'fold': False}}}
    assert fold(block(), some)['q'] == 'not folded: k reads it and is not folded'
    some = FOLD | {'k': {'opt': {'alpha': .3}}}
    assert 'and are not smoothed alike' in fold(block(), some)['q']
    tied = block()
    tied.k.weight = tied.q.weight
    assert fold(tied)['q'] == 'not folded: the weight of k is computed, or that of another layer'
    normed = block()
    nn.utils.parametrizations.weight_norm(normed.q)
    assert 'the weight of q is computed' in fold(normed)['q']
    bare = block()
    bare.norm = nn.LayerNorm(32, elementwise_affine=False)
    assert fold(bare)['q'] == 'not folded: a norm without parameters'


def test_a_weight_that_is_not_finite_does_not_take_the_others_along():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.q, self.k = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)
        def forward(self, x):
            y = self.norm(x)
            return self.q(y), self.k(y)
    torch.manual_seed(0)
    model = Two().eval()
    with torch.no_grad(): model.k.weight[3, 4] = torch.nan
    made = quantize(model, samples(), FOLD, **QUIET)
    rows = {l.name: l for l in made.quantization.explanation.layers}
    assert list(layers_of(made)) == ['q'] and 'not finite' in rows['k'].reason
    assert made.norm.weight is model.norm.weight or torch.equal(made.norm.weight, model.norm.weight)
    assert made.q.smooth is not None and rows['q'].fold.startswith('not folded')
    x = samples(9)[-1]
    assert (made(x)[0] - model(x)[0]).norm() < .05*model(x)[0].norm()


def test_a_model_alone_cannot_try_and_says_so():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32)).eval()
    found = explain(model, FOLD)
    assert 'no example of inputs' in found.remarks[0] and found.layers[0].fold == 'not folded: there was nothing to try it with'


def test_the_report_says_it():
    made = quantize(block(), samples(), FOLD, **QUIET)
    r = report(made)
    rows = {l.name: l for l in r.layers}
    assert rows['q'].fold == 'folded into norm' and rows['q'].weight.endswith('smoothed by the layer before')
    assert rows['last'].weight.endswith(', smoothed') and 'silu is not linear' in rows['last'].fold
    page = report_page(r)
    assert 'divided by the layer before' in page and 'smoothing: not folded: silu is not linear' in page
