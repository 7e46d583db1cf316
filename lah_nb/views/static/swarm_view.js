// The live picture of a swarm. Python sends a `scene` (who is there, where they stand, who hosts what) when it changes,
// and twice a second a `frame` of a few bytes for each peer and one for each expert. Between frames this file animates.
//
// `s` is a store: scene and frames of one model, shared by all its views. `v` is a view: its elements, its measures,
// and what the pointer is on. Peers, experts and grids are known by their numbers in the lists of the store.

const STATES = ['alive', 'silent', 'gone', 'trainer'];
const SILENT = '#D55E00', TRAINER = '#009E73', MARK = '#E69F00';
const RAMPS = {
  light: [[205, 222, 240], [107, 165, 214], [33, 113, 181], [8, 48, 107]],
  dark: [[38, 66, 97], [47, 120, 182], [116, 184, 235], [222, 242, 255]],
};
const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
const GOLDEN = 2.399963;   // radians between two seeds of a sunflower
const FADE = 400;          // milliseconds from one frame's colours to the next
const FLIGHT = 520;        // milliseconds that a dot takes
const MOST_DOTS = 160;

const clamp = (x, least, most) => Math.min(Math.max(x, least), most);
const brief = id => id.length > 12 ? `${id.slice(0, 4)}…${id.slice(-6)}` : id;

function ramp(stops, x) {
  const t = clamp(x, 0, 1) * (stops.length - 1);
  const i = Math.min(t | 0, stops.length - 2);
  const mixed = stops[i].map((a, k) => Math.round(a + (stops[i + 1][k] - a) * (t - i)));
  return `rgb(${mixed})`;
}

function number(n) {
  if (Number.isInteger(n) || n >= 100) return Math.round(n).toLocaleString('en');
  if (n >= 1) return n.toFixed(1);
  return n > 0 ? n.toFixed(2) : '0';
}

// ---------------------------------------------------------------- what Python sends

// by the scene a model opened with: `initialize` and `render` get different proxies of the model
const stores = new WeakMap();

