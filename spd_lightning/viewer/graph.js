// The attribution graph of one prompt: SVG nodes over a canvas of edges. It runs as the body of
// gr.HTML's js_on_load, with `element` (the root of this component), `props.value` (the harvest and
// its prompts), `server` and `watch`. widget.js and graph_layout.js are put before it. The server
// sends nodes and edges already filtered.

const STEPS = {
  influence: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1],
  top_k: [5, 10, 20, 50, 100, 200, 300, 500, 1000, 2000, 3000],
  threshold: [0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5],
  min_importance: [0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9],
};
const START = { influence: 1, top_k: 200, threshold: 0, min_importance: 0 };
const MEANING = {
  replacement:
    'The share of the influence of all leaves on the outputs that comes from tokens, not from rests or biases',
  completeness:
    'The share of a node’s in-edges that comes neither from a rest nor from a bias, averaged by influence',
};
const SVG = 'http://www.w3.org/2000/svg';

const shape = (tag, attributes, parent) => {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  parent.append(made);
  return made;
};
let prompts = [],
  graph = null,
  places = new Map(),
  byNode = new Map();
let hovered = null,
  pinned = null,
  edgeLit = null,
  requests = 0,
  nodeRequests = 0;

// ---- requests to the server -----------------------------------------------------------------------------------

const setting = (name) => STEPS[name][Number($(`[data-setting=${name}]`).value)];
const request = (more) => ({
  run: props.value.run,
  harvest: props.value.harvest,
  prompt: $('.prompt').value,
  ...more,
});

async function load() {
  const turn = ++requests;
  if (!props.value || !props.value.run) return;
  const filters = Object.fromEntries(Object.keys(STEPS).map((name) => [name, setting(name)]));
  const response = await send('graph', request(filters));
  if (turn !== requests) return;
  show(response.problem);
  if (response.problem) return clear();
  const pinnedName = pinned && pinned.name;
  graph = response;
  byNode = new Map(graph.nodes.map((node) => [node.node, node]));
  hovered = edgeLit = null;
  $('.tip').hidden = true;
  pinned = graph.nodes.find((node) => node.name === pinnedName) || null;
  render();
  if (pinned) pin(pinned);
  else emptyPanel();
}

function clear() {
  graph = pinned = hovered = edgeLit = null;
  places = new Map();
  $('svg').replaceChildren();
  $('.rows').replaceChildren();
  $('.axis').replaceChildren();
  $('.strongest tbody').replaceChildren();
  $('.frontier').hidden = true;
  $('.summary').textContent = $('.checks').textContent = $('.warning').textContent = '';
  $('canvas').width = $('canvas').height = 0;
  emptyPanel();
}

// ---- drawing --------------------------------------------------------------------------------------------------

function render() {
  const plan = layout(graph, $('.stage').clientWidth, $('.untangle').checked);
  places = plan.places;
  const sheet = $('.sheet'),
    svg = $('svg');
  sheet.style.width = `${plan.width}px`;
  sheet.style.height = `${plan.height}px`;
  svg.setAttribute('width', plan.width);
  svg.setAttribute('height', plan.height);
  svg.replaceChildren();
  plan.centers.forEach((y) => {
    shape('line', { class: 'guide', x1: plan.left - 14, x2: plan.width - 12, y1: y, y2: y }, svg);
  });
  graph.nodes.forEach((node) => drawNode(node, svg));
  drawRows(plan);
  drawAxis(plan);
  drawEdges(plan);
  drawSummary();
  drawFrontier(graph.frontier);
  drawTable();
  element.querySelectorAll('.extra').forEach((item, index) => {
    const kind = ['rest', 'bias'][index];
    item.hidden = !graph.nodes.some((node) => node.kind === kind);
  });
}

function drawRows(plan) {
  $('.rows').replaceChildren(
    ...graph.layers.map((name, layer) => {
      const label = named('span', '', name);
      label.style.top = `${plan.centers[layer]}px`;
      return label;
    }),
  );
}

