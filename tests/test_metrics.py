"""Metrics beside published libraries, what they refuse, and adapters with random weights of the real classes."""
import importlib
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segquant_nb import metrics
from segquant_nb.metrics import (FID, LPIPS, CLIPScore, ImageReward, ask, bootstrap, draw_latent_error, frechet,
                                 gaussian_distance, judge, latent_error, perceptual, psnr, record_latents,
                                 relative_error, side_by_side, ssim)
from segquant_nb.scenes import Scene, Thing, edges, render, sample_scene
from segquant_nb.zoo import FAMILIES, generate, load, noise_model

pytestmark = pytest.mark.filterwarnings('ignore:.FluxPosEmbed')


@pytest.fixture(scope='module', autouse=True)
def quiet():
    import transformers
    transformers.logging.set_verbosity_error()  # no word about torchvision


def pictures(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# ---- distances ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('shape', [(2, 1, 11, 11), (3, 3, 12, 40), (1, 4, 33, 17)])
def test_psnr_and_ssim_are_those_of_torchmetrics(shape):
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
    x = pictures(*shape).double()
    y = (x + .2*(pictures(*shape, seed=1).double() - .5)).clamp(0, 1)
    torch.testing.assert_close(psnr(x, y), peak_signal_noise_ratio(x, y, data_range=1., reduction='none', dim=(1, 2, 3)),
                               rtol=1e-6, atol=0)
    _, chart = structural_similarity_index_measure(x, y, data_range=1., reduction='none', return_full_image=True)
    torch.testing.assert_close(ssim(x, y), chart[..., 5:-5, 5:-5].flatten(1).mean(1), rtol=1e-10, atol=0)


@pytest.mark.parametrize('metric', [psnr, ssim, lambda x, y: perceptual(judge(), x, y)])
@pytest.mark.parametrize('spoil', [lambda x: x*2 - 1, lambda x: x*255, lambda x: (x*255).byte(), lambda x: x/0 - x/0])
def test_a_wrong_range_is_refused_on_either_side(metric, spoil):
    x = pictures(1, 3, 64, 64)
    metric(x, x.flip(-1))
    for pair in ((spoil(x), x), (x, spoil(x))):
        with pytest.raises(ValueError, match='from 0 to 1'):
            metric(*pair)


def test_what_cannot_be_compared_is_refused():
    x = pictures(2, 3, 64, 64)
    for metric in (psnr, ssim, relative_error, side_by_side, latent_error):
        with pytest.raises(ValueError, match='cannot compare'):
            metric(x, x[:1])
    for wrong in (x[0], x[:0], x[..., 0], list(x), x[None]):
        for metric in (psnr, ssim, side_by_side):
            with pytest.raises(ValueError, match=r'of shape \(B, .*H, W\), from 0 to 1'):
                metric(wrong, wrong)
    with pytest.raises(ValueError, match=r'\(B, 3, H, W\)'):
        side_by_side(x[:, :1], x[:, :1])
    with pytest.raises(ValueError, match='1 titles and 2 pictures'):
        side_by_side(x, x, ['a ring'])
    with pytest.raises(ValueError, match='64, 64'):
        perceptual(judge(), x[..., :32], x[..., :32])
    with pytest.raises(ValueError, match='two at least'):
        frechet(judge(), x, x[:1])


def test_pictures_in_half_precision_are_measured_and_shown():
    x = pictures(2, 3, 64, 64)
    for dtype in (torch.float16, torch.bfloat16):
        assert psnr(x.to(dtype), x).min() > 40 and ssim(x.to(dtype), x).min() > .99
        side_by_side(x.to(dtype), x.to(dtype)).canvas.draw()


def stages(images):
    "The judge's convolutions once more, in float64 NumPy: sums over windows, one output at a time"
    state = {k: v.double().numpy() for k, v in judge().state_dict().items()}
    x, maps = images.double().numpy()*2 - 1, []

    def conv(x, name, stride):
        w = state[name + '.weight']
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::stride, ::stride]
        return np.einsum('bchwij,ocij->bohw', windows, w) + state[name + '.bias'][:, None, None]

    def norm_silu(x, name):
        groups = x.reshape(len(x), 8, -1)
        groups = (groups - groups.mean(2, keepdims=True))/np.sqrt(groups.var(2, keepdims=True) + 1e-5)
        y = groups.reshape(x.shape)*state[name + '.weight'][:, None, None] + state[name + '.bias'][:, None, None]
        return y/(1 + np.exp(-y))
    for i in range(4):
        x = norm_silu(conv(x, f'stages.{i}.0', 2 if i else 1), f'stages.{i}.1')
        x = norm_silu(conv(x, f'stages.{i}.3', 1), f'stages.{i}.4')
        maps.append(x)
    return maps


