// What the interactive pages share: elements, numbers, tokens as text, questions to the server. It stands before the page's
// own script, as the body of gr.HTML's js_on_load. Whatever comes from a prompt becomes text, never markup.

const $ = (selector) => element.querySelector(selector);
const make = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};
const number = (value) => {
  if (value === null || value === undefined) return '–';
  const size = Math.abs(value);
  const text = size === 0 ? '0' : size >= 1e5 || size < 1e-4 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
  return text.replaceAll('-', '−');
};

// A name that fits: a long one loses its middle, since both ends tell modules apart; `panel.shortened` does the same.
const NAME = 34, NAME_IN_PANEL = 28;
const shortened = (text, most = NAME) => {
  const letters = [...text];
  if (letters.length <= most) return text;
  const end = Math.floor((most * 3) / 7);
  return `${letters.slice(0, most - 1 - end).join('')}…${letters.slice(-end).join('')}`;
};

// An element with a name in it, and the whole name as its title where it was shortened.
const named = (tag, className, text, most = NAME) => {
  const made = make(tag, className, shortened(text, most));
  if (made.textContent !== text) made.title = text;
  return made;
};

function meter(value, largest) {
  const track = make('span', 'meter'), fill = make('i', value >= 0 ? 'plus' : 'minus');
  fill.style.width = `${(100 * Math.abs(value)) / (largest || 1)}%`;
  track.append(fill);
  return track;
}

// ---- tokens ---------------------------------------------------------------------------------------------------

const GLYPHS = { ' ': '·', '\n': '↵', '\t': '→', '\r': '␍' };
// Controls, and what would turn or hide the text around it: marks of direction, of width zero, of lines.
const BLANK = /([ \u0000-\u001f\u007f-\u009f\u00a0\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff])/;
const glyph = (character) => GLYPHS[character] || `\\u${character.codePointAt(0).toString(16).padStart(4, '0')}`;

// A token as plain text in which blanks are visible.
const glyphs = (token) => (token === '' ? '∅' : token.split(BLANK).map((part) => (BLANK.test(part) ? glyph(part) : part)).join(''));

// A token as nodes: the text as it is, each blank with a faint glyph over it. With `breaks`, lines end where the text's do.
function written(token, breaks = false) {
  if (token === '') return [make('i', 'blank', '∅')];
  return token.split(BLANK).filter((part) => part !== '').map((part) => {
    if (!BLANK.test(part)) return document.createTextNode(part);
    const shown = make('i', part === ' ' ? 'blank space' : 'blank', part === ' ' || (breaks && part === '\n') ? part : '');
    shown.dataset.glyph = glyph(part);
    return shown;
  });
}

// ---- asking the server ----------------------------------------------------------------------------------------

async function ask(name, question) {
  try {
    return await server[name](question);
  } catch (error) {
    return { problem: 'The viewer does not answer; is the process that serves this page still running?' };
  }
}

function show(problem) {
  $('.problem').hidden = !problem;
  $('.problem').textContent = problem || '';
}

