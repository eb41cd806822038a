"""The web page: `glm4lite ui`. It draws the events of a conversation and keeps chats on disk.

chats.py      what a chat is: a tree of turns                     render.py    a chat -> what Gradio's Chatbot shows
history.py    a saved chat -> the messages the model reads        panels.py    the live line, the list, the model page
answering.py  one answer: events in, a growing turn out           artifacts.py HTML and SVG in a sandboxed frame
runtime.py    the loaded model, its sessions, answers under way   export.py    a chat as Markdown and JSON
layout.py     what is on the page                                 app.py       what happens on a click
markup.py     any text -> Markdown, HTML that draw nothing    formulas.py   how the page reads Markdown
attachments.py a file -> text; untrusted/ reads it                saved/       the folder of chats, presets, importing
transfer.py   chats out of the page and into it                   library.py   what happens to a chat as a whole
serving.py    the page on a FastAPI app, closed to strangers      command.py   `glm4lite ui`
"""
