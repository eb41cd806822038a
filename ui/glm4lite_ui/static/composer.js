// Where a message is written: text, files, a message that is changed; and the one line of status below it.

import {element, find, iconButton, isTouched, toast} from './dom.js';
import {ask, tell} from './server.js';
import {lastTurn, toEnd} from './thread.js';
import {count, say, t} from './words.js';

const BEACON = 15000;  // characters that a browser sends for sure when the page is left
const LONG_PASTE = 2000;  // characters from which on pasted text becomes a file
let state = null, files = [], editing = null, beforeEditing = '', reading = 0, sending = false, pasted = 0;

export function setUp(shared) {
  state = shared;
  const message = find('#message');
  message.addEventListener('input', () => { fit(); keepDraft(); });
  message.addEventListener('keydown', keys);
  message.addEventListener('paste', paste);
  find('#composer').addEventListener('submit', event => { event.preventDefault(); submit(); });
  find('#stop').addEventListener('click', stop);
  find('#attach').addEventListener('click', () => find('#files').click());
  find('#files').addEventListener('change', event => { addFiles(event.target.files); event.target.value = ''; write(); });
  find('#stop-editing').addEventListener('click', stopEditing);
  dropping();
  addEventListener('pagehide', saveDraft);
}

/** The message is what is typed next, unless a phone's keyboard would come up. */
export function write() {
  if (!isTouched()) find('#message').focus();
}

function keys(event) {
  if (event.isComposing) return;
  if (event.key === 'Enter' && !event.shiftKey) {
    event.preventDefault();
    submit();
  } else if (event.key === 'ArrowUp' && !event.target.value && !editing && lastTurn() && !state.answering) {
    event.preventDefault();
    edit(lastTurn());
  }
}

export const isEditing = () => Boolean(editing);
export const stop = () => { if (state.answering) tell(`/chats/${state.chat}/stop`); };

export async function submit() {
  const text = find('#message').value.trim();
  if ((!text && !files.length) || sending) return;
  if (state.answering) return toast(t('This chat is being answered; stop that first.'));
  if (state.model && !state.model.loaded) return toast(t('No model is loaded. What you write stays here until one is.'));
  if (reading) return toast(t('A file is still being read.'));
  if (files.some(file => file.problem)) files = files.filter(file => !file.problem);
  const sent = files.map(({reading, problem, ...file}) => file);
  const chat = state.chat;
  sending = true;
  const done = editing
    ? await tell(`/chats/${state.chat}/turns/${editing.id}/edit`, {text, files: sent})
    : await tell(`/chats/${state.chat}/send`, {text, files: sent, title: state.title});
  sending = false;
  if (!done) return;
  if (state.chat !== chat) return;  // another one was opened meanwhile
  draftOf = null;
  clearTimeout(draftTimer);
  if (localStorage.getItem('unsent') === chat) localStorage.removeItem('unsent');
  set(editing ? beforeEditing : '');
  editing = null;
  find('#editing').hidden = true;
  toEnd();
}

/** Sends a text, whatever stands in the field. */
export async function send(text) {
  await tell(`/chats/${state.chat}/send`, {text, title: state.title});
}

/** Puts a message into the field, to be changed. */
export function edit(turn) {
  if (!editing) beforeEditing = find('#message').value;
  editing = turn;
  find('#editing').hidden = false;
  set(turn.meta.user);
  find('#message').focus();
}

export function stopEditing() {
  if (!editing) return;
  editing = null;
  find('#editing').hidden = true;
  set(beforeEditing);
  find('#message').focus();
}

/** Another chat is shown; its draft comes with its first message. */
export function changed() {
  saveDraft();
  editing = null;
  find('#editing').hidden = true;
  set('');
}

function set(text) {
  files = [];
  drawChips();
  find('#message').value = text;
  fit();
}

function fit() {
  const message = find('#message');
  message.style.height = 'auto';
  message.style.height = Math.min(message.scrollHeight + 2, innerHeight / 3) + 'px';
}

// What was written and not sent is kept by the server, until it is; of a chat that is not saved yet the browser keeps
// the name, so that the next new chat is that one.

let draftTimer = 0, draftOf = null;

function keepDraft() {
  if (editing) return;
  const chat = state.chat, text = find('#message').value;
  if (draftOf && draftOf.chat !== chat) saveDraft();
  draftOf = {chat, text};
  if (!state.saved) localStorage.setItem('unsent', chat);
  clearTimeout(draftTimer);
  draftTimer = setTimeout(saveDraft, 400);
}

function saveDraft() {
  if (!draftOf) return;
  const {chat, text} = draftOf;
  draftOf = null;
  ask(`/chats/${chat}/type`, {text}, 'POST', text.length < BEACON).catch(() => undefined);
}

