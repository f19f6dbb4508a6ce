// The attribution graph of one prompt: SVG nodes over a canvas of edges. Runs as the body of gr.HTML's js_on_load,
// with `element` (this component's root), `props.value` (which harvest, its prompts), `server` and `watch`.
// Edges and nodes come from the server already filtered; what is drawn here is only layout, hover and pin.

const STEPS = {
  top_k: [5, 10, 20, 50, 100, 200, 300, 500, 1000, 2000, 3000],
  threshold: [0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5],
  min_importance: [0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9],
};
const START = { top_k: 200, threshold: 0, min_importance: 0 };
const LEFT = 150, RIGHT = 40, TOP = 46, BOTTOM = 46, CELL_GAP = 14, NARROW = 15;
const SVG = 'http://www.w3.org/2000/svg';

const $ = (selector) => element.querySelector(selector);
const make = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};
const shape = (tag, attributes, parent) => {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  parent.append(made);
  return made;
};
const number = (value) => {
  if (value === null || value === undefined) return '–';
  const size = Math.abs(value);
  const text = size === 0 ? '0' : size >= 1e5 || size < 1e-4 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
  return text.replace('-', '−');
};

let prompts = [], graph = null, places = new Map(), byNode = new Map();
let hovered = null, pinned = null, edgeLit = null, asked = 0, askedNode = 0;

// ---- asking the server ----------------------------------------------------------------------------------------

const setting = (name) => STEPS[name][Number($(`[data-setting=${name}]`).value)];
const request = (more) => ({ run: props.value.run, harvest: props.value.harvest, prompt: $('.prompt').value, ...more });

async function ask(name, question) {
  try {
    return await server[name](question);
  } catch (error) {
    return { problem: 'The viewer does not answer; is the process that serves this page still running?' };
  }
}

async function load() {
  const turn = ++asked;
  if (!props.value || !props.value.run) return;
  const answer = await ask('graph', request({ top_k: setting('top_k'), threshold: setting('threshold'), min_importance: setting('min_importance') }));
  if (turn !== asked) return;
  show(answer.problem);
  if (answer.problem) return clear();
  const kept = pinned && keyOf(pinned);
  graph = answer;
  byNode = new Map(graph.nodes.map((node) => [node.node, node]));
  hovered = edgeLit = null;
  pinned = graph.nodes.find((node) => keyOf(node) === kept) || null;
  render();
  if (pinned) pin(pinned); else emptyPanel();
}

function show(problem) {
  $('.problem').hidden = !problem;
  $('.problem').textContent = problem || '';
}

function clear() {
  graph = pinned = hovered = edgeLit = null;
  places = new Map();
  $('svg').replaceChildren();
  $('.rows').replaceChildren();
  $('.axis').replaceChildren();
  $('tbody').replaceChildren();
  $('.summary').textContent = '';
  $('canvas').width = $('canvas').height = 0;
  emptyPanel();
}

const keyOf = (node) => `${graph.layers[node.layer]}:${node.pos}:${node.component}`;

// ---- layout ---------------------------------------------------------------------------------------------------

// Rows are layers, the input at the bottom; columns are positions; nodes of one layer and position share a cell and
// wrap into several lines when it is full. `places` holds the centre and radius of every node.
function layout() {
  const positions = Math.max(1, graph.tokens.length);
  const cells = new Map();
  for (const node of graph.nodes) {
    const key = `${node.layer},${node.pos}`;
    cells.set(key, [...(cells.get(key) || []), node]);
  }
  const room = Math.max(320, $('.stage').clientWidth - LEFT - RIGHT);
  const columns = columnWidths(cells, positions, room);
  const heights = graph.layers.map((_, layer) => rowLines(cells, columns, layer, positions));
  const base = Math.max(46, Math.min(118, 460 / graph.layers.length));
  let y = TOP, lowest = 0;
  const centres = [];
  for (let layer = graph.layers.length - 1; layer >= 0; layer--) {
    centres[layer] = y + ((heights[layer] - 1) * NARROW) / 2;
    lowest = y + (heights[layer] - 1) * NARROW;
    y = lowest + base;
  }
  const width = LEFT + columns.total + RIGHT, height = lowest + BOTTOM;
  placeCells(cells, columns, centres);
  return { width, height, centres, columns };
}

