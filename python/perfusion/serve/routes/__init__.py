"""The routes, one module per API. docs/server.md is their contract."""
