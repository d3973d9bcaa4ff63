"""The model is the caller's: no trace is left, whatever it is wrapped in; and errors that help."""
import copy

import graph_pipelines
import pytest
import torch
import torch.nn.functional as F
from graph_configs import CASES, build
from torch import nn

from segquant_nb.graph import (SegPattern, Semantics, analyze, example_from_pipeline, record)


class Stateful(nn.Module):
    "Everything that a forward may change: a cache, a buffer, random numbers, running statistics"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm, self.drop = nn.Linear(8, 16), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.register_buffer('seen', torch.zeros(1))
        self.cache, self.log, self.last = {}, [], None
        self.frozen = nn.Linear(2, 2).eval()

    def forward(self, x, fail=False):
        self.seen += 1
        self.cache['x'], self.last = x, x
        self.log.append(x.shape)
        torch.rand(1)
        a, b = self.a(x).chunk(2, -1)
        if fail: raise ValueError('no such thing')
        return self.b(self.drop(self.norm(F.silu(a)*b)))


def state(model):
    hooks = [len(getattr(m, n)) for m in model.modules() for n in vars(m) if 'hooks' in n]
    return (hooks, [m.training for m in model.modules()], copy.deepcopy(model.state_dict()),
            [p._version for p in model.parameters()], [id(t) for t in model.state_dict(keep_vars=True).values()],
            [sorted(vars(m)) for m in model.modules()])


def assert_same(before, after):
    assert before[:2] == after[:2] and before[3:] == after[3:]
    assert before[2].keys() == after[2].keys()
    for name in before[2]: assert torch.equal(before[2][name], after[2][name]), name


@pytest.mark.parametrize('fail', [False, True])
def test_no_trace(fail):
    model, x = Stateful().train(), torch.randn(4, 8)
    model.frozen.eval()
    torch.manual_seed(3)
    before, random, kept = state(model), torch.get_rng_state(), x.clone()
    if fail:
        with pytest.raises(RuntimeError, match='no such thing'): analyze(model, dict(x=x, fail=True))
    else:
        assert analyze(model, x)['a'].out_sizes == [8, 8]
    assert_same(before, state(model))
    assert torch.equal(random, torch.get_rng_state()) and torch.equal(x, kept)
    assert model.cache == {} and model.log == [] and model.last is None
    model(x).sum().backward()
    assert model.a.weight.grad is not None


@pytest.mark.parametrize('name', ['flux', 'sd35', 'sd15', 'cosmos', 'longcat-audio', 'minimax-music3', 'wan'])
def test_backward_after_it(name):
    model, inputs = build(CASES[name])
    with torch.no_grad(): first = model(**inputs, return_dict=False)[0]
    before = state(model)
    analyze(model, inputs)
    assert_same(before, state(model))
    out = model(**inputs, return_dict=False)[0]
    assert torch.equal(out, first)
    out.float().sum().backward()
    assert any(p.grad is not None for p in model.parameters())


def layers_of(found):
    return [(n, l.in_sizes, l.out_sizes, l.heads, sorted(map(str, l.patterns))) for n, l in found.items()]


def cast(value, dtype):
    return torch.utils._pytree.tree_map(
        lambda t: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t, value)


@pytest.mark.parametrize('name', ['flux', 'sd35', 'sdxl', 'ltx', 'sana'])
def test_same_answer_in_bf16_and_under_no_grad_and_inference(name):
    model, inputs = build(CASES[name])
    plain = layers_of(analyze(model, inputs))
    with torch.no_grad(): assert layers_of(analyze(model, inputs)) == plain
    with torch.inference_mode(): assert layers_of(analyze(model, inputs)) == plain
    model, inputs = build(CASES[name])
    assert layers_of(analyze(model.to(torch.bfloat16), cast(inputs, torch.bfloat16))) == plain


@pytest.mark.parametrize('name', ['flux', 'sd3', 'sdxl', 'pixart-sigma', 'lumina2', 'mochi'])
def test_same_answer_without_weights(name):
    "On meta, and for Lumina 2 and Mochi, which meta cannot run, with weights that take no memory"
    model, inputs = build(CASES[name])
    plain = layers_of(analyze(model, inputs))
    with torch.device('meta'): empty = type(model).from_config(model.config)
    assert layers_of(analyze(empty, inputs)) == plain
    assert all(p.device.type == 'meta' for p in empty.parameters())


@pytest.mark.parametrize('name', ['flux', 'sd35', 'sd15', 'sdxl', 'wan', 'pixart-sigma', 'dit', 'lumina2'])
def test_no_example_needed(name):
    model, inputs = build(CASES[name])
    assert layers_of(analyze(model)) == layers_of(analyze(model, inputs))