function drawAxis(plan) {
  const axis = $('.axis');
  axis.style.width = `${plan.width}px`;
  axis.replaceChildren(
    ...graph.tokens.map((token, pos) => {
      const label = make('span');
      label.append(...written(token));
      label.title = `position ${pos}: ${glyphs(token)}`;
      label.style.left = `${plan.columns.starts[pos]}px`;
      label.style.width = `${plan.columns.widths[pos] - 3}px`;
      return label;
    }),
  );
}

function drawNode(node, svg) {
  const { x, y, r, gap } = places.get(node.node);
  const strength = node.kind === 'component' ? Math.max(0, Math.min(1, node.importance)) : 0;
  const group = shape(
    'g',
    {
      class: `node ${node.kind}${strength > 0.55 ? ' strong' : ''}`,
      'data-node': node.node,
      transform: `translate(${x},${y})`,
      tabindex: 0,
      role: 'button',
      'aria-label': node.name,
    },
    svg,
  );
  for (const layer of ['under', 'shape']) {
    const fill =
      layer === 'under' || node.kind === 'rest'
        ? {}
        : { 'fill-opacity': node.kind === 'component' ? strength : 0.08 };
    if (node.kind === 'component' || node.kind === 'rest')
      shape('circle', { class: layer, r, ...fill }, group);
    else if (node.kind === 'bias')
      shape('path', { class: layer, d: `M0 ${-r}L${r} 0L0 ${r}L${-r} 0Z`, ...fill }, group);
    else
      shape(
        'rect',
        { class: layer, x: -r, y: -r, width: 2 * r, height: 2 * r, rx: r * 0.3, ...fill },
        group,
      );
  }
  const numberFits = 7 * String(node.component).length + 3 <= 2 * r;
  if (node.kind !== 'rest' && node.kind !== 'bias' && numberFits) {
    shape('text', { class: 'inside', y: 4 }, group).textContent = node.component;
  }
  if (node.label && gap >= 58 && !graph.tokens.length) {
    const y = node.layer === 0 ? r + 17 : -r - 9;
    shape('text', { y }, group).textContent = node.label;
  }
}

// A node's name; if inputs are tokens, an input or output also shows its token.
const titled = ({ name, label }) =>
  label && graph.tokens.length ? `${name} “${glyphs(label)}”` : name;

const color = (name) => getComputedStyle($('.spd-graph')).getPropertyValue(name).trim();

function curve(edge) {
  const from = places.get(edge.source),
    to = places.get(edge.target);
  const up = from.y >= to.y ? 1 : -1,
    level = from.y === to.y;
  const y1 = from.y - up * from.r,
    y2 = to.y + up * to.r,
    bend = level ? -38 : (y2 - y1) * 0.45;
  return [
    from.x,
    y1,
    from.x,
    y1 + bend,
    to.x,
    level ? y1 + bend : y2 - bend,
    to.x,
    level ? y1 : y2,
  ];
}

// The hovered node is lit; if there is none, the pinned one. An edge that is lit from the table takes
// precedence over both.
const lit = () => hovered || pinned;
const touches = (edge, node) => edge.source === node.node || edge.target === node.node;
const isLit = (edge) => (edgeLit ? edge === edgeLit : lit() ? touches(edge, lit()) : null);

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
  const ink = { plus: color('--plus'), minus: color('--minus') };
  const largest = Math.max(...graph.edges.map((edge) => Math.abs(edge.attribution)), 1e-30);
  const strokes = graph.edges
    .map((edge) => {
      const share = Math.abs(edge.attribution) / largest;
      return { edge, share, on: isLit(edge) };
    })
    .reverse();
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

// Values are written near the far end of the lit node's edges, where they fan out. A value without a
// free place is left out; the panel shows it.
function labelEdges(pen, strokes, ink) {
  pen.font = '600 12px system-ui, sans-serif';
  pen.textAlign = 'center';
  pen.textBaseline = 'middle';
  pen.lineWidth = 4;
  pen.strokeStyle = color('--paper');
  const taken = [];
  for (const { edge } of strokes.reverse()) {
    const text = number(edge.attribution),
      half = pen.measureText(text).width / 2 + 3;
    const outward = edgeLit || edge.source === lit().node;
    const spots = [0.62, 0.5, 0.74, 0.4, 0.84].map((t) => along(curve(edge), outward ? t : 1 - t));
    const isFree = ([x, y]) =>
      taken.every(([a, b, other]) => Math.abs(x - a) > half + other || Math.abs(y - b) > 14);
    const spot = spots.find(isFree);
    if (!spot) continue;
    taken.push([...spot, half]);
    pen.strokeText(text, ...spot);
    pen.fillStyle = edge.attribution >= 0 ? ink.plus : ink.minus;
    pen.fillText(text, ...spot);
  }
}