function columnWidths(cells, positions, room) {
  const widths = new Array(positions).fill(26);
  for (const nodes of cells.values()) {
    const pos = positions === 1 ? 0 : nodes[0].pos;
    const across = positions === 1 ? nodes.length : Math.min(nodes.length, 8);
    widths[pos] = Math.max(widths[pos], across * NARROW + CELL_GAP);
  }
  const wanted = widths.reduce((sum, width) => sum + width, 0);
  const stretch = positions === 1 ? room / wanted : Math.max(1, room / wanted);
  const starts = [];
  let total = 0;
  widths.forEach((width, index) => { starts[index] = LEFT + total; widths[index] = width * stretch; total += widths[index]; });
  return { widths, starts, total };
}

const lineLength = (columns, pos) => Math.max(1, Math.floor((columns.widths[pos] - CELL_GAP) / NARROW));

function rowLines(cells, columns, layer, positions) {
  let lines = 1;
  for (let pos = 0; pos < positions; pos++) {
    const nodes = cells.get(`${layer},${pos}`);
    if (nodes) lines = Math.max(lines, Math.ceil(nodes.length / lineLength(columns, pos)));
  }
  return lines;
}

function placeCells(cells, columns, centres) {
  places = new Map();
  for (const nodes of cells.values()) placeCell(nodes, columns, centres);
  if (!$('.untangle').checked) return;
  const upwards = [...cells.values()].sort((a, b) => a[0].layer - b[0].layer);
  for (let round = 0; round < 4; round++) {
    const incoming = round % 2 === 0;
    for (const nodes of incoming ? upwards : [...upwards].reverse()) straighten(nodes, incoming, columns, centres);
  }
}

const columnOf = (columns, node) => (columns.widths.length === 1 ? 0 : node.pos);

function placeCell(nodes, columns, centres) {
  const pos = columnOf(columns, nodes[0]);
  const perLine = Math.min(nodes.length, lineLength(columns, pos));
  const lines = Math.ceil(nodes.length / perLine);
  const gap = Math.min(132, (columns.widths[pos] - CELL_GAP) / perLine);
  const middle = columns.starts[pos] + columns.widths[pos] / 2;
  nodes.forEach((node, index) => {
    const line = Math.floor(index / perLine), onLine = Math.min(perLine, nodes.length - line * perLine);
    const x = middle + (index - line * perLine - (onLine - 1) / 2) * gap;
    places.set(node.node, { x, y: centres[node.layer] + (line - (lines - 1) / 2) * NARROW, r: Math.max(4.5, Math.min(15, gap * 0.3)), gap, lines });
  });
}

// Moves a cell's nodes towards the mean place of their neighbours below (or above), weighted by |attribution|. Inputs
// keep their order and outputs their places, which mean something; cells of several lines are only reordered.
function straighten(nodes, incoming, columns, centres) {
  if (nodes[0].kind === 'output') return;
  const pulls = new Map(nodes.map((node) => [node.node, [0, 0]]));
  for (const { source, target, attribution } of graph.edges) {
    const [own, other] = incoming ? [target, source] : [source, target];
    const pull = pulls.get(own), weight = Math.abs(attribution) + 1e-9 * graph.largest;
    if (pull) { pull[0] += weight * places.get(other).x; pull[1] += weight; }
  }
  const wishes = new Map(nodes.map(({ node }) => [node, pulls.get(node)[1] > 0 ? pulls.get(node)[0] / pulls.get(node)[1] : places.get(node).x]));
  const fixed = nodes[0].kind === 'input' || nodes[0].kind === 'embedding';
  if (!fixed) nodes.sort((a, b) => wishes.get(a.node) - wishes.get(b.node) || a.node - b.node);
  const { gap, lines } = places.get(nodes[0].node);
  if (lines > 1) return placeCell(nodes, columns, centres);
  const pos = columnOf(columns, nodes[0]), half = (CELL_GAP + Math.min(gap, 40)) / 2;
  const first = columns.starts[pos] + half, last = first + columns.widths[pos] - 2 * half;
  spread(nodes.map(({ node }) => wishes.get(node)), Math.min(gap, Math.max(gap * 0.55, 60)), first, last)
    .forEach((x, index) => { places.get(nodes[index].node).x = x; });
}