def test_perceptual_and_frechet_are_those_of_brute_force():
    "Pixel by pixel, and by the eigenvalues of the product of covariances, in float64 from the judge's weights on"
    x, y = (render([sample_scene(s) for s in seeds]) for seeds in (range(5), range(5, 10)))
    x = (x + .1*torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    a, b = stages(x), stages(y)
    want = []
    for n in range(5):
        total = 0.
        for s, t in zip(a, b):
            places = [(i, j) for i in range(s.shape[2]) for j in range(s.shape[3])]
            total += sum(((s[n, :, i, j]/np.linalg.norm(s[n, :, i, j]) - t[n, :, i, j]/np.linalg.norm(t[n, :, i, j]))**2).sum()
                         for i, j in places)/len(places)
        want.append(total)
    torch.testing.assert_close(perceptual(judge(), x, y).double(), torch.tensor(want).double(), rtol=1e-4, atol=1e-5)
    f, g = a[-1].mean((2, 3)), b[-1].mean((2, 3))
    cross = np.sqrt(np.linalg.eigvals(np.cov(f.T) @ np.cov(g.T)).real.clip(0)).sum()
    distance = ((f.mean(0) - g.mean(0))**2).sum() + np.trace(np.cov(f.T)) + np.trace(np.cov(g.T)) - 2*cross
    assert frechet(judge(), x, y) == pytest.approx(distance, rel=1e-3)


def test_gaussian_distance_is_the_one_of_scipy_free_arithmetic():
    "tr(Σ₁Σ₂)^½ by the eigenvalues of the product, which is not symmetric, in NumPy"
    x, y = (torch.randn(50, 6, generator=torch.Generator().manual_seed(s)).double() for s in (0, 1))
    y = y @ torch.randn(6, 6, generator=torch.Generator().manual_seed(2)).double() + 1
    a, b = np.cov(x.numpy().T), np.cov(y.numpy().T)
    cross = np.sqrt(np.linalg.eigvals(a @ b).real.clip(0)).sum()
    want = ((x.mean(0) - y.mean(0))**2).sum().item() + np.trace(a) + np.trace(b) - 2*cross
    assert gaussian_distance(x, y) == pytest.approx(want, rel=1e-10)


def test_bootstrap_refuses_what_has_no_mean():
    for values, said in ((torch.tensor([]), 'nothing'), (torch.tensor([1., torch.inf]), '1 of 2 .* infinite'),
                         (torch.tensor([torch.nan]), 'not finite'), (torch.zeros(3, 4), r'shape \(3, 4\)'), (torch.tensor(1.), r'\(\)')):
        with pytest.raises(ValueError, match=said):
            bootstrap(values)
    for wrong in (dict(confidence=95), dict(confidence=0), dict(draws=0)):
        with pytest.raises(ValueError, match='expected a share between 0 and 1'):
            bootstrap(torch.rand(4), **wrong)
    assert bootstrap(torch.tensor([True, False]))[0] == .5


def test_titles_stand_above_the_first_row_only():
    x = pictures(2, 3, 16, 16)
    axes = side_by_side(x, x, ['a ring', 'a cross']).axes
    assert [ax.get_title() for ax in axes] == ['a ring', 'a cross'] + ['']*4


# ---- the judge ------------------------------------------------------------------------------------------------------
class Parrot(nn.Module):
    "A judge that gives the answers it was told"
    def __init__(self, told):
        super().__init__()
        self.told = told

    def forward(self, images):
        return [F.one_hot(column.clamp(min=0), 16).float() for column in self.told.T]


def test_one_thing_has_no_other_way_round():
    "The second thing that the judge sees where there is none must not stand in for the first"
    scene = Scene((Thing('small', 'red', 'plain', 'ring', 30., 30.),), None, 'dark', 'plain', 0)
    right = metrics.answers([scene])
    wrong = right.clone()
    wrong[0, 3:7] = torch.tensor([1, 5, 3, 2])  # nothing of it is right …
    wrong[0, 7:] = right[0, 3:7]  # … and what is asked for is said of a second thing
    found = ask(Parrot(wrong), torch.zeros(1, 3, 64, 64), [scene])
    assert found.pop('relation').isnan() and found['layout'] == 1
    assert not any(v.isnan() for v in found.values()) and found['color'] == found['shape'] == found['texture'] == 0


def test_of_two_equal_things_neither_is_swapped():
    scene = Scene((Thing('small', 'red', 'plain', 'ring', 20., 30.), Thing('small', 'red', 'plain', 'ring', 44., 30.)), 'left of', 'dark', 'plain', 0)
    found = ask(Parrot(metrics.answers([scene])), torch.zeros(1, 3, 64, 64), [scene])
    assert found['relation'] == found['color'] == 1


def test_a_relation_between_things_that_are_not_there_is_wrong():
    "Two things were asked for and the judge sees one, or the other axis"
    scene = next(s for s in map(sample_scene, range(99)) if s.relation)
    told = metrics.answers([scene])
    for layout in range(3):
        told[0, 0] = layout
        right = layout == metrics.answers([scene])[0, 0]
        assert ask(Parrot(told), torch.zeros(1, 3, 64, 64), [scene])['relation'] == float(right)


def test_swapped_things_are_wrong_in_relation_only():
    scene = next(s for s in map(sample_scene, range(99)) if s.relation and s.things[0].words != s.things[1].words)
    told = metrics.answers([scene])
    told = torch.cat([told[:, :3], told[:, 7:], told[:, 3:7]], 1)
    found = ask(Parrot(told), torch.zeros(1, 3, 64, 64), [scene])
    assert found.pop('relation') == 0 and all(v == 1 for v in found.values())


# ---- latents, step by step ------------------------------------------------------------------------------------------
@pytest.mark.parametrize('controlnet', [False, True])
@pytest.mark.parametrize('name', FAMILIES)
def test_latents_of_every_family_and_its_twin(name, controlnet):
    prompts, steps = ['a red ring', 'a small blue square', 'a cross'], 3
    pipe = load(name, controlnet)
    lines = edges(render([sample_scene(s) for s in range(3)])) if controlnet else None
    options = dict(edges=lines, num_inference_steps=steps, seed=5)
    before = generate(pipe, prompts, **options)
    reference = record_latents(pipe, prompts, **options)
    assert reference.shape[:2] == (3, steps)
    last = generate(pipe, prompts, output_type='latent', **options)
    assert torch.equal(reference[:, -1], last)  # what is recorded is what the pipeline goes on with
    assert torch.equal(generate(pipe, prompts, **options), before)  # and recording leaves no trace
    assert not latent_error(record_latents(pipe, prompts, **options), reference).any()
    assert latent_error(record_latents(pipe, prompts, batch=1, **options), reference).max() < 1e-3

    with torch.no_grad():
        for weight in noise_model(pipe).parameters():
            weight.mul_(1.01)  # the same pipeline, another denoiser
    error = latent_error(record_latents(pipe, prompts, **options), reference)
    assert error.shape == (3, steps) and (error > 1e-5).all() and (error[:, -1] > error[:, 0]).all()
    by_hand = (record_latents(pipe, prompts, **options) - reference)[1, 2].norm()/reference[1, 2].norm()
    assert error[1, 2].item() == pytest.approx(by_hand.item(), rel=1e-5)
    draw_latent_error({name: error}).canvas.draw()


def test_a_callback_of_the_callers_is_called_and_what_it_changes_is_recorded():
    pipe, seen = load('tiny-sdxl'), []
    def theirs(pipe, step, time, given):
        seen.append((step, sorted(given)))
        return {'latents': given['latents']*0} if step == 1 else {}
    options = dict(num_inference_steps=3, callback_on_step_end=theirs)
    found = record_latents(pipe, ['a ring', 'a cross'], callback_on_step_end_tensor_inputs=['prompt_embeds'], **options)
    assert seen == [(i, ['latents', 'prompt_embeds']) for i in range(3)]
    assert found[:, 0].any() and not found[:, 1].any() and found[:, 2].any()
    theirs_alone = generate(pipe, ['a ring', 'a cross'], output_type='latent', **options)
    assert torch.equal(found[:, -1], theirs_alone)


def test_latents_of_a_pipeline_that_is_not_of_the_zoo():
    from graph_pipelines import sd3_pipeline
    pipe = sd3_pipeline()
    pipe.set_progress_bar_config(disable=True)
    latents = record_latents(pipe, ['abc', 'xyz'], num_inference_steps=2, height=64, width=96)
    assert latents.shape == (2, 2, 4, 8, 12)


# ---- the published metrics: what is missing -------------------------------------------------------------------------
@pytest.mark.parametrize('metric, module', [(LPIPS, 'torchvision'), (LPIPS, 'torchmetrics'), (FID, 'torch_fidelity')])
def test_a_missing_package_is_named(metric, module, monkeypatch):
    real = importlib.import_module

    def without(name, *more):
        if name.split('.')[0] == module:
            raise ModuleNotFoundError(f'No module named {module!r}', name=module)
        return type(sys)(name) if name.split('.')[0] in ('torchvision', 'torchmetrics') else real(name, *more)
    monkeypatch.setattr(importlib, 'import_module', without)
    with pytest.raises(ImportError, match=rf"^{metric.__name__} needs {module}: pip install 'segquant_nb\[eval\]'\.$"):
        metric()


def test_a_torchvision_of_another_build_is_named(monkeypatch):
    def broken(name, *more):
        raise RuntimeError('operator torchvision::nms does not exist')
    monkeypatch.setattr(importlib, 'import_module', broken)
    with pytest.raises(ImportError, match='LPIPS needs a torchvision built for torch .*nms'):
        LPIPS()


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    "Where torch.hub looks for weights"
    before = torch.hub.get_dir()
    torch.hub.set_dir(tmp_path)
    (tmp_path/'checkpoints').mkdir()
    yield tmp_path/'checkpoints'
    torch.hub.set_dir(before)


def needs(*names):
    "These packages, or skip; a torchvision of another build fails with RuntimeError"
    try:
        return [importlib.import_module(n) for n in names]
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"pip install 'segquant_nb[eval]' to run this: {error}")


