.PHONY: test slow mutants quality style docs

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