// a copy: numbers of several bytes must begin where their size divides the place
function bytes(view, kind = Uint8Array) {
  return new kind(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

const frameLength = s => 13 * s.peers.length + s.uids.length;

function readFrame(buffer, info, n, m) {
  const b = bytes(buffer).buffer;
  const small = i => new Uint8Array(b, i * n, n);
  const rest = new DataView(b, 3 * n + m);
  const column = (start, step, read) => Float64Array.from({ length: n }, (_, i) => rest[read](start + i * step, true));
  return {
    ...info,
    state: small(0),
    flying: small(1),
    begun: small(2),
    load: new Uint8Array(b, 3 * n, m),
    latency: column(0, 2, 'getUint16').map(tenths => tenths / 10),
    updates: column(2 * n, 4, 'getUint32'),
    rate: column(6 * n, 4, 'getFloat32'),
  };
}

function openStore(shown) {
  const { peers, uids, hosts, grids, layout } = shown;
  const frame = readFrame(shown.frame, shown.info, peers.length, uids.length);
  return {
    peers, uids, hosts, grids, layout,
    at: Array.from(bytes(shown.at, Float32Array)),
    cells: Array.from(bytes(shown.cells, Uint16Array)),
    links: bytes(shown.links, Uint16Array),
    frame,
    before: frame,
    frames: 0,
    views: new Set(),
  };
}

// what joined comes at the end of each list, from `first` on (0 when some were forgotten);
// `hosts` of known peers may change
function takeScene(s, message, buffers) {
  const [peers, uids] = message.first;
  s.peers.splice(peers, s.peers.length, ...message.peers);
  s.uids.splice(uids, s.uids.length, ...message.uids);
  s.grids = message.grids;
  s.hosts.splice(peers);
  while (s.hosts.length < s.peers.length) s.hosts.push([]);
  for (const [i, hosted] of message.hosts) s.hosts[i] = hosted;
  s.at.splice(3 * peers, s.at.length, ...bytes(buffers[0], Float32Array));
  s.cells = Array.from(bytes(buffers[1], Uint16Array));
  s.links = bytes(buffers[2], Uint16Array);
}

function takeFrame(s, message, buffers) {
  s.before = s.frame;
  s.frame = readFrame(buffers[0], message, s.peers.length, s.uids.length);
  s.frames++;
}

function initialize({ model }) {
  const shown = model.get('scene');
  const s = openStore(shown);
  const handle = (message, buffers) => {
    if (message.kind === 'scene') takeScene(s, message, buffers);
    else if (message.kind === 'frame' && buffers[0].byteLength === frameLength(s)) takeFrame(s, message, buffers);
    else return;
    const anew = message.kind === 'scene' && !message.first[0];
    for (const tell of s.views) tell(message.kind, anew);
  };
  model.on('msg:custom', handle);
  stores.set(shown, s);
  return () => model.off('msg:custom', handle);
}

// ---------------------------------------------------------------- where things are

const highest = grids => Math.max(1, ...grids.map(([, rows]) => rows));
const triple = (list, i) => [list[3 * i], list[3 * i + 1], list[3 * i + 2]];

function place({ s, box, layout }, i) {
  const [x, y, turn] = triple(s.at, i);
  if (layout === 'ring') return [box.x + Math.cos(turn) * box.r, box.y + Math.sin(turn) * box.r];
  return [box.x + x * box.r, box.y + y * box.r];
}

// beside each other where there is room, else the swarm above and the grids below
function measure(v) {
  const { s, W, H } = v;
  const narrow = W < 620;
  const side = narrow ? W : Math.min(W * .58, H);
  const n = Math.max(1, s.peers.length);
  const gap = v.layout === 'ring' ? Math.PI * side / n : side / Math.sqrt(n);
  const around = clamp(gap * .34, 5, 44);
  const most = Math.max(1, ...s.hosts.map(hosted => hosted.length));
  v.box = {
    x: narrow ? W / 2 : side / 2,
    y: narrow ? side / 2 : H / 2,
    r: Math.max(20, side / 2 - around - 8),
    peer: clamp(gap * .09, 2.5, 9),
    around,
    dot: clamp(around / Math.sqrt(most) / 1.5, .9, 5),
    left: narrow ? 8 : side + 24,
    top: narrow ? side + 24 : 28,
    width: narrow ? W - 16 : W - side - 32,
    height: narrow ? H - side - 72 : H - 84,
  };
  v.box.peers = s.peers.map((_, i) => place(v, i));
  v.box.experts = s.hosts.flatMap((hosted, i) => placeExperts(v.box, hosted || [], i));
  const columns = s.grids.reduce((sum, [, , wide]) => sum + wide + 1, -1);
  const fits = Math.min(v.box.width / Math.max(columns, 1), v.box.height / highest(s.grids), 34);
  v.box.cell = Math.max(.6, fits);
}

// [expert, its peer, x, y] of each: seeds of a sunflower around the peer
function placeExperts(box, hosted, i) {
  const [x, y] = box.peers[i];
  return hosted.map((u, j) => {
    const r = box.peer + (box.around - box.peer) * Math.sqrt((j + 1.5) / (hosted.length + 1));
    return [u, i, x + r * Math.cos(GOLDEN * j), y + r * Math.sin(GOLDEN * j)];
  });
}

// the theme's colours, which may change at any time
function readColours(v) {
  const read = name => {
    v.probe.style.color = `var(--${name})`;
    return getComputedStyle(v.probe).color;
  };
  for (const name of ['fg', 'bg', 'line', 'idle', 'gone']) v.css[name] = read(name);
  const [red, green, blue] = (v.css.fg.match(/[\d.]+/g) || [0, 0, 0]).map(Number);
  const half = v.css.fg.startsWith('rgb') ? 382 : 1.5;
  v.css.ramp = RAMPS[red + green + blue > half ? 'dark' : 'light'];
  v.css.font = getComputedStyle(v.root).fontFamily;
}

// ---------------------------------------------------------------- the picture that changes twice a second

function kick(v) {
  v.painting ||= requestAnimationFrame(() => paint(v));
}

function paint(v) {
  v.painting = 0;
  const { s, g } = v;
  const jump = v.still || s.uids.length > 1500;
  const k = jump ? 1 : Math.min(1, (performance.now() - v.since) / FADE);
  const colour = x => x > .004 ? ramp(v.css.ramp, x) : v.css.idle;
  const load = u => {
    const end = s.frame.load[u] || 0;
    const start = s.before.load[u] ?? end;
    return (start + (end - start) * k) / 255;
  };
  const colourOf = u => colour(load(u));
  const picked = v.model.get('selected');
  const strong = v.hover >= 0 ? v.hover : s.peers.findIndex(([id]) => id === picked);
  g.clearRect(0, 0, v.W, v.H);
  paintLinks(v, strong);
  paintExperts(v, colourOf);
  paintPeers(v, colour, picked, strong);
  paintGrids(v, colourOf);
  if (k < 1) kick(v);
}

function paintLinks({ s, g, box, css }, strong) {
  const mine = [];
  const line = (a, b) => {
    g.moveTo(...box.peers[a]);
    g.lineTo(...box.peers[b]);
  };
  g.lineWidth = 1;
  g.strokeStyle = css.line;
  g.beginPath();
  for (let i = 0; i < s.links.length; i += 2) {
    const a = s.links[i], b = s.links[i + 1];
    if (!box.peers[a] || !box.peers[b]) continue;
    if (a === strong || b === strong) mine.push([a, b]);
    line(a, b);
  }
  g.stroke();
  if (!mine.length) return;
  g.strokeStyle = css.fg;
  g.globalAlpha = .55;
  g.beginPath();
  for (const [a, b] of mine) line(a, b);
  g.stroke();
  g.globalAlpha = 1;
}

function paintExperts({ s, g, box, css }, colourOf) {
  for (const [u, i, x, y] of box.experts) {
    g.fillStyle = s.frame.state[i] === 0 ? colourOf(u) : css.idle;
    disc(g, x, y, box.dot);
    g.fill();
  }
}

function paintPeers(v, colour, picked, strong) {
  const { s, g, box, css } = v;
  const busiest = Math.max(1e-9, ...s.frame.rate);
  box.peers.forEach(([x, y], i) => {
    const state = STATES[s.frame.state[i]];
    paintPeer(v, x, y, state, colour(Math.max(.12, s.frame.rate[i] / busiest)));
    if (i !== strong && s.peers[i][0] !== picked) return;
    g.strokeStyle = i === v.hover ? css.fg : MARK;
    g.lineWidth = 2;
    disc(g, x, y, box.peer + 4);
    g.stroke();
  });
}

function paintPeer({ g, box, css }, x, y, state, busy) {
  const r = box.peer;
  g.fillStyle = css.bg;
  disc(g, x, y, r + 1.5);
  g.fill();
  // who has just joined has no state before the next frame
  g.fillStyle = { alive: busy, silent: css.bg, trainer: TRAINER }[state] ?? css.gone;
  if (state === 'trainer') diamond(g, x, y, r + 1);
  else disc(g, x, y, r);
  g.fill();
  if (state === 'silent') {
    g.strokeStyle = SILENT;
    g.lineWidth = Math.max(1.5, r / 4);
    g.stroke();
  }
  if (state === 'gone') {
    g.strokeStyle = css.bg;
    g.lineWidth = Math.max(1.2, r / 4);
    cross(g, x, y, r / 2);
    g.stroke();
  }
}

function disc(g, x, y, r) {
  g.beginPath();
  g.arc(x, y, r, 0, 7);
}

function diamond(g, x, y, r) {
  g.beginPath();
  g.moveTo(x, y - r);
  g.lineTo(x + r, y);
  g.lineTo(x, y + r);
  g.lineTo(x - r, y);
  g.closePath();
}

function cross(g, x, y, r) {
  g.beginPath();
  g.moveTo(x - r, y - r);
  g.lineTo(x + r, y + r);
  g.moveTo(x + r, y - r);
  g.lineTo(x - r, y + r);
}

// the heat maps: a cell for each expert, one grid beside the other
function paintGrids(v, colourOf) {
  const { s, g, box, css } = v;
  const starts = [];
  let x = box.left;
  for (const [, , columns] of s.grids) {
    starts.push(x);
    x += (columns + 1) * box.cell;
  }
  g.fillStyle = css.fg;
  g.font = `600 12px ${css.font}`;
  g.fillText('Expert load', box.left, box.top - 10);
  paintCells(v, starts, colourOf);
  g.font = `11px ${css.font}`;
  g.fillStyle = css.fg;
  const y = box.top + highest(s.grids) * box.cell;
  s.grids.forEach(([name, , columns], i) => {
    if ((columns + 1) * box.cell > 6 * name.length) g.fillText(name, starts[i], y + 12);
  });
  paintLegend(v, y);
}

function paintCells({ s, g, box, css }, starts, colourOf) {
  const c = box.cell;
  const pad = c > 4 ? 1 : 0;
  const alive = new Uint8Array(s.uids.length);
  s.hosts.forEach((hosted, i) => {
    if (s.frame.state[i] === 0) for (const u of hosted) alive[u] = 1;
  });
  for (let u = 0; u < s.uids.length; u++) {
    const [grid, row, column] = triple(s.cells, u);
    const x = starts[grid] + column * c;
    const y = box.top + row * c;
    g.fillStyle = alive[u] ? colourOf(u) : css.gone;
    g.fillRect(x, y, c - pad, c - pad);
    if (alive[u] || c <= 7) continue;
    g.fillStyle = css.bg;   // a bar through what is gone
    g.fillRect(x + c * .3, y + c * .45, c * .4, Math.max(1, c * .1));
  }
}

function paintLegend({ s, g, box, css }, y) {
  const wide = Math.min(box.width, 220);
  const bar = g.createLinearGradient(box.left, 0, box.left + wide, 0);
  for (let i = 0; i <= 6; i++) bar.addColorStop(i / 6, ramp(css.ramp, i / 6));
  g.fillStyle = bar;
  g.fillRect(box.left, y + 20, wide, 6);
  g.fillStyle = css.fg;
  g.fillText('idle', box.left, y + 39);
  g.textAlign = 'right';
  g.fillText(`${number(s.frame.top)} rows/s`, box.left + wide, y + 39);
  g.textAlign = 'left';
}

// ---------------------------------------------------------------- calls on their way

// dots that move along the edges from the trainer, or back: a few for each peer, not one for each call
function launch(v) {
  const { frame } = v.s;
  if (frame.own < 0 || v.still || !v.box.peers[frame.own]) return;
  const now = performance.now();
  let room = MOST_DOTS - v.dots.length;
  frame.begun.forEach((begun, i) => {
    if (i === frame.own) return;
    for (let j = Math.min(begun, frame.flying[i] + 3, 5); j > 0 && room > 0; j--) {
      v.dots.push({ peer: i, start: now + 480 * Math.random(), back: Math.random() < .5 });
      room--;
    }
  });
  if (v.dots.length) soar(v);
}

function soar(v) {
  v.flying ||= requestAnimationFrame(now => fly(v, now));
}

function fly(v, now) {
  const { o, box } = v;
  const own = box.peers[v.s.frame.own];
  v.flying = 0;
  o.clearRect(0, 0, v.W, v.H);
  o.fillStyle = MARK;
  v.dots = own ? v.dots.filter(dot => now < dot.start + FLIGHT && box.peers[dot.peer]) : [];
  for (const { peer, start, back } of v.dots) {
    const gone = (now - start) / FLIGHT;
    if (gone < 0) continue;
    const t = back ? 1 - gone : gone;
    const [x, y] = box.peers[peer];
    disc(o, own[0] + (x - own[0]) * t, own[1] + (y - own[1]) * t, 2.6);
    o.fill();
  }
  if (v.dots.length) soar(v);
}

// ---------------------------------------------------------------- words

function facts({ s }, i) {
  const [id, addr, device] = s.peers[i];
  const { state, updates, rate, latency, flying } = s.frame;
  const name = STATES[state[i]];
  return {
    peer: id,
    state: name === 'trainer' ? 'this trainer, or a peer without experts' : name,
    address: addr || 'dials out only',
    device: device || '–',
    experts: String((s.hosts[i] || []).length),
    updates: number(updates[i]),
    load: `${number(rate[i])} rows/s`,
    latency: latency[i] ? `${number(latency[i])} ms` : '–',
    'calls in flight': String(flying[i]),
  };
}

function words(v) {
  const { s, root, picture, status, said } = v;
  status.textContent = s.frame.status;
  picture.setAttribute('aria-label', `Swarm topology and expert load: ${s.frame.status}`);
  // read aloud when a peer's state changes, not twice a second
  const changed = s.peers.some((_, i) => s.before.state[i] !== s.frame.state[i]);
  if (changed) said.textContent = s.frame.status;
  root.dataset.frames = s.frames;
  root.dataset.states = Array.from(s.frame.state, i => STATES[i]).join(' ');
  showDetail(v, s.peers.findIndex(([id]) => id === v.model.get('selected')));
  showTip(v);
}

// the table below the picture; what has not changed in it may be selected and copied
function showDetail(v, i) {
  const { s, detail } = v;
  detail.hidden = i < 0;
  if (i < 0) return;
  const about = { ...facts(v, i), experts: expertNames(s, i) };
  if (!detail.children.length) detail.append(...Object.keys(about).flatMap(detailRow));
  Object.values(about).forEach((text, k) => {
    const value = detail.children[2 * k + 1];
    if (value.textContent !== text) value.textContent = text;
  });
}

function detailRow(name) {
  const term = document.createElement('dt');
  term.textContent = name;
  return [term, document.createElement('dd')];
}

function expertNames(s, i) {
  const uids = (s.hosts[i] || []).map(u => s.uids[u]);
  if (uids.length > 24) return `${uids.length}: ${uids.slice(0, 24).join(', ')}, …`;
  return uids.join(', ') || 'none';
}

// what the pointer is on, in a few words beside it
function showTip(v) {
  const { s, tip, box } = v;
  tip.hidden = v.hover < 0 || !s.peers[v.hover];
  if (tip.hidden) return;
  const f = facts(v, v.hover);
  const first = `${brief(f.peer)} · ${f.state}`;
  const second = `${f.address.split('/p2p/')[0]} · ${f.device}`;
  const third = `${f.experts} experts · ${f.updates} updates · ${f.load} · ${f.latency}`;
  tip.textContent = `${first}\n${second}\n${third}`;
  const [x, y] = box.peers[v.hover];
  const right = Math.max(0, Math.min(x + 14, v.W - tip.offsetWidth - 4));
  const down = Math.max(0, Math.min(y + 10, v.H - tip.offsetHeight));
  tip.style.transform = `translate(${right}px, ${down}px)`;
}

// ---------------------------------------------------------------- what happens

function resize(v) {
  const d = devicePixelRatio || 1;
  const W = v.W = v.root.clientWidth;
  if (!W) return;
  v.H = W < 620 ? W + Math.min(W, 300) + 80 : clamp(W * .52, 320, 520);
  v.picture.style.height = `${v.H}px`;
  for (const context of [v.g, v.o]) {
    context.canvas.width = W * d;
    context.canvas.height = v.H * d;
    context.setTransform(d, 0, 0, d, 0, 0);
  }
  readColours(v);
  measure(v);
  words(v);
  paint(v);
}

function news(v, kind, anew) {
  if (!v.on || !v.W) return;
  if (kind === 'scene') {
    if (anew) {   // numbers of peers mean others now
      v.hover = -1;
      v.dots = [];
    }
    measure(v);
  } else {
    v.since = performance.now();
    readColours(v);
    launch(v);
    words(v);
  }
  kick(v);
}

function refresh(v) {
  words(v);
  kick(v);
}

// the peer that the pointer is on, or -1
function near({ box }, event) {
  let best = -1;
  let least = (box.peer + 9) ** 2;
  box.peers.forEach(([x, y], i) => {
    const distance = (event.offsetX - x) ** 2 + (event.offsetY - y) ** 2;
    if (distance >= least) return;
    least = distance;
    best = i;
  });
  return best;
}

function hover(v, i) {
  v.hover = i;
  refresh(v);
}

function select(v, i) {
  const { s, model, said } = v;
  model.set('selected', i >= 0 ? s.peers[i][0] : '');
  model.save_changes();
  refresh(v);
  if (i < 0) return;
  const experts = (s.hosts[i] || []).length;
  said.textContent = `peer ${brief(s.peers[i][0])}, ${STATES[s.frame.state[i]]}, ${experts} experts`;
}

function pressKey(v, event) {
  const n = v.s.peers.length;
  const i = v.s.peers.findIndex(([id]) => id === v.model.get('selected'));
  const step = STEPS[event.key];
  if (step && n) select(v, i < 0 ? (step > 0 ? 0 : n - 1) : (i + step + n) % n);
  else if (event.key === 'Escape') select(v, -1);
  else return;
  event.preventDefault();
  event.stopPropagation();
}

function arrange(v, layout) {
  v.layout = layout;
  markLayout(v);
  measure(v);
  kick(v);
}

function markLayout({ root, layout }) {
  for (const button of root.querySelectorAll('[data-layout]')) {
    button.setAttribute('aria-pressed', button.dataset.layout === layout);
  }
}

function toggleLive(v) {
  v.on = !v.on;
  v.live.setAttribute('aria-pressed', v.on);
  if (v.on) news(v, 'frame');
}

// ---------------------------------------------------------------- a view

const HTML = `
<div class="bar">
  <span role="group" aria-label="layout">
    <button data-layout="force">Force</button><button data-layout="ring">Ring by key</button>
  </span>
  <button data-live aria-pressed="true">Live</button><span class="status"></span>
</div>
<div class="said" role="status"></div>
<div class="picture" tabindex="0" role="img"><canvas></canvas><canvas></canvas><div class="tip" hidden></div></div>
<dl class="detail" hidden></dl><i hidden></i>`;

function openView(model, root) {
  const s = stores.get(model.get('scene'));
  const find = selector => root.querySelector(selector);
  const [base, over] = root.querySelectorAll('canvas');
  return {
    s, model, root,
    picture: find('.picture'), status: find('.status'), said: find('.said'), live: find('[data-live]'),
    tip: find('.tip'), detail: find('.detail'), probe: find('i'),
    g: base.getContext('2d'), o: over.getContext('2d'),   // the picture, and the dots that move over it
    W: 0, H: 0, box: {}, css: {},
    layout: s.layout, on: true, hover: -1, dots: [],
    still: matchMedia('(prefers-reduced-motion: reduce)').matches,
    since: -1e9,              // when the last frame came
    painting: 0, flying: 0,   // animation frames that are asked for
  };
}

function listen(v) {
  const { root, picture, live, o } = v;
  for (const button of root.querySelectorAll('[data-layout]')) button.onclick = () => arrange(v, button.dataset.layout);
  live.onclick = () => toggleLive(v);
  o.canvas.onpointermove = event => {
    const i = near(v, event);
    if (i !== v.hover) hover(v, i);
  };
  o.canvas.onpointerleave = () => hover(v, -1);
  o.canvas.onclick = event => select(v, near(v, event));
  picture.onkeydown = event => pressKey(v, event);
}

function render({ model, el }) {
  const root = document.createElement('div');
  root.className = 'lah';
  root.innerHTML = HTML;
  el.append(root);
  const v = openView(model, root);
  const tell = (kind, anew) => news(v, kind, anew);
  const changed = () => refresh(v);
  const watcher = new ResizeObserver(() => resize(v));
  listen(v);
  markLayout(v);
  model.on('change:selected', changed);
  v.s.views.add(tell);
  watcher.observe(root);
  return () => {
    watcher.disconnect();
    cancelAnimationFrame(v.painting);
    cancelAnimationFrame(v.flying);
    v.s.views.delete(tell);
    model.off('change:selected', changed);
  };
}

export default { initialize, render };
