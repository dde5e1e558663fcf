"""The served models: one Backend per engine, one BackendManager for all of them."""

from inferflux.server.backends.backend import Backend as Backend
from inferflux.server.backends.backend import BackendState as BackendState
from inferflux.server.backends.backend import MakeClient as MakeClient
from inferflux.server.backends.manager import BackendManager as BackendManager
