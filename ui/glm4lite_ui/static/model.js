// What is loaded, and loading another model, with its progress.

import {element, find} from './dom.js';
import {ask, tell} from './server.js';
import {name, t} from './words.js';

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
  name(find('#open-model'), `${t('The model')}: ${about.name}`);
  draw();
}

function draw() {
  const about = state.model, body = find('#model .sheet-body');
  const rows = about.facts.map(([name, value]) => element('tr', {}, element('th', {scope: 'row'}, t(name)), element('td', {}, value)));
  const source = element('input', {id: 'source', autocomplete: 'off', spellcheck: 'false', list: 'known-models', placeholder: 'zai-org/GLM-4-9B-0414'});
  const quant = element('select', {id: 'quant'}, ...about.quants.map(name => element('option', {value: name}, name)));
  const form = element('form', {id: 'load', on: {submit: event => {
    event.preventDefault();
    load(source.value, quant.value);
  }}},
    element('div', {class: 'field'}, element('label', {for: 'source'}, t('Another model')), source, element('p', {class: 'about'}, t('nano, a folder, or a repository of the Hugging Face Hub.'))),
    element('div', {class: 'field'}, element('label', {for: 'quant'}, t('Weights')), quant),
    element('button', {type: 'submit', class: 'main'}, t('Load')));
  body.replaceChildren(element('table', {id: 'facts'}, element('tbody', {}, ...rows)), form, element('div', {id: 'load-progress', role: 'status'}));
  progress(about);
}

async function load(source, quant) {
  find('#load-progress').replaceChildren();
  try {
    await ask('/model/load', {source, quant});
  } catch (problem) {
    find('#load-progress').replaceChildren(element('p', {class: 'note problem'}, problem.message.includes(source) ? problem.message : `${source}: ${problem.message}`));
  }
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
    place.replaceChildren(ended ? element('p', {class: 'note'}, ended) : '');
    return;
  }
  const left = loading.left == null ? '' : t('{seconds} s left', {seconds: loading.left});
  place.replaceChildren(
    element('p', {}, loading.stage ? `${t(loading.stage)} · ${loading.said}${left && ' · ' + left}` : t('Waiting for the engine…')),
    element('progress', {'aria-label': t('Loading {source}', loading), max: 1, ...(loading.share == null ? {} : {value: loading.share})}),
    element('button', {type: 'button', class: 'plain', on: {click: () => tell('/model/cancel')}}, t('Cancel')));
}
