"What lies between linear layers, quick: kernels on the emulated GPU, and modules that are what they were where something is unusual."
import copy
import ctypes
import gc
import inspect
import pickle
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle, RMSNorm, SD35AdaLayerNormZeroX
from diffusers.models.transformers.transformer_flux import FluxAttention
from emulate import COMPILER
from torch import nn

from segquant_nb import between, ops
from segquant_nb.between import beside_gelu, gated_sum, norm_rows, rms_heads, rms_heads_reference, rotate_heads, rotate_heads_reference
from segquant_nb.codes import PackedColumns
from segquant_nb.dualscale import DualScale
from segquant_nb.formats import Quantizer
from segquant_nb.ops import use_kernels, use_quick_parts
from segquant_nb.producers import NormCodes
from segquant_nb.seglinear import Plan, SegLinear
from test_ops import emulated

pytestmark = pytest.mark.skipif(COMPILER is None, reason='the emulation of kernels needs a C++ compiler')
WIDTH, TOKENS = 64, 20


@pytest.fixture
def gpu():
    "Kernels on CPU tensors, wherever this module asks"
    with emulated() as gpu, mock.patch.multiple(ops, _DEVICE='cpu', cuda_problem=lambda *_: None): yield gpu


def launched(gpu):
    made = [launch.function for launch in gpu.launches]
    gpu.launches.clear()
    return made


def test_kernels_give_the_bits_of_their_references(gpu):
    g = torch.Generator().manual_seed(0)
    for dtype, columns, heads in ((torch.bfloat16, 24, 9), (torch.float16, 128, 3)):
        x, angles = torch.randn(2, 5, heads, columns, generator=g).to(dtype), torch.rand(5, columns, generator=g)*6
        cosines, sines, weight = angles.cos(), angles.sin(), (torch.rand(columns, generator=g) + .5).to(dtype)
        for at, given in ((1, x), (2, x.transpose(1, 2).contiguous())):
            right = apply_rotary_emb(given, (cosines, sines), sequence_dim=at)
            assert torch.equal(rotate_heads(given, cosines, sines, at), right) and torch.equal(rotate_heads_reference(given, cosines, sines, at), right)
        for options in (dict(), dict(weight=weight), dict(weight=weight, rounded=True)):
            assert torch.equal(rms_heads(x, **options), rms_heads_reference(x, **options))
    zeros = torch.zeros(1, 0, 3, 24).bfloat16()
    assert rotate_heads(zeros, cosines[:0, :24], sines[:0, :24]).shape == rms_heads(zeros).shape == zeros.shape
    inf = torch.full((1, 8), float('inf')).bfloat16()
    assert rms_heads(inf).isnan().all() and rms_heads_reference(inf).isnan().all()


def modules():
    "Each known class, and how it is called"
    torch.manual_seed(0)
    angles = torch.rand(TOKENS, 32)*6
    return {'LayerNorm': (nn.LayerNorm(WIDTH), lambda m, x, e: m(x)), 'plain LayerNorm': (nn.LayerNorm(WIDTH, elementwise_affine=False), lambda m, x, e: m(x)),
            'RMSNorm': (nn.RMSNorm(32, eps=1e-6), lambda m, x, e: m(x.unflatten(-1, (-1, 32)))), 'RMSNorm of diffusers': (RMSNorm(32, 1e-6), lambda m, x, e: m(x.unflatten(-1, (-1, 32)))),
            'wide RMSNorm of diffusers': (RMSNorm(320, 1e-6), lambda m, x, e: m(x.repeat(1, 1, 5))), 'AdaLayerNormZero': (AdaLayerNormZero(WIDTH), lambda m, x, e: torch.cat([v.flatten() for v in m(x, emb=e)])),
            'AdaLayerNormZeroSingle': (AdaLayerNormZeroSingle(WIDTH), lambda m, x, e: torch.cat([v.flatten() for v in m(x, emb=e)])),
            'SD35AdaLayerNormZeroX': (SD35AdaLayerNormZeroX(WIDTH), lambda m, x, e: torch.cat([v.flatten() for v in m(x, emb=e)])),
            'AdaLayerNormContinuous': (AdaLayerNormContinuous(WIDTH, WIDTH, elementwise_affine=False, eps=1e-6), lambda m, x, e: m(x, e)),
            'FluxAttention': (FluxAttention(query_dim=WIDTH, heads=2, dim_head=32, out_dim=WIDTH, pre_only=True, eps=1e-6), lambda m, x, e: m(x, image_rotary_emb=(angles.cos(), angles.sin())))}


