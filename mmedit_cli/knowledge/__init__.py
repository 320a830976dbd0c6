"""Knowledge editing: what a vision-language model answers, changed and measured."""