@pytest.mark.parametrize('metric, package, url', [(LPIPS, 'torchvision.models', 'pytorch.org/models/alexnet'),
                                                  (FID, 'torch_fidelity', 'weights-inception-2015-12-05')])
def test_missing_weights_are_named_with_their_address(metric, package, url, empty_cache):
    needs(package, 'torchmetrics')
    with pytest.raises(FileNotFoundError, match=f'{metric.__name__} needs weights .*https.*{url}.*checkpoints'):
        metric()


def test_missing_models_of_the_hub_are_named(tmp_path):
    for make, said in ((lambda: CLIPScore('someone/nothing'), 'CLIPScore needs someone/nothing, .*hf download'),
                       (lambda: CLIPScore(tmp_path/'none'), 'CLIPScore needs .*none, which is neither'),
                       (lambda: ImageReward(tmp_path/'none.pt'), 'none.pt is not there: .*hf download THUDM/Im')):
        with pytest.raises(FileNotFoundError, match=said):
            make()


def test_nothing_is_downloaded(monkeypatch):
    import huggingface_hub
    import transformers
    asked = []

    def read(*names, **options):
        asked.append(options['local_files_only'])
        raise OSError('not here')
    monkeypatch.setattr(transformers.CLIPProcessor, 'from_pretrained', read)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', read)
    for metric, model in ((CLIPScore, 'openai/clip-vit-large-patch14'), (ImageReward, 'THUDM/ImageReward')):
        with pytest.raises(FileNotFoundError, match=f'{metric.__name__} needs {model}, .*`hf download {model}`'):
            metric()
    assert asked == [True, True]


