"""Files and pages of strangers become text, in a process of their own with limits of memory and time.

apart.py       starts that process, reads its lines, ends it in time
process.py     what runs there: walls, a reader
documents.py   PDF, Word, notebooks, HTML, text files -> text

A PDF or a page of some kilobytes can take any amount of memory or time, in a library as in code of one's own; what it
does then, it does there. Where the system allows, that process can also open no files and no connections.
"""
