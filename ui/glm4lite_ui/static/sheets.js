// The sheets: they open over the page, keep the focus, and close with Escape (the browser's own dialogs).

import {find} from './dom.js';

export function setUp() {
  for (const sheet of document.querySelectorAll('dialog')) {
    sheet.querySelector('.close').addEventListener('click', () => sheet.close());
    sheet.addEventListener('click', event => { if (event.target === sheet) sheet.close(); });  // beside it
  }
}

/** Opens a sheet, at one of its parts. */
export function open(name, part) {
  const sheet = find('#' + name);
  if (!sheet.open) sheet.showModal();
  if (!part) return;
  find(part).scrollIntoView();
  find(part).focus();
}
