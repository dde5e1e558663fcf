"""What an answer's text says: reasoning, content and tool calls, told apart as the text comes.

Each reader's joined output is the same however the text is cut into pieces: that is what makes a stream put back
together equal the whole answer. Knows characters; no tokens, no HTTP.
"""
