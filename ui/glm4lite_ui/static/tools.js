// The tools: by where they come from, which are on in this chat, which ask before they run; and adding an MCP server.

import {element, find} from './dom.js';
import {ask, tell} from './server.js';
import {choice, entry, openMenu, part, ruler} from './menu.js';
import {count, explain, say, t} from './words.js';

const NONE = {groups: [], approval: 'ask', takes_tools: true, refused: '', problem: null};
let state = null, about = NONE, choose = () => undefined, menu = null;

export function setUp(shared) {
  state = shared;
  find('#open-tools').addEventListener('click', open);
}

/** Asks which there are. */
export async function refresh() {
  about = await ask('/tools', undefined, 'GET').catch(() => about);
  draw();
}

// Which are on. A chat that names its tools has those; one that does not has all, also those that come later.

const all = () => about.groups.flatMap(group => group.tools);
const isOn = tool => !state.settings.tools || state.settings.tools.includes(tool.name);
const among = group => group.tools.filter(isOn).length;

/** Turns tools on or off in this chat. Names that no server offers at the moment stay as they are. */
function turn(tools, on) {
  const names = new Set(tools.map(tool => tool.name)), known = all().map(tool => tool.name);
  const before = state.settings.tools ?? known;
  const now = [...before.filter(name => !names.has(name)), ...on ? names : []];
  const whole = known.every(name => now.includes(name)) && about.groups.every(group => group.state === 'connected');
  choose({tools: whole ? null : known.filter(name => now.includes(name)).concat(now.filter(name => !known.includes(name)))});
  fill();
}

const keyOf = group => group.origin || group.kind;
const titleOf = group => group.kind === 'builtin' ? t('Built in') : group.kind === 'research' ? t('Research') : group.kind === 'python' ? t('Python') : group.name;

// The menu of the composer

function open() {
  const groups = about.groups.filter(group => group.tools.length);
  const entries = groups.map(group => part(titleOf(group),
    groupChoice(group), ...group.tools.map(tool => choice(tool.name, isOn(tool), () => turn([tool], !isOn(tool)), {class: 'inner', 'data-tool': tool.name}))));
  const quiet = about.takes_tools ? '' : element('p', {class: 'note'}, t("This model's template has no place for tools."));
  menu = openMenu(find('#open-tools'), t('Tools of this chat'), [quiet, ...entries, entries.length ? ruler() : '',
    entry(t('Tools and MCP servers…'), () => state.openSheet('settings', '#tools'))].filter(Boolean));
}

const groupChoice = group => choice(titleOf(group), stateOf(group), () => turn(group.tools, among(group) < group.tools.length), {'data-group': keyOf(group)});
const stateOf = group => among(group) === 0 ? false : among(group) === group.tools.length || 'mixed';

// The part of the sheet

/** `change` takes settings of this chat that are other than before. */
export function section(change) {
  choose = change;
  return element('section', {id: 'tools', tabindex: -1, 'aria-labelledby': 'tools-title'}, element('h3', {id: 'tools-title'}, t('Tools')), element('div', {id: 'tool-groups'}), form());
}

function draw() {
  const place = find('#tool-groups');
  if (!place) return;
  const focused = document.activeElement?.closest?.('#tool-groups') && document.activeElement.dataset.key;
  const notes = [about.takes_tools ? '' : t("This model's template has no place for tools."), about.problem && explain(about.problem),
    about.approval === 'every' ? t('Started with --approve every: each call asks.') : about.approval === 'all' ? t('Started with --approve all: no call asks.') : ''];
  place.replaceChildren(...notes.filter(Boolean).map(said => element('p', {class: 'note'}, said)), ...about.groups.map(drawGroup));
  const refused = Boolean(about.refused);
  find('#add-server form').hidden = refused;
  find('#add-refused').hidden = !refused;
  fill();
  if (focused) place.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
}

const STATES = {connecting: t('connecting…'), connected: '', failed: t('not connected')};

