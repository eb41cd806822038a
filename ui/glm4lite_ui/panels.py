"""Small pieces of HTML beside the conversation: the list of chats, the live line, questions. All text is escaped."""

from __future__ import annotations

import time
from collections.abc import Sequence

from glm4lite.weights.memory import readable
from glm4lite_ui.answering import Answer, Asking
from glm4lite_ui.chats import Chat, Turn
from glm4lite_ui.markup import code_block, literal, text_html
from glm4lite_ui.runtime import Runtime

EXPORTS = {"md": "Markdown", "json": "JSON"}

CHAT_LIST_JS = """
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-chat]');
  if (!button) return;
  const chat = button.dataset.chat;
  if (button.dataset.act === 'open') {
    trigger('open', {chat: chat});
    if (innerWidth < 768) document.querySelector('#library .toggle-button')?.click();
  }
  else if (confirm('Delete this chat? It cannot be brought back.')) trigger('remove', {chat: chat});
});
// The address names the open chat, also where a search hides it, so that reloading the page comes back to it.
watch('value', () => {
  const address = new URL(location), open = element.querySelector('[data-current]')?.dataset.current;
  if (open) address.searchParams.set('chat', open);
  history.replaceState(null, '', address);
});
"""

# A button under each question deletes its turn; Gradio's Chatbot has none. It draws messages anew, so they are watched.
TURNS_JS = """
const mark = () => document.querySelectorAll('#chatbot .message-buttons-right').forEach((row, turn) => {
  const buttons = row.querySelector('.icon-button-wrapper');
  let button = buttons?.querySelector('.g-delete');
  if (!buttons) return;
  if (!button) {
    button = buttons.querySelector('button').cloneNode(false);
    button.classList.add('g-delete');
    button.title = button.ariaLabel = 'Delete turn';
    button.textContent = '×';
    button.addEventListener('click', () => trigger('mark', {turn: Number(button.dataset.turn)}));
    buttons.append(button);
  }
  if (button.dataset.turn !== String(turn)) button.dataset.turn = turn;
});
new MutationObserver(mark).observe(element.closest('#chat-column') ?? document.body, {childList: true, subtree: true});
mark();
"""

# What is copied or edited is what was said, not how it is written for the page (markup.with_original). Gradio draws an
# edited message itself before the server has seen it, so it is given one of which no sign means anything.
ORIGINAL_JS = """
const shown = /\\[\ufdd4\\]: #(\\S*)\\n\\n[^\ufdd5]*\\[\ufdd5\\]: #/g;
const said = (_, data) => new TextDecoder().decode(Uint8Array.from(atob(data), sign => sign.charCodeAt(0)));
const set = (box, text) => {
  box.value = text;
  box.dispatchEvent(new Event('input', {bubbles: true}));
};
const clipboard = navigator.clipboard, write = clipboard?.writeText.bind(clipboard);
if (clipboard) clipboard.writeText = text => write(text.replace(shown, said));
new MutationObserver(() => requestAnimationFrame(() => {
  for (const box of document.querySelectorAll('#chatbot textarea')) {
    const text = box.value.replace(shown, said);
    if (text === box.value) continue;
    set(box, text);
  }
})).observe(document.querySelector('#chatbot'), {childList: true, subtree: true});
document.addEventListener('click', event => {
  if (!event.target.closest('#chatbot button[aria-label=Submit]')) return;
  for (const box of document.querySelectorAll('#chatbot textarea')) {
    const bytes = Array.from(new TextEncoder().encode(box.value), byte => String.fromCharCode(byte));
    const literal = box.value.replace(/[!-/:-@[-`{-~]/g, sign => `&#${sign.charCodeAt()};`);
    set(box, `[﷔]: #${btoa(bytes.join(''))}\n\n${literal}\n\n[﷕]: #`);
  }
}, true);
"""

