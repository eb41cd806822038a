// The conversation: turns, each a question as it was typed and the parts of its answer, drawn from differences.

import {copy, element, find, html, icon, iconButton} from './dom.js';
import {dressCode} from './code.js';
import {ask, showMore, tell} from './server.js';
import {count, explain, languageOf, say, t} from './words.js';

const NEAR = 80;  // pixels from the end at which the page goes along with an answer that grows
const turns = new Map();  // id -> {element, meta, parts}
let state = null, earlier = 0, endings = {}, printing = false;

export function setUp(shared) {
  state = shared;
  endings = {
    length: t('The answer was cut: the longest answer allowed, or the context, is used up.'),
    cancelled: t('Stopped.'),
    tool_rounds: t('Stopped: the model kept calling tools.'),
  };
  find('#earlier').addEventListener('click', () => showMore(turns.size + 30));
  find('#to-end').addEventListener('click', toEnd);
  find('#thread').addEventListener('scroll', offerEnd, {passive: true});
  for (const example of [t('What is 37 * 24?'), t('What time is it in Tokyo?')]) {
    const button = element('button', {type: 'button', class: 'plain'}, example);
    button.addEventListener('click', () => state.send(example));
    find('#examples').append(button);
  }
}

/** Nothing is shown until the chat's first message comes. */
export function clear() {
  for (const turn of turns.values()) turn.element.remove();
  turns.clear();
  for (const id of ['greeting', 'asking', 'full', 'earlier', 'to-end']) find('#' + id).hidden = true;
  showAsking(null);
}

/** A message of the server's about the chat that is shown. */
export function draw(message) {
  const stays = isAtEnd(), held = focusedButton();
  const before = message.order && turns.size ? firstVisible() : null;
  if (message.order) arrange(message);
  for (const delta of message.turns) drawTurn(delta);
  if (message.order) for (const id of message.order) find('#turns').append(turns.get(id).element);
  showAsking(message.asking);
  showFull();
  if (before && before.element.isConnected) find('#thread').scrollTop += before.element.getBoundingClientRect().top - before.top;
  if (stays) toEnd();
  offerEnd();
  if (held && !held.button.isConnected) focusAgain(held);
  if (printing && !earlier) {
    printing = false;
    setTimeout(() => print(), 50);
  }
}

/** Which button of which place in the conversation has the focus: it is drawn anew when the turn is. */
function focusedButton() {
  const button = document.activeElement, turn = button?.closest('#turns > .turn');
  return turn && {button, place: [...find('#turns').children].indexOf(turn)};
}

/** The same button, for the other version where there is none on this side; else the message. */
function focusAgain({button, place}) {
  const buttons = [...find('#turns').children[place]?.querySelectorAll('button:not(:disabled)') ?? []];
  const same = buttons.find(one => one.ariaLabel === button.ariaLabel);
  const other = button.closest('.versions') && buttons.find(one => one.closest('.versions'));
  (same ?? other)?.focus();
  if (!same && !other) state.write();
}

export const lastTurn = () => [...turns.values()].at(-1);

/** Prints all of the chat, not only what is drawn. */
export function printAll() {
  if (!earlier) return print();
  printing = true;
  showMore(turns.size + earlier);
}

function arrange(message) {
  const stay = new Set(message.order);
  for (const [id, turn] of turns) {
    if (stay.has(id)) continue;
    turn.element.remove();
    turns.delete(id);
  }
  for (const id of message.order) if (!turns.has(id)) turns.set(id, newTurn(id));
  // in the order shown
  for (const id of message.order) {
    const turn = turns.get(id);
    turns.delete(id);
    turns.set(id, turn);
  }
  earlier = message.earlier;
  find('#earlier').hidden = !earlier;
  find('#earlier').textContent = t('Show earlier ({count})', {count: count(earlier)});
  find('#greeting').hidden = message.order.length > 0;
}

function newTurn(id) {
  const parts = element('div', {class: 'parts'}), question = element('div', {class: 'question'});
  const foot = element('div', {class: 'foot'});
  return {id, parts: [], meta: {}, question, partsElement: parts, foot, element: element('article', {class: 'turn', 'data-turn': id}, question, parts, foot)};
}

function drawTurn(delta) {
  const turn = turns.get(delta.id);
  if (!turn) return;
  for (const change of delta.changes ?? []) drawPart(turn, change);
  if (!delta.meta) return;
  const wasUser = JSON.stringify([turn.meta.user, turn.meta.files, turn.meta.dropped]);
  turn.meta = delta.meta;
  if (wasUser !== JSON.stringify([delta.meta.user, delta.meta.files, delta.meta.dropped])) drawQuestion(turn);
  drawFoot(turn);
  turn.element.classList.toggle('dropped', delta.meta.dropped);
}