# ---- the published metrics: real classes, random weights ------------------------------------------------------------
def test_lpips_converts_the_range(empty_cache):
    torchvision, functional = needs('torchvision', 'torchmetrics.functional.image')
    url = torchvision.models.AlexNet_Weights.DEFAULT.url
    torch.manual_seed(0)
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), empty_cache/url.rsplit('/', 1)[1])
    x, y = pictures(3, 3, 64, 64), pictures(3, 3, 64, 64, seed=1)
    found = LPIPS()(x, y)
    want = functional.learned_perceptual_image_patch_similarity(2*x - 1, 2*y - 1, 'alex', reduction='none')
    torch.testing.assert_close(found, want)
    assert not LPIPS()(x, x).any() and LPIPS()(x[:1], y[:1]).shape == (1,)
    trap = functional.learned_perceptual_image_patch_similarity(x, y, 'alex', reduction='none')
    assert (found - trap).abs().min() > 1e-3
    with pytest.raises(ValueError, match='from 0 to 1'):
        LPIPS()(2*x - 1, 2*y - 1)


def test_fid_sees_eight_bits_and_takes_batches(empty_cache, monkeypatch):
    module, theirs = needs('torch_fidelity.feature_extractor_inceptionv3', 'torchmetrics.image.fid')
    net, path = module.FeatureExtractorInceptionV3, empty_cache/module.URL_INCEPTION_V3.rsplit('/', 1)[1]
    with monkeypatch.context() as random_weights:
        random_weights.setattr(module, 'load_state_dict_from_url', lambda *a, **k: {})
        random_weights.setattr(net, 'load_state_dict', lambda *a, **k: None)
        torch.manual_seed(0)
        state = net('inception-v3-compat', ['2048']).state_dict()
        torch.save({k: v*6**.5 if v.ndim == 4 else v for k, v in state.items()}, path)  # or signals would fade
    fid, x, real = FID(), pictures(4, 3, 64, 64), pictures(5, 3, 80, 64, seed=1)
    extract = theirs.NoTrainInceptionV3('inception-v3-compat', ['2048'], str(path), antialias=False)
    with torch.no_grad():
        want = extract((x*255).round().byte())
    torch.testing.assert_close(fid.features(x), want)
    torch.testing.assert_close(fid.features(iter(x.split(3))), want, rtol=1e-4, atol=1e-4)
    assert fid.features(x).std(0).max() > 1e-3  # pictures that differ look different
    monkeypatch.setattr(metrics, 'gaussian_distance', lambda a, b: (a[:, :8], b[:, :8]))  # 2048 wide takes a while
    a, b = fid(x, real=real)
    torch.testing.assert_close((a, b), (want[:, :8], fid.features(real)[:, :8]), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match='from 0 to 1'):
        fid(x*255, real)


