// The places of the nodes of an attribution graph. This is a pure function of a graph and the room
// for it; graph.js draws the result.
//
// Rows are layers, with the input at the bottom; columns are positions. The nodes of one layer and
// position share a cell, and wrap into several lines when it is full. With `untangle`, cells are
// then swept upwards and downwards, and each node moves to the mean place of its neighbors (the
// barycenter heuristic of Sugiyama, Tagawa and Toda, 1981).

const LEAST_LEFT = 150,
  LETTER = 7,
  RIGHT = 40,
  TOP = 46,
  BOTTOM = 46,
  CELL_GAP = 14,
  NARROW = 15;

// The room for the names of layers, left of the first column.
const roomForNames = (layers) => {
  const lengths = layers.map((name) => shortened(name).length);
  return Math.max(LEAST_LEFT, 24 + LETTER * Math.max(...lengths));
};

// Returns the sheet's width and height, the room `left` of the columns, the y of each layer, the
// columns {widths, starts}, and `places`: for each node, its center {x, y}, radius r, the gap to its
// neighbors, and the number of lines of its cell.
function layout(graph, room, untangle) {
  const cells = new Map();
  for (const node of graph.nodes) {
    const key = `${node.layer},${node.pos}`;
    if (!cells.has(key)) cells.set(key, []);
    cells.get(key).push(node);
  }
  const left = roomForNames(graph.layers);
  const columns = columnWidths(
    cells,
    Math.max(1, graph.tokens.length),
    Math.max(320, room - left - RIGHT),
    left,
  );
  const { centers, height } = rowCenters(graph.layers.length, cells, columns);
  const plan = {
    left,
    width: left + columns.total + RIGHT,
    height,
    centers,
    columns,
    places: new Map(),
  };
  for (const nodes of cells.values()) placeCell(nodes, plan);
  const upwards = untangle ? [...cells.values()].sort((a, b) => a[0].layer - b[0].layer) : [];
  for (let round = 0; round < 4; round++) {
    const incoming = round % 2 === 0;
    for (const nodes of incoming ? upwards : [...upwards].reverse())
      straighten(nodes, graph, incoming, plan);
  }
  return plan;
}

function columnWidths(cells, positions, room, left) {
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
  widths.forEach((width, index) => {
    starts[index] = left + total;
    widths[index] = width * stretch;
    total += widths[index];
  });
  return { widths, starts, total };
}

const columnOf = (columns, node) => (columns.widths.length === 1 ? 0 : node.pos);
const lineLength = (columns, pos) =>
  Math.max(1, Math.floor((columns.widths[pos] - CELL_GAP) / NARROW));

function rowCenters(layers, cells, columns) {
  const lines = new Array(layers).fill(1),
    centers = [];
  for (const nodes of cells.values()) {
    const needed = Math.ceil(nodes.length / lineLength(columns, columnOf(columns, nodes[0])));
    lines[nodes[0].layer] = Math.max(lines[nodes[0].layer], needed);
  }
  const step = Math.max(46, Math.min(118, 460 / layers));
  let y = TOP;
  for (let layer = layers - 1; layer >= 0; layer--) {
    centers[layer] = y + ((lines[layer] - 1) * NARROW) / 2;
    y += (lines[layer] - 1) * NARROW + step;
  }
  return { centers, height: y - step + BOTTOM };
}

function placeCell(nodes, { columns, centers, places }) {
  const pos = columnOf(columns, nodes[0]);
  const perLine = Math.min(nodes.length, lineLength(columns, pos));
  const lines = Math.ceil(nodes.length / perLine);
  const gap = Math.min(132, (columns.widths[pos] - CELL_GAP) / perLine);
  const r = columns.widths.length > 1 ? 5 : Math.max(4.5, Math.min(15, gap * 0.3));
  const middle = columns.starts[pos] + columns.widths[pos] / 2;
  nodes.forEach((node, index) => {
    const line = Math.floor(index / perLine),
      onLine = Math.min(perLine, nodes.length - line * perLine);
    const x = middle + (index - line * perLine - (onLine - 1) / 2) * gap;
    places.set(node.node, {
      x,
      y: centers[node.layer] + (line - (lines - 1) / 2) * NARROW,
      r,
      gap,
      lines,
    });
  });
}

// Moves a cell's nodes toward the mean place of their neighbors below (or above), weighted by
// |attribution|. Inputs keep their order and outputs keep their places, since these have a meaning.
// Cells of several lines are only reordered.
function straighten(nodes, graph, incoming, plan) {
  if (nodes[0].kind === 'output') return;
  const wishes = wishesOf(nodes, graph, incoming, plan.places);
  const fixed = nodes[0].kind === 'input' || nodes[0].kind === 'embedding';
  if (!fixed) nodes.sort((a, b) => wishes.get(a.node) - wishes.get(b.node) || a.node - b.node);
  const { gap, lines } = plan.places.get(nodes[0].node);
  if (lines > 1) return placeCell(nodes, plan);
  const pos = columnOf(plan.columns, nodes[0]),
    half = (CELL_GAP + Math.min(gap, 40)) / 2;
  const first = plan.columns.starts[pos] + half,
    last = first + plan.columns.widths[pos] - 2 * half;
  spread(
    nodes.map(({ node }) => wishes.get(node)),
    Math.min(gap, Math.max(gap * 0.55, 60)),
    first,
    last,
  ).forEach((x, index) => {
    plan.places.get(nodes[index].node).x = x;
  });
}

function wishesOf(nodes, graph, incoming, places) {
  const pulls = new Map(nodes.map(({ node }) => [node, [0, 0]]));
  for (const { source, target, attribution } of graph.edges) {
    const [node, neighbor] = incoming ? [target, source] : [source, target];
    const pull = pulls.get(node);
    const weight = Math.abs(attribution) + 1e-9 * graph.largest;
    if (pull) {
      pull[0] += weight * places.get(neighbor).x;
      pull[1] += weight;
    }
  }
  return new Map(
    [...pulls].map(([node, [sum, weight]]) => [
      node,
      weight > 0 ? sum / weight : places.get(node).x,
    ]),
  );
}

// Returns places in the given order, at least `gap` apart, between `first` and `last`, and close to
// the wishes.
function spread(wishes, gap, first, last) {
  const xs = [];
  wishes.forEach((wish, index) => {
    xs.push(index ? Math.max(wish, xs[index - 1] + gap) : wish);
  });
  const shift = xs.reduce((sum, x, index) => sum + x - wishes[index], 0) / xs.length;
  for (let index = xs.length - 1, limit = last; index >= 0; index--, limit -= gap) {
    xs[index] = Math.min(xs[index] - shift, limit);
  }
  xs.forEach((x, index) => {
    xs[index] = Math.max(x, first + index * gap);
  });
  return xs;
}
