// How this chat is answered. What is typed is sent when nothing more was typed for a moment, all fields at once, and
// one after the other: nothing that was typed is lost, whatever the server is doing.

import * as presets from './presets.js';
import * as tools from './tools.js';
import {element, find, iconButton} from './dom.js';
import {ask, exportOf, tell} from './server.js';
import {language, say, t} from './words.js';

const PAUSE_MS = 250;
const FIELDS = [
  ['temperature', 'Temperature', 'How freely words are chosen; 0 always takes the likeliest.', 0.1],
  ['top_p', 'Top-p', 'Only the likeliest words that together have this probability.', 0.05],
  ['top_k', 'Top-k', 'Only this many of the likeliest words; 0 is no limit.', 1],
  ['min_p', 'Min-p', 'Only words at least this likely beside the likeliest one.', 0.05],
  ['repetition_penalty', 'Repetition penalty', 'Above 1, words that were said become less likely.', 0.05],
  ['frequency_penalty', 'Frequency penalty', 'From -2 to 2: the more often a word came, the less likely it is.', 0.1],
  ['presence_penalty', 'Presence penalty', 'From -2 to 2: words that came become less likely, however often.', 0.1],
  ['max_new_tokens', 'Max tokens', 'The longest answer, its thought included; empty is what the context leaves.', 1],
  ['thinking_budget', 'Thinking budget', 'The longest thought, in tokens; 0 is none, empty is no limit.', 1],
  ['seed', 'Seed', 'The same seed gives the same answer; empty is another one each time.', 1],
];
let state = null, pending = null, timer = 0, running = null;
const UNSET = {seed: t('random'), max_new_tokens: t('what is left'), thinking_budget: t('no limit')};
const inputs = new Map();

export function setUp(shared) {
  state = shared;
  addEventListener('pagehide', () => save(true));
}

/** Draws the sheet, once it is known which tools there are. */
export function build() {
  const body = find('#settings .sheet-body');
  body.replaceChildren();
  inputs.clear();
  const system = element('textarea', {id: 'system', rows: 4, 'aria-describedby': 'about-system'});
  body.append(presetField());
  body.append(field('system', t('System prompt'), t('What the model is told before the conversation.'), system));
  for (const [name, label, about, step] of FIELDS) {
    body.append(field(name, t(label), t(about), element('input', {id: name, inputmode: step === 1 ? 'numeric' : 'decimal', autocomplete: 'off'})));
  }
  body.append(field('schema', t('Answer schema'), t('A JSON schema that every answer follows; empty is text.'), element('textarea', {id: 'answer-schema', rows: 3, spellcheck: false})));
  body.append(field('stop', t('Stop at'), t('Texts that end the answer, one a line.'), element('textarea', {id: 'stop-texts', rows: 2})));
  body.append(tools.section(change => {
    state.settings = {...state.settings, ...change};
    changed();
  }), forgetButton(), exports(), pageChoices());
  tools.refresh();
  showOwn();
  fill();
}

/** What the model takes where nothing is set, which another model changes. */
export function showOwn() {
  for (const [name, , about] of inputs.size ? FIELDS : []) {
    find('#' + name).placeholder = state.model.own[name] ?? UNSET[name] ?? '';
    const idle = name === 'thinking_budget' && !state.model.thinks;
    find(`#about-${name}`).textContent = idle ? t('This model does not think, so this changes nothing.') : t(about);
  }
}

/** Settings under a name, and those of new chats. */
function presetField() {
  const choose = element('select', {id: 'preset', on: {change: () => {
    remove.hidden = !choose.value;
    if (choose.value) presets.apply(choose.value);
  }}});
  const button = (label, act, id) => element('button', {type: 'button', class: 'plain', id, on: {click: act}}, label);
  const remove = button(t('Delete preset'), () => presets.remove(choose.value));
  presets.connect(use, save, () => {
    choose.replaceChildren(element('option', {value: ''}, t('Choose…')), ...Object.keys(presets.kept).map(name => element('option', {value: name}, name)));
    remove.hidden = true;
    presets.fill();
  });
  presets.refresh();
  return element('div', {class: 'field'}, element('label', {for: 'preset'}, t('Preset')), choose,
    element('div', {class: 'buttons'}, button(t('Keep as a preset…'), () => presets.keep(choose.value), 'keep-preset'), remove,
      button(t('Use for new chats'), async () => {
        await save();
        if (await tell('/preferences/new_chat', state.settings)) state.toast(t('New chats start with these settings.'), 'done');
      }, 'use-for-new')));
}

/** Takes over settings in place of this chat's; what was allowed in it stays. */
function use(settings) {
  state.settings = {system: '', tools: null, ...settings, always: state.settings.always};
  pending = {chat: state.chat, settings: state.settings};
  show();
  save();
}

function field(name, label, about, input) {
  const reset = iconButton('reset', t('Reset {name}', {name: label}), () => {
    input.value = '';
    changed();
    input.focus();
  }, {class: 'icon reset', hidden: true});
  input.setAttribute('aria-describedby', `about-${name}`);
  input.addEventListener('input', changed);
  inputs.set(name, {input, reset});
  return element('div', {class: 'field', 'data-field': name},
    element('label', {for: input.id}, label), reset, input,
    element('p', {class: 'about', id: `about-${name}`}, about), element('p', {class: 'wrong', role: 'alert', hidden: true}));
}

