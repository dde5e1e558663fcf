"""The API's request and response bodies, as msgspec structs, and how a request's body is read into one."""
