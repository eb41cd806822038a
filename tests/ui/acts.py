"""What a user does on the page."""

from __future__ import annotations

from typing import Any


def given(name: str, content: bytes) -> dict[str, Any]:
    """A file for `set_input_files`."""
    return {"name": name, "mimeType": "", "buffer": content}


def ask(page: Any, text: str) -> None:
    """Sends a message; returns when it stands in the chat."""
    last = "([...document.querySelectorAll('.turn')].at(-1)?.dataset.turn ?? null)"
    before = page.evaluate(last)
    page.fill("#message", text)
    page.press("#message", "Enter")
    page.wait_for_function(f"before => {last} !== before", arg=before)


def wait_for_end(page: Any) -> None:
    """The stop button is gone."""
    page.wait_for_selector("#stop", state="hidden")


def shown(page: Any) -> str:
    """The conversation as it is drawn."""
    return str(page.inner_text("#turns"))


def start_long_answer(page: Any) -> None:
    """Of a model that says "word" for long."""
    ask(page, "Write for long")
    page.wait_for_selector("text=word word word")


def delete_chat(page: Any, title: str) -> None:
    """With the menu of the list; what asks whether one is sure is to be accepted."""
    page.get_by_label(f"More about {title}").click()
    page.get_by_role("menuitem", name="Delete").click()