@pytest.fixture(scope='module')
def tiny_clip(tmp_path_factory):
    "A folder with a random CLIP of the real class, and its parts"
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor
    from segquant_nb.zoo import clip_tokenizer
    tokens, width = clip_tokenizer(), dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2)
    text = dict(vocab_size=len(tokens), eos_token_id=tokens.eos_token_id, max_position_embeddings=24)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(projection_dim=32, vision_config=dict(image_size=32, patch_size=8) | width,
                                 text_config=text | width)).eval()
    small = CLIPImageProcessorPil(size={'shortest_edge': 32}, crop_size={'height': 32, 'width': 32})
    folder = tmp_path_factory.mktemp('clip')
    model.save_pretrained(folder)
    CLIPProcessor(small, tokens).save_pretrained(folder)
    return folder, model, small, tokens


def test_clip_score_is_the_cosine_of_what_clip_says_of_files(tiny_clip):
    "The reference goes through Pillow, one picture at a time, and through the model's parts"
    from PIL import Image
    folder, model, small, tokens = tiny_clip
    scenes = [sample_scene(s) for s in range(6)]
    x = F.interpolate(render(scenes), (50, 71), mode='bilinear')  # not a multiple of what CLIP sees
    words = ['a red ring', 'a blue square', 'zebra '*99, '', '🦄', 'A LARGE CIRCLE']
    found = CLIPScore(str(folder))(x, words)
    for picture, text, score in zip(x, words, found):
        file = Image.fromarray((picture*255).round().byte().permute(1, 2, 0).numpy())
        with torch.no_grad():
            a = model.get_image_features(small(file, return_tensors='pt').pixel_values).pooler_output
            b = model.get_text_features(tokens([text], truncation=True, return_tensors='pt').input_ids).pooler_output
        assert score.item() == pytest.approx(max(100*F.cosine_similarity(a, b).item(), 0), abs=1e-4)
    assert found.max() > 1 and found.shape == (6,)
    for wrong in ('a red ring', ['a red ring']):
        with pytest.raises(ValueError, match='6 pictures and 1 prompts'):
            CLIPScore(str(folder))(x, wrong)
    with pytest.raises(ValueError, match='from 0 to 1'):
        CLIPScore(str(folder))(x*255, words)


