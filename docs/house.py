"The drawing of the house, made from the imports and the layers that pyproject.toml demands: python docs/house.py > house.svg"
import re
from collections import Counter
from html import escape
from pathlib import Path

import grimp

ROOT = Path(__file__).parent.parent
WIDTH, ROOM, LINE, GAP, MARGIN = 760, 24, 30, 26, 90  # pixels; the margin is where the arrows go


def floors():
    "Rows from the top down, each with the floors that stand beside each other on it"
    text = (ROOT/'pyproject.toml').read_text(encoding='utf-8')
    layers = re.search(r'layers = \[(.*?)\]', text, re.S)[1]
    rows = [re.findall(r'lah_nb\.(\w+)', line) for line in re.findall(r'"([^"]+)"', layers)]
    rows = [[floor for floor in row if any((ROOT/'lah_nb').glob(f'{floor}*'))] for row in rows]
    return [row for row in rows if row]


def imports():
    "(floor, floor) -> how many modules of the one import one of the other; floor -> its modules in reading order"
    graph = grimp.build_graph('lah_nb', cache_dir=None)
    arrows, rooms = Counter(), {}
    for path in sorted((ROOT/'nbs').glob('*/[0-9]*.ipynb')): rooms.setdefault(path.parent.name, []).append(re.sub(r'^\d+[a-z]?_', '', path.stem))
    floor_of = lambda module: (module.split('.') + [''])[1]
    for module in graph.modules:
        for other in graph.find_modules_directly_imported_by(module):
            ends = floor_of(module), floor_of(other)
            if all(ends) and ends[0] != ends[1] and not ends[0].startswith('_'): arrows[ends] += 1
    return arrows, rooms


def place_rooms(names, x, width):
    "Each room's place, left to right and then down; and the height of all"
    left, y, placed = x + 10, 34, []
    for name in names:
        wide = 7.6 * len(name) + 18
        if left + wide > x + width - 8: left, y = x + 10, y + LINE
        placed.append((name, left, y, wide))
        left += wide + 8
    return placed, y + LINE + 6


def svg():
    "A floor a box, a module a room with a door to its page, and on the right the imports, all of them downwards"
    arrows, rooms = imports()
    parts, at, y = [], {}, 4
    for row in floors():
        wide = (WIDTH - MARGIN - 10 * (len(row) - 1)) / len(row)
        heights = []
        for i, floor in enumerate(row):
            x = 4 + i * (wide + 10)
            placed, height = place_rooms(rooms.get(floor, []), x, wide) if floor in rooms else ([], 40)
            heights.append(height)
            name = f'{floor}/' if floor in rooms else f'{floor}.py'
            parts.append(f'<text class="floor" x="{x + 10:.0f}" y="{y + 22}">{name}</text>')
            for room, left, down, width in placed:
                parts.append(f'<a href="{room}.html"><rect class="room" x="{left:.0f}" y="{y + down}" width="{width:.0f}" height="{ROOM}" rx="4"/>'
                             f'<text x="{left + 9:.0f}" y="{y + down + 16}">{escape(room)}</text></a>')
        for i, floor in enumerate(row):
            x, height = 4 + i * (wide + 10), max(heights)
            parts.insert(0, f'<rect class="home" x="{x:.0f}" y="{y}" width="{wide:.0f}" height="{height}" rx="6"/>')
            at[floor] = y + height / 2, x + wide
        y += max(heights) + GAP
    right, lane = WIDTH - MARGIN + 6, Counter()
    for n, ((above, below), count) in enumerate(sorted(arrows.items(), key=lambda arrow: at[arrow[0][1]][0] - at[arrow[0][0]][0])):
        (start, _), (end, _) = at[above], at[below]
        start, end = start - 12 + 5 * lane[above], end + 4 - 5 * lane[below, 'in']
        lane[above] += 1
        lane[below, 'in'] += 1
        bend = right + 14 + (end - start) * 0.13
        parts.append(f'<path class="way" stroke-width="{1 + count ** 0.5 / 2:.1f}" d="M{right} {start:.0f}C{bend:.0f} {start:.0f} {bend:.0f} {end:.0f} {right} {end:.0f}">'
                     f'<title>{above} → {below}: {count} imports</title></path>'
                     f'<path class="tip" d="M{right} {end:.0f}l8 -4v8z"/>')
    return f'<svg class="house" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y - GAP + 8}" role="img" aria-label="The floors of lah_nb, and who imports whom">{"".join(parts)}</svg>'


if __name__ == '__main__': print(svg())
