"""Bytes go where they matter, within the budget, and the model stays as it is"""
import pytest
import torch
from torch import nn

from segquant_nb.auto import Auto, Options, allot, measure_layers
from segquant_nb.config import Config, explain, read_config
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
    assert loud.gain > 1e3*soft.gain
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
    assert [g.gain for g in training.groups] == [g.gain for g in measure_layers(model.eval(), samples, WAYS, progress=False).groups]


def test_a_layer_under_two_names_is_tried_under_both(samples):
    class Twice(nn.Module):
        def __init__(self, silent):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.silent = nn.Linear(64, 64), silent
            self.second = self.first

        def forward(self, x): return self.second(x) + self.silent*self.first(x)

    heard, alone = (measure_layers(Twice(s), samples, WAYS, progress=False).groups[0].gain for s in (1., 0.))
    assert abs(heard/alone - 1) < .01 and alone > .1


def test_few_rows_instead_of_hessians(model, samples, measured):
    few = measure_layers(model, samples, WAYS, memory=6.6e5, keep=64, progress=False)
    for a, b in zip(few.groups, measured.groups):
        assert a.layers == b.layers and .5 < a.gain/b.gain < 2


def test_the_larger_of_two_equals_is_never_taken():
    same = Options(('a',), 8, ('16 bits', 'large', 'small'), (16, 9, 8), (0., .1, .1), 1.)
    assert allot([same], 9) == [2] and allot([same], 100) == [0]
    nearly = Options(('a',), 8, ('16 bits', 'quick', 'slow'), (16, 8, 8), (0., .100, .095), 1.)
    assert allot([nearly], 8) == [1]
    worth = Options(('a',), 8, ('16 bits', 'quick', 'slow'), (16, 8, 8), (0., .100, .050), 1.)
    assert allot([worth], 8) == [2]


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
