"""What the commands do in the domain of knowledge: evaluate, train, edit, ask, export."""
