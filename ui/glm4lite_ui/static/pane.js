// Pages and pictures that the model wrote, in a frame that can do nothing but draw.
//
// The frame has an origin of its own (a sandbox without allow-same-origin) and a policy without network; it exists only
// while it is shown. Scripts run only after a click that says what they can do (artifacts.py says why).

import {copy, download, element, find, iconButton} from './dom.js';
import {ask} from './server.js';
import {t} from './words.js';

let state = null, found = [], at = 0, view = 'preview', scripts = false;

export function setUp(shared) {
  state = shared;
  find('#open-pane').addEventListener('click', () => find('#pane').hidden ? open() : close());
}

/** Looks for what can be shown, when an answer is over or another chat is open. */
export async function refresh() {
  const chat = state.chat;
  const list = state.saved ? await ask(`/chats/${chat}/artifacts`, undefined, 'GET').catch(() => []) : [];
  if (chat !== state.chat) return;
  found = list;
  find('#open-pane').hidden = !found.length;
  if (!found.length) close();
}

/** Opens the pane with the artifact of this source, or the last one. */
export async function open(source) {
  await refresh();
  if (!found.length) return;
  const place = source == null ? -1 : found.findLastIndex(one => one.source === source);
  at = place < 0 ? found.length - 1 : place;
  view = 'preview';
  scripts = false;
  find('#pane').hidden = false;
  draw();
  find('#pane .close').focus();
}

export function close() {
  find('#pane').hidden = true;
  find('#pane').replaceChildren();
}

function draw() {
  const one = found[at], pane = find('#pane');
  const choose = element('select', {'aria-label': t('Which one'), on: {change: event => { at = Number(event.target.value); scripts = false; draw(); }}},
    ...found.map((other, place) => element('option', {value: place}, `${place + 1}/${found.length} · ${other.kind} · ${other.name}`)));
  choose.value = at;
  const tab = (name, label) => element('button', {type: 'button', class: 'plain', 'aria-pressed': String(view === name), on: {click: () => { view = name; draw(); }}}, label);
  const bar = element('div', {class: 'pane-bar'}, tab('code', t('Code')), tab('preview', t('Preview')), choose,
    iconButton('copy', t('Copy code'), event => copy(one.source, event.currentTarget)),
    iconButton('download', t('Download'), () => download(`${one.name}.${one.kind.toLowerCase()}`, one.source)),
    iconButton('close', t('Close'), close, {class: 'icon close'}));
  pane.replaceChildren(bar);
  if (view === 'code') return pane.append(element('pre', {tabindex: 0}, element('code', {}, one.source)));
  if (one.scripts && !scripts) {
    pane.append(element('p', {class: 'note'}, element('button', {type: 'button', class: 'plain', id: 'run-scripts', on: {click: () => { scripts = true; draw(); }}}, t('Run its scripts')),
      ' ', t('They see nothing of this page, but may send over WebRTC what the preview holds.')));
  }
  const frame = element('iframe', {sandbox: scripts ? 'allow-scripts' : '', referrerpolicy: 'no-referrer', title: t('Preview')});
  frame.srcdoc = one.document;
  pane.append(frame);
}
