// Prompts as text, colored by one component; the components that are active at a token, and the
// places where a component is most important. It runs as the body of gr.HTML's js_on_load, with
// `element`, `props.value` (the harvest, its sites and prompts), `server` and `watch`. widget.js is
// put before it.

let page = null,
  lit = [],
  pinned = null,
  requests = 0,
  placeRequests = 0;
let spans = [],
  rows = [],
  numbers = new Map();

const request = (more) => ({ run: props.value.run, harvest: props.value.harvest, ...more });
const percent = (share) => `${share >= 0.9995 ? 100 : (100 * share).toFixed(1)} %`;
const layerNow = () => $('.layer').value;

// ---- one component --------------------------------------------------------------------------------------------

async function load(layer, component) {
  const turn = ++requests;
  if (!props.value || !props.value.run) return;
  const response = await send('component', request({ layer, component }));
  if (turn !== requests) return;
  show(response.problem);
  if (response.problem) return;
  page = response;
  fillComponents();
  color();
  if ($('.rank').checked) order();
  drawSummary();
  drawTop();
  markChosen();
}

function fillComponents() {
  const listed = page.components.map(({ component, share, mean }) => {
    const text = `${component} — at ${percent(share)} of tokens, mean ${number(mean)}`;
    return [component, text];
  });
  const isListed = listed.some(([component]) => component === page.component);
  if (!isListed) listed.push([page.component, `${page.component} — not active`]);
  $('.layer').value = $('.layer').title = page.layer;
  $('.component').replaceChildren(
    ...listed.map(([component, text]) => {
      const option = make('option', '', text);
      option.value = component;
      return option;
    }),
  );
  $('.component').value = page.component;
  const index = $('.component').selectedIndex,
    last = $('.component').length - 1;
  element.querySelectorAll('.step').forEach((button) => {
    button.disabled = button.dataset.step === '1' ? index >= last : index <= 0;
  });
}

function paint(span, importance) {
  span.style.setProperty('--g', importance);
  span.classList.toggle('strong', importance > 0.6);
}

function color() {
  lit.forEach((span) => {
    paint(span, 0);
    delete span.values;
  });
  const { prompt, pos, importance, activation } = page.places;
  lit = prompt.map((row, k) => {
    const span = spans[row][pos[k]];
    span.values = { importance: importance[k], activation: activation[k] };
    paint(span, importance[k] || 0);
    return span;
  });
}

function order() {
  const sums = new Array(rows.length).fill(0);
  page.places.prompt.forEach((row, k) => {
    sums[row] += page.places.importance[k] || 0;
  });
  const ranked = rows.map((row, k) => [row, sums[k] / spans[k].length, k]);
  if ($('.rank').checked) ranked.sort((a, b) => b[1] - a[1] || a[2] - b[2]);
  $('.texts').replaceChildren(...ranked.map(([row]) => row));
  reveal();
}

function drawSummary() {
  const entry = page.components.find(({ component }) => component === page.component);
  const facts = entry
    ? [
        `active at ${page.total} of ${page.positions} tokens (${percent(entry.share)})`,
        `mean importance ${number(entry.mean)}`,
        `spread ${number(entry.spread)}`,
      ]
    : ['not active at any token'];
  const name = named('b', '', `${page.layer}:${page.component}`, 60);
  $('.summary').replaceChildren(name, make('span', '', ` · ${facts.join(' · ')}`));
}

function drawTop() {
  const made = page.top.map((place) => {
    const row = make('tr'),
      mark = make('span', 'token');
    const before = make('td'),
      token = make('td', 'it'),
      after = make('td', 'after');
    const left = make('div', 'before'),
      words = make('span');
    place.before.forEach((word) => words.append(...written(word), gap()));
    left.append(words);
    before.append(left);
    mark.append(...written(place.token));
    paint(mark, place.importance || 0);
    token.append(mark);
    place.after.forEach((word) => after.append(gap(), ...written(word)));
    const source = make('td', '', place.source);
    source.title = `${place.source}, position ${place.pos}`;
    const importance = make('td', 'number', number(place.importance));
    const activation = make('td', 'number', number(place.activation));
    row.append(importance, activation, before, token, after, source);
    row.addEventListener('click', () => pin(place.prompt, place.pos, true));
    return row;
  });
  if (!made.length) {
    const row = make('tr'),
      cell = make('td', '', 'This component is not active at any token of this harvest.');
    cell.colSpan = 6;
    row.append(cell);
    made.push(row);
  }
  $('.strongest tbody').replaceChildren(...made);
}