/** The first that is heard of a chat: what was typed in it. Files that were given before that stay. */
export function showDraft(text) {
  if (editing || find('#message').value) return;
  find('#message').value = text;
  fit();
}

// Files

export async function addFiles(list) {
  const given = [...list].map(file => [file, {name: file.name, reading: true}]);  // the list of an input lives and is emptied
  files.push(...given.map(([, entry]) => entry));
  reading += given.length;
  drawChips();
  for (const [file, entry] of given) {
    try {
      Object.assign(entry, await ask(`/files?name=${encodeURIComponent(file.name)}`, file));
    } catch (problem) {
      entry.problem = problem.message;
    }
    entry.reading = false;
    reading -= 1;
    drawChips();
  }
}

/** A file's name, what it was read as where that is not plain text, and its size for the model. */
export function nameOf(file) {
  const form = file.form === 'text' ? say(file.encoding) : file.pages ? pagesOf(file) : t(file.form ?? '');
  return t('{name} · {count} tokens', {name: form ? `${file.name} · ${form}` : file.name, count: count(file.tokens)});
}

const pagesOf = ({form, pages}) => pages === 1 ? t('{form}, 1 page', {form: t(form)}) : t('{form}, {count} pages', {form: t(form), count: count(pages)});

function drawChips() {
  const chips = files.map(file => {
    const said = file.problem ?? (file.reading ? t('{name}: being read', file) : nameOf(file));
    return element('li', {class: file.problem ? 'chip problem' : 'chip'}, said, iconButton('close', t('Remove {name}', file), () => {
      files = files.filter(other => other !== file);
      drawChips();
    }));
  });
  find('#chips').replaceChildren(...chips);
  find('#chips').hidden = !chips.length;
}

function paste(event) {
  const text = event.clipboardData.getData('text/plain');
  const given = [...event.clipboardData.files];
  if (given.length) addFiles(given);
  else if (text.length >= LONG_PASTE) addFiles([new File([text], `${t('pasted')}-${++pasted}.txt`, {type: 'text/plain'})]);
  else return;
  event.preventDefault();
}

/** Files may be dropped anywhere on the page. */
function dropping() {
  const holds = event => [...event.dataTransfer?.types ?? []].includes('Files'), cover = find('#drop-here');
  addEventListener('dragover', event => {
    if (!holds(event)) return;
    event.preventDefault();
    cover.hidden = false;
  });
  addEventListener('dragleave', event => { if (!event.relatedTarget) cover.hidden = true; });
  addEventListener('drop', event => {
    cover.hidden = true;
    if (!holds(event)) return;
    event.preventDefault();
    addFiles(event.dataTransfer.files);
  });
}

// What is being done

const PHASES = {
  asking: () => t('waiting for you'),
  progress: status => `${t(status.stage)} ${count(status.done)} / ${count(status.total)} ${t(status.unit)}`,
  tool: status => t('running {name}', status),
  reading: status => t('reading, {seconds} s', {seconds: status.seconds.toFixed(1)}),
  thinking: status => t('thinking, {speed} tokens/s', {speed: status.speed.toFixed(1)}),
  writing: status => t('{speed} tokens/s', {speed: status.speed.toFixed(1)}),
};

/** Speed and context in a line; the rest where the mouse stands on it. */
export function drawStatus(message) {
  const counts = lastTurn()?.meta.counts, status = message.status, {used, total} = message.context;
  const said = [], more = [];
  if (PHASES[status.phase]) said.push(PHASES[status.phase](status));
  else if (counts) {
    said.push(t('{speed} tokens/s', {speed: counts.tokens_per_s.toFixed(1)}));
    const computed = counts.prefilled_tokens;
    more.push(t('{count} tokens', {count: count(counts.new_tokens)}));
    more.push(t('prompt {prompt}: {reused} reused, {computed} computed', {
      prompt: count(counts.prompt_tokens), reused: count(Math.max(counts.prompt_tokens - computed, 0)), computed: count(computed)}));
  }
  if (used && total) said.push(t('context {used} of {total}', {used: count(used), total: count(total)}));
  more.push(...[state.model?.name, say(state.memory)].filter(Boolean));
  find('#status').textContent = said.join(' · ');
  find('#status').title = more.join(' · ');
  const meter = find('#context'), share = used / total;
  meter.hidden = !used || !total;  // without a model there is no context
  meter.firstElementChild.style.width = `${Math.min(share, 1) * 100}%`;
  meter.classList.toggle('tight', share > 0.8);
  for (const [name, value] of [['now', used], ['max', total], ['text', `${Math.round(share * 100)} %`]]) meter.setAttribute('aria-value' + name, value);
  meter.title = t('context {used} of {total}', {used: count(used), total: count(total)});
  find('#send').hidden = message.answering;
  find('#stop').hidden = !message.answering;
}
