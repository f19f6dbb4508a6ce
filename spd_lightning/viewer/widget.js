// Shared by the interactive pages: elements, numbers, tokens as text, requests to the server. This
// file is put before the page's own script, as the body of gr.HTML's js_on_load. Anything from a
// prompt becomes text, never markup.

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
  if (size === 0) return '0';
  const scientific = size >= 1e5 || size < 1e-4;
  const text = scientific ? value.toExponential(1) : String(Number(value.toPrecision(3)));
  return text.replaceAll('-', '−');
};

// Shortens a long name in its middle, since both ends tell modules apart. `panel.shortened` does the
// same.
const NAME = 34,
  NAME_IN_PANEL = 28;
const shortened = (text, most = NAME) => {
  const letters = [...text];
  if (letters.length <= most) return text;
  const end = Math.floor((most * 3) / 7);
  return `${letters.slice(0, most - 1 - end).join('')}…${letters.slice(-end).join('')}`;
};

// An element that shows a name; if shortened, the full name is its title.
const named = (tag, className, text, most = NAME) => {
  const made = make(tag, className, shortened(text, most));
  if (made.textContent !== text) made.title = text;
  return made;
};

function meter(value, largest) {
  const track = make('span', 'meter'),
    fill = make('i', value >= 0 ? 'plus' : 'minus');
  fill.style.width = `${(100 * Math.abs(value)) / (largest || 1)}%`;
  track.append(fill);
  return track;
}

// ---- tokens ---------------------------------------------------------------------------------------------------

const GLYPHS = { ' ': '·', '\n': '↵', '\t': '→', '\r': '␍' };
// Control characters, and others that would turn or hide the text around them: direction marks,
// characters of width zero, and line separators.
const BLANK =
  /([ \u0000-\u001f\u007f-\u009f\u00a0\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff])/;
const glyph = (character) =>
  GLYPHS[character] || `\\u${character.codePointAt(0).toString(16).padStart(4, '0')}`;

// A token as plain text in which blanks are visible.
const glyphs = (token) => {
  if (token === '') return '∅';
  return token
    .split(BLANK)
    .map((part) => (BLANK.test(part) ? glyph(part) : part))
    .join('');
};

// A token as DOM nodes: the text itself, with a faint glyph over each blank. With `breaks`, line
// breaks in the token are kept.
function written(token, breaks = false) {
  if (token === '') return [make('i', 'blank', '∅')];
  return token
    .split(BLANK)
    .filter((part) => part !== '')
    .map((part) => {
      if (!BLANK.test(part)) return document.createTextNode(part);
      const isKept = part === ' ' || (breaks && part === '\n');
      const shown = make('i', part === ' ' ? 'blank space' : 'blank', isKept ? part : '');
      shown.dataset.glyph = glyph(part);
      return shown;
    });
}

// ---- requests to the server -----------------------------------------------------------------------------------

async function send(name, request) {
  try {
    return await server[name](request);
  } catch (error) {
    return {
      problem: 'The viewer does not respond. Is the process that serves this page still running?',
    };
  }
}

function show(problem) {
  $('.problem').hidden = !problem;
  $('.problem').textContent = problem || '';
}
