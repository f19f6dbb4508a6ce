// The frontier of one prompt's circuits: how small against how good, one point a λ, the chosen one marked. It stands before
// graph.js, whose `shape` it draws with. Rows come as the table `frontier` holds them, by λ.

const MASKS = ['ci', 'stochastic', 'adversarial'];
const PLOT = { width: 300, height: 170, left: 58, right: 12, top: 12, bottom: 34 };
const labeled = (rows) => rows.length && rows[0].label !== null;

function drawFrontier(rows) {
  $('.frontier').hidden = !rows.length;
  if (!rows.length) return;
  const steps = `adversarial: PGD, ${rows[0].adversary_steps} step${rows[0].adversary_steps === 1 ? '' : 's'}`;
  const what = labeled(rows) ? ` · “${glyphs(rows[0].token)}” after position ${rows[0].pos}, target ${number(rows[0].p_target)}` : '';
  $('.frontier summary').textContent = `How small, how good${what} · ${steps}`;
  const shown = labeled(rows) ? ['loss', 'p'] : ['loss'];
  $('.frontier .plots').replaceChildren(...shown.map((kind) => plotted(rows, kind)), key());
  $('.frontier table').replaceChildren(...frontierTable(rows));
}

function key() {
  const list = make('div', 'key');
  for (const masks of MASKS) {
    const item = make('span', '', masks);
    item.prepend(make('i', `swatch ${masks}`));
    list.append(item);
  }
  return list;
}

function frontierTable(rows) {
  const masks = labeled(rows) ? ['target', ...MASKS].map((name) => [`p ${name}`, `p_${name}`]) : [['kept', 'kept']];
  const columns = [['λ', 'lambda'], ['nodes', 'nodes'], ['important', 'important'], ...masks, ...MASKS.map((name) => [`loss ${name}`, `loss_${name}`]), ['steps', 'steps']];
  const head = make('tr'), body = make('tbody'), top = make('thead');
  head.append(...columns.map(([title]) => make('th', 'number', title)));
  top.append(head);
  for (const row of rows) {
    const line = make('tr', row.chosen ? 'chosen' : '');
    line.title = row.chosen ? 'the λ whose graph is shown' : row.lambda === null ? 'what the importance function says itself' : '';
    line.append(...columns.map(([, name]) => make('td', 'number', cell(name, row[name]))));
    body.append(line);
  }
  return [top, body];
}

function cell(name, value) {
  if (name === 'lambda' && value === null) return 'before';
  return Number.isInteger(value) ? String(value) : number(value);
}

// Values of one kind (loss or p) under each of the masks against the number of nodes, on a log axis.
function plotted(rows, kind) {
  const { width, height, left, right, top, bottom } = PLOT;
  const values = rows.flatMap((row) => MASKS.map((masks) => row[`${kind}_${masks}`])).filter((value) => value !== null);
  const most = kind === 'p' ? 1 : Math.max(...values, 1e-9);
  const sizes = rows.map((row) => Math.log10(Math.max(1, row.nodes))), low = Math.min(...sizes), span = Math.max(...sizes) - low || 1;
  const x = (row) => left + 8 + ((Math.log10(Math.max(1, row.nodes)) - low) / span) * (width - left - right - 16);
  const y = (value) => height - bottom - (value / most) * (height - top - bottom);
  const svg = shape('svg', { width, height, role: 'img', 'aria-label': `${kind === 'p' ? 'label probability' : 'loss'} against nodes` }, make('div'));
  const write = (text, at) => { shape('text', at, svg).textContent = text; };
  for (const value of [0, most]) {
    shape('line', { class: 'guide', x1: left, x2: width - right, y1: y(value), y2: y(value) }, svg);
    write(number(value), { x: left - 6, y: y(value) + 4, 'text-anchor': 'end' });
  }
  write(kind === 'p' ? 'p' : 'loss', { x: left - 6, y: (y(0) + y(most)) / 2, 'text-anchor': 'end' });
  const ends = [rows.reduce((a, b) => (b.nodes < a.nodes ? b : a)), rows.reduce((a, b) => (b.nodes > a.nodes ? b : a))];
  ends.forEach((row) => write(row.nodes, { x: x(row), y: height - bottom + 15, 'text-anchor': 'middle' }));
  write('nodes', { x: (left + width) / 2, y: height - 5, 'text-anchor': 'middle' });
  const own = rows.find((row) => row.chosen);
  if (own) shape('line', { class: 'own', x1: x(own), x2: x(own), y1: top, y2: height - bottom }, svg);
  if (kind === 'p') shape('line', { class: 'target', x1: left, x2: width - right, y1: y(own ? own.p_target : 1), y2: y(own ? own.p_target : 1) }, svg);
  const ordered = [...rows].sort((a, b) => a.nodes - b.nodes);
  for (const masks of MASKS) {
    const points = ordered.filter((row) => row[`${kind}_${masks}`] !== null).map((row) => [x(row), y(row[`${kind}_${masks}`])]);
    shape('polyline', { class: masks, points: points.map((point) => point.join(',')).join(' ') }, svg);
    points.forEach(([cx, cy]) => shape('circle', { class: masks, cx, cy, r: 3 }, svg));
  }
  return svg;
}
