"nbdev's processed notebooks, docs/ and the plotly script as sources for Sphinx: python docs/prepare.py _proc _site"
import itertools, json, re, shutil, sys
from pathlib import Path

import nbformat, yaml
from plotly.offline import get_plotlyjs

HERE = Path(__file__).parent
ROOT = HERE.parent
GIT = 'https://github.com/lah-nb/lah_nb'
MARKDOWN = nbformat.v4.new_markdown_cell
PLOTLY = 'application/vnd.plotly.v1+json'
FLOORS = [('network', '00', 'Peers, calls, and a hash table of signed records that expire'), ('mixture', '05', 'What an expert is, who hosts it, who is chosen, and the layer that is all of them'), ('swarm', '09a', 'Start, join, lend, and see who is there'),
          ('training', '12', 'Data, models, and the trainer with several batches in flight'), ('people', '15', 'Pictures, live views, and the command')]


def front_matter(source):
    "What nbdev says of a page in a raw cell"
    found = re.fullmatch(r'\s*---\n(.*?)\n---\s*', source, re.S)
    return yaml.safe_load(found[1]) if found else None


def api(text, page, used):
    "An entry of the reference: nbdev's `show_doc`, in plain Markdown, with a label to link to"
    text = text.removeprefix('---\n\n')
    text = re.sub(r'\[source\]\((?:%s)?(/blob[^)]*)\)\{[^}]*\}' % re.escape(GIT), rf'<a class="source" href="{GIT}\1">source</a>', text).replace('collections.abc.', '')
    def heading(found):
        name = label(page, found[1])
        target = '' if name in used else f'({name})=\n\n'  # `Span` and `span` are one label to Sphinx: it goes to the first
        used.add(name)
        return f'{target}### `{found[1]}`'
    return re.sub(r'^### (\S+)$', heading, text, flags=re.M)


def label(page, name): return f'api-{page}-{name.lower()}'


def links(text, labels):
    "Links between notebooks, and from names to their entries, as they are on the site"
    text = re.sub(r'\]\(/(\w+)\.html#([\w.]+)\)', lambda m: f'](#{label(m[1], m[2])})' if label(m[1], m[2]) in labels else f']({m[1]}.ipynb)', text)
    text = re.sub(r'\]\((?:\.\./)*(?:nbs/)?(?:tutorials/)?(\d\d\w?_\w+)\.ipynb\)', lambda m: f']({page_name(m[1])}.ipynb)', text)
    return re.sub(r'^\[!\[Open In Colab\].*$', '', text, flags=re.M)


def page_name(stem):
    "03a_peer -> peer; tutorials keep their number"
    return f'tutorial_{stem}' if (ROOT/'nbs/tutorials'/f'{stem}.ipynb').exists() else re.sub(r'^\d+\w*?_', '', stem)


def figure(data, n):
    "A plotly figure; its title is text of the page, which a phone can break into lines"
    data = json.loads(json.dumps(data))
    title = data['layout'].pop('title', {}).get('text', '')
    if title and (margin := data['layout'].get('margin')): margin['t'] = max(30, margin.get('t', 60) - 30)
    return ('<script src="_static/plotly.min.js"></script>' * (n == 1) + f'<div class="figure-title">{title}</div><div id="figure{n}" class="plotly-figure" style="height: {data["layout"].get("height", 450)}px"></div>'
            f'<script>document.addEventListener("DOMContentLoaded", () => Plotly.newPlot("figure{n}", {json.dumps(data["data"])}, {json.dumps(data["layout"])}, {{responsive: true, displaylogo: false}}'
            + (f').then(() => Plotly.addFrames("figure{n}", {json.dumps(data["frames"])})' if data.get('frames') else '') + '))</script>')


def with_pictures(text, notebooks):
    "A page of docs/ with the drawings and the notebooks' figures that it names: `<!-- batch.svg -->`, `<!-- dht: its cell -->`"
    figures = itertools.count(1)
    def shown(found):
        page, source = found[1], found[2]
        return next(figure(output.data[PLOTLY], next(figures)) for cell in notebooks[page].cells if source in cell.source for output in cell.get('outputs', []) if PLOTLY in output.get('data', {}))
    text = re.sub(r'^<!-- (\w+\.svg) -->$', lambda m: f'<div class="picture">\n{(HERE/m[1]).read_text(encoding="utf-8")}</div>', text, flags=re.M)
    return re.sub(r'^<!-- (\w+): (.+) -->$', shown, text, flags=re.M)


