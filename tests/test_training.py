"""What the notebook does not show of training: signs and weights of the losses, runs that are killed, bad calls."""
import copy
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from segquant_nb import training
from segquant_nb.scenes import edges
from segquant_nb.training import (PARTS, Denoising, Recipe, Task, control_task, denoiser_task, distillation_task, judge_task,
                                  make_pool, recipe_of, save_weights, text_task, train, train_part, vae_task, with_edges,
                                  with_latents)
from segquant_nb.zoo import FAMILIES, WEIGHTS, load, noise_model, read_weights

pytestmark = pytest.mark.filterwarnings('ignore:.FluxPosEmbed')


@pytest.fixture(scope='module', autouse=True)
def quiet():
    import diffusers
    import transformers
    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()


@pytest.fixture(scope='module')
def pool():
    "Scenes that training never showed"
    return make_pool(64, held_out=True).to('cpu')


@torch.no_grad()
def loss_of(task, module, steps=2):
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        losses.append(sum(task.loss(module, step).values()).item())
    return sum(losses)/steps


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- losses: what trained weights reach, and no other sign, scale, time or condition would ----------------------------
@pytest.mark.parametrize('name, error, control', [('tiny-sd35', .1977, .1617), ('tiny-flux', .2207, .1674),
                                                  ('tiny-sdxl', .0387, .1314)])
def test_trained_weights_are_good_at_the_losses(name, error, control, pool):
    pipe = load(name, controlnet=True)
    assert loss_of(denoiser_task(load(name), pool, batch=64), noise_model(pipe)) == pytest.approx(error, rel=.03)
    task = control_task(load(name), pool, batch=32)
    assert loss_of(task, pipe.controlnet) == pytest.approx(control, rel=.03)
    assert loss_of(task, task.module) > 1.1*control  # a net that says nothing yet


