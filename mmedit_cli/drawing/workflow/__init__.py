"""What the commands do in the domain of drawing: learn, draw, evaluate."""
