"""Measure a model on held-out questions and show what training changed. Heavy imports wait for a call."""

from .evaluate import EvaluatedCompletion, Evaluation, evaluate
from .page import render_page
from .report import model_card_sections, write_report


__all__ = ["EvaluatedCompletion", "Evaluation", "evaluate", "model_card_sections", "render_page", "write_report"]