// A turn's question and what can be done with it

function drawQuestion(turn) {
  const {user, files, dropped} = turn.meta;
  const chips = files.map(file => element('li', {class: 'chip'}, state.nameOf(file)));
  turn.question.replaceChildren(
    dropped ? element('p', {class: 'note'}, t('The model no longer reads this: its context was full.')) : '',
    element('div', {class: 'said', dir: 'auto', lang: languageOf(user)}, user),
    chips.length ? element('ul', {class: 'chips'}, ...chips) : '',
    element('div', {class: 'tools'},
      iconButton('copy', t('Copy message'), event => copyPart(turn, 'user', event.currentTarget)),
      iconButton('edit', t('Edit'), () => state.edit(turn)),
      iconButton('delete', t('Delete turn'), () => {
        if (confirm(t('Delete this turn? It cannot be brought back.'))) tell(turnPath(turn), undefined, 'DELETE');
      })),
  );
}

const turnPath = (turn, act = '') => `/chats/${state.chat}/turns/${turn.id}${act}`;

function copyPart(turn, which, button) {
  copy(ask(turnPath(turn), undefined, 'GET').then(said => said[which]), button).catch(problem => state.toast(problem.message));
}

// Below an answer: what ended it, and what can be done with it

function drawFoot(turn) {
  const {under_way, error, ending, counts, versions, cut, dropped} = turn.meta;
  turn.foot.replaceChildren();
  if (under_way) return;
  if (error) turn.foot.append(element('p', {class: 'note problem'}, explain(error)));
  else if (endings[ending]) turn.foot.append(element('p', {class: 'note'}, endings[ending]));
  const tools = element('div', {class: 'tools'});
  if (turn.parts.length) tools.append(iconButton('copy', t('Copy answer'), event => copyPart(turn, 'answer', event.currentTarget)));
  tools.append(iconButton('again', t('Regenerate'), () => tell(turnPath(turn, '/regenerate'))));
  if (cut && turn === lastTurn()) {
    const resume = element('button', {type: 'button', class: 'plain resume'}, icon('resume'), t('Continue'));
    resume.addEventListener('click', () => tell(turnPath(turn, '/resume')));
    tools.append(resume);
  }
  tools.append(iconButton('branch', t('New chat from here'), async () => {
    const made = await tell(turnPath(turn, '/branch'));
    if (made) state.open(made.id);
  }));
  if (versions.length > 1) tools.append(versionButtons(turn, versions));
  if (counts) tools.append(element('span', {class: 'counts'}, countsOf(counts)));
  turn.foot.append(tools);
}

function versionButtons(turn, versions) {
  const place = versions.indexOf(turn.id);
  const to = (step, name, label) => iconButton(name, label, () => tell(`/chats/${state.chat}/turns/${versions[place + step]}/show`), {disabled: !versions[place + step]});
  return element('span', {class: 'versions'}, to(-1, 'left', t('Earlier version')), `${place + 1}/${versions.length}`, to(1, 'right', t('Later version')));
}

const countsOf = counts => t('{count} tokens, {speed}/s', {count: count(counts.new_tokens), speed: counts.tokens_per_s.toFixed(1)});

// The parts of an answer

function drawPart(turn, change) {
  let part = turn.parts[change.part];
  if (change.gone || (part && part.head.kind !== change.head.kind)) {
    part?.element.remove();
    if (change.gone) return void (turn.parts.length = Math.min(turn.parts.length, change.part));
    part = undefined;
  }
  const isNew = !part;
  part ??= turn.parts[change.part] = newPart(change.head.kind);
  part.head = change.head;
  part.blocks.splice(change.from, Infinity, ...change.blocks);
  if (isNew) {
    const next = turn.partsElement.children[change.part];
    turn.partsElement.insertBefore(part.element, next ?? null);
  }
  if (part.head.kind === 'call') drawCall(part, change);
  else {
    replaceFrom(part.body, change.from, change.blocks);
    if (part.head.kind === 'thinking') drawThought(part);
  }
}

function newPart(kind) {
  const body = element('div', {class: 'text'}), part = {blocks: [], head: {kind}, body};
  if (kind === 'text') return {...part, element: body};
  const summary = element('summary');
  return {...part, summary, element: element('details', {class: kind}, summary, body)};
}

function replaceFrom(body, from, blocks) {
  while (body.children.length > from) body.lastElementChild.remove();
  for (const block of blocks) {
    const made = html(block);
    dressCode(made);
    body.append(made);
  }
}

