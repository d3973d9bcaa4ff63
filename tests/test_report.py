"""Reports: numbers against an independent count, a page that shows itself without a network, files that are whole."""
import math
import os
import re
import shutil
from html import unescape
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from segquant_nb import reporting
from segquant_nb.ops import use_emulation
from segquant_nb.quantization import quantize, quantize_pipeline
from segquant_nb.reporting import (Kept, LayerReport, Report, Trial, draw_layers, draw_trajectory, report,
                                   report_numbers, report_page, save_report, try_prompts, write_whole)
from segquant_nb.zoo import load


class Net(nn.Module):
    "Layers of a few kinds, and one that calibration never calls"
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(3))
        self.conv, self.spare, self.norm = nn.Conv1d(1, 1, 3, padding=1), nn.Linear(32, 32), nn.LayerNorm(32)

    def forward(self, x):
        x = self.conv(x[:, None])[:, 0]
        for block in self.blocks: x = x + block(x)
        return self.norm(x)


@pytest.fixture(scope='module')
def quantized():
    torch.manual_seed(0)
    net = Net().eval()
    samples = [torch.randn(64, 32) for _ in range(4)]
    config = {'default': {'seglinear': True}, 'blocks.1.*': {'enable': False}}
    return net, quantize(net, samples, config, progress=False)


def trial(images, latents=None):
    n = len(images)
    latents = torch.ones(n, 4, 2) if latents is None else latents
    return Trial([f'<prompt> & "{i}"' for i in range(n)], 7, {}, images, latents, 1.5, 3)


def made_up(name='w8a8', before=None, noise=.02, accuracy=None, layers=6):
    "A report with pictures, without a pipeline"
    g = torch.Generator().manual_seed(1)
    before = before or trial(torch.rand(9, 3, 16, 16, generator=g)*.6 + .2)
    images = before.images + noise*torch.linspace(.5, 1, 9)[:, None, None, None]
    after = trial(images, before.latents*(1 + noise*torch.arange(1, 5)[:, None]))
    rows = [LayerReport(f'blocks.{i//2}.part{i % 2}', '8 → 8', 'one scale', 'int8', 'int8', 'emulation', 'no reason', 128,
                        72, 8, .01*(i + 1)) for i in range(layers)]
    kept = [Kept('<conv>', 'Conv2d: only linear layers are quantized', 100)]
    names = ['<conv>', *(r.name for r in rows)]
    return Report(name, 'Model', names, rows, kept, [Kept('vae', 'not the denoiser', 1000)], before, after, accuracy)


def test_every_layer_is_counted_once_and_bytes_are_those_of_the_layers(quantized):
    net, small = quantized
    r = report(small)
    linear = {n for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d))}
    assert set(r.names) == linear == {l.name for l in r.layers} | {k.name for k in r.kept}
    assert {k.name for k in r.kept} == {'conv', 'spare', 'blocks.1.0', 'blocks.1.2'}
    assert {k.name: 'never called' in k.reason for k in r.kept}['spare']
    for row in r.layers:
        n, k = net.get_submodule(row.name).weight.shape
        made = small.get_submodule(row.name)
        scales = 4*(made.weight_scale.numel() + sum(v.numel() for name, v in made.state_dict().items()
                                                    if name.startswith('input')))
        assert row.before == 2*(n*k + n) and row.after == n*k + scales + 2*n and row.floats == 2*n
        assert row.error == small.quantization.errors[row.name] and math.isclose(
            row.decibels, 10*math.log10(1/row.error**2))
    assert r.bytes_before == sum(2*p.numel() for n in linear for p in net.get_submodule(n).parameters())
    assert [(k.name, k.bytes) for k in r.outside] == [('parameters outside of layers', 2*64)]
    polarity = {row.name: row.polarity for row in r.layers}
    assert polarity['blocks.0.2'] == 'two scales' and polarity['blocks.0.0'] == 'one scale'


def test_a_kernel_is_named_only_if_it_runs(quantized):
    small = quantized[1]
    use_emulation(small)
    r = report(small)
    assert {l.kernel for l in r.layers} == {'emulation'} and all('use_kernels would take' in l.why for l in r.layers)
    assert f'{len(r.layers)} of {len(r.names)} layers run emulated' in repr(r) and 'run emulated' in report_page(r)


def test_words_follow_numbers():
    good, bad, same = made_up(noise=.001), made_up(noise=.1), made_up(noise=0.)
    assert 'hardly anybody' in good.headline and 'anybody sees it' in bad.headline and 'are equal' in same.headline
    worse = torch.ones(9), torch.linspace(.5, .8, 9)
    assert 'followed worse' in made_up(accuracy=worse).headline and 'better' in made_up(accuracy=worse[::-1]).headline
    assert 'as before, as far as 9 pictures can tell' in made_up(accuracy=(worse[0], worse[0])).headline
    larger = made_up()
    object.__setattr__(larger.layers[0], 'after', 10_000)
    assert 'MORE memory' in larger.headline
    assert 'not quantized' in repr(good) and '<conv>' in repr(good) and 'vae 1.00 kB' in repr(good)


