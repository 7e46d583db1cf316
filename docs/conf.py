"The site that `scripts/docs` builds; everything it needs is local."
from configparser import ConfigParser
from pathlib import Path

_cfg = ConfigParser(delimiters=['='], interpolation=None)
_cfg.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
_cfg = _cfg['DEFAULT']
project, author, version, copyright = _cfg['lib_name'], _cfg['author'], _cfg['version'], _cfg['copyright']
release = version

extensions = ['myst_nb', 'sphinx_copybutton']
html_theme, html_title, html_static_path = 'furo', f'{project} {version}', ['_static']
html_css_files, html_js_files = ['site.css'], [('plotly.min.js', {'defer': None})]
html_theme_options = {'source_repository': _cfg['git_url'], 'source_branch': _cfg['branch'], 'footer_icons': []}
html_show_sphinx = False
nb_execution_mode, nb_ipywidgets_js, nb_merge_streams = 'off', {}, True
myst_enable_extensions, myst_heading_anchors = ['colon_fence', 'dollarmath', 'deflist'], 3
copybutton_exclude = '.linenos, .gp, .go'
exclude_patterns = ['_build']
suppress_warnings = ['misc.highlighting_failure', 'myst.header']  # cells with lines for the shell; an entry before the first section
