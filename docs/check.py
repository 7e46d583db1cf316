"""Opens every page of the built site in headless Chromium, by day, by night and on a phone: python docs/check.py _docs [FOLDER FOR PICTURES]

Every picture and figure is there, nothing is wider than the phone, no console error, no request that leaves this machine, every link and anchor leads somewhere, and the search finds what it should.
"""
import asyncio, functools, http.server, sys, threading, time
from pathlib import Path
from urllib.parse import unquote, urldefrag

sys.path.insert(0, str(Path(__file__).parents[1] / 'tests'))
try: from browser import ARGS, find_chromium
except ImportError: sys.exit(print('playwright is not here: the pages of the site are not opened'))
from playwright.async_api import async_playwright

LOOKS = dict(light=('light', 1280, 900), dark=('dark', 1280, 900), phone=('light', 390, 844))
SEARCH, FOUND = 'beam search', {'gating.html', 'tutorial_03_gate.html'}
AT_ONCE = 4

PICTURES = '''async () => {
    await Promise.all([...document.images].map(image => { image.loading = 'eager'; return image.decode().catch(() => 0); }));
    await new Promise(done => { const look = n => [...document.querySelectorAll('.plotly-figure')].every(e => e.querySelector('.main-svg')) || !n ? done() : setTimeout(look, 50, n - 1); look(200); });
    return [...[...document.images].filter(image => !image.naturalWidth).map(image => image.src.slice(0, 100)), ...[...document.querySelectorAll('.plotly-figure')].filter(e => !e.querySelector('.main-svg')).map(e => e.id)]; }'''
WIDTH = '[document.documentElement.scrollWidth, innerWidth]'
LINKS = "[...document.querySelectorAll('a[href]')].map(a => a.href.baseVal === undefined ? a.href : new URL(a.href.baseVal, location).href)"  # in a drawing, a link is an object
NAMES = "[...document.querySelectorAll('[id], a[name]')].map(e => e.id || e.name)"


class Quiet(http.server.SimpleHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *_): pass


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_): pass  # a browser that hangs up early


class Site:
    def __init__(self, folder, url, pictures=None):
        self.url, self.pictures, self.pages = url, pictures, sorted(path.name for path in folder.glob('*.html'))
        self.wrong, self.links, self.names = [], {}, {}  # what is wrong; page -> where it links to; page -> its anchors

    async def watch(self, context):
        "No request leaves the site, and none fails"
        async def gate(route):
            if route.request.url.startswith((self.url, 'data:', 'blob:')): return await route.continue_()
            self.wrong.append(f'{route.request.frame.url}: wants {route.request.url[:200]}')
            await route.abort()
        await context.route('**/*', gate)
        context.on('response', lambda r: r.status >= 400 and self.wrong.append(f'{r.status} for {r.url}'))
        context.on('console', lambda m: m.type == 'error' and self.wrong.append(f'{m.page.url}: console says {m.text}'))
        context.on('weberror', lambda e: self.wrong.append(f'{e.page.url}: {e.error}'))

    async def turn(self, page, look):
        scheme, width, height = LOOKS[look]
        await page.emulate_media(color_scheme=scheme)
        await page.set_viewport_size(dict(width=width, height=height))

    async def picture(self, page, name, **options):
        if self.pictures: await page.screenshot(path=self.pictures/f'{name}.png', **options)

    async def open(self, context, name):
        page = await context.new_page()
        await page.goto(f'{self.url}/{name}')
        for look in LOOKS:
            await self.turn(page, look)
            self.wrong += [f'{name}, {look}: is not there: {lost}' for lost in await page.evaluate(PICTURES)]
            width, window = await page.evaluate(WIDTH)
            if width > window: self.wrong.append(f'{name}, {look}: {width} pixels wide, in a window of {window}')
            await self.picture(page, f'{name[:-5]}-{look}', full_page=True)
        self.links[name], self.names[name] = await page.evaluate(LINKS), set(await page.evaluate(NAMES))
        await page.close()

    async def search(self, context):
        page = await context.new_page()
        for look in LOOKS:
            await self.turn(page, look)
            await page.goto(f'{self.url}/index.html')
            if look == 'phone': await page.locator('.mobile-header label[for=__navigation]').click()
            await page.locator('.sidebar-search').fill(SEARCH)
            await page.locator('.sidebar-search').press('Enter')
            await page.wait_for_selector('#search-results .search-summary:has-text("found")', timeout=30_000)
            found = {urldefrag(href)[0].rsplit('/', 1)[-1].split('?')[0] for href in await page.eval_on_selector_all('#search-results a', 'all => all.map(a => a.href)')}
            if not FOUND <= found: self.wrong.append(f'{look}: the search for {SEARCH!r} finds {sorted(found)}')
            await self.picture(page, f'searched-{look}')
        await page.close()

    def check_links(self):
        for name, links in self.links.items():
            for link in sorted(set(links)):
                if not link.startswith(self.url): continue
                path, anchor = urldefrag(link)
                path, anchor = path.removeprefix(f'{self.url}/') or 'index.html', unquote(anchor)
                if path.endswith('.html') and path not in self.names: self.wrong.append(f'{name}: no page {path}')
                elif anchor and anchor not in self.names.get(path, ()): self.wrong.append(f'{name}: no anchor {path}#{anchor}')

    async def check(self):
        async with async_playwright() as p:
            browser = await p.chromium.launch(executable_path=find_chromium(), headless=True, args=ARGS)
            context, names = await browser.new_context(), iter(self.pages)
            await self.watch(context)
            async def some():
                for name in names: await self.open(context, name)
            await asyncio.gather(self.search(context), *(some() for _ in range(AT_ONCE)))
            await browser.close()
        self.check_links()


def main(folder, pictures=None):
    if not find_chromium(): return print('chromium is not here: the pages of the site are not opened')
    with Server(('127.0.0.1', 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        site, began = Site(Path(folder), f'http://127.0.0.1:{server.server_port}', pictures and Path(pictures)), time.monotonic()
        asyncio.run(site.check())
        server.shutdown()
    for line in sorted(set(site.wrong)): print(line)
    print(f'{len(site.pages)} pages in {", ".join(LOOKS)}, {sum(map(len, site.links.values()))} links, in {time.monotonic() - began:.0f} s: {len(set(site.wrong)) or "nothing"} wrong')
    return bool(site.wrong)


if __name__ == '__main__': sys.exit(main(*sys.argv[1:]))
