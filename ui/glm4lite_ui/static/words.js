// What the page says, in two languages. English is the key; the browser's language is taken until the user chooses.

const CHINESE = {
};

const chosen = localStorage.getItem('language') || (navigator.language || 'en');
export const language = chosen.toLowerCase().startsWith('zh') ? 'zh' : 'en';

/** The text in the page's language; `{name}` in it is replaced by values.name. */
export function t(text, values = {}) {
  const said = language === 'zh' ? CHINESE[text] ?? text : text;
  return said.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

/** A number with the signs that the language sets between thousands. */
export const count = number => Number(number).toLocaleString(language === 'zh' ? 'zh-CN' : 'en-US');

/** Puts the texts into the templates: data-t the content, data-label a name, data-hint a placeholder. */
export function translate(root) {
  for (const element of root.querySelectorAll('[data-t]')) element.append(t(element.dataset.t));
  for (const element of root.querySelectorAll('[data-label]')) name(element, t(element.dataset.label));
  for (const element of root.querySelectorAll('[data-hint]')) element.placeholder = t(element.dataset.hint);
}

/** Names an element for who hovers over it and for who hears it. */
export function name(element, text) {
  element.setAttribute('aria-label', text);
  if (element.localName === 'button') element.title = text;
}
