"""Picture editing: pictures changed by instruction."""
