// Prompts as text, colored by one component; what is in use at a token, and where a component is most important. Runs as
// the body of gr.HTML's js_on_load, with `element`, `props.value` (which harvest, its sites and prompts), `server` and
// `watch`. widget.js stands before it.

let page = null, lit = [], pinned = null, asked = 0, askedPlace = 0;
let spans = [], rows = [], numbers = new Map();

const request = (more) => ({ run: props.value.run, harvest: props.value.harvest, ...more });
const percent = (share) => `${share >= 0.9995 ? 100 : (100 * share).toFixed(1)} %`;
const layerNow = () => $('.layer').value;

// ---- one component --------------------------------------------------------------------------------------------

async function load(layer, component) {
  const turn = ++asked;
  if (!props.value || !props.value.run) return;
  const answer = await ask('component', request({ layer, component }));
  if (turn !== asked) return;
  show(answer.problem);
  if (answer.problem) return;
  page = answer;
  fillComponents();
  color();
  if ($('.rank').checked) order();
  drawSummary();
  drawTop();
  markChosen();
}

function fillComponents() {
  const listed = page.components.map(({ component, share, mean }) => [component, `${component} — at ${percent(share)} of tokens, mean ${number(mean)}`]);
  if (!listed.some(([component]) => component === page.component)) listed.push([page.component, `${page.component} — at no token`]);
  $('.layer').value = $('.layer').title = page.layer;
  $('.component').replaceChildren(...listed.map(([component, text]) => { const option = make('option', '', text); option.value = component; return option; }));
  $('.component').value = page.component;
  const index = $('.component').selectedIndex, last = $('.component').length - 1;
  element.querySelectorAll('.step').forEach((button) => { button.disabled = button.dataset.step === '1' ? index >= last : index <= 0; });
}

function paint(span, importance) {
  span.style.setProperty('--g', importance);
  span.classList.toggle('strong', importance > 0.6);
}

function color() {
  lit.forEach((span) => { paint(span, 0); delete span.values; });
  const { prompt, pos, importance, activation } = page.places;
  lit = prompt.map((held, k) => {
    const span = spans[held][pos[k]];
    span.values = { importance: importance[k], activation: activation[k] };
    paint(span, importance[k] || 0);
    return span;
  });
}

function order() {
  const sums = new Array(rows.length).fill(0);
  page.places.prompt.forEach((held, k) => { sums[held] += page.places.importance[k] || 0; });
  const ranked = rows.map((row, k) => [row, sums[k] / spans[k].length, k]);
  if ($('.rank').checked) ranked.sort((a, b) => b[1] - a[1] || a[2] - b[2]);
  $('.texts').replaceChildren(...ranked.map(([row]) => row));
  reveal();
}

function drawSummary() {
  const own = page.components.find(({ component }) => component === page.component);
  const told = own ? `in use at ${page.total} of ${page.positions} tokens (${percent(own.share)}) · mean importance ${number(own.mean)} · spread ${number(own.spread)}` : 'in use at no token';
  $('.summary').replaceChildren(named('b', '', `${page.layer}:${page.component}`, 60), make('span', '', ` · ${told}`));
}

function drawTop() {
  const made = page.top.map((place) => {
    const row = make('tr'), before = make('td'), token = make('td', 'it'), after = make('td', 'after'), mark = make('span', 'token');
    const left = make('div', 'before'), words = make('span');
    place.before.forEach((word) => words.append(...written(word), gap()));
    left.append(words);
    before.append(left);
    mark.append(...written(place.token));
    paint(mark, place.importance || 0);
    token.append(mark);
    place.after.forEach((word) => after.append(gap(), ...written(word)));
    const source = make('td', '', place.source);
    source.title = `${place.source}, position ${place.pos}`;
    row.append(make('td', 'number', number(place.importance)), make('td', 'number', number(place.activation)), before, token, after, source);
    row.addEventListener('click', () => pin(place.prompt, place.pos, true));
    return row;
  });
  if (!made.length) { const row = make('tr'), cell = make('td', '', 'It is in use at no token of this harvest.'); cell.colSpan = 6; row.append(cell); made.push(row); }
  $('.strongest tbody').replaceChildren(...made);
}

// ---- one token ------------------------------------------------------------------------------------------------

const spanOf = (prompt, pos) => (spans[numbers.get(prompt)] || [])[pos];

// Scrolls the frame, not the page, to the pinned token; within a page that is not shown there is nothing to scroll.
function reveal() {
  const box = $('.texts');
  if (!pinned || !pinned.span || !box.clientHeight) return;
  const away = pinned.span.getBoundingClientRect().top - box.getBoundingClientRect().top;
  if (away < 0 || away > box.clientHeight - 40) box.scrollTop += away - box.clientHeight / 3;
}

async function pin(prompt, pos, far) {
  const turn = ++askedPlace;
  if (pinned && pinned.span) pinned.span.classList.remove('pinned');
  pinned = { prompt, pos, span: spanOf(prompt, pos) };
  if (pinned.span) {
    pinned.span.classList.add('pinned');
    pinned.span.closest('.text').hidden = false;
    if (far) reveal();
  }
  const answer = await ask('place', request({ prompt, pos }));
  if (turn !== askedPlace) return;
  show(answer.problem);
  if (answer.problem) return;
  const head = make('div', 'head'), name = make('div', 'name'), word = make('span', 'token'), close = make('button', 'close', '×');
  word.append(...written(answer.token));
  name.append(word);
  close.setAttribute('aria-label', 'Unpin');
  close.addEventListener('click', unpin);
  head.append(name, close);
  const where = make('p', 'where', `position ${answer.pos} of ${answer.source}`);
  $('.panel').replaceChildren(head, where, ...predictions(answer), ...inUse(answer));
  $('.panel').scrollTop = 0;
  markChosen();
}