def test_numbers_are_those_of_the_pictures():
    accuracy = torch.ones(9), torch.full((9,), .5)
    first, row = report_numbers(made_up(noise=.1, accuracy=accuracy))
    assert first['psnr'] is None and first['layers_kept'] == 7 and row['layers_quantized'] == 6 and row['layers_kept'] == 1
    shift = .1*torch.linspace(.5, 1, 9).double()
    assert abs(row['psnr'] - (-20*shift.log10()).mean()) < 1e-3 and row['accuracy'] == .5
    assert abs(row['latent_error'] - .4) < 1e-5 and math.isclose(row['seconds_a_picture'], 1.5/9)
    assert row['psnr_low'] < row['psnr'] < row['psnr_high'] and math.isclose(row['megabytes'], (6*72 + 100)/1e6)
    assert math.isinf(report_numbers(made_up(noise=0.))[1]['psnr'])


class Page(HTMLParser):
    "Tags that are opened and closed, attributes, text"
    OPEN = {'meta', 'img', 'br', 'td', 'th'}

    def __init__(self, page):
        super().__init__()
        self.stack, self.links, self.words = [], [], []
        self.feed(page)
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        if tag not in self.OPEN: self.stack.append(tag)
        self.links += [v for k, v in attrs if k in ('src', 'href', 'srcset', 'poster', 'data')]

    def handle_startendtag(self, tag, attrs): pass
    def handle_endtag(self, tag): assert self.stack.pop() == tag, tag
    def handle_data(self, data): self.words.append(data)


def test_the_page_is_whole_and_fetches_nothing():
    before = made_up().before
    two = [made_up('one & only', before), made_up('<b>two</b>', before, noise=.15)]
    page = report_page(two, 'A <title> & more')
    parsed = Page(page)
    assert parsed.links and all(link.startswith('data:image/') for link in parsed.links)
    assert not re.search(r'https?:|url\(|@import|<script', page)
    words = ' '.join(parsed.words)
    assert 'A <title> & more' in words and '<b>two</b>' in words and '<prompt> & "0"' in words and '<conv>' in words
    assert '<b>two' not in page and '<conv>' not in page  # never as tags
    worst = int(torch.stack([r.psnr for r in two]).amin(0).argmin())
    assert 'with 3 threads' in words  # those of the trial, not of whoever writes the page
    assert worst == 8 and words.count('suffered most') == 2 and 'prompt> & "8"' in words and 'prompt> & "7"' not in words
    assert page.count('<figure class="card"><div class="grid"') == 6 and page.count('<details>') == 2


def test_layers_that_stay_are_as_easy_to_find():
    page = unescape(report_page(made_up()))
    assert '1 of 7' in page and 'layers not quantized' in page and 'What is not quantized' in page
    assert page.count('not quantized: Conv2d') == 1  # in the long table, too
    drawn = draw_layers(made_up())
    assert drawn.count('<circle') == 6 and drawn.count(': not quantized</title>') == 1


def test_drawings_stand_where_the_numbers_are():
    r = made_up(noise=.1)
    centers = [float(y) for y in re.findall(r'cy="([\d.]+)"', draw_layers(r))]
    assert centers == sorted(centers, reverse=True)  # larger errors are higher up
    logs = [math.log(l.error) for l in r.layers]
    slopes = [(a - b)/(y - x) for x, y, a, b in zip(logs, logs[1:], centers, centers[1:])]
    assert max(slopes) - min(slopes) < 1
    line = re.search(r'polyline points="([^"]*)"', draw_trajectory(r))[1].split()
    assert len(line) == 4 and float(line[0].split(',')[1]) > float(line[3].split(',')[1])
    assert all(0 <= float(n) <= 700 for p in line for n in p.split(','))
    blind = made_up(noise=0.)
    assert 'nan' not in draw_trajectory(blind) and 'inf' not in draw_trajectory(blind)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path/'report.html'
    save_report(made_up(), path)
    old = path.read_bytes()

    def full(part, content):
        with open(part, 'wb') as file: file.write(content[:100])
        raise KeyboardInterrupt
    monkeypatch.setattr(reporting.Path, 'write_bytes', full)
    with pytest.raises(KeyboardInterrupt): write_whole(path, b'x'*1000)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ['report.html']


def test_what_cannot_be_reported_is_refused(quantized, tmp_path):
    net, small = quantized
    with pytest.raises(TypeError, match='expected a model or a pipeline, got a str'): report('model')
    for attempt, said in ((lambda: report(net), 'has not been quantized'),
                          (lambda: report(small, made_up().before), 'drawn by a pipeline'),
                          (lambda: report(small, accuracy=len), 'accuracy is about pictures'),
                          (lambda: report_page([]), 'no reports'),
                          (lambda: report_page([made_up(), made_up()]), 'one trial'),
                          (lambda: save_report(made_up(), tmp_path/'a.txt'), 'ends in .html')):
        with pytest.raises(ValueError, match=said): attempt()
    assert not os.listdir(tmp_path)


