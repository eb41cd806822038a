// A menu beside a button: arrow keys go through it, letters lead to an entry, Escape leads back to the button.

import {element, find} from './dom.js';

let closed = {button: null, at: 0};

/** An entry that does something and closes the menu. */
export const entry = (label, act, attributes = {}) => element('button', {type: 'button', role: 'menuitem', ...attributes, on: {click: event => {
  event.currentTarget.closest('.menu').hidePopover();
  act();
}}}, label);

/** One that is on or off, or one of several; the menu stays, as there may be more to choose. `checked` may be 'mixed'. */
export const choice = (label, checked, act, attributes = {}) => element('button', {
  type: 'button', role: 'menuitemcheckbox', 'aria-checked': String(checked), tabindex: -1, ...attributes, on: {click: event => act(event.currentTarget)},
}, label);

export const ruler = () => element('div', {role: 'separator'});

/** Entries under a name. */
export const part = (name, ...entries) => element('div', {role: 'group', 'aria-label': name}, ...entries);

/** Opens it; where the button's own menu was open, the press of the mouse has closed that, and it stays closed. */
export function openMenu(button, name, children) {
  if (closed.button === button && performance.now() - closed.at < 200) return null;
  const box = element('div', {class: 'menu', popover: 'auto', role: 'menu', 'aria-label': name}, ...children);
  find('#library').parentElement.append(box);
  box.addEventListener('beforetoggle', event => {  // `toggle` comes after the click that closed it
    if (event.newState !== 'closed') return;
    closed = {button, at: performance.now()};
    button.setAttribute('aria-expanded', 'false');
  });
  box.addEventListener('toggle', event => { if (event.newState === 'closed') box.remove(); });
  box.addEventListener('keydown', event => walk(event, box));
  button.setAttribute('aria-expanded', 'true');
  box.showPopover();
  place(box, button.getBoundingClientRect());
  entriesOf(box)[0]?.focus();
  return box;
}

const entriesOf = box => [...box.querySelectorAll('[role^=menuitem]')];

/** Below the button, or above it where there is more room. */
function place(box, at) {
  const below = innerHeight - at.bottom - 8, above = at.top - 8;
  const under = box.offsetHeight <= below || below >= above;
  box.style.maxHeight = `${under ? below : above}px`;
  box.style.left = `${Math.max(8, Math.min(at.left, innerWidth - box.offsetWidth - 8))}px`;
  box.style.top = `${under ? at.bottom : at.top - box.offsetHeight}px`;
}

function walk(event, box) {
  const entries = entriesOf(box), now = entries.indexOf(document.activeElement), last = entries.length - 1;
  let next = {ArrowDown: now + 1, ArrowUp: now - 1, Home: 0, End: last}[event.key];
  if (event.key === 'Tab') return box.hidePopover();
  if (next === undefined && event.key.length === 1 && event.key !== ' ' && !event.ctrlKey && !event.metaKey && !event.altKey) {
    const following = [...entries.slice(now + 1), ...entries.slice(0, now + 1)];
    next = entries.indexOf(following.find(one => one.textContent.trim().toLowerCase().startsWith(event.key.toLowerCase())));
    if (next < 0) return;
  }
  if (next === undefined) return;
  event.preventDefault();
  entries[(next + entries.length) % entries.length].focus();
}