// The point of a Bézier curve at t between 0 and 1.
function along([x1, y1, x2, y2, x3, y3, x4, y4], t) {
  const s = 1 - t;
  const at = (a, b, c, d) => s * s * s * a + 3 * s * s * t * b + 3 * s * t * t * c + t * t * t * d;
  return [at(x1, x2, x3, x4), at(y1, y2, y3, y4)];
}

function markNodes() {
  const near = new Set();
  if (edgeLit) near.add(edgeLit.source).add(edgeLit.target);
  else if (lit()) {
    near.add(lit().node);
    graph.edges
      .filter((edge) => touches(edge, lit()))
      .forEach((edge) => near.add(edge.source).add(edge.target));
  }
  element.querySelectorAll('.node').forEach((group) => {
    const node = Number(group.dataset.node);
    group.classList.toggle('off', near.size > 0 && !near.has(node));
    group.classList.toggle('on', node === (lit() && lit().node));
    group.setAttribute('aria-pressed', String(Boolean(pinned) && pinned.node === node));
  });
}

function drawSummary() {
  const counts = `${graph.edges.length} of ${graph.edges_total} edges, ${graph.nodes.length} of ${graph.nodes_total} nodes`;
  const hidden =
    graph.edges_passing > graph.edges.length ? ` (${graph.edges_passing} pass the filters)` : '';
  const rest = `${counts}${hidden} · largest |attribution| ${number(graph.largest)} · mode ${graph.mode}`;
  const scores = ['replacement', 'completeness']
    .filter((name) => graph[name] !== null)
    .map((name) => {
      const fact = make('span', '', ` · ${name} ${number(graph[name])}`);
      fact.title = MEANING[name];
      return fact;
    });
  $('.summary').replaceChildren(
    make('b', '', graph.label),
    make('span', '', ` · ${rest}`),
    ...scores,
  );
  $('.checks').replaceChildren(...checked(graph.checks));
  $('.warning').textContent = graph.warning;
}

// How well the whole graph agrees with interventions, whichever part of it is shown.
function checked(checks) {
  if (!checks) return [];
  const percent = (share) =>
    share < 1e-4 ? 'under 0.01 %' : `${number(Number((100 * share).toPrecision(2)))} %`;
  const fact = (text, meaning) => {
    const span = make('span', '', text);
    span.title = meaning;
    return span;
  };
  const figures = [
    ['r = ', checks.correlation, (r) => number(r)],
    ['off by ', checks.relative_error, percent],
  ];
  const agreement = figures
    .filter(([, value]) => value !== null)
    .map(([before, value, format]) => before + format(value))
    .join(', ');
  const gapMeaning =
    'How far the in-edges are from adding up to the values they explain: ' +
    'Σ|value − Σ in-edges| / Σ|value| over components and outputs, with all edges. ' +
    'In frozen graphs it is 0; in others it is what the linearization misses.';
  const checkMeaning =
    'The source of each edge was ablated while all other sites were held fixed, and the change ' +
    'of the target was measured. This checks single edges, not whether the in-edges of a node add up. ' +
    'r: correlation between the edge and the loss of the target. ' +
    'Off by: the norm of the differences divided by the norm of the edges.';
  return [
    checks.gap !== null && fact(`gap ${percent(checks.gap)}`, gapMeaning),
    checks.checked &&
      fact(
        `${checks.checked} edges checked by intervention${agreement && `: ${agreement}`}`,
        checkMeaning,
      ),
  ].filter(Boolean);
}

