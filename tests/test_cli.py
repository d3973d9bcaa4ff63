"""The command: what it leaves, what it refuses, and how it stops."""
import csv
import os
import signal
import subprocess
import sys
import time

import pytest

from segquant_nb.cli import main, open_pipeline
from segquant_nb.config import Config, read_config

SMALL = ['--pictures', '2', '--steps', '2']


def run(capsys, *argv):
    try: status = main(list(argv))
    except SystemExit as e: status = e.code
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    "A small run of baseline and fp8, and what it printed"
    import contextlib
    import io
    out = tmp_path_factory.mktemp('run')/'deep'/'results'
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(['report', 'tiny-sd35', 'baseline', 'fp8', '--out', str(out), *SMALL]) == 0
    return out, said.getvalue()


def test_it_leaves_pictures_numbers_and_a_report(results):
    out, said = results
    names = {'baseline.png', 'fp8.png', 'numbers.csv', 'numbers.md', 'report.html'}
    assert {p.name for p in out.iterdir()} == names and all(str(out/n) in said for n in names)
    for name in ('baseline.png', 'fp8.png'):
        assert (out/name).read_bytes()[:4] == b'\x89PNG' and (out/name).stat().st_size > 10_000
    with open(out/'numbers.csv', newline='') as f: rows = {r['model']: r for r in csv.DictReader(f)}
    assert list(rows) == ['original', 'baseline', 'fp8']
    assert rows['original']['psnr'] == '' and 15 < float(rows['baseline']['psnr']) < 60
    assert float(rows['baseline']['megabytes']) < .55*float(rows['original']['megabytes'])
    assert int(rows['fp8']['layers_quantized']) + int(rows['fp8']['layers_kept']) == int(rows['original']['layers_kept'])
    table = (out/'numbers.md').read_text(encoding='utf-8')
    assert table in said and {line.count('|') for line in table.splitlines()} == {10}
    page = (out/'report.html').read_text(encoding='utf-8')
    assert 'tiny-sd35 in fewer bits' in page and page.count('<details>') == 2 and 'emulated' in page


def test_the_same_run_gives_the_same_numbers(results, tmp_path, capsys):
    out = tmp_path/'again'
    assert run(capsys, 'report', 'tiny-sd35', 'fp8', '--out', str(out), *SMALL)[0] == 0
    def numbers(folder):
        with open(folder/'numbers.csv', newline='') as f: row = {r['model']: r for r in csv.DictReader(f)}['fp8']
        return {k: v for k, v in row.items() if k != 'seconds_a_picture'}
    assert numbers(out) == numbers(results[0])


def test_own_prompts_and_a_yaml_file(tmp_path, capsys):
    "A pipeline that diffusers has saved, as anybody has one"
    open_pipeline('tiny-sd35').save_pretrained(tmp_path/'mine')
    (tmp_path/'half.yaml').write_text('default: {input_quant: {type: fp8e4m3}, weight_quant: {type: fp8e4m3}}\n'
                                      'transformer_blocks.*: {enable: false}\n')
    (tmp_path/'prompts.txt').write_text('a small red circle, plain dark background\n\na large blue ring, plain dark background\n')
    status, said, err = run(capsys, 'report', str(tmp_path/'mine'), str(tmp_path/'half.yaml'), '--out',
                            str(tmp_path/'out'), '--prompts', str(tmp_path/'prompts.txt'), '--pictures', '1', '--steps', '2')
    assert status == 0, err
    page = (tmp_path/'out'/'report.html').read_text(encoding='utf-8')
    assert 'mine in fewer bits' in page and '“a large blue ring, plain dark background”' in page
    assert 'of what prompts ask for' not in page and 'enable is False' in page


def test_explain_and_doctor_print_a_table(capsys):
    status, said, _ = run(capsys, 'explain', 'tiny-sd35', 'baseline')
    assert status == 0 and said.startswith('SD3Transformer2DModel with baseline: 82 layers quantized, 1 not')
    assert 'pos_embed.proj (Conv2d' in said
    status, said, _ = run(capsys, 'doctor')
    assert status == 0 and 'cpu_int8' in said and 'emulation' in said


def test_auto_measures_and_then_goes_on_like_the_others(tmp_path, capsys, monkeypatch):
    seen = []
    def quick(self, model, calib_set):
        seen.append((type(model).__name__, len(calib_set), self.bits, self.progress))
        return Config(read_config({'default': {'enable': False}}).default, (('proj_out', read_config('fp8').default),), f'auto, bits={self.bits:g}')
    monkeypatch.setattr('segquant_nb.auto.Auto.__call__', quick)
    status, said, err = run(capsys, 'report', 'tiny-sd35', 'auto:bits=5', '--out', str(tmp_path/'out'), *SMALL)
    assert status == 0, err
    assert {p.name for p in (tmp_path/'out').glob('*.png')} == {'auto-bits-5.png'} and 'auto, bits=5: quantized' in said
    (tmp_path/'small.yaml').write_text('auto: {bits: 4.5}\n')
    status, said, _ = run(capsys, 'explain', 'tiny-sd35', str(tmp_path/'small.yaml'))
    assert status == 0 and said.startswith('SD3Transformer2DModel with auto, bits=4.5')
    assert [s[:1] + s[2:] for s in seen] == [('SD3Transformer2DModel', 5., False), ('SD3Transformer2DModel', 4.5, False)]
    assert min(s[1] for s in seen) > 1


