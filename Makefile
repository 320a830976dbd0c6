.PHONY: test slow mutants quality style

test:
	python -m pytest -n 2

slow:
	python -m pytest -n 2 -m slow

mutants:
	python scripts/mutants.py

quality:
	ruff check .
	ruff format --check .
	mypy

style:
	ruff check --fix .
	ruff format .
