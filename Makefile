.PHONY: test slow quality style

test:
	python -m pytest -n 2

slow:
	python -m pytest -m slow

quality:
	ruff check .
	ruff format --check .
	mypy

style:
	ruff check --fix .
	ruff format .
