// Settings under a name: chosen and kept in the sheet, and in the composer's menu.

import {find} from './dom.js';
import {ask, tell} from './server.js';
import {choice, entry, openMenu, ruler} from './menu.js';
import {t} from './words.js';

let state = null, settings = null;
export let kept = {};
const listeners = [];

export function setUp(shared) {
  state = shared;
  find('#open-presets').addEventListener('click', async () => {
    await refresh();
    open();
  });
}

/** `use` takes the settings of a preset, `save` sends what waits; `drawn` is called when there are other presets. */
export function connect(use, save, drawn) {
  settings = {use, save};
  listeners.splice(0, Infinity, drawn);
}

export async function refresh() {
  ({presets: kept} = await ask('/preferences', undefined, 'GET').catch(() => ({presets: kept})));
  for (const drawn of listeners) drawn();
}

/** Takes them over; what was allowed in this chat stays. */
export const apply = name => settings.use(name ? kept[name] : {});

/** Keeps this chat's settings; whether it did. */
export async function keep(suggested = '') {
  const name = prompt(t('Name of the preset'), suggested);
  if (!name?.trim()) return false;
  await settings.save();
  if (!await tell('/preferences/presets', {name, settings: state.settings})) return false;
  await refresh();
  return true;
}

export async function remove(name) {
  if (await tell(`/preferences/presets?name=${encodeURIComponent(name)}`, undefined, 'DELETE')) await refresh();
}

/** The preset whose values are those of this chat; "" where none is, null where the chat has values of its own. */
export function current() {
  const now = said(state.settings);
  if (now === said({})) return '';
  return Object.keys(kept).find(name => said(kept[name]) === now) ?? null;
}

/** What settings say, apart from permissions. */
const said = ({always, ...settings}) => JSON.stringify(Object.entries(settings).filter(([, value]) => value != null && value !== '').sort());

function open() {
  const now = current();
  const one = (name, label) => choice(label, now === name, () => {
    menu.hidePopover();
    apply(name);
  }, {role: 'menuitemradio', 'data-preset': name});
  const menu = openMenu(find('#open-presets'), t('Presets'), [
    one('', t("The model's own settings")), ...Object.keys(kept).map(name => one(name, name)), ruler(),
    entry(t('Keep as a preset…'), () => keep(now ?? '')), entry(t('All settings…'), () => state.openSheet('settings'))]);
}

/** Shows which one is chosen. */
export function fill() {
  find('#open-presets').textContent = current() || t('Preset');
}
