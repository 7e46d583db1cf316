"nbdev's processed notebooks, docs/ and the plotly script as sources for Sphinx: python docs/prepare.py _proc _site"
import ast, gzip, itertools, json, re, shutil, sys
from pathlib import Path

import nbformat, yaml
from plotly.offline import get_plotlyjs

import house

HERE = Path(__file__).parent
ROOT = HERE.parent
GIT = 'https://github.com/lah-nb/lah_nb'
MARKDOWN = nbformat.v4.new_markdown_cell
PLOTLY = 'application/vnd.plotly.v1+json'
FLOORS = {
    'network': 'Peers, calls, and a hash table of signed records that expire',
    'mixture': 'What an expert is, who hosts it, who is chosen, and the layer that is all of them',
    'swarm': 'Start, join, lend, and see who is there',
    'training': 'Data, models, and the trainer with several batches in flight',
    'simulation': 'The same code with thousands of peers, in virtual time',
    'views': 'Live views, panels and still pictures',
    'command': 'The `lah-nb` command, and what an operator needs',
    'experiments': 'A question, a measurement, an answer'}


def code_of(source):
    "The code of a cell, folded: the library is meant to be read"
    cell = nbformat.v4.new_code_cell(re.sub(r'^#\|.*\n?', '', source, flags=re.M))
    cell.metadata = {'tags': ['hide-input'], 'mystnb': {'code_prompt_show': 'Show the code', 'code_prompt_hide': 'Hide the code'}}
    return cell


def front_matter(source):
    "What nbdev says of a page in a raw cell"
    found = re.fullmatch(r'\s*---\n(.*?)\n---\s*', source, re.S)
    return yaml.safe_load(found[1]) if found else None


def api(text, page, used):
    "An entry of the reference: nbdev's `show_doc`, in plain Markdown, with a label to link to"
    text = text.removeprefix('---\n\n')
    text = re.sub(r'\[source\]\((?:%s)?(/blob[^)]*)\)\{[^}]*\}' % re.escape(GIT), rf'<a class="source" href="{GIT}\1">source</a>', text)
    text = re.sub(r'\b(?:__main__|collections\.abc|lah_nb(?:\.\w+)+)\.(?=[A-Za-z_])', '', text)  # `Call`, wherever it lives
    def heading(found):
        name = label(page, found[1])
        target = '' if name in used else f'({name})=\n\n'  # `Span` and `span` are one label to Sphinx: it goes to the first
        used.add(name)
        return f'{target}### `{found[1]}`'
    return re.sub(r'^### (\S+)$', heading, text, flags=re.M)


def defined(source):
    "The names that a cell defines, in order; a patched method with its class, as `show_doc` calls it"
    for node in ast.parse(source).body:
        patched = any('patch' in ast.dump(decorator) for decorator in getattr(node, 'decorator_list', ()))
        if patched: yield f'{ast.unparse(node.args.args[0].annotation)}.{node.name}'
        elif hasattr(node, 'name'): yield node.name


def label(page, name): return f'api-{page}-{name.lower()}'


def links(text, labels):
    "Links between notebooks, and from names to their entries, as they are on the site"
    text = re.sub(r'\]\(/(?:\w+/)?(\w+)\.html#([\w.]+)\)', lambda m: f'](#{label(m[1], m[2])})' if label(m[1], m[2]) in labels else f']({m[1]}.ipynb)', text)
    text = re.sub(r'\]\((?:\.\./)*(?:nbs/)?(?:\w+/)?(\d\d[a-z]?_\w+)\.ipynb\)', lambda m: f']({page_name(m[1])}.ipynb)', text)
    return re.sub(r'^\[!\[Open In Colab\].*$', '', text, flags=re.M)


def page_name(stem):
    "07_host -> host; tutorials keep their number"
    return f'tutorial_{stem}' if (ROOT/'nbs/tutorials'/f'{stem}.ipynb').exists() else re.sub(r'^\d+[a-z]?_', '', stem)


def figure(data, n):
    "A plotly figure; its title is text of the page, which a phone can break into lines"
    data = json.loads(json.dumps(data))
    title = data['layout'].pop('title', {}).get('text', '')
    if title and (margin := data['layout'].get('margin')): margin['t'] = max(30, margin.get('t', 60) - 30)
    name, layout, after = f'"figure{n}"', data['layout'], ''
    if data.get('frames'): after += f'Plotly.addFrames({name}, {json.dumps(data["frames"])});'
    if narrow := layout.get('meta', {}).get('narrow'):  # what it changes on a phone
        after += f'if (innerWidth < 600) {{ document.getElementById({name}).style.height = "{narrow["height"]}px"; Plotly.relayout({name}, {json.dumps(narrow)}); }}'
    plot = f'Plotly.newPlot({name}, {json.dumps(data["data"])}, {json.dumps(layout)}, {{responsive: true, displaylogo: false}})'
    return ('<script defer src="_static/plotly.min.js"></script>' * (n == 1)
            + f'<div class="figure-title">{title}</div><div id={name} class="plotly-figure" style="height: {layout.get("height", 450)}px"></div>'
            + f'<script>document.addEventListener("DOMContentLoaded", () => {plot}.then(() => {{ {after} }}))</script>')


