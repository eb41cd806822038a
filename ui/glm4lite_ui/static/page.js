// The page as a whole: which chat is shown, and what the keys do.

import * as code from './code.js';
import * as composer from './composer.js';
import * as library from './library.js';
import * as model from './model.js';
import * as pane from './pane.js';
import * as presets from './presets.js';
import * as settings from './settings.js';
import * as sheets from './sheets.js';
import * as thread from './thread.js';
import * as tools from './tools.js';
import {addIcons, element, find, isTouched, toast} from './dom.js';
import {listen, newId, show, tell} from './server.js';
import {explain, language, t, translate} from './words.js';

const PIECES = 6;  // layout.py
const NEW = {title: 'New chat', saved: false, heard: false, answering: false};
const NO_SETTINGS = {system: '', tools: null, always: []};
const KEYS = [
  ['Enter', 'Send'], ['Shift Enter', 'A new line'], ['Escape', 'Stop the answer'], ['↑', 'Change the last message, in an empty field'],
  ['Ctrl K', 'Search chats'], ['Ctrl Shift O', 'New chat'], ['Ctrl /', 'This list'],
];

// What the parts of the page share: the chat that is shown, as far as the server has told, and what can be done with it.
const state = {...NEW, settings: NO_SETTINGS, chat: '', model: null, open, toast, colour, openSheet: sheets.open, send: composer.send, edit: composer.edit, write: composer.write, nameOf: composer.nameOf};
let pieces = 0;

/** A piece of the page is there (layout.py); the last one begins it. */
export function mounted(piece) {
  translate(piece);
  addIcons(piece);
  pieces += 1;
  if (pieces === PIECES) start();
}

async function start() {
  document.documentElement.lang = language === 'zh' ? 'zh-CN' : language;  // the letters' Chinese form
  colour();
  for (const part of [thread, composer, library, settings, tools, presets, model, pane, sheets]) part.setUp(state);
  code.setUp(pane.open);
  setUpHeader();
  setUpKeys();
  addEventListener('popstate', () => visit(addressed()));
  visit(addressed());
  history.replaceState(null, '', addressOf(state.chat));
  listen(hear);
  library.refresh();
  await model.refresh();
  settings.build();
  find('#message').focus();
  document.body.dataset.ready = 'true';
}

const isId = text => /^[0-9a-f]{16}$/.test(text ?? '');
const addressed = () => [new URL(location).searchParams.get('chat'), unsent(), newId()].find(isId);
const unsent = () => localStorage.getItem('unsent');

/** Opens a chat, a new one without an id; the way back leads to the one that was shown. */
function open(id = null) {
  if (!id && !state.saved && !thread.lastTurn()) return find('#message').focus();  // this one is new
  id ??= unsent() ?? newId();
  if (id === state.chat) return;
  history.pushState(null, '', addressOf(id));
  visit(id);
}

const addressOf = id => {
  const address = new URL(location);
  address.searchParams.set('chat', id);
  return address;
};

function visit(id) {
  settings.save();
  Object.assign(state, NEW, {chat: id, settings: {...NO_SETTINGS}});
  thread.clear();
  composer.changed();
  pane.close();
  showTitle();
  settings.fill();
  library.mark();
  show(id);
}

function hear(message) {
  if (message.type === 'list') return library.refresh();
  if (message.type === 'model') return model.hear(message).then(settings.showOwn);
  if (message.type === 'tools') return tools.refresh();
  if (message.type === 'problem') {
    if (message.chat !== state.chat) return;
    toast(explain(message.said));
    return open(newId());
  }
  state.answering = message.answering;
  if (message.order) {
    if (state.saved && !message.saved) state.title = NEW.title;  // it was deleted
    Object.assign(state, {saved: message.saved, memory: message.memory});
    if (!settings.waiting()) state.settings = message.settings;
    if (message.saved) state.title = message.title;
    if (!state.heard) composer.showDraft(message.draft);
    state.heard = true;
    showTitle();
    settings.fill();
  }
  thread.draw(message);
  composer.drawStatus(message);
  if (message.order && !message.answering) pane.refresh();
}

function showTitle() {
  const title = find('#title'), said = state.title === NEW.title ? '' : state.title;
  if (document.activeElement !== title) title.value = said;
  document.title = `${said || t(NEW.title)} · glm4lite`;
}

function setUpHeader() {
  const title = find('#title');
  title.addEventListener('change', () => {
    state.title = title.value.trim() || state.title;
    if (state.saved) tell(`/chats/${state.chat}/rename`, {title: state.title});
    showTitle();
  });
  title.addEventListener('keydown', event => { if (event.key === 'Enter') title.blur(); });
  for (const name of ['settings', 'model']) find(`#open-${name}`).addEventListener('click', () => {
    if (name === 'model') model.refresh();
    sheets.open(name);
    if (name === 'model' && !isTouched()) find('#source').focus();
  });
  find('#shortcuts dl').append(...KEYS.flatMap(([keys, said]) => [
    element('dt', {}, ...keys.split(' ').map(key => element('kbd', {}, key))), element('dd', {}, t(said))]));
}

function setUpKeys() {
  addEventListener('keydown', event => {
    if (event.isComposing) return;
    const command = event.ctrlKey || event.metaKey, key = event.key.toLowerCase();
    if (isSign(event) && !isTaken()) return find('#message').focus();  // where it is then typed
    if (event.key === 'Escape') {
      if (document.querySelector('dialog[open], .menu:popover-open') || library.uncover()) return;  // it closes that alone
      if (composer.isEditing()) composer.stopEditing();
      else composer.stop();
    } else if (command && key === 'k') library.search();
    else if (command && event.shiftKey && key === 'o') open();
    else if (command && key === '/') sheets.open('shortcuts');
    else if (command && key === 'p') thread.printAll();
    else return;
    if (event.key !== 'Escape') event.preventDefault();
  });
}

const isSign = event => event.key.length === 1 && event.key !== ' ' && !event.ctrlKey && !event.metaKey && !event.altKey;

/** Whether what has the focus, or lies over the page, takes what is typed. */
const isTaken = () => Boolean(document.activeElement?.closest('input, textarea, select, #asking') || document.querySelector('dialog[open], .menu:popover-open'));

function colour() {
  document.documentElement.style.colorScheme = localStorage.getItem('theme') || 'light dark';
}
