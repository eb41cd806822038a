// What is loaded, and loading another model, with its progress.

import {element, find} from './dom.js';
import {ask, tell} from './server.js';
import {explain, name, say, t} from './words.js';

const QUANTS = {auto: t('automatic'), none: t('as stored')};
let state = null;

export function setUp(shared) {
  state = shared;
}

/** Asks what is loaded; also when another model took its place. */
export async function refresh() {
  const about = await ask('/model', undefined, 'GET').catch(() => null);
  if (!about) return;
  state.model = about;
  find('#open-model').textContent = about.name;
  name(find('#open-model'), t('The model: {name}', about));
  draw();
}

function draw() {
  const about = state.model, body = find('#model .sheet-body');
  const source = element('input', {id: 'source', autocomplete: 'off', spellcheck: 'false', list: 'known-models', placeholder: 'zai-org/GLM-4-9B-0414'});
  const quant = element('select', {id: 'quant'}, ...about.quants.map(name => element('option', {value: name}, QUANTS[name] ?? name)));
  const form = element('form', {id: 'load', on: {submit: event => {
    event.preventDefault();
    load(source.value, quant.value);
  }}},
    element('div', {class: 'field'}, element('label', {for: 'source'}, t('Another model')), source, element('p', {class: 'about'}, t('nano, a folder, or a repository of the Hugging Face Hub.'))),
    element('div', {class: 'field'}, element('label', {for: 'quant'}, t('Weights')), quant),
    element('datalist', {id: 'known-models'}, ...about.known.map(name => element('option', {value: name}))),
    element('div', {class: 'buttons'}, element('button', {type: 'submit', class: 'main'}, t('Load')),
      element('button', {type: 'button', class: 'plain', id: 'plan', on: {click: () => plan(source.value, quant.value)}}, t('Will it fit?'))));
  body.replaceChildren(table(about.facts, 'facts'), form, element('div', {id: 'load-progress', role: 'status'}));
  progress(about);
}

const table = (rows, id) => element('table', {id, class: 'facts'}, element('tbody', {}, ...rows.map(([name, value]) =>
  element('tr', {}, element('th', {scope: 'row'}, say(name)), element('td', {}, say(value))))));

async function load(source, quant) {
  find('#load-progress').replaceChildren();
  await ask('/model/load', {source, quant}).catch(problem => refused(source, problem));
}

/** What the model would take here, before it is loaded. */
async function plan(source, quant) {
  find('#load-progress').replaceChildren(element('p', {class: 'note'}, t('Looking at the model…')));
  const lines = await ask('/model/plan', {source, quant}).catch(problem => refused(source, problem));
  if (lines) find('#load-progress').replaceChildren(table(lines, 'planned'));
}

function refused(source, problem) {
  const said = problem.message.includes(source) ? problem.message : `${source}: ${problem.message}`;
  find('#load-progress').replaceChildren(element('p', {class: 'note problem'}, said));
}

/** A load goes on, or is over. */
export function hear(message) {
  if (message.loading) progress(message);
  else refresh();
}

function progress({loading, ended}) {
  const place = find('#load-progress');
  if (!place) return;
  find('#load button[type=submit]').disabled = Boolean(loading);
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
