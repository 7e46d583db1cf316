// The live picture of a swarm. Python sends a `scene` (who is there, where they stand, who hosts what) when it changes,
// and twice a second a `frame` of a few bytes for each peer and one for each expert. Between frames this file animates.
const STATES = ['alive', 'silent', 'gone', 'trainer'], SILENT = '#D55E00', TRAINER = '#009E73', MARK = '#E69F00';
const RAMPS = { light: [[205, 222, 240], [107, 165, 214], [33, 113, 181], [8, 48, 107]], dark: [[38, 66, 97], [47, 120, 182], [116, 184, 235], [222, 242, 255]] };
const ramp = (stops, v) => { const t = Math.min(Math.max(v, 0), 1) * (stops.length - 1), i = Math.min(t | 0, stops.length - 2); return `rgb(${stops[i].map((a, k) => Math.round(a + (stops[i + 1][k] - a) * (t - i)))})`; };
const bytes = (view, kind = Uint8Array) => new kind(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
const number = n => Number.isInteger(n) || n >= 100 ? Math.round(n).toLocaleString('en') : n >= 1 ? n.toFixed(1) : n > 0 ? n.toFixed(2) : '0';
const brief = id => id.length > 12 ? `${id.slice(0, 4)}…${id.slice(-6)}` : id;
const stores = new WeakMap();   // by the scene a model opened with: `initialize` and `render` get different proxies of the model

function readFrame(buffer, info, n, m) {
  const b = bytes(buffer).buffer, at = [0, n, 2 * n, 3 * n].map(i => new Uint8Array(b, i, i < 3 * n ? n : m)), rest = new DataView(b, 3 * n + m);
  const column = (start, step, read) => Float64Array.from({ length: n }, (_, i) => rest[read](start + i * step, true));
  return { ...info, state: at[0], flying: at[1], begun: at[2], load: at[3], latency: column(0, 2, 'getUint16').map(v => v / 10), updates: column(2 * n, 4, 'getUint32'), rate: column(6 * n, 4, 'getFloat32') };
}

function initialize({ model }) {
  const s = { views: new Set(), frames: 0 }, shown = model.get('scene');
  const links = buffer => { s.links = bytes(buffer, Uint16Array); };
  Object.assign(s, { peers: shown.peers, uids: shown.uids, hosts: shown.hosts, grids: shown.grids, layout: shown.layout, at: Array.from(bytes(shown.at, Float32Array)), cells: Array.from(bytes(shown.cells, Uint16Array)) });
  links(shown.links);
  s.frame = s.before = readFrame(shown.frame, shown.info, s.peers.length, s.uids.length);
  const handle = (message, buffers) => {
    if (message.kind === 'scene') {   // what joined comes at the end of each list, from `first` on (0 when some were forgotten); `hosts` of known peers may change
      const [peers, uids] = message.first;
      s.peers.splice(peers, s.peers.length, ...message.peers); s.hosts.splice(peers); s.uids.splice(uids, s.uids.length, ...message.uids); s.grids = message.grids;
      while (s.hosts.length < s.peers.length) s.hosts.push([]);
      for (const [i, hosted] of message.hosts) s.hosts[i] = hosted;
      s.at.splice(3 * peers, s.at.length, ...bytes(buffers[0], Float32Array)); s.cells = Array.from(bytes(buffers[1], Uint16Array));
      links(buffers[2]);
    } else if (message.kind === 'frame' && buffers[0].byteLength === 13 * s.peers.length + s.uids.length) {
      s.before = s.frame; s.frame = readFrame(buffers[0], message, s.peers.length, s.uids.length); s.frames++;
    } else return;
    for (const view of s.views) view(message.kind, message.kind === 'scene' && !message.first[0]);
  };
  model.on('msg:custom', handle);
  stores.set(shown, s);
  return () => model.off('msg:custom', handle);
}

function render({ model, el }) {
  const s = stores.get(model.get('scene')), root = document.createElement('div');
  root.className = 'lah';
  root.innerHTML = `<div class="bar"><span role="group" aria-label="layout"><button data-layout="force">Force</button><button data-layout="ring">Ring by key</button></span>
    <button data-live aria-pressed="true">Live</button><span class="status"></span></div><div class="said" role="status"></div>
    <div class="picture" tabindex="0" role="img"><canvas></canvas><canvas></canvas><div class="tip" hidden></div></div><dl class="detail" hidden></dl><i hidden></i>`;
  el.append(root);
  const [picture, tip, status, said, detail, probe, live] = ['.picture', '.tip', '.status', '.said', '.detail', 'i', '[data-live]'].map(q => root.querySelector(q));
  const [base, over] = root.querySelectorAll('canvas'), g = base.getContext('2d'), o = over.getContext('2d');
  const still = matchMedia('(prefers-reduced-motion: reduce)').matches;
  let W = 0, H = 0, box = {}, css = {}, since = -1e9, painting = 0, flying = 0, hover = -1, layout = s.layout, dots = [], on = true;

  // where things are
  const place = i => { const [x, y, turn] = [0, 1, 2].map(k => s.at[3 * i + k]); return layout === 'ring' ? [box.x + Math.cos(turn) * box.r, box.y + Math.sin(turn) * box.r] : [box.x + x * box.r, box.y + y * box.r]; };
  function measure() {
    const n = Math.max(1, s.peers.length), narrow = W < 620;
    const side = narrow ? W : Math.min(W * .58, H), gap = layout === 'ring' ? 2 * Math.PI * .5 * side / n : side / Math.sqrt(n), most = Math.max(1, ...s.hosts.map(h => h.length));
    const re = Math.min(Math.max(gap * .34, 5), 44), rp = Math.min(Math.max(gap * .09, 2.5), 9);
    box = { x: narrow ? W / 2 : side / 2, y: narrow ? side / 2 : H / 2, r: Math.max(20, side / 2 - re - 8), rp, re, dot: Math.min(Math.max(re / Math.sqrt(most) / 1.5, .9), 5),
            gx: narrow ? 8 : side + 24, gy: narrow ? side + 24 : 28, gw: narrow ? W - 16 : W - side - 32, gh: narrow ? H - side - 72 : H - 84 };
    box.peers = s.peers.map((_, i) => place(i));
    box.experts = s.hosts.flatMap((hosted, i) => (hosted || []).map((u, j) => { const r = box.rp + (box.re - box.rp) * Math.sqrt((j + 1.5) / (hosted.length + 1)), turn = 2.399963 * j; return [u, i, box.peers[i][0] + r * Math.cos(turn), box.peers[i][1] + r * Math.sin(turn)]; }));
    const columns = s.grids.reduce((sum, [, , c]) => sum + c + 1, -1), rows = Math.max(1, ...s.grids.map(([, r]) => r));
    box.cell = Math.max(.6, Math.min(box.gw / Math.max(columns, 1), box.gh / rows, 34));
  }
  function colours() {
    const read = name => { probe.style.color = `var(--${name})`; return getComputedStyle(probe).color; };
    for (const name of ['fg', 'bg', 'line', 'idle', 'gone']) css[name] = read(name);
    const [r, gr, b] = (css.fg.match(/[\d.]+/g) || [0, 0, 0]).map(Number);
    const lit = css.fg.startsWith('rgb') ? r + gr + b > 382 : r + gr + b > 1.5;
    css.ramp = RAMPS[lit ? 'dark' : 'light']; css.font = getComputedStyle(root).fontFamily;
  }

  // the picture that changes twice a second
  function paint() {
    painting = 0;
    const k = still || s.uids.length > 1500 ? 1 : Math.min(1, (performance.now() - since) / 400), a = s.before, b = s.frame;
    const load = u => { const end = b.load[u] || 0, start = a.load[u] ?? end; return (start + (end - start) * k) / 255; };
    const colour = v => v > .004 ? ramp(css.ramp, v) : css.idle;
    g.clearRect(0, 0, W, H);
    g.lineWidth = 1; g.strokeStyle = css.line; g.beginPath();
    const picked = model.get('selected'), strong = hover >= 0 ? hover : s.peers.findIndex(p => p[0] === picked), mine = [];
    for (let i = 0; i < s.links.length; i += 2) { const [p, q] = [s.links[i], s.links[i + 1]]; if (!box.peers[p] || !box.peers[q]) continue;
      if (p === strong || q === strong) mine.push([p, q]); g.moveTo(...box.peers[p]); g.lineTo(...box.peers[q]); }
    g.stroke();
    if (mine.length) { g.strokeStyle = css.fg; g.globalAlpha = .55; g.beginPath(); for (const [p, q] of mine) { g.moveTo(...box.peers[p]); g.lineTo(...box.peers[q]); } g.stroke(); g.globalAlpha = 1; }
    for (const [u, i, x, y] of box.experts) { g.fillStyle = b.state[i] === 0 ? colour(load(u)) : css.idle; g.beginPath(); g.arc(x, y, box.dot, 0, 7); g.fill(); }
    const top = Math.max(1e-9, ...b.rate);
    box.peers.forEach(([x, y], i) => {
      const state = STATES[b.state[i]], r = box.rp;
      g.fillStyle = css.bg; g.beginPath(); g.arc(x, y, r + 1.5, 0, 7); g.fill();
      g.fillStyle = state === 'trainer' ? TRAINER : state === 'alive' ? colour(Math.max(.12, b.rate[i] / top)) : state === 'silent' ? css.bg : css.gone;
      g.beginPath();
      if (state === 'trainer') { g.moveTo(x, y - r - 1); g.lineTo(x + r + 1, y); g.lineTo(x, y + r + 1); g.lineTo(x - r - 1, y); g.closePath(); } else g.arc(x, y, r, 0, 7);
      g.fill();
      if (state === 'silent') { g.strokeStyle = SILENT; g.lineWidth = Math.max(1.5, r / 4); g.stroke(); }
      if (state === 'gone') { g.strokeStyle = css.bg; g.lineWidth = Math.max(1.2, r / 4); g.beginPath(); g.moveTo(x - r / 2, y - r / 2); g.lineTo(x + r / 2, y + r / 2); g.moveTo(x + r / 2, y - r / 2); g.lineTo(x - r / 2, y + r / 2); g.stroke(); }
      if (i === strong || s.peers[i][0] === picked) { g.strokeStyle = i === hover ? css.fg : MARK; g.lineWidth = 2; g.beginPath(); g.arc(x, y, r + 4, 0, 7); g.stroke(); }
    });
    heat(colour, load);
    if (k < 1) kick();
  }
  function heat(colour, load) {
    const c = box.cell, pad = c > 4 ? 1 : 0, starts = [], alive = new Uint8Array(s.uids.length); let x = box.gx;
    s.hosts.forEach((hosted, i) => { if (s.frame.state[i] === 0) for (const u of hosted) alive[u] = 1; });
    for (const [, , columns] of s.grids) { starts.push(x); x += (columns + 1) * c; }
    g.fillStyle = css.fg; g.font = `600 12px ${css.font}`; g.fillText('Expert load', box.gx, box.gy - 10);
    for (let u = 0; u < s.uids.length; u++) { const [grid, row, column] = [0, 1, 2].map(k => s.cells[3 * u + k]); g.fillStyle = alive[u] ? colour(load(u)) : css.gone;
      g.fillRect(starts[grid] + column * c, box.gy + row * c, c - pad, c - pad); if (!alive[u] && c > 7) { g.fillStyle = css.bg; g.fillRect(starts[grid] + column * c + c * .3, box.gy + row * c + c * .45, c * .4, Math.max(1, c * .1)); } }
    const rows = Math.max(1, ...s.grids.map(([, r]) => r)), y = box.gy + rows * c; g.font = `11px ${css.font}`; g.fillStyle = css.fg;
    s.grids.forEach(([name], i) => { if ((s.grids[i][2] + 1) * c > 6 * name.length) g.fillText(name, starts[i], y + 12); });
    const w = Math.min(box.gw, 220), bar = g.createLinearGradient(box.gx, 0, box.gx + w, 0); for (let i = 0; i <= 6; i++) bar.addColorStop(i / 6, ramp(css.ramp, i / 6));
    g.fillStyle = bar; g.fillRect(box.gx, y + 20, w, 6); g.fillStyle = css.fg; g.fillText('idle', box.gx, y + 39); g.textAlign = 'right'; g.fillText(`${number(s.frame.top)} rows/s`, box.gx + w, y + 39); g.textAlign = 'left';
  }

  // calls on their way: dots that move along the edges from the trainer
  function launch() {
    const own = s.frame.own; if (own < 0 || still || !box.peers[own]) return;
    const now = performance.now(); let room = 160 - dots.length;
    s.frame.begun.forEach((n, i) => { for (let j = Math.min(n, s.frame.flying[i] + 3, 5); j > 0 && room > 0 && i !== own; j--, room--) dots.push([i, now + 480 * Math.random(), Math.random() < .5]); });
    if (dots.length && !flying) flying = requestAnimationFrame(fly);
  }
  function fly(now) {
    flying = 0; o.clearRect(0, 0, W, H); o.fillStyle = MARK;
    const own = box.peers[s.frame.own]; dots = own ? dots.filter(d => now < d[1] + 520 && box.peers[d[0]]) : [];
    for (const [i, start, back] of dots) { let t = (now - start) / 520; if (t < 0) continue; if (back) t = 1 - t; const [x, y] = box.peers[i]; o.beginPath(); o.arc(own[0] + (x - own[0]) * t, own[1] + (y - own[1]) * t, 2.6, 0, 7); o.fill(); }
    if (dots.length) flying = requestAnimationFrame(fly);
  }

  // words
  const facts = i => { const [id, addr, device] = s.peers[i], f = s.frame, state = STATES[f.state[i]]; return { peer: id, state: state === 'trainer' ? 'this trainer, or a peer without experts' : state, address: addr || 'dials out only', device: device || '–', experts: String((s.hosts[i] || []).length),
    updates: number(f.updates[i]), load: `${number(f.rate[i])} rows/s`, latency: f.latency[i] ? `${number(f.latency[i])} ms` : '–', 'calls in flight': String(f.flying[i]) }; };
  function words() {
    status.textContent = s.frame.status; picture.setAttribute('aria-label', `Swarm topology and expert load: ${s.frame.status}`);
    if (s.peers.some((_, i) => s.before.state[i] !== s.frame.state[i])) said.textContent = s.frame.status;   // read aloud when a peer's state changes, not twice a second
    root.dataset.frames = s.frames; root.dataset.states = Array.from(s.frame.state, i => STATES[i]).join(' ');
    const i = s.peers.findIndex(p => p[0] === model.get('selected')); detail.hidden = i < 0;
    if (i >= 0) { const uids = (s.hosts[i] || []).map(u => s.uids[u]), f = { ...facts(i), experts: uids.length > 24 ? `${uids.length}: ${uids.slice(0, 24).join(', ')}, …` : uids.join(', ') || 'none' };
      if (!detail.children.length) detail.append(...Object.keys(f).flatMap(k => { const name = document.createElement('dt'); name.textContent = k; return [name, document.createElement('dd')]; }));
      Object.values(f).forEach((v, k) => { const value = detail.children[2 * k + 1]; if (value.textContent !== v) value.textContent = v; }); }   // what has not changed may be selected and copied
    if (hover >= 0 && s.peers[hover]) { const f = facts(hover); tip.textContent = `${brief(f.peer)} · ${f.state}\n${f.address.split('/p2p/')[0]} · ${f.device}\n${f.experts} experts · ${f.updates} updates · ${f.load} · ${f.latency}`; tip.hidden = false;
      const [x, y] = box.peers[hover]; tip.style.transform = `translate(${Math.max(0, Math.min(x + 14, W - tip.offsetWidth - 4))}px, ${Math.max(0, Math.min(y + 10, H - tip.offsetHeight))}px)`; } else tip.hidden = true;
  }

  const kick = () => { painting ||= requestAnimationFrame(paint); };
  function size() {
    const d = devicePixelRatio || 1; W = root.clientWidth; if (!W) return;
    H = W < 620 ? W + Math.min(W, 300) + 80 : Math.max(320, Math.min(520, W * .52)); picture.style.height = `${H}px`;
    for (const [canvas, c] of [[base, g], [over, o]]) { canvas.width = W * d; canvas.height = H * d; c.setTransform(d, 0, 0, d, 0, 0); }
    colours(); measure(); words(); paint();
  }
  function news(kind, anew) { if (!on || !W) return; if (kind === 'scene') { if (anew) { hover = -1; dots = []; } measure(); } else { since = performance.now(); colours(); launch(); words(); } kick(); }
  const near = e => { let best = -1, d0 = (box.rp + 9) ** 2; box.peers.forEach(([x, y], i) => { const d = (e.offsetX - x) ** 2 + (e.offsetY - y) ** 2; if (d < d0) [d0, best] = [d, i]; }); return best; };
  const select = i => { model.set('selected', i >= 0 ? s.peers[i][0] : ''); model.save_changes(); words(); kick(); if (i >= 0) said.textContent = `peer ${brief(s.peers[i][0])}, ${STATES[s.frame.state[i]]}, ${(s.hosts[i] || []).length} experts`; };
  const press = () => root.querySelectorAll('[data-layout]').forEach(b => b.setAttribute('aria-pressed', b.dataset.layout === layout));
  root.querySelectorAll('[data-layout]').forEach(b => b.onclick = () => { layout = b.dataset.layout; press(); measure(); kick(); });
  live.onclick = () => { on = !on; live.setAttribute('aria-pressed', on); if (on) news('frame'); };
  over.onpointermove = e => { const i = near(e); if (i !== hover) { hover = i; words(); kick(); } };
  over.onpointerleave = () => { hover = -1; words(); kick(); };
  over.onclick = e => select(near(e));
  picture.onkeydown = e => {
    const n = s.peers.length, i = s.peers.findIndex(p => p[0] === model.get('selected')), step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[e.key];
    if (step && n) select(i < 0 ? (step > 0 ? 0 : n - 1) : (i + step + n) % n); else if (e.key === 'Escape') select(-1); else return;
    e.preventDefault(); e.stopPropagation();
  };
  const changed = () => { words(); kick(); };
  model.on('change:selected', changed);
  press(); s.views.add(news);
  const watcher = new ResizeObserver(size); watcher.observe(root);
  return () => { watcher.disconnect(); cancelAnimationFrame(painting); cancelAnimationFrame(flying); s.views.delete(news); model.off('change:selected', changed); };
}
export default { initialize, render };
