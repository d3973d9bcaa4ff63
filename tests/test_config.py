"""Configurations that are wrong, and what is said about them"""

import copy
import math
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from torch import nn

from segquant_nb.config import (PRESETS, Calibrate, Config, LayerConfig, Optimum, explain,
                                merge_config, plan_layer, read_config)
from segquant_nb.formats import DType
from segquant_nb.graph import SegPattern

WRONG = {  # what, and a piece of what has to be said
    'misspelt': ({'seglinaer': True}, "no field 'seglinaer'. Did you mean 'seglinear'?"),
    'misspelt deep': ({'opt': {'search_alpha_config': {'stpe': .1}}}, "default.opt.search_alpha_config has no field 'stpe'"),
    'key of a wrong kind': ({3: 4}, 'has no field 3'),
    'nan': ({'opt': {'alpha': math.nan}}, 'default.opt.alpha=nan: expected float from 0 to 1'),
    'bool for a float': ({'opt': {'alpha': True}}, 'default.opt.alpha=True'),
    'bool for an int': ({'opt': {'low_rank': True}}, 'default.opt.low_rank=True'),
    'int for a bool': ({'calib': {'actorder': 1}}, 'expected bool'),
    'float for an int': ({'calib': {'blocksize': 12.5}}, 'default.calib.blocksize=12.5: expected int'),
    'out of range': ({'input_quant': {'percentile': 101}}, 'percentile=101.0: expected float'),
    'no damping': ({'calib': {'percdamp': 0}}, 'percdamp=0.0: expected float'),
    'no group': ({'calib': {'groupsize': 0}}, 'groupsize=0: expected a number of columns'),
    'None for a dict': ({'opt': None}, 'default.opt: expected a dict of fields, got None'),
    'name for a dict': ({'opt': 'smooth'}, "default.opt: expected a dict of fields, got 'smooth'"),
    'unknown member': ({'opt': {'type': 'smoth'}}, "Did you mean 'smooth'?"),
    'unknown format': ({'input_quant': {'type': 'int9'}}, "default.input_quant.type: 'int9' is no number format"),
    'unknown pattern': ({'search_patterns': ['linear2junk']}, "Did you mean 'linear2chunk'?"),
    'one pattern': ({'search_patterns': 'linear2chunk'}, 'expected a list of patterns'),
    'unknown clip': ({'input_quant': {'clip': 'foo'}}, "clip='foo' is not one of"),
    'dynamic weight': ({'weight_quant': {'dynamic': True}}, 'a weight does not change'),
    'column scales': ({'weight_quant': {'axis': 0}}, 'weight_quant.axis=0'),
    'static tokens': ({'input_quant': {'axis': -1}}, 'input_quant.axis=-1 without dynamic=True'),
    'inputs by channel': ({'input_quant': {'axis': 1}}, 'input_quant.axis=1'),
    'quartz in 8 bits': ({'input_quant': {'quartz': 16}}, 'QuaRTZ is for type int4'),
    'rounding without quartz': ({'input_quant': {'quartz_rounded': True}}, 'set quartz, too'),
    'quartz for weights': ({'weight_quant': {'quartz': 16}}, 'QuaRTZ is for inputs'),
    'lopsided float': ({'input_quant': {'type': 'fp8e4m3', 'symmetric': False}}, 'cannot be asymmetric'),
    'odd rotation': ({'opt': {'rotate': 24}}, 'expected a power of two'),
    'grid upside down': ({'opt': {'search_alpha_config': {'min': .8, 'max': .2}}}, 'min is above max')}


@pytest.mark.parametrize('name', WRONG)
@pytest.mark.parametrize('where', ['default', '*.ff.*'])
def test_what_is_wrong_is_named_with_its_place(name, where):
    entry, said = WRONG[name]
    given = {where: copy.deepcopy(entry)}
    with pytest.raises((ValueError, TypeError)) as caught: read_config(given)
    words = str(caught.value)
    assert said.replace('default', where) in words and words.startswith(where) and '\n' not in words
    assert given == {where: entry} or 'alpha=nan' in words


@pytest.mark.parametrize('given,said', [
    (3, 'not int'), ([], 'not list'), ('', 'is no preset'), ('W8A8', "Did you mean 'w8a8'?"),
    ('segqant-g-w8a8', "Did you mean 'segquant-g-w8a8'?"), ({3: {}}, '3: expected "default" or a pattern'),
    ({'*': None}, '*: expected a dict of fields, got None')])
def test_no_configuration_at_all(given, said):
    with pytest.raises((ValueError, TypeError)) as caught: read_config(given)
    assert said in str(caught.value)


@pytest.mark.parametrize('text,said', [
    (b'', 'holds a NoneType'), (b'- a\n', 'holds a list'), (b'\xff\xfe', 'is not YAML'),
    (b'default: {opt: {alpha: [1}}', 'is not YAML'), (b'default: {}\ndefault: {}', "'default' is given twice"),
    (b'default: {opt: {alpha: .1, alpha: .2}}', "'alpha' is given twice"), (b'default: {groupsize: 3}', "no field 'groupsize'")])
def test_bad_files(text, said, tmp_path):
    path = tmp_path/'mine.yaml'
    path.write_bytes(text)
    with pytest.raises((ValueError, TypeError)) as caught: read_config(path)
    assert said in str(caught.value) and '\n' not in str(caught.value)
    with pytest.raises(FileNotFoundError, match='there is no file'): read_config(tmp_path/'yours.yaml')


