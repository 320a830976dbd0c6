.PHONY: test slow mutants quality style docs notebooks

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

# into site/; a broken link fails
docs:
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict

# the tutorials, into notebooks/
notebooks:
	python scripts/notebooks.py
