"""What the commands do in the domain of picture editing: edit, train, evaluate."""