function drawGroup(group) {
  const title = titleOf(group);
  const toggle = element('input', {type: 'checkbox', 'data-group': keyOf(group), 'data-key': `on ${keyOf(group)}`, disabled: !group.tools.length, on: {input: event => turn(group.tools, event.target.checked)}});
  const server = group.kind === 'server';
  return element('fieldset', {class: 'tools-of', 'data-origin': group.origin, 'data-state': group.state},
    element('legend', {}, element('label', {}, toggle, ' ', title)),
    STATES[group.state] ? element('p', {class: 'note', role: 'status'}, STATES[group.state]) : '',
    group.about ? element('p', {class: 'about mono'}, group.about) : '',
    group.problem ? element('p', {class: 'note problem'}, explain(group.problem)) : '',
    ...group.left_out.map(said => element('p', {class: 'note problem', 'data-theirs': ''}, said)),
    server && group.state === 'connected' && !group.tools.length ? element('p', {class: 'note'}, t('It offers no tools.')) : '',
    server && group.tools.length ? element('div', {class: 'trust-row'}, element('span', {}, t('All of them')), trust(group, null)) : '',
    ...group.tools.map(tool => drawTool(group, tool)),
    group.added && !about.refused ? serverButtons(group) : '');
}

function drawTool(group, tool) {
  const input = element('input', {type: 'checkbox', name: 'tool', value: tool.name, 'data-key': `on ${tool.full_name}`, on: {input: event => turn([tool], event.target.checked)}});
  return element('div', {class: 'tool'},
    element('label', {}, input, element('span', {}, element('strong', {}, tool.name), element('span', {class: 'allowed', 'data-tool': tool.permission, hidden: true}, ` · ${t('allowed in this chat')}`),
      element('span', {class: 'about', 'data-theirs': ''}, t(tool.about.split('\n', 1)[0])), tool.caution ? element('span', {class: 'about problem'}, say(tool.caution)) : '')),
    trust(group, tool));
}

/** Whether a tool, or all of a server, may run unasked, in all chats. */
function trust(group, tool) {
  const said = tool ?? group, byRule = !tool ? t('as each says') : tool.asks ? t('asks (default)') : t('runs (default)');
  const select = element('select', {
    'aria-label': tool ? t('Before {name} runs', tool) : t('Before a tool of {name} runs', {name: group.name}), 'data-key': `trust ${tool?.full_name ?? group.origin}`,
    disabled: about.approval !== 'ask', on: {change: () => tell('/tools/trust', {origin: group.origin, tool: tool?.name ?? '', word: select.value}).then(done => done || refresh())},
  }, ...[['', byRule], ['ask', t('always ask')], ['allow', t('allow')]].map(([value, label]) => element('option', {value}, label)));
  select.value = said.word;
  return select;
}

function serverButtons(group) {
  const button = (label, act, key) => element('button', {type: 'button', class: 'plain', 'data-key': `${key} ${group.name}`, 'aria-label': `${label}: ${group.name}`, on: {click: act}}, label);
  const remove = () => {
    if (group.state !== 'connecting' && !confirm(t('Remove {name}? What was said about its tools is forgotten.', group))) return;
    tell(`/servers?name=${encodeURIComponent(group.name)}`, undefined, 'DELETE');
  };
  return element('div', {class: 'buttons'},
    group.state === 'connecting' ? '' : button(t('Restart'), () => tell('/servers/restart', {name: group.name}), 'restart'), button(t('Remove'), remove, 'remove'));
}

/** Shows what is on in this chat, in the sheet and in the menu. */
export function fill() {
  for (const group of about.groups) {
    const box = find(`#tool-groups [data-group="${CSS.escape(keyOf(group))}"]`);
    const title = box?.closest('fieldset');
    if (box) {
      box.checked = group.tools.length > 0 && among(group) === group.tools.length;
      box.indeterminate = stateOf(group) === 'mixed';
      for (const tool of group.tools) {
        const own = title.querySelector(`input[value="${CSS.escape(tool.name)}"]`);
        if (own) own.checked = isOn(tool);
      }
    }
    if (!menu?.isConnected) continue;
    menu.querySelector(`[data-group="${CSS.escape(keyOf(group))}"]`)?.setAttribute('aria-checked', String(stateOf(group)));
    for (const tool of group.tools) menu.querySelector(`[data-tool="${CSS.escape(tool.name)}"]`)?.setAttribute('aria-checked', String(isOn(tool)));
  }
  for (const mark of document.querySelectorAll('#tool-groups .allowed')) mark.hidden = !state.settings.always?.includes(mark.dataset.tool);
  const on = all().filter(isOn).length, button = find('#open-tools');
  button.textContent = about.takes_tools && all().length ? t('Tools {on}/{all}', {on: count(on), all: count(all().length)}) : t('Tools');
}

