"""Bytes go where they matter, within the budget, and the model stays as it is"""
import copy
import itertools

import pytest
import torch
from torch import nn

from segquant_nb.auto import Auto, Measured, Options, WAYS as ALL_WAYS, _errors, _typical, allot, auto_from, measure_layers, pictures_of
from segquant_nb.config import PRESETS, Config, explain, read_config
from segquant_nb.quantization import quantize
from segquant_nb.seglinear import SegLinear

WAYS = {'int8': 'segquant-a-w8a8', 'int4': {'default': {'input_quant': {'type': 'int8', 'axis': -1, 'dynamic': True},
                                                        'weight_quant': {'type': 'int4', 'axis': 1}}}}


class TwoPaths(nn.Module):
    "What `loud` makes is a hundred times as large in the result"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.loud, self.soft = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x): return self.loud(x)*10 + self.soft(x.flip(-1))*.1


@pytest.fixture(scope='module')
def model(): return TwoPaths().eval()


@pytest.fixture(scope='module')
def samples():
    torch.manual_seed(1)
    return [dict(x=torch.randn(32, 64)) for _ in range(4)]


@pytest.fixture(scope='module')
def measured(model, samples): return measure_layers(model, samples, WAYS, progress=False)


def way(config: Config, layer: str):
    found = config.of(layer)
    return '16 bits' if not found.enable else found.weight_quant.type.value


def test_bytes_go_where_they_matter(measured):
    loud, soft = (next(g for g in measured.groups if name in g.layers) for name in ('loud', 'soft'))
    assert all(a > 1e3*b for a, b in zip(loud.errors[1:], soft.errors[1:]))
    middle = measured.choose(bits=7)
    assert (way(middle, 'loud'), way(middle, 'soft')) == ('int8', 'int4')
    assert [way(measured.choose(bits=17), n) for n in ('loud', 'soft')] == ['16 bits', '16 bits']


def test_the_errors_foretold_are_those_measured(model, samples, measured):
    with torch.no_grad():
        right = torch.cat([model(**s) for s in samples])
        for bits in (5.2, 7, 9, 13):
            config = measured.choose(bits=bits)
            made = quantize(model, samples, config, progress=False)
            assert 8*made.quantization.explanation.bytes_after <= bits*measured.weights
            off = ((torch.cat([made(**s) for s in samples]) - right).norm()/right.norm()).item()
            chosen = [0 if way(config, g.layers[0]) == '16 bits' else g.ways.index(way(config, g.layers[0])) for g in measured.groups]
            foretold = sum(g.errors[i] for g, i in zip(measured.groups, chosen))**.5
            assert .8*foretold < off < 1.25*foretold


def test_an_error_budget_is_kept_with_few_bytes(measured):
    coarse, fine = measured.choose(error=.5), measured.choose(error=1e-3)
    assert way(coarse, 'loud') == way(coarse, 'soft') == 'int4'
    assert way(fine, 'loud') != 'int4' and way(fine, 'soft') == 'int4'


def test_auto_is_a_configuration(model, samples):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    made = quantize(model, samples, Auto(bits=7, ways=WAYS, progress=False), progress=False)
    assert isinstance(made.loud, SegLinear) and isinstance(made.soft, SegLinear)
    assert made.loud.plan.weight.dtype.value == 'int8' and made.soft.plan.weight.dtype.value == 'int4'
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()) and type(model.loud) is nn.Linear
    again = Auto(bits=7, ways=WAYS, progress=False)(model, iter(samples))
    assert [way(again, n) for n in ('loud', 'soft')] == ['int8', 'int4']


def test_a_budget_of_bytes_counts_what_explain_counts(samples):
    class WithConvolution(TwoPaths):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 16, 3, padding=1)

        def forward(self, x): return super().forward(x) + self.conv(x[:, None]).mean(1)

    model = WithConvolution().eval()
    found = measure_layers(model, samples, WAYS, progress=False)
    assert found.fixed == 2*sum(p.numel() for p in model.conv.parameters())
    size = found.fixed + 14*found.weights//16
    plan = explain(model, found.choose(bytes=size), example=samples[0])
    assert .7*size < plan.bytes_after <= size


