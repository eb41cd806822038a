// The chats on the left: found as one types, in groups by when they were last used.

import {element, find, iconButton} from './dom.js';
import {ask, tell} from './server.js';
import {language, t} from './words.js';

const WIDE = matchMedia('(min-width: 900px)');
let state = null, asked = 0, waiting = null;

export function setUp(shared) {
  state = shared;
  find('#new-chat').addEventListener('click', () => { state.open(); close(); });
  find('#search').addEventListener('input', () => {
    clearTimeout(waiting);
    waiting = setTimeout(refresh, 100);
  });
  find('#open-library').addEventListener('click', () => isOpen() ? close(true) : open());
  find('#library-shade').addEventListener('click', () => close());
  find('#library').addEventListener('keydown', event => { if (event.key === 'Escape' && !WIDE.matches) close(); });
  find('#chats').addEventListener('keydown', walk);
  WIDE.addEventListener('change', () => setOpen(WIDE.matches));
  setOpen(WIDE.matches && localStorage.getItem('library') !== 'closed');
}

export function open() {
  if (WIDE.matches) localStorage.removeItem('library');
  setOpen(true);
  if (!WIDE.matches) find('#search').focus();
}

/** The list lies over the chat where there is little room, and goes when something was chosen. */
function close(always = false) {
  if (WIDE.matches && !always) return;
  if (WIDE.matches) localStorage.setItem('library', 'closed');
  const within = find('#library').contains(document.activeElement);
  setOpen(false);
  if (within) find('#open-library').focus();
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
  const chats = await ask(`/chats?query=${encodeURIComponent(query)}`, undefined, 'GET').catch(() => null);
  if (chats && number === asked) draw(chats, query.trim());
}

export function mark() {
  for (const link of find('#chats').querySelectorAll('a')) {
    if (link.dataset.chat === state.chat) link.setAttribute('aria-current', 'page');
    else link.removeAttribute('aria-current');
  }
}

const DAY = 86400;

function groupOf(chat, midnight) {
  if (chat.pinned) return t('Pinned');
  if (chat.folder) return chat.folder;
  if (chat.updated >= midnight) return t('Today');
  return chat.updated >= midnight - 6 * DAY ? t('Last 7 days') : t('Older');
}

function draw(chats, query) {
  const list = find('#chats'), midnight = new Date().setHours(0, 0, 0, 0) / 1000, groups = new Map();
  const first = [t('Pinned'), ...new Set(chats.map(chat => chat.folder).filter(Boolean)), t('Today'), t('Last 7 days'), t('Older')];
  for (const group of first) groups.set(group, []);
  for (const chat of chats) groups.get(groupOf(chat, midnight)).push(chat);
  const focused = document.activeElement?.closest?.('#chats a')?.dataset.chat;
  list.replaceChildren();
  for (const [group, members] of groups) {
    if (members.length) list.append(element('h2', {}, group), element('ul', {}, ...members.map(row)));
  }
  if (!chats.length) list.append(element('p', {class: 'empty'}, query ? t('No chat matches.') : t('No chats yet.')));
  mark();
  if (focused) list.querySelector(`a[data-chat="${focused}"]`)?.focus();
}

function row(chat) {
  const when = new Date(chat.updated * 1000).toLocaleString(language === 'zh' ? 'zh-CN' : 'en-GB', {dateStyle: 'medium', timeStyle: 'short'});
  const link = element('a', {href: `?chat=${chat.id}`, 'data-chat': chat.id, title: `${chat.title}\n${when}`, dir: 'auto'}, chat.title);
  link.addEventListener('click', event => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;  // another window
    event.preventDefault();
    state.open(chat.id);
    close();
  });
  const remove = iconButton('delete', t('Delete {title}', chat), async () => {
    if (!confirm(t('Delete this chat? It cannot be brought back.'))) return;
    if (await tell(`/chats/${chat.id}`, undefined, 'DELETE') && chat.id === state.chat) state.open();
  });
  return element('li', {}, link, remove);
}

/** Arrow keys go through the list. */
function walk(event) {
  if (event.key !== 'ArrowDown' && event.key !== 'ArrowUp') return;
  const links = [...find('#chats').querySelectorAll('a')], place = links.indexOf(event.target);
  if (place < 0) return;
  event.preventDefault();
  links[place + (event.key === 'ArrowDown' ? 1 : -1)]?.focus();
}