@pytest.mark.parametrize('name', modules())
def test_a_module_stays_what_it_is(gpu, name):
    module, call = modules()[name]
    module = module.bfloat16().requires_grad_(False)
    for p in module.parameters(): p.add_(torch.randn_like(p)*.05)
    for images in (1, 3):
        x, e = (torch.randn(images, TOKENS, WIDTH)*2 + .5).bfloat16(), torch.randn(images, WIDTH).bfloat16()
        plain, exact = call(module, x, e), call(copy.deepcopy(module).double(), x.double(), e.double())
        classes = [type(m) for m in module.modules()]
        found = use_quick_parts(module)
        assert sum(found.values()) >= 1 and use_quick_parts(module) == found  # once is enough
        launched(gpu)
        for _ in range(4): quick = call(module, x, e)
        assert {'codes', 'rms_heads', 'rotate_heads'} >= set(launched(gpu)) != set()
        error, usual = ((y.double() - exact).square().mean().sqrt() for y in (quick, plain))
        assert error < 1.1*usual and (quick - plain).abs().max() < .05*plain.abs().max()
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(call(twin, x, e), quick) and type(twin) is type(module)
        with torch.inference_mode(): assert torch.equal(call(module, x.clone(), e.clone()), quick)
        launched(gpu)
        with torch.autocast('cpu', torch.bfloat16): call(module, x, e)
        learned = call(module, x.clone().requires_grad_(), e)
        assert learned.requires_grad and not launched(gpu) or name == 'FluxAttention'
        assert torch.equal(call(module.float(), x.float(), e.float()), call(copy.deepcopy(module), x.float(), e.float())) and not launched(gpu)
        module.bfloat16()
        assert use_quick_parts(module, False) == found and [type(m) for m in module.modules()] == classes
        assert torch.equal(call(module, x, e), plain) and not launched(gpu)


def test_inputs_of_any_layout(gpu):
    norm = nn.LayerNorm(48).bfloat16().requires_grad_(False)
    plain, x = copy.deepcopy(norm), (torch.randn(5, 4, 96)*3 + 1).bfloat16()
    use_quick_parts(norm)
    for odd in (x[..., :48], x[:, ::2, 48:], x.flatten()[1:1 + 480].view(10, 48), x[:, :, :48].transpose(0, 1)): assert torch.equal(norm(odd), plain(odd))
    assert not launched(gpu)
    for given in (x[:0, :, :48].contiguous(), x[0, 0, :48]): assert norm(given).shape == given.shape
    for _ in range(3): norm(x[..., :48].contiguous())
    assert any(between._repeated(norm_rows, (norm.eps,), x.dtype, x.device).known.values())  # the third is only a launch


def test_norms_refuse_images_that_do_not_match(gpu):
    codes, x = NormCodes(PackedColumns((64,)), scale=torch.ones(1, 1), device=torch.device('cpu')), torch.randn(8, 64).bfloat16()
    with pytest.raises(ValueError, match='scale is for 4 images, shift for 2'): codes(x, torch.zeros(2, 64).bfloat16(), torch.zeros(4, 64).bfloat16())