def test_a_model_in_training_is_measured_as_it_will_run(samples):
    class Trained(TwoPaths):
        def __init__(self):
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(64), nn.Dropout(.5)

        def forward(self, x): return self.drop(self.norm(super().forward(x)))

    model = Trained().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    training = measure_layers(model, samples, WAYS, progress=False)
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [g.errors for g in training.groups] == [g.errors for g in measure_layers(model.eval(), samples, WAYS, progress=False).groups]


def test_a_layer_under_two_names_is_tried_under_both(samples):
    class Twice(nn.Module):
        def __init__(self, silent):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.silent = nn.Linear(64, 64), silent
            self.second = self.first

        def forward(self, x): return self.second(x) + self.silent*self.first(x)

    heard, alone = (measure_layers(Twice(s), samples, WAYS, progress=False).groups[0].errors[-1] for s in (1., 0.))
    assert abs(heard/alone - 1) < .01 and alone > 1e-4


def test_few_rows_instead_of_hessians(model, samples, measured):
    few = measure_layers(model, samples, WAYS, memory=6.6e5, keep=64, progress=False)
    for a, b in zip(few.groups, measured.groups):
        assert a.layers == b.layers and .5 < a.errors[-1]/b.errors[-1] < 2


def test_the_larger_of_two_equals_is_never_taken():
    same = Options(('a',), 8, ('16 bits', 'large', 'small'), (16, 9, 8), (0., .1, .1))
    assert allot([same], 9) == [2] and allot([same], 100) == [0]
    nearly = Options(('a',), 8, ('16 bits', 'quick', 'slow'), (16, 8, 8), (0., .100, .095))
    assert allot([nearly], 8) == [1]
    worth = Options(('a',), 8, ('16 bits', 'quick', 'slow'), (16, 8, 8), (0., .100, .050))
    assert allot([worth], 8) == [2]


class Chain(nn.Module):
    "Five layers that matter more and less, two of them twice as large"
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in ((48, 48), (48, 96), (96, 48), (48, 48), (48, 48)))

    def forward(self, x):
        parts = [self.layers[0](x)]
        parts.append(self.layers[2](self.layers[1](x.roll(1, -1)).relu())*.3)
        parts.append(self.layers[3](x.flip(-1))*.02)
        return sum(parts) + self.layers[4](x.tanh())*3


def test_near_the_best_of_all_mixtures_that_can_be_built():
    torch.manual_seed(4)
    model, samples = Chain().eval(), [dict(x=torch.randn(64, 48)) for _ in range(4)]
    found = measure_layers(model, samples, WAYS, progress=False)
    alike = [quantize(model, samples[::2], config, progress=False) for config in found.ways.values()]
    with torch.no_grad():
        right, built = torch.cat([model(**s) for s in samples[1::2]]), []
        for chosen in itertools.product(range(3), repeat=len(found.groups)):
            made = copy.deepcopy(model)
            for g, i in zip(found.groups, chosen):
                for name in g.layers:
                    if i: made.set_submodule(name, alike[i - 1].get_submodule(name))
            off = torch.cat([made(**s) for s in samples[1::2]]) - right
            built.append((sum(g.bytes[i] for g, i in zip(found.groups, chosen)), off.square().sum().item(), chosen))
        for bits in (5.5, 6, 7, 8, 9, 11):
            most = bits*found.weights/8
            config = found.choose(bits=bits)
            ours = next(e for b, e, c in built if all(way(config, g.layers[0]) == g.ways[i] for g, i in zip(found.groups, c)))
            assert ours <= 1.3*min(e for b, e, _ in built if b <= most), bits


def test_what_counts_is_what_is_said_to(model, samples):
    def soft_alone(m): return [m.soft(s['x']) for s in samples]
    found = measure_layers(model, samples, WAYS, progress=False, results=soft_alone)
    loud, soft = (next(g for g in found.groups if name in g.layers) for name in ('loud', 'soft'))
    assert max(loud.errors) == 0 < min(soft.errors[1:])
    config = Auto(bits=7, ways=WAYS, progress=False, results=soft_alone)(model, samples)
    assert (way(config, 'loud'), way(config, 'soft')) == ('int4', 'int8')