function drawTable() {
  const rows = graph.edges.slice(0, 25).map((edge) => {
    const row = make('tr');
    for (const end of [edge.source, edge.target]) {
      const cell = make('td'),
        button = named('button', '', titled(byNode.get(end)), 60);
      button.addEventListener('click', () => pin(byNode.get(end)));
      cell.append(button);
      row.append(cell);
    }
    const bar = make('td');
    bar.append(meter(edge.attribution, graph.largest));
    row.append(make('td', 'number', number(edge.attribution)), bar);
    row.addEventListener('mouseenter', () => {
      edgeLit = edge;
      drawEdges();
    });
    row.addEventListener('mouseleave', () => {
      edgeLit = null;
      drawEdges();
    });
    return row;
  });
  if (!rows.length) {
    const row = make('tr'),
      cell = make('td', '', 'No edge passes these filters.');
    cell.colSpan = 4;
    row.append(cell);
    rows.push(row);
  }
  $('.strongest tbody').replaceChildren(...rows);
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
  const ins = edges.filter((edge) => edge.target === node.node);
  const outs = edges.filter((edge) => edge.source === node.node);
  const list = facts(node);
  list.append(
    make('dt', '', 'edges shown'),
    make('dd', '', `${ins.length} in, ${outs.length} out`),
  );
  tip.replaceChildren(make('div', 'name', titled(node)), list);
  const { x, y, r } = places.get(node.node),
    stage = $('.stage');
  const right = x - stage.scrollLeft + r + 14,
    left = right - 2 * r - 28 - tip.offsetWidth;
  tip.style.left = `${right + tip.offsetWidth > stage.clientWidth && left > 4 ? left : right}px`;
  tip.style.top = `${Math.max(4, Math.min(y - stage.scrollTop - 20, stage.clientHeight - tip.offsetHeight - 4))}px`;
}

function emptyPanel() {
  $('.panel').replaceChildren(
    ...[
      'A circle is a component that is active on this prompt; the more important it is, the darker its fill. ' +
        'A line is an attribution: how much of one node’s value reaches the next along the direct path. ' +
        'The sign of a component is arbitrary: two negative lines in a row have the same effect as two positive ones.',
      'Hover over a node to see its edges and their values. Click it to pin it here with all edges into and out of it.',
    ].map((text) => make('p', 'hint', text)),
  );
}

async function pin(node) {
  if (!node) return;
  pinned = node;
  hovered = null;
  $('.tip').hidden = true;
  drawEdges();
  const turn = ++nodeRequests,
    turnGraph = requests;
  const response = await send('node', request({ node: node.node }));
  if (turn !== nodeRequests || turnGraph !== requests || pinned !== node) return;
  show(response.problem);
  if (response.problem) return;
  const head = make('div', 'head'),
    close = make('button', 'close', '×');
  close.setAttribute('aria-label', 'Unpin');
  close.addEventListener('click', unpin);
  head.append(make('div', 'name', titled(node)), close);
  const ins = side('In', response.ins, response.in_count, response.in_sum);
  const outs = side('Out', response.outs, response.out_count, response.out_sum);
  $('.panel').replaceChildren(head, facts(node), ...ins, ...outs);
}

function unpin() {
  pinned = null;
  nodeRequests++;
  emptyPanel();
  if (graph) drawEdges();
}

function side(title, ends, count, sum) {
  const head = make('h4', '', `${title}-edges`);
  const part = ends.length < count ? `${ends.length} of ` : '';
  head.append(make('small', '', count ? `${part}${count}, sum ${number(sum)}` : 'none'));
  const largest = Math.max(...ends.map((end) => Math.abs(end.attribution)), 0);
  return [
    head,
    ...ends.map((end) => {
      const button = make('button', 'end');
      const name = named('span', '', titled(end), NAME_IN_PANEL);
      button.append(
        name,
        make('span', 'value', number(end.attribution)),
        meter(end.attribution, largest),
      );
      const heads = [...end.heads]
        .sort((a, b) => Math.abs(b.attribution) - Math.abs(a.attribution))
        .slice(0, 4)
        .map(({ head, attribution }) => `head ${head}: ${number(attribution)}`);
      if (heads.length) button.append(make('small', 'heads', heads.join(' · ')));
      button.title = `${titled(end)}: ${byNode.has(end.node) ? 'click to pin this node' : 'hidden by a filter'}`;
      button.addEventListener('click', () => pin(byNode.get(end.node)));
      return button;
    }),
  ];
}

