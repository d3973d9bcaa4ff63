"""What users install: quick to import, complete in a wheel, found from a checkout."""
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPTIONAL = ('diffusers', 'transformers', 'accelerate', 'matplotlib', 'cupy', 'onnx', 'nbdev', 'fastcore', 'IPython')


def python(code, *, exe=sys.executable, cwd=None, path=None):
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'IN_TEST')}
    if path:
        env['PYTHONPATH'] = str(path)
    done = subprocess.run([exe, '-c', code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_costs_nothing(tmp_path):
    "Under 50 ms beyond torch, and nothing optional with it; best of three, the machine may be busy"
    code = ('import sys, time, torch\nbefore = set(sys.modules)\nt = time.perf_counter()\nimport segquant_nb\n'
            't = time.perf_counter() - t\nnew = {m.split(".")[0] for m in set(sys.modules) - before}\n'
            f'print(t, *sorted(new & set({OPTIONAL!r})))')
    runs = [python(code, cwd=tmp_path).split() for _ in range(3)]
    assert min(float(r[0]) for r in runs) < .05, runs
    assert all(len(r) == 1 for r in runs), f'optional packages imported: {runs[0][1:]}'


def test_modules_import_nothing_optional(tmp_path):
    names = [p.stem for p in (ROOT/'segquant_nb').glob('[!_]*.py')]
    code = f'''
import importlib, sys, torch
before = set(sys.modules)
for name in {names!r}: importlib.import_module("segquant_nb." + name)
print(*sorted({{m.split(".")[0] for m in set(sys.modules) - before}} & set({OPTIONAL!r})))'''
    assert python(code, cwd=tmp_path) == ''


def test_public_names_are_found_where_they_are_first_used():
    import segquant_nb
    from segquant_nb.formats import Quantizer
    assert segquant_nb.Quantizer is Quantizer and 'pack_int4' in dir(segquant_nb)
    assert python('import segquant_nb; print(segquant_nb.formats.Quantizer(), "formats" in dir(segquant_nb))'
                  ).endswith('True')
    with pytest.raises(AttributeError, match='no attribute .quantise.'):
        segquant_nb.quantise


def test_the_version_is_the_same_everywhere():
    import segquant_nb
    for file, line in (('settings.ini', 'version = '), ('CITATION.cff', 'version: ')):
        found = re.findall(f'^{line}(.*)$', (ROOT/file).read_text(encoding='utf-8'), re.M)
        assert found == [segquant_nb.__version__], file


FIND = 'from segquant_nb.cuda import cuda_src_dir; print(cuda_src_dir())'


def test_kernels_are_found_from_a_bare_checkout(tmp_path):
    for folder in ('segquant_nb', 'cuda_src'):
        (tmp_path/folder).symlink_to(ROOT/folder)
    assert Path(python(FIND, cwd=ROOT.parent, path=tmp_path)).samefile(ROOT/'cuda_src')


def test_kernels_are_found_from_an_editable_install(tmp_path):
    where = python('import segquant_nb; print(segquant_nb.__file__)', cwd=tmp_path)
    if not Path(where).samefile(ROOT/'segquant_nb'/'__init__.py'):
        pytest.skip(f'segquant_nb is not installed editable from {ROOT}')
    assert Path(python(FIND, cwd=tmp_path)).samefile(ROOT/'cuda_src')


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "An sdist, and the wheel that is built from it; from a copy, as setuptools writes into its source folder"
    out, copy = tmp_path_factory.mktemp('dist'), tmp_path_factory.mktemp('source')/'copy'
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(
        '.*', '_proc', 'docs', 'nbs', 'tests', 'tools', 'build', 'dist', 'demo', '__pycache__', '*.egg-info'))
    done = subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', out, copy],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return {p.suffix: p for p in out.iterdir()}


def test_sdist_and_wheel_hold_what_they_should(built):
    kernels = {p.relative_to(ROOT).as_posix() for p in (ROOT/'cuda_src').rglob('*.cu*')}
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT/'segquant_nb').glob('*.py')}
    with tarfile.open(built['.gz']) as sdist:
        inside = {n.split('/', 1)[1] for n in sdist.getnames() if '/' in n}
    assert kernels | modules | {'settings.ini', 'README.md', 'LICENSE'} <= inside
    with zipfile.ZipFile(built['.whl']) as wheel:
        inside = set(wheel.namelist())
        metadata = wheel.read(next(n for n in inside if n.endswith('METADATA'))).decode()
    assert {f'segquant_nb/{k}' for k in kernels} | modules <= inside
    assert not [n for n in inside if n.startswith(('tests/', 'nbs/', 'tools/', 'docs/', 'cuda_src/'))]
    assert 'License-Expression: Apache-2.0' in metadata and 'Requires-Dist: torch>=2.11' in metadata
    relative = re.findall(r'\]\((?![a-z]+:|#)[^)]*', metadata)
    assert '/blob/v' in metadata and '/raw/v' in metadata and not relative, relative
    assert not [line for line in metadata.splitlines()
                if line.startswith('Requires-Dist: fastcore') and 'extra ==' not in line]


def test_the_wheel_works_in_an_empty_venv(built, tmp_path):
    "Its own package, its own kernels, its own command; the dependencies are lent by this environment"
    venv = tmp_path/'venv'
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', venv], check=True)
    exe = venv/'bin'/'python'
    subprocess.run([sys.executable, '-m', 'pip', '-q', '--python', exe, 'install', '--no-deps', '--no-index',
                    built['.whl']], check=True)
    site = Path(python('import sysconfig; print(sysconfig.get_path("purelib"))', exe=exe))
    (site/'lent.pth').write_text(sysconfig.get_path('purelib') + '\n')
    assert Path(python('import segquant_nb; print(segquant_nb.__file__)', exe=exe, cwd=tmp_path)).parent.parent == site
    assert Path(python(FIND, exe=exe, cwd=tmp_path)) == site/'segquant_nb'/'cuda_src'
    # Draws, calibrates and judges, with all that the wheel brings along; fp8 as nothing has to be solved for it
    small = [venv/'bin'/'segquant', 'report', 'tiny-sd35', 'fp8', '--pictures', '2', '--steps', '2', '--out', tmp_path/'report']
    done = subprocess.run(small, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path/'report'/'report.html').stat().st_size > 100_000, done.stderr
