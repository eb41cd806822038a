"""Research with sources: search, click, open, finish, and the report that cites what was read.

source.py     what a source is             browser.py     the four tools over any number of them
folder.py     the user's files             index.py       their text, found by SQLite's FTS5
web.py        SearXNG, and pages           fetching.py    from which addresses anything may be fetched, and how much
mcp.py        MCP servers that search      documents.py   files and pages -> text
loop.py       a model does research        report.py      citations become links

    research = Research.load("zai-org/GLM-Z1-Rumination-32B-0414", docs=["notes"], search="http://127.0.0.1:8888")
    for event in research.run("How do tides form?"): ...
    print(research.report.markdown())
"""
