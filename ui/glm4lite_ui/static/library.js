// The chats on the left: found as one types, in groups by when they were last used.

import {element, find, iconButton, isTouched} from './dom.js';
import {entry, openMenu} from './menu.js';
import {ask, exportOf, tell} from './server.js';
import {language, say, t} from './words.js';

const WIDE = matchMedia('(min-width: 900px)');
const TIME = new Intl.DateTimeFormat(language === 'zh' ? 'zh-CN' : 'en-GB', {dateStyle: 'medium', timeStyle: 'short'});
let state = null, asked = 0, waiting = null, folders = [];

export function setUp(shared) {
  state = shared;
  find('#new-chat').addEventListener('click', () => { state.open(); close(); });
  find('#search').addEventListener('input', () => {
    clearTimeout(waiting);
    waiting = setTimeout(refresh, 100);
  });
  find('#import').addEventListener('click', () => find('#import-file').click());
  find('#import-file').addEventListener('change', event => importFile(event.target));
  find('#open-library').addEventListener('click', () => isOpen() ? close(true) : open());
  find('#library-shade').addEventListener('click', () => close());
  find('#export-all').href = exportOf('all', 'zip');
  for (const place of ['#search', '#chats']) find(place).addEventListener('keydown', walk);
  WIDE.addEventListener('change', () => setOpen(WIDE.matches));
  setOpen(WIDE.matches && localStorage.getItem('library') !== 'closed');
}

export function open() {
  if (WIDE.matches) localStorage.removeItem('library');
  setOpen(true);
  if (!WIDE.matches) find(isTouched() ? '#new-chat' : '#search').focus();
}

/** Chats of this program, of ChatGPT or of Open WebUI. */
async function importFile(input) {
  const [file] = input.files;
  input.value = '';
  if (!file) return;
  find('#import').disabled = true;
  const came = await tell(`/import?name=${encodeURIComponent(file.name)}`, file);
  find('#import').disabled = false;
  if (came) state.toast(came.said.map(say).join(t(' ')), 'done');
  refresh();
}

/** The list lies over the chat where there is little room, and goes when something was chosen. */
function close(always = false) {
  if (WIDE.matches && !always) return;
  if (WIDE.matches) localStorage.setItem('library', 'closed');
  const within = find('#library').contains(document.activeElement);
  setOpen(false);
  if (within) find('#open-library').focus();
}

/** Takes the list away where it lies over the chat; whether it did. */
export function uncover() {
  const over = isOpen() && !WIDE.matches;
  close();
  return over;
}

const isOpen = () => !find('#library').hidden;

function setOpen(open) {
  find('#library').hidden = !open;
  find('#library-shade').hidden = !open || WIDE.matches;
  find('#open-library').setAttribute('aria-expanded', open);
}

export function search() {
  open();
  find('#search').focus();
  find('#search').select();
}

/** Asks for the list anew. Of answers that cross, the one to the last question is drawn. */
export async function refresh() {
  const number = ++asked, query = find('#search').value;
  const groups = await ask(`/chats?query=${encodeURIComponent(query)}`, undefined, 'GET').catch(() => null);
  if (groups && number === asked) draw(groups, query.trim());
}

export function mark() {
  for (const link of find('#chats').querySelectorAll('a')) {
    if (link.dataset.chat === state.chat) link.setAttribute('aria-current', 'page');
    else link.removeAttribute('aria-current');
  }
}

const GROUPS = {pinned: t('Pinned'), today: t('Today'), week: t('Last 7 days'), older: t('Older')};

function draw(groups, query) {
  const list = find('#chats'), focused = document.activeElement?.closest?.('#chats a')?.dataset.chat;
  list.replaceChildren();
  folders = groups.filter(group => group.kind === 'folder').map(group => group.name);
  for (const group of groups) list.append(element('h2', {}, GROUPS[group.kind] ?? group.name), element('ul', {}, ...group.chats.map(row)));
  if (!groups.length) list.append(element('p', {class: 'empty'}, query ? t('No chat matches.') : t('No chats yet.')));
  mark();
  if (focused) list.querySelector(`a[data-chat="${focused}"]`)?.focus();
}

function row(chat) {
  const when = TIME.format(chat.updated * 1000);
  const titled = chat.title === 'New chat' ? t('New chat') : chat.title;  // nothing was typed in it
  const link = element('a', {href: `?chat=${chat.id}`, 'data-chat': chat.id, title: `${titled}\n${when}`, dir: 'auto'}, titled);
  link.addEventListener('click', event => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;  // another window
    event.preventDefault();
    state.open(chat.id);
    close();
    if (event.detail) state.write();  // the mouse has no way back to go
  });
  const more = iconButton('more', t('More about {title}', chat), () => menu(chat, more), {'aria-haspopup': 'menu'});
  const found = chat.found && element('span', {class: 'found', dir: 'auto', on: {click: () => link.click()}}, chat.found);
  return element('li', {}, link, more, found);
}

/** What can be done with a chat of the list, beside its button. */
function menu(chat, button) {
  const place = change => tell(`/chats/${chat.id}/place`, {pinned: chat.pinned, folder: chat.folder, ...change});
  const download = (kind, label) => element('a', {role: 'menuitem', href: exportOf(chat.id, kind), download: true, on: {click: event => event.target.closest('.menu').hidePopover()}}, label);
  openMenu(button, t('More about {title}', chat), [
    entry(t('Rename…'), () => {
      const title = prompt(t('Title of this chat'), chat.title);
      if (title?.trim()) tell(`/chats/${chat.id}/rename`, {title});
    }),
    entry(chat.pinned ? t('Unpin') : t('Pin'), () => place({pinned: !chat.pinned})),
    ...folders.filter(name => name !== chat.folder).map(name => entry(t('Move to {name}', {name}), () => place({folder: name}))),
    entry(t('Move to a new folder…'), () => {
      const name = prompt(t('Name of the folder'));
      if (name?.trim()) place({folder: name});
    }),
    ...chat.folder ? [entry(t('Out of {folder}', chat), () => place({folder: ''}))] : [],
    download('md', t('Export as Markdown')), download('json', t('Export as JSON')),
    entry(t('Delete'), () => remove(chat), {class: 'problem'})]);
}

/** Deletes a chat at once, and offers to take that back. */
async function remove(chat) {
  const shown = chat.id === state.chat;
  if (!await tell(`/chats/${chat.id}`, undefined, 'DELETE')) return;
  if (shown) state.open();
  state.toast(t('“{title}” was deleted.', chat), 'done', [t('Undo'), async () => {
    if (await tell(`/chats/${chat.id}/restore`) && shown) state.open(chat.id);
  }]);
}

/** Arrow keys go through the list, from the search on; Enter in the search opens the first that was found. */
async function walk(event) {
  const search = find('#search'), links = () => [...find('#chats').querySelectorAll('a')];
  if (event.isComposing) return;
  if (event.key === 'Enter' && event.target === search && search.value.trim()) {
    clearTimeout(waiting);
    await refresh();
    const [first] = links();
    if (!first) return;
    state.open(first.dataset.chat);
    close();
    state.write();
  }
  const stops = [search, ...links()], place = stops.indexOf(event.target), step = {ArrowDown: 1, ArrowUp: -1}[event.key];
  if (!step || place < 0) return;
  event.preventDefault();
  stops[place + step]?.focus();
}