// ---- one token ------------------------------------------------------------------------------------------------

const spanOf = (prompt, pos) => (spans[numbers.get(prompt)] || [])[pos];

// Scrolls the frame, not the page, to the pinned token. In a hidden page there is nothing to scroll.
function reveal() {
  const box = $('.texts');
  if (!pinned || !pinned.span || !box.clientHeight) return;
  const away = pinned.span.getBoundingClientRect().top - box.getBoundingClientRect().top;
  if (away < 0 || away > box.clientHeight - 40) box.scrollTop += away - box.clientHeight / 3;
}

async function pin(prompt, pos, far) {
  const turn = ++placeRequests;
  if (pinned && pinned.span) pinned.span.classList.remove('pinned');
  pinned = { prompt, pos, span: spanOf(prompt, pos) };
  if (pinned.span) {
    pinned.span.classList.add('pinned');
    pinned.span.closest('.text').hidden = false;
    if (far) reveal();
  }
  const response = await send('place', request({ prompt, pos }));
  if (turn !== placeRequests) return;
  show(response.problem);
  if (response.problem) return;
  const head = make('div', 'head'),
    name = make('div', 'name');
  const word = make('span', 'token'),
    close = make('button', 'close', '×');
  word.append(...written(response.token));
  name.append(word);
  close.setAttribute('aria-label', 'Unpin');
  close.addEventListener('click', unpin);
  head.append(name, close);
  const where = make('p', 'where', `position ${response.pos} of ${response.source}`);
  $('.panel').replaceChildren(head, where, ...predictions(response), ...activeComponents(response));
  $('.panel').scrollTop = 0;
  markChosen();
}

function predictions({ outputs, rest, follows }) {
  const head = make('h4', '', 'Predicted next token'),
    table = make('table'),
    body = make('tbody'),
    top = make('tr');
  top.append(make('th', '', 'token'), make('th', '', 'masked'), make('th', '', 'target'));
  top.title =
    'masked: the network under CI masks; target: the unmasked network. ' +
    'The tokens are the likeliest ones under CI masks.';
  for (const output of outputs) {
    const row = make('tr', output.next ? 'follows' : ''),
      word = make('td');
    word.append(...written(output.token));
    if (output.next) word.append(' ✓');
    row.append(word, make('td', '', percent(output.ci)), make('td', '', percent(output.target)));
    body.append(row);
  }
  const others = make('tr', 'others');
  others.append(
    make('td', '', 'others'),
    make('td', '', percent(rest[0])),
    make('td', '', percent(rest[1])),
  );
  body.append(others);
  table.append(top, body);
  if (follows !== null) {
    const actual = make('small');
    actual.append('actual: ', ...written(follows));
    head.append(actual);
  }
  return [head, table];
}

function activeComponents({ components, count }) {
  const head = make('h4', '', 'Active components');
  const part = components.length < count ? `${components.length} of ` : '';
  head.append(make('small', '', count ? `${part}${count}` : 'none'));
  return [
    head,
    ...components.map(({ layer, component, importance, activation }) => {
      const button = make('button', 'end');
      const name = `${layer}:${component}`;
      const label = named('span', '', name, NAME_IN_PANEL);
      button.append(label, make('span', 'value', number(importance)), meter(importance, 1));
      const facts = `importance ${number(importance)}, activation ${number(activation)}`;
      button.title = `${name}, ${facts}: click to color the text by this component`;
      button.dataset.name = name;
      button.addEventListener('click', () => load(layer, component));
      return button;
    }),
  ];
}

function markChosen() {
  const name = page && `${page.layer}:${page.component}`;
  element
    .querySelectorAll('.end')
    .forEach((button) => button.classList.toggle('chosen', button.dataset.name === name));
}

function unpin() {
  placeRequests++;
  if (pinned && pinned.span) pinned.span.classList.remove('pinned');
  pinned = null;
  const hint =
    'A darker token means that the selected component is more important there. ' +
    'Click a token to see the components that are active at it and the predicted next tokens, ' +
    'both under CI masks and for the unmasked network.';
  $('.panel').replaceChildren(make('p', 'hint', hint));
}

// ---- the text -------------------------------------------------------------------------------------------------

const gap = () => ($('.texts').classList.contains('apart') ? ' ' : '');

