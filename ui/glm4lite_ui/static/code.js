// The bar above a block of code: its language, and what can be done with it.

import {copy, download, element, iconButton} from './dom.js';
import {t} from './words.js';

const ENDINGS = {python: 'py', javascript: 'js', typescript: 'ts', bash: 'sh', shell: 'sh', markdown: 'md', text: 'txt', rust: 'rs', 'c++': 'cpp', csharp: 'cs', ruby: 'rb', yaml: 'yml'};
let preview = () => undefined;

export function setUp(open) {
  preview = open;
}

/** Puts a bar above each block of code in an element. */
export function dressCode(root) {
  for (const box of root.querySelectorAll('.code')) {
    const code = box.querySelector('code'), language = code.dataset.language ?? '';
    const said = () => code.textContent.replace(/\n$/, '');
    const bar = element('div', {class: 'code-bar'}, element('span', {class: 'language'}, language),
      iconButton('wrap', t('Wrap lines'), event => {
        event.currentTarget.setAttribute('aria-pressed', box.classList.toggle('wrapped'));
      }, {'aria-pressed': 'false'}),
      iconButton('copy', t('Copy code'), event => copy(said(), event.currentTarget)),
      iconButton('download', t('Download'), () => download(`code.${ENDINGS[language] ?? (language || 'txt')}`, code.textContent)));
    if (isPicture(language, code)) bar.append(iconButton('show', t('Preview'), () => preview(code.textContent)));
    box.prepend(bar);
  }
}

const isPicture = (language, code) => {
  const named = language.toLowerCase();
  return named === 'html' || named === 'svg' || (named === 'xml' && code.textContent.slice(0, 500).toLowerCase().includes('<svg'));
};