// Places in the given order, at least `gap` apart and between `first` and `last`, near to the wishes.
function spread(wishes, gap, first, last) {
  const xs = [];
  wishes.forEach((wish, index) => { xs.push(index ? Math.max(wish, xs[index - 1] + gap) : wish); });
  const shift = xs.reduce((sum, x, index) => sum + x - wishes[index], 0) / xs.length;
  for (let index = xs.length - 1, limit = last; index >= 0; index--, limit -= gap) xs[index] = Math.min(xs[index] - shift, limit);
  xs.forEach((x, index) => { xs[index] = Math.max(x, first + index * gap); });
  return xs;
}

// ---- drawing --------------------------------------------------------------------------------------------------

function render() {
  const plan = layout();
  const sheet = $('.sheet'), svg = $('svg');
  sheet.style.width = `${plan.width}px`;
  sheet.style.height = `${plan.height}px`;
  svg.setAttribute('width', plan.width);
  svg.setAttribute('height', plan.height);
  svg.replaceChildren();
  plan.centres.forEach((y) => shape('line', { class: 'guide', x1: LEFT - 14, x2: plan.width - 12, y1: y, y2: y }, svg));
  graph.nodes.forEach((node) => drawNode(node, svg));
  drawRows(plan);
  drawAxis(plan);
  drawEdges(plan);
  drawSummary();
  drawTable();
  element.querySelectorAll('.extra').forEach((item, index) => { item.hidden = !graph.nodes.some((node) => node.kind === ['rest', 'bias'][index]); });
}

function drawRows(plan) {
  $('.rows').replaceChildren(...graph.layers.map((name, layer) => {
    const label = make('span', '', name);
    label.style.top = `${plan.centres[layer]}px`;
    return label;
  }));
}

function drawAxis(plan) {
  const axis = $('.axis');
  axis.style.width = `${plan.width}px`;
  axis.replaceChildren(...graph.tokens.map((token, pos) => {
    const label = make('span', '', token);
    label.title = `position ${pos}: ${token}`;
    label.style.left = `${plan.columns.starts[pos]}px`;
    label.style.width = `${plan.columns.widths[pos] - 3}px`;
    return label;
  }));
}

function drawNode(node, svg) {
  const { x, y, r, gap } = places.get(node.node);
  const strength = node.kind === 'component' ? Math.max(0, Math.min(1, node.importance)) : 0;
  const group = shape('g', { class: `node ${node.kind}${strength > 0.55 ? ' strong' : ''}`, 'data-node': node.node, transform: `translate(${x},${y})`,
    tabindex: 0, role: 'button', 'aria-label': keyOf(node) }, svg);
  for (const layer of ['under', 'shape']) {
    const fill = layer === 'under' || node.kind === 'rest' ? {} : { 'fill-opacity': node.kind === 'component' ? strength : 0.08 };
    if (node.kind === 'component' || node.kind === 'rest') shape('circle', { class: layer, r, ...fill }, group);
    else if (node.kind === 'bias') shape('path', { class: layer, d: `M0 ${-r}L${r} 0L0 ${r}L${-r} 0Z`, ...fill }, group);
    else shape('rect', { class: layer, x: -r, y: -r, width: 2 * r, height: 2 * r, rx: r * 0.3, ...fill }, group);
  }
  if (gap < 30) return;
  const inside = r >= 9;
  shape('text', { class: inside ? 'inside' : '', y: inside ? 4 : -r - 5 }, group).textContent = node.component;
  if (node.label && gap >= 58) {
    shape('text', { y: node.layer === 0 ? r + 17 : -r - 9 }, group).textContent = node.label;
  }
}

const colour = (name) => getComputedStyle($('.spd-graph')).getPropertyValue(name).trim();

function curve(edge) {
  const from = places.get(edge.source), to = places.get(edge.target);
  const up = from.y >= to.y ? 1 : -1, level = from.y === to.y;
  const y1 = from.y - up * from.r, y2 = to.y + up * to.r, bend = level ? -38 : (y2 - y1) * 0.45;
  return [from.x, y1, from.x, y1 + bend, to.x, level ? y1 + bend : y2 - bend, to.x, level ? y1 : y2];
}