def test_compiled_they_are_what_they_were(gpu):
    for name in ('LayerNorm', 'AdaLayerNormZeroSingle', 'FluxAttention'):
        module, call = modules()[name]
        module.bfloat16().requires_grad_(False)
        x, e = torch.randn(1, TOKENS, WIDTH).bfloat16(), torch.randn(1, WIDTH).bfloat16()
        torch._dynamo.reset()
        right = torch.compile(lambda x, e: call(module, x, e), fullgraph=True, backend='aot_eager')(x, e)
        use_quick_parts(module)
        launched(gpu)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(lambda x, e: call(module, x, e), fullgraph=True, backend='aot_eager')(x, e), right) and not launched(gpu)


def test_who_watches_a_module_is_not_passed_over(gpu):
    x, e = torch.randn(1, TOKENS, WIDTH).bfloat16(), torch.randn(1, WIDTH).bfloat16()
    ada, called = AdaLayerNormZeroSingle(WIDTH).bfloat16().requires_grad_(False), []
    use_quick_parts(ada)
    for watched in (ada.norm, ada.silu):
        handle = watched.register_forward_hook(lambda *args: called.append(args))
        for _ in range(3): ada(x, emb=e)
        handle.remove()
    assert len(called) == 6
    forward = ada.norm.forward
    ada.norm.forward = lambda *args: called.append(args) or forward(*args)
    ada(x, emb=e)
    assert len(called) == 7


def test_what_only_looks_like_it_is_left_alone(gpu):
    class Doubled(nn.LayerNorm):
        def forward(self, x): return 2*super().forward(x)
    ada, x, e = AdaLayerNormZeroSingle(WIDTH).bfloat16().requires_grad_(False), torch.randn(2, TOKENS, WIDTH).bfloat16(), torch.randn(2, WIDTH).bfloat16()
    ada.norm = Doubled(WIDTH, elementwise_affine=False, eps=1e-6)
    plain = ada(x, emb=e)[0]
    use_quick_parts(ada)
    assert torch.equal(ada(x, emb=e)[0], plain) and not launched(gpu)
    x, y, gate = (torch.randn(2, TOKENS, WIDTH).bfloat16() for _ in range(3))
    for other in (gate[:, 0], gate[:1, 0], gate[:, 0, :1]):  # each image, all images, all columns
        assert torch.equal(between._added(x, other, y), x + other[:, None]*y)
    assert launched(gpu) == ['gated_sum']*2
    norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
    for other in (gate[:, 0, :1], gate[:, 0].float()): assert torch.equal(between._modulated(norm, x, other, other), norm(x)*(1 + other[:, None]) + other[:, None])
    act, wide = nn.GELU(approximate='tanh'), torch.randn(2, TOKENS, 2*WIDTH).bfloat16()
    for a, b in ((x, wide), (x[..., :60].contiguous(), wide)):
        seen = []
        handle = act.register_forward_hook(lambda *_: seen.append(1))
        assert torch.equal(between._beside(a, act, b), torch.cat([a, act(b)], -1)) and len(seen) == 2
        handle.remove()
    assert not launched(gpu)
    ff, x = feed_forward('gelu', [(128, Quantizer(**TOKEN))])
    plain = ff(x)
    use_quick_parts(ff)
    ff.net[1] = nn.Identity()
    assert torch.equal(ff(x), plain) and not ff.net[2].ready[torch.bfloat16].behind
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    try: ada(x[..., :32].repeat(1, 1, 2), emb=e)
    finally: handle.remove()
    assert 'Doubled' in seen and 'SiLU' in seen


def test_an_embedding_is_looked_at_anew_when_it_changed(gpu):
    a, b = (AdaLayerNormZeroSingle(WIDTH).bfloat16().requires_grad_(False) for _ in range(2))
    x, e = torch.randn(1, TOKENS, WIDTH).bfloat16(), torch.randn(1, WIDTH).bfloat16()
    def right(m): return m.usual.forward(m, x, emb=e.clone())[1]
    for m in (a, b): use_quick_parts(m)
    calls = []
    with mock.patch.object(nn.SiLU, 'forward', lambda m, v: calls.append(1) or F.silu(v)):
        for m in (a, b): m(x, emb=e)
        assert len(calls) == 1
    assert torch.equal(a(x, emb=e)[1], right(a))
    e.mul_(2)
    assert torch.equal(b(x, emb=e)[1], right(b))
    e.data = torch.randn(1, WIDTH).bfloat16()
    assert torch.equal(a(x, emb=e)[1], right(a))
    assert between._EMBEDDING.made is not None
    del e
    gc.collect()
    assert between._EMBEDDING.made is None


