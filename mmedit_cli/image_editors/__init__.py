"""Image editors: ways to change a picture as an instruction says; a method a file, named like the editor."""