@pytest.mark.parametrize('make, denoiser', [
    (graph_pipelines.sd3_pipeline, 'transformer'), (graph_pipelines.flux_pipeline, 'transformer'),
    (graph_pipelines.sdxl_pipeline, 'unet')])
def test_pipelines(make, denoiser):
    pipe = make()
    model = getattr(pipe, denoiser)
    before, settings = state(model), {k: v for k, v in vars(pipe).items()}
    scheduler, random = copy.deepcopy(vars(pipe.scheduler)), torch.get_rng_state()
    found = analyze(pipe)
    assert vars(pipe) == settings and repr(vars(pipe.scheduler)) == repr(scheduler)
    assert torch.equal(random, torch.get_rng_state())
    assert_same(before, state(model))
    assert layers_of(found) == layers_of(analyze(model, pipeline=pipe))
    assert layers_of(found) == layers_of(analyze(model))
    args, kwargs = example_from_pipeline(pipe)
    assert not args and 'timestep' in kwargs or len(args) == 2
    text = analyze(pipe.text_encoder, pipeline=pipe)  # any part that the pipeline calls
    assert text.counts()['dual'] == 2


def test_compiled_parts_fall_back_to_the_original():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = torch.compile(Stateful().eval()), nn.Linear(8, 8)
            self.two.compile()

        def forward(self, x): return self.two(self.one(x))
    found = analyze(Two(), torch.randn(2, 8))
    assert found['one._orig_mod.a'].out_sizes == [8, 8] and found['two'].seen
    assert analyze(torch.compile(Stateful().eval()), torch.randn(2, 8))['a'].out_sizes == [8, 8]


@pytest.mark.parametrize('how', ['cpu_offload', 'hooks'])
def test_accelerate_offload(how):
    import accelerate
    model, inputs = build(CASES['flux'])
    plain = layers_of(analyze(model, inputs))
    if how == 'cpu_offload': accelerate.cpu_offload(model, execution_device='cpu')
    else: accelerate.cpu_offload_with_hook(model, execution_device='cpu')
    devices = [p.device for p in model.parameters()]
    assert layers_of(analyze(model, inputs)) == plain
    assert [p.device for p in model.parameters()] == devices
    with torch.no_grad(): assert torch.isfinite(model(**inputs)[0]).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu():
    pytest.importorskip('diffusers')
    model, inputs = build(CASES['flux'])
    plain = layers_of(analyze(model, inputs))
    on_gpu = torch.utils._pytree.tree_map(lambda t: t.cuda() if isinstance(t, torch.Tensor) else t, inputs)
    state = torch.cuda.get_rng_state()
    assert layers_of(analyze(model.cuda(), on_gpu)) == plain
    assert torch.equal(state, torch.cuda.get_rng_state())


def test_bad_inputs_are_named():
    model, inputs = build(CASES['sd3'])
    wrong = inputs | dict(encoder_hidden_states=torch.zeros(1, 3, 31))
    with pytest.raises(RuntimeError, match=r'encoder_hidden_states: float32 \(1, 3, 31\)'): analyze(model, wrong)
    with pytest.raises(RuntimeError, match='called with nothing'): analyze(model, {})


def test_no_example_says_how_to_give_one():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, left, right, strange): return self.a(left @ right @ strange)
    with pytest.raises(ValueError, match='example=dict.*pipeline=pipe'): analyze(Odd())


def test_a_pipeline_that_does_not_get_there():
    pipe = graph_pipelines.sd3_pipeline()
    with pytest.raises(RuntimeError, match='did not reach Linear'): analyze(nn.Linear(2, 2), pipeline=pipe)
    with pytest.raises(ValueError, match='no transformer or unet'): analyze(lambda prompt: None)


@pytest.mark.parametrize('make', [
    graph_pipelines.controlnet_pipeline,
    lambda: graph_pipelines.image_pipeline('StableDiffusionXLImg2ImgPipeline'),
    lambda: graph_pipelines.image_pipeline('StableDiffusionXLInpaintPipeline')],
    ids=['controlnet', 'image', 'inpaint'])
def test_pipelines_that_need_an_image(make):
    assert layers_of(analyze(make())) == layers_of(analyze(graph_pipelines.sdxl_pipeline()))


def test_a_controlnet_alone_and_in_its_pipeline():
    pipe = graph_pipelines.controlnet_pipeline()
    alone, called = analyze(pipe.controlnet), analyze(pipe.controlnet, pipeline=pipe)
    assert layers_of(alone) == layers_of(called) and alone.counts()['unseen'] == 0