def image_reward_checkpoint(width=128, layers=2, words=64, positions=48, side=32, patch=16):
    "A small state dict with the names of ImageReward.pt; NumPy keeps what `RandomState` draws for good"
    def linear(name, out, inner): return {f'{name}.weight': (out, inner), f'{name}.bias': (out,)}
    def norm(name): return {f'{name}.weight': (width,), f'{name}.bias': (width,)}
    v, t = 'blip.visual_encoder.', 'blip.text_encoder.'
    shapes = {v + 'cls_token': (1, 1, width), v + 'pos_embed': (1, (side//patch)**2 + 1, width),
              v + 'patch_embed.proj.weight': (width, 3, patch, patch), v + 'patch_embed.proj.bias': (width,),
              **norm(v + 'norm'), **norm(t + 'embeddings.LayerNorm'),
              t + 'embeddings.word_embeddings.weight': (words, width),
              t + 'embeddings.position_embeddings.weight': (positions, width)}
    for i in range(layers):
        b, c = f'{v}blocks.{i}.', f'{t}encoder.layer.{i}.'
        shapes |= {**norm(b + 'norm1'), **norm(b + 'norm2'), **linear(b + 'attn.qkv', 3*width, width),
                   **linear(b + 'attn.proj', width, width), **linear(b + 'mlp.fc1', 4*width, width),
                   **linear(b + 'mlp.fc2', width, 4*width), **linear(c + 'intermediate.dense', 4*width, width),
                   **linear(c + 'output.dense', width, 4*width), **norm(c + 'output.LayerNorm')}
        for kind in ('attention', 'crossattention'):
            shapes |= {**linear(f'{c}{kind}.output.dense', width, width), **norm(f'{c}{kind}.output.LayerNorm')}
            for part in ('query', 'key', 'value'): shapes |= linear(f'{c}{kind}.self.{part}', width, width)
    for i, (inner, out) in {0: (width, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}.items():
        shapes |= linear(f'mlp.layers.{i}', out, inner)
    state = {}
    for i, (name, shape) in enumerate(shapes.items()):
        noise = torch.from_numpy(np.random.RandomState(i).randn(*shape)).float()
        state[name] = noise*(1.5/shape[-1]**.5 if len(shape) > 1 else .2) + ('orm' in name and 'weight' in name)
    return state | {t + 'embeddings.position_ids': torch.arange(positions)[None]}


def test_image_reward_scores_as_its_own_package(tmp_path):
    """What `ImageReward.score` of image-reward 1.5 made of these weights, prompts and pictures (as files): its own
    ImageReward.py and models/BLIP at this size, with transformers 4.38.2, timm 0.6.13 and fairscale 0.4.13. At full size, with
    random weights, package and adapter agreed as closely."""
    torch.save(image_reward_checkpoint(), tmp_path/'ImageReward.pt')
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'large', 'small', 'red', 'blue', 'circle', 'square',
             'of', 'left', '##s']
    (tmp_path/'vocab.txt').write_text('\n'.join(words) + '\n')
    coarse = torch.from_numpy(np.random.RandomState(0).rand(2, 3, 5, 7)).float()
    x = (coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)*255).round()/255
    prompts = ['a large red circle', 'a small blue square left of circles']
    reward = ImageReward(tmp_path/'ImageReward.pt', str(tmp_path))
    found = reward(x[[0, 0, 1, 1]], prompts*2)
    want = torch.tensor([1.273977518081665, 9.672927856445312, 8.437471389770508, 5.633726596832275])
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match='2 pictures and 1 prompts'):
        reward(x, prompts[:1])
    with pytest.raises(FileNotFoundError, match='ImageReward needs .*nowhere'):
        ImageReward(tmp_path/'ImageReward.pt', str(tmp_path/'nowhere'))
    torch.save({'weight': torch.zeros(1)}, tmp_path/'other.pt')
    with pytest.raises(ValueError, match='other.pt is not the checkpoint of ImageReward'):
        ImageReward(tmp_path/'other.pt', str(tmp_path))
