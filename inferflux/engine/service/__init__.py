"""The engine in a process of its own: frames over a socket pair, the child's loop, and the client with its restarts."""
