"""The `jaxinfer` command; the only place where flags live."""