function fillTexts() {
  const prompts = props.value.prompts;
  numbers = new Map(prompts.map(({ id }, k) => [id, k]));
  $('.texts').classList.toggle(
    'apart',
    !prompts.some(({ tokens }) => tokens.some((token) => /\s/.test(token))),
  );
  spans = [];
  rows = prompts.map(({ source, tokens }, k) => {
    const row = make('div', 'text'),
      label = make('b', '', source),
      body = make('div');
    label.title = source;
    spans.push(
      tokens.map((token, pos) => {
        const span = make('span', 'token');
        span.append(...written(token, true));
        span.at = [k, pos];
        return span;
      }),
    );
    body.append(...spans[k]);
    row.append(label, body);
    return row;
  });
  $('.texts').replaceChildren(...rows);
  lit = [];
}

function find() {
  const wanted = $('.find').value.toLowerCase();
  const prompts = props.value.prompts;
  let count = 0;
  rows.forEach((row, k) => {
    const text = prompts[k].text ?? prompts[k].tokens.join(''); // `text` joins characters that are split over tokens
    row.hidden = Boolean(wanted) && !`${prompts[k].source}\n${text}`.toLowerCase().includes(wanted);
    count += !row.hidden;
  });
  const all = props.value.total;
  $('.shown').textContent = count < all ? `${count} of ${all} prompts shown` : `${all} prompts`;
}

const tokenUnder = (event) => event.target.closest && event.target.closest('.texts .token');

function hover(span) {
  const tip = $('.tip');
  tip.hidden = !span;
  if (!span) return;
  const [row, pos] = span.at;
  const list = make('dl', 'facts'),
    word = make('div', 'name');
  const fact = (name, value) => list.append(make('dt', '', name), make('dd', '', value));
  word.append(...written(props.value.prompts[row].tokens[pos]));
  fact('position', pos);
  if (span.values) {
    fact('importance', number(span.values.importance));
    fact('activation', number(span.values.activation));
  } else {
    fact('importance', props.value.threshold ? `≤ ${number(props.value.threshold)}` : '0');
  }
  tip.replaceChildren(word, list);
  const frame = $('.frame').getBoundingClientRect(),
    box = span.getClientRects()[0];
  const below = box.bottom - frame.top + 8,
    above = box.top - frame.top - tip.offsetHeight - 8;
  tip.style.left = `${Math.max(4, Math.min(box.left - frame.left, frame.width - tip.offsetWidth - 8))}px`;
  tip.style.top = `${below + tip.offsetHeight > frame.height && above > 0 ? above : below}px`;
}

function step(by) {
  if (!pinned) return;
  const next = spanOf(pinned.prompt, pinned.pos + by);
  if (next) pin(pinned.prompt, pinned.pos + by);
}

// ---- controls -------------------------------------------------------------------------------------------------

async function open() {
  const value = props.value || {},
    prompts = value.prompts || [];
  unpin();
  page = null;
  $('.tip').hidden = true;
  show(value.problem);
  $('.spd-widget').classList.toggle('blank', !prompts.length);
  if (!prompts.length) {
    requests++;
    return;
  }
  $('.layer').replaceChildren(
    ...value.layers.map((layer) => {
      const option = named('option', '', layer);
      option.value = layer;
      return option;
    }),
  );
  $('.find').value = '';
  fillTexts();
  find();
  await load(null, null);
  if (page && page.top.length && !pinned) pin(page.top[0].prompt, page.top[0].pos, true);
}

$('.layer').addEventListener('change', () => load(layerNow(), null));
$('.component').addEventListener('change', () => load(layerNow(), Number($('.component').value)));
element.querySelectorAll('.step').forEach((button) =>
  button.addEventListener('click', () => {
    $('.component').selectedIndex += Number(button.dataset.step);
    load(layerNow(), Number($('.component').value));
  }),
);
$('.find').addEventListener('input', find);
$('.rank').addEventListener('change', () => page && order());
$('.texts').addEventListener('mouseover', (event) => page && hover(tokenUnder(event)));
$('.texts').addEventListener('mouseleave', () => hover(null));
$('.texts').addEventListener('scroll', () => hover(null));
$('.texts').addEventListener('click', (event) => {
  const span = tokenUnder(event);
  if (span) pin(props.value.prompts[span.at[0]].id, span.at[1]);
});
element.addEventListener('keydown', (event) => {
  if (event.key === 'Escape') unpin();
  if (event.target !== $('.texts')) return;
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (by) {
    event.preventDefault();
    step(by);
  }
});
let seenWidth = 0;
new ResizeObserver(() => {
  const width = $('.texts').clientWidth;
  if (width && !seenWidth) reveal();
  seenWidth = width;
}).observe($('.texts'));
watch('value', open);
open();