def test_example_wins_and_call_is_passed_on():
    pipe = graph_pipelines.sd3_pipeline()
    shapes = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs['hidden_states'].shape[-1]), with_kwargs=True)
    args, kwargs = example_from_pipeline(pipe)
    found = analyze(pipe, kwargs | dict(hidden_states=torch.zeros(2, 4, 6, 6)))
    assert shapes[-1] == 6
    assert layers_of(analyze(pipe, call=dict(height=96, width=96))) == layers_of(found)
    assert shapes[-1] == 12
    hook.remove()


def test_recorded_where_the_pipeline_calls_it():
    "Some models only run within a context that their pipeline opens"
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.open = nn.Linear(4, 4), False

        def forward(self, x):
            if not self.open: raise ValueError('not open')
            return self.a(x)

    class Pipeline:
        def __init__(self): self.transformer = Model()

        def __call__(self, prompt):
            self.transformer.open = True
            self.transformer(torch.zeros(1, 4))
    pipe = Pipeline()
    assert analyze(pipe)['a'].seen and not pipe.transformer.open


@pytest.mark.parametrize('wrong, message', [
    (lambda: analyze('flux'), "not str 'flux'"), (lambda: analyze(None), 'diffusers pipeline, not NoneType'),
    (lambda: analyze(3), 'not int 3'), (lambda: analyze(object()), 'needs a model'),
    (lambda: analyze(nn.Linear(2, 2), 'x'), "example has to be a dict.*not str 'x'"),
    (lambda: Semantics.from_json('{}'), 'not the JSON of a Semantics'),
    (lambda: analyze(torch.jit.script(nn.Linear(2, 2)), torch.ones(1, 2)), 'scripted or traced'),
    (lambda: analyze(nn.ReLU(), torch.ones(1, 2)), 'no linear layer and no convolution')])
def test_wrong_arguments(wrong, message):
    with pytest.raises((TypeError, ValueError), match=message): wrong()


class Writes(nn.Module):
    "Changes a weight, a plain tensor and a list within a dict"
    def __init__(self):
        super().__init__()
        self.a, self.mean, self.cache = nn.Linear(4, 4), torch.zeros(4), {'k': [torch.zeros(4)]}

    def forward(self, x):
        with torch.no_grad(): self.a.weight.mul_(2)
        self.a.bias.data.add_(1)
        self.mean += 1
        self.cache['k'][0] += 1
        self.cache['k'].append(x)
        return self.a(x)


def test_what_was_written_in_place_is_put_back():
    model = Writes()
    before = copy.deepcopy(model.state_dict())
    analyze(model, torch.randn(2, 4))
    for name, value in before.items(): assert torch.equal(value, model.state_dict()[name])
    assert model.mean.sum() == 0 and len(model.cache['k']) == 1 and model.cache['k'][0].sum() == 0


def test_large_weights_that_changed_are_told(monkeypatch):
    from segquant_nb import graph
    saved = graph._saved_tensors
    monkeypatch.setattr(graph, '_saved_tensors', lambda model, held: saved(model, held, most=0))
    with pytest.warns(UserWarning, match='Writes changed a tensor of shape'): analyze(Writes(), torch.ones(2, 4))


def test_threads_wait_for_each_other():
    from concurrent.futures import ThreadPoolExecutor
    model, inputs = build(CASES['flux'])
    plain, before = layers_of(analyze(model, inputs)), state(model)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: analyze(model, inputs), range(8)): assert layers_of(found) == plain
    assert_same(before, state(model))


def test_too_large_an_example_is_refused():
    from segquant_nb import graph
    rec = graph.Recorder(limit=100)
    with rec, pytest.raises(MemoryError, match='smaller example'): torch.zeros(101)


def test_json_and_select():
    model, inputs = build(CASES['flux'])
    found = analyze(model, inputs)
    back = Semantics.from_json(found.to_json())
    assert back == found and back.model == found.model and repr(back) == repr(found)
    assert layers_of(found.select(SegPattern.all())) == layers_of(found)
    none = found.select([])
    assert not any(layer.patterns for layer in none.values()) and found.counts()['dual'] == 11
    seg = found.select(SegPattern.seg()).counts()
    assert (seg['split'], seg['heads'], seg['concat'], seg['dual']) == (5, 4, 2, 0)
    dual = found.select([SegPattern.ACTIVATION2LINEAR]).counts()
    assert (dual['split'], dual['heads'], dual['concat'], dual['dual']) == (0, 0, 0, 9)  # proj_out is one part


def test_a_trace_keeps_no_tensor_alive():
    import gc
    import weakref
    model, x = Stateful().eval(), torch.randn(4, 8)
    trace = record(model, (x,))
    alive = weakref.ref(model.a.weight)
    del model
    gc.collect()
    assert alive() is None and trace.nodes
