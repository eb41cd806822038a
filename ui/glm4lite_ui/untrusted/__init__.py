"""Other programs' exports of chats, read in a process of their own (glm4lite/untrusted).

archives.py    an export -> chats in our own form         messages.py    its messages -> a tree of turns
"""
