"""Rendering chat templates, which are code from strangers, in a process with limits."""
