"""HTTP: routes, middleware and handlers. All other parts of the server know no HTTP."""
