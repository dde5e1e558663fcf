"""One module per group of routes: a checked body in, a response out."""
