"""The HTTP server: who may call, what may be said, which models serve, and the way of a request from text to answer."""
