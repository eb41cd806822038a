// How this chat is answered. What is typed is sent when nothing more was typed for a moment, all fields at once, and
// one after the other: nothing that was typed is lost, whatever the server is doing.

import {element, find, iconButton} from './dom.js';
import {ask, tell} from './server.js';
import {language, say, t} from './words.js';

const PAUSE_MS = 250;
const FIELDS = [
  ['temperature', 'Temperature', 'How freely words are chosen; 0 always takes the likeliest.', 0.1],
  ['top_p', 'Top-p', 'Only the likeliest words that together have this probability.', 0.05],
  ['top_k', 'Top-k', 'Only this many of the likeliest words; 0 is no limit.', 1],
  ['min_p', 'Min-p', 'Only words at least this likely beside the likeliest one.', 0.05],
  ['repetition_penalty', 'Repetition penalty', 'Above 1, words that were said become less likely.', 0.05],
  ['max_new_tokens', 'Max tokens', 'The longest answer; empty is what the context leaves.', 1],
  ['seed', 'Seed', 'The same seed gives the same answer; empty is another one each time.', 1],
];
let state = null, kept = {}, pending = null, timer = 0, running = false;
const inputs = new Map();

export function setUp(shared) {
  state = shared;
}

/** Draws the sheet, once it is known which tools there are. */
export function build() {
  const body = find('#settings .sheet-body');
  body.replaceChildren();
  inputs.clear();
  const system = element('textarea', {id: 'system', rows: 4, 'aria-describedby': 'about-system'});
  body.append(presets());
  body.append(field('system', t('System prompt'), t('What the model is told before the conversation.'), system));
  for (const [name, label, about, step] of FIELDS) {
    const own = state.model.own[name];
    const input = element('input', {id: name, inputmode: step === 1 ? 'numeric' : 'decimal', autocomplete: 'off', placeholder: own ?? (name === 'seed' ? t('random') : t('what is left'))});
    body.append(field(name, t(label), t(about), input));
  }
  body.append(field('stop', t('Stop at'), t('Texts that end the answer, one a line.'), element('textarea', {id: 'stop-texts', rows: 2})));
  if (state.model.tools.length) body.append(toolList());
  body.append(forgetButton(), exports(), pageChoices());
  fill();
}

/** Settings under a name, and those of new chats. */
function presets() {
  const choose = element('select', {id: 'preset', on: {change: () => apply(choose.value)}});
  const list = async () => {
    const {presets} = await ask('/preferences', undefined, 'GET').catch(() => ({presets: {}}));
    kept = presets;
    choose.replaceChildren(element('option', {value: ''}, t('Choose…')), ...Object.keys(presets).map(name => element('option', {value: name}, name)));
    remove.hidden = true;
  };
  const keep = async () => {
    const name = prompt(t('Name of the preset'), choose.value);
    if (!name?.trim()) return;
    await save();
    if (await tell('/preferences/presets', {name, settings: state.settings})) await list();
  };
  const apply = name => {
    remove.hidden = !name;
    if (!name) return;
    state.settings = {...kept[name], always: state.settings.always};
    fill();
    pending = {chat: state.chat, settings: state.settings};
    save();
  };
  const button = (label, act, id) => element('button', {type: 'button', class: 'plain', id, on: {click: act}}, label);
  const remove = button(t('Delete preset'), async () => {
    if (await tell(`/preferences/presets?name=${encodeURIComponent(choose.value)}`, undefined, 'DELETE')) await list();
  });
  remove.hidden = true;
  list();
  return element('div', {class: 'field'}, element('label', {for: 'preset'}, t('Preset')), choose,
    element('div', {class: 'buttons'}, button(t('Keep as a preset…'), keep, 'keep-preset'), remove,
      button(t('Use for new chats'), async () => {
        await save();
        if (await tell('/preferences/new_chat', state.settings)) state.toast(t('New chats start with these settings.'), 'done');
      }, 'use-for-new')));
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

function toolList() {
  const groups = new Map();
  for (const tool of state.model.tools) {
    const origin = say(tool.from);
    groups.set(origin, [...groups.get(origin) ?? [], tool]);
  }
  const made = [...groups].map(([origin, tools]) => element('fieldset', {class: 'tools-of'}, element('legend', {}, t('Tools: {origin}', {origin})), ...tools.map(tool => {
    const input = element('input', {type: 'checkbox', name: 'tool', value: tool.name, on: {input: changed}});
    return element('label', {}, input, element('span', {}, element('strong', {}, tool.name), tool.asks ? ` · ${t('asks first')}` : '', element('span', {class: 'about'}, t(tool.about.split('\n', 1)[0]))));
  })));
  return element('div', {}, ...made, state.model.takes_tools ? '' : element('p', {class: 'note'}, t("This model's template has no place for tools.")));
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

/** Shows the chat's settings, unless they are being typed. */
export function fill() {
  if (!inputs.size || pending || running) return;
  const settings = state.settings;
  for (const [name, {input, reset}] of inputs) {
    const value = settings[name];
    const said = name === 'stop' ? (value ?? []).join('\n') : value ?? '';
    if (input.value !== String(said)) input.value = said;
    reset.hidden = value == null || value === '';
  }
  for (const box of document.getElementsByName('tool')) box.checked = !settings.tools || settings.tools.includes(box.value);
  find('#ask-again').hidden = !settings.always?.length;
  find('#export').hidden = !state.saved;
  for (const link of find('#export').querySelectorAll('a')) link.href = `/export/${state.chat}.${link.dataset.kind}`;
}

function changed() {
  const settings = {...state.settings};
  for (const [name, {input, reset}] of inputs) {
    const text = input.value;
    reset.hidden = !text;
    if (name === 'system') settings.system = text;
    else if (name === 'stop') settings.stop = text.split('\n').filter(Boolean).length ? text.split('\n').filter(Boolean) : null;
    else settings[name] = text.trim() === '' ? null : Number(text.trim().replace(',', '.'));
  }
  const boxes = [...document.getElementsByName('tool')], on = boxes.filter(box => box.checked).map(box => box.value);
  settings.tools = on.length === boxes.length ? null : on;
  pending = {chat: state.chat, settings};
  clearTimeout(timer);
  timer = setTimeout(save, PAUSE_MS);
}

/** Sends what is waiting; the next one waits until it was answered. */
export async function save() {
  clearTimeout(timer);
  if (!pending || running) return;
  const {chat, settings} = pending;
  pending = null;
  running = true;
  let problem = null;
  const odd = Object.entries(settings).find(([, value]) => Number.isNaN(value));
  try {
    if (odd) throw Object.assign(new Error(t('{name} must be a number', {name: odd[0]})), {about: odd[0]});
    await ask(`/chats/${chat}/set`, settings);
    if (chat === state.chat) state.settings = {...settings, always: state.settings.always};
  } catch (error) {
    problem = error;
  }
  running = false;
  if (chat === state.chat) showProblem(problem);
  else if (problem) state.toast(problem.message);
  if (pending) await save();
  else if (chat !== state.chat) fill();  // which waited for what was typed in the other chat
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