class Pages:
    "Turns processed notebooks into pages that Sphinx can read"
    def __init__(self, proc):
        self.paths = {page_name(path.stem): path.relative_to(proc) for path in sorted(proc.rglob('*.ipynb')) if path.stem != 'index'}
        self.notebooks = {page: nbformat.read(proc/path, 4) for page, path in self.paths.items()}
        self.about = {page: meta for page, nb in self.notebooks.items() for cell in nb.cells if cell.cell_type == 'raw' and (meta := front_matter(cell.source))}
        self.labels = {label(page, name) for page, nb in self.notebooks.items() for cell in nb.cells for output in cell.get('outputs', []) for name in re.findall(r'^### (\S+)$', output.get('data', {}).get('text/markdown', ''), re.M)}

    def whence(self, page):
        "Where a page comes from"
        path = f'blob/main/nbs/{self.paths[page]}'
        colab = f' · <a href="https://colab.research.google.com/github/{GIT.removeprefix("https://github.com/")}/{path}">run it in Colab</a>' if 'tutorials' in path else ''
        return f'<p class="notebook-link"><a href="{GIT}/{path}">this page as a notebook</a>{colab}</p>'

    def api(self):
        "The library's pages by floor"
        pages = [(path.name.partition('_')[0], page) for page, path in self.paths.items() if 'tutorials' not in str(path)]
        for n, (floor, first, about) in enumerate(FLOORS):
            below = FLOORS[n + 1][1] if n + 1 < len(FLOORS) else '~'
            here = [page for number, page in sorted(pages) if first <= number < below]
            yield f'## {floor.capitalize()}\n\n{about}.\n\n' + '\n'.join(f'- [{self.about[page]["title"]}]({page}.ipynb): {self.about[page]["description"]}' for page in here) + '\n\n```{toctree}\n:hidden:\n\n' + '\n'.join(here) + '\n```\n'

    def outputs(self, cell, figures):
        kept = []
        for output in cell.outputs:
            data = output.get('data')
            if data is not None:
                data.pop('application/vnd.jupyter.widget-view+json', None)
                if PLOTLY in data: output['data'] = {'text/html': figure(data[PLOTLY], next(figures))}
                elif not data: continue
            kept.append(output)
        return kept

    def cells(self, nb, page):
        seen, used, figures = set(), set(), itertools.count(1)
        for cell in nb.cells:
            cell.metadata = {}
            if cell.cell_type == 'raw':
                if meta := front_matter(cell.source): yield MARKDOWN(f'# {meta.get("title", page)}\n\n*{meta.get("description", "")}*\n\n{self.whence(page)}')
            elif cell.cell_type == 'markdown':
                if 'AUTOGENERATED' not in cell.source: yield MARKDOWN(links(cell.source, self.labels))
            elif re.search(r'^#\|\s*output: asis', cell.source, re.M):
                for output in cell.outputs:
                    text = output.get('data', {}).get('text/markdown')
                    if text and text not in seen: yield MARKDOWN(links(api(text, page, used), self.labels))
                    seen.add(text)
            else:
                cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)
                cell.outputs = self.outputs(cell, figures)
                if cell.source.strip(): yield cell

    def write(self, folder):
        for page, nb in self.notebooks.items():
            nb.cells = list(self.cells(nb, page))
            nb.metadata.setdefault('kernelspec', {}).update(name='python3', display_name='python3', language='python')
            nbformat.write(nb, folder/f'{page}.ipynb')


def main(proc, site):
    site.mkdir()
    pages = Pages(proc)
    for path in HERE.glob('*.md'): (site/path.name).write_text(with_pictures(path.read_text(encoding='utf-8'), pages.notebooks), encoding='utf-8')
    (site/'api.md').write_text('# The library\n\nThe library is written as notebooks; each page explains a part, defines it, and shows it at work. Five floors, each in reading order:\n\n' + '\n'.join(pages.api()), encoding='utf-8')
    pages.write(site)
    for path in [*(path for kind in ('png', 'gif') for path in HERE.glob(f'*.{kind}')), HERE/'conf.py', ROOT/'settings.ini']: shutil.copy(path, site)
    for name in ('benchmarks/README.md', 'CHANGELOG.md', 'CONTRIBUTING.md'):
        text = (ROOT/name).read_text(encoding='utf-8')
        (site/f'{"benchmarks" if "bench" in name else Path(name).stem.lower()}.md').write_text(re.sub(r'\]\((?!http|#)([^)]+)\)', rf']({GIT}/blob/main/\1)', text), encoding='utf-8')
    (site/'_static').mkdir()
    shutil.copy(HERE/'site.css', site/'_static')
    (site/'_static/plotly.min.js').write_text(get_plotlyjs(), encoding='utf-8')


if __name__ == '__main__': main(Path(sys.argv[1]), Path(sys.argv[2]))