// A node is lit when it is hovered, else when it is pinned; an edge lit from the table outranks both.
const lit = () => hovered || pinned;
const touches = (edge, node) => edge.source === node.node || edge.target === node.node;
const isLit = (edge) => edgeLit ? edge === edgeLit : lit() ? touches(edge, lit()) : null;

function drawEdges(plan) {
  const canvas = $('canvas');
  if (plan) {
    const ratio = plan.width * plan.height > 1e7 ? 1 : Math.min(2, window.devicePixelRatio || 1);
    canvas.width = plan.width * ratio;
    canvas.height = plan.height * ratio;
    canvas.style.width = `${plan.width}px`;
    canvas.style.height = `${plan.height}px`;
    canvas.ratio = ratio;
  }
  const pen = canvas.getContext('2d');
  pen.setTransform(canvas.ratio, 0, 0, canvas.ratio, 0, 0);
  pen.clearRect(0, 0, canvas.width, canvas.height);
  const ink = { plus: colour('--plus'), minus: colour('--minus') };
  const largest = Math.max(...graph.edges.map((edge) => Math.abs(edge.attribution)), 1e-30);
  const strokes = graph.edges.map((edge) => ({ edge, share: Math.abs(edge.attribution) / largest, on: isLit(edge) })).reverse();
  for (const stroke of strokes) if (stroke.on !== true) strokeEdge(pen, stroke, ink);
  for (const stroke of strokes) if (stroke.on === true) strokeEdge(pen, stroke, ink);
  labelEdges(pen, strokes.filter((stroke) => stroke.on === true).slice(-14), ink);
  markNodes();
}

function strokeEdge(pen, { edge, share, on }, ink) {
  const [x1, y1, ...rest] = curve(edge);
  pen.beginPath();
  pen.moveTo(x1, y1);
  pen.bezierCurveTo(...rest);
  pen.strokeStyle = edge.attribution >= 0 ? ink.plus : ink.minus;
  pen.lineWidth = 0.7 + 5.3 * share;
  pen.globalAlpha = on === false ? 0.05 : on ? 0.95 : 0.18 + 0.62 * Math.sqrt(share);
  pen.stroke();
  pen.globalAlpha = 1;
}

// Values stand at the far end of the lit node's edges, where they fan out.
function labelEdges(pen, strokes, ink) {
  pen.font = '600 12px system-ui, sans-serif';
  pen.textAlign = 'center';
  pen.textBaseline = 'middle';
  pen.lineWidth = 4;
  pen.strokeStyle = colour('--paper');
  for (const { edge } of strokes) {
    const t = !lit() || edgeLit ? 0.5 : edge.source === lit().node ? 0.62 : 0.38, s = 1 - t;
    const [x1, y1, x2, y2, x3, y3, x4, y4] = curve(edge);
    const at = (a, b, c, d) => s * s * s * a + 3 * s * s * t * b + 3 * s * t * t * c + t * t * t * d;
    const x = at(x1, x2, x3, x4), y = at(y1, y2, y3, y4), text = number(edge.attribution);
    pen.strokeText(text, x, y);
    pen.fillStyle = edge.attribution >= 0 ? ink.plus : ink.minus;
    pen.fillText(text, x, y);
  }
}

function markNodes() {
  const near = new Set();
  if (edgeLit) near.add(edgeLit.source).add(edgeLit.target);
  else if (lit()) {
    near.add(lit().node);
    graph.edges.filter((edge) => touches(edge, lit())).forEach((edge) => near.add(edge.source).add(edge.target));
  }
  element.querySelectorAll('.node').forEach((group) => {
    const own = Number(group.dataset.node);
    group.classList.toggle('off', near.size > 0 && !near.has(own));
    group.classList.toggle('on', own === (lit() && lit().node));
    group.setAttribute('aria-pressed', String(Boolean(pinned) && pinned.node === own));
  });
}

function drawSummary() {
  const counts = `${graph.edges.length} of ${graph.edges_total} edges, ${graph.nodes.length} of ${graph.nodes_total} nodes`;
  const hidden = graph.edges_passing > graph.edges.length ? ` (${graph.edges_passing} pass the filters)` : '';
  $('.summary').replaceChildren(make('b', '', graph.label), ` · ${counts}${hidden} · largest |attribution| ${number(graph.largest)} · mode ${graph.mode}`);
}

