"""Grammars: what an answer must look like, and which tokens may come next. Over llguidance; no torch, no HTTP.

`vocabulary` is a tokenizer as llguidance sees it, `grammar` the kinds a caller can ask for, `compiling` turns one into
a matcher within limits, `grammars` keeps compiled ones for an engine, `row` is one request's place in its grammar,
`tool_calls` writes the grammars of forced calls.
"""