def with_pictures(text, notebooks):
    "A page of docs/ with the drawings and the notebooks' figures that it names: `<!-- batch.svg -->`, `<!-- dht: its cell -->`"
    figures = itertools.count(1)
    def shown(found):
        page, source = found[1], found[2]
        return next(figure(output.data[PLOTLY], next(figures)) for cell in notebooks[page].cells if source in cell.source for output in cell.get('outputs', []) if PLOTLY in output.get('data', {}))
    text = re.sub(r'^<!-- (\w+\.json\.gz) -->$', lambda m: figure(json.loads(gzip.decompress((HERE/m[1]).read_bytes())), next(figures)), text, flags=re.M)
    text = text.replace('<!-- the house -->', f'<div class="picture">\n{house.svg()}\n</div>')
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

    def floor(self, floor):
        "A page for a floor: what is on it, in reading order"
        here = [page for page, path in self.paths.items() if str(path.parent) == floor]
        lines = [f'- [{self.about[page]["title"]}]({page}.ipynb): {self.about[page]["description"]}' for page in here]
        return f'# {floor.capitalize()}\n\n{FLOORS[floor]}.\n\n' + '\n'.join(lines) + '\n\n```{toctree}\n:hidden:\n\n' + '\n'.join(here) + '\n```\n'

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

    def entries(self, page, used):
        "name -> its entry of the reference, from what `show_doc` printed"
        for cell in self.notebooks[page].cells:
            if not re.search(r'^#\|\s*output: asis', cell.source, re.M): continue
            name = re.search(r'show_doc\(([\w.]+)', cell.source)
            for output in cell.outputs:
                if text := output.get('data', {}).get('text/markdown'): yield name[1], links(api(text, page, used), self.labels)

    def chapter(self, page):
        "The cells of a library page in the order of its notebook: what a cell defines, then its code, folded"
        processed, used = {cell.id: cell for cell in self.notebooks[page].cells}, set()
        entries = dict(self.entries(page, used))
        for cell in nbformat.read(ROOT/'nbs'/self.paths[page], 4).cells:
            if cell.cell_type == 'code' and re.search(r'^#\|\s*export\s*$', cell.source, re.M):
                names = list(defined(cell.source))
                for name in names:
                    if name in entries: yield MARKDOWN(entries.pop(name))
                if names or not re.search(r'^(?:import|from) ', cell.source, re.M): yield code_of(cell.source)
            elif cell.id in processed: yield processed[cell.id]

    def cells(self, page):
        figures, nb = itertools.count(1), self.notebooks[page]
        library = 'tutorials' not in str(self.paths[page])
        yield MARKDOWN(f'# {self.about[page].get("title", page)}\n\n*{self.about[page].get("description", "")}*\n\n{self.whence(page)}')
        for cell in (self.chapter(page) if library else nb.cells):
            if cell.cell_type == 'raw' or 'AUTOGENERATED' in cell.source or library and cell.source.startswith('# '): continue
            if cell.cell_type == 'markdown': yield MARKDOWN(links(cell.source, self.labels))
            elif 'hide-input' in cell.metadata.get('tags', []): yield cell
            else:
                cell.metadata = {}
                cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)
                cell.outputs = self.outputs(cell, figures)
                if cell.source.strip(): yield cell

    def write(self, folder):
        for page, nb in self.notebooks.items():
            nb.cells = list(self.cells(page))
            nb.metadata.setdefault('kernelspec', {}).update(name='python3', display_name='python3', language='python')
            nbformat.write(nb, folder/f'{page}.ipynb')


def main(proc, site):
    site.mkdir()
    pages = Pages(proc)
    for path in HERE.glob('*.md'): (site/path.name).write_text(with_pictures(path.read_text(encoding='utf-8'), pages.notebooks), encoding='utf-8')
    for floor in FLOORS: (site/f'floor_{floor}.md').write_text(pages.floor(floor), encoding='utf-8')
    pages.write(site)
    for path in [*(path for kind in ('png', 'gif') for path in HERE.glob(f'*.{kind}')), HERE/'conf.py', ROOT/'settings.ini']: shutil.copy(path, site)
    for name in ('benchmarks/README.md', 'CHANGELOG.md', 'CONTRIBUTING.md'):
        text = (ROOT/name).read_text(encoding='utf-8')
        (site/f'{"benchmarks" if "bench" in name else Path(name).stem.lower()}.md').write_text(re.sub(r'\]\((?!http|#)([^)]+)\)', rf']({GIT}/blob/main/\1)', text), encoding='utf-8')
    (site/'_static').mkdir()
    shutil.copy(HERE/'site.css', site/'_static')
    (site/'_static/plotly.min.js').write_text(get_plotlyjs(), encoding='utf-8')


if __name__ == '__main__': main(Path(sys.argv[1]), Path(sys.argv[2]))
