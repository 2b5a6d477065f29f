"""Datasets: each module makes rows with `prompt` and `answer`; nothing is imported or downloaded here."""
