// What the page asks of the server, and the stream of what the server tells this window.

import {find, toast} from './dom.js';
import {explain, language, t} from './words.js';

const hex = bytes => Array.from(crypto.getRandomValues(new Uint8Array(bytes)), byte => byte.toString(16).padStart(2, '0')).join('');
export const newId = () => hex(8);
const WINDOW = hex(8);

/** Asks; throws an Error whose message is what the user can be told. With `keepalive` it is sent though the page is left. */
export async function ask(path, body, method = 'POST', keepalive = false) {
  const request = {method, keepalive, headers: {}};
  if (body instanceof Blob) request.body = body;
  else if (body !== undefined) {
    request.body = JSON.stringify(body);
    request.headers['Content-Type'] = 'application/json';
  }
  let answer;
  try {
    answer = await fetch('/page' + path, request);
  } catch {
    throw new Error(t('The server cannot be reached.'));
  }
  const said = await answer.json().catch(() => null);
  if (!answer.ok) throw refusal(said?.error, answer.status);
  return said;
}

/** The server's reason as an Error; `about` is the name of the field that it speaks of. */
function refusal(reason, status) {
  const sentence = reason?.said ? reason : {said: reason?.message ?? `${status}`};
  return Object.assign(new Error(explain(sentence)), {about: sentence.values?.name});
}

/** As `ask`; a problem is shown, and undefined returned. */
export async function tell(path, body, method) {
  try {
    return await ask(path, body, method) ?? true;
  } catch (problem) {
    toast(problem.message);
    return undefined;
  }
}

/** Where a chat, or `all` of them, comes as a file. */
export const exportOf = (chat, kind) => `/export/${chat}.${kind}?language=${language}`;

let shown = {chat: '', visit: 0, turns: 0};

/** Which chat this window shows now. What comes for another one, or for an earlier visit, is dropped. */
export function show(chat, turns = 0) {
  shown = {chat, visit: shown.visit + 1, turns};
  ask('/show', {window: WINDOW, ...shown}).catch(() => undefined);  // a lost server is told again when it is back
}

/** More turns of the same chat. */
export function showMore(turns) {
  shown.turns = turns;
  ask('/show', {window: WINDOW, ...shown}).catch(() => undefined);
}

/** Listens for ever; `hear` gets each message that is for what this window shows. */
export function listen(hear) {
  const source = new EventSource('/page/events?window=' + WINDOW);
  let again = null;
  source.onmessage = event => {
    const message = JSON.parse(event.data);
    if (message.type === 'hello') {
      find('#lost').hidden = true;
      show(shown.chat, shown.turns);
    } else if (message.type !== 'chat' || (message.chat === shown.chat && message.visit === shown.visit)) {
      hear(message);
    }
    if (message.type === 'chat') afterDrawing(() => acknowledge(message.number));
  };
  source.onerror = () => {
    find('#lost').hidden = false;
    source.close();
    again ??= setTimeout(() => listen(hear), 700);
  };
}

const afterDrawing = then => document.hidden ? setTimeout(then) : requestAnimationFrame(() => setTimeout(then));

const acknowledge = number =>
  fetch(`/page/ack?window=${WINDOW}&number=${number}`, {method: 'POST'}).catch(() => undefined);