def test_what_is_learned_keeps_its_gradients(gpu):
    for images in (1, 3):
        ada, x = AdaLayerNormZeroSingle(WIDTH).bfloat16(), torch.randn(images, TOKENS, WIDTH).bfloat16()
        e = torch.randn(images, WIDTH).bfloat16()
        use_quick_parts(ada)
        ada.norm.requires_grad_(False)
        ada(x, emb=e)[0].sum().backward()
        assert ada.linear.weight.grad.abs().sum() > 0


def test_the_processor_is_asked_for_its_parameters(gpu):
    "As FluxAttention.forward does, to find out what may be passed on"
    module, _ = modules()['FluxAttention']
    before = inspect.signature(module.processor.__call__)
    use_quick_parts(module)
    assert inspect.signature(module.processor.__call__) == before and between.quick_processor(nn.Linear) is None


TOKEN, W8 = dict(axis=-1, dynamic=True), Quantizer('int8', axis=1)


def feed_forward(activation, inputs, weight=W8, **extra):
    torch.manual_seed(0)
    ff, x = FeedForward(32, 32, activation_fn=activation).requires_grad_(False), torch.randn(2, 12, 32)
    ff.net[2] = SegLinear.of(ff.net[2], Plan(inputs, [32], weight), ff.net[0](x).flatten(0, 1), **extra)
    ff.bfloat16()
    use_kernels(ff, 'cuda')
    return ff, x.bfloat16()


@pytest.mark.parametrize('activation', ['gelu', 'gelu-approximate', 'geglu', 'swiglu'])
def test_a_feed_forward_network_makes_codes(gpu, activation):
    for inputs, weight in (([(128, Quantizer(**TOKEN))], W8), ([(33, Quantizer()), (95, DualScale())], W8), ([(128, Quantizer(**TOKEN))], Quantizer('int4', axis=1))):
        ff, x = feed_forward(activation, inputs, weight)
        plain, keys = ff(x), ff.state_dict().keys()
        assert use_quick_parts(ff) == {'FeedForward': 1} and ff.state_dict().keys() == keys
        for _ in range(4): quick = ff(x)
        assert (quick - plain).abs().max() < .02*plain.abs().max() and len(ff.net[2].ready[torch.bfloat16].behind) == 1
        launched(gpu)
        with mock.patch.object(F, 'gelu', side_effect=AssertionError), mock.patch.object(nn.SiLU, 'forward', side_effect=AssertionError): ff(x)
        assert launched(gpu) == ['codes', 's8_gemm']
        ff.net[2].weight_scale.neg_()  # in place: call use_kernels again
        use_kernels(ff, 'cuda')
        assert torch.equal(ff(x), ff(x)) and (ff(x) + quick - 2*ff.net[2].bias).abs().max() < .02*plain.abs().max()


def test_a_feed_forward_network_that_is_unusual_is_as_before(gpu):
    ff, x = feed_forward('gelu', [(128, Quantizer(**TOKEN))])
    plain = ff(x)
    use_quick_parts(ff)
    called = []
    for part in ff.net:
        handle = part.register_forward_hook(lambda *args: called.append(part))
        assert torch.equal(ff(x), plain)
        handle.remove()
    assert len(called) == 3
    assert torch.equal(ff(x[:1, :5]), ff.usual.forward(ff, x[:1, :5]))  # few rows
    ff.net[1].p = .5
    ff.train()
    assert not torch.equal(ff(x), ff(x))  # a dropout
    ff.eval()
    with torch.autocast('cpu', torch.bfloat16): ff(x)
    assert not ff.net[2].ready[torch.bfloat16].behind
    g = torch.Generator().manual_seed(0)
    other, x = feed_forward('gelu', [(128, Quantizer(**TOKEN))], low_rank=(torch.randn(4, 128, generator=g)/9, torch.randn(32, 4, generator=g)/9))
    plain = other(x)
    use_quick_parts(other)
    assert torch.equal(other(x), plain)
    ops.use_emulation(other)
    assert torch.equal(other(x), other.usual.forward(other, x))