class Net1(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
    def forward(self, x): return self.b(self.a(x))


class Heads(Net1):
    def forward(self, x): return self.a(x), self.b(x)


def shown(r):
    "All that there is to see, once"
    page = Page(report_page(r))
    return ' '.join([repr(r), r._repr_html_(), str(report_numbers(r)), draw_layers(r), *page.words])


def test_a_report_of_a_model_where_nothing_is_quantized():
    torch.manual_seed(0)
    net = Heads().eval()
    with torch.no_grad(): net.a.weight[0, 0] = net.b.weight[0, 0] = torch.nan
    with pytest.warns(UserWarning, match='nothing was quantized: a and 1 more'): made = quantize(net, [torch.randn(64, 32)], progress=False)
    said = shown(report(made))
    assert 'nothing is quantized (2 layers stay as they were)' in said and 'a, b (the weight is not finite in 1 of 1024 places)' in said
    assert 'nothing was quantized' in repr(made.quantization)
    empty = made_up(layers=0)
    assert 'nothing is quantized' in shown(empty) and 'likeness to the original' in report_page(empty)


def test_reports_of_a_failed_layer_of_one_layer_and_of_an_error_that_is_no_number():
    torch.manual_seed(0)
    net = Net1().eval()
    with torch.no_grad(): net.b.weight[0, 0] = torch.inf
    failed = report(quantize(net, [torch.randn(64, 32)], progress=False))
    said = shown(failed)
    assert '1 of 2 layers not quantized' in said and 'b (the weight is not finite' in repr(failed) and '<circle' in said
    single = shown(report(quantize(nn.Sequential(nn.Linear(32, 8)).eval(), [torch.randn(64, 32)], progress=False)))
    assert 'all 1 layers quantized' not in single and 'the only layer is quantized' in single
    odd = made_up()
    object.__setattr__(odd.layers[2], 'error', math.nan)
    assert 'cy="nan' not in shown(odd) and '--w:nan' not in report_page(odd)


def test_errors_that_flatter_are_called_so():
    torch.manual_seed(0)
    r = report(quantize(Net1().eval(), [torch.randn(10, 32)], progress=False))
    assert r.judged in shown(r) and 'errors of layers are too small, as 2 of 2 layers' in repr(r)
    r = report(quantize(Net1().eval(), [torch.randn(100, 32)], progress=False))
    assert 'on inputs that nothing was fitted to' in report_page(r) and 'too small' not in shown(r)


def test_a_compiled_model_is_what_it_was():
    torch.manual_seed(0)
    made = quantize(Net1().eval(), [torch.randn(100, 32)], progress=False)
    assert repr(report(torch.compile(made, backend='eager'))) == repr(report(made))


SIZES = {'wide': {'width': 1280, 'height': 900}, 'phone': {'width': 390, 'height': 844}}


def test_a_browser_shows_it_on_every_screen(tmp_path):
    sync_api = pytest.importorskip('playwright.sync_api')
    names = ('chromium', 'chromium-browser', 'google-chrome')
    chromium = os.environ.get('CHROMIUM') or next(filter(None, map(shutil.which, names)), None)
    if not chromium: pytest.skip('no Chromium')
    before = made_up().before
    path = save_report([made_up('w8a8', before), made_up('w4a8', before, .15)], tmp_path/'report.html')
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=['--no-sandbox', '--disable-gpu'])
        grounds = set()
        for size, scheme in (('wide', 'light'), ('wide', 'dark'), ('phone', 'light')):
            page = browser.new_page(viewport=SIZES[size], color_scheme=scheme)
            asked, troubles = [], []
            page.on('request', lambda r: asked.append(r.url))
            page.on('console', lambda m: troubles.append(m.text))
            page.goto(path.as_uri())
            assert not troubles and all(u.startswith(('file:', 'data:')) for u in asked)
            assert page.evaluate('document.documentElement.scrollWidth') == SIZES[size]['width']  # nothing sticks out
            assert page.evaluate('[...document.images].every(i => i.complete && i.naturalWidth)')
            assert page.locator('.narrow svg').first.is_visible() == (size == 'phone')
            grounds.add(page.evaluate('getComputedStyle(document.body).backgroundColor'))
        assert len(grounds) == 2  # light and dark
        page.emulate_media(media='print')
        assert page.locator('table').first.is_visible()  # on paper it is unfolded
        browser.close()


def test_pictures_of_another_pipeline_are_no_before():
    pipe = load('tiny-flux')
    call = dict(height=64, width=64, num_inference_steps=2)
    small = quantize_pipeline(pipe, ['a red circle'], 'baseline', steps=1, progress=False, **call)
    before = try_prompts(load('tiny-sd35'), ['a large red plain circle, plain light background'], **call)
    with pytest.raises(ValueError, match='drawn by a StableDiffusion3Pipeline, and this is a FluxPipeline'): report(small, before)
    with pytest.raises(TypeError, match='expected what try_prompts returns'): report(small, 'pictures')
