// Elements from values. Text is always set as text; HTML comes only from the server's sanitizer (html()).

import {languageOf, t} from './words.js';

const ICONS = {
  menu: 'M4 6h16M4 12h16M4 18h16',
  plus: 'M12 5v14M5 12h14',
  settings: 'M4 7h10M18 7h2M4 17h2M10 17h10M14 4v6M6 14v6',
  pane: 'M4 5h16v14H4zM13 5v14',
  attach: 'M20 11l-8 8a5 5 0 0 1-7-7l9-9a3.5 3.5 0 0 1 5 5l-9 9a2 2 0 0 1-3-3l8-8',
  send: 'M12 19V5M6 11l6-6 6 6',
  stop: 'M7 7h10v10H7z',
  close: 'M6 6l12 12M18 6L6 18',
  down: 'M12 5v14M6 13l6 6 6-6',
  copy: 'M9 9h10v10H9zM5 15V5h10',
  done: 'M5 13l5 5 9-11',
  edit: 'M5 19l1-4L16 5l3 3L9 18zM14 7l3 3',
  delete: 'M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13',
  again: 'M20 12a8 8 0 1 1-2.5-5.8M20 4v5h-5',
  resume: 'M6 5l7 7-7 7M14 5l6 7-6 7',
  branch: 'M7 4v16M7 9c0 5 10 2 10 8M17 20v-3M5 4h4M15 20h4',
  left: 'M14 6l-6 6 6 6',
  right: 'M10 6l6 6-6 6',
  wrap: 'M4 6h16M4 12h13a3 3 0 0 1 0 6h-5M14 15l-3 3 3 3M4 18h4',
  download: 'M12 4v11M7 11l5 5 5-5M5 20h14',
  show: 'M3 12s3.5-6 9-6 9 6 9 6-3.5 6-9 6-9-6-9-6zM12 10a2 2 0 1 0 0 4 2 2 0 0 0 0-4',
  more: 'M5 12h.01M12 12h.01M19 12h.01',
  reset: 'M4 12a8 8 0 1 0 2.5-5.8M4 4v5h5',
};

export const find = selector => document.querySelector(selector);

/** <tag ...attributes>children</tag>; children are elements or texts, `on` are listeners. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === 'on') for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    else if (value === true) made.setAttribute(name, '');
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter(child => child != null && child !== false));
  return made;
}

/** HTML that the server's sanitizer has seen, in an element of its own. */
export function html(block) {
  const made = element('div', {class: 'block'});
  made.innerHTML = block;
  const spoken = languageOf(made.textContent);
  if (spoken) made.lang = spoken;
  for (const labelled of made.querySelectorAll('[aria-label]')) labelled.setAttribute('aria-label', t(labelled.getAttribute('aria-label')));
  return made;
}

export function icon(name) {
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  const path = document.createElementNS('http://www.w3.org/2000/svg', 'path');
  svg.setAttribute('viewBox', '0 0 24 24');
  svg.setAttribute('aria-hidden', 'true');
  path.setAttribute('d', ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button of one icon; `label` is what it is called. */
export function iconButton(name, label, click, attributes = {}) {
  const made = element('button', {type: 'button', class: 'icon', title: label, 'aria-label': label, ...attributes}, icon(name));
  made.addEventListener('click', click);
  return made;
}

export function addIcons(root) {
  for (const button of root.querySelectorAll('[data-icon]')) button.prepend(icon(button.dataset.icon));
}

/** A message in the corner, as text; `offer` is [label, act] of what can be done about it. It lies over open sheets, too. */
export function toast(text, kind = 'problem', offer = null) {
  const made = element('div', {class: `toast ${kind}`}, text), place = find('#toasts');
  if (offer) made.append(element('button', {type: 'button', class: 'plain', on: {click: () => { made.remove(); offer[1](); }}}, offer[0]));
  if (document.querySelector('dialog[open]') && place.matches(':popover-open')) place.hidePopover();  // what is shown last lies above
  if (!place.matches(':popover-open')) place.showPopover();
  place.append(made);
  setTimeout(() => made.remove(), kind === 'problem' || offer ? 10000 : 4000);
}

/** Whether a finger is what points here: a field that is focused calls for a keyboard, which covers half of the page. */
export const isTouched = () => matchMedia('(pointer: coarse)').matches;

/** Copies a text, or what becomes one, and shows on the button that it was done. */
export async function copy(text, button) {
  const blob = Promise.resolve(text).then(said => new Blob([said], {type: 'text/plain'}));
  await navigator.clipboard.write([new ClipboardItem({'text/plain': blob})]);
  const old = button.querySelector('svg');
  old.replaceWith(icon('done'));
  setTimeout(() => button.querySelector('svg').replaceWith(old), 1500);
}

export function download(name, text) {
  const link = element('a', {href: URL.createObjectURL(new Blob([text])), download: name});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
