// What is loaded, and loading another model, with its progress.

import {element, find} from './dom.js';
import {ask, tell} from './server.js';
import {refresh as refreshTools} from './tools.js';
import {explain, name, say, t} from './words.js';

const QUANTS = {auto: t('automatic'), none: t('as stored')};
let state = null, said = 'null';

export function setUp(shared) {
  state = shared;
}

/** Asks what is loaded; also when another model took its place. */
export async function refresh() {
  const about = await ask('/model', undefined, 'GET').catch(() => null);
  if (!about) return;
  state.model = about;
  const called = about.loaded ? about.name : t('No model');
  find('#open-model').textContent = called;
  name(find('#open-model'), t('The model: {name}', {name: called}));
  draw();
  offer();
}

/** Where none is loaded, the composer says so and offers the last one. */
function offer() {
  const {loaded, loading} = state.model, place = find('#no-model');
  place.hidden = loaded;
  if (loaded) return place.replaceChildren();
  const share = loading?.share == null ? '' : ` ${Math.round(loading.share * 100)} %`;
  place.replaceChildren(element('span', {}, loading ? t('Loading {source}', loading) + share : t('No model is loaded. What you write stays here until one is.')), loading ? '' : again());
}

/** A button that loads the last model as it was. */
function again() {
  const {source, quant, lora, name} = state.model;
  return element('button', {type: 'button', class: 'plain again', on: {click: () => tell('/model/load', {source, quant, lora})}}, t('Load {name} again', {name}));
}

/** What is loaded is drawn anew; what was typed, and what was said about it, stays. */
function draw() {
  const about = state.model, unload = element('button', {type: 'button', class: 'plain', id: 'unload', 'aria-describedby': 'about-unload', on: {click: () => tell('/model/unload')}}, t('Unload'));
  if (!find('#load')) find('#model .sheet-body').append(element('div', {id: 'now'}), form(), element('div', {id: 'load-progress', role: 'status'}));
  const focused = find('#now').contains(document.activeElement);
  find('#now').replaceChildren(...about.loaded
    ? [table(about.facts, 'facts'), element('div', {class: 'buttons'}, unload), element('p', {class: 'about', id: 'about-unload'}, t('Gives the memory back. Until a model is loaded again, no message is sent.'))]
    : [element('p', {id: 'unloaded'}, t('No model is loaded. What you write stays here until one is.')), element('div', {class: 'buttons'}, again())]);
  if (focused) find('#now button').focus();
  find('#known-models').replaceChildren(...about.known.map(name => element('option', {value: name})));
  const ended = JSON.stringify(about.ended);
  if (about.loading || ended !== said) progress(about);
  said = about.loading ? null : ended;
}

/** Another model. */
function form() {
  const source = element('input', {id: 'source', autocomplete: 'off', spellcheck: 'false', list: 'known-models', placeholder: 'zai-org/GLM-4-9B-0414'});
  const quant = element('select', {id: 'quant'}, ...state.model.quants.map(name => element('option', {value: name}, QUANTS[name] ?? name)));
  const lora = element('textarea', {id: 'lora', rows: 1, autocomplete: 'off', spellcheck: 'false', 'aria-describedby': 'about-lora'});
  return element('form', {id: 'load', on: {submit: event => {
    event.preventDefault();
    load(source.value, quant.value, lora.value.split('\n'));
  }}},
    element('div', {class: 'field'}, element('label', {for: 'source'}, t('Another model')), source, element('p', {class: 'about'}, t('nano, a folder, or a repository of the Hugging Face Hub.'))),
    element('div', {class: 'field'}, element('label', {for: 'quant'}, t('Weights')), quant),
    element('div', {class: 'field'}, element('label', {for: 'lora'}, t('Adapters')), lora, element('p', {class: 'about', id: 'about-lora'}, t('LoRA adapters of that model, one a line: folders or repositories, with =0.5 behind one for half of it.'))),
    element('datalist', {id: 'known-models'}),
    element('div', {class: 'buttons'}, element('button', {type: 'submit', class: 'main'}, t('Load')),
      element('button', {type: 'button', class: 'plain', id: 'plan', on: {click: () => plan(source.value, quant.value, lora.value.split('\n'))}}, t('Will it fit?'))));
}

const table = (rows, id) => element('table', {id, class: 'facts'}, element('tbody', {}, ...rows.map(([name, value]) =>
  element('tr', {}, element('th', {scope: 'row'}, say(name)), element('td', {}, say(value))))));

async function load(source, quant, lora) {
  find('#load-progress').replaceChildren();
  await ask('/model/load', {source, quant, lora}).catch(problem => refused(source, problem));
}

/** What the model would take here, before it is loaded. */
async function plan(source, quant, lora) {
  find('#load-progress').replaceChildren(element('p', {class: 'note'}, t('Looking at the model…')));
  const lines = await ask('/model/plan', {source, quant, lora}).catch(problem => refused(source, problem));
  if (lines) find('#load-progress').replaceChildren(table(lines, 'planned'));
}

function refused(source, problem) {
  const said = problem.message.includes(source) ? problem.message : `${source}: ${problem.message}`;
  find('#load-progress').replaceChildren(element('p', {class: 'note problem'}, said));
}

/** A load goes on, or is over. */
export async function hear(message) {
  if (!message.loading) {
    refreshTools();  // another model's template may have no place for them
    return refresh();
  }
  said = null;
  Object.assign(state.model ?? {}, {loading: message.loading});
  progress(message);
  if (state.model) offer();
}

function progress({loading, ended}) {
  const place = find('#load-progress');
  if (!place) return;
  for (const button of document.querySelectorAll('#load button[type=submit], #unload, #model .again')) button.disabled = Boolean(loading);
  if (!loading) {
    place.replaceChildren(ended ? element('p', {class: 'note'}, explain(ended)) : '');
    return;
  }
  const left = loading.left == null ? '' : t('{seconds} s left', {seconds: loading.left});
  place.replaceChildren(
    element('p', {}, loading.stage ? `${t(loading.stage)} · ${loading.said}${left && ' · ' + left}` : t('Waiting for the engine…')),
    element('progress', {'aria-label': t('Loading {source}', loading), max: 1, ...(loading.share == null ? {} : {value: loading.share})}),
    element('button', {type: 'button', class: 'plain', on: {click: () => tell('/model/cancel')}}, t('Cancel')));
}