def test_a_row_that_is_moved_far_counts_in_decibels():
    ease, strength = torch.tensor([1., 2., 1000.]).double(), torch.tensor([.01, .1, 1.]).double()
    wrong = torch.outer(strength, ease)
    wrong[0, 2] *= 1000  # a picture that jumped
    a, b, c = _errors([.01, .1, 1.], dict(enumerate(wrong)), _typical(wrong))
    assert c/b == pytest.approx(10) and b/a == pytest.approx(1)  # a sum of squares would say .1
    wrong[1, 1] = 0  # and one that came out right by chance
    assert _errors([.01, .1, 1.], dict(enumerate(wrong)), _typical(wrong))[1] > b/100


def test_a_way_that_was_not_tried_errs_more_than_the_better_one_that_was():
    by_chance = {0: torch.tensor([1.]), 2: torch.tensor([2.])}  # own errors say that 0 should be far worse than 2
    a, b, c = _errors([1., .3, .1], by_chance, torch.ones(1))
    assert (a, c) == pytest.approx((1, 2)) and b == pytest.approx(6)


def test_never_foretold_worse_than_one_way_for_all():
    groups = [Options((f'l{i}',), 1, ('16 bits', 'a', 'b'), (20, 12, 10), (0., .95, 1.)) for i in range(4)]
    found = Measured(tuple(groups), {n: read_config(c) for n, c in (('a', 'w8a8'), ('b', 'w4a8'))})
    assert [way(found.choose(bytes=49), f'l{i}') for i in range(4)] == ['int8']*4  # no step is worth it by itself


def test_presets_are_among_the_ways():
    for preset in ('w8a8', 'w8a8-dynamic', 'w4a8'): assert PRESETS[preset] in ALL_WAYS.values()


def test_pictures_count_where_there_is_a_pipeline():
    from segquant_nb.graph import denoiser
    from segquant_nb.zoo import load
    pipe = load('tiny-flux')
    call = dict(height=64, width=64, max_sequence_length=24, num_inference_steps=2)
    auto = Auto(bits=5).for_pipeline(pipe, ['a red circle', 'a blue square'], **call)
    assert auto.bits == 5 and Auto(bits=5, results=len).for_pipeline(pipe, ['a']).results is len
    with torch.no_grad():
        one, two = auto.results(denoiser(pipe)), pictures_of(pipe, ['a red circle', 'a blue square'], seed=10**6, **call)(denoiser(pipe))
    assert len(one) == 2 and all(torch.equal(a, b) and a.shape == (3*64*64,) for a, b in zip(one, two))


def test_auto_by_a_word_or_a_dict():
    assert auto_from() == auto_from({}) == Auto(bits=5) and auto_from({'bytes': 10**6}) == Auto(bytes=10**6)
    for wrong in ({'bit': 5}, {'bits': 5, 'bytes': 9}, {'bits': '5'}, {'bits': True}, 5, 'w8a8'):
        with pytest.raises(ValueError, match='expected one budget, for example'): auto_from(wrong)


def test_what_is_refused(model, samples, measured):
    with pytest.raises(ValueError, match='one positive budget.*got none'): measured.choose()
    with pytest.raises(ValueError, match='one positive budget.*bits=5, error=0.1'): Auto(bits=5, error=.1)
    with pytest.raises(ValueError, match=r'bits=1 are too few: with the smallest option everywhere, it is 4\.\d\d'): measured.choose(bits=1)
    with pytest.raises(ValueError, match='bytes=1,000 are too few'): measured.choose(bytes=1000)
    with pytest.raises(ValueError, match='too few: with the smallest option everywhere'): allot(list(measured.groups), 1)
    with pytest.raises(ValueError, match='the calibration set is empty'): measure_layers(model, [], WAYS)
    with pytest.raises(ValueError, match=r'Auto\(bits=5\)'): read_config('auto')
    with pytest.raises(ValueError, match='can be read once only'): quantize(model, iter(samples), Auto(bits=6))
    with pytest.raises(ValueError, match='is no preset'): measure_layers(model, samples, {'a': 'w9a9'})