function forgetButton() {
  return element('button', {type: 'button', id: 'ask-again', class: 'plain', hidden: true, on: {click: () => tell(`/chats/${state.chat}/ask_again`)}}, t('Ask again before every tool'));
}

function exports() {
  return element('p', {id: 'export', hidden: true}, t('Export: '), element('a', {'data-kind': 'md', download: true}, 'Markdown'), ' · ', element('a', {'data-kind': 'json', download: true}, 'JSON'));
}

/** What is this browser's, and no chat's. */
function pageChoices() {
  const choose = (id, label, options, value, change) => {
    const select = element('select', {id, on: {change: event => change(event.target.value)}}, ...options.map(([key, said]) => element('option', {value: key}, said)));
    select.value = value;
    return element('div', {class: 'field'}, element('label', {for: id}, label), select);
  };
  return element('fieldset', {class: 'page-choices'}, element('legend', {}, t('This page')),
    choose('theme', t('Colours'), [['', t("The system's")], ['light', t('Light')], ['dark', t('Dark')]], localStorage.getItem('theme') ?? '', value => {
      localStorage.setItem('theme', value);
      state.colour();
    }),
    choose('language', t('Language'), [['en', 'English'], ['zh', '中文']], language, value => {
      localStorage.setItem('language', value);
      location.reload();
    }));
}

/** Whether something was chosen here that the server has not got yet. */
export const waiting = () => Boolean(pending || running);

/** Shows the chat's settings, unless they are being typed. */
export function fill() {
  if (inputs.size && !waiting()) show();
}

function show() {
  const settings = state.settings;
  for (const [name, {input, reset}] of inputs) {
    const value = settings[name];
    if (name === 'schema' && isSchema(input.value, value)) continue;  // as it was typed
    const said = name === 'stop' ? (value ?? []).join('\n') : name === 'schema' ? value ? JSON.stringify(value, null, 2) : '' : value ?? '';
    if (input.value !== String(said)) input.value = said;
    reset.hidden = value == null || value === '';
  }
  tools.fill();
  presets.fill();
  find('#ask-again').hidden = !settings.always?.length;
  find('#export').hidden = !state.saved;
  for (const link of find('#export').querySelectorAll('a')) link.href = exportOf(state.chat, link.dataset.kind);
}

function changed() {
  const settings = {...state.settings};
  for (const [name, {input, reset}] of inputs) {
    const text = input.value;
    reset.hidden = !text;
    if (name === 'system') settings.system = text;
    else if (name === 'stop') settings.stop = text.split('\n').filter(Boolean).length ? text.split('\n').filter(Boolean) : null;
    else if (name === 'schema') settings.schema = schemaOf(text);
    else settings[name] = text.trim() === '' ? null : Number(text.trim().replace(',', '.'));
  }
  pending = {chat: state.chat, settings};
  clearTimeout(timer);
  timer = setTimeout(save, PAUSE_MS);
}

/** A schema as it was typed; NaN, which is refused as a number's is, where that is no JSON object. */
function schemaOf(text) {
  if (!text.trim()) return null;
  try {
    const found = JSON.parse(text);
    return found && typeof found === 'object' && !Array.isArray(found) ? found : NaN;
  } catch {
    return NaN;
  }
}

const isSchema = (text, value) => JSON.stringify(schemaOf(text)) === JSON.stringify(value ?? null) && !Number.isNaN(schemaOf(text));

/** Sends what is waiting, and ends when all was answered; one waits for the other, unless the page is being left. */
export async function save(leaving = false) {
  clearTimeout(timer);
  while (running && !leaving) await running;
  if (!pending) return;
  const {chat, settings} = pending;
  pending = null;
  let answered = null;
  running = new Promise(resolve => { answered = resolve; });
  let problem = null;
  const odd = Object.entries(settings).find(([, value]) => Number.isNaN(value));
  try {
    if (odd) throw Object.assign(new Error(odd[0] === 'schema' ? t('This is no JSON object.') : t('{name} must be a number', {name: odd[0]})), {about: odd[0]});
    await ask(`/chats/${chat}/set`, settings, 'POST', leaving);
    if (chat === state.chat) state.settings = {...settings, always: state.settings.always};
  } catch (error) {
    problem = error;
  }
  running = null;
  answered();
  if (chat === state.chat) showProblem(problem);
  else if (problem) state.toast(problem.message);
  if (pending) await save();
  else if (chat === state.chat) presets.fill();
  else fill();  // which waited for what was typed in the other chat
}

function showProblem(problem) {
  for (const box of document.querySelectorAll('#settings .field')) {
    const mine = problem?.about === box.dataset.field, wrong = box.querySelector('.wrong');
    if (!wrong) continue;
    wrong.hidden = !mine;
    wrong.textContent = mine ? problem.message : '';
    inputs.get(box.dataset.field).input.toggleAttribute('aria-invalid', mine);
  }
  if (problem && !find('#settings .wrong:not([hidden])')) state.toast(problem.message);
}
