"Packaging metadata comes from `settings.ini`, the one file to edit."
import sys
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py

sys.path.append('scripts')
from stubs import write

cfg = ConfigParser(delimiters=['='], interpolation=None)
cfg.read('settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
words = lambda key: cfg.get(key, '').split()
lines = lambda key: [line for line in cfg.get(key, '').splitlines() if line.strip()]


class BuildWithStubs(build_py):
    "Type checkers and editors do not follow `@patch`; the wheel tells them"
    def run(self):
        super().run()
        if not self.editable_mode: write(cfg['lib_path'], Path(self.build_lib)/cfg['lib_path'])


setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], license='Apache-2.0',
    author=cfg['author'], author_email=cfg['author_email'], keywords=cfg['keywords'].split(),
    long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research', 'Topic :: Scientific/Engineering :: Artificial Intelligence',
                 'Framework :: Jupyter', 'Operating System :: POSIX :: Linux', 'Programming Language :: Python :: 3 :: Only']
                + [f'Programming Language :: Python :: 3.{minor}' for minor in range(10, 14)],
    cmdclass={'build_py': BuildWithStubs},
    packages=[cfg['lib_path'], *(f"{cfg['lib_path']}.{name}" for name in find_namespace_packages(cfg['lib_path']))], include_package_data=True,
    python_requires=f">={cfg['min_python']}", install_requires=words('requirements'),
    extras_require={'notebook': words('notebook_requirements'), 'tensorboard': words('tensorboard_requirements'), 'trainers': words('trainers_requirements'), 'dev': words('dev_requirements'), 'docs': words('docs_requirements')},
    entry_points={'console_scripts': lines('console_scripts'), 'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
)