function meter(value, largest) {
  const track = make('span', 'meter'), fill = make('i', value >= 0 ? 'plus' : 'minus');
  fill.style.width = `${(100 * Math.abs(value)) / (largest || 1)}%`;
  track.append(fill);
  return track;
}

function drawTable() {
  const rows = graph.edges.slice(0, 25).map((edge) => {
    const row = make('tr');
    for (const end of [edge.source, edge.target]) {
      const cell = make('td'), button = make('button', '', keyOf(byNode.get(end)));
      button.addEventListener('click', () => pin(byNode.get(end)));
      cell.append(button);
      row.append(cell);
    }
    const bar = make('td');
    bar.append(meter(edge.attribution, graph.largest));
    row.append(make('td', 'number', number(edge.attribution)), bar);
    row.addEventListener('mouseenter', () => { edgeLit = edge; drawEdges(); });
    row.addEventListener('mouseleave', () => { edgeLit = null; drawEdges(); });
    return row;
  });
  if (!rows.length) { const row = make('tr'); const cell = make('td', '', 'No edge passes these filters.'); cell.colSpan = 4; row.append(cell); rows.push(row); }
  $('tbody').replaceChildren(...rows);
}

// ---- hover and pin --------------------------------------------------------------------------------------------

function facts(node) {
  const list = make('dl', 'facts');
  const fact = (name, value) => list.append(make('dt', '', name), make('dd', '', value));
  if (node.importance !== null) fact('importance', number(node.importance));
  fact({ input: 'value', output: 'value' }[node.kind] || 'activation', number(node.activation));
  for (const [name, value] of Object.entries(node.outputs || {})) fact(name, number(value));
  return list;
}

function hover(node) {
  if (node === hovered) return;
  hovered = node;
  drawEdges();
  const tip = $('.tip');
  tip.hidden = !node;
  if (!node) return;
  const edges = graph.edges.filter((edge) => touches(edge, node));
  const list = facts(node);
  list.append(make('dt', '', 'edges shown'), make('dd', '', `${edges.filter((e) => e.target === node.node).length} in, ${edges.filter((e) => e.source === node.node).length} out`));
  tip.replaceChildren(make('div', 'name', keyOf(node)), list);
  const { x, y, r } = places.get(node.node), stage = $('.stage');
  const left = x - stage.scrollLeft + r + 14, flip = left + tip.offsetWidth > stage.clientWidth;
  tip.style.left = `${flip ? Math.max(4, left - tip.offsetWidth - 2 * r - 28) : left}px`;
  tip.style.top = `${Math.max(4, Math.min(y - stage.scrollTop - 20, stage.clientHeight - tip.offsetHeight - 4))}px`;
}

function emptyPanel() {
  $('.panel').replaceChildren(...[
    'A circle is a component that takes part in this prompt, the fuller the more important it is. A line is an attribution: how much of one node’s value reaches the next along the direct path.',
    'Hover a node to see its edges and their values. Click it to pin it here, with everything that flows in and out.',
  ].map((text) => make('p', 'hint', text)));
}

async function pin(node) {
  if (!node) return;
  pinned = node;
  hovered = null;
  $('.tip').hidden = true;
  drawEdges();
  const turn = ++askedNode, turnGraph = asked;
  const answer = await ask('node', request({ node: node.node }));
  if (turn !== askedNode || turnGraph !== asked || pinned !== node) return;
  show(answer.problem);
  if (answer.problem) return;
  const head = make('div', 'head'), close = make('button', 'close', '×');
  close.setAttribute('aria-label', 'Unpin');
  close.addEventListener('click', unpin);
  head.append(make('div', 'name', keyOf(node)), close);
  $('.panel').replaceChildren(head, facts(node), ...side('In', answer.ins, answer.in_count, answer.in_sum), ...side('Out', answer.outs, answer.out_count, answer.out_sum));
}

function unpin() {
  pinned = null;
  askedNode++;
  emptyPanel();
  if (graph) drawEdges();
}