# The list is open where there is room beside it; both panels' buttons have a name; Escape stops the answer.
PAGE_JS = (
    "() => {"
    + ORIGINAL_JS
    + """
  for (const [panel, name] of [['library', 'Chats'], ['settings', 'Settings of this chat']]) {
    const button = document.querySelector(`#${panel} .toggle-button`);
    if (button) button.title = button.ariaLabel = name;
  }
  if (innerWidth >= 768) document.querySelector('#library .toggle-button')?.click();
  document.addEventListener('keydown', event => {
    if (event.key === 'Escape' && !event.isComposing) document.querySelector('#message .stop-button')?.click();
  });
}
"""
)


def chat_list(chats: Sequence[Chat], current: str, searched: bool = False) -> str:
    """A button per chat, the open one marked, each with one that deletes it."""
    named = f'data-current="{text_html(current)}"'
    if not chats:
        return f'<p class="g-empty" {named}>{"No chat matches." if searched else "No chats yet."}</p>'
    return f'<ul class="g-chats" {named}>{"".join(_chat_row(chat, chat.id == current) for chat in chats)}</ul>'


def _chat_row(chat: Chat, current: bool) -> str:
    title, when = text_html(chat.title), time.strftime("%d %b %Y, %H:%M", time.localtime(chat.updated))
    mark = ' aria-current="true"' if current else ""
    target = f'data-chat="{chat.id}"'
    return (
        f'<li><button class="g-open" data-act="open" {target} title="{title}, {when}"{mark}>{title}</button>'
        f'<button class="g-remove" data-act="remove" {target} aria-label="Delete {title}">×</button></li>'
    )


def live_line(runtime: Runtime, chat: Chat, answer: Answer | None = None) -> str:
    """Speed, prompt tokens (reused and new), context used of total, the model, memory of weights and of the cache."""
    turn = chat.turns[-1] if chat.turns else None
    pieces = _under_way(answer) if answer is not None else _finished(turn)
    if (counts := turn.counts if turn else None) is not None:
        used, context = counts.prompt_tokens + counts.new_tokens, runtime.engine.model.context
        pieces.append(f"context {used:,} of {context:,}")
    pieces.append(runtime.name)
    memory = f"weights {readable(runtime.weight_bytes())}"
    if cache := runtime.engine.prefixes.nbytes:
        memory += f" · KV {readable(cache)}"
    pieces.append(memory)
    return "".join(f"<span>{text_html(piece)}</span>" for piece in pieces)


def _under_way(answer: Answer) -> list[str]:
    seconds = time.monotonic() - answer.started
    writer = answer.writer
    if answer.asking is not None:
        return ["waiting for you"]
    if writer.progress is not None:
        return [f"{writer.progress.stage} {writer.progress.done:,} of {writer.progress.total:,} {writer.progress.unit}"]
    if writer.pieces < 2:
        return [f"reading, {seconds:.1f} s"]
    return [f"{(writer.pieces - 1) / max(time.monotonic() - writer.first_piece, 1e-3):.1f} tokens/s"]


def _finished(turn: Turn | None) -> list[str]:
    if turn is None or not turn.counts:
        return []
    counts = turn.counts
    prompt, new = counts.prompt_tokens, counts.prefilled_tokens
    reused = max(prompt - new, 0)
    return [
        f"{counts.new_tokens:,} tokens at {counts.tokens_per_s:.1f}/s",
        f"prompt {prompt:,}: {reused:,} reused, {new:,} computed",
    ]


def question_about(asking: Asking | None) -> str:
    """Markdown: which call waits for the user's word."""
    if asking is None:
        return ""
    origin = f" of {literal(asking.tool.origin)}" if asking.tool.origin else ""
    caution = f"\n\n{literal(asking.tool.caution)}" if asking.tool.caution else ""
    return f"**Run {literal(asking.call.name)}{origin}?**\n\n{code_block(asking.call.arguments, 'json')}{caution}"


def context_full(chat: Chat) -> str:
    """Markdown: what is offered when a chat no longer fits."""
    error = chat.turns[-1].error if chat.turns else None
    return f"**This chat no longer fits the model's context.** {literal(error or '')}"


def export_links(chat: Chat) -> str:
    """Downloads of the chat as it is saved."""
    links = (f'<a href="export/{chat.id}.{kind}" download>{name}</a>' for kind, name in EXPORTS.items())
    return f'<p class="g-export">Export: {" · ".join(links)}</p>'
