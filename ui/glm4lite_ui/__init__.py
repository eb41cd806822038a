"""The web page: `glm4lite ui`. It draws the events of a conversation and keeps chats on disk.

chats.py       what a chat is: a tree of turns                     layout.py     the page: Blocks of its own parts
history.py     a saved chat -> the messages the model reads        static/       what they are made of, and the script
answering.py   one answer: events in, a growing turn out           routes.py     what the page asks of the server
runtime.py     the loaded model, its sessions, answers under way   windows.py    what each window is told
toolset.py     the tools by place, and which ask                   tool_routes.py what the page asks about tools
servers.py     MCP servers that are added on the page              here.py       who asks: this machine's user?
attachments.py a file -> text                                      thread.py     a turn -> JSON, and its differences
saved/         chats, presets, servers, trust; importing           markdown.py   Markdown -> blocks of safe HTML
transfer.py    chats out of the page and into it                   formulas.py   the Markdown that is read
export.py      a chat as Markdown and JSON                         artifacts.py  HTML and SVG in a sandboxed frame
markup.py      any text -> Markdown, HTML that draw nothing        models.py     what is loaded; loading.py another one
serving.py     the page on a FastAPI app, closed to strangers      command.py    `glm4lite ui`
"""
