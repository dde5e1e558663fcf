"""`inferctl admin`: one module per area, each a table of actions; `areas` puts them together."""