const lasted = seconds => seconds == null ? '' : ' · ' + t('{seconds} s', {seconds: Math.max(seconds, 0.01).toFixed(seconds < 10 ? 2 : 0)});

function drawThought(part) {
  const open = part.head.open;
  if (part.wasOpen !== open) part.element.open = open;
  part.wasOpen = open;
  part.summary.textContent = (open ? t('Thinking') : t('Thought')) + lasted(part.head.seconds);
}

function drawCall(part, change) {
  const {name, failed, not_run, seconds, written} = part.head;
  if (part.wasWritten !== written) part.element.open = written;
  part.wasWritten = written;
  const results = change.results ?? 0, given = part.blocks.length - results;
  part.body.replaceChildren();
  replaceFrom(part.body, 0, part.blocks);
  if (results) part.body.children[given].before(element('p', {class: 'label'}, failed ? t('Error') : t('Result')));
  if (not_run) part.body.append(element('p', {class: 'label'}, t('It was not run.')));
  const [first = '', ...more] = results ? part.body.lastElementChild.querySelector('code').textContent.trim().replace(/^Error: /, '').split('\n') : [];
  const said = first.length > 60 ? first.slice(0, 59) + '…' : more.length ? first + ' …' : first;
  part.summary.replaceChildren(
    element('strong', {}, failed ? t('{name} failed', {name}) : name),
    said ? ` → ${said}` : '', lasted(seconds));
}

// A call that waits for the user's word

function showAsking(asking) {
  const card = find('#asking');
  if (!asking) {
    if (card.contains(document.activeElement)) state.write();
    card.hidden = true;
    card.dataset.id = '';
    return card.replaceChildren();
  }
  if (card.dataset.id === asking.id) return;
  card.dataset.id = asking.id;
  const shownAt = performance.now();
  const decide = decision => {
    if (performance.now() - shownAt < 400) return;  // a key that was meant for something else
    tell(`/chats/${state.chat}/decide`, {asked: asking.id, decision});
  };
  const button = (label, decision, key, kind) => element('button', {type: 'button', class: kind, 'data-decision': decision, 'aria-keyshortcuts': key, on: {click: () => decide(decision)}}, label);
  const blocks = element('div', {class: 'text'});
  replaceFrom(blocks, 0, asking.blocks);
  const question = asking.from ? t('Run {name} of {origin}?', {name: asking.name, origin: say(asking.from)}) : t('Run {name}?', asking);
  const approve = button(t('Approve'), 'approve', 'Enter', 'main');
  card.replaceChildren(...[
    element('h2', {}, question), asking.caution ? element('p', {class: 'note'}, explain(asking.caution)) : '', blocks,
    element('div', {class: 'buttons'}, approve, button(t('Always for this chat'), 'always', 'A', 'plain'), button(t('Deny'), 'deny', 'D', 'plain')),
    element('p', {class: 'hint'}, t('Enter approves, A always, D denies')),
  ].filter(Boolean));
  card.onkeydown = event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === 'a' || event.key === 'A') decide('always');
    if (event.key === 'd' || event.key === 'D') decide('deny');
  };
  card.setAttribute('aria-label', question);
  card.hidden = false;
  const busy = document.activeElement === find('#message') && find('#message').value;
  if (!busy && !document.querySelector('dialog[open]')) approve.focus();
}

/** Offers to go on without the oldest turns where the context was full. */
function showFull() {
  const card = find('#full'), last = lastTurn(), full = Boolean(last?.meta.full && !last.meta.under_way);
  if (card.hidden === !full) return;
  card.hidden = !full;
  card.replaceChildren();
  if (!full) return;
  const drop = element('button', {type: 'button', class: 'main', on: {click: () => tell(`/chats/${state.chat}/drop_oldest`)}}, t('Drop the oldest turns and answer'));
  card.append(element('h2', {}, t("This chat no longer fits the model's context.")), element('div', {class: 'buttons'}, drop));
}

// Where the page stands

const isAtEnd = () => {
  const thread = find('#thread');
  return thread.scrollHeight - thread.scrollTop - thread.clientHeight < NEAR;
};

export function toEnd() {
  const thread = find('#thread');
  thread.scrollTop = thread.scrollHeight;
}

const offerEnd = () => { find('#to-end').hidden = isAtEnd(); };

function firstVisible() {
  const top = find('#thread').getBoundingClientRect().top;
  for (const {element} of turns.values()) {
    const box = element.getBoundingClientRect();
    if (box.bottom > top) return {element, top: box.top};
  }
  return null;
}