def test_remarks():
    names = ['a.attn.to_q', 'a.attn.to_k', 'proj_out']
    def said(config): return read_config(config).remarks(names)
    assert said({'default': {}, '*.to_?': {}, 'proj_out': {}}) == []
    assert "Did you mean 'a.attn.to_q'?" in said({'a.atn.to_q': {}})[0]
    assert "Did you mean 'default'?" in said({'defualt': {}})[0]
    assert said({'*.to_q': {}, 'a.*': {}}) == []  # to_k is left
    assert 'all of its 2 layers' in said({'*': {}, 'a.*': {}})[0]
    assert 'never applies' in said({'*.to_q': {}, '*.to_k': {}, 'a.*': {}})[0]  # two together


def test_first_match_wins_and_merges_with_the_default():
    config = read_config({'default': {'opt': {'type': 'svd', 'low_rank': 8}}, '*.q': {'opt': {'alpha': .25}}, 'a.*': {'enable': False}})
    q = config.of('a.q')
    assert q.enable and q.opt.alpha == .25 and q.opt.low_rank == 8 and q.opt.type is Optimum.SVD
    assert not config.of('a.k').enable and config.of('b') == config.default


def spelled(config):
    "A LayerConfig as the dict that says all of it"
    if is_dataclass(config): return {f.name: spelled(getattr(config, f.name)) for f in fields(config)}
    return list(config) if isinstance(config, tuple) else config


@pytest.mark.parametrize('name', PRESETS)
def test_presets_survive_being_spelled_out_and_are_not_written_to(name):
    before = copy.deepcopy(PRESETS)
    config = read_config(name)
    assert config.name == name
    assert merge_config(LayerConfig(), spelled(config.default)) == config.default
    assert read_config({'default': spelled(config.default)}).default == config.default
    assert PRESETS == before
    hash(config)


def test_a_preset_may_be_the_default(tmp_path):
    (tmp_path/'mine.yaml').write_text('default: w8a8\n"out": {enable: false}\n')
    made = read_config(tmp_path/'mine.yaml')
    assert made.default == read_config('w8a8').default
    assert made.of('out') == replace(made.default, enable=False) and made.of('in') == made.default
    with pytest.raises(ValueError, match="'w8a9' is no preset. Did you mean"): read_config({'default': 'w8a9'})


def test_published_presets_say_what_was_published():
    def of(name): return read_config(name).default
    a, g, svd, w4 = map(of, ('segquant-a-w8a8', 'segquant-g-w8a8', 'svdquant-w4a8', 'segquant-g-w4a8'))
    for c in (of('baseline'), of('smooth'), a, g):
        assert (c.input_quant.type, c.input_quant.axis, c.input_quant.dynamic) == (DType.INT8, None, False)
        assert (c.weight_quant.type, c.weight_quant.axis) == (DType.INT8, None)
    assert a.seglinear and g.seglinear and not of('smooth').seglinear and of('smooth').opt.alpha == .5
    assert a.calib.type is Calibrate.AMAX and g.calib.type is Calibrate.GPTQ
    for c in (svd, w4):
        assert (c.input_quant.axis, c.input_quant.dynamic) == (-1, True) and c.opt.low_rank == 64
        assert (c.weight_quant.type, c.weight_quant.axis) == (DType.INT4, 1)
        assert c.opt.search_alpha_config.enable and c.calib.type is Calibrate.GPTQ
    assert w4.seglinear and not svd.seglinear and not w4.calib.actorder
    w44 = of('segquant-g-w4a4')
    assert w44.input_quant.type is DType.INT4 and w44.opt.low_rank == 32 and not w44.opt.rotate
    assert of('fp8').input_quant.type is DType.FP8E4M3 and of('w4a16').input_quant.type is DType.BF16


def test_patterns_choose_what_is_cut():
    from segquant_nb.graph import analyze
    from segquant_nb.zoo import flux_transformer
    model = flux_transformer()
    meaning = analyze(model)
    def seen(**fields): return explain(model, {'default': {'seglinear': True, **fields}}, meaning).layers
    def cuts(layers): return sum(len(l.plan.inputs) > 1 for l in layers), sum(len(l.plan.outputs) > 1 for l in layers)
    def duals(layers): return sum('Dual' in repr(l.plan) for l in layers)
    whole, seg = seen(), seen(search_patterns=SegPattern.seg())
    dual, none = seen(search_patterns=['activation2linear']), seen(search_patterns=[])
    assert duals(whole) > duals(dual) > 0 == duals(seg) == duals(none)  # a GELU beside others
    assert cuts(whole) == cuts(seg) == (10, 11) and cuts(dual) == cuts(none) == cuts(seen(seglinear=False)) == (0, 0)
    assert duals(seen(input_quant={'type': 'bf16'}, weight_quant={'type': 'int4'})) == 0


def test_explain_says_what_stays():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(32, 8), nn.Linear(8, 4))
    found = explain(model, {'default': {}, '3': {'enable': False}}, example=torch.randn(1, 3, 2, 2))
    assert [l.name for l in found.layers if l.plan] == ['2']
    reasons = {l.name: l.reason for l in found.layers}
    assert reasons['0'] == 'Conv2d: only linear layers are quantized' and reasons['3'] == 'enable is False'
    assert '<table>' in found._repr_html_() and 'stays: 3 (enable is False)' in repr(found)
    assert found.bytes_before == sum(2*p.numel() for p in model.parameters()) and found.other == 0


def test_rotation_is_planned_beside_dual_scales():
    from segquant_nb.graph import analyze
    model = nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 8))
    seen = analyze(model, example=torch.randn(2, 24))
    settings = read_config({'default': {'seglinear': True, 'opt': {'rotate': 64}}}).default
    assert plan_layer(model[0], settings, seen['0']).blocks == (8,)
    assert plan_layer(model[2], settings, seen['2']).blocks == ()  # it is dual
    assert plan_layer(model[2], settings).blocks == (32,)
    assert isinstance(read_config(None), Config) and read_config().name == 'w8a8'