// Adding a server

function form() {
  const field = (id, label, about, input) => element('div', {class: 'field'}, element('label', {for: id}, label), input, about ? element('p', {class: 'about', id: `about-${id}`}, about) : '');
  const text = (id, more = {}) => element('input', {id, autocomplete: 'off', spellcheck: 'false', ...more});
  const lines = (id, hint) => element('textarea', {id, rows: 2, spellcheck: 'false', placeholder: hint, 'aria-describedby': `about-${id}`});
  const kind = element('select', {id: 'server-kind', on: {change: () => show()}}, element('option', {value: 'command'}, t('A program on this machine')), element('option', {value: 'url'}, t('An address (HTTP)')));
  const program = element('div', {class: 'sub-fields'},
    element('p', {class: 'warning', role: 'note'}, t('The program is started on this machine and runs with your rights: it can read and change your files. It is started again with the page. Add only what you trust.')),
    field('server-command', t('Command line'), t('As in a terminal, without pipes and variables.'), text('server-command', {placeholder: 'npx -y @modelcontextprotocol/server-filesystem ~/notes', 'aria-describedby': 'about-server-command'})),
    field('server-env', t('Environment'), t('NAME=value, one a line; ${NAME} is filled in when it starts.'), lines('server-env', 'TOKEN=${MY_TOKEN}')),
    field('server-cwd', t('Folder it runs in'), '', text('server-cwd')));
  const address = element('div', {class: 'sub-fields', hidden: true},
    element('p', {class: 'warning', role: 'note'}, t('What the model gives its tools is sent there.')),
    field('server-url', t('Address'), t('Streamable HTTP, as https://…/mcp.'), text('server-url', {inputmode: 'url', placeholder: 'https://', 'aria-describedby': 'about-server-url'})),
    field('server-headers', t('Headers'), t('Name: value, one a line; ${NAME} is filled in.'), lines('server-headers', 'Authorization: Bearer ${MY_TOKEN}')));
  const show = () => {
    program.hidden = kind.value !== 'command';
    address.hidden = kind.value !== 'url';
  };
  const said = element('p', {id: 'adding', role: 'status', class: 'note'}), problem = element('p', {id: 'add-problem', role: 'alert', class: 'wrong'});
  const submit = element('button', {type: 'submit', class: 'main'}, t('Add')), cancel = element('button', {type: 'button', class: 'plain', hidden: true}, t('Cancel'));
  const made = element('form', {autocomplete: 'off'}, field('server-name', t('Name'), '', text('server-name', {maxlength: 100})), field('server-kind', t('What it is'), '', kind), program, address,
    element('div', {class: 'buttons'}, submit, cancel), said, problem);
  const value = id => made.querySelector(`#server-${id}`).value;
  let name = '';
  cancel.addEventListener('click', () => tell(`/servers?name=${encodeURIComponent(name)}`, undefined, 'DELETE'));
  made.addEventListener('submit', async event => {
    event.preventDefault();
    if (submit.disabled) return;
    name = value('name').trim();
    const fields = kind.value === 'url' ? {url: value('url'), headers: value('headers')} : {command: value('command'), env: value('env'), cwd: value('cwd')};
    const chat = state.chat;
    problem.textContent = '';
    said.textContent = t('Connecting to {name}…', {name});
    submit.disabled = true;
    cancel.hidden = false;
    try {
      const tools = await ask('/servers', {name, fields});
      made.reset();
      show();
      made.parentElement.open = false;
      made.parentElement.querySelector('summary').focus();
      state.toast(t('{name} is connected: {count} tools.', {name, count: count(tools.length)}), 'done');
      await refresh();
      if (chat === state.chat && state.settings.tools) turn(tools.map(tool => ({name: tool})), true);
    } catch (error) {
      problem.textContent = error.message;
    }
    said.textContent = '';
    submit.disabled = false;
    cancel.hidden = true;
  });
  const refused = element('p', {id: 'add-refused', class: 'note', hidden: true}, t('MCP servers are added and removed only on the machine where glm4lite runs, by its own user.'));
  return element('details', {id: 'add-server', on: {toggle: event => { if (event.target.open) find('#server-name').focus(); }}}, element('summary', {}, t('Add an MCP server')), refused, made);
}