def test_flow_matching_and_noise_prediction_by_their_definitions():
    "Undo what was predicted and the picture is there again"
    for name in FAMILIES:
        job, x = Denoising(load(name)), torch.randn(5, 16, 16, 16, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(0)
        z, t, target = job.noisy(x)
        s = t.view(-1, 1, 1, 1).double()
        if name == 'tiny-sdxl':  # as DDPM has it, with the betas from the scheduler's description
            betas = torch.linspace(.00085**.5, .012**.5, 1000, dtype=torch.float64)**2
            a = (1 - betas).cumprod(0)[t].view(-1, 1, 1, 1)
            back = (z - (1 - a).sqrt()*target)/a.sqrt()
        else:
            back = z - s/1000*target  # straight back along the flow
        torch.testing.assert_close(back.float(), x, atol=2e-4, rtol=1e-4)
        assert target.std() == pytest.approx(1. if name == 'tiny-sdxl' else 2**.5, rel=.05)


def test_control_of_sdxl_is_weighed_as_a_v_prediction(pool):
    "The error of v = √a·noise − √(1−a)·picture, made from noise and picture that belong to z"
    pipe = load('tiny-sdxl')
    task, job = control_task(pipe, pool, batch=8), Denoising(pipe)
    rows = torch.arange(8)
    torch.manual_seed(0)
    dropped = torch.rand(8) < .3
    x = job.latents(pool, rows)
    z, t, noise = job.noisy(x)
    with torch.no_grad():
        said = job.predict(noise_model(pipe), z, t, *job.text(pool, rows, dropped, training.LENGTHS[0]),
                           control=(task.module, edges(pool.pictures(rows))))
    a = job.alphas[t].view(-1, 1, 1, 1).double()
    def v(noise): return a.sqrt()*noise - (1 - a).sqrt()*(z - (1 - a).sqrt()*noise)/a.sqrt()
    want = (v(said.double()) - v(noise.double())).square().mean()
    assert loss_of(task, task.module, 1) == pytest.approx(want.item(), rel=1e-4)


def test_distillation_asks_for_what_guidance_gives(pool, monkeypatch):
    "A teacher who says 3 with the caption and 1 without, and a student who says 1 + strength·2"
    silent = Denoising(load('tiny-flux')).text(pool, torch.arange(1), torch.ones(1, dtype=torch.bool), 24)[1]

    def predict(self, model, z, t, sequence, pooled, guidance=None, control=None):
        if guidance is not None: return torch.ones_like(z) + 2*guidance.view(-1, 1, 1, 1)
        return torch.ones_like(z)*(1 if torch.allclose(pooled, silent.expand_as(pooled), atol=1e-5) else 3)
    monkeypatch.setattr(Denoising, 'predict', predict)
    task = distillation_task(load('tiny-flux'), pool, batch=4)
    assert loss_of(task, task.module) < 1e-10


@pytest.mark.parametrize('name', FAMILIES)
def test_the_condition_is_what_the_pipeline_sees(name):
    "The same edges, in the same range, in training and in `generate`; raw lines are something else"
    from segquant_nb.scenes import caption, render, sample_scene
    from segquant_nb.zoo import generate
    twin, scenes, seen = load(name, controlnet=True), [sample_scene(s) for s in range(2)], []
    lines = edges(render(scenes))
    hook = twin.controlnet.register_forward_pre_hook(lambda net, args, given: seen.append(given['controlnet_cond']), with_kwargs=True)
    generate(twin, [caption(s) for s in scenes], edges=lines, num_inference_steps=1)
    hook.remove()
    job = Denoising(load(name))

    def in_training(edges):
        z, t = torch.zeros(2, 16, 16, 16), torch.full((2,), 500)
        given = []
        def net(*args, controlnet_cond, **more):
            given.append(controlnet_cond)
            raise InterruptedError
        with pytest.raises(InterruptedError):
            job.predict(None, z, t, torch.zeros(2, 24, 128), torch.zeros(2, 64), control=(net, edges))
        return given[0]
    want, raw = in_training(lines), in_training((lines + 1)/2)
    found = seen[0][-2:]  # guidance has two halves
    near, far = ((found - x).square().mean()/want.square().mean() for x in (want, raw))
    assert near < .15 < .2 < far, (near, far)  # the pipelines add the autoencoder's noise


# ---- runs -------------------------------------------------------------------------------------------------------------
class Killed(Exception):
    "As good as SIGKILL: nothing saves the state on the way out"


@pytest.mark.parametrize('end, every', [(KeyboardInterrupt, 60), (Killed, 0)])
def test_a_run_that_stops_goes_on_to_the_same_bits(end, every, pool, tmp_path):
    "A real part, with dropout of captions and noise, against a run in one go; and a kill between two saves"
    def task(stop=None):
        made = denoiser_task(load('tiny-sdxl'), pool, steps=6, batch=2)
        def loss(module, step):
            if step == stop: raise end
            return made.loss(module, step)
        return Task(made.module, loss, made.steps, made.rate, made.decay)
    straight = train(task(), tmp_path/'straight')
    with pytest.raises((SystemExit, Killed)):
        train(task(stop=4), tmp_path/'broken', every=every)
    if end is Killed:
        (tmp_path/'broken'/'state.part').write_bytes(b'half')  # it was killed while it saved
    resumed = train(task(), tmp_path/'broken')
    assert equal(straight.state_dict(), resumed.state_dict())
    assert not equal(straight.state_dict(), noise_model(load('tiny-sdxl')).state_dict())


def toy(steps=3, rate=.1, width=3):
    return Task(nn.Linear(width, 1), lambda net, step: {'error': net(torch.randn(4, width)).square().mean()}, steps, rate)


def test_every_step_draws_noise_of_its_own(tmp_path):
    seen = []
    def loss(net, step):
        seen.append(torch.rand(()).item())
        return {'error': net(torch.ones(1, 3)).square().mean()}
    train(Task(nn.Linear(3, 1), loss, 5, .1), tmp_path)
    assert len(set(seen)) == 5


def test_a_finished_run_says_so_and_a_state_of_another_run_is_refused(tmp_path, capsys):
    first = train(toy(), tmp_path)
    capsys.readouterr()
    assert equal(train(toy(), tmp_path).state_dict(), first.state_dict())
    assert 'is finished: all 3 steps are done' in capsys.readouterr().out
    for other, said in ((toy(steps=4), '3 steps at a rate of 0.1, and this one has 4 steps at a rate of 0.1'), (toy(rate=.2), 'at a rate of 0.2'),
                        (toy(width=5), 'another module'), (replace(toy(), data='other scenes'), 'this one has .* 0.1, other scenes')):
        with pytest.raises(ValueError, match=said):
            train(other, tmp_path)


def test_a_damaged_state_is_refused(tmp_path):
    train(toy(), tmp_path)
    whole = (tmp_path/'state.pt').read_bytes()
    weights = whole.index(train(toy(), tmp_path).weight.detach().numpy().tobytes())
    flipped = bytearray(whole)
    flipped[weights + 1] ^= 1  # one bit of the averaged weights
    for content in (b'', b'not a state', whole[:100], whole[:-30], whole[:len(whole)//2], bytes(flipped)):
        (tmp_path/'state.pt').write_bytes(content)
        with pytest.raises(ValueError, match='state.pt is damaged'):
            train(toy(), tmp_path)
        assert (tmp_path/'state.pt').read_bytes() == content
    torch.save({'weight': torch.zeros(1)}, tmp_path/'state.pt')
    with pytest.raises(ValueError, match='state.pt is damaged'):
        train(toy(), tmp_path)


def test_tasks_and_runs_leave_the_callers_things_alone(pool, tmp_path):
    pipe = load('tiny-flux')
    before, slots = copy.deepcopy(noise_model(pipe).state_dict()), dict(pipe.components)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    for make in (judge_task, vae_task, text_task):
        make(pool, batch=2)
    for make in (denoiser_task, control_task, distillation_task):
        task = make(pipe, pool, steps=1, batch=2)
        if make is not denoiser_task: task = replace(task, sample=None)  # one drawing of samples will do
        train(task, tmp_path/make.__name__)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert equal(noise_model(pipe).state_dict(), before) and all(p.requires_grad for p in noise_model(pipe).parameters())
    assert {k: id(v) for k, v in pipe.components.items()} == {k: id(v) for k, v in slots.items()}
    assert pool.latents is None and pool.edges is None


def test_what_a_pool_stores_is_what_a_step_would_compute(pool):
    pipe, rows = load('tiny-sd35'), torch.tensor([5, 60])
    ready = with_edges(with_latents(pool, pipe))
    torch.testing.assert_close(ready.latents[rows].float(), Denoising(pipe).latents(pool, rows), atol=4e-3, rtol=0)
    assert torch.equal(ready.edges[rows].float().expand(-1, 3, -1, -1), edges(pool.pictures(rows)))


# ---- the command ------------------------------------------------------------------------------------------------------
def test_the_shipped_recipe_is_the_record():
    record = {run['part']: run for run in json.loads((WEIGHTS/'training.json').read_text())['runs']}
    assert record.keys() == PARTS.keys()
    for name in PARTS:
        r = recipe_of(name, 'cuda')
        assert [list(r.steps), list(r.rates), r.batch] == [record[name][k] for k in ('steps', 'rate', 'batch')]
    assert recipe_of('tiny-sd35', 'cuda') == Recipe((8426, 9241), (.001, .0008), 256, 262_144)
    assert recipe_of('tiny-flux', 'cuda').guidance == 1300 and recipe_of('tiny-flux', 'cpu').guidance == 1000


def test_two_runs_and_guidance_stand_on_each_other(tmp_path, monkeypatch):
    "The recipe of FLUX in small: the second run goes on from the first, and the distillation from the second"
    monkeypatch.setattr(training, 'recipe_of', lambda name, device: Recipe((2, 3), (1e-3, 5e-4), 2, 8, guidance=2))
    began = []
    def watched(task, folder, **more):
        began.append((folder.name, task.steps, task.rate, copy.deepcopy(task.module.state_dict())))
        result = train(task, folder, **more)
        began.append(copy.deepcopy(result.state_dict()))
        return result
    monkeypatch.setattr(training, 'train', watched)
    monkeypatch.setattr(training, 'sample_of', lambda *a, **k: None)
    trained = train_part('tiny-flux', tmp_path)
    assert [b[:3] for b in began[::2]] == [('tiny-flux', 2, 1e-3), ('tiny-flux-2', 3, 5e-4), ('tiny-flux-guidance', 2, 3e-4)]
    assert equal(began[1], began[2][3]) and equal(began[3], began[4][3]) and equal(began[5], trained.state_dict())
    kept = read_weights('tiny-flux', tmp_path/'weights')
    assert all(torch.equal(v.half().float(), kept[k]) for k, v in trained.state_dict().items())
    assert equal(noise_model(load('tiny-flux', folder=tmp_path/'weights')).state_dict(), kept)


def test_installed_weights_are_only_replaced_by_name(tmp_path):
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in WEIGHTS.iterdir()}
    train_part('judge', tmp_path, steps=1, batch=2, scenes=4)
    assert {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in WEIGHTS.iterdir()} == before
    assert {p.name for p in WEIGHTS.iterdir()} == {p.name for p in (tmp_path/'weights').iterdir()}
    other = tmp_path/'elsewhere'
    train_part('judge', tmp_path, folder=other, steps=1, batch=2, scenes=4)  # finished: nothing to train, but to save
    assert equal(read_weights('judge', other), read_weights('judge', tmp_path/'weights'))


@pytest.mark.parametrize('given', [dict(steps=-1), dict(steps=0), dict(batch=0), dict(scenes=0)])
def test_numbers_below_one_are_refused_before_anything_is_made(given, tmp_path):
    with pytest.raises(ValueError, match='expected one at least'):
        train_part('judge', tmp_path/'runs', **given)
    assert not (tmp_path/'runs').exists()


def test_an_unknown_part_is_refused(tmp_path):
    with pytest.raises(ValueError, match='no-such is not a part|.no-such. is not a part of the zoo: there are judge, vae'):
        train_part('no-such', tmp_path)


SHORT = ['judge', '--steps', '2', '--batch', '2', '--scenes', '4']


@pytest.mark.parametrize('arguments, status, said', [
    (['--help'], 0, 'The parts stand on each other in this order: judge'), ([], 2, 'required: part'),
    (['judgee'], 2, "invalid choice: 'judgee'"), (['judge', '--steps', 'many'], 2, 'invalid int value'),
    (['judge', '--steps', '-1'], 'steps=-1: expected one at least.', ''), (['judge', '--batch', '0'], 'batch=0: expected one at least.', '')])
def test_what_the_command_says_of_its_arguments(arguments, status, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        training._command(arguments)
    assert end.value.code == status
    printed = capsys.readouterr()
    assert said in printed.out + printed.err and not list(tmp_path.iterdir())


def test_the_command_trains_and_says_when_there_is_nothing_to_do(tmp_path, monkeypatch, capsys):
    env = os.environ | {'PYTHONPATH': str(WEIGHTS.parents[1]), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-m', 'segquant_nb.training', *SHORT], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0 and 'finished' not in done.stdout, done.stderr
    assert sorted(p.name for p in (tmp_path/'runs').iterdir()) == ['judge', 'weights']
    monkeypatch.chdir(tmp_path)
    training._command(SHORT)
    assert 'judge is finished: all 2 steps are done' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='is of another run'):
        training._command([*SHORT[:2], '3', *SHORT[3:]])
    for other in ([*SHORT[:4], '3', *SHORT[5:]], [*SHORT[:-1], '5']):  # it would go on with other scenes
        with pytest.raises(SystemExit, match='2 of 4 scenes in each, and this one has'):
            training._command(other)
    with pytest.raises(SystemExit, match='text.safetensors is not there: the weights have judge'):
        listing = tmp_path/'runs'/'weights'/'weights.json'
        listing.write_text('{"judge": {}}')
        training._command(['tiny-sdxl', *SHORT[1:]])


def test_a_folder_that_cannot_take_the_result_is_refused_before_the_work(tmp_path):
    (tmp_path/'weights').mkdir()
    (tmp_path/'weights'/'weights.json').write_text('{')
    (tmp_path/'file').touch()
    for arguments, said in (([], 'weights.json is damaged'), (['--folder', str(tmp_path/'file')], 'file')):
        with pytest.raises(SystemExit, match=said):
            training._command([*SHORT, '--runs', str(tmp_path), *arguments])
    assert not (tmp_path/'judge').exists()


def test_lines_of_the_log_that_are_not_whole_do_not_stop_a_run(tmp_path):
    train(toy(), tmp_path)
    for name in ('state.pt', 'log.csv'): (tmp_path/name).unlink(missing_ok=True)
    (tmp_path/'log.csv').write_bytes(b'garbage\n\n\xff\n0,1.5\n0')
    train(toy(), tmp_path)
    assert (tmp_path/'log.csv').read_text() == '0,1.5\n'


def test_pools_are_made_without_other_processes(monkeypatch):
    "So that it works wherever Python does, whatever its way to start one"
    import multiprocessing
    monkeypatch.setattr(multiprocessing.Process, 'start', None)
    assert len(make_pool(8)) == 8


def test_saving_keeps_the_readers_out_and_the_checksum_right(tmp_path):
    save_weights('text', training.TextTeacher(), 'fresh', tmp_path)
    assert {k.split('.')[0] for k in read_weights('text', tmp_path)} == {'clip', 'clip2', 't5'}
    assert not list(tmp_path.glob('*.part'))