function predictions({ outputs, rest, follows }) {
  const head = make('h4', '', 'What comes next'), table = make('table'), body = make('tbody'), top = make('tr');
  top.append(make('th', '', 'token'), make('th', '', 'masked'), make('th', '', 'target'));
  top.title = 'masked: with the importances as masks; target: the network itself. Tokens that are likely when masked';
  for (const output of outputs) {
    const row = make('tr', output.next ? 'follows' : ''), word = make('td');
    word.append(...written(output.token));
    if (output.next) word.append(' ✓');
    row.append(word, make('td', '', percent(output.ci)), make('td', '', percent(output.target)));
    body.append(row);
  }
  const others = make('tr', 'others');
  others.append(make('td', '', 'others'), make('td', '', percent(rest[0])), make('td', '', percent(rest[1])));
  body.append(others);
  table.append(top, body);
  if (follows !== null) { const told = make('small'); told.append('follows: ', ...written(follows)); head.append(told); }
  return [head, table];
}

function inUse({ components, count }) {
  const head = make('h4', '', 'In use here');
  head.append(make('small', '', count ? `${components.length < count ? `${components.length} of ` : ''}${count} components` : 'none'));
  return [head, ...components.map(({ layer, component, importance, activation }) => {
    const button = make('button', 'end');
    button.append(named('span', '', `${layer}:${component}`, NAME_IN_PANEL), make('span', 'value', number(importance)), meter(importance, 1));
    button.title = `${layer}:${component}, importance ${number(importance)}, activation ${number(activation)}: color the text by it`;
    button.dataset.name = `${layer}:${component}`;
    button.addEventListener('click', () => load(layer, component));
    return button;
  })];
}

function markChosen() {
  const name = page && `${page.layer}:${page.component}`;
  element.querySelectorAll('.end').forEach((button) => button.classList.toggle('chosen', button.dataset.name === name));
}

function unpin() {
  askedPlace++;
  if (pinned && pinned.span) pinned.span.classList.remove('pinned');
  pinned = null;
  $('.panel').replaceChildren(make('p', 'hint', 'The darker a token, the more the chosen component is needed there. Click a token to see which components are in use at it, and what the model expects next: under their importances as masks, and unmasked.'));
}

// ---- the text -------------------------------------------------------------------------------------------------

const gap = () => ($('.texts').classList.contains('apart') ? ' ' : '');

function fillTexts() {
  const prompts = props.value.prompts;
  numbers = new Map(prompts.map(({ id }, k) => [id, k]));
  $('.texts').classList.toggle('apart', !prompts.some(({ tokens }) => tokens.some((token) => /\s/.test(token))));
  spans = [];
  rows = prompts.map(({ source, tokens }, k) => {
    const row = make('div', 'text'), label = make('b', '', source), body = make('div');
    label.title = source;
    spans.push(tokens.map((token, pos) => {
      const span = make('span', 'token');
      span.append(...written(token, true));
      span.at = [k, pos];
      return span;
    }));
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
    const text = prompts[k].text ?? prompts[k].tokens.join('');  // characters that several tokens share are whole in text
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
  const [held, pos] = span.at, list = make('dl', 'facts'), word = make('div', 'name');
  const fact = (name, value) => list.append(make('dt', '', name), make('dd', '', value));
  word.append(...written(props.value.prompts[held].tokens[pos]));
  fact('position', pos);
  if (span.values) { fact('importance', number(span.values.importance)); fact('activation', number(span.values.activation)); }
  else fact('importance', `${props.value.threshold ? `≤ ${number(props.value.threshold)}` : '0'}`);
  tip.replaceChildren(word, list);
  const frame = $('.frame').getBoundingClientRect(), box = span.getClientRects()[0];
  const below = box.bottom - frame.top + 8, above = box.top - frame.top - tip.offsetHeight - 8;
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
  const value = props.value || {}, prompts = value.prompts || [];
  unpin();
  page = null;
  $('.tip').hidden = true;
  show(value.problem);
  $('.spd-widget').classList.toggle('blank', !prompts.length);
  if (!prompts.length) { asked++; return; }
  $('.layer').replaceChildren(...value.layers.map((layer) => { const option = named('option', '', layer); option.value = layer; return option; }));
  $('.find').value = '';
  fillTexts();
  find();
  await load(null, null);
  if (page && page.top.length && !pinned) pin(page.top[0].prompt, page.top[0].pos, true);
}

$('.layer').addEventListener('change', () => load(layerNow(), null));
$('.component').addEventListener('change', () => load(layerNow(), Number($('.component').value)));
element.querySelectorAll('.step').forEach((button) => button.addEventListener('click', () => {
  $('.component').selectedIndex += Number(button.dataset.step);
  load(layerNow(), Number($('.component').value));
}));
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
  if (by) { event.preventDefault(); step(by); }
});
let seenWidth = 0;
new ResizeObserver(() => {
  const width = $('.texts').clientWidth;
  if (width && !seenWidth) reveal();
  seenWidth = width;
}).observe($('.texts'));
watch('value', open);
open();
