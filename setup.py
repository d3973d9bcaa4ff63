"""What `pyproject.toml` calls dynamic: from `settings.ini`, the way nbdev 2 does it, and classifiers."""
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
package = cfg['lib_path']
kernels = f'{package}.cuda_src'  # top-level cuda_src/ travels inside the wheel under this name
suffix = '_requirements'


def absolute(link):
    "PyPI shows the README away from its repository"
    kind = 'raw' if link[1].endswith(('.png', '.jpg', '.gif', '.svg')) else 'blob'
    return f']({cfg["git_url"]}/{kind}/v{cfg["version"]}/{link[1]}'


readme = re.sub(r'\]\((?![a-z]+:|#)([^)\s]+)', absolute, (here/'README.md').read_text(encoding='utf-8'))

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme,
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    project_urls={'Documentation': cfg['doc_host'] + cfg['doc_baseurl']},
    keywords=cfg['keywords'].split(),
    classifiers=[
        'Development Status :: 3 - Alpha',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    python_requires='>=' + cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require={key.removesuffix(suffix): cfg[key].split() for key in cfg if key.endswith(suffix)},
    packages=find_packages(include=[package, package + '.*']) + [kernels],
    package_dir={kernels: 'cuda_src'},
    package_data={kernels: ['**/*.cu', '**/*.cuh'], package: ['weights/*']},
    include_package_data=False,
    zip_safe=False,
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'nbdev': [f'{package}={package}._modidx:d'],  # what makes [source] links work
    },
)