function side(title, ends, count, sum) {
  const head = make('h4', '', `${title}-edges`);
  head.append(make('small', '', count ? `${ends.length < count ? `${ends.length} of ` : ''}${count}, sum ${number(sum)}` : 'none'));
  const largest = Math.max(...ends.map((end) => Math.abs(end.attribution)), 0);
  return [head, ...ends.map((end) => {
    const button = make('button', 'end');
    button.append(make('span', '', end.name), make('span', 'value', number(end.attribution)), meter(end.attribution, largest));
    button.title = byNode.has(end.node) ? 'Pin this node' : 'Hidden by the importance filter';
    button.addEventListener('click', () => pin(byNode.get(end.node)));
    return button;
  })];
}

// ---- controls -------------------------------------------------------------------------------------------------

function fillPrompts() {
  const wanted = $('.find').value.trim().toLowerCase();
  const matching = prompts.filter((prompt) => prompt.label.toLowerCase().includes(wanted)).slice(0, 500);
  const groups = new Map();
  for (const prompt of matching) {
    if (!groups.has(prompt.split)) { const group = make('optgroup'); group.label = prompt.split; groups.set(prompt.split, group); }
    const option = make('option', '', prompt.label);
    option.value = prompt.id;
    groups.get(prompt.split).append(option);
  }
  const kept = $('.prompt').value;
  $('.prompt').replaceChildren(...groups.values());
  if (matching.some((prompt) => prompt.id === kept)) $('.prompt').value = kept;
}

function describeSliders() {
  for (const name of Object.keys(STEPS)) {
    const value = setting(name), output = $(`[data-setting=${name}]`).nextElementSibling;
    output.textContent = name === 'top_k' ? `${value} edges` : `≥ ${name === 'threshold' ? `${number(100 * value)} %` : number(value)}`;
  }
  const index = $('.prompt').selectedIndex, last = $('.prompt').length - 1;
  element.querySelectorAll('.step').forEach((button) => { button.disabled = button.dataset.step === '1' ? index >= last : index <= 0; });
}

function refresh() { describeSliders(); return load(); }

function open() {
  prompts = (props.value && props.value.prompts) || [];
  $('.find').hidden = prompts.length <= 60;
  $('.find').value = '';
  unpin();
  fillPrompts();
  show(props.value && props.value.problem);
  $('.spd-graph').classList.toggle('blank', !prompts.length);
  if (prompts.length) refresh(); else clear();
}

const nodeUnder = (event) => {
  const group = event.target.closest && event.target.closest('.node');
  return group && graph ? byNode.get(Number(group.dataset.node)) : null;
};

for (const [name, steps] of Object.entries(STEPS)) {
  const slider = $(`[data-setting=${name}]`);
  Object.assign(slider, { min: 0, max: steps.length - 1, step: 1, value: steps.indexOf(START[name]) });
  slider.addEventListener('input', refresh);
}
$('.untangle').addEventListener('change', () => graph && render());
$('.prompt').addEventListener('change', refresh);
$('.find').addEventListener('input', () => { fillPrompts(); if ($('.prompt').value) refresh(); });
element.querySelectorAll('.step').forEach((button) => button.addEventListener('click', () => {
  $('.prompt').selectedIndex += Number(button.dataset.step);
  refresh();
}));
$('svg').addEventListener('mouseover', (event) => graph && hover(nodeUnder(event)));
$('svg').addEventListener('mouseleave', () => graph && hover(null));
$('svg').addEventListener('focusin', (event) => event.target.matches(':focus-visible') && hover(nodeUnder(event)));
$('svg').addEventListener('focusout', () => graph && hover(null));
$('svg').addEventListener('click', (event) => { const node = nodeUnder(event); if (node) pin(node); else unpin(); });
element.addEventListener('keydown', (event) => {
  if (event.key === 'Escape') unpin();
  if ((event.key === 'Enter' || event.key === ' ') && nodeUnder(event)) { event.preventDefault(); pin(nodeUnder(event)); }
});
let seenWidth = 0;
new ResizeObserver(() => {
  const width = $('.stage').clientWidth;
  if (graph && width && width !== seenWidth) { seenWidth = width; render(); }
}).observe($('.stage'));
new MutationObserver(() => graph && drawEdges()).observe(document.body, { attributes: true, attributeFilter: ['class'] });
watch('value', open);
open();