// ---- controls -------------------------------------------------------------------------------------------------

function fillPrompts() {
  const wanted = $('.find').value.trim().toLowerCase();
  const matching = prompts
    .filter((prompt) => prompt.label.toLowerCase().includes(wanted))
    .slice(0, 500);
  const groups = new Map();
  for (const prompt of matching) {
    if (!groups.has(prompt.split)) {
      const group = make('optgroup');
      group.label = prompt.split;
      groups.set(prompt.split, group);
    }
    const option = make('option', '', prompt.label);
    option.value = prompt.id;
    groups.get(prompt.split).append(option);
  }
  const selected = $('.prompt').value;
  $('.prompt').replaceChildren(...groups.values());
  if (matching.some((prompt) => prompt.id === selected)) $('.prompt').value = selected;
}

function describeSliders() {
  for (const name of Object.keys(STEPS)) {
    const value = setting(name),
      output = $(`[data-setting=${name}]`).nextElementSibling;
    output.textContent = {
      influence: value === 1 ? 'all nodes' : `${number(100 * value)} %`,
      top_k: `${value} edges`,
      threshold: `≥ ${number(100 * value)} %`,
      min_importance: `≥ ${number(value)}`,
    }[name];
  }
  const index = $('.prompt').selectedIndex,
    last = $('.prompt').length - 1;
  element.querySelectorAll('.step').forEach((button) => {
    button.disabled = button.dataset.step === '1' ? index >= last : index <= 0;
  });
}

function refresh() {
  describeSliders();
  return load();
}

function open() {
  prompts = (props.value && props.value.prompts) || [];
  $('.find').hidden = prompts.length <= 100;
  $('.find').value = '';
  unpin();
  fillPrompts();
  show(props.value && props.value.problem);
  $('.spd-widget').classList.toggle('blank', !prompts.length);
  if (prompts.length) refresh();
  else clear();
}

const nodeUnder = (event) => {
  const group = event.target.closest && event.target.closest('.node');
  return group && graph ? byNode.get(Number(group.dataset.node)) : null;
};

for (const [name, steps] of Object.entries(STEPS)) {
  const slider = $(`[data-setting=${name}]`);
  Object.assign(slider, {
    min: 0,
    max: steps.length - 1,
    step: 1,
    value: steps.indexOf(START[name]),
  });
  slider.addEventListener('input', refresh);
}
$('.untangle').addEventListener('change', () => graph && render());
$('.prompt').addEventListener('change', refresh);
$('.find').addEventListener('input', () => {
  fillPrompts();
  if ($('.prompt').value) refresh();
});
element.querySelectorAll('.step').forEach((button) =>
  button.addEventListener('click', () => {
    $('.prompt').selectedIndex += Number(button.dataset.step);
    refresh();
  }),
);
$('svg').addEventListener('mouseover', (event) => graph && hover(nodeUnder(event)));
$('svg').addEventListener('mouseleave', () => graph && hover(null));
$('svg').addEventListener(
  'focusin',
  (event) => event.target.matches(':focus-visible') && hover(nodeUnder(event)),
);
$('svg').addEventListener('focusout', () => graph && hover(null));
$('svg').addEventListener('click', (event) => {
  const node = nodeUnder(event);
  if (node) pin(node);
  else unpin();
});
element.addEventListener('keydown', (event) => {
  if (event.key === 'Escape') unpin();
  if ((event.key === 'Enter' || event.key === ' ') && nodeUnder(event)) {
    event.preventDefault();
    pin(nodeUnder(event));
  }
});
let seenWidth = 0;
new ResizeObserver(() => {
  const width = $('.stage').clientWidth;
  if (graph && width && width !== seenWidth) {
    seenWidth = width;
    render();
  }
}).observe($('.stage'));
new MutationObserver(() => graph && drawEdges()).observe(document.body, {
  attributes: true,
  attributeFilter: ['class'],
});
watch('value', open);
open();
