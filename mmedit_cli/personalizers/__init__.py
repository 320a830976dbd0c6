"""Personalizers: they teach a text-to-image model something of one's own; one method a file."""
