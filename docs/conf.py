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
html_css_files = ['site.css']
html_theme_options = {'top_of_page_buttons': [], 'footer_icons': []}
html_show_sphinx = False
nb_execution_mode, nb_ipywidgets_js, nb_merge_streams = 'off', {}, True
myst_enable_extensions, myst_heading_anchors = ['colon_fence', 'deflist'], 3
copybutton_exclude = '.linenos, .gp, .go'
exclude_patterns = ['_build', '.doctrees']
linkcheck_ignore = [r'https://github\.com/lah-nb/lah_nb/.*#L\d+', r'http://(127\.0\.0\.1|localhost).*']  # lines of a file are shown by a script; addresses of the reader's own computer
linkcheck_timeout, linkcheck_retries = 20, 2
suppress_warnings = ['misc.highlighting_failure', 'myst.header']  # cells with lines for the shell; an entry before the first section
