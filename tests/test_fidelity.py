"""The fidelity table: what is in it, what it counts, and what happens where a peer is not installed."""
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import fidelity

from segquant_nb.config import PRESETS
from segquant_nb.scenes import caption, sample_scene

RESULTS = [ROOT/'nbs'/'results'/f'fidelity_{model}.json' for model in fidelity.MODELS]


def test_every_preset_has_a_row():
    assert set(PRESETS) <= set(fidelity.ROWS)


@pytest.mark.parametrize('path', RESULTS, ids=lambda p: p.stem)
def test_the_stored_table_is_whole(path):
    found = fidelity.read(path)
    assert list(found['rows']) == list(fidelity.ROWS)
    assert not [name for name, row in found['rows'].items() if 'not run' in row]
    s = found['settings']
    assert s['prompts'] >= 128 and s['seeds'] >= 2 and s['calibration'] == fidelity.CALIBRATION
    for row in found['rows'].values():
        psnrs = torch.tensor(row['each']['psnr']).double()/100
        assert len(psnrs) == s['prompts']*s['seeds']
        assert fidelity.summary(psnrs, s) == pytest.approx(row['psnr'], abs=.02)


@pytest.mark.parametrize('path', RESULTS, ids=lambda p: p.stem)
def test_what_was_measured_is_stored_and_kept_to(path):
    found = fidelity.read(path)
    rows, stored = found['rows'], found['measured']
    assert stored['settings'] == fidelity.MEASURING and stored['ways'] == json.loads(json.dumps(fidelity.WAYS))
    measured, outside = fidelity.measured_from(stored), rows['w8a8-dynamic']['bytes'] - sized(stored, 'int8 by token')
    for name in (n for n, row in fidelity.ROWS.items() if row.measured):
        preset, row = name.removeprefix('auto@'), rows[name]
        budget = dict(bytes=rows[preset]['bytes'] - outside) if preset != name else dict(bits=float(name.split()[1]))
        if preset != name: assert row['bytes'] <= rows[preset]['bytes']
        chosen = fidelity.ways_of(measured, measured.choose(**budget))
        assert row['remarks'] == [fidelity.counted(chosen)]
        assert row['bytes'] - outside == stored['fixed'] + sum(g.bytes[g.ways.index(w)] for g, w in zip(measured.groups, chosen))


def sized(stored, way):
    at = 1 + list(stored['ways']).index(way)
    return stored['fixed'] + sum(g['bytes'][at] for g in stored['groups'])


def test_processes_give_what_one_gives():
    assert fidelity.forked(3)(lambda x: x*x, list(range(7))) == [x*x for x in range(7)] == fidelity.forked(9)(lambda x: x*x, list(range(7)))


def test_no_reported_prompt_calibrates():
    reported, m = {caption(s) for s in fidelity.scenes(128)}, fidelity.MEASURING
    assert not reported & {caption(sample_scene(i)) for i in range(fidelity.CALIBRATION['prompts'])}
    assert not reported & {caption(sample_scene(m['first'] + i)) for i in range(m['prompts'])}


def test_bytes_of_int8():
    model = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Conv2d(6, 4, 3))
    plain = 2*sum(p.numel() for p in model.parameters())
    codes, scales = 6*8 + 4*6*9, 4*6 + 4*4  # instead of two bytes for each of them
    assert fidelity.int8_bytes(model, ['0', '2']) == plain - codes + scales
    assert fidelity.int8_bytes(model, ['0'], smooth=True) == plain - 6*8 + 4*6 + 4*8


def test_intervals_draw_prompts_with_all_their_seeds():
    prompts = torch.randn(50)
    settings = dict(seeds=2)
    up_and_down = torch.cat([prompts, -prompts])  # each prompt's mean is 0
    assert fidelity.summary(up_and_down, settings) == [0, 0, 0]
    mean, low, high = fidelity.summary(torch.cat([prompts, prompts]), settings)
    assert high - low > .3  # as of 50 values, not of 100


def test_a_peer_that_is_missing_is_listed_with_what_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(fidelity, 'version', lambda package: None)
    settings = dict(prompts=2, seeds=1, calibration=fidelity.CALIBRATION)
    peers = [name for name, row in fidelity.ROWS.items() if row.package]
    fidelity.run(['tiny-flux'], peers, settings, 'cpu', 1, tmp_path, False)
    rows = fidelity.read(tmp_path/'fidelity_tiny-flux.json')['rows']
    assert list(rows) == peers and all(r['not run'].startswith('pip install ') for r in rows.values())


def test_other_settings_do_not_mix_with_stored_rows(tmp_path):
    (tmp_path/'fidelity_tiny-flux.json').write_text(json.dumps(dict(settings=dict(prompts=1), rows={})))
    with pytest.raises(SystemExit, match='another --out'):
        fidelity.run(['tiny-flux'], ['baseline'], dict(prompts=2), 'cpu', 1, tmp_path, False)


def test_a_pattern_that_matches_nothing_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['fidelity.py', '--only', 'nothing'])
    with pytest.raises(SystemExit): fidelity.main()
    assert '--only nothing matches none of baseline' in capsys.readouterr().err
