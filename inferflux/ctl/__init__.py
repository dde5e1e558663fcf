"""`inferctl`: talks to a server over HTTP, for people and for scripts. Knows nothing of the server's insides."""

from inferflux.ctl.main import main as main