@pytest.mark.parametrize('command', ['', 'demo', 'report', 'explain', 'doctor'])
def test_every_command_explains_itself(command, capsys):
    status, said, _ = run(capsys, *command.split(), '--help')
    assert status == 0 and said.startswith('usage: segquant') and len(said.split('\n\n')) > 2


def test_help_does_not_wait_for_torch():
    code = ('import sys\nfrom segquant_nb.cli import main\ntry: main(["--help"])\nexcept SystemExit: pass\n'
            'print(sorted({"torch", "diffusers", "matplotlib"} & set(sys.modules)))')
    assert subprocess.check_output([sys.executable, '-c', code], text=True).endswith('[]\n')


@pytest.fixture
def wrong(tmp_path):
    (tmp_path/'file').write_text('mine')
    (tmp_path/'empty').mkdir()
    (tmp_path/'one.txt').write_text('a red circle\n')
    (tmp_path/'bad.yaml').write_text('default: {seglinar: true}\n')
    (tmp_path/'auto.yaml').write_text('auto: {bits: 5}\n"*.ff.*": {enable: false}\n')
    (tmp_path/'latin.txt').write_bytes('ein grüner Kreis'.encode('latin-1'))
    return tmp_path


@pytest.mark.parametrize('argv, expected', [
    ('report tiny-sd35 w9a9', "'w9a9' is no preset"),
    ('report tiny-sd35 {}/bad.yaml', "Did you mean 'seglinear'?"),
    ('report tiny-sd35 {}/none.yaml', 'there is no file'),
    ('report tiny-sd35 auto:bits', "'auto:bits': expected a budget such as auto:bits=5."),
    ('report tiny-sd35 auto:bit=5', 'expected one budget'),
    ('report tiny-sd35 auto:bits=5,error=.1', 'expected one budget'),
    ('report tiny-sd35 auto:bits=0', 'expected one positive budget'),
    ('report tiny-sd35 auto:bits=5 auto:bits=5', 'each can be compared only once'),
    ('report tiny-sd35 {}/auto.yaml', 'auto chooses for every layer'),
    ('explain tiny-sd36 auto:bits=5', 'needs prompts: name a file'),
    ('explain tiny-sd35 w8a8 --prompts', 'expected one argument'),
    ('report tiny-sd36 --prompts {}/empty', 'is a directory'),
    ('report tiny-sd36 --prompts {}/latin.txt', 'is no text in UTF-8'),
    ('report tiny-sd36', 'needs prompts'),
    ('report tiny-sd36 --prompts {}/one.txt --pictures 1', 'at least one more is needed'),
    ('report tiny-sd35 --prompts {}/none.txt', 'none.txt: no such file or directory.'),
    ('explain tiny-sd36', 'there is no pipeline tiny-sd36'),
    ('explain {}/empty', 'has no model_index.json'),
    ('explain {}/file', 'there is no pipeline'),
    ('report tiny-sd35 --device nonsense', "device 'nonsense' cannot be used"),
    ('report tiny-sd35 --device cuda:99', "device 'cuda:99' cannot be used"),
    ('demo --out {}/file', 'is a file: name a folder'),
    ('demo --out {}/file/deeper', 'not a directory'),
    ('demo --model tiny-sd36', 'invalid choice'),
    ('demo --pictures 0', 'is not a whole number from 1 up'),
    ('demo --steps', 'expected one argument'),
    ('dmeo', 'invalid choice'),
])
def test_mistakes_get_a_sentence_and_status_2(argv, expected, wrong, capsys):
    status, said, err = run(capsys, *argv.format(wrong).split())
    lines = [line for line in err.strip().split('\n') if not line.startswith(('usage:', ' '))]
    assert status == 2 and expected in err and len(lines) == 1 and lines[0].startswith('segquant'), err
    assert (wrong/'file').read_text() == 'mine' and len(list(wrong.iterdir())) == 6


def test_the_seed_reaches_the_pictures_of_the_zoo(monkeypatch):
    given = []
    monkeypatch.setattr('segquant_nb.cli.compare_configs', lambda *args, **more: given.append(args[7]))
    assert main(['report', 'tiny-sd35', 'baseline', '--seed', '7']) == 0 and given == [7]


def test_an_interruption_gets_a_sentence_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    def stop(*args, **more): raise KeyboardInterrupt
    monkeypatch.setattr('segquant_nb.reporting.report', stop)
    status, _, err = run(capsys, 'report', 'tiny-sd35', 'baseline', '--out', str(tmp_path/'out'), *SMALL)
    assert status == 130 and err.strip().split('\n')[-1].startswith('segquant: interrupted') and not os.listdir(tmp_path)


def test_ctrl_c_stops_the_command(tmp_path):
    "A real signal, in the middle of the work"
    command = [sys.executable, '-c', 'import sys; from segquant_nb.cli import main; sys.exit(main())']
    process = subprocess.Popen([*command, 'demo', '--out', tmp_path/'out'], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    while not (tmp_path/'out').exists() and process.poll() is None: time.sleep(.05)
    process.send_signal(signal.SIGINT)
    said, err = process.communicate(timeout=60)
    assert process.returncode == 130 and 'Traceback' not in err and 'interrupted' in err, err
    assert not (tmp_path/'out').exists()


def test_a_reader_that_has_enough_is_no_error():
    command = 'import sys; from segquant_nb.cli import main; sys.exit(main(["doctor"]))'
    doctor = subprocess.Popen([sys.executable, '-c', command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    doctor.stdout.close()
    assert doctor.stderr.read() == b'' and doctor.wait() == 0
