// The frontier of one prompt's circuits: their size against their loss, with one point per λ and the
// chosen one marked. This file is put before graph.js and uses its `shape`. Rows are those of the
// table `frontier`, ordered by λ.

const MASKS = ['ci', 'stochastic', 'adversarial'];
const PLOT = { width: 300, height: 170, left: 58, right: 12, top: 12, bottom: 34 };
const labeled = (rows) => rows.length && rows[0].label !== null;

function drawFrontier(rows) {
  $('.frontier').hidden = !rows.length;
  if (!rows.length) return;
  const first = rows[0];
  const plural = first.adversary_steps === 1 ? '' : 's';
  const steps = `adversarial: PGD, ${first.adversary_steps} step${plural}`;
  const facts = ['Size against loss'];
  if (labeled(rows)) {
    facts.push(
      `“${glyphs(first.token)}” after position ${first.pos}, target ${number(first.p_target)}`,
    );
  }
  facts.push(steps);
  $('.frontier summary').textContent = facts.join(' · ');
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
  const masks = labeled(rows)
    ? ['target', ...MASKS].map((name) => [`p ${name}`, `p_${name}`])
    : [['kept', 'kept']];
  const columns = [
    ['λ', 'lambda'],
    ['nodes', 'nodes'],
    ['important', 'important'],
    ...masks,
    ...MASKS.map((name) => [`loss ${name}`, `loss_${name}`]),
    ['steps', 'steps'],
  ];
  const head = make('tr'),
    body = make('tbody'),
    top = make('thead');
  head.append(...columns.map(([title]) => make('th', 'number', title)));
  top.append(head);
  for (const row of rows) {
    const line = make('tr', row.chosen ? 'chosen' : '');
    if (row.chosen) line.title = 'the λ of the graph above';
    else if (row.lambda === null) line.title = 'the predictions of the importance function';
    line.append(...columns.map(([, name]) => make('td', 'number', cell(name, row[name]))));
    body.append(line);
  }
  return [top, body];
}

function cell(name, value) {
  if (name === 'lambda' && value === null) return 'before';
  return Number.isInteger(value) ? String(value) : number(value);
}

// Plots one kind of value (loss or p) under each kind of masks against the number of nodes, on a log
// axis.
function plotted(rows, kind) {
  const { width, height, left, right, top, bottom } = PLOT;
  const values = rows
    .flatMap((row) => MASKS.map((masks) => row[`${kind}_${masks}`]))
    .filter((value) => value !== null);
  const most = kind === 'p' ? 1 : Math.max(...values, 1e-9);
  const sizeOf = (row) => Math.log10(Math.max(1, row.nodes));
  const sizes = rows.map(sizeOf);
  const low = Math.min(...sizes);
  const span = Math.max(...sizes) - low || 1;
  const x = (row) => left + 8 + ((sizeOf(row) - low) / span) * (width - left - right - 16);
  const y = (value) => height - bottom - (value / most) * (height - top - bottom);
  const name = `${kind === 'p' ? 'label probability' : 'loss'} against nodes`;
  const svg = shape('svg', { width, height, role: 'img', 'aria-label': name }, make('div'));
  const write = (text, at) => {
    shape('text', at, svg).textContent = text;
  };
  for (const value of [0, most]) {
    shape('line', { class: 'guide', x1: left, x2: width - right, y1: y(value), y2: y(value) }, svg);
    write(number(value), { x: left - 6, y: y(value) + 4, 'text-anchor': 'end' });
  }
  write(kind === 'p' ? 'p' : 'loss', {
    x: left - 6,
    y: (y(0) + y(most)) / 2,
    'text-anchor': 'end',
  });
  const smallest = rows.reduce((a, b) => (b.nodes < a.nodes ? b : a));
  const largest = rows.reduce((a, b) => (b.nodes > a.nodes ? b : a));
  [smallest, largest].forEach((row) =>
    write(row.nodes, { x: x(row), y: height - bottom + 15, 'text-anchor': 'middle' }),
  );
  write('nodes', { x: (left + width) / 2, y: height - 5, 'text-anchor': 'middle' });
  const chosen = rows.find((row) => row.chosen);
  if (chosen)
    shape(
      'line',
      { class: 'own', x1: x(chosen), x2: x(chosen), y1: top, y2: height - bottom },
      svg,
    );
  if (kind === 'p') {
    const target = y(chosen ? chosen.p_target : 1);
    shape('line', { class: 'target', x1: left, x2: width - right, y1: target, y2: target }, svg);
  }
  const ordered = [...rows].sort((a, b) => a.nodes - b.nodes);
  for (const masks of MASKS) {
    const column = `${kind}_${masks}`;
    const points = ordered
      .filter((row) => row[column] !== null)
      .map((row) => [x(row), y(row[column])]);
    shape(
      'polyline',
      { class: masks, points: points.map((point) => point.join(',')).join(' ') },
      svg,
    );
    points.forEach(([cx, cy]) => shape('circle', { class: masks, cx, cy, r: 3 }, svg));
  }
  return svg;
}