def test_every_known_class_is_one_that_is_there():
    "Its forward takes what the quick one takes"
    from importlib import import_module
    for name, quick in ops._QUICK.items():
        module, _, kind = name.rpartition('.')
        assert between.quick_class(getattr(import_module(module), kind), quick) is not None, name
    assert between.quick_class(nn.Linear, ops._QUICK['torch.nn.modules.normalization.RMSNorm']) is None


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_blocks_of_flux(gpu, dtype):
    from diffusers import FluxTransformer2DModel
    torch.manual_seed(0)
    model = FluxTransformer2DModel(in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=16,
                                   guidance_embeds=True, axes_dims_rope=(8, 12, 12)).to(dtype).requires_grad_(False)
    for p in model.parameters(): p.add_(torch.randn_like(p)*.1)
    def given(images):
        some = dict(hidden_states=(images, 20, 16), encoder_hidden_states=(images, 6, 24), pooled_projections=(images, 16))
        return dict({k: torch.randn(s).to(dtype) for k, s in some.items()}, timestep=torch.rand(images).to(dtype), guidance=torch.ones(images).to(dtype), img_ids=torch.rand(20, 3), txt_ids=torch.zeros(6, 3), return_dict=False)
    for images in (1, 2):
        inputs = given(images)
        plain, exact = model(**inputs)[0], copy.deepcopy(model).double()(**{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})[0]
        found = use_quick_parts(model)
        assert found['FluxTransformerBlock'] == found['FluxSingleTransformerBlock'] == found['AdaLayerNormZeroSingle'] == 2 and found['FluxAttnProcessor'] == 4
        for _ in range(3): launched(gpu), (quick := model(**inputs)[0])
        made = launched(gpu)
        assert made.count('beside_gelu') == 2 and made.count('gated_sum') == 10 and made.count('rotate_heads') == 8 and made.count('rms_heads') == 12
        error, usual = ((y.double() - exact).square().mean().sqrt() for y in (quick, plain))
        assert error < 1.1*usual and not torch.equal(quick, exact)
        twin = pickle.loads(pickle.dumps(model))
        assert (twin(**inputs)[0] - quick).abs().max() < .02*quick.abs().max()  # the emulated reciprocal of a GELU is off by what the draw says
        assert use_quick_parts(model, False) == found and torch.equal(model(**inputs)[0], plain)


def test_branches_meet(gpu):
    x, residual, wide, gate = (torch.randn(s).bfloat16() for s in ((2, 5, 24), (2, 5, 24), (2, 5, 40), (2, 24)))
    assert torch.equal(gated_sum(x, residual, gate), residual + gate[:, None]*x) and torch.equal(gated_sum(x, residual, gate[:1]), residual + gate[:1, None]*x)
    right = torch.cat([x, F.gelu(wide.double(), approximate='tanh').bfloat16()], -1)
    assert torch.allclose(beside_gelu(x, wide).float(), right.float(), rtol=2**-7, atol=1e-6)
    assert gated_sum(x[:, :0].contiguous(), residual[:, :0].contiguous(), gate).shape == (2, 0, 24)
    for wrong, why in ((lambda: gated_sum(x, residual, gate[[0, 1, 1]]), 'gate has 3 rows'), (lambda: gated_sum(x, residual[:1], gate), 'residual has shape'), (lambda: beside_gelu(x, wide[:1]), 'b has shape'),
                       (lambda: beside_gelu(x[..., :20].contiguous(), wide), 'multiple of 8'), (lambda: gated_sum(x, residual.half(), gate), 'residual is torch.float16')):
        with pytest.raises((TypeError, ValueError), match=why): wrong()


def test_a_weight_that_is_no_parameter_is_read_too(gpu):
    x = torch.randn(2, TOKENS, 32).bfloat16()
    for norm in (nn.LayerNorm(32), nn.RMSNorm(32, eps=1e-6), RMSNorm(32, 1e-6)):
        norm = norm.bfloat16().requires_grad_(False)
        use_quick_parts(norm)
        weight = norm.weight*3
        del norm.weight
        norm.weight = weight
        for _ in range(3): quick = norm(x)
        plain = norm.usual.forward(norm, x)
        assert launched(gpu) and (quick - plain).abs().max() < .02*plain.abs().max()


def test_who_reads_an_embedding_again_is_in_another_step(gpu):
    a, b = (AdaLayerNormZeroSingle(WIDTH).bfloat16().requires_grad_(False) for _ in range(2))
    x, e = torch.randn(1, TOKENS, WIDTH).bfloat16(), torch.randn(1, WIDTH).bfloat16()
    for m in (a, b): use_quick_parts(m), m(x, emb=e)
    version, other = e._version, e*2
    ctypes.memmove(e.data_ptr(), other.data_ptr(), e.numel()*2)  # as a replayed graph writes
    assert e._version == version
    for m in (a, b): assert torch.equal(m(x, emb=e)[1], m.usual.forward(m, x, emb=e.clone())[1])
    with torch.inference_mode(): a(x, emb=e)
    b.requires_grad_(True)
    b(x, emb=e)[1].sum().backward()
    assert b.linear.weight.grad is not None


def test_derivatives_of_other_kinds_go_the_old_way(gpu):
    norm, x = nn.LayerNorm(WIDTH).bfloat16().requires_grad_(False), torch.randn(2, TOKENS, WIDTH).bfloat16()
    use_quick_parts(norm)
    with torch.autograd.forward_ad.dual_level():
        y = norm(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        assert torch.autograd.forward_ad.unpack_dual(y).tangent is not None
    assert torch.equal(torch.func.vmap(norm)(x), norm.usual.forward(norm, x)) and not launched(gpu)
    norm(x)
    assert launched(gpu)


def test_types_that_differ_are_left_to_pytorch(gpu):
    y, gate, residual = torch.randn(2, TOKENS, WIDTH).bfloat16(), torch.randn(2, WIDTH).bfloat16(), torch.randn(2, TOKENS, WIDTH).half()
    for _ in range(4): assert torch.equal(between._added(residual, gate, y), residual + gate[:, None]*y)
    class Another(torch.Tensor): pass
    assert between._usable(y) and not between._usable(y.as_subclass(Another))


def test_another_activation_inside_a_swiglu(gpu):
    ff, x = feed_forward('swiglu', [(128, Quantizer(**TOKEN))])
    use_quick_parts(ff)
    called = []
    handle = ff.net[0].activation.register_forward_hook(lambda *args: called.append(1))
    ff(x)
    handle.remove()
    ff.net[0].activation = nn.GELU()
    assert called == [1] and torch.equal(ff(x), ff.usual.forward(ff, x))


def test_classes_are_found_by_their_names():
    ada = AdaLayerNormZeroSingle(WIDTH)
    use_quick_parts(ada)
    assert type(ada).__name__ == 'AdaLayerNormZeroSingle' and type(ada) is not AdaLayerNormZeroSingle and 'QuickAdaLayerNormZeroSingle' in repr(ada)
    assert pickle.loads(pickle.dumps(ada)).norm.__class__ is ada.norm.__class__
    wrapped = ada.norm.forward
    ada.norm.forward = lambda *args: wrapped(*args)  # as hooks of other libraries do
    use_quick_parts(ada, False)
    assert torch.equal(ada.norm(torch.ones(1, 2, WIDTH)), torch.zeros(1, 2, WIDTH)) and type(ada) is AdaLayerNormZeroSingle
